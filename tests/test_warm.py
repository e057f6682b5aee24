"""Warm starts: the experts of a file are hits, bits stay, damaged files are refused."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest

import moejax
from moejax import decode, warm
from moejax.errors import CheckpointError
from moejax.kernels import build

pytestmark = pytest.mark.usefixtures("own_cache")
PROMPT = np.arange(20, dtype=np.int32)
LINKS = [None, "paced:4,10", "disk"] if build.library() else [None]


def prefilled(runtime, state):
    fixed = (runtime.model, runtime.policy, runtime.params, runtime.store)
    return decode.prefill(*fixed, state, [PROMPT])


@pytest.mark.parametrize("link", LINKS)
def test_a_warm_start_hits_and_keeps_the_bits(tmp_path, link):
    runtime = moejax.load("tiny", slots=150, context=128, link=link)
    state, cold, traces = prefilled(runtime, runtime.init_state())
    warm.save(tmp_path / "file", runtime, state)
    state = warm.restore(tmp_path / "file", runtime, runtime.init_state())
    _, logits, again = prefilled(runtime, state)
    assert np.array_equal(cold, logits)
    assert sum(int(t.fetched.sum()) for t in traces) > 0
    assert sum(int(t.fetched.sum()) for t in again) == 0


def test_a_run_leaves_its_residency_for_the_next(tmp_path):
    options = {"slots": 150, "context": 128, "residency_file": tmp_path / "file"}
    first = moejax.load("tiny", **options)
    text = first.generate("The old house", 8)[0].text
    second = moejax.load("tiny", **options)
    assert second.generate("The old house", 8)[0].text == text
    assert first.stats.fetched > 0 and second.stats.fetched == 0


@pytest.mark.parametrize("link", LINKS[1:])
def test_what_a_warm_start_still_has_to_move_is_counted(tmp_path, link):
    options = {"slots": 150, "context": 128, "residency_file": tmp_path / "file", "link": link}
    first = moejax.load("tiny", **options)
    first.generate("The old house", 8)
    second = moejax.load("tiny", **options)
    second.generate("The old house", 8)
    assert second.stats.fetched == 0 and second.stats.hit_rate == 1
    assert second.stats.bytes_moved == first.stats.bytes_moved > 0


def test_a_file_that_could_not_be_written_is_refused_first(tmp_path):
    with pytest.raises(CheckpointError, match="cannot be written"):
        moejax.load("tiny", residency_file=tmp_path / "none" / "file")


def test_what_does_not_fit_is_left_out(tmp_path):
    runtime = moejax.load("tiny", slots=150, context=128)
    state, *_ = prefilled(runtime, runtime.init_state())
    warm.save(tmp_path / "file", runtime, state)
    small = moejax.load("tiny", slots=24, context=128)
    for per_layer in (False, True):
        fresh = decode.init_state(
            small.model, small.policy, small.store, slots=24, context=128, per_layer=per_layer
        )
        restored = warm.restore(tmp_path / "file", small, fresh)
        tables = restored.experts.residency
        owner, slot_of = np.asarray(tables.owner), np.asarray(tables.slot_of)
        assert (owner >= 0).all() and (slot_of[owner] == np.arange(24)).all()
        if per_layer:
            assert (owner // 32 == np.asarray(tables.home)).all()
        _, logits, _ = prefilled(small, restored)
        assert np.isfinite(np.asarray(logits)).all()


def test_full_residency_needs_no_file_to_be_warm(tmp_path):
    runtime = moejax.load("tiny", context=128)
    state = runtime.init_state()
    warm.save(tmp_path / "file", runtime, state)
    assert warm.restore(tmp_path / "file", runtime, state) is state


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"experts": 31}, "another model"),
        ({"format": "other"}, "another model"),
        ({"extra": 1}, "another model"),
        ({"resident": [0, 0]}, "damaged"),
        ({"resident": [192]}, "damaged"),
        ({"resident": [True]}, "damaged"),
        ({"resident": None}, "damaged"),
    ],
)
def test_other_files_are_refused(tmp_path, change, said):
    runtime = moejax.load("tiny", slots=24, context=128)
    warm.save(tmp_path / "file", runtime, runtime.init_state())
    document = json.loads((tmp_path / "file").read_text())
    (tmp_path / "file").write_text(json.dumps(document | change))
    with pytest.raises(CheckpointError, match=said):
        warm.restore(tmp_path / "file", runtime, runtime.init_state())


def test_a_dense_model_and_a_missing_folder_are_refused(tmp_path):
    runtime = moejax.load("tiny", slots=24, context=128)
    state = runtime.init_state()
    with pytest.raises(CheckpointError, match="cannot write"):
        warm.save(tmp_path / "none" / "file", runtime, state)
    with pytest.raises(CheckpointError, match="dense"):
        warm.save(tmp_path / "file", runtime, dataclasses.replace(state, experts=None))
    with pytest.raises(CheckpointError):
        warm.restore(tmp_path / "absent", runtime, state)
    assert jnp.isfinite(state.length).all()
