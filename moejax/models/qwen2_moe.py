"""Qwen2-MoE (also Qwen1.5-MoE): a sigmoid-gated shared expert, biased q/k/v projections."""

from collections.abc import Mapping
from typing import Any

from moejax.checkpoints.rules import Rule
from moejax.config import Fields, ModelConfig, RouterRule
from moejax.models.family import LAYER, Family, attention_rules, expert_rules, ffn_rules, stem_rules
from moejax.models.fields import (
    attention_fields,
    expert_fields,
    qwen_moe_layers,
    sliding_window,
    windows_from,
)


def config(hf: Mapping[str, Any]) -> ModelConfig:
    """ModelConfig of a Qwen2-MoE config.json; by default every other early layer slides."""
    fields = Fields(hf)
    attention = attention_fields(fields)
    layers = attention["num_layers"]
    window = sliding_window(fields, fields.get("use_sliding_window", default=False, kind=bool))
    last = fields.get("max_window_layers", default=28)
    sliding = [window is not None and i < last and i % 2 == 0 for i in range(layers)]
    built = ModelConfig(
        model_type="qwen2_moe",
        **attention,
        **expert_fields(fields, "moe_intermediate_size"),
        qkv_bias=fields.get("qkv_bias", default=True, kind=bool),
        windows=windows_from(fields, window, sliding, typed=True),
        dense_width=fields.size("intermediate_size"),
        moe_layers=qwen_moe_layers(fields, layers),
        shared_width=fields.size("shared_expert_intermediate_size"),
        shared_gate=True,
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
        *ffn_rules(LAYER + "mlp.shared_expert.", "shared"),
        Rule(LAYER + "mlp.shared_expert_gate.weight", "shared/gate"),
    ),
)
