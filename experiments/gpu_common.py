"""What the parts of the GPU suite share: shapes, random bits made in place, timing."""

import contextlib
import dataclasses
import functools
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from moejax.kernels import pallas
from moejax.layout import RecordLayout


@dataclasses.dataclass(frozen=True)
class Shape:
    """The experts of a published model."""

    name: str
    width: int  # D
    expert_width: int  # F
    experts: int  # E
    top_k: int  # K


SHAPES = (
    Shape("Qwen3-30B-A3B", 2048, 768, 128, 8),
    Shape("OLMoE", 2048, 1024, 64, 8),
    Shape("DeepSeek-V2-Lite", 2048, 1408, 64, 6),
    Shape("Mixtral", 4096, 14336, 8, 2),
)
TINY = Shape("tiny", 64, 48, 4, 2)


def on_gpu() -> bool:
    """Whether the backend is a GPU."""
    return jax.default_backend() == "gpu"


def kernel_mode() -> Any:
    """A context in which Pallas kernels run: interpreted without a GPU."""
    return contextlib.nullcontext() if on_gpu() else pallas.interpreted()


@functools.partial(jax.jit, static_argnames=("rows", "layout"))
def random_records(rows: int, layout: RecordLayout) -> jax.Array:
    """Records [rows, R] of bits that are small finite weights, a hash of their place.

    Made by one fused kernel, so that 58 GB need no scratch memory.
    """
    shape = (rows, layout.elements)
    row = jax.lax.broadcasted_iota(jnp.uint32, shape, 0)
    column = jax.lax.broadcasted_iota(jnp.uint32, shape, 1)
    mixed = row * jnp.uint32(2654435761) ^ column * jnp.uint32(2246822519)
    mixed = (mixed ^ (mixed >> 15)) * jnp.uint32(3266489917)
    mixed = mixed ^ (mixed >> 13)
    if layout.dtype == "float32":
        return (mixed & jnp.uint32(0x80FFFFFF)) | jnp.uint32(0x3C000000)
    if layout.dtype == "bfloat16":
        return ((mixed & jnp.uint32(0x80FF)) | jnp.uint32(0x3C00)).astype(jnp.uint16)
    bits = mixed & 0xFF
    # The high byte of a scale makes it about 2^-10: results then neither overflow nor vanish.
    size, high = (4, 0x3A) if layout.dtype == "int8" else (2, 0x16)
    for name, matrix in layout.matrices.items():
        first = layout.offsets[name] + matrix.scales_at
        inside = (column >= first) & (column < first + matrix.rows * matrix.scale_row_bytes)
        bits = jnp.where(inside & ((column - first) % size == size - 1), high, bits)
    return bits.astype(jnp.uint8)


def timed(function: Callable, *arguments: Any, repeats: int = 5) -> list[float]:
    """Seconds of each call, after one that compiles; results are waited for."""
    jax.block_until_ready(function(*arguments))
    samples = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        samples.append(time.perf_counter() - start)
    return samples


def median(samples: list[float]) -> float:
    """The median of some samples."""
    return statistics.median(samples)


def guarded(row: dict, measure: Callable[[], dict]) -> dict:
    """The row with what was measured, or with the error of it."""
    try:
        return {**row, **measure()}
    except Exception as error:  # one case must not end a part
        text = "".join(traceback.format_exception(error))
        return {**row, "error": f"{type(error).__name__}: {error}"[:500], "trace": text[-1500:]}


@functools.cache
def memory_rate(quick: bool) -> float:
    """Bytes per second of reading a large array once."""
    size = 1 << (22 if quick else 31)
    array = jnp.ones(size // 4, jnp.float32)
    total = jax.jit(lambda a: a.sum())
    return size / min(timed(total, array))


def each(values: Any) -> Iterator[Any]:
    """The values, with compiled programs and dead buffers forgotten in between."""
    for value in values:
        yield value
        jax.clear_caches()
