"""The book of predictions: what was promised, what came of it, and what it protects."""

import dataclasses

import jax
import jax.numpy as jnp

from moejax.policies.prediction import first
from moejax.state import Forecast, PolicyMemory, pytree


@pytree
class Account:
    """What came of the predictions for one layer."""

    predicted: jax.Array  # [] i32, experts
    right: jax.Array  # [] i32, of those, needed
    used: jax.Array  # [] i32, prefetched records used here the first time
    wanted: jax.Array  # [E] bool, the predicted experts
    fresh: jax.Array  # [E] bool, prefetched and used here the first time, if at all

    @classmethod
    def none(cls, experts: int) -> "Account":
        """Where nothing was predicted."""
        zero, none = jnp.int32(0), jnp.zeros(experts, bool)
        return cls(predicted=zero, right=zero, used=zero, wanted=none, fresh=none)


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
        return memory, Account.none(experts)
    start = (layer * experts,)
    wanted = jax.lax.dynamic_slice(book.wanted, start, (experts,))
    # A record that has left since it was prefetched is not prefetched any more.
    fresh = jax.lax.dynamic_slice(book.fresh, start, (experts,)) & resident
    account = Account(
        predicted=wanted.sum(dtype=jnp.int32),
        right=(wanted & needed).sum(dtype=jnp.int32),
        used=(fresh & needed).sum(dtype=jnp.int32),
        wanted=wanted,
        fresh=fresh,
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
    """Keys [L * E], greater where `chosen` than anywhere else, whatever an evictor's keys are."""
    if jnp.issubdtype(keys.dtype, jnp.floating):
        # Finite, and NaN, which leaves first, the least of all.
        return jnp.where(chosen, jnp.inf, jnp.nan_to_num(keys, nan=-jnp.inf))
    most = jnp.iinfo(keys.dtype).max
    return jnp.where(chosen, most, jnp.minimum(keys, most - 1))


def promise(
    memory: PolicyMemory,
    target: jax.Array,
    wanted: jax.Array,
    rank: jax.Array,
    brought: jax.Array,
    capacity: jax.Array,
    divided: jax.Array,
) -> PolicyMemory:
    """Note what is predicted for layer `target`, best first: at most half of its slots in all.

    Args:
        wanted: [E] bool.
        rank: [E] i32, 0 = best.
        brought: [E] bool, those of them that were given a slot now.
        capacity: [] i32 slots in use that may serve the layer.
        divided: [] bool, whether they serve no other.
    """
    book, start = memory.forecast, (target * wanted.shape[0],)
    before = jax.lax.dynamic_slice(book.wanted, start, wanted.shape)
    promised = jnp.where(divided, before.sum(), book.wanted.sum())
    left = capacity // 2 - promised
    fresh = jax.lax.dynamic_slice(book.fresh, start, wanted.shape)
    kept = before | first(wanted & ~before, rank, left)
    book = Forecast(
        wanted=jax.lax.dynamic_update_slice(book.wanted, kept, start),
        fresh=jax.lax.dynamic_update_slice(book.fresh, fresh | brought, start),
    )
    return dataclasses.replace(memory, forecast=book)
