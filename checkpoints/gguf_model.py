"""GGUF models in Hugging Face's terms: the metadata as a config.json, the tensors by its names."""

import dataclasses
import functools
import json
import re
from pathlib import Path
from typing import Any

from moejax.checkpoints.gguf_file import GgufFile, read_file, require_package
from moejax.checkpoints.headers import GGUF_BLOCKS, TensorInfo
from moejax.errors import CheckpointError, UnsupportedModelError

MODEL_TYPES = {
    "qwen3moe": "qwen3_moe",
    "qwen2moe": "qwen2_moe",
    "olmoe": "olmoe",
    "llama": "llama",  # mixtral, if it has experts
    "qwen3": "qwen3",
}
MAX_EXPERTS = 2**16
TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
LAYER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "{block}.gate",
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
}
PROJECTIONS = {"gate": ("gate_proj", "w1"), "up": ("up_proj", "w3"), "down": ("down_proj", "w2")}
NUMBER = "(0|[1-9][0-9]{0,5})"
IN_LAYER = re.compile(rf"blk\.{NUMBER}\.(\w+)\.(weight|bias)")
EXPERTS = re.compile(rf"blk\.{NUMBER}\.ffn_(gate|up|down)(_exps|\.{NUMBER})\.weight")


class _Keys:
    """Metadata of the architecture, read key by key; what nobody has read is refused by name."""

    def __init__(self, path: Path, file: GgufFile):
        self.path, self.metadata = path, file.metadata
        self.architecture = file.metadata.get("general.architecture")
        if not isinstance(self.architecture, str) or self.architecture not in MODEL_TYPES:
            raise UnsupportedModelError(
                f"{path}: architecture {self.architecture!r:.80} is not one of "
                f"{', '.join(MODEL_TYPES)}"
            )
        self.read: set[str] = set()

    def get(self, name: str, default: Any = None, *, required: bool = False) -> Any:
        """The value of ARCHITECTURE.name; one per layer counts as one if all are alike."""
        self.read.add(name)
        value = self.metadata.get(f"{self.architecture}.{name}", default)
        if isinstance(value, list) and value and all(item == value[0] for item in value):
            value = value[0]
        if isinstance(value, list) or (required and value is None):
            why = "is missing" if value is None else "differs between layers"
            raise CheckpointError(f"{self.path}: {self.architecture}.{name} {why}")
        return value

    def size(self, name: str) -> int:
        """A positive integer."""
        value = self.get(name, required=True)
        if type(value) is not int or not 0 < value < 2**31:
            raise CheckpointError(f"{self.path}: {self.architecture}.{name} is {value!r:.80}")
        return value

    def expect(self, name: str, *accepted: Any) -> None:
        """Refuse any value but those accepted."""
        value = self.get(name)
        if value is not None and value not in accepted:
            raise UnsupportedModelError(
                f"{self.path}: {self.architecture}.{name} = {value!r:.80} is not supported"
            )

    def finish(self) -> None:
        """Refuse every key of the architecture that was not read."""
        prefix = f"{self.architecture}."
        ours = {key.removeprefix(prefix) for key in self.metadata if key.startswith(prefix)}
        if unread := sorted(ours - self.read):
            raise UnsupportedModelError(f"{self.path}: unknown metadata {', '.join(unread)}")


def read_config(path: Path) -> dict[str, Any]:
    """What the model's config.json would say, from a GGUF file's metadata.

    Raises CheckpointError when the file is malformed, UnsupportedModelError, naming it, for an
    architecture or an option that moejax does not compute.
    """
    path = Path(path)
    file = read_file(path)
    keys = _Keys(path, file)
    shapes = {tensor.name: tensor.shape for tensor in file.tensors}
    if len(shapes.get("token_embd.weight", ())) != 2:
        raise CheckpointError(f"{path} has no matrix token_embd.weight")
    heads = keys.size("attention.head_count")
    head_dim = keys.get("attention.key_length") or keys.size("embedding_length") // heads
    keys.expect("attention.value_length", head_dim)
    keys.expect("rope.dimension_count", head_dim)
    keys.expect("vocab_size", shapes["token_embd.weight"][0])
    config = {
        "model_type": MODEL_TYPES[keys.architecture],
        "vocab_size": shapes["token_embd.weight"][0],
        "hidden_size": keys.size("embedding_length"),
        "num_hidden_layers": keys.size("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": keys.get("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": keys.size("context_length"),
        "rms_norm_eps": keys.get("attention.layer_norm_rms_epsilon", required=True),
        "intermediate_size": keys.size("feed_forward_length"),
        "tie_word_embeddings": "output.weight" not in shapes,
        "rope_theta": keys.get("rope.freq_base", 10000.0),
        "rope_scaling": _rope_scaling(keys),
        **_token_ids(file.metadata),
        **_family(keys, "blk.0.attn_q.bias" in shapes),
    }
    keys.finish()
    # A number of another type is then refused where every config.json is read.
    return json.loads(json.dumps(config))


def _family(keys: _Keys, biased: bool) -> dict[str, Any]:
    """The keys that only some families have."""
    name, found = keys.architecture, {}
    experts = keys.get("expert_count", 0)
    if experts:
        found = {"num_experts": experts, "num_experts_per_tok": keys.size("expert_used_count")}
        keys.expect("expert_gating_func", 1)  # softmax
        keys.expect("expert_weights_scale", 0.0, 1.0)
        keys.expect("expert_group_count", 0, 1)
        keys.expect("expert_group_used_count", 0, 1)
    else:
        keys.expect("expert_used_count", 0)
    if name == "llama":
        keys.expect("expert_weights_norm", True)
        if not experts:
            return {"attention_bias": biased}
        return {"model_type": "mixtral", "num_local_experts": found.pop("num_experts"), **found}
    if name == "qwen3":
        return found
    # llama.cpp normalises the weights of the chosen experts by architecture, if nothing is said.
    found["norm_topk_prob"] = keys.get("expert_weights_norm", name == "qwen3moe")
    if name == "olmoe":
        return found | {"clip_qkv": keys.get("attention.clamp_kqv")}
    found["moe_intermediate_size"] = keys.size("expert_feed_forward_length")
    if name == "qwen2moe":
        keys.get("expert_shared_count")  # their widths are one sum
        width = keys.size("expert_shared_feed_forward_length")
        found |= {"shared_expert_intermediate_size": width, "qkv_bias": biased}
    return found


def _rope_scaling(keys: _Keys) -> dict[str, Any] | None:
    kind = keys.get("rope.scaling.type", "none")
    keys.get("rope.scaling.finetuned")
    if kind not in ("none", "linear", "yarn"):
        raise UnsupportedModelError(f"{keys.path}: rope scaling {kind!r:.80} is not supported")
    if kind == "none":
        return None
    scaling = {"rope_type": kind, "factor": keys.get("rope.scaling.factor", required=True)}
    if kind == "yarn":
        scaling["original_max_position_embeddings"] = keys.size(
            "rope.scaling.original_context_length"
        )
    return scaling


def _token_ids(metadata: dict[str, Any]) -> dict[str, Any]:
    ids = {}
    for name in ("eos", "eot", "bos", "padding"):
        ids[name] = metadata.get(f"tokenizer.ggml.{name}_token_id")
        if not isinstance(ids[name], int | None):
            raise CheckpointError(f"tokenizer.ggml.{name}_token_id is no number: {ids[name]!r:.80}")
    ends = [ids[name] for name in ("eos", "eot") if ids[name] is not None]
    return {
        "eos_token_id": list(dict.fromkeys(ends)),
        "bos_token_id": ids["bos"],
        "pad_token_id": ids["padding"],
    }


def list_tensors(path: Path) -> list[TensorInfo]:
    """All tensors of a GGUF file by their Hugging Face names, experts one by one, in file order.

    Raises what `read_file` and `read_config` raise; tensors that are not known keep their names.
    """
    path = Path(path)
    file = read_file(path)
    if any(tensor.dtype in GGUF_BLOCKS for tensor in file.tensors):
        require_package(path)
    config = read_config(path)
    rotated = config["head_dim"] if file.metadata["general.architecture"] == "llama" else 0
    if rotated % 2:
        raise CheckpointError(f"{path}: {rotated} rows of a head cannot be rotated")
    experts = config.get("num_experts", config.get("num_local_experts", 0))
    named = functools.partial(_named, rotated, config["model_type"] == "mixtral", experts)
    return [part for tensor in file.tensors for part in named(tensor)]


def _named(rotated: int, mixtral: bool, experts: int, tensor: TensorInfo) -> list[TensorInfo]:
    """A tensor under its Hugging Face name, or one for each of its experts."""
    block = "block_sparse_moe" if mixtral else "mlp"
    if found := EXPERTS.fullmatch(tensor.name):
        layer, part, _, expert = found.groups()
        name = f"model.layers.{layer}.{block}.experts.{{}}.{PROJECTIONS[part][mixtral]}.weight"
        if expert is not None:
            return [dataclasses.replace(tensor, name=name.format(expert))]
        if len(tensor.shape) != 3 or tensor.shape[0] != experts or experts > MAX_EXPERTS:
            raise CheckpointError(
                f"{tensor.file}: {tensor.name} is {list(tensor.shape)}, not of {experts} experts"
            )
        size = tensor.nbytes // experts
        return [
            dataclasses.replace(
                tensor,
                name=name.format(i),
                shape=tensor.shape[1:],
                start=tensor.start + i * size,
                nbytes=size,
            )
            for i in range(experts)
        ]
    if tensor.name in TOP:
        return [dataclasses.replace(tensor, name=TOP[tensor.name])]
    found = IN_LAYER.fullmatch(tensor.name)
    if not found or found[2] not in LAYER:
        return [tensor]
    name = f"model.layers.{found[1]}.{LAYER[found[2]].format(block=block)}.{found[3]}"
    shape, head_rows = tensor.shape, 0
    if found[2] == "ffn_gate_inp_shexp" and len(shape) == 1:
        shape = (1, *shape)
    if found[2] in ("attn_q", "attn_k") and rotated:
        head_rows = rotated
        if shape[0] % rotated:
            raise CheckpointError(f"{tensor.file}: {tensor.name} is not whole heads of {rotated}")
    return [dataclasses.replace(tensor, name=name, shape=shape, head_rows=head_rows)]
