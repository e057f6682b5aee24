"""How one layer's experts come into slots: copied from memory, or moved over a link.

Residency is logical: the tables change when a policy decides, never when a record arrives. A slot
whose record is still on its way is marked `arriving`, and whoever needs it waits. So no result
depends on timing.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from moejax import kernels
from moejax.kernels import transport
from moejax.policies import residency as tables
from moejax.policies.policy import Policy
from moejax.policies.prediction import first
from moejax.state import ExpertCache, ExpertStore, Residency, pytree

TOGETHER = 4  # records that are waited for before their experts run, while others move


@pytree
class Shelf:
    """What the passes of a layer read experts from."""

    source: jax.Array  # the pool, or the store's records when weights are read in place
    residency: Residency
    arriving: jax.Array | None  # see ExpertCache


@pytree
class Moved:
    """What was brought."""

    records: jax.Array  # [] i32
    stall: jax.Array  # [] i32, microseconds
    failure: jax.Array  # [] i32, see StepTrace

    @classmethod
    def none(cls) -> "Moved":
        """Nothing yet."""
        zero = jnp.int32(0)
        return cls(records=zero, stall=zero, failure=zero)

    def add(self, count: jax.Array, stall: jax.Array, failure: jax.Array) -> "Moved":
        """With a pass more; the first failure stays."""
        return Moved(
            records=self.records + count,
            stall=self.stall + stall,
            failure=jnp.where(self.failure > 0, self.failure, failure),
        )

    def failed(self, failure: jax.Array) -> "Moved":
        """With a failure that is not the link's, or 0."""
        return self.add(jnp.int32(0), jnp.int32(0), failure)


def layer_slots(policy: Policy, residency: Residency, layer: jax.Array, experts: int) -> jax.Array:
    """[E] slots of a layer's experts, -1 = absent."""
    capacity = tables.usable(residency, experts, policy.capacity)
    return tables.layer_slots(residency, layer, experts, capacity)


@dataclasses.dataclass(frozen=True)
class Supply:
    """The supply of one layer's experts under a policy."""

    policy: Policy
    store: ExpertStore
    layer: jax.Array  # [] i32
    experts: int  # E
    virtual: bool  # weights are read in place: the cache has no pool

    def open(self, cache: ExpertCache) -> Shelf:
        """The shelf that passes work on."""
        return Shelf(
            source=self.store.records if self.virtual else cache.pool,
            residency=cache.residency,
            arriving=cache.arriving,
        )

    def close(self, cache: ExpertCache, shelf: Shelf) -> ExpertCache:
        """The cache after the passes."""
        return ExpertCache(
            pool=cache.pool if self.virtual else shelf.source,
            residency=shelf.residency,
            arriving=shelf.arriving,
        )

    def capacity(self, residency: Residency) -> jax.Array:
        """[] i32 slots in use that may serve the layer."""
        in_use = tables.usable(residency, self.experts, self.policy.capacity)
        serves = (residency.home < 0) | (residency.home == self.layer)
        return (serves & (jnp.arange(serves.shape[0]) < in_use)).sum(dtype=jnp.int32)

    def slots(self, residency: Residency) -> jax.Array:
        """[E] slots of the layer's experts, -1 = absent."""
        return layer_slots(self.policy, residency, self.layer, self.experts)

    def late(self, shelf: Shelf) -> jax.Array:
        """[E] which experts have a slot whose record is still to come."""
        if shelf.arriving is None:
            return jnp.zeros(self.experts, bool)
        slots = self.slots(shelf.residency)
        return (slots >= 0) & shelf.arriving[slots]

    def overdue(self, shelf: Shelf, needed: jax.Array, after: jax.Array) -> jax.Array:
        """[E] those `needed` that have a slot, but whose record the link has not brought yet.

        This is the only thing here that depends on time. It may decide where an expert is computed.
        """
        if shelf.arriving is None:
            return jnp.zeros(self.experts, bool)
        late = needed & self.late(shelf)
        ids = jnp.where(late, self.ids(), -1)
        return late & ~transport.landed(self.store.link, ids, after)

    def ids(self) -> jax.Array:
        """[E] ids of the layer's experts."""
        return self.layer * self.experts + jnp.arange(self.experts, dtype=jnp.int32)

    def find(
        self,
        shelf: Shelf,
        keys: jax.Array,
        wanted: jax.Array,
        order: jax.Array,
        pinned: jax.Array | None = None,
    ) -> tuple[Shelf, tables.Copies]:
        """Give slots to as many absent ones of the experts `wanted` [E] as possible, in order.

        Those of experts that are `pinned` [L * E] stay, unless there are no others.
        """
        home = shelf.residency.home
        capacity = tables.usable(shelf.residency, self.experts, self.policy.capacity)
        residency = self._pinned(shelf.residency, wanted, capacity, pinned)
        if kernels.chosen() != "native":
            residency, copies = tables.bring(residency, keys, self.layer, wanted, order, capacity)
        else:
            slot_of, owner, slot, expert, count = transport.plan_fetch(
                residency.slot_of,
                residency.owner,
                residency.home,
                keys,
                wanted,
                order,
                self.layer,
                capacity,
            )
            residency = Residency(slot_of=slot_of, owner=owner, home=home)
            copies = tables.Copies(slot=slot, expert=expert, count=count)
        residency = dataclasses.replace(residency, home=home)
        arriving = shelf.arriving
        if arriving is not None:
            brought = jnp.arange(self.experts) < copies.count
            slot = jnp.where(brought, copies.slot, arriving.shape[0])
            arriving = arriving.at[slot].set(True, mode="drop")
        return Shelf(source=shelf.source, residency=residency, arriving=arriving), copies

    def _pinned(
        self,
        residency: Residency,
        wanted: jax.Array,
        capacity: jax.Array,
        pinned: jax.Array | None,
    ) -> Residency:
        """The tables, in which the slots of pinned experts serve no layer, if others are free."""
        if pinned is None:
            return residency
        owner, layers = residency.owner, residency.slot_of.shape[0] // self.experts
        away = (owner >= 0) & pinned[jnp.maximum(owner, 0)]
        kept = dataclasses.replace(residency, home=jnp.where(away, layers, residency.home))
        there = self.slots(residency) >= 0
        free = tables.evictable(kept, self.layer, wanted & there, capacity).any()
        return dataclasses.replace(kept, home=jnp.where(free, kept.home, residency.home))

    def request(
        self, shelf: Shelf, wanted: jax.Array, order: jax.Array, kind: Any, after: jax.Array
    ) -> Shelf:
        """Begin to move what is `wanted` [E] and not there over the link; nothing without one."""
        if shelf.arriving is None:
            return shelf
        slots = self.slots(shelf.residency)
        wanted = wanted & ((slots < 0) | self.late(shelf))
        first, count = _first(wanted[order])
        token = transport.request(self.store.link, self.ids()[order][first], count, kind, after)
        return dataclasses.replace(shelf, arriving=_behind(shelf.arriving, token))

    def within_room(
        self, shelf: Shelf, wanted: jax.Array, rank: jax.Array, shield: jax.Array
    ) -> jax.Array:
        """[E] those `wanted` that are there, and the first others, as many as there are slots for.

        Args:
            rank: [E] i32, who comes first.
            shield: [L * E] bool, experts that must not leave.
        """
        residency = shelf.residency
        capacity = tables.usable(residency, self.experts, self.policy.capacity)
        there = self.slots(residency) >= 0
        free = tables.evictable(residency, self.layer, wanted & there, capacity)
        owner = residency.owner
        room = (free & ((owner < 0) | ~shield[jnp.maximum(owner, 0)])).sum()
        return (wanted & there) | first(wanted & ~there, rank, room)

    def _run(
        self, shelf: Shelf, chosen: jax.Array, plan: Any, x: jax.Array, rows: jax.Array
    ) -> tuple[Shelf, jax.Array]:
        """Run the experts `chosen` [E], whose records are all in their slots."""
        where = self.ids() if self.virtual else self.slots(shelf.residency)
        index = jnp.where(chosen, where, -1)
        source, rows = kernels.experts(self.store.layout, shelf.source, index, plan, x, rows)
        return dataclasses.replace(shelf, source=source), rows

    def copy(self, shelf: Shelf, copies: tables.Copies, after: jax.Array) -> Shelf:
        """Carry out the copies now, if memory holds the records; over a link, nothing."""
        if self.virtual or shelf.arriving is not None:
            return shelf
        source = kernels.fetch(
            shelf.source, self.store.records, copies.slot, copies.expert, copies.count, after
        )
        return dataclasses.replace(shelf, source=source)

    def from_copies(self, chosen: jax.Array, plan: Any, x: jax.Array, rows: jax.Array) -> jax.Array:
        """Run the experts `chosen` [E] from their low-bit copies."""
        index, copies = jnp.where(chosen, self.ids(), -1), self.store.low
        return kernels.experts(copies.layout, copies.records, index, plan, x, rows)[1]

    def on_host(
        self, shelf: Shelf, chosen: jax.Array, plan: Any, x: jax.Array, rows: jax.Array
    ) -> tuple[jax.Array, jax.Array | None]:
        """Run the experts `chosen` [E] where memory holds their records.

        Returns:
            The rows, and the failure [] i32 of a host beside a GPU, None where there is none.
        """
        index, link = jnp.where(chosen, self.ids(), -1), self.store.link
        if self.store.host is not None:
            layout, host = self.store.layout, self.store.host
            return kernels.experts_on_host(layout, host, index, plan, x, rows)
        if link is not None:
            # Behind the requests, so that the link works meanwhile; and of x too: the others may be
            # the same in every layer, and XLA would begin once.
            before = [x[0, 0], rows.reshape(-1)[0], shelf.arriving[0].astype(x.dtype)]
            x = _behind(x, transport.host_begin(link, jnp.stack(before)))
        _, rows = kernels.experts(self.store.layout, self.store.records, index, plan, x, rows)
        if link is not None:
            count = chosen.sum(dtype=jnp.int32)
            rows = _behind(rows, transport.host_end(link, count, rows, index))
        return rows, None

    def compute(
        self,
        shelf: Shelf,
        copies: tables.Copies | None,
        pending: jax.Array,
        plan: Any,
        x: jax.Array,
        rows: jax.Array,
        elsewhere: jax.Array | None = None,
    ) -> tuple[Shelf, jax.Array, jax.Array, tuple[jax.Array, jax.Array]]:
        """Run those of the experts `pending` [E] that have a slot, once their records are there.

        Args:
            copies: what to copy into slots before, None = nothing.
            elsewhere: [E] of them, those that are computed elsewhere and only keep their slots.

        Returns:
            The shelf, the rows, which experts ran [E], and (stall, failure) of this pass.
        """
        slots = self.slots(shelf.residency)
        run = pending & (slots >= 0)
        if shelf.arriving is not None:
            here = run if elsewhere is None else run & ~elsewhere
            shelf, rows, _, cost = self._compute_over_link(shelf, slots, here, plan, x, rows)
            return shelf, rows, run, cost
        if copies is not None:
            shelf = self.copy(shelf, copies, rows)
        shelf, rows = self._run(shelf, run, plan, x, rows)
        zero = jnp.int32(0)
        return shelf, rows, run, (zero, zero)

    def _compute_over_link(
        self,
        shelf: Shelf,
        slots: jax.Array,
        run: jax.Array,
        plan: Any,
        x: jax.Array,
        rows: jax.Array,
    ) -> tuple[Shelf, jax.Array, jax.Array, tuple[jax.Array, jax.Array]]:
        """Experts that are there run while others move; those run a few at a time, as they come."""
        layout, ids = self.store.layout, self.ids()
        late = run & self.late(shelf)
        index = jnp.where(run & ~late, slots, -1)
        source, rows = kernels.experts(layout, shelf.source, index, plan, x, rows)

        def some(carry: tuple) -> tuple:
            late, source, arriving, rows, stall, failure = carry
            first, count = _first(late)
            token = transport.request(
                self.store.link, ids[first], count, transport.Kind.DEMAND, rows
            )
            now = late & (jnp.cumsum(late) <= TOGETHER)
            source, status = transport.commit(
                self.store.link,
                source,
                slots[first],
                ids[first],
                jnp.minimum(_behind(count, token), TOGETHER),
                rows,
            )
            index = jnp.where(now, slots, -1)
            source, rows = kernels.experts(layout, source, index, plan, x, rows)
            # What failed stays marked, so that whoever needs it next asks again.
            there = jnp.where(now & (status[0] == 0), slots, arriving.shape[0])
            arriving = arriving.at[there].set(False, mode="drop")
            failure = jnp.where(failure > 0, failure, status[0])
            return late & ~now, source, arriving, rows, stall + status[2], failure

        zero = jnp.int32(0)
        start = (late, source, shelf.arriving, rows, zero, zero)
        _, source, arriving, rows, stall, failure = jax.lax.while_loop(
            lambda carry: carry[0].any(), some, start
        )
        shelf = Shelf(source=source, residency=shelf.residency, arriving=arriving)
        return shelf, rows, run, (stall, failure)

    def deliver(
        self,
        shelf: Shelf,
        copies: tables.Copies,
        wanted: jax.Array,
        order: jax.Array,
        after: jax.Array,
    ) -> Shelf:
        """Bring what `find` gave slots to, ahead of need: copied now, or begun over the link."""
        if shelf.arriving is not None:
            resident = self.slots(shelf.residency) >= 0
            return self.request(shelf, wanted & resident, order, transport.Kind.PREFETCH, after)
        return self.copy(shelf, copies, after)

    def forget(self, shelf: Shelf, needed: jax.Array, after: jax.Array) -> Shelf:
        """Drop what has lost its slot, and stop what is on its way to this layer but not `needed`.

        The tables stay: should it be needed later, it is asked for again. What a foresight brings
        in when a layer has run is not stopped.
        """
        if shelf.arriving is None or not self.policy.looks_ahead:
            return shelf
        token = transport.drop(self.store.link, shelf.residency.slot_of, after)
        shelf = dataclasses.replace(shelf, arriving=_behind(shelf.arriving, token))
        if not (self.policy.predictor.horizon or self.policy.foresight.drafts):
            return shelf
        keep = jnp.ones(shelf.residency.slot_of.shape[0], bool)
        keep = jax.lax.dynamic_update_slice(keep, needed, (self.layer * self.experts,))
        token = transport.cancel(self.store.link, keep, after)
        return dataclasses.replace(shelf, arriving=_behind(shelf.arriving, token))


def _first(chosen: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Positions [E] of the chosen, in order and before all others, and how many there are."""
    return jnp.argsort(~chosen, stable=True).astype(jnp.int32), chosen.sum(dtype=jnp.int32)


def _behind(array: jax.Array, token: jax.Array) -> jax.Array:
    """The array, to be had only after the token (which is never this small)."""
    other = -array if jnp.issubdtype(array.dtype, jnp.floating) else ~array
    return jnp.where(token[0] == jnp.iinfo(jnp.int32).min, other, array)
