"""Mixtral: few large experts, their weights renormalised, and its own tensor names."""

from collections.abc import Mapping
from typing import Any

from moejax.config import Fields, ModelConfig, RouterRule
from moejax.models.family import Family, attention_rules, expert_rules, stem_rules
from moejax.models.fields import attention_fields, expert_fields, sliding_window, windows_from

W123 = ("w1", "w3", "w2")


def config(hf: Mapping[str, Any]) -> ModelConfig:
    """ModelConfig of a Mixtral config.json."""
    fields = Fields(hf)
    attention = attention_fields(fields, default_theta=1e6)
    layers = attention["num_layers"]
    window = sliding_window(fields)
    built = ModelConfig(
        model_type="mixtral",
        **attention,
        **expert_fields(fields, "intermediate_size"),
        windows=windows_from(fields, window, [window is not None] * layers),
        moe_layers=tuple(range(layers)),
        router=RouterRule(
            normalize=True,
            # not a key of the published family: of dense models that were cut into slices
            equal=fields.get("equal_expert_weights", default=False, kind=bool),
        ),
    )
    fields.finish()
    return built


FAMILY = Family(
    config=config,
    rules=(
        *stem_rules(),
        *attention_rules(),
        *expert_rules("block_sparse_moe", names=W123),
        *expert_rules("mlp", names=W123),
    ),
)
