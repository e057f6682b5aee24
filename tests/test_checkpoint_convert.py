import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from ckpt_models import Model, assert_equal, write_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from moejax.checkpoints import resumable
from moejax.checkpoints.bank import open_bank
from moejax.checkpoints.convert import convert_directory, is_converted, load_converted
from moejax.errors import CheckpointError, NonFiniteError
from moejax.layout import PART_ALIGNMENT

FILES = {"config.json", "tokenizer.json", "dense.safetensors", "experts.bank", "converted.json"}


def bits(arrays):
    params, records = arrays
    return params, None if records is None else np.asarray(records)


@pytest.fixture
def model(tmp_path):
    model = Model()
    model.write(tmp_path / "source", shards=2)
    return model


@settings(max_examples=25, deadline=None)
@given(
    moe=st.lists(st.booleans(), min_size=1, max_size=3).map(tuple),
    width=st.integers(1, 40),
    dtype=st.sampled_from(["bfloat16", "float32"]),
    source=st.sampled_from(["BF16", "F16", "F32"]),
    fused=st.booleans(),
    shards=st.integers(1, 3),
)
def test_round_trip(moe, width, dtype, source, fused, shards, tmp_path_factory):
    base = tmp_path_factory.mktemp("convert")
    model = Model(moe=moe, width=width, dtype=dtype, source=source, fused=fused)
    model.write(base / "source", shards)
    convert_directory(base / "source", base / "target", model.weights)
    loaded = load_converted(base / "target", model.weights)
    assert_equal(bits(loaded), model.expected())
    assert set(os.listdir(base)) == {"source", "target"}
    assert set(os.listdir(base / "target")) == FILES - ({"experts.bank"} if not any(moe) else set())
    for array in loaded[0].values():
        assert array.ctypes.data % PART_ALIGNMENT == 0


def test_what_is_loaded_is_mapped_and_read_only(model, tmp_path):
    convert_directory(tmp_path / "source", tmp_path / "target", model.weights)
    params, records = load_converted(tmp_path / "target", model.weights)
    sizes = {path: array.nbytes for path, array in params.items()}
    mapped = {path for path, array in params.items() if isinstance(array, np.memmap)}
    assert {path for path, size in sizes.items() if size % 64 == 0} <= mapped
    assert isinstance(records, np.memmap)
    assert not any(params[path].flags.writeable for path in mapped)


def test_other_programs_can_read_the_dense_file(model, tmp_path):
    convert_directory(tmp_path / "source", tmp_path / "target", model.weights)
    loaded = load_file(tmp_path / "target" / "dense.safetensors")
    assert_equal((loaded, None), (model.expected()[0], None))


def test_small_files_are_copied_and_the_config_is_in_the_bank(model, tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    (source / "generation_config.json").write_text('{"eos_token_id": 1}')
    (source / "pytorch_model.bin").write_text("code")
    (source / "modeling.py").write_text("code")
    convert_directory(source, target, model.weights)
    assert set(os.listdir(target)) == FILES | {"generation_config.json"}
    for name in ("config.json", "tokenizer.json", "generation_config.json"):
        assert (target / name).read_bytes() == (source / name).read_bytes()
    assert open_bank(target / "experts.bank").config == {"model_type": "test"}
    assert is_converted(target) and not is_converted(source)


def test_progress_reaches_the_bytes_that_are_read(model, tmp_path):
    seen = []
    convert_directory(
        tmp_path / "source",
        tmp_path / "target",
        model.weights,
        progress=lambda *args: seen.append(args),
    )
    needed = sum(t.nbytes for n, t in model.tensors().items() if "inv_freq" not in n)
    done = [done for done, _ in seen]
    assert done == sorted(set(done)) and seen[-1] == (needed, needed)
    assert {total for _, total in seen} == {needed}


def test_an_existing_target_needs_force(model, tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    convert_directory(source, target, model.weights)
    before = (target / "experts.bank").stat().st_ino
    with pytest.raises(CheckpointError, match="target exists"):
        convert_directory(source, target, model.weights)
    assert (target / "experts.bank").stat().st_ino == before
    other = Model(seed=1)
    other.write(source, shards=2)
    convert_directory(source, target, other.weights, force=True)
    assert_equal(bits(load_converted(target, other.weights)), other.expected())
    assert set(os.listdir(tmp_path)) == {"source", "target"}


@pytest.mark.parametrize("kind", ["directory", "more", "file", "link"])
def test_force_replaces_only_converted_models(kind, model, tmp_path):
    target = tmp_path / "target"
    if kind == "file":
        target.write_text("mine")
    elif kind == "directory":
        target.mkdir()
        (target / "config.json").write_text("mine")
    else:
        convert_directory(tmp_path / "source", tmp_path / "elsewhere", model.weights)
        (tmp_path / "elsewhere").rename(target if kind == "more" else tmp_path / "real")
        if kind == "more":
            (target / "notes.txt").write_text("mine")
        else:
            target.symlink_to(tmp_path / "real")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(CheckpointError, match="not a converted model"):
        convert_directory(tmp_path / "source", target, model.weights, force=True)
    assert sorted(tmp_path.rglob("*")) == before


def test_the_source_is_never_the_target(model, tmp_path):
    for target in (tmp_path / "source", tmp_path, tmp_path / "x" / ".." / "source"):
        (tmp_path / "x").mkdir(exist_ok=True)
        with pytest.raises(CheckpointError, match="holds the source"):
            convert_directory(tmp_path / "source", target, model.weights, force=True)
    assert len(list((tmp_path / "source").iterdir())) == 5


def test_foreign_directories_beside_the_target_are_left_alone(model, tmp_path):
    for name in ("target.old", "target.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine.txt").write_text("mine")
    source, target = tmp_path / "source", tmp_path / "target"
    with pytest.raises(CheckpointError, match="target.partial is in the way"):
        convert_directory(source, target, model.weights)
    (tmp_path / "target.partial").rename(tmp_path / "moved")
    convert_directory(source, target, model.weights)
    with pytest.raises(CheckpointError, match="cannot write"):
        convert_directory(source, target, model.weights, force=True)
    assert (tmp_path / "target.old" / "mine.txt").read_text() == "mine"
    assert_equal(bits(load_converted(target, model.weights)), model.expected())


@pytest.mark.parametrize("config", [None, "[]", "{"])
def test_a_source_without_a_config_is_refused(config, model, tmp_path):
    (tmp_path / "source" / "config.json").unlink()
    if config:
        (tmp_path / "source" / "config.json").write_text(config)
    with pytest.raises(CheckpointError, match="config.json"):
        convert_directory(tmp_path / "source", tmp_path / "target", model.weights)
    assert os.listdir(tmp_path) == ["source"]


def test_a_missing_parent_is_refused(model, tmp_path):
    with pytest.raises(CheckpointError, match="absent is not a directory"):
        convert_directory(tmp_path / "source", tmp_path / "absent" / "target", model.weights)


def test_free_space_is_checked_for_the_whole_model(model, tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 33_000})  # either file alone would fit
    monkeypatch.setattr(resumable.shutil, "disk_usage", lambda _: usage)
    monkeypatch.setattr(os, "pwrite", lambda *_: pytest.fail("written"))
    with pytest.raises(CheckpointError, match="needs 3[0-9]{4} more bytes and 33000 are free"):
        convert_directory(tmp_path / "source", tmp_path / "target", model.weights)
    assert not (tmp_path / "target").exists()


def test_weights_that_are_not_finite_make_no_target(model, tmp_path):
    tensors = model.tensors()
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    tensors[name][0, 0] = np.nan
    write_checkpoint(tmp_path / "source", tensors, shards=2)
    for _ in range(2):
        with pytest.raises(NonFiniteError, match=name):
            convert_directory(tmp_path / "source", tmp_path / "target", model.weights)
        assert not (tmp_path / "target").exists()
    convert_directory(tmp_path / "source", tmp_path / "target", model.weights, check_finite=False)


def test_leftovers_from_other_sources_are_thrown_away(model, tmp_path):
    partial = tmp_path / "target.partial"

    def stop(done, total):
        if done == total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert_directory(tmp_path / "source", tmp_path / "target", model.weights, progress=stop)
    assert (partial / "dense.safetensors").exists()
    other = Model(seed=1)
    other.write(tmp_path / "source", shards=2)
    convert_directory(tmp_path / "source", tmp_path / "target", other.weights)
    assert_equal(bits(load_converted(tmp_path / "target", other.weights)), other.expected())


def test_two_processes_do_not_convert_into_the_same_target(model, tmp_path):
    errors = []

    def meanwhile(done, total):
        with pytest.raises(CheckpointError, match="another process is writing") as error:
            convert_directory(tmp_path / "source", tmp_path / "target", model.weights)
        errors.append(error)

    convert_directory(tmp_path / "source", tmp_path / "target", model.weights, progress=meanwhile)
    assert errors
    assert_equal(bits(load_converted(tmp_path / "target", model.weights)), model.expected())


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"experts": 2}, "router/weight is BF16"),
        ({"moe": (False, True)}, "attention/q is BF16"),
        ({"tied": True}, "extra: head/weight"),
        ({"moe": (True, True, True)}, "extra: mlp/down"),
        ({"expert_width": 4}, "experts.bank holds .*expert_width=5.* asks for .*expert_width=4"),
    ],
)
def test_a_converted_model_must_fit_its_config(changes, why, model, tmp_path):
    convert_directory(tmp_path / "source", tmp_path / "target", model.weights)
    with pytest.raises(CheckpointError, match=why):
        load_converted(tmp_path / "target", Model(**changes).weights)


@pytest.mark.parametrize("name", ["dense.safetensors", "experts.bank"])
def test_absent_and_truncated_files_are_refused(name, model, tmp_path):
    convert_directory(tmp_path / "source", tmp_path / "target", model.weights)
    path = tmp_path / "target" / name
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(CheckpointError, match=name):
        load_converted(tmp_path / "target", model.weights)
    path.unlink()
    with pytest.raises(CheckpointError, match=name):
        load_converted(tmp_path / "target", model.weights)


def test_a_kill_at_any_system_call_loses_nothing(tmp_path):
    """SIGKILL at every call that changes the disk: the target is old or new, and a rerun ends."""
    script = Path(__file__).with_name("ckpt_kill.py")
    run = subprocess.run(
        [sys.executable, script, tmp_path], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout)
    assert result["kills"] > 50 and result["bank_kills"] > 20
    assert result["resumed"] > result["kills"] // 3
