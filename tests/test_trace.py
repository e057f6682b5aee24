"""Traces: the file and what it refuses, slices, imports, statistics, and the commands for them."""

import csv
import dataclasses
import io
import itertools
import json
import lzma
import pathlib
import tracemalloc
import zipfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from moejax.cli.traces import app
from moejax.config import ModelConfig
from moejax.errors import InputError
from moejax.traces import file as trace_file
from moejax.traces import importers as trace_import
from moejax.traces import statistics as trace_stats
from moejax.traces.form import COLUMNS, READS
from moejax.traces.trace import Outcome, Phase, Trace, concatenated

BIG_MOE = pathlib.Path(__file__).parents[2] / "shared" / "data" / "traces" / "bigmoeonedge"
needs_traces = pytest.mark.skipif(not BIG_MOE.is_dir(), reason=f"no traces at {BIG_MOE}")


def made(seed, *, rows=12, layers=2, top_k=2, experts=5, optional=True, **changes) -> Trace:
    """A trace of random routing: prefill, decode and verification, of two sequences."""
    rng = np.random.default_rng(seed)
    run = np.sort(rng.integers(0, rows, rows))
    run = np.unique(run, return_inverse=True)[1].astype(np.int32)
    passes, most = int(run[-1]) + 1, min(3, experts)
    scores = rng.random((rows, layers, experts)).astype(np.float16)
    ids = np.argsort(-scores.astype(np.float32), axis=2, kind="stable")
    fields = {
        "model": f"random {seed} ü",
        "experts": experts,
        "sequence": rng.integers(0, 2, rows).astype(np.int32),
        "position": rng.integers(0, 50, rows).astype(np.int32),
        "run": run,
        "phase": rng.choice([0, 1, 3], passes)[run].astype(np.uint8),
        "token": rng.integers(-1, 99, rows).astype(np.int32),
        "accepted": rng.random(rows) < 0.8,
        "picks": ids[:, :, :top_k].astype(np.int16),
        "about": {"policy": "lru", "slots": 3, "nested": {"a": [1, None, "é"]}},
    }
    if optional:
        reads = int(rng.integers(0, 7))
        times = np.sort(rng.random((3, reads)) * 1e6, axis=0)
        fields |= {
            "weights": rng.random((rows, layers, top_k)).astype(np.float32),
            "scores": scores,
            "top_ids": ids[:, :, :most].astype(np.int16),
            "top_scores": np.take_along_axis(scores, ids[:, :, :most], axis=2),
            "outcome": rng.integers(0, 7, (rows, layers, top_k)).astype(np.uint8),
            "exact": ids[:, :, -top_k:].astype(np.int16),
            "resident": rng.random((passes, layers, experts)) < 0.5,
            "began": np.cumsum(rng.random(passes)),
            "seconds": rng.random(passes),
            "counts": {
                "hits": rng.integers(0, 9, (passes, layers)).astype(np.int32),
                "replaced_mass": rng.random((passes, layers)).astype(np.float32),
            },
            "reads": {
                "expert": rng.integers(0, layers * experts, reads).astype(np.int32),
                **dict(zip(("requested_us", "begun_us", "landed_us"), times, strict=True)),
                "kind": rng.integers(0, 3, reads).astype(np.uint8),
                "run": rng.integers(0, passes, reads).astype(np.int32),
            },
        }
    return Trace(**fields | changes)


def arrays(trace: Trace) -> dict[str, np.ndarray]:
    found = dict(trace.columns())
    found |= {f"counts/{name}": column for name, column in trace.counts.items()}
    return found | {f"reads/{name}": column for name, column in trace.reads.items()}


def same(one: Trace, other: Trace) -> None:
    assert (one.model, one.experts, one.about) == (other.model, other.experts, other.about)
    mine, theirs = arrays(one), arrays(other)
    assert mine.keys() == theirs.keys()
    for name, column in mine.items():
        assert column.dtype == theirs[name].dtype and column.shape == theirs[name].shape, name
        assert column.tobytes() == theirs[name].tobytes(), name


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "trace.npz"
    made(1).save(path)
    return path


# --- the file


@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(1, 30),
    layers=st.integers(1, 4),
    top_k=st.integers(1, 4),
    more=st.integers(0, 6),
    optional=st.booleans(),
    kind=st.sampled_from([np.float16, np.float32]),
)
def test_a_trace_comes_back_as_it_was(
    tmp_path_factory, seed, rows, layers, top_k, more, optional, kind
):
    sizes = {"rows": rows, "layers": layers, "top_k": top_k, "experts": top_k + more}
    trace = made(seed, **sizes, optional=optional)
    if optional:
        scores = {name: getattr(trace, name).astype(kind) for name in ("scores", "top_scores")}
        trace = dataclasses.replace(trace, **scores).check()
    folder = tmp_path_factory.mktemp("round", numbered=True)
    trace.save(folder / "a")
    back = Trace.load(folder / "a")
    same(trace, back)
    back.save(folder / "b")
    assert (folder / "a").read_bytes() == (folder / "b").read_bytes()
    assert sorted(path.name for path in folder.iterdir()) == ["a", "b"]
    with np.load(folder / "a", allow_pickle=False) as plain:  # any program can read it
        assert json.loads(plain["header.json"])["format"] == "moejax-trace"
        for name, column in arrays(trace).items():
            np.testing.assert_array_equal(plain[name], column)


def test_a_trace_that_cannot_be_written_leaves_the_old_one(saved):
    before = saved.read_bytes()
    for broken in ({"about": {"x": float("nan")}}, {"about": {"x": object()}}, {"experts": 0}):
        with pytest.raises(InputError):
            dataclasses.replace(made(2), **broken).save(saved)
        assert saved.read_bytes() == before and [*saved.parent.iterdir()] == [saved]
    with pytest.raises(InputError, match="cannot write"):
        made(2).save(saved / "below")


def test_a_full_disk_leaves_nothing(saved, monkeypatch):
    before = saved.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(trace_file.os, "fsync", full)
    with pytest.raises(InputError, match="No space left"):
        made(3).save(saved)
    assert saved.read_bytes() == before and [*saved.parent.iterdir()] == [saved]


def rewritten(path, change=None, header=None, drop=(), extra=None, dtype=None):
    """The file with its members changed, zipped anew with right checksums."""
    with zipfile.ZipFile(path) as old:
        members = {name: old.read(name) for name in old.namelist()}
    about = json.loads(members["header.json"])
    for name, array in (change or {}).items():
        file = io.BytesIO()
        np.save(file, array, allow_pickle=True)
        members[f"{name}.npy"] = file.getvalue()
        about["columns"][name] = {"dtype": array.dtype.str, "shape": list(array.shape)}
    for name in drop:
        del members[f"{name}.npy"], about["columns"][name]
    members["header.json"] = json.dumps(about | (header or {})).encode()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for name, data in (members | (extra or {})).items():
            new.writestr(name, data)
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"header": {"format": "other"}}, "not a trace"),
        ({"header": {"version": 2}}, "version 2.*reads version 1"),
        ({"header": {"experts": 2.0}}, "'experts'"),
        ({"header": {"experts": -3}}, "experts"),
        ({"header": {"model": None}}, "'model'"),
        ({"header": {"about": []}}, "'about'"),
        ({"header": {"columns": {}}}, "unknown, or is not both"),
        ({"extra": {"evil.npy": b""}}, "unknown, or is not both"),
        ({"extra": {"header.json": b"{"}}, "no JSON"),
        ({"extra": {"header.json": b"[" * 100_000}}, "no JSON"),
        ({"extra": {"picks.npy": b"\x93NUMPY\x01\x00"}}, "no NumPy array"),
        ({"drop": ["picks"]}, "no column 'picks'"),
        ({"drop": ["top_ids"]}, "belong together"),
        ({"change": {"picks": np.zeros((12, 2, 2), np.int64)}}, "int16"),
        ({"change": {"picks": np.zeros((12, 2), np.int16)}}, "picks"),
        ({"change": {"token": np.zeros(11, np.int32)}}, "token.*N=12"),
        ({"change": {"token": np.array([None] * 12)}}, "token"),
        ({"change": {"picks": np.full((12, 2, 2), 5, np.int16)}}, r"\[-1, 5\)"),
        ({"change": {"weights": np.full((12, 2, 2), np.nan, np.float32)}}, "NaN"),
        ({"change": {"phase": np.full(12, 9, np.uint8)}}, "phase"),
        ({"change": {"counts/hits": np.zeros((1, 2), np.int32)}}, "hits"),
        ({"change": {"counts/x y": np.zeros((1, 2), np.int32)}}, "unknown"),
        ({"change": {"reads/when": np.zeros(3, np.int32)}}, "unknown"),
        ({"change": {"seconds": np.full(12, -1.0)}}, "seconds"),
    ],
)
def test_a_wrong_file_says_what_is_wrong(saved, changes, message):
    with pytest.raises(InputError, match=message):
        Trace.load(rewritten(saved, **changes))


def test_a_torn_file_is_refused_wherever_it_is_torn(saved):
    whole = saved.read_bytes()
    for length in {0, 1, 10, *range(100, len(whole), 97), len(whole) - 1}:
        saved.write_bytes(whole[:length])
        with pytest.raises(InputError, match="not a trace"):
            Trace.load(saved)
    with pytest.raises(InputError, match="cannot read"):
        Trace.load(saved.parent)
    with pytest.raises(InputError, match=r"^there is no file [^ ]*none\.npz$"):
        Trace.load(saved.parent / "none.npz")


def test_flipped_bits_are_an_error_or_no_change(saved):
    whole, rng = saved.read_bytes(), np.random.default_rng(0)
    trace, refused = Trace.load(saved), 0
    for _ in range(300):
        torn = bytearray(whole)
        torn[rng.integers(len(torn))] ^= 1 << rng.integers(8)
        saved.write_bytes(torn)
        try:
            back = Trace.load(saved)
        except InputError:
            refused += 1
        else:
            same(trace, back)
    assert refused > 150


def test_a_hostile_file_costs_no_memory(saved):
    huge = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        huge, {"descr": "<i4", "fortran_order": False, "shape": (2**40,)}
    )
    stated = {"dtype": "<i4", "shape": [2**40]}
    with zipfile.ZipFile(saved) as old:
        header = json.loads(old.read("header.json"))
    header["columns"] |= dict.fromkeys(("run", "sequence"), stated)
    lying = {f"{name}.npy": huge.getvalue() for name in ("run", "sequence")}
    bomb = {"picks.npy": bytes(300 << 20)}
    for extra in (lying | {"header.json": json.dumps(header).encode()}, bomb):
        rewritten(saved, extra=extra)
        tracemalloc.start()
        try:
            with pytest.raises(InputError, match="as long as its shape|unpacks to"):
                Trace.load(saved)
            assert tracemalloc.get_traced_memory()[1] < 8 << 20
        finally:
            tracemalloc.stop()
        made(1).save(saved)


@pytest.mark.parametrize(
    ("about", "message"),
    [
        ({"record_bytes": "many"}, "record_bytes 'many'"),
        ({"record_bytes": True}, "record_bytes True"),
        ({"router": "softmax"}, "must have normalize"),
        ({"router": {"normalize": True, "colour": 1}}, "must have normalize"),
        ({"router": {"normalize": 1}}, "normalize 1 .* not a bool"),
        ({"router": {"normalize": True, "num_groups": 0}}, "num_groups 0 .* not a int"),
        ({"router": {"normalize": True, "num_groups": 2}}, "1 of 2 groups of its 5 experts"),
        ({"router": {"normalize": True, "num_groups": 5, "top_groups": 6}}, "6 of 5 groups"),
        ({"source": ["moejax"]}, "source of a trace must be text"),
    ],
)
def test_what_is_read_of_about_is_checked(about, message):
    with pytest.raises(InputError, match=message):
        made(1, about=about).check()
    made(1, about={"router": {"normalize": False, "scale": 2}, "record_bytes": 1}).check()


def test_sizes_and_times_are_bounded(tmp_path, monkeypatch):
    wide = np.zeros((1, 4097, 1), np.int16)
    row = {"rows": 1, "top_k": 1, "optional": False}
    for experts in (5, 2000):
        layers = 4097 if experts == 5 else 501
        with pytest.raises(InputError, match="layers and 1000000 experts in all"):
            made(1, **row, experts=experts, picks=wide[:, :layers]).check()
    with pytest.raises(InputError, match="bytes of JSON"):
        made(1, about={"note": "x" * (1 << 20)}).save(tmp_path / "long")
    far = made(1)
    with pytest.raises(InputError, match=r"seconds of a trace must be in \[0, 1e\+09\]"):
        dataclasses.replace(far, seconds=far.seconds + 1e300).check()
    reads = {"expert": np.zeros(1, np.int32), "landed_us": np.full(1, 1e306)}
    with pytest.raises(InputError, match="reads/landed_us of a trace is further"):
        dataclasses.replace(far, reads=reads).check()
    path = tmp_path / "table.jsonl.xz"
    path.write_bytes(lzma.compress(b"\n" * 100_000))
    monkeypatch.setattr(trace_import, "MOST_TEXT", 50_000)
    with pytest.raises(InputError, match="line 50001 ends more than 50000 characters"):
        trace_import.read(path)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_zip_that_tricks_is_refused(saved):
    """A column that is there twice, one packed in another way, and one in Fortran's order."""
    with zipfile.ZipFile(saved, "a") as archive:
        archive.writestr("picks.npy", archive.read("picks.npy"))
    with pytest.raises(InputError, match="twice"):
        Trace.load(saved)
    for method, message in ((zipfile.ZIP_BZIP2, "not deflated"), (zipfile.ZIP_DEFLATED, None)):
        made(1).save(saved)
        with zipfile.ZipFile(saved) as old:
            members = {name: old.read(name) for name in old.namelist()}
        with zipfile.ZipFile(saved, "w", method) as new:
            for name, data in members.items():
                new.writestr(name, data)
        if message is None:
            same(Trace.load(saved), made(1))
        else:
            with pytest.raises(InputError, match=message):
                Trace.load(saved)
    turned = np.asfortranarray(made(1).picks)
    assert not turned.flags.c_contiguous
    with pytest.raises(InputError, match="C order"):
        Trace.load(rewritten(saved, change={"picks": turned}))
    other = {"header": {"columns": {n: {"dtype": "<i4", "shape": [1]} for n in arrays(made(1))}}}
    made(1).save(saved)
    with pytest.raises(InputError, match="does not say"):
        Trace.load(rewritten(saved, **other))


# --- the object


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"picks": [[1]]}, "NumPy array"),
        ({"run": np.zeros(0, np.int32)}, "no rows"),
        ({"experts": 1 << 15}, "experts"),
        ({"sequence": np.full(12, -1, np.int32)}, "sequence -1"),
        ({"top_scores": None}, "belong together"),
        ({"scores": np.full((12, 2, 5), np.inf, np.float16)}, "scores of a trace hold NaN"),
        ({"outcome": np.full((12, 2, 2), 7, np.uint8)}, "outcome 7"),
        ({"seconds": None}, "needs seconds"),
        ({"reads": {"expert": np.array([10], np.int32)}}, r"\[-1, 10\)"),
        ({"reads": {"expert": np.zeros(1, np.int32), "kind": np.zeros(2, np.uint8)}}, "kind"),
        ({"reads": {"why": np.zeros(1)}}, "unknown"),
        ({"optional": False, "run": np.arange(12, dtype=np.int32) + 1}, "numbered from 0"),
        ({"optional": False, "run": np.array([0, 1] * 6, np.int32)}, "adjacent"),
        ({"optional": False, "run": np.arange(12, dtype=np.int32) * 2}, "without gaps"),
        ({"phase": np.arange(12).astype(np.uint8) % 2}, "several phases"),
    ],
)
def test_a_trace_that_cannot_be_is_refused(changes, message):
    with pytest.raises(InputError, match=message):
        made(4, **changes).check()


@given(seed=st.integers(0, 10**6), rows=st.integers(1, 25))
def test_slices_are_those_of_a_list_of_rows(seed, rows):
    trace, rng = made(seed, rows=rows), np.random.default_rng(seed)
    bounds = trace.offsets()
    for p in range(trace.passes):
        own = np.flatnonzero(trace.run == p)
        assert (bounds[p], bounds[p + 1]) == (own[0], own[-1] + 1)
        assert trace.rows_of(p) == slice(own[0], own[-1] + 1)
    chosen = rng.random(trace.passes) < 0.6
    if not chosen.any():
        with pytest.raises(InputError, match="no pass"):
            trace.of_passes(chosen)
        return
    part = trace.of_passes(chosen).check()
    numbers = [p for p in range(trace.passes) if chosen[p]]
    rows_kept = [n for n in range(rows) if trace.run[n] in numbers]
    assert [numbers[p] for p in part.run] == [trace.run[n] for n in rows_kept]
    reads = [r for r in range(len(trace.reads["run"])) if trace.reads["run"][r] in numbers]
    for name, column in arrays(part).items():
        whole = arrays(trace)[name]
        kind = (COLUMNS | {f"reads/{n}": f for n, f in READS.items()}).get(name, ("", "P"))[1][0]
        if name == "run" or name == "reads/run":
            continue
        index = {"N": rows_kept, "P": numbers, "R": reads}[kind]
        np.testing.assert_array_equal(column, whole[index], err_msg=name)
    first, last = sorted(rng.integers(0, trace.passes + 1, 2))
    if first < last:
        same(
            trace.between(first, last),
            trace.of_passes((np.arange(trace.passes) >= first) & (np.arange(trace.passes) < last)),
        )
    for phase in set(trace.phase):
        kept = trace.of_phase(phase)
        np.testing.assert_array_equal(kept.token, trace.token[trace.phase == phase])
    for number in set(trace.sequence):
        own = trace.of_sequences(number).check()
        np.testing.assert_array_equal(own.picks, trace.picks[trace.sequence == number])
        shared = {p for p in trace.run if len(set(trace.sequence[trace.run == p])) > 1}
        torn = any(p in shared for p in trace.run[trace.sequence == number])
        assert (own.seconds is None, not own.counts) == (torn, torn)


def test_slices_of_nothing_say_so():
    trace = made(0, phase=np.full(12, Phase.DECODE, np.uint8))
    with pytest.raises(InputError, match="no prefill or draft passes"):
        trace.of_phase(Phase.PREFILL, Phase.DRAFT)
    with pytest.raises(InputError, match="no sequence 7"):
        trace.of_sequences(7)
    with pytest.raises(InputError, match="there is no pass 99"):
        trace.rows_of(99)


@given(seeds=st.lists(st.integers(0, 10**6), min_size=1, max_size=4))
def test_joined_traces_are_their_parts_one_after_the_other(seeds):
    parts = [dataclasses.replace(made(seed), model="one") for seed in seeds]
    whole, passes, sequences, rows, end = concatenated(parts).check(), 0, 0, 0, 0.0
    for part in parts:
        own = whole.between(passes, passes + part.passes)
        np.testing.assert_array_equal(own.sequence - sequences, part.sequence)
        np.testing.assert_array_equal(own.picks, part.picks)
        np.testing.assert_allclose(own.began - end, part.began)
        np.testing.assert_allclose(own.reads["landed_us"] - end * 1e6, part.reads["landed_us"])
        for name in ("hits", "replaced_mass"):
            np.testing.assert_array_equal(own.counts[name], part.counts[name])
        passes, rows = passes + part.passes, rows + part.rows
        sequences, end = (
            sequences + part.sequence.max() + 1,
            end + part.began[-1] + part.seconds[-1],
        )
    assert (whole.passes, whole.rows) == (passes, rows)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"experts": 9}, "number of experts"),
        ({"layers": 3}, "layers"),
        ({"optional": False}, "scores"),
        ({"seconds": None, "began": None}, "columns"),
        ({"model": "another"}, "model"),
        ({"counts": {}}, "counts"),
    ],
)
def test_unlike_traces_are_not_joined(other, message):
    with pytest.raises(InputError, match=message):
        concatenated([made(0), made(0, **other)])


def test_a_trace_knows_its_model():
    config = object.__new__(ModelConfig)
    for name, value in (("moe_layers", (0, 1)), ("num_experts", 5), ("top_k", 2)):
        object.__setattr__(config, name, value)
    made(0).check_model(config)
    object.__setattr__(config, "num_experts", 6)
    with pytest.raises(InputError, match="2 layers of 5 experts.*2 of 6"):
        made(0).check_model(config)


# --- imports


def routes(path):
    """BigMoeOnEdge's events, read without moejax: (phase, step, layer) -> [(expert, residency)]."""
    with lzma.open(path, "rt") as file:
        rows = csv.DictReader(line for line in file if not line.startswith("#"))
        events = {}
        for row in rows:
            key = tuple(int(row[name]) for name in ("phase", "step", "layer"))
            pick = int(row["expert"]), int(row["residency"]), float(row["weight"])
            events.setdefault(key, []).append(pick)
    return events


@needs_traces
@pytest.mark.parametrize(
    ("name", "layers", "record", "events", "lag1"),
    [("qwen", 48, 3059712, 7461, 0.380), ("gemma", 30, 4336640, 4710, 0.357)],
)
def test_big_moe_on_edge_comes_in_whole(tmp_path, name, layers, record, events, lag1):
    path = BIG_MOE / f"{name}.route.csv.xz"
    done = CliRunner().invoke(app, ["import", str(path), str(tmp_path / "t"), "--json"])
    assert done.exit_code == 0, done.output
    trace, wanted = Trace.load(tmp_path / "t"), routes(path)
    assert (trace.layers, trace.experts, trace.top_k) == (layers, 128, 6)
    assert trace.about["record_bytes"] == record and len(wanted) == events
    # One pass for the prompt, one for each token after it.
    prompt = int((trace.phase == Phase.PREFILL).sum())
    assert trace.passes == 1 + 128 and trace.rows == prompt + 128
    kinds = [Outcome.MISS, Outcome.HIT, Outcome.PREFETCHED]
    seen = 0
    for n, layer in itertools.product(range(trace.rows), range(layers)):
        own = wanted.get((trace.phase[n], trace.position[n], layer))
        if own is None:
            assert (trace.picks[n, layer] == -1).all()
            continue
        expert, residency, weight = zip(*own, strict=True)
        seen += 1
        assert trace.picks[n, layer].tolist() == list(expert)
        assert trace.outcome[n, layer].tolist() == [kinds[r] for r in residency]
        np.testing.assert_array_equal(trace.weights[n, layer], np.array(weight, np.float32))
    assert seen == events
    found = trace_stats.statistics(trace)
    assert found.rows == 128 and abs(found.overlap[1] - lag1) < 5e-4
    assert found.stack_distance["0.5"] > 0 and found.score_by_rank is None


def big_moe(*rows, head="# route_trace v1\n# model=/x/My-Model.gguf n_expert=8\n"):
    columns = "turn,phase,step,layer,slot,expert,weight,residency,expert_bytes\n"
    return head + columns + "".join(",".join(map(str, row)) + "\n" for row in rows)


def test_a_second_turn_goes_on_or_begins_anew(tmp_path):
    def rows(turn, start):
        picks = [(0, start), (0, start + 1), (1, start + 2), (1, start + 3)]
        return [(turn, p, s, 0, k, (s + k) % 8, 0.5, 0, 0) for p, s in picks for k in (0, 1)]

    path = tmp_path / "a.route.csv"
    path.write_text(big_moe(*rows(0, 0), *rows(1, 4), *rows(2, 0)))
    trace = trace_import.read(path)
    assert trace.model == "My-Model" and trace.experts == 8
    assert trace.sequence.tolist() == [0] * 8 + [1] * 4
    assert trace.run.tolist() == [0, 0, 1, 2, 3, 3, 4, 5, 6, 6, 7, 8]
    assert trace.position.tolist() == [*range(8), *range(4)]


@given(seed=st.integers(0, 10**6), weighted=st.booleans(), compress=st.booleans())
@settings(max_examples=8)
def test_tables_say_the_same_in_csv_and_json(tmp_path_factory, seed, weighted, compress):
    """Layers as the model counts them, in layer-major order, and short rows."""
    rng, folder = np.random.default_rng(seed), tmp_path_factory.mktemp("table")
    rows = []
    for layer, (sequence, token) in itertools.product((1, 3), ((4, 0), (4, 1), (9, 0), (9, 1))):
        chosen = rng.permutation(7)[: rng.integers(1, 4)].tolist()
        row = {"token": token, "layer": layer, "experts": chosen, "sequence": sequence}
        row |= {"phase": "decode" if (sequence, token) == (9, 1) else "prefill", "id": token + 5}
        rows.append(row | ({"weights": rng.random(len(chosen)).tolist()} if weighted else {}))
    lines = [json.dumps(row) for row in rows]
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0])
    writer.writeheader()
    for row in rows:
        several = {n: " ".join(map(str, v)) for n, v in row.items() if isinstance(v, list)}
        writer.writerow(row | several)
    found = []
    for name, content in (("t.jsonl", "\n".join(lines) + "\n"), ("t.csv", text.getvalue())):
        path = folder / (name + ".xz" * compress)
        opener = lzma.open if compress else open
        with opener(path, "wt", encoding="utf-8") as file:
            file.write(content)
        found.append(trace_import.read(path, experts=9))
    one, other = (dataclasses.replace(trace, about={}) for trace in found)
    same(one, other)
    assert found[0].about["layer_numbers"] == [1, 3] and found[0].experts == 9
    assert one.run.tolist() == [0, 0, 1, 2] and one.token.tolist() == [5, 6, 5, 6]
    for row in rows:
        [at] = np.flatnonzero((one.sequence == row["sequence"]) & (one.position == row["token"]))
        layer = (1, 3).index(row["layer"])
        chosen = one.picks[at, layer]
        assert chosen[chosen >= 0].tolist() == row["experts"]
        if weighted:
            own = one.weights[at, layer, : len(row["weights"])]
            np.testing.assert_array_equal(own, np.array(row["weights"], np.float32))


GOOD = (0, 0, 0, 0, 0, 1, 0.5, 0, 9)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "", "no picks"),
        ("a.csv", "token,layer,experts\n", "no picks"),
        ("a.csv", "token,layer\n0,0\n", "line 2 has no experts"),
        ("a.csv", "token,layer,experts\n0,0,1 x\n", "line 2 has expert 'x'"),
        ("a.csv", "token,layer,experts\n0,0,1\n0,0,2\n", "more than once"),
        ("a.csv", "token,layer,experts\n0,5000,1\n", "line 2 has layer '5000'"),
        ("a.csv", "token,layer,experts\n0,-1,1\n", "line 2 has layer '-1'"),
        ("a.csv", "token,layer,experts,weights\n0,0,1,nan\n", "weight 'nan'"),
        ("a.csv", "token,layer,experts,weights\n0,0,1,1 2\n", "2 weights for 1"),
        ("a.csv", "token,layer,experts,phase\n0,0,1,later\n", "phase 'later'"),
        ("a.csv", "token,layer,experts\n" + "1" * (1 << 20), "too long"),
        ("a.jsonl", "{}\n", "line 1 has no token"),
        ("a.jsonl", '{"token": 0, "layer": 0, "experts": [1]}\n[1]\n', "line 2 is no JSON"),
        ("a.jsonl", '{"token": true, "layer": 0, "experts": [1]}\n', "token True"),
        ("a.jsonl", '{"token": 0, "layer": 0, "experts": []}\n', "1 to 1024 numbers"),
        ("a.jsonl", '{"token": 0, "layer": 0, "experts": [40000]}\n', "expert 40000"),
        ("a.csv", big_moe(GOOD, head="# route_trace v7\n"), "route_trace v1"),
        ("a.csv", big_moe((0, 0, 0, 0, 0, 8, 0.5, 0, 9)), "line 4 has expert '8'"),
        ("a.csv", big_moe(GOOD, (0, 2, 1, 0, 0, 1, 0.5, 0, 9)), "line 5 has phase '2'"),
        ("a.csv", big_moe((0, 0, 0, 0, 0, 1, "inf", 0, 9)), "weight 'inf'"),
        ("a.csv", big_moe((0, 0, 0, 0, 0, 1, 0.5, 3, 9)), "residency '3'"),
        ("a.csv", big_moe(GOOD, GOOD), "more than once"),
        ("a.csv.xz", "not compressed", "cannot read"),
    ],
)
def test_a_wrong_table_says_where(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    done = CliRunner().invoke(app, ["import", str(tmp_path / name), str(tmp_path / "out")])
    assert done.exit_code == 2 and not (tmp_path / "out").exists()
    with pytest.raises(InputError, match=message):
        trace_import.read(tmp_path / name)


def test_an_import_replaces_a_file_only_if_it_is_told_to(tmp_path):
    table, out = tmp_path / "a.csv", tmp_path / "out"
    table.write_text("token,layer,experts\n0,0,1 2\n")
    out.write_text("words")
    kept = CliRunner().invoke(app, ["import", str(table), str(out)])
    assert kept.exit_code == 2 and f"{out} exists" in kept.stderr and "--force" in kept.stderr
    assert out.read_text() == "words"
    done = CliRunner().invoke(app, ["import", str(table), str(out), "--force"])
    assert done.exit_code == 0 and Trace.load(out).rows == 1


# --- statistics


def stacks(picks, experts):
    """Reuse by an explicit list per layer, the last used first."""
    since, distance = np.full(picks.shape, -2), np.full(picks.shape, -2)
    for layer in range(picks.shape[1]):
        stack, row_of = [], {}
        for n, row in enumerate(picks[:, layer]):
            for k, expert in enumerate(row):
                if expert < 0:
                    continue
                known = expert in stack
                distance[n, layer, k] = stack.index(expert) if known else -1
                since[n, layer, k] = n - row_of[expert] if known else -1
                if known:
                    stack.remove(expert)
                stack.insert(0, expert)
                row_of[expert] = n
    return since, distance


@given(seed=st.integers(0, 10**6), holes=st.booleans(), phase=st.sampled_from(["decode", "all"]))
def test_statistics_are_those_of_plain_loops(seed, holes, phase):
    rng = np.random.default_rng(seed)
    rows, layers, experts = 40, 2, 6
    trace = made(seed, rows=rows, layers=layers, experts=experts, top_k=3)
    picks = trace.picks.copy()
    if holes:
        picks[rng.random(picks.shape[:2]) < 0.2] = -1
        picks[rng.random(picks.shape) < 0.2] = -1
    position = np.concatenate([np.sort(rng.permutation(30)[:20]) for _ in range(2)])
    sequence = np.repeat([0, 1], 20)
    trace = dataclasses.replace(
        trace,
        picks=picks,
        position=position.astype(np.int32),
        sequence=sequence.astype(np.int32),
    ).check()
    kept = [n for n in range(rows) if trace.accepted[n] and (phase == "all" or trace.phase[n])]
    if not kept:
        with pytest.raises(InputError, match="no decode rows"):
            trace_stats.statistics(trace, phase)
        return
    found = trace_stats.statistics(trace, phase)
    sets = {(sequence[n], position[n]): [set(p[p >= 0]) for p in picks[n]] for n in kept}
    for lag in (1, 2, 8):
        means = []
        for layer in range(layers):
            shares = []
            for (s, p), own in sets.items():
                before = sets.get((s, p - lag))
                if before and own[layer] and before[layer]:
                    shares.append(len(own[layer] & before[layer]) / len(own[layer]))
            means.append(np.mean(shares) if shares else None)
        assert found.overlap_by_layer[lag] == [
            None if m is None else pytest.approx(m) for m in means
        ]
    for window in (1, 3, 16):
        means = []
        for layer in range(layers):
            one = np.mean([len(own[layer]) for own in sets.values()])
            unions = [
                len(set().union(*(sets[s, p + i][layer] for i in range(window))))
                for s, p in sets
                if all((s, p + i) in sets for i in range(window))
            ]
            means += [np.mean(unions) / one] if unions and one else []
        expected = pytest.approx(np.mean(means)) if means else None
        assert found.union[window] == expected
    since, distance = stacks(picks[kept], experts)
    own = trace_stats.stack_distances(picks[kept], experts)
    np.testing.assert_array_equal(own, (since, distance))
    used = since > -2
    assert found.first_uses == pytest.approx((since == -1).sum() / max(used.sum(), 1))
    if (since >= 0).any():
        assert found.stack_distance["0.5"] == np.median(distance[since >= 0])
        assert found.reuse_tokens["0.5"] == np.median(since[since >= 0])
        assert found.reused_within[2] == pytest.approx(
            ((since >= 0) & (since <= 2)).sum() / used.sum()
        )
    entropies, ginis = [], []
    for layer in range(layers):
        uses = np.array([(picks[kept, layer] == e).sum() for e in range(experts)])
        share = uses / max(uses.sum(), 1)
        entropies.append(-sum(p * np.log(p) for p in share if p) / np.log(experts))
        pairs = np.abs(share[:, None] - share[None, :]).mean()
        ginis.append(pairs / 2 / share.mean() if share.any() else 0.0)
    np.testing.assert_allclose(found.entropy_by_layer, entropies, atol=1e-12)
    np.testing.assert_allclose(found.gini_by_layer, ginis, atol=1e-12)
    scores = -np.sort(-trace.scores[kept].astype(np.float64), axis=2)
    np.testing.assert_allclose(found.score_by_rank, scores.mean((0, 1)), rtol=1e-5)
    ratios = scores[:, :, 3] / np.where(scores[:, :, 2] > 0, scores[:, :, 2], np.nan)
    np.testing.assert_allclose(found.score_step, np.nanmean(ratios), rtol=1e-4)


def drafted(seed, experts=7, layers=2, top_k=3) -> Trace:
    """Cycles of two sequences: up to 3 drafts, as passes, and their verification; one is plain."""
    rng, rows, length, run = np.random.default_rng(seed), [], [4, 9], 0
    for gammas in rng.integers(0, 4, (6, 2)):
        for i in range(max(gammas) + 1):
            if any(i < gamma for gamma in gammas):
                rows += [
                    (s, length[s] + i, run, Phase.DRAFT, i < 2) for s in (0, 1) if i < gammas[s]
                ]
                run += 1
        for s in (0, 1):
            rows += [(s, length[s] + i, run, Phase.VERIFY, i < 2) for i in range(gammas[s] + 1)]
            length[s] += min(gammas[s] + 1, 2)
        run += 1
        rows.append((0, length[0], run, Phase.DECODE, True))
        length[0], run = length[0] + 1, run + 1
    names, types = ("sequence", "position", "run", "phase", "accepted"), [np.int32] * 3
    kinds = zip(names, [*types, np.uint8, bool], strict=True)
    columns = {n: np.array([row[i] for row in rows], k) for i, (n, k) in enumerate(kinds)}
    scores = rng.random((len(rows), layers, experts)).astype(np.float16)
    picks = rng.random(scores.shape).argsort(-1)[..., :top_k].astype(np.int16)
    picks[(columns["phase"] == Phase.DRAFT)[:, None, None] & (rng.random(picks.shape) < 0.4)] = -1
    token = np.full(len(rows), -1, np.int32)
    columns |= {"picks": picks, "scores": scores, "token": token}
    return Trace(model="drafted", experts=experts, **columns).check()


@given(seed=st.integers(0, 10**6), most=st.sampled_from([None, 2, 5]))
def test_drafts_are_set_against_their_verification(seed, most):
    trace = drafted(seed)
    best = np.argsort(-trace.scores.astype(np.float32), axis=2, kind="stable")
    if most:
        ids = best[..., :most].astype(np.int16)
        top = np.take_along_axis(trace.scores, ids.astype(int), axis=2)
        trace = dataclasses.replace(trace, scores=None, top_ids=ids, top_scores=top).check()
    found, gate, places, kept = [], [], [], []
    for n in np.flatnonzero(trace.phase == Phase.DRAFT):
        end = min(np.flatnonzero((trace.phase == Phase.VERIFY) & (trace.run > trace.run[n])))
        window = np.flatnonzero(trace.run == trace.run[end])
        own = [v for v in window if trace.sequence[v] == trace.sequence[n]]
        [v] = [v for v in own if trace.position[v] == trace.position[n]]
        places.append(int(trace.position[n] - trace.position[own[0]]))
        kept.append(trace.accepted[n])
        for shares, given_ in ((found, trace.picks[n]), (gate, best[n, :, :3])):
            both = [np.isin(trace.picks[v, x], given_[x]).mean() for x in range(trace.layers)]
            shares.append(both)
    stats = trace_stats.statistics(trace, "all").drafts
    if not found:
        assert stats is None
        return
    assert (stats.rows, stats.kept) == (len(found), pytest.approx(np.mean(kept)))
    np.testing.assert_allclose(stats.found_by_layer, np.mean(found, axis=0))
    for place, share in stats.found_by_place.items():
        rows = [s for s, p in zip(found, places, strict=True) if p == place]
        assert share == pytest.approx(np.mean(rows))
    assert sorted(stats.found_by_place) == sorted(set(places))
    if most == 2:  # fewer scores than picks
        assert stats.gate is stats.gate_by_layer is None
    else:
        np.testing.assert_allclose(stats.gate_by_layer, np.mean(gate, axis=0))
        assert stats.gate == pytest.approx(np.mean(gate))
    plain = trace.of_passes(trace.pass_phases() != Phase.DRAFT)
    whole = trace_stats.statistics(trace, "all")
    assert dataclasses.replace(whole, drafts=None) == trace_stats.statistics(plain, "all")
    assert trace_stats.statistics(trace, "draft").rows == sum(kept)


# --- commands


def test_the_commands_print_what_a_trace_holds(saved, tmp_path):
    run = CliRunner()
    done = run.invoke(app, ["info", str(saved), "--json"])
    header = json.loads(done.output)
    assert done.exit_code == 0 and header["columns"]["picks"]["shape"] == [12, 2, 2]
    for command in ("info", "stats"):
        done = run.invoke(app, [command, str(saved), *["--phase", "all"] * (command == "stats")])
        assert done.exit_code == 0 and "2 layers of 5, top-2" in done.output
    done = run.invoke(app, ["stats", str(saved), "--phase", "all", "--json"])
    assert json.loads(done.output)["rows"] == int(Trace.load(saved).accepted.sum())
    drafted(3).save(tmp_path / "drafted")
    done = run.invoke(app, ["stats", str(tmp_path / "drafted")])
    assert "drafted upon" in done.output and "in its gate's best" in done.output
    assert "drafted upon" not in run.invoke(app, ["stats", str(saved)]).output
    for arguments in (["stats", saved, "--phase", "x"], ["info", tmp_path], ["stats", tmp_path]):
        assert run.invoke(app, [*map(str, arguments)]).exit_code == 2


def test_pages_and_timelines_are_of_the_passes_asked_for(saved, tmp_path, monkeypatch):
    from moejax.traces import perfetto
    from moejax.traces import view as trace_view

    seen = {}

    def page(trace, path, *, text_of):
        seen[path.name] = (trace, text_of and text_of(5))
        path.write_bytes(bytes(2048))

    def timeline(trace, path):
        seen[path.name] = trace
        path.write_bytes(bytes(1024))

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(trace_view, "write_page", page)
    monkeypatch.setattr(perfetto, "write", timeline)
    trace, run = Trace.load(saved), CliRunner()
    some = ["--start", "1", "--stop", "3"]
    for command in (["view", saved, "all"], ["view", saved, "some", *some, "--text-of", "tiny"]):
        done = run.invoke(app, [*map(str, command)])
        assert done.exit_code == 0 and done.stdout == ""
        assert done.stderr == f"{command[2]}: 2.0 KiB, open it in a browser\n"
    done = run.invoke(app, ["perfetto", str(saved), "time", *some])
    assert done.exit_code == 0 and done.stderr == "time: 1.0 KiB, open it at ui.perfetto.dev\n"
    assert run.invoke(app, ["perfetto", str(saved), "time", *some, "--quiet"]).stderr == ""
    same(seen["all"][0], trace)
    same(seen["some"][0], trace.between(1, 3))
    same(seen["time"], trace.between(1, 3))
    assert seen["all"][1] is None and isinstance(seen["some"][1], str)
    done = run.invoke(app, ["view", str(saved), "none", "--start", "99"])
    assert done.exit_code == 2 and "no pass" in done.stderr
