"""Converted model directories: config and tokenizer files, dense.safetensors and experts.bank."""

import json
import math
import os
from collections.abc import Mapping
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
from moejax.layout import PART_ALIGNMENT, RECORD_ALIGNMENT, aligned_empty

CONFIG = "config.json"
DENSE = "dense.safetensors"
BANK = "experts.bank"
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
NAMES = {value.name: key for key, value in SOURCES.items()}  # bfloat16 -> BF16


def _dense_file(specs: Mapping[str, Any]) -> tuple[bytes, dict[str, int], int]:
    """Header, first byte of every path, and size of dense.safetensors.

    Safetensors allow no gaps, so paths are sorted by the largest power of two that divides their
    bytes: each then starts at a multiple of its own, and only small odd ones need a copy later.
    """
    sizes = {
        path: math.prod(spec.shape) * np.dtype(spec.dtype).itemsize for path, spec in specs.items()
    }
    order = sorted(specs, key=lambda path: (-(sizes[path] & -sizes[path]), path))
    entries, position = {"__metadata__": {"format": "moejax"}}, 0
    for path in order:
        end = position + sizes[path]
        entries[path] = {
            "dtype": NAMES[np.dtype(specs[path].dtype).name],
            "shape": list(specs[path].shape),
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
    header, starts, size = _dense_file(weights.specs)
    write_resumable(
        path,
        size,
        lambda done: write_placements(placements, starts, done, check_finite, progress),
        lambda descriptor: write_all(descriptor, memoryview(header), 0),
        fingerprint,
    )


def _converted_size(weights: WeightMap, config: dict) -> int:
    size = _dense_file(weights.specs)[2]
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
    return {name + suffix for name in (*COPIED, ORIGIN, DENSE, BANK) for suffix in suffixes}


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
    force: bool = False,
    check_finite: bool = True,
    progress: Progress | None = None,
) -> None:
    """Convert a Hugging Face safetensors directory into one that needs no conversion to run.

    Everything is written to TARGET.partial, which is renamed when complete: `target` is absent,
    the previous one (force), or whole. A killed conversion continues when it is run again, unless
    the source has changed. progress(bytes read, bytes in all). Raises CheckpointError as `load`
    does, when the disk is full, and when `target` exists without force or is not such a directory;
    NonFiniteError as `load` does.
    """
    source, target = Path(source), Path(target)
    _check_target(source, target, force)
    config = parse_json(read_small(source / CONFIG), str(source / CONFIG))
    placements = plan_directory(source, weights)
    copied = [name for name in COPIED if (source / name).is_file()]
    contents = {name: read_small(source / name) for name in copied}
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
                write_bank(
                    temporary / BANK,
                    placements,
                    weights,
                    config,
                    check_finite=check_finite,
                    progress=on_experts,
                )
            for name, content in contents.items():
                write_small(temporary / name, content)
            for path in map(temporary.joinpath, (DENSE, BANK)):
                journal_path(path).unlink(missing_ok=True)
            _replace(temporary, target)


def is_converted(directory: Path) -> bool:
    """Whether a directory was made by `convert_directory`."""
    return (Path(directory) / DENSE).is_file()


def _load_dense(path: Path, specs: Mapping[str, Any]) -> dict[str, np.ndarray]:
    tensors = {tensor.name: tensor for tensor in read_header(path)}
    problems = Problems()
    for name in sorted(tensors.keys() | specs.keys()):
        spec, tensor = specs.get(name), tensors.get(name)
        if spec is None or tensor is None:
            problems.add("extra" if spec is None else "missing", name)
            continue
        wanted = (NAMES[np.dtype(spec.dtype).name], tuple(spec.shape))
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
        params[name] = array.view(specs[name].dtype).reshape(tensor.shape)
    return params


def load_converted(
    directory: Path, weights: WeightMap
) -> tuple[dict[str, np.ndarray], np.ndarray | None]:
    """Map a converted directory: dense parameters by path and records [L * E, R], as `load` does.

    Nothing is read or copied but small unaligned parameters; everything mapped is read-only.
    Raises CheckpointError when a file is absent or malformed or does not fit `weights`.
    """
    directory = Path(directory)
    params = _load_dense(directory / DENSE, weights.specs)
    if weights.layout is None:
        return params, None
    bank = open_bank(directory / BANK)
    found = (bank.layout, bank.layers, bank.experts)
    wanted = (weights.layout, weights.expert_layers, weights.experts)
    if found != wanted:
        raise CheckpointError(f"{bank.path} holds {found}, the config asks for {wanted}")
    return params, bank.records
