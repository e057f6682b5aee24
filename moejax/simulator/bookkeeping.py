"""A supply of experts that exist in tables only: what replays give to the engine's layers."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from moejax.policies import residency as tables
from moejax.state import Residency
from moejax.supply import Shelf, Supply


@dataclasses.dataclass(frozen=True)
class Tables(Supply):
    """A supply without records: experts get slots, and that is all."""

    wide: bool = False  # for many tables of few slots side by side: no loops, all pairs compared

    def _run(
        self, shelf: Shelf, chosen: jax.Array, plan: Any, x: jax.Array, rows: jax.Array
    ) -> tuple[Shelf, jax.Array]:
        return shelf, rows

    def from_copies(self, chosen: jax.Array, plan: Any, x: jax.Array, rows: jax.Array) -> jax.Array:
        """Nothing."""
        return rows

    def on_host(
        self, shelf: Shelf, chosen: jax.Array, plan: Any, x: jax.Array, rows: jax.Array
    ) -> tuple[jax.Array, None]:
        """Nothing."""
        return rows, None

    def find(
        self,
        shelf: Shelf,
        keys: jax.Array,
        wanted: jax.Array,
        order: jax.Array,
        pinned: jax.Array | None = None,
    ) -> tuple[Shelf, tables.Copies]:
        """As `Supply.find`, but that no list of copies is made, only their number.

        `residency.bring` sorts the experts of a layer for it, which takes longer than all the rest.
        """
        home, experts = shelf.residency.home, self.experts
        capacity = tables.usable(shelf.residency, experts, self.policy.capacity)
        residency = self._pinned(shelf.residency, wanted, capacity, pinned)
        there = tables.layer_slots(residency, self.layer, experts, capacity) >= 0
        free = tables.evictable(residency, self.layer, wanted & there, capacity)
        missing = wanted & ~there
        count = jnp.minimum(missing.sum(dtype=jnp.int32), free.sum(dtype=jnp.int32))
        fill = _filled_at_once if self.wide else _filled_in_turn
        residency = fill(residency, keys, self.layer, missing, order, free, count)
        residency = dataclasses.replace(residency, home=home)
        none = jnp.zeros(experts, jnp.int32)
        copies = tables.Copies(slot=none, expert=none, count=count)
        return dataclasses.replace(shelf, residency=residency), copies


def _filled_in_turn(
    residency: Residency,
    keys: jax.Array,
    layer: jax.Array,
    missing: jax.Array,
    order: jax.Array,
    free: jax.Array,
    count: jax.Array,
) -> Residency:
    """The tables after the first `count` missing [E], in order, took slots among `free` [S]."""
    turn = jnp.cumsum(missing[order])

    def one(i: jax.Array, carry: tuple) -> tuple:
        residency, free = carry
        expert = layer * missing.shape[0] + order[jnp.argmax(turn > i)]
        slot = tables.victim(residency, keys, free)
        return tables.place(residency, slot, expert), free.at[slot].set(False)

    return jax.lax.fori_loop(0, count, one, (residency, free))[0]


def _filled_at_once(
    residency: Residency,
    keys: jax.Array,
    layer: jax.Array,
    missing: jax.Array,
    order: jax.Array,
    free: jax.Array,
    count: jax.Array,
) -> Residency:
    """The same for the tables of one layer: who comes n-th takes the slot that is given up n-th.

    Keys must not be NaN.
    """
    del layer
    ids, slots = jnp.arange(missing.shape[0]), jnp.arange(free.shape[0])
    place = jnp.argsort(order)
    # A product, as XLA's CPU backend is slow at sums of so few; counts below 2**24 are exact.
    until = (place <= place[:, None]).astype(jnp.float32)
    turn = jnp.where(missing, (until @ missing.astype(jnp.float32)).astype(jnp.int32), 0)
    # The barriers keep XLA from doing all this anew for each of the pairs below.
    key, empty, turn = jax.lax.optimization_barrier(
        (keys[jnp.maximum(residency.owner, 0)], residency.owner < 0, turn)
    )
    level = jnp.where(empty[:, None] | empty, False, key[:, None] < key)
    alike = (empty[:, None] & empty) | (~empty[:, None] & ~empty & (key[:, None] == key))
    sooner = level | (empty[:, None] & ~empty) | (alike & (slots[:, None] < slots))
    given_up = (free[:, None] & sooner).sum(axis=0, dtype=jnp.int32) + 1
    given_up = jax.lax.optimization_barrier(jnp.where(free & (given_up <= count), given_up, -1))
    takes = turn[:, None] == given_up  # [E, S]
    newest = jnp.where(takes, ids[:, None], 0).sum(axis=0, dtype=jnp.int32)
    owner = jax.lax.optimization_barrier(jnp.where(given_up > 0, newest, residency.owner))
    has = owner == ids[:, None]
    slot_of = jnp.where(has.any(axis=1), jnp.where(has, slots, 0).sum(axis=1, dtype=jnp.int32), -1)
    return Residency(slot_of=slot_of, owner=owner, home=residency.home)
