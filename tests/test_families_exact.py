"""Any budget gives the bits of the resident run where families differ, as XLA really compiles it.

Latent attention, shared experts with and without a gate, first layers dense, biases, sliding
windows, grouped routing: what the Qwen3-MoE of the other exactness tests does not have.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import build

from moejax import decode
from moejax.models import config_from_hf

CONTEXT = 128
STEPS = 4
COMMON = {
    "vocab_size": 67,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "moe_intermediate_size": 16,
}
FAMILIES = {
    "qwen2_moe": {
        "num_key_value_heads": 2,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "shared_expert_intermediate_size": 20,
        "mlp_only_layers": [0],
        "use_sliding_window": True,
        "sliding_window": 9,
    },
    "deepseek_v2": {
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "n_shared_experts": 2,
        "first_k_dense_replace": 1,
        "kv_lora_rank": 12,
        "q_lora_rank": 10,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 6,
        "topk_method": "group_limited_greedy",
        "n_group": 4,
        "topk_group": 2,
        "routed_scaling_factor": 2.5,
    },
}


def run(built, prompts, slots, capacity):
    """Logits of prefill and of greedy steps [1 + STEPS, B, V], and how many experts came."""
    policy = dataclasses.replace(built.policy, capacity=jnp.int32(capacity))
    fixed = (built.model, policy, built.params, built.store)
    state = decode.init_state(
        built.model, policy, built.store, slots=slots, batch=len(prompts), context=CONTEXT
    )
    state, logits, traces = decode.prefill(*fixed, state, prompts, chunk=8)
    rows = [np.asarray(logits)]
    for _ in range(STEPS):
        tokens = jnp.argmax(logits, -1).astype(jnp.int32)[:, None]
        state, out = decode.decode_step(*fixed, state, tokens)
        logits = out.logits
        rows.append(np.asarray(logits))
        traces.append(out.trace)
    return np.stack(rows), sum(int(trace.fetched.sum()) for trace in traces)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_bits_do_not_depend_on_the_budget(family, dtype):
    assert not jax.config.read("jax_disable_most_optimizations")
    config = config_from_hf({"model_type": family, **COMMON, **FAMILIES[family]})
    assert config.dense_layers and config.shared_width
    built = build(config, dtype)
    rng = np.random.default_rng(3)
    prompts = [rng.integers(0, config.vocab_size, n).astype(np.int32) for n in (19, 6)]
    everything = config.num_moe_layers * config.num_experts
    whole, _ = run(built, prompts, everything, everything)
    assert np.isfinite(whole).all() and len(np.unique(whole)) > whole.size // 4
    for capacity in (config.top_k, everything - 1):
        some, fetched = run(built, prompts, everything - 1, capacity)
        assert some.tobytes() == whole.tobytes(), capacity
        assert fetched > 0
