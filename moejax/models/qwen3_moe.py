"""Qwen3-MoE: per-head q/k norms, fine-grained experts without a shared one."""

from collections.abc import Mapping
from typing import Any

from moejax.config import Fields, ModelConfig, RouterRule
from moejax.models.family import LAYER, Family, attention_rules, expert_rules, ffn_rules, stem_rules
from moejax.models.fields import (
    attention_bias,
    attention_fields,
    expert_fields,
    qwen_moe_layers,
    sliding_window,
    windows_from,
)


def config(hf: Mapping[str, Any]) -> ModelConfig:
    """ModelConfig of a Qwen3-MoE config.json."""
    fields = Fields(hf)
    attention = attention_fields(fields)
    layers = attention["num_layers"]
    window = sliding_window(fields, fields.get("use_sliding_window", default=False, kind=bool))
    if window:
        # Releases of transformers disagree on whether the first layers are then exempt.
        fields.expect("max_window_layers", 0)
    fields.get("max_window_layers", default=None)
    built = ModelConfig(
        model_type="qwen3_moe",
        **attention,
        **attention_bias(fields),
        **expert_fields(fields, "moe_intermediate_size"),
        qk_norm="head",
        windows=windows_from(fields, window, [window is not None] * layers),
        dense_width=fields.size("intermediate_size"),
        moe_layers=qwen_moe_layers(fields, layers),
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
