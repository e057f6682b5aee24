"""One layer's experts under a budget: fetch what is missing, compute, in passes if need be."""

import dataclasses
import math

import chex
import jax
import jax.numpy as jnp

from moejax import kernels
from moejax import residency as tables
from moejax.eviction import Access
from moejax.layout import RecordLayout
from moejax.policy import Policy
from moejax.routing import Routing
from moejax.state import ExpertCache, ExpertStore, pytree

MAX_BLOCK = 32  # tokens that share one read of an expert's weights


@pytree
class Blocks:
    """The picks of a layer, grouped into blocks of M tokens of one expert each."""

    expert: jax.Array  # [NB] i32, expert of the layer, -1 = unused block
    tokens: jax.Array  # [NB, M] i32
    block_of: jax.Array  # [N, K] i32
    row_of: jax.Array  # [N, K] i32


@pytree
class LayerTrace:
    """Counts of one layer's access; see StepTrace."""

    needed: jax.Array
    hits: jax.Array
    fetched: jax.Array
    host: jax.Array
    passes: jax.Array


def resident(policy: Policy, cache: ExpertCache, layer: jax.Array, experts: int) -> jax.Array:
    """[E] which experts of a layer are resident, as routers see it."""
    capacity = tables.usable(cache.residency, experts, policy.capacity)
    return tables.layer_slots(cache.residency, layer, experts, capacity) >= 0


def block_size(tokens: int, top_k: int, experts: int) -> int:
    """M: the mean picks per expert, rounded up to a power of two; depends on static shapes only."""
    mean = max(1, tokens * top_k // experts)
    return min(MAX_BLOCK, 1 << (mean - 1).bit_length())


def group(expert: jax.Array, valid: jax.Array, experts: int) -> Blocks:
    """Group picks [N, K] of valid [N] tokens by expert; independent of what is resident."""
    n, k = expert.shape
    size = block_size(n, k, experts)
    limit = min(n * k, math.ceil(n * k / size) + min(experts, n * k))
    flat = jnp.where(valid[:, None], expert, experts).reshape(-1)
    order = jnp.argsort(flat, stable=True)
    sorted_expert = flat[order]
    counts = jnp.zeros(experts + 1, jnp.int32).at[flat].add(1)
    first_pick = jnp.cumsum(counts) - counts
    blocks = -(-counts // size)
    first_block = jnp.cumsum(blocks) - blocks
    rank = jnp.arange(n * k, dtype=jnp.int32) - first_pick[sorted_expert]
    real = sorted_expert < experts
    block = jnp.where(real, first_block[sorted_expert] + rank // size, limit)
    row = rank % size
    unsorted = jnp.zeros_like(order).at[order].set(jnp.arange(n * k))
    return Blocks(
        expert=jnp.full(limit, -1, jnp.int32).at[block].set(sorted_expert, mode="drop"),
        tokens=jnp.zeros((limit, size), jnp.int32)
        .at[block, row]
        .set((order // k).astype(jnp.int32), mode="drop"),
        block_of=jnp.minimum(block[unsorted], limit - 1).reshape(n, k),
        row_of=row[unsorted].reshape(n, k),
    )


def combine(y: jax.Array, blocks: Blocks, routing: Routing) -> jax.Array:
    """Weighted sum [N, D] of block rows y [NB, M, D], always in rank order."""
    total = jnp.zeros((routing.expert.shape[0], y.shape[-1]), jnp.float32)
    for rank in range(routing.expert.shape[1]):
        rows = y[blocks.block_of[:, rank], blocks.row_of[:, rank]]
        total = total + routing.weight[:, rank, None] * rows
    return total


def access(layer: jax.Array, scores: jax.Array, routing: Routing, valid: jax.Array) -> Access:
    """What a layer uses, in the form evictors observe."""
    experts = scores.shape[-1]
    flat = jnp.where(valid[:, None], routing.expert, experts).reshape(-1)
    positions = jnp.arange(flat.shape[0], dtype=jnp.int32)
    last = jnp.full(experts, -1, jnp.int32).at[flat].max(positions, mode="drop")
    tokens = jnp.zeros(experts, jnp.int32).at[flat].add(1, mode="drop")
    return Access(
        layer=layer, scores=scores, needed=last >= 0, tokens=tokens, last_use=last, valid=valid
    )


def first_use(routing: Routing, valid: jax.Array, experts: int) -> jax.Array:
    """[E] position of each expert's first use among the N * K picks; N * K if unused."""
    flat = jnp.where(valid[:, None], routing.expert, experts).reshape(-1)
    total = flat.shape[0]
    positions = jnp.arange(total, dtype=jnp.int32)
    return jnp.full(experts, total, jnp.int32).at[flat].min(positions, mode="drop")


def apply(
    policy: Policy,
    store: ExpertStore,
    cache: ExpertCache,
    memory: object,
    layer: jax.Array,
    x: jax.Array,  # [N, D] f32
    scores: jax.Array,  # [N, E] f32
    routing: Routing,
    valid: jax.Array,  # [N] bool
) -> tuple[jax.Array, ExpertCache, object, LayerTrace]:
    """Mixture of the routed experts [N, D] f32; fetches misses, in passes when slots are few."""
    chex.assert_rank([x, scores, routing.expert, valid], [2, 2, 2, 1])
    chex.assert_equal_shape_prefix([x, scores, routing.expert, valid], 1)
    chex.assert_type([x, scores], jnp.float32)
    experts = scores.shape[-1]
    used = access(layer, scores, routing, valid)
    memory = policy.evictor.observe(memory, used)
    keys = policy.evictor.keys(memory, layer)
    order = jnp.argsort(first_use(routing, valid, experts)).astype(jnp.int32)
    blocks = group(routing.expert, valid, experts)
    capacity = tables.usable(cache.residency, experts, policy.capacity)
    hits = used.needed & resident(policy, cache, layer, experts)
    missing = used.needed & ~hits
    virtual = cache.pool.shape[0] == 0
    source = store.records if virtual else cache.pool
    y = jnp.zeros((*blocks.tokens.shape, x.shape[-1]), jnp.float32)
    host = jnp.zeros_like(missing)
    if policy.placement.uses_host:
        host = missing & ~policy.placement.fetch(missing, used.tokens, scores)
        ids = layer * experts + blocks.expert
        _, y = _compute(store.layout, store.records, ids, host, blocks, x, y)

    def one_pass(carry: tuple) -> tuple:
        pending, source, residency, y, fetched, passes = carry
        source, residency, count = _fetch(
            capacity, store, source, residency, keys, layer, pending, order, virtual
        )
        slots = tables.layer_slots(residency, layer, experts, capacity)
        run = pending & (slots >= 0)
        index = layer * experts + blocks.expert if virtual else slots[blocks.expert]
        source, y = _compute(store.layout, source, index, run, blocks, x, y)
        return pending & ~run, source, residency, y, fetched + count, passes + 1

    start = (used.needed & ~host, source, cache.residency, y, jnp.int32(0), jnp.int32(0))
    _, source, residency, y, fetched, passes = jax.lax.while_loop(
        lambda carry: carry[0].any(), one_pass, start
    )
    trace = LayerTrace(
        needed=used.needed.sum(dtype=jnp.int32),
        hits=hits.sum(dtype=jnp.int32),
        fetched=fetched,
        host=host.sum(dtype=jnp.int32),
        passes=passes,
    )
    cache = dataclasses.replace(cache, pool=cache.pool if virtual else source, residency=residency)
    return combine(y, blocks, routing), cache, memory, trace


def _compute(
    layout: RecordLayout,
    source: jax.Array,
    index: jax.Array,
    run: jax.Array,
    blocks: Blocks,
    x: jax.Array,
    y: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Fill in y for the blocks of the experts `run` [E], whose records are source[index]."""
    todo = run[blocks.expert] & (blocks.expert >= 0)
    first = jnp.argsort(~todo).astype(jnp.int32)
    count = todo.sum(dtype=jnp.int32)
    return kernels.expert_rows(layout, source, index, first, count, x, blocks.tokens, y)


def _fetch(
    capacity: jax.Array,
    store: ExpertStore,
    pool: jax.Array,
    residency: tables.Residency,
    keys: jax.Array,
    layer: jax.Array,
    pending: jax.Array,
    order: jax.Array,
    virtual: bool,
) -> tuple[jax.Array, tables.Residency, jax.Array]:
    """Bring in as many pending experts as there are evictable slots, in order of first use."""
    experts = pending.shape[0]
    slots = tables.layer_slots(residency, layer, experts, capacity)
    missing = pending & (slots < 0)
    free = tables.evictable(residency, layer, pending & (slots >= 0), capacity)
    count = jnp.minimum(missing.sum(dtype=jnp.int32), free.sum(dtype=jnp.int32))
    queue = order[jnp.argsort(~missing[order])]

    def bring(i: jax.Array, carry: tuple) -> tuple:
        pool, residency, free = carry
        expert = layer * experts + queue[i]
        slot = tables.victim(residency, keys, free)
        if not virtual:
            pool = kernels.fetch(pool, store.records, slot, expert)
        return pool, tables.place(residency, slot, expert), free.at[slot].set(False)

    pool, residency, _ = jax.lax.fori_loop(0, count, bring, (pool, residency, free))
    return pool, residency, count
