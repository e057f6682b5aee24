"""The table of distances between experts, and the file that keeps it."""

import dataclasses
import os
import pickle
import shutil
import tracemalloc
import types

import numpy as np
import pytest
from conftest import build, small_config
from hypothesis import given
from hypothesis import strategies as st

import moejax
from moejax import distances, quantise
from moejax.checkpoints import convert
from moejax.checkpoints.convert import DISTANCES
from moejax.checkpoints.headers import read_header
from moejax.errors import CheckpointError, InputError
from moejax.kernels import build as native
from moejax.layout import DTYPES, FORMATS, RecordLayout, aligned_empty
from moejax.loading import read_config, source_path
from moejax.models import config_from_hf, family
from moejax.models.family import weight_map

pytestmark = pytest.mark.usefixtures("own_cache")
TINY = source_path("tiny")


def records_of(layout, values):
    """Records [n, R] of experts given as {part: f32 [n, rows, cols]}, noise in the padding."""
    count = len(values["down"])
    records = aligned_empty((count, layout.elements), layout.bits)
    records[:] = np.random.default_rng(9).integers(1, 200, records.shape)
    for part, matrix in layout.matrices.items():
        if layout.quantised:
            layout.view(records, part)[:] = quantise.quantise(values[part], matrix)
        else:
            layout.view(records, part)[:] = values[part].astype(DTYPES[layout.dtype])
    return records


def drawn(layout, count, rng, scale=1.0):
    shapes = {part: (m.rows, m.cols) for part, m in layout.matrices.items()}
    return {
        part: (rng.normal(size=(count, *shape)) * scale).astype(np.float32)
        for part, shape in shapes.items()
    }


def vectors(layout, records):
    """f64 [n, weights], one row an expert."""
    rows = []
    for record in records:
        parts = []
        for part, matrix in layout.matrices.items():
            data = layout.view(record, part)
            data = quantise.dequantise(data, matrix) if layout.quantised else data
            parts.append(np.asarray(data, np.float64).ravel())
        rows.append(np.concatenate(parts))
    return np.array(rows)


def oracle(layout, records, layers, experts):
    flat = vectors(layout, records).reshape(layers, experts, -1)
    return np.array([[[np.linalg.norm(a - b) for b in layer] for a in layer] for layer in flat])


@given(
    st.sampled_from(FORMATS),
    st.sampled_from([(32, 24), (130, 7), (64, 160)]),
    st.sampled_from([(1, 1), (1, 5), (3, 4)]),
    st.sampled_from([1, 900, 1 << 30]),
    st.integers(0, 2**20),
)
def test_distances_are_those_of_whole_experts(form, widths, shape, block, seed):
    layout = RecordLayout(width=widths[0], expert_width=widths[1], dtype=form)
    rng = np.random.default_rng(seed)
    values = drawn(layout, shape[0] * shape[1], rng, 10.0 ** rng.integers(-3, 3))
    records = records_of(layout, values)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distances, "BLOCK", block)
        got = distances.expert_distances(layout, records, *shape)
    assert got.dtype == np.float32 and got.shape == (*shape, shape[1])
    np.testing.assert_allclose(got, oracle(layout, records, *shape), rtol=1e-6, atol=0)
    assert (got == got.swapaxes(1, 2)).all()
    assert (got[:, np.arange(shape[1]), np.arange(shape[1])] == 0).all()


@pytest.mark.parametrize("form", ["float32", "bfloat16"])
def test_near_experts_keep_their_distance(form):
    layout = RecordLayout(width=64, expert_width=96, dtype=form)
    values = drawn(layout, 1, np.random.default_rng(0))
    values = {part: np.repeat(value, 7, axis=0) for part, value in values.items()}
    for expert, change in enumerate([0, 2.0**-22, 2.0**-16, 2.0**-9, 2.0**-5, 0.5], 1):
        values["down"][expert, 3, 5] = 0.75 + change
    values["down"][0, 3, 5] = 0.75
    records = records_of(layout, values)
    got, true = distances.expert_distances(layout, records, 1, 7), oracle(layout, records, 1, 7)
    np.testing.assert_allclose(got, true, rtol=1e-3, atol=0)
    assert got[0, 0, 1] == 0 < got[0, 0, 5]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_infinitely_far(value):
    layout = RecordLayout(width=16, expert_width=8, dtype="float32")
    values = drawn(layout, 3, np.random.default_rng(0))
    values["gate_up"][1, 2, 3] = value
    got = distances.expert_distances(layout, records_of(layout, values), 1, 3)[0]
    assert np.isinf(got).tolist() == [
        [False, True, False],
        [True, False, True],
        [False, True, False],
    ]
    assert (np.diag(got) == 0).all() and got[0, 2] > 0


@pytest.mark.parametrize("form", ["bfloat16", "int8"])
def test_memory_is_bounded_by_blocks(form):
    layout = RecordLayout(width=1024, expert_width=1024, dtype=form)
    one = records_of(layout, drawn(layout, 1, np.random.default_rng(0)))
    records = np.concatenate([np.roll(one, 4096 * i, axis=1) for i in range(16)])
    tracemalloc.start()
    distances.expert_distances(layout, records, 1, 16)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64 << 20 < records.size * 4  # of f32


SHAPE = (2, 3, 3)
PRINT = bytes(range(32))


def table(seed=0):
    half = np.triu(np.random.default_rng(seed).random(SHAPE).astype(np.float32), 1)
    return half + half.swapaxes(1, 2)


class Counted:
    """A computation that knows how often it ran."""

    def __init__(self, result):
        self.result, self.calls = result, 0

    def __call__(self):
        self.calls += 1
        return self.result


def test_a_table_is_made_once(tmp_path):
    path, compute = tmp_path / "new" / "file.safetensors", Counted(table())
    for _ in range(3):
        got = distances.stored_distances([path], PRINT, SHAPE, compute)
        assert got.tobytes() == table().tobytes() and got.shape == SHAPE
    assert compute.calls == 1 and os.listdir(path.parent) == [path.name]
    assert {t.name: t.shape for t in read_header(path)} == {
        "distances": SHAPE,
        "fingerprint": (32,),
    }
    numpy = pytest.importorskip("safetensors.numpy")
    loaded = numpy.load_file(path)
    assert loaded["distances"].tobytes() == table().tobytes()
    assert loaded["fingerprint"].tobytes() == PRINT


def test_a_table_of_other_weights_is_made_again(tmp_path):
    path = tmp_path / "file"
    distances.stored_distances([path], PRINT, SHAPE, Counted(table()))
    for fingerprint in (PRINT[::-1], PRINT):
        compute = Counted(table(1))
        got = distances.stored_distances([path], fingerprint, SHAPE, compute)
        assert compute.calls == 1 and got.tobytes() == table(1).tobytes()


def damaged():
    """Bytes of files that must not be taken, each beside what is wrong with it."""
    good = distances._file(table(), PRINT)
    yield from ((f"cut at {n}", good[:n]) for n in (0, 5, 8, 60, len(good) // 2, len(good) - 1))
    yield "appended", good + b"\0"
    yield "noise", np.random.default_rng(0).bytes(len(good))
    yield "huge header", (1 << 62).to_bytes(8, "little") + good[8:]
    yield "pickle", pickle.dumps(table())
    deep = b"[" * 100000
    yield "deep", len(deep).to_bytes(8, "little") + deep
    yield "other shape", distances._file(table().reshape(3, 2, 3), PRINT)
    yield "longer print", distances._file(table(), PRINT + b"\0")
    yield "other type", good.replace(b'"F32"', b'"I32"')
    for what, index, value in (
        ("nan", (0, 0, 1), np.nan),
        ("negative", (0, 0, 1), -1),
        ("not symmetric", (1, 2, 0), 7),
        ("far from itself", (1, 2, 2), 1),
    ):
        wrong = table()
        wrong[index] = value
        if what in ("nan", "negative"):
            wrong[0, 1, 0] = value
        yield what, distances._file(wrong, PRINT)


DAMAGED = dict(damaged())


@pytest.mark.parametrize("what", DAMAGED)
def test_damaged_files_are_made_again(tmp_path, what):
    data = DAMAGED[what]
    path, compute = tmp_path / "file", Counted(table())
    path.write_bytes(data)
    for _ in range(2):
        got = distances.stored_distances([path], PRINT, SHAPE, compute)
        assert got.tobytes() == table().tobytes()
    assert compute.calls == 1


def test_a_pipe_is_not_waited_for(tmp_path):
    path, compute = tmp_path / "file", Counted(table())
    os.mkfifo(path)
    distances.stored_distances([path], PRINT, SHAPE, compute)
    assert compute.calls == 1 and path.is_file()


def test_the_first_path_that_can_be_written_is(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    blocked, path, compute = tmp_path / "file" / "x", tmp_path / "y", Counted(table())
    for _ in range(2):
        distances.stored_distances([blocked, path], PRINT, SHAPE, compute)
    assert compute.calls == 1 and path.is_file()
    got = distances.stored_distances([blocked], PRINT, SHAPE, compute)
    assert compute.calls == 2 and got.tobytes() == table().tobytes()


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    distances.stored_distances([path], PRINT, SHAPE, Counted(table()))
    old = path.read_bytes()

    def fails(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fails)
    got = distances.stored_distances([path], PRINT[::-1], SHAPE, Counted(table(1)))
    assert got.tobytes() == table(1).tobytes() and path.read_bytes() == old


def in_memory(built, directory):
    return types.SimpleNamespace(
        store=built.store, config=built.config, model=built.model, directory=directory, link=None
    )


def cached(own_cache):
    folder = own_cache / "moejax" / "distances"
    return sorted(folder.iterdir()) if folder.exists() else []


@pytest.fixture
def made(monkeypatch):
    """How often distances were computed."""
    calls, compute = [], distances.expert_distances

    def counted(*arguments):
        calls.append(arguments)
        return compute(*arguments)

    monkeypatch.setattr(distances, "expert_distances", counted)
    return calls


def test_experts_in_memory_have_their_table_in_the_cache(small, tmp_path, own_cache, made):
    runtime = in_memory(small, tmp_path)
    store = runtime.store
    got = distances.distances_of(runtime)
    np.testing.assert_allclose(
        got, oracle(store.layout, np.asarray(store.records), 2, 8), rtol=1e-6
    )
    assert distances.distances_of(runtime).tobytes() == got.tobytes() and len(made) == 1
    assert len(cached(own_cache)) == 1 and not list(tmp_path.glob("*.safetensors"))
    other = np.array(store.records)
    store.layout.view(other, "down")[5, 0, 0] += 1
    runtime.store = dataclasses.replace(store, records=other)
    assert not np.array_equal(distances.distances_of(runtime), got)
    assert len(made) == 2 and len(cached(own_cache)) == 2
    turned = np.array(store.records)
    store.layout.view(turned, "gate_up")[3] = store.layout.view(other, "gate_up")[3, ::-1]
    runtime.store = dataclasses.replace(store, records=turned)
    assert not np.array_equal(distances.distances_of(runtime), got)
    distances.distances_of(in_memory(build(small_config(), "bfloat16"), tmp_path))
    assert len(made) == 4


def converted(target, quant=None, source=TINY):
    config = config_from_hf(read_config(TINY))
    weights = weight_map(config, family(config.model_type).rules, "bfloat16")
    convert.convert_directory(source, target, weights, quant=quant, force=True)
    return target


LINKS = [None, "disk", "paced:4,10"] if native.library() else [None]


@pytest.mark.parametrize("quant", [None, "int4"])
def test_a_converted_model_has_its_table_beside_it(tmp_path, own_cache, made, quant):
    directory = converted(tmp_path / "model", quant)
    found = []
    for link in LINKS:
        runtime = moejax.load(directory, slots=32, context=64, link=link)
        found.append(distances.distances_of(runtime))
    assert len(made) == 1 and not cached(own_cache) and (directory / DISTANCES).is_file()
    assert len({got.tobytes() for got in found}) == 1
    layers, experts = runtime.config.num_moe_layers, runtime.config.num_experts
    records = np.array(convert.open_bank(directory / convert.BANK).records)
    true = oracle(runtime.store.layout, records[:experts], 1, experts)
    np.testing.assert_allclose(found[0][:1], true, rtol=1e-6)
    assert found[0].shape == (layers, experts, experts)


def test_a_bank_of_other_weights_makes_the_table_stale(tmp_path, made):
    directory = converted(tmp_path / "model")
    first = distances.distances_of(moejax.load(directory, context=64))
    kept = (directory / DISTANCES).read_bytes()
    shutil.rmtree(directory)
    converted(directory, "int8")
    (directory / DISTANCES).write_bytes(kept)
    again = distances.distances_of(moejax.load(directory, context=64))
    assert len(made) == 2 and not np.array_equal(first, again)
    np.testing.assert_allclose(again, first, rtol=0.05, atol=1e-6)


def test_one_other_weight_makes_the_table_stale(tmp_path, made):
    source = shutil.copytree(TINY, tmp_path / "source")
    first = distances.distances_of(moejax.load(converted(tmp_path / "a", source=source)))
    [file] = source.glob("*.safetensors")
    tensor = next(t for t in read_header(file) if ".experts.3." in t.name)
    with open(file, "r+b") as data:
        data.seek(tensor.start)
        data.write(bytes(2))
    target = converted(tmp_path / "b", source=source)
    shutil.copy(tmp_path / "a" / DISTANCES, target)
    again = distances.distances_of(moejax.load(target))
    assert len(made) == 2 and not np.array_equal(again, first)


def test_a_table_of_another_version_is_made_again(small, tmp_path, made, monkeypatch):
    for version in (1, 2, 2):
        monkeypatch.setattr(distances, "VERSION", version)
        distances.distances_of(in_memory(small, tmp_path))
    assert len(made) == 2


@pytest.mark.skipif(native.library() is None, reason="links need the native library")
def test_experts_on_the_disk_are_read_from_their_bank(own_cache, made):
    plain = distances.distances_of(moejax.load("tiny", context=64))
    runtime = moejax.load("tiny", slots=32, context=64, link="disk")
    assert runtime.store.records is None
    assert np.array_equal(distances.distances_of(runtime), plain)
    [bank] = (own_cache / "moejax" / "banks").iterdir()
    assert (bank / DISTANCES).is_file()
    assert len(made) == 2
    assert np.array_equal(distances.distances_of(runtime), plain) and len(made) == 2


def test_a_directory_that_cannot_be_written_leaves_it_to_the_cache(tmp_path, own_cache, made):
    directory = converted(tmp_path / "model")
    (directory / (DISTANCES + ".tmp")).mkdir()
    runtime = moejax.load(directory, context=64)
    for _ in range(2):
        distances.distances_of(runtime)
    assert len(made) == 1 and len(cached(own_cache)) == 1


def test_what_cannot_be_compared_is_refused(small, tmp_path):
    runtime = in_memory(small, tmp_path)
    runtime.store = dataclasses.replace(small.store, records=None)
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(InputError, match="several models: convert the one"):
        distances.distances_of(runtime)
    runtime.store = None
    with pytest.raises(InputError, match="no experts"):
        distances.distances_of(runtime)


def test_a_bank_of_another_model_is_refused(small, tmp_path):
    runtime = in_memory(small, converted(tmp_path / "model"))
    with pytest.raises(CheckpointError, match="holds"):
        distances.distances_of(runtime)
