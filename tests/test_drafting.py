"""Draft routers against plain loops over tokens, written from the papers' text."""

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from test_substitution import (
    Case,
    alphas,
    assert_same_bits,
    cases,
    eligible,
    missing_of,
    ranked,
    routed,
    standins_of,
    weigh,
    wide_case,
)

from moejax.config import RouterRule
from moejax.errors import PolicyError
from moejax.policies.drafting import (
    AllLowBits,
    BandThenSkip,
    GatedBias,
    NearestResident,
    RandomResident,
    SkipMissing,
)
from moejax.policies.prediction import MANY
from moejax.policies.routing import TopK

F = np.float32
LAYERS = 2
PICKS = st.sampled_from([1, 2, 3, 99])


def tables(case, seed):
    """Distances with many ties, not symmetric, so that rows and columns are told apart."""
    experts = case.scores.shape[1]
    rng = np.random.default_rng(seed)
    return rng.integers(1, 5, size=(LAYERS, experts, experts)).astype(F)


def everyone(case, picks=MANY):
    """One router of each kind, with numbers that change much."""
    distance, picks = jnp.asarray(tables(case, 5)), jnp.int32(picks)
    return [
        NearestResident(distance=distance, picks=picks),
        NearestResident(distance=distance, picks=picks, weights="own"),
        RandomResident(seed=jnp.int32(3), picks=picks),
        SkipMissing(picks=picks),
        BandThenSkip(alpha=F(0.9), picks=picks),
        GatedBias(low=F(0), high=F(0.1), strength=F(4), reach=jnp.int32(0), picks=picks),
        GatedBias(low=F(0), high=F(0.1), strength=F(9), reach=jnp.int32(2), picks=picks),
        AllLowBits(picks=picks),
    ]


KINDS = range(len(everyone(wide_case())))


# the oracle: a list of (expert, score) by rank for each token, (-1, 0) = left out


def left_out(case):
    return [(-1, 0.0)] * case.k


def merged(case, picks):
    """Picks of one token with those that end at the same expert added up in the better rank."""
    out = left_out(case)
    for rank, (expert, score) in enumerate(picks):
        first = next((r for r in range(rank) if out[r][0] == expert), rank)
        if expert >= 0:
            out[first] = (expert, out[first][1] + float(score))
    return out


def check(case, got, expected):
    """Equal to expected[t], for padding to nothing."""
    for t, valid in enumerate(case.valid):
        row = eligible(case, t)
        exact = ranked(row)[: case.k]
        picks = expected[t] if valid else left_out(case)
        experts = [expert for expert, _ in picks]
        after = weigh(case.rule, [score for _, score in picks])
        before = weigh(case.rule, [float(row[e]) for e in exact])
        used = dict(zip(experts, after, strict=True))
        lost = sum(max(0.0, w - used.get(e, 0.0)) for e, w in zip(exact, before, strict=True))
        assert got.exact[t].tolist() == exact
        assert got.expert[t].tolist() == experts
        np.testing.assert_allclose(got.weight[t], after, rtol=2e-6, atol=0)
        np.testing.assert_allclose(got.replaced_mass[t], lost if valid else 0, atol=5e-6)
    assert got.expert.dtype == got.exact.dtype == np.int32
    assert got.weight.dtype == got.replaced_mass.dtype == F


@given(
    cases(),
    st.integers(0, 99),
    PICKS,
    st.integers(0, LAYERS - 1),
    st.sampled_from(["inherit", "own"]),
    st.sampled_from([(), (np.nan,), (np.inf, np.nan)]),
)
def test_the_nearest_resident_stands_in(case, seed, picks, layer, weights, odd):
    distance = tables(case, seed)
    for i, value in enumerate(odd):
        distance[..., i + 1] = value
    router = NearestResident(distance=jnp.asarray(distance), picks=jnp.int32(picks))
    router = dataclasses.replace(router, weights=weights)
    got = routed(router, case.seen(layer=layer))
    expected = []
    for t in range(len(case.scores)):
        row, dealt = eligible(case, t), []
        for pick in ranked(row)[: min(picks, case.k)]:
            away = distance[layer, pick]
            there = [e for e in np.flatnonzero(case.resident) if away[e] < np.inf]
            if case.resident[pick]:
                dealt.append((pick, row[pick]))
            elif there:
                standin = min(there, key=lambda e, away=away: (away[e], e))
                own = weights == "own"
                dealt.append((standin, case.scores[t, standin] if own else row[pick]))
            else:
                dealt.append((-1, 0.0))
        expected.append(merged(case, dealt))
    check(case, got, expected)


def test_duplicates_add_up_in_the_better_rank():
    case = Case(
        scores=np.array([[8, 4, 2, 1, 1]], F) / F(16),
        resident=np.array([0, 1, 0, 1, 0], bool),
        valid=np.ones(1, bool),
        k=3,
        rule=RouterRule(normalize=False),
    )
    distance = np.full((1, 5, 5), 9, F)
    distance[0, 0, 1] = distance[0, 2, 1] = 1
    got = routed(NearestResident(distance=jnp.asarray(distance)), case.seen())
    assert got.expert.tolist() == [[1, -1, -1]]
    assert got.weight.tolist() == [[14 / 16, 0, 0]]
    assert got.replaced_mass.tolist() == [10 / 16]
    own = routed(NearestResident(distance=jnp.asarray(distance), weights="own"), case.seen())
    assert own.weight.tolist() == [[12 / 16, 0, 0]]


@given(cases(), st.integers(0, 2**31 - 1), PICKS)
def test_random_residents_inherit(case, seed, picks):
    got = routed(RandomResident(seed=jnp.int32(seed), picks=jnp.int32(picks)), case.seen())
    expected = []
    for t, valid in enumerate(case.valid):
        row = eligible(case, t)
        exact = ranked(row)[: min(picks, case.k)]
        missing = [e for e in exact if not case.resident[e]]
        used = [int(e) for e in got.expert[t] if e >= 0]
        assert set(used) <= set(np.flatnonzero(case.resident))
        assert bool(used) == bool(valid and case.resident.any())
        options = []  # everything that a draw among the experts used could have led to
        for drawn in itertools.product(used, repeat=len(missing)):
            swap = dict(zip(missing, drawn, strict=True))
            options.append(merged(case, [(swap.get(e, e), row[e]) for e in exact]))
        fits = [
            o for o in options if np.allclose(weigh(case.rule, [s for _, s in o]), got.weight[t])
        ]
        fits = [o for o in fits if [e for e, _ in o] == got.expert[t].tolist()]
        assert fits or not used
        expected.append(fits[0] if fits else left_out(case))
    check(case, got, expected)


def test_random_residents_are_drawn_evenly_and_by_seed_layer_and_scores():
    rng = np.random.default_rng(3)
    tokens = 512
    base = np.array([0.5, 0.2, 0.1, 0.05, 0.05, 0.05, 0.05], F)
    case = Case(
        scores=base * rng.uniform(0.999, 1.001, (tokens, 7)).astype(F),
        resident=np.array([0, 0, 1, 0, 1, 1, 1], bool),
        valid=np.ones(tokens, bool),
        k=2,
        rule=RouterRule(normalize=False),
    )
    router = RandomResident(seed=jnp.int32(0), picks=jnp.int32(1))
    drawn = routed(router, case.seen()).expert[:, 0]
    counts = np.bincount(drawn, minlength=7)
    assert set(np.flatnonzero(counts)) == {2, 4, 5, 6}
    assert counts[counts > 0].min() > tokens / 4 * 0.7
    other = dataclasses.replace(router, seed=jnp.int32(1))
    for changed in (routed(other, case.seen()), routed(router, case.seen(layer=1))):
        assert 0.15 < (changed.expert[:, 0] == drawn).mean() < 0.35
    both = routed(dataclasses.replace(router, picks=jnp.int32(2)), case.seen()).expert
    assert (both[:, 0] == drawn).all()
    assert 0.15 < (both[:, 1] < 0).mean() < 0.35  # two draws of one token are independent
    half = np.arange(tokens) % 2 == 0  # padding has no say in the others' draws
    apart = dataclasses.replace(case, valid=half)
    assert (routed(router, apart.seen()).expert[half, 0] == drawn[half]).all()


@given(cases(), PICKS)
def test_missing_picks_are_skipped(case, picks):
    expected = []
    for t in range(len(case.scores)):
        row = eligible(case, t)
        exact = ranked(row)[: min(picks, case.k)]
        kept = [(e, row[e]) if case.resident[e] else (-1, 0.0) for e in exact]
        expected.append(merged(case, kept))
    check(case, routed(SkipMissing(picks=jnp.int32(picks)), case.seen()), expected)


@given(cases(), alphas, PICKS)
def test_the_band_is_filled_and_the_rest_skipped(case, alpha, picks):
    got = routed(BandThenSkip(alpha=F(alpha), picks=jnp.int32(picks)), case.seen())
    expected = []
    for t in range(len(case.scores)):
        alone = dataclasses.replace(case, valid=np.arange(len(case.valid)) == t)
        row = eligible(case, t)
        missing = missing_of(alone, t, alpha)
        standins = standins_of(alone, t, alpha, "paper")
        leaving = missing[max(0, len(missing) - len(standins)) :]
        swap = dict(zip(leaving, standins, strict=False))
        used = [swap.get(e, e) for e in ranked(row)[: case.k]][:picks]
        expected.append(
            merged(case, [(e, row[e]) if case.resident[e] else (-1, 0.0) for e in used])
        )
    check(case, got, expected)


def test_what_another_token_must_have_is_no_standin():
    case = Case(  # SMoE's C holds expert 3 for token 0's sake, and token 1 would take it for 2
        scores=np.array([[1, 2, 1, 12, 1], [8, 1, 5, 4, 3]], F) / F(32),
        resident=np.array([1, 0, 0, 0, 1], bool),
        valid=np.ones(2, bool),
        k=2,
        rule=RouterRule(normalize=False),
    )
    got = routed(BandThenSkip(alpha=F(0.5)), case.seen())
    assert got.expert.tolist() == [[-1, -1], [0, 4]]


def raised(case, t, router, picks):
    """Scores of a token in f64 after the gated bias; None: the order hangs on rounding."""
    row = np.array(eligible(case, t), np.float64)
    limit = min(picks, case.k)
    missing = sum(not case.resident[e] for e in ranked(row)[:limit])
    low, high = float(router.low), float(router.high)
    gate = min(max((missing / limit - low) / (high - low), 0.0), 1.0)
    entropy = -sum(float(s) * math.log(s) for s in case.scores[t] if s > 0)
    entropy = min(max(entropy / math.log(len(row)), 0.0), 1.0)
    nats = float(router.strength) * gate * (0.2 + 0.8 * entropy)
    reach = int(router.reach) * case.k or len(row)
    up = case.resident & np.isin(np.arange(len(row)), ranked(row)[:reach])
    key = row * np.exp(np.where(up, nats, 0.0))
    pairs = itertools.product(key[up & (row > 0)], key[~up & (row > 0)])
    assume(not nats or all(abs(a - b) > 1e-5 * a for a, b in pairs))
    return key


@given(
    cases(),
    st.sampled_from([(0.25, 0.5), (0.0, 1.0), (0.1, 0.4)]),
    st.sampled_from([0.0, 0.5, 2.0, 4.0]),
    st.integers(0, 3),
    PICKS,
)
def test_residents_are_raised_when_many_picks_are_missing(case, gate, strength, reach, picks):
    router = GatedBias(
        low=F(gate[0]),
        high=F(gate[1]),
        strength=F(strength),
        reach=jnp.int32(reach),
        picks=jnp.int32(picks),
    )
    expected = []
    for t in range(len(case.scores)):
        row = eligible(case, t)
        key = raised(case, t, router, picks)
        key[ranked(row)[0]] = math.inf
        used = ranked(key)[: min(picks, case.k)]
        kept = [(e, row[e]) if case.resident[e] else (-1, 0.0) for e in used]
        expected.append(merged(case, kept))
    check(case, routed(router, case.seen()), expected)


GATED = (30, 12, 10, 8, 2, 1, 1, 0)  # scores in 64ths


def gated(resident, scores=GATED, k=4, **fields):
    case = Case(
        scores=np.array([scores], F) / F(64),
        resident=np.isin(np.arange(8), resident),
        valid=np.ones(1, bool),
        k=k,
        rule=RouterRule(normalize=True),
    )
    return routed(GatedBias(**fields), case.seen()).expert.tolist()[0]


def test_the_gate_opens_between_its_bounds():
    assert gated([0, 1, 2, 4]) == [0, 1, 2, -1]  # one in four: closed
    assert gated([0, 1, 4]) == [0, 1, 4, -1]  # two in four: open
    assert gated([0, 1, 4], strength=0.0) == [0, 1, -1, -1]
    assert gated([1, 4, 5, 6, 7]) == [-1, 1, 4, 5]  # the best pick stays a pick
    assert gated([0, 1, 4], low=0.5, high=0.5) == [0, 1, -1, -1]
    assert gated([0, 1, 4], low=0.4, high=0.4) == [0, 1, 4, -1]
    mixed = (30, 2, 10, 8, 12, 1, 1, 0)
    assert gated([0, 1, 4, 7], mixed, strength=1e30) == [0, 4, 1, -1]  # none is raised to infinity


def test_a_router_in_doubt_is_raised_more():
    shares = [s / 64 for s in GATED if s]
    entropy = -sum(s * math.log(s) for s in shares) / math.log(8)
    needed = math.log(8 / 2) / (0.2 + 0.8 * entropy)  # for expert 4 to beat 3
    assert gated([0, 1, 4], strength=needed * 1.01) == [0, 1, -1, 4]
    assert gated([0, 1, 4], strength=needed * 0.99) == [0, 1, -1, -1]


def test_only_experts_within_reach_are_raised():
    assert gated([3], k=2, reach=2) == [-1, 3]
    assert gated([4], k=2, reach=2) == [-1, -1]
    assert gated([4], k=2, reach=0) == [-1, 4]
    tied = (30, 12, 10, 6, 6, 0, 0, 0)
    assert gated([3], tied, k=2, reach=2) == [-1, 3]
    assert gated([4], tied, k=2, reach=2) == [-1, -1]


@given(cases(), PICKS)
def test_all_experts_run_from_low_bit_copies(case, picks):
    router = AllLowBits(picks=jnp.int32(picks))
    got = routed(router, case.seen())
    assert router.low_bit and got.low.tolist() == [True] * case.scores.shape[1]
    expected = []
    for t in range(len(case.scores)):
        row = eligible(case, t)
        expected.append(merged(case, [(e, row[e]) for e in ranked(row)[:picks][: case.k]]))
    check(case, got, expected)


@pytest.mark.parametrize("kind", KINDS)
@given(case=cases(), picks=st.sampled_from([0, 1, 3, MANY]), broken=st.booleans())
def test_no_draft_uses_what_is_not_resident_or_one_expert_twice(kind, case, picks, broken):
    router = everyone(case, picks)[kind]
    if broken:
        case = dataclasses.replace(case, scores=np.where(case.scores < 0.1, np.nan, case.scores))
    got = routed(router, case.seen())
    assert not router.exact and router.low_bit == isinstance(router, AllLowBits)
    for t, valid in enumerate(case.valid):
        used = [e for e in got.expert[t] if e >= 0]
        assert len(set(used)) == len(used) <= min(picks, case.k)
        assert router.low_bit or case.resident[used].all()
        assert (got.weight[t][got.expert[t] < 0] == 0).all()
        if not valid:
            assert not used and got.replaced_mass[t] == 0
        elif not broken:
            assert np.isfinite(got.weight[t]).all() and (got.weight[t] >= 0).all()
            if case.rule.normalize and got.weight[t].any():
                np.testing.assert_allclose(got.weight[t].sum(), case.rule.scale, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@given(case=cases())
def test_with_everything_resident_the_bits_are_those_of_top_k(kind, case):
    case = dataclasses.replace(
        case, resident=np.ones_like(case.resident), valid=np.ones_like(case.valid)
    )
    for picks in (case.k, MANY):
        got = routed(everyone(case, picks)[kind], case.seen())
        assert_same_bits(got, routed(TopK(), case.seen()))


@pytest.mark.parametrize("kind", KINDS)
def test_a_pick_of_a_group_that_is_out_weighs_nothing(kind):
    rule = RouterRule(normalize=False, num_groups=2, top_groups=1)
    case = Case(np.array([[8, 0, 4, 4]], F) / F(16), np.ones(4, bool), np.ones(1, bool), 3, rule)
    got = routed(everyone(case)[kind], case.seen())
    assert got.expert.tolist() == [[0, 1, 2]] and got.weight.tolist() == [[0.5, 0, 0]]
    assert got.replaced_mass.tolist() == [0]


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_are_routed_like_other_tokens(kind):
    case = wide_case()
    router = everyone(case, 4)[kind]
    decode = routed(router, case.seen())
    assert_same_bits(routed(router, case.seen(prefill=True)), decode)
    assert decode.replaced_mass.sum() > 0.05


@pytest.mark.parametrize("kind", KINDS)
def test_padding_changes_nothing(kind):
    case = wide_case()
    router = everyone(case, 4)[kind]
    got = routed(router, case.seen())
    noise = case.scores.copy()
    noise[5] = np.nan
    again = routed(router, dataclasses.replace(case, scores=noise).seen())
    for name in ("expert", "weight", "replaced_mass"):
        assert getattr(got, name).tobytes() == getattr(again, name).tobytes()


@pytest.mark.parametrize("kind", KINDS)
def test_changing_a_number_does_not_recompile(kind):
    traces = []

    @jax.jit
    def counted(router, seen):
        traces.append(1)
        return router.route(None, seen)[0]

    case, masses = wide_case(), set()
    for picks in (6, 3, 1):
        router = everyone(case, picks)[kind]
        changed = jax.tree.map(lambda leaf, p=picks: leaf * leaf.dtype.type(p), router)
        changed = dataclasses.replace(changed, picks=jnp.int32(picks))
        masses.add(float(counted(changed, case.seen()).replaced_mass.sum()))
    assert len(traces) == 1 and len(masses) > 1


def test_nothing_resident_leaves_everything_out():
    case = dataclasses.replace(wide_case(), resident=np.zeros(24, bool))
    for router in everyone(case)[:-1]:
        got = routed(router, case.seen())
        assert (got.expert == -1).all() and (got.weight == 0).all()
        np.testing.assert_allclose(got.replaced_mass, case.valid, rtol=1e-6)


def test_one_expert_is_enough():
    case = Case(
        np.ones((2, 1), F), np.ones(1, bool), np.array([True, False]), 1, RouterRule(normalize=True)
    )
    for router in everyone(case):
        got = routed(router, case.seen())
        assert got.expert.tolist() == [[0], [-1]] and got.weight.tolist() == [[1], [0]]


def test_other_weights_are_refused():
    with pytest.raises(PolicyError, match="unknown weights 'none'; known: inherit, own"):
        NearestResident(distance=jnp.zeros((1, 2, 2)), weights="none")


def test_distances_are_asked_for():
    with pytest.raises(PolicyError, match="see distances_of"):
        NearestResident().route(None, wide_case().seen())
