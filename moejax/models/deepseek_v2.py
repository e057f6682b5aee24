"""DeepSeek-V2: latent attention, shared experts, first layers dense, group-limited routing."""

from collections.abc import Mapping
from typing import Any

from moejax.checkpoints.rules import Rule
from moejax.config import Fields, Latent, ModelConfig, Rope, RouterRule
from moejax.errors import ConfigError
from moejax.models.family import LAYER, Family, expert_rules, ffn_rules, stem_rules
from moejax.models.fields import (
    attention_bias,
    base_fields,
    expert_fields,
    rope_from,
    usable_positions,
    windows_from,
)
from moejax.models.rope import yarn_mscale

ATTENTION = {
    "q_proj": "q",
    "q_a_proj": "q_a",
    "q_b_proj": "q_b",
    "kv_a_proj_with_mqa": "kv_a",
    "kv_b_proj": "kv_b",
    "o_proj": "o",
    "q_a_layernorm": "q_a_norm",
    "kv_a_layernorm": "kv_a_norm",
}
BIASED = ("q_a_proj", "kv_a_proj_with_mqa", "o_proj")


def config(hf: Mapping[str, Any]) -> ModelConfig:
    """ModelConfig of a DeepSeek-V2 config.json."""
    fields = Fields(hf)
    base = base_fields(fields)
    layers = base["num_layers"]
    experts = expert_fields(fields, "moe_intermediate_size")
    latent = _latent(fields)
    head_dim = latent.nope_dim + latent.rope_dim
    rope = rope_from(fields, latent.rope_dim, base["max_positions"], 10000.0, interleaved=True)
    first = fields.get("first_k_dense_replace", default=0)
    if first < 0:
        raise ConfigError(f"config.json: first_k_dense_replace is {first}")
    fields.expect("moe_layer_freq", 1)
    fields.expect("mlp_bias", False)
    fields.expect("num_key_value_heads", base["num_heads"])
    fields.expect("head_dim", latent.rope_dim)
    fields.expect("qk_head_dim", head_dim)
    shared = fields.size("n_shared_experts", default=None, most=2**16) or 0
    built = ModelConfig(
        model_type="deepseek_v2",
        **{**base, "max_positions": usable_positions(rope, base["max_positions"])},
        **attention_bias(fields),
        **experts,
        num_kv_heads=base["num_heads"],
        head_dim=head_dim,
        rope=rope,
        attention_scale=_attention_scale(rope, head_dim),
        windows=windows_from(fields, None, [False] * layers),
        latent=latent,
        dense_width=fields.size("intermediate_size"),
        moe_layers=tuple(range(first, layers)),
        shared_width=shared * experts["expert_width"],
        router=_router(fields, experts["num_experts"], experts["top_k"]),
    )
    fields.finish()
    return built


def _latent(fields: Fields) -> Latent:
    return Latent(
        q_rank=fields.size("q_lora_rank", default=None),
        kv_rank=fields.size("kv_lora_rank"),
        nope_dim=fields.size("qk_nope_head_dim"),
        rope_dim=fields.size("qk_rope_head_dim"),
        v_dim=fields.size("v_head_dim"),
    )


def _attention_scale(rope: Rope, head_dim: int) -> float:
    """Softmax scale: yarn's `mscale_all_dim` enters squared, once for queries and once for keys."""
    mscale = yarn_mscale(rope.factor, dict(rope.options).get("mscale_all_dim") or 0.0)
    return head_dim**-0.5 * mscale * mscale


def _router(fields: Fields, experts: int, top_k: int) -> RouterRule:
    # transformers ignores norm_topk_prob here and DeepSeek's own code does not.
    fields.expect("norm_topk_prob", False)
    fields.expect("scoring_func", "softmax")
    fields.expect("topk_method", "greedy", "group_limited_greedy")
    groups = fields.size("n_group", default=1)
    top_groups = fields.size("topk_group", default=1)
    if fields.get("topk_method", default="greedy", kind=str) == "greedy":
        groups = top_groups = 1
    if experts % groups or top_groups > groups or top_groups * (experts // groups) < top_k:
        raise ConfigError(
            f"config.json: top-{top_k} of the best {top_groups} of {groups} groups of {experts} "
            "experts"
        )
    scale = fields.number("routed_scaling_factor", default=1.0)
    return RouterRule(normalize=False, scale=scale, num_groups=groups, top_groups=top_groups)


FAMILY = Family(
    config=config,
    rules=(
        *stem_rules(),
        *(Rule(f"{LAYER}self_attn.{n}.weight", f"attention/{k}") for n, k in ATTENTION.items()),
        *(Rule(f"{LAYER}self_attn.{n}.bias", f"attention/{ATTENTION[n]}_bias") for n in BIASED),
        *expert_rules(),
        *ffn_rules(LAYER + "mlp.", "mlp"),
        *ffn_rules(LAYER + "mlp.shared_experts.", "shared"),
    ),
)
