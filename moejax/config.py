"""ModelConfig: one frozen description of every family, read from a Hugging Face config.json."""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

from moejax.errors import ConfigError, UnsupportedModelError
from moejax.layout import RecordLayout

# Keys that say nothing about inference: training, bookkeeping, generation defaults.
IGNORED_KEYS = frozenset(
    """_name_or_path architectures attn_implementation auto_map aux_loss_alpha bos_token_id
    chunk_size_feed_forward dtype eos_token_id ep_size id2label initializer_range label2id
    max_window_layers model_type output_attentions output_hidden_states output_router_logits
    pad_token_id pretraining_tp problem_type return_dict router_aux_loss_coef
    router_jitter_noise seq_aux sep_token_id torch_dtype transformers_version unk_token_id
    use_cache moe_layer_freq num_key_value_heads is_encoder_decoder tie_encoder_decoder""".split()
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rope:
    """Rotary position embedding of `dim` leading channels of each head."""

    dim: int
    theta: float
    kind: str = "default"  # default, linear, dynamic, yarn, llama3, longrope
    factor: float = 1.0
    original_max_positions: int = 0
    attention_factor: float | None = None
    interleaved: bool = False  # pairs (2i, 2i+1) as DeepSeek, instead of (i, i + dim/2)
    options: tuple[tuple[str, Any], ...] = ()  # the numbers of this kind only, sorted by name


@dataclasses.dataclass(frozen=True, kw_only=True)
class Latent:
    """Multi-head latent attention (DeepSeek-V2): ranks of the latents and widths of the parts."""

    q_rank: int | None
    kv_rank: int
    nope_dim: int
    rope_dim: int
    v_dim: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class RouterRule:
    """The family's own top-k rule on softmax scores."""

    normalize: bool  # weights of the chosen k sum to 1
    scale: float = 1.0  # routed_scaling_factor
    num_groups: int = 1  # > 1: only the best `top_groups` groups, by their best score, are eligible
    top_groups: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Everything the decoder needs to know about a model, whatever its family."""

    model_type: str
    vocab_size: int  # V
    width: int  # D
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    norm_eps: float
    tied_embeddings: bool
    rope: Rope
    attention_scale: float
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: str = "none"  # none, head (one norm per head), whole (over the whole projection)
    clip_qkv: float | None = None
    windows: tuple[int, ...] = ()  # attended positions per layer, 0 = all; empty = all layers full
    latent: Latent | None = None
    dense_width: int = 0  # FFN width of the dense layers
    moe_layers: tuple[int, ...] = ()  # which layers have experts
    num_experts: int = 0  # E
    top_k: int = 0  # K
    expert_width: int = 0  # F
    shared_width: int = 0  # FFN width of the shared expert, 0 = none
    shared_gate: bool = False  # sigmoid gate on the shared expert
    router: RouterRule = RouterRule(normalize=True)
    eos_ids: tuple[int, ...] = ()
    bos_id: int | None = None
    pad_id: int | None = None

    @property
    def num_moe_layers(self) -> int:
        """L: layers with experts."""
        return len(self.moe_layers)

    @property
    def dense_layers(self) -> tuple[int, ...]:
        """Layers with a dense FFN instead of experts."""
        return tuple(i for i in range(self.num_layers) if i not in set(self.moe_layers))

    def record_layout(self, dtype: str) -> RecordLayout:
        """Layout of one expert's record in `dtype`."""
        return RecordLayout(width=self.width, expert_width=self.expert_width, dtype=dtype)


class Fields:
    """Reads a config.json key by key and refuses by name whatever nobody has read."""

    def __init__(self, hf: Mapping[str, Any]):
        self._hf = dict(hf)
        self._read: set[str] = set()

    def get(self, *names: str, default: Any = dataclasses.MISSING, kind: type | tuple = int) -> Any:
        """Value of the first of `names` that is present; null counts as absent."""
        self._read.update(names)
        for name in names:
            value = self._hf.get(name)
            if value is None:
                continue
            accepted = (int, float) if kind is float else kind
            if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
                raise ConfigError(f"config.json: {name} is {value!r}, expected {kind}")
            return float(value) if kind is float else value
        if default is dataclasses.MISSING:
            raise ConfigError(f"config.json: {' or '.join(names)} is missing")
        return default

    def size(self, *names: str, default: Any = dataclasses.MISSING) -> Any:
        """Positive integer below 2^31."""
        value = self.get(*names, default=default)
        if value is not None and value is not default and not 0 < value < 2**31:
            raise ConfigError(f"config.json: {names[0]} is {value}, expected a positive size")
        return value

    def expect(self, name: str, *accepted: Any) -> None:
        """Refuse by name any value of `name` other than `accepted` or null."""
        self._read.add(name)
        value = self._hf.get(name)
        if value is not None and value not in accepted:
            wanted = " or ".join(repr(a) for a in accepted)
            raise UnsupportedModelError(
                f"config.json: {name} = {value!r} is not supported (only {wanted})"
            )

    def finish(self) -> None:
        """Refuse every key that was not read, unless it says nothing about inference."""
        unread = sorted(
            name
            for name, value in self._hf.items()
            if name not in self._read and name not in IGNORED_KEYS and value not in (None, False)
        )
        if unread:
            raise UnsupportedModelError(
                f"config.json: unknown options {', '.join(unread)}; remove those that do not change "
                "the model's output, or ask for support"
            )


def read_config_json(directory: pathlib.Path) -> dict[str, Any]:
    """The config.json of a model directory; ConfigError if it is missing or malformed."""
    path = pathlib.Path(directory) / "config.json"
    try:
        hf = json.loads(path.read_text())
    except FileNotFoundError:
        raise ConfigError(f"{path} is missing: give a Hugging Face model directory") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(hf, dict):
        raise ConfigError(f"{path} must hold a JSON object")
    return hf


def rope_from(fields: Fields, head_dim: int, max_positions: int, theta: float) -> Rope:
    """Rope of either spelling: rope_theta + rope_scaling (transformers 4) or rope_parameters (5).

    Args:
        head_dim: channels of one head; `partial_rotary_factor` takes its leading part.
        theta: the family's default base.
    """
    spelled = [fields.get(n, default=None, kind=dict) for n in ("rope_parameters", "rope_scaling")]
    given = dict(next((s for s in spelled if s), {}))
    top_theta = fields.get("rope_theta", default=None, kind=float)
    theta = float(given.pop("rope_theta", None) or top_theta or theta)
    top_partial = fields.get("partial_rotary_factor", default=None, kind=float)
    partial = float(given.pop("partial_rotary_factor", None) or top_partial or 1.0)
    kind = given.pop("rope_type", None) or given.pop("type", None) or "default"
    given.pop("type", None)
    original = given.pop("original_max_position_embeddings", None)
    original = original or fields.get("original_max_position_embeddings", default=None)
    if kind not in ("default", "linear", "dynamic", "yarn", "llama3", "longrope"):
        raise UnsupportedModelError(f"config.json: rope type {kind!r} is not supported")
    factor = given.pop("factor", None)
    if factor is None and kind in ("linear", "dynamic", "yarn", "llama3"):
        raise ConfigError(f"config.json: rope type {kind!r} needs a factor")
    attention_factor = given.pop("attention_factor", None)
    known = {
        "yarn": {"beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"},
        "llama3": {"low_freq_factor", "high_freq_factor"},
        "longrope": {"short_factor", "long_factor", "short_mscale", "long_mscale"},
    }.get(kind, set())
    unknown = sorted(name for name, v in given.items() if name not in known and v is not None)
    if unknown:
        raise UnsupportedModelError(f"config.json: unknown rope options {', '.join(unknown)}")
    options = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items() if v is not None}
    dim = int(head_dim * partial)
    if dim % 2 or dim <= 0:
        raise ConfigError(f"config.json: {dim} rotary channels of a head of {head_dim}")
    return Rope(
        dim=dim,
        theta=theta,
        kind=kind,
        factor=float(factor) if factor is not None else 1.0,
        original_max_positions=int(original or max_positions),
        attention_factor=attention_factor,
        options=tuple(sorted(options.items())),
    )


def token_ids(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Special token ids: eos as a tuple, bos and pad as int or None."""
    eos = hf.get("eos_token_id")
    return {
        "eos_ids": tuple(eos) if isinstance(eos, list) else (() if eos is None else (eos,)),
        "bos_id": hf.get("bos_token_id"),
        "pad_id": hf.get("pad_token_id"),
    }


def attention_fields(fields: Fields, *, default_theta: float) -> dict[str, Any]:
    """What every family but MLA spells alike: sizes, heads, norm, rope, vocabulary."""
    width = fields.size("hidden_size")
    num_heads = fields.size("num_attention_heads")
    num_kv_heads = fields.size("num_key_value_heads", default=num_heads)
    if num_heads % num_kv_heads:
        raise ConfigError(f"config.json: {num_heads} heads over {num_kv_heads} key-value heads")
    head_dim = fields.size("head_dim", default=None) or width // num_heads
    max_positions = fields.size("max_position_embeddings")
    fields.expect("hidden_act", "silu")
    fields.expect("attention_dropout", 0, 0.0)
    return {
        "vocab_size": fields.size("vocab_size"),
        "width": width,
        "num_layers": fields.size("num_hidden_layers"),
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "head_dim": head_dim,
        "max_positions": max_positions,
        "norm_eps": fields.get("rms_norm_eps", kind=float),
        "tied_embeddings": fields.get("tie_word_embeddings", default=False, kind=bool),
        "rope": rope_from(fields, head_dim, max_positions, default_theta),
        "attention_scale": head_dim**-0.5,
    }


def expert_fields(fields: Fields, num_layers: int, *, width_keys: tuple[str, ...]) -> dict[str, Any]:
    """Experts per layer, top-k, expert width and which layers are sparse (Qwen's two rules)."""
    num_experts = fields.size("num_experts", "num_local_experts", "n_routed_experts")
    top_k = fields.size("num_experts_per_tok")
    if top_k > num_experts:
        raise ConfigError(f"config.json: top-{top_k} of {num_experts} experts")
    step = fields.size("decoder_sparse_step", default=1)
    dense = fields.get("mlp_only_layers", default=[], kind=list)
    return {
        "num_experts": num_experts,
        "top_k": top_k,
        "expert_width": fields.size(*width_keys),
        "moe_layers": tuple(i for i in range(num_layers) if i not in dense and (i + 1) % step == 0),
    }
