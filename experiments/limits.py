"""Run a command under a memory limit that counts its share of the page cache (Linux, as root).

Command:   python -m experiments.limits --memory 1.5GB -- llama-bench ...

The limit is a control group (version 1 or 2) inside the caller's own. A page of a file is charged
to the group that reads it first, so a mapped model counts in full, provided that it was not cached
before: `drop_cached` sees to that.
"""

import argparse
import contextlib
import ctypes
import errno
import mmap
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from moejax.units import parse_bytes

ROOT = pathlib.Path("/sys/fs/cgroup")
LIMIT = {1: "memory.limit_in_bytes", 2: "memory.max"}
PEAK = {1: "memory.max_usage_in_bytes", 2: "memory.peak"}
HITS = {1: "memory.failcnt", 2: "memory.events"}


class LimitError(RuntimeError):
    """This machine does not let this process limit memory; the message says why."""


class MemoryLimit:
    """A control group that processes are started in."""

    def __init__(self, path: pathlib.Path, version: int, size: int):
        self.path, self.version, self.bytes = path, version, size

    def start(self, command: Sequence[str], **options: Any) -> subprocess.Popen:
        """`subprocess.Popen` of a command that is in the group from its first page on."""
        enter = f'echo $$ > "{self.path / "cgroup.procs"}" && exec "$@"'
        return subprocess.Popen(["/bin/sh", "-c", enter, "sh", *command], **options)

    def usage(self) -> dict[str, Any]:
        """Limit and peak in bytes, page cache included, and how often the limit was met."""
        peak, hits = self.path / PEAK[self.version], (self.path / HITS[self.version]).read_text()
        if self.version == 2:
            hits = dict(line.split() for line in hits.splitlines())["max"]
        found = int(peak.read_text()) if peak.exists() else None  # memory.peak is of Linux 5.19
        return {"limit": self.bytes, "peak": found, "limit_met": int(hits)}


@contextlib.contextmanager
def memory_limit(size: int) -> Iterator[MemoryLimit]:
    """A group of `size` bytes inside the caller's own, removed at the end with its processes gone.

    Raises:
        LimitError: control groups cannot be used here.
    """
    version, own = own_group()
    path = own / f"moejax-{os.getpid()}"
    try:
        if version == 2 and "memory" not in (own / "cgroup.subtree_control").read_text():
            (own / "cgroup.subtree_control").write_text("+memory")
        path.mkdir()
    except OSError as error:
        raise LimitError(f"cannot make a control group in {own}: {error}") from error
    try:
        (path / LIMIT[version]).write_text(str(size))
        yield MemoryLimit(path, version, size)
    except PermissionError as error:
        raise LimitError(f"cannot limit the control group {path}: {error}") from error
    finally:
        _remove(path, version)


def own_group() -> tuple[int, pathlib.Path]:
    """Version and directory of the memory control group that this process is in.

    Raises:
        LimitError: there is none.
    """
    try:
        lines = pathlib.Path("/proc/self/cgroup").read_text().splitlines()
    except OSError as error:
        raise LimitError(f"no control groups: {error}") from error
    groups = {names: path for _, names, path in (line.split(":", 2) for line in lines)}
    for names, path in groups.items():
        if "memory" in names.split(","):
            return 1, ROOT / "memory" / path.lstrip("/")
    unified = ROOT / groups.get("", "/none").lstrip("/")
    if not (unified / "cgroup.controllers").exists():
        raise LimitError("no control group with a memory controller is mounted")
    if "memory" not in (unified / "cgroup.controllers").read_text():
        raise LimitError(f"{unified} has no memory controller")
    return 2, unified


def _remove(path: pathlib.Path, version: int) -> None:
    for _ in range(50):
        try:
            if version == 1:
                (path / "memory.force_empty").write_text("0")
            path.rmdir()
            return
        except OSError as error:  # a process that has just ended is counted a little longer
            if error.errno != errno.EBUSY:
                raise
            time.sleep(0.1)
    raise LimitError(f"{path} still has processes: end them and remove it with rmdir")


def drop_cached(paths: Iterable[pathlib.Path]) -> int:
    """Take files out of the page cache; returns the bytes that stayed (mapped by others)."""
    left = 0
    for path in paths:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        left += cached_bytes(path)
    return left


def cached_bytes(path: pathlib.Path) -> int:
    """Bytes of a file in the page cache."""
    size = os.path.getsize(path)
    if not size:
        return 0
    with open(path, "rb") as file, mmap.mmap(file.fileno(), size, mmap.MAP_PRIVATE) as mapped:
        # A private mapping is writable, which is what ctypes asks for; nothing is written.
        buffer = ctypes.c_char.from_buffer(mapped)
        pages = (ctypes.c_ubyte * (-(-size // mmap.PAGESIZE)))()
        libc = ctypes.CDLL(None, use_errno=True)
        failed = libc.mincore(
            ctypes.c_void_p(ctypes.addressof(buffer)), ctypes.c_size_t(size), pages
        )
        del buffer
        if failed:
            raise OSError(ctypes.get_errno(), "mincore failed")
        return sum(page & 1 for page in pages) * mmap.PAGESIZE


def main() -> None:
    """Run the command, then tell its peak on stderr."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--memory", required=True, help="such as 1.5GB")
    parser.add_argument("--drop", type=pathlib.Path, nargs="*", default=[], help="uncache files")
    parser.add_argument("command", nargs="+")
    options = parser.parse_args()
    drop_cached(options.drop)
    try:
        with memory_limit(parse_bytes(options.memory)) as limit:
            code = limit.start(options.command).wait()
            print(limit.usage(), file=sys.stderr)
    except LimitError as error:
        raise SystemExit(f"limits: {error}") from None
    raise SystemExit(code)


if __name__ == "__main__":
    main()
