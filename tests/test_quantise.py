import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from ckpt_models import Model, assert_equal, write_checkpoint
from cli_models import write_model
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.numpy import load_file, save_file

import moejax
from moejax.checkpoints import hf
from moejax.checkpoints.bank import open_bank
from moejax.checkpoints.convert import convert_directory, load_converted, quantisation
from moejax.checkpoints.error_table import ErrorTable
from moejax.config import read_config_json
from moejax.errors import CheckpointError, InputError, NonFiniteError
from moejax.formats import held_shape, parameter_format, quant_format
from moejax.layout import MatrixLayout, RecordLayout
from moejax.models import config_from_hf, family
from moejax.models.family import weight_map
from moejax.quantise import dequantise, error, quantise

QUANTISED = ("int8", "int4g32", "int4g64")
formats = st.sampled_from(QUANTISED)


def unpacked(data: bytes, rows: int, cols: int, form: str) -> tuple[np.ndarray, np.ndarray, int]:
    """Integers [rows, columns], scales [rows, groups] and their first byte, by the description."""
    if form == "int8":
        q = np.array([[data[r * cols + c] for c in range(cols)] for r in range(rows)], np.uint8)
        at = -(-rows * cols // 64) * 64
        scales = np.frombuffer(data, "<f4", rows, at).reshape(rows, 1)
        return q.view(np.int8).astype(np.int64), scales, at
    columns, group = -(-cols // 128) * 128, int(form[-2:])
    q = np.zeros((rows, columns), np.int64)
    for r in range(rows):
        for c in range(columns):
            chunk, within = divmod(c, 128)
            nibble, word = divmod(within, 16)
            at = r * columns // 2 + chunk * 64 + word * 4
            q[r, c] = (int.from_bytes(data[at : at + 4], "little") >> (4 * nibble) & 15) - 8
    at = -(-rows * columns // 2 // 64) * 64
    scales = np.frombuffer(data, "<f2", rows * columns // group, at)
    return q, scales.reshape(rows, -1), at


def oracle(data: np.ndarray, rows: int, cols: int, form: str) -> np.ndarray:
    """Weights f64 [rows, cols] of a quantised matrix."""
    q, scales, _ = unpacked(data.tobytes(), rows, cols, form)
    spread = np.repeat(scales.astype(np.float64), q.shape[1] // scales.shape[1], axis=1)
    return (q * spread)[:, :cols]


def random(rows, cols, seed=0):
    return np.random.default_rng(seed).normal(size=(rows, cols)).astype(np.float32)


def grouped(weights, form):
    """Weights as [groups, weights that share a scale], padded with zeros."""
    if form == "int8":
        return weights
    rows, cols = weights.shape
    padded = np.zeros((rows, -(-cols // 128) * 128), weights.dtype)
    padded[:, :cols] = weights
    return padded.reshape(-1, int(form[-2:]))


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(1, 9), cols=st.integers(1, 300), form=formats, seed=st.integers(0, 99))
def test_the_bytes_are_those_described(rows, cols, form, seed):
    weights, layout = random(rows, cols, seed), MatrixLayout(rows, cols, form)
    data = quantise(weights, layout)
    assert data.dtype == np.uint8 and data.shape == (layout.bytes,)
    q, scales, at = unpacked(data.tobytes(), rows, cols, form)
    assert layout.scales_at == at and at % 64 == 0
    assert layout.bytes == -(-(at + scales.nbytes) // 64) * 64
    assert q.min() >= (-127 if form == "int8" else -8) and not q[:, cols:].any()
    used = rows * layout.row_bytes
    assert not data[used:at].any() and not data[at + scales.nbytes :].any()
    assert layout.weight_bytes == used + scales.nbytes
    wanted = oracle(data, rows, cols, form)
    np.testing.assert_array_equal(dequantise(data, layout), wanted.astype(np.float32))
    relative = np.linalg.norm(wanted - weights) / np.linalg.norm(weights.astype(np.float64))
    assert error(weights, layout) == pytest.approx(relative, rel=1e-5, abs=1e-7)


@settings(max_examples=40, deadline=None)
@given(
    weights=hnp.arrays(
        np.float32,
        hnp.array_shapes(min_dims=2, max_dims=2, max_side=200),
        elements=st.floats(-1e4, 1e4, width=32),
    )
)
def test_int8_rounds_to_half_a_step(weights):
    form, (rows, cols) = "int8", weights.shape
    data = quantise(weights, MatrixLayout(rows, cols, form))
    step = np.abs(weights).max(axis=1, keepdims=True).astype(np.float64) / 127
    slack = 1e-5 * step + 1e-44  # the scale is an f32
    assert (np.abs(oracle(data, rows, cols, form) - weights) <= step / 2 + slack * 127).all()


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 6), cols=st.integers(1, 300), form=formats, seed=st.integers(0, 99))
def test_no_group_is_worse_than_with_the_scale_of_q4_0(rows, cols, form, seed):
    if form == "int8":
        return
    weights = random(rows, cols, seed) ** 3  # with outliers
    data = quantise(weights, MatrixLayout(rows, cols, form))
    wrong = grouped(oracle(data, rows, cols, form) - weights, form)
    floats = grouped(weights.astype(np.float64), form)
    largest = np.take_along_axis(floats, np.abs(floats).argmax(1)[:, None], 1)
    scale = np.where(largest == 0, 1, largest / -8)
    plain = np.clip(np.rint(floats / scale), -8, 7) * scale - floats
    assert ((wrong**2).sum(1) <= 1.01 * (plain**2).sum(1) + 1e-6 * (floats**2).sum(1)).all()


@pytest.mark.parametrize(("form", "group"), [("int4g32", 32), ("int4g64", 64)])
def test_int4_is_better_than_an_absolute_maximum(form, group):
    weights = random(64, 512)
    floats = weights.reshape(-1, group).astype(np.float64)
    scale = np.abs(floats).max(1, keepdims=True) / 7
    plain = np.linalg.norm(np.rint(floats / scale) * scale - floats) / np.linalg.norm(floats)
    assert error(weights, MatrixLayout(64, 512, form)) < 0.86 * plain
    assert error(weights, MatrixLayout(64, 512, "int8")) < 0.1 * plain


@pytest.mark.parametrize("form", QUANTISED)
def test_what_lies_on_the_grid_comes_back(form):
    low, high = (-127, 127) if form == "int8" else (-8, 7)
    q = np.random.default_rng(0).integers(low, high + 1, (16, 256))
    q[:, ::32] = low
    scale = 2.0 ** -np.arange(16)[:, None]
    weights = (q * scale).astype(np.float32)
    layout = MatrixLayout(16, 256, form)
    np.testing.assert_array_equal(dequantise(quantise(weights, layout), layout), weights)


@pytest.mark.parametrize("form", QUANTISED)
def test_zeros_and_tiny_weights(form):
    layout = MatrixLayout(4, 40, form)
    weights = np.zeros((4, 40), np.float32)
    assert not dequantise(quantise(weights, layout), layout).any()
    assert error(weights, layout) == 0
    weights[1], weights[2, 3], weights[3] = 1e-44, -1e-30, random(1, 40)[0] * 1e-6
    found = dequantise(quantise(weights, layout), layout)
    assert np.abs(found[:3]).max() <= 1e-30 and np.isfinite(found).all()
    assert np.linalg.norm(found[3] - weights[3]) < 0.2 * np.linalg.norm(weights[3])


@pytest.mark.parametrize("form", QUANTISED)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_refused(form, value):
    weights = random(3, 70)
    weights[1, 69] = value
    with pytest.raises(NonFiniteError, match="cannot be quantised"):
        quantise(weights, MatrixLayout(3, 70, form))


def test_weights_beyond_the_scales_are_refused():
    weights = random(3, 70) * 1e30
    with pytest.raises(CheckpointError, match="too large for int4.*use int8"):
        quantise(weights, MatrixLayout(3, 70, "int4g32"))
    layout = MatrixLayout(3, 70, "int8")
    np.testing.assert_allclose(dequantise(quantise(weights, layout), layout), weights, atol=2e28)
    largest = np.full((1, 32), -5e5, np.float32)
    layout = MatrixLayout(1, 32, "int4g32")
    np.testing.assert_allclose(dequantise(quantise(largest, layout), layout), largest, rtol=1e-3)


@pytest.mark.parametrize("form", QUANTISED)
def test_stacks_of_bfloat16_are_quantised_one_by_one(form):
    stack = np.stack([random(5, 130, seed) for seed in range(6)]).astype(ml_dtypes.bfloat16)
    stack, layout = stack.reshape(2, 3, 5, 130), MatrixLayout(5, 130, form)
    data = quantise(stack, layout)
    assert data.shape == (2, 3, layout.bytes)
    one = quantise(stack[1, 2].astype(np.float32), layout)
    np.testing.assert_array_equal(data[1, 2], one)
    assert dequantise(data, layout).shape == stack.shape


def test_shapes_that_do_not_fit_are_refused():
    for layout in (MatrixLayout(3, 4, "int8"), MatrixLayout(4, 3, "float32")):
        with pytest.raises(ValueError, match="does not have the quantised layout"):
            quantise(np.zeros((4, 3), np.float32), layout)


@given(d=st.integers(1, 300), f=st.integers(1, 300), form=st.sampled_from([*QUANTISED, "bfloat16"]))
def test_records(d, f, form):
    layout = RecordLayout(width=d, expert_width=f, dtype=form)
    gate_up, down = layout.matrices["gate_up"], layout.matrices["down"]
    assert (gate_up.rows, gate_up.cols, down.rows, down.cols) == (2 * f, d, d, f)
    assert layout.offsets["gate_up"] == 0 and layout.offsets["down"] % 64 == 0
    assert gate_up.bytes <= layout.offsets["down"] < gate_up.bytes + 64
    end = layout.offsets["down"] + down.bytes
    assert end <= layout.stride < end + 4096 and layout.stride % 4096 == 0
    assert layout.weight_bytes == gate_up.weight_bytes + down.weight_bytes <= end
    records = np.zeros((2, layout.elements), layout.bits)
    layout.view(records, "down")[1] = 1
    touched = np.flatnonzero(records[1].view(np.uint8))
    assert layout.offsets["down"] <= touched.min() and touched.max() < end and not records[0].any()


def test_formats_are_named():
    assert quant_format(None) is None and quant_format("int8", 64) == "int8"
    assert quant_format("int4") == quant_format("int4g32") == "int4g32"
    assert quant_format("int4", 64) == "int4g64"
    for wrong in (("int5", 32), ("int4", 16), ("bfloat16", 32)):
        with pytest.raises(InputError, match="is not one of"):
            quant_format(*wrong)


def test_linear_maps_are_quantised_and_nothing_else():
    floats = """embed/weight final_norm/weight norms/input norms/post moe/router shared/gate
    attention/q_bias attention/o_bias attention/q_norm attention/kv_a_norm attention/kv_b"""
    for path in floats.split():
        assert parameter_format(path, "bfloat16", "int4g32") == "bfloat16", path
    linear = "attention/q attention/o attention/kv_a mlp/gate_up shared/down experts/down"
    for path in linear.split():
        assert parameter_format(path, "bfloat16", "int4g64") == "int4g64", path
        assert parameter_format(path, "float32", None) == "float32", path
    assert parameter_format("head/weight", "bfloat16", "int4g32") == "int8"
    assert parameter_format("head/weight", "bfloat16", "int4g32", tied=True) == "bfloat16"
    assert held_shape((6, 5, 130), "int8") == (6, MatrixLayout(5, 130, "int8").bytes)
    assert held_shape((6, 5), "bfloat16") == (6, 5)


models = st.builds(
    Model,
    moe=st.lists(st.booleans(), min_size=1, max_size=3).map(tuple),
    experts=st.integers(1, 3),
    width=st.integers(1, 140),
    expert_width=st.integers(1, 40),
    dtype=st.sampled_from(["bfloat16", "float32"]),
    source=st.sampled_from(["BF16", "F16", "F32"]),
    fused=st.booleans(),
    tied=st.booleans(),
)


def expected(model, quant):
    """What a loader must make of a model: floats as they are, matrices quantised one by one."""
    params, _ = Model.expected(model)
    exact = dict(model.tensors())
    tied = "head/weight" not in params
    for path in params:
        form = parameter_format(path, model.dtype, quant, tied)
        if form not in QUANTISED:
            continue
        name = {"head/weight": "lm_head.weight"}.get(path)
        floats = exact[name].astype(np.float32) if name else stacked(model, path)
        layout = MatrixLayout(*floats.shape[-2:], form)
        params[path] = quantise(floats, layout)
    if not any(model.moe):
        return params, None
    float_model = Model(**{**vars(model), "dtype": "float32"})
    wide = float_model.expected()[1]
    layout = RecordLayout(width=model.width, expert_width=model.expert_width, dtype=quant)
    records = np.zeros((len(wide), layout.elements), np.uint8)
    for part, matrix in layout.matrices.items():
        layout.view(records, part)[:] = quantise(float_model.layout.view(wide, part), matrix)
    return params, records


def stacked(model, path):
    return Model(**{**vars(model), "dtype": "float32"}).expected()[0][path]


@settings(max_examples=40, deadline=None)
@given(
    model=models, quant=formats, shards=st.integers(1, 2), chunk=st.sampled_from([1, 64, 1 << 18])
)
def test_loading_and_converting_quantise_every_matrix(
    model, quant, shards, chunk, tmp_path_factory
):
    base = tmp_path_factory.mktemp("model")
    model.write(base / "source", shards)
    errors = ErrorTable()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hf, "CHUNK", chunk)
        loaded = hf.load(base / "source", model.weights.quantised(quant), errors=errors)
        table = convert_directory(base / "source", base / "target", model.weights, quant=quant)
    wanted = expected(model, quant)
    assert_equal(loaded, wanted)
    params, records = load_converted(base / "target", model.weights)
    assert_equal((params, None if records is None else np.asarray(records)), wanted)
    assert table == errors.rows() == quantisation(base / "target")["errors"]
    tensors = 2 * sum(model.moe) * (1 if model.fused else model.experts)
    if any(model.moe) and not model.fused:
        assert table["experts/gate_up"]["tensors"] == tensors
    layers = [q for name, q in sorted(model.tensors().items()) if "q_proj" in name]
    found = [error(q, MatrixLayout(*q.shape, quant)) for q in layers]
    assert table["attention/q"]["tensors"] == len(found)
    assert table["attention/q"]["max"] == pytest.approx(max(found), rel=1e-6)
    assert table["attention/q"]["mean"] == pytest.approx(np.mean(found), rel=1e-6)


def test_a_converted_directory_says_what_it_holds_and_is_mapped(tmp_path):
    model = Model(width=64, expert_width=64)
    model.write(tmp_path / "source")
    convert_directory(tmp_path / "source", tmp_path / "target", model.weights, quant="int4")
    about = quantisation(tmp_path / "target")
    assert about["quant"] == "int4g32"
    assert about["formats"]["head/weight"] == "int8"
    assert about["formats"]["attention/q"] == "int4g32" and "router/weight" not in about["formats"]
    bank = open_bank(tmp_path / "target" / "experts.bank")
    assert bank.layout.dtype == "int4g32"
    bank.verify()
    params, records = load_converted(tmp_path / "target", model.weights)
    assert isinstance(records, np.memmap) and not records.flags.writeable
    assert isinstance(params["attention/q"], np.memmap)
    convert_directory(tmp_path / "source", tmp_path / "target", model.weights, force=True)
    assert quantisation(tmp_path / "target") is None
    assert_equal(load_converted(tmp_path / "target", model.weights), model.expected())


@pytest.mark.parametrize("text", ["{", '{"quant": "int4"}', '{"quant": "int8", "errors": 1}'])
def test_a_damaged_quantisation_file_is_refused(text, tmp_path):
    model = Model()
    model.write(tmp_path / "source")
    convert_directory(tmp_path / "source", tmp_path / "target", model.weights, quant="int8")
    (tmp_path / "target" / "quantisation.json").write_text(text)
    with pytest.raises(CheckpointError, match="quantisation.json"):
        load_converted(tmp_path / "target", model.weights)


def test_another_format_than_the_stored_one_is_refused(tmp_path):
    model = Model()
    model.write(tmp_path / "source")
    convert_directory(tmp_path / "source", tmp_path / "target", model.weights, quant="int8")
    path = tmp_path / "target" / "quantisation.json"
    path.write_text(path.read_text().replace('"int8"', '"int4g32"'))
    with pytest.raises(CheckpointError, match="does not fit the config"):
        load_converted(tmp_path / "target", model.weights)


def test_what_is_converted_is_not_quantised_again(tmp_path):
    source = write_model(tmp_path / "source")
    config = config_from_hf(read_config_json(source))
    weights = weight_map(config, family(config.model_type).rules, "bfloat16")
    for name, quant in (("int8", "int8"), ("floats", None)):
        convert_directory(source, tmp_path / name, weights, quant=quant)
        with pytest.raises(CheckpointError, match=f"is converted, to {name}: load the original"):
            moejax.load(tmp_path / name, quant="int4")
    (tmp_path / "floats" / "dense.safetensors").rename(tmp_path / "moved")
    (tmp_path / "floats" / "orbax").mkdir()
    with pytest.raises(CheckpointError, match="is converted, to floats"):
        moejax.load(tmp_path / "floats", quant="int4")
    for options in ({"quant": "int3"}, {"quant": "int4", "group": 16}):
        with pytest.raises(InputError, match="is not one of"):
            moejax.load(source, **options)


def dequantised(source, target, quant):
    """A directory that holds in floats what a quantised model computes with."""
    shutil.copytree(source, target)
    tensors = load_file(source / "model.safetensors")
    for name, tensor in tensors.items():
        tensors[name] = tensor.astype(np.float32)
        if "_proj" in name:
            layout = MatrixLayout(*tensor.shape, quant_format(quant))
            tensors[name] = dequantise(quantise(tensor, layout), layout)
    save_file(tensors, target / "model.safetensors")
    return target


@pytest.mark.parametrize("quant", ["int8", "int4"])
def test_a_quantised_model_computes_with_its_weights(quant, tmp_path):
    source, ids = write_model(tmp_path / "source"), np.arange(3, 20)[None]
    config = config_from_hf(read_config_json(source))
    weights = weight_map(config, family(config.model_type).rules, "float32")
    convert_directory(source, tmp_path / "target", weights, quant=quant)
    options = {"context": 64, "dtype": "float32"}
    at_once = moejax.load(source, quant=quant, **options).logits(ids)
    mapped = moejax.load(tmp_path / "target", **options).logits(ids)
    few = moejax.load(tmp_path / "target", slots=3, **options).logits(ids)
    np.testing.assert_array_equal(at_once, mapped)
    np.testing.assert_array_equal(at_once, few)
    floats = dequantised(source, tmp_path / "floats", quant)
    wanted = np.asarray(moejax.load(floats, **options).logits(ids))
    np.testing.assert_allclose(at_once, wanted, rtol=0, atol=1e-4 * np.abs(wanted).max())


@pytest.mark.parametrize("check_finite", [True, False])
def test_every_tensor_that_is_not_finite_is_named(check_finite, tmp_path):
    model = Model()
    tensors = model.tensors()
    bad = ["model.layers.0.mlp.up_proj.weight", "model.layers.2.mlp.experts.1.down_proj.weight"]
    for name in bad:
        tensors[name][0, 0] = np.nan
    write_checkpoint(tmp_path / "source", tensors)
    with pytest.raises(NonFiniteError) as raised:
        hf.load(tmp_path / "source", model.weights.quantised("int8"), check_finite=check_finite)
    assert all(name in str(raised.value) for name in bad)
    for _ in range(2):
        with pytest.raises(NonFiniteError):
            convert_directory(
                tmp_path / "source",
                tmp_path / "target",
                model.weights,
                quant="int4",
                check_finite=check_finite,
            )
        assert not (tmp_path / "target").exists()


def test_weights_too_large_for_int4_are_named(tmp_path):
    model = Model(source="F32")
    tensors = model.tensors()
    tensors["model.layers.1.mlp.experts.2.up_proj.weight"][0, 0] = 1e20
    write_checkpoint(tmp_path / "source", tensors)
    with pytest.raises(CheckpointError, match="experts.2.up_proj.weight: .*use int8"):
        hf.load(tmp_path / "source", model.weights.quantised("int4g64"))


def test_progress_reaches_the_bytes_that_are_read(tmp_path):
    model, seen = Model(), []
    model.write(tmp_path / "source", shards=2)
    convert_directory(
        tmp_path / "source",
        tmp_path / "target",
        model.weights,
        quant="int4",
        progress=lambda *args: seen.append(args),
    )
    needed = sum(t.nbytes for n, t in model.tensors().items() if "inv_freq" not in n)
    done = [done for done, _ in seen]
    assert done == sorted(set(done)) and seen[-1] == (needed, needed)


def test_a_kill_at_any_system_call_loses_nothing(tmp_path):
    """SIGKILL at every call that changes the disk; the errors survive with the weights."""
    script = Path(__file__).with_name("ckpt_kill.py")
    run = subprocess.run(
        [sys.executable, script, tmp_path, "int4"], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout)
    assert result["kills"] > 50 and result["bank_kills"] > 20
    assert result["resumed"] > result["kills"] // 3


def test_memory_is_that_of_the_quantised_model(tmp_path):
    """A model of 64 MB in 8 shards, loaded and converted, each in a process of its own."""
    script = Path(__file__).with_name("ckpt_memory.py")
    command = [sys.executable, script, tmp_path]
    subprocess.run([*command, "write"], check=True)
    measured = {}
    for action in ("load", "convert"):
        run = subprocess.run([*command, action, "int4"], check=True, capture_output=True, text=True)
        measured[action] = json.loads(run.stdout)
    model, shard = measured["load"]["model"], measured["load"]["shard"]
    size = sum(p.stat().st_size for p in (tmp_path / "target").iterdir())
    assert size < 0.35 * model
    assert measured["load"]["peak"] < size + shard
    assert measured["convert"]["peak"] < 2 * shard
    assert math.isclose(os.path.getsize(tmp_path / "target" / "experts.bank"), size, rel_tol=0.1)
