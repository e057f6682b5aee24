"""Draft sets: against dictionaries, in the slot tables, and as what drafts may use."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import build, small_config
from hypothesis import given
from hypothesis import strategies as st

from moejax import decode, kernels, window
from moejax.errors import PolicyError
from moejax.kernels import build as build_native
from moejax.policies import residency
from moejax.policies.eviction import CLOCK_LIMIT, LRU, Access
from moejax.policies.foresight import Promote
from moejax.policies.pinning import RULES, DraftSet
from moejax.policies.policy import policy
from moejax.state import ExpertCache, ExpertStore, Forecast
from moejax.supply import Supply

needs_native = pytest.mark.skipif(build_native.library() is None, reason=build_native.status())
LAYERS, EXPERTS, TOKENS, TOP = 3, 6, 4, 2
SEED = st.integers(0, 2**32 - 1)


@dataclasses.dataclass
class Step:
    """One layer's run: the experts of each token by rank, and which tokens there are."""

    layer: int
    picks: np.ndarray  # [N, K]
    valid: np.ndarray  # [N]

    def access(self):
        tokens, last = np.zeros(EXPERTS, np.int32), np.full(EXPERTS, -1, np.int32)
        for place, expert in enumerate(self.picks.reshape(-1)):
            if self.valid[place // TOP]:
                tokens[expert] += 1
                last[expert] = place
        return Access(
            layer=jnp.int32(self.layer),
            scores=jnp.full((TOKENS, EXPERTS), jnp.nan),
            needed=jnp.asarray(tokens > 0),
            tokens=jnp.asarray(tokens),
            last_use=jnp.asarray(last),
            valid=jnp.asarray(self.valid),
        )


def drawn_steps(seed, length):
    """Layers in turn, tokens with a taste for some experts, a step without tokens now and then."""
    rng = np.random.default_rng(seed)
    taste = rng.dirichlet(np.full(EXPERTS, 0.7), LAYERS) + 1e-3
    steps = []
    for turn in range(length):
        likely = taste[turn % LAYERS] / taste[turn % LAYERS].sum()
        picks = [rng.choice(EXPERTS, TOP, replace=False, p=likely) for _ in range(TOKENS)]
        valid = rng.random(TOKENS) < rng.choice([0.0, 0.6, 1.0])
        steps.append(Step(turn % LAYERS, np.array(picks), valid))
    return steps


class Plain:
    """The description, with dictionaries."""

    def __init__(self, rule, size, decay):
        self.rule, self.size, self.decay = rule, size, decay
        self.use = {divmod(number, EXPERTS): 0.0 for number in range(LAYERS * EXPERTS)}
        self.pinned = {key: False for key in self.use}
        self.last = {key: -1 for key in self.use}
        self.time = 0

    def observe(self, step):
        used = {e: 0 for e in range(EXPERTS)}
        for token in np.flatnonzero(step.valid):
            for expert in step.picks[token]:
                used[expert] += 1
                self.last[step.layer, expert] = self.time
                self.time += 1
        if not step.valid.any():
            return
        kept = {"temporal": 0.0, "global": 1.0, "ema": self.decay}[self.rule]
        for expert, count in used.items():
            self.use[step.layer, expert] = self.use[step.layer, expert] * kept + count
        row = [self.use[step.layer, e] for e in range(EXPERTS)]
        best = sorted(range(EXPERTS), key=lambda e: (-row[e], e))[: self.size]
        for expert in range(EXPERTS):
            self.pinned[step.layer, expert] = expert in best and row[expert] > 0


OBSERVE = jax.jit(lambda rule, memory, access: rule.observe(memory, access))


def numbers(rule, size, decay=0.5, seed=0):
    return DraftSet(size=jnp.int32(size), decay=jnp.float32(decay), seed=jnp.int32(seed), rule=rule)


def same_order(keys, want):
    """Whether numbers are in the order of a list of tuples, ties included."""
    keys = np.asarray(keys).tolist()
    ranks = sorted(set(want))
    return [sorted(set(keys)).index(k) for k in keys] == [ranks.index(w) for w in want]


@given(
    seed=SEED,
    rule=st.sampled_from([rule for rule in RULES if rule != "random"]),
    size=st.integers(0, EXPERTS + 2),
    decay=st.sampled_from([0.0, 0.25, 0.5, 1.0]),
    length=st.integers(1, 30),
)
def test_sets_and_keys_are_those_of_the_description(seed, rule, size, decay, length):
    chosen, plain = numbers(rule, size, decay), Plain(rule, size, decay)
    memory = chosen.init(LAYERS, EXPERTS)
    assert not chosen.draft_set(memory).any()
    for step in drawn_steps(seed, length):
        memory = OBSERVE(chosen, memory, step.access())
        plain.observe(step)
        pinned = chosen.draft_set(memory)
        assert pinned.shape == (LAYERS * EXPERTS,) and pinned.dtype == bool
        assert pinned.tolist() == list(plain.pinned.values())
        want = [(plain.pinned[key], plain.last[key]) for key in plain.use]
        assert same_order(chosen.keys(memory, jnp.int32(step.layer)), want)


def test_rules_by_hand():
    steps = [Step(1, np.array(p), np.ones(4, bool)) for p in ([[0, 1]] * 4, [[2, 3]] * 4)]
    steps[1].valid[2:] = False  # uses 4, 4, 2, 2 in all
    sets = {}
    for rule, decay in (("temporal", 0.0), ("global", 0.0), ("ema", 0.25), ("ema", 0.75)):
        chosen = numbers(rule, 2, decay)
        memory = chosen.init(LAYERS, EXPERTS)
        for step in steps:
            memory = OBSERVE(chosen, memory, step.access())
        sets[rule, decay] = np.flatnonzero(chosen.draft_set(memory)) - EXPERTS
    assert sets["temporal", 0.0].tolist() == [2, 3]
    assert sets["global", 0.0].tolist() == [0, 1]
    assert sets["ema", 0.25].tolist() == [2, 3]
    assert sets["ema", 0.75].tolist() == [0, 1]


@pytest.mark.parametrize(("rule", "decay"), [("global", 0.5), ("ema", 1.0), ("ema", 0.9)])
def test_old_uses_count_as_much_as_new_ones_only_without_decay(rule, decay):
    chosen = numbers(rule, 2, decay)
    memory = chosen.init(LAYERS, EXPERTS)
    for first in (0, 2):
        step = Step(1, np.tile([first, first + 1], (4, 1)), np.ones(4, bool))
        memory = OBSERVE(chosen, memory, step.access())
    best = np.flatnonzero(chosen.draft_set(memory)) - EXPERTS
    assert best.tolist() == ([2, 3] if decay == 0.9 else [0, 1])


def test_a_random_set_is_that_of_its_seed():
    layers = 40
    sets = []
    for seed in (0, 0, 1):
        chosen = numbers("random", 2, seed=seed)
        memory = chosen.init(layers, EXPERTS)
        before = np.asarray(chosen.draft_set(memory)).reshape(layers, EXPERTS)
        assert (before.sum(axis=1) == 2).all()
        for step in drawn_steps(seed, 12):
            memory = chosen.observe(memory, step.access())
        assert np.array_equal(before.reshape(-1), chosen.draft_set(memory))
        sets.append(before)
    assert np.array_equal(sets[0], sets[1])
    assert not np.array_equal(sets[0], sets[2])
    assert len({row.tobytes() for row in sets[0]}) > 8  # each layer its own
    assert numbers("random", 99).init(2, EXPERTS).pinned.all()
    assert not numbers("random", 0).init(2, EXPERTS).pinned.any()


def test_a_random_set_favours_nobody():
    chosen = numbers("random", 2)
    share = np.asarray(chosen.init(3000, EXPERTS).pinned).reshape(-1, EXPERTS).mean(axis=0)
    np.testing.assert_allclose(share, 2 / EXPERTS, atol=0.04)


def test_a_random_set_leaves_last_before_and_after_use():
    chosen = numbers("random", 2)
    memory = chosen.init(LAYERS, EXPERTS)
    pinned = np.asarray(memory.pinned)
    for step in drawn_steps(3, 9):
        keys = np.asarray(chosen.keys(memory, jnp.int32(0)))
        assert keys[pinned].min() > keys[~pinned].max()
        memory = chosen.observe(memory, step.access())


def test_numbers_never_retrace():
    traces = []

    @jax.jit
    def observe(rule, memory, access):
        traces.append(rule)
        return rule.observe(memory, access)

    steps = drawn_steps(0, 6)
    found = set()
    for size, decay, seed in ((1, 0.5, 0), (3, 0.25, 1), (6, 0.0, 2)):
        chosen = numbers("ema", size, decay, seed)
        memory = chosen.init(LAYERS, EXPERTS)
        for step in steps:
            memory = observe(chosen, memory, step.access())
        found.add(int(chosen.draft_set(memory).sum()))
    assert len(traces) == 1 and len(found) == 3
    size = jax.jit(lambda rule: rule.init(LAYERS, EXPERTS).pinned.sum())
    assert [int(size(numbers("random", n))) for n in (0, 1, 4)] == [0, LAYERS, 4 * LAYERS]
    assert size._cache_size() == 1


def test_the_clock_does_not_bring_the_sets_and_the_others_together():
    chosen = numbers("temporal", 1)
    memory = chosen.init(LAYERS, EXPERTS)
    memory = OBSERVE(chosen, memory, Step(0, np.tile([0, 1], (4, 1)), np.ones(4, bool)).access())
    assert np.flatnonzero(memory.pinned).tolist() == [0]
    for clock in (CLOCK_LIMIT - 9, CLOCK_LIMIT - 8, CLOCK_LIMIT - 1):
        old = dataclasses.replace(memory.lru, clock=jnp.int32(clock))
        late = dataclasses.replace(memory, lru=old)
        step = Step(1, np.tile([4, 5], (4, 1)), np.ones(4, bool))
        late = OBSERVE(chosen, late, step.access())
        keys = np.asarray(chosen.keys(late, jnp.int32(1)))
        pinned = np.asarray(late.pinned)
        assert np.flatnonzero(pinned).tolist() == [0, EXPERTS + 4]
        assert keys[pinned].min() > keys[~pinned].max()
        assert keys[EXPERTS + 5] == keys[~pinned].max()  # the others by last use


def test_unknown_rules_are_refused():
    with pytest.raises(PolicyError, match="temporal, global, ema, random"):
        DraftSet(size=2, rule="hot")


BRING = jax.jit(residency.bring)


@given(seed=SEED, rule=st.sampled_from(RULES), slots=st.integers(2, 14), size=st.integers(0, 3))
def test_nobody_of_a_set_leaves_while_another_can(seed, rule, slots, size):
    """Verifications in the slot tables: pinned experts leave only where all others stay or left."""
    chosen = numbers(rule, size)
    memory, tables = chosen.init(LAYERS, EXPERTS), residency.empty(LAYERS * EXPERTS, 14)
    for step in drawn_steps(seed, 24):
        access = step.access()
        memory = OBSERVE(chosen, memory, access)
        pinned, old = np.asarray(memory.pinned), np.asarray(tables.owner)[:slots]
        own = step.layer * EXPERTS + np.flatnonzero(access.needed)
        order = jnp.arange(EXPERTS, dtype=jnp.int32)
        keys = chosen.keys(memory, access.layer)
        tables, copies = BRING(tables, keys, access.layer, access.needed, order, jnp.int32(slots))
        now = np.asarray(tables.owner)[:slots]
        gone = np.setdiff1d(old[old >= 0], now)
        stayed = np.setdiff1d(now[now >= 0], own)
        assert not np.isin(gone, own).any()
        if pinned[gone].any():
            assert pinned[stayed].all() and (now >= 0).all()
        if len(gone) and len(stayed):  # within both groups, the least recently used
            assert np.asarray(keys)[gone].max() < np.asarray(keys)[stayed].min()


@functools.cache
def deep():
    """4 layers of 16 experts."""
    return build(small_config(num_layers=4, moe_layers=(0, 1, 2, 3), num_experts=16))


def verified(evictor, slots, steps=12, width=3, seed=0):
    """After each step of several tokens: who is resident, the memory, and the picks of the step."""
    built = deep()
    made = dataclasses.replace(policy("lru"), evictor=evictor)
    fixed = (built.model, made, built.params, built.store)
    state = decode.init_state(built.model, made, built.store, slots=slots, context=128)
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        tokens = rng.integers(0, 61, (1, width)).astype(np.int32)
        state, out = decode.decode_step(*fixed, state, tokens, prefill=False)
        there = np.asarray(state.experts.residency.slot_of) >= 0
        yield there, jax.device_get(state.policy.evictor), np.asarray(out.trace.picks)


def most_used(picks, size):
    """Ids of each layer's most used experts of one step."""
    found = []
    for layer, row in enumerate(picks):
        counts = np.bincount(row[row >= 0], minlength=16)
        best = sorted(range(16), key=lambda e: (-counts[e], e))[:size]
        found += [layer * 16 + e for e in best if counts[e]]
    return found


@pytest.mark.parametrize(("size", "more"), [(1, 1), (1, 6), (3, 1), (3, 2)])
def test_what_a_step_used_most_is_there_for_the_next_draft(size, more):
    """As long as one slot is left: then the others take turns, though all need up to six."""
    chosen = numbers("temporal", size)
    for there, memory, picks in verified(chosen, 4 * size + more):
        assert np.flatnonzero(memory.pinned).tolist() == sorted(most_used(picks, size))
        assert there[memory.pinned].all()


def test_lru_alone_does_not_keep_it():
    runs = verified(LRU(), 10)
    missing = sum(int((~there[most_used(picks, 1)]).sum()) for there, _, picks in runs)
    assert missing > 0


def test_another_size_is_the_same_program():
    for _ in verified(numbers("temporal", 2), 12, steps=2):
        pass
    before = decode.decode_step._cache_size()
    for _ in verified(numbers("temporal", 5), 12, steps=3):
        pass
    assert decode.decode_step._cache_size() == before


@functools.cache
def finding(name):
    """`Supply.find`, jitted."""

    @jax.jit
    def run(tables, keys, wanted, order, pinned, layer, capacity):
        made = dataclasses.replace(policy("lru"), capacity=capacity)
        store = ExpertStore(records=jnp.zeros((LAYERS * EXPERTS, 4), jnp.uint16), layout=None)
        supply = Supply(made, store, layer, EXPERTS, True)
        shelf = supply.open(ExpertCache(pool=jnp.zeros((0, 4)), residency=tables))
        with kernels.using(name):
            shelf, copies = supply.find(shelf, keys, wanted, order, pinned)
        return shelf.residency, copies.count

    return run


@pytest.mark.parametrize("name", ["reference", pytest.param("native", marks=needs_native)])
@given(
    seed=SEED,
    capacity=st.integers(3, 9),
    share=st.sampled_from([0.2, 0.7, 1.0]),
    divided=st.booleans(),
    layer=st.integers(0, LAYERS - 1),
)
def test_slots_of_pinned_experts_are_taken_only_where_there_are_no_others(
    name, seed, capacity, share, divided, layer
):
    rng = np.random.default_rng(seed)
    tables = tables_with(rng, 9, divided=divided)
    owner, home = np.array(tables.owner), np.asarray(tables.home)
    pinned, wanted = rng.random(LAYERS * EXPERTS) < share, rng.random(EXPERTS) < 0.6
    keys = rng.permutation(LAYERS * EXPERTS).astype(np.int32)
    order = rng.permutation(EXPERTS).astype(np.int32)
    arrays = (tables, keys, wanted, order, pinned, jnp.int32(layer), jnp.int32(capacity))
    after, count = finding(name)(*arrays)
    ids = [layer * EXPERTS + e for e in order if wanted[e]]
    there = [e for e in ids if e in owner[:capacity]]
    absent = [e for e in ids if e not in there]
    free = [s for s in range(capacity) if home[s] in (-1, layer) and owner[s] not in there]
    unpinned = [s for s in free if owner[s] < 0 or not pinned[owner[s]]]
    free = unpinned or free
    number = min(len(free), len(absent))
    for expert in absent[:number]:
        slot = min(free, key=lambda s: (owner[s] >= 0, keys[owner[s]] if owner[s] >= 0 else s))
        owner[owner == expert] = -1
        owner[slot] = expert
        free.remove(slot)
    assert int(count) == number
    assert after.owner.tolist() == owner.tolist()
    assert np.array_equal(after.home, home)
    slot_of = np.asarray(after.slot_of)
    assert all(owner[slot_of[e]] == e for e in np.flatnonzero(slot_of >= 0))


def tables_with(rng, slots, divided=False):
    """Random tables, some slots empty."""
    tables = residency.empty(LAYERS * EXPERTS, slots, layers=LAYERS if divided else 0)
    slot_of, owner = np.array(tables.slot_of), np.array(tables.owner)
    for slot, home in enumerate(np.asarray(tables.home)):
        free = np.flatnonzero(slot_of < 0)
        free = free[(home < 0) | (free // EXPERTS == home)]
        if rng.random() < 0.8:
            owner[slot] = rng.choice(free)
            slot_of[owner[slot]] = slot
    return dataclasses.replace(tables, slot_of=jnp.asarray(slot_of), owner=jnp.asarray(owner))


@given(
    seed=SEED,
    capacity=st.integers(1, 9),
    pins=st.booleans(),
    ahead=st.booleans(),
    layer=st.integers(0, LAYERS - 1),
)
def test_a_draft_may_use_who_is_there_to_stay(seed, capacity, pins, ahead, layer):
    rng = np.random.default_rng(seed)
    tables = tables_with(rng, 9)
    evictor = numbers("temporal", 2) if pins else LRU()
    made = dataclasses.replace(policy("lru"), evictor=evictor, capacity=jnp.int32(capacity))
    if ahead:
        made = dataclasses.replace(made, foresight=Promote())
    memory = made.init(LAYERS, EXPERTS)
    pinned, fresh = rng.random((2, LAYERS * EXPERTS)) < 0.4
    if pins:
        replaced = dataclasses.replace(memory.evictor, pinned=jnp.asarray(pinned))
        memory = dataclasses.replace(memory, evictor=replaced)
        assert np.array_equal(window.draft_set(made, memory), pinned)
    else:
        assert window.draft_set(made, memory) is None
    if ahead:
        book = Forecast(wanted=jnp.asarray(rng.random(18) < 0.5), fresh=jnp.asarray(fresh))
        memory = dataclasses.replace(memory, forecast=book)
    cache = ExpertCache(pool=jnp.zeros((9, 4)), residency=tables)
    got = window.draftable(made, cache, memory, jnp.int32(layer), EXPERTS)
    for expert in range(EXPERTS):
        number = layer * EXPERTS + expert
        there = number in np.asarray(tables.owner)[:capacity]
        want = there and (pinned[number] or not pins) and not (ahead and fresh[number])
        assert bool(got[expert]) == want
