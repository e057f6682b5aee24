"""Policies that draft, and ours, as functions of their numbers; see `presets`."""

import dataclasses

import jax.numpy as jnp

from moejax.policies import utility
from moejax.policies.drafting import AllLowBits, GatedBias, NearestResident, SkipMissing
from moejax.policies.eviction import LRU
from moejax.policies.foresight import DraftRouting, Promote, UtilityQueue
from moejax.policies.lengths import CycleCosts, FixedLength, Lengths, LiveLength
from moejax.policies.pinning import DraftSet
from moejax.policies.placement import HostAll
from moejax.policies.policy import Policy
from moejax.policies.prediction import LastLayer
from moejax.policies.preset_parts import exact, window_of
from moejax.policies.price import Costs, Priced, PricedPlacement
from moejax.policies.speculation import Draft, LookupDraft, ModelDraft, SelfDraft, Speculate
from moejax.policies.utility import Utility
from moejax.policies.value import Value

ALL = 2**30  # experts of a token, or layers: no limit


def _drafting(draft: Draft, gamma: int, lengths: Lengths | None = None) -> Speculate:
    lengths = FixedLength(gamma=jnp.int32(gamma)) if lengths is None else lengths
    return Speculate(draft=draft, lengths=lengths, max_length=max(gamma, 1))


def _live(gamma: int) -> LiveLength:
    # In plain steps, as measured on the embedded model at half residency.
    start = {"plain_ms": 1.0, "fixed_ms": 0.9, "draft_ms": 0.25, "token_ms": 0.1, "miss_ms": 0.03}
    costs = CycleCosts(**{name: jnp.float32(value) for name, value in start.items()})
    return LiveLength(costs=costs, size=max(gamma, 16))


def specmoe(gamma: int = 5, size: int = 8, decay: float = 0.5) -> Policy:
    """SpecMoE: drafts by the nearest of `size` pinned experts per layer, chosen in verification."""
    router = NearestResident(distance=None)
    return exact(
        DraftSet(size=jnp.int32(size), decay=jnp.float32(decay)),
        speculation=_drafting(SelfDraft(router=router), gamma),
    )


def self_draft(gamma: int = 2, window: int = 32) -> Policy:
    """Drafts by all residents, missing experts left out; the smallest mean score leaves first."""
    draft = SelfDraft(router=SkipMissing())
    return exact(window_of(window), speculation=_drafting(draft, gamma))


def self_draft_bias(gamma: int = 2, window: int = 32) -> Policy:
    """The same with a gated bias towards residents before the top-k choice."""
    draft = SelfDraft(router=GatedBias())
    return exact(window_of(window), speculation=_drafting(draft, gamma))


def lookup(gamma: int = 4, least: int = 2) -> Policy:
    """Drafts what followed the last occurrence of the newest tokens; LRU."""
    return exact(LRU(), speculation=_drafting(LookupDraft(least=jnp.int32(least)), gamma))


def moe_speq(gamma: int = 4, limit: int = ALL) -> Policy:
    """Drafts by int4 copies of all experts, whose routing is prefetched (arXiv 2511.14102)."""
    return exact(
        LRU(),
        foresight=DraftRouting(limit=jnp.int32(limit)),
        speculation=_drafting(SelfDraft(router=AllLowBits()), gamma),
    )


def sp_moe(gamma: int = 4, limit: int = ALL, cutoff: int = ALL) -> Policy:
    """SP-MoE: a draft model's attention outputs through the gates, up to layer `cutoff`; LRU."""
    return exact(
        LRU(),
        cutoff=LastLayer(last=jnp.int32(cutoff)),
        foresight=DraftRouting(limit=jnp.int32(limit)),
        speculation=_drafting(ModelDraft(), gamma),
    )


def sp_moe_self(gamma: int = 2, limit: int = ALL, cutoff: int = ALL, window: int = 32) -> Policy:
    """SP-MoE fed by the self-draft, whose own routing is the prediction."""
    made = self_draft(gamma, window)
    return dataclasses.replace(
        made,
        cutoff=LastLayer(last=jnp.int32(cutoff)),
        foresight=DraftRouting(limit=jnp.int32(limit)),
    )


def auto(
    gamma: int = 3, decay: float = 0.9, load: float = 3.0, host: float = 1.0, rate: float = 3.0
) -> Policy:
    """Ours: whatever is predicted to cost least, for every miss, every slot and every draft."""
    # All as arrays: live costs would otherwise change their types, and recompile.
    numbers = {"load": load, "host0": host, "host1": 0.0, "device": load / 30, "horizon": 0.0}
    costs = Costs(**{name: jnp.float32(number) for name, number in numbers.items()})
    made = exact(
        Value(decay=jnp.float32(decay)),
        placement=PricedPlacement(costs=costs),
        foresight=Promote(rate=jnp.float32(rate)),
    )
    if not gamma:
        return made
    draft = SelfDraft(router=SkipMissing())
    return dataclasses.replace(made, speculation=_drafting(draft, gamma, _live(gamma)))


def auto_lossy(
    alpha: float = 0.5,
    gamma: int = 0,
    decay: float = 0.9,
    load: float = 0.15,
    host: float = 0.05,
    rate: float = 3.0,
) -> Policy:
    """The same, and experts are replaced where that costs less than alpha of loss per ms."""
    made = dataclasses.replace(auto(gamma, decay, load, host, rate), must_be_exact=False)
    router = Priced(alpha=jnp.float32(alpha), costs=made.placement.costs)
    return dataclasses.replace(made, router=router)


def moe_spac(gamma: int = 8, cap: int = 5, up: float = 5.0, threshold: int = 1) -> Policy:
    """MoE-SpAc: a draft model, utility levels from windows, misses on the host."""
    return exact(
        Utility(cap=jnp.int32(cap), up=jnp.float32(up)),
        placement=HostAll(),
        foresight=UtilityQueue(threshold=jnp.int32(threshold)),
        speculation=_drafting(ModelDraft(), gamma),
    )


def moe_spac_balanced(
    gamma: int = 8, load: float = 3.0, host: float = 1.0, device: float = 0.1
) -> Policy:
    """MoE-SpAc with a threshold for each layer, found by trying all."""
    names = ("device_token", "host", "load")
    costs = {
        name: jnp.float32(cost) for name, cost in zip(names, (device, host, load), strict=True)
    }
    zero = jnp.float32(0)
    costs = utility.Costs(**costs, device=zero, host_token=zero, hidden=zero)
    queue = UtilityQueue(threshold=jnp.int32(1), costs=costs)
    return dataclasses.replace(moe_spac(gamma), foresight=queue)
