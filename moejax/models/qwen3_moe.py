"""Qwen3-MoE: per-head q/k norms, fine-grained experts without a shared one."""

from collections.abc import Mapping
from typing import Any

from moejax.config import (
    Fields,
    ModelConfig,
    RouterRule,
    attention_fields,
    expert_fields,
    token_ids,
)
from moejax.models.family import (
    LAYER,
    Family,
    attention_rules,
    expert_rules,
    ffn_rules,
    stem_rules,
)


def config(hf: Mapping[str, Any]) -> ModelConfig:
    """ModelConfig of a Qwen3-MoE config.json."""
    fields = Fields(hf)
    attention = attention_fields(fields, default_theta=10000.0)
    layers = attention["num_layers"]
    bias = fields.get("attention_bias", default=False, kind=bool)
    sliding = fields.get("use_sliding_window", default=False, kind=bool)
    window = fields.size("sliding_window", default=None)
    built = ModelConfig(
        model_type="qwen3_moe",
        **attention,
        **expert_fields(fields, layers, width_keys=("moe_intermediate_size",)),
        **token_ids(hf),
        qkv_bias=bias,
        o_bias=bias,
        qk_norm="head",
        windows=(window,) * layers if sliding and window else (),
        dense_width=fields.size("intermediate_size"),
        router=RouterRule(normalize=fields.get("norm_topk_prob", default=False, kind=bool)),
    )
    fields.finish()
    return built


FAMILY = Family(
    config=config,
    rules=(
        *stem_rules(),
        *attention_rules(),
        *expert_rules(),
        *ffn_rules(LAYER + "mlp.", "mlp"),
    ),
)
