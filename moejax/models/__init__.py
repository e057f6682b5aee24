"""Model families: a registry by `model_type`, and the decoder they share."""

import importlib
from collections.abc import Mapping
from typing import Any

from moejax.config import ModelConfig
from moejax.errors import ConfigError, UnsupportedModelError
from moejax.models.family import Family

FAMILIES = (
    "deepseek_v2",
    "llama",
    "mistral",
    "mixtral",
    "olmoe",
    "qwen2_moe",
    "qwen3",
    "qwen3_moe",
)
QUANTISATION_KEYS = ("quantization_config", "compression_config")


def family(model_type: str) -> Family:
    """The family of a `model_type`; UnsupportedModelError lists those that exist."""
    if model_type not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise UnsupportedModelError(
            f"model_type {model_type!r:.80} is not supported; known: {known}"
        )
    return importlib.import_module(f"moejax.models.{model_type}").FAMILY


def config_from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """ModelConfig of a config.json of any supported family; nothing in it is ignored silently.

    Raises:
        ConfigError: it is malformed or contradicts itself.
        UnsupportedModelError: a family, quantisation or option that moejax does not compute.
    """
    model_type = hf.get("model_type")
    if not isinstance(model_type, str):
        raise ConfigError("config.json: model_type is missing")
    for key in QUANTISATION_KEYS:
        if given := hf.get(key):
            method = given.get("quant_method", "unknown") if isinstance(given, dict) else given
            raise UnsupportedModelError(
                f"the checkpoint is quantised ({key}: {method!r:.80}); give the bf16, f16 or f32 "
                "original"
            )
    return family(model_type).config(hf)
