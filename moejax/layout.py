"""How one expert's weights lie in one flat, aligned record, in memory and on disk alike."""

import dataclasses
import math

import ml_dtypes
import numpy as np

RECORD_ALIGNMENT = 4096  # bytes: direct I/O needs it, and a record is then one read and one copy
PART_ALIGNMENT = 64  # bytes: one cache line, one AVX-512 register

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
BITS = {"float32": np.dtype(np.uint32), "bfloat16": np.dtype(np.uint16)}


def _aligned(size: int, alignment: int) -> int:
    return math.ceil(size / alignment) * alignment


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecordLayout:
    """Where gate_up [2F, D] and down [D, F] lie in an expert's record of `stride` bytes."""

    width: int  # D
    expert_width: int  # F
    dtype: str  # a key of DTYPES

    @property
    def bits(self) -> np.dtype:
        """Unsigned type in which records are stored (in-place updates of it never copy)."""
        return BITS[self.dtype]

    @property
    def parts(self) -> dict[str, tuple[int, tuple[int, int]]]:
        """First element and shape of each part."""
        item = self.bits.itemsize
        gate_up = (2 * self.expert_width, self.width)
        down_at = _aligned(math.prod(gate_up) * item, PART_ALIGNMENT) // item
        return {"gate_up": (0, gate_up), "down": (down_at, (self.width, self.expert_width))}

    @property
    def stride(self) -> int:
        """Bytes from one record to the next."""
        start, shape = self.parts["down"]
        return _aligned((start + math.prod(shape)) * self.bits.itemsize, RECORD_ALIGNMENT)

    @property
    def elements(self) -> int:
        """R: elements of one record, padding included."""
        return self.stride // self.bits.itemsize

    @property
    def weight_bytes(self) -> int:
        """Bytes of one expert's weights, padding excluded."""
        return 3 * self.width * self.expert_width * self.bits.itemsize

    def view(self, records: np.ndarray, part: str) -> np.ndarray:
        """View of one part of records [..., R], as [..., rows, columns] in the weights' dtype."""
        start, shape = self.parts[part]
        flat = records[..., start : start + math.prod(shape)]
        return flat.view(DTYPES[self.dtype]).reshape(*records.shape[:-1], *shape)


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Uninitialised array aligned like a record, so that JAX need not copy it."""
    dtype = np.dtype(dtype)
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + RECORD_ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % RECORD_ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)
