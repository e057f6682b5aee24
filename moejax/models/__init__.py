"""Model families: a registry by `model_type`, and the decoder they share."""

import importlib
from collections.abc import Mapping
from typing import Any

from moejax.config import ModelConfig
from moejax.errors import ConfigError, UnsupportedModelError
from moejax.models.family import Family

FAMILIES = {
    "qwen3_moe": "qwen3_moe",
    "olmoe": "olmoe",
}


def family(model_type: str) -> Family:
    """The family of a `model_type`; UnsupportedModelError lists those that exist."""
    if model_type not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise UnsupportedModelError(f"model_type {model_type!r} is not supported; known: {known}")
    return importlib.import_module(f"moejax.models.{FAMILIES[model_type]}").FAMILY


def config_from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """ModelConfig of a config.json of any supported family; nothing in it is ignored silently."""
    model_type = hf.get("model_type")
    if not isinstance(model_type, str):
        raise ConfigError("config.json: model_type is missing")
    if hf.get("quantization_config"):
        method = hf["quantization_config"].get("quant_method", "unknown")
        raise UnsupportedModelError(
            f"the checkpoint is quantised ({method}); give the bf16, f16 or f32 original"
        )
    return family(model_type).config(hf)
