"""Any budget gives the bits of the fully resident run."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import build, small_config
from hypothesis import given
from hypothesis import strategies as st

from moejax import decode
from moejax.policies.placement import HostAll
from moejax.state import pytree, static

CONTEXT = 128


def run(built, prompts, steps, *, policy=None, chunk=8, **budget):
    """Logits of prefill and of `steps` greedy steps [1 + steps, B, V], and the last trace."""
    policy = policy or built.policy
    fixed = (built.model, policy, built.params, built.store)
    state = decode.init_state(
        built.model, policy, built.store, batch=len(prompts), context=CONTEXT, **budget
    )
    state, logits, traces = decode.prefill(*fixed, state, prompts, chunk=chunk)
    outs = [np.asarray(logits)]
    for _ in range(steps):
        tokens = jnp.argmax(logits, -1).astype(jnp.int32)[:, None]
        state, out = decode.decode_step(*fixed, state, tokens)
        logits = out.logits
        outs.append(np.asarray(logits))
        traces.append(out.trace)
    return np.stack(outs), traces


def prompts_of(seed, batch):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 61, rng.integers(1, 20)).astype(np.int32) for _ in range(batch)]


@pytest.fixture(scope="module")
def model():
    return build(small_config(), "bfloat16")


@given(
    capacity=st.integers(2, 15),
    batch=st.sampled_from([1, 3]),
    seed=st.integers(0, 2**16),
    virtual=st.booleans(),
)
def test_bits_do_not_depend_on_the_budget(model, capacity, batch, seed, virtual):
    prompts = prompts_of(seed, batch)
    policy = dataclasses.replace(model.policy, capacity=jnp.int32(capacity))
    whole, _ = run(model, prompts, 4, slots=16)
    some, traces = run(model, prompts, 4, slots=15, policy=policy, virtual=virtual)
    assert np.array_equal(whole, some)
    assert sum(int(t.fetched.sum()) for t in traces) > 0


@pytest.mark.parametrize("slots", [2, 9])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bits_do_not_depend_on_the_number_of_slots(slots, dtype):
    model = build(small_config(), dtype)
    prompts = prompts_of(slots, 1)
    whole, _ = run(model, prompts, 4, slots=16)
    some, traces = run(model, prompts, 4, slots=slots)
    assert np.array_equal(whole, some)
    assert sum(int(t.fetched.sum()) for t in traces) > 0


def test_numbers_of_a_policy_never_recompile(model):
    prompts = prompts_of(8, 1)
    run(model, prompts, 1, slots=15)
    before = decode.decode_step._cache_size()
    for capacity in (2, 7, 15):
        policy = dataclasses.replace(model.policy, capacity=jnp.int32(capacity))
        run(model, prompts_of(capacity, 1), 3, slots=15, policy=policy)
    assert decode.decode_step._cache_size() == before


def test_bits_do_not_depend_on_partitioning(model):
    prompts = prompts_of(1, 2)
    whole, _ = run(model, prompts, 4, slots=16)
    some, traces = run(model, prompts, 4, slots=5, per_layer=True)
    assert np.array_equal(whole, some)
    assert max(int(t.passes.max()) for t in traces) > 1


def test_experts_computed_on_the_host_have_the_same_bits(model):
    prompts = prompts_of(2, 2)
    host = dataclasses.replace(model.policy, placement=HostAll())
    whole, _ = run(model, prompts, 4, slots=16)
    some, traces = run(model, prompts, 4, slots=5, policy=host)
    assert np.array_equal(whole, some)
    assert sum(int(t.fetched.sum()) for t in traces) == 0
    assert all((np.asarray(t.host) == np.asarray(t.needed)).all() for t in traces)


def test_a_tight_budget_takes_passes(model):
    _, traces = run(model, prompts_of(3, 3), 1, slots=2)
    first = traces[0]
    assert int(first.needed.max()) > 2
    assert (np.asarray(first.passes) >= np.ceil(np.asarray(first.needed) / 2)).all()


def test_capacity_may_shrink_and_grow_while_running(model):
    prompt = prompts_of(4, 1)
    whole, _ = run(model, prompt, 12, slots=16)
    fixed = (model.params, model.store)
    state = decode.init_state(model.model, model.policy, model.store, slots=15, context=CONTEXT)
    state, logits, _ = decode.prefill(model.model, model.policy, *fixed, state, prompt, chunk=8)
    for i, capacity in enumerate([15, 3, 2, 2, 9, 15, 2, 4, 4, 15, 1, 7]):
        policy = dataclasses.replace(model.policy, capacity=jnp.int32(capacity))
        tokens = jnp.argmax(logits, -1).astype(jnp.int32)[:, None]
        state, out = decode.decode_step(model.model, policy, *fixed, state, tokens)
        logits = out.logits
        assert np.array_equal(np.asarray(logits), whole[i + 1])
        check_tables(state.experts.residency)


@pytest.mark.parametrize("per_layer", [False, True])
@pytest.mark.parametrize("capacity", [-3, 0, 1, 4])
def test_any_capacity_ends(model, capacity, per_layer):
    prompts = prompts_of(9, 1)
    policy = dataclasses.replace(model.policy, capacity=jnp.int32(capacity))
    whole, _ = run(model, prompts, 3, slots=16)
    some, _ = run(model, prompts, 3, slots=10, policy=policy, per_layer=per_layer)
    assert np.array_equal(whole, some)


@pytree
class Stubborn:
    """Every expert is worth as much as a key can say."""

    value: float = static()

    def init(self, num_layers, num_experts):
        return jnp.full(num_layers * num_experts, self.value)

    def observe(self, memory, access):
        return memory

    def keys(self, memory, layer):
        return memory


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 2**31 - 1])
def test_keys_at_the_end_of_their_range(model, value):
    prompts = prompts_of(10, 1)
    policy = dataclasses.replace(model.policy, evictor=Stubborn(value=value))
    whole, _ = run(model, prompts, 3, slots=16)
    some, traces = run(model, prompts, 3, slots=6, policy=policy, per_layer=True)
    assert np.array_equal(whole, some)
    for trace in traces:
        assert (np.asarray(trace.fetched) == np.asarray(trace.needed - trace.hits)).all()


def check_tables(residency):
    """slot_of and owner are inverse to each other."""
    slot_of, owner = np.asarray(residency.slot_of), np.asarray(residency.owner)
    held = np.flatnonzero(slot_of >= 0)
    assert (owner[slot_of[held]] == held).all()
    used = np.flatnonzero(owner >= 0)
    assert (slot_of[owner[used]] == used).all()


def test_finished_sequences_need_no_experts(model):
    fixed = (model.model, model.policy, model.params, model.store)
    state = decode.init_state(*fixed[:2], model.store, slots=4, batch=2, context=CONTEXT)
    state, _, _ = decode.prefill(*fixed, state, prompts_of(5, 2), chunk=8)
    length = np.asarray(state.length)
    state, out = decode.decode_step(*fixed, state, jnp.array([[7], [-1]], jnp.int32))
    assert (np.asarray(out.trace.needed) == 2).all()
    assert (np.asarray(out.trace.picks)[:, 1] == -1).all()
    assert (np.asarray(state.length) - length).tolist() == [1, 0]


def test_a_batch_equals_its_sequences_alone(model):
    prompts = prompts_of(6, 3)
    together, _ = run(model, prompts, 3, slots=16)
    for b, prompt in enumerate(prompts):
        alone, _ = run(model, [prompt], 3, slots=16)
        np.testing.assert_allclose(together[:, b], alone[:, 0], atol=0.05, rtol=0.05)


def test_virtual_residency_copies_nothing(model):
    state = decode.init_state(
        model.model, model.policy, model.store, slots=5, context=CONTEXT, virtual=True
    )
    assert state.experts.pool.size == 0
    assert state.experts.residency.owner.shape == (5,)


def test_pinned_host_store_gives_the_same_bits(model):
    host = jax.sharding.SingleDeviceSharding(jax.devices()[0], memory_kind="pinned_host")
    records = jax.device_put(model.store.records, host)
    pinned = dataclasses.replace(model, store=dataclasses.replace(model.store, records=records))
    whole, _ = run(model, prompts_of(7, 1), 2, slots=16)
    some, _ = run(pinned, prompts_of(7, 1), 2, slots=5)
    assert np.array_equal(whole, some)
