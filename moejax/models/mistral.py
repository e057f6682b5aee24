"""Mistral, dense: every layer slides."""

from collections.abc import Mapping
from typing import Any

from moejax.config import Fields, ModelConfig
from moejax.models.family import Family, dense_rules
from moejax.models.fields import attention_fields, sliding_window, windows_from


def config(hf: Mapping[str, Any]) -> ModelConfig:
    """ModelConfig of a Mistral config.json; a window that is left out is 4096, null is none."""
    fields = Fields({"sliding_window": 4096, **hf})
    attention = attention_fields(fields)
    window = sliding_window(fields)
    built = ModelConfig(
        model_type="mistral",
        **attention,
        windows=windows_from(fields, window, [window is not None] * attention["num_layers"]),
        dense_width=fields.size("intermediate_size"),
    )
    fields.finish()
    return built


FAMILY = Family(config=config, rules=dense_rules())
