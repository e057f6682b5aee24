"""Qwen3, dense: per-head q/k norms; the last layers may slide."""

from collections.abc import Mapping
from typing import Any

from moejax.config import Fields, ModelConfig
from moejax.models.family import Family, dense_rules
from moejax.models.fields import attention_bias, attention_fields, sliding_window, windows_from


def config(hf: Mapping[str, Any]) -> ModelConfig:
    """ModelConfig of a Qwen3 config.json."""
    fields = Fields(hf)
    attention = attention_fields(fields, default_head_dim=128)
    window = sliding_window(fields, fields.get("use_sliding_window", default=False, kind=bool))
    first = fields.get("max_window_layers", default=28)
    sliding = [window is not None and i >= first for i in range(attention["num_layers"])]
    built = ModelConfig(
        model_type="qwen3",
        **attention,
        **attention_bias(fields),
        qk_norm="head",
        windows=windows_from(fields, window, sliding, typed=True),
        dense_width=fields.size("intermediate_size"),
    )
    fields.finish()
    return built


FAMILY = Family(config=config, rules=dense_rules())
