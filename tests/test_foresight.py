"""Foresight: who is wanted, and what becomes of it in slots and over a link."""

import dataclasses
import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import build, small_config
from hypothesis import given
from hypothesis import strategies as st
from test_experts import NOBODY
from test_speculate import begun, deep, drafting, needs_native, opened

from moejax import decode, experts, kernels, window
from moejax.config import RouterRule
from moejax.errors import PolicyError
from moejax.kernels import transport
from moejax.kernels.transport import Kind
from moejax.policies import residency, utility
from moejax.policies.drafting import SkipMissing
from moejax.policies.evictors import ScoreWindow
from moejax.policies.foresight import (
    DraftRouting,
    Glimpse,
    Lookahead,
    NoForesight,
    Promote,
    UtilityQueue,
)
from moejax.policies.pinning import DraftSet
from moejax.policies.placement import BandwidthShare, HostAll
from moejax.policies.policy import policy
from moejax.policies.prediction import LastLayer, NoCutoff, PreviousToken
from moejax.policies.routing import Routing
from moejax.policies.speculation import SelfDraft
from moejax.policies.utility import Utility
from moejax.state import ExpertCache, ExpertStore, Forecast, pytree, static
from moejax.supply import Supply

SEED = st.integers(0, 2**32 - 1)
SELF = SelfDraft(router=SkipMissing())


def glimpse_of(**parts):
    """A glimpse of a layer of six experts and two tokens; top-2."""
    usual = {
        "layer": jnp.int32(0),
        "scores": jnp.zeros((2, 6)),
        "chance": jnp.ones(2),
        "missed": jnp.zeros(6, bool),
        "resident": jnp.zeros(6, bool),
        "keys": jnp.zeros(6, jnp.int32),
        "levels": None,
        "work": None,
        "slots": jnp.int32(9),
        "valid": jnp.ones(2, bool),
        "top_k": 2,
    }
    return Glimpse(**usual | parts)


WANTED = jax.jit(lambda foresight, memory, seen: foresight.wanted(memory, seen))


@given(
    seed=SEED,
    shape=st.sampled_from([(1, 5, 2), (4, 8, 3), (3, 4, 4)]),
    limit=st.integers(0, 5),
    ties=st.booleans(),
)
def test_draft_routing_wants_the_best_of_every_likely_token(seed, shape, limit, ties):
    tokens, number, top_k = shape
    rng = np.random.default_rng(seed)
    scores = rng.dirichlet(np.ones(number), tokens).astype(np.float32)
    if ties:
        scores = np.round(scores * 4) / 4
    chance = rng.choice([0.0, 0.25, 0.5, 1.0], tokens).astype(np.float32)
    valid = rng.random(tokens) < 0.7
    scores[~valid] = np.nan
    seen = glimpse_of(
        scores=jnp.asarray(scores),
        chance=jnp.asarray(chance),
        valid=jnp.asarray(valid),
        missed=jnp.zeros(number, bool),
        top_k=top_k,
    )
    got, _ = WANTED(DraftRouting(limit=jnp.int32(limit)), None, seen)
    want = np.zeros(number)
    for n in np.flatnonzero(valid):
        best = sorted(range(number), key=lambda e: (-scores[n, e], e))[: min(limit, top_k)]
        for expert in best:
            want[expert] = max(want[expert], float(scores[n, expert]) * float(chance[n]))
    np.testing.assert_allclose(got, want, rtol=1e-6)
    assert np.array_equal(np.asarray(got) > 0, want > 0)


def test_draft_routing_takes_the_likelier_of_two_tokens():
    scores = jnp.array([[0.6, 0.3, 0.1, 0, 0, 0], [0.1, 0.2, 0.7, 0, 0, 0]])
    seen = glimpse_of(scores=scores, chance=jnp.array([1.0, 0.5]))
    got, memory = DraftRouting(limit=1).wanted(None, seen)
    np.testing.assert_allclose(got, [0.6, 0, 0.35, 0, 0, 0])
    got, _ = DraftRouting().wanted(None, seen)
    np.testing.assert_allclose(got, [0.6, 0.3, 0.35, 0, 0, 0])
    assert memory is None and DraftRouting().spent(None, jnp.int32(3)) is None


class PlainPromote:
    """The link's time in records, of a rate per step of four layers, in exact fractions."""

    def __init__(self, rate, most):
        self.rate, self.most, self.saved = rate / 4, most, 0.0

    def wanted(self, keys, missed, is_step):
        self.saved = min(self.saved + self.rate * is_step, self.most)
        order = sorted(np.flatnonzero(missed), key=lambda e: (-keys[e], e))
        return [int(e) for e in order[: int(self.saved)]]


@given(
    seed=SEED,
    rate=st.sampled_from([0.0, 1.0, 2.0, 4.0, 10.0]),
    most=st.sampled_from([0.5, 1.0, 3.0, 8.0]),
    floating=st.booleans(),
)
def test_promotion_wants_the_greatest_keys_that_there_is_time_for(seed, rate, most, floating):
    rng = np.random.default_rng(seed)
    foresight = Promote(rate=jnp.float32(rate), most=jnp.float32(most))
    memory, plain = foresight.init(4, 6), PlainPromote(rate, most)
    for _ in range(20):
        keys = rng.integers(0, 4, 6)
        if floating:
            keys = (keys - 2).astype(np.float32)
        missed, valid = rng.random(6) < 0.5, rng.random(2) < 0.7
        seen = glimpse_of(
            keys=jnp.asarray(keys), missed=jnp.asarray(missed), valid=jnp.asarray(valid)
        )
        got, memory = WANTED(foresight, memory, seen)
        want = plain.wanted(keys, missed, valid.any())
        assert np.flatnonzero(np.asarray(got) > 0).tolist() == sorted(want)
        for one in want:
            below = sum(keys[other] < keys[one] for other in range(6))
            assert float(got[one]) == 1.0 + below
        assert float(memory.records) == plain.saved
        spent = int(rng.integers(0, len(want) + 1))
        memory = foresight.spent(memory, jnp.int32(spent))
        plain.saved -= spent
    assert float(memory.records) >= 0


def test_what_was_fetched_meanwhile_takes_no_place_of_a_promotion():
    """Of two that were missed, one has been fetched by now: the step did without the other."""
    there = jnp.arange(6) == 4
    missed = there | (jnp.arange(6) == 1)
    seen = glimpse_of(keys=jnp.arange(6), missed=missed, resident=there)
    foresight = Promote(rate=jnp.float32(1.0))
    got, _ = foresight.wanted(foresight.init(1, 6), seen)
    assert float(got[1]) > 0


def test_numbers_never_retrace():
    traces = []

    @jax.jit
    def wanted(foresight, memory, seen):
        traces.append(foresight)
        return foresight.wanted(memory, seen)

    for value in (1, 2, 3):
        seen = glimpse_of(levels=jnp.arange(6), missed=jnp.ones(6, bool))
        promote = Promote(rate=jnp.float32(value), most=jnp.float32(value + 1))
        assert (wanted(promote, promote.init(1, 6), seen)[0] > 0).sum() == value
        wanted(DraftRouting(limit=jnp.int32(value)), None, seen)
        assert (wanted(UtilityQueue(threshold=jnp.int32(value)), None, seen)[0] > 0).sum() == (
            6 - value
        )
    assert len(traces) == 3


def test_lookahead_wants_what_a_draft_routes_to_as_far_as_there_is_time():
    foresight = Lookahead(rate=jnp.float32(1.0), most=jnp.float32(8.0))
    memory = dataclasses.replace(foresight.init(4, 6), records=jnp.float32(1.5))
    seen = glimpse_of(
        scores=jnp.float32([[0.5, 0.3, 0.1, 0.05, 0.03, 0.02], [0.15, 0.1, 0.6, 0.1, 0.03, 0.02]]),
        chance=jnp.float32([1.0, 0.6]),
        resident=jnp.arange(6) == 0,
        missed=jnp.arange(6) == 4,
        keys=jnp.float32([0.0, 0.9, 0.1, 0.2, 0.3, 0.0]),
        drafting=True,
    )
    wanted, after = WANTED(foresight, memory, seen)
    np.testing.assert_allclose(wanted, [0, 0, 0.36, 0, 0, 0], rtol=1e-6)  # one: 0.6 * 0.6 > 0.3
    assert after.records == 1.5  # a draft saves nothing up
    np.testing.assert_allclose(foresight.worth(seen), [0.5, 0.9, 0.36, 0.2, 0.3, 0.0], rtol=1e-6)
    plain = dataclasses.replace(seen, drafting=False)
    promote = Promote(rate=foresight.rate, most=foresight.most)
    np.testing.assert_array_equal(
        WANTED(foresight, memory, plain)[0], WANTED(promote, memory, plain)[0]
    )
    np.testing.assert_array_equal(foresight.worth(plain), plain.keys)


@pytest.mark.parametrize("threshold", [-1, 0, 1, 2, 5, 6])
def test_the_queue_holds_levels_from_the_threshold_on(threshold):
    levels = np.array([0, 1, 2, 5, 0, 4])
    got, _ = WANTED(
        UtilityQueue(threshold=jnp.int32(threshold)), None, glimpse_of(levels=jnp.asarray(levels))
    )
    want = np.where((levels >= threshold) & (levels > 0), levels, 0)
    assert np.asarray(got).tolist() == want.tolist()


@pytest.mark.parametrize(
    ("load", "host", "least"),
    # a dear link: none; a free one and a dear host: all that are hot; in between: enough
    [(np.inf, 1.0, 9), (0.0, 1e6, 1), (1.0, 1.0, 2)],
)
def test_the_queue_is_cut_where_the_slowest_resource_is_done_first(load, host, least):
    """Levels 3, 2, 2, 1, 0 and all needed; the link brings one, three or four, and so on."""
    levels = jnp.array([3, 2, 2, 1, 1, 1], jnp.int32)
    everyone = jnp.ones(6, bool)
    work = utility.Work(
        level=levels,
        tokens=jnp.ones(6, jnp.int32),
        needed=everyone,
        resident=everyone,
        hot=utility.at_least(levels, everyone),
        coming=utility.at_least(levels, everyone),
    )
    zero = jnp.float32(0)
    costs = utility.Costs(
        device=zero,
        device_token=zero,
        host=jnp.float32(host),
        host_token=zero,
        hidden=zero,
        load=jnp.float32(load),
    )
    for number in (1, 3):
        queue = UtilityQueue(threshold=jnp.int32(number), costs=costs)
        got, _ = WANTED(queue, None, glimpse_of(levels=levels, work=work))
        want = np.where(np.asarray(levels) >= max(number, least), levels, 0)
        assert np.asarray(got).tolist() == want.tolist()


def test_no_foresight_wants_nothing():
    seen = glimpse_of(missed=jnp.ones(6, bool), scores=jnp.ones((2, 6)))
    assert not NoForesight().wanted(None, seen)[0].any()
    assert not NoForesight.drafts and not NoForesight.after


# What comes into slots.


@pytree
class Fixed:
    """Keys as given; the draft set too, if there is one."""

    value: jax.Array  # [L * E]
    kept: jax.Array  # [L * E] bool

    def init(self, num_layers, num_experts):
        return None

    def observe(self, memory, access):
        return memory

    def keys(self, memory, layer):
        return self.value

    def draft_set(self, memory):
        return self.kept


@pytree
class Told:
    """Wants what it was told, and counts what it got."""

    drafts = False
    after = True

    priority: jax.Array  # [E]
    gains: bool = static(default=False)

    def init(self, num_layers, num_experts):
        return jnp.int32(0)

    def wanted(self, memory, seen):
        return self.priority, memory

    def worth(self, seen):
        return seen.keys

    def spent(self, memory, count):
        return memory + count

    def drained(self, evictor, memory):
        return memory


@dataclasses.dataclass
class Case:
    """Tables, and what is wanted of them."""

    layers: int
    experts: int
    tables: residency.Residency
    keys: np.ndarray
    kept: np.ndarray
    predicted: np.ndarray
    priority: np.ndarray
    layer: int
    capacity: int
    last: int

    @property
    def home(self):
        return np.asarray(self.tables.home)

    @property
    def owner(self):
        return np.asarray(self.tables.owner)

    @property
    def in_use(self):
        return max(self.capacity, self.layers if self.home[0] >= 0 else 1)

    @property
    def serving(self):
        """Slots in use that may hold an expert of the layer."""
        slots = np.arange(min(self.in_use, len(self.owner)))
        return [int(s) for s in slots if self.home[s] in (-1, self.layer)]

    @property
    def own(self):
        return range(self.layer * self.experts, (self.layer + 1) * self.experts)

    def resident(self, number):
        return number in self.owner[: self.in_use]


@st.composite
def cases(draw, keys=("int", "float", "odd")):
    """Tables of few shapes, each a compilation, and random wishes."""
    layers, number, slots = draw(st.sampled_from([(1, 4, 3), (3, 4, 7), (3, 4, 12)]))
    rng = np.random.default_rng(draw(SEED))
    divided = draw(st.booleans())
    tables = residency.empty(layers * number, slots, layers=layers if divided else 0)
    full = draw(st.sampled_from([0.3, 0.9, 1.0]))
    for slot in range(slots):
        free = np.flatnonzero(np.asarray(tables.slot_of) < 0)
        home = int(tables.home[slot])
        free = free[(home < 0) | (free // number == home)]
        if len(free) and rng.random() < full:
            tables = residency.place(tables, jnp.int32(slot), jnp.int32(rng.choice(free)))
    kind = draw(st.sampled_from(keys))
    values = rng.integers(-3, 4, layers * number).astype(np.int32)
    if kind != "int":
        values = (values / 2).astype(np.float32)
    if kind == "odd":
        values = rng.choice(np.float32([np.nan, np.inf, -np.inf, 0, 1]), len(values))
    if kind == "int" and draw(st.booleans()):
        values = np.where(values > 1, np.iinfo(np.int32).max, values)
    case = Case(
        layers=layers,
        experts=number,
        tables=tables,
        keys=values,
        kept=rng.random(layers * number) < draw(st.sampled_from([0.0, 0.3])),
        predicted=np.zeros(layers * number, bool),
        priority=rng.choice(np.float32([np.nan, -1, 0, 0.5, 0.5, 1, 2, 2]), number),
        layer=draw(st.integers(0, layers - 1)),
        capacity=draw(st.integers(1, slots)),
        last=draw(st.sampled_from([-1, 0, 1, 2, 2, 2])),
    )
    most = len(case.serving) // 2 if divided else case.in_use // 2
    some = list(case.own) if divided else np.arange(layers * number)
    chosen = rng.permutation(some)[: rng.integers(0, most + 1)]
    case.predicted[chosen.astype(int)] = True
    return case


@functools.cache
def bringing(name, gains):
    """`window.bring` on a case, jitted, with records that go along."""

    @jax.jit
    def run(tables, keys, kept, predicted, priority, layer, capacity, last, pool, records):
        made = dataclasses.replace(
            policy("lru"),
            evictor=Fixed(value=keys, kept=kept),
            foresight=Told(priority=priority, gains=gains),
            cutoff=LastLayer(last=last),
            capacity=capacity,
        )
        number = priority.shape[0]
        memory = made.init(keys.shape[0] // number, number)
        book = Forecast(wanted=predicted, fresh=jnp.zeros_like(predicted))
        memory = dataclasses.replace(memory, forecast=book)
        store = ExpertStore(records=records, layout=None)
        supply = Supply(made, store, layer, number, False)
        shelf = supply.open(ExpertCache(pool=pool, residency=tables))
        scores, valid = jnp.zeros((1, number)), jnp.ones(1, bool)
        with kernels.using(name):
            seen = window.glimpse(supply, shelf, memory, scores, valid, 1)
            shelf, memory, count = window.bring(supply, shelf, memory, seen, scores)
        return shelf.source, shelf.residency, memory, count

    return run


def brought(case, name="reference", gains=False):
    """Pool, tables, memory and count afterwards; pool rows say whose they are."""
    records = np.arange(case.layers * case.experts, dtype=np.uint16)[:, None].repeat(64, 1)
    pool = np.where(case.owner >= 0, case.owner, 999).astype(np.uint16)[:, None].repeat(64, 1)
    numbers = (case.layer, case.capacity, case.last)
    arrays = (case.tables, case.keys, case.kept, case.predicted, case.priority)
    out = bringing(name, gains)(*arrays, *map(jnp.int32, numbers), pool, jnp.asarray(records))
    pool, tables, memory, count = jax.device_get(out)
    assert memory.foresight == count
    return pool, tables, memory, int(count)


def check_tables(case, pool, tables, memory, count):
    """What must hold whatever was wanted."""
    owner, slot_of = tables.owner, tables.slot_of
    assert sorted(owner[owner >= 0]) == np.flatnonzero(slot_of >= 0).tolist()
    assert all(owner[slot_of[e]] == e for e in np.flatnonzero(slot_of >= 0))
    assert (pool[owner >= 0, 0] == owner[owner >= 0]).all()
    changed = np.flatnonzero(owner != case.owner)
    filled = [int(s) for s in changed if owner[s] >= 0]
    assert len(filled) == count
    assert set(filled) <= set(case.serving)
    new = owner[filled]
    assert set(new) <= set(case.own)
    assert all(case.priority[e % case.experts] > 0 for e in new)
    assert not any(case.resident(e) for e in new)
    shielded = case.kept | case.predicted
    for slot in filled:
        assert case.owner[slot] < 0 or not shielded[case.owner[slot]]
    for slot in set(changed) - set(filled):  # was beyond the capacity, and has moved in
        assert case.owner[slot] in new and slot >= case.in_use
    if case.last < case.layer:
        assert not len(changed) and np.array_equal(memory.forecast.wanted, case.predicted)
    start = case.layer * case.experts
    fresh = memory.forecast.fresh
    assert np.flatnonzero(fresh).tolist() == sorted(new)
    wanted = memory.forecast.wanted
    assert wanted[case.predicted].all()
    added = np.flatnonzero(wanted & ~case.predicted)
    assert set(added) <= set(case.own)
    assert all(case.priority[e - start] > 0 for e in added)
    divided = case.home[0] >= 0
    promised = wanted[start : start + case.experts].sum() if divided else wanted.sum()
    assert promised <= len(case.serving) // 2


def plain_bring(case):
    """Owners of the slots afterwards, from the description."""
    owner, shielded = case.owner.copy(), case.kept | case.predicted
    if case.last < case.layer:
        return owner
    start, priority = case.layer * case.experts, case.priority
    order = sorted(
        (e for e in range(case.experts) if priority[e] > 0), key=lambda e: (-priority[e], e)
    )
    kept = {start + e for e in order if case.resident(start + e)}
    absent = [start + e for e in order if start + e not in kept]
    free = [s for s in case.serving if owner[s] not in kept]
    free = [s for s in free if owner[s] < 0 or not shielded[owner[s]]]

    def worth(slot):
        key = case.keys[owner[slot]]
        # who has no number leaves first
        return (owner[slot] >= 0, -np.inf if np.isnan(key) else float(key), slot)

    for expert in absent[: len(free)]:
        slot = min(free, key=worth)
        owner[owner == expert] = -1
        owner[slot] = expert
        free.remove(slot)
    return owner


@pytest.mark.parametrize("name", ["reference", pytest.param("native", marks=needs_native)])
@given(case=cases(keys=("int", "float")))
def test_bring_gives_slots_in_order_and_shields(name, case):
    pool, tables, memory, count = brought(case, name)
    check_tables(case, pool, tables, memory, count)
    assert tables.owner.tolist() == plain_bring(case).tolist()


@given(case=cases(keys=("odd",)))
def test_bring_holds_with_keys_that_are_no_numbers(case):
    check_tables(case, *brought(case))


@given(case=cases(keys=("int", "float")), seed=SEED)
def test_what_must_gain_displaces_nobody_who_is_worth_more(case, seed):
    rng = np.random.default_rng(seed)
    for _ in range(8):
        keys = rng.integers(-3, 9, len(case.keys)).astype(case.keys.dtype)
        own = keys[list(case.own)] - keys.min() + 1  # who is worth most comes first, as promoted
        case = dataclasses.replace(
            case,
            keys=keys,
            priority=np.where(rng.random(case.experts) < 0.7, own, 0).astype(np.float32),
        )
        pool, tables, memory, count = brought(case, gains=True)
        check_tables(case, pool, tables, memory, count)
        filled = np.flatnonzero((tables.owner != case.owner) & (tables.owner >= 0))
        filled = filled[case.owner[filled] >= 0]
        came, left = np.sort(keys[tables.owner[filled]]), np.sort(keys[case.owner[filled]])
        assert (came > left).all(), (came, left)  # however the two are paired


# By hand: who owns the slots, keys, who is wanted how much, slots in use, owners afterwards.
GAINS = {
    # Keys 5 and 4 come to residents of keys 1 and 10, of a later layer: one place is theirs.
    "second": ((4, 5), (5, 4, 0, 0, 1, 10, 0, 0), (2, 1, 0, 0), 2, [0, 5]),
    # The resident of key 1 is wanted and stays; key 3 is worth less than who would really leave.
    "wanted resident": ((1, 3), (3, 1, 0, 10), (2, 1, 0, 0), 2, [1, 3]),
    "worth more": ((2,), (3, 0, 2, 0), (1, 0, 0, 0), 1, [0, -1]),
    "worth as much": ((2,), (2, 0, 2, 0), (1, 0, 0, 0), 1, [2, -1]),
    "worth less": ((2,), (1, 0, 2, 0), (1, 0, 0, 0), 1, [2, -1]),
    "worth more, room": ((2,), (3, 0, 2, 0), (1, 0, 0, 0), 2, [2, 0]),
    "worth as much, room": ((2,), (2, 0, 2, 0), (1, 0, 0, 0), 2, [2, 0]),
    "worth less, room": ((2,), (1, 0, 2, 0), (1, 0, 0, 0), 2, [2, 0]),
}


@pytest.mark.parametrize("name", GAINS)
def test_one_must_be_worth_more_than_who_leaves_or_find_an_empty_slot(name):
    owners, keys, priority, capacity, after = GAINS[name]
    tables = residency.empty(len(keys), 2)
    for slot, expert in enumerate(owners):
        tables = residency.place(tables, jnp.int32(slot), jnp.int32(expert))
    case = Case(
        layers=len(keys) // 4,
        experts=4,
        tables=tables,
        keys=np.float32(keys),
        kept=np.zeros(len(keys), bool),
        predicted=np.zeros(len(keys), bool),
        priority=np.float32(priority),
        layer=0,
        capacity=capacity,
        last=9,
    )
    assert brought(case, gains=True)[1].owner.tolist() == after


def test_the_queue_gives_levels_their_place_again():
    """After `bring`, hot experts of layers that have run are worth their level again."""
    made = dataclasses.replace(
        policy("lru"), evictor=Utility(), foresight=UtilityQueue(threshold=jnp.int32(2))
    )
    memory = made.init(2, 4)
    level = jnp.array([[3, 0, 2, 1], [0, 0, 0, 0]], jnp.int32)
    evictor = dataclasses.replace(memory.evictor, level=level, layer=jnp.int32(0))
    memory = dataclasses.replace(memory, evictor=evictor)
    before = np.asarray(made.evictor.keys(evictor, jnp.int32(0)))
    assert before[:4].max() == 0  # demoted
    store = ExpertStore(records=jnp.zeros((8, 4), jnp.uint16), layout=None)
    supply = Supply(made, store, jnp.int32(0), 4, True)
    cache = ExpertCache(pool=jnp.zeros((0, 4), jnp.uint16), residency=residency.empty(8, 4))
    shelf = supply.open(cache)
    scores, valid = jnp.zeros((1, 4)), jnp.ones(1, bool)
    seen = window.glimpse(supply, shelf, memory, scores, valid, 1)
    assert np.asarray(seen.levels).tolist() == [3, 0, 2, 1]
    shelf, memory, count = window.bring(supply, shelf, memory, seen, scores)
    assert int(count) == 2 and shelf.residency.owner[:3].tolist() == [0, 2, -1]
    after = np.asarray(made.evictor.keys(memory.evictor, jnp.int32(0)))
    assert after[0] > after[2] > after[1] == after[3] == 0


# In the engine.


def stepped(built, made, steps=14, *, width=1, seed=0, store=None, pause=0.0, **budget):
    """Logits and trace of each step of the same tokens, and who owns which slot after it."""
    store = store or built.store
    fixed = (built.model, made, built.params, store)
    state = decode.init_state(built.model, made, store, batch=1, context=128, **budget)
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        tokens = rng.integers(0, 61, (1, width)).astype(np.int32)
        state, out = decode.decode_step(*fixed, state, tokens, prefill=False)
        logits, trace = jax.device_get((out.logits, out.trace))
        # a copy: on the host's memory, the next step would write into what it was given
        yield logits.copy(), trace, np.array(state.experts.residency.owner)
        time.sleep(pause)


def promoting(rate, most=8.0, **parts):
    """LRU, misses on the host, promoted meanwhile: `rate` records per step."""
    promote = Promote(rate=jnp.float32(rate), most=jnp.float32(most))
    return dataclasses.replace(policy("lru"), placement=HostAll(), foresight=promote, **parts)


@needs_native
@pytest.mark.parametrize(("rate", "most"), [(1.0, 8.0), (4.0, 1.0), (12.0, 2.0)])
def test_promotion_keeps_within_its_budget(rate, most):
    saved = total = full = 0
    for _, trace, _ in stepped(deep(), promoting(rate, most), slots=24, width=3):
        assert not trace.fetched.any() and (trace.host + trace.hits == trace.needed).all()
        for count, needed, hits in zip(trace.prefetched, trace.needed, trace.hits, strict=True):
            saved = min(saved + rate / 4, most)
            assert count <= min(int(saved), needed - hits)
            # of LRU, what was just missed is worth more than anybody else
            assert count == min(int(saved), needed - hits)
            saved -= count
            total += int(count)
            full += count == int(saved + count) > 0
    assert total > 8 and full > 4


@needs_native
def test_only_what_was_missed_is_promoted():
    before = np.full(24, -1)
    for _, trace, owner in stepped(deep(), promoting(8.0), slots=24, width=2):
        came = set(owner[owner >= 0]) - set(before[before >= 0])
        rows = enumerate(trace.picks)
        needed = {16 * layer + e for layer, row in rows for e in row.ravel() if e >= 0}
        assert came <= needed
        before = owner


@needs_native
def test_promotion_never_displaces_a_draft_set():
    evictor = DraftSet(size=jnp.int32(2))
    made = promoting(16.0, evictor=evictor)
    built, before = deep(), np.full(12, -1)
    fixed = (built.model, made, built.params, built.store)
    state = decode.init_state(built.model, made, built.store, slots=12, context=128)
    rng, moved = np.random.default_rng(0), 0
    pinned = np.zeros(64, bool)
    for _ in range(16):
        tokens = rng.integers(0, 61, (1, 3)).astype(np.int32)
        state, out = decode.decode_step(*fixed, state, tokens, prefill=False)
        now, owner = (
            np.array(state.policy.evictor.pinned),
            np.array(state.experts.residency.owner),
        )
        gone = set(before[before >= 0]) - set(owner[owner >= 0])
        # pinned before and after: in the set of its layer all the time
        assert not any(pinned[e] and now[e] for e in gone)
        moved += len(gone)
        before, pinned = owner, now
    assert moved > 10


@needs_native
@pytest.mark.parametrize("pause", [0.0, 0.05])
def test_what_has_not_landed_is_computed_on_the_host_with_the_same_bits(pause):
    built, made = deep(), promoting(8.0)
    whole = stepped(built, built.policy, slots=64)
    memory = stepped(built, made, slots=24)
    speed = {"latency_us": 6e7} if not pause else {}
    link, store = opened(built, gigabytes_per_second=1.0, **speed)
    overdue = late = 0
    with link:
        linked = stepped(built, made, slots=24, store=store, pause=pause)
        for one, two, three in zip(whole, memory, linked, strict=True):
            assert np.array_equal(one[0], three[0]) and np.array_equal(one[0], two[0])
            assert np.array_equal(two[2], three[2])
            near, far = two[1], three[1]
            for name in ("needed", "hits", "host", "fetched", "prefetched"):
                assert np.array_equal(getattr(near, name), getattr(far, name)), name
            assert (far.overdue <= far.late).all() and (far.late <= far.hits).all()
            assert not near.overdue.any() and not near.late.any()
            if not pause:
                assert np.array_equal(far.overdue, far.late)
            assert not far.stall.any()
            late, overdue = late + far.late.sum(), overdue + far.overdue.sum()
        moved = link.stats()
    assert late > 3
    assert (overdue > 3) if not pause else (overdue == 0)
    assert (moved.committed == 0) == (not pause)


@needs_native
def test_where_it_is_computed_does_not_change_who_stays():
    """Overdue or not is a matter of time; the tables must not be."""
    built = deep()
    made = dataclasses.replace(
        policy("lru"),
        placement=BandwidthShare(share=jnp.float32(1.0)),  # every miss is fetched
        foresight=Promote(),
        evictor=Fixed(value=jnp.zeros(64), kept=jnp.zeros(64, bool)),
    )
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(1, 32)), jnp.float32)
    picks = jnp.array([[0, 1]], jnp.int32)
    routing = Routing(
        expert=picks, weight=jnp.full((1, 2), 0.5), exact=picks, replaced_mass=jnp.zeros(1)
    )
    work = experts.Layer(
        index=jnp.int32(0),
        hidden=x,
        x=x,
        shared=None,
        scores=jnp.full((1, 16), 1 / 16),
        routing=routing,
        valid=jnp.ones(1, bool),
        prefill=True,
    )
    found = []
    apply = jax.jit(functools.partial(experts.apply, ahead=NOBODY))
    for latency in (1.0, 30_000.0):
        link, store = opened(built, gigabytes_per_second=10.0, latency_us=latency)
        with link, kernels.using("native"):
            tables = residency.empty(64, 2)
            for slot, expert in enumerate((0, 20)):  # 0 is on its way; so was 20
                tables = residency.place(tables, jnp.int32(slot), jnp.int32(expert))
            cache = decode.init_cache(built.config, store, 2)
            arriving = jnp.array([True, False])
            cache = dataclasses.replace(cache, residency=tables, arriving=arriving)
            asked = transport.request(
                store.link, jnp.zeros(1, jnp.int32), jnp.int32(1), Kind.PREFETCH, x
            )
            jax.block_until_ready(asked)
            time.sleep(0.01)
            y, after, _, _, trace = apply(made, store, cache, made.init(4, 16), work)
            found.append((np.array(y), np.array(after.residency.owner), int(trace.overdue)))
    assert [overdue for _, _, overdue in found] == [0, 1]
    assert np.array_equal(found[0][0], found[1][0])
    assert np.array_equal(found[0][1], found[1][1])


def late_glance(supply, shelf, needed):
    """Which of the needed experts are overdue."""
    return np.asarray(supply.overdue(shelf, jnp.asarray(needed), jnp.zeros(1)))


@needs_native
def test_overdue_is_who_is_needed_has_a_slot_and_has_not_landed():
    built, made = deep(), promoting(1.0)
    link, store = opened(built, gigabytes_per_second=1.0)
    with link:
        tables = residency.empty(64, 5)
        for slot, expert in enumerate((16, 17, 18, 19, 3)):
            tables = residency.place(tables, jnp.int32(slot), jnp.int32(expert))
        cache = decode.init_cache(built.config, store, 5)
        arriving = jnp.array([True, True, False, True, True])
        cache = dataclasses.replace(cache, residency=tables, arriving=arriving)
        supply = Supply(made, store, jnp.int32(1), 16, False)
        shelf = supply.open(cache)
        needed = np.zeros(16, bool)
        needed[[0, 1, 2, 5]] = True  # 16 and 17 late, 18 there, 21 absent; 19 not needed
        assert np.flatnonzero(late_glance(supply, shelf, needed)).tolist() == [0, 1]
        transport.request(store.link, jnp.array([17], jnp.int32), 1, Kind.PREFETCH, jnp.zeros(1))
        while not link.stats().landed:
            time.sleep(0.001)
        assert np.flatnonzero(late_glance(supply, shelf, needed)).tolist() == [0]
        plain = dataclasses.replace(shelf, arriving=None)
        assert not late_glance(supply, plain, needed).any()


@needs_native
def test_what_was_cancelled_on_its_way_is_asked_for_again_when_it_is_needed():
    """A prediction that fails cancels promoted records too: they must not stay overdue for ever."""
    built = deep()
    predictor = PreviousToken(limit=jnp.int32(1))
    made = promoting(8.0, predictor=predictor)
    link, store = opened(built, gigabytes_per_second=10.0)
    with link, kernels.using("native"):
        tables = residency.empty(64, 6)
        tables = residency.place(tables, jnp.int32(0), jnp.int32(5))
        cache = decode.init_cache(built.config, store, 6)
        # as `Supply.forget` leaves it: a slot, and nothing on its way
        arriving = jnp.zeros(6, bool).at[0].set(True)
        cache = dataclasses.replace(cache, residency=tables, arriving=arriving)
        x = jnp.ones((1, 32))
        picks = jnp.array([[5]], jnp.int32)
        routing = Routing(
            expert=picks, weight=jnp.ones((1, 1)), exact=picks, replaced_mass=jnp.zeros(1)
        )
        work = experts.Layer(
            index=jnp.int32(0),
            hidden=x,
            x=x,
            shared=None,
            scores=jnp.full((1, 16), 1 / 16),
            routing=routing,
            valid=jnp.ones(1, bool),
        )
        apply = jax.jit(functools.partial(experts.apply, ahead=NOBODY))
        memory, overdue = made.init(4, 16), []
        for _ in range(3):
            _, cache, memory, _, trace = apply(made, store, cache, memory, work)
            overdue.append(int(trace.overdue))
            time.sleep(0.05)  # time for thousands of records
    assert overdue[-1] == 0, overdue


@needs_native
def test_overdue_records_do_not_change_what_is_drafted():
    built = deep()
    made = drafting(SELF, 2, placement=HostAll(), foresight=Promote(rate=jnp.float32(8.0)))
    link, store = opened(built, gigabytes_per_second=1.0, latency_us=10_000.0)
    prompt, overdue = [np.array([3, 4, 5], np.int32)], 0
    with link:
        loops = [begun(built, made, prompt, slots=28, store=s) for s in (None, store)]
        for _ in range(12):
            near, far = (loop.step(np.ones(1, bool), np.full(1, 50)) for loop in loops)
            for name in ("proposed", "token", "count"):
                assert np.array_equal(getattr(near, name), getattr(far, name)), name
            overdue += int(far.totals.overdue)
    assert overdue > 0


GROUPED = RouterRule(normalize=False, num_groups=4, top_groups=1)


def test_drafts_want_experts_of_groups_that_are_in():
    """With grouped routing (DeepSeek-V2) the model never runs others: they are not critical."""
    config = small_config(router=GROUPED, num_experts=16)
    built = build(config)
    made = drafting(SELF, 2, foresight=DraftRouting())
    state = decode.init_state(built.model, made, built.store, slots=20, context=128)
    fixed = (built.model, made, built.params, built.store)
    tokens, chance = jnp.full((1, 1), 5), jnp.ones(1)
    step = functools.partial(decode.step, prefill=False, scores=True, chance=chance)
    state, out = jax.jit(lambda state: step(*fixed, state, tokens))(state)
    fresh = np.asarray(state.policy.forecast.fresh).reshape(2, 16)
    assert fresh.sum(axis=1).tolist() == [2, 2]
    for layer in range(2):
        scores = np.asarray(out.trace.scores[layer, 0])
        group = scores.reshape(4, 4).max(axis=1).argmax()
        inside = range(4 * group, 4 * group + 4)
        want = sorted(inside, key=lambda e: -scores[e])[:2]
        assert np.flatnonzero(fresh[layer]).tolist() == sorted(want)


def test_a_draft_uses_nothing_fresh():
    built = build(small_config(num_experts=16))
    made = drafting(SELF, 2, foresight=DraftRouting())
    fixed = (built.model, made, built.params, built.store)
    state = decode.init_state(built.model, made, built.store, slots=20, context=128)
    options = {"prefill": False, "chance": jnp.ones(1)}
    step = jax.jit(lambda state: decode.step(*fixed, state, jnp.full((1, 1), 5), **options))
    first, out = step(state)
    assert int(out.trace.prefetched.sum()) == 4 and (np.asarray(out.trace.picks) < 0).all()
    # the same token at the same place: its experts have slots now, but were never used
    _, again = step(dataclasses.replace(first, length=state.length))
    assert (np.asarray(again.trace.picks) < 0).all()


def test_utility_queues_need_an_evictor_with_levels():
    with pytest.raises(PolicyError):
        policy(dataclasses.replace(policy("lru"), foresight=UtilityQueue()))


def test_score_windows_promote_what_they_value():
    """As in the preset `auto`: promoted is only who has a greater mean score than who leaves."""
    made = promoting(4.0, evictor=ScoreWindow(n=jnp.int32(8), size=8))
    built = build(small_config(num_layers=1, moe_layers=(0,), num_experts=16))
    before, pairs = np.full(8, -1), []
    fixed = (built.model, made, built.params, built.store)
    state = decode.init_state(built.model, made, built.store, slots=8, context=128)
    rng = np.random.default_rng(0)
    for _ in range(30):
        tokens = rng.integers(0, 61, (1, 3)).astype(np.int32)
        state, _ = decode.decode_step(*fixed, state, tokens, prefill=False)
        owner = np.array(state.experts.residency.owner)
        means = np.array(state.policy.evictor.means)
        changed = (owner != before) & (before >= 0)
        pairs += zip(np.sort(means[owner[changed]]), np.sort(means[before[changed]]), strict=True)
        before = owner
    assert len(pairs) > 5
    assert all(came > left for came, left in pairs), pairs


def test_cutoffs_are_asked_for_the_layer_itself():
    assert bool(NoCutoff().allows(jnp.int32(5)))
    made = promoting(12.0, cutoff=LastLayer(last=jnp.int32(1)))
    built = build(small_config(num_layers=3, moe_layers=(0, 1, 2), num_experts=16))
    total = np.zeros(3, int)
    for _, trace, _ in stepped(built, made, steps=6, slots=20):
        total += trace.prefetched
    assert (total[:2] > 0).all() and total[2] == 0
