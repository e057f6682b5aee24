"""Statistics of a routing trace: what a cache of experts lives on."""

import dataclasses
import math
from typing import Any

import numpy as np

from moejax.errors import InputError
from moejax.traces.trace import Phase, Trace

LAGS = (1, 2, 4, 8, 32)
WINDOWS = tuple(range(1, 17))
SHARES = (0.1, 0.25)  # of the experts, those picked most
QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9, 0.99)
NEAR = (1, 2, 4, 8, 16, 32)  # tokens within which an expert is used again
PHASES = {
    "all": (Phase.PREFILL, Phase.DECODE, Phase.VERIFY),  # what the model itself ran
    "prefill": (Phase.PREFILL,),
    "draft": (Phase.DRAFT,),
    "decode": (Phase.DECODE, Phase.VERIFY),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DraftStats:
    """How well the routing of self-drafts tells what their verification routes to.

    Over the tokens that were drafted upon and then verified, whether they were kept or not. `found`
    is the share of the verification's picks that the draft's own picks hold, `gate` the share that
    the K best scores of its gates hold, resident or not.
    """

    rows: int
    kept: float  # share of those tokens
    made: float  # picks of the draft's, over K
    found: float
    found_by_layer: list[float]
    found_by_place: dict[int, float]  # by place in the window, 0 = the pending token
    gate: float | None
    gate_by_layer: list[float] | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class TraceStats:
    """Means over layers, and the values of the layers where `_by_layer` says so.

    A use is one pick. Distances are within a layer, in the order of execution, whatever the
    sequence; overlaps and unions are within a sequence.
    """

    phase: str
    rows: int
    layers: int
    experts: int
    top_k: int
    sequences: int
    top_share: dict[str, float]  # of the uses, to the 10 % and 25 % of a layer's experts used most
    gini: float  # of the uses of a layer's experts: 0 = all alike, near 1 = one takes them all
    gini_by_layer: list[float]
    unused: float  # share of the experts never used
    entropy: float  # of the uses over a layer's experts, over log E
    entropy_by_layer: list[float]
    overlap: dict[int, float | None]  # by lag: share of a token's picks that the earlier one had
    overlap_by_layer: dict[int, list[float | None]]
    chance: float  # overlap of independent uniform picks, K / E
    first_uses: float  # share of the uses that are an expert's first
    reuse_tokens: dict[str, float | None]  # quantiles: rows since the last use of the same expert
    reused_within: dict[int, float]  # by rows: share of the uses that come so soon after another
    stack_distance: dict[str, float | None]  # quantiles: distinct other experts since then
    stack_median_by_layer: list[float | None]
    union: dict[int, float | None]  # by window: distinct experts of so many tokens over one's
    score_by_rank: list[float] | None  # mean router score, best first
    score_step: float | None  # mean of the score after the K-th over the K-th
    score_steps: list[float | None] | None  # the same of all ranks: the (r + 1)-th over the r-th
    drafts: DraftStats | None  # of a trace that has drafts and their verification, of any phase

    def as_dict(self) -> dict[str, Any]:
        """All fields, for JSON."""
        return dataclasses.asdict(self)


def statistics(trace: Trace, phase: str = "decode") -> TraceStats:
    """Statistics of the rows of a phase, drafts that were rejected left out.

    Args:
        phase: "decode" (with verified drafts), "prefill", "draft", or "all" but drafts.

    Raises:
        InputError: no such phase, or no rows of it.
    """
    if phase not in PHASES:
        raise InputError(f"phase {phase!r:.40} is unknown; known: {', '.join(PHASES)}")
    kept = np.isin(trace.phase, PHASES[phase]) & trace.accepted
    if not kept.any():
        raise InputError(f"the trace has no {phase} rows: choose --phase all, or record some")
    picks = trace.picks[kept]
    uses = np.stack([_uses(picks[:, layer], trace.experts) for layer in range(trace.layers)])
    place = (trace.sequence[kept].astype(np.int64), trace.position[kept].astype(np.int64))
    overlap = {lag: _overlaps(picks, trace.experts, place, lag) for lag in LAGS}
    scores = _score_tail(trace, kept)
    return TraceStats(
        phase=phase,
        rows=len(picks),
        layers=trace.layers,
        experts=trace.experts,
        top_k=trace.top_k,
        sequences=len(np.unique(place[0])),
        **_skew(uses),
        overlap={lag: _mean(values) for lag, values in overlap.items()},
        overlap_by_layer=overlap,
        chance=trace.top_k / trace.experts,
        **_reuse(picks, trace.experts),
        union=_unions(picks, trace.experts, place),
        **scores,
        drafts=drafts_against_verification(trace),
    )


def drafts_against_verification(trace: Trace) -> DraftStats | None:
    """How well drafts tell what their verification routes to; None without any of both."""
    draft, verified, place = _verified_drafts(trace)
    wanted = trace.picks[verified]
    if not (wanted >= 0).any():
        return None
    found = _held(wanted, trace.picks[draft])
    gate = None
    if (best := _best(trace, draft)) is not None:
        gate = _held(wanted, best).mean(axis=0)
    return DraftStats(
        rows=len(draft),
        kept=float(trace.accepted[draft].mean()),
        made=float((trace.picks[draft] >= 0).mean()),
        found=float(found.mean()),
        found_by_layer=found.mean(axis=0).tolist(),
        found_by_place={int(n): float(found[place == n].mean()) for n in np.unique(place)},
        gate=None if gate is None else float(gate.mean()),
        gate_by_layer=None if gate is None else gate.tolist(),
    )


def _verified_drafts(trace: Trace) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows of drafts, those of the same tokens in the next verification, and places in its window.

    All three are [M].
    """
    ends = np.flatnonzero(trace.pass_phases() == Phase.VERIFY)
    cycle = np.searchsorted(ends, np.arange(trace.passes))[trace.run]
    window = np.unique(np.stack([cycle, trace.sequence]), axis=1, return_inverse=True)[1].ravel()
    key = window * (int(trace.position.max()) + 1) + trace.position
    draft, verified = (np.flatnonzero(trace.phase == p) for p in (Phase.DRAFT, Phase.VERIFY))
    order = verified[np.argsort(key[verified])]
    if not len(order):
        return draft[:0], order, order
    at = order[np.minimum(np.searchsorted(key[order], key[draft]), len(order) - 1)]
    there = key[at] == key[draft]
    first = np.full(int(window.max()) + 1, np.iinfo(np.int32).max)
    np.minimum.at(first, window[verified], trace.position[verified])
    place = trace.position - first[window]
    return draft[there], at[there], place[draft[there]]


def _held(wanted: np.ndarray, given: np.ndarray) -> np.ndarray:
    """[M, L] share of the picks wanted [M, L, K] that are among those given [M, L, n]."""
    there = (wanted[..., None] == given[..., None, :]).any(axis=-1) & (wanted >= 0)
    return there.sum(axis=-1) / np.maximum((wanted >= 0).sum(axis=-1), 1)


def _best(trace: Trace, rows: np.ndarray) -> np.ndarray | None:
    """[M, L, K] the experts that the scores of some rows would choose; None without scores."""
    top_k = trace.top_k
    if trace.about.get("router", {}).get("num_groups", 1) > 1:
        return None  # which groups are out of the running takes more than scores
    if trace.scores is not None:
        order = np.argsort(-trace.scores[rows].astype(np.float32), axis=-1, kind="stable")
        return order[..., :top_k]
    if trace.top_ids is None or trace.top_ids.shape[2] < top_k:
        return None
    return trace.top_ids[rows][..., :top_k]


def _uses(picks: np.ndarray, experts: int) -> np.ndarray:
    """[E] how often each expert is among picks [N, K]."""
    return np.bincount(picks[picks >= 0], minlength=experts)


def _mean(values: Any) -> float | None:
    """Mean of the values that are there."""
    found = [value for value in values if value is not None]
    return float(np.mean(found)) if found else None


def _skew(uses: np.ndarray) -> dict[str, Any]:
    """Of uses [L, E]."""
    experts = uses.shape[1]
    total = np.maximum(uses.sum(axis=1, keepdims=True), 1)
    share = uses / total
    greatest = -np.sort(-share, axis=1)
    top = {f"{s:.0%}": float(greatest[:, : math.ceil(s * experts)].sum(1).mean()) for s in SHARES}
    logs = np.log(share, where=share > 0, out=np.zeros_like(share))
    entropy = -(share * logs).sum(axis=1) / math.log(max(experts, 2))
    rank = 2 * np.arange(1, experts + 1) - experts - 1
    gini = (greatest[:, ::-1] * rank).sum(axis=1) / experts
    return {
        "top_share": top,
        "gini": float(gini.mean()),
        "gini_by_layer": gini.tolist(),
        "unused": float((uses == 0).mean()),
        "entropy": float(entropy.mean()),
        "entropy_by_layer": entropy.tolist(),
    }


def _used(picks: np.ndarray, experts: int) -> np.ndarray:
    """[N, E] bool, the experts among picks [N, K]."""
    used = np.zeros((len(picks), experts + 1), bool)
    used[np.arange(len(picks))[:, None], picks] = True  # -1 is the last column
    return used[:, :experts]


def _overlaps(
    picks: np.ndarray, experts: int, place: tuple[np.ndarray, np.ndarray], lag: int
) -> list[float | None]:
    """By layer, the share of a token's experts that the token `lag` before it used."""
    sequence, position = place
    key = sequence * (int(position.max()) + 1 + max(LAGS)) + position
    order = np.argsort(key, kind="stable")
    at = np.searchsorted(key[order], key - lag)
    earlier = order[np.minimum(at, len(order) - 1)]
    after = np.flatnonzero(key[earlier] == key - lag)
    before, found = earlier[after], []
    for layer in range(picks.shape[1]):
        used = _used(picks[:, layer], experts)
        size = used.sum(axis=1)
        whole = (size[before] > 0) & (size[after] > 0)
        both = (used[before] & used[after]).sum(axis=1)
        found.append(float((both[whole] / size[after][whole]).mean()) if whole.any() else None)
    return found


def _unions(
    picks: np.ndarray, experts: int, place: tuple[np.ndarray, np.ndarray]
) -> dict[int, float | None]:
    """By window, the mean number of distinct experts of so many tokens over that of one."""
    sums = {window: [] for window in WINDOWS}
    sequence, position = place
    order = np.lexsort((position, sequence))
    sequence, position = sequence[order], position[order]
    for layer in range(picks.shape[1]):
        used = union = _used(picks[order, layer], experts)
        one = used.sum(axis=1).mean()
        for window in WINDOWS:
            first, last = slice(max(len(order) - window + 1, 0)), slice(window - 1, None)
            whole = sequence[first] == sequence[last]
            whole &= position[last] - position[first] == window - 1
            union = union[first] | used[last]
            if whole.any() and one:
                sums[window].append(union[whole].sum(axis=1).mean() / one)
    return {window: _mean(values) for window, values in sums.items()}


def stack_distances(picks: np.ndarray, experts: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows since the last use of each pick's expert in its layer, and other experts used since.

    Both [N, L, K] i64; -1 for first uses, -2 where there is no pick.

    An independent LRU cache of C slots per layer that is given the picks one by one hits those
    whose distance is less than C.
    """
    rows, layers, top_k = picks.shape
    clock = np.full((layers, experts), -1, np.int64)  # of the last use
    row_of = np.full((layers, experts), -1, np.int64)
    since = np.full(picks.shape, -2, np.int64)
    distance = np.full(picks.shape, -2, np.int64)
    every = np.arange(layers)
    for n in range(rows):
        for k in range(top_k):
            expert = picks[n, :, k]
            there = every if expert.min() >= 0 else np.flatnonzero(expert >= 0)
            expert = expert[there]
            last = clock[there, expert]
            newer = (clock[there] > last[:, None]).sum(axis=1)
            distance[n, there, k] = np.where(last < 0, -1, newer)
            since[n, there, k] = np.where(last < 0, -1, n - row_of[there, expert])
            clock[there, expert], row_of[there, expert] = n * top_k + k, n
    return since, distance


def _reuse(picks: np.ndarray, experts: int) -> dict[str, Any]:
    since, distance = stack_distances(picks, experts)
    used, again = since > -2, since >= 0
    layers = range(picks.shape[1])
    by_layer = [distance[:, layer][again[:, layer]] for layer in layers]
    total = max(int(used.sum()), 1)
    return {
        "first_uses": float((since == -1).sum() / total),
        "reuse_tokens": _quantiles(since[again]),
        "reused_within": {n: float((again & (since <= n)).sum() / total) for n in NEAR},
        "stack_distance": _quantiles(distance[again]),
        "stack_median_by_layer": [float(np.median(d)) if d.size else None for d in by_layer],
    }


def _quantiles(values: np.ndarray) -> dict[str, float | None]:
    if not values.size:
        return dict.fromkeys(map("{:g}".format, QUANTILES))
    found = np.quantile(values, QUANTILES)
    return {f"{q:g}": float(value) for q, value in zip(QUANTILES, found, strict=True)}


def _score_tail(trace: Trace, kept: np.ndarray) -> dict[str, Any]:
    """Scores by rank, of rows that have any."""
    scores = trace.scores if trace.scores is not None else trace.top_scores
    if scores is None:
        return {"score_by_rank": None, "score_step": None, "score_steps": None}
    ranks, top_k = scores.shape[2], trace.top_k
    total, steps, ratios = np.zeros(ranks), np.zeros(ranks - 1), np.zeros(ranks - 1)
    for layer in range(trace.layers):
        best = -np.sort(-scores[kept, layer].astype(np.float32), axis=1)
        total += best.sum(axis=0, dtype=np.float64)
        whole = best[:, :-1] > 0
        ratio = np.divide(best[:, 1:], best[:, :-1], where=whole, out=np.zeros_like(best[:, 1:]))
        ratios += ratio.sum(axis=0, dtype=np.float64)
        steps += whole.sum(axis=0)
    by_rank = [float(r / n) if n else None for r, n in zip(ratios, steps, strict=True)]
    return {
        "score_by_rank": (total / (kept.sum() * trace.layers)).tolist(),
        "score_step": by_rank[top_k - 1] if top_k <= len(by_rank) else None,
        "score_steps": by_rank,
    }
