"""Reading data sets that lie on the disk: compressed, and of sizes that are bounded before use."""

import bz2
import csv
import gzip
import io
import json
import lzma
import pathlib
import tarfile
import typing
import zlib
from collections.abc import Callable, Iterator
from typing import Any

from moejax.errors import InputError

LIMIT = 256 << 20  # bytes of a file once decompressed, or of all members of an archive
MEMBERS = 10_000
OPENERS: dict[str, Callable] = {".xz": lzma.open, ".gz": gzip.open, ".bz2": bz2.open}
BROKEN = (OSError, EOFError, lzma.LZMAError, zlib.error, tarfile.TarError)
# What a field may be, a list never being empty.
KINDS = {str: "a text", int: "a whole number"}
KINDS |= {list[str]: "a list of texts", list[dict]: "a list of objects"}


def find(folder: pathlib.Path, *names: str) -> pathlib.Path:
    """The first of these files, plain or compressed, that is in the folder or in its `eval`.

    Raises:
        InputError: none is there; the message says which are looked for.
    """
    for name in names:
        for place in (folder, folder / "eval"):
            for suffix in ("", *OPENERS):
                if (place / (name + suffix)).is_file():
                    return place / (name + suffix)
    raise InputError(f"{folder} has no {' or '.join(names)} (.xz or .gz too): give --data")


def read(path: pathlib.Path, limit: int = LIMIT) -> bytes:
    """A file's content, decompressed.

    Raises:
        InputError: it cannot be read, is damaged, or is larger than `limit`.
    """
    try:
        with OPENERS.get(path.suffix, open)(path, "rb") as file:
            content = file.read(limit + 1)
    except BROKEN as error:
        raise InputError(f"{path} cannot be read ({error}): copy it again") from error
    if len(content) > limit:
        raise InputError(f"{path} holds more than {limit} bytes: it is not the data set")
    return content


def text(path: pathlib.Path) -> str:
    """A file's text, decompressed; InputError as `read`, or if it is not UTF-8."""
    return _decoded(read(path), path)


def json_lines(path: pathlib.Path, **fields: Any) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines; InputError as `check_fields` for any of them."""
    rows = [
        _json(line, f"{path} line {n}") for n, line in enumerate(text(path).split("\n"), 1) if line
    ]
    for n, row in enumerate(rows, 1):
        check_fields(row, f"{path} line {n}", **fields)
    return rows


def members(path: pathlib.Path, limit: int = LIMIT) -> Iterator[tuple[str, bytes]]:
    """(name, content) of the regular files of a tar archive, in its order; nothing is unpacked.

    Raises:
        InputError: damaged, too large, with too many members, or with one that is no plain file
            or folder or whose name leaves the archive.
    """
    content, left = io.BytesIO(read(path, limit)), limit
    try:
        with tarfile.open(fileobj=content, mode="r:") as archive:
            for n, member in enumerate(archive):
                parts = pathlib.PurePosixPath(member.name).parts
                plain = member.isfile() or member.isdir()
                if not plain or ".." in parts or parts[:1] == ("/",) or n >= MEMBERS:
                    raise InputError(
                        f"{path} has the member {member.name!r:.80}: it is not plain data"
                    )
                left -= member.size
                if left < 0:
                    raise InputError(
                        f"{path} holds more than {limit} bytes: it is not the data set"
                    )
                if member.isfile():
                    yield member.name, archive.extractfile(member).read()
    except BROKEN as error:
        raise InputError(f"{path} is damaged ({error}): copy it again") from error


def csv_rows(content: bytes, where: str, columns: int) -> list[list[str]]:
    """Rows of a CSV file without header; InputError if one has another number of columns."""
    try:
        rows = [*csv.reader(io.StringIO(_decoded(content, where), newline=""), strict=True)]
    except csv.Error as error:
        raise InputError(f"{where} is damaged ({error}): copy it again") from error
    if any(len(row) != columns for row in rows):
        raise InputError(f"{where} is damaged: a row has not {columns} columns; copy it again")
    return rows


def json_document(content: bytes, where: str, **fields: Any) -> dict[str, Any]:
    """A JSON object with these fields; InputError for anything else."""
    document = _json(_decoded(content, where), where)
    check_fields(document, where, **fields)
    return document


def check_fields(row: Any, where: str, **fields: Any) -> None:
    """Raise InputError unless this is an object whose fields these are, each one of KINDS."""
    if not isinstance(row, dict) or not row.keys() >= fields.keys():
        raise InputError(f"{where} has not the fields {', '.join(fields)}: it is not the data set")
    for name, kind in fields.items():
        if not _fits(row[name], kind):
            raise InputError(
                f"{where}: {name} is {row[name]!r:.60}, not {KINDS[kind]}: it is not the data set"
            )


def _fits(value: Any, kind: Any) -> bool:
    if items := typing.get_args(kind):
        return isinstance(value, list) and bool(value) and all(_fits(v, *items) for v in value)
    return isinstance(value, kind) and not isinstance(value, bool)


def _json(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is not valid JSON ({error}): copy the file again") from error


def _decoded(content: bytes, where: Any) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{where} is not UTF-8 text: copy it again") from error
