"""The hot path in plain XLA: defines the semantics and runs everywhere."""

import jax
import jax.numpy as jnp
import numpy as np

from moejax.layout import DTYPES, RecordLayout


def expert_weights(layout: RecordLayout, record: jax.Array) -> dict[str, jax.Array]:
    """Weights gate_up [2F, D] and down [D, F] of a record [R] of bits."""
    weights = {}
    for name, (start, shape) in layout.parts.items():
        flat = jax.lax.slice(record, (start,), (start + int(np.prod(shape)),))
        bits = jax.lax.bitcast_convert_type(flat, jnp.dtype(DTYPES[layout.dtype]))
        weights[name] = bits.reshape(shape)
    return weights


def linear(x: jax.Array, weight: jax.Array) -> jax.Array:
    """x [..., D] times weight [F, D] transposed: inputs in the weight's dtype, sums in f32."""
    # A GPU would round f32 inputs to TF32 by default.
    exact = jax.lax.Precision.HIGHEST if weight.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        x.astype(weight.dtype),
        weight,
        (((x.ndim - 1,), (weight.ndim - 1,)), ((), ())),
        precision=exact,
        preferred_element_type=jnp.float32,
    )


def swiglu(x: jax.Array, gate_up: jax.Array, down: jax.Array) -> jax.Array:
    """Gated FFN of x [..., D] with gate_up [2F, D] and down [D, F]; f32 result [..., D]."""
    gate, up = jnp.split(linear(x, gate_up), 2, axis=-1)
    return linear(jax.nn.silu(gate) * up, down)


def expert_rows(
    layout: RecordLayout,
    source: jax.Array,  # [*, R] bits: the pool or the store
    index: jax.Array,  # [NB] i32, row of `source` per block
    todo: jax.Array,  # [NB] i32, blocks to compute come first
    count: jax.Array,  # [] i32, how many of `todo`
    x: jax.Array,  # [N, D]
    tokens: jax.Array,  # [NB, M] i32, the tokens of each block
    y: jax.Array,  # [NB, M, D] f32, results so far
) -> tuple[jax.Array, jax.Array]:
    """Expert FFN of `count` blocks of M tokens; returns (source, y) so that writes stay ordered.

    The composition of a block never depends on residency, so neither do its bits.
    """

    def block(i: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        source, y = carry
        b = todo[i]
        record = jax.lax.dynamic_index_in_dim(source, index[b], keepdims=False)
        rows = swiglu(x[tokens[b]], **expert_weights(layout, record))
        return source, jax.lax.dynamic_update_index_in_dim(y, rows, b, 0)

    return jax.lax.fori_loop(0, count, block, (source, y))


def fetch(pool: jax.Array, store: jax.Array, slot: jax.Array, expert: jax.Array) -> jax.Array:
    """Copy record `expert` of the store [L * E, R] into a slot of the pool [S, R], in place."""
    record = jax.lax.dynamic_index_in_dim(store, expert, keepdims=True)
    record = jax.device_put(record, jax.memory.Space.Device)
    return jax.lax.dynamic_update_slice_in_dim(pool, record, slot, 0)
