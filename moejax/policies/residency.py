"""The slot tables: pure bookkeeping of which expert is where, shared by engine and simulator."""

import jax
import jax.numpy as jnp

from moejax.state import Residency, pytree


def empty(num_ids: int, slots: int, *, layers: int = 0) -> Residency:
    """No expert resident.

    Args:
        num_ids: L * E.
        slots: S.
        layers: if given, slots are divided evenly among this many layers instead of pooled.
    """
    home = jnp.full(slots, -1, jnp.int32)
    if layers:
        # Interleaved, so that any prefix of the slots serves all layers alike.
        home = jnp.arange(slots, dtype=jnp.int32) % layers
    return Residency(
        slot_of=jnp.full(num_ids, -1, jnp.int32), owner=jnp.full(slots, -1, jnp.int32), home=home
    )


def full(num_ids: int) -> Residency:
    """Every expert resident, expert i in slot i."""
    return Residency(
        slot_of=jnp.arange(num_ids, dtype=jnp.int32),
        owner=jnp.arange(num_ids, dtype=jnp.int32),
        home=jnp.full(num_ids, -1, jnp.int32),
    )


def usable(residency: Residency, experts: int, capacity: jax.Array) -> jax.Array:
    """Slots in use: `capacity`, but at least one for every layer that has to be served."""
    layers = residency.slot_of.shape[0] // experts
    return jnp.maximum(capacity, jnp.where(residency.home[0] < 0, 1, layers))


def layer_slots(
    residency: Residency, layer: jax.Array, experts: int, capacity: jax.Array
) -> jax.Array:
    """[E] slots of a layer's experts, -1 = absent; slots beyond `capacity` do not count."""
    slots = jax.lax.dynamic_slice(residency.slot_of, (layer * experts,), (experts,))
    return jnp.where(slots < capacity, slots, -1)


def evictable(
    residency: Residency, layer: jax.Array, kept: jax.Array, capacity: jax.Array
) -> jax.Array:
    """[S] slots in use that may receive an expert of `layer` while its experts `kept` [E] stay."""
    experts = kept.shape[0]
    local = residency.owner - layer * experts
    held = (local >= 0) & (local < experts) & kept[jnp.clip(local, 0, experts - 1)]
    at_home = (residency.home < 0) | (residency.home == layer)
    return ~held & at_home & (jnp.arange(residency.owner.shape[0]) < capacity)


def victim(residency: Residency, keys: jax.Array, free: jax.Array) -> jax.Array:
    """The slot among `free` [S] to fill next: an empty one, or that of the smallest key [L * E]."""
    empty = free & (residency.owner < 0)
    among = jnp.where(empty.any(), empty, free)
    key = keys[jnp.maximum(residency.owner, 0)]
    least = jnp.where(among, key, _greatest(keys.dtype)).min()
    # Not argmin: keys may all be as great as the filler, or NaN.
    return jnp.argmax(among & (empty | ~(key > least))).astype(jnp.int32)


@pytree
class Copies:
    """Records to copy into slots, the first `count` of each list."""

    slot: jax.Array  # [E] i32
    expert: jax.Array  # [E] i32, ids
    count: jax.Array  # [] i32


def bring(
    residency: Residency,
    keys: jax.Array,
    layer: jax.Array,
    wanted: jax.Array,
    order: jax.Array,
    capacity: jax.Array,
) -> tuple[Residency, Copies]:
    """Give slots to as many absent experts of a layer as can be had while those `wanted` stay.

    Args:
        keys: [L * E], see `victim`.
        wanted: [E] bool.
        order: [E] i32, a permutation: who comes first if slots are few.
        capacity: [] i32 slots in use.
    """
    experts = wanted.shape[0]
    slots = layer_slots(residency, layer, experts, capacity)
    missing = wanted & (slots < 0)
    free = evictable(residency, layer, wanted & (slots >= 0), capacity)
    count = jnp.minimum(missing.sum(dtype=jnp.int32), free.sum(dtype=jnp.int32))
    ids = layer * experts + order[jnp.argsort(~missing[order])]

    def one(i: jax.Array, carry: tuple) -> tuple:
        residency, free, chosen = carry
        slot = victim(residency, keys, free)
        return place(residency, slot, ids[i]), free.at[slot].set(False), chosen.at[i].set(slot)

    chosen = jnp.full(experts, -1, jnp.int32)
    residency, _, chosen = jax.lax.fori_loop(0, count, one, (residency, free, chosen))
    return residency, Copies(slot=chosen, expert=ids.astype(jnp.int32), count=count)


def place(residency: Residency, slot: jax.Array, expert: jax.Array) -> Residency:
    """Residency after `expert` (an id) has taken `slot` from whatever owned it."""
    ids, slots = residency.slot_of.shape[0], residency.owner.shape[0]
    old_owner, old_slot = residency.owner[slot], residency.slot_of[expert]
    owner = residency.owner.at[jnp.where(old_slot < 0, slots, old_slot)].set(-1, mode="drop")
    slot_of = residency.slot_of.at[jnp.where(old_owner < 0, ids, old_owner)].set(-1, mode="drop")
    return Residency(
        slot_of=slot_of.at[expert].set(slot), owner=owner.at[slot].set(expert), home=residency.home
    )


def _greatest(dtype: jnp.dtype) -> float:
    return jnp.inf if jnp.issubdtype(dtype, jnp.floating) else jnp.iinfo(dtype).max
