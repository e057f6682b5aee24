"""Placements against the papers' loops, one decision at a time, and live costs against NumPy."""

import collections
import dataclasses
import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moejax.errors import InputError, PolicyError
from moejax.policies.placement import (
    BandwidthShare,
    Demand,
    FetchAll,
    HostAll,
    LiveCosts,
    ThreeTimelines,
    TwoPointer,
)

INF = math.inf
fetch = jax.jit(lambda placement, demand: placement.fetch(demand))


@st.composite
def demands(draw):
    """What a layer needs: many ties or none, nothing or everything missing, padding."""
    experts = draw(st.sampled_from([1, 8, 60]))
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    needed = rng.random(experts) < draw(st.sampled_from([0.2, 0.7, 1.0]))
    missing = needed & (rng.random(experts) < draw(st.sampled_from([0.0, 0.5, 1.0])))
    levels = draw(st.sampled_from([1, 3, 2**16]))
    tokens = rng.integers(1, draw(st.sampled_from([2, 4, 300])), experts)
    score = (rng.integers(0, levels, experts) / levels).astype(np.float32)
    return Demand(
        missing=missing,
        hits=needed & ~missing,
        tokens=np.where(needed, tokens, 0).astype(np.int32),
        score=np.where(needed, score, np.float32(0)),
    )


def all_missing(count, experts=16, tokens=1):
    """`count` missing experts, the lower the id the higher the score, and the rest not needed."""
    missing = np.arange(experts) < count
    return Demand(
        missing=missing,
        hits=np.zeros(experts, bool),
        tokens=np.where(missing, tokens, 0).astype(np.int32),
        score=np.where(missing, 1 - np.arange(experts) / 64, 0).astype(np.float32),
    )


def chosen(placement, demand):
    """Ids of the missing experts that a placement fetches."""
    fetched = np.asarray(fetch(placement, demand))
    assert fetched.shape == demand.missing.shape and fetched.dtype == bool
    return set(np.flatnonzero(fetched & demand.missing).tolist())


def in_order(demand, *keys):
    """Ids of the missing experts, greatest keys first, then lowest ids."""
    ids = np.flatnonzero(demand.missing).tolist()
    return sorted(ids, key=lambda e: (*(-float(key[e]) for key in keys), e))


# Few halves, so that times of the two are often equal, or any f32.
costs = st.integers(0, 12).map(lambda n: n / 2) | st.floats(2**-10, 2**20, width=32)
eighths = st.integers(0, 64).map(lambda n: n / 8)


def two_pointer(order, load, host, link_first):
    """SMoE's Algorithm 2."""
    load, host = np.float32(load), np.float32(host)
    left, right, loads, hosts = 0, len(order) - 1, 0, 0
    fetched = set()
    while left <= right:
        link_time, host_time = np.float32(loads) * load, np.float32(hosts) * host
        if link_time < host_time or (link_first and link_time == host_time):
            fetched.add(order[left])
            left, loads = left + 1, loads + 1
        else:
            right, hosts = right - 1, hosts + 1
    return fetched


@given(demands(), costs, costs, st.sampled_from(["paper", "released"]))
def test_two_pointer_equals_the_papers_loop(demand, load, host, variant):
    paper = variant == "paper"
    order = in_order(demand, demand.score if paper else demand.tokens)
    placement = TwoPointer(load=load, host=host, variant=variant)
    assert chosen(placement, demand) == two_pointer(order, load, host, paper)


@pytest.mark.parametrize(
    "load, host, paper, released",
    [
        (1, 1, 4, 4),  # of 8
        (1, 3, 6, 6),
        (2, 1, 3, 3),
        (0, 1, 8, 7),
        (1, 0, 1, 0),
        (0, 0, 8, 0),
        (INF, 1, 0, 0),
        (INF, 0, 0, 0),
        (1, INF, 8, 8),
        (0, INF, 8, 8),
        (INF, INF, 8, 8),
        (math.nan, 1, 0, 0),
        (1, math.nan, 8, 8),
    ],
)
def test_two_pointer_by_hand(load, host, paper, released):
    demand = all_missing(8)
    assert chosen(TwoPointer(load=load, host=host), demand) == set(range(paper))
    placement = TwoPointer(load=load, host=host, variant="released")
    assert chosen(placement, demand) == set(range(released))


def test_who_begins_and_what_is_sorted():
    one = all_missing(1)
    assert chosen(TwoPointer(load=9, host=1), one) == {0}
    assert chosen(TwoPointer(load=9, host=1, variant="released"), one) == set()
    two = dataclasses.replace(all_missing(2), tokens=np.array([1, 2] + [0] * 14, np.int32))
    assert chosen(TwoPointer(load=1, host=1), two) == {0}
    assert chosen(TwoPointer(load=1, host=1, variant="released"), two) == {1}


@given(st.integers(0, 60), eighths, eighths, st.sampled_from(["paper", "released"]))
def test_two_pointer_is_within_one_expert_of_the_best_split(count, load, host, variant):
    demand = all_missing(count, 60)
    loads = len(chosen(TwoPointer(load=load, host=host, variant=variant), demand))
    times = [max(k * load, (count - k) * host) for k in range(count + 1)]
    assert min(times[max(loads - 1, 0) : loads + 2]) == min(times)
    assert times[loads] <= min(times) + max(load, host)


@given(demands(), st.tuples(eighths, eighths), st.tuples(eighths, eighths), eighths)
def test_dearer_loads_never_add_fetches(demand, loads, hosts, device):
    for make in (TwoPointer, lambda **given: ThreeTimelines(**given, device=device)):
        dear = chosen(make(load=max(loads), host=min(hosts)), demand)
        cheap = chosen(make(load=min(loads), host=max(hosts)), demand)
        assert dear <= cheap


def balanced(count, share):
    """FreeToken's number of fetches: whichever whole number has the lesser later finish."""
    low = math.floor(share * count)

    def finish(fetches):
        return max(fetches * (1 - share), (count - fetches) * share)

    return min(count, low if finish(low) <= finish(low + 1) else low + 1)


@given(demands(), st.integers(1, 256))
def test_bandwidth_share_equals_the_search(demand, parts):
    share = Fraction(parts, 256)
    order = in_order(demand, demand.score)
    want = set(order[: balanced(len(order), share)])
    assert chosen(BandwidthShare(share=float(share)), demand) == want


@given(demands(), st.floats(2**-20, 2, width=32), st.floats(2**-20, 2, width=32))
def test_a_greater_share_never_removes_fetches(demand, one, other):
    less, more = (chosen(BandwidthShare(share=s), demand) for s in sorted([one, other]))
    assert less <= more
    assert abs(len(less) - min(one, other, 1) * demand.missing.sum()) <= 1.001


@pytest.mark.parametrize(
    "share, fetched",
    [(0, 1), (-3, 1), (math.nan, 1), (-INF, 1), (1, 8), (1.5, 8), (INF, 8), (0.1, 0), (0.5, 4)],
)
def test_bandwidth_share_at_its_ends(share, fetched):
    assert chosen(BandwidthShare(share=share), all_missing(8)) == set(range(fetched))
    assert chosen(BandwidthShare(share=share), all_missing(0)) == set()


def test_a_level_split_fetches_the_lower_number():
    assert chosen(BandwidthShare(share=0.5), all_missing(1)) == set()
    assert chosen(BandwidthShare(share=0.25), all_missing(3)) == set()
    assert chosen(BandwidthShare(share=0.25), all_missing(4)) == {0}


def test_matched_bandwidths():
    placement = BandwidthShare.matched(12.0, 48.0)
    assert float(placement.share) == 0.25
    assert chosen(BandwidthShare.matched(30.0, 20.0), all_missing(8)) == set(range(8))
    for pair in [(0.0, 1.0), (1.0, 0.0), (-1.0, 2.0), (math.nan, 1.0), (1.0, INF)]:
        with pytest.raises(InputError, match="positive"):
            BandwidthShare.matched(*pair)


def timelines(demand, load, host, device):
    """HybriMoE's simulation in exact numbers: (fetched, when the layer is done)."""
    order = collections.deque(in_order(demand, demand.tokens, demand.score))
    load, host, device = map(Fraction, (load, host, device))
    link_time = host_time = Fraction(0)
    device_time = int(demand.hits.sum()) * device
    fetched = set()
    while order:
        by_device = max(device_time, link_time + load) + device
        by_host = host_time + host * int(demand.tokens[order[-1]])
        if by_device <= by_host:
            fetched.add(order.popleft())
            link_time, device_time = link_time + load, by_device
        else:
            order.pop()
            host_time = by_host
    return fetched, max(device_time, host_time)


def finish(demand, order, count, load, host, device):
    """When a layer is done whose first `count` experts of the order are fetched."""
    device_time = int(demand.hits.sum()) * device
    for n in range(count):
        device_time = max(device_time, (n + 1) * load) + device
    return max(device_time, host * sum(int(demand.tokens[e]) for e in order[count:]))


@given(demands(), eighths, eighths, eighths)
def test_three_timelines_equal_the_simulation(demand, load, host, device):
    want, done = timelines(demand, load, host, device)
    assert chosen(ThreeTimelines(load=load, host=host, device=device), demand) == want
    order = in_order(demand, demand.tokens, demand.score)
    splits = [finish(demand, order, n, load, host, device) for n in range(len(order) + 1)]
    assert done == splits[len(want)] == min(splits)


@pytest.mark.parametrize(
    "load, host, device, fetched",
    [
        (2, 1, 0, 3),  # of 8 of one token each
        (1, 1, 1, 4),
        (1, 1.5, 3, 2),
        (0, 1, 0, 8),
        (1, 0, 0, 0),
        (0, 0, 0, 8),
        (INF, 1, 1, 0),
        (1, INF, 1, 8),
        (INF, INF, 1, 8),
        (1, 1, INF, 0),
        (1, INF, INF, 8),
    ],
)
def test_three_timelines_by_hand(load, host, device, fetched):
    placement = ThreeTimelines(load=load, host=host, device=device)
    assert chosen(placement, all_missing(8)) == set(range(fetched))


def test_busy_residents_and_many_tokens_move_the_split():
    few = all_missing(4)
    placement = ThreeTimelines(load=1, host=4, device=1)
    assert chosen(placement, few) == {0, 1, 2}
    hits = np.arange(16) >= 6
    busy = dataclasses.replace(few, hits=hits, tokens=np.where(hits, 5, few.tokens))
    assert chosen(placement, busy) == {0, 1}
    heavy = np.where(few.missing, [1, 1, 9, 1] * 4, 0).astype(np.int32)
    assert chosen(placement, dataclasses.replace(busy, tokens=heavy)) == {0, 2}
    best_last = dataclasses.replace(busy, score=np.arange(16, dtype=np.float32))
    assert chosen(placement, best_last) == {2, 3}


@pytest.mark.parametrize(
    "first, second",
    [
        (TwoPointer(load=1.0, host=2.0), TwoPointer(load=5.0, host=INF)),
        (TwoPointer(load=1.0, host=2.0), TwoPointer(load=1.0, host=2.0).with_costs(3.0, 4.0)),
        (BandwidthShare(share=0.5), BandwidthShare(share=-1.0)),
        (BandwidthShare.matched(1, 2), BandwidthShare.matched(3.5, 4)),
        *(
            (placement, placement.with_costs(LiveCosts().load, LiveCosts().host))
            for placement in (
                TwoPointer(load=jnp.float32(1), host=jnp.float32(2)),
                ThreeTimelines(load=jnp.float32(1), host=jnp.float32(2), device=jnp.float32(3)),
                ThreeTimelines(load=1.0, host=2.0, device=3.0),
            )
        ),
    ],
)
def test_other_numbers_do_not_trace_again(first, second):
    traces = []

    @jax.jit
    def run(placement, demand):
        traces.append(placement)
        return placement.fetch(demand)

    for placement in (first, second, first):
        run(placement, all_missing(3))
    assert len(traces) == 1


def test_with_costs_keeps_the_rest():
    released = TwoPointer(load=1.0, host=2.0, variant="released").with_costs(3.0, 4.0)
    assert released == TwoPointer(load=3.0, host=4.0, variant="released")
    timed = ThreeTimelines(load=1.0, host=2.0, device=5.0).with_costs(3.0, 4.0)
    assert timed == ThreeTimelines(load=3.0, host=4.0, device=5.0)
    whole = TwoPointer(load=jnp.int32(1), host=jnp.int32(1)).with_costs(2.5, 1.5)
    assert (float(whole.load), float(whole.host)) == (2.5, 1.5)


@pytest.mark.parametrize(
    "make",
    [
        TwoPointer,
        lambda load, host: TwoPointer(load=1.0, host=1.0, variant="released").with_costs(
            load, host
        ),
        lambda load, host: ThreeTimelines(load=load, host=host, device=jnp.float32(0.5)),
        lambda load, host: BandwidthShare(share=host / (load + 1)),
    ],
)
def test_many_costs_at_once(make):
    load, host = (jnp.asarray(c.ravel(), jnp.float32) for c in np.mgrid[0:3, 0:4])
    demand = jax.tree.map(jnp.asarray, all_missing(7, tokens=2))
    run = jax.vmap(lambda load, host: make(load=load, host=host).fetch(demand))
    rows = np.asarray(jax.jit(run)(load, host))
    assert rows.shape == (12, 16)
    for row, one_load, one_host in zip(rows, load, host, strict=True):
        assert set(np.flatnonzero(row)) == chosen(make(load=one_load, host=one_host), demand)


@given(demands())
def test_all_or_nothing(demand):
    assert chosen(FetchAll(), demand) == set(np.flatnonzero(demand.missing))
    assert chosen(HostAll(), demand) == set()
    assert not FetchAll.uses_host
    assert all(p.uses_host for p in (HostAll, TwoPointer, BandwidthShare, ThreeTimelines))


def test_unknown_variant():
    with pytest.raises(PolicyError, match="paper or released"):
        TwoPointer(load=1.0, host=1.0, variant="code")


def trimmed(values):
    """Mean of the values within one standard deviation of the mean; exact for whole numbers."""
    values = np.array(values, np.int64)
    offsets = len(values) * values - values.sum()
    return values[len(values) * offsets**2 <= (offsets**2).sum()].mean()


@given(st.lists(st.tuples(*[st.none() | st.integers(0, 3000)] * 2), max_size=30))
def test_live_costs_equal_numpy(measured):
    live = LiveCosts()
    assert (live.load, live.host) == (2000, 50000)
    loads, hosts = [], []
    for load, host in measured:
        live.add(load, host)
        loads += [] if load is None else [load]
        hosts += [] if host is None else [host]
        assert live.load == pytest.approx(trimmed(loads[-10:]) if loads else 2000, rel=1e-12)
        assert live.host == pytest.approx(trimmed(hosts[-10:]) if hosts else 50000, rel=1e-12)


@given(st.lists(st.floats(0, 1e300), min_size=1, max_size=12), st.integers(1, 12))
def test_live_costs_lie_among_the_latest(values, window):
    live = LiveCosts(load=1, host=INF, window=window)
    for value in values:
        live.add(value, None)
    latest = values[-window:]
    assert min(latest) * (1 - 1e-12) <= live.load <= max(latest) * (1 + 1e-12)
    assert live.host == INF


def test_an_outlier_is_dropped_and_two_are_kept():
    live = LiveCosts()
    for value in [10.0] * 9 + [500.0]:
        live.add(value, value)
    assert live.load == live.host == 10
    two = LiveCosts()
    two.add(1.1, 2.3)
    two.add(2.3, None)
    assert two.load == pytest.approx(1.7)
    assert two.host == 2.3


@pytest.mark.parametrize("wrong", [-1.0, math.nan, INF, -INF])
def test_wrong_measurements_are_refused(wrong):
    live = LiveCosts()
    for pair in [(wrong, 1.0), (1.0, wrong), (wrong, None), (None, wrong)]:
        with pytest.raises(ValueError, match="cost of"):
            live.add(*pair)
    assert (live.load, live.host) == (2000, 50000)


@pytest.mark.parametrize("wrong", [{"load": -1.0}, {"host": math.nan}, {"window": 0}])
def test_wrong_start_values_are_refused(wrong):
    with pytest.raises(ValueError, match="LiveCosts"):
        LiveCosts(**wrong)
