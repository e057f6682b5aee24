"""What several families' config.json spell alike."""

from collections.abc import Iterable
from typing import Any

from moejax.checkpoints.rules import MAX_LAYERS
from moejax.config import MAX_EXPERTS, MAX_SIZE, Fields, Rope
from moejax.errors import ConfigError, UnsupportedModelError

ROPE_KEYS = ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings")
LAYER_TYPES = ("full_attention", "sliding_attention")


def base_fields(fields: Fields) -> dict[str, Any]:
    """ModelConfig fields of every family: sizes, norm, vocabulary and special tokens."""
    fields.expect("hidden_act", "silu", "swish")
    return {
        "vocab_size": fields.size("vocab_size"),
        "width": fields.size("hidden_size"),
        "num_layers": fields.size("num_hidden_layers", most=MAX_LAYERS),
        "num_heads": fields.size("num_attention_heads"),
        "max_positions": fields.size("max_position_embeddings"),
        "norm_eps": fields.number("rms_norm_eps"),
        "tied_embeddings": fields.get("tie_word_embeddings", default=False, kind=bool),
        **_token_ids(fields),
    }


def _token_ids(fields: Fields) -> dict[str, Any]:
    eos = fields.get("eos_token_id", default=[], kind=(int, list))
    eos = eos if isinstance(eos, list) else [eos]
    bos = fields.get("bos_token_id", default=None)
    pad = fields.get("pad_token_id", default=None)
    for token in (*eos, *([] if bos is None else [bos])):
        if type(token) is not int or not 0 <= token <= MAX_SIZE:
            raise ConfigError(f"config.json: {token!r:.80} is not a token id")
    # Old LLaMA checkpoints say -1 for "none"; nothing is ever padded with the id itself.
    return {"eos_ids": tuple(eos), "bos_id": bos, "pad_id": None if pad == -1 else pad}


def attention_fields(
    fields: Fields, *, default_theta: float = 10000.0, default_head_dim: int | None = None
) -> dict[str, Any]:
    """`base_fields` and those of grouped-query attention; head_dim defaults to D / heads."""
    base = base_fields(fields)
    num_heads = base["num_heads"]
    num_kv_heads = fields.size("num_key_value_heads", default=num_heads)
    if num_heads % num_kv_heads:
        raise ConfigError(f"config.json: {num_heads} heads over {num_kv_heads} key-value heads")
    head_dim = fields.size("head_dim", default=default_head_dim) or base["width"] // num_heads
    rope = rope_from(fields, head_dim, base["max_positions"], default_theta)
    return {
        **base,
        "max_positions": usable_positions(rope, base["max_positions"]),
        "num_kv_heads": num_kv_heads,
        "head_dim": head_dim,
        "rope": rope,
        "attention_scale": head_dim**-0.5,
    }


def attention_bias(fields: Fields) -> dict[str, bool]:
    """The switch that puts biases on all four projections."""
    bias = fields.get("attention_bias", default=False, kind=bool)
    return {"qkv_bias": bias, "o_bias": bias}


def expert_fields(fields: Fields, width_key: str) -> dict[str, Any]:
    """Number, choice and width of the experts."""
    num_experts = fields.size(
        "num_experts", "num_local_experts", "n_routed_experts", most=MAX_EXPERTS
    )
    top_k = fields.size("num_experts_per_tok")
    if top_k > num_experts:
        raise ConfigError(f"config.json: top-{top_k} of {num_experts} experts")
    return {"num_experts": num_experts, "top_k": top_k, "expert_width": fields.size(width_key)}


def qwen_moe_layers(fields: Fields, num_layers: int) -> tuple[int, ...]:
    """Layers with experts by Qwen's two rules: every so many, and not the listed ones."""
    step = fields.size("decoder_sparse_step", default=1)
    dense = fields.get("mlp_only_layers", default=[], kind=list)
    if not all(type(layer) is int and layer >= 0 for layer in dense):
        raise ConfigError(f"config.json: mlp_only_layers is {dense!r:.80}, expected layer numbers")
    return tuple(i for i in range(num_layers) if i not in dense and (i + 1) % step == 0)


def sliding_window(fields: Fields, used: bool = True) -> int | None:
    """The sliding window's length, if it is in use; 0 is none (transformers 5 writes it)."""
    if not fields.get("sliding_window", default=None) or not used:
        return None
    return fields.size("sliding_window")


def windows_from(
    fields: Fields, window: int | None, sliding: Iterable[bool], *, typed: bool = False
) -> tuple[int, ...]:
    """Attended positions per layer, empty if no layer slides.

    Args:
        sliding: which layers slide by the family's own rule.
        typed: the family follows `layer_types`; the others refuse those that break their rule.
    """
    sliding = list(sliding)
    types = fields.get("layer_types", default=None, kind=list)
    if types is not None:
        unknown = [t for t in types if t not in LAYER_TYPES]
        if unknown:
            raise UnsupportedModelError(f"config.json: layer_types {unknown[0]!r:.80}")
        if len(types) != len(sliding):
            raise ConfigError(f"config.json: {len(types)} layer_types for {len(sliding)} layers")
        listed = [t == "sliding_attention" for t in types]
        if not typed and listed != sliding:
            raise UnsupportedModelError(
                "config.json: layer_types other than this family's sliding window are not supported"
            )
        sliding = listed
    if not any(sliding):
        return ()
    if window is None:
        raise ConfigError("config.json: layers slide, but no sliding_window is in use")
    return tuple(window if slides else 0 for slides in sliding)


def rope_from(
    fields: Fields, dim: int, max_positions: int, theta: float, *, interleaved: bool = False
) -> Rope:
    """Rope of either spelling: rope_theta + rope_scaling (transformers 4) or rope_parameters (5).

    Args:
        dim: rotary channels.
        theta: the family's default base.

    Raises:
        ConfigError: contradictions, and numbers that are missing or out of range.
        UnsupportedModelError: an unknown kind or option, or rotation of a part of the head, which
            no reference implementation of these families computes.
    """
    inner = Fields(_rope_values(fields), "config.json: rope_parameters")
    kind = inner.get("rope_type", "type", default="default", kind=str)
    inner.expect("partial_rotary_factor", 1)
    if dim < 2 or dim % 2 or kind == "dynamic" and dim == 2:
        raise ConfigError(f"config.json: {dim} channels cannot be rotated")
    if kind not in _OPTIONS:
        raise UnsupportedModelError(f"config.json: rope type {kind!r:.80} is not supported")
    original = max_positions
    if kind in ("yarn", "llama3", "longrope"):
        original = inner.size("original_max_position_embeddings", default=max_positions)
    else:
        inner.expect("original_max_position_embeddings", max_positions)
    factor, attention_factor = 1.0, None
    if kind in ("linear", "dynamic", "llama3"):
        factor = inner.number("factor")
    elif kind in ("yarn", "longrope"):
        factor = inner.number("factor", default=max_positions / original)
        attention_factor = inner.number("attention_factor", default=None)
    options = _OPTIONS[kind](inner, dim)
    theta = inner.number("rope_theta", default=theta)
    if kind == "yarn" and theta <= 1 or kind == "longrope" and original <= 1:
        raise ConfigError(
            f"config.json: rope_theta {theta:g} over {original} original positions, {kind} needs "
            "more than 1"
        )
    inner.finish()
    return Rope(
        dim=dim,
        theta=theta,
        kind=kind,
        factor=factor,
        original_max_positions=original,
        attention_factor=attention_factor,
        interleaved=interleaved,
        options=tuple(sorted((name, v) for name, v in options.items() if v is not None)),
    )


def usable_positions(rope: Rope, max_positions: int) -> int:
    """The context that the rope is made for: these two kinds stretch the original by the factor."""
    if rope.kind not in ("dynamic", "yarn"):
        return max_positions
    return min(max(max_positions, int(rope.original_max_positions * rope.factor)), MAX_SIZE)


def _rope_values(fields: Fields) -> dict[str, Any]:
    """All that is said of the rope at any of its places, which must agree."""
    places = [fields.get(n, default={}, kind=dict) for n in ("rope_parameters", "rope_scaling")]
    places.append({n: fields.get(n, default=None, kind=(int, float)) for n in ROPE_KEYS})
    values: dict[str, Any] = {}
    for place in places:
        for name, value in place.items():
            if value is not None and name in values and values[name] != value:
                raise ConfigError(f"config.json: {name} is both {values[name]!r} and {value!r}")
            if value is not None:
                values[name] = value
    return values


def _yarn(inner: Fields, dim: int) -> dict[str, Any]:
    betas = {name: inner.number(name, default=None) for name in ("beta_fast", "beta_slow")}
    scales = {n: inner.number(n, default=None, least=0.0) for n in ("mscale", "mscale_all_dim")}
    return {**betas, **scales, "truncate": inner.get("truncate", default=None, kind=bool)}


def _llama3(inner: Fields, dim: int) -> dict[str, Any]:
    low, high = inner.number("low_freq_factor"), inner.number("high_freq_factor")
    if low >= high:
        raise ConfigError(
            f"config.json: low_freq_factor {low} is not below high_freq_factor {high}"
        )
    return {"low_freq_factor": low, "high_freq_factor": high}


def _longrope(inner: Fields, dim: int) -> dict[str, Any]:
    options = {}
    for name in ("short_factor", "long_factor"):
        given = inner.get(name, kind=list)
        listed = Fields({str(i): v for i, v in enumerate(given)}, f"config.json: {name}")
        options[name] = tuple(listed.number(str(i)) for i in range(len(given)))
        if len(given) != dim // 2:
            raise ConfigError(f"config.json: {len(given)} of {name} for {dim // 2} frequencies")
    return options


def _plain(inner: Fields, dim: int) -> dict[str, Any]:
    return {}


_OPTIONS = {
    "default": _plain,
    "linear": _plain,
    "dynamic": _plain,
    "yarn": _yarn,
    "llama3": _llama3,
    "longrope": _longrope,
}
