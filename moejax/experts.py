"""One layer's experts under a budget: fetch misses, compute, prefetch for a later layer."""

import dataclasses

import chex
import jax
import jax.numpy as jnp

from moejax import kernels
from moejax import residency as tables
from moejax.eviction import Access
from moejax.policy import Policy
from moejax.prediction import Gate, View
from moejax.routing import Routing
from moejax.state import ExpertCache, ExpertStore, PolicyMemory, pytree


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
    fetched: jax.Array
    prefetched: jax.Array
    host: jax.Array
    passes: jax.Array


def resident(policy: Policy, cache: ExpertCache, layer: jax.Array, experts: int) -> jax.Array:
    """[E] which experts of a layer are resident, as routers see it."""
    return _slots(policy, cache.residency, layer, experts) >= 0


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
    y, cache, trace = _mixture(policy, store, cache, memory, layer, used)
    memory, cache, prefetched = _prefetch(policy, store, cache, memory, layer, used, gate)
    return y, cache, memory, dataclasses.replace(trace, prefetched=prefetched)


def _mixture(
    policy: Policy,
    store: ExpertStore,
    cache: ExpertCache,
    memory: PolicyMemory,
    layer: Layer,
    used: Access,
) -> tuple[jax.Array, ExpertCache, LayerTrace]:
    experts, first_id = layer.experts, layer.index * layer.experts
    keys = policy.evictor.keys(memory.evictor, layer.index)
    order = jnp.argsort(first_use(layer)).astype(jnp.int32)
    picks = jnp.where(layer.valid[:, None], layer.routing.expert, -1)
    plan = kernels.plan(picks, experts)
    hits = used.needed & resident(policy, cache, layer.index, experts)
    missing = used.needed & ~hits
    virtual = cache.pool.shape[0] == 0
    in_store = first_id + jnp.arange(experts, dtype=jnp.int32)
    rows = kernels.empty_rows(plan, layer.x.shape[1])
    host = jnp.zeros_like(missing)
    if policy.placement.uses_host:
        host = missing & ~policy.placement.fetch(missing, used.tokens, layer.scores)
        index = jnp.where(host, in_store, -1)
        _, rows = kernels.experts(store.layout, store.records, index, plan, layer.x, rows)

    def one_pass(carry: tuple) -> tuple:
        pending, source, residency, rows, fetched, passes = carry
        source, residency, count = _bring(
            policy, store, source, residency, keys, layer.index, pending, order, virtual, rows
        )
        slots = _slots(policy, residency, layer.index, experts)
        run = pending & (slots >= 0)
        index = jnp.where(run, in_store if virtual else slots, -1)
        source, rows = kernels.experts(store.layout, source, index, plan, layer.x, rows)
        return pending & ~run, source, residency, rows, fetched + count, passes + 1

    source = store.records if virtual else cache.pool
    start = (used.needed & ~host, source, cache.residency, rows, jnp.int32(0), jnp.int32(0))
    _, source, residency, rows, fetched, passes = jax.lax.while_loop(
        lambda carry: carry[0].any(), one_pass, start
    )
    trace = LayerTrace(
        needed=used.needed.sum(dtype=jnp.int32),
        hits=hits.sum(dtype=jnp.int32),
        fetched=fetched,
        prefetched=jnp.int32(0),
        host=host.sum(dtype=jnp.int32),
        passes=passes,
    )
    cache = ExpertCache(pool=cache.pool if virtual else source, residency=residency)
    return kernels.combine(plan, rows, layer.routing.weight), cache, trace


def _prefetch(
    policy: Policy,
    store: ExpertStore,
    cache: ExpertCache,
    memory: PolicyMemory,
    layer: Layer,
    used: Access,
    gate: Gate,
) -> tuple[PolicyMemory, ExpertCache, jax.Array]:
    """Bring in what the predictor wants for a later layer, as far as there are evictable slots."""
    if not policy.predictor.horizon:
        return memory, cache, jnp.int32(0)
    view = View(
        layer=layer.index,
        hidden=layer.hidden,
        scores=layer.scores,
        tokens=used.tokens,
        valid=layer.valid,
    )
    predictor = policy.predictor.observe(memory.predictor, view)
    memory = dataclasses.replace(memory, predictor=predictor)
    layers = cache.residency.slot_of.shape[0] // layer.experts
    ahead = layer.index + policy.predictor.horizon
    target = jnp.minimum(ahead, layers - 1)
    priority = policy.predictor.wanted(predictor, view, target, gate)
    useful = (ahead < layers) & layer.valid.any() & policy.cutoff.allows(target)
    virtual = cache.pool.shape[0] == 0
    pool, residency, count = _bring(
        policy,
        store,
        store.records if virtual else cache.pool,
        cache.residency,
        policy.evictor.keys(memory.evictor, target),
        target,
        (priority > 0) & useful,
        jnp.argsort(-priority).astype(jnp.int32),
        virtual,
        layer.x,
    )
    cache = ExpertCache(pool=cache.pool if virtual else pool, residency=residency)
    return memory, cache, count


def _slots(
    policy: Policy, residency: tables.Residency, layer: jax.Array, experts: int
) -> jax.Array:
    """[E] slots of a layer's experts, -1 = absent."""
    capacity = tables.usable(residency, experts, policy.capacity)
    return tables.layer_slots(residency, layer, experts, capacity)


def _bring(
    policy: Policy,
    store: ExpertStore,
    pool: jax.Array,
    residency: tables.Residency,
    keys: jax.Array,
    layer: jax.Array,
    wanted: jax.Array,  # [E] bool
    order: jax.Array,  # [E] i32
    virtual: bool,
    after: jax.Array,
) -> tuple[jax.Array, tables.Residency, jax.Array]:
    """Copy as many absent ones of the experts `wanted` as there are evictable slots, in order.

    `after` is the result of the last read of the pool: the copies must not overtake it.
    """
    experts = wanted.shape[0]
    capacity = tables.usable(residency, experts, policy.capacity)
    residency, copies = tables.bring(residency, keys, layer, wanted, order, capacity)
    if not virtual:
        pool = kernels.fetch(pool, store.records, copies.slot, copies.expert, copies.count, after)
    return pool, residency, copies.count
