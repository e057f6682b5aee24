"""Replays agree with real runs: hits, misses and residency of every pass and layer."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import build, small_config

from moejax import decode
from moejax.policies.foresight import Promote
from moejax.policies.policy import policy
from moejax.policies.prediction import Everything, NoPrediction, PreviousToken
from moejax.simulator import labels, replay, runs
from moejax.simulator.simulate import Asked, simulate
from moejax.traces.recorder import Keep, Recorder
from moejax.traces.trace import Phase, Trace

LAYERS, EXPERTS, WIDTH = 3, 8, 6


@pytest.fixture(scope="module")
def model():
    config = small_config(num_layers=LAYERS, moe_layers=tuple(range(LAYERS)), num_experts=EXPERTS)
    return build(config, seed=3)


def real(model, made, slots, *, per_layer=False, batch=1, steps=14) -> Trace:
    """A trace of two prompts of given tokens, each with its decode steps, run by the engine.

    Every pass is fed as a window, padded: one program to compile.
    """
    rng = np.random.default_rng(5)
    made = dataclasses.replace(made, capacity=jnp.int32(slots))
    sizes = {"slots": slots, "batch": batch, "context": 64, "per_layer": per_layer}
    state = decode.init_state(model.model, made, model.store, **sizes)
    keep = Keep(residency=True, full=True)
    recorder = Recorder(experts=EXPERTS, keep=keep, exact=not made.exact)
    fixed = (model.model, made, model.params, model.store)
    for sequence in (0, batch):
        length = np.zeros(batch, np.int64)
        state = decode.rewind(state, length)
        for i, width in enumerate([WIDTH, *[1] * steps]):
            tokens = np.full((batch, WIDTH), -1, np.int32)
            tokens[:, :width] = rng.integers(0, 61, (batch, width))
            state, out = decode.decode_step(*fixed, state, tokens, scores=True, prefill=False)
            phase = Phase.DECODE if i else Phase.PREFILL if made.exact else Phase.VERIFY
            recorder.add(phase, tokens, length, sequence, out.trace, (0.0, 1.0))
            length = length + width
    about = {"source": "moejax", "record_bytes": 10, "router": {"normalize": True}}
    return recorder.finished("small", about)


def agrees(trace, found):
    for name in replay.COUNTS:
        np.testing.assert_array_equal(found.counts[name], trace.counts[name], name)
    np.testing.assert_array_equal(found.resident, trace.resident)


def mixed(name, **parts):
    return dataclasses.replace(policy(name), **parts)


# Evictors by use and by score, pools and slots per layer, host and link, prefetch: each at least
# once. (policy, slots per layer?, sequences)
EXACT = {
    "balanced": (policy("balanced:load=1"), True, 2),
    "score window, streamed": (
        mixed("score-window:window=4", predictor=Everything()),
        False,
        1,
    ),
    "hybrimoe": (
        mixed("hybrimoe:load=1,host=2", predictor=PreviousToken(limit=jnp.int32(2))),
        False,
        1,
    ),
}
CHECKED = Asked(semantics="engine", check=True)


@pytest.fixture(scope="module")
def balanced(model):
    made, per_layer, batch = EXACT["balanced"]
    return real(model, made, 9, per_layer=per_layer, batch=batch)


@pytest.mark.parametrize("name", EXACT)
def test_exact_policies_agree(model, balanced, name):
    made, per_layer, batch = EXACT[name]
    trace = balanced
    if name != "balanced":
        trace = real(model, made, 9, per_layer=per_layer, batch=batch)
    asked = dataclasses.replace(CHECKED, per_layer=per_layer)
    [found] = simulate(trace, [made], [9], asked, keep=True)
    agrees(trace, found)
    assert found.label == "exact" and found.sequences == batch
    assert found.total("hits") > 0 and found.total("evicted") > 0
    assert found.total("fetched") + found.total("prefetched") > 0
    assert "streamed" not in name or found.total("prefetched") > 0
    assert not made.placement.uses_host or found.total("host") > 0


def test_live_costs_are_those_of_the_run(balanced):
    """A placement that learned its costs step by step is replayed with what it had learned."""
    made, per_layer, _ = EXACT["balanced"]
    asked = dataclasses.replace(CHECKED, per_layer=per_layer)
    shape = (balanced.passes, balanced.layers)
    dear = {"load_us": np.full(shape, 1e6, "f4"), "host_us": np.ones(shape, "f4")}
    told = dataclasses.replace(balanced, counts=balanced.counts | dear)
    [own], [learned] = (simulate(t, [made], [9], asked, keep=True) for t in (balanced, told))
    # The two pointers fetch the first miss of a layer whatever it costs, and here no other.
    assert (learned.counts["fetched"] <= 1).all() and (own.counts["fetched"] > 1).any()
    assert learned.total("host") > own.total("host")


def test_what_a_trace_does_not_hold_is_not_called_exact(model, balanced):
    """Costs and rates learned over a link, and scores as files hold them."""
    made, per_layer, _ = EXACT["balanced"]

    def label(trace, made):
        """Of a replay that counted what the run did."""
        own = dataclasses.replace(made, capacity=jnp.int32(9))
        return labels.unknown(trace, own, per_layer, trace.counts) or "exact"

    def run_of(trace, made):
        whose = {"capacity": 9, "per_layer": per_layer, "policy_parts": runs.parts_of(made)}
        return dataclasses.replace(trace, about=trace.about | whose)

    linked = dataclasses.replace(balanced, about=balanced.about | {"link": "paced:20,1"})
    [found] = simulate(linked, [made], [9], dataclasses.replace(CHECKED, per_layer=per_layer))
    assert found.label == label(linked, made)
    assert label(linked, made).startswith("open-loop, learns costs")
    assert label(linked, policy("lru")) == "exact"
    ones = np.ones((balanced.passes, balanced.layers), "f4")
    counts = linked.counts | {"load_us": ones, "host_us": ones}
    told = dataclasses.replace(linked, counts=counts)
    assert label(told, policy("score-window:window=4")) == "exact"
    priced = mixed("lru", placement=policy("auto").placement)
    assert label(told, priced).startswith("open-loop, learns costs")
    assert label(told, made) == labels.OTHER_COSTS
    assert label(run_of(told, made), made) == "exact"
    assert label(linked, mixed("lru", foresight=Promote())) == "exact"  # learns nothing
    promoting = dataclasses.replace(made, foresight=Promote())
    assert label(told, promoting).startswith("open-loop, learns costs")
    rated = dataclasses.replace(told, counts=told.counts | {"rate": ones})
    assert label(run_of(rated, promoting), promoting) == "exact"
    assert label(run_of(rated, made), promoting) == labels.OTHER_COSTS
    rounded = dataclasses.replace(balanced, scores=balanced.scores.astype(np.float16))
    assert label(rounded, policy("score-window:window=4")) == "rounded scores"
    assert label(rounded, policy("lru")) == "exact"
    ids = np.argsort(-balanced.scores, axis=2)[:, :, :4].astype(np.int16)
    most = np.take_along_axis(balanced.scores, ids.astype(int), axis=2).astype(np.float16)
    cut = dataclasses.replace(balanced, scores=None, top_ids=ids, top_scores=most)
    assert label(cut, policy("score-window:window=4")) == "truncated scores"


@pytest.fixture(scope="module")
def lossy(model):
    parts = {"predictor": NoPrediction(), "speculation": policy("lookup:gamma=5").speculation}
    made = mixed("smoe:alpha=0.6,window=4,load=1,host=2", **parts)
    trace = real(model, made, 7)
    whose = {"capacity": 7, "per_layer": False, "policy_parts": runs.parts_of(made)}
    return made, dataclasses.replace(trace, about=trace.about | whose)


def test_substitution_is_made_again(lossy):
    """A lossy run from its scores: the same stand-ins, so the same tables; other budgets do not."""
    made, trace = lossy
    found, other = simulate(trace, [made], [7, 12], CHECKED, keep=True)
    agrees(trace, found)
    assert found.label == "closed-loop" and found.total("replaced") > 0
    np.testing.assert_allclose(
        found.counts["replaced_mass"], trace.counts["replaced_mass"], atol=1e-6
    )
    assert other.label.startswith("open-loop") and other.counts["differing"].sum() > 0
    [exact] = simulate(trace, ["lru"], [9], Asked())
    assert exact.label.startswith("open-loop")


def test_rounded_scores_follow_the_recorded_picks(lossy):
    """Scores as files hold them may tip a choice; few that differ give way to what was recorded."""
    made, trace = lossy
    scores = np.array(trace.scores)
    # As if rounding had exchanged what the last token scores.
    scores[-1, -1] = np.roll(scores[-1, -1], 1)
    changed = dataclasses.replace(trace, scores=scores)
    found, _ = simulate(changed, [made], [7, 12], CHECKED, keep=True)
    assert found.label == "closed-loop, recorded" and not found.counts["differing"].any()
    for name in ("needed", "hits", "fetched", "replaced"):
        np.testing.assert_array_equal(found.counts[name], trace.counts[name], name)
