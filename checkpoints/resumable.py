"""Large files written so that a kill loses little and the final name always holds a whole file."""

import contextlib
import errno
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

from moejax.checkpoints.headers import parse_json, read_small
from moejax.errors import CheckpointError

JOURNAL_BYTES = 256 << 20  # bytes written between two entries in the journal
FULL = (errno.ENOSPC, errno.EDQUOT)

# (units finished once this is written, first byte, bytes)
Pieces = Iterable[tuple[int, int, memoryview]]


class State(Protocol):
    """What is gathered while a file is written and has to survive a kill, as JSON values."""

    def export(self) -> dict[str, Any]:
        """All of it, of the units that are finished."""

    def restore(self, state: dict[str, Any]) -> None:
        """Become what was exported."""


def partial_path(path: Path) -> Path:
    """Where `path` lies while it is unfinished."""
    return path.with_name(path.name + ".partial")


def journal_path(path: Path) -> Path:
    """Where the progress of an unfinished `path` is noted."""
    return path.with_name(path.name + ".journal")


def sync_directory(directory: Path) -> None:
    """Make renames within a directory durable."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_all(descriptor: int, data: memoryview, position: int) -> None:
    """Write all of `data` at a byte position."""
    while data:
        count = os.pwrite(descriptor, data, position)
        data, position = data[count:], position + count


def write_small(path: Path, data: bytes) -> None:
    """Replace a small file atomically and durably."""
    unfinished = path.with_name(path.name + ".tmp")
    with open(unfinished, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)
    sync_directory(path.parent)


@contextlib.contextmanager
def write_errors(path: Path, size: int) -> Iterator[None]:
    """Turn an OSError into a CheckpointError; for a full disk it says what `size` is needed."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise CheckpointError(
                f"no space left for {path}, which needs {size} bytes: free some and run it again "
                f"(it continues where it stopped) or delete {partial_path(path)}"
            ) from error
        raise CheckpointError(f"cannot write {path}: {error}") from error


def check_space(path: Path, size: int, present: int = 0) -> None:
    """Raise CheckpointError unless `size` bytes, of which `present` exist, fit beside `path`."""
    free = shutil.disk_usage(path.parent).free
    if size - present > free:
        raise CheckpointError(
            f"no space for {path}: it needs {size - present} more bytes and {free} are free"
        )


@contextlib.contextmanager
def locked(path: Path, flags: int) -> Iterator[int]:
    """Open `path` for this process alone; CheckpointError while another one has it."""
    descriptor = os.open(path, flags, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The previous owner may have renamed it, complete, since it was opened.
            mine = os.path.samestat(os.fstat(descriptor), os.stat(path))
        except (BlockingIOError, FileNotFoundError):
            mine = False
        if not mine:
            raise CheckpointError(f"another process is writing {path}")
        yield descriptor
    finally:
        os.close(descriptor)


def _noted(path: Path, descriptor: int, size: int, fingerprint: str) -> tuple[int, dict[str, Any]]:
    """Finished units and the state of an unfinished file, 0 and nothing if it is of no use."""
    try:
        noted = parse_json(read_small(journal_path(path)), "journal")
    except CheckpointError:
        return 0, {}
    done, state = noted.get("done"), noted.get("state", {})
    same = noted.get("fingerprint") == fingerprint and os.fstat(descriptor).st_size == size
    usable = same and type(done) is int and done > 0 and isinstance(state, dict)
    return (done, state) if usable else (0, {})


def write_resumable(
    path: Path,
    size: int,
    pieces: Callable[[int], Pieces],
    finish: Callable[[int], None],
    fingerprint: str,
    state: State | None = None,
) -> None:
    """Write a file of `size` bytes under another name, then rename it: `path` is old or complete.

    pieces(done) yields what remains after `done` units; what is never written stays zero.
    finish(descriptor) then reads and completes the file. After a kill, the same call with the same
    fingerprint goes on at the last note in the journal, with `state` as it was then. Raises
    CheckpointError when the disk is full, when another process writes the same file, and for
    every other failed write.
    """
    partial = partial_path(path)

    def note(done):
        os.fsync(descriptor)
        noted = {"fingerprint": fingerprint, "done": done}
        if state is not None:
            noted["state"] = state.export()
        write_small(journal_path(path), json.dumps(noted).encode())

    with write_errors(path, size), locked(partial, os.O_RDWR | os.O_CREAT) as descriptor:
        done, noted = _noted(path, descriptor, size, fingerprint)
        if state is not None:
            state.restore(noted)
        if not done:
            # First the journal: an old one must never vouch for what is written from here on.
            journal_path(path).unlink(missing_ok=True)
            os.truncate(descriptor, 0)
        check_space(path, size, os.fstat(descriptor).st_blocks * 512)
        os.truncate(descriptor, size)
        finished, unnoted = done, 0
        for finished, position, data in pieces(done):
            write_all(descriptor, data, position)
            unnoted += len(data)
            if unnoted >= JOURNAL_BYTES and finished > done:
                note(finished)
                done, unnoted = finished, 0
        note(finished)
        finish(descriptor)
        os.fsync(descriptor)
        os.replace(partial, path)
        journal_path(path).unlink()
        sync_directory(path.parent)
