"""Policies by name, each after what it reproduces; their numbers can be given as text.

`smoe` is SMoE (arXiv 2508.18983), `specmoe` SpecMoE (2604.10152), `sp_moe` SP-MoE (2510.10302),
`moe_spac` MoE-SpAc (2603.09983); the others are what they are compared with.
"""

import dataclasses
import inspect
from collections.abc import Callable

import jax.numpy as jnp

from moejax.errors import PolicyError
from moejax.policies.alternatives import CacheBoost, LowBitFallback
from moejax.policies.draft_presets import (
    ALL,
    auto,
    auto_lossy,
    lookup,
    moe_spac,
    moe_spac_balanced,
    moe_speq,
    self_draft,
    self_draft_bias,
    sp_moe,
    sp_moe_self,
    specmoe,
)
from moejax.policies.eviction import LRU
from moejax.policies.evictors import (
    LFU,
    ClassLRU,
    DecayedLFU,
    LeastStale,
    ScoreEMA,
    TwoQueue,
)
from moejax.policies.placement import BandwidthShare, FetchAll, HostAll, ThreeTimelines, TwoPointer
from moejax.policies.policy import UNLIMITED, Policy
from moejax.policies.prediction import (
    Everything,
    NextAttention,
    NextGate,
    NextResidual,
)
from moejax.policies.preset_parts import exact, window_of
from moejax.policies.substitution import Substitute


def lru() -> Policy:
    """On-demand offloading, least recently used out first."""
    return exact(LRU())


def lfu() -> Policy:
    """Least often used out first."""
    return exact(LFU())


def decayed_lfu(decay: float = 0.95) -> Policy:
    """Least often used out first, old uses counting less."""
    return exact(DecayedLFU(decay=jnp.float32(decay)))


def class_lru(period: int = 64) -> Policy:
    """By frequency class, then least recently used (llama.cpp)."""
    return exact(ClassLRU(period=jnp.int32(period)))


def two_queue(window: int = 64) -> Policy:
    """Scan-resistant: experts used once leave before those used again."""
    return exact(TwoQueue(window=jnp.int32(window)))


def least_stale() -> Policy:
    """The experts whose layer comes last leave first (SpecMD, arXiv 2602.03921)."""
    return exact(LeastStale())


def score_window(window: int = 16) -> Policy:
    """SMoE's eviction alone: the smallest mean router score of the last steps."""
    return exact(window_of(window))


def score_ema(decay: float = 0.9) -> Policy:
    """The smallest decayed router score out first."""
    return exact(ScoreEMA(decay=jnp.float32(decay)))


def host() -> Policy:
    """Misses run on the host, nothing is moved: what is resident comes from a residency file."""
    return exact(LRU(), placement=HostAll())


def balanced(load: float = 3.0, host: float = 1.0) -> Policy:
    """LRU with misses split between the link and the host by SMoE's two pointers."""
    return exact(LRU(), placement=_two_pointer(load, host))


def bandwidth(share: float = 0.5) -> Policy:
    """LRU with a share of the misses fetched, as bandwidths go (FreeToken, arXiv 2608.16157)."""
    return exact(LRU(), placement=BandwidthShare(share=jnp.float32(share)))


def hybrimoe(load: float = 3.0, host: float = 1.0, device: float = 0.1, limit: int = 2) -> Policy:
    """HybriMoE (arXiv 2504.05897): score EMA, three timelines, prefetch by the next gate."""
    return exact(
        ScoreEMA(decay=jnp.float32(0.9)),
        placement=_timelines(load, host, device),
        predictor=NextGate(limit=jnp.int32(limit), alpha=jnp.float32(0.0)),
    )


def moe_infinity() -> Policy:
    """Prefetch of all picks of the next gate, as MoE-Infinity prefetches all that it expects."""
    return exact(LRU(), predictor=NextGate(alpha=jnp.float32(0.0)))


def stream() -> Policy:
    """Every layer's experts are moved while the layer before runs (DeepSpeed)."""
    return exact(LRU(), predictor=Everything())


def _two_pointer(load: float, host: float) -> TwoPointer:
    return TwoPointer(load=jnp.float32(load), host=jnp.float32(host))


def _timelines(load: float, host: float, device: float) -> ThreeTimelines:
    costs = {"load": load, "host": host, "device": device}
    return ThreeTimelines(**{name: jnp.float32(cost) for name, cost in costs.items()})


def smoe_fetch(alpha: float = 0.25, window: int = 16, horizon: int = 1) -> Policy:
    """SMoE without host compute: substitution, score eviction, top-score prefetch."""
    return Policy(
        router=Substitute(alpha=jnp.float32(alpha)),
        evictor=window_of(window),
        placement=FetchAll(),
        capacity=jnp.int32(UNLIMITED),
        predictor=NextAttention(alpha=jnp.float32(alpha), horizon=horizon),
    )


def smoe(
    alpha: float = 0.25, window: int = 16, horizon: int = 1, load: float = 3.0, host: float = 1.0
) -> Policy:
    """SMoE, whole: also misses split between the link and the host.

    load and host are the costs of an expert on either, in any one unit.
    """
    whole = smoe_fetch(alpha, window, horizon)
    return dataclasses.replace(whole, placement=_two_pointer(load, host))


def smoe_timelines(
    alpha: float = 0.25, window: int = 16, load: float = 3.0, host: float = 1.0, device: float = 0.1
) -> Policy:
    """SMoE for few misses per layer: split by finish times, one prefetch two layers ahead.

    The two pointers always load the first miss, though the host may be done with it sooner.
    """
    whole = smoe_fetch(alpha, window)
    ahead = NextAttention(alpha=jnp.float32(alpha), limit=jnp.int32(1), horizon=2)
    return dataclasses.replace(whole, placement=_timelines(load, host, device), predictor=ahead)


def smoe_released(alpha: float = 0.25, load: float = 3.0, host: float = 1.0) -> Policy:
    """SMoE as its released code has it; see docs/design.md for the differences."""
    return Policy(
        router=Substitute(alpha=jnp.float32(alpha), variant="released"),
        evictor=LRU(),
        placement=TwoPointer(load=jnp.float32(load), host=jnp.float32(host), variant="released"),
        capacity=jnp.int32(UNLIMITED),
        predictor=NextResidual(alpha=jnp.float32(alpha), limit=jnp.int32(1), only_missing=True),
    )


def low_bit(alpha: float = 0.25) -> Policy:
    """Missing low-score experts run from int4 copies that stay in fast memory (after HOBBIT)."""
    return Policy(
        router=LowBitFallback(alpha=jnp.float32(alpha)),
        evictor=LRU(),
        placement=FetchAll(),
        capacity=jnp.int32(UNLIMITED),
    )


def cache_boost(boost: float = 0.5, keep: int = 1) -> Policy:
    """Cache-conditional experts (arXiv 2412.00099): resident experts score higher."""
    return Policy(
        router=CacheBoost(boost=jnp.float32(boost), keep=jnp.int32(keep)),
        evictor=LRU(),
        placement=FetchAll(),
        capacity=jnp.int32(UNLIMITED),
    )


PRESETS: dict[str, Callable[..., Policy]] = {
    made.__name__.replace("_", "-"): made
    for made in (
        lru,
        lfu,
        decayed_lfu,
        class_lru,
        two_queue,
        least_stale,
        score_window,
        score_ema,
        host,
        balanced,
        bandwidth,
        hybrimoe,
        moe_infinity,
        stream,
        smoe,
        smoe_fetch,
        smoe_released,
        smoe_timelines,
        cache_boost,
        low_bit,
        specmoe,
        self_draft,
        self_draft_bias,
        lookup,
        moe_speq,
        sp_moe,
        sp_moe_self,
        moe_spac,
        moe_spac_balanced,
        auto,
        auto_lossy,
    )
}


# Least and greatest of each number by its name; others: any that is not negative.
BOUNDS = {
    "alpha": (0.0, 1e6),
    "decay": (0.0, 1.0),
    "share": (0.0, 1.0),
    "horizon": (1, 1024),
    "window": (1, 4096),
    "period": (1, 2**30),
    "limit": (1, 2**30),
    "keep": (0, 2**30),
    "gamma": (0, 64),
    "least": (1, 3),
    "size": (1, 2**30),
    "cap": (1, 8),
    "up": (0.0, 9.0),
    "cutoff": (0, 2**30),
    "threshold": (1, 8),
}
MOST = 1e30


def build(name: str, make: Callable[..., Policy], numbers: str) -> Policy:
    """The policy of a preset, with numbers such as "alpha=0.35,window=32" instead of its own.

    Raises:
        PolicyError: a number that the preset does not have, or what is none.
    """
    if not numbers:
        return make()
    known = inspect.signature(make).parameters
    given: dict[str, float] = {}
    for part in numbers.split(","):
        key, _, text = part.partition("=")
        if key not in known:
            raise PolicyError(
                f"policy {name!r} has no number {key!r}; it has: {', '.join(known) or 'none'}"
            )
        try:
            whole = ALL if text == "all" and known[key].default == ALL else text
            given[key] = int(whole) if isinstance(known[key].default, int) else float(text)
        except ValueError:
            kind = "whole number" if isinstance(known[key].default, int) else "number"
            raise PolicyError(f"{key} of policy {name!r} must be a {kind}, not {text!r}") from None
        least, most = BOUNDS.get(key, (0.0, MOST))
        if not least <= given[key] <= most:
            raise PolicyError(
                f"{key} of policy {name!r} must be in [{least:g}, {most:g}], not {text!r}"
            )
    return make(**given)
