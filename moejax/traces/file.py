"""The file of a trace: a zip archive of NumPy columns and one JSON header, written atomically.

Sizes are compared before anything is read: a hostile file costs at most `ALWAYS_FITS` of memory, or
`MOST_RATIO` times its own size if that is more.
"""

import contextlib
import json
import math
import os
import pathlib
import zipfile
import zlib
from collections.abc import Iterator
from typing import IO, Any

import numpy as np

from moejax.errors import InputError, reason, unreadable
from moejax.traces.form import (
    COLUMNS,
    COUNT,
    FORMAT,
    MOST_EXPERTS,
    NEEDED,
    READS,
    VERSION,
    check_column,
    forms,
)

HEADER = "header.json"
HEADER_BYTES = 1 << 20
ALWAYS_FITS = 64 << 20  # bytes unpacked
MOST_RATIO = 500  # of larger ones to the file: traces reach some 50
STAMP = (1980, 1, 1, 0, 0, 0)  # of all members: the same trace gives the same file


def save(trace: Any, path: str | os.PathLike) -> None:
    """Write a checked trace; the file is whole or not there.

    Raises:
        InputError: the file cannot be written, or `about` is not JSON.
    """
    path = pathlib.Path(path)
    header = {"format": FORMAT, "version": VERSION, "model": trace.model, "experts": trace.experts}
    arrays = _members(trace)
    header["columns"] = {n: _stated(array.dtype, array.shape) for n, array in arrays.items()}
    try:
        text = json.dumps(header | {"about": trace.about}, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InputError(f"`about` of a trace must be JSON: {error}") from None
    if len(text.encode()) > HEADER_BYTES:
        raise InputError(f"`about` of a trace must be less than {HEADER_BYTES} bytes of JSON")
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(unfinished, "wb") as file:
            with zipfile.ZipFile(file, "w") as archive:
                _put(archive, HEADER, text.encode())
                for name, array in arrays.items():
                    with archive.open(_info(f"{name}.npy"), "w", force_zip64=True) as member:
                        np.lib.format.write_array(member, array, (1, 0), allow_pickle=False)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error}") from error
    finally:
        with contextlib.suppress(OSError):
            unfinished.unlink()


def _members(trace: Any) -> dict[str, np.ndarray]:
    arrays = trace.columns()
    arrays |= {f"counts/{name}": count for name, count in trace.counts.items()}
    arrays |= {f"reads/{name}": column for name, column in trace.reads.items()}
    # Little-endian and C order everywhere, so that one kind of reader will do.
    little = {name: array.astype(array.dtype.newbyteorder("<")) for name, array in arrays.items()}
    return {name: np.ascontiguousarray(array) for name, array in little.items()}


def _stated(dtype: np.dtype, shape: tuple[int, ...]) -> dict[str, Any]:
    """What the header says of a column."""
    return {"dtype": dtype.str, "shape": list(shape)}


def _info(name: str) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name, STAMP)
    info.compress_type = zipfile.ZIP_DEFLATED
    return info


def _put(archive: zipfile.ZipFile, name: str, data: bytes) -> None:
    with archive.open(_info(name), "w") as member:
        member.write(data)


def load(path: str | os.PathLike) -> dict[str, Any]:
    """The fields of the trace in a file, their types and shapes checked, not yet their values.

    Raises:
        InputError: no such file, not a trace, another version, or it contradicts itself.
    """
    with _opened(path) as (archive, header):
        sizes = {"E": header["experts"]}
        read = {
            name: _column(path, archive, name, stated, sizes)
            for name, stated in header["columns"].items()
        }
    fields: dict[str, Any] = {"counts": {}, "reads": {}}
    for name, array in read.items():
        group, _, own = name.rpartition("/")
        (fields[group] if group else fields)[own] = array
    return fields | {name: header[name] for name in ("model", "experts", "about")}


def read_header(path: str | os.PathLike) -> dict[str, Any]:
    """The header of a trace: `model`, `experts`, `columns` by name, `about`; reads no column.

    Raises:
        InputError: as `load`.
    """
    with _opened(path) as (_, header):
        return header


@contextlib.contextmanager
def _opened(path: str | os.PathLike) -> Iterator[tuple[zipfile.ZipFile, dict[str, Any]]]:
    try:
        with open(path, "rb") as file, zipfile.ZipFile(file) as archive:
            _check_members(path, archive, os.fstat(file.fileno()).st_size)
            yield archive, _header(path, archive)
    except OSError as error:
        raise InputError(unreadable(path, error)) from error
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise InputError(
            f"{path} is not a trace, or only a part of one ({error}): record, import or copy it "
            "again"
        ) from error


def _check_members(path: Any, archive: zipfile.ZipFile, size: int) -> None:
    infos = archive.infolist()
    names = [info.filename for info in infos]
    if HEADER not in names:
        raise InputError(f"{path} is not a trace: it has no {HEADER}")
    if len(set(names)) != len(names):
        raise InputError(f"{path} is not a trace: it holds a name twice")
    for info in infos:
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise InputError(f"{path}: {info.filename} is not deflated as those of traces are")
    total = sum(info.file_size for info in infos)
    if total > max(ALWAYS_FITS, MOST_RATIO * size):
        raise InputError(
            f"{path} of {size} bytes unpacks to {total}: no trace does, so it is not read"
        )
    if archive.getinfo(HEADER).file_size > HEADER_BYTES:
        raise InputError(f"{path} is not a trace: its header is too long")


def _header(path: Any, archive: zipfile.ZipFile) -> dict[str, Any]:
    try:
        header = json.loads(archive.read(HEADER))
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{path} is not a trace: its header is no JSON ({reason(error)})"
        ) from None
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise InputError(f"{path} is not a trace: its header does not say {FORMAT!r}")
    if header.get("version") != VERSION:
        raise InputError(
            f"{path} is a trace of version {header.get('version')!r:.20}, and this moejax reads "
            f"version {VERSION}: take a moejax that wrote it, or record it again"
        )
    kinds = {"model": str, "experts": int, "columns": dict, "about": dict}
    for name, kind in kinds.items():
        if type(header.get(name)) is not kind:
            raise InputError(f"{path}: {name!r} of its header is not a {kind.__name__}")
    if not 0 < header["experts"] <= MOST_EXPERTS:
        raise InputError(f"{path}: 'experts' of its header is not in [1, {MOST_EXPERTS}]")
    columns = set(header["columns"])
    held = {name.removesuffix(".npy") for name in archive.namelist()} - {HEADER}
    if wrong := sorted(columns ^ held | {name for name in columns if not _form(name)}):
        raise InputError(
            f"{path}: column {wrong[0]!r:.60} is unknown, or is not both in the header and the file"
        )
    if missing := [name for name in NEEDED if name not in columns]:
        raise InputError(f"{path} has no column {missing[0]!r}")
    return header


def _form(name: str) -> tuple[tuple[str, str], ...]:
    """The types that a column may have, with its dimensions; () for an unknown one."""
    group, _, own = name.rpartition("/")
    if group == "counts":
        return COUNT if own.isidentifier() else ()
    if group == "reads":
        return (READS[own],) if own in READS else ()
    return forms(own) if not group and own in COLUMNS else ()


def _column(
    path: Any, archive: zipfile.ZipFile, name: str, stated: Any, sizes: dict[str, int]
) -> np.ndarray:
    info = archive.getinfo(f"{name}.npy")
    with archive.open(info) as member:
        dtype, shape = _npy_header(path, name, member)
        if stated != _stated(dtype, shape):
            raise InputError(f"{path}: the header does not say what {name} is")
        check_column(f"{path}: {name}", dtype, shape, _form(name), sizes)
        if member.tell() + math.prod(shape) * dtype.itemsize != info.file_size:
            raise InputError(f"{path}: {name} is not as long as its shape {list(shape)} says")
        array = np.empty(shape, dtype)
        left = memoryview(array).cast("B") if array.size else b""
        while left:
            count = member.readinto(left)
            if not count:
                raise EOFError(f"{name} ends early")
            left = left[count:]
        member.read(1)  # the end, where the checksum is compared
    return array.astype(dtype.newbyteorder("="), copy=False)


def _npy_header(path: Any, name: str, member: IO[bytes]) -> tuple[np.dtype, tuple[int, ...]]:
    try:
        if np.lib.format.read_magic(member) != (1, 0):
            raise ValueError("not of version 1.0")
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(member)
    except ValueError as error:
        raise InputError(f"{path}: {name} is no NumPy array: {error}") from None
    if fortran or any(size < 0 for size in shape) or dtype.hasobject or dtype.fields:
        raise InputError(f"{path}: {name} is not a plain array in C order")
    return dtype, shape
