"""Every evictor against a plain simulator written from its rule, over random accesses."""

import copy
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moejax.policies import residency
from moejax.policies.eviction import CLOCK_LIMIT, LRU, Access
from moejax.policies.evictors import (
    LFU,
    ClassLRU,
    DecayedLFU,
    LeastStale,
    ScoreEMA,
    ScoreWindow,
    TwoQueue,
)

LAYERS, EXPERTS, CHOSEN, STEPS = 3, 5, 2, 24
IDS = LAYERS * EXPERTS
WINDOW = 4  # rows of the score window: few enough to go round


@dataclasses.dataclass
class Step:
    """One layer's step: who was scored and picked, token by token."""

    layer: int
    scores: list  # [N][E]
    picks: list  # [N][K]
    valid: list  # [N]

    @property
    def tokens(self):
        return [t for t, valid in enumerate(self.valid) if valid]

    @property
    def used(self):
        """Ids in order of last use, each once."""
        order = []
        for t in self.tokens:
            for expert in self.picks[t]:
                one = self.layer * EXPERTS + expert
                order = [other for other in order if other != one] + [one]
        return order

    @property
    def mean(self):
        """Mean score per expert in float64."""
        return [
            sum(float(self.scores[t][e]) for t in self.tokens) / len(self.tokens)
            for e in range(EXPERTS)
        ]

    @property
    def access(self):
        picks = [(t * CHOSEN + k, e) for t in self.tokens for k, e in enumerate(self.picks[t])]
        last, count = [-1] * EXPERTS, [0] * EXPERTS
        for position, expert in picks:
            last[expert], count[expert] = position, count[expert] + 1
        return Access(
            layer=jnp.int32(self.layer),
            scores=jnp.array(self.scores, jnp.float32),
            needed=jnp.array([n > 0 for n in count]),
            tokens=jnp.array(count, jnp.int32),
            last_use=jnp.array(last, jnp.int32),
            valid=jnp.array(self.valid),
        )


def draw_steps(seed, tokens, cyclic=False, layers=LAYERS):
    """Steps with padding (sometimes nothing else), repeated picks and ties.

    Scores are multiples of 3 / 64, so that means over 1 to 4 steps of 1, 2 or 4 tokens are exact.
    """
    rng = np.random.default_rng(seed)
    favourite = rng.permutation(EXPERTS) + 1.0
    steps = []
    for i in range(STEPS):
        real = rng.choice([n for n in (0, 1, 2, 4) if n <= tokens])
        valid = rng.permutation(np.arange(tokens) < real)
        scores = rng.integers(0, 9, (tokens, EXPERTS)) * 3 / 64
        scores[~valid] = rng.choice([1e9, np.nan])  # nobody may look here
        picks = [
            rng.choice(EXPERTS, CHOSEN, replace=False, p=favourite / favourite.sum())
            for _ in range(tokens)
        ]
        layer = i % layers if cyclic else int(rng.integers(0, layers))
        steps.append(
            Step(layer, scores.tolist(), [list(map(int, p)) for p in picks], valid.tolist())
        )
    return steps


class Plain:
    """What simulators share: all uses so far, in order."""

    def __init__(self):
        self.history, self.layer = [], LAYERS - 1

    def observe(self, step):
        self.layer = step.layer
        if step.tokens:
            self.step(step)
        self.history += step.used

    def step(self, step):
        pass

    def last(self, one):
        """Position of the last use; experts never used come before all others, in id order."""
        uses = [i for i, other in enumerate(self.history) if other == one]
        return uses[-1] if uses else one - IDS

    def distance(self, one):
        """How many other experts were used since the last use of this one; None = never used."""
        if one not in self.history:
            return None
        return len(set(self.history[self.last(one) + 1 :]) - {one})


class PlainWindow(Plain):
    def __init__(self, n):
        super().__init__()
        self.n, self.means = n, {layer: [] for layer in range(LAYERS)}

    def step(self, step):
        self.means[step.layer].append(step.mean)

    def key(self, one):
        layer, expert = divmod(one, EXPERTS)
        recent = self.means[layer][-self.n :]
        return sum(m[expert] for m in recent) / len(recent) if recent else -np.inf


class PlainLFU(Plain):
    def __init__(self):
        super().__init__()
        self.count = {}

    def step(self, step):
        for one in step.used:
            self.count[one] = self.count.get(one, 0) + 1

    def key(self, one):
        return self.count.get(one, 0), self.last(one)


class PlainDecayed(Plain):
    def __init__(self, decay):
        super().__init__()
        self.decay, self.used_at, self.steps = decay, {}, dict.fromkeys(range(LAYERS), 0)

    def step(self, step):
        self.steps[step.layer] += 1
        for one in step.used:
            self.used_at.setdefault(one, []).append(self.steps[step.layer])

    def key(self, one):
        now = self.steps[one // EXPERTS]
        return sum(self.decay ** (now - then) for then in self.used_at.get(one, []))


class PlainEMA(Plain):
    def __init__(self, decay, top=EXPERTS):
        super().__init__()
        self.decay, self.top, self.counted = decay, top, {layer: [] for layer in range(LAYERS)}

    def step(self, step):
        best = sorted(range(EXPERTS), key=lambda e: (-step.mean[e], e))[: self.top]
        self.counted[step.layer].append(
            [score if e in best else 0.0 for e, score in enumerate(step.mean)]
        )

    def key(self, one):
        layer, expert = divmod(one, EXPERTS)
        newest_first = self.counted[layer][::-1]
        return sum(
            (1 - self.decay) * self.decay**age * scores[expert]
            for age, scores in enumerate(newest_first)
        )


class PlainClasses(Plain):
    def __init__(self, period):
        super().__init__()
        self.period, self.steps, self.count = period, dict.fromkeys(range(LAYERS), 0), {}

    def step(self, step):
        self.steps[step.layer] += 1
        if self.steps[step.layer] % self.period == 0:
            for one in self.count:
                if one // EXPERTS == step.layer:
                    self.count[one] //= 2
        for one in step.used:
            self.count[one] = self.count.get(one, 0) + 1

    def key(self, one):
        level, count = 0, self.count.get(one, 0)
        while count >= 2**level:
            level += 1
        return level, self.last(one)


class PlainQueues(Plain):
    def __init__(self, window):
        super().__init__()
        self.window, self.again = window, {}

    def near(self, one):
        return self.distance(one) is not None and self.distance(one) < self.window

    def step(self, step):
        near = {one: self.near(one) for one in step.used}
        self.again |= near

    def key(self, one):
        return self.again.get(one, False) and self.near(one), self.last(one)


class PlainStale(Plain):
    def key(self, one):
        layer, wait = self.layer, 0
        while True:
            layer, wait = (layer + 1) % LAYERS, wait + 1
            if layer == one // EXPERTS:
                return -wait, self.last(one)


class PlainLRU(Plain):
    def key(self, one):
        return self.last(one) if one in self.history else -1


f32, i32 = jnp.float32, jnp.int32
CASES = {
    "window-1": (ScoreWindow(n=i32(1), size=WINDOW), PlainWindow(1)),
    "window-3": (ScoreWindow(n=i32(3), size=WINDOW), PlainWindow(3)),
    "window-full": (ScoreWindow(n=i32(WINDOW), size=WINDOW), PlainWindow(WINDOW)),
    "window-beyond": (ScoreWindow(n=i32(99), size=WINDOW), PlainWindow(WINDOW)),
    "window-never-full": (ScoreWindow(n=i32(STEPS), size=2 * STEPS), PlainWindow(STEPS)),
    "lfu": (LFU(), PlainLFU()),
    "decayed": (DecayedLFU(decay=f32(0.5)), PlainDecayed(0.5)),
    "decay-none": (DecayedLFU(decay=f32(1)), PlainDecayed(1)),
    "decay-all": (DecayedLFU(decay=f32(0)), PlainDecayed(0)),
    "ema": (ScoreEMA(decay=f32(0.75)), PlainEMA(0.75)),
    "ema-top": (ScoreEMA(decay=f32(0.75), top=i32(2)), PlainEMA(0.75, 2)),
    "classes": (ClassLRU(period=i32(5)), PlainClasses(5)),
    "classes-always": (ClassLRU(period=i32(1)), PlainClasses(1)),
    "classes-never": (ClassLRU(period=i32(2**31 - 1)), PlainClasses(2**31 - 1)),
    "queues-0": (TwoQueue(window=i32(0)), PlainQueues(0)),
    "queues-1": (TwoQueue(window=i32(1)), PlainQueues(1)),
    "queues-6": (TwoQueue(window=i32(6)), PlainQueues(6)),
    "queues-all": (TwoQueue(window=i32(IDS)), PlainQueues(IDS)),
    "stale": (LeastStale(), PlainStale()),
    "lru": (LRU(), PlainLRU()),
}
ROUNDED = {"ema", "ema-top", "window-never-full"}
EACH = ["window-3", "lfu", "decayed", "ema-top", "classes", "queues-6", "stale", "lru"]
LEAVES = {
    "window-1": ("n", [1, 2, 4]),
    "decayed": ("decay", [0.0, 0.5, 1.0]),
    "ema": ("decay", [0.25, 0.75]),
    "ema-top": ("top", [1, 2, 5]),
    "classes": ("period", [1, 3, 7]),
    "queues-6": ("window", [0, 3, 15]),
}


def stacked(steps):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *[step.access for step in steps])


def run_steps(evictor, accesses):
    """[STEPS, L * E] keys after each step."""

    def one(memory, access):
        memory = evictor.observe(memory, access)
        return memory, evictor.keys(memory, access.layer)

    return jax.lax.scan(one, evictor.init(LAYERS, EXPERTS), accesses)[1]


compiled_steps = jax.jit(run_steps)
sequences = given(
    seed=st.integers(0, 2**16),
    tokens=st.sampled_from([1, 4]),
    cyclic=st.booleans(),
    layers=st.sampled_from([2, LAYERS]),  # with 2, the last layer is never seen
)


@pytest.mark.parametrize("name", CASES)
@sequences
def test_keys_equal_the_rule(name, seed, tokens, cyclic, layers):
    evictor, plain = CASES[name][0], copy.deepcopy(CASES[name][1])
    steps = draw_steps(seed, tokens, cyclic, layers)
    keys = np.asarray(compiled_steps(evictor, stacked(steps)))
    for step, got in zip(steps, keys, strict=True):
        plain.observe(step)
        want = [plain.key(one) for one in range(IDS)]
        if isinstance(want[0], tuple):
            assert len(set(got.tolist())) == IDS
            assert np.argsort(got).tolist() == sorted(range(IDS), key=lambda one: want[one])
        elif name in ROUNDED:
            np.testing.assert_allclose(got, want, rtol=2e-6)
        elif name == "lru":  # times: only their order is the rule
            assert (
                np.argsort(got, kind="stable").tolist() == np.argsort(want, kind="stable").tolist()
            )
        else:
            assert np.array_equal(got, np.array(want, np.float32))


@pytest.mark.parametrize("name", EACH)
def test_a_step_without_tokens_changes_nothing(name):
    evictor = CASES[name][0]
    memory = evictor.init(LAYERS, EXPERTS)
    busy = [step for step in draw_steps(3, 4) if step.tokens]
    for step in busy[:5]:
        memory = evictor.observe(memory, step.access)
    idle = dataclasses.replace(busy[4], valid=[False] * 4)  # of the layer that ran last
    after = evictor.observe(memory, idle.access)
    assert jax.tree.all(jax.tree.map(np.array_equal, memory, after))


def test_experts_of_a_layer_never_seen_leave_first():
    scores = [[0.0, -1.0, 0.5, 0.0, 0.25]]
    step = Step(1, scores, [[0, 1]], [True])
    for name, (evictor, _) in CASES.items():
        if name == "stale":
            continue
        memory = evictor.observe(evictor.init(LAYERS, EXPERTS), step.access)
        keys = np.asarray(evictor.keys(memory, jnp.int32(1)))
        seen, unseen = keys[EXPERTS : 2 * EXPERTS], np.delete(keys, np.s_[EXPERTS : 2 * EXPERTS])
        used = seen[:2] if "window" not in name and "ema" not in name else seen[2:3]
        assert unseen.max() < used.min(), name
    window = ScoreWindow(n=jnp.int32(2), size=WINDOW)
    keys = window.keys(window.observe(window.init(LAYERS, EXPERTS), step.access), jnp.int32(1))
    assert np.isneginf(keys[:EXPERTS]).all() and np.isfinite(keys[EXPERTS : 2 * EXPERTS]).all()


def test_the_layer_that_has_just_run_leaves_first_in_a_prefetch_too():
    evictor = LeastStale()
    memory = evictor.observe(evictor.init(3, 5), draw_steps(0, 1, cyclic=True)[1].access)
    for layer in range(3):
        keys = np.asarray(evictor.keys(memory, jnp.int32(layer))).reshape(3, 5)
        assert keys[1].max() < keys[0].min() and keys[0].max() < keys[2].min()


def test_a_scan_does_not_drive_out_experts_in_steady_use():
    steps = [Step(0, [[0.0] * 5], [[0, 1]], [True])] * 2
    steps += [Step(layer, [[0.0] * 5], [[a, a + 1]], [True]) for layer in (1, 2) for a in (0, 2)]
    steady = {}
    for name in ("queues-all", "lru"):
        keys = np.asarray(compiled_steps(CASES[name][0], stacked(steps)))[-1]
        scanned = [layer * 5 + e for layer in (1, 2) for e in range(4)]
        steady[name] = keys[:2].min() > keys[scanned].max()
    assert steady == {"queues-all": True, "lru": False}


@pytest.mark.parametrize("name", LEAVES)
def test_numbers_never_retrace_and_can_be_mapped_over(name):
    field, values = LEAVES[name]
    evictor, accesses = CASES[name][0], stacked(draw_steps(11, 4))
    dtype = getattr(evictor, field).dtype
    traces = []

    @jax.jit
    def observed(evictor, accesses):
        traces.append(1)
        return run_steps(evictor, accesses)

    def at(value):
        return dataclasses.replace(evictor, **{field: value})

    alone = [np.asarray(observed(at(jnp.asarray(v, dtype)), accesses)) for v in values]
    assert len(traces) == 1
    assert any(not np.array_equal(alone[0], other) for other in alone[1:])
    mapped = jax.vmap(lambda value: run_steps(at(value), accesses))(jnp.array(values, dtype))
    np.testing.assert_allclose(mapped, np.stack(alone), rtol=1e-6)
    exact = evictor.init(LAYERS, EXPERTS)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(exact))


@functools.partial(jax.jit, static_argnames="slots")
def run_tables(evictor, accesses, slots, capacity):
    """Tables after each step of a layer that brings in what it needs."""

    def one(carry, access):
        tables, memory = carry
        memory = evictor.observe(memory, access)
        keys = evictor.keys(memory, access.layer)
        tables, _ = residency.bring(
            tables, keys, access.layer, access.needed, jnp.arange(EXPERTS), capacity
        )
        return (tables, memory), (tables.owner, tables.slot_of)

    start = residency.empty(IDS, slots), evictor.init(LAYERS, EXPERTS)
    return jax.lax.scan(one, start, accesses)[1]


@pytest.mark.parametrize("name", EACH)
@given(seed=st.integers(0, 2**16), capacity=st.integers(EXPERTS, 9), cyclic=st.booleans())
def test_the_tables_stay_inverse_and_the_least_worth_leave(name, seed, capacity, cyclic):
    evictor, plain = CASES[name][0], copy.deepcopy(CASES[name][1])
    steps = draw_steps(seed, 4, cyclic)
    owners, slots_of = run_tables(evictor, stacked(steps), 9, capacity)
    before = set()
    for step, owner, slot_of in zip(steps, np.asarray(owners), np.asarray(slots_of), strict=True):
        plain.observe(step)
        assert [int(owner[s]) for s in slot_of if s >= 0] == np.flatnonzero(slot_of >= 0).tolist()
        assert (owner >= 0).sum() == (slot_of >= 0).sum() <= capacity
        now, needed = set(owner[owner >= 0].tolist()), set(step.used)
        assert needed <= now <= before | needed
        left, stay = before - now, (before & now) - needed
        assert not left or len(now) == capacity
        if left and stay:
            slack = 1e-6 if name in ROUNDED else 0
            worst, best = max(map(plain.key, left)), min(map(plain.key, stay))
            assert worst <= best if isinstance(worst, tuple) else worst <= best + slack
        before = now


def use(*experts, layer=0):
    picks = [[e, e] for e in experts]
    return Step(layer, [[0.0] * EXPERTS] * len(picks), picks, [True] * len(picks)).access


def order(evictor, memory):
    return np.argsort(evictor.keys(memory, jnp.int32(0)), kind="stable").tolist()


def test_lfu_halves_its_counts_before_a_key_wraps():
    evictor = LFU()
    limit = 2**31 // IDS - 1
    memory = evictor.init(LAYERS, EXPERTS)
    count = np.zeros(IDS, np.int32)
    count[[0, 1, 2, 7]] = limit, limit - 1, 9, limit
    memory = dataclasses.replace(memory, count=jnp.array(count))
    assert order(evictor, memory)[-4:] == [2, 1, 0, 7]
    for again in (1, 0):
        keys = evictor.keys(memory, jnp.int32(0))
        assert np.array_equal(keys, np.asarray(memory.count, np.int64) * IDS + memory.recency)
        assert (np.asarray(keys) >= 0).all()
        memory = evictor.observe(memory, use(again))
    assert int(memory.count[0]) == (limit + 1) // 2 and int(memory.count[2]) == 4
    assert order(evictor, memory)[-4:] == [2, 7, 1, 0]


def test_classes_hold_at_their_limits():
    evictor = ClassLRU(period=jnp.int32(2**31 - 1))
    memory = evictor.init(LAYERS, EXPERTS)
    memory = dataclasses.replace(
        memory,
        count=memory.count.at[:3].set(jnp.array([CLOCK_LIMIT, CLOCK_LIMIT - 1, 1])),
        steps=memory.steps.at[0].set(CLOCK_LIMIT),
    )
    for _ in range(3):
        memory = evictor.observe(memory, use(0, 1))
    assert memory.count[:3].tolist() == [CLOCK_LIMIT, CLOCK_LIMIT, 1]
    assert memory.steps.tolist() == [CLOCK_LIMIT, 0, 0]
    assert order(evictor, memory)[-3:] == [2, 0, 1]
    big = evictor.init(64, 1024)
    big = dataclasses.replace(big, count=big.count.at[5].set(CLOCK_LIMIT))
    assert order(evictor, big)[-1] == 5
    memory = ClassLRU(period=jnp.int32(9)).observe(memory, use(2))
    assert memory.count[:3].tolist() == [CLOCK_LIMIT // 2, CLOCK_LIMIT // 2, 1]


@pytest.mark.parametrize("name", ["lfu", "classes", "queues-6", "stale"])
def test_recency_stays_a_permutation(name):
    evictor = CASES[name][0]
    memory = evictor.init(LAYERS, EXPERTS)
    for step in draw_steps(5, 4):
        memory = evictor.observe(memory, step.access)
        rows = np.asarray(memory.recency).reshape(-1, EXPERTS if name == "stale" else IDS)
        assert all(sorted(row) == list(range(len(row))) for row in rows)
