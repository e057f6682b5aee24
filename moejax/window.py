"""What a step does for the next one: drafts from residents, and experts brought in ahead."""

import dataclasses

import jax
import jax.numpy as jnp

from moejax.policies import forecast
from moejax.policies import residency as tables
from moejax.policies.eviction import Access
from moejax.policies.foresight import Glimpse
from moejax.policies.policy import Policy
from moejax.policies.prediction import in_order, ranks
from moejax.policies.utility import Work, at_least
from moejax.state import ExpertCache, PolicyMemory
from moejax.supply import Shelf, Supply, layer_slots


def draft_set(policy: Policy, memory: PolicyMemory) -> jax.Array | None:
    """[L * E] bool experts that evictors keep for drafts, None = all that are resident."""
    chosen = getattr(policy.evictor, "draft_set", None)
    return chosen(memory.evictor) if chosen else None


def draftable(
    policy: Policy, cache: ExpertCache, memory: PolicyMemory, layer: jax.Array, experts: int
) -> jax.Array:
    """[E] residents that a draft may use: not those whose record may still be on its way."""
    start = (layer * experts,)
    there = layer_slots(policy, cache.residency, layer, experts) >= 0
    if memory.forecast is not None:
        there &= ~jax.lax.dynamic_slice(memory.forecast.fresh, start, (experts,))
    kept = draft_set(policy, memory)
    return there if kept is None else there & jax.lax.dynamic_slice(kept, start, (experts,))


def glimpse(
    supply: Supply,
    shelf: Shelf,
    memory: PolicyMemory,
    scores: jax.Array,
    valid: jax.Array,
    top_k: int,
    *,
    chance: jax.Array | None = None,
    missed: jax.Array | None = None,
    used: Access | None = None,
) -> Glimpse:
    """What the foresight sees of the supply's layer: scores [N, E], valid [N].

    Args:
        used: what the step that has run used; None in drafts.
    """
    policy, start = supply.policy, (supply.layer * supply.experts,)
    resident, levels, work = supply.slots(shelf.residency) >= 0, None, None
    if hasattr(policy.evictor, "levels"):
        every = policy.evictor.levels(memory.evictor)
        levels = jax.lax.dynamic_slice(every, start, (supply.experts,))
        if used is not None and getattr(policy.foresight, "costs", None) is not None:
            absent = shelf.residency.slot_of < 0
            work = Work(
                level=levels,
                tokens=used.tokens,
                needed=used.needed,
                # As if what is hot were there already: else nothing would ever be fetched.
                resident=jnp.ones_like(resident),
                hot=at_least(every, jnp.ones_like(absent)),
                coming=at_least(every, absent),
            )
    keys = policy.evictor.keys(memory.evictor, supply.layer)
    return Glimpse(
        layer=supply.layer,
        scores=scores,
        chance=jnp.ones(scores.shape[0], jnp.float32) if chance is None else chance,
        missed=jnp.zeros(supply.experts, bool) if missed is None else missed,
        resident=resident,
        keys=jax.lax.dynamic_slice(keys, start, (supply.experts,)),
        levels=levels,
        work=work,
        slots=tables.usable(shelf.residency, supply.experts, policy.capacity),
        valid=valid,
        top_k=top_k,
        drafting=used is None,
    )


def bring(
    supply: Supply, shelf: Shelf, memory: PolicyMemory, seen: Glimpse, after: jax.Array
) -> tuple[Shelf, PolicyMemory, jax.Array]:
    """Give slots to what the foresight wants for the layer's next run; how many, too.

    Not those of experts that are predicted, or kept for drafts. `after` is any array that must
    exist before records are asked for.
    """
    policy, foresight = supply.policy, supply.policy.foresight
    drained = foresight.drained(policy.evictor, memory.evictor)
    memory = dataclasses.replace(memory, evictor=drained)
    priority, remembered = foresight.wanted(memory.foresight, seen)
    memory = dataclasses.replace(memory, foresight=remembered)
    wanted = (priority > 0) & policy.cutoff.allows(supply.layer)

    def once(carry: tuple) -> tuple:
        _, shelf, memory, _ = carry
        return jnp.bool_(False), *_brought(supply, shelf, memory, seen, wanted, priority, after)

    # Most often there is nothing to do. A loop, not `cond`, which would copy the pool.
    start = (wanted.any(), shelf, memory, jnp.int32(0))
    _, shelf, memory, count = jax.lax.while_loop(lambda carry: carry[0], once, start)
    return shelf, memory, count


def _brought(
    supply: Supply,
    shelf: Shelf,
    memory: PolicyMemory,
    seen: Glimpse,
    wanted: jax.Array,
    priority: jax.Array,
    after: jax.Array,
) -> tuple[Shelf, PolicyMemory, jax.Array]:
    policy, foresight = supply.policy, supply.policy.foresight
    shield, kept = memory.forecast.wanted, draft_set(policy, memory)
    if kept is not None:
        shield = shield | kept
    keys = policy.evictor.keys(memory.evictor, supply.layer)
    rank = ranks(jnp.where(wanted, priority, 0.0))
    if foresight.gains:
        wanted = _gaining(supply, shelf, keys, shield, seen, wanted, rank)
        rank = ranks(jnp.where(wanted, priority, 0.0))
    order = in_order(rank)
    wanted = supply.within_room(shelf, wanted, rank, shield)
    shelf, copies = supply.find(shelf, forecast.greatest(keys, shield), wanted, order)
    shelf = supply.deliver(shelf, copies, wanted, order, after)
    brought = wanted & ~seen.resident & (supply.slots(shelf.residency) >= 0)
    memory = forecast.promise(
        memory,
        supply.layer,
        wanted,
        rank,
        brought,
        supply.capacity(shelf.residency),
        shelf.residency.home[0] >= 0,
    )
    spent = foresight.spent(memory.foresight, copies.count)
    return shelf, dataclasses.replace(memory, foresight=spent), copies.count


def _gaining(
    supply: Supply,
    shelf: Shelf,
    keys: jax.Array,
    shield: jax.Array,
    seen: Glimpse,
    wanted: jax.Array,
    rank: jax.Array,
) -> jax.Array:
    """[E] those wanted that are there, or worth more than who leaves for them."""
    residency = shelf.residency
    capacity = tables.usable(residency, supply.experts, supply.policy.capacity)
    free = tables.evictable(residency, supply.layer, wanted & seen.resident, capacity)
    owner = jnp.maximum(residency.owner, 0)
    worth = forecast.greatest(keys, shield)[owner]
    own = supply.policy.foresight.worth(seen)[:, None]
    less = (residency.owner < 0) | (~shield[owner] & (worth < own))
    absent = wanted & ~seen.resident
    before = (absent & (rank < rank[:, None])).sum(axis=1)
    return wanted & (seen.resident | (before < (free & less).sum(axis=1)))
