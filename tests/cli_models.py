"""A small random Qwen3-MoE directory with a tokenizer and a chat template, made without torch."""

import json
import pathlib

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file
from text_models import byte_level_backend

LAYERS, EXPERTS, TOP_K, WIDTH, EXPERT_WIDTH, HEADS, KV_HEADS, HEAD_DIM = 2, 8, 2, 32, 16, 4, 2, 8
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_model(directory: pathlib.Path, *, dtype=ml_dtypes.bfloat16) -> pathlib.Path:
    """Write the model and return its directory."""
    directory.mkdir(parents=True)
    backend = byte_level_backend()
    backend.save(str(directory / "tokenizer.json"))
    vocabulary = backend.get_vocab_size()
    tokenizer_config = {"chat_template": TEMPLATE, "eos_token": "<eos>", "bos_token": "<bos>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    config = {
        "model_type": "qwen3_moe",
        "vocab_size": vocabulary,
        "hidden_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "intermediate_size": 48,
        "moe_intermediate_size": EXPERT_WIDTH,
        "num_experts": EXPERTS,
        "num_experts_per_tok": TOP_K,
        "norm_topk_prob": True,
        "eos_token_id": backend.token_to_id("<eos>"),
    }
    (directory / "config.json").write_text(json.dumps(config))
    rng = np.random.default_rng(0)
    tensors = {
        name: (rng.normal(size=shape) * shape[-1] ** -0.5 + ("norm" in name)).astype(dtype)
        for name, shape in _shapes(vocabulary).items()
    }
    save_file(tensors, directory / "model.safetensors")
    return directory


def damage(directory: pathlib.Path, name: str) -> None:
    """Put a NaN into one tensor of the model."""
    from safetensors.numpy import load_file

    tensors = load_file(directory / "model.safetensors")
    tensors[name].reshape(-1)[3] = np.nan
    save_file(tensors, directory / "model.safetensors")


def _shapes(vocabulary: int) -> dict[str, tuple[int, ...]]:
    shapes = {"model.embed_tokens.weight": (vocabulary, WIDTH), "model.norm.weight": (WIDTH,)}
    for layer in range(LAYERS):
        at = f"model.layers.{layer}."
        query, key = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
        shapes |= {
            at + "input_layernorm.weight": (WIDTH,),
            at + "post_attention_layernorm.weight": (WIDTH,),
            at + "self_attn.q_proj.weight": (query, WIDTH),
            at + "self_attn.k_proj.weight": (key, WIDTH),
            at + "self_attn.v_proj.weight": (key, WIDTH),
            at + "self_attn.o_proj.weight": (WIDTH, query),
            at + "self_attn.q_norm.weight": (HEAD_DIM,),
            at + "self_attn.k_norm.weight": (HEAD_DIM,),
            at + "mlp.gate.weight": (EXPERTS, WIDTH),
        }
        for expert in range(EXPERTS):
            part = f"{at}mlp.experts.{expert}."
            shapes[part + "gate_proj.weight"] = (EXPERT_WIDTH, WIDTH)
            shapes[part + "up_proj.weight"] = (EXPERT_WIDTH, WIDTH)
            shapes[part + "down_proj.weight"] = (WIDTH, EXPERT_WIDTH)
    return shapes
