"""SMoE in the engine: exact where it must be, the same in every tier, its loss accounted for."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import build, small_config
from test_exactness import prompts_of, run

import moejax
from moejax import decode, loss, low_bits
from moejax.errors import InputError, PolicyError
from moejax.kernels import build as build_native
from moejax.kernels.store import Store
from moejax.policies.alternatives import CacheBoost, LowBitFallback
from moejax.policies.eviction import LRU
from moejax.policies.policy import policy, with_alpha
from moejax.policies.presets import PRESETS
from moejax.policies.routing import TopK
from moejax.policies.substitution import AttenuateLow, RandomStandIn, SkipLow, Substitute
from moejax.state import Forecast, pytree

needs_native = pytest.mark.skipif(build_native.library() is None, reason=build_native.status())
LAYERS, EXPERTS, SLOTS = 4, 16, 24
LOSSY = {
    "substitute": Substitute(alpha=jnp.float32(0.6)),
    "released": Substitute(alpha=jnp.float32(0.6), variant="released"),
    "random": RandomStandIn(alpha=jnp.float32(0.6)),
    "skip": SkipLow(alpha=jnp.float32(0.6)),
    "attenuate": AttenuateLow(alpha=jnp.float32(0.6), factor=jnp.float32(0.5)),
    "boost": CacheBoost(boost=jnp.float32(0.3)),
    "low-bit": LowBitFallback(alpha=jnp.float32(0.6)),
}


@functools.cache
def deep(kernels):
    config = small_config(num_layers=LAYERS, moe_layers=tuple(range(LAYERS)), num_experts=EXPERTS)
    config = dataclasses.replace(config, top_k=4)
    built = build(config, "bfloat16")
    store = dataclasses.replace(built.store, low=low_bits.copies(built.store))
    return dataclasses.replace(built, model=built.model.clone(kernels=kernels), store=store)


def steps(built, policy, tokens, *, store=None, scores=False, **budget):
    """Logits [T, B, V] and traces of single steps, and the last state."""
    store = store or built.store
    state = decode.init_state(
        built.model, policy, store, batch=tokens.shape[1], context=128, **budget
    )
    logits, traces = [], []
    for row in tokens:
        state, out = decode.decode_step(
            built.model, policy, built.params, store, state, row[:, None], scores=scores
        )
        logits.append(np.asarray(out.logits))
        traces.append(jax.device_get(out.trace))
    return np.stack(logits), traces, state


def tokens_of(seed, count, batch):
    return np.random.default_rng(seed).integers(0, 61, (count, batch)).astype(np.int32)


@pytest.mark.parametrize("kernels", ["reference", pytest.param("native", marks=needs_native)])
def test_alpha_zero_is_the_exact_run(kernels):
    built, prompts = deep(kernels), prompts_of(1, 2)
    whole, _ = run(built, prompts, 6, slots=LAYERS * EXPERTS)
    lossy = with_alpha(policy("smoe"), 0.0)
    some, traces = run(built, prompts, 6, policy=lossy, slots=SLOTS)
    assert np.array_equal(whole, some)
    assert sum(t.host.sum() for t in traces) > 0 and sum(t.prefetched.sum() for t in traces) > 0
    assert not any(t.replaced.any() or t.replaced_mass.any() for t in traces)


@pytest.mark.parametrize("name", LOSSY)
def test_prompts_keep_the_routing_of_the_model(name):
    built, prompts = deep("reference"), prompts_of(2, 2)
    whole, _ = run(built, prompts, 0, slots=LAYERS * EXPERTS)
    lossy = dataclasses.replace(policy("lru"), router=LOSSY[name], must_be_exact=False)
    some, traces = run(built, prompts, 0, policy=lossy, slots=SLOTS)
    assert np.array_equal(whole, some) and not lossy.exact
    assert not any(t.replaced_mass.any() for t in traces)


class Jittered:
    """The store of a built model over a paced link whose delays depend on a seed."""

    def __init__(self, built, seed, **how):
        records = np.asarray(built.store.records)
        how = {"gigabytes_per_second": 1.0, "latency_us": 10.0, "jitter_us": 300.0} | how
        self.link = Store.open_paced(records, seed=seed, **how)
        handle = jax.device_put(np.int32(self.link.handle))
        self.store = dataclasses.replace(built.store, link=handle)

    def __enter__(self):
        return self.store

    def __exit__(self, *exception):
        self.link.close()


def assert_same(first, second):
    (logits, traces, state), (other, others, end) = first, second
    assert np.array_equal(logits, other)
    for a, b in zip(traces, others, strict=True):
        for field in dataclasses.fields(a):
            # How long it took, and what of the residents was still to come, differs by tier.
            if field.name not in ("stall", "late", "passes"):
                one, two = getattr(a, field.name), getattr(b, field.name)
                assert jax.tree.all(jax.tree.map(np.array_equal, one, two)), field.name
    assert np.array_equal(state.experts.residency.owner, end.experts.residency.owner)


@needs_native
@pytest.mark.parametrize("name", ["smoe:alpha=0.6", "smoe-fetch:alpha=0.6,horizon=2"])
def test_lossy_results_depend_on_no_timing_and_on_no_tier(name):
    built, tokens = deep("native"), tokens_of(3, 24, 2)
    chosen = policy(name)
    memory = steps(built, chosen, tokens, slots=SLOTS)
    assert sum(t.replaced.sum() for t in memory[1]) > 0
    assert_same(memory, steps(built, chosen, tokens, slots=SLOTS, virtual=True))
    for seed, buffers in ((1, 64), (2, 3)):
        with Jittered(built, seed, buffers=buffers) as store:
            assert_same(memory, steps(built, chosen, tokens, store=store, slots=SLOTS))


@needs_native
def test_a_step_over_a_link_has_no_effects():
    """JAX dispatches programs with effects from Python, which costs more than a small model."""
    built, chosen = deep("native"), policy("smoe")
    with Jittered(built, 0) as store:
        state = decode.init_state(built.model, chosen, store, slots=SLOTS, context=128)
        step = functools.partial(decode.step, built.model, chosen, built.params, store)
        assert not jax.make_jaxpr(step)(state, np.zeros((1, 1), np.int32)).effects


@needs_native
@pytest.mark.parametrize("host", [1e-3, 1.0, 1e3])
def test_host_computed_fetched_and_resident_experts_give_the_same_bits(host):
    built, tokens = deep("native"), tokens_of(4, 12, 2)
    whole, *_ = steps(built, policy("lru"), tokens, slots=LAYERS * EXPERTS)
    chosen = policy(f"balanced:load=1.0,host={host}")
    link = Jittered(built, 1, host_us=50.0)
    with link as store:
        some, traces, _ = steps(built, chosen, tokens, store=store, slots=SLOTS)
        stats = link.link.stats()
    assert np.array_equal(whole, some)
    fetched, hosted = (sum(getattr(t, n).sum() for t in traces) for n in ("fetched", "host"))
    assert hosted > 0 and (fetched > 0 or host < 1e-2)
    assert stats.host_experts == hosted and stats.host_us >= 50 * hosted
    assert stats.committed == fetched


@pytest.mark.parametrize("name", LOSSY)
def test_the_account_of_what_was_replaced(name):
    """Recomputed in float64 from the recorded scores and picks."""
    built, tokens = deep("reference"), tokens_of(5, 16, 3)
    lossy = dataclasses.replace(policy("lru"), router=LOSSY[name], must_be_exact=False)
    _, traces, _ = steps(built, lossy, tokens, slots=SLOTS, scores=True)
    replaced = low = 0
    for trace in traces:
        for layer in range(LAYERS):
            scores = trace.scores[layer].astype(np.float64)
            exact = np.argsort(-scores, axis=1, kind="stable")[:, :4]
            weights = np.take_along_axis(scores, exact, 1)
            weights /= weights.sum(1, keepdims=True)
            lost, missed = 0.0, 0
            for n in range(3):
                used = dict(zip(trace.picks[layer, n], trace.weights[layer, n], strict=True))
                missed += sum(e not in used for e in exact[n])
                lost += sum(
                    max(0.0, w - used.get(e, 0.0))
                    for e, w in zip(exact[n], weights[n], strict=True)
                )
            assert trace.replaced[layer] == missed
            distinct = len(set(exact.ravel().tolist()))
            assert trace.exact_needed[layer] == distinct
            mass = trace.replaced_mass[layer]
            if name == "low-bit":  # at most the weight of all picks in the band
                bar = np.sort(scores, axis=1)[:, -5, None]
                chosen = np.take_along_axis(scores, exact, 1)
                most = weights[(chosen > bar) & (chosen < 1.6 * bar)].sum()
                assert 0 < mass <= most + 1e-6 if trace.low[layer] else mass == 0
            else:
                np.testing.assert_allclose(mass, lost, rtol=1e-4, atol=1e-6)
            replaced, low = replaced + lost, low + trace.low[layer]
    assert replaced > 0 or low > 0


def test_low_bit_copies_are_computed_from():
    """Every miss from int4 gives the logits of a model whose missing experts are int4."""
    built, tokens = deep("reference"), tokens_of(6, 8, 1)
    router = LowBitFallback(alpha=jnp.float32(1e6))
    lossy = dataclasses.replace(policy("lru"), router=router, must_be_exact=False)
    some, traces, _ = steps(built, lossy, tokens, slots=SLOTS)
    assert sum(t.low.sum() for t in traces) == sum(t.needed.sum() for t in traces) > 0
    assert not any(t.fetched.any() or t.hits.any() for t in traces)
    low = built.store.low
    quantised = dataclasses.replace(built.store, records=low.records, layout=low.layout, low=None)
    whole, *_ = steps(built, policy("lru"), tokens, store=quantised, slots=LAYERS * EXPERTS)
    np.testing.assert_allclose(some, whole, atol=1e-5)
    exact, *_ = steps(built, policy("lru"), tokens, slots=LAYERS * EXPERTS)
    assert np.abs(exact - whole).max() > 1e-3


def test_low_bits_are_refused_where_they_cannot_be_had():
    lossy = policy("low-bit")
    built = build(small_config())
    with pytest.raises(PolicyError, match="low_bits"):
        decode.init_state(built.model, lossy, built.store, slots=4)
    with pytest.raises(PolicyError, match="slots"):
        moejax.load("tiny", policy="low-bit", host_memory="1GiB")
    with pytest.raises(InputError, match="load floats"):
        moejax.load("tiny", policy="low-bit", quant="int8")
    runtime = moejax.load("tiny", policy="low-bit:alpha=0.5", slots=48, context=64)
    runtime.generate("The sea", 8)
    assert runtime.stats.label == "lossy" and runtime.stats.low > 0


def test_parts_that_lack_something_are_refused_by_name():
    class Plain:
        exact, low_bit = False, False

        def init(self, num_layers, num_experts):
            return None

        def route(self, memory, seen):
            return TopK().route(memory, seen)

    def refused(message, **parts):
        with pytest.raises(PolicyError, match=message):
            policy(dataclasses.replace(policy("cache-boost"), **parts))

    refused("Plain is no pytree", router=Plain())
    refused("LRU is no router: it has no exact, low_bit, route", router=LRU())
    refused("TopK is no evictor: it has no observe, keys", evictor=TopK())
    built = deep("reference")
    with pytest.raises(PolicyError, match="4 layers ahead never comes"):
        steps(built, policy("smoe-fetch:horizon=4"), tokens_of(0, 1, 1), slots=SLOTS)
    with pytest.raises(PolicyError, match="on the host, which.*such as lru or smoe-fetch"):
        moejax.load("tiny", policy="smoe", slots=48, link="disk")


def test_exact_policies_refuse_lossy_parts_by_name():
    with pytest.raises(PolicyError, match="Substitute is lossy"):
        dataclasses.replace(policy("lru"), router=LOSSY["substitute"])
    assert policy("lru").exact and not policy("smoe").exact
    with pytest.raises(PolicyError, match="TopK has no alpha"):
        with_alpha(policy("lru"), 0.1)


@pytree
class Pinned(LRU):
    """LRU that never wants to part with some experts: their keys are as great as can be."""

    def keys(self, memory, layer):
        number = jnp.arange(LAYERS * EXPERTS)
        keys = super().keys(memory, layer).astype(jnp.float32)
        keys = jnp.where(number % 8 < 3, jnp.inf, keys)
        return jnp.where(number % 16 == 5, jnp.nan, keys)


@pytest.mark.parametrize("kernels", ["reference", pytest.param("native", marks=needs_native)])
def test_no_evictor_makes_a_prefetch_displace_what_is_needed(kernels):
    built, tokens = deep(kernels), tokens_of(8, 30, 1)
    whole, *_ = steps(built, policy("lru"), tokens, slots=LAYERS * EXPERTS)
    for name in ("moe-infinity", "stream"):
        chosen = dataclasses.replace(policy(name), evictor=Pinned())
        some, traces, state = steps(built, chosen, tokens, slots=11)
        assert np.array_equal(whole, some)
        assert sum(t.prefetched.sum() for t in traces) > 0
        assert not owner_faults(state, 11)


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_every_preset_runs(name):
    built, tokens = deep("reference"), tokens_of(7, 6, 2)
    chosen = policy(name)
    logits, traces, state = steps(built, chosen, tokens, slots=SLOTS)
    whole, *_ = steps(built, policy("lru"), tokens, slots=LAYERS * EXPERTS)
    assert np.isfinite(logits).all()
    assert np.array_equal(logits, whole) or not chosen.exact


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("smoe:beta=1", "has no number 'beta'; it has: alpha"),
        ("smoe:alpha", "alpha of policy 'smoe' must be a number, not ''"),
        ("smoe:alpha=x", "must be a number"),
        ("smoe:alpha=nan", r"must be in \[0, 1e\+06\]"),
        ("smoe:alpha=-1", "must be in"),
        ("smoe:load=1e39", "must be in"),
        ("smoe:horizon=0", r"must be in \[1, 1024\]"),
        ("smoe:window=99999999999999", "must be in"),
        ("class-lru:period=0", "must be in"),
        ("score-ema:decay=1.5", r"must be in \[0, 1\]"),
        ("smoe:window=1.5", "must be a whole number"),
        ("bandwidth:share=2", "must be in"),
        ("lru:capacity=4", "has no number 'capacity'; it has: none"),
    ],
)
def test_bad_numbers_of_presets_are_refused(text, message):
    with pytest.raises(PolicyError, match=message):
        policy(text)


def test_a_window_of_any_length_is_kept():
    assert policy("smoe:window=100").evictor.size == 100
    assert policy("smoe:window=10").evictor.size == policy("smoe:window=20").evictor.size


def owner_faults(state, capacity):
    """What is wrong with a state's tables, in words."""
    slot_of = np.asarray(state.experts.residency.slot_of)
    owner = np.asarray(state.experts.residency.owner)
    faults = []
    held = owner[owner >= 0]
    if len(set(held.tolist())) != len(held):
        faults.append("an expert has two slots")
    if (np.sort(slot_of[slot_of >= 0]) != np.flatnonzero(owner >= 0)).any():
        faults.append("slots and owners are not inverse")
    elif (owner[slot_of[slot_of >= 0]] != np.flatnonzero(slot_of >= 0)).any():
        faults.append("slots and owners are not inverse")
    if (owner[capacity:] >= 0).any():
        faults.append("a slot beyond the capacity is in use")
    book = state.policy.forecast
    if book is not None and np.asarray(book.wanted).sum() > capacity // 2:
        faults.append("more than half of the slots are protected")
    return faults


STRESSED = [
    ("smoe:alpha=0.5", 1, 20, False),
    ("smoe-fetch:alpha=0.5,horizon=2", 3, 12, False),
    ("smoe-released:alpha=0.5", 2, 16, True),
    ("hybrimoe", 3, 17, False),
    ("moe-infinity", 4, 21, True),
    ("stream", 1, 40, False),
    ("two-queue", 8, 9, False),
    ("class-lru", 2, 16, True),
]


@needs_native
@pytest.mark.parametrize(("name", "batch", "slots", "per_layer"), STRESSED)
def test_tables_keep_their_invariants_over_a_delayed_link(name, batch, slots, per_layer):
    """Prefetches in flight, dropped and cancelled: 300 steps of batches with ended sequences."""
    built, rng = deep("native"), np.random.default_rng(slots)
    tokens = tokens_of(slots, 300, batch)
    tokens[rng.random(tokens.shape) < 0.1] = -1
    chosen = policy(name)
    with Jittered(built, slots, buffers=5, jitter_us=100.0, gigabytes_per_second=5.0) as store:
        state = decode.init_state(
            built.model, chosen, store, batch=batch, context=384, slots=slots, per_layer=per_layer
        )
        capacity = np.asarray(state.experts.residency.owner).size
        budget = {"slots": slots, "per_layer": per_layer, "virtual": True}
        expected, *_ = steps(built, chosen, tokens[:60], **budget)
        for number, row in enumerate(tokens):
            state, out = decode.decode_step(
                built.model, chosen, built.params, store, state, row[:, None]
            )
            if number < 60:
                assert np.array_equal(out.logits, expected[number], equal_nan=True)
            assert not owner_faults(state, capacity)
            trace = jax.device_get(out.trace)
            assert not trace.failure.any()
            assert (trace.hits + trace.fetched + trace.host >= trace.needed).all()
            last = np.asarray(state.experts.residency.slot_of)[-EXPERTS:]
            needed = np.unique(trace.picks[-1][trace.picks[-1] >= 0])
            if trace.host[-1] == 0 and len(needed) <= capacity // (LAYERS if per_layer else 1):
                assert (last[needed] >= 0).all()  # nothing came in after the last layer


@pytest.mark.parametrize("name", ["smoe-fetch:alpha=0.5", "cache-boost", "low-bit:alpha=1"])
def test_loss_equals_what_plain_loops_find(name):
    runtime = moejax.load("tiny", slots=64, policy=name, virtual=True, context=64)
    rng = np.random.default_rng(0)
    windows = rng.integers(5, 4000, (2, 21)).astype(np.int32)
    exact = loss.exact_logits(runtime, windows)
    found = loss.measure(runtime, windows, exact)
    own = dataclasses.replace(runtime.policy, router=TopK())
    state = runtime.init_state(1, context=21)

    def logp(logits):
        logits = np.asarray(logits, np.float64)
        logits = logits - logits.max()
        return logits - np.log(np.exp(logits).sum())

    for w, window in enumerate(windows):
        state = decode.rewind(state, np.zeros(1))
        for t in range(20):
            token = np.array([[window[t]]], np.int32)
            copied = jax.tree.map(jnp.copy, state)
            fixed = (runtime.params, runtime.store)
            _, out = decode.decode_step(runtime.model, own, *fixed, copied, token)
            p = logp(out.logits[0])
            state, out = decode.decode_step(runtime.model, runtime.policy, *fixed, state, token)
            q, r = logp(out.logits[0]), logp(exact[w, t])
            want = {
                "nll": -q[window[t + 1]],
                "exact_nll": -r[window[t + 1]],
                "local": (np.exp(p) * (p - q)).sum(),
                "trajectory": (np.exp(r) * (r - q)).sum(),
                "replaced_mass": out.trace.replaced_mass.sum(),
            }
            for name, value in want.items():
                got = getattr(found, name)[w, t]
                np.testing.assert_allclose(got, value, rtol=2e-3, atol=2e-5, err_msg=name)
            assert found.flipped[w, t] == (q.argmax() != r.argmax())
            for name in ("hits", "replaced", "exact_hits", "exact_needed", "needed", "low"):
                assert getattr(found, name)[w, t] == getattr(out.trace, name).sum(), name
            assert found.moved[w, t] == (out.trace.fetched + out.trace.prefetched).sum()
    assert found.replaced.sum() + found.low.sum() > 0 and found.local.max() > 1e-5
    assert 0 < found.summary()["hit_rate"] < 1


def test_loss_of_an_exact_policy_is_none():
    runtime = moejax.load("tiny", slots=64, virtual=True, context=64)
    windows = np.random.default_rng(1).integers(5, 4000, (1, 17)).astype(np.int32)
    found = loss.measure(runtime, windows, loss.exact_logits(runtime, windows))
    assert not found.local.any() and not found.replaced.any() and not found.flipped.any()
    assert np.abs(found.trajectory).max() < 1e-6
    assert found.summary()["perplexity_over_exact"] == pytest.approx(1, abs=1e-6)


def test_loss_refuses_what_it_cannot_measure():
    runtime = moejax.load("tiny", slots=64, context=64)
    windows = np.full((1, 9), 7, np.int32)
    exact = np.zeros((1, 8, 4096), np.float32)
    with pytest.raises(InputError, match="virtual=True"):
        loss.measure(runtime, windows, exact)
    with pytest.raises(InputError, match="W, T"):
        loss.measure(runtime, windows, exact[:, :7])


def test_a_forecast_is_none_for_policies_that_never_prefetch():
    assert policy("lru").init(2, 8).forecast is None
    assert isinstance(policy("smoe").init(2, 8).forecast, Forecast)
