"""Writes GGUF files as llama.cpp's converter does, from Hugging Face directories."""

import json
import pathlib
import re
from collections.abc import Callable

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type
from safetensors.numpy import load_file

ARCHITECTURES = {
    "qwen3_moe": "qwen3moe",
    "qwen2_moe": "qwen2moe",
    "olmoe": "olmoe",
    "mixtral": "llama",
    "llama": "llama",
    "qwen3": "qwen3",
}
NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate": "ffn_gate_inp",
    "block_sparse_moe.gate": "ffn_gate_inp",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
    "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp",
}
TOP = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
PARTS = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down"}
PARTS |= {"w1": "gate", "w3": "up", "w2": "down"}
EXPERT = re.compile(r"model\.layers\.(\d+)\.\w+\.experts\.(\d+)\.(\w+)\.weight")


def permuted(weights: np.ndarray, heads: int) -> np.ndarray:
    """Rows as llama.cpp's converter orders them for the llama architecture."""
    rows = weights.shape[0]
    halves = weights.reshape(heads, 2, rows // heads // 2, *weights.shape[1:])
    return halves.swapaxes(1, 2).reshape(weights.shape)


def gguf_tensors(directory: pathlib.Path) -> dict[str, np.ndarray]:
    """Tensors f32 of a directory by their GGUF names; the experts of a layer are one."""
    config = json.loads((directory / "config.json").read_text())
    heads = {"q": config["num_attention_heads"], "k": config["num_key_value_heads"]}
    found, experts = {}, {}
    for path in sorted(directory.glob("*.safetensors")):
        for name, tensor in load_file(path).items():
            tensor = tensor.astype(np.float32)
            if name in TOP:
                found[TOP[name]] = tensor
            elif match := EXPERT.fullmatch(name):
                key = f"blk.{match[1]}.ffn_{PARTS[match[3]]}_exps.weight"
                experts.setdefault(key, {})[int(match[2])] = tensor
            else:
                _, _, layer, rest = name.split(".", 3)
                rest, kind = rest.rsplit(".", 1)
                which = re.fullmatch(r"self_attn\.([qk])_proj", rest)
                if which and ARCHITECTURES[config["model_type"]] == "llama":
                    tensor = permuted(tensor, heads[which[1]])
                found[f"blk.{layer}.{NAMES[rest]}.{kind}"] = tensor
    if config.get("tie_word_embeddings"):
        found.pop("output.weight", None)
    stacks = {key: np.stack([of[i] for i in range(len(of))]) for key, of in experts.items()}
    return found | stacks


def metadata(writer: gguf.GGUFWriter, config: dict) -> None:
    """The keys that llama.cpp's converter writes."""
    rope = config.get("rope_parameters") or config
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    if experts := config.get("num_experts") or config.get("num_local_experts"):
        writer.add_expert_count(experts)
        writer.add_expert_used_count(config["num_experts_per_tok"])
    if width := config.get("moe_intermediate_size"):
        writer.add_expert_feed_forward_length(width)
    if width := config.get("shared_expert_intermediate_size"):
        writer.add_expert_shared_feed_forward_length(width)
    if ARCHITECTURES[config["model_type"]] == "llama":
        writer.add_rope_dimension_count(head_dim)
        writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"t{i}" for i in range(2000)])
    if isinstance(config.get("eos_token_id"), int):
        writer.add_eos_token_id(config["eos_token_id"])
    if config.get("bos_token_id") is not None:
        writer.add_bos_token_id(config["bos_token_id"])


def write_gguf(
    directory: pathlib.Path,
    path: pathlib.Path,
    kind: Type = Type.F32,
    encode: Callable[[np.ndarray, Type], np.ndarray] = gguf.quantize,
    change: Callable[[gguf.GGUFWriter], None] = lambda writer: None,
) -> dict[str, np.ndarray]:
    """Write a file whose matrices have one type, and return its tensors as stored."""
    config = json.loads((directory / "config.json").read_text())
    writer = gguf.GGUFWriter(path, ARCHITECTURES[config["model_type"]])
    metadata(writer, config)
    change(writer)
    stored = {}
    for name, tensor in gguf_tensors(directory).items():
        used = Type.F32 if tensor.ndim == 1 or "gate_inp" in name else kind
        data = tensor if used == Type.F32 else encode(tensor, used)
        raw = None if used in (Type.F32, Type.F16) else used
        writer.add_tensor(name, data, raw_dtype=raw)
        stored[name] = data if used == Type.F32 else gguf.dequantize(data, used)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return stored
