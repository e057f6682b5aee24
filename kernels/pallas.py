"""The operations of `kernels` on a GPU; same names and meaning as in `reference`.

Experts run in Pallas kernels, the rest is XLA's. The kernels compile through Triton, which Pallas
offers for every NVIDIA GPU since Ampere; where they cannot be used, experts run in the reference.
"""

import contextlib
import contextvars
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from moejax.kernels import notice, reference
from moejax.kernels.reference import (
    Blocks,
    combine,
    empty_rows,
    linear,
    plan,
    rms_norm,
    softmax,
)
from moejax.layout import RecordLayout

__all__ = [
    "choose",
    "combine",
    "empty_rows",
    "experts",
    "fetch",
    "interpreted",
    "linear",
    "plan",
    "rms_norm",
    "softmax",
]

LEAST_CAPABILITY = 8.0  # Ampere: bfloat16 on tensor cores, asynchronous copies
_interpreting = contextvars.ContextVar("moejax.kernels.pallas.interpreting", default=False)


@contextlib.contextmanager
def interpreted() -> Iterator[None]:
    """Trace the kernels for Pallas' interpreter, on any backend: slow, for tests."""
    token = _interpreting.set(True)
    try:
        yield
    finally:
        _interpreting.reset(token)


def choose(source: jax.Array) -> tuple[str, str]:
    """How experts in `source` [*, R] are computed here: (one of "triton", "interpret",
    "reference", the reason for the latter)."""
    try:
        from moejax.kernels import pallas_experts  # noqa: F401
    except ImportError as error:
        return "reference", f"this JAX has no Triton in Pallas ({error})"
    if _interpreting.get():
        return "interpret", ""
    device = jax.devices()[0]
    if device.platform != "gpu":
        return "reference", f"the backend is {device.platform}"
    capability = str(getattr(device, "compute_capability", ""))
    # ROCm has names here, such as gfx942; its GPUs do not run the inline PTX.
    if not capability.replace(".", "", 1).isdigit():
        return "reference", f"not an NVIDIA GPU ({capability or 'unknown'})"
    if float(capability) < LEAST_CAPABILITY:
        return "reference", f"compute capability {capability} < {LEAST_CAPABILITY}"
    if source.size > 2**31 and source.size * source.dtype.itemsize <= 2**32:
        # Pallas counts elements of arrays up to 4 GiB in signed 32 bits.
        return "reference", "byte records of 2 to 4 GiB are beyond Pallas' 32-bit offsets"
    return "triton", ""


def experts(
    layout: RecordLayout,
    source: jax.Array,
    index: jax.Array,
    blocks: Blocks,
    x: jax.Array,
    rows: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Expert FFN of the blocks whose expert has a record; others keep the rows they have."""
    how, reason = choose(source)
    if how == "reference":
        notice.once(f"experts run in plain XLA, not in Pallas: {reason}")
        return reference.experts(layout, source, index, blocks, x, rows)
    from moejax.kernels import pallas_experts

    interpret = how == "interpret"
    rows = pallas_experts.experts(layout, source, index, blocks, x, rows, interpret=interpret)
    return source, rows


def fetch(
    pool: jax.Array,
    store: jax.Array,
    slot: jax.Array,
    expert: jax.Array,
    count: jax.Array,
    after: jax.Array,
) -> jax.Array:
    """Copy records into slots, in place, once `after` f32 exists: see `reference.fetch`."""
    # No slot is that large, so this changes nothing but the order of things.
    bit = jax.lax.bitcast_convert_type(after.reshape(-1)[0], jnp.int32) & 1
    slot = jnp.minimum(slot, jnp.iinfo(jnp.int32).max - bit)
    return reference.fetch(pool, store, slot, expert, count, after)
