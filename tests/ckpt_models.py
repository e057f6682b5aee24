"""Small random checkpoints in Hugging Face's format, with what a correct reader makes of them."""

import dataclasses
import json
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from moejax.checkpoints.rules import Rule, WeightMap
from moejax.layout import DTYPES, RecordLayout

LAYER = "model.layers.{layer}."
EXPERT = LAYER + "mlp.experts.{expert}."
RULES = (
    Rule("model.embed_tokens.weight", "embed/weight"),
    Rule(LAYER + "self_attn.q_proj.weight", "attention/q"),
    Rule(LAYER + "input_layernorm.weight", "norm/weight"),
    Rule(LAYER + "self_attn.rotary_emb.inv_freq", None),
    Rule(LAYER + "mlp.gate_proj.weight", "mlp/gate_up", half=0),
    Rule(LAYER + "mlp.up_proj.weight", "mlp/gate_up", half=1),
    Rule(LAYER + "mlp.down_proj.weight", "mlp/down"),
    Rule(LAYER + "mlp.gate.weight", "router/weight"),
    Rule(EXPERT + "gate_proj.weight", "experts/gate_up", half=0),
    Rule(EXPERT + "up_proj.weight", "experts/gate_up", half=1),
    Rule(EXPERT + "down_proj.weight", "experts/down"),
    Rule(LAYER + "mlp.experts.gate_up_proj", "experts/gate_up"),
    Rule(LAYER + "mlp.experts.down_proj", "experts/down"),
    Rule("lm_head.weight", "head/weight"),
    Rule("lm_head.weight", None),
)
SOURCES = {"BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype("f2"), "F32": np.dtype("f4")}


@dataclasses.dataclass(frozen=True)
class Spec:
    shape: tuple[int, ...]
    dtype: np.dtype


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """A shape of checkpoint: `moe` says of each layer whether it has experts."""

    moe: tuple[bool, ...] = (False, True, True)
    experts: int = 3
    width: int = 8
    expert_width: int = 5
    dtype: str = "bfloat16"
    source: str = "BF16"
    fused: bool = False
    tied: bool = False
    seed: int = 0

    @property
    def layout(self) -> RecordLayout:
        return RecordLayout(width=self.width, expert_width=self.expert_width, dtype=self.dtype)

    @property
    def specs(self) -> dict[str, Spec]:
        d, f, n = self.width, 6, len(self.moe)
        moe, dense = sum(self.moe), n - sum(self.moe)
        dtype = DTYPES[self.dtype]
        shapes = {"embed/weight": (7, d), "attention/q": (n, 3, d), "head/weight": (7, d)}
        shapes |= {"mlp/gate_up": (dense, 2 * f, d), "mlp/down": (dense, d, f)} if dense else {}
        shapes |= {"router/weight": (moe, self.experts, d)} if moe else {}
        if self.tied:
            del shapes["head/weight"]
        specs = {path: Spec(shape, dtype) for path, shape in shapes.items()}
        return specs | {"norm/weight": Spec((n, d), np.dtype("f4"))}

    def stack_index(self, target: str, layer: int) -> int | None:
        if layer >= len(self.moe):
            return None
        if target.startswith(("experts/", "router/", "mlp/")):
            of_moe = not target.startswith("mlp/")
            return sum(m == of_moe for m in self.moe[:layer]) if self.moe[layer] == of_moe else None
        return layer

    @property
    def weights(self) -> WeightMap:
        experts = any(self.moe)
        return WeightMap(
            rules=RULES,
            specs=self.specs,
            stack_index=self.stack_index,
            layout=self.layout if experts else None,
            expert_layers=sum(self.moe),
            experts=self.experts if experts else 0,
        )

    def tensors(self) -> dict[str, np.ndarray]:
        """The checkpoint's tensors by name, in the source dtype."""
        rng = np.random.default_rng(self.seed)
        d, f, e = self.width, self.expert_width, self.experts

        def random(*shape):
            return rng.normal(size=shape).astype(SOURCES[self.source])

        tensors = {"model.embed_tokens.weight": random(7, d), "lm_head.weight": random(7, d)}
        for i, moe in enumerate(self.moe):
            layer = LAYER.format(layer=i)
            tensors[layer + "self_attn.q_proj.weight"] = random(3, d)
            tensors[layer + "input_layernorm.weight"] = random(d)
            tensors[layer + "self_attn.rotary_emb.inv_freq"] = np.ones(2, np.int64)
            if not moe:
                tensors[layer + "mlp.gate_proj.weight"] = random(6, d)
                tensors[layer + "mlp.up_proj.weight"] = random(6, d)
                tensors[layer + "mlp.down_proj.weight"] = random(d, 6)
                continue
            tensors[layer + "mlp.gate.weight"] = random(e, d)
            gate, up, down = random(e, f, d), random(e, f, d), random(e, d, f)
            if self.fused:
                tensors[layer + "mlp.experts.gate_up_proj"] = np.concatenate([gate, up], axis=1)
                tensors[layer + "mlp.experts.down_proj"] = down
                continue
            for j in range(e):
                expert = EXPERT.format(layer=i, expert=j)
                tensors[expert + "gate_proj.weight"] = gate[j]
                tensors[expert + "up_proj.weight"] = up[j]
                tensors[expert + "down_proj.weight"] = down[j]
        return tensors

    def expected(self) -> tuple[dict[str, np.ndarray], np.ndarray | None]:
        """Dense parameters and records, built the slow and obvious way."""
        t = self.tensors()
        names = [LAYER.format(layer=i) for i in range(len(self.moe))]
        dense = [name for name, moe in zip(names, self.moe, strict=True) if not moe]
        moe = [name for name, moe in zip(names, self.moe, strict=True) if moe]
        params = {
            "embed/weight": t["model.embed_tokens.weight"],
            "head/weight": t["lm_head.weight"],
            "attention/q": np.stack([t[n + "self_attn.q_proj.weight"] for n in names]),
            "norm/weight": np.stack([t[n + "input_layernorm.weight"] for n in names]),
        }
        if dense:
            both = ("mlp.gate_proj.weight", "mlp.up_proj.weight")
            params["mlp/gate_up"] = np.stack(
                [np.concatenate([t[n + b] for b in both]) for n in dense]
            )
            params["mlp/down"] = np.stack([t[n + "mlp.down_proj.weight"] for n in dense])
        if moe:
            params["router/weight"] = np.stack([t[n + "mlp.gate.weight"] for n in moe])
        params = {path: params[path].astype(spec.dtype) for path, spec in self.specs.items()}
        return params, self._expected_records(t, moe) if moe else None

    def _expected_records(self, t: dict[str, np.ndarray], moe: list[str]) -> np.ndarray:
        layout = self.layout
        records = np.zeros((len(moe) * self.experts, layout.elements), layout.bits)
        for i, name in enumerate(moe):
            for j in range(self.experts):
                record = records[i * self.experts + j]
                if self.fused:
                    gate_up = t[name + "mlp.experts.gate_up_proj"][j]
                    down = t[name + "mlp.experts.down_proj"][j]
                else:
                    one = name + f"mlp.experts.{j}."
                    both = [t[one + "gate_proj.weight"], t[one + "up_proj.weight"]]
                    gate_up, down = np.concatenate(both), t[one + "down_proj.weight"]
                layout.view(record, "gate_up")[:] = gate_up.astype(DTYPES[self.dtype])
                layout.view(record, "down")[:] = down.astype(DTYPES[self.dtype])
        return records

    def write(self, directory: Path, shards: int = 1) -> Path:
        """Write the checkpoint, its tensors dealt out to `shards` files."""
        return write_checkpoint(directory, self.tensors(), shards)


def write_checkpoint(directory: Path, tensors: dict[str, np.ndarray], shards: int = 1) -> Path:
    """Write tensors with the safetensors library, beside a config and a tokenizer."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps({"model_type": "test"}))
    (directory / "tokenizer.json").write_text("{}")
    if shards == 1:
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        return directory
    files = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    owner = {name: files[i % shards] for i, name in enumerate(sorted(tensors))}
    for file in files:
        save_file({n: t for n, t in tensors.items() if owner[n] == file}, directory / file)
    index = {"metadata": {"total_size": 0}, "weight_map": owner}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def assert_equal(loaded, expected) -> None:
    """Same paths, dtypes, shapes and bits."""
    (params, records), (wanted, wanted_records) = loaded, expected
    assert params.keys() == wanted.keys()
    for path, array in wanted.items():
        assert params[path].dtype == array.dtype and params[path].shape == array.shape, path
        assert params[path].tobytes() == array.tobytes(), path
    assert (records is None) == (wanted_records is None)
    if records is not None:
        np.testing.assert_array_equal(records, wanted_records, strict=True)
