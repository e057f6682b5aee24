"""The lossy half of `speculation_frontier`: time, bytes and divergence of substitution.

Divergences and misses are measured on held-out text, token by token, with weights read in place;
times on the link, on tokens that each system makes itself. "Missed" counts every expert that a
step needs and that is not resident when its layer begins, wherever it is computed then; "moved"
counts records. Prefetched experts are resident by then, so the comparison of misses is with SMoE
without its prefetch.
"""

import argparse
import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

import moejax
from experiments import intervals
from experiments import smoe_common as common
from experiments.frontier_bench import FRONTIER, NO_PREFETCH, Bench, in_ms, named
from experiments.smoe_common import Text
from moejax.loss import exact_logits, layer_prices, measure
from moejax.policies.policy import Policy, with_alpha

FITTED = "auto-lossy, fitted"
DRAFTING = "auto-lossy:gamma=3"
LOSSY = {
    **dict.fromkeys(("smoe", NO_PREFETCH, "smoe-fetch"), (0.1, 0.25, 0.35, 0.5)),
    **dict.fromkeys(("smoe-timelines", "smoe-released"), (0.1, 0.25, 0.35, 0.5)),
    **dict.fromkeys(("auto-lossy", FITTED), (0.05, 0.1, 0.2, 0.4, 0.8)),
    DRAFTING: (0.2, 0.4, 0.8, 1.2, 1.6),
}
OURS = ("auto-lossy", FITTED, DRAFTING)
OWN_SHARE = 0.75  # residency at which only ours run beside LRU
TERMS = ("critical_path", "window", "share")  # of the price, which ablations leave out
HORIZON = 8.0  # steps, of the ablation that puts the saving of later loads in
ABLATED = 0.2  # alpha of the ablations
FIT = 0.4  # alpha with which steps are replaced to fit kappa


class Lossy:
    """The lossy systems, with kappa fitted on other text than they are measured on."""

    def __init__(self, bench: Bench, text: Text, options: argparse.Namespace):
        self.bench, self.text, self.options = bench, text, options
        self.windows, self.domain = text.stacked("profile")
        self.virtual = moejax.load("tiny", slots=bench.pool, virtual=True)
        self.kappa = self._fitted(options.tokens)

    def _fitted(self, tokens: int) -> np.ndarray:
        windows = self.text.stacked("measured")[0][:, : tokens + 1]
        made = with_alpha(named("auto-lossy"), FIT)
        chosen = common.with_policy(self.virtual, made, self.bench.pool)
        return layer_prices(measure(chosen, windows, exact_logits(self.virtual, windows)))

    def policy(self, name: str, alpha: float) -> Policy:
        """A system of `LOSSY`, or an ablation of `auto-lossy`."""
        if name == FITTED:
            made = with_alpha(named("auto-lossy"), alpha)
            return _routed(made, kappa=jnp.asarray(self.kappa))
        for term in TERMS:
            if name == _ablation(term):
                return _routed(with_alpha(named("auto-lossy"), alpha), **{term: False})
        if name == _ablation("reuse", "with"):
            made = with_alpha(named("auto-lossy"), alpha)
            costs = dataclasses.replace(made.router.costs, horizon=jnp.float32(HORIZON))
            return _routed(made, costs=costs)
        return with_alpha(named(name), alpha)

    def rows(self) -> list[dict[str, Any]]:
        """Times, divergences and misses of all systems."""
        options, bench, cases = self.options, self.bench, {}
        for share in options.lossy_shares:
            cases["lru", share, ""] = bench.generation(named("lru"), share)
            for name, alphas in options.lossy.items():
                for alpha in alphas if share != OWN_SHARE or name in OURS else ():
                    cases[name, share, alpha] = bench.generation(self.policy(name, alpha), share)
        for name in options.ablations:
            made = bench.generation(self.policy(name, ABLATED), FRONTIER)
            cases[name, FRONTIER, ABLATED] = made
        cases["all resident", 1.0, ""] = bench.whole()
        found = common.in_rounds(cases, options.rounds, options.seed)
        windows = self.windows[:, : options.tokens + 1]
        measured = common.Accuracy(self.virtual, windows, self.domain)
        rows = []
        for (name, share, alpha), case in cases.items():
            row = {"name": name, "residency": share, "alpha": alpha}
            row |= in_ms(common.merged(found[name, share, alpha]))
            row["times_ms"] = intervals.milliseconds(case, options.rounds)
            if name != "all resident":
                row |= self._text_figures(measured, case.runtime.policy)
            rows.append(row)
        return rows

    def _text_figures(self, measured: common.Accuracy, made: Policy) -> dict[str, Any]:
        """Of the held-out text, and by window what ratios at equal divergence are made of."""
        lost = measured.loss(made, self.bench.pool, local=False)
        layers = self.virtual.config.num_moe_layers
        loss = common.accuracy(lost, self.domain, layers)["all"]
        row = {f"text_{key}": loss[key] for key in ("missed", "moved", "hit_rate")}
        row |= {"kl": loss["trajectory_kl"]}
        row |= {key: loss[key] for key in ("perplexity_over_exact", "interval")}
        each = {"kl": lost.trajectory, "missed": lost.needed - lost.hits, "moved": lost.moved}
        for key, values in each.items():
            row[f"{key}_by_window"] = values.mean(axis=1, dtype=np.float64).tolist()
        return row


def ablations() -> list[str]:
    """Names of all ablations of the price."""
    return [*map(_ablation, TERMS), _ablation("reuse", "with")]


def _ablation(term: str, how: str = "without") -> str:
    return f"auto-lossy {how} {term.replace('_', ' ')}"


def _routed(made: Policy, **fields: Any) -> Policy:
    return dataclasses.replace(made, router=dataclasses.replace(made.router, **fields))


# What is compared at equal divergence: the rival, and the rows' numbers and what they are made of.
AT_EQUAL_KL = {
    "missed_bytes": (NO_PREFETCH, "missed_by_window"),
    "moved_bytes": ("smoe", "moved_by_window"),
    "tpot": ("smoe", "times_ms"),
}


def drawn(row: dict, key: str, domain: np.ndarray, seed: int) -> np.ndarray:
    """A row's number [1 + D]: as measured, then with windows, or rounds and prompts, drawn."""
    if key == "times_ms":
        found = np.median(intervals.by_round([row[key]], seed)[0], axis=1)
        found[1:] = found[1:] if len(row[key]) >= intervals.LEAST_ROUNDS else np.nan
        return found
    return intervals.windows([row[key]], domain, seed)[0]


def over_smoe(
    rows: list[dict], rival: str, key: str, share: float, domain: np.ndarray, seed: int
) -> tuple[float | None, list[float] | None]:
    """Mean of our least number over a rival's, at each of its divergences that we reach.

    With the interval of all windows, rounds and prompts drawn again, for all systems alike.
    """
    own = [row for row in rows if row["name"] in (*OURS, rival) and row["residency"] == share]
    made = {
        (row["name"], row["alpha"]): (
            drawn(row, "kl_by_window", domain, seed),
            drawn(row, key, domain, seed),
        )
        for row in own
    }
    found = [
        _mean_over({name: (kl[i], number[i]) for name, (kl, number) in made.items()}, rival)
        for i in range(1 + intervals.DRAWS)
    ]
    value = float(found[0]) if np.isfinite(found[0]) else None
    return value, intervals.interval(np.array(found[1:]))


def _mean_over(points: dict[tuple[str, Any], tuple[float, float]], rival: str) -> float:
    """Of (divergence, number) by system and alpha; NaN where we reach none of the rival's."""
    ours = [[points[key] for key in points if key[0] == name] for name in OURS]
    theirs = [point for (name, _), point in points.items() if name == rival]
    pairs = [(min(at_kl(line, kl) for line in ours), number) for kl, number in theirs]
    ratios = [least / number for least, number in pairs if np.isfinite(least)]
    return float(np.mean(ratios)) if ratios else np.nan


def at_kl(points: list[tuple[float, float]], kl: float) -> float:
    """A number at a divergence, on straight lines between points; infinite beyond them."""
    line = sorted(points)
    if not line or not line[0][0] <= kl <= line[-1][0]:
        return np.inf
    return float(np.interp(kl, *zip(*line, strict=True)))


def lossy_summary(
    rows: list[dict], domain: np.ndarray, share: float = FRONTIER, seed: int = 0
) -> dict[str, Any]:
    """Bytes and time over SMoE's at its own divergences, and the gap closed within 1 %."""
    summary = {}
    for name, (rival, key) in AT_EQUAL_KL.items():
        value, ends = over_smoe(rows, rival, key, share, domain, seed)
        summary[f"{name}_over_smoe_at_equal_kl"] = value
        summary[f"{name}_over_smoe_at_equal_kl_interval"] = ends
    for share_closed in sorted({row["residency"] for row in rows if row["name"] == "lru"}):
        for name, value in _gap_closed(rows, share_closed, seed).items():
            summary.setdefault(f"{name}_by_residency", {})[f"{share_closed:g}"] = value
    return summary | _gap_closed(rows, share, seed)


def _gap_closed(rows: list[dict], share: float, seed: int) -> dict[str, Any]:
    """Of LRU's time to that of all resident, by the fastest of ours within 1 % of perplexity."""
    own = [row for row in rows if row["name"] in OURS and row["residency"] == share]
    within = [row for row in own if row["perplexity_over_exact"] <= 1.01]
    lru = next(r for r in rows if r["name"] == "lru" and r["residency"] == share)
    resident = next(r for r in rows if r["name"] == "all resident")
    closed, ends = None, None
    if within:
        best = min(within, key=lambda row: row["tpot_ms"])
        times = [row["times_ms"] for row in (lru, best, resident)]
        closed, ends = intervals.paired(intervals.gap_closed, *times, seed=seed)
    return {"lossy_gap_closed": closed, "lossy_gap_closed_interval": ends}
