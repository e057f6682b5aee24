"""The hot path in plain XLA: defines the semantics and runs everywhere."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from moejax.kernels.weight import Weight, decode
from moejax.layout import RecordLayout

MAX_BLOCK = 32  # tokens that share one read of an expert's weights
FIXED_BITS, MAX_SHIFT = 22, 127  # of activations in fixed point


def expert_weights(layout: RecordLayout, record: jax.Array) -> dict[str, jax.Array]:
    """Floats gate_up [2F, D] and down [D, F] of a record [R] of bits."""
    weights = {}
    for name, matrix in layout.matrices.items():
        start, shape = layout.parts[name]
        data = jax.lax.slice(record, (start,), (start + math.prod(shape),))
        weights[name] = decode(matrix, data)
    return weights


def linear(x: jax.Array, weight: Weight, *, round_input: bool = True) -> jax.Array:
    """x [..., cols] f32 times the transpose of weight [rows, cols]: f32 [..., rows].

    bfloat16 weights take x rounded to bfloat16, unless not to `round_input`; sums are always f32.
    """
    return _linear(x, weight.array(), round_input)


def _linear(x: jax.Array, weight: jax.Array, round_input: bool = True) -> jax.Array:
    if not round_input:
        weight = weight.astype(jnp.float32)
    # A GPU would round f32 inputs to TF32 by default.
    exact = jax.lax.Precision.HIGHEST if weight.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        x.astype(weight.dtype),
        weight,
        (((x.ndim - 1,), (1,)), ((), ())),
        precision=exact,
        preferred_element_type=jnp.float32,
    )


def fixed_point(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Integers n [..., cols] i32 and shifts k [..., 1] i32 of finite f32 x, about n / 2**k.

    A row shares its shift, and its integers are at most 2**22. So native kernels take activations
    that meet int8 or int4 weights where a processor multiplies bytes (AVX-512 VNNI, AMX): the
    products add up exactly, whatever their order. Rows that are not finite they take as f32.
    """
    top = jnp.abs(x).max(axis=-1, keepdims=True)
    shift = jnp.where(top > 0, FIXED_BITS - jnp.frexp(top)[1], MAX_SHIFT)
    shift = jnp.minimum(shift, MAX_SHIFT)
    return jnp.rint(jnp.ldexp(x, shift)).astype(jnp.int32), shift


def _swiglu(x: jax.Array, gate_up: jax.Array, down: jax.Array) -> jax.Array:
    gate, up = jnp.split(_linear(x, gate_up), 2, axis=-1)
    return _linear(jax.nn.silu(gate) * up, down)


def rms_norm(x: jax.Array, weight: Weight, eps: float) -> jax.Array:
    """Root-mean-square norm over the last axis, in f32."""
    x = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + eps)
    return x * scale * weight.array().astype(jnp.float32)


def softmax(x: jax.Array) -> jax.Array:
    """Softmax over the last axis."""
    return jax.nn.softmax(x, axis=-1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Blocks:
    """The picks of a layer, grouped into blocks of M tokens of one expert each."""

    picks: jax.Array  # [N, K] i32, -1 = none
    expert: jax.Array  # [NB] i32, expert of the layer, -1 = unused block
    tokens: jax.Array  # [NB, M] i32
    block_of: jax.Array  # [N, K] i32
    row_of: jax.Array  # [N, K] i32


def block_size(tokens: int, top_k: int, experts: int) -> int:
    """M: the mean picks per expert, rounded up to a power of two; depends on static shapes only."""
    mean = max(1, tokens * top_k // experts)
    return min(MAX_BLOCK, 1 << (mean - 1).bit_length())


def plan(picks: jax.Array, experts: int) -> Blocks:
    """Group picks [N, K] (-1 = none) by expert; independent of what is resident."""
    n, k = picks.shape
    size = block_size(n, k, experts)
    limit = min(n * k, math.ceil(n * k / size) + min(experts, n * k))
    flat = jnp.where(picks >= 0, picks, experts).reshape(-1)
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
        picks=picks,
        expert=jnp.full(limit, -1, jnp.int32).at[block].set(sorted_expert, mode="drop"),
        tokens=jnp.zeros((limit, size), jnp.int32)
        .at[block, row]
        .set((order // k).astype(jnp.int32), mode="drop"),
        block_of=jnp.minimum(block[unsorted], limit - 1).reshape(n, k),
        row_of=row[unsorted].reshape(n, k),
    )


def empty_rows(blocks: Blocks, width: int) -> jax.Array:
    """[NB, M, D] f32 zeros, to be filled in by `experts`."""
    return jnp.zeros((*blocks.tokens.shape, width), jnp.float32)


def experts(
    layout: RecordLayout,
    source: jax.Array,
    index: jax.Array,
    blocks: Blocks,
    x: jax.Array,
    rows: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Expert FFN of the blocks whose expert has a record; others keep the rows they have.

    The composition of a block never depends on residency, so neither do its bits.

    Args:
        source: [*, R] bits, the pool or the store.
        index: [E] i32, the row of `source` that holds each expert of the layer, -1 = not now.
        x: [N, D] f32.
        rows: [NB, M, D] f32, results so far.

    Returns:
        (source, rows): the source goes through, so that later writes to it stay behind.
    """
    todo = (index[blocks.expert] >= 0) & (blocks.expert >= 0)
    first = jnp.argsort(~todo).astype(jnp.int32)

    def block(i: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        source, rows = carry
        b = first[i]
        at = index[blocks.expert[b]]
        record = jax.lax.dynamic_index_in_dim(source, at, keepdims=False)
        y = _swiglu(x[blocks.tokens[b]], **expert_weights(layout, record))
        return source, jax.lax.dynamic_update_index_in_dim(rows, y, b, 0)

    return jax.lax.fori_loop(0, todo.sum(dtype=jnp.int32), block, (source, rows))


def combine(blocks: Blocks, rows: jax.Array, weight: jax.Array) -> jax.Array:
    """Sum [N, D] of each token's rows times weight [N, K], always in rank order."""
    total = jnp.zeros((weight.shape[0], rows.shape[-1]), jnp.float32)
    for rank in range(weight.shape[1]):
        picked = rows[blocks.block_of[:, rank], blocks.row_of[:, rank]]
        total = total + weight[:, rank, None] * picked
    return total


def fetch(
    pool: jax.Array,
    store: jax.Array,
    slot: jax.Array,
    expert: jax.Array,
    count: jax.Array,
    after: jax.Array,
) -> jax.Array:
    """Copy the first `count` records `expert` [E] of the store [L * E, R] into slots [E], in place.

    `after` orders the copies behind earlier reads where the backend cannot see that order.
    """
    del after

    def one(i: jax.Array, pool: jax.Array) -> jax.Array:
        record = jax.lax.dynamic_index_in_dim(store, expert[i], keepdims=True)
        record = jax.device_put(record, jax.memory.Space.Device)
        return jax.lax.dynamic_update_slice_in_dim(pool, record, slot[i], 0)

    return jax.lax.fori_loop(0, count, one, pool)
