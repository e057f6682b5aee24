"""What MoE-SpAc's utility knows: hot experts from verification windows, against plain history.

Claim:     experts that are hot by verification windows foretell the experts of the next cycle with
           a precision above that of the same counter fed by the last 9 tokens decoded; hot or cold
           is right for 85 % of the last layer's experts (arXiv 2603.09983); and the policy takes
           less time per token than all others of this comparison.
Command:   python -m experiments.spac_utility --out experiments/results/spac_utility.json
Hardware:  2 quiet CPU cores: about 20 minutes (--quick: 2); and the held-out text. Times are over
           the paced link of `speculation_common`, with experts on the host at a third of a load.
Expected:  0.85 at the last layer, above an autoregressive predictor; 1.42 of llama.cpp's tokens per
           second with speculation, 2.06 of HybriMoE's; a small cap K hurts.

A draft model proposes gamma tokens that the embedded model verifies with the pending one. What is
to be foretold is always the same, the experts that the tokens which are really made in the next
cycle use ("window" rows: all positions it verifies). An estimator is asked after each cycle. All
begin cold with every prompt, and count from its 18th token on. Those that rank call as many experts
of a layer hot as the one fed by verification windows does. Intervals (95 %) draw prompts anew
within their domains. Sampling at temperature 1 is the main case: greedy text of so small a model
repeats itself (see `distinct`). In timed runs the others may also have the draft model's memory.
"""

import argparse
import dataclasses
import pathlib
from typing import Any

import jax.numpy as jnp
import numpy as np

import moejax
from experiments import smoe_common as common
from experiments import spac_runs
from experiments import spac_windows as windows
from experiments import speculation_common as speculation
from experiments.smoe_common import Text
from experiments.spac_runs import CAP, GAMMA, MAIN, TEMPERATURE, Case
from experiments.spac_windows import Recorded
from moejax.policies.eviction import LRU
from moejax.policies.evictors import ScoreEMA
from moejax.policies.utility import SoftUtility, Utility
from moejax.reports.plots import BLUE, LOOKS, ORANGE, SKY

UP = 5.0
CAPS, UPS = (1, 2, 3, 5, 8), (1.0, 3.0, 5.0, 7.0)
SLOTS, LENGTHS = (24, 48, 72, 96), (32, 64, 128)
OURS, CONTROL = "verification window", "last 9 tokens"
RIVALS = ("lru", "host", "hybrimoe", "sp-moe")
PAPER = {"accuracy": 0.85, "speedup_over_hybrimoe": 2.06, "speedup_over_llama_cpp_sd": 1.42}
QUICK = {
    **{"windows": 2, "tokens": 48, "rounds": 1, "timed": 24, "gammas": (4, GAMMA)},
    **{"temperatures": (TEMPERATURE,), "slots": (MAIN,), "caps": (3,), "rivals": ("lru", "host")},
}
FULL = {
    **{"windows": 8, "tokens": 128, "rounds": 5, "timed": 64, "gammas": (2, 4, GAMMA)},
    **{"temperatures": (0.0, TEMPERATURE), "slots": SLOTS, "caps": CAPS, "rivals": RIVALS},
}


def utility(cap: int = CAP, up: float = UP, **fields: Any) -> Utility:
    """An estimator whose numbers change without compiling anew."""
    return Utility(cap=jnp.int32(cap), up=jnp.float32(up), **fields)


def estimates(recorded: Recorded) -> dict[str, np.ndarray]:
    """Who is hot after each cycle, [P, C, L, E] bool, by estimator."""
    window, accepted = (windows.whole(recorded, x) for x in (recorded.fed, recorded.made))
    latest, each = windows.last(recorded), windows.single(recorded)
    levels = {
        OURS: windows.replayed(utility(), window),
        "accepted positions": windows.replayed(utility(), accepted),
        CONTROL: windows.replayed(utility(), latest),
        "tokens gathered to windows of 9": windows.replayed(
            utility(window=jnp.int32(windows.WINDOW)), each
        ),
    }
    hot = {name: level > 0 for name, level in levels.items()}
    number = hot[OURS].sum(axis=-1)
    soft, ema = SoftUtility(decay=jnp.float32(0.9)), ScoreEMA(decay=jnp.float32(0.9))
    ranked = {
        # a level first, then the uses in the window just seen
        f"{CONTROL}, same number": levels[CONTROL] * 1024 + _uses_of(latest, recorded),
        "counts of the verification window alone": recorded.uses(recorded.fed),
        "counts of the last 9 tokens alone": _uses_of(latest, recorded),
        "score EMA (HybriMoE)": windows.replayed(ema, each, "keys"),
        "soft, verification window": windows.replayed(soft, window, "keys"),
        "soft, accepted positions": windows.replayed(soft, accepted, "keys"),
    }
    return hot | {name: windows.best(value, number) for name, value in ranked.items()}


def _uses_of(steps: windows.Steps, recorded: Recorded) -> np.ndarray:
    shown = dataclasses.replace(recorded, picks=steps.picks, scores=steps.scores)
    return shown.uses(steps.valid)


def estimator_rows(recorded: Recorded, about: dict, sample: np.ndarray) -> list[dict]:
    """A row for each estimator and target, with the difference to the control's precision."""
    rows, hot = [], estimates(recorded)
    for target, positions in (("made", recorded.made), ("window", recorded.fed)):
        uses = recorded.uses(positions)
        sums = {name: windows.tally(own, uses, recorded) for name, own in hot.items()}

        def precisions(name: str, sums=sums) -> np.ndarray:
            right, number = (sums[name][key].sum(axis=1) for key in ("right", "hot"))
            return windows.quotient(right, number, sample)

        for name, own in sums.items():
            apart = windows.bounds(precisions(name) - precisions(CONTROL))
            row = {**about, "estimator": name, "target": target}
            rows.append(row | windows.rates(own, sample) | {"precision_over_control": apart})
    return rows


def sweep_rows(recordings: dict, options: argparse.Namespace, sample: np.ndarray) -> list[dict]:
    """Of the estimator and of the control: one number changed at a time, at temperature 1."""
    main, rows = recordings[GAMMA, TEMPERATURE], []

    def add(kind: str, value: Any, recorded: Recorded, **numbers: Any) -> None:
        uses = recorded.uses(recorded.made)
        fed = {OURS: windows.whole(recorded, recorded.fed), CONTROL: windows.last(recorded)}
        for name, steps in fed.items():
            hot = windows.replayed(utility(**numbers), steps) > 0
            found = windows.rates(windows.tally(hot, uses, recorded), sample)
            rows.append({"sweep": kind, "value": value, "estimator": name, **found})

    for cap in CAPS:
        add("cap", cap, main, cap=cap)
    for up in UPS:
        add("up", up, main, up=up)
    for gamma in options.gammas:
        add("gamma", gamma, recordings[gamma, TEMPERATURE])
    for length in (n for n in LENGTHS if n <= options.tokens):
        add("tokens", length, main.until(length))
    return rows + slot_rows(main, sample)


def slot_rows(recorded: Recorded, sample: np.ndarray) -> list[dict]:
    """Hot experts that fit into so many slots, and the picks that those who stay carry."""
    uses, rows = recorded.uses(recorded.made), []
    steps = windows.whole(recorded, recorded.fed)
    keys = windows.replayed(utility(after_use="restore"), steps, "keys")
    recency = windows.replayed(LRU(), steps, "keys") + 1  # 0 = never used
    for slots in SLOTS:
        stay, hot = windows.fitting(keys, slots)
        found = windows.rates(windows.tally(hot, uses, recorded), sample)
        lru = windows.fitting(recency, slots)[0]
        shares = {
            name: windows.rates(windows.tally(own, uses, recorded), sample)["share"]
            for name, own in (("resident_share", stay), ("resident_share_of_lru", lru))
        }
        rows.append({"sweep": "slots", "value": slots, "estimator": OURS, **found, **shares})
    return rows


def trace_rows(data: pathlib.Path) -> list[dict]:
    """The same on a real routing, whose windows hold no rejected tokens: the control is the same.

    One sequence, so there are no intervals.
    """
    recorded = windows.real_trace(data)
    if recorded is None:
        return []
    uses, steps = recorded.uses(recorded.made), windows.whole(recorded, recorded.fed)
    sample, rows = np.zeros((1, 1), int), []
    numbers = [{"cap": cap} for cap in CAPS] + [{"up": up} for up in UPS if up != UP]
    cases = [(OURS, steps, own) for own in numbers] + [(CONTROL, windows.last(recorded), {})]
    for name, own, changed in cases:
        hot = windows.replayed(utility(**changed), own) > 0
        found = windows.rates(windows.tally(hot, uses, recorded), sample)
        found = {key: value for key, value in found.items() if not key.endswith("interval")}
        rows.append({"estimator": name, "cap": CAP, "up": UP} | changed | found)
    return rows


def recordings_of(
    virtual: moejax.Runtime, text: Text, options: argparse.Namespace
) -> dict[tuple[int, float], Recorded]:
    """By gamma and temperature; gammas below the greatest only at temperature 1."""
    prompts = text.stacked()[0][:, : speculation.PROMPT]
    pairs = [(gamma, TEMPERATURE) for gamma in options.gammas]
    pairs += [(GAMMA, t) for t in options.temperatures if t != TEMPERATURE]
    return {
        pair: windows.record(virtual, prompts, options.tokens, *pair, options.seed)
        for pair in pairs
    }


def recording_row(pair: tuple[int, float], recorded: Recorded) -> dict[str, Any]:
    """How a recording went: tokens per cycle, and how many of a prompt's tokens are distinct."""
    kept = [row[made] for row, made in zip(recorded.token, recorded.made, strict=True)]
    return {
        "gamma": pair[0],
        "temperature": pair[1],
        "cycles": int(recorded.cycles.sum()),
        "tokens_per_cycle": float(recorded.count.sum() / recorded.cycles.sum()),
        "distinct": float(np.mean([len(set(own.tolist())) / len(own) for own in kept])),
    }


def find(rows: list[dict], **wanted: Any) -> dict[str, Any]:
    """The first row with these values."""
    for row in rows:
        if all(row[name] == value for name, value in wanted.items()):
            return row
    raise KeyError(wanted)


def summarise(rows: list[dict]) -> dict[str, float]:
    """Precision by verification windows, and by the last tokens, at temperature 1."""
    main = {"gamma": GAMMA, "temperature": TEMPERATURE, "target": "made"}
    return {
        "hot_precision": find(rows, estimator=OURS, **main)["precision"],
        "control_precision": find(rows, estimator=CONTROL, **main)["precision"],
    }


def judge(rows: list[dict], timed: list[dict]) -> dict[str, dict]:
    """The claim's parts."""
    precision = summarise(rows)
    ours = find(rows, estimator=OURS, gamma=GAMMA, temperature=TEMPERATURE, target="made")
    rivals = [r for r in timed if (r["slots"], r["temperature"]) == (MAIN, TEMPERATURE)]
    rivals = [row["tpot_ms"] for row in rivals if row["name"] != "moe-spac"]
    own = find(timed, policy=Case("moe-spac").text, slots=MAIN, temperature=TEMPERATURE)["tpot_ms"]
    least = {
        "hot_precision over control_precision": (*precision.values(),),
        "accuracy at the last layer": (ours["last_layer_accuracy"], PAPER["accuracy"]),
    }
    targets = {
        name: {"value": value, "at_least": bar, "met": None not in (value, bar) and value >= bar}
        for name, (value, bar) in least.items()
    }
    name = "tpot over the best of the others"
    return targets | common.judged({name: own / min(rivals)}, {name: 1.0})


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """The report, without what `common.finish` adds."""
    text = Text.read(options.windows, 1, speculation.PROMPT + options.tokens, options.data)
    virtual = moejax.load(common.MODEL, virtual=True, slots=MAIN, policy="moe-spac")
    draft = moejax.load("tiny-draft", context=virtual.context)
    virtual = dataclasses.replace(virtual, draft=draft)
    feeds, domain = text.stacked()
    recordings, sample = recordings_of(virtual, text, options), windows.drawn(domain, options.seed)
    rows = []
    for (gamma, temperature), recorded in recordings.items():
        rows += estimator_rows(recorded, {"gamma": gamma, "temperature": temperature}, sample)
    costs = spac_runs.host_costs(virtual, feeds[0])
    timed = spac_runs.timed_rows(virtual, text, options)
    targets = judge(rows, timed)
    return {
        "paper": PAPER,
        "slots": MAIN,
        "draft_in_slots": spac_runs.draft_slots(virtual),
        "recordings": [recording_row(*item) for item in recordings.items()],
        "rows": rows,
        "sweeps": sweep_rows(recordings, options, sample),
        "real_trace": trace_rows(options.data),
        "real_trace_note": "its windows hold no rejected tokens: the control is the same machine",
        "timed": timed,
        "balancer": {
            "costs_us": costs,
            "rows": windows.balance_rows(recordings[GAMMA, TEMPERATURE], costs, CAP, MAIN),
        },
        "drift": spac_runs.drift_rows(virtual, feeds[:, :-1]),
        "summary": summarise(rows),
        "targets": targets,
        "verdict": common.verdict(targets),
    }


def plot(report: dict[str, Any], path: pathlib.Path) -> None:
    """Estimators, time over the budget, the balancer, and the drift."""
    figure, axes = common.figure(2, 2, (12.5, 8.4))
    main = {"gamma": GAMMA, "temperature": TEMPERATURE, "target": "made"}
    rows = [r for r in report["rows"] if all(r[name] == v for name, v in main.items())][::-1]
    estimators, times, balancer, theorem = axes.flat
    precision = [np.nan if row["precision"] is None else 100 * row["precision"] for row in rows]
    control = [row["estimator"] == CONTROL for row in rows]
    bars = estimators.barh([row["estimator"] for row in rows], precision, color=BLUE)
    for bar, is_control in zip(bars, control, strict=True):
        if is_control:
            bar.set(facecolor=ORANGE, hatch="//", edgecolor="white")
    for i, row in enumerate(rows):
        if row["precision_interval"]:
            estimators.plot([100 * x for x in row["precision_interval"]], [i, i], "k-", lw=1.2)
        label = f"{row['hot_per_layer']:.1f} hot per layer"
        box = {"fc": "white", "ec": "none", "alpha": 0.85, "pad": 1.5}
        estimators.text(2, i, label, va="center", fontsize=8, bbox=box)
    estimators.set(xlabel="Hot experts used in the next cycle (%)", xlim=(0, 75))
    estimators.set_title("Who foretells best? (hatched: the control)")
    _plot_times(times, report["timed"])
    found = [row for row in report["balancer"]["rows"] if row.get("allowed", 1) == 1]
    names = [str(row["threshold"]) for row in found]
    balancer.bar(names, [row["slowest_us"] for row in found], color=SKY)
    balancer.set(xlabel="Threshold", ylabel="Predicted time of a layer (us)")
    balancer.set_title("Balancer against fixed thresholds")
    for model, (colour, marker) in zip(("target", "draft"), LOOKS, strict=False):
        own = [row for row in report["drift"] if row["model"] == model]
        layers = [row["layer"] for row in own]
        for key, style, name in (
            ("correlation_with_input", "-", "layer 0's input"),
            ("correlation_with_own_layer", ":", "its own layer's input"),
        ):
            look = {"color": colour, "marker": marker, "label": f"{model}, {name}"}
            theorem.plot(layers, [r[key] for r in own], style, **look)
    theorem.axhline(0, color="black", lw=0.6)
    theorem.set(
        xlabel="Layer", ylabel="Correlation", title="Drift of gate scores against that of inputs"
    )
    theorem.legend(frameon=False, fontsize=8)
    for axis in axes.flat:
        axis.grid(alpha=0.25)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    common.save(figure, path)


def _plot_times(axis: Any, rows: list[dict]) -> None:
    names = dict.fromkeys(row["name"] for row in rows)
    for name, (colour, marker) in zip(names, LOOKS, strict=False):
        own = [r for r in rows if (r["name"], r["temperature"]) == (name, TEMPERATURE)]
        own = [r for r in own if (r["cap"], r["threshold"]) == (CAP, 1)]
        own.sort(key=lambda row: row["slots"])
        places = [100 * row["slots"] / 192 for row in own]
        spread = [row["tpot_ms_spread"] / 2 for row in own]
        look = {"marker": marker, "color": colour, "capsize": 3, "label": name}
        axis.errorbar(places, [row["tpot_ms"] for row in own], spread, **look)
    axis.set(xlabel="Resident experts (%)", ylabel="TPOT (ms)")
    axis.set_title("Time per output token, paced link, batch 1")
    axis.set(xlim=(0, 60), ylim=(0, None))
    axis.legend(frameon=False, fontsize=8)


def main() -> None:
    """Measure, write the JSON and draw."""
    parser = common.arguments(__doc__)
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--timed", type=int, help="tokens generated in timed runs")
    parser.add_argument("--gammas", type=int, nargs="+", help=f"draft lengths, {GAMMA} among them")
    parser.add_argument("--temperatures", type=float, nargs="+", help="1 among them")
    parser.add_argument("--slots", type=int, nargs="+", help=f"of timed runs, {MAIN} among them")
    parser.add_argument("--caps", type=int, nargs="+", help="of timed runs")
    parser.add_argument("--rivals", nargs="+", choices=RIVALS)
    options = common.resolved(parser.parse_args(), QUICK, FULL)
    report = {
        "claim": "hot experts by verification windows foretell the next cycle better than the same "
        "counter fed by the last 9 tokens, and MoE-SpAc takes the least time per token",
        "command": "python -m experiments.spac_utility",
        **measure(options),
    }
    common.finish(report, options, plot)


if __name__ == "__main__":
    main()
