"""Every pytree of moejax, with its shapes. Read this file first.

    L  layers with experts      E  experts per layer      K  experts chosen per token
    A  attention layers         S  slots in the pool      R  elements of an expert record
    B  sequences                T  tokens per sequence    N  = B * T, tokens of one step
    D  model width              F  expert width           V  vocabulary
    C  positions in the KV cache

An expert's id is `layer * E + expert`. Weights and keys are stored as unsigned bits (u16 for
bfloat16): XLA's CPU backend then updates one row in place instead of copying the whole buffer.
So are the dense weights that are stacked over layers: it then converts the layer at hand to f32
instead of the whole stack before the loop.
"""

import dataclasses
import inspect
from typing import Any

import jax

from moejax.layout import RecordLayout


def pytree(cls: type) -> type:
    """Frozen, keyword-only dataclass registered as a pytree; `static` fields are metadata.

    The type's name is one of them: JAX compares dataclass nodes by metadata and children alone
    (0.10.2, 0.12.0), so that `jit` could run the program of another policy of the same shape.
    """
    cls.__annotations__ = {**inspect.get_annotations(cls), "node_type": str}
    cls.node_type = static(default=f"{cls.__module__}.{cls.__qualname__}", repr=False)
    return jax.tree_util.register_dataclass(dataclasses.dataclass(frozen=True, kw_only=True)(cls))


def static(**kwargs: Any) -> Any:
    """A field that is part of the pytree's structure: changing it recompiles."""
    return dataclasses.field(metadata={"static": True}, **kwargs)


def array_fields(cls: type) -> list[str]:
    """Names of the fields of a pytree that are not static."""
    return [f.name for f in dataclasses.fields(cls) if not f.metadata.get("static")]


@pytree
class LowBits:
    """Copies of all experts in fewer bits, in fast memory: for routers that fall back on them."""

    records: jax.Array  # [L * E, R'] bits
    layout: RecordLayout = static()


@pytree
class HostRecords:
    """The store's records as the host computes from them while the program runs on a GPU."""

    handle: jax.Array  # [] i32, of `kernels.host.Records`
    way: str = static()  # one of `kernels.host.WAYS`


@pytree
class ExpertStore:
    """The full set of experts, on the host or behind a link; never changes."""

    records: jax.Array | None  # [L * E, R] bits; None = only to be had over the link
    link: jax.Array | None = None  # [] i32, handle of a `kernels.transport.Store`; None = memory
    low: LowBits | None = None
    host: HostRecords | None = None  # None = the host's experts run on `records` where they lie
    layout: RecordLayout = static()

    @property
    def can_fail(self) -> bool:
        """Whether `StepTrace.failure` may be other than 0."""
        return self.link is not None or self.host is not None


@pytree
class Residency:
    """Which experts are in which slots: the only part of the cache that policies see."""

    slot_of: jax.Array  # [L * E] i32, -1 = absent
    owner: jax.Array  # [S] i32, expert id, -1 = empty
    home: jax.Array  # [S] i32, the one layer a slot serves, -1 = any (a global pool)


@pytree
class ExpertCache:
    """Expert slots on the device."""

    pool: jax.Array  # [S, R] bits; [0, R] = virtual: the tables decide, weights are read in place
    residency: Residency
    # [S] bool, slots whose record is still to be moved over the link; None without a link
    arriving: jax.Array | None = None


@pytree
class Forecast:
    """What was predicted and prefetched, until it turns out."""

    wanted: jax.Array  # [L * E] bool, predicted for a layer that has not run since: leaves last
    fresh: jax.Array  # [L * E] bool, prefetched and not used since


@pytree
class PolicyMemory:
    """What the parts of a policy remember from step to step, each as its `init` made it."""

    router: Any
    evictor: Any
    predictor: Any
    foresight: Any
    speculation: Any
    forecast: Forecast | None  # None for policies that never prefetch


@pytree
class KVCache:
    """Keys and values of grouped-query attention (G key-value heads of H channels)."""

    keys: jax.Array  # [A, B, C, G, H] bits
    values: jax.Array  # [A, B, C, G, H] bits


@pytree
class LatentKVCache:
    """Compressed keys and values of multi-head latent attention."""

    latent: jax.Array  # [A, B, C, kv_rank] bits
    rope_key: jax.Array  # [A, B, C, rope_dim] bits


@pytree
class DecodeState:
    """Everything that a step reads and replaces; donated to the step."""

    kv: KVCache | LatentKVCache
    experts: ExpertCache | None  # None for dense models
    policy: PolicyMemory | None  # None for dense models
    length: jax.Array  # [B] i32, tokens in the KV cache per sequence


@pytree
class StepTrace:
    """What one step did, per layer with experts. Counts are experts, not bytes."""

    picks: jax.Array  # [L, N, K] i32, chosen experts by rank, -1 where there was no token
    weights: jax.Array  # [L, N, K] f32, router weights as used
    needed: jax.Array  # [L] i32, distinct experts needed
    hits: jax.Array  # [L] i32, of those, resident when the layer began
    late: jax.Array  # [L] i32, of the hits, those whose record was still to come over a link
    fetched: jax.Array  # [L] i32, missing records copied into slots
    prefetched: jax.Array  # [L] i32, records copied ahead for a later layer, while in this one
    host: jax.Array  # [L] i32, experts computed on the host
    overdue: jax.Array  # [L] i32, of those `late`, computed there too: they took too long
    low: jax.Array  # [L] i32, experts computed from their low-bit copies
    passes: jax.Array  # [L] i32, passes over the slots
    stall: jax.Array  # [L] i32, microseconds waited for the link
    # [L] i32, 0, or why records did not arrive or the host not compute (`kernels.transport.Status`)
    failure: jax.Array
    exact_needed: jax.Array  # [L] i32, distinct experts that the model's own router picks
    exact_hits: jax.Array  # [L] i32, of those, resident when the layer began
    replaced: jax.Array  # [L] i32, picks of the model's own router that were not made
    replaced_mass: jax.Array  # [L] f32, router weight that its picks lost, summed over tokens
    predicted: jax.Array  # [L] i32, experts that had been predicted for the layer
    predicted_right: jax.Array  # [L] i32, of those, needed
    prefetch_used: jax.Array  # [L] i32, records copied ahead that were used here, the first time
    scores: jax.Array | None  # [L, N, E] f32, full router scores when recording them
    forecast: jax.Array | None  # [L, E] bool, what had been predicted, when recording scores
    # Likewise: what was resident when the layer began, what of it was used for the first time since
    # a prefetch brought it, and what ran on the host or from low-bit copies; the picks of the
    # model's own router.
    resident: jax.Array | None = None  # [L, E] bool
    fresh: jax.Array | None = None  # [L, E] bool
    hosted: jax.Array | None = None  # [L, E] bool
    lowered: jax.Array | None = None  # [L, E] bool
    exact: jax.Array | None = None  # [L, N, K] i32


@pytree
class StepOutput:
    """What a step returns beside the new state."""

    logits: jax.Array  # [B, V] f32 of the last token of each sequence, or [B, T, V]
    trace: StepTrace | None  # None for dense models
    # [A, N, D] f32, what follows each layer's attention, when asked for
    hidden: jax.Array | None = None
