"""The operations of `kernels` on the native library; same names and meaning as in `reference`."""

import jax
import jax.numpy as jnp

from moejax.kernels import cpu, transport
from moejax.kernels.weight import Weight
from moejax.layout import RecordLayout

fetch = transport.copy_records


def linear(x: jax.Array, weight: Weight, *, round_input: bool = True) -> jax.Array:
    """x [..., cols] f32 times the transpose of weight [rows, cols]."""
    data, layer = _stack(weight)
    layout = weight.layout
    return cpu.linear(
        x,
        data,
        layer,
        rows=layout.rows,
        cols=layout.cols,
        format=layout.format,
        round_input=round_input,
    )


def rms_norm(x: jax.Array, weight: Weight, eps: float) -> jax.Array:
    """Root-mean-square norm over the last axis."""
    data, layer = _stack(weight)
    rows = x.reshape(-1, x.shape[-1])
    return cpu.rms_norm(rows, data, layer, eps=eps).reshape(x.shape)


def softmax(x: jax.Array) -> jax.Array:
    """Softmax over the last axis of x [N, E]."""
    return cpu.softmax(x)


def plan(picks: jax.Array, experts: int) -> jax.Array:
    """The picks themselves: the kernel groups them."""
    del experts
    return picks


def empty_rows(picks: jax.Array, width: int) -> jax.Array:
    """[N, K, D] f32 zeros."""
    return jnp.zeros((*picks.shape, width), jnp.float32)


def experts(
    layout: RecordLayout,
    source: jax.Array,
    index: jax.Array,
    picks: jax.Array,
    x: jax.Array,
    rows: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Expert FFN of the picks whose expert has a record."""
    rows = cpu.experts(
        source,
        index,
        picks,
        x,
        rows,
        expert_width=layout.expert_width,
        format=layout.dtype,
        gate_up_offset=layout.offsets["gate_up"],
        down_offset=layout.offsets["down"],
    )
    return source, rows


def combine(picks: jax.Array, rows: jax.Array, weight: jax.Array) -> jax.Array:
    """Sum of each token's rows times weight [N, K], in rank order."""
    del picks
    total = jnp.zeros((rows.shape[0], rows.shape[2]), jnp.float32)
    for rank in range(weight.shape[1]):
        total = total + weight[:, rank, None] * rows[:, rank]
    return total


def _stack(weight: Weight) -> tuple[jax.Array, jax.Array]:
    """(data [layers, ...], layer)."""
    if weight.layer is None:
        return weight.data[None], jnp.int32(0)
    return weight.data, weight.layer
