"""The timeline of link, host and device as Chrome trace events, for ui.perfetto.dev."""

import collections
import heapq
import json
import os
import pathlib
from typing import Any

import numpy as np

from moejax.errors import InputError
from moejax.reports.files import replace_text
from moejax.traces.trace import Outcome, Phase, Trace

# The processes of the timeline.
DEVICE, LINK, HOST = 1, 2, 3
DEMAND, PREFETCH, BY_HOST = 0, 1, 2  # `kind` of a read
KINDS = {DEMAND: "demand", PREFETCH: "prefetch"}
NS_PER_US = 1000
HITS = (Outcome.HIT, Outcome.PREFETCHED, Outcome.SUBSTITUTE)

Event = dict[str, Any]


def write(trace: Trace, path: str | os.PathLike) -> None:
    """Write the timeline of a trace; the file is whole or not there.

    Passes are slices of the device, records moved are slices of the link from their beginning on
    and asynchronous slices from their request on, and experts computed on the host those of the
    host. What runs at the same time lies on several threads. Hit rate, bytes and records under way
    are counters. The format is Google's "Trace Event Format".

    Raises:
        InputError: the trace has no times, or the file cannot be written.
    """
    events = timeline(trace)
    about = {"model": trace.model, "about": json.dumps(trace.about, ensure_ascii=False)}
    document = {"traceEvents": events, "displayTimeUnit": "ms", "otherData": about}
    replace_text(pathlib.Path(path), json.dumps(document, allow_nan=False))


def timeline(trace: Trace) -> list[Event]:
    """The events of a trace, metadata first, the others in order of time."""
    trace.check()
    reads = _reads(trace)
    if trace.seconds is None and not reads:
        raise InputError("the trace has no times: record one, or choose one that was recorded")
    events = []
    if trace.seconds is not None:
        events += _passes(trace)
    moved = [read for read in reads if read["kind"] != BY_HOST]
    events += _moves(trace, moved)
    events += _host(trace, [read for read in reads if read["kind"] == BY_HOST])
    events += _under_way(moved)
    events.sort(key=lambda event: (event["ts"], -event.get("dur", 0)))
    return _names(events) + events


def _reads(trace: Trace) -> list[dict[str, Any]]:
    """Reads with times in whole nanoseconds, so that sums and comparisons are exact."""
    needed = {"expert", "requested_us", "begun_us", "landed_us"}
    if not trace.reads:
        return []
    if missing := needed - set(trace.reads):
        raise InputError(f"the reads of the trace lack {', '.join(sorted(missing))}")
    columns = {name: column.tolist() for name, column in trace.reads.items()}
    size = len(columns["expert"])
    columns.setdefault("kind", [DEMAND] * size)
    columns.setdefault("run", [-1] * size)
    found = [
        dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)
    ]
    for read in found:
        requested, begun, landed = (_ns(read[f"{name}_us"]) for name in _TIMES)
        if not requested <= begun <= landed:
            raise InputError(
                f"a read of expert {read['expert']} lands before it begins, or begins before it "
                "was requested: the reads of the trace are damaged"
            )
        read |= {"requested": requested, "begun": begun, "landed": landed}
    return found


_TIMES = ("requested", "begun", "landed")


def _ns(us: float) -> int:
    return round(us * NS_PER_US)


def _us(ns: int) -> float:
    return ns / NS_PER_US


def _passes(trace: Trace) -> list[Event]:
    began = trace.began
    if began is None:
        began = np.cumsum(trace.seconds) - trace.seconds
    starts = [_ns(s * 1e6) for s in began.tolist()]
    ends = [_ns((b + s) * 1e6) for b, s in zip(began.tolist(), trace.seconds.tolist(), strict=True)]
    offsets, phases = trace.offsets(), trace.pass_phases()
    lanes = _lanes([*zip(starts, ends, strict=True)])
    rates, moved = _hit_rates(trace), _records_moved(trace)
    events = []
    for p, (start, end, lane) in enumerate(zip(starts, ends, lanes, strict=True)):
        rows = slice(offsets[p], offsets[p + 1])
        arguments = {
            "pass": p,
            "tokens": int(offsets[p + 1] - offsets[p]),
            "sequences": np.unique(trace.sequence[rows]).tolist(),
            "rejected": int((~trace.accepted[rows]).sum()),
        }
        phase = Phase(phases[p]).name.lower()
        events.append(_slice(f"{phase} {p}", phase, DEVICE, lane, start, end, arguments))
        own = phases[p] != Phase.DRAFT  # which uses nothing that is not there
        if own and rates is not None and np.isfinite(rates[p]):
            events.append(_counter("hit rate", DEVICE, start, "%", float(rates[p]) * 100))
        if moved is not None:
            unit, values = moved
            events.append(_counter(f"{unit} moved", DEVICE, start, unit, int(values[p])))
    return events


def _hit_rates(trace: Trace) -> np.ndarray | None:
    """[P] share of distinct experts that were resident, NaN where none was needed."""
    if {"needed", "hits"} <= set(trace.counts):
        needed, hits = (trace.counts[name].sum(axis=1) for name in ("needed", "hits"))
    elif trace.outcome is not None and trace.outcome.any():
        needed, hits = _distinct(trace, list(Outcome)[1:]), _distinct(trace, HITS)
    else:
        return None
    return np.divide(hits, needed, out=np.full(trace.passes, np.nan), where=needed > 0)


def _records_moved(trace: Trace) -> tuple[str, np.ndarray] | None:
    """The unit, and how much of it [P] each pass moved."""
    if {"fetched", "prefetched"} <= set(trace.counts):
        moved = (trace.counts["fetched"] + trace.counts["prefetched"]).sum(axis=1)
    elif trace.outcome is not None and trace.outcome.any():
        moved = _distinct(trace, (Outcome.MISS, Outcome.PREFETCHED))
    else:
        return None
    size = trace.about.get("record_bytes")
    if isinstance(size, int) and size > 0:
        return "bytes", moved.astype(np.int64) * size
    return "records", moved


def _distinct(trace: Trace, outcomes: Any) -> np.ndarray:
    """[P] distinct experts of each pass and layer with one of the outcomes."""
    there = np.isin(trace.outcome, outcomes) & (trace.picks >= 0)
    row, layer, rank = np.nonzero(there)
    run = trace.run[row].astype(np.int64)
    key = (run * trace.layers + layer) * trace.experts + trace.picks[row, layer, rank]
    passes = np.unique(key) // (trace.layers * trace.experts)
    return np.bincount(passes, minlength=trace.passes)


def _moves(trace: Trace, reads: list[dict[str, Any]]) -> list[Event]:
    events = []
    lanes = _lanes([(read["begun"], read["landed"]) for read in reads])
    for number, (read, lane) in enumerate(zip(reads, lanes, strict=True)):
        name, kind = _expert(trace, read["expert"]), KINDS.get(read["kind"], "read")
        arguments = {"waited_us": _us(read["begun"] - read["requested"]), "kind": kind}
        if read["run"] >= 0:
            arguments["pass"] = read["run"]
        times = read["begun"], read["landed"]
        events.append(_slice(name, kind, LINK, lane, *times, arguments))
        waited = {"name": name, "cat": kind, "id": number, "pid": LINK, "tid": 0}
        events.append(waited | {"ph": "b", "ts": _us(read["requested"])})
        events.append(waited | {"ph": "e", "ts": _us(read["landed"])})
    return events


def _host(trace: Trace, reads: list[dict[str, Any]]) -> list[Event]:
    """Experts computed together, which have one time, are one slice."""
    groups = collections.defaultdict(list)
    for read in reads:
        groups[read["begun"], read["landed"]].append(read["expert"])
    lanes = _lanes([*groups])
    events = []
    for (times, experts), lane in zip(groups.items(), lanes, strict=True):
        names = [_expert(trace, expert) for expert in experts]
        name = names[0] if len(names) == 1 else f"{len(names)} experts"
        events.append(_slice(name, "host", HOST, lane, *times, {"experts": names}))
    return events


def _under_way(reads: list[dict[str, Any]]) -> list[Event]:
    """The counter of records that were requested and have not landed."""
    changes = collections.Counter()
    for read in reads:
        changes[read["requested"]] += 1
        changes[read["landed"]] -= 1
    events, count = [], 0
    for time, change in sorted(changes.items()):
        count += change
        events.append(_counter("records under way", LINK, time, "records", count))
    return events


def _expert(trace: Trace, number: int) -> str:
    if number < 0:
        return "unknown expert"
    layer, expert = divmod(number, trace.experts)
    return f"layer {layer} expert {expert}"


def _lanes(spans: list[tuple[int, int]]) -> list[int]:
    """The thread of each span, the first that is free when it begins: none overlap on one."""
    lanes = [0] * len(spans)
    ends: list[tuple[int, int]] = []  # when each busy thread is free again, and its number
    free: list[int] = []
    for index in sorted(range(len(spans)), key=lambda i: spans[i]):
        start, end = spans[index]
        while ends and ends[0][0] <= start:
            heapq.heappush(free, heapq.heappop(ends)[1])
        lanes[index] = heapq.heappop(free) if free else len(ends)
        heapq.heappush(ends, (end, lanes[index]))
    return lanes


def _slice(
    name: str, kind: str, process: int, lane: int, start: int, end: int, arguments: dict[str, Any]
) -> Event:
    times = {"ts": _us(start), "dur": _us(end - start)}
    where = {"pid": process, "tid": lane + 1}
    return {"name": name, "cat": kind, "ph": "X", **times, **where, "args": arguments}


def _counter(name: str, process: int, time: int, unit: str, value: float) -> Event:
    return {"name": name, "ph": "C", "ts": _us(time), "pid": process, "args": {unit: value}}


def _names(events: list[Event]) -> list[Event]:
    """Metadata: what the processes and threads that have events are called."""
    processes = {DEVICE: "device", LINK: "link", HOST: "host"}
    threads = {DEVICE: "passes", LINK: "transfers", HOST: "experts"}
    used = sorted({(event["pid"], event.get("tid", 0)) for event in events})
    found = []
    for process in sorted({process for process, _ in used}):
        where = {"ph": "M", "pid": process}
        found.append({**where, "name": "process_name", "args": {"name": processes[process]}})
        found.append({**where, "name": "process_sort_index", "args": {"sort_index": process}})
    for process, thread in used:
        if thread:
            name = threads[process] + (f" {thread}" if thread > 1 else "")
            where = {"ph": "M", "pid": process, "tid": thread}
            found.append({**where, "name": "thread_name", "args": {"name": name}})
    return found
