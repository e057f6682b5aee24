"""Score processes fitted to real traces, by the overlap of their picks and the spread of scores."""

import dataclasses
import functools
import math
from collections.abc import Iterable
from typing import Any

import numpy as np
from scipy.optimize import brentq, least_squares

from moejax.errors import InputError
from moejax.traces.statistics import LAGS, statistics
from moejax.traces.synthetic import ScoreProcess, generate
from moejax.traces.trace import Phase, Trace

SAMPLES = 1 << 20  # logits behind each expectation; their draws are the same every time
CORRELATIONS = np.linspace(0, 1, 41)
THINNED = 8  # every so many tokens, for the overlap at long lags
LONG_LAGS = tuple(THINNED * lag for lag in LAGS if THINNED * lag > max(LAGS))
DOCUMENTS = (32, 64, 128, 256, 512, 1024)  # lengths that are tried
USUAL_DOCUMENT = 256  # at least, where none ends within a sequence
LOGITS = 1 << 25  # at most, of each trace that a process is judged by
SIGMAS = (1e-3, 50.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fit:
    """A process, and statistics of the trace and of traces that the process makes.

    Names of statistics: `overlap_LAG`; `overlap_between`, of tokens of different sequences;
    `score_entropy`, of a token's scores over log E; `score_gap`, the mean logarithm of the best
    score over that of the K-th; `gini` and `top_25%`, of how often a layer's experts are picked.
    """

    process: ScoreProcess
    sequence_tokens: int
    measured: dict[str, float]
    # Means and standard deviations over seeds; None of what traces of this length do not have.
    reproduced: dict[str, float | None]
    spread: dict[str, float | None]

    @property
    def errors(self) -> dict[str, float | None]:
        """Reproduced less measured."""
        made = self.reproduced
        return {n: None if made[n] is None else made[n] - v for n, v in self.measured.items()}

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return dataclasses.asdict(self) | {"errors": self.errors}


def fit(
    trace: Trace,
    *,
    sigma: float | None = None,
    document_tokens: int | None = None,
    seeds: Iterable[int] = range(4),
) -> Fit:
    """The process whose picks overlap as a trace's do, and whose scores spread as widely.

    Decode rows count, and all rows where there are none. The bias comes from the overlap between
    sequences, so a single one has none; document share, correlation and document length from the
    overlap by lag, least squares; sigma from the entropy of the scores, or where only the best are
    there, or weights, from how far the K-th is behind the first.

    Args:
        sigma: of the logits; needed where the trace has neither scores nor weights.
        document_tokens: instead of fitting it.
        seeds: of the traces that the fit is judged by.

    Raises:
        InputError: too few tokens in a row, no sigma, or no seed.
    """
    measured, length = summary(trace)
    if not (seeds := [*seeds]):
        raise InputError("a fit is judged by traces that it makes: give at least one seed")
    if "overlap_1" not in measured or "overlap_2" not in measured:
        raise InputError("a process is fitted to at least three tokens in a row: record more")
    sizes = {"layers": trace.layers, "experts": trace.experts, "top_k": trace.top_k}
    if sigma is None:
        sigma = _sigma(measured, trace.experts, trace.top_k)
    lags = {int(n[8:]): v for n, v in measured.items() if n[8:].isdigit()}
    bias = 0.0
    if "overlap_between" in measured:
        bias = float(_correlation_of(measured["overlap_between"], trace.experts, trace.top_k))
    documents = [document_tokens]
    if document_tokens is None:  # that long, or longer than any sequence
        documents = [n for n in DOCUMENTS if n <= length // 2] + [max(length, USUAL_DOCUMENT)]
    fits = []
    for tokens in documents:
        start = ScoreProcess(
            **sizes,
            sigma=sigma,
            bias=bias,
            document=0.0,
            correlation=0.0,
            document_tokens=tokens,
        )
        fits.append(_lags_fitted(lags, start, length))
    process = min(fits, key=lambda found: found[0])[1]
    reproduced, spread = _reproduced(process, trace, length, measured, seeds)
    return Fit(
        process=process,
        sequence_tokens=length,
        measured=measured,
        reproduced=reproduced,
        spread=spread,
    )


def _lags_fitted(
    lags: dict[int, float], start: ScoreProcess, length: int
) -> tuple[float, ScoreProcess]:
    """Squared error of the overlaps, and the process of the least."""
    most = 1 - start.bias
    # by the number of pairs that far apart
    certainty = [math.sqrt(max(length - lag, 1) / length) for lag in lags]

    def made(numbers: np.ndarray) -> ScoreProcess:
        document, correlation = map(float, numbers)
        document = min(max(document * most, 0.0), most)
        return dataclasses.replace(start, document=document, correlation=correlation)

    def wrong(numbers: np.ndarray) -> np.ndarray:
        process = made(numbers)
        rho = [process.correlation_at(lag, length) for lag in lags]
        error = expected_overlap(rho, start.experts, start.top_k) - [*lags.values()]
        return error * certainty

    bounds = ([0.0, 0.0], [1.0, 0.99])
    tries = [least_squares(wrong, (0.5, phi), bounds=bounds) for phi in (0.2, 0.6)]
    best = min(tries, key=lambda found: found.cost)
    return float(best.cost), made(best.x)


def summary(trace: Trace) -> tuple[dict[str, float], int]:
    """The statistics of `Fit` that a trace has, and the median length of its sequences."""
    decode = np.isin(trace.phase, (Phase.DECODE, Phase.VERIFY)) & trace.accepted
    kept = decode if decode.any() else trace.accepted
    rows = _rows(trace, kept)
    stats = statistics(rows, "all")
    found = {f"overlap_{lag}": stats.overlap[lag] for lag in LAGS}
    thin = kept & (trace.position % THINNED == 0)
    if thin.any():
        far = _rows(trace, thin)
        far = dataclasses.replace(far, position=far.position // THINNED)
        overlap = statistics(far, "all").overlap
        found |= {f"overlap_{lag}": overlap[lag // THINNED] for lag in LONG_LAGS}
    found |= {"overlap_between": _between(rows), **_dispersion(rows)}
    found |= {"gini": stats.gini, "top_25%": stats.top_share["25%"]}
    lengths = np.unique(rows.sequence, return_counts=True)[1]
    return {n: float(v) for n, v in found.items() if v is not None}, int(np.median(lengths))


def _rows(trace: Trace, kept: np.ndarray) -> Trace:
    """Rows [N] bool, a pass each, without what is of whole passes."""
    columns = ("sequence", "position", "phase", "token", "accepted", "picks", "weights")
    columns += ("scores", "top_ids", "top_scores")
    own = {n: c[kept] for n, c in trace.columns().items() if n in columns}
    run = np.arange(int(kept.sum()), dtype=np.int32)
    return Trace(model=trace.model, experts=trace.experts, run=run, **own)


def _between(trace: Trace) -> float | None:
    """Share of picks that tokens of two different sequences have in common."""
    names, sequence = np.unique(trace.sequence, return_inverse=True)
    if len(names) < 2:
        return None
    shape = (len(names), trace.layers, trace.experts)
    row, layer, _ = np.nonzero(trace.picks >= 0)
    uses = np.zeros(shape)
    np.add.at(uses, (sequence[row], layer, trace.picks[trace.picks >= 0]), 1)
    share = uses / np.maximum(np.bincount(sequence), 1)[:, None, None]
    pairs = share.sum(axis=0) ** 2 - (share**2).sum(axis=0)
    return float(pairs.sum(axis=1).mean() / (len(names) * (len(names) - 1)) / trace.top_k)


def _dispersion(trace: Trace) -> dict[str, float]:
    """How widely scores are spread."""
    found = {}
    if trace.scores is not None:
        scores = trace.scores.astype(np.float32)
        logs = np.log(scores, where=scores > 0, out=np.zeros_like(scores))
        entropy = -(scores * logs).sum(axis=-1, dtype=np.float64)
        found["score_entropy"] = float(entropy.mean() / math.log(max(trace.experts, 2)))
    best = next((c for c in (trace.scores, trace.top_scores, trace.weights) if c is not None), None)
    if best is not None and trace.top_k > 1 and best.shape[2] >= trace.top_k:
        best = -np.sort(-best.astype(np.float64), axis=-1)
        first, last = best[..., 0], best[..., trace.top_k - 1]
        whole = last > 0
        if whole.any():
            found["score_gap"] = float(np.log(first[whole] / last[whole]).mean())
    return found


def _reproduced(
    process: ScoreProcess, trace: Trace, length: int, measured: dict, seeds: Iterable[int]
) -> tuple[dict[str, float | None], dict[str, float | None]]:
    """Means and standard deviations, over seeds, of statistics of traces as long as the real one,
    if LOGITS allow."""
    most = max(LOGITS // (trace.layers * trace.experts), 64)
    length = min(length, most // 2)
    tokens = min(max(trace.rows, length * (1 + ("overlap_between" in measured))), most)
    runs = []
    for seed in seeds:
        made = generate(process, tokens, seed=seed, sequence_tokens=length)
        runs.append(summary(made)[0])
    own = {name: [run[name] for run in runs if name in run] for name in measured}
    return (
        {name: float(np.mean(values)) if values else None for name, values in own.items()},
        {name: float(np.std(values)) if values else None for name, values in own.items()},
    )


def _sigma(measured: dict[str, float], experts: int, top_k: int) -> float:
    normal = _normal(experts)
    if "score_entropy" in measured:
        wanted = measured["score_entropy"]

        def excess(sigma: float) -> float:
            logits = sigma * normal
            scores = np.exp(logits - logits.max(axis=1, keepdims=True))
            scores /= scores.sum(axis=1, keepdims=True)
            logs = np.log(scores, where=scores > 0, out=np.zeros_like(scores))
            return -(scores * logs).sum(axis=1).mean() / math.log(experts) - wanted

        if excess(SIGMAS[0]) <= 0 or excess(SIGMAS[1]) >= 0:
            raise InputError(f"no sigma gives scores of the entropy {wanted:.4f}: give sigma")
        return float(brentq(excess, *SIGMAS, xtol=1e-4))
    if measured.get("score_gap", 0.0) > 0:
        ordered = -np.sort(-normal, axis=1)
        return measured["score_gap"] / float((ordered[:, 0] - ordered[:, top_k - 1]).mean())
    raise InputError("the trace has neither scores nor weights that differ: give sigma")


@functools.lru_cache(maxsize=4)
def _normal(experts: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((max(SAMPLES // experts, 64), experts))


@functools.lru_cache(maxsize=4)
def _curve(experts: int, top_k: int) -> np.ndarray:
    """Overlap at each of CORRELATIONS."""
    first, other = (
        _normal(experts),
        np.random.default_rng(1).standard_normal(_normal(experts).shape),
    )
    picks = np.argpartition(-first, top_k - 1, axis=1)[:, :top_k]
    found = []
    for rho in CORRELATIONS:
        mixed = rho * first + math.sqrt(1 - rho * rho) * other
        bar = -np.partition(-mixed, top_k - 1, axis=1)[:, top_k - 1 : top_k]
        found.append((np.take_along_axis(mixed, picks, axis=1) >= bar).mean())
    return np.maximum.accumulate(found)


def expected_overlap(correlation: Any, experts: int, top_k: int) -> np.ndarray:
    """Share of the top-k that two vectors of E normal numbers have in common, by simulation.

    Args:
        correlation: of the numbers of an expert, any shape; negative ones count as 0.
    """
    return np.interp(correlation, CORRELATIONS, _curve(experts, top_k))


def _correlation_of(overlap: float, experts: int, top_k: int) -> float:
    curve = _curve(experts, top_k)
    return float(np.interp(overlap, curve, CORRELATIONS))
