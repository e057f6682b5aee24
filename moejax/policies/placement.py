"""Placement of misses: which missing experts are fetched; the others are computed on the host."""

import collections
import dataclasses
import math
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from moejax.errors import InputError, PolicyError
from moejax.state import pytree, static


@pytree
class Demand:
    """What one layer needs in one step."""

    missing: jax.Array  # [E] bool, needed and not resident
    hits: jax.Array  # [E] bool, needed and resident
    tokens: jax.Array  # [E] i32, how many tokens use each expert
    score: jax.Array  # [E] f32, greatest router score among the tokens that use an expert, else 0


class Placement(Protocol):
    """Splits a layer's missing experts between the link and the host."""

    uses_host: bool  # static: False = fetches everything

    def fetch(self, demand: Demand) -> jax.Array:
        """[E] which of the missing experts to fetch; what is not missing does not matter."""
        ...


@pytree
class FetchAll:
    """Fetch every missing expert (on-demand offloading)."""

    uses_host = False

    def fetch(self, demand: Demand) -> jax.Array:
        """All of them."""
        return demand.missing


@pytree
class HostAll:
    """Compute every missing expert where its weights lie; residency never changes."""

    uses_host = True

    def fetch(self, demand: Demand) -> jax.Array:
        """None of them."""
        return jnp.zeros_like(demand.missing)


def _before(missing: jax.Array, *keys: jax.Array) -> jax.Array:
    """[E, E] whether a row's expert is missing and comes before a column's: greatest keys first.

    Experts that are equal in every key come in the order of their ids.
    """
    ids = jnp.arange(missing.shape[0])
    before = ids[:, None] < ids
    for key in reversed(keys):
        before = (key[:, None] > key) | ((key[:, None] == key) & before)
    return missing[:, None] & before


def _unless_no_host(fetched: jax.Array, host: jax.Array) -> jax.Array:
    """The split, or everything where the host's cost is infinite or NaN.

    Of an infinite or NaN cost of the link the split itself fetches nothing: no comparison holds.
    """
    return fetched | ~(host < jnp.inf)


def _cost(value: jax.Array | float) -> jax.Array:
    return jnp.asarray(value, jnp.float32)


def _like(old: jax.Array | float, new: jax.Array | float) -> jax.Array | float:
    # A Python number and an array are different types to `jit`: a change would recompile.
    return np.float32(new) if hasattr(old, "dtype") else new


@pytree
class TwoPointer:
    """The link takes misses from the best-scoring end, the host from the other, until they meet.

    SMoE, Algorithm 2: whichever has spent less time so far takes its next expert, the link when
    they are level. Both see rising times of start, i * load and j * host, so their decisions are a
    merge of the two: of n experts, the one with i before it and n - 1 - i after it is fetched if
    and only if i * load <= (n - 1 - i) * host. Equal scores go by expert id.

    Costs are at least 0; an infinite (or NaN) one marks a resource that is not there and is never
    used, and if neither is there everything is fetched.
    """

    uses_host = True

    load: jax.Array | float  # one expert over the link, in the unit of `host`
    host: jax.Array | float  # one expert computed on the host
    # "released": as in their code, experts of most tokens first, and the host when they are level
    variant: str = static(default="paper")

    def __post_init__(self):
        if self.variant not in ("paper", "released"):
            raise PolicyError(f"variant {self.variant!r} of TwoPointer: write paper or released")

    def fetch(self, demand: Demand) -> jax.Array:
        """[E] the first few of the missing."""
        paper = self.variant == "paper"
        before = _before(demand.missing, demand.score if paper else demand.tokens)
        rank = before.sum(0, dtype=jnp.int32)
        after = demand.missing.sum(dtype=jnp.int32) - 1 - rank
        load, host = _cost(self.load), _cost(self.host)
        link_start, host_start = rank * load, after * host
        fetched = link_start <= host_start if paper else link_start < host_start
        return demand.missing & _unless_no_host(fetched, host)

    def with_costs(self, load: jax.Array | float, host: jax.Array | float) -> "TwoPointer":
        """The same with other costs; does not recompile."""
        return dataclasses.replace(self, load=_like(self.load, load), host=_like(self.host, host))


@pytree
class BandwidthShare:
    """Fetches a fixed share of each layer's misses, the best-scoring first.

    FreeToken (arXiv 2608.16157): copies over the link also read the host's memory, so both finish
    together when the share is the link's bandwidth over the host's. Of share * n and the integers
    on both sides, as in their code, the one that lets the later of the two finish first, the lower
    one when level: the expert with i before it is fetched if and only if
    i + 1 < share * (n + 1). From 1 everything is fetched; at 0 or less (or NaN), which is an
    unknown share, one expert per layer. Theirs fetches the last used first.
    """

    uses_host = True

    share: jax.Array | float  # of the misses

    @classmethod
    def matched(cls, link_gb_per_s: float, host_gb_per_s: float) -> "BandwidthShare":
        """The share at which link and host finish together.

        Args:
            link_gb_per_s: whole records over the link, while the host is idle.
            host_gb_per_s: the host's memory as its experts read it, while the link is idle.

        Raises:
            InputError: a bandwidth that is not a positive number.
        """
        for rate in (link_gb_per_s, host_gb_per_s):
            if not 0 < rate < math.inf:
                raise InputError(f"a bandwidth of {rate} GB/s: it must be a positive number")
        return cls(share=jnp.float32(link_gb_per_s / host_gb_per_s))

    def fetch(self, demand: Demand) -> jax.Array:
        """[E] the first few of the missing."""
        rank = _before(demand.missing, demand.score).sum(0, dtype=jnp.int32)
        share = _cost(self.share)
        matched = rank + 1 < share * (demand.missing.sum(dtype=jnp.int32) + 1)
        return demand.missing & jnp.where(share > 0, matched, rank == 0)


@pytree
class ThreeTimelines:
    """Simulates link, host and device, and gives each miss to whoever would be done with it first.

    HybriMoE (arXiv 2504.05897), scheduling within a layer. Missing experts are sorted by tokens,
    then score, the greatest first, then by id. The device computes the residents, `device` each.
    Then, until none is left, two finish times are compared: that of the first expert if the link
    fetches it next (`load`; then `device`, once the device is free), and that of the last one if
    the host computes it next (`host` per token). The earlier goes ahead, the link when level.

    As the link's finish times do not depend on what the host does, an expert is fetched if and
    only if it would be computed on the device no later than the host could be done with it and
    all that follow it. No other split of that order finishes the layer earlier.

    Costs are at least 0; infinite (or NaN) ones as in `TwoPointer`. The paper lets an idle host
    compute residents too; here it does not.
    """

    uses_host = True

    load: jax.Array | float  # one expert over the link, in the unit of all three
    host: jax.Array | float  # one token through one expert on the host
    device: jax.Array | float  # one expert on the device, whatever its tokens

    def fetch(self, demand: Demand) -> jax.Array:
        """[E] the first few of the missing."""
        missing, hits = demand.missing, demand.hits
        tokens = jnp.where(missing, demand.tokens, 0)
        before = _before(missing, tokens, demand.score)
        done = before.sum(0, dtype=jnp.int32) + 1
        left = tokens.sum() - jnp.where(before, tokens[:, None], 0).sum(0)
        load, host, device = _cost(self.load), _cost(self.host), _cost(self.device)
        # A queue behind another: what delays it most is its own start, or the last arrival.
        start = jnp.maximum(hits.sum(dtype=jnp.int32) * device, load)
        on_device = jnp.maximum(start + done * device, done * load + device)
        return missing & _unless_no_host(on_device <= left * host, host)

    def with_costs(self, load: jax.Array | float, host: jax.Array | float) -> "ThreeTimelines":
        """The same with other costs of the link and the host; does not recompile."""
        return dataclasses.replace(self, load=_like(self.load, load), host=_like(self.host, host))


class LiveCosts:
    """Averages of the latest measured costs of one expert, in microseconds; lives on the host.

    As in SMoE's released code: measurements further than one (population) standard deviation from
    their mean are dropped. Until the first one comes, a start value stands in.
    """

    def __init__(self, load: float = 2000.0, host: float = 50000.0, window: int = 10):
        """Start values, and how many measurements of each kind count.

        Raises:
            ValueError: a negative or NaN start value, or no measurements.
        """
        if not (load >= 0 and host >= 0 and window >= 1):
            raise ValueError(f"LiveCosts(load={load}, host={host}, window={window})")
        self._start = {"load": float(load), "host": float(host)}
        self._measured = {
            "load": collections.deque(maxlen=window),
            "host": collections.deque(maxlen=window),
        }

    def add(self, load_us: float | None, host_us: float | None) -> None:
        """Note the cost of one expert over the link and on the host; None = not measured.

        Raises:
            ValueError: a measurement that is negative or not finite; then neither is noted.
        """
        given = {"load": load_us, "host": host_us}
        given = {name: float(value) for name, value in given.items() if value is not None}
        for name, value in given.items():
            if not 0 <= value < math.inf:
                raise ValueError(f"a {name} cost of {value} us: it must be at least 0 and finite")
        for name, value in given.items():
            self._measured[name].append(value)

    @property
    def load(self) -> float:
        """Microseconds of one expert over the link."""
        return self._average("load")

    @property
    def host(self) -> float:
        """Microseconds of one expert on the host."""
        return self._average("host")

    def _average(self, name: str) -> float:
        values = self._measured[name]
        if not values:
            return self._start[name]
        mean = math.fsum(values) / len(values)
        offsets = [value - mean for value in values]
        # Two values are one deviation off exactly: rounding must not drop either.
        limit = math.hypot(*offsets) / math.sqrt(len(values)) * (1 + 1e-9)
        kept = [v for v, offset in zip(values, offsets, strict=True) if abs(offset) <= limit]
        return math.fsum(kept) / len(kept)
