"""OLMoE: q/k norms over the whole projection, optional clipping of queries, keys and values."""

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
from moejax.models.family import Family, attention_rules, expert_rules, stem_rules


def config(hf: Mapping[str, Any]) -> ModelConfig:
    """ModelConfig of an OLMoE config.json."""
    fields = Fields(hf)
    attention = attention_fields(fields, default_theta=10000.0)
    bias = fields.get("attention_bias", default=False, kind=bool)
    built = ModelConfig(
        model_type="olmoe",
        **attention,
        **expert_fields(fields, attention["num_layers"], width_keys=("intermediate_size",)),
        **token_ids(hf),
        qkv_bias=bias,
        o_bias=bias,
        qk_norm="whole",
        clip_qkv=fields.get("clip_qkv", default=None, kind=float),
        router=RouterRule(normalize=fields.get("norm_topk_prob", default=False, kind=bool)),
    )
    fields.finish()
    return built


FAMILY = Family(config=config, rules=(*stem_rules(), *attention_rules(), *expert_rules()))
