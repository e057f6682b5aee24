"""Stores of expert records behind a link: opened, closed, and what they have done.

The programs that use one know its handle only; `moejax.kernels.transport` has their operations.
"""

import ctypes
import dataclasses
import functools
import os
import weakref
from collections.abc import Callable
from typing import Self

import numpy as np

from moejax.errors import MoejaxError
from moejax.kernels import build

MAX_THREADS = 256
MESSAGE_BYTES = 4096


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoreStats:
    """What a store has done since it was opened or its statistics were reset."""

    requested: int  # reads asked for; those landed or under way already are not counted
    landed: int  # records read, into landing buffers or slots
    bytes: int  # of them
    committed: int  # records moved into slots
    prefetched: int  # of those, begun as a prefetch before the commit
    dropped: int  # prefetches refused, or displaced before they began: no buffer was free
    deferred: int  # demands that found no buffer, left for the commit to read
    cancelled: int  # queued prefetches cancelled
    recycled: int  # landed records thrown away for a newer read
    coalesced: int  # records read together with a neighbour in the file
    errors: int  # records that could not be delivered
    busy_us: int  # time with at least one read under way; per record: busy_us / landed
    stall_us: int  # time that commits waited
    host_us: int  # time between `host_begin` and `host_end`, where experts were computed
    host_experts: int  # of them
    direct: int  # 1 = the file is read around the page cache


class _Stats(ctypes.Structure):
    _fields_ = [(field.name, ctypes.c_int64) for field in dataclasses.fields(StoreStats)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Events:
    """What a store moved and the host computed, in the order in which it was complete.

    Times are microseconds of `clock_us`. Experts that the host computed together have those of
    all of them: the beginning of the first and the end of the last.
    """

    expert: np.ndarray  # [R] i32, id, -1 = unknown
    requested_us: np.ndarray  # [R] f64
    begun_us: np.ndarray  # [R] f64, when the link or the host began
    landed_us: np.ndarray  # [R] f64, when it was complete; a paced link knows it ahead
    kind: np.ndarray  # [R] u8, `transport.Kind` of a record when it was begun, or HOST
    dropped: int  # earlier events that the log had no room for

    def columns(self) -> dict[str, np.ndarray]:
        """The arrays by name."""
        found = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in found.items() if name != "dropped"}


HOST = 2  # kind of an event: an expert computed on the host
EVENT = np.dtype(
    [(n, "i8") for n in ("requested", "begun", "landed")] + [("expert", "i4")] + [("kind", "i4")]
)


class Store:
    """Records behind a link, until it is closed; not while a program that uses it runs."""

    def __init__(self, opened: Callable[[ctypes.CDLL], int], records: int, record_bytes: int):
        native = native_library()
        self.records = records
        self.record_bytes = record_bytes
        self.handle = opened(native)
        if not self.handle:
            raise MoejaxError(f"cannot open the store: {_last_error(native, 0)}")
        # Also at exit: a reader thread must not outlive the interpreter.
        self._finalizer = weakref.finalize(self, native.moejax_store_close, self.handle)

    @classmethod
    def open_disk(
        cls,
        path: str | os.PathLike,
        *,
        data_offset: int,
        record_bytes: int,
        records: int,
        threads: int = 4,
        direct: bool = True,
        buffers: int = 16,
        checksums: np.ndarray | None = None,
    ) -> Self:
        """A file of `records` records from byte `data_offset` on.

        Args:
            threads: reads at the same time.
            direct: read around the page cache if the file system and the alignment allow it.
            buffers: records that may have been read or queued ahead of their commit.
            checksums: [records] u32, CRC-32 of each record, compared after every read.

        Raises:
            MoejaxError: the file cannot be opened.
        """
        _counts(record_bytes=record_bytes, records=records, threads=threads, buffers=buffers)
        if data_offset < 0 or threads > MAX_THREADS:
            raise ValueError(f"bad data_offset {data_offset} or threads {threads}")
        if checksums is not None:
            checksums = np.ascontiguousarray(checksums, np.uint32)
            if checksums.shape != (records,):
                raise ValueError(f"checksums must be [{records}], got {checksums.shape}")
        address = None if checksums is None else checksums.ctypes.data
        arguments = (data_offset, record_bytes, records, threads, direct, buffers, address)
        return cls(
            lambda native: native.moejax_store_open_disk(os.fsencode(path), *arguments),
            records,
            record_bytes,
        )

    @classmethod
    def open_paced(
        cls,
        records: np.ndarray,
        *,
        gigabytes_per_second: float,
        latency_us: float = 0.0,
        host_us: float = 0.0,
        buffers: int | None = None,
        jitter_us: float = 0.0,
        seed: int = 0,
    ) -> Self:
        """Records [L * E, R] in memory, as if over a serial link of a rate and latency.

        A record is complete latency + bytes / rate after the link is free and it was asked for.

        Args:
            host_us: the least time of one expert between `host_begin` and `host_end`.
            buffers: as in `open_disk`; all by default.
            jitter_us: every record takes longer by a pseudo-random time below this.
            seed: of these times, which follow one another in the order of the transfers.
        """
        if records.ndim != 2 or not records.flags.c_contiguous or not records.size:
            raise ValueError(f"records must be contiguous [L * E, R], got {records.shape}")
        if not gigabytes_per_second > 0 or not 0 <= latency_us < float("inf"):
            raise ValueError(f"bad rate {gigabytes_per_second} GB/s or latency {latency_us} us")
        if not 0 <= host_us < float("inf") or not 0 <= jitter_us < float("inf"):
            raise ValueError(f"bad time on the host {host_us} us or jitter {jitter_us} us")
        if not 0 <= seed < 2**64:
            raise ValueError(f"seed must fit a u64, got {seed}")
        count, record_bytes = len(records), records.nbytes // len(records)
        buffers = count if buffers is None else buffers
        _counts(buffers=buffers)
        address = records.ctypes.data
        link = (gigabytes_per_second, latency_us, host_us, jitter_us, seed)
        arguments = (record_bytes, count, buffers, *link)
        store = cls(
            lambda native: native.moejax_store_open_paced(address, *arguments), count, record_bytes
        )
        store._source = records  # read for as long as the store is open
        return store

    def close(self) -> None:
        """Stop the readers and forget what has landed; again is harmless."""
        self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def stats(self, *, reset: bool = False) -> StoreStats:
        """What happened so far; with `reset`, counting starts anew."""
        stats = self._counts(reset)
        return StoreStats(**{name: getattr(stats, name) for name, _ in _Stats._fields_})

    def moved(self) -> int:
        """Bytes moved so far, as in `stats`, in less time: steps ask for it."""
        return self._counts(False).bytes

    def _counts(self, reset: bool) -> _Stats:
        stats = _Stats()
        if not native_library().moejax_store_stats(self.handle, reset, ctypes.byref(stats)):
            raise ValueError("the store is closed")
        return stats

    def log(self, capacity: int) -> None:
        """Log what is moved and computed from now on, the last `capacity` of it; 0 = no longer.

        It takes 32 bytes for each and forgets what it had logged before.

        Raises:
            MoejaxError: there is not so much memory.
        """
        if not 0 <= capacity < 2**31:
            raise ValueError(f"the capacity must fit an i32 and not be negative, got {capacity}")
        done = native_library().moejax_store_log(self.handle, capacity)
        if done == 0:
            raise ValueError("the store is closed")
        if done < 0:
            raise MoejaxError(f"no memory for a log of {capacity} events: give less")

    def events(self, *, reset: bool = False) -> Events:
        """What was logged; with `reset`, the log is empty after it and goes on."""
        native, dropped = native_library(), ctypes.c_int64()
        size = native.moejax_store_event_count(self.handle)
        found = np.empty(max(size, 0), EVENT)
        arguments = (found.ctypes.data, size, reset, ctypes.byref(dropped))
        size = native.moejax_store_events(self.handle, *arguments)
        if size < 0:
            raise ValueError("the store is closed")
        found = found[:size]
        found = found[np.argsort(found["landed"], kind="stable")]
        times = {f"{name}_us": found[name] / 1e3 for name in ("requested", "begun", "landed")}
        return Events(
            expert=found["expert"].copy(),
            kind=found["kind"].astype(np.uint8),
            dropped=dropped.value,
            **times,
        )

    def last_error(self) -> str:
        """Message of the last record that could not be delivered, or ''."""
        return _last_error(native_library(), self.handle) if self._finalizer.alive else ""


def _counts(**counts: int) -> None:
    for name, count in counts.items():
        if not 0 < count < 2**31:
            raise ValueError(f"{name} must be positive and fit an i32, got {count}")


@functools.cache
def native_library() -> ctypes.CDLL:
    """The native library; MoejaxError where there is none."""
    native = build.library()
    if native is None:
        raise MoejaxError(build.status())
    i32, i64, f64 = ctypes.c_int32, ctypes.c_int64, ctypes.c_double
    text, address = ctypes.c_char_p, ctypes.c_void_p
    native.moejax_store_open_disk.argtypes = [text, i64, i64, i32, i32, i32, i32, address]
    paced = [f64, f64, f64, f64, ctypes.c_uint64]
    native.moejax_store_open_paced.argtypes = [address, i64, i32, i32, *paced]
    native.moejax_store_close.argtypes = [i32]
    native.moejax_store_close.restype = None
    native.moejax_store_stats.argtypes = [i32, i32, address]
    native.moejax_store_log.argtypes = [i32, i64]
    native.moejax_store_event_count.argtypes = [i32]
    native.moejax_store_event_count.restype = i64
    native.moejax_store_events.argtypes = [i32, address, i64, i32, address]
    native.moejax_store_events.restype = i64
    native.moejax_clock_us.argtypes = []
    native.moejax_clock_us.restype = f64
    native.moejax_store_last_error.argtypes = [i32, text, i64]
    native.moejax_store_last_error.restype = None
    return native


def clock_us() -> float:
    """Now, in microseconds of the clock of the events: monotonic, of any origin."""
    return native_library().moejax_clock_us()


def _last_error(native: ctypes.CDLL, handle: int) -> str:
    text = ctypes.create_string_buffer(MESSAGE_BYTES)
    native.moejax_store_last_error(handle, text, MESSAGE_BYTES)
    return text.value.decode(errors="replace")
