"""The hot path in native kernels: XLA FFI calls into the library of `build`, CPU only."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from moejax.errors import MoejaxError
from moejax.kernels import build

FORMATS = {"float32": 0, "bfloat16": 1, "int8": 2, "int4g32": 3, "int4g64": 4}
# Types in which each format is held: bits, or the floats themselves.
HELD = {"float32": (jnp.uint32, jnp.float32), "bfloat16": (jnp.uint16, jnp.bfloat16)}
MAX_HEAD = 1024  # channels of an attention head, kMaxHead of kernels.h


def linear(
    x: jax.Array,
    bits: jax.Array,
    layer: jax.Array,
    *,
    rows: int,
    cols: int,
    format: str,
    round_input: bool = True,
) -> jax.Array:
    """x times the matrix of one layer, transposed.

    x [..., cols] f32; bits [L, ...] in the format's storage type; layer [] i32. Without
    `round_input`, bfloat16 weights take the f32 activation. Result [..., rows] f32.
    """
    _typed("x", x, jnp.float32)
    _stored("bits", bits, format)
    _scalar("layer", layer)
    if x.ndim < 1 or x.shape[-1] != cols:
        raise ValueError(f"x must be [..., {cols}], got {x.shape}")
    out = jax.ShapeDtypeStruct((*x.shape[:-1], rows), jnp.float32)
    return _call("moejax_linear", out)(
        x,
        bits,
        jnp.asarray(layer, jnp.int32),
        rows=np.int64(rows),
        cols=np.int64(cols),
        format=np.int64(FORMATS[format]),
        round_input=bool(round_input),
    )


def experts(
    source: jax.Array,
    index: jax.Array,
    picks: jax.Array,
    x: jax.Array,
    y: jax.Array,
    *,
    expert_width: int,
    format: str,
    gate_up_offset: int,
    down_offset: int,
) -> jax.Array:
    """y with the results of the picks whose expert has a record; the other rows stay.

    source [S, R] bits; index [E] i32, row of `source` per expert, -1 = not now; picks [N, K] i32,
    -1 = none; x [N, D] f32; y [N, K, D] f32; offsets in bytes within a record. Result [N, K, D].
    """
    _stored("source", source, format)
    _typed("index", index, jnp.int32)
    _typed("picks", picks, jnp.int32)
    _typed("x", x, jnp.float32)
    _typed("y", y, jnp.float32)
    if source.ndim != 2 or index.ndim != 1 or picks.ndim != 2 or x.ndim != 2:
        raise ValueError(
            "source, index, picks and x must be [S, R], [E], [N, K] and [N, D], got "
            f"{source.shape}, {index.shape}, {picks.shape} and {x.shape}"
        )
    if picks.shape[0] != x.shape[0] or y.shape != (*picks.shape, x.shape[1]):
        raise ValueError(f"y must be {(*picks.shape, x.shape[1])} for {x.shape}, got {y.shape}")
    out = jax.ShapeDtypeStruct(y.shape, y.dtype)
    return _call("moejax_experts", out, aliases={4: 0})(
        source,
        index,
        picks,
        x,
        y,
        width=np.int64(x.shape[1]),
        expert_width=np.int64(expert_width),
        format=np.int64(FORMATS[format]),
        gate_up_offset=np.int64(gate_up_offset),
        down_offset=np.int64(down_offset),
    )


def rms_norm(x: jax.Array, bits: jax.Array, layer: jax.Array, *, eps: float) -> jax.Array:
    """Root-mean-square norm of x [..., D] f32 with weights [L, D] (f32 or bf16, or their bits)."""
    _typed("x", x, jnp.float32)
    _typed("bits", bits, *HELD["float32"], *HELD["bfloat16"])
    _scalar("layer", layer)
    if bits.ndim != 2 or x.ndim < 1 or x.shape[-1] != bits.shape[1] or 0 in bits.shape:
        raise ValueError(f"x and bits must be [..., D] and [L, D], got {x.shape} and {bits.shape}")
    out = jax.ShapeDtypeStruct(x.shape, x.dtype)
    layer = jnp.asarray(layer, jnp.int32)
    return _call("moejax_rms_norm", out)(x, bits, layer, eps=np.float32(eps))


def softmax(x: jax.Array) -> jax.Array:
    """Softmax over the last axis of x [..., E] f32."""
    _typed("x", x, jnp.float32)
    if x.ndim < 1:
        raise ValueError("x must have an axis")
    return _call("moejax_softmax", jax.ShapeDtypeStruct(x.shape, x.dtype))(x)


def attend(
    query: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    layer: jax.Array,
    positions: jax.Array,
    valid: jax.Array,
    window: jax.Array,
    *,
    scale: float,
) -> jax.Array:
    """Causal attention of each token to its sequence's cache; zeros for tokens that are not valid.

    query [B, T, H, K] f32; keys [A, B, C, G, K] and values [A, B, C, G, V], bf16 or f32 or their
    bits; positions [B, T] i32; valid [B, T] bool; window [] i32, positions attended, 0 = all.
    Query head h reads key-value head h * G // H. Result [B, T, H, V] f32.
    """
    _typed("query", query, jnp.float32)
    _typed("keys", keys, *HELD["float32"], *HELD["bfloat16"])
    _typed("values", values, keys.dtype)
    _typed("positions", positions, jnp.int32)
    _typed("valid", valid, jnp.bool_)
    _scalar("layer", layer)
    _scalar("window", window)
    if query.ndim != 4 or keys.ndim != 5 or values.ndim != 5:
        raise ValueError(
            "query, keys and values must be [B, T, H, K], [A, B, C, G, K] and [A, B, C, G, V], "
            f"got {query.shape}, {keys.shape} and {values.shape}"
        )
    batch, tokens, heads, key_dim = query.shape
    agree = (
        keys.shape[:4] == values.shape[:4]
        and (keys.shape[1], keys.shape[4]) == (batch, key_dim)
        and positions.shape == valid.shape == (batch, tokens)
        and heads % max(1, keys.shape[3]) == 0
        and 0 not in keys.shape
        and max(key_dim, values.shape[4]) <= MAX_HEAD
    )
    if not agree:
        raise ValueError(
            f"shapes do not fit: query {query.shape}, keys {keys.shape}, values {values.shape}, "
            f"positions {positions.shape}, valid {valid.shape} (heads of at most {MAX_HEAD})"
        )
    out = jax.ShapeDtypeStruct((*query.shape[:3], values.shape[4]), jnp.float32)
    return _call("moejax_attend", out)(
        query,
        keys,
        values,
        jnp.asarray(layer, jnp.int32),
        positions,
        valid,
        jnp.asarray(window, jnp.int32),
        scale=np.float32(scale),
    )


def _call(
    name: str, out: jax.ShapeDtypeStruct, aliases: dict[int, int] | None = None
) -> Callable[..., jax.Array]:
    if build.library() is None:
        raise MoejaxError(build.status())
    return jax.ffi.ffi_call(name, out, input_output_aliases=aliases, vmap_method="sequential")


def _typed(name: str, array: jax.Array, *dtypes: object) -> None:
    if array.dtype not in [jnp.dtype(dtype) for dtype in dtypes]:
        names = " or ".join(jnp.dtype(dtype).name for dtype in dtypes)
        raise ValueError(f"{name} must be {names}, got {array.dtype.name}")


def _scalar(name: str, value: jax.Array) -> None:
    if jnp.shape(value) != () or not jnp.issubdtype(jnp.result_type(value), jnp.integer):
        raise ValueError(f"{name} must be an integer scalar, got {value!r}")


def _stored(name: str, bits: jax.Array, format: str) -> None:
    if format not in FORMATS:
        raise ValueError(f"unknown format {format!r} (one of {', '.join(FORMATS)})")
    _typed(name, bits, *HELD.get(format, (jnp.uint8,)))
    if bits.ndim < 2 or 0 in bits.shape:
        raise ValueError(f"{name} must be a stack [layers, ...] with elements, got {bits.shape}")
