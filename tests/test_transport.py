"""The native transport: slot planning, copies, and stores on a disk or behind a paced link."""

import contextlib
import functools
import subprocess
import sys
import threading
import time
import zlib

import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moejax.errors import MoejaxError
from moejax.kernels import build, transport
from moejax.kernels.transport import Kind, Status, Store
from moejax.layout import aligned_empty
from moejax.policies import residency as tables
from moejax.state import Residency

if build.library() is None:
    pytest.skip(build.status(), allow_module_level=True)

NOW = jnp.zeros(1, jnp.float32)
ids = functools.partial(jnp.asarray, dtype=jnp.int32)


def make_records(count=40, elements=2048, dtype=np.uint16, seed=0):
    """Random records [count, elements], aligned as in a bank."""
    records = aligned_empty((count, elements), dtype)
    rng = np.random.default_rng(seed)
    records[:] = rng.integers(1, np.iinfo(dtype).max, records.shape, dtype=dtype)
    return records


def write(path, records, offset=4096):
    """The arguments that open the records, written after `offset` other bytes."""
    path.write_bytes(b"x" * offset + records.tobytes())
    return {"data_offset": offset, "record_bytes": records[0].nbytes, "records": len(records)}


@pytest.fixture(params=["direct", "buffered", "paced"])
def opened(request, tmp_path):
    """Records and a function that opens them as each kind of store."""
    records = make_records()

    def open_store(**options):
        if request.param == "paced":
            options.pop("threads", None)
            return Store.open_paced(records, gigabytes_per_second=2.0, latency_us=20, **options)
        arguments = write(tmp_path / "bank", records)
        direct = request.param == "direct"
        return Store.open_disk(tmp_path / "bank", direct=direct, **arguments, **options)

    return records, open_store


def fresh_pool(slots=8, like=None):
    """A pool full of stale bits."""
    like = make_records(1) if like is None else like
    return jnp.full((slots, like.shape[1]), 7, like.dtype)


def padded(values):
    """[8] i32, so that all calls share one compilation."""
    return ids(np.pad(np.asarray(values, np.int32), (0, 8 - len(values)), constant_values=-1))


def ask(store, experts, kind=Kind.DEMAND):
    """Request experts and wait for the call, not for the records."""
    token = transport.request(store.handle, padded(experts), len(experts), kind, NOW)
    assert token.tolist() == [Status.OK]


def move(store, pool, slots, experts, count=None):
    """Commit; the pool and the status as NumPy arrays."""
    count = len(slots) if count is None else count
    pool, status = transport.commit(store.handle, pool, padded(slots), padded(experts), count, NOW)
    return np.asarray(pool), np.asarray(status)


def expected_pool(records, slots, experts, size=8):
    """What a pool holds after one commit."""
    pool = np.full((size, records.shape[1]), 7, records.dtype)
    for slot, expert in zip(slots, experts, strict=True):
        pool[slot] = records[expert]
    return pool


@st.composite
def plans(draw):
    """Consistent tables, with keys, needs and a layer."""
    # Few shapes: every one is compiled.
    layers, experts, slots = draw(st.sampled_from([(1, 1, 1), (3, 7, 9), (4, 8, 24)]))
    per_layer = draw(st.booleans())
    home = np.arange(slots) % layers if per_layer else np.full(slots, -1)
    slot_of, owner = np.full(layers * experts, -1), np.full(slots, -1)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    filled = rng.random(slots) < draw(st.sampled_from([0.0, 0.5, 1.0]))
    for slot in np.flatnonzero(filled):
        free = np.flatnonzero(slot_of < 0)
        free = free[(free // experts == home[slot]) | (home[slot] < 0)]
        if len(free):
            owner[slot] = rng.choice(free)
            slot_of[owner[slot]] = slot
    if draw(st.booleans()):
        keys = draw(hnp.arrays(np.int32, layers * experts, elements=st.integers(-3, 3)))
    else:
        special = st.sampled_from([np.nan, np.inf, -np.inf, 0.0, -0.0, 1.0, 2.0])
        keys = draw(hnp.arrays(np.float32, layers * experts, elements=special))
    pending = draw(hnp.arrays(np.bool_, experts))
    layer, capacity = draw(st.integers(0, layers - 1)), draw(st.integers(0, slots))
    residency = Residency(slot_of=ids(slot_of), owner=ids(owner), home=ids(home))
    return (
        residency,
        jnp.asarray(keys),
        jnp.asarray(pending),
        rng.permutation(experts),
        layer,
        (capacity),
    )


RULE = jax.jit(tables.bring)
PLAN = jax.jit(transport.plan_fetch)


@given(plans())
def test_plan_equals_the_rule(plan):
    residency, keys, pending, order, layer, capacity = plan
    after, copies = RULE(residency, keys, ids(layer), pending, ids(order), ids(capacity))
    slot_of, owner, slots, experts, count = PLAN(
        residency.slot_of,
        residency.owner,
        residency.home,
        keys,
        pending,
        ids(order),
        ids(layer),
        ids(capacity),
    )
    n = int(count)
    assert n == copies.count
    np.testing.assert_array_equal(slot_of, after.slot_of)
    np.testing.assert_array_equal(owner, after.owner)
    np.testing.assert_array_equal(slots[:n], copies.slot[:n])
    np.testing.assert_array_equal(experts[:n], copies.expert[:n])
    assert (slots[n:] == -1).all() and (experts[n:] == -1).all()


@pytest.mark.parametrize(("dtype", "elements"), [(np.uint8, 4099), (np.uint16, 300_000)])
def test_copy_records(dtype, elements):
    records = make_records(6, elements, dtype)
    pool = fresh_pool(4, records)
    pairs = [(3, 5), (0, 2), (9, 1), (1, 6), (-1, 0), (2, -1), (0, 4), (1, 1)]
    slots, experts = zip(*pairs, strict=True)
    got = transport.copy_records(pool, jnp.asarray(records), ids(slots), ids(experts), 7, NOW)
    np.testing.assert_array_equal(got, expected_pool(records, [3, 0], [5, 4], 4))


def test_reads_anything_in_any_order(opened):
    records, open_store = opened
    rng = np.random.default_rng(1)
    with open_store(threads=3, buffers=4) as store:
        pool = expected = np.asarray(fresh_pool())
        for step in range(40):
            slots = rng.permutation(8)[: rng.integers(1, 9)]
            experts = rng.integers(0, len(records), len(slots))  # repeats included
            if step % 2:
                ask(store, rng.permutation(experts)[:5], Kind(step % 4 // 2))
            if step % 5 == 0:
                ask(store, rng.integers(0, len(records), 6), Kind.PREFETCH)
            if step % 7 == 0:
                keep = jnp.asarray(rng.random(len(records)) < 0.5)
                assert transport.cancel(store.handle, keep, NOW) == Status.OK
            pool, status = move(store, jnp.asarray(pool), slots, experts)
            expected = expected.copy()
            expected[slots] = records[experts]
            np.testing.assert_array_equal(pool, expected)
            assert status[:2].tolist() == [Status.OK, len(slots)]
        assert store.stats().errors == 0


def test_prefetched_records_are_hits(opened):
    records, open_store = opened
    with open_store(buffers=4) as store:
        ask(store, [9, 30, -1], Kind.PREFETCH)
        while store.stats().landed < 2:
            pass
        pool, status = move(store, fresh_pool(), [0, 1, 2], [9, 30, 12])
        np.testing.assert_array_equal(pool, expected_pool(records, [0, 1, 2], [9, 30, 12]))
        assert status[[0, 1, 3]].tolist() == [Status.OK, 3, 2]
        stats = store.stats(reset=True)
        assert (stats.requested, stats.landed, stats.committed, stats.prefetched) == (3, 3, 3, 2)
        assert stats.bytes == 3 * store.record_bytes
        assert store.stats().landed == 0
        ask(store, [9])  # its buffer was freed by the commit, so this is a new read
        assert store.stats().requested == 1


def test_prefetch_is_dropped_without_buffers_and_demand_displaces_it(opened):
    records, open_store = opened
    with open_store(buffers=2) as store:
        ask(store, [1, 2, 3], Kind.PREFETCH)
        assert store.stats().dropped == 1
        while store.stats().landed < 2:
            pass
        move(store, fresh_pool(), [0], [3])  # lets a paced link notice what has arrived
        ask(store, [4, 5, 6])
        stats = store.stats()
        assert (stats.recycled, stats.deferred) == (2, 1)
        pool, status = move(store, fresh_pool(), [5, 6, 7], [4, 5, 6])
        np.testing.assert_array_equal(pool, expected_pool(records, [5, 6, 7], [4, 5, 6]))
        assert status[[0, 3]].tolist() == [Status.OK, 0]


def test_cancel_drops_what_has_not_begun():
    records = make_records()
    with Store.open_paced(records, gigabytes_per_second=1.0, latency_us=6e7) as slow:
        ask(slow, [0, 1, 2, 3], Kind.PREFETCH)
        keep = jnp.zeros(len(records), bool).at[2].set(True)
        assert transport.cancel(slow.handle, keep, NOW) == Status.OK
        assert slow.stats().cancelled == 2  # 0 is on its way, 2 is kept
        ask(slow, [1, 2, 3], Kind.PREFETCH)
        assert slow.stats().requested == 6
        assert transport.cancel(slow.handle, keep[1:], NOW) == Status.BAD_REQUEST


def test_stale_records_make_room_for_prefetches(opened):
    records, open_store = opened
    with open_store(buffers=2) as store:
        ask(store, [1, 2], Kind.PREFETCH)
        while store.stats().landed < 2:
            pass
        move(store, fresh_pool(), [0], [3])
        transport.cancel(store.handle, jnp.zeros(len(records), bool).at[2].set(True), NOW)
        ask(store, [7, 8], Kind.PREFETCH)
        stats = store.stats()
        assert (stats.recycled, stats.dropped) == (1, 1)
        _, status = move(store, fresh_pool(), [0, 1], [2, 1])
        assert status[[0, 3]].tolist() == [Status.OK, 1]


def test_neighbours_are_read_together(tmp_path):
    records = make_records()
    arguments = write(tmp_path / "bank", records)
    with Store.open_disk(tmp_path / "bank", threads=1, **arguments) as store:
        experts = [7, 20, 6, 8, 21, 39, 0]
        pool, _ = move(store, fresh_pool(), range(7), experts)
        np.testing.assert_array_equal(pool, expected_pool(records, range(7), experts))
        assert store.stats().coalesced == 3


def test_records_and_offsets_that_direct_reads_cannot_have(tmp_path):
    records = make_records(10, 333, np.uint8)
    arguments = write(tmp_path / "bank", records, offset=17)
    with Store.open_disk(tmp_path / "bank", **arguments) as store:
        pool, status = move(store, fresh_pool(8, records), [3, 1, 2], [0, 9, 8])
        np.testing.assert_array_equal(pool, expected_pool(records, [3, 1, 2], [0, 9, 8]))
        assert status[0] == Status.OK and store.stats().direct == 0


@pytest.mark.parametrize("ahead", [False, True])
def test_a_truncated_file_gives_zeros(tmp_path, ahead):
    records = make_records()
    arguments = write(tmp_path / "bank", records)
    whole = (tmp_path / "bank").read_bytes()
    (tmp_path / "bank").write_bytes(whole[: 4096 + 30 * 4096 + 1000])
    with Store.open_disk(tmp_path / "bank", **arguments) as store:
        if ahead:
            ask(store, [29, 30, 31])
        pool, status = move(store, fresh_pool(), [0, 1, 2], [29, 30, 31])
        assert status[:2].tolist() == [Status.SHORT_READ, 1]
        expected = expected_pool(records, [0], [29])
        expected[1:3] = 0
        np.testing.assert_array_equal(pool, expected)
        assert "expert 3" in store.last_error() and "ends before" in store.last_error()
        assert store.stats().errors == 2
        (tmp_path / "bank").write_bytes(whole)
        pool, status = move(store, fresh_pool(), [1], [30])  # a failure is not remembered
        np.testing.assert_array_equal(pool, expected_pool(records, [1], [30]))


@pytest.mark.parametrize("ahead", [False, True])
def test_damage_is_noticed(tmp_path, ahead):
    records = make_records()
    arguments = write(tmp_path / "bank", records)
    checksums = np.array([zlib.crc32(record) for record in records], np.uint32)
    damaged = bytearray((tmp_path / "bank").read_bytes())
    damaged[4096 + 5 * 4096 + 77] ^= 1
    (tmp_path / "bank").write_bytes(damaged)
    with Store.open_disk(tmp_path / "bank", checksums=checksums, **arguments) as store:
        if ahead:
            ask(store, [4, 5, 6], Kind.PREFETCH)
        pool, status = move(store, fresh_pool(), [0, 1, 2], [4, 5, 6])
        assert status[:2].tolist() == [Status.BAD_CHECKSUM, 2]
        expected = expected_pool(records, [0, 2], [4, 6])
        expected[1] = 0
        np.testing.assert_array_equal(pool, expected)
        assert "expert 5 is damaged" in store.last_error()


def test_what_does_not_exist_is_a_status(opened):
    records, open_store = opened
    with open_store() as store:
        pool, status = move(store, fresh_pool(), [0, 1, 2, 8], [40, -7, 3, 4])
        assert status[:2].tolist() == [Status.BAD_REQUEST, 1]
        expected = expected_pool(records, [2], [3])
        expected[:2] = 0
        np.testing.assert_array_equal(pool, expected)
        narrow = fresh_pool(8, records[:, 1:])
        pool, status = move(store, narrow, [0], [1])
        assert status[0] == Status.BAD_REQUEST and not pool[0].any()
        pool, status = move(store, fresh_pool(), [5, 5, -1, 3], [1, 2, -1, 9], count=3)
        np.testing.assert_array_equal(pool, expected_pool(records, [5], [2]))
        assert status[0] == Status.OK
    pool, status = move(store, fresh_pool(), [0], [1])
    assert status[0] == Status.NO_STORE and not pool[0].any()
    token = transport.request(store.handle, ids([1]), 1, 0, NOW)
    assert token == transport.cancel(store.handle, jnp.zeros(40, bool), NOW) == Status.NO_STORE
    with pytest.raises(ValueError, match="closed"):
        store.stats()
    store.close()


@given(
    rate=st.sampled_from([0.05, 1.0, 50.0]),
    latency=st.sampled_from([0.0, 3.0, 500.0]),
    jitter=st.sampled_from([0.0, 20.0, 800.0]),
    seed=st.integers(0, 100),
)
def test_bytes_do_not_depend_on_the_link(rate, latency, jitter, seed):
    records = make_records()
    rng = np.random.default_rng(seed)
    link = {"gigabytes_per_second": rate, "latency_us": latency, "jitter_us": jitter, "seed": seed}
    with Store.open_paced(records, buffers=3, **link) as store:
        for _ in range(4):
            slots, experts = rng.permutation(8)[:4], rng.permutation(40)[:4]
            ask(store, rng.permutation(40)[:6], Kind.PREFETCH)
            ask(store, experts[:2])
            pool, status = move(store, fresh_pool(), slots, experts)
            np.testing.assert_array_equal(pool, expected_pool(records, slots, experts))
            assert status[0] == Status.OK


def busy(moves, **link):
    """Microseconds that a paced link counts for the commits of `moves`, and records landed."""
    records = make_records()
    with Store.open_paced(records, **link) as store:
        for experts in moves:
            move(store, fresh_pool(), range(len(experts)), experts)
        stats = store.stats()
        return stats.busy_us, stats.landed


def test_a_paced_link_is_busy_as_long_as_it_moves_records():
    link = {"gigabytes_per_second": 4.096, "latency_us": 20.7}  # 21.7 us for each record
    assert busy([[1, 2, 3], [4], [5, 6, 7, 8, 9, 10]], **link) == (217, 10)
    link["gigabytes_per_second"] = 0.4096
    assert busy([[1, 2, 3], [4]], **link) == (122, 4)


def test_jitter_follows_its_seed():
    link = {"gigabytes_per_second": 4.096, "latency_us": 0.0}
    moves = [range(8)] * 40
    one, other = (busy(moves, jitter_us=50.0, seed=seed, **link)[0] for seed in (1, 2**64 - 1))
    assert one == busy(moves, jitter_us=50.0, seed=1, **link)[0] != other
    # 320 times 1 us and anything below 50 us: 8320 us on average, with a deviation of 258 us.
    assert 7500 < one < 9100 and 7500 < other < 9100


def test_jitter_delays_a_record():
    records = make_records()
    link = {"gigabytes_per_second": 4.096, "jitter_us": 20_000.0}
    with Store.open_paced(records, **link) as store:
        pool, _ = move(store, fresh_pool(), [], [])  # compiled
        start = time.monotonic()
        _, status = move(store, jnp.asarray(pool), range(4), range(4))
        waited = (time.monotonic() - start) * 1e6
        assert store.stats().busy_us > 4 and waited >= store.stats().busy_us
        assert status[0] == Status.OK


def test_a_disk_is_busy_no_longer_than_time_passes(tmp_path):
    records = make_records(8, 2**21)
    arguments = write(tmp_path / "bank", records)
    start = time.monotonic()
    with Store.open_disk(tmp_path / "bank", threads=2, **arguments) as store:
        ask(store, range(8))
        while (stats := store.stats()).landed < 8:
            pass
    assert 0 < stats.busy_us <= (time.monotonic() - start) * 1e6


def host(store, count, after=NOW):
    """Begin and end `count` experts on the host."""
    token = transport.host_begin(store.handle, after)
    assert token.tolist() == [Status.OK]
    token = transport.host_end(store.handle, count, token)
    assert token.tolist() == [Status.OK]


def test_experts_on_the_host_are_counted(opened):
    _, open_store = opened
    with open_store() as store:
        host(store, 3)
        host(store, 2)
        stats = store.stats(reset=True)
        assert stats.host_experts == 5 and stats.host_us >= 0
        assert (store.stats().host_us, store.stats().host_experts) == (0, 0)
        host(store, 0)  # nothing computed, nothing to count
        host(store, -1)
        assert transport.host_end(store.handle, 4, NOW) == Status.OK  # never begun
        assert (store.stats().host_us, store.stats().host_experts) == (0, 0)
        transport.host_begin(store.handle, NOW).block_until_ready()
        host(store, 1)
        assert transport.host_end(store.handle, 1, NOW) == Status.OK  # ended already
        assert store.stats().host_experts == 1
    token = transport.host_begin(store.handle, NOW)
    assert token == transport.host_end(store.handle, 1, token) == Status.NO_STORE


def test_the_host_takes_its_time():
    with Store.open_paced(make_records(), gigabytes_per_second=1.0, host_us=4000) as store:
        host(store, 0)  # compiled
        start = time.monotonic()
        host(store, 5)
        assert time.monotonic() - start >= 0.02
        stats = store.stats(reset=True)
        assert stats.host_us / stats.host_experts >= 4000
        token = transport.host_begin(store.handle, NOW).block_until_ready()
        time.sleep(0.05)
        transport.host_end(store.handle, 1, token).block_until_ready()
        assert store.stats().host_us >= 50_000  # work counts, not only waiting


def test_a_beginning_without_an_end_delays_nothing(opened):
    records, open_store = opened
    with open_store() as store:
        transport.host_begin(store.handle, NOW).block_until_ready()
        ask(store, [3])
        pool, status = move(store, fresh_pool(), [0], [3])
        np.testing.assert_array_equal(pool, expected_pool(records, [0], [3]))
        assert status[0] == Status.OK and store.stats().host_experts == 0


def test_closing_lets_the_host_finish():
    @jax.jit
    def run(handle):
        token = transport.host_begin(handle, NOW)
        token = transport.request(handle, ids([1]), 1, Kind.PREFETCH, token)
        return transport.host_end(handle, 1, token)

    store = Store.open_paced(make_records(), gigabytes_per_second=1.0, host_us=100_000)
    ended = run(-1)  # compiled
    assert ended == Status.NO_STORE
    start = time.monotonic()
    thread = threading.Thread(target=lambda: run(store.handle).block_until_ready())
    thread.start()
    while store.stats().requested == 0:
        pass
    time.sleep(0.01)
    store.close()
    assert time.monotonic() - start >= 0.1
    thread.join()


def test_the_host_works_while_the_link_does():
    """Every call of a step follows the one whose result it takes."""
    slots = ids([0, 1, 2, 3])

    def step(handle, pool, x, rounds):
        def one(carry, experts):
            pool, x = carry
            token = transport.request(handle, experts, 4, Kind.PREFETCH, x)
            token = transport.host_begin(handle, token)
            x = jnp.where(token[0] == Status.OK, x, 0) @ x
            token = transport.host_end(handle, 2, x)
            pool, status = transport.commit(handle, pool, slots, experts, 4, token)
            return (pool, x + status[0]), status

        return jax.lax.scan(one, (pool, x), rounds)

    records = make_records()
    rounds = np.random.default_rng(0).permutation(40).reshape(10, 4)
    swap = jnp.asarray([[0.0, 1.0], [1.0, 0.0]])
    # Records take 8 ms at most and the host 10 ms: they have arrived when it ends.
    link = {"gigabytes_per_second": 4.0, "latency_us": 1000, "jitter_us": 900}
    with Store.open_paced(records, host_us=5000, **link) as store:
        run = jax.jit(step, donate_argnums=1)
        (pool, x), status = run(store.handle, fresh_pool(4), swap, ids(rounds))
        np.testing.assert_array_equal(pool, records[rounds[-1]])
        np.testing.assert_array_equal(x, np.eye(2))
        np.testing.assert_array_equal(status, [[Status.OK, 4, 0, 4]] * 10)
        stats = store.stats()
        assert stats.host_experts == 20 and stats.host_us >= 20 * 5000
        assert stats.stall_us == 0 and stats.prefetched == 40


def decode(store, pool, residency, sequence):
    """Scan over layers: plan, commit, and request the next layer's experts; sums of records."""

    def layer(carry, xs):
        pool, residency, total = carry
        number, wanted, following = xs
        slot_of, owner, slots, experts, count = transport.plan_fetch(
            residency.slot_of,
            residency.owner,
            residency.home,
            residency.slot_of,
            wanted,
            jnp.arange(8, dtype=jnp.int32),
            number,
            residency.owner.shape[0],
        )
        pool, status = transport.commit(store, pool, slots, experts, count, total)
        residency = Residency(slot_of=slot_of, owner=owner, home=residency.home)
        following = jnp.where(following, jnp.arange(8, dtype=jnp.int32) + (number + 1) * 8, -1)
        token = transport.request(store, following, 8, Kind.PREFETCH, status)
        mine = jax.lax.dynamic_slice(slot_of, (number * 8,), (8,))
        first = jnp.where(wanted, pool[mine, 0].astype(jnp.int32), 0).sum()
        return (pool, residency, total + first + token[0]), status

    numbers = jnp.arange(5, dtype=jnp.int32)
    following = jnp.concatenate([sequence[1:], jnp.zeros((1, 8), bool)])
    carry = (pool, residency, jnp.int32(0))
    return jax.lax.scan(layer, carry, (numbers, sequence, following))


def test_inside_a_scan(opened):
    records, open_store = opened
    step = jax.jit(decode, donate_argnums=(1, 2))
    rng = np.random.default_rng(3)
    pool, residency = fresh_pool(12), tables.empty(40, 12)
    with open_store(buffers=6) as store:
        for _ in range(5):
            sequence = rng.random((5, 8)) < 0.3
            (pool, residency, total), status = step(
                store.handle, pool, residency, jnp.asarray(sequence)
            )
            assert total == records[np.flatnonzero(sequence), 0].astype(np.int64).sum()
            assert (status[:, 0] == Status.OK).all()
            held = np.asarray(residency.owner)
            np.testing.assert_array_equal(np.asarray(pool)[held >= 0], records[held[held >= 0]])
        assert store.stats().prefetched > 0


def test_the_pool_is_never_copied():
    def temporary(slots):
        arguments = (
            jnp.int32(1),
            fresh_pool(slots),
            tables.empty(40, slots),
            jnp.ones((5, 8), bool),
        )
        compiled = jax.jit(decode, donate_argnums=(1, 2)).lower(*arguments).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    growth = temporary(520) - temporary(8)
    assert growth < 512 * 64  # the tables may be copied, of 512 more records not one


def test_two_stores_and_threads_at_once(tmp_path):
    records = make_records(), make_records(seed=1)
    arguments = [write(tmp_path / f"bank{i}", records[i]) for i in (0, 1)]
    failures = []

    def run(store, records, seed):
        rng = np.random.default_rng(seed)
        for _ in range(20):
            experts = rng.permutation(40)[:6]
            ask(store, experts[:3], Kind.PREFETCH)
            pool, status = move(store, fresh_pool(), range(6), experts)
            same = np.array_equal(pool, expected_pool(records, range(6), experts))
            if not same or status[0] != Status.OK:
                failures.append(experts)

    with contextlib.ExitStack() as stack:
        threads = []
        for i in (0, 1):
            opened = Store.open_disk(tmp_path / f"bank{i}", threads=2, buffers=4, **arguments[i])
            store = stack.enter_context(opened)
            threads += [
                threading.Thread(target=run, args=(store, records[i], 2 * i + j)) for j in (0, 1)
            ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failures


def test_the_interpreter_exits_with_an_open_store(tmp_path):
    write(tmp_path / "bank", make_records())
    program = (
        "import sys, jax.numpy as jnp\n"
        "from moejax.kernels import transport\n"
        "store = transport.Store.open_disk(\n"
        "    sys.argv[1], data_offset=4096, record_bytes=4096, records=40)\n"
        "transport.request(store.handle, jnp.arange(8), 8, 1, jnp.zeros(1))\n"
        "store.cycle = store\n"
        "print('end')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "bank")],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "end\n", "")


def test_bad_arguments(tmp_path):
    with pytest.raises(MoejaxError, match="No such file"):
        Store.open_disk(tmp_path / "none", data_offset=0, record_bytes=4096, records=1)
    arguments = write(tmp_path / "bank", make_records())
    for bad in ({"threads": 0}, {"buffers": 0}, {"record_bytes": 0}, {"data_offset": -1}):
        with pytest.raises(ValueError):
            Store.open_disk(tmp_path / "bank", **(arguments | bad))
    with pytest.raises(ValueError, match="checksums"):
        Store.open_disk(tmp_path / "bank", checksums=np.zeros(3, np.uint32), **arguments)
    for bad in ({"gigabytes_per_second": 0.0}, {"gigabytes_per_second": 1.0, "latency_us": -1}):
        with pytest.raises(ValueError, match="rate"):
            Store.open_paced(make_records(), **bad)
    for bad in ({"host_us": -1}, {"host_us": float("inf")}, {"jitter_us": float("nan")}):
        with pytest.raises(ValueError, match="host"):
            Store.open_paced(make_records(), gigabytes_per_second=1.0, **bad)
    for seed in (-1, 2**64):
        with pytest.raises(ValueError, match="seed"):
            Store.open_paced(make_records(), gigabytes_per_second=1.0, seed=seed)
    with pytest.raises(ValueError, match="count"):
        transport.host_end(1, ids([1]), NOW)
    with pytest.raises(ValueError, match="contiguous"):
        Store.open_paced(make_records()[:, ::2], gigabytes_per_second=1.0)
    with pytest.raises(ValueError, match="slots"):
        transport.commit(1, fresh_pool(), ids([1, 2]), ids([1]), 1, NOW)
    with pytest.raises(ValueError, match="store"):
        transport.copy_records(fresh_pool(), make_records(1, 9), ids([0]), ids([0]), 1, NOW)
    with pytest.raises(ValueError, match="handle"):
        transport.request(1.0, ids([1]), 1, Kind.DEMAND, NOW)
    with pytest.raises(ValueError, match="keep"):
        transport.cancel(1, ids([1]), NOW)
    with pytest.raises(ValueError, match="keys"):
        bools = jnp.ones(2, bool)
        transport.plan_fetch(ids([1]), ids([1]), ids([1]), ids([1, 2]), bools, ids([0, 1]), 0, 1)
