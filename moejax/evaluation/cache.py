"""Results of scoring on the disk, found again by what made them: model, policy, budget, request."""

import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import inspect
import json
import os
import pathlib
import sqlite3
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np

from moejax import checkpoints, kernels
from moejax.errors import InputError
from moejax.kernels import build

FORMAT = 1  # of what is stored; another one finds nothing of this
WHOLE = 64 << 20  # bytes up to which a file is read whole for its fingerprint
SAMPLED = 4096  # numbers of an array, about
ENDS = 1 << 20  # bytes that are read of the beginning and the end of larger ones


def default_path() -> pathlib.Path:
    """Where results are kept if nothing else is said."""
    home = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(home) / "moejax" / "eval" / "scores.sqlite"


class Cache:
    """A file of results by key; safe to share between processes."""

    def __init__(self, path: str | os.PathLike):
        """Open or make the file; InputError if it is no such file or cannot be written."""
        self.path = pathlib.Path(path)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = sqlite3.connect(self.path, timeout=60, isolation_level=None)
            self._file.execute("PRAGMA journal_mode = WAL")  # or every result waits for the disk
            self._file.execute("PRAGMA synchronous = NORMAL")
            self._file.execute(
                "CREATE TABLE IF NOT EXISTS score (key TEXT PRIMARY KEY, value TEXT)"
            )
        except (OSError, sqlite3.Error) as error:
            raise InputError(
                f"{path} cannot keep results ({error}): delete it or name another"
            ) from error

    def get(self, key: str) -> dict[str, Any] | None:
        """What is stored under a key, None for nothing."""
        found = self._run("SELECT value FROM score WHERE key = ?", (key,)).fetchone()
        return None if found is None else json.loads(found[0])

    def put(self, key: str, value: dict[str, Any]) -> None:
        """Store a result; one that is there stays."""
        text = json.dumps(value, allow_nan=False)
        self._run("INSERT OR IGNORE INTO score VALUES (?, ?)", (key, text))

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _run(self, statement: str, values: tuple) -> sqlite3.Cursor:
        try:
            return self._file.execute(statement, values)
        except sqlite3.Error as error:
            raise InputError(f"{self.path} is damaged ({error}): delete it") from error


def key(*parts: Any) -> str:
    """The key of what these JSON documents describe."""
    text = json.dumps([FORMAT, *parts], sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def about(runtime: Any) -> dict[str, Any]:
    """All that decides the scores of a runtime beside the request, as a JSON document."""
    model = runtime.model
    return {
        "moejax": importlib.metadata.version("moejax"),
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
        "files": fingerprint(runtime.directory),
        "weights": [model.dtype, model.quant, model.kernels, sample(runtime.params)],
        "policy": policy_document(runtime.policy),
        "code": code(runtime.policy),
        "slots": runtime.slots,
        "per_layer": runtime.per_layer,
        "context": runtime.context,
        "link": runtime.tier,
    }


def sample(weights: Any) -> str:
    """A digest of some of the numbers of every array: a folder may hold several GGUF files."""
    digest = hashlib.sha256()
    for array in map(np.asarray, jax.tree.leaves(weights)):
        flat = array.reshape(-1)
        digest.update(flat[:: max(flat.size // SAMPLED, 1)].tobytes())
    return digest.hexdigest()


def policy_document(policy: Any) -> list[Any]:
    """A policy's structure and all of its numbers."""
    numbers, structure = jax.tree.flatten(policy)
    arrays = [np.asarray(number) for number in numbers]
    return [str(structure), [[str(a.dtype), list(a.shape), a.tolist()] for a in arrays]]


def code(policy: Any) -> str:
    """A digest of all that computes: moejax's sources, and those of a policy's own parts."""
    package = pathlib.Path(__file__).parents[1]
    files = {pathlib.Path(path) for path in _sources(policy)}
    for folder in (package, *(pathlib.Path(m.__path__[0]) for m in (kernels, checkpoints))):
        files |= {f for f in folder.rglob("*") if f.suffix in (".py", ".cc", ".h")}
    digest = hashlib.sha256(build.status().encode())
    for file in sorted(files):
        digest.update(str(file).encode() + file.read_bytes())
    return digest.hexdigest()


def _sources(part: Any) -> Iterator[str]:
    """The files in which the types of a policy and of all its parts are written."""
    if dataclasses.is_dataclass(part):
        with contextlib.suppress(TypeError, OSError):
            yield inspect.getfile(type(part))
        for field in dataclasses.fields(part):
            yield from _sources(getattr(part, field.name))
    elif isinstance(part, tuple | list):
        for each in part:
            yield from _sources(each)


def fingerprint(directory: str | os.PathLike) -> str:
    """A digest of all files of a model: names, sizes and contents, of large ones both ends.

    Of large files the time of their last change counts too.
    """
    root = pathlib.Path(directory)
    files = sorted(file for file in root.rglob("*") if file.is_file())
    stamps = [(str(f.relative_to(root)), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    return _digest(str(root), tuple(stamps))


@functools.lru_cache(maxsize=16)
def _digest(root: str, stamps: tuple[tuple[str, int, int], ...]) -> str:
    digest = hashlib.sha256()
    for name, size, changed in stamps:
        digest.update(json.dumps([name, size, changed if size > WHOLE else None]).encode())
        for part in _read(pathlib.Path(root) / name, size):
            digest.update(part)
    return digest.hexdigest()


def _read(path: pathlib.Path, size: int) -> Iterable[bytes]:
    with open(path, "rb") as file:
        if size <= WHOLE:
            while part := file.read(ENDS):
                yield part
            return
        yield file.read(ENDS)
        file.seek(-ENDS, os.SEEK_END)
        yield file.read(ENDS)
