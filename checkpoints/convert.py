"""Converted model directories: config and tokenizer files, dense.safetensors and experts.bank.

With quantised weights also quantisation.json: the format of the experts, of every dense parameter
that is quantised (a U8 tensor in dense.safetensors), and the errors of what was quantised.
"""

import json
import math
import os
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from moejax.checkpoints.bank import (
    bank_size,
    fingerprint_of,
    open_bank,
    source_stats,
    write_bank,
    write_placements,
)
from moejax.checkpoints.error_table import ErrorTable
from moejax.checkpoints.gguf_file import is_gguf
from moejax.checkpoints.gguf_model import read_config
from moejax.checkpoints.headers import Problems, parse_json, read_header, read_small
from moejax.checkpoints.hf import SOURCES, Progress, plan_directory
from moejax.checkpoints.resumable import (
    check_space,
    journal_path,
    locked,
    partial_path,
    sync_directory,
    write_all,
    write_errors,
    write_resumable,
    write_small,
)
from moejax.checkpoints.rules import EXPERTS, Placement, WeightMap
from moejax.errors import CheckpointError
from moejax.formats import quant_format
from moejax.layout import PART_ALIGNMENT, QUANTISED, RECORD_ALIGNMENT, aligned_empty

CONFIG = "config.json"
DENSE = "dense.safetensors"
BANK = "experts.bank"
QUANTISATION = "quantisation.json"
DISTANCES = "distances.safetensors"  # between experts: made when first asked for
ORIGIN = "converted.json"  # says what the directory was made from; marks it as replaceable
COPIED = (
    CONFIG,
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
NAMES = {value.name: key for key, value in SOURCES.items()} | {"uint8": "U8"}  # bfloat16 -> BF16


def _dense_file(weights: WeightMap) -> tuple[bytes, dict[str, int], int]:
    """Header, first byte of every path, and size of dense.safetensors.

    Safetensors allow no gaps, so paths are sorted by the largest power of two that divides their
    bytes: each then starts at a multiple of its own, and only small odd ones need a copy later.
    """
    held = {path: weights.held(path) for path in weights.specs}
    sizes = {path: math.prod(shape) * dtype.itemsize for path, (shape, dtype) in held.items()}
    order = sorted(held, key=lambda path: (-(sizes[path] & -sizes[path]), path))
    entries, position = {"__metadata__": {"format": "moejax"}}, 0
    for path in order:
        shape, dtype = held[path]
        end = position + sizes[path]
        entries[path] = {
            "dtype": NAMES[dtype.name],
            "shape": list(shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(entries).encode()
    length = math.ceil((8 + len(text)) / RECORD_ALIGNMENT) * RECORD_ALIGNMENT - 8
    header = length.to_bytes(8, "little") + text.ljust(length)
    starts = {path: len(header) + entries[path]["data_offsets"][0] for path in order}
    return header, starts, len(header) + position


def _write_dense(
    path: Path,
    placements: list[Placement],
    weights: WeightMap,
    fingerprint: str,
    check_finite: bool,
    progress: Progress | None,
) -> None:
    header, starts, size = _dense_file(weights)
    errors = ErrorTable()

    def finish(descriptor):
        write_all(descriptor, memoryview(header), 0)
        _note_errors(path.parent, weights, errors)

    write_resumable(
        path,
        size,
        lambda done: write_placements(placements, starts, done, check_finite, errors, progress),
        finish,
        fingerprint,
        errors,
    )


def _note_errors(directory: Path, weights: WeightMap, errors: ErrorTable) -> None:
    """Add what one of the files cost to a quantised directory's quantisation.json."""
    if weights.quant is None:
        return
    path, noted = directory / QUANTISATION, {}
    if path.exists():
        noted = parse_json(read_small(path), str(path))["errors"]
    about = {
        "quant": weights.quant,
        "formats": weights.formats,
        "errors": noted | errors.rows(),
    }
    write_small(path, json.dumps(about, indent=2).encode())


def _converted_size(weights: WeightMap, config: dict) -> int:
    size = _dense_file(weights)[2]
    if weights.layout is not None:
        size += bank_size(config, weights.layout, weights.expert_layers, weights.experts)[1]
    return size


def _written(temporary: Path) -> int:
    """Bytes that an interrupted conversion has left on the disk."""
    finished = [temporary / DENSE, temporary / BANK]
    paths = [*finished, *map(partial_path, finished)]
    return sum(os.stat(path).st_blocks * 512 for path in paths if path.exists())


def _names() -> set[str]:
    """Every name that a conversion gives to a file, for however short a time."""
    suffixes = ("", ".tmp", ".partial", ".journal", ".journal.tmp")
    return {
        name + suffix
        for name in (*COPIED, ORIGIN, QUANTISATION, DENSE, BANK, DISTANCES)
        for suffix in suffixes
    }


def _is_ours(directory: Path) -> bool:
    """Whether a conversion made all that is in the directory, so that it may be deleted."""
    if directory.is_symlink() or not directory.is_dir():
        return False
    names = set(os.listdir(directory))
    return names <= {ORIGIN + ".tmp"} or (ORIGIN in names and names <= _names())


def _clear(directory: Path) -> None:
    """Delete a directory's files, last the one that says that the directory is ours."""
    for name in sorted(os.listdir(directory), key=lambda name: name == ORIGIN):
        os.unlink(directory / name)


def _remove(directory: Path) -> None:
    _clear(directory)
    os.rmdir(directory)


def _check_target(source: Path, target: Path, force: bool) -> None:
    if not target.parent.is_dir():
        raise CheckpointError(f"{target.parent} is not a directory")
    if target.resolve() == source.resolve() or target.resolve() in source.resolve().parents:
        raise CheckpointError(f"{target} holds the source: convert into another directory")
    if os.path.lexists(target):
        if not force:
            raise CheckpointError(f"{target} exists: give another name, or replace it with --force")
        if not _is_ours(target):
            raise CheckpointError(f"{target} is not a converted model, so it is not replaced")


def _prepare(temporary: Path, fingerprint: str, source: Path) -> None:
    """Keep what an interrupted conversion from the same files has left, remove anything else."""
    if not _is_ours(temporary):
        raise CheckpointError(f"{temporary} is in the way: move it elsewhere")
    origin = temporary / ORIGIN
    text = json.dumps({"source": str(source), "fingerprint": fingerprint}).encode()
    if not origin.is_file() or read_small(origin) != text:
        _clear(temporary)
        write_small(origin, text)


def _replace(temporary: Path, target: Path) -> None:
    old = target.with_name(target.name + ".old")
    if target.exists():
        if _is_ours(old):
            _remove(old)
        os.rename(target, old)
    os.rename(temporary, target)
    sync_directory(target.parent)
    if _is_ours(old):
        _remove(old)


def convert_directory(
    source: Path,
    target: Path,
    weights: WeightMap,
    *,
    quant: str | None = None,
    group: int = 32,
    force: bool = False,
    check_finite: bool = True,
    progress: Progress | None = None,
) -> dict[str, dict[str, float]]:
    """Convert a Hugging Face safetensors directory or a .gguf file into one that is mapped to run.

    `weights` describes the float model; quant "int8" or "int4" (in groups of 32 or 64 columns)
    quantises its linear maps. Returns, by kind of tensor, their number and the mean and maximum of
    their relative RMS errors, empty without `quant`; they are also in quantisation.json.
    Everything is written to TARGET.partial, which is renamed when complete: `target` is absent,
    the previous one (force), or whole. A killed conversion continues when it is run again, unless
    the source has changed. progress(bytes read, bytes in all). Raises CheckpointError as `load`
    does, when the disk is full, and when `target` exists without force or is not such a directory;
    NonFiniteError as `load` does.
    """
    source, target = Path(source), Path(target)
    weights = weights.quantised(quant_format(quant, group))
    _check_target(source, target, force)
    config, contents = _small_files(source)
    placements = plan_directory(source, weights)
    stats = source_stats(placements)
    fingerprint = fingerprint_of(placements, stats, contents, weights.layout, check_finite)
    dense = [placement for placement in placements if placement.target != EXPERTS]
    total = sum(placement.source_bytes for placement in placements)
    dense_bytes = sum(placement.source_bytes for placement in dense)
    on_dense = progress and (lambda done, _: progress(done, total))
    on_experts = progress and (lambda done, _: progress(dense_bytes + done, total))

    temporary, size = partial_path(target), _converted_size(weights, config)
    with write_errors(target, size):
        temporary.mkdir(exist_ok=True)
        with locked(temporary, os.O_RDONLY):
            _prepare(temporary, fingerprint, source)
            check_space(target, size, _written(temporary))
            if not (temporary / DENSE).exists():
                _write_dense(temporary / DENSE, dense, weights, fingerprint, check_finite, on_dense)
            if weights.layout is not None and not (temporary / BANK).exists():
                errors = ErrorTable()
                write_bank(
                    temporary / BANK,
                    placements,
                    weights,
                    config,
                    check_finite=check_finite,
                    errors=errors,
                    finished=partial(_note_errors, temporary, weights, errors),
                    progress=on_experts,
                )
            for name, content in contents.items():
                write_small(temporary / name, content)
            for path in map(temporary.joinpath, (DENSE, BANK)):
                journal_path(path).unlink(missing_ok=True)
            _replace(temporary, target)
    return quantisation(target)["errors"] if weights.quant else {}


def _small_files(source: Path) -> tuple[dict, dict[str, bytes]]:
    """The model's config.json, and the bytes of the files to copy; a GGUF file's lie beside it."""
    directory = source.parent if is_gguf(source) else source
    contents = {n: read_small(directory / n) for n in COPIED if (directory / n).is_file()}
    if is_gguf(source):
        config = read_config(source)
        return config, contents | {CONFIG: json.dumps(config, indent=2).encode()}
    if CONFIG not in contents:
        raise CheckpointError(f"{source / CONFIG} is missing: give a Hugging Face model directory")
    return parse_json(contents[CONFIG], str(source / CONFIG)), contents


def quantisation(directory: Path) -> dict[str, Any] | None:
    """What quantisation.json says of a converted directory, None if its weights are floats.

    Raises CheckpointError when it is malformed.
    """
    path = Path(directory) / QUANTISATION
    if not path.is_file():
        return None
    about = parse_json(read_small(path), str(path))
    if about.get("quant") not in QUANTISED or not isinstance(about.get("errors"), dict):
        raise CheckpointError(f"{path} is damaged: convert the model again")
    return about


def is_converted(directory: Path) -> bool:
    """Whether a directory was made by `convert_directory`."""
    return (Path(directory) / DENSE).is_file()


def _load_dense(path: Path, weights: WeightMap) -> dict[str, np.ndarray]:
    held = {name: weights.held(name) for name in weights.specs}
    tensors = {tensor.name: tensor for tensor in read_header(path)}
    problems = Problems()
    for name in sorted(tensors.keys() | held.keys()):
        tensor = tensors.get(name)
        if name not in held or tensor is None:
            problems.add("missing" if tensor is None else "extra", name)
            continue
        shape, dtype = held[name]
        wanted = (NAMES[dtype.name], shape)
        if (tensor.dtype, tensor.shape) != wanted:
            problems.add("shape", name, f"is {tensor.dtype} {tensor.shape}, needs {wanted}")
    problems.raise_if_any(f"{path} does not fit its config")
    data = np.memmap(path, np.uint8, "r")
    params = {}
    for name, tensor in tensors.items():
        array = data[tensor.start : tensor.start + tensor.nbytes]
        if tensor.start % PART_ALIGNMENT:
            copy = aligned_empty(array.shape, np.uint8)
            copy[:] = array
            array = copy
        params[name] = array.view(held[name][1]).reshape(tensor.shape)
    return params


def load_converted(
    directory: Path, weights: WeightMap
) -> tuple[dict[str, np.ndarray], np.ndarray | None]:
    """Map a converted directory: dense parameters by path and records [L * E, R], as `load` does.

    `weights` describes the float model; what is stored quantised comes as `WeightMap.held` says,
    in the format of `quantisation`. Nothing is read or copied but small unaligned parameters;
    everything mapped is read-only. Raises CheckpointError when a file is absent or malformed or
    does not fit `weights`.
    """
    directory = Path(directory)
    if about := quantisation(directory):
        weights = weights.quantised(about["quant"])
        if about.get("formats") != weights.formats:
            raise CheckpointError(f"{directory / QUANTISATION} does not fit the config")
    params = _load_dense(directory / DENSE, weights)
    if weights.layout is None:
        return params, None
    bank = open_bank(directory / BANK)
    found = (bank.layout, bank.layers, bank.experts)
    wanted = (weights.layout, weights.expert_layers, weights.experts)
    if found != wanted:
        raise CheckpointError(f"{bank.path} holds {found}, the config asks for {wanted}")
    return params, bank.records
