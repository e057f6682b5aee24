"""One layer's experts under a budget: fetch misses, compute, prefetch for a later layer."""

import dataclasses

import chex
import jax
import jax.numpy as jnp

from moejax import kernels
from moejax.eviction import Access
from moejax.kernels.transport import Kind
from moejax.policy import Policy
from moejax.prediction import Gate, View
from moejax.routing import Routing
from moejax.state import ExpertCache, ExpertStore, PolicyMemory, pytree
from moejax.supply import Moved, Shelf, Supply, layer_slots


@pytree
class Layer:
    """What one layer's experts work on; N tokens."""

    index: jax.Array  # [] i32, among the layers with experts
    hidden: jax.Array  # [N, D] f32, residual stream
    x: jax.Array  # [N, D] f32, its norm
    scores: jax.Array  # [N, E] f32
    routing: Routing
    valid: jax.Array  # [N] bool

    @property
    def experts(self) -> int:
        """E."""
        return self.scores.shape[1]


@pytree
class LayerTrace:
    """Counts of one layer's access; see StepTrace."""

    needed: jax.Array
    hits: jax.Array
    late: jax.Array
    fetched: jax.Array
    prefetched: jax.Array
    host: jax.Array
    passes: jax.Array
    stall: jax.Array
    failure: jax.Array


def resident(policy: Policy, cache: ExpertCache, layer: jax.Array, experts: int) -> jax.Array:
    """[E] which experts of a layer are resident, as routers see it."""
    return layer_slots(policy, cache.residency, layer, experts) >= 0


def access(layer: Layer) -> Access:
    """What a layer uses, in the form evictors observe."""
    picks = jnp.where(layer.valid[:, None], layer.routing.expert, layer.experts).reshape(-1)
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
    picks = jnp.where(layer.valid[:, None], layer.routing.expert, layer.experts).reshape(-1)
    positions = jnp.arange(picks.shape[0], dtype=jnp.int32)
    unused = jnp.full(layer.experts, picks.shape[0], jnp.int32)
    return unused.at[picks].min(positions, mode="drop")


def apply(
    policy: Policy,
    store: ExpertStore,
    cache: ExpertCache,
    memory: PolicyMemory,
    layer: Layer,
    gate: Gate,
) -> tuple[jax.Array, ExpertCache, PolicyMemory, LayerTrace]:
    """Mixture of the routed experts [N, D] f32; fetches misses, in passes when slots are few."""
    chex.assert_rank([layer.x, layer.scores, layer.routing.expert, layer.valid], [2, 2, 2, 1])
    chex.assert_equal_shape_prefix([layer.x, layer.scores, layer.routing.expert, layer.valid], 1)
    chex.assert_type([layer.x, layer.scores], jnp.float32)
    used = access(layer)
    memory = dataclasses.replace(memory, evictor=policy.evictor.observe(memory.evictor, used))
    keys = policy.evictor.keys(memory.evictor, layer.index)
    virtual = cache.pool.shape[0] == 0
    supply = Supply(policy, store, layer.index, layer.experts, virtual)
    shelf = supply.open(cache)
    y, shelf, trace = _mixture(supply, shelf, keys, layer, used)
    if policy.predictor.horizon:
        memory, shelf, prefetched = _prefetch(supply, shelf, memory, layer, used, gate)
        trace = dataclasses.replace(trace, prefetched=prefetched)
    return y, supply.close(cache, shelf), memory, trace


def _mixture(
    supply: Supply, shelf: Shelf, keys: jax.Array, layer: Layer, used: Access
) -> tuple[jax.Array, Shelf, LayerTrace]:
    policy, store = supply.policy, supply.store
    order = jnp.argsort(first_use(layer)).astype(jnp.int32)
    picks = jnp.where(layer.valid[:, None], layer.routing.expert, -1)
    plan = kernels.plan(picks, layer.experts)
    hits = used.needed & (supply.slots(shelf.residency) >= 0)
    missing = used.needed & ~hits
    late = supply.late(shelf)
    rows = kernels.empty_rows(plan, layer.x.shape[1])
    host = jnp.zeros_like(missing)
    if policy.placement.uses_host:
        host = missing & ~policy.placement.fetch(missing, used.tokens, layer.scores)
    shelf = supply.request(shelf, used.needed & ~host, order, Kind.DEMAND, layer.x)
    if policy.placement.uses_host:
        index = jnp.where(host, supply.ids(), -1)
        _, rows = kernels.experts(store.layout, store.records, index, plan, layer.x, rows)

    def one_pass(carry: tuple) -> tuple:
        pending, shelf, rows, moved, passes = carry
        shelf, copies = supply.find(shelf, keys, pending, order)
        shelf, rows, ran, cost = supply.compute(shelf, copies, pending, plan, layer.x, rows)
        return pending & ~ran, shelf, rows, moved.add(copies.count, *cost), passes + 1

    start = (used.needed & ~host, shelf, rows, Moved.none(), jnp.int32(0))
    _, shelf, rows, moved, passes = jax.lax.while_loop(
        lambda carry: carry[0].any(), one_pass, start
    )
    trace = LayerTrace(
        needed=used.needed.sum(dtype=jnp.int32),
        hits=hits.sum(dtype=jnp.int32),
        late=(hits & late).sum(dtype=jnp.int32),
        fetched=moved.records,
        prefetched=jnp.int32(0),
        host=host.sum(dtype=jnp.int32),
        passes=passes,
        stall=moved.stall,
        failure=moved.failure,
    )
    return kernels.combine(plan, rows, layer.routing.weight), shelf, trace


def _prefetch(
    supply: Supply, shelf: Shelf, memory: PolicyMemory, layer: Layer, used: Access, gate: Gate
) -> tuple[PolicyMemory, Shelf, jax.Array]:
    """Bring in what the predictor wants for a later layer, as far as there are evictable slots."""
    policy = supply.policy
    view = View(
        layer=layer.index,
        hidden=layer.hidden,
        scores=layer.scores,
        tokens=used.tokens,
        valid=layer.valid,
    )
    predictor = policy.predictor.observe(memory.predictor, view)
    memory = dataclasses.replace(memory, predictor=predictor)
    shelf = supply.forget(shelf, layer.x)
    ahead = layer.index + policy.predictor.horizon
    target = jnp.minimum(ahead, shelf.residency.slot_of.shape[0] // layer.experts - 1)
    priority = policy.predictor.wanted(predictor, view, target, gate)
    useful = (ahead == target) & layer.valid.any() & policy.cutoff.allows(target)
    wanted, order = (priority > 0) & useful, jnp.argsort(-priority).astype(jnp.int32)
    keys = policy.evictor.keys(memory.evictor, target)
    later = dataclasses.replace(supply, layer=target)
    shelf, copies = later.find(shelf, keys, wanted, order)
    shelf = later.deliver(shelf, copies, wanted, order, layer.x)
    return memory, shelf, copies.count
