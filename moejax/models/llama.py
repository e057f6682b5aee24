"""Llama, dense."""

from collections.abc import Mapping
from typing import Any

from moejax.config import Fields, ModelConfig
from moejax.models.family import Family, dense_rules
from moejax.models.fields import attention_bias, attention_fields, windows_from


def config(hf: Mapping[str, Any]) -> ModelConfig:
    """ModelConfig of a Llama config.json."""
    fields = Fields(hf)
    attention = attention_fields(fields)
    fields.expect("mlp_bias", False)
    built = ModelConfig(
        model_type="llama",
        **attention,
        **attention_bias(fields),
        windows=windows_from(fields, None, [False] * attention["num_layers"]),
        dense_width=fields.size("intermediate_size"),
    )
    fields.finish()
    return built


FAMILY = Family(config=config, rules=dense_rules())
