"""MoE-SpAc's estimator and balancer against plain loops written from their description."""

import csv
import dataclasses
import functools
import itertools
import lzma
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import Bounds, LinearConstraint, milp

from moejax.errors import PolicyError
from moejax.policies.eviction import Access
from moejax.policies.utility import (
    MAX_CAP,
    STAMPS,
    Balance,
    Costs,
    SoftUtility,
    Utility,
    UtilityMemory,
    Work,
    at_least,
    balance,
)
from moejax.state import array_fields

F = np.float32
LAYERS, EXPERTS, TOKENS, CHOSEN, STEPS = 3, 6, 9, 2, 30
TRACE = "data/traces/bigmoeonedge/qwen.route.csv.xz"


@dataclasses.dataclass
class Step:
    """One layer's step: whom each token picked, whether the queue is emptied after it."""

    layer: int
    picks: np.ndarray  # [N, K]
    valid: np.ndarray  # [N]
    drain: int = 0  # threshold, 0 = not

    @property
    def counts(self):
        """How many tokens use each expert."""
        chosen = self.picks[self.valid].reshape(-1)
        return np.array([int((chosen == e).sum()) for e in range(EXPERTS)])

    @property
    def used(self):
        """Experts of this layer in the order of their uses."""
        return [int(e) for t in np.flatnonzero(self.valid) for e in self.picks[t]]

    def access(self, scores=None, experts=EXPERTS):
        last = np.full(experts, -1)
        count = np.zeros(experts, int)
        for t in np.flatnonzero(self.valid):
            for k, e in enumerate(self.picks[t]):
                last[e], count[e] = t * self.picks.shape[1] + k, count[e] + 1
        scores = np.zeros((len(self.picks), experts)) if scores is None else scores
        return Access(
            layer=np.int32(self.layer),
            scores=F(scores),
            needed=count > 0,
            tokens=np.int32(count),
            last_use=np.int32(last),
            valid=self.valid,
        )


def draw_steps(seed, most=TOKENS):
    """Layers in turn, steps of 0 (padding alone) to `most` tokens, favourites that change."""
    rng = np.random.default_rng(seed)
    steps, real = [], most
    taste = rng.dirichlet(np.full(EXPERTS, 0.5), size=LAYERS)
    for i in range(STEPS):
        layer = i % LAYERS
        if layer == 0:  # all layers of a step see the same tokens
            real = int(
                rng.choice([0, 1, 2, most // 2, most, most], p=[0.1, 0.1, 0.1, 0.2, 0.2, 0.3])
            )
            valid = rng.permutation(np.arange(TOKENS) < real)
        if rng.random() < 0.2:
            taste[layer] = rng.dirichlet(np.full(EXPERTS, 0.5))
        p = (taste[layer] + 0.01) / (taste[layer] + 0.01).sum()
        picks = np.array([rng.choice(EXPERTS, CHOSEN, replace=False, p=p) for _ in range(TOKENS)])
        drain = int(rng.integers(1, 4)) if rng.random() < 0.3 else 0
        steps.append(Step(layer, picks, valid, drain))
    return steps


# the oracle: dictionaries and loops, one expert at a time


class Machine:
    """One small state machine per (layer, expert)."""

    def __init__(self, numbers, calibrate, after_use, layers=LAYERS, experts=EXPERTS):
        self.numbers, self.calibrate, self.after_use = numbers, calibrate, after_use
        self.layers, self.experts = layers, experts
        self.level = {(layer, e): 0 for layer in range(layers) for e in range(experts)}
        self.status = dict.fromkeys(self.level, 0)
        self.gathered = {layer: [] for layer in range(layers)}  # picks, token by token
        self.boundary = dict.fromkeys(range(layers), float(numbers["up"]))
        self.history = []

    def observe(self, step):
        tokens = [list(step.picks[t]) for t in np.flatnonzero(step.valid)]
        if not tokens:
            return
        layer = step.layer
        self.gathered[layer] += tokens
        if len(self.gathered[layer]) >= self.numbers["window"]:
            self.close(layer, self.gathered[layer])
            self.gathered[layer] = []
        if layer == 0:  # a new step: whatever was demoted in the last one is back
            self.status = dict(self.level)
        for one in [(layer, e) for e in range(self.experts)]:
            self.status[one] = 0 if self.after_use == "demote" else self.level[one]
        self.history += [(layer, e) for e in step.used]

    def close(self, layer, window):
        n = len(window)
        counts = [sum(e in picks for picks in window) for e in range(self.experts)]
        hot = [e for e in range(self.experts) if self.level[layer, e] >= 1]
        up = max(1, round(self.boundary[layer] * n / 9))
        for e, c in enumerate(counts):
            s = self.level[layer, e]
            if c - s >= up:
                s = s + 1
            elif s - c >= self.numbers["down"]:
                s = s - 1
            self.level[layer, e] = max(0, min(s, self.numbers["cap"]))
        if self.calibrate:
            precision = sum(counts[e] > 0 for e in hot) / len(hot) if hot else 1.0
            moved = self.boundary[layer] + self.numbers["rate"] * (
                self.numbers["target"] - precision
            )
            self.boundary[layer] = min(max(moved, 1.0), 9.0)

    def drain(self, threshold):
        for one, s in self.level.items():
            if s >= 1 and s >= threshold:
                self.status[one] = max(self.status[one], s)

    def leaving(self):
        """[L * E] sortable: status, then how recently used; equal = never used."""
        last = {one: i for i, one in enumerate(self.history)}
        return [(self.status[one], last.get(one, -1)) for one in sorted(self.level)]


@functools.partial(jax.jit, static_argnums=2)
def run(utility, steps, shape):
    """All steps in turn; what is seen after each."""

    def one(memory, step):
        access, threshold = step
        memory = utility.observe(memory, access)
        drained = utility.drain(memory, threshold)
        memory = jax.tree.map(lambda a, b: jnp.where(threshold > 0, a, b), drained, memory)
        seen = {
            "keys": utility.keys(memory, access.layer),
            "levels": utility.levels(memory),
            "up": memory.up,
        }
        return memory, seen

    return jax.lax.scan(one, utility.init(*shape), steps)


def stacked(steps, **kwargs):
    accesses = [step.access(**kwargs) for step in steps]
    accesses = jax.tree.map(lambda *leaves: jnp.asarray(np.stack(leaves)), *accesses)
    return accesses, jnp.asarray([step.drain for step in steps], jnp.int32)


def ordered(values):
    """Positions in the order of values, equal where they are."""
    places = {value: place for place, value in enumerate(sorted(set(values)))}
    return [places[value] for value in values]


numbers = st.fixed_dictionaries(
    {
        "cap": st.integers(0, 8),
        "up": st.sampled_from([1.0, 2.0, 3.07, 4.5, 5.0, 9.0]),
        "down": st.integers(1, 3),
        "window": st.sampled_from([0, 1, 4, 9]),
        "target": st.sampled_from([0.837, 0.519]),
        "rate": st.sampled_from([0.731, 2.213]),
    }
)
KINDS = {"cap": jnp.int32, "down": jnp.int32, "window": jnp.int32}


def made(values, **fields):
    leaves = {name: KINDS.get(name, jnp.float32)(value) for name, value in values.items()}
    return Utility(**leaves, **fields)


more = settings(max_examples=2 * settings.default.max_examples)


@pytest.mark.parametrize("calibrate", [False, True])
@pytest.mark.parametrize("after_use", ["demote", "restore"])
@more
@given(seed=st.integers(0, 2**20), values=numbers, most=st.sampled_from([TOKENS, 1]))
def test_it_is_the_machine_of_the_description(calibrate, after_use, seed, values, most):
    steps = draw_steps(seed, most)
    fields = {"calibrate": calibrate, "after_use": after_use}
    _, seen = run(made(values, **fields), stacked(steps), (LAYERS, EXPERTS))
    seen = jax.tree.map(np.asarray, seen)
    assert (seen["up"] is not None) == calibrate
    machine = Machine(values, **fields)
    for i, step in enumerate(steps):
        machine.observe(step)
        if step.drain:
            machine.drain(step.drain)
        assert seen["levels"][i].tolist() == list(machine.level.values())
        assert ordered(seen["keys"][i].tolist()) == ordered(machine.leaving())
        if calibrate:
            np.testing.assert_allclose(seen["up"][i], list(machine.boundary.values()), rtol=1e-5)


def counted(*counts, tokens=9, layer=0):
    """Steps of one layer in which expert 0 is used by so many tokens, expert 1 by the others."""
    return [
        Step(layer, np.where(np.arange(TOKENS) < c, 0, 1)[:, None], np.arange(TOKENS) < tokens)
        for c in counts
    ]


@pytest.mark.parametrize(
    ("counts", "levels"),
    [
        ([4, 5, 6, 7, 8, 9, 9, 9], [0, 1, 2, 3, 4, 5, 5, 5]),  # level s is entered with s + 4
        ([9, 9, 5, 2, 1, 1, 0], [1, 2, 2, 2, 1, 1, 0]),  # kept from s to s + 4
        ([5, 5, 1, 0, 0], [1, 1, 1, 0, 0]),
    ],
)
def test_the_released_numbers(counts, levels):
    steps = counted(*counts)
    _, seen = run(made({}), stacked(steps), (1, EXPERTS))
    assert seen["levels"][:, 0].tolist() == levels


@pytest.mark.parametrize(("tokens", "needed"), [(1, 1), (2, 1), (3, 2), (5, 3), (7, 4), (9, 5)])
def test_the_boundary_scales_with_the_window(tokens, needed):
    for count in range(tokens + 1):
        steps = counted(count, tokens=tokens)
        _, seen = run(made({}), stacked(steps), (1, EXPERTS))
        assert seen["levels"][0, 0] == (count >= needed)


def test_demoted_experts_leave_first_until_the_queue_or_the_next_step_restores_them():
    """Two layers whose expert 0 is hot; expert 1 of layer 1 is cold but used last of all."""
    utility = made({}, after_use="demote")
    memory = utility.init(2, EXPERTS)
    hot = [0, EXPERTS]  # expert 0 of both layers

    def status(memory):
        return (np.asarray(utility.keys(memory, jnp.int32(0)))[hot] // STAMPS).tolist()

    for layer, expected in ((0, [0, 0]), (1, [0, 0]), (0, [0, 1]), (1, [0, 0])):
        memory = utility.observe(memory, counted(9, layer=layer)[0].access())
        assert status(memory) == expected
    assert utility.levels(memory)[jnp.array(hot)].tolist() == [2, 2]
    assert status(utility.drain(memory, 3)) == [0, 0]
    drained = utility.drain(memory, 2)
    assert status(drained) == [2, 2]
    again = utility.observe(drained, counted(9, layer=0)[0].access())
    assert status(again) == [0, 2]
    kept = dataclasses.replace(utility, after_use="restore")
    assert (np.asarray(kept.keys(memory, 0))[hot] // STAMPS).tolist() == [2, 2]


@pytest.mark.parametrize("window", [0, 12])
def test_a_step_without_tokens_is_none(window):
    utility = made({"window": window}, calibrate=True)
    memory = utility.init(2, EXPERTS)
    for layer in (0, 1, 0):
        memory = utility.observe(memory, counted(9, layer=layer)[0].access())
    memory = utility.drain(memory, 1)
    idle = counted(9, tokens=0, layer=1)[0].access(np.full((TOKENS, EXPERTS), np.nan))
    after = utility.observe(memory, idle)
    for name in array_fields(UtilityMemory):
        assert np.array_equal(getattr(memory, name), getattr(after, name)), name


def test_short_steps_are_gathered_into_the_window_that_one_long_step_would_be():
    rng = np.random.default_rng(5)
    windows = [draw_steps(seed)[0] for seed in rng.integers(0, 99, 12)]
    windows = [dataclasses.replace(step, valid=np.ones(TOKENS, bool)) for step in windows]
    singles = [
        dataclasses.replace(step, valid=np.arange(TOKENS) == t)
        for step in windows
        for t in range(TOKENS)
    ]
    long = run(made({"up": 2.0}), stacked(windows), (LAYERS, EXPERTS))[1]["levels"]
    short = run(made({"up": 2.0, "window": 9}), stacked(singles), (LAYERS, EXPERTS))[1]["levels"]
    assert long.max() > 1
    assert (short[TOKENS - 1 :: TOKENS] == long).all()
    assert (short[TOKENS - 2 :: TOKENS][1:] == long[:-1]).all()


def test_calibration_settles_at_the_wanted_precision():
    """Experts that come and go: the higher the boundary, the surer those that are hot."""
    rng = np.random.default_rng(0)
    rate = rng.uniform(0, 1, 64)
    steps = []
    for _ in range(600):
        rate = np.clip(rate + rng.normal(scale=0.15, size=64), 0, 0.9)
        uses = rng.random((TOKENS, 64)) < rate**2
        count = uses.sum(axis=0)
        access = Step(0, np.zeros((TOKENS, 1), int), np.ones(TOKENS, bool)).access(experts=64)
        steps.append(dataclasses.replace(access, needed=count > 0, tokens=np.int32(count)))
    accesses = jax.tree.map(lambda *leaves: jnp.asarray(np.stack(leaves)), *steps)
    used = np.asarray(accesses.needed)
    found = []
    for target in (0.5, 0.87, 0.94):
        utility = made({"target": target, "rate": 0.5}, calibrate=True)
        _, seen = run(utility, (accesses, jnp.zeros(600, jnp.int32)), (1, 64))
        hot = np.asarray(seen["levels"]) > 0
        each = [used[i + 1][hot[i]].mean() if hot[i].any() else 1.0 for i in range(100, 599)]
        found.append((np.mean(each), float(seen["up"][100:].mean())))
    assert found[0][1] == 1.0  # the lowest boundary is surer than that
    assert abs(found[1][0] - 0.87) < 0.01 and abs(found[2][0] - 0.94) < 0.01
    assert found[1][1] + 0.5 < found[2][1]


def test_the_clock_is_set_back_before_stamps_outgrow_the_key():
    utility = made({"cap": MAX_CAP}, after_use="restore")
    memory = utility.init(1, EXPERTS)
    memory = dataclasses.replace(
        memory,
        clock=jnp.int32(STAMPS - 12),
        last_used=jnp.array([[7, STAMPS - 15, STAMPS - 14, STAMPS // 2, 0, 0]], jnp.int32),
        level=jnp.array([[0, 7, 8, 8, 8, 0]], jnp.int32),
    )
    step = Step(0, np.array([[5, 3], [3, 1]] * 4 + [[1, 5]]), np.ones(9, bool))
    after = utility.observe(memory, step.access())
    assert after.clock < STAMPS // 2 + 20
    keys = np.asarray(utility.keys(after, 0))
    assert keys.min() >= 0  # no key wrapped
    assert np.argsort(np.asarray(after.last_used)[0], kind="stable").tolist() == [0, 4, 2, 3, 1, 5]
    assert (keys // STAMPS).tolist() == np.asarray(after.level)[0].tolist()


def test_changing_a_number_does_not_recompile():
    traces = []

    @jax.jit
    def counted_run(utility, soft, memory, mass, access):
        traces.append(1)
        return utility.observe(memory, access), soft.observe(mass, access)

    access = counted(4)[0].access(np.ones((TOKENS, EXPERTS)))
    found = set()
    for calibrate in (False, True):
        for up, decay in ((2.0, 0.5), (4.0, 0.9), (6.0, 1.0)):
            utility = made({"cap": 3, "up": up, "down": 1, "window": 3}, calibrate=calibrate)
            soft = SoftUtility(decay=jnp.float32(decay))
            memory, mass = utility.init(LAYERS, EXPERTS), jnp.ones(LAYERS * EXPERTS)
            memory, mass = counted_run(utility, soft, memory, mass, access)
            found.add((int(memory.level[0, 0]), float(mass[0])))
    assert len(traces) == 2 and len(found) == 3


def test_unknown_ways_after_use_are_refused():
    with pytest.raises(PolicyError, match="after_use 'pin' of Utility: write demote or restore"):
        Utility(after_use="pin")


@given(st.integers(0, 2**20), st.sampled_from([0.0, 0.5, 0.9, 1.0]))
def test_soft_utility_sums_the_whole_softmax_of_the_valid_tokens(seed, decay):
    rng = np.random.default_rng(seed)
    soft, mass = SoftUtility(decay=jnp.float32(decay)), {}
    memory = soft.init(LAYERS, EXPERTS)
    for step in draw_steps(seed):
        scores = rng.dirichlet(np.ones(EXPERTS), size=TOKENS)
        scores[~step.valid] = rng.choice([np.nan, np.inf])
        memory = observe_soft(soft, memory, step.access(scores))
        if not step.valid.any():
            continue
        for e in range(EXPERTS):
            window = sum(float(scores[t, e]) for t in np.flatnonzero(step.valid))
            mass[step.layer, e] = decay * mass.get((step.layer, e), 0.0) + window
    wanted = [mass.get(divmod(one, EXPERTS), 0.0) for one in range(LAYERS * EXPERTS)]
    keys = soft.keys(memory, jnp.int32(0))
    assert keys.dtype == jnp.float32
    np.testing.assert_allclose(keys, wanted, rtol=1e-5, atol=1e-6)


@jax.jit
def observe_soft(soft, memory, access):
    return soft.observe(memory, access)


# the balancer


@dataclasses.dataclass
class Layer:
    """A layer's window and the experts beyond it, as lists."""

    level: list
    tokens: list
    needed: list
    resident: list
    others: list  # levels of the experts of other layers
    absent: list  # of those, which a later layer has and the device has not
    costs: dict
    cap: int
    slots: int

    def work(self):
        return Work(
            level=jnp.array(self.level, jnp.int32),
            tokens=jnp.array(self.tokens, jnp.int32),
            needed=jnp.array(self.needed),
            resident=jnp.array(self.resident),
            hot=at_least(
                jnp.array(self.level + self.others, jnp.int32),
                jnp.ones(len(self.level + self.others), bool),
            ),
            coming=at_least(jnp.array(self.others, jnp.int32), jnp.array(self.absent)),
        )

    def solved(self):
        costs = Costs(**{name: jnp.float32(cost) for name, cost in self.costs.items()})
        found = balanced(self.work(), costs, jnp.int32(self.cap), jnp.int32(self.slots))
        return jax.tree.map(np.asarray, found)

    def times(self, hot, coming):
        """Device, host and link when these experts [ids] are hot and so many are to come."""
        c = self.costs
        active = [e for e, used in enumerate(self.needed) if used]
        on_device = [e for e in active if e in hot and self.resident[e]]
        device = c["device"] + sum(c["device_token"] * self.tokens[e] for e in on_device)
        cold = [e for e in active if e not in on_device]
        host = sum(c["host"] + c["host_token"] * self.tokens[e] for e in cold) + c["hidden"]
        return device, host, coming * c["load"]

    def threshold_times(self):
        """Of each threshold, in order: times, and whether it is allowed."""
        rows = []
        for k in range(self.cap + 2):
            hot = {e for e, s in enumerate(self.level) if s >= k}
            elsewhere = [s >= k for s in self.others]
            coming = sum(h and a for h, a in zip(elsewhere, self.absent, strict=True))
            rows.append((self.times(hot, coming), len(hot) + sum(elsewhere) <= self.slots))
        return rows


balanced = jax.jit(balance)
COSTS = array_fields(Costs)


@st.composite
def layers(draw, experts=6, others=8):
    rng = np.random.default_rng(draw(st.integers(0, 2**20)))
    cap = draw(st.integers(0, MAX_CAP))
    needed = rng.random(experts) < draw(st.sampled_from([0.0, 0.5, 1.0]))
    # whole costs: sums are exact in float32, and ties are many
    scale = draw(st.sampled_from([2, 20]))
    return Layer(
        level=rng.integers(0, cap + 1, experts).tolist(),
        tokens=np.where(needed, rng.integers(1, 10, experts), 0).tolist(),
        needed=needed.tolist(),
        resident=(rng.random(experts) < draw(st.sampled_from([0.0, 0.5, 1.0]))).tolist(),
        others=rng.integers(0, cap + 1, others).tolist(),
        absent=(rng.random(others) < 0.5).tolist(),
        costs={name: float(rng.integers(0, scale)) for name in COSTS},
        cap=cap,
        slots=draw(st.sampled_from([0, 3, 8, 14])),
    )


def by_subsets(layer):
    """The best threshold, from all subsets of experts that some threshold makes."""
    everyone = layer.level + layer.others
    found = []
    for size in range(len(layer.level) + 1):
        for subset in itertools.combinations(range(len(layer.level)), size):
            out = [s for e, s in enumerate(layer.level) if e not in subset]
            inside = [layer.level[e] for e in subset]
            for k in range(layer.cap + 2):
                if min(inside, default=k) < k or max(out, default=k - 1) >= k:
                    continue
                if sum(s >= k for s in everyone) > layer.slots:
                    continue
                new = sum(s >= k and a for s, a in zip(layer.others, layer.absent, strict=True))
                found.append((max(layer.times(set(subset), new)), -k))
    return -min(found)[1]


def check_times(layer, got):
    rows = [times for times, _ in layer.threshold_times()]
    rows += rows[-1:] * (MAX_CAP + 2 - len(rows))
    for name, expected in zip(("device", "host", "link"), zip(*rows, strict=True), strict=True):
        assert getattr(got, name).tolist() == list(expected), name


@more
@given(layers())
def test_the_threshold_is_the_best_of_all_subsets_that_are_thresholds(layer):
    got = layer.solved()
    check_times(layer, got)
    assert got.threshold == by_subsets(layer)


def by_program(layer):
    """Least greatest time by integer programming: one threshold is chosen, y is no less than it."""
    rows = layer.threshold_times()
    number = len(rows)
    allowed = [float(ok) for _, ok in rows]
    above = [[-times[i] for times, _ in rows] + [1.0] for i in range(3)]  # y - T >= 0
    solution = milp(
        c=[0.0] * number + [1.0],
        integrality=[1] * number + [0],
        bounds=Bounds([0.0] * (number + 1), [*allowed, math.inf]),
        constraints=[
            LinearConstraint([[1.0] * number + [0.0]], 1, 1),
            LinearConstraint(above, 0, math.inf),
        ],
    )
    assert solution.success
    return solution.fun


@given(layers())
def test_no_integer_program_finds_a_better_threshold(layer):
    got = layer.solved()
    slowest = max(float(times[got.threshold]) for times in (got.device, got.host, got.link))
    assert layer.threshold_times()[int(got.threshold)][1]
    np.testing.assert_allclose(slowest, by_program(layer), rtol=1e-6, atol=1e-6)


def example(**changes):
    """Two hot residents, one hot absent expert, one cold resident; all of them needed."""
    layer = Layer(
        level=[3, 1, 2, 0],
        tokens=[6, 5, 4, 1],
        needed=[True] * 4,
        resident=[True, True, False, True],
        others=[5, 1],
        absent=[True, True],
        costs=dict(zip(COSTS, (1.0, 1.0, 4.0, 1.0, 2.0, 3.0), strict=True)),
        cap=5,
        slots=100,
    )
    return dataclasses.replace(layer, **changes)


def test_the_example_by_hand():
    got = example().solved()
    assert isinstance(got, Balance)
    # k = 0: experts 0, 1, 3 on the device; 1: 0 and 1; 2: 0 alone, and so on
    assert got.device.tolist()[:5] == [13, 12, 7, 7, 1]
    assert got.host.tolist()[:5] == [10, 15, 24, 24, 34]
    assert got.link.tolist() == [6, 6, 3, 3, 3, 3, 0, 0, 0, 0]
    assert got.threshold == 0


@pytest.mark.parametrize(
    ("changes", "threshold"),
    [
        ({"slots": 5}, 1),  # the cold one does not fit; 5 of the 6 are hot at 1
        ({"slots": 2}, 3),  # at 2 and 3 the times are level, and 3 leaves fewer hot
        ({"slots": 1}, 6),  # the host has everything from 4 on
        ({"slots": 0}, 6),
        ({"resident": [False] * 4}, 6),  # nothing to run on the device: no transfers
        ({"needed": [False] * 4}, 6),
        ({"cap": 0, "level": [0] * 4, "others": [0, 0]}, 0),
        ({"cap": 20, "slots": 0}, MAX_CAP + 1),
    ],
)
def test_edges_of_the_balancer(changes, threshold):
    assert example(**changes).solved().threshold == threshold


def test_levels_that_are_left_from_a_higher_cap_count_as_the_cap():
    got = example(cap=2, slots=0).solved()
    assert got.threshold == 3  # 3 and 5 are not hot there
    assert got.link.tolist() == [6, 6, 3] + [0] * 7
    assert got.device.tolist()[2:4] == [7, 1]


@pytest.mark.parametrize("gone", [math.inf, math.nan])
def test_a_resource_that_is_not_there(gone):
    def solved(**layer):
        costs = {name: layer.pop(name, cost) for name, cost in example().costs.items()}
        return example(costs=costs, **layer).solved()

    everything = [True] * 4
    assert solved(host=gone, resident=everything).threshold == 0
    assert solved(host_token=gone, resident=everything).threshold == 0
    assert solved(load=gone).threshold == 6
    assert solved(device_token=gone).threshold == 4 + 2  # the host, as late as it may be
    nowhere = solved(host=gone)  # one needed expert is absent: every threshold waits for ever
    assert nowhere.threshold == 6 and np.isinf(nowhere.host).all()


def test_one_program_serves_all_numbers_of_the_balancer():
    traces = []

    @jax.jit
    def counted_balance(*args):
        traces.append(1)
        return balance(*args).threshold

    found = set()
    for cap, slots, load in ((5, 100, 0.0), (3, 2, 1.0), (8, 0, 50.0)):
        layer = example(cap=cap)
        costs = Costs(**{n: jnp.float32(c) for n, c in (layer.costs | {"load": load}).items()})
        found.add(int(counted_balance(layer.work(), costs, jnp.int32(cap), jnp.int32(slots))))
    assert len(traces) == 1 and found == {0, 3, 9}


@given(st.lists(st.tuples(st.integers(0, MAX_CAP), st.booleans()), min_size=7, max_size=7))
def test_at_least_counts_the_chosen(experts):
    level, chosen = zip(*experts, strict=True)
    got = at_least(jnp.array(level, jnp.int32), jnp.array(chosen))
    expected = [sum(s >= k and c for s, c in experts) for k in range(MAX_CAP + 2)]
    assert got.tolist() == expected


# a real routing


@pytest.fixture(scope="module")
def real_tokens():
    """[tokens, layers, k] experts of Qwen3-30B-A3B at decode."""
    root = pathlib.Path(__file__).resolve().parents[1]
    places = [root / "shared" / TRACE, root.parent / "shared" / TRACE]
    found = [place for place in places if place.exists()]
    if not found:
        pytest.skip(f"no routing trace: neither {places[0]} nor {places[1]} exists")
    picks = {}
    with lzma.open(found[0], "rt") as file:
        for row in csv.DictReader(line for line in file if not line.startswith("#")):
            if row["phase"] == "1":
                at = (int(row["step"]), int(row["layer"]))
                picks.setdefault(at, {})[int(row["slot"])] = int(row["expert"])
    steps = sorted({step for step, _ in picks})
    assert len(picks) == len(steps) * 48
    return np.array(
        [[[picks[s, layer][k] for k in range(6)] for layer in range(48)] for s in steps], np.int32
    )


def replayed(tokens, utility, window):
    """Levels [windows, L, E] after each window, through jitted accesses of so many tokens."""
    steps = len(tokens) // window
    shape = (steps, window, *tokens.shape[1:])
    grouped = tokens[: steps * window].reshape(shape).swapaxes(1, 2)  # [steps, L, window, K]
    valid = np.ones(window, bool)
    each = [Step(layer, picks, valid) for step in grouped for layer, picks in enumerate(step)]
    _, seen = run(utility, stacked(each, experts=128), (48, 128))
    return np.asarray(seen["levels"])[47::48].reshape(steps, 48, 128)


def uses_in_windows(tokens, window):
    """[windows, L, E] uses, one pick at a time."""
    counts = np.zeros((len(tokens) // window, 48, 128), int)
    for t, layer, k in np.ndindex(counts.shape[0] * window, 48, 6):
        counts[t // window, layer, tokens[t, layer, k]] += 1
    return counts


def by_hand(counts):
    """The released machine with K = 5, up = 5, down = 1 in NumPy: levels after each window."""
    level, found = np.zeros(counts.shape[1:], int), []
    for c in counts:
        rise = (c >= level + 5) & (level < 5)
        fall = ~(c >= level + 5) & (c <= level - 1) & (level > 0)
        level = level + rise - fall
        found.append(level)
    return np.array(found)


def foresight(level, counts):
    """Of levels and the window after each: hot experts per layer, their share, precision."""
    hot, later = level[:-1] > 0, counts[1:]
    carried = (hot * later).sum() / later.sum()
    return hot.sum() / hot[..., 0].size, carried, (hot & (later > 0)).sum() / hot.sum()


def test_hot_experts_of_a_real_routing_foretell_its_next_window(real_tokens):
    counts = uses_in_windows(real_tokens, 9)
    level = replayed(real_tokens, made({}), 9)
    assert np.array_equal(level, by_hand(counts))
    hot, carried, precision = foresight(level, counts)
    print(f"hot {hot:.2f} per layer, {carried:.1%} of the next picks, precision {precision:.3f}")
    assert hot == pytest.approx(4.3, abs=0.3)
    assert carried == pytest.approx(0.29, abs=0.015)
    assert precision == pytest.approx(0.85, abs=0.04)


def test_on_a_real_routing_plain_decoding_feeds_the_same_counter_as_well(real_tokens):
    """The control: one token per step. Here windows hold no rejected tokens, so both are level."""
    singles = replayed(real_tokens, made({"window": 9}), 1)
    assert np.array_equal(singles[8::9], replayed(real_tokens, made({}), 9))


@pytest.mark.parametrize("start", [1.0, 9.0])
def test_a_calibrated_boundary_nears_its_target_on_a_real_routing(real_tokens, start):
    counts, found = uses_in_windows(real_tokens, 9), []
    for calibrate in (False, True):
        utility = made({"up": start, "target": 0.85, "rate": 3.0}, calibrate=calibrate)
        level = replayed(real_tokens, utility, 9)
        found.append(foresight(level[6:], counts[6:])[2])  # once it had time to move
    print(f"precision {found[0]:.3f}, calibrated for 0.85: {found[1]:.3f}")
    assert abs(found[1] - 0.85) < abs(found[0] - 0.85) / 2
