"""Prefetching: the same bits, the same tables as a plain simulation, and hits where it guesses."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import build, small_config
from hypothesis import given
from hypothesis import strategies as st
from test_exactness import prompts_of, run

import moejax
from moejax import decode
from moejax.kernels import build as build_native
from moejax.policies import residency
from moejax.policies.placement import HostAll
from moejax.policies.policy import policy
from moejax.policies.prediction import (
    Ahead,
    Everything,
    LastLayer,
    NextAttention,
    NextGate,
    NextResidual,
    PreviousToken,
    View,
    best,
)
from moejax.state import pytree, static

LAYERS = 4


@pytree
class Oracle:
    """Wants what it was told for the layer ahead."""

    wanted_by_layer: jax.Array  # [L, E]
    horizon: int = static(default=1)
    attends = False

    def init(self, num_layers, num_experts):
        return None

    def observe(self, memory, view):
        return memory

    def wanted(self, memory, view, target, ahead):
        return self.wanted_by_layer[target]


@pytest.fixture(scope="module")
def deep():
    return build(small_config(num_layers=LAYERS, moe_layers=tuple(range(LAYERS))))


def with_predictor(built, predictor, **changes):
    return dataclasses.replace(built.policy, predictor=predictor, **changes)


PREDICTORS = [
    PreviousToken(limit=jnp.int32(2)),
    NextGate(limit=jnp.int32(2)),
    NextGate(limit=jnp.int32(8), horizon=3),
    NextAttention(alpha=jnp.float32(0.1)),
    NextAttention(alpha=jnp.float32(0.0), limit=jnp.int32(3), horizon=2),
    NextResidual(alpha=jnp.float32(0.1)),
    NextResidual(alpha=jnp.float32(0.0), limit=jnp.int32(1), only_missing=True),
    Everything(),
]


BUDGETS = (
    {"slots": 9},
    {"slots": 16, "per_layer": True},
    {"slots": 9, "virtual": True},
)


@pytest.mark.parametrize("number", range(len(PREDICTORS)))
def test_prefetching_never_changes_bits(deep, number):
    prompts, predictor = prompts_of(3, 2), PREDICTORS[number]
    whole, _ = run(deep, prompts, 4, slots=32)
    changes = {"placement": HostAll()} if number in (1, 3) else {}
    chosen = with_predictor(deep, predictor, **changes)
    some, traces = run(deep, prompts, 4, policy=chosen, **BUDGETS[number % 3])
    assert np.array_equal(whole, some)
    assert sum(int(t.prefetched.sum()) for t in traces) > 0


def test_a_perfect_prediction_hits_everywhere_but_in_the_first_layer(deep):
    prompts = prompts_of(5, 1)
    _, plain = run(deep, prompts, 1, slots=10)
    picks = np.asarray(plain[-1].picks)[:, 0]
    wanted = np.zeros((LAYERS, 8), np.float32)
    for layer, chosen in enumerate(picks):
        wanted[layer, chosen] = 1
    _, traces = run(
        deep,
        prompts,
        1,
        policy=with_predictor(deep, Oracle(wanted_by_layer=jnp.array(wanted))),
        slots=10,
    )
    hits, needed = np.asarray(traces[-1].hits), np.asarray(traces[-1].needed)
    assert (hits[1:] == needed[1:]).all()
    assert int(np.asarray(plain[-1].hits)[1:].sum()) < needed[1:].sum()
    assert not np.asarray(traces[-1].fetched)[1:].any()


def test_the_gate_of_the_same_hidden_state_is_the_router(deep):
    """Asked for the running layer itself, the gate gives the scores that the router gave."""

    @pytree
    class Spy:
        horizon = 1
        attends = False

        def init(self, num_layers, num_experts):
            return jnp.zeros((num_layers, num_experts))

        def observe(self, memory, view):
            return memory

        def wanted(self, memory, view, target, ahead):
            same = ahead.gate(view.hidden, view.layer) == view.scores
            return jnp.where(same.all(), 1.0, 0.0) * jnp.ones(8)

    _, traces = run(deep, prompts_of(5, 1), 1, policy=with_predictor(deep, Spy()), slots=31)
    _, plain = run(deep, prompts_of(5, 1), 1, slots=31)
    assert sum(int(t.prefetched.sum()) for t in traces) > 0
    assert sum(int(t.prefetched.sum()) for t in plain) == 0


@pytest.mark.parametrize("kernels", ["reference", "native"])
@pytest.mark.parametrize("slots", [32, 9])
def test_the_next_attention_foresees_exactly_when_nothing_is_missing(deep, kernels, slots):
    """Then the hidden state ahead is that of the layer ahead, bit for bit."""
    if kernels == "native" and build_native.library() is None:
        pytest.skip(build_native.status())

    @pytree
    class Spy:
        horizon = 1
        attends = True

        def init(self, num_layers, num_experts):
            return jnp.zeros((num_layers + 1, 2, 32)), jnp.zeros(num_layers, bool)

        def observe(self, memory, view):
            foreseen, same = memory
            same = same.at[view.layer].set((foreseen[view.layer] == view.hidden).all())
            return foreseen.at[view.layer + 1].set(view.ahead), same

        def wanted(self, memory, view, target, ahead):
            return jnp.zeros(8)

    chosen = with_predictor(deep, Spy())
    model = deep.model.clone(kernels=kernels)
    state = decode.init_state(model, chosen, deep.store, slots=slots, batch=2, context=128)
    for tokens in (np.arange(14).reshape(2, 7), [[3], [5]], [[8], [-1]]):
        tokens = jnp.asarray(tokens, jnp.int32)
        state, out = decode.decode_step(model, chosen, deep.params, deep.store, state, tokens)
        same = np.asarray(state.policy.predictor[1])
        if tokens.shape[1] > 1:
            assert not same.any()  # not asked during prefill
        elif (tokens >= 0).all():
            missed = np.asarray(out.trace.needed - out.trace.hits)
            assert same[1:].tolist() == (missed[:-1] == 0).tolist()
            assert (slots == 32) == (missed.sum() == 0)


def test_predictions_are_accounted_for(deep):
    """Counts per layer against what the recorded scores say."""
    chosen = with_predictor(deep, NextGate(alpha=jnp.float32(0.2)))
    state = decode.init_state(deep.model, chosen, deep.store, slots=12, batch=1, context=128)
    fixed = (deep.model, chosen, deep.params, deep.store)
    for token in range(20):
        tokens = jnp.array([[token]], jnp.int32)
        state, out = decode.decode_step(*fixed, state, tokens, scores=True)
        trace = jax.device_get(out.trace)
        assert not state.policy.forecast.wanted.any()  # every layer has run
        assert trace.predicted[0] == 0
        for layer in range(LAYERS):
            needed = set(trace.picks[layer, 0].tolist())
            wanted = set(np.flatnonzero(trace.forecast[layer]).tolist())
            assert trace.predicted[layer] == len(wanted)
            assert trace.predicted_right[layer] == len(wanted & needed)


@pytest.mark.parametrize("last", [0, 1, 3])
def test_the_cutoff_stops_at_its_layer(deep, last):
    everything = Oracle(wanted_by_layer=jnp.ones((LAYERS, 8)))
    chosen = with_predictor(deep, everything, cutoff=LastLayer(last=jnp.int32(last)))
    _, traces = run(deep, prompts_of(7, 1), 1, policy=chosen, slots=31)
    # Counted in the layer that asks: layer l prefetches for layer l + 1.
    total = sum(np.asarray(t.prefetched) for t in traces)
    assert (total[last:] == 0).all() and (total[:last] > 0).all()


def test_numbers_of_predictors_never_recompile(deep):
    def with_limit(limit):
        predictor = PreviousToken(limit=jnp.int32(limit))
        return with_predictor(deep, predictor, cutoff=LastLayer(last=jnp.int32(limit)))

    run(deep, prompts_of(8, 1), 1, slots=15, policy=with_limit(1))
    before = decode.decode_step._cache_size()
    run(deep, prompts_of(8, 1), 2, slots=15, policy=with_limit(3))
    assert decode.decode_step._cache_size() == before


@given(seed=st.integers(0, 2**16), slots=st.integers(3, 12), capacity=st.integers(1, 12))
def test_bring_keeps_what_is_wanted_and_fills_in_order(seed, slots, capacity):
    rng = np.random.default_rng(seed)
    tables = residency.empty(12, slots)
    for slot, expert in enumerate(rng.permutation(12)[: rng.integers(0, slots + 1)]):
        tables = residency.place(tables, jnp.int32(slot), jnp.int32(expert))
    keys, wanted = rng.integers(0, 9, 12), rng.random(4) < 0.6
    order, layer = rng.permutation(4), int(rng.integers(0, 3))
    capacity = min(capacity, slots)
    old = np.asarray(tables.owner)
    new, copies = residency.bring(
        tables,
        jnp.asarray(keys),
        jnp.int32(layer),
        jnp.asarray(wanted),
        jnp.asarray(order),
        capacity,
    )
    ids = [layer * 4 + e for e in order if wanted[e] and layer * 4 + e not in old[:capacity]]
    kept = {layer * 4 + e for e in range(4) if wanted[e]}
    owner = old.copy()
    free = [s for s in range(capacity) if owner[s] not in kept]
    for expert in ids[: len(free)]:
        empty = [s for s in free if owner[s] < 0]
        slot = empty[0] if empty else min(free, key=lambda s: (keys[owner[s]], s))
        owner[owner == expert] = -1
        owner[slot] = expert
        free.remove(slot)
    assert np.asarray(new.owner).tolist() == owner.tolist()
    count = int(copies.count)
    assert count == min(len(ids), len(old[:capacity]) - len(kept & set(old[:capacity].tolist())))
    brought = zip(np.asarray(copies.slot)[:count], np.asarray(copies.expert)[:count], strict=True)
    assert all(owner[slot] == expert for slot, expert in brought)


def test_best_keeps_the_greatest():
    assert best(jnp.array([0.1, 0.5, 0.5, 0.2]), 2).tolist() == [0, 0.5, 0.5, 0]
    assert best(jnp.array([1.0, 1.0, 1.0]), 1).tolist() == [1, 0, 0]
    assert not best(jnp.zeros(3), 2).any()


def test_padding_predicts_nothing():
    hidden = jnp.zeros((2, 4))
    view = View(
        layer=jnp.int32(0),
        hidden=hidden,
        x=hidden,
        shared=None,
        partial=hidden,
        ahead=hidden,
        scores=jnp.zeros((2, 3)),
        tokens=jnp.zeros(3, jnp.int32),
        missed=jnp.bool_(True),
        resident=jnp.zeros(3, bool),
        valid=jnp.zeros(2, bool),
        top_k=1,
    )
    ahead = Ahead(
        gate=lambda hidden, target: jnp.ones((2, 3)),
        input_norm=lambda hidden, target: hidden,
        attend=lambda *_: None,
    )
    for predictor in PREDICTORS[:-1]:
        memory = predictor.init(2, 3)
        memory = predictor.observe(memory, view)
        wanted = predictor.wanted(memory, view, jnp.int32(1), ahead)
        assert not wanted.any()


def test_prefetched_bytes_are_counted():
    chosen = with_predictor(type("B", (), {"policy": policy("lru")}), PREDICTORS[1])
    runtime = moejax.load("tiny", slots=64, policy=chosen, context=128)
    runtime.generate("The sea", max_new_tokens=8)
    stats = runtime.stats
    assert stats.prefetched > 0
    assert stats.bytes_moved == (stats.fetched + stats.prefetched) * stats.record_bytes
    plain = moejax.load("tiny", slots=64, context=128)
    plain.generate("The sea", max_new_tokens=8)
    assert stats.hit_rate > plain.stats.hit_rate
    assert plain.stats.prefetched == 0
