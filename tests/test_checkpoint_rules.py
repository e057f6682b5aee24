import dataclasses
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from ckpt_models import RULES, Model, Spec

from moejax.checkpoints.headers import TensorInfo
from moejax.checkpoints.rules import Rule, WeightMap, plan
from moejax.errors import CheckpointError

DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32", "int64": "I64"}


def infos(tensors):
    file = Path("model.safetensors")
    return [TensorInfo(n, DTYPES[t.dtype.name], t.shape, file, 0, t.nbytes) for n, t in tensors]


def checkpoint(**options):
    model = Model(**options)
    return model, {tensor.name: tensor for tensor in infos(model.tensors().items())}


def problems(tensors, model) -> list[str]:
    with pytest.raises(CheckpointError) as error:
        plan(tensors.values(), model.weights, "the model")
    title, *lines = str(error.value).split("\n")
    assert title == "the model does not fit its config:"
    return [line.strip() for line in lines]


def test_a_complete_checkpoint_fills_every_element_once():
    model, tensors = checkpoint()
    count = {path: np.zeros(np.prod(spec.shape), int) for path, spec in model.specs.items()}
    count["experts"] = np.zeros(model.weights.records_shape, int).reshape(-1)
    for p in plan(tensors.values(), model.weights, ""):
        count[p.target][p.start : p.start + p.count] += 1
    records = count.pop("experts").reshape(model.weights.records_shape)
    assert all((c == 1).all() for c in count.values())
    assert (records.sum(axis=1) == 3 * model.width * model.expert_width).all()
    assert records.max() == 1


def test_all_problems_come_in_one_error():
    model, tensors = checkpoint()
    del tensors["model.embed_tokens.weight"]
    del tensors["model.layers.0.mlp.up_proj.weight"]
    del tensors["model.layers.2.mlp.experts.1.down_proj.weight"]
    name = "model.layers.1.self_attn.q_proj.weight"
    tensors[name] = dataclasses.replace(tensors[name], shape=(8, 3))
    tensors["lm_head.weight"] = dataclasses.replace(tensors["lm_head.weight"], dtype="F64")
    gate = "model.layers.1.mlp.experts.0.gate_proj.weight"
    tensors[gate] = dataclasses.replace(tensors[gate], dtype="F8_E4M3")
    scale = gate + "_scale_inv"
    tensors[scale] = TensorInfo(scale, "F32", (1, 1), None, 0, 4)
    tensors["vision.weight"] = TensorInfo("vision.weight", "F32", (1,), None, 0, 4)
    assert sorted(problems(tensors, model)) == [
        "dtype: lm_head.weight is F64, needs one of BF16, F16, F32",
        "extra: vision.weight",
        "missing: model.embed_tokens.weight",
        "missing: model.layers.0.mlp.up_proj.weight",
        "missing: model.layers.2.mlp.experts.1.down_proj.weight",
        f"quantised: {gate} (F8_E4M3)",
        f"quantised: {scale} (F32)",
        f"shape: {name} is [8, 3], needs [3, 8]",
    ]


@pytest.mark.parametrize("suffix", ["qweight", "qzeros", "scales", "weight_scale_inv", "g_idx"])
def test_quantised_checkpoints_are_named_as_such(suffix):
    model, tensors = checkpoint()
    name = f"model.layers.0.self_attn.q_proj.{suffix}"
    tensors[name] = TensorInfo(name, "I32", (1, 1), None, 0, 4)
    assert problems(tensors, model) == [f"quantised: {name} (I32)"]


def test_thousands_of_missing_tensors_stay_readable_and_every_pattern_is_named():
    model, tensors = checkpoint(moe=(True,) * 10, experts=60)
    tensors = {name: t for name, t in tensors.items() if ".experts." not in name}
    expert = "model.layers.{layer}.mlp.experts.{expert}."
    assert problems(tensors, model) == [
        f"missing: {expert}{part}.weight (600 tensors, "
        f"first: model.layers.0.mlp.experts.0.{part}.weight)"
        for part in ("gate_proj", "up_proj", "down_proj")
    ]


def absurd(fused):
    """A model that claims a million experts, and the few tensors of a small file."""
    model = Model(moe=(True,) * 16, experts=2**16, fused=fused)
    _, tensors = checkpoint(moe=(True,) * 16, experts=2, fused=fused)
    return model, {name: t for name, t in tensors.items() if not name.endswith("mlp.gate.weight")}


@pytest.mark.parametrize("fused", [False, True])
def test_a_claim_of_a_million_experts_costs_little(fused):
    model, tensors = absurd(fused)
    tracemalloc.start()
    started = time.process_time()
    lines = problems(tensors, model)
    seconds, peak = time.process_time() - started, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert seconds < 1 and peak < 4e6
    layer = "model.layers.{layer}.mlp."
    router = f"missing: {layer}gate.weight (16 tensors, first: model.layers.0.mlp.gate.weight)"
    if fused:
        count = "(16 tensors, first: model.layers.0.mlp.experts."
        assert lines == [
            f"shape: {layer}experts.gate_up_proj {count}gate_up_proj "
            "is [2, 10, 8], needs [65536, 10, 8])",
            f"shape: {layer}experts.down_proj {count}down_proj is [2, 8, 5], needs [65536, 8, 5])",
            router,
        ]
    else:
        assert lines == [router] + [
            f"missing: {layer}experts.{{expert}}.{part}.weight ({16 * (2**16 - 2)} tensors, "
            f"first: model.layers.0.mlp.experts.2.{part}.weight)"
            for part in ("gate_proj", "up_proj", "down_proj")
        ]


def test_a_fused_tensor_beside_some_of_its_experts_is_one_duplicate():
    model, tensors = checkpoint()
    _, fused = checkpoint(fused=True)
    for expert in (0, 2):
        for part in ("gate_proj", "up_proj"):
            del tensors[f"model.layers.1.mlp.experts.{expert}.{part}.weight"]
    name = "model.layers.1.mlp.experts.gate_up_proj"
    tensors[name] = fused[name]
    assert problems(tensors, model) == [
        f"duplicate: {name} holds the same weights as model.layers.1.mlp.experts.1.gate_proj.weight"
    ]


def test_thousands_of_extra_tensors_stay_readable():
    model, tensors = checkpoint()
    for i in range(1000):
        name = f"model.layers.{i % 10 + 90}.mlp.experts.{i}.up_proj.weight"
        tensors[name] = TensorInfo(name, "BF16", (5, 8), None, 0, 80)
    assert problems(tensors, model) == [
        "extra: model.layers.*.mlp.experts.*.up_proj.weight (1000 tensors, "
        "first: model.layers.90.mlp.experts.0.up_proj.weight)"
    ]


def test_missing_fused_tensors_are_named_as_the_checkpoint_spells_them():
    model, tensors = checkpoint(fused=True)
    del tensors["model.layers.2.mlp.experts.gate_up_proj"]
    assert problems(tensors, model) == ["missing: model.layers.2.mlp.experts.gate_up_proj"]


def test_the_same_weights_in_two_spellings_are_duplicates():
    model, tensors = checkpoint()
    _, fused = checkpoint(fused=True)
    name = "model.layers.1.mlp.experts.down_proj"
    tensors[name] = fused[name]
    assert problems(tensors, model) == [
        f"duplicate: {name} holds the same weights as model.layers.1.mlp.experts.0.down_proj.weight"
    ]


def test_a_name_given_twice_is_a_duplicate():
    model, tensors = checkpoint()
    with pytest.raises(CheckpointError, match="duplicate: lm_head.weight .again in model.safe"):
        plan([*tensors.values(), tensors["lm_head.weight"]], model.weights, "")


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.mlp.experts.0.up_proj.weight",  # a dense layer
        "model.layers.1.mlp.up_proj.weight",  # an expert layer
        "model.layers.3.input_layernorm.weight",  # no such layer
        "model.layers.1.mlp.experts.3.up_proj.weight",  # no such expert
        "model.layers.01.input_layernorm.weight",  # layer 1 spelt twice
        "model.layers.٣.input_layernorm.weight",  # a digit, not an ASCII one
        "model.layers.x.input_layernorm.weight",
        "model.layers." + "9" * 5000 + ".input_layernorm.weight",
        "Xmodel.embed_tokens.weight",
        "model.embed_tokens.weightX",
        "model.embed_tokens.weight\n",
        "modelXembed_tokensXweight",
        "",
    ],
)
def test_names_outside_the_model_are_extra(name):
    model, tensors = checkpoint()
    tensors[name] = TensorInfo(name, "BF16", (8,), None, 0, 16)
    (line,) = problems(tensors, model)
    assert line.startswith("extra:") and name.strip() in line


def test_where_several_rules_match_the_first_that_applies_wins():
    model, tensors = checkpoint(tied=True)
    assert "lm_head.weight" in tensors
    assert all(p.tensor.name != "lm_head.weight" for p in plan(tensors.values(), model.weights, ""))


@pytest.mark.parametrize(
    "arguments",
    [
        ("a.weight", "x", 2),
        ("a.{layer}", "experts/gate"),
        ("a.weight", "experts/down"),
    ],
)
def test_malformed_rules_are_refused(arguments):
    with pytest.raises(ValueError):
        Rule(*arguments)


@pytest.mark.parametrize(
    "changes",
    [
        {"specs": {"unheard/of": Spec((1,), np.dtype("f4"))}},
        {"specs": {"embed/weight": Spec((1,), np.dtype("f8"))}},
        {"specs": {"mlp/gate_up": Spec((1, 3, 2), np.dtype("f4"))}},
    ],
)
def test_specs_that_no_checkpoint_can_fill_are_refused(changes):
    with pytest.raises(ValueError):
        WeightMap(**{"rules": RULES, "stack_index": lambda target, layer: None, **changes})


def test_a_stack_index_out_of_range_is_refused():
    model, tensors = checkpoint()
    weights = dataclasses.replace(model.weights, stack_index=lambda target, layer: layer)
    with pytest.raises(ValueError, match="stack_index gave"):
        plan(tensors.values(), weights, "")
