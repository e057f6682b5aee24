"""Distances between the experts of each layer, made once and kept in a file beside the weights.

The file is safetensors, `distances` f32 [L, E, E] and `fingerprint` u8 [32]: a digest of what the
distances were made from. It lies in the converted directory, or in the cache directory if that
cannot be written or there is none. One that does not fit or is damaged is made again.
"""

import contextlib
import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from moejax import tiers
from moejax.checkpoints import convert, headers
from moejax.checkpoints.bank import open_bank
from moejax.checkpoints.gguf_file import is_gguf
from moejax.checkpoints.resumable import write_small
from moejax.errors import CheckpointError, InputError
from moejax.layout import MatrixLayout, RecordLayout
from moejax.models import family
from moejax.models.family import weight_map
from moejax.quantise import dequantise_rows, matrix_parts

VERSION = 1  # of the distances that the same weights give
BLOCK = 2 << 20  # weights worked on at once, of all experts of a layer together: 16 MB of f64
# Squared distances below this share of the squared lengths: there the Gram matrix has lost too many
# of the digits of f64, and differences are taken.
CLOSE = 1e-9
SAMPLES = 16  # pieces of each record that the fingerprint of records in memory takes
SAMPLE_BYTES = 256


def expert_distances(
    layout: RecordLayout, records: np.ndarray, layers: int, experts: int
) -> np.ndarray:
    """L2 distances f32 [L, E, E] between whole experts, symmetric, 0 to themselves.

    An expert is its gate_up and down as one vector, dequantised; infinity where one of a pair has
    NaN or infinity. The relative error is below 1e-3 however near two experts are.

    Args:
        records: [L * E, R] of layout.bits, in memory or mapped.
    """
    table = np.empty((layers, experts, experts), np.float32)
    for layer in range(layers):
        table[layer] = _layer_distances(layout, records[layer * experts : (layer + 1) * experts])
    return table


def _layer_distances(layout: RecordLayout, records: np.ndarray) -> np.ndarray:
    """[E, E] of the records [E, R] of one layer."""
    experts = len(records)
    gram = np.zeros((experts, experts))
    with np.errstate(invalid="ignore", over="ignore"):
        for block in _blocks(layout, records):
            gram += block @ block.T
        lengths = np.diag(gram)
        both = lengths[:, None] + lengths
        squares = both - gram - gram.T
        close = np.argwhere(np.triu(squares < CLOSE * both, 1))
        if len(close):
            _take_differences(squares, close, _blocks(layout, records))
        squares = np.where(np.isfinite(squares), squares, np.inf)
        np.fill_diagonal(squares, 0)
        return np.sqrt(squares).astype(np.float32)


def _take_differences(squares: np.ndarray, pairs: np.ndarray, blocks: Iterator[np.ndarray]) -> None:
    """Replace the squared distances of pairs [n, 2] by sums of squared differences."""
    sums = np.zeros(len(pairs))
    for block in blocks:
        for i, (one, other) in enumerate(pairs):
            difference = block[one] - block[other]
            sums[i] += difference @ difference
    squares[pairs[:, 0], pairs[:, 1]] = squares[pairs[:, 1], pairs[:, 0]] = sums


def _blocks(layout: RecordLayout, records: np.ndarray) -> Iterator[np.ndarray]:
    """The weights of records [E, R] in f64 blocks [E, n]; together they are every weight once."""
    for part, matrix in layout.matrices.items():
        view = layout.view(records, part)
        step = max(BLOCK // max(len(records) * matrix.columns, 1), 1)
        for start in range(0, matrix.rows, step):
            rows = slice(start, min(start + step, matrix.rows))
            block = np.empty((len(records), rows.stop - start, matrix.cols))
            for expert, data in enumerate(view):
                block[expert] = _rows(data, matrix, rows)
            yield block.reshape(len(records), -1)


def _rows(data: np.ndarray, matrix: MatrixLayout, rows: slice) -> np.ndarray:
    """Some rows of one expert's matrix, as floats."""
    if not matrix.quantised:
        return data[rows]
    weights, scales = matrix_parts(data, matrix)
    return dequantise_rows(weights[rows], scales[rows], matrix)


def stored_distances(
    paths: Sequence[pathlib.Path],
    fingerprint: bytes,
    shape: tuple[int, ...],
    compute: Callable[[], np.ndarray],
) -> np.ndarray:
    """The table of the first file that is whole and fits, else what `compute` returns.

    That is then written, whole or not at all, to the first path where it can be.

    Args:
        fingerprint: what the table is made from; a file with another one does not fit.
        shape: of the table, [L, E, E].
    """
    for path in paths:
        with contextlib.suppress(CheckpointError):
            return _read(path, fingerprint, shape)
    table = compute()
    for path in paths:
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_small(path, _file(table, fingerprint))
            break
    return table


def _file(table: np.ndarray, fingerprint: bytes) -> bytes:
    entries = {
        "distances": {
            "dtype": "F32",
            "shape": list(table.shape),
            "data_offsets": [0, table.nbytes],
        },
        "fingerprint": {
            "dtype": "U8",
            "shape": [len(fingerprint)],
            "data_offsets": [table.nbytes, table.nbytes + len(fingerprint)],
        },
    }
    text = json.dumps(entries).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    return len(text).to_bytes(8, "little") + text + table.astype("<f4").tobytes() + fingerprint


def _read(path: pathlib.Path, fingerprint: bytes, shape: tuple[int, ...]) -> np.ndarray:
    """The table of a file; CheckpointError unless it is well formed and the one that is meant."""
    tensors = {tensor.name: tensor for tensor in headers.read_header(path)}
    found = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
    if found != {"distances": ("F32", tuple(shape)), "fingerprint": ("U8", (len(fingerprint),))}:
        raise CheckpointError(f"{path} holds other tensors")
    data = {}
    with headers.open_regular(path)[0] as file:
        for name, tensor in tensors.items():
            data[name] = bytearray(tensor.nbytes)
            headers.read_exact(file, tensor.start, memoryview(data[name]))
    table = np.frombuffer(data["distances"], "<f4").reshape(shape)
    ordered = (table >= 0).all() and np.array_equal(table, table.swapaxes(1, 2))
    if bytes(data["fingerprint"]) != fingerprint or not ordered:
        raise CheckpointError(f"{path} was made from other weights, or is damaged")
    if np.diagonal(table, axis1=1, axis2=2).any():
        raise CheckpointError(f"{path} is damaged")
    return table


def distances_of(runtime: Any) -> np.ndarray:
    """Distances f32 [L, E, E] between the experts of a loaded model, from a file where there is.

    Experts in a converted directory, or on the disk behind a link, are told apart by the checksums
    of their bank; others, in memory, by sums and pieces of their records.

    Raises:
        InputError: a dense model, or experts on the disk and several models in their directory.
        CheckpointError: the bank is damaged.
    """
    store, config = runtime.store, runtime.config
    if store is None:
        raise InputError("a dense model has no experts to compare")
    layout, shape = store.layout, (config.num_moe_layers, config.num_experts)
    directory = _bank_directory(runtime)
    if directory is None:
        records = np.asarray(store.records)
        content = _digest(records)
    else:
        bank = open_bank(directory / convert.BANK)
        records, content = bank.records, bank.checksums.tobytes()
        found = (bank.layout, bank.layers, bank.experts)
        if found != (layout, *shape):
            raise CheckpointError(f"{bank.path} holds {found}, the model {(layout, *shape)}")
    about = repr((VERSION, layout, shape)).encode()
    fingerprint = hashlib.sha256(about + hashlib.sha256(content).digest()).digest()
    cached = _cache() / f"{fingerprint.hex()[:24]}.safetensors"
    return stored_distances(
        [cached] if directory is None else [directory / convert.DISTANCES, cached],
        fingerprint,
        (*shape, shape[1]),
        lambda: expert_distances(layout, records, *shape),
    )


def _cache() -> pathlib.Path:
    home = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
    return home / "moejax" / "distances"


def _digest(records: np.ndarray) -> bytes:
    """A digest of every record's sum and of pieces all over it, records [L * E, R].

    A sum alone would not see rows change places; a digest of all takes far longer.
    """
    data = records.view(np.uint8).reshape(len(records), -1)
    digest = hashlib.sha256(data.view(np.uint64).sum(axis=1, dtype=np.uint64))
    for start in np.linspace(0, data.shape[1] - SAMPLE_BYTES, SAMPLES).astype(int):
        digest.update(np.ascontiguousarray(data[:, start : start + SAMPLE_BYTES]))
    return digest.digest()


def _bank_directory(runtime: Any) -> pathlib.Path | None:
    """The converted directory that holds the experts of a model; None if only memory does."""
    directory = pathlib.Path(runtime.directory)
    if convert.is_converted(directory):
        return directory
    if runtime.store.records is not None:
        return None
    sources = [path for path in directory.iterdir() if is_gguf(path)]
    if any((directory / name).exists() for name in (headers.SINGLE, headers.INDEX)):
        sources.append(directory)
    if len(sources) != 1:
        raise InputError(f"{directory} holds several models: convert the one that is meant")
    model = runtime.model
    weights = weight_map(model.config, family(model.config.model_type).rules, model.dtype)
    return tiers.bank_directory(sources[0], weights, model.quant, None)
