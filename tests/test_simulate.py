"""The simulator against brute force, published replays, and its own faster paths."""

import dataclasses
import functools
import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from moejax.cli import exits
from moejax.cli import simulate as simulate_commands
from moejax.errors import BudgetError, InputError, PolicyError
from moejax.planner.machines import machine
from moejax.policies import residency as tables
from moejax.policies.eviction import LRU
from moejax.policies.placement import HostAll
from moejax.policies.policy import policy
from moejax.policies.routing import Routing
from moejax.simulator import accesses, bounds, replay, stack_distance, tape, timeline
from moejax.simulator.bookkeeping import Tables
from moejax.simulator.simulate import Asked, per_step, simulate, unavoidable
from moejax.simulator.tape import tapes_of
from moejax.state import ExpertStore, Residency, pytree
from moejax.supply import Shelf
from moejax.traces.trace import Phase, Trace

DATA = pathlib.Path(__file__).parents[1] / ".." / "shared" / "data" / "traces" / "bigmoeonedge"
# ../shared/data/NOTES.md, section 4
REFERENCE = {
    "qwen": {
        "lru": (0.384, 0.590, 0.811, 0.958),
        "lfu": (0.374, 0.567, 0.799, 0.958),
        "belady": (0.524, 0.758, 0.912, 0.969),
    },
    "gemma": {
        "lru": (0.360, 0.592, 0.791, 0.951),
        "belady": (0.513, 0.752, 0.900, 0.963),
    },
}
SHIELDED = {"lru": (0.429, 0.612, 0.817), "lfu": (0.459, 0.631, 0.821)}


@functools.cache
def published(name):
    from moejax.traces import importers as trace_import

    path = DATA / f"{name}.route.csv.xz"
    if not path.exists():
        pytest.skip(f"{path} is not there")
    return trace_import.read(path)


@pytest.mark.parametrize("name", REFERENCE)
def test_published_replays(name):
    trace, capacities = published(name), (8, 16, 32, 64)
    slots = [c * trace.layers for c in capacities]
    for kind, rates in REFERENCE[name].items():
        found = simulate(trace, [kind], slots, Asked(per_layer=True))
        np.testing.assert_allclose([f.hit_rate for f in found], rates, atol=0.005, err_msg=kind)


def test_published_replays_that_shield_the_layer():
    trace = published("qwen")
    asked = Asked(semantics="engine", per_layer=True)
    for kind, rates in SHIELDED.items():
        found = simulate(trace, [kind], [c * trace.layers for c in (8, 16, 32)], asked)
        np.testing.assert_allclose([f.hit_rate for f in found], rates, atol=0.005, err_msg=kind)


@pytree
class NoStandIn:
    """A lossy router."""

    exact = False
    low_bit = False

    def init(self, layers, experts):
        return None


def exact_of(seen, top_k):
    ids = jnp.zeros((1, top_k), jnp.int32)
    none = jnp.zeros(1, jnp.float32)
    return Routing(expert=ids, weight=jnp.zeros((1, top_k)), exact=ids, replaced_mass=none)


def random_trace(seed=0, layers=3, experts=8, top_k=2, tokens=60, prompt=6, scores=False):
    """Skewed picks, with a prompt in one pass."""
    rng = np.random.default_rng(seed)
    weight = rng.gumbel(size=(tokens, layers, experts)) + np.linspace(0, 2, experts)
    picks = np.argsort(-weight, axis=2)[:, :, :top_k].astype(np.int16)
    number = np.arange(tokens, dtype=np.int32)
    chances = np.exp(weight) / np.exp(weight).sum(axis=2, keepdims=True)
    return Trace(
        model="random",
        experts=experts,
        sequence=np.zeros(tokens, np.int32),
        position=number,
        run=np.maximum(number - prompt + 1, 0).astype(np.int32),
        phase=np.where(number < prompt, Phase.PREFILL, Phase.DECODE).astype(np.uint8),
        token=np.full(tokens, -1, np.int32),
        accepted=np.ones(tokens, bool),
        picks=picks,
        scores=chances.astype(np.float16) if scores else None,
        about={"source": "moejax", "record_bytes": 1000},
    )


def plain_cache(uses, capacity, leaves):
    """Hits [M] of a cache written down plainly; `leaves(resident, count, last)` names who goes."""
    resident, count, last, hits = [], {}, {}, []
    for time, own in enumerate(uses):
        hits.append(own in resident)
        count[own] = count.get(own, 0) + 1
        if own not in resident:
            if len(resident) == capacity:
                resident.remove(leaves(resident, count, last))
            resident.append(own)
        last[own] = time
    return hits


RULES = {
    "lru": lambda resident, count, last: min(resident, key=lambda x: last[x]),
    "lfu": lambda resident, count, last: min(resident, key=lambda x: (count[x], last[x])),
}


@pytest.mark.parametrize("per_layer", [True, False])
@pytest.mark.parametrize("name", RULES)
def test_single_accesses_are_a_plain_cache(name, per_layer):
    trace, capacities = random_trace(), (2, 5)
    slots = [c * trace.layers for c in capacities]
    found = simulate(trace, [name], slots, Asked(per_layer=per_layer))
    uses = accesses.sequences(trace.picks, trace.experts, per_layer)
    for number, one in zip(slots, found, strict=True):
        capacity = number // trace.layers if per_layer else number
        hits = np.array([plain_cache(own.tolist(), capacity, RULES[name]) for own in uses])
        hits = accesses.unfolded(hits, trace.picks.shape)[trace.phase == Phase.DECODE]
        assert one.hit_rate == hits.mean()
        assert one.moved_per_token == (~hits).sum() / len(hits)


@pytest.mark.parametrize("per_layer", [True, False])
@pytest.mark.parametrize("name", RULES)
def test_accesses_in_blocks_are_those_at_once(monkeypatch, name, per_layer):
    """Some of no use among them; the last block is shorter than the others."""
    trace = random_trace()
    trace.picks[7:11, 1] = -1
    asked = Asked(per_layer=per_layer, check=True)
    [whole] = simulate(trace, [name], [9], asked)
    monkeypatch.setattr(accesses, "BLOCK", 7 * trace.picks[0].size)
    sizes = [part.stop - part.start for part, _ in accesses.blocks(trace, per_layer)]
    assert sizes == [7] * 8 + [4]
    [parts] = simulate(trace, [name], [9], asked)
    assert whole.counts.keys() == parts.counts.keys() and whole.total("hits") > 0
    for count, values in whole.counts.items():
        np.testing.assert_array_equal(values, parts.counts[count], count)


def test_uses_of_passes_are_counted_by_layer():
    trace = random_trace(prompt=9)
    trace.picks[12:15, 1] = -1
    seen = [set() for _ in range(trace.layers)]
    for number, (first, needed) in enumerate(
        zip(accesses.first_uses(trace), accesses.needed(trace), strict=True)
    ):
        for layer, before in enumerate(seen):
            own = {*trace.picks[trace.rows_of(number), layer].ravel().tolist()} - {-1}
            assert (first[layer], needed[layer]) == (len(own - before), len(own))
            before |= own


uses_of = st.lists(st.integers(-1, 5), min_size=1, max_size=14)


@given(uses=uses_of, capacity=st.integers(1, 5))
def test_stack_distances_are_lru(uses, capacity):
    distance = stack_distance.distances(np.array([uses]), 6)[0]
    used = [x for x in uses if x >= 0]
    wanted = plain_cache(used, capacity, RULES["lru"])
    found = (distance >= 0) & (distance < capacity)
    assert found[np.array(uses) >= 0].tolist() == wanted
    counted = np.ones((1, len(uses)), bool)
    assert stack_distance.hits(distance[None], counted, np.array([capacity])) == sum(wanted)


@given(uses=uses_of, capacity=st.integers(1, 4))
def test_no_choice_of_who_leaves_beats_belady(uses, capacity):
    @functools.cache
    def most(time, resident):
        if time == len(uses):
            return 0
        own = uses[time]
        if own < 0 or own in resident:
            return (own >= 0) + most(time + 1, resident)
        if len(resident) < capacity:
            return most(time + 1, resident | {own})
        return max(most(time + 1, (resident - {out}) | {own}) for out in resident)

    found = bounds.belady(np.array(uses), capacity)
    assert found.sum() == most(0, frozenset())
    first = [uses.index(own) for own in set(uses)]
    assert not found[first].any()


EXPERTS, SLOTS = 7, 6


@functools.partial(jax.jit, static_argnames="wide")
def found_slots(owner, slot_of, capacity, keys, wanted, order, wide):
    """Owners, slots and number brought by `residency.bring` (wide=None), or by `Tables`."""
    residency = Residency(slot_of=slot_of, owner=owner, home=jnp.full(SLOTS, -1))
    zero, made = jnp.int32(0), dataclasses.replace(policy("lru"), capacity=capacity)
    if wide is None:
        after, copies = tables.bring(residency, keys, zero, wanted, order, capacity)
    else:
        nothing = jnp.zeros((0, 0), jnp.uint8)
        store = ExpertStore(records=nothing, layout=None)
        supply = Tables(made, store, zero, EXPERTS, True, wide)
        shelf = Shelf(source=nothing, residency=residency, arriving=None)
        shelf, copies = supply.find(shelf, keys, wanted, order)
        after = shelf.residency
    return after.owner, after.slot_of, copies.count


@given(st.data())
def test_slots_are_given_as_the_engine_gives_them(data):
    """Both ways to fill slots against `residency.bring`, on one layer's tables."""
    owner = np.array(data.draw(st.permutations([*range(EXPERTS), *[-1] * SLOTS]))[:SLOTS])
    capacity = data.draw(st.integers(1, SLOTS))
    owner[capacity:] = -1
    slot_of = np.full(EXPERTS, -1)
    slot_of[owner[owner >= 0]] = np.flatnonzero(owner >= 0)
    keys = data.draw(st.lists(st.integers(0, 3), min_size=EXPERTS, max_size=EXPERTS))
    wanted = data.draw(st.lists(st.booleans(), min_size=EXPERTS, max_size=EXPERTS))
    order = data.draw(st.permutations(range(EXPERTS)))
    given = [jnp.asarray(x, jnp.int32) for x in (owner, slot_of, capacity, keys)]
    given += [jnp.asarray(wanted), jnp.asarray(order, jnp.int32)]
    engine, in_turn, at_once = (found_slots(*given, wide) for wide in (None, False, True))
    for one in zip(engine, in_turn, at_once, strict=True):
        np.testing.assert_array_equal(one[0], one[1])
        np.testing.assert_array_equal(one[0], one[2])


@pytest.mark.parametrize("name", ["class-lru:period=5", "score-window:window=3"])
def test_layers_replayed_one_by_one_are_the_whole(name):
    trace = random_trace(scores=True)
    tapes, setting = tapes_of(trace), replay.Setting(experts=trace.experts)
    slots = [3 * trace.layers, 5 * trace.layers]
    own = [dataclasses.replace(policy(name), capacity=jnp.int32(n)) for n in slots]
    assert replay.separable(own[0])
    fast = replay.run(tapes, own, max(slots), setting, per_layer=True)
    empty = np.full(max(slots), -1, np.int32)
    slow = replay.run(tapes, own, max(slots), setting, per_layer=True, start=empty)
    for key, values in fast.items():
        np.testing.assert_array_equal(values, slow[key], key)
    assert fast["evicted"].sum() > 0 and (fast["hits"][0] != fast["hits"][1]).any()


def test_an_oracle_prefetches_what_will_be_needed():
    trace = random_trace()
    asked = Asked(semantics="engine", prefetch="oracle", check=True)
    [oracle] = simulate(trace, ["moe-infinity"], [12], asked)
    [none] = simulate(trace, ["moe-infinity"], [12], dataclasses.replace(asked, prefetch="none"))
    assert oracle.label.startswith("bound") and none.label == "exact"
    # All layers but the first, which no layer goes before.
    assert oracle.hit_rate > none.hit_rate
    assert (oracle.counts["hits"] == oracle.counts["needed"])[oracle.decode, 1:].all()


@pytree
class Short:
    """An evictor whose keys are too few."""

    def init(self, num_layers, num_experts):
        return jnp.zeros(num_experts)

    def observe(self, memory, access):
        return memory

    def keys(self, memory, layer):
        return memory


def without_decode():
    trace = random_trace()
    return dataclasses.replace(trace, phase=np.zeros_like(trace.phase))


ENGINE = Asked(semantics="engine")
BAD = {
    "unknown policy": (random_trace, ["best"], [9], ENGINE, PolicyError, "belady, optimal, auto"),
    "scores": (random_trace, ["smoe-fetch"], [9], ENGINE, PolicyError, "needs router scores"),
    "drafts": (random_trace, ["lookup"], [9], ENGINE, PolicyError, "no verified drafts"),
    "gates": (random_trace, ["moe-infinity"], [9], ENGINE, PolicyError, "--prefetch none"),
    "more than a cache": (random_trace, ["balanced"], [9], None, PolicyError, "--semantics engine"),
    "few slots": (random_trace, ["lru"], [1], ENGINE, BudgetError, "at least 2"),
    "uneven": (random_trace, ["lru"], [10], Asked(per_layer=True), BudgetError, "evenly"),
    "no decode": (without_decode, ["lru"], [9], None, InputError, "no decode passes"),
    "keys": (
        random_trace,
        [dataclasses.replace(policy("lru"), evictor=Short())],
        [9],
        ENGINE,
        PolicyError,
        "a number for each expert",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused(case):
    make, policies, slots, asked, error, text = BAD[case]
    with pytest.raises(error, match=text):
        simulate(make(), policies, slots, asked)
    with pytest.raises(InputError, match="known: access, engine"):
        Asked(semantics="exact")


def test_broken_tables_are_found(monkeypatch):
    """With a rule that puts every expert where it was not told to."""
    right = tables.place

    def place(residency, slot, expert):
        moved = right(residency, slot, expert)
        return dataclasses.replace(moved, slot_of=moved.slot_of.at[expert].set(slot + 1))

    monkeypatch.setattr(tables, "place", place)
    trace = random_trace(tokens=20, experts=9)
    with pytest.raises(PolicyError, match="broke the tables in pass 0, layer 0"):
        simulate(trace, ["lru"], [11], Asked(semantics="engine", check=True))


WRONG = {
    "no such method": (LRU, "evictor", "init", None, "init cannot be run: TypeError"),
    "memory of a kind": (LRU, "evictor", "observe", lambda s, m, a: 1, "changes the form"),
    "raising": (LRU, "evictor", "keys", lambda s, m, at: 1 // 0, "keys cannot be run: ZeroDiv"),
    "bools": (LRU, "evictor", "keys", lambda s, m, at: jnp.zeros(24, bool), "not bool [24]"),
    "few keys": (LRU, "evictor", "keys", lambda s, m, at: jnp.zeros(3), "not float32 [3]"),
    "a list": (LRU, "evictor", "keys", lambda s, m, at: [jnp.zeros(())] * 24, "not list"),
    "NumPy": (LRU, "evictor", "keys", lambda s, m, at: np.arange(24), "give one of JAX"),
    "branching": (
        HostAll,
        "placement",
        "fetch",
        lambda s, d: 1 if d.missing.any() else 0,
        "Tracer",
    ),
    "floats": (HostAll, "placement", "fetch", lambda s, d: d.score, "fetch must give a bool for"),
    "few ids": (NoStandIn, "router", "route", lambda s, m, seen: (exact_of(seen, 1), m), "[1, 1]"),
}


@pytest.mark.parametrize("name", WRONG)
def test_parts_that_break_their_word_are_told_so(name):
    kind, field, method, wrong, said = WRONG[name]
    odd = pytree(type("Odd", (kind,), {method: wrong, "__annotations__": {}}))
    made = dataclasses.replace(policy("lru"), must_be_exact=False, **{field: odd()})
    with pytest.raises(PolicyError, match=re.escape(said)):
        simulate(random_trace(scores=True), [made], [12], ENGINE)
    with pytest.raises(PolicyError):
        simulate(random_trace(scores=True), [made], [12])


def test_budgets_policies_and_owners_that_cannot_be():
    trace = random_trace()
    for slots in ([], [2.5], ["a"], [True], [0]):
        with pytest.raises((InputError, BudgetError)):
            simulate(trace, ["lru"], slots)
    for made in (3, None, object()):
        with pytest.raises(PolicyError, match="is no policy"):
            simulate(trace, [made], [9])
    for start in (np.arange(5), np.full(12, 99), np.full(12, 3), np.full(12, -7), "x"):
        with pytest.raises(InputError):
            simulate(trace, ["lru"], [12], ENGINE, start=start)
    # More slots than experts are as many as those: tables are not made for the others.
    for policies, asked in ((["lfu"], Asked()), (["lru"], ENGINE)):
        most, all_in = simulate(trace, policies, [10**12, 24], asked)
        assert most.slots == 10**12 and most.total("hits") == all_in.total("hits")


def test_decode_that_made_nothing_is_refused():
    trace = random_trace()
    decode = trace.phase == Phase.DECODE
    empty = dataclasses.replace(trace, picks=np.where(decode[:, None, None], -1, trace.picks))
    with pytest.raises(InputError, match="no picks to count"):
        simulate(empty, ["lru"], [9])
    with pytest.raises(InputError, match="all drafts were rejected"):
        simulate(dataclasses.replace(trace, accepted=~decode), ["lru"], [9])


def test_memory_is_refused_before_it_is_taken(monkeypatch):
    """Scores that no part of the policy reads take none."""
    trace = random_trace(scores=True)
    monkeypatch.setattr(tape, "MOST_BYTES", 6 * 3 * 8 * 4)
    [whole] = tapes_of(trace, scores=False)
    assert whole.steps.scores is None
    simulate(trace, ["lru"], [9], ENGINE)
    with pytest.raises(InputError, match="leave the prompts out"):
        simulate(trace, ["score-window:window=3"], [9], ENGINE)


@pytree
class OwnCosts:
    """A placement that learns a cost under a name of its own."""

    uses_host = True

    ratio: jax.Array

    def fetch(self, demand):
        return demand.missing & (self.ratio > 1)

    def with_costs(self, load, host):
        return dataclasses.replace(self, ratio=jnp.float32(host / load))


def test_costs_that_a_placement_has_no_place_for_are_left_out():
    trace = random_trace()
    counts = {n: np.full((trace.passes, 3), 7, np.float32) for n in ("load_us", "host_us", "rate")}
    trace = dataclasses.replace(trace, counts=counts, about={"link": "paced:1,1"})
    placement = OwnCosts(ratio=jnp.float32(2))
    made = dataclasses.replace(policy("lru"), placement=placement, capacity=jnp.int32(9))
    setting = replay.Setting(experts=trace.experts)
    plain, told = (replay.run(tapes_of(trace, learned=n), [made], 9, setting) for n in ((), counts))
    assert plain["fetched"].any() and not plain["host"].any()
    for name, count in plain.items():
        np.testing.assert_array_equal(count, told[name], name)
    [found] = simulate(trace, [made], [9], ENGINE)
    assert found.label == "open-loop, learns costs that were not recorded"


@pytest.mark.parametrize(("policies", "per_layer"), [(1, False), (2, False), (2, True)])
def test_several_tapes_are_one_after_the_other(monkeypatch, policies, per_layer):
    """All of one shape, of which no more than the bytes asked for; the counts are those of one."""
    trace = random_trace(scores=True)
    run = np.cumsum(np.arange(trace.rows) % 3 == 0, dtype=np.int32) - 1
    phase = np.array([0, 2, 1, 3, 0])[run % 5].astype(np.uint8)
    trace = dataclasses.replace(trace, run=run, phase=phase).check()
    own = [
        dataclasses.replace(policy("score-window:window=3"), capacity=jnp.int32(n))
        for n in (15, 12)[:policies]
    ]
    setting = replay.Setting(experts=trace.experts, keep=not per_layer)
    tapes = tapes_of(trace)
    assert len([*tapes]) == 1
    whole = replay.run(tapes, own, 15, setting, per_layer=per_layer)
    monkeypatch.setattr(tape, "TAPE_BYTES", 2000)
    forms = [jax.tree.map(lambda x: x.shape, one) for one in tapes]
    assert len(forms) > 3 and all(form == forms[0] for form in forms)
    held = sum(x.nbytes for one in tapes for x in (one.steps.scores, one.prompts.scores))
    assert held / len(forms) < 2000
    parts = replay.run(tapes, own, 15, setting, per_layer=per_layer)
    assert whole.keys() == parts.keys() and whole["evicted"].any()
    for name, counts in whole.items():
        np.testing.assert_array_equal(counts, parts[name], name)


def test_the_time_of_a_step_is_of_all_that_it_runs():
    """Windows of four tokens, of which three were accepted, run more experts than one token."""
    trace = random_trace(prompt=4)
    number = np.arange(trace.rows, dtype=np.int32)
    run = number // 4
    trace = dataclasses.replace(
        trace,
        run=run,
        phase=np.where(run == 0, Phase.PREFILL, Phase.VERIFY).astype(np.uint8),
        accepted=number % 4 != 3,
    )
    experts, tokens = per_step(trace)
    windows = trace.picks[4:].reshape(-1, 4, trace.layers, 2).swapaxes(1, 2)
    wanted = [len(np.unique(own)) for window in windows for own in window]
    assert experts == np.mean(wanted) > trace.top_k and tokens == 3
    # With all in slots the prediction is what was given.
    given = {"hardware": "rtx-4090", "disk": False, "link": None, "resident_tpot": 2.0}
    rates = simulate_commands._rates(trace, ENGINE, **given)
    [found] = simulate(trace, ["lru"], [24], ENGINE)
    counts = {"needed": found.counts["needed"], "hits": found.counts["needed"]}
    assert found.tpot(timeline.times(counts, rates).total) == pytest.approx(2000)


def test_first_uses_are_of_the_routing_that_is_replayed():
    trace = random_trace()
    same = dataclasses.replace(trace, picks=np.zeros_like(trace.picks), exact=trace.picks)
    same.picks[..., 1] = 1
    np.testing.assert_array_equal(unavoidable(same), unavoidable(trace))
    assert unavoidable(same, lossy=True).sum() == 2 * trace.layers


RATES = timeline.Rates(step_us=5.0, layer_us=10.0, expert_us=2.0, load_us=100.0)


def timed(rates=RATES, **counts):
    counts = {name: np.array(values)[None] for name, values in counts.items()}
    found = timeline.times(counts, rates)
    return float(found.total[0]), found


def test_times_by_hand():
    total, _ = timed(needed=[2, 2], hits=[2, 2], fetched=[0, 0])
    assert total == 5 + 2 * (10 + 2 * 2)
    # Two misses: the layer waits for both records, then runs their experts.
    total, found = timed(needed=[2], hits=[0], fetched=[2])
    assert total == 10 + 2 * 100 + 2 * 2 + 5
    assert float(found.busy[0]) == 200 and float(found.link[0]) == 200
    # Of six, those that came first run while the others move.
    assert timed(needed=[6], hits=[0], fetched=[6])[0] == 10 + 600 + 2 * 2 + 5
    # What a miss costs comes once for those that come together, after the wait; not without any.
    dear = dataclasses.replace(RATES, miss_us=7.0)
    assert timed(dear, needed=[2], hits=[2], fetched=[0])[0] == 10 + 2 * 2 + 5
    total, found = timed(dear, needed=[3], hits=[1], fetched=[2])
    assert total == 10 + 2 * 100 + 7 + 2 * 2 + 5 and float(found.link[0]) == 2 * 100 - 2
    assert timed(dear, needed=[6], hits=[0], fetched=[6])[0] == 10 + 600 + 7 + 2 * 2 + 5
    # An idle link takes a while to begin, and moves records one after another from then on.
    idle = dataclasses.replace(RATES, latency_us=30.0)
    assert timed(idle, needed=[2], hits=[0], fetched=[2])[0] == 10 + 30 + 2 * 100 + 2 * 2 + 5
    # A prefetch moves while the layer between computes; a record too late is waited for.
    slow = dataclasses.replace(RATES, layer_us=300.0)
    counts = {"needed": [1, 1], "hits": [1, 1], "fetched": [0, 0]}
    ahead = {"prefetched": [1, 0], "prefetch_used": [0, 1]}
    assert timed(slow, **counts, **ahead)[0] == timed(slow, **counts)[0]
    assert timed(**counts, **ahead)[0] == timed(**counts)[0] + 100 - 2 - 10
    assert timed(dear, **counts, **ahead)[0] == timed(**counts, **ahead)[0] + 7
    # On one processor what the host computes takes the device's time; on two it does not.
    host = {"needed": [4], "hits": [1], "fetched": [0], "host": [3]}
    both = dataclasses.replace(RATES, host_us=50.0)
    assert timed(both, **host)[0] == 10 + 2 + 150 + 5
    apart = dataclasses.replace(both, one_processor=False)
    assert timed(apart, **host)[0] == 10 + 150 + 5
    assert RATES.with_resident(1000.0, 4, 2).layer_us == (1000 - 5 - 16) / 4
    measured = dataclasses.replace(machine("laptop"), miss_us=7.0)
    for disk, latency in ((False, 0.0), (True, measured.disk_latency_us)):
        rates = timeline.rates_of(measured, 1_000_000, disk=disk)
        assert (rates.miss_us, rates.latency_us) == (7.0, latency)
    with pytest.raises(InputError, match="less than its experts take"):
        RATES.with_resident(10.0, 4, 2)


def test_bounds_hold():
    trace = random_trace()
    rates = timeline.rates_of(machine("rtx-4090"), 1_000_000)
    found = simulate(trace, ["lru", "lfu", "optimal"], [9, 15], ENGINE)
    for one in found:
        times = timeline.times(one.counts, rates)
        limits = timeline.bounds(one.counts, unavoidable(trace), rates)
        assert all(one.tpot(times.total) >= one.tpot(bound) - 1e-6 for bound in limits.values())
        best = next(o for o in found if o.policy == "optimal" and o.slots == one.slots)
        assert one.hit_rate <= best.hit_rate
    assert limits["resident"].sum() < limits["oracle_prefetch"].sum()


def test_the_command(tmp_path):
    app = typer.Typer()
    app.command()(exits.guarded(simulate_commands.simulate))
    path = tmp_path / "trace"
    random_trace().save(path)
    given = [str(path), "--policy", "lru", "--slots-per-layer", "3", "--hardware", "rtx-4090"]
    done = CliRunner().invoke(app, [*given, "--json"])
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    [row] = report["rows"]
    [wanted] = simulate(random_trace(), ["lru"], [9], Asked(per_layer=True))
    assert row["hit_rate"] == report["hit_rate"] == wanted.hit_rate
    assert row["slots_per_layer"] == 3 and row["tpot_ms"] >= row["bounds_ms"]["oracle_prefetch"]
    experts = random_trace().layers * random_trace().experts
    done = CliRunner().invoke(app, [str(path), "--slots", "9", "--slots", "45%", "--json"])
    assert [row["slots"] for row in json.loads(done.stdout)["rows"]] == [9, experts * 45 // 100]
    shown = CliRunner().invoke(app, [str(path), "--policy", "lru", "--policy", "belady"])
    assert shown.exit_code == 0 and f"{report['trace']['model']}: 3 layers" in shown.stdout
    wrong = CliRunner().invoke(app, [str(path), "--slots", "3", "--slots-per-layer", "1"])
    assert wrong.exit_code == 2
    wrong = CliRunner().invoke(app, [str(path), "--slots", "some"])
    assert wrong.exit_code == 2 and "such as 40%" in wrong.stderr
