"""Routing traces: what a model chose, token by token and layer by layer.

A trace lies in one compressed file that any program reads; docs/traces.md describes it.
"""

import dataclasses
import os
from collections.abc import Sequence
from typing import Any, Self

import numpy as np

from moejax.errors import InputError
from moejax.traces import file as trace_file
from moejax.traces.form import (
    COLUMNS,
    READS,
    Outcome,
    Phase,
    check_form,
    check_rows,
    check_values,
)

__all__ = ["Outcome", "Phase", "Trace", "concatenated"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trace:
    """N rows in order of execution; a row is one token in one pass through the model.

    L layers with experts, E experts, K picks per token, P passes. A pass is what runs at once: a
    chunk of a prompt, a decode step of a batch, a verification window; its rows are adjacent.
    """

    model: str  # name, for people
    experts: int  # E
    sequence: np.ndarray  # [N] i32
    position: np.ndarray  # [N] i32, place in its sequence
    run: np.ndarray  # [N] i32, pass, from 0 on without gaps
    phase: np.ndarray  # [N] u8, `Phase`
    token: np.ndarray  # [N] i32, the token that was fed, -1 = unknown
    accepted: np.ndarray  # [N] bool, False for drafts that were rejected
    picks: np.ndarray  # [N, L, K] i16, by rank, -1 = none
    weights: np.ndarray | None = None  # [N, L, K] f32, as used
    scores: np.ndarray | None = None  # [N, L, E] f16 or f32, the router's, or
    top_ids: np.ndarray | None = None  # [N, L, M] i16, of the M greatest scores, -1 = none
    top_scores: np.ndarray | None = None  # [N, L, M] f16 or f32
    outcome: np.ndarray | None = None  # [N, L, K] u8, `Outcome`
    exact: np.ndarray | None = None  # [N, L, K] i16, picks of the model's own router, if others
    resident: np.ndarray | None = None  # [P, L, E] bool, when the layer began
    began: np.ndarray | None = None  # [P] f64, seconds since the recording began
    seconds: np.ndarray | None = None  # [P] f64, how long each pass took
    counts: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)  # [P, L] of StepTrace
    reads: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)  # link events, `READS`
    about: dict[str, Any] = dataclasses.field(default_factory=dict)  # JSON: policy, slots, record

    @property
    def rows(self) -> int:
        """N."""
        return len(self.run)

    @property
    def layers(self) -> int:
        """L."""
        return self.picks.shape[1]

    @property
    def top_k(self) -> int:
        """K."""
        return self.picks.shape[2]

    @property
    def passes(self) -> int:
        """P."""
        return int(self.run[-1]) + 1 if len(self.run) else 0

    def offsets(self) -> np.ndarray:
        """[P + 1] i64: pass p has the rows from offsets[p] up to offsets[p + 1]."""
        return np.searchsorted(self.run, np.arange(self.passes + 1))

    def rows_of(self, number: int) -> slice:
        """The rows of a pass; InputError if there is no such pass."""
        if not 0 <= number < self.passes:
            raise InputError(f"there is no pass {number}: the trace has {self.passes}")
        first, last = np.searchsorted(self.run, [number, number + 1])
        return slice(int(first), int(last))

    def pass_phases(self) -> np.ndarray:
        """[P] u8, the `Phase` of each pass."""
        return self.phase[self.offsets()[:-1]]

    @property
    def replaced(self) -> bool:
        """Whether picks are known to be others than the model's own router would have made.

        Drafts are not meant, which may make do with what is resident.
        """
        if self.exact is not None or self.about.get("exact") is False:
            return True
        if self.outcome is not None:
            if (self.outcome[self.phase != Phase.DRAFT] == Outcome.SUBSTITUTE).any():
                return True
        replaced = self.counts.get("replaced")
        return replaced is not None and bool(replaced[self.pass_phases() != Phase.DRAFT].any())

    def columns(self) -> dict[str, np.ndarray]:
        """The columns that are there."""
        found = {name: getattr(self, name) for name in COLUMNS}
        return {name: column for name, column in found.items() if column is not None}

    def check(self) -> Self:
        """The trace itself.

        Raises:
            InputError: a column of the wrong type or shape, or values that cannot be.
        """
        check_form(self)
        check_rows(self)
        check_values(self)
        return self

    def check_model(self, config: Any) -> None:
        """Raise InputError unless the trace fits a model's config: layers, experts and picks."""
        own = (self.layers, self.experts, self.top_k)
        wanted = (config.num_moe_layers, config.num_experts, config.top_k)
        if own != wanted:
            raise InputError(
                "the trace of {} has {} layers of {} experts, top-{}; the model has {} of {}, "
                "top-{}: take a trace of this model".format(self.model, *own, *wanted)
            )

    def of_passes(self, chosen: np.ndarray) -> Self:
        """The trace of some passes [P] bool, numbered anew; InputError if there are none."""
        chosen = np.asarray(chosen)
        if chosen.shape != (self.passes,) or chosen.dtype != bool:
            raise InputError(f"passes are chosen by a mask bool [{self.passes}]")
        if not chosen.any():
            raise InputError("no pass of the trace is left: choose others")
        if chosen.all():  # a copy may take gigabytes
            return self
        number = np.cumsum(chosen, dtype=np.int32) - 1
        kept = chosen[self.run]
        changes = {
            name: column[kept] if COLUMNS[name][1][0] == "N" else column[chosen]
            for name, column in self.columns().items()
        }
        changes["run"] = number[changes["run"]]
        changes["counts"] = {name: count[chosen] for name, count in self.counts.items()}
        changes["reads"] = self._reads_of(chosen, number)
        return dataclasses.replace(self, **changes)

    def _reads_of(self, chosen: np.ndarray, number: np.ndarray) -> dict[str, np.ndarray]:
        if "run" not in self.reads:
            return {}
        run = self.reads["run"]
        kept = (run >= 0) & chosen[run]
        return {n: number[c[kept]] if n == "run" else c[kept] for n, c in self.reads.items()}

    def of_phase(self, *phases: Phase) -> Self:
        """The trace of the passes of these phases; InputError if there are none."""
        chosen = np.isin(self.pass_phases(), phases)
        if not chosen.any():
            names = " or ".join(Phase(phase).name.lower() for phase in phases)
            raise InputError(f"the trace has no {names} passes: record or choose another")
        return self.of_passes(chosen)

    def between(self, start: int, stop: int) -> Self:
        """The trace of the passes from `start` up to `stop`, without the latter."""
        numbers = np.arange(self.passes)
        return self.of_passes((start <= numbers) & (numbers < stop))

    def of_sequences(self, *sequences: int) -> Self:
        """The rows of some sequences; passes that only others were in are gone.

        What was measured for whole passes goes too where they lose rows to it: counts, residency,
        times and reads. InputError if no row is left.
        """
        kept = np.isin(self.sequence, sequences)
        if not kept.any():
            raise InputError(f"the trace has no sequence {', '.join(map(str, sequences))}")
        there = np.unique(self.run[kept])
        chosen = np.isin(np.arange(self.passes), there)
        if (chosen[self.run] == kept).all():
            return self.of_passes(chosen)
        rows = {n: c[kept] for n, c in self.columns().items() if COLUMNS[n][1][0] == "N"}
        rows["run"] = np.searchsorted(there, rows["run"]).astype(np.int32)
        none = {"resident": None, "began": None, "seconds": None, "counts": {}, "reads": {}}
        return dataclasses.replace(self, **rows, **none)

    def save(self, path: str | os.PathLike) -> None:
        """Write the trace; the file is whole or not there.

        Raises:
            InputError: the trace is not valid, or the file cannot be written.
        """
        trace_file.save(self.check(), path)

    @classmethod
    def load(cls, path: str | os.PathLike) -> Self:
        """Read and check a trace.

        Raises:
            InputError: the file is not there, not a trace, of another version, truncated, or
                holds what cannot be.
        """
        return cls(**trace_file.load(path)).check()


def concatenated(traces: Sequence[Trace], about: dict[str, Any] | None = None) -> Trace:
    """Traces of one model one after the other; sequences and passes are numbered on.

    Args:
        about: of the whole; by default what all traces have alike, and that one was not exact.

    Raises:
        InputError: none, or traces that differ in model, sizes or columns.
    """
    if not traces:
        raise InputError("no traces to join: give at least one")
    first = traces[0]
    for trace in traces[1:]:
        for what, own, other in zip(_LIKE, _likeness(first), _likeness(trace), strict=True):
            if own != other:
                raise InputError(f"traces that differ in their {what} cannot be joined")
    columns = {n: np.concatenate([t.columns()[n] for t in traces]) for n in first.columns()}
    sequences = _starts([int(t.sequence.max()) + 1 for t in traces])
    passes = _starts([t.passes for t in traces])
    for name, starts in (("sequence", sequences), ("run", passes)):
        parts = [getattr(t, name) + n for t, n in zip(traces, starts, strict=True)]
        columns[name] = np.concatenate(parts).astype(np.int32)
    if "began" in columns:
        ends = _starts([float(t.began[-1] + t.seconds[-1]) for t in traces])
        columns["began"] = np.concatenate([t.began + n for t, n in zip(traces, ends, strict=True)])
    changes = {
        "counts": {n: np.concatenate([t.counts[n] for t in traces]) for n in first.counts},
        "reads": _joined_reads(traces, passes),
        "about": _alike([t.about for t in traces]) if about is None else about,
    }
    return dataclasses.replace(first, **columns, **changes)


def _alike(abouts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The entries that all have, with one value; not exact where one is not."""
    first, *others = abouts
    found = {
        name: value
        for name, value in first.items()
        if all(name in about and about[name] == value for about in others)
    }
    return found | ({"exact": False} if any(a.get("exact") is False for a in abouts) else {})


def _joined_reads(traces: Sequence[Trace], passes: Sequence[int]) -> dict[str, np.ndarray]:
    """The reads with passes numbered on and times since the beginning of the first trace."""
    if not traces[0].reads:
        return {}
    if any(t.began is None for t in traces) or "run" not in traces[0].reads:
        raise InputError("reads without the passes' times cannot be joined: leave them out")
    ends = _starts([float(t.began[-1] + t.seconds[-1]) for t in traces])
    shift = {name: [end * 1e6 for end in ends] for name in READS if name.endswith("_us")}
    shift["run"] = list(passes)
    joined = {}
    for name, column in traces[0].reads.items():
        starts = shift.get(name, [0] * len(traces))
        parts = [t.reads[name] + n for t, n in zip(traces, starts, strict=True)]
        joined[name] = np.concatenate(parts).astype(column.dtype)
    return joined


_LIKE = ("model", "number of experts", "layers, picks and scores", "columns", "counts", "reads")


def _likeness(trace: Trace) -> tuple:
    sizes = trace.picks.shape[1:], None if trace.top_ids is None else trace.top_ids.shape[2]
    names = (set(trace.columns()), set(trace.counts), set(trace.reads))
    return (trace.model, trace.experts, sizes, *names)


def _starts(lengths: Sequence[float]) -> list:
    starts = [0]
    for length in lengths[:-1]:
        starts.append(starts[-1] + length)
    return starts
