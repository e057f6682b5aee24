"""The transport: what has landed."""

import contextlib
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_speculate import needs_native

from moejax.kernels import transport
from moejax.kernels.transport import Kind, Store
from moejax.layout import aligned_empty


def records_of(count=12, elements=2048):
    records = aligned_empty((count, elements), np.uint16)
    records[:] = np.arange(count)[:, None]
    return records


@contextlib.contextmanager
def open_store(kind, tmp_path, **options):
    records = records_of()
    if kind == "paced":
        options.pop("checksums", None)
        opened = Store.open_paced(records, **{"gigabytes_per_second": 1.0} | options)
    else:
        (tmp_path / "bank").write_bytes(records.tobytes())
        arguments = {"data_offset": 0, "record_bytes": records[0].nbytes, "records": len(records)}
        opened = Store.open_disk(tmp_path / "bank", **arguments, **options)
    with opened:
        yield opened


NOW = jnp.zeros(1)


def landed(store, ids):
    return np.asarray(LANDED(store.handle, jnp.asarray(ids, jnp.int32))).tolist()


LANDED = jax.jit(lambda handle, ids: transport.landed(handle, ids, NOW))


def ask(store, ids, kind=Kind.PREFETCH):
    padded = np.full(4, -1, np.int32)
    padded[: len(ids)] = ids
    padded = jnp.asarray(padded)
    jax.block_until_ready(transport.request(store.handle, padded, len(ids), kind, NOW))


def wait_for(store, count):
    while store.stats().landed < count:
        time.sleep(0.001)


@needs_native
@pytest.mark.parametrize("kind", ["paced", "disk"])
def test_landed_is_what_a_commit_would_not_wait_for(kind, tmp_path):
    with open_store(kind, tmp_path) as store:
        assert landed(store, [0, 5, 9, -1]) == [False] * 4
        assert store.stats().requested == 0  # asking is not requesting
        ask(store, [5, 9])
        wait_for(store, 2)
        assert landed(store, [0, 5, 9, -1, 5]) == [False, True, True, False, True]
        pool = jnp.zeros((3, 2048), jnp.uint16)
        slots, ids = jnp.array([1], jnp.int32), jnp.array([5], jnp.int32)
        pool, status = transport.commit(store.handle, pool, slots, ids, 1, NOW)
        assert status[:2].tolist() == [0, 1] and int(pool[1, 0]) == 5
        assert landed(store, [5, 9]) == [False, True]  # its buffer is free again
        ask(store, [5], Kind.DEMAND)
        wait_for(store, 3)
        assert landed(store, [5, 9]) == [True, True]
    assert landed(store, [5, 9]) == [False, False]  # closed


@needs_native
@pytest.mark.parametrize("kind", ["paced", "disk"])
def test_ids_that_there_are_not_have_not_landed(kind, tmp_path):
    least, most = np.iinfo(np.int32).min, np.iinfo(np.int32).max
    with open_store(kind, tmp_path) as store:
        ask(store, [0, 11])
        wait_for(store, 2)
        assert landed(store, [-1, -2, 12, 13, least, most, 0, 11]) == [False] * 6 + [True] * 2
        assert landed(store, []) == []
    for handle in (0, -1, store.handle + 1):
        there = LANDED(handle, jnp.array([0], jnp.int32))
        assert there.dtype == bool and not there.any()


@needs_native
def test_what_is_on_its_way_has_not_landed(tmp_path):
    with open_store("paced", tmp_path, latency_us=6e7) as store:
        ask(store, [1, 2], Kind.DEMAND)
        begun = time.perf_counter()
        assert landed(store, [1, 2, 3]) == [False] * 3
        assert time.perf_counter() - begun < 5  # and nobody waited for it
    with open_store("paced", tmp_path, latency_us=50_000.0) as store:
        assert landed(store, [1, 2]) == [False, False]  # compiled
        ask(store, [1, 2])
        seen = []
        while not all(landed(store, [1, 2])):
            seen.append(landed(store, [1, 2]))
        assert [False, False] in seen  # a link is serial
        assert [False, True] not in seen


@needs_native
def test_a_cancelled_or_dropped_record_has_not_landed(tmp_path):
    with open_store("paced", tmp_path, latency_us=200_000.0, buffers=3) as store:
        keep = jnp.arange(12) > 1
        jax.block_until_ready(transport.cancel(store.handle, keep, NOW))  # compiled
        ask(store, [])
        ask(store, [0])
        ask(store, [1, 2, 3])  # no buffer for 3
        jax.block_until_ready(transport.cancel(store.handle, keep, NOW))
        wait_for(store, 2)
        time.sleep(0.3)
        # 0 had begun, and serves a commit until its buffer is needed
        assert landed(store, [0, 1, 2, 3]) == [True, False, True, False]


@needs_native
@pytest.mark.parametrize("kind", ["paced", "disk"])
def test_a_record_whose_slot_is_lost_has_not_landed(kind, tmp_path):
    with open_store(kind, tmp_path) as store:
        ask(store, [4, 5, 6])
        wait_for(store, 3)
        slot_of = jnp.full(12, -1, jnp.int32).at[5].set(0)
        jax.block_until_ready(transport.drop(store.handle, slot_of, NOW))
        assert landed(store, [4, 5, 6]) == [False, True, False]
        ask(store, [4])  # read anew
        wait_for(store, 4)
        assert landed(store, [4, 5, 6]) == [True, True, False]


@needs_native
def test_a_record_that_failed_has_not_landed(tmp_path):
    checksums = np.zeros(12, np.uint32)
    with open_store("disk", tmp_path, checksums=checksums) as store:
        ask(store, [3])
        time.sleep(0.1)
        assert landed(store, [3]) == [False]


def test_landed_takes_i32_vectors_only():
    for wrong in (jnp.zeros(2), jnp.zeros((1, 2), jnp.int32)):
        with pytest.raises(ValueError, match="experts must be a vector of int32"):
            transport.landed(jnp.int32(1), wrong, NOW)
