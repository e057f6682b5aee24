"""Hugging Face directories of the tiny models: writing, reading, and a check against torch."""

import json
import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.flax import load_file, save_file
from tiny_data import CHAT_TEMPLATE, EOT, SPECIALS
from tiny_model import Shape

MLP = ("gate", "up", "down")
PAD = SPECIALS.index("<|pad|>")
# Greedy decoding of so small a model repeats itself.
SAMPLING = {"do_sample": True, "temperature": 0.7, "top_p": 0.95}


def config_of(shape: Shape) -> dict:
    """config.json of a model in the layout of transformers 5."""
    name = "Qwen3MoeForCausalLM" if shape.experts else "Qwen3ForCausalLM"
    config = {
        "architectures": [name],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": EOT,
        "dtype": "bfloat16",
        "eos_token_id": EOT,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "initializer_range": 0.02,
        "max_position_embeddings": shape.positions,
        "model_type": "qwen3_moe" if shape.experts else "qwen3",
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.kv_heads,
        "pad_token_id": PAD,
        "rms_norm_eps": shape.eps,
        "rope_parameters": {"rope_theta": shape.theta, "rope_type": "default"},
        "sliding_window": None,
        "tie_word_embeddings": True,
        "transformers_version": "5.23.0",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": shape.vocab,
    }
    if not shape.experts:
        full = ["full_attention"] * shape.layers
        return config | {"intermediate_size": shape.inner, "layer_types": full}
    return config | {
        "decoder_sparse_step": 1,
        "intermediate_size": shape.inner * shape.picks,
        "mlp_only_layers": [],
        "moe_intermediate_size": shape.inner,
        "norm_topk_prob": True,
        "num_experts": shape.experts,
        "num_experts_per_tok": shape.picks,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.003,
    }


def shape_of(config: dict) -> Shape:
    """The sizes that a config.json states."""
    experts = config.get("num_experts", 0)
    return Shape(
        vocab=config["vocab_size"],
        hidden=config["hidden_size"],
        layers=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        kv_heads=config["num_key_value_heads"],
        head_dim=config["head_dim"],
        experts=experts,
        picks=config.get("num_experts_per_tok", 0),
        inner=config["moe_intermediate_size"] if experts else config["intermediate_size"],
        theta=config["rope_parameters"]["rope_theta"],
        eps=config["rms_norm_eps"],
        positions=config["max_position_embeddings"],
    )


def tensor_places(shape: Shape) -> dict[str, tuple]:
    """Published tensor name -> (path in the parameters, expert index or None)."""
    places: dict[str, tuple] = {
        "model.embed_tokens.weight": (("embed",), None),
        "model.norm.weight": (("norm",), None),
    }
    names = {"norm1": "input_layernorm", "norm2": "post_attention_layernorm"}
    names |= {f"{a}_norm": f"self_attn.{a}_norm" for a in "qk"}
    names |= {a: f"self_attn.{a}_proj" for a in "qkvo"}
    names |= {"router": "mlp.gate"} if shape.experts else {m: f"mlp.{m}_proj" for m in MLP}
    for i in range(shape.layers):
        for key, name in names.items():
            places[f"model.layers.{i}.{name}.weight"] = (("layers", i, key), None)
        for e in range(shape.experts):
            for m in MLP:
                full = f"model.layers.{i}.mlp.experts.{e}.{m}_proj.weight"
                places[full] = (("layers", i, m), e)
    return places


def to_tensors(params: dict, shape: Shape) -> dict[str, jax.Array]:
    """Parameters as bf16 tensors under their published names, matrices as [out, in]."""
    host = jax.tree.map(np.asarray, params)
    tensors = {}
    for name, (path, expert) in tensor_places(shape).items():
        value = host
        for part in path:
            value = value[part]
        value = value if expert is None else value[expert]
        turned = value.ndim == 2 and path[-1] != "embed"
        tensors[name] = jnp.asarray(value.T if turned else value, jnp.bfloat16)
    return tensors


def from_tensors(tensors: dict[str, jax.Array], shape: Shape) -> dict:
    """Parameters in f32 from tensors under their published names."""
    params: dict = {"layers": [{} for _ in range(shape.layers)]}
    stacks: dict[tuple, list] = {}
    for name, (path, expert) in tensor_places(shape).items():
        value = np.asarray(tensors[name], np.float32)
        value = value.T if value.ndim == 2 and path[-1] != "embed" else value
        if expert is not None:
            stacks.setdefault(path, []).append(value)
        elif path[0] == "layers":
            params["layers"][path[1]][path[2]] = jnp.asarray(value)
        else:
            params[path[0]] = jnp.asarray(value)
    for (_, layer, key), values in stacks.items():
        params["layers"][layer][key] = jnp.asarray(np.stack(values))
    return params


def write_json(path: Path, value: dict) -> None:
    """Write indented JSON with a final newline."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def write_model(folder: Path, params: dict, shape: Shape, tokenizer: Path) -> None:
    """Write a complete model directory, replacing an existing one in one rename."""
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    weights = part / "model.safetensors"
    save_file(to_tensors(params, shape), weights, metadata={"format": "pt"})
    weights.chmod(0o644)
    write_json(part / "config.json", config_of(shape))
    ids = {"bos_token_id": EOT, "eos_token_id": EOT, "pad_token_id": PAD}
    write_json(part / "generation_config.json", {**SAMPLING, **ids})
    shutil.copyfile(tokenizer, part / "tokenizer.json")
    write_json(
        part / "tokenizer_config.json",
        {
            "add_prefix_space": False,
            "additional_special_tokens": list(SPECIALS[1:3]),
            "bos_token": SPECIALS[EOT],
            "chat_template": CHAT_TEMPLATE,
            "clean_up_tokenization_spaces": False,
            "eos_token": SPECIALS[EOT],
            "model_max_length": shape.positions,
            "pad_token": SPECIALS[PAD],
            "tokenizer_class": "PreTrainedTokenizerFast",
            "unk_token": None,
        },
    )
    if (folder / "README.md").exists():
        shutil.copyfile(folder / "README.md", part / "README.md")
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.replace(folder, old)
    os.replace(part, folder)
    shutil.rmtree(old, ignore_errors=True)


def read_model(folder: Path) -> tuple[dict, Shape]:
    """Parameters in f32 and the sizes of a model directory."""
    shape = shape_of(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    return from_tensors(load_file(folder / "model.safetensors"), shape), shape


def torch_difference(folder: Path, tokens: np.ndarray) -> dict:
    """Largest f32 logit difference to transformers on torch, with its loading report.

    tokens [batch, length]; needs torch and transformers.
    """
    import torch
    from tiny_model import logits_of
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    with torch.no_grad():
        theirs = model(torch.from_numpy(np.asarray(tokens, np.int64))).logits.numpy()
    params, shape = read_model(folder)
    ours = np.asarray(logits_of(params, jnp.asarray(tokens), shape, jnp.float32))
    return {
        "missing": sorted(info["missing_keys"]),
        "unexpected": sorted(info["unexpected_keys"]),
        "max_difference": float(np.abs(ours - theirs).max()),
        "same_top1": float((ours.argmax(-1) == theirs.argmax(-1)).mean()),
    }
