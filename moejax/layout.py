"""How weights lie in flat, aligned bytes, in memory and on disk alike: matrices and records.

A matrix [rows, cols] maps an activation of `cols` channels to `rows`, in one of five formats:

* float32, bfloat16: row-major, no padding.
* int8: q int8 [rows, cols] in -127..127, then scales f32 [rows]; w = q * scale of the row.
* int4g32, int4g64 (groups of G = 32 or 64 columns): columns are padded with zeros to a multiple of
  128, and each row is chunks of 128 columns, 64 bytes each. A chunk is 16 little-endian u32 words;
  bits 4k..4k+3 of word i hold q + 8 of column 16 * k + i of the chunk, q in -8..7. Then scales f16
  [rows, padded columns / G]; w = q * scale of the group.

Scales begin at a multiple of 64 bytes, and a quantised matrix takes a multiple of 64 bytes.
"""

import contextlib
import dataclasses
import math
import mmap

import ml_dtypes
import numpy as np

RECORD_ALIGNMENT = 4096  # bytes: direct I/O needs it, and a record is then one read and one copy
HUGE_FROM = 4 << 20  # bytes
PART_ALIGNMENT = 64  # bytes: one cache line, one AVX-512 register
CHUNK_COLUMNS = 128  # of int4: 64 bytes of nibbles
CHUNK_WORDS = 16  # u32, of 8 nibbles each

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
GROUPS = {"int4g32": 32, "int4g64": 64}  # columns that share a scale
QUANTISED = ("int8", *GROUPS)
FORMATS = (*DTYPES, *QUANTISED)
# Unsigned type in which weights of a format are held.
BITS = {"float32": np.dtype(np.uint32), "bfloat16": np.dtype(np.uint16)}
BITS |= dict.fromkeys(QUANTISED, np.dtype(np.uint8))


def _aligned(size: int, alignment: int) -> int:
    return math.ceil(size / alignment) * alignment


@dataclasses.dataclass(frozen=True)
class MatrixLayout:
    """Where the weights and scales of a matrix [rows, cols] lie in its `bytes` bytes."""

    rows: int
    cols: int
    format: str  # one of FORMATS

    @property
    def quantised(self) -> bool:
        """Whether weights are integers with scales."""
        return self.format in QUANTISED

    @property
    def columns(self) -> int:
        """Columns stored: `cols` and, for int4, the zeros behind them."""
        return _aligned(self.cols, CHUNK_COLUMNS) if self.format in GROUPS else self.cols

    @property
    def row_bytes(self) -> int:
        """Bytes of one row without its scales."""
        if self.format in GROUPS:
            return self.columns // 2
        return self.cols * (DTYPES[self.format].itemsize if not self.quantised else 1)

    @property
    def scale_dtype(self) -> np.dtype | None:
        """Type of the scales, None for floats."""
        if not self.quantised:
            return None
        return np.dtype(np.float16 if self.format in GROUPS else np.float32)

    @property
    def scales_per_row(self) -> int:
        """1 for int8, one per group for int4, 0 for floats."""
        if not self.quantised:
            return 0
        return self.columns // GROUPS[self.format] if self.format in GROUPS else 1

    @property
    def scale_row_bytes(self) -> int:
        """Bytes of one row's scales."""
        return self.scales_per_row * self.scale_dtype.itemsize if self.quantised else 0

    @property
    def scales_at(self) -> int | None:
        """Byte at which the scales begin, None for floats."""
        return _aligned(self.rows * self.row_bytes, PART_ALIGNMENT) if self.quantised else None

    @property
    def bytes(self) -> int:
        """Size of the matrix with scales; when quantised, a multiple of 64."""
        if not self.quantised:
            return self.rows * self.row_bytes
        return _aligned(self.scales_at + self.rows * self.scale_row_bytes, PART_ALIGNMENT)

    @property
    def weight_bytes(self) -> int:
        """Bytes that reading every weight once reads: scales and padded columns included."""
        return self.rows * (self.row_bytes + self.scale_row_bytes)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecordLayout:
    """Where gate_up [2F, D] and down [D, F] lie in an expert's record of `stride` bytes."""

    width: int  # D
    expert_width: int  # F
    dtype: str  # one of FORMATS

    @property
    def quantised(self) -> bool:
        """Whether weights are integers with scales."""
        return self.dtype in QUANTISED

    @property
    def bits(self) -> np.dtype:
        """Unsigned type in which records are stored (in-place updates of it never copy)."""
        return BITS[self.dtype]

    @property
    def matrices(self) -> dict[str, MatrixLayout]:
        """Layout of each part."""
        return {
            "gate_up": MatrixLayout(2 * self.expert_width, self.width, self.dtype),
            "down": MatrixLayout(self.width, self.expert_width, self.dtype),
        }

    @property
    def offsets(self) -> dict[str, int]:
        """First byte of each part, a multiple of 64."""
        return {"gate_up": 0, "down": _aligned(self.matrices["gate_up"].bytes, PART_ALIGNMENT)}

    @property
    def parts(self) -> dict[str, tuple[int, tuple[int, ...]]]:
        """First element and shape of each part: [rows, cols], or [bytes] where quantised."""
        matrices, item = self.matrices, self.bits.itemsize
        return {
            name: (at // item, (m.bytes,) if m.quantised else (m.rows, m.cols))
            for name, at in self.offsets.items()
            for m in (matrices[name],)
        }

    @property
    def stride(self) -> int:
        """Bytes from one record to the next."""
        return _aligned(self.offsets["down"] + self.matrices["down"].bytes, RECORD_ALIGNMENT)

    @property
    def elements(self) -> int:
        """R: elements of one record, padding included."""
        return self.stride // self.bits.itemsize

    @property
    def weight_bytes(self) -> int:
        """Bytes of one expert's weights and scales, without what only aligns them."""
        return sum(matrix.weight_bytes for matrix in self.matrices.values())

    def view(self, records: np.ndarray, part: str) -> np.ndarray:
        """View of one part of records [..., R]: [..., rows, cols] floats or [..., bytes] u8."""
        start, shape = self.parts[part]
        flat = records[..., start : start + math.prod(shape)]
        if self.quantised:
            return flat
        return flat.view(DTYPES[self.dtype]).reshape(*records.shape[:-1], *shape)


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Array of unspecified contents aligned like a record, so that JAX need not copy it.

    Large ones ask for huge pages: reading weights once is then limited by memory, not by addresses.
    """
    dtype = np.dtype(dtype)
    size = math.prod(shape) * dtype.itemsize
    if size >= HUGE_FROM and hasattr(mmap, "MADV_HUGEPAGE"):
        pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(OSError):  # a kernel may be built without them
            pages.madvise(mmap.MADV_HUGEPAGE)
        return np.frombuffer(pages, dtype).reshape(shape)
    raw = np.empty(size + RECORD_ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % RECORD_ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)
