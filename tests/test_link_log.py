"""The log of a link: every record moved and every expert computed on the host, with its times."""

import threading

import jax.numpy as jnp
import numpy as np
import pytest
from test_transport import NOW, ask, fresh_pool, ids, make_records, move, opened

from moejax.kernels import store as stores
from moejax.kernels import transport
from moejax.kernels.transport import Kind, Status, Store

__all__ = ["opened"]  # a fixture


def in_order(events, begin, end):
    """Whether times follow one another, and each event the one that was complete before it."""
    times = [np.full(1, begin), events.requested_us, events.begun_us, events.landed_us]
    steps = [(b >= a).all() for a, b in zip(times, [*times[1:], np.full(1, end)], strict=True)]
    return all(steps) and (np.diff(events.landed_us) >= 0).all()


def test_every_record_is_logged_once(opened):
    records, open_store = opened
    rng, begin = np.random.default_rng(5), stores.clock_us()
    with open_store(buffers=4) as store:
        store.log(1000)
        moved = []
        for _ in range(15):
            ask(store, rng.permutation(40)[:3], Kind.PREFETCH)
            experts = rng.integers(0, 40, 4)
            ask(store, experts[:2])
            move(store, fresh_pool(), range(4), experts)
            moved += experts.tolist()
        stats = None
        while stats != store.stats():  # what was under way may land after its request
            stats, events = store.stats(), store.events()
        assert events.dropped == 0
        assert len(events.expert) == stats.landed
        assert (events.kind == Kind.PREFETCH).sum() >= stats.prefetched > 0
        assert (events.kind == Kind.DEMAND).sum() >= stats.committed - stats.prefetched
        assert set(moved) <= set(events.expert.tolist()) <= set(range(40))
        assert in_order(events, begin, stores.clock_us() + 1e6)


def test_a_request_waits_for_the_link_and_is_a_demand_if_committed_first():
    records = make_records()
    # 20 ms for each record.
    with Store.open_paced(records, gigabytes_per_second=1.0, latency_us=20_000 - 4.096) as store:
        store.log(10)
        ask(store, [7, 8, 9], Kind.PREFETCH)
        move(store, fresh_pool(), [0, 1], [9, 7])
        events = store.events()
        np.testing.assert_array_equal(events.expert[:2], [7, 9])
        np.testing.assert_array_equal(events.kind[:2], [Kind.PREFETCH, Kind.DEMAND])
        np.testing.assert_allclose(events.landed_us - events.begun_us, 20_000, atol=0.01)
        np.testing.assert_array_equal(events.begun_us[1:], events.landed_us[:-1])
        assert events.requested_us[0] == events.requested_us[1] == events.begun_us[0]


def test_the_log_is_bounded_and_off_by_default(opened):
    _, open_store = opened
    with open_store(buffers=8) as store:
        move(store, fresh_pool(), range(4), range(4))
        assert len(store.events().expert) == 0
        store.log(5)
        for first in range(0, 40, 8):
            move(store, fresh_pool(), range(8), range(first, first + 8))
        events = store.events(reset=True)
        assert events.dropped == 35 and len(events.expert) == 5
        assert set(events.expert.tolist()) <= set(range(32, 40))
        for expert in (3, 1, 2, 5, 4, 6):  # the ring goes round after it was emptied
            move(store, fresh_pool(), [0], [expert])
        events = store.events(reset=True)
        assert (events.expert.tolist(), events.dropped) == ([1, 2, 5, 4, 6], 1)
        assert not store.events().dropped
        store.log(0)
        move(store, fresh_pool(), [0], [9])
        assert len(store.events().expert) == 0
        with pytest.raises(ValueError, match="negative"):
            store.log(-1)
    for use in (lambda: store.log(1), store.events):
        with pytest.raises(ValueError, match="closed"):
            use()


def test_what_was_asked_before_counts_from_the_log_on():
    with Store.open_paced(make_records(), gigabytes_per_second=1.0, latency_us=5000) as store:
        ask(store, [1, 2], Kind.PREFETCH)
        begin = stores.clock_us()
        store.log(4)
        move(store, fresh_pool(), [0, 1], [1, 2])
        events = store.events()
        assert events.expert.tolist() == [2]  # 1 was on its way
        assert begin <= events.requested_us[0] <= events.begun_us[0]


def test_experts_of_the_host_are_logged(opened):
    _, open_store = opened
    with open_store() as store:
        store.log(20)
        token = transport.host_begin(store.handle, NOW)
        named = transport.host_end(store.handle, 2, token, ids([-1, 31, -1, 4]))
        assert named.tolist() == [Status.OK]
        token = transport.host_begin(store.handle, named)
        transport.host_end(store.handle, 3, token).block_until_ready()
        events = store.events()
        assert len(events.expert) == store.stats().host_experts == 5
        assert events.expert.tolist() == [31, 4, -1, -1, -1]
        assert (events.kind == stores.HOST).all()
        assert events.begun_us[2] >= events.landed_us[1] >= events.begun_us[1]
        assert len(np.unique(events.landed_us)) == 2
        with pytest.raises(ValueError, match="experts must be"):
            transport.host_end(store.handle, 1, token, jnp.zeros(2))


def test_a_log_is_emptied_while_others_fill_it(opened):
    _, open_store = opened
    with open_store(buffers=4) as store:
        store.log(64)
        found, ended = [], threading.Event()

        def work(seed):
            rng = np.random.default_rng(seed)
            for _ in range(40):
                ask(store, rng.permutation(40)[:3], Kind.PREFETCH)
                move(store, fresh_pool(), range(5), rng.permutation(40)[:5])

        def empty():
            while not ended.is_set():
                found.append(store.events(reset=True))

        threads = [threading.Thread(target=work, args=(seed,)) for seed in (0, 1)]
        reader = threading.Thread(target=empty)
        for thread in [reader, *threads]:
            thread.start()
        for thread in threads:
            thread.join()
        ended.set()
        reader.join()
        landed = -1
        while landed != store.stats().landed:  # what was under way may land after its request
            landed = store.stats().landed
            found.append(store.events(reset=True))
    assert sum(len(events.expert) + events.dropped for events in found) == landed > 300
