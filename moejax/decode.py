"""The step: one jitted program for a whole token (or chunk), state donated."""

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moejax.config import ModelConfig
from moejax.errors import BudgetError, InputError, LinkError, PolicyError
from moejax.kernels.transport import Status
from moejax.layout import BITS
from moejax.models.layers import KV_BLOCK
from moejax.models.transformer import Decoder
from moejax.policies import residency as tables
from moejax.policies.policy import Policy
from moejax.state import (
    DecodeState,
    ExpertCache,
    ExpertStore,
    KVCache,
    LatentKVCache,
    StepOutput,
)

DEFAULT_CONTEXT = 4096
SHORT_CHUNK, LONG_CHUNK = 64, 512  # tokens per sequence of one prefill step
LONG_FROM = 256  # tokens left to be fed that make a long step worth its padding


def step(
    model: Decoder,
    policy: Policy | None,
    params: dict,
    store: ExpertStore | None,
    state: DecodeState,
    tokens: jax.Array,
    *,
    all_logits: bool = False,
    scores: bool = False,
    prefill: bool | None = None,
    hidden: str | None = None,
    chance: jax.Array | None = None,
) -> tuple[DecodeState, StepOutput]:
    """`decode_step` without jit, for use inside larger jitted programs.

    With `chance` [B] f32 it is a step of the policy's self-draft, see `Decoder.__call__`.
    """
    batch = state.length.shape[0]
    if tokens.ndim != 2 or tokens.shape[0] != batch or not tokens.size:
        raise InputError(f"tokens must be [{batch}, T] for this state, not {list(tokens.shape)}")
    how = {"all_logits": all_logits, "scores": scores, "prefill": prefill}
    how |= {"hidden": hidden, "chance": chance}
    return model.apply({"params": params}, policy, store, state, tokens, **how)


@functools.partial(
    jax.jit,
    static_argnames=("model", "all_logits", "scores", "prefill", "hidden"),
    donate_argnames=("state",),
)
def decode_step(
    model: Decoder,
    policy: Policy | None,
    params: dict,
    store: ExpertStore | None,
    state: DecodeState,
    tokens: jax.Array,
    *,
    all_logits: bool = False,
    scores: bool = False,
    prefill: bool | None = None,
    hidden: str | None = None,
) -> tuple[DecodeState, StepOutput]:
    """Process tokens [B, T] i32 and return the new state and the logits; donates `state`.

    One program serves every residency, position and policy number; it is traced once per shape of
    `tokens`. Sequences shorter than T are padded at the end with -1. Ids are not checked here; a
    sequence that outgrows the KV cache has NaN logits, and so have all when records of a link did
    not arrive (`check_arrived`).

    Args:
        model: the decoder (static).
        policy: how experts are chosen, kept and fetched; its numbers may change freely.
        all_logits: return [B, T, V] instead of the last token's [B, V].
        scores: keep the full router scores [L, N, E] in the trace.
        prefill: whether the tokens are a prompt's, which most lossy routers leave to the model's
            own; by default if T > 1.
        hidden: "raw" or "normed" returns what follows each layer's attention [A, B * T, D], too.
    """
    how = {"all_logits": all_logits, "scores": scores, "prefill": prefill, "hidden": hidden}
    return step(model, policy, params, store, state, tokens, **how)


def checked_context(config: ModelConfig, context: int | None) -> int:
    """Tokens per sequence to make room for; by default what the model was made for, at most 4096.

    Raises:
        InputError: not between 1 and the model's own limit.
    """
    if context is None:
        return min(config.max_positions, DEFAULT_CONTEXT)
    if not isinstance(context, int) or not 0 < context <= config.max_positions:
        raise InputError(f"context must be in [1, {config.max_positions}], not {context}")
    return context


def init_kv(config: ModelConfig, batch: int, context: int, dtype: str) -> KVCache | LatentKVCache:
    """Empty KV cache for `context` positions per sequence, rounded up to whole blocks."""
    capacity = math.ceil(context / KV_BLOCK) * KV_BLOCK
    lead, bits = (config.num_layers, batch, capacity), BITS[dtype]
    if config.latent:
        return LatentKVCache(
            latent=jnp.zeros((*lead, config.latent.kv_rank), bits),
            rope_key=jnp.zeros((*lead, config.latent.rope_dim), bits),
        )
    heads = (config.num_kv_heads, config.head_dim)
    return KVCache(keys=jnp.zeros((*lead, *heads), bits), values=jnp.zeros((*lead, *heads), bits))


def init_cache(
    config: ModelConfig,
    store: ExpertStore,
    slots: int,
    *,
    virtual: bool = False,
    per_layer: bool = False,
) -> ExpertCache:
    """Empty expert cache of `slots` slots; with room for all experts, full and read in place.

    Args:
        virtual: keep the tables only and read weights from the store (no copies are made).
        per_layer: divide the slots evenly among the layers instead of pooling them.

    Raises:
        BudgetError: fewer slots than one layer's top-k.
    """
    ids = config.num_moe_layers * config.num_experts
    least = config.top_k * (config.num_moe_layers if per_layer else 1)
    if slots < least:
        raise BudgetError(
            f"{slots} slots cannot hold the {least} experts needed at once"
            f"{' when every layer has slots of its own' * per_layer}; give at least {least}"
        )
    if virtual and store.records is None:
        raise BudgetError("weights behind a link cannot be read in place: leave `virtual` out")
    in_place = slots >= ids and store.link is None
    rows = 0 if virtual or in_place else min(slots, ids)
    layers = config.num_moe_layers if per_layer else 0
    return ExpertCache(
        pool=jnp.zeros((rows, store.layout.elements), store.layout.bits),
        residency=tables.full(ids)
        if in_place
        else tables.empty(ids, min(slots, ids), layers=layers),
        arriving=None if store.link is None else jnp.zeros(rows, bool),
    )


def init_state(
    model: Decoder,
    policy: Policy | None,
    store: ExpertStore | None,
    *,
    slots: int = 0,
    batch: int = 1,
    context: int = 2048,
    virtual: bool = False,
    per_layer: bool = False,
) -> DecodeState:
    """State before the first token of `batch` sequences of at most `context` tokens."""
    config = model.config
    cache = memory = None
    if config.num_moe_layers:
        if policy.low_bit and store.low is None:
            raise PolicyError(
                "this router runs low-bit copies of experts: give the policy to `load`, which "
                "makes them, or make them with moejax.low_bits"
            )
        if policy.placement.uses_host and store.host is None and _pinned(store):
            raise PolicyError(
                "this placement computes experts on the host, to which the records are not open: "
                "give the policy to `load`, or open them with moejax.devices.open_to_host"
            )
        if policy.placement.uses_host and store.records is None:
            raise PolicyError(
                "this placement computes experts on the host, where a disk has no copy of them: "
                "choose one that fetches, or load without a budget for host memory"
            )
        if policy.predictor.horizon >= max(config.num_moe_layers, 2):
            raise PolicyError(
                f"a prefetch {policy.predictor.horizon} layers ahead never comes: this model has "
                f"{config.num_moe_layers} layers with experts"
            )
        cache = init_cache(config, store, slots, virtual=virtual, per_layer=per_layer)
        # Copied: a state that holds one array twice cannot be donated.
        memory = jax.tree.map(jnp.copy, policy.init(config.num_moe_layers, config.num_experts))
    state = DecodeState(
        kv=init_kv(config, batch, context, model.dtype),
        experts=cache,
        policy=memory,
        length=jnp.zeros(batch, jnp.int32),
    )
    # Committed to its device like the state that a step returns: the second step would recompile.
    return jax.device_put(state, jax.devices()[0])


def _pinned(store: ExpertStore) -> bool:
    """Whether the records are in memory of the host that is not the program's own."""
    sharding = getattr(store.records, "sharding", None)
    return jax.default_backend() != "cpu" and getattr(sharding, "memory_kind", "") == "pinned_host"


def chunks(prompts: list[np.ndarray], size: int | None = None) -> Iterator[np.ndarray]:
    """Token chunks [B, T] i32 of prompts of unequal lengths, padded with -1.

    T is `size`, or one of two sizes: long ones read each expert less often, short ones pad less.
    """
    longest, start = max(len(p) for p in prompts), 0
    while start < longest:
        width = size or (LONG_CHUNK if longest - start >= LONG_FROM else SHORT_CHUNK)
        chunk = np.full((len(prompts), width), -1, np.int32)
        for row, prompt in zip(chunk, prompts, strict=True):
            part = prompt[start : start + width]
            row[: len(part)] = part
        yield chunk
        start += width


def prefill(
    model: Decoder,
    policy: Policy | None,
    params: dict,
    store: ExpertStore | None,
    state: DecodeState,
    prompts: list[np.ndarray],
    *,
    chunk: int | None = None,
) -> tuple[DecodeState, jax.Array, list]:
    """Feed prompts in chunks [B, chunk], of one or two sizes by default; donates `state`.

    Returns:
        The state, the logits [B, V] after each prompt's last token, and the traces of all chunks.

    Raises:
        InputError: an empty prompt, an id out of range, or a prompt that does not fit the KV cache.
        LinkError: expert records did not arrive.
    """
    prompts = [token_ids(p, model.config.vocab_size) for p in prompts]
    check_room(state, [len(p) for p in prompts])
    logits, traces = None, []
    done = 0
    for tokens in chunks(prompts, chunk):
        state, out = decode_step(model, policy, params, store, state, tokens)
        check_arrived(store, out)
        ended = np.array([done < len(p) <= done + tokens.shape[1] for p in prompts])
        logits = out.logits if logits is None else jnp.where(ended[:, None], out.logits, logits)
        traces.append(out.trace)
        done += tokens.shape[1]
    return state, logits, traces


def check_arrived(store: ExpertStore | None, out: StepOutput) -> None:
    """Raise LinkError if a step's records did not all arrive: its tokens were not taken in.

    So too if the host beside a GPU could not compute its experts.
    """
    if store is None or not store.can_fail:
        return
    failure = int(out.trace.failure.max())
    if failure:
        what = "did not arrive" if store.host is None else "could not be computed from"
        raise LinkError(f"expert records {what} ({Status(failure).name}); see last_error()")


def rewind(state: DecodeState, length: np.ndarray) -> DecodeState:
    """The state with only the first `length` [B] tokens of each sequence in its KV cache."""
    kept = jax.device_put(np.asarray(length, np.int32), state.length.sharding)
    return dataclasses.replace(state, length=kept)


def capacity(state: DecodeState) -> int:
    """C: positions that the KV cache holds per sequence."""
    return jax.tree.leaves(state.kv)[0].shape[2]


def token_ids(tokens: Any, vocab_size: int) -> np.ndarray:
    """Token ids [T] as i32; InputError for anything but whole numbers in [0, vocab_size)."""
    try:
        ids = np.asarray(tokens)
    except ValueError:
        raise InputError("token ids must be one flat list of integers") from None
    if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
        raise InputError(f"token ids must be one flat list of integers, not {ids.dtype}")
    if ids.size and not (0 <= ids.min() and ids.max() < vocab_size):
        raise InputError(f"token ids must be in [0, {vocab_size}), not {ids.min()} to {ids.max()}")
    return ids.astype(np.int32)


def check_room(
    state: DecodeState, prompts: list[int], extra: int = 0, *, context: int | None = None
) -> None:
    """Raise InputError unless prompts of these lengths plus `extra` tokens fit the context."""
    limit = min(capacity(state), context or capacity(state))
    if not prompts or min(prompts) < 1:
        raise InputError("a prompt is empty: give at least one token per sequence")
    lengths = np.asarray(state.length)
    if len(prompts) != len(lengths):
        raise InputError(f"{len(prompts)} prompts for a state of {len(lengths)} sequences")
    most = max(int(n) + p for n, p in zip(lengths, prompts, strict=True)) + extra
    if most > limit:
        raise InputError(
            f"{most} tokens do not fit the context of {limit}: shorten the prompt, ask "
            "for fewer new tokens or raise --context (context)"
        )
