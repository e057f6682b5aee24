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
from experiments import smoe_common as common
from experiments.frontier_bench import FRONTIER, NO_PREFETCH, Bench, in_ms, named
from experiments.smoe_common import Text, gap_closed
from moejax.loss import exact_logits, layer_prices, measure
from moejax.policies.policy import Policy, with_alpha

FITTED = "auto-lossy, fitted"
LOSSY = {
    **dict.fromkeys(("smoe", NO_PREFETCH, "smoe-fetch"), (0.1, 0.25, 0.35, 0.5)),
    **dict.fromkeys(("smoe-timelines", "smoe-released"), (0.1, 0.25, 0.35, 0.5)),
    **dict.fromkeys(("auto-lossy", FITTED), (0.05, 0.1, 0.2, 0.4, 0.8)),
}
OURS = ("auto-lossy", FITTED)
TERMS = ("critical_path", "window", "share")  # of the price, which ablations leave out
HORIZON = 8.0  # steps, of the ablation that puts the saving of later loads in
ABLATED = 0.2  # alpha of the ablations
FIT = 0.4  # alpha with which steps are replaced to fit kappa


class Lossy:
    """The lossy systems, with kappa fitted on other text than they are measured on."""

    def __init__(self, bench: Bench, text: Text, options: argparse.Namespace):
        self.bench, self.text, self.options = bench, text, options
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
                for alpha in alphas:
                    cases[name, share, alpha] = bench.generation(self.policy(name, alpha), share)
        for name in options.ablations:
            made = bench.generation(self.policy(name, ABLATED), FRONTIER)
            cases[name, FRONTIER, ABLATED] = made
        cases["all resident", 1.0, ""] = bench.whole()
        found = common.in_rounds(cases, options.rounds, options.seed)
        windows, domain = self.text.stacked("profile")
        measured = common.Accuracy(self.virtual, windows[:, : options.tokens + 1], domain)
        rows = []
        for (name, share, alpha), case in cases.items():
            row = {"name": name, "residency": share, "alpha": alpha}
            row |= in_ms(common.merged(found[name, share, alpha]))
            if name != "all resident":
                loss = measured.of(case.runtime.policy, bench.pool, local=False)["all"]
                row |= {f"text_{key}": loss[key] for key in ("missed", "moved", "hit_rate")}
                row |= {"kl": loss["trajectory_kl"]}
                row |= {key: loss[key] for key in ("perplexity_over_exact", "interval")}
            rows.append(row)
        return rows


def ablations() -> list[str]:
    """Names of all ablations of the price."""
    return [*map(_ablation, TERMS), _ablation("reuse", "with")]


def _ablation(term: str, how: str = "without") -> str:
    return f"auto-lossy {how} {term.replace('_', ' ')}"


def _routed(made: Policy, **fields: Any) -> Policy:
    return dataclasses.replace(made, router=dataclasses.replace(made.router, **fields))


def at_kl(rows: list[dict], names: tuple[str, ...], share: float, kl: float, key: str) -> float:
    """The least `key` of systems at a divergence, on straight lines between their alphas."""
    best = np.inf
    for name in names:
        own = [row for row in rows if row["name"] == name and row["residency"] == share]
        own = sorted(own, key=lambda row: row["kl"])
        if own and own[0]["kl"] <= kl <= own[-1]["kl"]:
            best = min(best, np.interp(kl, [r["kl"] for r in own], [r[key] for r in own]))
    return float(best)


def over_smoe(rows: list[dict], key: str, rival: str, share: float) -> float | None:
    """Mean of our least `key` over a rival's, at each of its divergences that we reach."""
    theirs = [row for row in rows if row["name"] == rival and row["residency"] == share]
    pairs = [(at_kl(rows, OURS, share, row["kl"], key), row[key]) for row in theirs]
    ratios = [own / other for own, other in pairs if np.isfinite(own)]
    return float(np.mean(ratios)) if ratios else None


def lossy_summary(rows: list[dict], share: float = FRONTIER) -> dict[str, Any]:
    """Bytes and time over SMoE's at its own divergences, and the gap closed within 1 %."""
    own = [row for row in rows if row["name"] in OURS and row["residency"] == share]
    within = [row["tpot_ms"] for row in own if row["perplexity_over_exact"] <= 1.01]
    lru = next(r for r in rows if r["name"] == "lru" and r["residency"] == share)
    resident = next(r for r in rows if r["name"] == "all resident")
    closed = gap_closed(lru["tpot_ms"], min(within), resident["tpot_ms"]) if within else None
    return {
        "missed_bytes_over_smoe_at_equal_kl": over_smoe(rows, "text_missed", NO_PREFETCH, share),
        "moved_bytes_over_smoe_at_equal_kl": over_smoe(rows, "text_moved", "smoe", share),
        "tpot_over_smoe_at_equal_kl": over_smoe(rows, "tpot_ms", "smoe", share),
        "lossy_gap_closed": closed,
    }
