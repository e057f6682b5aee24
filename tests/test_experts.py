"""One layer's experts against NumPy float64, and the slot tables against a plain simulator."""

import collections
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import build, small_config
from hypothesis import given
from hypothesis import strategies as st

from moejax import decode, experts
from moejax.config import RouterRule
from moejax.errors import BudgetError, PolicyError
from moejax.kernels import reference
from moejax.policies import residency
from moejax.policies.eviction import CLOCK_LIMIT, LRU, Access
from moejax.policies.policy import Policy, policy, policy_names
from moejax.policies.prediction import Ahead
from moejax.policies.routing import Routing, Scored, TopK


def nobody(*_):
    """What a later layer would answer, had it been asked."""
    raise AssertionError("nobody predicts here")


NOBODY = Ahead(gate=nobody, input_norm=nobody, attend=nobody)


def oracle_ffn(layout, record, x):
    """SwiGLU of one record in float64."""
    gate_up = layout.view(record, "gate_up").astype(np.float64)
    down = layout.view(record, "down").astype(np.float64)
    gate, up = np.split(gate_up @ x, 2)
    return down @ (gate / (1 + np.exp(-gate)) * up)


@st.composite
def routed(draw):
    tokens, width, chosen = draw(st.sampled_from([(1, 8, 2), (7, 8, 2), (40, 8, 3), (5, 3, 3)]))
    seed = draw(st.integers(0, 2**16))
    rng = np.random.default_rng(seed)
    skew = rng.dirichlet(np.full(width, draw(st.sampled_from([0.2, 5.0]))))
    picks = [rng.choice(width, chosen, replace=False, p=(skew + 1e-3) / (skew + 1e-3).sum())]
    picks += [rng.choice(width, chosen, replace=False) for _ in range(tokens - 1)]
    return np.array(picks, np.int32), rng.random(tokens) < draw(st.sampled_from([0.6, 1.0])), width


@given(routed())
def test_blocks_hold_every_pick_once(case):
    picks, valid, width = case
    blocks = reference.plan(jnp.asarray(np.where(valid[:, None], picks, -1)), width)
    tokens, owner = np.asarray(blocks.tokens), np.asarray(blocks.expert)
    for n, k in np.argwhere(np.broadcast_to(valid[:, None], picks.shape)):
        block, row = int(blocks.block_of[n, k]), int(blocks.row_of[n, k])
        assert owner[block] == picks[n, k]
        assert tokens[block, row] == n
    used = collections.Counter(picks[valid].ravel())
    size = tokens.shape[1]
    assert (owner >= 0).sum() == sum(-(-count // size) for count in used.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_mixture_equals_float64(dtype):
    built = build(small_config(), dtype)
    rng = np.random.default_rng(0)
    n, layer = 13, 1
    x = rng.normal(size=(n, 32)).astype(np.float32)
    x = np.asarray(jnp.asarray(x, dtype), np.float32)  # what bf16 inputs are rounded to anyway
    scores = jax.nn.softmax(jnp.asarray(rng.normal(size=(n, 8)), jnp.float32))
    valid = jnp.arange(n) != 4
    rule = RouterRule(normalize=True)
    cache = decode.init_cache(built.config, built.store, 3)
    state = built.policy.init(2, 8)
    seen = Scored(
        layer=jnp.int32(layer),
        scores=scores,
        resident=jnp.zeros(8, bool),
        valid=valid,
        rule=rule,
        top_k=2,
    )
    routing, _ = built.policy.router.route(None, seen)
    work = experts.Layer(
        index=jnp.int32(layer),
        hidden=x,
        x=x,
        shared=None,
        scores=scores,
        routing=routing,
        valid=valid,
    )
    apply = jax.jit(functools.partial(experts.apply, ahead=NOBODY))
    out, *_ = apply(built.policy, built.store, cache, state, work)
    records, layout = np.asarray(built.store.records), built.store.layout
    for t in np.flatnonzero(np.asarray(valid)):
        top = np.argsort(-np.asarray(scores[t]), kind="stable")[:2]
        weights = np.asarray(scores[t], np.float64)[top]
        rows = [oracle_ffn(layout, records[layer * 8 + e], x[t].astype(np.float64)) for e in top]
        want = sum(w / weights.sum() * r for w, r in zip(weights, rows, strict=True))
        tolerance = 1e-5 if dtype == "float32" else 2e-2
        np.testing.assert_allclose(out[t], want, rtol=tolerance, atol=tolerance)


class PlainLRU:
    """LRU over a global pool with the running layer shielded, one access at a time."""

    def __init__(self, slots):
        self.slots, self.order = slots, collections.OrderedDict()

    def layer(self, picks):
        """Experts in order of access; returns (hits, fetched)."""
        distinct = list(dict.fromkeys(picks))
        hits = [e for e in distinct if e in self.order]
        misses = [e for e in distinct if e not in self.order]
        for expert in misses:
            if len(self.order) == self.slots:
                victim = next(e for e in self.order if e not in distinct)
                del self.order[victim]
            self.order[expert] = True
        for expert in picks:
            self.order.move_to_end(expert)
        return len(hits), len(misses)


@given(
    slots=st.integers(4, 15),
    seed=st.integers(0, 2**16),
    tokens=st.sampled_from([1, 2]),
)
def test_lru_equals_a_plain_simulator(slots, seed, tokens):
    rng = np.random.default_rng(seed)
    plain = PlainLRU(slots)
    chosen = dataclasses.replace(policy("lru"), capacity=jnp.int32(slots))
    tables, memory = residency.empty(16, 15), chosen.init(2, 8)
    for _ in range(12):
        for layer in range(2):
            picks = np.array([rng.choice(8, 2, replace=False) for _ in range(tokens)], np.int32)
            tables, memory, hits, fetched = table_step(
                chosen, tables, memory, jnp.int32(layer), jnp.asarray(picks)
            )
            assert (int(hits), int(fetched)) == plain.layer((layer * 8 + picks).ravel().tolist())
            resident = {int(e) for e in np.asarray(tables.owner) if e >= 0}
            assert resident == set(plain.order)


def test_the_clock_is_set_back_before_it_wraps():
    lru = LRU()
    memory = lru.init(1, 4)
    near = CLOCK_LIMIT - 3
    memory = dataclasses.replace(
        memory, clock=jnp.int32(near), last_used=jnp.array([near - 1, 5, -1, near - 2], jnp.int32)
    )
    for expert in (1, 2, 1):
        order = np.argsort(lru.keys(memory, jnp.int32(0)), kind="stable")
        used = jnp.arange(4) == expert
        access = Access(
            layer=jnp.int32(0),
            scores=jnp.zeros((1, 4)),
            needed=used,
            tokens=used.astype(jnp.int32),
            last_use=jnp.where(used, 1, -1),
            valid=jnp.ones(1, bool),
        )
        memory = lru.observe(memory, access)
        after = np.argsort(lru.keys(memory, jnp.int32(0)), kind="stable")
        assert after.tolist() == [e for e in order if e != expert] + [expert]
        assert 0 <= int(memory.clock) < CLOCK_LIMIT


@jax.jit
def table_step(chosen, tables, memory, layer, picks):
    """One layer's access on the tables alone: the mechanism without weights."""
    built = TABLE_MODEL
    n = picks.shape[0]
    work = experts.Layer(
        index=layer,
        hidden=jnp.zeros((n, 32)),
        x=jnp.zeros((n, 32)),
        shared=None,
        scores=jnp.zeros((n, 8), jnp.float32),
        routing=Routing(
            expert=picks,
            weight=jnp.ones(picks.shape),
            exact=picks,
            replaced_mass=jnp.zeros(n, jnp.float32),
        ),
        valid=jnp.ones(n, bool),
    )
    cache = decode.ExpertCache(pool=built.store.records[:0], residency=tables)
    _, cache, memory, _, trace = experts.apply(chosen, built.store, cache, memory, work, NOBODY)
    return cache.residency, memory, trace.hits, trace.fetched


TABLE_MODEL = build(small_config())


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 11)), min_size=1, max_size=40))
def test_place_keeps_the_tables_inverse(moves):
    tables = residency.empty(12, 5)
    for slot, expert in moves:
        tables = residency.place(tables, jnp.int32(slot), jnp.int32(expert))
        slot_of, owner = np.asarray(tables.slot_of), np.asarray(tables.owner)
        assert owner[slot] == expert and slot_of[expert] == slot
        assert sorted(slot_of[slot_of >= 0]) == sorted(np.flatnonzero(owner >= 0))
        assert (owner[slot_of[slot_of >= 0]] == np.flatnonzero(slot_of >= 0)).all()


def test_too_few_slots_are_refused():
    built = TABLE_MODEL
    with pytest.raises(BudgetError, match="at least 2"):
        decode.init_cache(built.config, built.store, 1)
    with pytest.raises(BudgetError, match="at least 4"):
        decode.init_cache(built.config, built.store, 3, per_layer=True)


def test_unknown_policies_are_refused_by_name():
    with pytest.raises(PolicyError, match="'auto lossy' .did you mean 'auto-lossy'"):
        policy("auto lossy")
    with pytest.raises(PolicyError, match="unknown policy 'nope'; known: .*lru"):
        policy("nope")
    assert "lru" in policy_names()
    own = Policy(
        router=TopK(), evictor=LRU(), placement=policy("lru").placement, capacity=jnp.int32(4)
    )
    assert policy(own) is own


def test_a_policy_from_an_entry_point(monkeypatch):
    import importlib.metadata

    entry = importlib.metadata.EntryPoint("mine", "conftest:third_party", "moejax.policies")
    monkeypatch.setattr("moejax.policies.policy._entry_points", lambda: [entry])
    assert "mine" in policy_names()
    assert int(policy("mine").capacity) == 3
    bad = importlib.metadata.EntryPoint("bad", "builtins:dict", "moejax.policies")
    monkeypatch.setattr("moejax.policies.policy._entry_points", lambda: [bad])
    with pytest.raises(PolicyError, match="does not make a moejax.Policy"):
        policy("bad")
