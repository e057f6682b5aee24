"""ModelConfig: one frozen description of every family, read from a Hugging Face config.json."""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

from moejax.errors import ConfigError, UnsupportedModelError, reason
from moejax.layout import RecordLayout

MAX_SIZE = 2**31 - 1
MAX_NUMBER = 1e30
MAX_EXPERTS = 2**16

# Keys that say nothing about inference: training, parallelism, bookkeeping, output options.
IGNORED_KEYS = frozenset(
    """_attn_implementation_autoset _commit_hash _name_or_path architectures attention_dropout
    attn_implementation auto_map aux_loss_alpha chunk_size_feed_forward dtype ep_size id2label
    initializer_range label2id model_type output_attentions output_hidden_states
    output_router_logits pretraining_tp problem_type return_dict router_aux_loss_coef
    router_jitter_noise sep_token_id seq_aux torch_dtype transformers_version unk_token_id
    use_cache""".split()
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rope:
    """Rotary position embedding of `dim` leading channels of each head."""

    dim: int
    theta: float
    kind: str = "default"  # default, linear, dynamic, yarn, llama3, longrope
    factor: float = 1.0
    original_max_positions: int = 0  # context before scaling
    attention_factor: float | None = None  # on cos and sin; None = what the kind prescribes
    interleaved: bool = False  # pairs (2i, 2i+1) as DeepSeek, instead of (i, i + dim/2)
    options: tuple[tuple[str, Any], ...] = ()  # numbers of this kind only, sorted by name


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
    equal: bool = False  # every pick weighs `scale`: scores choose, and say what a pick is worth


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
        sparse = set(self.moe_layers)
        return tuple(i for i in range(self.num_layers) if i not in sparse)

    def record_layout(self, dtype: str) -> RecordLayout:
        """Layout of one expert's record in `dtype`."""
        return RecordLayout(width=self.width, expert_width=self.expert_width, dtype=dtype)


class Fields:
    """Reads a JSON object key by key and refuses by name whatever nobody has read."""

    def __init__(self, values: Mapping[str, Any], where: str = "config.json"):
        self._values = dict(values)
        self._where = where
        self._read: set[str] = set()

    def get(self, *names: str, default: Any = dataclasses.MISSING, kind: type | tuple = int) -> Any:
        """Value spelled by any of `names`, which must agree; null counts as absent.

        Raises:
            ConfigError: missing without a default, of another type, or not a finite number.
        """
        self._read.update(names)
        given = {n: self._values[n] for n in names if self._values.get(n) is not None}
        if not given:
            if default is dataclasses.MISSING:
                raise ConfigError(f"{self._where}: {' or '.join(names)} is missing")
            return default
        (name, value), *others = given.items()
        for other, again in others:
            if again != value:
                raise ConfigError(f"{self._where}: {name} is {value!r} but {other} is {again!r}")
        accepted = (int, float) if kind is float else kind
        if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
            raise ConfigError(f"{self._where}: {name} is {value!r:.80}, expected {kind}")
        if (kind is float or isinstance(value, float)) and not abs(value) <= MAX_NUMBER:
            raise ConfigError(f"{self._where}: {name} is {value!r:.80}, expected a finite number")
        return float(value) if kind is float else value

    def size(
        self, *names: str, default: Any = dataclasses.MISSING, most: int = MAX_SIZE
    ) -> int | None:
        """Integer from 1 to `most`."""
        value = self.get(*names, default=default)
        if value is not None and not 0 < value <= most:
            raise ConfigError(f"{self._where}: {names[0]} is {value!r:.80}, expected 1 to {most}")
        return value

    def number(
        self, name: str, default: Any = dataclasses.MISSING, *, least: float = 1 / MAX_NUMBER
    ) -> float | None:
        """Finite number of at least `least`: positive, unless that is 0."""
        value = self.get(name, default=default, kind=float)
        if value is not None and not value >= least:
            raise ConfigError(
                f"{self._where}: {name} is {value}, expected a number from {least:g} to "
                f"{MAX_NUMBER:g}"
            )
        return value

    def expect(self, name: str, *accepted: Any) -> None:
        """Refuse by name any value of `name` other than `accepted` or null."""
        self._read.add(name)
        value = self._values.get(name)
        if value is not None and value not in accepted:
            wanted = " or ".join(repr(a) for a in accepted)
            raise UnsupportedModelError(
                f"{self._where}: {name} = {value!r:.80} is not supported (only {wanted})"
            )

    def finish(self) -> None:
        """Refuse every key that was not read, unless it says nothing about inference."""
        unread = sorted(
            name
            for name, value in self._values.items()
            if name not in self._read | IGNORED_KEYS
            and not (value is None or value is False or value in ([], {}))
        )
        if unread:
            raise UnsupportedModelError(
                f"{self._where}: unknown options {', '.join(unread)}; remove those that do not "
                "change the model's output, or ask for support"
            )


def read_config_json(directory: pathlib.Path) -> dict[str, Any]:
    """The config.json of a model directory; ConfigError if it is missing or malformed."""
    path = pathlib.Path(directory) / "config.json"
    try:
        hf = json.loads(path.read_text())
    except FileNotFoundError:
        raise ConfigError(f"{path} is missing: give a Hugging Face model directory") from None
    except (ValueError, RecursionError, OSError) as error:
        raise ConfigError(f"{path} is not readable JSON: {reason(error)}") from None
    if not isinstance(hf, dict):
        raise ConfigError(f"{path} must hold a JSON object")
    return hf
