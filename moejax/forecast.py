"""The book of predictions: what was promised, what came of it, and what it protects."""

import dataclasses

import jax
import jax.numpy as jnp

from moejax.residency import Copies
from moejax.state import Forecast, PolicyMemory, pytree


@pytree
class Account:
    """What came of the predictions for one layer."""

    predicted: jax.Array  # [] i32, experts
    right: jax.Array  # [] i32, of those, needed
    used: jax.Array  # [] i32, prefetched records used here the first time
    wanted: jax.Array  # [E] bool, the predicted experts


def resolve(
    memory: PolicyMemory, layer: jax.Array, needed: jax.Array, resident: jax.Array
) -> tuple[PolicyMemory, Account]:
    """Close the predictions for a layer whose routing is known.

    Args:
        needed: [E] bool.
        resident: [E] bool, when the layer begins.
    """
    experts, book = needed.shape[0], memory.forecast
    if book is None:
        none = jnp.int32(0)
        return memory, Account(predicted=none, right=none, used=none, wanted=jnp.zeros_like(needed))
    start = (layer * experts,)
    wanted = jax.lax.dynamic_slice(book.wanted, start, (experts,))
    # A record that has left since it was prefetched is not prefetched any more.
    fresh = jax.lax.dynamic_slice(book.fresh, start, (experts,)) & resident
    account = Account(
        predicted=wanted.sum(dtype=jnp.int32),
        right=(wanted & needed).sum(dtype=jnp.int32),
        used=(fresh & needed).sum(dtype=jnp.int32),
        wanted=wanted,
    )
    book = Forecast(
        wanted=jax.lax.dynamic_update_slice(book.wanted, jnp.zeros_like(wanted), start),
        fresh=jax.lax.dynamic_update_slice(book.fresh, fresh & ~needed, start),
    )
    return dataclasses.replace(memory, forecast=book), account


def protected(memory: PolicyMemory, keys: jax.Array) -> jax.Array:
    """Keys [L * E] under which predicted experts leave last."""
    return keys if memory.forecast is None else greatest(keys, memory.forecast.wanted)


def shield(memory: PolicyMemory, layer: jax.Array, needed: jax.Array) -> jax.Array:
    """[L * E] bool, experts that no prefetch may displace: needed now, or predicted before."""
    return jax.lax.dynamic_update_slice(memory.forecast.wanted, needed, (layer * needed.shape[0],))


def greatest(keys: jax.Array, chosen: jax.Array) -> jax.Array:
    """Keys [L * E], the greatest there are where `chosen`."""
    if jnp.issubdtype(keys.dtype, jnp.floating):
        return jnp.where(chosen, jnp.inf, keys)
    return jnp.where(chosen, jnp.iinfo(keys.dtype).max, keys)


def promise(
    memory: PolicyMemory,
    target: jax.Array,
    wanted: jax.Array,
    order: jax.Array,
    copies: Copies,
    capacity: jax.Array,
) -> PolicyMemory:
    """Note what is predicted for layer `target`, best first: at most half of the slots in all.

    Args:
        wanted: [E] bool.
        order: [E] i32, best first.
        copies: the records that are brought for it.
    """
    book, experts = memory.forecast, wanted.shape[0]
    left = capacity // 2 - book.wanted.sum(dtype=jnp.int32)
    ranked = wanted[order]
    kept = jnp.zeros_like(wanted).at[order].set(ranked & (jnp.cumsum(ranked) <= left))
    brought = jnp.where(jnp.arange(experts) < copies.count, copies.expert, book.fresh.shape[0])
    start = (target * experts,)
    before = jax.lax.dynamic_slice(book.wanted, start, (experts,))
    book = Forecast(
        wanted=jax.lax.dynamic_update_slice(book.wanted, before | kept, start),
        fresh=book.fresh.at[brought].set(True, mode="drop"),
    )
    return dataclasses.replace(memory, forecast=book)
