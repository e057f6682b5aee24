"""The priced router, placement and evictor against plain loops over the rule; the fit of kappa."""

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from moejax.config import RouterRule
from moejax.errors import InputError
from moejax.policies.eviction import Access
from moejax.policies.placement import Demand
from moejax.policies.price import Costs, Priced, PricedPlacement
from moejax.policies.routing import Scored, TopK
from moejax.policies.value import Value, fit_kappa, replaced_terms

F = np.float32
INF = math.inf
GROUPED = RouterRule(normalize=False, scale=2.0, num_groups=4, top_groups=3)
SHAPES = [  # tokens, experts, k, rule: each is one compilation per set of terms
    (1, 16, 4, RouterRule(normalize=False)),
    (1, 8, 3, RouterRule(normalize=True)),
    (3, 16, 3, dataclasses.replace(GROUPED, normalize=True)),
    (4, 12, 2, GROUPED),
    (6, 16, 4, RouterRule(normalize=False)),
    (2, 4, 4, RouterRule(normalize=True)),
]
TERMS = ("reuse", "critical_path", "window", "share")
ALL = dict.fromkeys(TERMS, True)
more = settings(max_examples=10 * settings.default.max_examples)


@dataclasses.dataclass
class Case:
    scores: np.ndarray  # [N, E] f32
    resident: np.ndarray
    valid: np.ndarray
    memory: np.ndarray  # [2, E] f32, average softmax of two layers
    k: int
    rule: RouterRule
    numbers: dict  # load, host0, host1, device, horizon, kappa, decay, alpha
    layer: int = 1

    def seen(self, **changes):
        arrays = {
            "layer": jnp.int32(self.layer),
            "scores": jnp.asarray(self.scores),
            "resident": jnp.asarray(self.resident),
            "valid": jnp.asarray(self.valid),
        }
        return Scored(**(arrays | {"rule": self.rule, "top_k": self.k} | changes))

    def router(self, **fields):
        n = {name: jnp.float32(value) for name, value in self.numbers.items()}
        places = {name: n[name] for name in ("load", "host0", "host1", "device", "horizon")}
        kappa = jnp.zeros(2).at[self.layer].set(n["kappa"])
        numbers = {"alpha": n["alpha"], "costs": Costs(**places), "kappa": kappa}
        return Priced(**(numbers | {"decay": n["decay"]} | fields))


def eighths(most):
    return st.integers(0, 8 * most).map(lambda n: n / 8)


alphas = st.sampled_from([0.0, 2**-9, 2**-7, 2**-5, 2**-3, 1.0, INF]) | st.floats(0, 0.25, width=32)


@st.composite
def cases(draw, shapes=SHAPES):
    tokens, experts, k, rule = draw(st.sampled_from(shapes))
    rng = np.random.default_rng(draw(st.integers(0, 2**20)))
    if rule.normalize or draw(st.booleans()):
        logits = rng.normal(scale=draw(st.sampled_from([0.5, 1.5])), size=(tokens, experts))
        scores = (np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)).astype(F)
    else:
        scores = (rng.integers(0, 12, size=(tokens, experts)) / 64).astype(F)  # ties and zeros
    numbers = {
        "load": draw(eighths(4) | st.just(INF)),
        "host0": draw(eighths(2) | st.just(INF)),
        "host1": draw(eighths(2)),
        "device": draw(st.sampled_from([0.0, 0.125, 1.0])),
        "horizon": draw(st.sampled_from([0.0, 4.0, 32.0])),
        "kappa": draw(st.sampled_from([0.0, 0.5, 1.0, 3.0])),
        "decay": draw(st.sampled_from([0.0, 0.5, 1.0])),
        "alpha": draw(alphas),
    }
    return Case(
        scores=scores,
        resident=rng.random(experts) < draw(st.sampled_from([0.0, 0.3, 0.6, 1.0])),
        valid=rng.random(tokens) < draw(st.sampled_from([0.7, 1.0])),
        memory=(rng.integers(0, 8, size=(2, experts)) / 32).astype(F),
        k=k,
        rule=rule,
        numbers=numbers,
    )


@jax.jit
def run(router, memory, seen):
    return router.route(memory, seen)


def routed(router, case, **changes):
    return jax.tree.map(np.asarray, run(router, jnp.asarray(case.memory), case.seen(**changes)))


# the oracle: lists and loops in float64


class Walk:
    """The rule, one missing expert at a time."""

    def __init__(self, case, **terms):
        self.case, self.terms = case, ALL | terms
        self.n = {name: float(F(value)) for name, value in case.numbers.items()}
        self.tokens = np.flatnonzero(case.valid).tolist()
        self.rows = [self.eligible(row) for row in case.scores]
        self.order = [sorted(range(len(r)), key=lambda e, r=r: (-r[e], e)) for r in self.rows]
        self.picks = [order[: case.k] for order in self.order]
        self.rho = self.average()
        self.stand = {}  # (token, missing expert) -> stand-in, as the walk goes
        self.kept, self.replaced = set(), set()
        self.link = self.host = 0.0
        hits = {e for t in self.tokens for e in self.picks[t] if case.resident[e]}
        self.device = len(hits) * self.n["device"]
        self.missing = {e for t in self.tokens for e in self.picks[t]} - hits
        self.go()

    def eligible(self, row):
        rule = self.case.rule
        size = len(row) // rule.num_groups
        best = [max(row[g * size : (g + 1) * size]) for g in range(rule.num_groups)]
        groups = sorted(range(rule.num_groups), key=lambda g: (-best[g], g))[: rule.top_groups]
        return [float(s) if e // size in groups else 0.0 for e, s in enumerate(row)]

    def average(self):
        old = [float(v) for v in self.case.memory[self.case.layer]]
        if not self.tokens:
            return old
        found = [
            math.fsum(float(self.case.scores[t][e]) for t in self.tokens) for e in range(len(old))
        ]
        decay = self.n["decay"]
        mean = [v / len(self.tokens) for v in found]
        return [decay * a + (1 - decay) * b for a, b in zip(old, mean, strict=True)]

    def weight(self, t, e):
        row, rule = self.rows[t], self.case.rule
        total = math.fsum(row[p] for p in self.picks[t]) if rule.normalize else 1.0
        return row[e] / total * rule.scale

    def candidates(self, t):
        """All that may stand in for a pick of t, best first."""
        behind = self.order[t][self.case.k : 3 * self.case.k]
        kept = self.kept if self.terms["share"] else set()
        return [e for e in behind if self.rows[t][e] > 0 and (self.case.resident[e] or e in kept)]

    def standin(self, t):
        used = {s for (other, _), s in self.stand.items() if other == t}
        free = [e for e in self.candidates(t) if e not in used]
        return free[0] if free else None

    def users(self, e):
        return [t for t in self.tokens if e in self.picks[t]]

    def loss(self, e):
        """Without kappa."""
        terms = []
        for t in self.users(e):
            s = self.standin(t)
            terms.append(INF if s is None else self.weight(t, e) ** 2 + self.weight(t, s) ** 2)
        return math.fsum(terms) if self.terms["window"] and INF not in terms else max(terms)

    def price(self, e):
        """Cost, place and the clocks after it."""
        n, users = self.n, len(self.users(e))
        now = max(self.link, self.host, self.device)
        work = n["host0"] + n["host1"] * users
        arrives = self.link + n["load"]
        runs = max(self.device, arrives) + n["device"]
        fetch = max(arrives, runs, self.host) - now
        host = max(self.link, self.device, self.host + work) - now
        if not self.terms["critical_path"]:
            fetch, host = n["load"], work
        if self.terms["reuse"] and n["load"] < INF:
            fetch -= self.rho[e] * n["horizon"] * n["load"]
        self.distinct(fetch, host, 4.0)
        if host < fetch:
            return host, (self.link, self.host + work, self.device)
        if fetch == INF:
            return INF, (self.link, self.host, self.device + n["device"])
        return fetch, (arrives, self.host, runs)

    def distinct(self, a, b, scale=0.0):
        """Discard the case if rounding decides between the two."""
        if a != b and math.isfinite(a) and math.isfinite(b):
            assume(abs(a - b) > 2e-5 * max(abs(a), abs(b), scale))

    def go(self):
        at_first = {e: self.loss(e) for e in self.missing}
        for a, b in itertools.combinations(at_first.values(), 2):
            self.distinct(a, b)
        for e in sorted(self.missing, key=lambda e: (-at_first[e], e)):
            cost, clocks = self.price(e)
            loss, alpha = self.loss(e), self.n["alpha"]
            weighed = 0.0 if loss == INF else self.n["kappa"] * loss
            if loss == INF or alpha == 0 or cost == 0 or weighed >= alpha * cost:
                self.kept.add(e)
                self.link, self.host, self.device = clocks
            else:
                self.replaced.add(e)
                for t in self.users(e):
                    self.stand[t, e] = self.standin(t)
            if alpha and alpha < INF and cost < INF:
                self.distinct(weighed, alpha * cost, 4 * alpha)

    def used(self):
        """[N][K], after the second pass."""
        experts = []
        for t, picks in enumerate(self.picks):
            leaving = [e for e in picks if e in self.replaced] if t in self.tokens else []
            better = dict(zip(leaving, self.candidates(t), strict=False))
            assert len(better) == len(leaving)
            experts.append([better.get(e, e) for e in picks])
        return experts

    def weights(self, t, experts):
        row, rule = self.rows[t], self.case.rule
        total = math.fsum(row[e] for e in experts) if rule.normalize else 1.0
        return [row[e] / total * rule.scale for e in experts]


def check(case, got, memory, walk):
    for t, experts in enumerate(walk.used()):
        assert got.exact[t].tolist() == walk.picks[t]
        assert got.expert[t].tolist() == experts
        before, after = walk.weights(t, walk.picks[t]), walk.weights(t, experts)
        np.testing.assert_allclose(got.weight[t], after, rtol=2e-6)
        used = dict(zip(experts, after, strict=True))
        lost = [max(0.0, w - used.get(e, 0)) for e, w in zip(walk.picks[t], before, strict=True)]
        np.testing.assert_allclose(got.replaced_mass[t], sum(lost), rtol=2e-6, atol=5e-7)
    np.testing.assert_allclose(memory[case.layer], walk.rho, rtol=2e-6, atol=1e-9)
    assert memory[1 - case.layer].tolist() == case.memory[1 - case.layer].tolist()
    assert got.expert.dtype == got.exact.dtype == np.int32
    assert got.weight.dtype == got.replaced_mass.dtype == memory.dtype == F


@more
@given(cases())
def test_priced_follows_the_rule(case):
    assume((case.scores.max(axis=-1) > 0).all())
    got, memory = routed(case.router(), case)
    check(case, got, memory, Walk(case))


@pytest.mark.parametrize("term", TERMS)
@settings(max_examples=3 * settings.default.max_examples)
@given(case=cases(shapes=[SHAPES[0], SHAPES[4]]))
def test_each_term_can_be_left_out(term, case):
    left_out = {term: False}
    got, memory = routed(case.router(**left_out), case)
    check(case, got, memory, Walk(case, **left_out))


@more
@given(cases(), st.sampled_from([0.0, 0.02, 1.0, INF]))
def test_what_is_used_is_resident_or_kept_and_distinct(case, alpha):
    case.numbers["alpha"] = alpha
    got, _ = routed(case.router(), case)
    exact = routed(TopK(), case)[0]
    assert (got.exact == exact.expert).all()
    kept = set(got.expert[case.valid].ravel().tolist()) & set(
        exact.expert[case.valid].ravel().tolist()
    )
    for t in range(len(case.scores)):
        assert len(set(got.expert[t].tolist())) == case.k
        for e, own in zip(got.expert[t].tolist(), exact.expert[t].tolist(), strict=True):
            assert e == own or (case.valid[t] and (case.resident[e] or e in kept))
            # an expert that is replaced anywhere is replaced everywhere
            assert e == own or own not in kept


def assert_same_bits(got, exact):
    for name in ("expert", "weight", "exact", "replaced_mass"):
        assert getattr(got, name).tobytes() == getattr(exact, name).tobytes()


@more
@given(cases(), st.sampled_from(["alpha", "resident", "prompt", "nan"]))
def test_without_a_price_or_a_miss_the_bits_are_those_of_top_k(case, why):
    changes = {}
    if why == "alpha":
        case.numbers["alpha"] = 0.0
    elif why == "resident":
        case.resident[:] = True
    elif why == "prompt":
        changes = {"prefill": True}
    else:
        case.numbers["alpha"] = math.nan
    router = case.router()
    assert not router.exact and not router.low_bit
    got, memory = routed(router, case, **changes)
    assert_same_bits(got, routed(TopK(), case)[0])
    np.testing.assert_allclose(memory[case.layer], Walk(case).rho, rtol=2e-6, atol=1e-9)


def by_hand(scores, resident, alpha, **numbers):
    """One token, k = 2, scores in 64ths; 1 ms a load, nothing else."""
    given = {"load": 1.0, "host0": INF, "host1": 0.0, "device": 0.0, "horizon": 0.0}
    return Case(
        scores=np.array([scores], F) / F(64),
        resident=np.isin(np.arange(len(scores)), resident),
        valid=np.ones(1, bool),
        memory=np.zeros((2, len(scores)), F),
        k=2,
        rule=RouterRule(normalize=False),
        numbers=given | {"kappa": 1.0, "decay": 0.5, "alpha": alpha} | numbers,
    )


@pytest.mark.parametrize(
    ("scores", "resident", "numbers", "expected"),
    [  # (14^2 + 6^2) / 64^2 = 0.0566, (30^2 + 6^2) / 64^2 = 0.2285
        ([30, 14, 10, 6], [0, 3], {"alpha": 0.05}, [0, 1]),
        ([30, 14, 10, 6], [0, 3], {"alpha": 0.06}, [0, 3]),
        ([30, 14, 10, 6], [0], {"alpha": INF}, [0, 1]),  # nobody to stand in
        ([30, 14, 10, 6], [3], {"alpha": INF}, [3, 1]),  # one for two: the greater loss takes it
        ([30, 14, 10, 6], [2, 3], {"alpha": INF}, [2, 3]),
        ([30, 14, 10, 6], [2, 3], {"alpha": 0.1}, [0, 2]),  # 0.0723 is not worth it, 0.2441 is
        ([30, 14, 10, 0], [0, 3], {"alpha": INF}, [0, 1]),  # what cannot weigh does not stand in
        ([30, 14, 6, 5, 4, 3, 2], [0, 5], {"alpha": INF}, [0, 5]),  # rank 6 of at most 6
        ([30, 14, 6, 5, 4, 3, 2], [0, 6], {"alpha": INF}, [0, 1]),
        ([30, 14, 10, 6], [0, 3], {"alpha": 0.06, "kappa": 2.0}, [0, 1]),
        ([30, 14, 10, 6], [0, 3], {"alpha": INF, "device": 1.0}, [0, 3]),  # it would run after it
        ([30, 14, 10, 6], [0, 3], {"alpha": 0.06, "host0": 0.5}, [0, 1]),
        ([30, 14, 10, 6], [0, 3], {"alpha": INF, "host0": 0.5, "device": 0.5}, [0, 1]),  # hidden
        ([30, 14, 10, 6], [0, 3], {"alpha": 0.06, "host0": 0.5, "host1": 0.6}, [0, 3]),
        ([30, 14, 10, 6], [0, 3], {"alpha": INF, "horizon": 9.0}, [0, 3]),  # average 7 / 64
        ([30, 14, 10, 6], [0, 3], {"alpha": INF, "horizon": 10.0}, [0, 1]),  # saves all it costs
        ([30, 14, 10, 6], [0, 3], {"alpha": 1e9, "load": math.nan}, [0, 3]),
        ([30, 14, 10, 6], [0, 3], {"alpha": 0.06, "load": INF, "host0": 0.5}, [0, 1]),
        ([30, 14, 10, 6], [0, 3], {"alpha": 1e9, "kappa": math.nan}, [0, 1]),
    ],
)
def test_one_token_by_hand(scores, resident, numbers, expected):
    case = by_hand(scores, resident, **numbers)
    assert routed(case.router(), case)[0].expert.tolist() == [expected]


def test_an_expert_kept_for_one_token_stands_in_for_another():
    # token 1 picks 2 and 3; its third best, 1, is kept for token 0
    case = two_tokens([[40, 20, 1, 1, 1, 1], [1, 9, 15, 14, 1, 1]], [0, 5], alpha=0.09)
    for share, expected in ((True, [1, 0]), (False, [0, 5])):
        got, _ = routed(case.router(share=share), case)
        assert got.expert.tolist() == [[0, 1], expected]
    case.valid[0] = False
    got, _ = routed(case.router(), case)
    assert got.expert.tolist() == [[0, 1], [0, 5]]


def two_tokens(scores, resident, alpha, valid=(True, True), **numbers):
    case = by_hand(scores[0], resident, alpha, **numbers)
    case.scores, case.valid = np.array(scores, F) / F(64), np.array(valid)
    return case


def test_what_a_token_gives_no_weight_does_not_stand_in_though_kept():
    case = two_tokens([[40, 20, 1, 1, 1, 1], [1, 0, 15, 14, 1, 0]], [0], alpha=0.09)
    # 0 stands in for 2 in token 1; for 3 there would be only 1, kept for token 0
    assert routed(case.router(), case)[0].expert.tolist() == [[0, 1], [0, 3]]


def test_the_link_goes_first_when_level():
    # 0 costs 2 ms on either; on the link, it hides both of the others on the host
    case = two_tokens([[40, 10, 1, 2], [40, 1, 10, 2]], [3], alpha=0.1)
    case.numbers |= {"load": 2.0, "host0": 0.0, "host1": 1.0}
    assert routed(case.router(), case)[0].expert.tolist() == [[0, 1], [0, 2]]


def test_padding_keeps_no_device_busy():
    rows = [[30, 14, 10, 6], [1, 2, 3, 30]]
    case = two_tokens(rows, [3], alpha=INF, valid=(True, False), host0=0.5, device=0.5)
    assert routed(case.router(), case)[0].expert.tolist() == [[3, 1], [3, 2]]
    case = two_tokens(rows, [2, 3], alpha=INF, host0=0.5, device=0.5)
    assert routed(case.router(), case)[0].expert.tolist() == [[0, 1], [3, 2]]


@more
@given(cases(shapes=SHAPES[:2]), alphas, alphas, st.booleans())
def test_one_token_keeps_no_more_at_a_greater_alpha(case, one, other, reuse):
    kept = []
    for alpha in sorted((one, other)):
        case.numbers["alpha"] = alpha
        got, _ = routed(case.router(reuse=reuse), case)
        kept.append(np.isin(got.exact, got.expert).sum())
    assert kept[0] >= kept[1]


@more
@given(cases())
def test_padding_is_routed_exactly_and_changes_nothing(case):
    got, memory = routed(case.router(), case)
    case.scores[~case.valid] = np.roll(case.scores[~case.valid], 3, axis=1)
    again, after = routed(case.router(), case)
    exact = routed(TopK(), case)[0]
    assert memory.tobytes() == after.tobytes()
    for name in ("expert", "weight", "replaced_mass"):
        ours, first = getattr(again, name), getattr(got, name)
        assert ours[case.valid].tobytes() == first[case.valid].tobytes()
        assert ours[~case.valid].tobytes() == getattr(exact, name)[~case.valid].tobytes()


def test_changing_a_number_does_not_recompile_and_prompts_can_be_routed_too():
    case = by_hand([30, 14, 10, 6], [0, 3], alpha=1.0)
    traces = []

    @jax.jit
    def counted(router, placement, demand, seen):
        traces.append(1)
        return router.route(jnp.asarray(case.memory), seen)[0], placement.fetch(demand)

    found = set()
    for factor in (0.01, 1.0, 5.0):
        router = jax.tree.map(lambda leaf, f=factor: leaf * f, case.router(prefill=True))
        placement = PricedPlacement(costs=router.costs).with_costs(2.0, factor)
        demand = demand_of([1, 1], hits=0, experts=4)
        routing, fetched = counted(router, placement, demand, case.seen(prefill=True))
        found.add((*routing.expert[0].tolist(), *fetched.tolist()))
    assert len(traces) == 1 and len(found) == 3


# placement


def demand_of(tokens, hits, scores=None, experts=12):
    """Missing experts 0, 1, ... of so many tokens, then as many hits."""
    missing = np.arange(experts) < len(tokens)
    uses, score = np.zeros(experts, np.int32), np.zeros(experts, F)
    uses[missing] = tokens
    score[missing] = 0.5 if scores is None else scores
    after = (np.arange(experts) >= len(tokens)) & (np.arange(experts) < len(tokens) + hits)
    return Demand(missing=missing, hits=after, tokens=uses + after, score=score)


fetch = jax.jit(lambda placement, demand: placement.fetch(demand))


def end_of(costs, demand, fetched):
    """When a layer ends whose link brings `fetched` and whose host computes the other missing."""
    link, device = 0.0, int(demand.hits.sum()) * costs.device
    for _ in fetched:
        link += costs.load
        device = max(device, link) + costs.device
    host = 0.0
    for e in set(np.flatnonzero(demand.missing).tolist()) - set(fetched):
        host += costs.host0 + costs.host1 * int(demand.tokens[e])
    return max(device, host)


@more
@given(
    st.lists(st.integers(1, 6), max_size=8),
    st.integers(0, 4),
    st.tuples(eighths(4), eighths(2), eighths(2), st.sampled_from([0.0, 0.125, 1.0])),
    st.integers(0, 2**16),
)
def test_no_other_split_ends_earlier(tokens, hits, costs, seed):
    costs = Costs(**dict(zip(("load", "host0", "host1", "device"), costs, strict=True)))
    scores = np.random.default_rng(seed).integers(1, 5, len(tokens)) / 8
    demand = demand_of(tokens, hits, scores)
    got = np.asarray(fetch(PricedPlacement(costs=costs), demand))
    assert not got[~demand.missing].any()
    got = np.flatnonzero(got).tolist()
    missing = range(len(tokens))
    ends = {
        chosen: end_of(costs, demand, chosen)
        for size in range(len(tokens) + 1)
        for chosen in itertools.combinations(missing, size)
    }
    best = min(ends.values())
    assert ends[tuple(got)] == best
    order = sorted(missing, key=lambda e: (-tokens[e], -scores[e], e))
    assert set(got) == set(order[: len(got)])
    assert len(got) == max(len(chosen) for chosen, end in ends.items() if end == best)


@pytest.mark.parametrize(
    ("load", "host0", "expected"),
    [
        (1.0, INF, 5),
        (1.0, math.nan, 5),
        (0.0, INF, 5),
        (INF, 1.0, 0),
        (INF, 0.0, 0),
        (math.nan, 1.0, 0),
        (INF, INF, 5),
        (0.0, 0.0, 5),
        (1.0, 0.0, 0),
    ],
)
def test_places_that_are_not_there_are_not_used(load, host0, expected):
    placement = PricedPlacement(costs=Costs(load=load, host0=host0))
    assert placement.uses_host
    demand = demand_of([1, 2, 1, 3, 1], hits=2)
    assert np.asarray(fetch(placement, demand)).sum() == expected


def test_live_costs_keep_the_ratios_of_what_they_do_not_measure():
    names = ("load", "host0", "host1", "device", "horizon")
    numbers = dict(zip(names, map(F, (2.0, 1.0, 3.0, 0.5, 7.0)), strict=True))
    placement = PricedPlacement(costs=Costs(**numbers))
    assert float(placement.load) == 2 and float(placement.host) == 4
    live = placement.with_costs(3000.0, 2000.0)
    assert [float(getattr(live.costs, name)) for name in names] == [3000, 500, 1500, 750, 7]
    again = live.with_costs(2.0, 4.0)
    assert [float(getattr(again.costs, name)) for name in names] == [2, 1, 3, 0.5, 7]
    gone = placement.with_costs(INF, INF)
    assert not gone.costs.has_link and not gone.costs.has_host
    back = gone.with_costs(2.0, 4.0)
    assert [float(getattr(back.costs, name)) for name in names] == [2, 0, 4, 0.5, 7]


# value and kappa


observe = jax.jit(lambda value, memory, access: value.observe(memory, access))


@given(st.integers(0, 2**16), st.sampled_from([0.0, 0.75, 1.0]), st.sampled_from([1, 4]))
def test_value_is_the_average_softmax_of_used_and_unused(seed, decay, tokens):
    rng = np.random.default_rng(seed)
    value, layers, experts = Value(decay=jnp.float32(decay)), 3, 5
    memory, expected = value.init(layers, experts), np.zeros((layers, experts))
    for _ in range(8):
        layer, valid = int(rng.integers(layers)), rng.random(tokens) < 0.7
        scores = rng.dirichlet(np.ones(experts), size=tokens).astype(F)
        none = jnp.zeros(experts, jnp.int32)
        access = Access(
            layer=jnp.int32(layer),
            scores=jnp.where(valid[:, None], scores, jnp.nan),
            needed=none > 0,
            tokens=none,
            last_use=none - 1,
            valid=jnp.asarray(valid),
        )
        memory = observe(value, memory, access)
        if valid.any():
            mean = scores[valid].mean(axis=0, dtype=np.float64)
            expected[layer] = decay * expected[layer] + (1 - decay) * mean
    keys = value.keys(memory, jnp.int32(0))
    assert keys.shape == (layers * experts,) and keys.dtype == F
    np.testing.assert_allclose(keys, expected.reshape(-1), rtol=2e-6, atol=1e-9)


def best_by_supports(kl, terms):
    """Nonnegative least squares: the best of the plain solutions over all sets of layers."""
    found = (float(kl @ kl), np.zeros(terms.shape[1]))
    for size in range(1, terms.shape[1] + 1):
        for layers in itertools.combinations(range(terms.shape[1]), size):
            kappa = np.zeros(terms.shape[1])
            kappa[list(layers)] = np.linalg.lstsq(terms[:, layers], kl, rcond=None)[0]
            error = float(((kl - terms @ kappa) ** 2).sum())
            if (kappa >= 0).all() and error < found[0]:
                found = error, kappa
    return found[1]


@given(st.integers(0, 2**16), st.sampled_from([0.0, 0.3]))
def test_kappa_is_the_nonnegative_least_squares_fit(seed, shrink):
    rng = np.random.default_rng(seed)
    terms = rng.random((20, 4)) * (rng.random((20, 4)) < 0.6)
    kl = terms @ rng.normal(1.0, 1.5, 4) + 0.2 * rng.normal(size=20)
    got = fit_kappa(kl, terms, shrink)
    total = terms.sum(axis=1)
    common = max(0.0, float(kl @ total / (total @ total)))
    pull = np.sqrt(shrink) * np.diag(np.sqrt((terms**2).sum(axis=0)))
    rows, wanted = np.concatenate([terms, pull]), np.concatenate([kl, pull.sum(axis=1) * common])
    assert got.dtype == F
    np.testing.assert_allclose(got, best_by_supports(wanted, rows), rtol=1e-4, atol=1e-5)


def test_a_layer_without_a_term_gets_the_kappa_of_all():
    terms = np.array([[1.0, 0.0, 0.0], [0.0, 0.0, 2.0]])
    np.testing.assert_allclose(fit_kappa([2.0, 2.0], terms), [2, 6 / 5, 1], rtol=1e-6)
    assert fit_kappa(np.zeros(2), np.zeros((2, 3))).tolist() == [0, 0, 0]


@pytest.mark.parametrize("rule", [RouterRule(normalize=True), GROUPED])
def test_replaced_terms_are_the_squares_of_what_left_and_what_stands_in(rule):
    rng, layers, tokens, experts, k = np.random.default_rng(3), 2, 3, 8, 2
    scores = rng.dirichlet(np.ones(experts), (layers, tokens)).astype(F)
    picks = np.stack([rng.permutation(experts)[:k] for _ in range(layers * tokens)])
    picks = picks.reshape(layers, tokens, k).astype(np.int32)
    picks[0, 2] = -1
    want = np.zeros(layers)
    for layer, token in itertools.product(range(layers), range(tokens)):
        own = scores[layer, token].astype(np.float64)
        if rule.num_groups > 1:
            groups = own.reshape(rule.num_groups, -1).max(axis=1)
            kept = np.argsort(-groups)[: rule.top_groups]
            open_ = np.isin(np.arange(experts) // (experts // rule.num_groups), kept)
        else:
            open_ = np.ones(experts, bool)
        best = np.argsort(-np.where(open_, own, 0))[:k]
        total = own[best].sum() if rule.normalize else 1.0
        if picks[layer, token, 0] >= 0:
            changed = set(best) ^ set(picks[layer, token])
            want[layer] += sum((own[e] / total * rule.scale) ** 2 for e in changed)
    got = replaced_terms(rule, jnp.asarray(scores), jnp.asarray(picks), k)
    np.testing.assert_allclose(got, want, rtol=1e-5)


@pytest.mark.parametrize(
    ("kl", "terms", "shrink"),
    [
        (np.ones(3), np.ones((2, 2)), 0.0),
        (np.ones(2), np.ones(2), 0.0),
        (np.ones(0), np.ones((0, 2)), 0.0),
        (np.array([1.0, math.nan]), np.ones((2, 2)), 0.0),
        (np.ones(2), np.full((2, 2), INF), 0.0),
        (np.ones(2), np.ones((2, 2)), -1.0),
    ],
)
def test_what_cannot_be_fitted_is_refused(kl, terms, shrink):
    with pytest.raises(InputError, match="kappa is fitted to finite"):
        fit_kappa(kl, terms, shrink)
