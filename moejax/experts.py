"""One layer's experts under a budget: fetch misses, compute, prefetch for a later layer."""

import dataclasses
from typing import Any

import chex
import jax
import jax.numpy as jnp

from moejax import kernels, window
from moejax.kernels.transport import Kind
from moejax.policies import forecast
from moejax.policies.eviction import Access
from moejax.policies.placement import Demand
from moejax.policies.policy import Policy
from moejax.policies.prediction import Ahead, View, in_order, ranks
from moejax.policies.routing import Routing, eligible_scores
from moejax.state import ExpertCache, ExpertStore, PolicyMemory, pytree, static
from moejax.supply import Moved, Shelf, Supply, layer_slots


@pytree
class Layer:
    """What one layer's experts work on; N tokens."""

    index: jax.Array  # [] i32, among the layers with experts
    hidden: jax.Array  # [N, D] f32, residual stream
    x: jax.Array  # [N, D] f32, its norm
    shared: jax.Array | None  # [N, D] f32, output of the shared expert
    scores: jax.Array  # [N, E] f32
    routing: Routing
    valid: jax.Array  # [N] bool
    chance: jax.Array | None = None  # [N] f32, of drafts: see `foresight.Glimpse`
    prefill: bool = static(default=False)
    rule: Any = static(default=None)  # the router's, for drafts

    @property
    def experts(self) -> int:
        """E."""
        return self.scores.shape[1]

    @property
    def picks(self) -> jax.Array:
        """[N, K] i32 experts to run, -1 where there is none."""
        return jnp.where(self.valid[:, None], self.routing.expert, -1)


@pytree
class LayerTrace:
    """Counts of one layer's access; see StepTrace."""

    needed: jax.Array
    hits: jax.Array
    late: jax.Array
    fetched: jax.Array
    prefetched: jax.Array
    host: jax.Array
    overdue: jax.Array
    low: jax.Array
    passes: jax.Array
    stall: jax.Array
    failure: jax.Array
    exact_needed: jax.Array
    exact_hits: jax.Array
    replaced: jax.Array
    predicted: jax.Array
    predicted_right: jax.Array
    prefetch_used: jax.Array
    forecast: jax.Array
    resident: jax.Array
    fresh: jax.Array
    hosted: jax.Array
    lowered: jax.Array


def resident(policy: Policy, cache: ExpertCache, layer: jax.Array, experts: int) -> jax.Array:
    """[E] which experts of a layer are resident, as routers see it."""
    return layer_slots(policy, cache.residency, layer, experts) >= 0


def access(layer: Layer) -> Access:
    """What a layer uses, in the form evictors observe."""
    picks = jnp.where(layer.picks >= 0, layer.picks, layer.experts).reshape(-1)
    positions = jnp.arange(picks.shape[0], dtype=jnp.int32)
    last = jnp.full(layer.experts, -1, jnp.int32).at[picks].max(positions, mode="drop")
    tokens = jnp.zeros(layer.experts, jnp.int32).at[picks].add(1, mode="drop")
    return Access(
        layer=layer.index,
        scores=layer.scores,
        needed=last >= 0,
        tokens=tokens,
        last_use=last,
        valid=layer.valid,
    )


def first_use(layer: Layer) -> jax.Array:
    """[E] position of each expert's first use among the N * K picks; N * K if unused."""
    picks = jnp.where(layer.picks >= 0, layer.picks, layer.experts).reshape(-1)
    positions = jnp.arange(picks.shape[0], dtype=jnp.int32)
    unused = jnp.full(layer.experts, picks.shape[0], jnp.int32)
    return unused.at[picks].min(positions, mode="drop")


def apply(
    policy: Policy,
    store: ExpertStore,
    cache: ExpertCache,
    memory: PolicyMemory,
    layer: Layer,
    ahead: Ahead,
    kv: Any = None,
) -> tuple[jax.Array, ExpertCache, PolicyMemory, Any, LayerTrace]:
    """Mixture of the routed experts [N, D] f32; fetches misses, in passes when slots are few.

    `kv` goes through `ahead.attend` and is returned.
    """
    chex.assert_rank([layer.x, layer.scores, layer.routing.expert, layer.valid], [2, 2, 2, 1])
    chex.assert_equal_shape_prefix([layer.x, layer.scores, layer.routing.expert, layer.valid], 1)
    chex.assert_type([layer.x, layer.scores], jnp.float32)
    virtual = cache.pool.shape[0] == 0
    supply = Supply(policy, store, layer.index, layer.experts, virtual)
    return served(supply, cache, memory, layer, ahead, kv)


def served(
    supply: Supply,
    cache: ExpertCache,
    memory: PolicyMemory,
    layer: Layer,
    ahead: Ahead,
    kv: Any = None,
) -> tuple[jax.Array, ExpertCache, PolicyMemory, Any, LayerTrace]:
    """`apply` with experts from a given supply: replays give one that moves and computes nothing.

    This is all that decides what is resident, fetched, evicted and prefetched.
    """
    observed = supply.policy.evictor.observe
    work = _Work(supply, ahead, layer, access(layer), cache)
    memory = dataclasses.replace(memory, evictor=observed(memory.evictor, work.used))
    y, shelf, memory, kv, trace = work.run(memory, kv)
    return y, supply.close(cache, shelf), memory, kv, trace


def draft(
    policy: Policy, store: ExpertStore, cache: ExpertCache, memory: PolicyMemory, layer: Layer
) -> tuple[jax.Array, ExpertCache, PolicyMemory, LayerTrace]:
    """Mixture [N, D] f32 of what a draft's router chose among residents: nothing is moved for it.

    It waits for a resident whose record is still on its way, which is rare. The evictor does not
    learn of it. The foresight does, and may bring in what the model will need here when it
    verifies.
    """
    virtual = cache.pool.shape[0] == 0
    supply = Supply(policy, store, layer.index, layer.experts, virtual)
    work = _Work(supply, None, layer, access(layer), cache)
    y, shelf, memory, trace = work.draft(memory)
    return y, supply.close(cache, shelf), memory, trace


@dataclasses.dataclass(frozen=True)
class _Work:
    """One layer at work."""

    supply: Supply
    ahead: Ahead | None  # None in drafts
    layer: Layer
    used: Access
    cache: ExpertCache  # as the layer begins

    def run(self, memory: PolicyMemory, kv: Any) -> tuple:
        """Mixture, shelf, memory, KV cache and trace."""
        supply, layer, used = self.supply, self.layer, self.used
        policy = supply.policy
        shelf = supply.open(self.cache)
        there, late = supply.slots(shelf.residency) >= 0, supply.late(shelf)
        low = jnp.zeros_like(there) if layer.routing.low is None else layer.routing.low
        fetchable = used.needed & ~low
        host = self._host(fetchable & ~there, fetchable & there)
        order = jnp.argsort(first_use(layer)).astype(jnp.int32)
        overdue = jnp.zeros_like(host)
        if policy.placement.uses_host and policy.foresight.after:
            overdue = supply.overdue(shelf, fetchable & there, layer.x)
            # Asked for again: it may have been dropped, or never asked for.
            shelf = supply.request(shelf, overdue, order, Kind.PREFETCH, layer.x)
        pending = fetchable & ~host
        plan = kernels.plan(layer.picks, layer.experts)
        rows = kernels.empty_rows(plan, layer.x.shape[1])
        memory, account = forecast.resolve(memory, layer.index, used.needed, there)
        keys = forecast.protected(memory, policy.evictor.keys(memory.evictor, layer.index))
        pinned = window.draft_set(policy, memory)
        shelf = supply.forget(shelf, used.needed, layer.x)
        shelf = supply.request(shelf, pending & ~overdue, order, Kind.DEMAND, layer.x)
        rows = self._from_copies(low, plan, rows)
        moved, prefetched = Moved.none(), jnp.int32(0)
        if policy.predictor.horizon and not (layer.prefill and policy.predictor.attends):
            ready = pending & there & ~account.fresh
            shelf, rows, _, cost = supply.compute(shelf, None, ready, plan, layer.x, rows, overdue)
            shelf, copies = supply.find(shelf, keys, pending, order, pinned)
            pending = pending & ~ready
            moved = moved.add(copies.count, *cost)
            memory, shelf, kv, prefetched = self._prefetch(memory, shelf, kv, plan, rows)
            shelf = supply.copy(shelf, copies, rows)
        if policy.placement.uses_host:
            rows, failure = supply.on_host(shelf, host | overdue, plan, layer.x, rows)
            moved = moved if failure is None else moved.failed(failure)
        choice = (keys, order, pinned, overdue)
        shelf, rows, moved, passes = self._rest(shelf, choice, pending, plan, rows, moved)
        if policy.foresight.after and not layer.prefill:
            shelf, memory, count = self._bring(shelf, memory, rows, fetchable & ~there)
            prefetched += count
        y = kernels.combine(plan, rows, layer.routing.weight)
        where = (there, late, low, host, overdue)
        trace = self._trace(where, account, moved, prefetched, passes)
        return y, shelf, memory, kv, trace

    def draft(self, memory: PolicyMemory) -> tuple:
        """Mixture, shelf, memory and trace of drafted tokens."""
        supply, layer, needed = self.supply, self.layer, self.used.needed
        shelf = supply.open(self.cache)
        there = supply.slots(shelf.residency) >= 0
        low = jnp.zeros_like(there) if layer.routing.low is None else needed & layer.routing.low
        plan = kernels.plan(layer.picks, layer.experts)
        rows = self._from_copies(low, plan, kernels.empty_rows(plan, layer.x.shape[1]))
        run = needed & there & ~low
        shelf, rows, _, cost = supply.compute(shelf, None, run, plan, layer.x, rows)
        prefetched, none = jnp.int32(0), jnp.zeros_like(there)
        if supply.policy.foresight.drafts:
            shelf, memory, prefetched = self._bring(shelf, memory, rows, None)
        y = kernels.combine(plan, rows, layer.routing.weight)
        moved = Moved.none().add(jnp.int32(0), *cost)
        account = forecast.Account.none(layer.experts)
        where = (there, none, low, none, none)
        trace = self._trace(where, account, moved, prefetched, jnp.int32(0))
        return y, shelf, memory, trace

    def _from_copies(self, low: jax.Array, plan: Any, rows: jax.Array) -> jax.Array:
        """The rows with those of the experts `low` [E], run from their low-bit copies."""
        if self.layer.routing.low is None:
            return rows
        return self.supply.from_copies(low, plan, self.layer.x, rows)

    def _bring(
        self, shelf: Shelf, memory: PolicyMemory, rows: jax.Array, missed: jax.Array | None
    ) -> tuple[Shelf, PolicyMemory, jax.Array]:
        """Bring in what the foresight wants for the next run of this layer."""
        layer = self.layer
        seen = window.glimpse(
            self.supply,
            shelf,
            memory,
            layer.scores if layer.rule is None else eligible_scores(layer.rule, layer.scores),
            layer.valid,
            layer.picks.shape[1],
            chance=layer.chance,
            missed=missed,
            used=None if missed is None else self.used,
        )
        return window.bring(self.supply, shelf, memory, seen, rows)

    def _host(self, missing: jax.Array, hits: jax.Array) -> jax.Array:
        """[E] which of the missing experts are computed on the host."""
        placement, layer = self.supply.policy.placement, self.layer
        if not placement.uses_host:
            return jnp.zeros_like(missing)
        tokens, experts = layer.scores.shape
        picked = jnp.where(layer.picks >= 0, layer.picks, experts)
        uses = jnp.zeros((tokens, experts), bool)
        uses = uses.at[jnp.arange(tokens)[:, None], picked].set(True, mode="drop")
        demand = Demand(
            missing=missing,
            hits=hits,
            tokens=self.used.tokens,
            score=jnp.where(uses, layer.scores, 0.0).max(axis=0),
        )
        return missing & ~placement.fetch(demand)

    def _rest(
        self,
        shelf: Shelf,
        choice: tuple[jax.Array, jax.Array, jax.Array | None, jax.Array],
        pending: jax.Array,
        plan: Any,
        rows: jax.Array,
        moved: Moved,
    ) -> tuple[Shelf, jax.Array, Moved, jax.Array]:
        """Run the experts `pending`, in as many passes over the slots as it takes.

        Args:
            choice: the evictor's keys, who comes first, who is pinned, and who runs on the host.
        """
        supply, x, (keys, order, pinned, overdue) = self.supply, self.layer.x, choice

        def one_pass(carry: tuple) -> tuple:
            pending, shelf, rows, moved, passes = carry
            shelf, copies = supply.find(shelf, keys, pending, order, pinned)
            shelf, rows, ran, cost = supply.compute(shelf, copies, pending, plan, x, rows, overdue)
            return pending & ~ran, shelf, rows, moved.add(copies.count, *cost), passes + 1

        start = (pending, shelf, rows, moved, jnp.int32(0))
        _, *rest = jax.lax.while_loop(lambda carry: carry[0].any(), one_pass, start)
        return tuple(rest)

    def _prefetch(
        self, memory: PolicyMemory, shelf: Shelf, kv: Any, plan: Any, rows: jax.Array
    ) -> tuple[PolicyMemory, Shelf, Any, jax.Array]:
        """Bring in what the predictor wants for a later layer, as far as slots may be taken."""
        layer, policy, predictor = self.layer, self.supply.policy, self.supply.policy.predictor
        ahead = layer.index + predictor.horizon
        target = jnp.minimum(ahead, shelf.residency.slot_of.shape[0] // layer.experts - 1)
        later = dataclasses.replace(self.supply, layer=target)
        partial = layer.hidden + kernels.combine(plan, rows, layer.routing.weight)
        if layer.shared is not None:
            partial = partial + layer.shared
        attended = None
        if predictor.attends:
            until = jnp.where(ahead == target, target, layer.index)  # no further than is of use
            attended, kv = self.ahead.attend(partial, kv, layer.index, until)
        view = View(
            layer=layer.index,
            hidden=layer.hidden,
            x=layer.x,
            shared=layer.shared,
            partial=partial,
            ahead=attended,
            scores=layer.scores,
            tokens=self.used.tokens,
            missed=(self.used.needed & ~(self.supply.slots(self.cache.residency) >= 0)).any(),
            resident=later.slots(shelf.residency) >= 0,
            valid=layer.valid,
            top_k=layer.picks.shape[1],
        )
        remembered = predictor.observe(memory.predictor, view)
        memory = dataclasses.replace(memory, predictor=remembered)
        priority = predictor.wanted(remembered, view, target, self.ahead)
        useful = (ahead == target) & layer.valid.any() & policy.cutoff.allows(target)
        wanted, rank = (priority > 0) & useful, ranks(priority)
        shield, order = forecast.shield(memory, layer.index, self.used.needed), in_order(rank)
        kept = window.draft_set(policy, memory)
        shield = shield if kept is None else shield | kept
        wanted = later.within_room(shelf, wanted, rank, shield)
        keys = forecast.greatest(policy.evictor.keys(memory.evictor, target), shield)
        shelf, copies = later.find(shelf, keys, wanted, order)
        shelf = later.deliver(shelf, copies, wanted, order, layer.x)
        brought = wanted & ~view.resident & (later.slots(shelf.residency) >= 0)
        room, divided = later.capacity(shelf.residency), shelf.residency.home[0] >= 0
        memory = forecast.promise(memory, target, wanted, rank, brought, room, divided)
        return memory, shelf, kv, copies.count

    def _exact_picks(self) -> tuple[jax.Array, jax.Array]:
        """[E] experts that the model's own router picks; also how many picks it makes in vain."""
        layer, routing = self.layer, self.layer.routing
        drafts = self.ahead is None
        if not drafts and self.supply.policy.router.exact:
            return self.used.needed, jnp.int32(0)
        picks = jnp.where(layer.valid[:, None], routing.exact, layer.experts)
        exact = jnp.zeros_like(self.used.needed).at[picks].set(True, mode="drop")
        made = (routing.exact[:, :, None] == routing.expert[:, None, :]).any(axis=-1)
        return exact, (~made & layer.valid[:, None]).sum(dtype=jnp.int32)

    def _trace(
        self,
        where: tuple[jax.Array, ...],
        account: forecast.Account,
        moved: Moved,
        prefetched: jax.Array,
        passes: jax.Array,
    ) -> LayerTrace:
        needed, (exact, replaced) = self.used.needed, self._exact_picks()
        there, late, low, host, overdue = where
        hits = needed & there & ~low

        def count(chosen: jax.Array) -> jax.Array:
            return chosen.sum(dtype=jnp.int32)

        return LayerTrace(
            needed=count(needed),
            hits=count(hits),
            late=count(hits & late),
            fetched=moved.records,
            prefetched=prefetched,
            host=count(host),
            overdue=count(overdue),
            low=count(low),
            passes=passes,
            stall=moved.stall,
            failure=moved.failure,
            exact_needed=count(exact),
            exact_hits=count(exact & there),
            replaced=replaced,
            predicted=account.predicted,
            predicted_right=account.right,
            prefetch_used=account.used,
            forecast=account.wanted,
            resident=there,
            fresh=account.fresh & needed,
            hosted=host,
            lowered=low & needed,
        )
