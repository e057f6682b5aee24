"""Kernels of the decode hot path; knows JAX and weight layouts, never models or policies.

Every operation has a reference in plain XLA that defines it; some have a native form. `using`
chooses while a program is traced.
"""

import contextlib
import contextvars
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp

from moejax.kernels import reference
from moejax.kernels.weight import Weight
from moejax.layout import RecordLayout

__all__ = [
    "NAMES",
    "Weight",
    "chosen",
    "combine",
    "empty_rows",
    "experts",
    "experts_on_host",
    "fetch",
    "linear",
    "plan",
    "rms_norm",
    "softmax",
    "swiglu",
    "using",
]

NAMES = ("reference", "native", "pallas")
_chosen = contextvars.ContextVar("moejax.kernels", default="reference")


@contextlib.contextmanager
def using(name: str) -> Iterator[None]:
    """Trace with the kernels of that name, one of NAMES."""
    token = _chosen.set(name)
    try:
        yield
    finally:
        _chosen.reset(token)


def chosen() -> str:
    """Which kernels are traced now."""
    return _chosen.get()


def _kernels() -> ModuleType:
    if chosen() == "reference":
        return reference
    if chosen() == "pallas":
        from moejax.kernels import pallas

        return pallas
    from moejax.kernels import native_cpu

    return native_cpu


def linear(x: jax.Array, weight: Weight, *, round_input: bool = True) -> jax.Array:
    """x [..., cols] f32 times the transpose of weight [rows, cols]: f32 [..., rows].

    bfloat16 weights take x rounded to bfloat16, unless not to `round_input`; sums are always f32.
    """
    return _kernels().linear(x, weight, round_input=round_input)


def swiglu(x: jax.Array, gate_up: Weight, down: Weight) -> jax.Array:
    """Gated FFN of x [..., D] with gate_up [2F, D] and down [D, F]; f32 result [..., D]."""
    gate, up = jnp.split(linear(x, gate_up), 2, axis=-1)
    return linear(jax.nn.silu(gate) * up, down)


def rms_norm(x: jax.Array, weight: Weight, eps: float) -> jax.Array:
    """Root-mean-square norm over the last axis, in f32."""
    return _kernels().rms_norm(x, weight, eps)


def softmax(x: jax.Array) -> jax.Array:
    """Softmax over the last axis of x [N, E] f32."""
    return _kernels().softmax(x)


def plan(picks: jax.Array, experts: int) -> Any:
    """How the rows of picks [N, K] (-1 = none) among E experts are laid out."""
    return _kernels().plan(picks, experts)


def empty_rows(plan: Any, width: int) -> jax.Array:
    """Zeros, to be filled in by `experts`: one row of D per pick, laid out as planned."""
    return _kernels().empty_rows(plan, width)


def experts(
    layout: RecordLayout,
    source: jax.Array,
    index: jax.Array,
    plan: Any,
    x: jax.Array,
    rows: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Expert FFN of the picks whose expert has a record; other rows stay as they are.

    Args:
        source: [*, R] bits, the pool or the store.
        index: [E] i32, the row of `source` that holds each expert of the layer, -1 = not now.
        x: [N, D] f32.
        rows: results so far.

    Returns:
        (source, rows): the source goes through, so that later writes to it stay behind.
    """
    return _kernels().experts(layout, source, index, plan, x, rows)


def experts_on_host(
    layout: RecordLayout, hosted: Any, index: jax.Array, plan: Any, x: jax.Array, rows: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """`experts` on the host in a program that runs on a GPU, from `host.Records`.

    Returns:
        (rows, status): a `transport.Status` [] i32; but for OK, the rows mean nothing.
    """
    from moejax.kernels import host

    return host.experts(layout, hosted, index, plan, x, rows)


def combine(plan: Any, rows: jax.Array, weight: jax.Array) -> jax.Array:
    """Sum [N, D] of each token's rows times weight [N, K], always in rank order."""
    return _kernels().combine(plan, rows, weight)


def fetch(
    pool: jax.Array,
    store: jax.Array,
    slot: jax.Array,
    expert: jax.Array,
    count: jax.Array,
    after: jax.Array,
) -> jax.Array:
    """Copy the first `count` records `expert` [E] of the store [L * E, R] into slots [E], in place.

    `after` is the result of the last read of the pool, which the copies must not overtake.
    """
    return _kernels().fetch(pool, store, slot, expert, count, after)
