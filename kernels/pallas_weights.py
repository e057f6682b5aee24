"""Inside a Pallas kernel: tiles of a weight matrix, read from a record of bits and dequantised.

Weights of bfloat16, int8 and int4 become bfloat16 "parts" whose sum is the weight exactly, for a
tensor core multiplies bfloat16 exactly: one part of a bfloat16 or of an integer without its scale,
two of an int4 with its scale (4 bits times 11). An f32 activation becomes three parts likewise
(`split`), so that the products are those of f32. float32 weights stay f32 and never meet a tensor
core.

Dequantising int4 costs more instructions than a memory-bound kernel can spare. For few tokens the
activations are "spread" instead: as many copies as a chunk has groups, each with zeros outside its
group, so that one product of integers has every group's sum, and sums take the scales.

A row is walked in "positions": columns, or bytes of int4. A byte of int4 holds two columns, and
`halves` says how activations lie so that the byte at position p meets its columns at position p of
either half.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton as plgpu

from moejax.layout import CHUNK_COLUMNS, GROUPS, MatrixLayout

CHUNK_BYTES = CHUNK_COLUMNS // 2
PARTS = 3  # of an f32 activation: 3 times 8 bits
LANES = 4  # rows of zeros fill the parts up: Triton's shapes are powers of two


def activation_parts(format: str) -> int:
    """How many parts activations are split into for weights of a format."""
    return 1 if format in ("float32", "bfloat16") else PARTS


def activation_dtype(format: str) -> Any:
    """Type of those parts."""
    return jnp.float32 if format == "float32" else jnp.bfloat16


def positions(matrix: MatrixLayout) -> int:
    """Positions of a row."""
    return matrix.columns // 2 if matrix.format in GROUPS else matrix.cols


def activation_width(matrix: MatrixLayout) -> int:
    """Channels of an activation as the kernel reads it."""
    return matrix.columns


def scale_groups(matrix: MatrixLayout) -> int:
    """Groups of columns with a scale each, of a chunk of int4."""
    return CHUNK_COLUMNS // GROUPS[matrix.format]


def group_of(matrix: MatrixLayout, place: jax.Array) -> jax.Array:
    """Which group of its chunk an activation at a place belongs to."""
    # Byte 4 word + j holds columns 32 j .. 32 j + 31, all of one group.
    return place % 4 // (4 // scale_groups(matrix))


def split(x: jax.Array, format: str) -> list[jax.Array]:
    """The parts of x f32: cut after 8 bits each, so that their sum is x; infinities stay whole."""
    if format == "float32":
        return [x]
    if format == "bfloat16":
        return [x.astype(jnp.bfloat16)]
    finite = jnp.abs(x) < jnp.inf
    parts, rest = [], x
    for _ in range(PARTS):
        head = jnp.where(finite, _cut(rest), rest)
        parts.append(head.astype(jnp.bfloat16))
        rest = jnp.where(finite, rest - head, 0.0)
    return parts


def _cut(x: jax.Array) -> jax.Array:
    """x with the bits that bfloat16 does not have set to 0."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) & jnp.uint32(0xFFFF0000)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def place(matrix: MatrixLayout, column: jax.Array) -> jax.Array:
    """Where the activation of a column lies, among `activation_width` channels."""
    if matrix.format not in GROUPS:
        return column
    chunk, inside = column // CHUNK_COLUMNS, column % CHUNK_COLUMNS
    nibble, word = inside // 16, inside % 16
    half = (nibble % 2) * positions(matrix)
    return half + chunk * CHUNK_BYTES + word * 4 + nibble // 2


def arrange(matrix: MatrixLayout, x: jax.Array, spread: bool) -> jax.Array:
    """Activations [N, cols] f32 as the kernel reads them: [copies, N, `activation_width`]."""
    if matrix.format in GROUPS:
        tokens = x.shape[0]
        x = jnp.pad(x, ((0, 0), (0, matrix.columns - matrix.cols)))
        # Column 32 j + 16 half + word of a chunk lies in byte 4 word + j.
        x = x.reshape(tokens, -1, 4, 2, 16).transpose(0, 3, 1, 4, 2).reshape(tokens, -1)
    parts = jnp.stack(split(x, matrix.format))
    if not spread:
        return parts
    groups = scale_groups(matrix)
    own = group_of(matrix, jnp.arange(x.shape[1])) == jnp.arange(groups)[:, None]
    spread_parts = jnp.where(own[:, None, :], parts[:, None], 0)
    return spread_parts.reshape(-1, *x.shape)


def row_scales(matrix: MatrixLayout, ref: Any, at: Any, base: int, rows: jax.Array) -> jax.Array:
    """Scales [rows] f32 of int8 rows; rows beyond the matrix must have been clamped."""
    offsets = base + matrix.scales_at + rows * 4
    bits = jnp.zeros(rows.shape, jnp.uint32)
    for byte in range(4):
        bits = bits | (plgpu.load(ref.at[at, offsets + byte]).astype(jnp.uint32) << (8 * byte))
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def weight_tile(
    matrix: MatrixLayout,
    ref: Any,
    at: Any,
    base: int,
    rows: jax.Array,
    first: Any,
    step: int,
    spread: bool,
    interpret: bool,
) -> list[list[jax.Array]]:
    """Positions first .. first + step of some rows, by half and part: each [rows, step].

    Positions beyond a row are 0; rows beyond the matrix must have been clamped.

    Args:
        ref: [*, R] bits.
        at: the record's row in it.
        base: element of the record at which the matrix begins.
    """
    position = first + jnp.arange(step, dtype=jnp.int32)
    offsets = base + rows[:, None] * positions(matrix) + position[None, :]
    mask = None
    if positions(matrix) % step:
        mask = jnp.broadcast_to((position < positions(matrix))[None, :], offsets.shape)
    bits = _load(ref, at, offsets, mask)
    if matrix.format == "float32":
        return [[jax.lax.bitcast_convert_type(bits, jnp.float32)]]
    if matrix.format == "bfloat16":
        return [[jax.lax.bitcast_convert_type(bits, jnp.bfloat16)]]
    if matrix.format == "int8":
        return [[_integers(bits, INT8, interpret)]]
    nibbles = [_integers(bits, code, interpret) for code in (LOW_NIBBLE, HIGH_NIBBLE)]
    if spread:
        return [[whole] for whole in nibbles]
    scales = _group_scales(matrix, ref, at, base, rows, first, step)
    return [_scaled(whole, scales) for whole in nibbles]


def _load(ref: Any, at: Any, offsets: jax.Array, mask: jax.Array | None) -> jax.Array:
    if mask is None:
        return plgpu.load(ref.at[at, offsets])
    return plgpu.load(ref.at[at, offsets], mask=mask, other=jnp.zeros((), ref.dtype))


# Four bytes become bfloat16 in 8 instructions (one by one, they take 20). Bits 0x4300
# + n are 128 + n for n < 128, from which fused multiply-adds by 1 take what is too much.
INT8 = """{
    .reg .b32 a, b, c, d, e, f, one;
    mov.b32 one, 0x3f803f80;
    prmt.b32 a, $2, 0, 0x4140;
    prmt.b32 b, $2, 0, 0x4342;
    lop3.b32 c, a, 0x007f007f, 0x43004300, 0xea;
    lop3.b32 d, b, 0x007f007f, 0x43004300, 0xea;
    lop3.b32 e, a, 0x00800080, 0xc300c300, 0x6a;
    lop3.b32 f, b, 0x00800080, 0xc300c300, 0x6a;
    fma.rn.bf16x2 $0, c, one, e;
    fma.rn.bf16x2 $1, d, one, f;
}"""
NIBBLE = """{
    .reg .b32 a, b, c, d, one, less;
    mov.b32 one, 0x3f803f80;
    mov.b32 less, 0xc308c308;
    prmt.b32 a, $2, 0, 0x4140;
    prmt.b32 b, $2, 0, 0x4342;%s
    lop3.b32 c, a, 0x000f000f, 0x43004300, 0xea;
    lop3.b32 d, b, 0x000f000f, 0x43004300, 0xea;
    fma.rn.bf16x2 $0, c, one, less;
    fma.rn.bf16x2 $1, d, one, less;
}"""
LOW_NIBBLE = NIBBLE % ""
HIGH_NIBBLE = (
    NIBBLE
    % """
    shr.b32 a, a, 4;
    shr.b32 b, b, 4;"""
)


def _integers(bits: jax.Array, code: str, interpret: bool) -> jax.Array:
    """The signed integers in bytes, or nibbles less 8, as bfloat16."""
    if interpret and code is INT8:
        return jax.lax.bitcast_convert_type(bits, jnp.int8).astype(jnp.bfloat16)
    if interpret:
        nibbles = bits & 15 if code is LOW_NIBBLE else bits >> 4
        return nibbles.astype(jnp.bfloat16) - 8
    (whole,) = plgpu.elementwise_inline_asm(
        code,
        args=[bits],
        constraints="=r,=r,r",
        pack=4,
        result_shape_dtypes=[jax.ShapeDtypeStruct(bits.shape, jnp.bfloat16)],
    )
    return whole


def _scaled(whole: jax.Array, scales: jax.Array) -> list[jax.Array]:
    """The two parts of integers times their scales."""
    weights = whole.astype(jnp.float32) * scales
    head = _cut(weights)
    return [head.astype(jnp.bfloat16), (weights - head).astype(jnp.bfloat16)]


def chunk_scales(
    matrix: MatrixLayout,
    ref: Any,
    at: Any,
    base: int,
    rows: jax.Array,
    chunk: Any,
    group: jax.Array,
) -> jax.Array:
    """Scales [rows, groups] f32 of some groups of a chunk of int4."""
    group = chunk * scale_groups(matrix) + group
    return _half_floats(matrix, ref, at, base, rows, group, None)


def _group_scales(
    matrix: MatrixLayout,
    ref: Any,
    at: Any,
    base: int,
    rows: jax.Array,
    first: Any,
    step: int,
) -> jax.Array:
    """Scales [rows, step] f32 of the groups that both nibbles of each byte belong to."""
    chunks, each = step // CHUNK_BYTES, scale_groups(matrix)
    group = (first // CHUNK_BYTES) * each + jnp.arange(chunks * each, dtype=jnp.int32)
    mask = None
    if positions(matrix) % step:
        mask = (group < matrix.scales_per_row)[None, :]
        mask = jnp.broadcast_to(mask, (rows.shape[0], group.shape[0]))
    scales = _half_floats(matrix, ref, at, base, rows, group, mask)
    shape = (rows.shape[0], chunks, 16, each, 4 // each)
    scales = scales.reshape(rows.shape[0], chunks, 1, each, 1)
    return jnp.broadcast_to(scales, shape).reshape(rows.shape[0], step)


def _half_floats(
    matrix: MatrixLayout,
    ref: Any,
    at: Any,
    base: int,
    rows: jax.Array,
    group: jax.Array,
    mask: jax.Array | None,
) -> jax.Array:
    """Scales [rows, groups] f32 of int4, from their two bytes."""
    offsets = base + matrix.scales_at + (rows[:, None] * matrix.scales_per_row + group[None, :]) * 2
    low = _load(ref, at, offsets, mask).astype(jnp.uint16)
    high = _load(ref, at, offsets + 1, mask).astype(jnp.uint16)
    return jax.lax.bitcast_convert_type(low | (high << 8), jnp.float16).astype(jnp.float32)
