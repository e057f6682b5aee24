"""Whole models on the native kernels: the reference to a tolerance, T tokens as T single steps."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import build, small_config
from hypothesis import given
from hypothesis import strategies as st
from test_exactness import CONTEXT, prompts_of, run
from test_families_exact import COMMON, FAMILIES

from moejax import decode
from moejax.kernels import build as native
from moejax.models import config_from_hf
from moejax.models.transformer import Decoder

if native.library() is None:
    pytest.skip(native.status(), allow_module_level=True)


def on(built, kernels):
    """The same model on other kernels."""
    return dataclasses.replace(built, model=Decoder(built.config, built.model.dtype, None, kernels))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_native_equals_the_reference(family, dtype):
    built = build(config_from_hf({"model_type": family, **COMMON, **FAMILIES[family]}), dtype)
    experts = built.config.num_moe_layers * built.config.num_experts
    prompts = prompts_of(2, 2)
    want, _ = run(on(built, "reference"), prompts, 2, slots=experts)
    got, _ = run(on(built, "native"), prompts, 2, slots=experts)
    scale = np.abs(want).max()
    assert np.abs(got - want).max() < (2e-5 if dtype == "float32" else 4e-2) * scale
    assert got.std() > 0


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def wide(request):
    """Wider than XLA's own row-invariance reaches: a norm over 1100 channels."""
    config = small_config(width=1100, num_heads=4, num_kv_heads=2, head_dim=24, expert_width=40)
    return on(build(config, request.param), "native")


@given(seed=st.integers(0, 2**16), tokens=st.integers(2, 40), slots=st.sampled_from([4, 9, 16]))
def test_a_pass_over_tokens_equals_single_steps(wide, seed, tokens, slots):
    ids = np.random.default_rng(seed).integers(0, 61, (1, tokens)).astype(np.int32)
    fixed = (wide.model, wide.policy, wide.params, wide.store)
    padded = np.full((1, 40), -1, np.int32)
    padded[:, :tokens] = ids
    state = decode.init_state(*fixed[:2], wide.store, slots=16, context=CONTEXT)
    _, whole = decode.decode_step(*fixed, state, padded, all_logits=True)
    state = decode.init_state(*fixed[:2], wide.store, slots=slots, context=CONTEXT)
    for position in range(tokens):
        state, out = decode.decode_step(*fixed, state, ids[:, position : position + 1])
        assert np.array_equal(out.logits[0], whole.logits[0, position]), position


def test_batches_equal_single_sequences(wide):
    prompts = prompts_of(9, 3)
    together, _ = run(wide, prompts, 3, slots=16)
    for row, prompt in enumerate(prompts):
        alone, _ = run(wide, [prompt], 3, slots=6)
        assert np.array_equal(together[:, row], alone[:, 0])


def test_chunks_do_not_matter(wide):
    prompts = [np.arange(37, dtype=np.int32) % 61]
    runs = [run(wide, prompts, 2, slots=16, chunk=chunk)[0] for chunk in (1, 8, 64)]
    assert np.array_equal(runs[0], runs[1]) and np.array_equal(runs[0], runs[2])


def test_any_budget_gives_the_same_bits_on_native_kernels(wide):
    prompts = prompts_of(4, 2)
    whole, _ = run(wide, prompts, 3, slots=16)
    for budget in ({"slots": 2}, {"slots": 8, "per_layer": True}, {"slots": 5, "virtual": True}):
        some, traces = run(wide, prompts, 3, **budget)
        assert np.array_equal(whole, some)
        assert sum(int(t.fetched.sum()) for t in traces) > 0


def test_residency_follows_the_same_rule_on_both_kernels(wide):
    plain = on(wide, "reference")
    state = {}
    for built in (wide, plain):
        policy = dataclasses.replace(built.policy, capacity=jnp.int32(5))
        _, traces = run(built, prompts_of(1, 1), 0, slots=8, policy=policy)
        state[built.model.kernels] = [np.asarray(t.fetched).tolist() for t in traces]
    assert state["native"] == state["reference"]
