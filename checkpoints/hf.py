"""Reading Hugging Face safetensors directories: each tensor is copied once, into its place."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import ml_dtypes
import numpy as np

from moejax.checkpoints import gguf_file, gguf_model
from moejax.checkpoints.error_table import ErrorTable
from moejax.checkpoints.headers import GGUF_BLOCKS, list_tensors, open_regular, read_exact
from moejax.checkpoints.rules import EXPERTS, Placement, WeightMap, plan
from moejax.errors import CheckpointError, NonFiniteError
from moejax.layout import BITS, DTYPES, RecordLayout, aligned_empty
from moejax.quantise import BLOCK, quantise_rows, relative_error, squared_error

CHUNK = 1 << 18  # elements: a chunk is still in cache when it is converted, checked and delivered
SOURCES = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
}
EXPONENT = {"bfloat16": np.uint16(0x7F80), "float32": np.uint32(0x7F800000)}

Progress = Callable[[int, int], None]


def plan_directory(directory: Path, weights: WeightMap) -> list[Placement]:
    """Where every tensor of a directory or a .gguf file goes, from headers alone.

    Raises CheckpointError if it misfits.
    """
    read = gguf_model.list_tensors if gguf_file.is_gguf(directory) else list_tensors
    return plan(read(directory), weights, str(directory))


def is_exact(placement: Placement) -> bool:
    """Whether a quantised matrix takes the integers and scales of its source as they are."""
    matrix = placement.matrix
    return placement.tensor.dtype == "Q4_0" and matrix is not None and matrix.format == "int4g32"


def stream(
    placements: Sequence[Placement], done: int = 0, check_finite: bool = True
) -> Iterator[tuple[int, Placement, int, np.ndarray]]:
    """Yield the weights of placements[done:] in chunks: (finished, placement, at, bits).

    `bits` holds the run's elements from `at` onwards in the placement's dtype, as unsigned integers
    (where `is_exact`, the source's bytes), valid until the next chunk is asked for. Chunks for
    quantised matrices are whole rows. With it delivered, placements[:finished] are complete.
    Raises CheckpointError when a file cannot be read, and after the last chunk NonFiniteError,
    naming every tensor that holds NaN or infinity in the target's dtype; these cannot be quantised
    without check_finite either. `finished` stops before the first such tensor, so that a resumed
    stream finds it again.
    """
    nonfinite: dict[str, int] = {}
    with ExitStack() as stack:
        file = opened = None
        for number, placement in enumerate(placements[done:], done):
            tensor = placement.tensor
            if opened != tensor.file:
                stack.close()
                file, opened = stack.enter_context(open_regular(tensor.file)[0]), tensor.file
            step = _step(placement)
            for at in range(0, placement.count, step):
                count = min(step, placement.count - at)
                bits = _read(file, placement, at, count)
                checked = check_finite or placement.matrix is not None
                last = at + count == placement.count
                if checked and not _is_finite(bits, placement):
                    nonfinite.setdefault(tensor.name, number)
                    if placement.matrix is not None:
                        continue
                yield min([number + last, *nonfinite.values()]), placement, at, bits
    if nonfinite:
        names = list(nonfinite)
        shown = ", ".join(names[:20]) + (f" and {len(names) - 20} more" if names[20:] else "")
        raise NonFiniteError(
            f"NaN or infinity in {shown}: the download may be damaged, or the values do not fit "
            f"{placement.dtype}; check_finite=False loads them all the same, unless quantised"
        )


def _step(placement: Placement) -> int:
    """Elements of a chunk: whole rows, or whole heads, where they are read or written as such."""
    tensor, matrix = placement.tensor, placement.matrix
    chunk = CHUNK if matrix is None else min(CHUNK, BLOCK)
    if matrix is None and tensor.dtype in SOURCES and not tensor.head_rows:
        return chunk
    columns = tensor.shape[-1] if len(tensor.shape) > 1 else 1
    unit = columns * max(tensor.head_rows, 1)
    return max(chunk // unit, 1) * unit


def _read(file, placement: Placement, at: int, count: int) -> np.ndarray:
    """`count` elements of a run from `at` on, in the placement's dtype, as unsigned integers."""
    tensor, target = placement.tensor, DTYPES[placement.dtype]
    block, size = GGUF_BLOCKS.get(tensor.dtype) or (1, SOURCES[tensor.dtype].itemsize)
    raw = np.empty(count // block * size, np.uint8)
    read_exact(file, tensor.start + (placement.skip + at) // block * size, memoryview(raw))
    if tensor.head_rows:
        raw = gguf_file.unrotate(raw, tensor, count)
    if tensor.dtype in SOURCES:
        data = raw.view(SOURCES[tensor.dtype])
    elif is_exact(placement):
        return raw
    else:
        data = gguf_file.dequantise(raw, tensor.dtype)
    if data.dtype != target:
        with np.errstate(all="ignore"):
            data = data.astype(target)
    return data.view(BITS[placement.dtype])


def _is_finite(bits: np.ndarray, placement: Placement) -> bool:
    if is_exact(placement):
        return bool(np.isfinite(gguf_file.q4_0_scales(bits)).all())
    exponent = EXPONENT[placement.dtype]
    return np.bitwise_and(bits, exponent).max() != exponent


def pieces(
    placements: Sequence[Placement],
    done: int = 0,
    check_finite: bool = True,
    errors: ErrorTable | None = None,
    progress: Progress | None = None,
) -> Iterator[tuple[int, str, int, np.ndarray]]:
    """What `stream` reads, quantised where it has to be: (finished, target, position, bytes).

    `bytes` (u8) belong at byte `position` of the target. progress(bytes read, bytes in all).
    """
    total = sum(placement.source_bytes for placement in placements)
    before = sum(placement.source_bytes for placement in placements[:done])
    sums, current, read, complete = np.zeros(2), None, 0, done
    for finished, placement, at, bits in stream(placements, done, check_finite):
        if placement is not current:
            before += current.source_bytes if current is not None else 0
            sums, current, read = np.zeros(2), placement, 0
        matrix = placement.matrix
        if matrix is None:
            position = (placement.start + at) * bits.itemsize
            yield finished, placement.target, position, bits.view(np.uint8)
            read = at + len(bits)
        else:
            row, (weights, scales) = placement.row + at // matrix.cols, _quantised(placement, bits)
            rows = len(weights)
            read = at + rows * matrix.cols
            start = placement.start
            yield complete, placement.target, start + row * matrix.row_bytes, _bytes(weights)
            # With the scales, and not before, the run may be finished and its error counts.
            if errors is not None:
                if not is_exact(placement):
                    floats = bits.view(np.float32).reshape(rows, matrix.cols)
                    sums += squared_error(floats, weights, scales, matrix)
                if read == placement.count:
                    errors.add(placement.kind, relative_error(*sums))
            start += matrix.scales_at
            yield finished, placement.target, start + row * matrix.scale_row_bytes, _bytes(scales)
        complete = finished
        if progress is not None:
            progress(before + placement.source_bytes * read // placement.count, total)


def _quantised(placement: Placement, bits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weights and scales, as `quantise_rows` has them, of a chunk for a quantised matrix."""
    if is_exact(placement):
        return gguf_file.repack_q4_0(bits, placement.matrix)
    try:
        return quantise_rows(
            bits.view(np.float32).reshape(-1, placement.matrix.cols), placement.matrix
        )
    except CheckpointError as error:
        raise CheckpointError(f"{placement.tensor.name}: {error}") from error


def _bytes(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def zero_padding(records: np.ndarray, layout: RecordLayout) -> None:
    """Zero what no weight or scale fills in records [N, R] (in `layout.bits`)."""
    end = 0
    for name, matrix in layout.matrices.items():
        at = layout.offsets[name]
        runs = [(at, matrix.rows * matrix.row_bytes)]
        if matrix.quantised:
            runs.append((at + matrix.scales_at, matrix.rows * matrix.scale_row_bytes))
        for start, size in runs:
            records[:, end : start // records.itemsize] = 0
            end = (start + size) // records.itemsize
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
    errors: ErrorTable | None = None,
    progress: Progress | None = None,
) -> tuple[dict[str, np.ndarray], np.ndarray | None]:
    """Load a Hugging Face safetensors directory or a .gguf file: dense parameters by path, records.

    Returns aligned arrays of specs' shapes and dtypes (quantised ones as `WeightMap.held` says),
    and records [L * E, R] of layout.bits with expert e of expert layer l at l * E + e: those given
    (filled in place) or new ones; None for a dense model. Weights are quantised as they are read.
    `errors` takes what that cost; progress(bytes done, bytes in all) is called after every few MB.
    Raises CheckpointError before anything is allocated when the files are malformed or do not fit,
    and NonFiniteError, after reading, for NaN or infinity.
    """
    placements = plan_directory(directory, weights)
    params = {path: aligned_empty(*weights.held(path)) for path in weights.specs}
    for path in weights.formats:
        params[path][:] = 0
    flat = {path: array.reshape(-1).view(np.uint8) for path, array in params.items()}
    if records is not None:
        _check_records(records, weights)
    elif weights.layout is not None:
        records = aligned_empty(weights.records_shape, weights.layout.bits)
    if records is not None:
        zero_padding(records, weights.layout)
        flat[EXPERTS] = records.reshape(-1).view(np.uint8)
    for _, target, position, data in pieces(placements, 0, check_finite, errors, progress):
        flat[target][position : position + len(data)] = data
    return params, records
