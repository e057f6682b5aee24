"""The timeline: the rules of trace events, and what its slices and counters say."""

import collections
import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from trace_samples import distinct, make_trace

from moejax.errors import InputError
from moejax.traces import perfetto
from moejax.traces.trace import Outcome, Phase

HITS = {Outcome.HIT, Outcome.PREFETCHED, Outcome.SUBSTITUTE}


def make_reads(spans, experts):
    """Reads of (requested, waited, taken, kind) in quarters of a microsecond."""
    requested, waited, taken, kind = np.array(spans, np.float64).reshape(-1, 4).T
    return {
        "expert": np.arange(len(kind), dtype=np.int32) % experts - 1,
        "requested_us": requested / 4,
        "begun_us": (requested + waited) / 4,
        "landed_us": (requested + waited + taken) / 4,
        "kind": kind.astype(np.uint8),
        "run": np.full(len(kind), -1, np.int32),
    }


def check_rules(events):
    """What the format asks of every event."""
    stamps = [event["ts"] for event in events if event["ph"] != "M"]
    assert stamps == sorted(stamps)
    threads, waits = collections.defaultdict(list), {}
    named = {(e["pid"], e.get("tid", 0)) for e in events if e["ph"] == "M"}
    for event in events:
        assert isinstance(event["name"], str) and isinstance(event["pid"], int)
        assert event["ph"] in "MXCbe" and len(event["ph"]) == 1
        if event["ph"] == "M":
            assert event["name"] in ("process_name", "process_sort_index", "thread_name")
            assert event["args"].keys() <= {"name", "sort_index"} and event["args"]
            continue
        assert isinstance(event["ts"], float) and (event["pid"], event.get("tid", 0)) in named
        if event["ph"] == "X":
            assert event["dur"] >= 0 and event["tid"] > 0
            times = (round(event["ts"] * 1000), round((event["ts"] + event["dur"]) * 1000))
            threads[event["pid"], event["tid"]].append(times)
        if event["ph"] == "C":
            assert all(np.isfinite(value) for value in event["args"].values())
        if event["ph"] == "b":
            assert waits.setdefault((event["cat"], event["id"]), event) is event
        if event["ph"] == "e":
            begun = waits.pop((event["cat"], event["id"]))
            assert begun["name"] == event["name"] and begun["ts"] <= event["ts"]
    assert not waits
    for spans in threads.values():
        spans.sort()
        assert all(a[1] <= b[0] for a, b in zip(spans, spans[1:], strict=False))
    return threads


times = st.integers(0, 30)
spans = st.lists(st.tuples(times, times, st.integers(0, 9), st.integers(0, 2)), max_size=25)


@given(spans)
def test_reads_keep_the_rules_and_lose_nothing(spans):
    reads = make_reads(spans, 24)
    trace = make_trace(5, reads=reads if spans else {})
    events = perfetto.timeline(trace)
    threads = check_rules(events)
    moved = reads["kind"] < perfetto.BY_HOST
    busy = [
        (round(b * 1000), round(e * 1000))
        for b, e in zip(reads["begun_us"][moved], reads["landed_us"][moved], strict=True)
    ]
    link = [span for (pid, _), found in threads.items() if pid == perfetto.LINK for span in found]
    assert sorted(link) == sorted(busy)
    at_once = [
        sum(i == j or a <= time < b for j, (a, b) in enumerate(busy))
        for i, (time, _) in enumerate(busy)
    ]
    most = max(at_once, default=0)
    assert len([1 for pid, _ in threads if pid == perfetto.LINK]) <= max(most, 1)
    waiting = {e["ts"]: e["args"]["records"] for e in events if e["name"] == "records under way"}
    for time, count in waiting.items():
        there = (reads["requested_us"] <= time) & (time < reads["landed_us"]) & moved
        assert count == there.sum()
    hosted = [name for e in events if e.get("cat") == "host" for name in e["args"]["experts"]]
    expected = reads["expert"][~moved]
    assert sorted(hosted) == sorted(
        "unknown expert" if e < 0 else f"layer {e // 8} expert {e % 8}" for e in expected
    )


def test_passes_and_counters():
    trace = make_trace(30, seed=3)
    events = perfetto.timeline(trace)
    check_rules(events)
    passes = [e for e in events if e["ph"] == "X"]
    assert [e["args"]["pass"] for e in passes] == [*range(30)]
    np.testing.assert_allclose([e["dur"] for e in passes], trace.seconds * 1e6, atol=0.002)
    np.testing.assert_allclose([e["ts"] for e in passes], trace.began * 1e6, atol=0.002)
    assert {e["cat"] for e in passes} == {"prefill", "decode", "draft", "verify"}
    counters = collections.defaultdict(list)
    for event in events:
        if event["ph"] == "C":
            counters[event["name"]] += event["args"].values()
    rates, moved = [], []
    for p in range(30):
        rows = np.flatnonzero(trace.run == p)
        count = [
            [distinct(trace, rows, layer, s) for s in (HITS, {*Outcome} - {0}, {2, 3})]
            for layer in range(3)
        ]
        hits, needed, records = np.sum(count, axis=0)
        rates += [100 * hits / needed] * int(trace.phase[rows[0]] != Phase.DRAFT)
        moved.append(records * 1000)
        assert passes[p]["args"]["rejected"] == (~trace.accepted[rows]).sum()
    np.testing.assert_allclose(counters["hit rate"], rates)
    assert counters["bytes moved"] == moved


def test_counts_of_the_run_come_first():
    counts = {"needed": 4, "hits": 3, "fetched": 1, "prefetched": 2}
    counts = {name: np.full((6, 3), n, np.int32) for name, n in counts.items()}
    trace = make_trace(6, counts=counts, began=None, about={})
    events = perfetto.timeline(trace)
    found = {e["name"]: e["args"] for e in events if e["ph"] == "C"}
    assert found == {"hit rate": {"%": 75.0}, "records moved": {"records": 9}}
    starts = [e["ts"] for e in events if e["ph"] == "X"]
    np.testing.assert_allclose(starts, [*np.cumsum([0, *trace.seconds[:-1]]) * 1e6], atol=0.002)


def test_the_file_is_whole_or_not_there(tmp_path):
    trace = make_trace(4, reads=make_reads([(0, 1, 2, 0), (0, 3, 2, 1)], 8), model="</b>\u2028é")
    perfetto.write(trace, tmp_path / "t.json")
    document = json.loads((tmp_path / "t.json").read_text())
    assert document["traceEvents"] == perfetto.timeline(trace)
    assert document["otherData"]["model"] == "</b>\u2028é"
    backwards = {**trace.reads, "begun_us": trace.reads["landed_us"] + 1}
    partial = {n: c for n, c in trace.reads.items() if n != "begun_us"}
    bad = {
        "no times": {"began": None, "seconds": None, "reads": {}},
        "damaged": {"reads": backwards},
        "lack begun_us": {"reads": partial},
    }
    for message, changes in bad.items():
        with pytest.raises(InputError, match=message):
            perfetto.write(dataclasses.replace(trace, **changes), tmp_path / "other.json")
    with pytest.raises(InputError, match="cannot write"):
        perfetto.write(trace, tmp_path / "none" / "t.json")
    assert [path.name for path in tmp_path.iterdir()] == ["t.json"]
