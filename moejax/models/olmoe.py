"""OLMoE: q/k norms over the whole projection, optional clipping of queries, keys and values."""

from collections.abc import Mapping
from typing import Any

from moejax.config import Fields, ModelConfig, RouterRule
from moejax.models.family import Family, attention_rules, expert_rules, stem_rules
from moejax.models.fields import attention_bias, attention_fields, expert_fields, windows_from


def config(hf: Mapping[str, Any]) -> ModelConfig:
    """ModelConfig of an OLMoE config.json."""
    fields = Fields(hf)
    attention = attention_fields(fields)
    layers = attention["num_layers"]
    built = ModelConfig(
        model_type="olmoe",
        **attention,
        **attention_bias(fields),
        **expert_fields(fields, "intermediate_size"),
        qk_norm="whole",
        clip_qkv=fields.number("clip_qkv", default=None),
        windows=windows_from(fields, None, [False] * layers),
        moe_layers=tuple(range(layers)),
        router=RouterRule(normalize=fields.get("norm_topk_prob", default=False, kind=bool)),
    )
    fields.finish()
    return built


FAMILY = Family(config=config, rules=(*stem_rules(), *attention_rules(), *expert_rules()))
