"""A dense Llama cut into slices of FFN neurons, and the directory that the engine runs it from.

A slice of w neurons of a SwiGLU is an expert of width w; with all of them on, each with weight 1,
the layer is the dense one to rounding. Neurons that matter on the same tokens go into one slice: a
balanced k-means, in the manner of MoEfication (arXiv 2110.01786), of how large the contribution of
each neuron is on calibration text. The router is linear, as a mixture's is: ridge regression of the
logarithm of the norm of each slice's output, less its mean over slices, on what the FFN works on.
So the softmax of its logits foretells each slice's share of all contributions.
"""

import dataclasses
import json
import os
import pathlib
import shutil
import tempfile
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from moejax import loading
from moejax.checkpoints import hf
from moejax.config import ModelConfig
from moejax.errors import InputError
from moejax.models import config_from_hf, family
from moejax.models.family import weight_map

SKETCH = 128  # dimensions that neurons are compared in
SWEEPS = 8  # of k-means
RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # tried, over the mean square of an input
HELD_OUT = 8  # one calibration token of so many chooses the ridge
FLOOR = 1e-6  # of a norm, before its logarithm
ATTENTION = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj"}
COPIED = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
README = """A dense model whose FFN was cut into slices of neurons, one per expert, by
`python -m experiments.moefy`. All weights are the dense model's; the router was fitted to them.
Every chosen expert weighs 1 (`equal_expert_weights` in config.json), which only moejax knows:
other programs would mix the experts by their scores, and write nonsense.
"""


@dataclasses.dataclass(frozen=True)
class Dense:
    """A dense Llama: its config.json, and its weights f32 by moejax's names."""

    hf: dict[str, Any]
    config: ModelConfig
    weights: dict[str, np.ndarray]

    @classmethod
    def read(cls, model: pathlib.Path) -> "Dense":
        """From a directory or a .gguf file; InputError if it is no plain dense Llama."""
        source = loading.source_path(model)
        values = loading.read_config(source)
        config = config_from_hf(values)
        if config.model_type != "llama" or config.qkv_bias or config.o_bias:
            raise InputError(
                f"{model} is a {config.model_type}: give a dense Llama without biases, such as "
                "SmolLM2"
            )
        rules = family(config.model_type).rules
        return cls(values, config, hf.load(source, weight_map(config, rules, "float32"))[0])

    def ffn(self, layer: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """gate and up [F, D] and down [D, F] of a layer."""
        gate, up = np.split(self.weights["mlp/gate_up"][layer], 2)
        return gate, up, self.weights["mlp/down"][layer]


@dataclasses.dataclass(frozen=True)
class Slices:
    """How the FFN of every layer is cut; E slices of w neurons."""

    order: np.ndarray  # [A, F] i32, neurons, those of slice e at [e * w, (e + 1) * w)
    router: np.ndarray  # [A, E, D] f32
    fits: tuple[dict[str, float], ...]  # of every layer's router: its ridge, and R2 on held-out

    @property
    def experts(self) -> int:
        """E."""
        return self.router.shape[1]


def check_slices(neurons: int, experts: int) -> None:
    """Raise InputError unless so many slices of one width can be made."""
    if experts < 1 or neurons % experts:
        raise InputError(f"{neurons} neurons cannot be cut into {experts} slices of one width")


def cluster(contributions: np.ndarray, experts: int, seed: int) -> np.ndarray:
    """Order [F] i32 of neurons in which each run of F / E belongs together.

    Balanced k-means: a sweep seats neurons by their similarity to the centres, most similar pairs
    first, until a slice is full. Neurons resemble each other as their contributions correlate.

    Args:
        contributions: [N, F] f32, how large the output of each neuron is on each token.
    """
    tokens, neurons = contributions.shape
    check_slices(neurons, experts)
    rng, width = np.random.default_rng(seed), neurons // experts
    own = contributions - contributions.mean(axis=0)
    own = (rng.standard_normal((SKETCH, tokens), np.float32) @ own).T
    own /= np.maximum(np.linalg.norm(own, axis=1, keepdims=True), 1e-30)
    centres = own[rng.choice(neurons, experts, replace=False)]
    seat = np.full(neurons, -1)
    for _ in range(SWEEPS):
        before, seat = seat, _seated(own @ centres.T, width)
        if (seat == before).all():
            break
        centres = np.stack([own[seat == e].mean(axis=0) for e in range(experts)])
        centres /= np.maximum(np.linalg.norm(centres, axis=1, keepdims=True), 1e-30)
    return np.argsort(seat, kind="stable").astype(np.int32)


def _seated(similarity: np.ndarray, width: int) -> np.ndarray:
    """Slice [F] of each neuron, given similarities [F, E]: best pairs first, `width` in each."""
    neurons, experts = similarity.shape
    seat, room, left = np.full(neurons, -1), [width] * experts, neurons
    for pair in np.argsort(-similarity, axis=None, kind="stable").tolist():
        neuron, expert = divmod(pair, experts)
        if seat[neuron] < 0 and room[expert]:
            seat[neuron], left = expert, left - 1
            room[expert] -= 1
            if not left:
                break
    return seat


def fit_router(x: np.ndarray, norms: np.ndarray) -> tuple[np.ndarray, dict[str, float]]:
    """Router [E, D] f32 for norms [N, E] of slices' outputs on x [N, D], and how well it fits.

    The ridge is that which foretells held-out tokens best; their R2 counts all slices together.
    """
    target = np.log(np.maximum(norms, FLOOR).astype(np.float64))
    target -= target.mean(axis=1, keepdims=True)
    x = x.astype(np.float64)
    held = np.arange(len(x)) % HELD_OUT == HELD_OUT - 1
    gram, right = x[~held].T @ x[~held], x[~held].T @ target[~held]
    size = np.trace(gram) / len(gram)
    spread = ((target[held] - target[~held].mean(axis=0)) ** 2).sum()
    best = None
    for ridge in RIDGES:
        found = np.linalg.solve(gram + ridge * size * np.eye(len(gram)), right)
        error = ((x[held] @ found - target[held]) ** 2).sum()
        if best is None or error < best[0]:
            best = (error, ridge, found)
    error, ridge, found = best
    return found.T.astype(np.float32), {"ridge": ridge, "r2": float(1 - error / spread)}


def write(directory: pathlib.Path, dense: Dense, slices: Slices, picks: int, *, dtype: str) -> None:
    """Write a Hugging Face style directory that the engine runs, top-`picks`; replaces files there.

    A Mixtral with `equal_expert_weights`. Tokenizer files are the caller's to add.

    Raises:
        InputError: more picks than slices.
    """
    experts, config = slices.experts, dense.config
    if not 0 < picks <= experts:
        raise InputError(f"top-{picks} of {experts} slices cannot be")
    dropped = ("head_dim", "attention_bias", "mlp_bias", "architectures")
    values = {n: v for n, v in dense.hf.items() if n not in dropped} | {
        "model_type": "mixtral",
        "head_dim": config.head_dim,
        "intermediate_size": config.dense_width // experts,
        "num_local_experts": experts,
        "num_experts_per_tok": picks,
        "equal_expert_weights": True,
        "torch_dtype": dtype,
    }
    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
    tensors = {n: np.ascontiguousarray(t.astype(kind)) for n, t in _tensors(dense, slices).items()}
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory) as beside:
        made = {"README.md": README, "config.json": json.dumps(values, indent=1) + "\n"}
        save_file(tensors, pathlib.Path(beside, "model.safetensors"))
        for name, text in made.items():
            pathlib.Path(beside, name).write_text(text)
        for name in ("model.safetensors", *made):
            os.replace(pathlib.Path(beside, name), directory / name)


def _tensors(dense: Dense, slices: Slices) -> dict[str, np.ndarray]:
    """Weights by their published names."""
    w, config = dense.weights, dense.config
    tensors = {
        "model.embed_tokens.weight": w["embed/weight"],
        "model.norm.weight": w["final_norm/weight"],
    }
    if not config.tied_embeddings:
        tensors["lm_head.weight"] = w["head/weight"]
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}."
        tensors[prefix + "input_layernorm.weight"] = w["norms/input"][layer]
        tensors[prefix + "post_attention_layernorm.weight"] = w["norms/post"][layer]
        for short, name in ATTENTION.items():
            tensors[f"{prefix}self_attn.{name}.weight"] = w[f"attention/{short}"][layer]
        gate, up, down = cut(dense, layer, slices.order[layer], slices.experts)
        tensors[prefix + "mlp.gate.weight"] = slices.router[layer]
        tensors[prefix + "mlp.experts.gate_up_proj"] = np.concatenate([gate, up], axis=1)
        tensors[prefix + "mlp.experts.down_proj"] = down
    return tensors


def cut(
    dense: Dense, layer: int, order: np.ndarray, experts: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """gate and up [E, w, D] and down [E, D, w] of a layer whose neurons come in this order [F]."""
    gate, up, down = dense.ffn(layer)
    width = dense.config.width
    gate, up = (part[order].reshape(experts, -1, width) for part in (gate, up))
    return gate, up, down[:, order].reshape(width, experts, -1).transpose(1, 0, 2)


def copy_tokenizer(source: pathlib.Path, directory: pathlib.Path) -> None:
    """Copy what text needs, and the chat template, from beside the dense model."""
    for name in COPIED:
        if (source / name).is_file():
            shutil.copy(source / name, directory / name)
