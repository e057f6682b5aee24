import json
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from ckpt_models import Model, assert_equal, write_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st

from moejax.checkpoints import hf
from moejax.checkpoints.hf import load, plan_directory
from moejax.checkpoints.rules import Rule, WeightMap
from moejax.errors import CheckpointError, NonFiniteError
from moejax.layout import RECORD_ALIGNMENT

models = st.builds(
    Model,
    moe=st.lists(st.booleans(), min_size=1, max_size=4).map(tuple),
    experts=st.integers(1, 4),
    width=st.integers(1, 40),
    expert_width=st.integers(1, 40),
    dtype=st.sampled_from(["bfloat16", "float32"]),
    source=st.sampled_from(["BF16", "F16", "F32"]),
    fused=st.booleans(),
    tied=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)


@settings(max_examples=60, deadline=None)
@given(model=models, shards=st.integers(1, 3), chunk=st.sampled_from([1, 7, 64, hf.CHUNK]))
def test_every_layout_loads_bit_for_bit(model, shards, chunk, tmp_path_factory):
    directory = model.write(tmp_path_factory.mktemp("model"), shards)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hf, "CHUNK", chunk)
        assert_equal(load(directory, model.weights), model.expected())


def test_arrays_are_aligned_so_that_jax_need_not_copy_them(tmp_path):
    model = Model()
    params, records = load(model.write(tmp_path), model.weights)
    for array in [*params.values(), records]:
        assert array.ctypes.data % RECORD_ALIGNMENT == 0


def test_every_float16_and_many_float32_are_cast_as_torch_casts_them(tmp_path):
    torch = pytest.importorskip("torch")

    half = np.arange(2**16, dtype=np.uint16).view(np.float16)
    single = np.random.default_rng(0).integers(0, 2**32, 2**16, np.uint32).view(np.float32)
    for source in (half, single):
        write_checkpoint(tmp_path, {"t": source})
        spec = np.empty(source.shape, ml_dtypes.bfloat16)
        weights = WeightMap(
            rules=[Rule("t", "t")], specs={"t": spec}, stack_index=lambda target, layer: None
        )
        loaded = load(tmp_path, weights, check_finite=False)[0]["t"]
        wanted = torch.from_numpy(source).to(torch.bfloat16).float().numpy()
        np.testing.assert_array_equal(loaded.astype(np.float32), wanted)


def test_records_may_be_given(tmp_path):
    model = Model()
    shape = model.weights.records_shape
    given_ = np.memmap(tmp_path / "r", model.layout.bits, "w+", shape=shape)
    given_[:] = 0xFFFF
    params, records = load(model.write(tmp_path / "m"), model.weights, records=given_)
    assert records is given_
    assert_equal((params, np.asarray(records)), model.expected())


@pytest.mark.parametrize("wrong", ["shape", "dtype", "order", "read-only", "dense model"])
def test_records_that_do_not_fit_are_refused(wrong, tmp_path):
    model = Model(moe=(False,)) if wrong == "dense model" else Model()
    shape = model.weights.records_shape or (1, 2048)
    records = np.zeros(shape, model.layout.bits)
    if wrong == "shape":
        records = records[:-1]
    elif wrong == "dtype":
        records = records.view(np.int16)
    elif wrong == "order":
        records = np.asfortranarray(records)
    elif wrong == "read-only":
        records.flags.writeable = False
    with pytest.raises(ValueError, match="needed: |must be contiguous and writable"):
        load(model.write(tmp_path), model.weights, records=records)


def test_nothing_is_allocated_for_a_checkpoint_that_does_not_fit(tmp_path, monkeypatch):
    model = Model()
    tensors = model.tensors()
    del tensors["lm_head.weight"]
    write_checkpoint(tmp_path, tensors)
    monkeypatch.setattr(hf, "aligned_empty", lambda *_: pytest.fail("allocated"))
    with pytest.raises(CheckpointError, match="missing: lm_head.weight"):
        load(tmp_path, model.weights)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("source", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_every_tensor_that_is_not_finite_is_named(value, source, dtype, tmp_path):
    model = Model(source=source, dtype=dtype)
    tensors = model.tensors()
    bad = ["model.layers.0.mlp.up_proj.weight", "model.layers.2.mlp.experts.1.down_proj.weight"]
    for name in bad:
        tensors[name].reshape(-1)[-1] = value
    write_checkpoint(tmp_path, tensors)
    with pytest.raises(NonFiniteError) as error:
        load(tmp_path, model.weights)
    assert all(name in str(error.value) for name in bad)
    assert str(error.value).count(".weight") == 2
    params, _ = load(tmp_path, model.weights, check_finite=False)
    assert not np.isfinite(params["mlp/gate_up"][0, -1, -1].astype(np.float32))


def test_float32_beyond_bfloat16_is_not_finite(tmp_path):
    model = Model(source="F32")
    tensors = model.tensors()
    tensors["lm_head.weight"][0, 0] = np.finfo(np.float32).max
    write_checkpoint(tmp_path, tensors)
    with pytest.raises(NonFiniteError, match="lm_head.weight.*do not fit bfloat16"):
        load(tmp_path, model.weights)


def test_largest_finite_values_pass_the_check(tmp_path):
    model = Model(source="BF16")
    tensors = model.tensors()
    tensors["lm_head.weight"][0, :2] = [ml_dtypes.finfo("bfloat16").max, -0.0]
    load(write_checkpoint(tmp_path, tensors), model.weights)


def test_progress_reaches_the_bytes_that_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(hf, "CHUNK", 16)
    model = Model(source="F32")
    seen = []
    load(model.write(tmp_path), model.weights, progress=lambda *args: seen.append(args))
    needed = sum(t.nbytes for n, t in model.tensors().items() if "inv_freq" not in n)
    done = [done for done, _ in seen]
    assert {total for _, total in seen} == {needed}
    assert done == sorted(set(done)) and done[-1] == needed and len(done) > 50


def test_a_file_that_shrinks_while_it_is_read_is_an_error(tmp_path):
    model = Model()
    directory = model.write(tmp_path)
    placements = plan_directory(directory, model.weights)
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="ended early"):
        list(hf.stream(placements))


def test_memory_stays_below_the_model_and_one_shard(tmp_path):
    """A model of 64 MB in 8 shards, loaded and converted, each in a process of its own."""
    script = Path(__file__).with_name("ckpt_memory.py")
    command = [sys.executable, script, tmp_path]
    subprocess.run([*command, "write"], check=True)
    measured = {}
    for action in ("load", "convert"):
        run = subprocess.run([*command, action], check=True, capture_output=True, text=True)
        measured[action] = json.loads(run.stdout)
    model, shard = measured["load"]["model"], measured["load"]["shard"]
    assert model > 60e6 and shard < 10e6
    assert model * 0.9 < measured["load"]["peak"] < model + shard
    assert measured["convert"]["peak"] < 2 * shard
