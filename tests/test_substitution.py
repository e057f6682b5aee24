"""Lossy routers against plain loops over tokens, written from the papers' text."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from moejax.config import RouterRule
from moejax.errors import PolicyError
from moejax.policies.alternatives import CacheBoost, LowBitFallback
from moejax.policies.routing import Scored, TopK
from moejax.policies.substitution import AttenuateLow, RandomStandIn, SkipLow, Substitute

F = np.float32
GROUPED = RouterRule(normalize=False, scale=2.5, num_groups=3, top_groups=2)
SHAPES = [  # tokens, experts, k, rule: each is one compilation per router
    (1, 8, 2, RouterRule(normalize=False)),
    (4, 8, 3, RouterRule(normalize=True)),
    (8, 12, 4, GROUPED),
    (3, 12, 4, dataclasses.replace(GROUPED, normalize=True)),
    (2, 6, 6, RouterRule(normalize=True)),
]
TIED = [F(n / 64) for n in (0, 1, 4, 5, 6, 7, 8, 9, 12, 16)]
ALPHAS = [0.0, 0.125, 0.25, 0.5, 1.0, 1.5]


@dataclasses.dataclass
class Case:
    scores: np.ndarray
    resident: np.ndarray
    valid: np.ndarray
    k: int
    rule: RouterRule

    def seen(self, layer=0, **changes):
        arrays = {
            "layer": jnp.int32(layer),
            "scores": jnp.asarray(self.scores),
            "resident": jnp.asarray(self.resident),
            "valid": jnp.asarray(self.valid),
        }
        return Scored(**(arrays | {"rule": self.rule, "top_k": self.k} | changes))


@st.composite
def cases(draw, shapes=SHAPES):
    tokens, experts, k, rule = draw(st.sampled_from(shapes))
    rng = np.random.default_rng(draw(st.integers(0, 2**20)))
    if draw(st.booleans()):
        rows = st.lists(st.sampled_from(TIED), min_size=experts, max_size=experts)
        scores = np.array([draw(rows) for _ in range(tokens)], F)
        scores[np.arange(tokens), rng.integers(experts, size=tokens)] = F(0.25)
    else:
        logits = rng.normal(scale=draw(st.sampled_from([0.2, 1.0])), size=(tokens, experts))
        scores = (np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)).astype(F)
    resident = rng.random(experts) < draw(st.sampled_from([0.0, 0.3, 0.6, 1.0]))
    valid = rng.random(tokens) < draw(st.sampled_from([0.7, 1.0]))
    return Case(scores, resident, valid, k, rule)


more = settings(max_examples=4 * settings.default.max_examples)
alphas = st.one_of(st.sampled_from(ALPHAS), st.floats(0, 2, width=32))


@jax.jit
def run(router, memory, seen):
    return router.route(memory, seen)


def routed(router, seen, memory=None):
    return jax.tree.map(np.asarray, run(router, memory, seen)[0])


# the oracle: lists and loops, one token at a time


def eligible(case, t):
    row = [F(s) for s in case.scores[t]]
    groups, size = case.rule.num_groups, len(row) // case.rule.num_groups
    best = [max(row[g * size : (g + 1) * size]) for g in range(groups)]
    kept = sorted(range(groups), key=lambda g: (-best[g], g))[: case.rule.top_groups]
    return [s if e // size in kept else F(0) for e, s in enumerate(row)]


def ranked(row):
    return sorted(range(len(row)), key=lambda e: (-row[e], e))


def bar_of(case, row):
    return row[ranked(row)[case.k]] if case.k < len(row) else F(0)


def is_top(s, bar, alpha):
    return s > bar and s >= (F(1) + F(alpha)) * bar


def is_low(s, bar, alpha):
    return bar < s < (F(1) + F(alpha)) * bar


def batch_set(case, alpha):
    """C of Algorithm 1."""
    shared = set()
    for t in np.flatnonzero(case.valid):
        row = eligible(case, t)
        picks = ranked(row)[: case.k]
        shared |= {e for e in picks if is_top(row[e], bar_of(case, row), alpha)}
    return shared


def present(case, alpha):
    return set(np.flatnonzero(case.resident)) | batch_set(case, alpha)


def missing_of(case, t, alpha):
    """M_t, best first."""
    if not case.valid[t]:
        return []
    row, here = eligible(case, t), present(case, alpha)
    bar = bar_of(case, row)
    picks = ranked(row)[: case.k]
    return [e for e in picks if is_low(row[e], bar, alpha) and e not in here]


def standins_of(case, t, alpha, variant):
    """A_t, first choice first."""
    row, here = eligible(case, t), present(case, alpha)
    bar = bar_of(case, row)
    floor = max((F(1) - F(alpha)) * bar, F(0))
    outside = [e for e in ranked(row)[case.k :] if e in here and floor < row[e] <= bar]
    return outside if variant == "paper" else sorted(e for e in outside if row[e] < bar)


def weigh(rule, scores):
    total = math.fsum(scores) if rule.normalize else 1.0
    return [float(s) / total * rule.scale if total else 0.0 for s in scores]


def check(case, got, experts, scores):
    """Equal to experts[t] (-1 = left out) with the given scores before any renormalisation."""
    for t in range(len(case.scores)):
        row = eligible(case, t)
        exact = ranked(row)[: case.k]
        before = weigh(case.rule, [row[e] for e in exact])
        after = weigh(case.rule, scores[t])
        assert got.exact[t].tolist() == exact
        assert got.expert[t].tolist() == experts[t]
        np.testing.assert_allclose(got.weight[t], after, rtol=1e-6, atol=0)
        used = dict(zip(experts[t], after, strict=True))
        lost = sum(max(0.0, w - used.get(e, 0.0)) for e, w in zip(exact, before, strict=True))
        np.testing.assert_allclose(got.replaced_mass[t], lost, rtol=1e-6, atol=3e-7)
    assert got.expert.dtype == got.exact.dtype == np.int32
    assert got.weight.dtype == got.replaced_mass.dtype == F


@more
@given(cases(), alphas, st.sampled_from(["paper", "released"]))
def test_substitute_follows_algorithm_1(case, alpha, variant):
    got = routed(Substitute(alpha=jnp.float32(alpha), variant=variant), case.seen())
    experts, scores = [], []
    for t in range(len(case.scores)):
        row = eligible(case, t)
        picks = ranked(row)[: case.k]
        standins = standins_of(case, t, alpha, variant)
        missing = missing_of(case, t, alpha)
        leaving = missing[max(0, len(missing) - len(standins)) :]
        swap = dict(zip(leaving, standins, strict=False))
        experts.append([swap.get(e, e) for e in picks])
        scores.append([row[e] for e in experts[-1]])
        assert len(set(got.expert[t])) == case.k
        assert set(got.exact[t]) - set(got.expert[t]) <= set(missing)
    check(case, got, experts, scores)


@more
@given(cases(), alphas, st.integers(0, 2**31 - 1))
def test_random_stand_ins_come_from_all_present_experts(case, alpha, seed):
    router = RandomStandIn(alpha=jnp.float32(alpha), seed=jnp.int32(seed))
    got = routed(router, case.seen())
    for t in range(len(case.scores)):
        row = eligible(case, t)
        picks = ranked(row)[: case.k]
        here = present(case, alpha)
        candidates = {e for e in ranked(row)[case.k :] if e in here and row[e] > 0}
        missing = missing_of(case, t, alpha)
        leaving = missing[max(0, len(missing) - len(candidates)) :]
        drawn = [int(got.expert[t][picks.index(e)]) for e in leaving]
        assert len(set(drawn)) == len(drawn) and set(drawn) <= candidates
        stays = [(e, u) for e, u in zip(picks, got.expert[t], strict=True) if e not in leaving]
        assert all(e == u for e, u in stays)
    experts = got.expert.tolist()
    check(case, got, experts, [[eligible(case, t)[e] for e in x] for t, x in enumerate(experts)])


def test_random_stand_ins_are_drawn_evenly_and_by_seed_layer_and_scores():
    rng = np.random.default_rng(3)
    base = np.array([0.5, 0.16, 0.05, 0.15, 0.04, 0.03, 0.02, 0.05], F)
    tokens = 512  # expert 1 is low and missing; 0 is top, 2 and 4 to 7 are resident, 3 sets the bar
    case = Case(
        scores=base * rng.uniform(0.999, 1.001, (tokens, 8)).astype(F),
        resident=np.array([0, 0, 1, 0, 1, 1, 1, 1], bool),
        valid=np.ones(tokens, bool),
        k=2,
        rule=RouterRule(normalize=False),
    )
    router = RandomStandIn(alpha=jnp.float32(0.5), seed=jnp.int32(0))
    drawn = routed(router, case.seen()).expert[:, 1]
    counts = np.bincount(drawn, minlength=8)
    assert set(np.flatnonzero(counts)) == {2, 4, 5, 6, 7}
    assert counts[counts > 0].min() > tokens / 5 * 0.7
    other = dataclasses.replace(router, seed=jnp.int32(1))
    for changed in (routed(other, case.seen()), routed(router, case.seen(layer=1))):
        assert 0.1 < (changed.expert[:, 1] == drawn).mean() < 0.3
    half = np.arange(tokens) % 2 == 0  # padding has no say in the others' draws
    apart = dataclasses.replace(case, valid=half)
    assert (routed(router, apart.seen()).expert[half, 1] == drawn[half]).all()


@more
@given(cases(), alphas)
def test_skipped_picks_leave_their_weight_to_the_others(case, alpha):
    got = routed(SkipLow(alpha=jnp.float32(alpha)), case.seen())
    experts, scores = [], []
    for t in range(len(case.scores)):
        row, missing = eligible(case, t), missing_of(case, t, alpha)
        picks = ranked(row)[: case.k]
        experts.append([-1 if e in missing else e for e in picks])
        scores.append([0.0 if e in missing else row[e] for e in picks])
    check(case, got, experts, scores)


@more
@given(cases(), alphas, st.sampled_from([0.0, 0.5, 1.0]))
def test_attenuated_picks_stay_and_weigh_less(case, alpha, factor):
    router = AttenuateLow(alpha=jnp.float32(alpha), factor=jnp.float32(factor))
    got = routed(router, case.seen())
    experts, scores = [], []
    for t in range(len(case.scores)):
        row, missing = eligible(case, t), missing_of(case, t, alpha)
        experts.append(ranked(row)[: case.k])
        scores.append([row[e] * F(factor if e in missing else 1) for e in experts[-1]])
    check(case, got, experts, scores)


def test_a_token_that_loses_all_its_picks_weighs_nothing():
    case = Case(
        scores=np.array([[0.3, 0.3, 0.2, 0.2], [0.3, 0.3, 0.2, 0.2]], F),
        resident=np.zeros(4, bool),
        valid=np.array([True, False]),
        k=2,
        rule=RouterRule(normalize=True),
    )
    for router in (SkipLow(alpha=1.0), AttenuateLow(alpha=1.0, factor=0.0)):
        with jax.debug_nans(True):  # looks into each step, as nothing is compiled
            got = jax.tree.map(np.asarray, router.route(None, case.seen())[0])
        assert got.weight.tolist() == [[0, 0], [0.5, 0.5]]
        assert got.replaced_mass.tolist() == [1, 0]


def minor_of(case, t, alpha, variant):
    row = eligible(case, t)
    picks = ranked(row)[: case.k]
    if variant == "band":
        return {e for e in picks if is_low(row[e], bar_of(case, row), alpha)}
    total = sum(float(row[e]) for e in picks)
    shares = [sum(float(row[e]) for e in picks[:i]) / total for i in range(case.k)]
    assume(all(abs(share - alpha) > 1e-5 for share in shares[1:]))
    return {e for e, share in zip(picks, shares, strict=True) if share > alpha}


@more
@given(cases(), alphas, st.sampled_from(["band", "share"]))
def test_low_bit_copies_serve_what_matters_little_to_all(case, alpha, variant):
    got = routed(LowBitFallback(alpha=jnp.float32(alpha), variant=variant), case.seen())
    minor, vital = set(), set()
    for t in np.flatnonzero(case.valid):
        little = minor_of(case, t, alpha, variant)
        minor |= little
        vital |= set(ranked(eligible(case, t))[: case.k]) - little
    low = minor - vital - set(np.flatnonzero(case.resident))
    assert set(np.flatnonzero(got.low)) == low
    exact = routed(TopK(), case.seen())
    assert got.expert.tolist() == got.exact.tolist() == exact.expert.tolist()
    np.testing.assert_array_equal(got.weight, exact.weight)
    for t, valid in enumerate(case.valid):
        pairs = zip(exact.expert[t], exact.weight[t], strict=True)
        mass = sum(float(w) for e, w in pairs if valid and e in low)
        np.testing.assert_allclose(got.replaced_mass[t], mass, rtol=1e-6)


def test_a_pick_at_the_upper_edge_is_fetched_in_full():
    for second, low in ((15, []), (14, [1])):
        scores = np.array([[30, second, 10, 9]], F) / F(64)
        case = Case(scores, np.zeros(4, bool), np.ones(1, bool), 2, SHAPES[0][3])
        got = routed(LowBitFallback(alpha=jnp.float32(0.5)), case.seen())
        assert np.flatnonzero(got.low).tolist() == low


def boosted_picks(case, t, boost, keep):
    """Picks with `boost` nats for resident experts; None where the order hangs on rounding."""
    row = eligible(case, t)
    order = ranked(row)
    if not case.valid[t]:
        return order[: case.k]
    kept = order[: min(keep, case.k)]
    nats = np.where(case.resident, boost, 0.0)
    key = [math.log(s) + add if s else -math.inf for s, add in zip(row, nats, strict=True)]
    rest = sorted((e for e in order if e not in kept), key=lambda e: (-key[e], -row[e], e))
    if boost:
        pairs = [(a, b) for a in rest for b in rest if case.resident[a] > case.resident[b]]
        finite = [abs(key[a] - key[b]) for a, b in pairs if row[a] and row[b]]
        assume(all(gap > 1e-4 for gap in finite))
    return (kept + rest)[: case.k]


@more
@given(
    st.lists(cases(), min_size=1, max_size=3),
    st.sampled_from([0.0, 0.05, 0.2, 0.7, 3.0]),
    st.integers(0, 7),
    st.integers(0, 1),
)
def test_cache_boost_adds_to_the_logits_of_resident_experts(steps, boost, keep, layer):
    router = CacheBoost(boost=jnp.float32(boost), keep=jnp.int32(keep))
    memory, spans = router.init(2, 0), []
    for case in steps:
        for t in np.flatnonzero(case.valid):
            logits = [math.log(max(float(s), float(np.finfo(F).tiny))) for s in case.scores[t]]
            spans.append(max(logits) - min(logits))
        mean = sum(spans) / max(len(spans), 1)
        nats = min(boost * mean, 60.0)
        experts = [boosted_picks(case, t, nats, keep) for t in range(len(case.scores))]
        got, memory = run(router, memory, case.seen(layer=layer))
        got = jax.tree.map(np.asarray, got)
        check(
            case, got, experts, [[eligible(case, t)[e] for e in x] for t, x in enumerate(experts)]
        )
        assert memory.tokens.tolist() == [(1 - layer) * len(spans), layer * len(spans)]
        np.testing.assert_allclose(memory.mean[layer], mean, rtol=1e-5)
        assert memory.mean[1 - layer] == 0


def test_cache_boost_learns_from_prompts_that_it_routes_exactly():
    case = Case(
        np.array([[0.5, 0.25, 0.25]], F), np.ones(3, bool), np.ones(1, bool), 1, SHAPES[0][3]
    )
    router = CacheBoost(boost=0.5)
    _, memory = run(router, router.init(1, 3), case.seen(prefill=True))
    np.testing.assert_allclose(memory.mean, [math.log(2)], rtol=1e-6)


@pytest.mark.parametrize(
    ("scores", "resident", "alpha", "paper", "released"),
    [  # k = 2; scores in 64ths
        ([30, 15, 10, 9], [3], 0.5, [0, 1], [0, 1]),  # 15 is not below 1.5 * 10
        ([30, 14, 10, 6], [3], 0.5, [0, 3], [0, 3]),
        ([30, 14, 10, 5], [3], 0.5, [0, 1], [0, 1]),  # 5 is not above 0.5 * 10
        ([30, 14, 10, 5.03], [3], 0.5, [0, 3], [0, 3]),
        ([30, 14, 10, 6], [1, 3], 0.5, [0, 1], [0, 1]),
        ([30, 14, 10, 6], [], 0.5, [0, 1], [0, 1]),
        ([30, 14, 10, 6], [2, 3], 0.5, [0, 2], [0, 3]),  # the bar itself may stand in, or not
        ([30, 14, 10, 8, 9], [3, 4], 0.5, [0, 4], [0, 3]),  # by score, or by id
        ([14, 13, 10, 7], [3], 0.5, [0, 3], [0, 3]),  # one stand-in: the lower pick goes
        ([14, 13, 10, 7, 8], [3, 4], 0.5, [4, 3], [3, 4]),
        ([30, 10, 10, 10], [2, 3], 0.5, [0, 1], [0, 1]),  # a pick as low as the bar stays
        ([30, 14, 10, 1], [3], 1.5, [0, 3], [0, 3]),
        ([30, 14, 10, 0], [3], 1.5, [0, 1], [0, 1]),  # what cannot weigh does not stand in
    ],
)
def test_the_edges_of_the_band(scores, resident, alpha, paper, released):
    case = Case(
        scores=np.array([scores], F) / F(64),
        resident=np.isin(np.arange(len(scores)), resident),
        valid=np.ones(1, bool),
        k=2,
        rule=RouterRule(normalize=False),
    )
    for variant, expected in (("paper", paper), ("released", released)):
        router = Substitute(alpha=jnp.float32(alpha), variant=variant)
        assert routed(router, case.seen()).expert.tolist() == [expected]


def shared_case(first_valid=True):
    """Token 0 must have expert 3; token 1 misses its second pick, 2, and would take 3 for it."""
    return Case(
        scores=np.array([[1, 2, 1, 12], [8, 1, 5, 4]], F) / F(16),
        resident=np.zeros(4, bool),
        valid=np.array([first_valid, True]),
        k=2,
        rule=RouterRule(normalize=False),
    )


def test_what_another_token_must_have_counts_as_resident():
    router = Substitute(alpha=jnp.float32(0.5))
    got = routed(router, shared_case().seen())
    assert got.expert.tolist() == [[3, 1], [0, 3]]
    assert got.weight[1].tolist() == [0.5, 0.25]
    assert got.replaced_mass.tolist() == [0, 5 / 16]
    alone = routed(router, shared_case(first_valid=False).seen())
    assert alone.expert.tolist() == [[3, 1], [0, 2]]
    assert alone.replaced_mass.tolist() == [0, 0]
    idle = shared_case()
    idle.scores[0], idle.resident[3] = [0, 1, 0, 0], True  # a bar of 0 puts no score of 0 into C
    assert routed(router, idle.seen()).expert.tolist() == [[1, 0], [0, 3]]


def neutral():
    """Routers whose numbers make them the model's own."""
    zero, one = jnp.float32(0), jnp.float32(1)
    return [
        Substitute(alpha=zero),
        Substitute(alpha=zero, variant="released"),
        RandomStandIn(alpha=zero, seed=jnp.int32(5)),
        SkipLow(alpha=zero),
        AttenuateLow(alpha=zero, factor=zero),
        AttenuateLow(alpha=one, factor=one),
        CacheBoost(boost=zero, keep=jnp.int32(0)),
        CacheBoost(boost=one, keep=jnp.int32(99)),
        LowBitFallback(alpha=zero),
        LowBitFallback(alpha=one, variant="share"),
    ]


def assert_same_bits(got, exact):
    for name in ("expert", "weight", "exact", "replaced_mass"):
        assert getattr(got, name).tobytes() == getattr(exact, name).tobytes()


@pytest.mark.parametrize("router", neutral(), ids=lambda router: type(router).__name__)
@given(case=cases())
def test_neutral_numbers_give_the_bits_of_top_k(router, case):
    assert not router.exact and router.low_bit == isinstance(router, LowBitFallback)
    got = routed(router, case.seen(), router.init(2, 8))
    assert_same_bits(got, routed(TopK(), case.seen()))
    assert got.low is None or not got.low.any()


def busy(**fields):
    """Routers that change much."""
    much = jnp.float32(0.9)
    return [
        Substitute(alpha=much, **fields),
        Substitute(alpha=much, variant="released", **fields),
        RandomStandIn(alpha=much, seed=jnp.int32(1), **fields),
        SkipLow(alpha=much, **fields),
        AttenuateLow(alpha=much, factor=much, **fields),
        CacheBoost(boost=much, keep=jnp.int32(0), **fields),
        LowBitFallback(alpha=much, **fields),
    ]


def wide_case():
    rng = np.random.default_rng(0)
    scores = rng.dirichlet(np.full(24, 20.0), size=6).astype(F)
    return Case(scores, rng.random(24) < 0.4, np.arange(6) < 5, 6, RouterRule(normalize=True))


@pytest.mark.parametrize("which", range(7))
def test_prompts_are_routed_exactly_unless_asked_otherwise(which):
    case, router = wide_case(), busy()[which]
    memory = router.init(1, 24)
    exact = routed(TopK(), case.seen())
    prompt = routed(router, case.seen(prefill=True), memory)
    assert_same_bits(prompt, exact)
    assert (prompt.low is not None) == router.low_bit
    decode = routed(router, case.seen(), memory)
    asked = routed(busy(prefill=True)[which], case.seen(prefill=True), memory)
    assert_same_bits(asked, decode)
    assert decode.replaced_mass.sum() > 0.05


@pytest.mark.parametrize("which", range(7))
def test_padding_is_routed_exactly_and_changes_nothing(which):
    case, router = wide_case(), busy()[which]
    memory = router.init(1, 24)
    got, after = run(router, memory, case.seen())
    noise = case.scores.copy()
    noise[5] = np.roll(noise[5], 7)
    noise[5, 3] = 40.0
    other = dataclasses.replace(case, scores=noise)
    again, after_again = run(router, memory, other.seen())
    chosen = jax.tree.map(lambda leaf: np.asarray(leaf)[:5], dataclasses.replace(got, low=None))
    expected = jax.tree.map(lambda leaf: np.asarray(leaf)[:5], dataclasses.replace(again, low=None))
    assert_same_bits(chosen, expected)
    jax.tree.map(np.testing.assert_array_equal, (got.low, after), (again.low, after_again))
    exact = routed(TopK(), other.seen())
    assert np.asarray(again.expert)[5].tolist() == exact.expert[5].tolist()
    assert np.asarray(again.weight)[5].tolist() == exact.weight[5].tolist()
    assert again.replaced_mass[5] == 0


@pytest.mark.parametrize("which", range(7))
def test_changing_a_number_does_not_recompile(which):
    traces = []

    @jax.jit
    def counted(router, memory, seen):
        traces.append(1)
        return router.route(memory, seen)

    case, router = wide_case(), busy()[which]
    memory = router.init(1, 24)
    masses = set()
    for factor in (0.0, 0.3, 1.0):
        changed = jax.tree.map(lambda leaf, f=factor: (leaf * f).astype(leaf.dtype), router)
        masses.add(float(counted(changed, memory, case.seen())[0].replaced_mass.sum()))
    assert len(traces) == 1 and len(masses) > 1


def test_unknown_variants_are_refused():
    with pytest.raises(PolicyError, match="unknown variant 'best'; known: paper, released"):
        Substitute(alpha=0.3, variant="best")
    with pytest.raises(PolicyError, match="unknown variant 'best'; known: band, share"):
        LowBitFallback(alpha=0.3, variant="best")
