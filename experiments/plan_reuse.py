"""The reuse curves that `moejax plan` expects hit rates by, from recorded routing.

Claim:     hit rates by slots per layer over experts per token carry over from one model to another
           better than by the share of all experts that are in slots.
Command:   python -m experiments.plan_reuse --out experiments/results/plan_reuse.json \
               --curves moejax/planner/reuse.json
Hardware:  any CPU: a minute (--quick: half); and the routing traces beside the held-out text.
Expected:  mean error of one model's hit rates by the others' curves: under 0.1 by the multiple,
           above it by the share.

Replays are those of one pool for all layers under least recently used, as the engine has it: the
experts of the running layer stay until it is done, and count as hits if they were there when it
began. Prefill fills the pool, decode counts. The embedded model's curve is measured by the engine
itself (`residency`).
"""

import argparse
import csv
import itertools
import json
import lzma
import pathlib
from typing import Any

import numpy as np

from experiments.environment import environment
from experiments.held_out import DATA
from moejax.planner.reuse import Curve, Uses, pool_hit_rate
from moejax.reports.files import replace_text

TRACES = {"Qwen3-30B-A3B": ("qwen", 128), "gemma-4-26B-A4B": ("gemma", 128)}
RESULTS = pathlib.Path(__file__).parent / "results"
SHARES = (1 / 64, 1 / 32, 3 / 64, 1 / 16, 3 / 32, 1 / 8, 3 / 16, 1 / 4, 3 / 8, 1 / 2, 3 / 4)


def uses(path: pathlib.Path) -> Uses:
    """(decode?, layer, experts) of every token and layer of a trace, in order."""
    with lzma.open(path, "rt") as file:
        rows = csv.DictReader(line for line in file if not line.startswith("#"))
        keys = ((int(r["phase"]), int(r["step"]), int(r["layer"]), int(r["expert"])) for r in rows)
        return [
            (phase == 1, layer, [expert for *_, expert in group])
            for (phase, _, layer), group in itertools.groupby(keys, key=lambda k: k[:3])
        ]


def traced(name: str, data: pathlib.Path, shares: tuple[float, ...]) -> dict[str, Any]:
    """The curve of a recorded trace."""
    file, experts = TRACES[name]
    path = data / "traces" / "bigmoeonedge" / f"{file}.route.csv.xz"
    trace = uses(path)
    layers = 1 + max(layer for _, layer, _ in trace)
    top_k = max(len(chosen) for *_, chosen in trace)
    slots = [max(round(share * experts * layers), top_k) for share in shares]
    return {
        "model": name,
        "source": f"BigMoeOnEdge trace {path.name} (Apache-2.0): {layers} layers of {experts} "
        f"experts, {top_k} per token",
        "layers": layers,
        "experts": experts,
        "top_k": top_k,
        "multiples": [round(s / layers / top_k, 6) for s in slots],
        "hit_rates": [round(pool_hit_rate(trace, s), 6) for s in slots],
    }


def embedded() -> dict[str, Any]:
    """The curve of the embedded model, as the engine measured it."""
    report = json.loads((RESULTS / "residency.json").read_text())
    layers, experts, top_k = 6, 32, 4
    rows = [row for row in report["rows"] if row["residency"] < 1]
    return {
        "model": "embedded model",
        "source": f"the engine, `{report['command']}`",
        "layers": layers,
        "experts": experts,
        "top_k": top_k,
        "multiples": [round(row["slots"] / layers / top_k, 6) for row in rows],
        "hit_rates": [round(row["hit_rate"], 6) for row in rows],
    }


def errors(curves: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean absolute error of each curve by each other's, by both units."""
    rows = []
    for mine, other in itertools.permutations(curves, 2):
        by = Curve(other["model"], "", tuple(other["multiples"]), tuple(other["hit_rates"]))
        shares = np.array(other["multiples"]) * other["top_k"] / other["experts"]
        wrong: dict[str, list[float]] = {"multiple": [], "share": []}
        for multiple, rate in zip(mine["multiples"], mine["hit_rates"], strict=True):
            slots = round(multiple * mine["layers"] * mine["top_k"])
            sizes = (mine["layers"], mine["experts"], mine["top_k"])
            share = slots / mine["layers"] / mine["experts"]
            points = ([0, *shares, 1], [0, *other["hit_rates"], 1])
            wrong["multiple"].append(abs(by.at(slots, *sizes) - rate))
            wrong["share"].append(abs(float(np.interp(share, *points)) - rate))
        means = {f"error_by_{unit}": float(np.mean(values)) for unit, values in wrong.items()}
        rows.append({"model": mine["model"], "by": other["model"], **means})
    return rows


def main() -> None:
    """Replay and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="half of the points")
    parser.add_argument("--data", type=pathlib.Path, default=DATA)
    parser.add_argument("--curves", type=pathlib.Path, help="where `moejax plan` reads them")
    parser.add_argument("--out", type=pathlib.Path)
    options = parser.parse_args()
    if not (options.data / "traces").is_dir():
        raise SystemExit(f"there are no traces at {options.data / 'traces'}: give --data")
    shares = SHARES[::2] if options.quick else SHARES
    curves = [*(traced(name, options.data, shares) for name in TRACES), embedded()]
    rows = errors(curves)
    summary = {
        unit: float(np.mean([row[unit] for row in rows]))
        for unit in ("error_by_multiple", "error_by_share")
    }
    held = summary["error_by_multiple"] < summary["error_by_share"]
    report = {
        "claim": "hit rates carry over by slots per layer over experts per token, not by share",
        "command": "python -m experiments.plan_reuse",
        "environment": environment("recorded traces"),
        "curves": curves,
        "rows": rows,
        "summary": summary,
        "verdict": "holds" if held else "fails",
    }
    text = json.dumps(report, indent=1)
    if options.out:
        options.out.write_text(text + "\n")
    if options.curves:
        replace_text(options.curves, json.dumps({"curves": curves}, indent=1) + "\n")
    print(json.dumps({"summary": summary, "verdict": report["verdict"]}))


if __name__ == "__main__":
    main()
