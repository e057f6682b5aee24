"""The step's promises about programs: one trace per shape, writes in place."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import build, small_config

from moejax import decode, devices
from moejax.errors import InputError
from moejax.kernels import build as native
from moejax.models.transformer import Decoder


def compiled(built, slots, tokens, context=128, **options):
    """XLA's own account of one step."""
    state = decode.init_state(
        built.model, built.policy, built.store, slots=slots, context=context, **options
    )
    shape = jax.ShapeDtypeStruct((1, tokens), jnp.int32)
    args = (built.model, built.policy, built.params, built.store, state, shape)
    program = decode.decode_step.lower(*args).compile()
    return program.cost_analysis()["bytes accessed"], program.memory_analysis()


@pytest.fixture(scope="module")
def wide():
    """Records large against everything else: copying the pool would show."""
    return build(small_config(width=64, expert_width=128, num_experts=32), "bfloat16")


@pytest.mark.parametrize("tokens", [1, 16])
def test_slot_writes_are_in_place(wide, tokens):
    few, few_plan = compiled(wide, 8, tokens)
    many, many_plan = compiled(wide, 60, tokens)
    added = (60 - 8) * wide.store.layout.stride
    assert many - few < added / 20
    assert many_plan.temp_size_in_bytes - few_plan.temp_size_in_bytes < added / 20
    assert many_plan.alias_size_in_bytes - few_plan.alias_size_in_bytes >= added


def test_a_virtual_cache_does_not_copy_the_store(wide):
    size = wide.store.records.nbytes
    accessed, plan = compiled(wide, 20, 1, virtual=True)
    assert plan.temp_size_in_bytes < size / 2
    full, full_plan = compiled(wide, 64, 1)
    assert full_plan.temp_size_in_bytes < size / 2
    assert abs(accessed - full) < size / 2


def test_kv_writes_are_in_place(wide):
    short, short_plan = compiled(wide, 8, 1, context=512)
    long, long_plan = compiled(wide, 8, 1, context=8192)
    added = long_plan.alias_size_in_bytes - short_plan.alias_size_in_bytes
    assert added > 500_000
    assert long - short < added / 20
    assert long_plan.temp_size_in_bytes - short_plan.temp_size_in_bytes < added / 20


@pytest.mark.parametrize("tokens", [1, 16])
def test_dense_weights_are_read_one_layer_at_a_time(tokens):
    """More layers cost neither scratch memory nor, as XLA counts the body of a loop once, bytes.

    But a chunk is scattered into the KV cache, which XLA counts as reading and writing all of it.
    """

    def built(layers):
        config = small_config(num_layers=layers, moe_layers=tuple(range(layers)))
        return build(dataclasses.replace(config, width=128, num_heads=16), "bfloat16")

    few, many = built(2), built(16)
    least, most = (devices.dense_bytes(b.config, "bfloat16") for b in (few, many))
    dense = most - least
    kv = devices.kv_bytes(many.model, 1, 128) - devices.kv_bytes(few.model, 1, 128)
    (low, low_plan), (high, high_plan) = (compiled(b, 8, tokens) for b in (few, many))
    assert high_plan.temp_size_in_bytes - low_plan.temp_size_in_bytes < dense / 20
    assert high - low < dense / 20 + (2 * kv if tokens > 1 else 0)


def test_one_trace_per_shape(small):
    fixed = (small.model, small.policy, small.params, small.store)
    state = decode.init_state(small.model, small.policy, small.store, slots=7, context=128)
    before = decode.decode_step._cache_size()
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 61, n).astype(np.int32) for n in (3, 30)]
    for prompt in prompts:
        state, _, _ = decode.prefill(*fixed, state, [prompt], chunk=8)
        for token in range(5):
            state, _ = decode.decode_step(*fixed, state, np.full((1, 1), token, np.int32))
    assert decode.decode_step._cache_size() == before + 2


def test_the_state_is_donated(small):
    state = decode.init_state(small.model, small.policy, small.store, slots=7, context=128)
    new, _ = decode.decode_step(
        small.model, small.policy, small.params, small.store, state, np.zeros((1, 1), np.int32)
    )
    assert state.experts.pool.is_deleted() and state.kv.keys.is_deleted()
    assert not new.experts.pool.is_deleted()


def test_prefill_does_not_depend_on_the_chunk(small):
    fixed = (small.model, small.policy, small.params, small.store)
    prompts = [np.arange(n, dtype=np.int32) for n in (3, 21)]
    found = []
    for chunk in (4, 8, 32):
        state = decode.init_state(*fixed[:2], small.store, slots=16, batch=2, context=128)
        state, logits, _ = decode.prefill(*fixed, state, prompts, chunk=chunk)
        assert np.asarray(state.length).tolist() == [3, 21]
        found.append(np.asarray(logits))
    np.testing.assert_allclose(found[0], found[1], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found[0], found[2], rtol=1e-5, atol=1e-5)


def test_prompts_that_do_not_fit_are_refused(small):
    fixed = (small.model, small.policy, small.params, small.store)
    state = decode.init_state(*fixed[:2], small.store, slots=16, context=100)
    with pytest.raises(InputError, match="do not fit the context of 128"):
        decode.prefill(*fixed, state, [np.zeros(129, np.int32)])
    with pytest.raises(InputError, match="empty"):
        decode.prefill(*fixed, state, [np.zeros(0, np.int32)])
    with pytest.raises(InputError, match="2 prompts for a state of 1"):
        decode.prefill(*fixed, state, [np.zeros(1, np.int32)] * 2)


def test_bad_ids_are_refused(small):
    fixed = (small.model, small.policy, small.params, small.store)
    state = decode.init_state(*fixed[:2], small.store, slots=16, context=128)
    for prompt in ([0, 61], [-1, 2], [1, -1, 2], [2**32 + 1], [2**70], [0.5], [True], ["a"], [[1]]):
        with pytest.raises(InputError, match="token ids"):
            decode.prefill(*fixed, state, [prompt])


def test_tokens_of_another_shape_are_refused(small):
    fixed = (small.model, small.policy, small.params, small.store)
    state = decode.init_state(*fixed[:2], small.store, slots=16, context=128)
    for shape in ((1,), (2, 1), (1, 0), (1, 1, 1)):
        with pytest.raises(InputError, match=r"tokens must be \[1, T\]"):
            decode.decode_step(*fixed, state, np.zeros(shape, np.int32))


@pytest.mark.parametrize("kernels", ["reference", "native"])
def test_a_sequence_that_outgrows_the_cache_has_no_numbers(small, kernels):
    if kernels == "native" and native.library() is None:
        pytest.skip(native.status())
    model = Decoder(small.config, small.model.dtype, None, kernels)
    fixed = (model, small.policy, small.params, small.store)
    state = decode.init_state(*fixed[:2], small.store, slots=16, batch=2, context=128)
    state, _, _ = decode.prefill(*fixed, state, [np.zeros(127, np.int32), np.zeros(3, np.int32)])
    found = []
    for _ in range(2):
        state, out = decode.decode_step(*fixed, state, np.ones((2, 1), np.int32))
        found.append(np.isfinite(np.asarray(out.logits)).all(axis=1).tolist())
    assert found == [[True, True], [False, True]]


def test_nothing_is_written_behind_the_context(small):
    """The last position of one sequence does not touch the other's cache."""
    fixed = (small.model, small.policy, small.params, small.store)
    state = decode.init_state(*fixed[:2], small.store, slots=16, batch=2, context=128)
    prompts = [np.zeros(128, np.int32), np.arange(5, dtype=np.int32)]
    state, _, _ = decode.prefill(*fixed, state, prompts, chunk=64)
    keys = np.asarray(state.kv.keys)
    tokens = np.array([[1] * 4, [1, 2, -1, -1]], np.int32)
    state, _ = decode.decode_step(*fixed, state, tokens)
    after = np.asarray(state.kv.keys)
    assert np.array_equal(keys[:, 0], after[:, 0])
    assert np.array_equal(np.delete(keys[:, 1], [5, 6], 1), np.delete(after[:, 1], [5, 6], 1))
