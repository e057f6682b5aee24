"""Quantised matrices in NumPy: floats to the bytes of `layout.MatrixLayout`, and back."""

from collections.abc import Iterator

import numpy as np

from moejax.errors import CheckpointError, NonFiniteError
from moejax.layout import GROUPS, MatrixLayout

VERSION = 1  # of the integers and scales that the same weights give
BLOCK = 1 << 16  # weights worked on at once: what a step needs then stays in the cache
# Scales that are tried for int4, as factors on Q4_0's. A smaller one clips the largest weight and
# serves the others better. More candidates gain less than 1 % of the error.
STEPS = 8 / np.array([8.0, 7.3, 8.7], np.float32)
SCALE_MAX = float(np.finfo(np.float16).max)


def row_blocks(rows: int, cols: int) -> Iterator[slice]:
    """Slices of whole rows, about BLOCK weights each."""
    step = max(BLOCK // max(cols, 1), 1)
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def quantise_rows(rows: np.ndarray, layout: MatrixLayout) -> tuple[np.ndarray, np.ndarray]:
    """Weights u8 [n, row_bytes] and scales [n, scales_per_row] of f32 rows [n, cols].

    int8 rounds to multiples of max|row| / 127. int4 starts from Q4_0's scale, the weight of the
    largest magnitude / -8, tries a few near it, takes the integers that leave the least squared
    error under their own least-squares scale, and rounds once more to the f16 that is stored.

    Raises:
        NonFiniteError: NaN or infinity.
        CheckpointError: weights whose int4 scale is beyond f16.
    """
    if layout.format in GROUPS:
        return _int4_rows(rows, layout)
    with np.errstate(invalid="ignore"):
        peak = np.maximum(rows.max(axis=1), -rows.min(axis=1))
    _check_finite(peak)
    scales = peak / np.float32(127)
    # Divided, as the inverse of a denormal scale may be infinite.
    q = rows / np.where(scales == 0, np.float32(1), scales)[:, None]
    np.rint(q, out=q)
    np.clip(q, -127, 127, out=q)
    return q.astype(np.int8).view(np.uint8), scales[:, None]


def _check_finite(peak: np.ndarray) -> None:
    if not np.isfinite(peak).all():
        raise NonFiniteError("NaN or infinity cannot be quantised")


def _int4_rows(rows: np.ndarray, layout: MatrixLayout) -> tuple[np.ndarray, np.ndarray]:
    n, group = len(rows), GROUPS[layout.format]
    padded = rows
    if layout.columns != layout.cols:
        padded = np.zeros((n, layout.columns), np.float32)
        padded[:, : layout.cols] = rows
    # The group is the first axis: sums over it are then sums of long vectors.
    grouped = np.ascontiguousarray(padded.reshape(-1, group).T)
    scales = _int4_scales(grouped)
    q = _rounded(grouped, scales.astype(np.float32), np.empty_like(grouped))
    q += 8
    codes = q.astype(np.uint8).T.reshape(n, layout.columns)
    return pack_nibbles(codes), scales.reshape(n, -1)


def _int4_scales(grouped: np.ndarray) -> np.ndarray:
    """Scales f16 [N] of weights [G, N]."""
    with np.errstate(invalid="ignore"):
        high, low = grouped.max(axis=0), grouped.min(axis=0)
    start = np.where(high > -low, high, low) / np.float32(-8)
    _check_finite(start)
    best, gain = np.zeros_like(start), np.full_like(start, -1)
    q, product = np.empty_like(grouped), np.empty_like(grouped)
    # Scaled to about 1, squares neither overflow nor vanish.
    unit = np.where(start == 0, np.float32(1), np.abs(start))
    scaled = grouped / unit
    for step in STEPS:
        _rounded(scaled, np.sign(start) * step, q)
        dot = np.multiply(scaled, q, out=product).sum(axis=0)
        norm = np.multiply(q, q, out=product).sum(axis=0)
        norm[norm == 0] = 1
        # Under its least-squares scale dot / norm, the integers take away this much squared error.
        found = dot * dot / norm
        better = found > gain
        gain = np.where(better, found, gain)
        best = np.where(better, dot / norm, best)
    best = best * unit
    if not (np.abs(best) <= SCALE_MAX).all():
        raise CheckpointError(
            f"weights up to {8 * np.abs(best).max():.3g} are too large for int4, whose scales are "
            "f16: use int8 or no quantisation"
        )
    return best.astype(np.float16)


def _rounded(grouped: np.ndarray, scales: np.ndarray, out: np.ndarray) -> np.ndarray:
    """Integers -8..7 nearest to grouped [G, N] / scales [N]; 0 where the scale is 0."""
    inverse = np.zeros_like(scales)
    np.divide(1, scales, out=inverse, where=scales != 0)
    np.multiply(grouped, inverse, out=out)
    np.rint(out, out=out)
    return np.clip(out, -8, 7, out=out)


def pack_nibbles(codes: np.ndarray) -> np.ndarray:
    """Bytes [n, columns / 2] of codes q + 8, u8 [n, columns]."""
    n, columns = codes.shape
    # Byte b of word i holds columns 16 * 2b + i (low half) and 16 * (2b + 1) + i.
    pairs = codes.reshape(n, -1, 4, 2, 16)
    joined = pairs[:, :, :, 0] | pairs[:, :, :, 1] << 4
    return np.ascontiguousarray(joined.swapaxes(2, 3)).reshape(n, columns // 2)


def unpack_nibbles(packed: np.ndarray) -> np.ndarray:
    """Codes q + 8, u8 [n, columns], of bytes [n, columns / 2]."""
    n, half = packed.shape
    joined = packed.reshape(n, -1, 16, 4).swapaxes(2, 3)
    return np.stack([joined & 15, joined >> 4], axis=3).reshape(n, 2 * half)


def dequantise_rows(weights: np.ndarray, scales: np.ndarray, layout: MatrixLayout) -> np.ndarray:
    """Rows f32 [n, cols] of what `quantise_rows` returns."""
    n, scales = len(weights), scales.astype(np.float32)
    if layout.format not in GROUPS:
        return weights.view(np.int8) * scales
    q = unpack_nibbles(weights).astype(np.float32) - 8
    groups = q.reshape(n, layout.scales_per_row, -1) * scales[:, :, None]
    return groups.reshape(n, layout.columns)[:, : layout.cols]


def matrix_parts(matrix: np.ndarray, layout: MatrixLayout) -> tuple[np.ndarray, np.ndarray]:
    """Views of a quantised matrix [bytes]: weights u8 [rows, row_bytes], scales [rows, ...]."""
    weights = matrix[: layout.rows * layout.row_bytes].reshape(layout.rows, layout.row_bytes)
    end = layout.scales_at + layout.rows * layout.scale_row_bytes
    scales = matrix[layout.scales_at : end].view(layout.scale_dtype)
    return weights, scales.reshape(layout.rows, layout.scales_per_row)


def quantise(matrix: np.ndarray, layout: MatrixLayout) -> np.ndarray:
    """u8 [..., bytes] of f32 or bf16 matrices [..., rows, cols]; raises as `quantise_rows`."""
    _check_shape(matrix, layout)
    lead = matrix.shape[:-2]
    out = np.zeros((*lead, layout.bytes), np.uint8)
    for index in np.ndindex(lead):
        weights, scales = matrix_parts(out[index], layout)
        for rows in row_blocks(layout.rows, layout.cols):
            block = matrix[index][rows].astype(np.float32)
            weights[rows], scales[rows] = quantise_rows(block, layout)
    return out


def dequantise(data: np.ndarray, layout: MatrixLayout) -> np.ndarray:
    """f32 [..., rows, cols] of matrices u8 [..., bytes]."""
    lead = data.shape[:-1]
    out = np.empty((*lead, layout.rows, layout.cols), np.float32)
    for index in np.ndindex(lead):
        weights, scales = matrix_parts(data[index], layout)
        for rows in row_blocks(layout.rows, layout.cols):
            out[index][rows] = dequantise_rows(weights[rows], scales[rows], layout)
    return out


def squared_error(
    rows: np.ndarray, weights: np.ndarray, scales: np.ndarray, layout: MatrixLayout
) -> tuple[float, float]:
    """Sums in f64 of squared differences between rows and their quantised form, and of squares."""
    floats = rows.astype(np.float64)
    wrong = dequantise_rows(weights, scales, layout) - floats
    # Not a dot product: the threads of a BLAS wait for each other over so few numbers.
    return float(np.square(wrong, out=wrong).sum()), float(np.square(floats, out=floats).sum())


def relative_error(wrong: float, total: float) -> float:
    """Relative RMS error from sums of squares; 0 for zeros."""
    return (wrong / total) ** 0.5 if total else 0.0


def error(matrix: np.ndarray, layout: MatrixLayout) -> float:
    """Relative RMS error of quantising matrices [..., rows, cols]; raises as `quantise_rows`."""
    _check_shape(matrix, layout)
    wrong = total = 0.0
    for index in np.ndindex(matrix.shape[:-2]):
        for rows in row_blocks(layout.rows, layout.cols):
            block = matrix[index][rows].astype(np.float32)
            sums = squared_error(block, *quantise_rows(block, layout), layout)
            wrong, total = wrong + sums[0], total + sums[1]
    return relative_error(wrong, total)


def _check_shape(matrix: np.ndarray, layout: MatrixLayout) -> None:
    if matrix.shape[-2:] != (layout.rows, layout.cols) or not layout.quantised:
        raise ValueError(f"a matrix {matrix.shape} does not have the quantised layout {layout}")
