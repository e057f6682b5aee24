"""Names and shapes of a model's dense parameters: declared once, used to load, restore and plan."""

import dataclasses
from collections.abc import Callable

import numpy as np

from moejax.config import ModelConfig
from moejax.formats import held_shape, parameter_format
from moejax.layout import BITS, MatrixLayout


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every dense parameter by path; stacks lead with their number of layers."""
    shapes = {
        "embed/weight": (config.vocab_size, config.width),
        "final_norm/weight": (config.width,),
        "norms/input": (config.num_layers, config.width),
        "norms/post": (config.num_layers, config.width),
    }
    if not config.tied_embeddings:
        shapes["head/weight"] = (config.vocab_size, config.width)
    attention = latent_shapes(config) if config.latent else attention_shapes(config)
    shapes |= {f"attention/{k}": (config.num_layers, *v) for k, v in attention.items()}
    if config.dense_layers:
        shapes |= _ffn("mlp", len(config.dense_layers), config.width, config.dense_width)
    if config.moe_layers:
        layers = config.num_moe_layers
        shapes["moe/router"] = (layers, config.num_experts, config.width)
        if config.shared_width:
            shapes |= _ffn("shared", layers, config.width, config.shared_width)
        if config.shared_gate:
            shapes["shared/gate"] = (layers, 1, config.width)
    return shapes


def attention_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of one layer of grouped-query attention."""
    query, key = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "q": (query, config.width),
        "k": (key, config.width),
        "v": (key, config.width),
        "o": (config.width, query),
    }
    if config.qkv_bias:
        shapes |= {"q_bias": (query,), "k_bias": (key,), "v_bias": (key,)}
    if config.o_bias:
        shapes["o_bias"] = (config.width,)
    if config.qk_norm == "head":
        shapes |= {"q_norm": (config.head_dim,), "k_norm": (config.head_dim,)}
    if config.qk_norm == "whole":
        shapes |= {"q_norm": (query,), "k_norm": (key,)}
    return shapes


def latent_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of one layer of multi-head latent attention."""
    latent = config.latent
    query = config.num_heads * (latent.nope_dim + latent.rope_dim)
    shapes: dict[str, tuple[int, ...]] = {
        "kv_a": (latent.kv_rank + latent.rope_dim, config.width),
        "kv_a_norm": (latent.kv_rank,),
        "kv_b": (config.num_heads * (latent.nope_dim + latent.v_dim), latent.kv_rank),
        "o": (config.width, config.num_heads * latent.v_dim),
    }
    if latent.q_rank is None:
        shapes["q"] = (query, config.width)
    else:
        shapes |= {
            "q_a": (latent.q_rank, config.width),
            "q_a_norm": (latent.q_rank,),
            "q_b": (query, latent.q_rank),
        }
    if config.qkv_bias:
        shapes["kv_a_bias"] = (latent.kv_rank + latent.rope_dim,)
        if latent.q_rank is not None:
            shapes["q_a_bias"] = (latent.q_rank,)
    if config.o_bias:
        shapes["o_bias"] = (config.width,)
    return shapes


def is_stacked(path: str) -> bool:
    """Whether the parameters of a group (or the one at `path`) are stacks over layers."""
    return path.split("/")[0] not in ("embed", "final_norm", "head")


@dataclasses.dataclass(frozen=True)
class Held:
    """How a parameter is held on the device."""

    shape: tuple[int, ...]  # of the array
    dtype: np.dtype
    weight: tuple[int, ...]  # shape of the weight, or of the stack of weights
    format: str  # one of layout.FORMATS
    stacked: bool

    @property
    def vector(self) -> bool:
        """Whether each weight is a vector."""
        return len(self.weight) == 1 + self.stacked

    @property
    def layout(self) -> MatrixLayout:
        """Of each weight; a vector is one row."""
        rows = 1 if self.vector else self.weight[-2]
        return MatrixLayout(rows, self.weight[-1], self.format)


def held_parameters(config: ModelConfig, dtype: str, quant: str | None = None) -> dict[str, Held]:
    """How every dense parameter is held, by path: as unsigned bits, like experts.

    XLA's CPU backend would convert a whole bf16 stack to f32 before the loop over layers, and the
    native kernels take bits.
    """
    held = {}
    for path, shape in parameter_shapes(config).items():
        format = parameter_format(path, dtype, quant, config.tied_embeddings)
        held[path] = Held(
            shape=held_shape(shape, format),
            dtype=BITS[format],
            weight=shape,
            format=format,
            stacked=is_stacked(path),
        )
    return held


def stack_index(config: ModelConfig) -> Callable[[str, int], int | None]:
    """The function that tells where a layer stands in the stack of a path, None if it does not."""
    every, dense, sparse = (
        {layer: index for index, layer in enumerate(layers)}
        for layers in (range(config.num_layers), config.dense_layers, config.moe_layers)
    )
    groups = {"mlp": dense, "moe": sparse, "shared": sparse, "experts": sparse}
    return lambda path, layer: groups.get(path.split("/")[0], every).get(layer)


def _ffn(group: str, layers: int, width: int, hidden: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{group}/gate_up": (layers, 2 * hidden, width),
        f"{group}/down": (layers, width, hidden),
    }
