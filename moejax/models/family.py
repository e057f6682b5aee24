"""What a family file provides, and the weight rules that most families share."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from moejax.checkpoints.rules import Rule, WeightMap
from moejax.config import ModelConfig
from moejax.layout import DTYPES
from moejax.models.shapes import parameter_shapes, stack_index

LAYER = "model.layers.{layer}."


@dataclasses.dataclass(frozen=True)
class Family:
    """One family of checkpoints: how its config.json and its tensor names are read."""

    config: Callable[[Mapping[str, Any]], ModelConfig]
    rules: tuple[Rule, ...]


@dataclasses.dataclass(frozen=True)
class Spec:
    """Shape and dtype of one dense parameter."""

    shape: tuple[int, ...]
    dtype: np.dtype


def stem_rules() -> tuple[Rule, ...]:
    """Embeddings, norms and head, spelled alike everywhere."""
    return (
        Rule("model.embed_tokens.weight", "embed/weight"),
        Rule("model.norm.weight", "final_norm/weight"),
        Rule("lm_head.weight", "head/weight"),
        Rule("lm_head.weight", None),  # a copy of the embeddings, where those are tied
        Rule(LAYER + "input_layernorm.weight", "norms/input"),
        Rule(LAYER + "post_attention_layernorm.weight", "norms/post"),
        Rule(LAYER + "self_attn.rotary_emb.inv_freq", None),
    )


def attention_rules() -> tuple[Rule, ...]:
    """Grouped-query attention; parameters that a config does not have are never matched."""
    names = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj"}
    weights = [Rule(f"{LAYER}self_attn.{n}.weight", f"attention/{k}") for k, n in names.items()]
    biases = [Rule(f"{LAYER}self_attn.{n}.bias", f"attention/{k}_bias") for k, n in names.items()]
    norms = [Rule(f"{LAYER}self_attn.{k}.weight", f"attention/{k}") for k in ("q_norm", "k_norm")]
    return (*weights, *biases, *norms)


def ffn_rules(
    prefix: str, group: str, names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
) -> tuple[Rule, ...]:
    """A SwiGLU whose gate and up projections become the halves of one matrix."""
    gate, up, down = names
    return (
        Rule(f"{prefix}{gate}.weight", f"{group}/gate_up", half=0),
        Rule(f"{prefix}{up}.weight", f"{group}/gate_up", half=1),
        Rule(f"{prefix}{down}.weight", f"{group}/down"),
    )


def expert_rules(block: str = "mlp", **names: tuple[str, str, str]) -> tuple[Rule, ...]:
    """Router and experts, one tensor per expert or all of a layer fused."""
    prefix = f"{LAYER}{block}."
    return (
        Rule(prefix + "gate.weight", "moe/router"),
        *ffn_rules(prefix + "experts.{expert}.", "experts", **names),
        Rule(prefix + "experts.gate_up_proj", "experts/gate_up"),
        Rule(prefix + "experts.down_proj", "experts/down"),
    )


def dense_rules() -> tuple[Rule, ...]:
    """A whole dense model."""
    return (*stem_rules(), *attention_rules(), *ffn_rules(LAYER + "mlp.", "mlp"))


def weight_map(config: ModelConfig, rules: tuple[Rule, ...], dtype: str) -> WeightMap:
    """All that the checkpoint reader needs to fill a model of this config in `dtype`."""
    specs = {path: Spec(s, DTYPES[dtype]) for path, s in parameter_shapes(config).items()}
    return WeightMap(
        rules=rules,
        specs=specs,
        stack_index=stack_index(config),
        layout=config.record_layout(dtype) if config.moe_layers else None,
        expert_layers=config.num_moe_layers,
        experts=config.num_experts,
    )
