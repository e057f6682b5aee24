"""All systems and our composition of them: time against bytes, and time against loss.

Claim:     on the embedded model, at batch 1 and residencies of 25, 50 and 75 %, `auto` closes at
           least 40 % of the gap between on-demand LRU and everything resident without changing a
           bit, and is at most 2 % slower than the best exact preset; its lossy form misses at least
           10 % fewer bytes than SMoE at equal divergence, and closes at least 75 % of the gap at a
           perplexity within 1 %.
Command:   python -m experiments.speculation_frontier --out \\
           experiments/results/speculation_frontier.json
Hardware:  2 quiet CPU cores: about 25 minutes (--quick: 3); and the held-out text. The paced
           link is that of `smoe_ablation`: LRU spends 70 % of its time on loads at 40 % residency,
           and an expert on the host takes a third of a load.
Expected:  the papers compare with weaker baselines: SpecMoE 4.3x on-demand offloading at batch 256
           and a loss at batch 1, SP-MoE 1.07 to 3.5x, MoE-SpAc +42 % tokens per second over the
           best speculative baseline.

Every configuration continues the same prompts greedily. Exact ones make the same tokens, which is
checked. The memory of a draft model is taken from the slots. Lossy ones are timed on their own
tokens; their divergence is measured on held-out text, token by token.
"""

import argparse
import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import moejax
from experiments import smoe_common as common
from experiments import speculation_common as runs
from experiments.smoe_common import Text, gap_closed, with_policy
from experiments.speculation_common import Generation
from moejax.drafters import completed
from moejax.foresight import NoForesight
from moejax.policy import Policy, policy, with_alpha
from moejax.speculation import NoSpeculation

QUICK = {"windows": 1, "tokens": 128, "rounds": 1, "new": 24, "kl_windows": 1}
FULL = {"windows": 2, "tokens": 192, "rounds": 4, "new": 64, "kl_windows": 2}
SHARES = (0.125, 0.25, 0.5, 0.75)
SUMMARY = (0.25, 0.5, 0.75)  # residencies of the claim
EXACT = (
    *("lru", "score-window:window=32", "decayed-lfu", "host", "balanced", "hybrimoe"),
    *("specmoe", "self-draft", "lookup", "sp-moe", "sp-moe-self", "moe-spac"),
    *("auto:gamma=0", "auto"),
)
GAMMAS = (0, 1, 2, 4, 8)
SWEPT = ("self-draft", "lookup", "sp-moe", "sp-moe-self")
LOSSY = {
    "smoe": (0.1, 0.25, 0.35, 0.5),
    "smoe-fetch": (0.1, 0.25, 0.35, 0.5),
    "smoe-timelines": (0.1, 0.25, 0.35, 0.5),
    "smoe-released": (0.1, 0.25, 0.35, 0.5),
    "auto-lossy": (0.05, 0.1, 0.2, 0.4, 0.8),
}
FRONTIER = 0.5  # residency of the frontier of time and loss, beside the claim's own
POOL = 0.75  # of the pool that all residencies are parts of


def needs_model(made: Policy) -> bool:
    """Whether it drafts with another model."""
    return getattr(made.speculation.draft, "kind", None) == "model"


def capacity(share: float, experts: int, taken: int) -> int:
    """Slots of a residency, less those whose memory a draft model takes."""
    return common.slots_of(share, experts) - taken


def slots_taken(draft: moejax.Runtime, record: int) -> int:
    """Slots that the weights of a draft model would fill."""
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(draft.params))
    return -(-size // record)


def budgeted(made: Policy, slots: int) -> Policy:
    """The policy with so many slots in use."""
    return dataclasses.replace(made, capacity=jnp.int32(slots))


def with_gamma(made: Policy, gamma: int) -> Policy:
    """The policy with another draft length, none without a draft."""
    if not gamma:
        plain = dataclasses.replace(made, speculation=NoSpeculation())
        if plain.foresight.drafts:
            plain = dataclasses.replace(plain, foresight=NoForesight())
        return plain
    lengths = dataclasses.replace(made.speculation.lengths, gamma=jnp.int32(gamma))
    speculation = dataclasses.replace(made.speculation, lengths=lengths, max_length=max(GAMMAS))
    return dataclasses.replace(made, speculation=speculation)


class Bench:
    """The runtime behind the link, and the prompts."""

    def __init__(self, text: Text, new: int):
        plain = moejax.load("tiny")
        self.experts = common.experts_of(plain)
        self.record = plain.store.layout.stride
        self.link = runs.link(self.record)
        self.pool = common.slots_of(POOL, self.experts)
        self.runtime = runs.base_runtime(self.pool, self.link)
        self.taken = slots_taken(self.runtime.draft, self.record)
        self.resident = moejax.load("tiny", slots=self.experts)
        self.groups, self.new = runs.prompts_of(text, 1), new

    def generation(self, made: Policy, share: float) -> Generation | None:
        """A policy at a residency; None if nothing is left of the memory."""
        slots = capacity(share, self.experts, self.taken if needs_model(made) else 0)
        if slots < self.runtime.config.top_k:
            return None
        made = completed(budgeted(made, slots), self.runtime)
        chosen = with_policy(self.runtime, made, self.pool)
        return Generation(chosen, self.groups, self.new)

    def whole(self) -> Generation:
        """Everything resident, in memory."""
        return Generation(self.resident, self.groups, self.new)


def named(name: str, link: str) -> Policy:
    """The preset with the costs of the link, where it has such numbers."""
    load, host = runs.LOAD_US / 1e3, runs.HOST_US / 1e3
    costs = f"load={load},host={host}"
    extra = {
        "balanced": f":{costs}",
        "hybrimoe": f":{costs},device={load / 30}",
        "smoe": f":{costs},window=32",
        "smoe-fetch": ":window=32",
        "smoe-timelines": f":{costs},device={load / 30},window=32",
        "smoe-released": f":{costs}",
        "auto": f":{costs}",
        "auto:gamma=0": f",{costs}",
        "auto-lossy": f":{costs}",
    }
    return policy(name + extra.get(name, ""))


def exact_rows(bench: Bench, options: argparse.Namespace, names: tuple[str, ...]) -> list[dict]:
    """All exact systems at all residencies, interleaved."""
    cases = {}
    for share in options.shares:
        for name in names:
            made = bench.generation(named(name, bench.link), share)
            if made is not None:
                cases[name, share, ""] = made
    for name in options.swept:
        for gamma in GAMMAS:
            made = with_gamma(named(name, bench.link), gamma)
            cases[name, FRONTIER, gamma] = bench.generation(made, FRONTIER)
    cases["all resident", 1.0, ""] = bench.whole()
    found = common.in_rounds(cases, options.rounds, options.seed)
    truth = cases["all resident", 1.0, ""].tokens
    rows = []
    for (name, share, gamma), case in cases.items():
        if case.tokens != truth:
            raise RuntimeError(f"{name} at {share} made other tokens than plain decoding")
        row = common.merged(found[name, share, gamma])
        rows.append({"name": name, "residency": share, "gamma": gamma, **_in_ms(row)})
    return rows


def _in_ms(row: dict[str, float]) -> dict[str, float]:
    milliseconds = {f"{name}_ms": row.pop(name) * 1e3 for name in ("tpot", "tpot_spread", "ttft")}
    return milliseconds | row


def find(rows: list[dict], name: str, share: float, gamma: Any = "") -> dict | None:
    """The row of a system at a residency."""
    for row in rows:
        if (row["name"], row["residency"], row["gamma"]) == (name, share, gamma):
            return row
    return None


def exact_summary(rows: list[dict], shares: tuple[float, ...] = SUMMARY) -> dict[str, dict]:
    """What `auto` closes of the gap, and its time over that of the best other exact preset."""
    closed, over = {}, {}
    for share in shares:
        own = find(rows, "auto", share)
        if own is None:
            continue
        lru, best = find(rows, "lru", share), best_preset(rows, share)
        resident = find(rows, "all resident", 1.0)
        closed[f"{share:g}"] = gap_closed(lru["tpot_ms"], own["tpot_ms"], resident["tpot_ms"])
        over[f"{share:g}"] = own["tpot_ms"] / best["tpot_ms"]
    return {"exact_gap_closed": closed, "exact_over_best_preset": over}


def best_preset(rows: list[dict], share: float) -> dict:
    """The fastest exact preset of others at a residency."""
    others = [
        row
        for row in rows
        if row["residency"] == share and row["gamma"] == "" and not row["name"].startswith("auto")
    ]
    return min(others, key=lambda row: row["tpot_ms"])


def break_even(rows: list[dict]) -> list[dict]:
    """Tokens per cycle that speculation needs not to lose against the same policy at gamma 0."""
    law = []
    for row in rows:
        if row["gamma"] in ("", 0):
            continue
        plain = find(rows, row["name"], row["residency"], 0)
        cycle = row["tpot_ms"] * row["tokens_per_cycle"]
        needed = cycle / plain["tpot_ms"]
        law.append(
            {
                "name": row["name"],
                "residency": row["residency"],
                "gamma": row["gamma"],
                "needed": needed,
                "achieved": row["tokens_per_cycle"],
                "misses_over_plain": common.ratio(
                    row["missed"] * row["tokens_per_cycle"], plain["missed"]
                ),
            }
        )
    return law


def lossy_rows(bench: Bench, text: Text, options: argparse.Namespace) -> list[dict]:
    """Lossy systems: time on the link, divergence and misses on held-out text."""
    cases, resident = {}, ("all resident", 1.0, "")
    for share in options.lossy_shares:
        cases["lru", share, ""] = bench.generation(named("lru", bench.link), share)
        for name, alphas in options.lossy.items():
            for alpha in alphas:
                made = with_alpha(named(name, bench.link), alpha)
                cases[name, share, alpha] = bench.generation(made, share)
    cases[resident] = bench.whole()
    found = common.in_rounds(cases, options.rounds, options.seed)
    windows, domain = text.stacked("profile")
    virtual = moejax.load("tiny", slots=bench.pool, virtual=True)
    measured = common.Accuracy(virtual, windows[:, : options.tokens + 1], domain)
    rows = []
    for (name, share, alpha), case in cases.items():
        row = {"name": name, "residency": share, "alpha": alpha}
        row |= _in_ms(common.merged(found[name, share, alpha]))
        if name != "all resident":
            chosen = case.runtime.policy
            loss = measured.of(chosen, bench.pool, local=False)["all"]
            row |= {f"text_{key}": loss[key] for key in ("missed", "moved", "hit_rate")}
            row |= {
                "kl": loss["trajectory_kl"],
                "perplexity_over_exact": loss["perplexity_over_exact"],
            }
        rows.append(row)
    return rows


def at_kl(rows: list[dict], names: tuple[str, ...], share: float, kl: float, key: str) -> float:
    """The least `key` of systems at a divergence, on straight lines between their alphas."""
    best = np.inf
    for name in names:
        own = [row for row in rows if row["name"] == name and row["residency"] == share]
        own = sorted(own, key=lambda row: row["kl"])
        if own and own[0]["kl"] <= kl <= own[-1]["kl"]:
            best = min(best, np.interp(kl, [r["kl"] for r in own], [r[key] for r in own]))
    return float(best)


def lossy_summary(rows: list[dict], share: float = FRONTIER) -> dict[str, Any]:
    """Missed bytes against SMoE's at its own divergences, and the gap closed within 1 %."""
    smoe = [row for row in rows if row["name"] == "smoe-fetch" and row["residency"] == share]
    ratios = []
    for row in smoe:
        own = at_kl(rows, ("auto-lossy",), share, row["kl"], "text_missed")
        if np.isfinite(own):
            ratios.append(own / row["text_missed"])
    within = [
        row
        for row in rows
        if row["name"] == "auto-lossy"
        and row["residency"] == share
        and row["perplexity_over_exact"] <= 1.01
    ]
    lru = next(r for r in rows if r["name"] == "lru" and r["residency"] == share)
    resident = next(r for r in rows if r["name"] == "all resident")
    closed = None
    if within:
        best = min(row["tpot_ms"] for row in within)
        closed = gap_closed(lru["tpot_ms"], best, resident["tpot_ms"])
    return {
        "missed_bytes_over_smoe_at_equal_kl": float(np.mean(ratios)) if ratios else None,
        "lossy_gap_closed": closed,
    }


def targets_of(summary: dict[str, Any]) -> dict[str, dict]:
    """The claim's limits, and whether they hold."""
    values, limits = {}, {}
    for share, closed in summary["exact_gap_closed"].items():
        values[f"gap left {share}"] = None if closed is None else 1 - closed
        limits[f"gap left {share}"] = 0.6
    for share, over in summary["exact_over_best_preset"].items():
        values[f"over best preset {share}"], limits[f"over best preset {share}"] = over, 1.02
    lossy = summary["lossy_gap_closed"]
    values["lossy gap left"] = None if lossy is None else 1 - lossy
    name = "missed_bytes_over_smoe_at_equal_kl"
    values[name] = summary[name]
    return common.judged(values, limits | {"lossy gap left": 0.25, name: 0.9})


def plot(report: dict[str, Any], path: pathlib.Path) -> None:
    """Time over residency, the law of break-even, time against divergence."""
    figure, axes = common.figure(1, 3, (15, 4.6))
    rows = [row for row in report["rows"] if row["gamma"] == ""]
    for name in dict.fromkeys(row["name"] for row in rows):
        own = [row for row in rows if row["name"] == name]
        style = {"linewidth": 2.5, "color": "black"} if name == "auto" else {"linewidth": 1}
        x = [100 * row["residency"] for row in own]
        axes[0].plot(x, [row["tpot_ms"] for row in own], marker=".", label=name, **style)
    axes[0].set(xlabel="experts resident (%)", ylabel="TPOT (ms)", title="exact systems, batch 1")
    axes[0].legend(fontsize=7, ncols=2)
    for name in dict.fromkeys(row["name"] for row in report["break_even"]):
        own = [row for row in report["break_even"] if row["name"] == name]
        axes[1].plot(
            [r["needed"] for r in own], [r["achieved"] for r in own], marker="o", label=name
        )
        for row in own:
            axes[1].annotate(row["gamma"], (row["needed"], row["achieved"]), fontsize=7)
    most = max(max(r["needed"], r["achieved"]) for r in report["break_even"])
    axes[1].plot([1, most], [1, most], "k--", linewidth=1, label="break-even")
    axes[1].set(
        xlabel="tokens per cycle needed",
        ylabel="tokens per cycle made",
        title="speculation at 50 % residency (numbers: gamma)",
    )
    axes[1].legend(fontsize=7)
    lossy = [row for row in report["lossy"] if row["residency"] == FRONTIER]
    for name in dict.fromkeys(row["name"] for row in lossy if row["alpha"] != ""):
        own = [row for row in lossy if row["name"] == name]
        axes[2].plot([r["kl"] for r in own], [r["tpot_ms"] for r in own], marker="o", label=name)
    axes[2].set(
        xlabel="KL from exact routing (nats per token)",
        ylabel="TPOT (ms)",
        title="lossy systems, 50 % resident",
    )
    axes[2].legend(fontsize=7)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    common.save(figure, path)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """The report, without what `common.finish` adds."""
    text = Text.read(options.windows, options.kl_windows, options.tokens, options.data)
    bench = Bench(text, options.new)
    rows = exact_rows(bench, options, options.exact)
    lossy = lossy_rows(bench, text, options)
    summary = exact_summary(rows, tuple(s for s in SUMMARY if s in options.shares))
    summary |= lossy_summary(lossy)
    targets = targets_of(summary)
    return {
        "link": bench.link,
        "slots_of_draft_model": bench.taken,
        "record_bytes": bench.record,
        "rows": rows,
        "break_even": break_even(rows),
        "lossy": lossy,
        "summary": summary,
        "targets": targets,
        "verdict": common.verdict(targets),
    }


def main() -> None:
    """Measure, write the JSON and draw."""
    parser = common.arguments(__doc__)
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--new", type=int, help="tokens made after each prompt")
    parser.add_argument("--kl-windows", type=int, help="windows of a domain for divergences")
    options = common.resolved(parser.parse_args(), QUICK, FULL)
    quick = options.quick
    options.shares = (FRONTIER,) if quick else SHARES
    options.exact = ("lru", "hybrimoe", "auto:gamma=0", "auto") if quick else EXACT
    options.swept = ("self-draft",) if quick else SWEPT
    options.lossy_shares = (FRONTIER,) if quick else (0.25, FRONTIER)
    chosen = ("smoe-fetch", "auto-lossy")
    options.lossy = {n: LOSSY[n][::2] for n in chosen} if quick else LOSSY
    report = {
        "claim": "one price is as fast as the best exact system, and less lossy than SMoE",
        "command": "python -m experiments.speculation_frontier",
        **measure(options),
    }
    common.finish(report, options, plot)


if __name__ == "__main__":
    main()
