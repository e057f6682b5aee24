"""Where experts go and how they get there, in native code: slot tables, copies, stores on a link.

A store is a bank file that threads read, or records in memory behind a link of a stated rate. A
step asks for records ahead with `request` and moves them into slots with `commit`. The order of
these calls is that of their data: every one takes `after`, any array that must exist before.
"""

import ctypes
import dataclasses
import enum
import functools
import os
import weakref
from collections.abc import Callable
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np

from moejax.errors import MoejaxError
from moejax.kernels import build

MAX_THREADS = 256
MESSAGE_BYTES = 4096


class Kind(enum.IntEnum):
    """How urgent a request is: every demand is read before any prefetch."""

    DEMAND = 0
    PREFETCH = 1


class Status(enum.IntEnum):
    """What a commit answers; after all but OK, the slots concerned hold zeros."""

    OK = 0
    READ_FAILED = 1
    SHORT_READ = 2
    BAD_CHECKSUM = 3
    BAD_REQUEST = 4  # an expert, slot or record size that the store does not have
    NO_STORE = 5


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
    busy_us: int  # time with at least one read under way
    stall_us: int  # time that commits waited
    direct: int  # 1 = the file is read around the page cache


class _Stats(ctypes.Structure):
    _fields_ = [(field.name, ctypes.c_int64) for field in dataclasses.fields(StoreStats)]


class Store:
    """Records behind a link, until it is closed; not while a program that uses it runs."""

    def __init__(self, opened: Callable[[ctypes.CDLL], int], records: int, record_bytes: int):
        native = _native()
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
        buffers: int | None = None,
    ) -> Self:
        """Records [L * E, R] in memory, as if over a serial link of a rate and latency.

        A record is complete latency + bytes / rate after the link is free and it was asked for.
        `buffers` as in `open_disk`; all by default.
        """
        if records.ndim != 2 or not records.flags.c_contiguous or not records.size:
            raise ValueError(f"records must be contiguous [L * E, R], got {records.shape}")
        if not gigabytes_per_second > 0 or not 0 <= latency_us < float("inf"):
            raise ValueError(f"bad rate {gigabytes_per_second} GB/s or latency {latency_us} us")
        count, record_bytes = len(records), records.nbytes // len(records)
        buffers = count if buffers is None else buffers
        _counts(buffers=buffers)
        address = records.ctypes.data
        arguments = (record_bytes, count, buffers, gigabytes_per_second, latency_us)
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
        stats = _Stats()
        if not _native().moejax_store_stats(self.handle, reset, ctypes.byref(stats)):
            raise ValueError("the store is closed")
        return StoreStats(**{name: getattr(stats, name) for name, _ in _Stats._fields_})

    def last_error(self) -> str:
        """Message of the last record that could not be delivered, or ''."""
        return _last_error(_native(), self.handle) if self._finalizer.alive else ""


def plan_fetch(
    slot_of: jax.Array,
    owner: jax.Array,
    home: jax.Array,
    keys: jax.Array,
    pending: jax.Array,
    order: jax.Array,
    layer: jax.Array,
    capacity: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]:
    """Give slots to as many absent experts of a layer as can be had, as `residency.bring` does.

    Args:
        slot_of, owner, home: the tables of a Residency.
        keys: [L * E] i32 or f32, the smallest among the evictable slots leaves first.
        pending: [E] bool, experts that are needed; those resident stay.
        order: [E] i32, a permutation: who comes first if slots are few.
        layer: [] i32.
        capacity: [] i32 slots in use.

    Returns:
        slot_of, owner, slots [E] i32, experts [E] i32 (ids, -1 beyond count), count [] i32.
    """
    for name, array in (("slot_of", slot_of), ("owner", owner), ("home", home), ("order", order)):
        _vector(name, array, jnp.int32)
    _vector("pending", pending, jnp.bool_)
    if keys.dtype not in (jnp.int32, jnp.float32) or keys.shape != slot_of.shape:
        raise ValueError(f"keys must be i32 or f32 {slot_of.shape}, got {keys.dtype} {keys.shape}")
    if home.shape != owner.shape or order.shape != pending.shape:
        raise ValueError(
            f"owner {owner.shape} and home {home.shape} must have one shape, and so must "
            f"pending {pending.shape} and order {order.shape}"
        )
    ints = jax.ShapeDtypeStruct(pending.shape, jnp.int32)
    scalar = jax.ShapeDtypeStruct((), jnp.int32)
    call = _call("moejax_plan_fetch", (slot_of, owner, ints, ints, scalar), {0: 0, 1: 1})
    return call(
        slot_of,
        owner,
        home,
        keys,
        pending,
        order,
        _scalar("layer", layer),
        _scalar("capacity", capacity),
    )


def copy_records(
    pool: jax.Array,
    store: jax.Array,
    slots: jax.Array,
    experts: jax.Array,
    count: jax.Array,
    after: jax.Array,
) -> jax.Array:
    """pool [S, R] with records of store [L * E, R] in slots, in place if the pool is donated.

    slots, experts [M] i32, the first `count` [] i32 of them; pairs that do not exist are skipped.
    """
    _pool(pool)
    if store.ndim != 2 or store.dtype != pool.dtype or store.shape[1] != pool.shape[1]:
        raise ValueError(
            f"store must be {pool.dtype} [L * E, {pool.shape[1]}], got {store.dtype} {store.shape}"
        )
    _pairs(slots, experts)
    call = _call("moejax_copy_records", pool, {0: 0})
    return call(pool, store, slots, experts, _scalar("count", count), after)


def request(
    handle: jax.Array,
    experts: jax.Array,
    count: jax.Array,
    kind: jax.Array | Kind,
    after: jax.Array,
) -> jax.Array:
    """Ask for records ahead; returns at once with a token [1] i32, a Status, to be passed on.

    experts [M] i32 (-1 = none), the first `count` [] i32 of them. One that has landed or is under
    way is not read again. Without a free buffer, stale records go first; then a prefetch is
    dropped and a demand displaces prefetches, queued ones before landed ones.
    """
    _vector("experts", experts, jnp.int32)
    call = _call("moejax_request", jax.ShapeDtypeStruct((1,), jnp.int32), effect=True)
    return call(
        _scalar("handle", handle),
        experts,
        _scalar("count", count),
        _scalar("kind", kind),
        after,
    )


def cancel(handle: jax.Array, keep: jax.Array, after: jax.Array) -> jax.Array:
    """Forget what is not worth keeping [L * E] bool; returns a token [1] i32, a Status.

    Queued prefetches are dropped. What is under way or has landed stays until its buffer is
    needed for anything newer, and serves a commit until then.
    """
    _vector("keep", keep, jnp.bool_)
    call = _call("moejax_cancel", jax.ShapeDtypeStruct((1,), jnp.int32), effect=True)
    return call(_scalar("handle", handle), keep, after)


def commit(
    handle: jax.Array,
    pool: jax.Array,
    slots: jax.Array,
    experts: jax.Array,
    count: jax.Array,
    after: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Fill slots with records, those requested before and others alike; waits for them.

    What has not begun to be read by now is read straight into its slot, unless the file is read
    directly and the slot does not lie at a multiple of 512 bytes or what its disk asks for.
    pool [S, R] bits, changed in place if it is donated; slots, experts [M] i32, the first `count`
    [] i32 of them.

    Returns:
        pool, and status [4] i32: a Status, records delivered, microseconds of waiting, and how
        many of the records had been begun as a prefetch. A slot whose record cannot be delivered
        holds zeros; `Store.last_error` says why.
    """
    _pool(pool)
    _pairs(slots, experts)
    status = jax.ShapeDtypeStruct((4,), jnp.int32)
    call = _call("moejax_commit", (pool, status), {1: 0}, effect=True)
    return call(_scalar("handle", handle), pool, slots, experts, _scalar("count", count), after)


def _counts(**counts: int) -> None:
    for name, count in counts.items():
        if not 0 < count < 2**31:
            raise ValueError(f"{name} must be positive and fit an i32, got {count}")


@functools.cache
def _native() -> ctypes.CDLL:
    native = build.library()
    if native is None:
        raise MoejaxError(build.status())
    i32, i64, f64 = ctypes.c_int32, ctypes.c_int64, ctypes.c_double
    text, address = ctypes.c_char_p, ctypes.c_void_p
    native.moejax_store_open_disk.argtypes = [text, i64, i64, i32, i32, i32, i32, address]
    native.moejax_store_open_paced.argtypes = [address, i64, i32, i32, f64, f64]
    native.moejax_store_close.argtypes = [i32]
    native.moejax_store_close.restype = None
    native.moejax_store_stats.argtypes = [i32, i32, address]
    native.moejax_store_last_error.argtypes = [i32, text, i64]
    native.moejax_store_last_error.restype = None
    return native


def _last_error(native: ctypes.CDLL, handle: int) -> str:
    text = ctypes.create_string_buffer(MESSAGE_BYTES)
    native.moejax_store_last_error(handle, text, MESSAGE_BYTES)
    return text.value.decode(errors="replace")


def _call(name: str, out: object, aliases: dict[int, int] | None = None, effect: bool = False):
    _native()
    out = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), out)
    return jax.ffi.ffi_call(name, out, has_side_effect=effect, input_output_aliases=aliases)


def _scalar(name: str, value: jax.Array) -> jax.Array:
    if jnp.shape(value) != () or not jnp.issubdtype(jnp.result_type(value), jnp.integer):
        raise ValueError(f"{name} must be an integer scalar, got {value!r}")
    return jnp.asarray(value, jnp.int32)


def _vector(name: str, array: jax.Array, dtype: object) -> None:
    if array.ndim != 1 or array.dtype != dtype:
        expected = jnp.dtype(dtype).name
        raise ValueError(f"{name} must be a vector of {expected}, got {array.dtype} {array.shape}")


def _pairs(slots: jax.Array, experts: jax.Array) -> None:
    _vector("slots", slots, jnp.int32)
    _vector("experts", experts, jnp.int32)
    if slots.shape != experts.shape:
        raise ValueError(f"slots {slots.shape} and experts {experts.shape} differ in shape")


def _pool(pool: jax.Array) -> None:
    if pool.ndim != 2 or not pool.size:
        raise ValueError(f"the pool must be [S, R] with elements, got {pool.shape}")
