"""Write a Qwen3-MoE directory of random weights, for measurements that need a size, not a text.

Command:   python -m experiments.random_model OUT
Hardware:  any CPU; the default (1.72 billion parameters, 3.4 GB) takes about half a minute.
Expected:  a directory that moejax, transformers and llama.cpp's converter read. It has no
           tokenizer: give token ids.
"""

import argparse
import concurrent.futures
import json
import math
import os
import pathlib
from collections.abc import Iterator

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

SCALE = 0.02  # standard deviation of every matrix, as Qwen3-MoE initialises them
# With 0.02 here too, what attention adds, alike for all tokens of a context, would outweigh the
# token itself: every token would go to the same few experts, and greedy decoding would repeat one.
EMBEDDING_SCALE = 1.0
Shapes = dict[str, tuple[int, ...]]


def make_config(
    *,
    layers: int = 16,
    width: int = 1024,
    experts: int = 64,
    top_k: int = 8,
    expert_width: int = 512,
    heads: int = 16,
    kv_heads: int = 4,
    head_dim: int = 64,
    vocab: int = 32000,
) -> dict:
    """The config.json of the model."""
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "torch_dtype": "bfloat16",
        "vocab_size": vocab,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "attention_bias": False,
        "tie_word_embeddings": False,
        "intermediate_size": 4 * width,
        "moe_intermediate_size": expert_width,
        "num_experts": experts,
        "num_experts_per_tok": top_k,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def shards(config: dict) -> Iterator[Shapes]:
    """Tensor shapes file by file: embedding and head, then one layer each."""
    width, vocab = config["hidden_size"], config["vocab_size"]
    yield {
        "model.embed_tokens.weight": (vocab, width),
        "model.norm.weight": (width,),
        "lm_head.weight": (vocab, width),
    }
    for layer in range(config["num_hidden_layers"]):
        yield _layer_shapes(config, f"model.layers.{layer}.")


def _layer_shapes(config: dict, at: str) -> Shapes:
    width, inner = config["hidden_size"], config["moe_intermediate_size"]
    channels = config["head_dim"]
    query = config["num_attention_heads"] * channels
    key = config["num_key_value_heads"] * channels
    shapes = {
        "input_layernorm": (width,),
        "post_attention_layernorm": (width,),
        "self_attn.q_proj": (query, width),
        "self_attn.k_proj": (key, width),
        "self_attn.v_proj": (key, width),
        "self_attn.o_proj": (width, query),
        "self_attn.q_norm": (channels,),
        "self_attn.k_norm": (channels,),
        "mlp.gate": (config["num_experts"], width),
    }
    for expert in range(config["num_experts"]):
        part = f"mlp.experts.{expert}."
        shapes[part + "gate_proj"] = (inner, width)
        shapes[part + "up_proj"] = (inner, width)
        shapes[part + "down_proj"] = (width, inner)
    return {f"{at}{name}.weight": shape for name, shape in shapes.items()}


def write(directory: pathlib.Path, config: dict, seed: int = 0) -> int:
    """Write the model and return its parameters; holds one layer in memory at a time."""
    directory.mkdir(parents=True)
    files = list(shards(config))
    placed, total, number = {}, 0, 0
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as workers:
        for i, shapes in enumerate(files):
            file = f"model-{i + 1:05}-of-{len(files):05}.safetensors"
            numbers = range(number, number + len(shapes))
            made = workers.map(_tensor, shapes, shapes.values(), [seed] * len(shapes), numbers)
            save_file(dict(zip(shapes, made, strict=True)), directory / file, {"format": "pt"})
            placed |= dict.fromkeys(shapes, file)
            total += sum(math.prod(shape) for shape in shapes.values())
            number += len(shapes)
    index = {"metadata": {"total_size": 2 * total}, "weight_map": placed}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")
    (directory / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    return total


def _tensor(name: str, shape: tuple[int, ...], seed: int, number: int) -> np.ndarray:
    """One tensor, drawn from a generator of its own so that threads change nothing."""
    if "norm" in name:
        return np.ones(shape, ml_dtypes.bfloat16)
    drawn = np.random.default_rng((seed, number)).standard_normal(shape, np.float32)
    drawn *= EMBEDDING_SCALE if "embed" in name else SCALE
    return drawn.astype(ml_dtypes.bfloat16)


def main() -> None:
    """Write the model that the options describe."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=pathlib.Path)
    for name, default in make_config.__kwdefaults__.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    parser.add_argument("--seed", type=int, default=0)
    options = vars(parser.parse_args())
    out, seed = options.pop("out"), options.pop("seed")
    if out.exists():
        parser.error(f"{out} exists already")
    parameters = write(out, make_config(**options), seed)
    print(f"{out}: {parameters / 1e9:.2f} billion parameters")


if __name__ == "__main__":
    main()
