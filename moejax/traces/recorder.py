"""Gathers the rows of a trace on the host while a model runs."""

import collections
import dataclasses
import time
from typing import Any

import jax
import numpy as np

from moejax.errors import InputError
from moejax.kernels.store import Store, clock_us
from moejax.state import StepTrace
from moejax.traces.form import ALSO, COLUMNS, COUNT
from moejax.traces.trace import Outcome, Phase, Trace

COUNTS = (
    *("needed", "hits", "late", "fetched", "prefetched", "host", "overdue", "low", "passes"),
    *("stall", "exact_needed", "exact_hits", "replaced", "replaced_mass"),
    *("predicted", "predicted_right", "prefetch_used"),
)
TYPES = {name: kind for name, (kind, _) in COLUMNS.items()}
TYPES |= {f"counts/{name}": COUNT[name == "replaced_mass"][0] for name in COUNTS}
LEARNED = COUNT[1][0]  # the type of what a policy renews
MASKS = ("resident", "fresh", "hosted", "lowered")
MERGED = 512  # passes whose arrays become one: many small arrays take more than they hold
EVENTS = 1 << 16  # of a link that its log holds from one pass to the next


@dataclasses.dataclass(frozen=True, kw_only=True)
class Keep:
    """What a trace is to hold beside the picks."""

    scores: int | None = None  # the M greatest of each layer; 0 = none, None = all
    full: bool = False  # scores in f32, not f16: replays of policies that read them are then exact
    weights: bool = True  # the router's, as used
    residency: bool = False  # what was resident in each pass and layer: L * E bits each
    drafts: bool = False  # what a self-draft routed to, token by token, before each verification

    def __post_init__(self) -> None:
        if self.scores is not None and self.scores < 0:
            raise InputError(f"{self.scores} scores cannot be kept: give 0 or more, or None = all")


class LinkLog:
    """What a link moved, and the host computed beside it, pass by pass."""

    def __init__(self, link: Store | None):
        self._link, self._zero = link, 0.0
        self._parts: list[dict[str, np.ndarray]] = []
        self.lost = 0  # events that the log had no room for

    def start(self) -> float:
        """Log from now on; the time of `time.perf_counter` from which times count."""
        if self._link is None:
            return time.perf_counter()
        self._link.log(EVENTS)
        readings = []
        for _ in range(9):  # of both clocks: the process may be interrupted between them
            before, zero, after = time.perf_counter(), clock_us(), time.perf_counter()
            readings.append((after - before, (before + after) / 2, zero))
        _, begun, self._zero = min(readings)
        return begun

    def read(self, number: int) -> None:
        """Take over what was logged by the end of a pass."""
        if self._link is None:
            return
        events = self._link.events(reset=True)
        self.lost += events.dropped
        found = events.columns()
        for name in found:
            if name.endswith("_us"):
                found[name] = found[name] - self._zero
        self._parts.append(found | {"run": np.full(len(events.expert), number, np.int32)})

    def stop(self) -> None:
        """The link logs no longer."""
        if self._link is not None:
            self._link.log(0)

    def found(self) -> dict[str, np.ndarray]:
        """All of it, as `Trace.reads` has it."""
        if not self._parts:
            return {}
        return {n: np.concatenate([part[n] for part in self._parts]) for n in self._parts[0]}


class Recorder:
    """Rows and passes so far, each in the type that a trace has."""

    def __init__(
        self,
        *,
        experts: int,
        keep: Keep,
        exact: bool = False,
        link: Store | None = None,
    ):
        """Nothing yet.

        Args:
            experts: E.
            exact: keep the picks of the model's own router beside those that were made.
            link: whose events to keep, if it has a log.

        Raises:
            InputError: more scores than experts.
        """
        if keep.scores is not None and keep.scores > experts:
            raise InputError(f"{keep.scores} scores cannot be kept: a layer has {experts} experts")
        self.experts, self.keep, self.exact = experts, keep, exact
        more = ALSO if keep.full else {}
        self._types = TYPES | {name: kind for name, (kind, _) in more.items()}
        self.passes = 0
        self._begun, self._log = 0.0, LinkLog(link)
        self._parts: dict[str, list[np.ndarray]] = collections.defaultdict(list)
        self._merged: dict[str, list[np.ndarray]] = collections.defaultdict(list)

    def start(self) -> None:
        """The recording begins: times count from here."""
        self._begun = self._log.start()

    def stop(self) -> None:
        """The recording ends, or failed."""
        self._log.stop()

    def add(
        self,
        phase: Phase,
        tokens: np.ndarray,
        start: np.ndarray,
        first: int,
        trace: StepTrace,
        times: tuple[float, float],
        accepted: np.ndarray | None = None,
        learned: dict[str, float] | None = None,
    ) -> None:
        """Add a pass.

        Args:
            tokens: [B, T] i32 as they were fed, -1 = padding.
            start: [B] how many tokens each sequence held before.
            first: number of the first sequence in the trace.
            trace: recorded with scores.
            times: of `time.perf_counter`, before and after.
            accepted: [B, T] bool; all by default.
            learned: numbers that the policy renews, as the pass had them; see `live.learned`.
        """
        wanted = ("picks", "weights", *MASKS, *COUNTS, "exact")
        wanted += () if self.keep.scores == 0 else ("scores",)
        found = jax.device_get({name: getattr(trace, name) for name in wanted})
        b, t = np.nonzero(tokens >= 0)
        rows = b * tokens.shape[1] + t
        picks, exact = (np.moveaxis(found[n], 1, 0)[rows] for n in ("picks", "exact"))
        columns = {
            "sequence": first + b,
            "position": start[b] + t,
            "run": np.full(len(b), self.passes),
            "phase": np.full(len(b), phase),
            "token": tokens[b, t],
            "accepted": np.ones(len(b), bool) if accepted is None else accepted[b, t],
            "picks": picks,
            "outcome": outcomes(picks, exact, *(found[name] for name in MASKS)),
            "began": np.array([times[0] - self._begun]),
            "seconds": np.array([times[1] - times[0]]),
            **{f"counts/{name}": found[name][None] for name in COUNTS},
        }
        for name, number in (learned or {}).items():
            columns[f"counts/{name}"] = np.full((1, picks.shape[1]), number)
        if self.keep.weights:
            columns["weights"] = np.moveaxis(found["weights"], 1, 0)[rows]
        if self.exact:
            columns["exact"] = exact
        if self.keep.residency:
            columns["resident"] = found["resident"][None]
        if self.keep.scores != 0:
            columns |= _scores(np.moveaxis(found["scores"], 1, 0)[rows], self.keep.scores)
        for name, column in columns.items():
            self._parts[name].append(column.astype(self._types.get(name, LEARNED), copy=True))
        self.passes += 1
        if phase != Phase.DRAFT:  # what came is known by the end of the verification
            self._log.read(self.passes - 1)
        if self.passes % MERGED == 0:
            self._merge()

    def add_drafts(
        self,
        fed: np.ndarray,
        drafted: np.ndarray,
        start: np.ndarray,
        first: int,
        traces: StepTrace,
        begun: float,
        accepted: np.ndarray,
        learned: dict[str, float] | None,
    ) -> None:
        """Add the passes of a self-draft, before the verification of what it made.

        One program drafts and verifies, so that they have no times of their own.

        Args:
            fed: [B, W] i32, as the verification is fed; the last draft was not drafted upon.
            drafted: [B], how many of them were made.
            traces: [G, ...].
            accepted: [B, W] bool, of what was fed.
        """
        traces = jax.device_get(traces)
        for i in range(drafted.max()):
            tokens = np.where(i < drafted, fed[:, i], -1)[:, None]
            own = jax.tree.map(lambda leaf, i=i: leaf[i], traces)
            marks = accepted[:, i, None]
            self.add(Phase.DRAFT, tokens, start + i, first, own, (begun, begun), marks, learned)

    def _merge(self) -> None:
        for name, parts in self._parts.items():
            if parts:
                self._merged[name].append(np.concatenate(parts))
            parts.clear()

    def finished(self, model: str, about: dict[str, Any]) -> Trace:
        """The trace of everything that was added, checked."""
        if not self.passes:
            raise InputError("nothing was recorded: give texts of at least one token")
        if self.passes % MERGED:
            self._merge()
        columns, counts = {}, {}
        for name in list(self._merged):
            group, _, own = name.rpartition("/")
            (counts if group else columns)[own] = np.concatenate(self._merged.pop(name))
        # A cost that was infinite in between has no number there.
        counts = {name: column for name, column in counts.items() if len(column) == self.passes}
        reads = self._log.found()
        about = about | ({"reads_lost": self._log.lost} if self._log.lost else {})
        made = Trace(
            model=model, experts=self.experts, **columns, counts=counts, reads=reads, about=about
        )
        return made.check()


def outcomes(
    picks: np.ndarray,
    exact: np.ndarray,
    resident: np.ndarray,
    fresh: np.ndarray,
    hosted: np.ndarray,
    lowered: np.ndarray,
) -> np.ndarray:
    """[N, L, K] u8, the `Outcome` of picks [N, L, K].

    Args:
        exact: [N, L, K], those of the model's own router.
        resident, fresh, hosted, lowered: [L, E] bool, see `StepTrace`.
    """
    kind = np.where(resident, Outcome.HIT, Outcome.MISS).astype(np.uint8)
    kind[fresh & resident] = Outcome.PREFETCHED
    kind[hosted] = Outcome.HOST
    kind[lowered] = Outcome.LOW
    found = kind[np.arange(len(kind))[:, None], np.maximum(picks, 0)]
    own = (picks[..., None] == exact[..., None, :]).any(axis=-1)
    found[~own & np.isin(found, (Outcome.HIT, Outcome.PREFETCHED))] = Outcome.SUBSTITUTE
    found[picks < 0] = Outcome.UNKNOWN
    return found


def _scores(scores: np.ndarray, most: int | None) -> dict[str, np.ndarray]:
    if most is None:
        return {"scores": scores}
    order = np.argsort(-scores, axis=-1, kind="stable")[..., :most]
    return {"top_ids": order, "top_scores": np.take_along_axis(scores, order, axis=-1)}
