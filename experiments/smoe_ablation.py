"""SMoE step by step against on-demand LRU and its rivals, over a link like a GPU's.

Claim:     on the embedded model, at batch 1 and 40 % residency, SMoE (arXiv 2508.18983) needs at
           most 0.65 of on-demand LRU's TPOT without host compute and 0.45 with it; it misses at
           most 0.55 of LRU's bytes at alpha 0.25 and 0.47 at 0.35, with held-out perplexity within
           1 % and 2 % of exact routing.
Command:   python -m experiments.smoe_ablation --out experiments/results/smoe_ablation.json
Hardware:  2 quiet CPU cores: about 25 minutes (--quick: 2); and the held-out text. The link is
           paced: it is calibrated so that LRU at 40 % and batch 1 spends 70 % of its TPOT on
           loads, as the paper measured, and an expert computed on the host takes a third of a load.
Expected:  the paper's steps are -8, -20, -14 and -34 % of TPOT (score eviction, substitution,
           prefetch, balance), each relative to the one before.

Every configuration decodes the same held-out tokens, whatever its logits say, from prompts of 64
tokens; experts stay in their slots from one sequence to the next. A step of a batch of B makes B
tokens: TPOT is the time of a step, bytes and counts are per token. "Missed" is needed and not
resident when the layer begins, whether then fetched or computed on the host; a prefetched expert
whose record is still on its way is no miss (`late_per_token`), but its bytes are moved.
"""

import argparse
import dataclasses
import pathlib
import tempfile
from typing import Any

import numpy as np

import moejax
from experiments import intervals
from experiments import smoe_common as common
from experiments.smoe_common import RESIDENCIES, Replay, Text, gap_closed, with_policy
from moejax.policies.placement import HostAll
from moejax.policies.policy import Policy, policy
from moejax.policies.routing import TopK

QUICK = {"windows": 1, "tokens": 128, "rounds": 1, "profile": 1, "timed": 48}
FULL = {"windows": 8, "tokens": 256, "rounds": 5, "profile": 4, "timed": 64}
STEPS = ("lru", "+score eviction", "+substitution", "+prefetch", "+balance")
PAPER = dict(zip(STEPS[1:], (-0.08, -0.20, -0.14, -0.34), strict=True))
PAPER_HITS = dict(zip(STEPS[1:], (0.11, 0.60, 0.12, -0.03), strict=True))
WINDOWS = (1, 2, 4, 8, 16, 32, 64)  # n of the score eviction, which the paper does not give
RIVALS = ("HybriMoE", "MoE-Infinity", "Fiddler", "llama.cpp", "DeepSpeed")  # and LRU
NO_PREFETCH = "balance, no prefetch"  # SMoE without its third step
TIMELINES = "balance by finish times"  # and one prefetch, two layers ahead: no part of the paper
MAIN = 0.4  # residency of the summary
LIMITS = {
    "tpot_over_lru": 0.65,
    "tpot_over_lru_with_host": 0.45,
    "missed_bytes_over_lru 0.25": 0.55,
    "missed_bytes_over_lru 0.35": 0.47,
    "moved_bytes_over_lru 0.25": 0.55,
    "moved_bytes_over_lru 0.35": 0.47,
    "perplexity_over_exact 0.25": 1.01,
    "perplexity_over_exact 0.35": 1.02,
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One configuration."""

    name: str
    residency: float
    batch: int
    alpha: float = 0.25
    text: str = ""  # the policy, as `moejax.policies.policy` takes it; set by `cases`
    seats: str = ""  # who is resident from the start: "popular", "layers" or "all"

    @property
    def step(self) -> bool:
        """Whether it is one of the ablation's steps."""
        return self.name in STEPS


def policy_texts(window: int, alpha: float, load: float, host: float) -> dict[str, str]:
    """The policy of every step and baseline; "" = made of another one, see `build`."""
    costs, numbers = f"load={load:.6g},host={host:.6g}", f"alpha={alpha},window={window}"
    return {
        "lru": "lru",
        "+score eviction": f"score-window:window={window}",
        "+substitution": f"smoe-fetch:{numbers}",
        "+prefetch": f"smoe-fetch:{numbers}",
        "+balance": f"smoe:{numbers},{costs}",
        NO_PREFETCH: f"smoe:{numbers},{costs}",
        TIMELINES: f"smoe-timelines:{numbers},{costs},device={load / 30:.6g}",
        "HybriMoE": f"hybrimoe:{costs},device={load / 30:.6g}",
        "MoE-Infinity": "moe-infinity",
        "Fiddler": "host",
        "llama.cpp": "host",
        "DeepSpeed": "stream",
        "smoe-released": f"smoe-released:alpha={alpha},{costs}",
        "all resident": "lru",
    }


def build(case: Case) -> Policy:
    """The policy of a case."""
    made = policy(case.text)
    if case.name in ("+substitution", NO_PREFETCH):
        made = dataclasses.replace(made, predictor=policy("lru").predictor)
    return made


def cases(
    window: int, load: float, host: float, *, quick: bool = False, rivals: bool = True
) -> list[Case]:
    """All configurations; if `quick`, those of 40 % residency and batch 1 only."""
    batches, shares = ((1,), (MAIN,)) if quick else ((1, 3), RESIDENCIES)
    others = (NO_PREFETCH, TIMELINES, *((*RIVALS, "smoe-released") if rivals else ()))
    seats = {"Fiddler": "popular", "llama.cpp": "layers", "all resident": "all"}
    found = [Case(name, share, b) for b in batches for share in shares for name in STEPS]
    found += [Case(name, MAIN, 1, 0.35) for name in (*STEPS[2:], NO_PREFETCH)]
    found += [Case(name, MAIN, b, seats=seats.get(name, "")) for b in batches for name in others]
    found += [Case("all resident", 1.0, b, seats="all") for b in batches]
    return [
        dataclasses.replace(c, text=policy_texts(window, c.alpha, load, host)[c.name])
        for c in found
    ]


def sweep(runtime: moejax.Runtime, text: Text) -> list[dict]:
    """Hits of exact routing by the window n of score eviction, on the profile's text, and LRU's."""
    windows, domain = text.stacked("profile")
    found = common.Accuracy(runtime, windows, domain)
    slots = common.slots_of(MAIN, common.experts_of(runtime))
    rows = [{"policy": "lru", "n": None, "hit_rate": _hits(found, policy("lru"), slots)}]
    for n in WINDOWS:
        hits = _hits(found, policy(f"score-window:window={n}"), slots)
        rows.append({"policy": "score-window", "n": n, "hit_rate": hits})
    return rows


def _hits(found: common.Accuracy, chosen: Policy, slots: int) -> float:
    return found.of(chosen, slots, local=False)["all"]["hit_rate"]


def best_window(rows: list[dict]) -> int:
    """The n of most hits, the smaller one when level."""
    scored = [row for row in rows if row["n"] is not None]
    return min(scored, key=lambda row: (-row["hit_rate"], row["n"]))["n"]


@dataclasses.dataclass
class Bench:
    """What all timed runs share."""

    text: Text
    timed: int  # decode steps of a sequence
    popular: np.ndarray
    folder: pathlib.Path
    link: str = ""
    _runtime: Any = None

    def over(self, link: str) -> "Bench":
        """The same over another link."""
        tokens = common.PROMPT + self.timed
        loaded = moejax.load(common.MODEL, link=link, context=tokens)
        return dataclasses.replace(self, link=link, _runtime=loaded)

    def replay(self, case: Case) -> Replay:
        """A case, ready to run."""
        slots = common.slots_of(case.residency, common.experts_of(self._runtime))
        runtime = with_policy(self._runtime, build(case), slots)
        if case.seats:
            ids = self.popular if case.seats == "popular" else np.arange(slots)
            path = self.folder / f"{case.seats}-{slots}.json"
            runtime = common.seated(runtime, [int(i) for i in ids[:slots]], path)
        return Replay(runtime, common.groups_of(self.text, case.batch, self.timed))

    def calibrate(self, rounds: int, seed: int) -> dict[str, Any]:
        """The link on which LRU at 40 % and batch 1 spends the wanted share on loads."""
        lru = Case("lru", MAIN, 1, text="lru")
        full = Case("all resident", 1.0, 1, text="lru", seats="all")

        def measured(link: str) -> tuple[float, float, float]:
            bench = self.over(link)
            replays = {case: bench.replay(case) for case in (lru, full)}
            found = common.in_rounds(replays, rounds, seed)
            own, resident = (common.merged(found[case]) for case in (lru, full))
            return own["tpot"], resident["tpot"], own["needed"] - own["hits"]

        return common.calibrated(measured, moejax.load(common.MODEL).store.layout.stride)


def row_of(case: Case, runs: list[dict], slots: int, record: int) -> dict[str, Any]:
    """The figures of a case; see the module's text for the units."""
    run = common.merged(runs)
    if isinstance(build(case).placement, HostAll) and run["fetched"]:
        raise RuntimeError(f"{case.name} fetched experts that the host was to compute")
    tokens, fetched = case.batch, run["prefetched"]
    return {
        "name": case.name,
        "policy": case.text,
        "residency": case.residency,
        "slots": slots,
        "fast_bytes": slots * record,
        "batch": case.batch,
        "alpha": case.alpha if "alpha" in case.text else None,
        "tpot_ms": run["tpot"] * 1e3,
        "tpot_ms_spread": run["tpot_spread"] * 1e3,
        "slowest_step_ms": run["slowest"] * 1e3,
        "ttft_ms": run["ttft"] * 1e3,
        "ttft_ms_spread": run["ttft_spread"] * 1e3,
        "stall_ms": run["stall"] / 1e3,
        "stall_share": run["stall"] / 1e6 / run["tpot"],
        "exact_hit_rate": run["exact_hits"] / run["exact_needed"],
        "hit_rate": run["hits"] / run["needed"],
        "moved_bytes_per_token": run["moved_bytes"] / tokens,
        "missed_bytes_per_token": (run["needed"] - run["hits"]) * record / tokens,
        "late_per_token": run["late"] / tokens,
        "host_per_token": run["host"] / tokens,
        "replaced_per_token": run["replaced"] / tokens,
        "prediction_precision": common.ratio(run["predicted_right"], run["predicted"]),
        "prefetched_per_token": fetched / tokens,
        "prefetch_use": common.ratio(run["prefetch_used"], fetched),
    }


def add_accuracy(rows: list[dict], found: common.Accuracy, seed: int) -> None:
    """Held-out loss of the lossy cases of batch 1, and of one exact one: it must change nothing."""
    for row in rows:
        case = Case(row["name"], row["residency"], row["batch"], text=row["policy"])
        chosen = build(case)
        exact = isinstance(chosen.router, TopK)
        control = row["name"] == "+score eviction" and row["residency"] == MAIN
        if row["batch"] > 1 or (exact and not control):
            continue
        table = found.of(chosen, row["slots"], local=False, seed=seed)["all"]
        kept = ("nll", "perplexity", "perplexity_over_exact", "interval", "trajectory_kl", "flips")
        row |= {name: table[name] for name in kept}


def find(rows: list[dict], name: str, residency=MAIN, batch=1, alpha=0.25) -> dict[str, Any]:
    """The row of a configuration."""
    for row in rows:
        same = (row["name"], row["residency"], row["batch"]) == (name, residency, batch)
        if same and row["alpha"] in (None, alpha):
            return row
    raise KeyError((name, residency, batch, alpha))


def stepwise(rows: list[dict]) -> list[dict]:
    """Relative change of each step to the one before, beside the paper's (batch 1)."""
    found = []
    for row in rows:
        if row["name"] not in STEPS[1:] or row["alpha"] not in (None, 0.25):
            continue
        where = (row["residency"], row["batch"])
        before = find(rows, STEPS[STEPS.index(row["name"]) - 1], *where)
        start = find(rows, "lru", *where)
        changes = {
            name: row[key] / before[key] - 1
            for name, key in (("ttft", "ttft_ms"), ("hit_rate", "hit_rate"))
        }
        times = (row["times_ms"], before["times_ms"])
        changes["tpot"], ends = intervals.paired(intervals.change, *times)
        found.append(
            {"name": row["name"], "residency": where[0], "batch": where[1]}
            | {f"{name}_change": value for name, value in changes.items()}
            | {"tpot_change_interval": ends}
            | {"tpot_over_lru": row["tpot_ms"] / start["tpot_ms"]}
            | {"paper_tpot_change": PAPER[row["name"]]}
            | {"paper_hit_rate_change": PAPER_HITS[row["name"]]}
        )
    return found


def summarise(rows: list[dict]) -> dict[str, Any]:
    """The numbers of the claim, at 40 % residency and batch 1."""
    lru, resident = find(rows, "lru"), find(rows, "all resident", 1.0)
    times = (lru["tpot_ms"], resident["tpot_ms"])

    def over_lru(name: str, key: str) -> dict[str, float]:
        return {str(a): find(rows, name, alpha=a)[key] / lru[key] for a in (0.25, 0.35)}

    missed, moved = "missed_bytes_per_token", "moved_bytes_per_token"
    whole, fetch = find(rows, "+balance"), find(rows, "+prefetch")
    rivals = [row for row in rows if row["batch"] == 1 and row["name"] in RIVALS]
    best = min([lru, *rivals], key=lambda row: row["tpot_ms"])
    ratios = {
        "tpot_over_lru": (fetch, lru),
        "tpot_over_lru_with_host": (whole, lru),
        "tpot_over_lru_with_host_without_prefetch": (find(rows, NO_PREFETCH), lru),
        "tpot_over_lru_by_finish_times": (find(rows, TIMELINES), lru),
        "tpot_over_best_rival": (whole, best),
    }
    return {
        **compared(ratios),
        "best_rival": best["name"],
        "ttft_over_lru": whole["ttft_ms"] / lru["ttft_ms"],
        "ttft_over_best_rival": whole["ttft_ms"] / min(r["ttft_ms"] for r in [lru, *rivals]),
        "missed_bytes_over_lru": over_lru("+balance", missed),
        "missed_bytes_over_lru_without_host": over_lru("+prefetch", missed),
        "missed_bytes_over_lru_without_prefetch": over_lru("+substitution", missed),
        "missed_bytes_over_lru_with_host_without_prefetch": over_lru(NO_PREFETCH, missed),
        "moved_bytes_over_lru": over_lru("+balance", moved),
        "moved_bytes_over_lru_without_host": over_lru("+prefetch", moved),
        "moved_bytes_over_lru_without_prefetch": over_lru("+substitution", moved),
        "gap_closed": gap_closed(times[0], whole["tpot_ms"], times[1]),
        "gap_closed_without_host": gap_closed(times[0], fetch["tpot_ms"], times[1]),
        "perplexity_over_exact": {
            str(a): find(rows, "+balance", alpha=a)["perplexity_over_exact"] for a in (0.25, 0.35)
        },
    }


def compared(ratios: dict[str, tuple[dict, dict]]) -> dict[str, Any]:
    """Ratios of the times of two rows, in the median over rounds, with their intervals."""
    found: dict[str, Any] = {}
    for name, rows in ratios.items():
        times = (row["times_ms"] for row in rows)
        found[name], found[f"{name}_interval"] = intervals.paired(intervals.ratio, *times)
    return found


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """The report, without what `common.finish` adds."""
    sizes = (options.windows, options.profile)
    text = Text.read(*sizes, max(options.tokens, common.PROMPT + options.timed), options.data)
    virtual = moejax.load(common.MODEL, virtual=True)
    searched = sweep(virtual, text)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(text, options.timed, common.popular(virtual, text), pathlib.Path(folder))
        link = bench.calibrate(min(options.rounds, 3), options.seed)
        bench = bench.over(link["link"])
        window, costs = best_window(searched), (link["load_us"], link["host_us"])
        chosen = cases(window, *costs, quick=options.quick, rivals=options.rivals)
        replays = {case: bench.replay(case) for case in chosen}
        found = common.in_rounds(replays, options.rounds, options.seed)
    record = link["record_bytes"]
    rows = [
        row_of(c, found[c], replays[c].runtime.slots, record)
        | {"times_ms": intervals.milliseconds(replays[c], options.rounds)}
        for c in chosen
    ]
    windows, domain = text.stacked()
    exact = common.Accuracy(virtual, windows[:, : options.tokens + 1], domain)
    add_accuracy(rows, exact, options.seed)
    summary = summarise(rows)
    ends = {name: summary.get(f"{name}_interval") for name in LIMITS}
    targets = common.judged(common.flat(summary), LIMITS, ends)
    lru, resident = find(rows, "lru"), find(rows, "all resident", 1.0)
    return {
        "link": link | {"experts_share_in_rows": 1 - resident["tpot_ms"] / lru["tpot_ms"]},
        "window_sweep": {"residency": MAIN, "rows": searched, "chosen": window},
        "equal_bytes": "slots = residency x 192 experts, rounded down; slots x record_bytes is all "
        "that experts take in fast memory: no row keeps low-bit copies beside it",
        "rows": rows,
        "stepwise": stepwise(rows),
        "summary": summary,
        "targets": targets,
        "verdict": common.verdict(targets),
    }


def plot(report: dict[str, Any], path: pathlib.Path) -> None:
    """The steps beside the paper's, and the rivals, at batch 1."""
    rows = report["rows"]
    figure, (left, right) = common.figure(1, 2, (11, 4.6))
    shares = sorted({row["residency"] for row in rows if row["name"] == "+balance"})
    wide = 0.8 / len(shares)
    for i, share in enumerate(shares):
        start = find(rows, "lru", share)["tpot_ms"]
        found = [find(rows, name, share) for name in STEPS]
        left.bar(
            np.arange(len(STEPS)) + (i - (len(shares) - 1) / 2) * wide,
            [row["tpot_ms"] / start for row in found],
            wide * 0.9,
            yerr=[row["tpot_ms_spread"] / 2 / start for row in found],
            color=("#9ecae1", "#3182bd", "#08306b")[i % 3],
            error_kw={"lw": 0.8},
            label=f"{share:.0%} resident",
        )
    paper = np.cumprod([1.0, *(1 + change for change in PAPER.values())])
    left.plot(range(len(STEPS)), paper, "D", ms=6, color="#e6550d", label="Paper (Qwen2-57B)")
    left.set_xticks(range(len(STEPS)), [name.replace(" ", "\n") for name in STEPS], fontsize=9)
    left.set(ylabel="TPOT relative to LRU", ylim=(0, 1.45), title="SMoE step by step, batch 1")
    left.legend(frameon=False, ncols=2, loc="upper center", fontsize=9)
    draw_rivals(right, rows)
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    common.save(figure, path)


def draw_rivals(axis: Any, rows: list[dict]) -> None:
    """TPOT of everything at 40 % residency and batch 1, with the time waited for link and host."""
    chosen = [r for r in rows if (r["batch"], r["residency"]) == (1, MAIN)]
    chosen = [r for r in chosen if r["alpha"] in (None, 0.25)] + [find(rows, "all resident", 1.0)]
    chosen = sorted(chosen, key=lambda row: -row["tpot_ms"])
    labels = [{"lru": "LRU (mixtral-offloading)"}.get(r["name"], r["name"]) for r in chosen]
    total = np.array([row["tpot_ms"] for row in chosen])
    stall = np.array([row["stall_ms"] for row in chosen])
    axis.barh(labels, total - stall, color="#3182bd", label="Computing and copying")
    axis.barh(labels, stall, left=total - stall, color="#fdae6b", label="Waiting for link or host")
    for i, value in enumerate(total):
        axis.text(value, i, f" {value:.2f}", va="center", fontsize=8)
    axis.set(xlabel="TPOT (ms)", xlim=(0, total.max() * 1.13), title="40 % resident, batch 1")
    axis.legend(frameon=False, fontsize=9, loc="upper right")


def main() -> None:
    """Measure, write the JSON and draw."""
    parser = common.arguments(__doc__)
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--timed", type=int, help="decode steps timed of a window")
    parser.add_argument("--profile", type=int, help="windows of each domain to choose numbers on")
    parser.add_argument("--no-rivals", dest="rivals", action="store_false")
    options = common.resolved(parser.parse_args(), QUICK, FULL)
    report = {
        "claim": "at 40 % residency and batch 1 SMoE takes at most 0.65 of LRU's TPOT, 0.45 with "
        "the host, for at most 1 % of perplexity at alpha 0.25 and 2 % at 0.35",
        "command": "python -m experiments.smoe_ablation",
        **measure(options),
    }
    common.finish(report, options, plot)


if __name__ == "__main__":
    main()
