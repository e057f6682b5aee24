"""Tiny random models built and saved by transformers: the oracle of the parity tests."""

import dataclasses
import json
import pathlib

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the oracle is transformers on torch")

import safetensors.torch  # noqa: E402
import transformers  # noqa: E402

transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()

COMMON = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "eos_token_id": 1,
    "pad_token_id": None,
}
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
FAMILIES = {
    "qwen3_moe": {**COMMON, **EXPERTS, "head_dim": 8},
    "olmoe": {**COMMON, "num_experts": 6, "num_experts_per_tok": 2},
    "qwen2_moe": {**COMMON, **EXPERTS, "shared_expert_intermediate_size": 20},
    "mixtral": {**COMMON, "num_local_experts": 5, "num_experts_per_tok": 2},
    "deepseek_v2": {
        **COMMON,
        "num_key_value_heads": 4,
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 16,
        "n_shared_experts": 2,
        "first_k_dense_replace": 1,
        "kv_lora_rank": 12,
        "q_lora_rank": None,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 6,
    },
    "qwen3": {**COMMON, "head_dim": 8},
    "llama": COMMON,
    "mistral": {**COMMON, "sliding_window": None},
}
MOE_FAMILIES = tuple(f for f in FAMILIES if f not in ("qwen3", "llama", "mistral"))


def build(family: str, seed: int = 0, **changes) -> transformers.PreTrainedModel:
    """A model whose every parameter, norms and biases included, is random and matters."""
    config = transformers.AutoConfig.for_model(family, **{**FAMILIES[family], **changes})
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.3 if parameter.ndim == 1 else 1.3 * parameter.shape[-1] ** -0.5
            parameter.normal_(0.0, scale, generator=generator)
            if "norm" in name:
                parameter.add_(1.0)
    return model.float().eval()


@dataclasses.dataclass(frozen=True)
class Reference:
    """What transformers computes for one sequence."""

    logits: np.ndarray  # [T, V] f32
    router: tuple[np.ndarray, ...]  # of every sparse layer: logits [T, E]


def reference(
    model: transformers.PreTrainedModel, ids: np.ndarray, *, router: bool = False
) -> Reference:
    """One pass over the whole sequence."""
    asked = {"output_router_logits": True} if router else {}
    with torch.no_grad():
        out = model(torch.tensor(ids[None]).long(), use_cache=False, **asked)
    layers = out.router_logits if router else ()
    return Reference(out.logits[0].numpy(), tuple(layer.numpy() for layer in layers))


def stepwise(model: transformers.PreTrainedModel, ids: np.ndarray) -> np.ndarray:
    """Logits [T, V] f32, token by token through the cache of transformers."""
    rows, cache = [], None
    with torch.no_grad():
        for token in ids:
            out = model(torch.tensor([[int(token)]]), past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            rows.append(out.logits[0, -1].numpy())
    return np.stack(rows)


def rewrite_config(directory: pathlib.Path, change) -> None:
    """Apply `change` to the saved config.json, as a dict, in place."""
    path = directory / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def to_transformers_4(config: dict) -> None:
    """Spell the rope as transformers 4 did."""
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = {"type": rope.pop("rope_type"), **rope}
    if config["rope_scaling"]["type"] == "default":
        config["rope_scaling"] = None


def tensors(directory: pathlib.Path) -> dict[str, torch.Tensor]:
    """All tensors of a saved directory."""
    found = {}
    for path in sorted(directory.glob("*.safetensors")):
        found |= safetensors.torch.load_file(path)
    return found


def save_in_memory_names(model: transformers.PreTrainedModel, directory: pathlib.Path) -> None:
    """Save as the modules spell it: the experts of a layer fused."""
    model.config.save_pretrained(directory)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    safetensors.torch.save_file(state, directory / "model.safetensors")
