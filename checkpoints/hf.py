"""Reading Hugging Face safetensors directories: each tensor is copied once, into its place."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import ml_dtypes
import numpy as np

from moejax.checkpoints.headers import TensorInfo, list_tensors, open_regular, read_exact
from moejax.checkpoints.rules import EXPERTS, Placement, WeightMap, plan
from moejax.errors import NonFiniteError
from moejax.layout import BITS, DTYPES, RecordLayout, aligned_empty

__all__ = ["TensorInfo", "list_tensors", "load", "plan_directory", "stream", "zero_padding"]

CHUNK = 1 << 18  # elements: a chunk is still in cache when it is converted, checked and delivered
SOURCES = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
}
EXPONENT = {"bfloat16": np.uint16(0x7F80), "float32": np.uint32(0x7F800000)}

Progress = Callable[[int, int], None]


def plan_directory(directory: Path, weights: WeightMap) -> list[Placement]:
    """Where every tensor of a directory goes, from headers alone; CheckpointError if it misfits."""
    return plan(list_tensors(directory), weights, str(directory))


def _is_finite(bits: np.ndarray, dtype: str, scratch: np.ndarray) -> bool:
    exponents = np.bitwise_and(bits, EXPONENT[dtype], out=scratch[: len(bits)])
    return exponents.max() != EXPONENT[dtype]


def stream(
    placements: Sequence[Placement], done: int = 0, check_finite: bool = True
) -> Iterator[tuple[int, Placement, int, np.ndarray]]:
    """Yield the weights of placements[done:] in chunks: (finished, placement, at, bits).

    `bits` holds the target's elements placement.start + at onwards, as unsigned integers, valid
    until the next chunk is asked for. With it delivered, placements[:finished] are complete.
    Raises CheckpointError when a file cannot be read, and after the last chunk NonFiniteError,
    naming every tensor that holds NaN or infinity in the target's dtype. `finished` stops before
    the first such tensor, so that a resumed stream finds it again.
    """
    raw = np.empty(CHUNK, np.uint32)
    converted, scratch = np.empty_like(raw), np.empty_like(raw)
    nonfinite: dict[str, int] = {}
    with ExitStack() as stack:
        file = opened = None
        for number, placement in enumerate(placements[done:], done):
            tensor = placement.tensor
            if opened != tensor.file:
                stack.close()
                file, opened = stack.enter_context(open_regular(tensor.file)[0]), tensor.file
            source, target = SOURCES[tensor.dtype], DTYPES[placement.dtype]
            bits = BITS[placement.dtype]
            for at in range(0, placement.count, CHUNK):
                count = min(CHUNK, placement.count - at)
                data = raw.view(source)[:count]
                first = tensor.start + (placement.skip + at) * source.itemsize
                read_exact(file, first, memoryview(data.view(np.uint8)))
                if source != target:
                    with np.errstate(all="ignore"):
                        converted.view(target)[:count] = data
                    data = converted.view(target)[:count]
                data = data.view(bits)
                if check_finite and not _is_finite(data, placement.dtype, scratch.view(bits)):
                    nonfinite.setdefault(tensor.name, number)
                last = at + count == placement.count
                yield min([number + last, *nonfinite.values()]), placement, at, data
    if nonfinite:
        names = list(nonfinite)
        shown = ", ".join(names[:20]) + (f" and {len(names) - 20} more" if names[20:] else "")
        raise NonFiniteError(
            f"NaN or infinity in {shown}: the download may be damaged, or the values do not fit "
            f"{placement.dtype}; check_finite=False loads them all the same"
        )


def zero_padding(records: np.ndarray, layout: RecordLayout) -> None:
    """Zero what lies between and behind the parts of records [N, R] (in `layout.bits`)."""
    end = 0
    for start, shape in layout.parts.values():
        records[:, end:start] = 0
        end = start + shape[0] * shape[1]
    records[:, end:] = 0


def _check_records(records: np.ndarray, weights: WeightMap) -> None:
    layout = weights.layout
    if layout is None or records.shape != weights.records_shape or records.dtype != layout.bits:
        raise ValueError(
            f"records are {records.dtype} {records.shape}, needed: "
            f"{layout and layout.bits} {weights.records_shape}"
        )
    if not (records.flags.c_contiguous and records.flags.writeable):
        raise ValueError("records must be contiguous and writable")


def load(
    directory: Path,
    weights: WeightMap,
    *,
    records: np.ndarray | None = None,
    check_finite: bool = True,
    progress: Progress | None = None,
) -> tuple[dict[str, np.ndarray], np.ndarray | None]:
    """Load a Hugging Face safetensors directory: dense parameters by path, and expert records.

    Returns aligned arrays of specs' shapes and dtypes, and records [L * E, R] of layout.bits with
    expert e of expert layer l at l * E + e: those given (filled in place) or new ones; None for a
    dense model. progress(bytes done, bytes in all) is called after every few MB.
    Raises CheckpointError before anything is allocated when the files are malformed or do not fit,
    and NonFiniteError, after reading, for NaN or infinity.
    """
    placements = plan_directory(directory, weights)
    params = {
        path: aligned_empty(tuple(spec.shape), spec.dtype) for path, spec in weights.specs.items()
    }
    flat = {path: array.reshape(-1).view(BITS[array.dtype.name]) for path, array in params.items()}
    if records is not None:
        _check_records(records, weights)
    elif weights.layout is not None:
        records = aligned_empty(weights.records_shape, weights.layout.bits)
    if records is not None:
        zero_padding(records, weights.layout)
        flat[EXPERTS] = records.reshape(-1)
    total = sum(placement.source_bytes for placement in placements)
    read = 0
    for _, placement, at, bits in stream(placements, check_finite=check_finite):
        start = placement.start + at
        flat[placement.target][start : start + len(bits)] = bits
        read += len(bits) * SOURCES[placement.tensor.dtype].itemsize
        if progress is not None:
            progress(read, total)
    return params, records
