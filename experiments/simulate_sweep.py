"""A thousand configurations of evictors over a real trace, and what that takes.

Claim:     1,000 configurations over the Qwen3-30B-A3B trace (48 layers of 128 experts, 156 tokens)
           replay in under 60 s with slots per layer and under 5 minutes with one pool, on 2 cores,
           compiling included; LRU at all capacities takes one pass of stack distances.
Command:   python -m experiments.simulate_sweep --out experiments/results/simulate_sweep.json
Hardware:  2 quiet CPU cores: about 5 minutes (--quick: under 1, with fewer configurations).
Expected:  nothing beats recency at the fewest slots, and all meet above a quarter of the experts,
           where the trace holds little else than what was used already.
"""

import argparse
import dataclasses
import pathlib
import time
from typing import Any

import jax.numpy as jnp
import numpy as np

from experiments import smoe_common as common
from moejax.policies.policy import policy
from moejax.reports.plots import LOOKS
from moejax.simulator import accesses, replay, stack_distance
from moejax.simulator.simulate import Asked, prepared
from moejax.simulator.tape import tapes_of
from moejax.traces import importers as trace_import
from moejax.traces.trace import Phase, Trace

TRACE = pathlib.Path("traces/bigmoeonedge/qwen.route.csv.xz")
LIMITS = {"per_layer_seconds": 60.0, "global_seconds": 300.0}
FEW, MANY = 6, 32  # slots per layer
QUICK, FULL = {"configurations": 64}, {"configurations": 1000}


def policies(number: int, layers: int) -> dict[str, list[tuple[str, int]]]:
    """Configurations (name, slots) by structure: recency, frequency, decays and periods."""
    capacities = np.unique(np.linspace(FEW, MANY, 20).astype(int)) * layers
    decays = 1 - np.geomspace(0.3, 0.002, 100)
    periods = np.unique(np.geomspace(2, 256, 100).astype(int))
    names = {
        "lru": ["lru"],
        "lfu": ["lfu"],
        "decayed-lfu": [f"decayed-lfu:decay={d:.4f}" for d in decays],
        "class-lru": [f"class-lru:period={p}" for p in periods],
    }
    left, found = number, {}
    for i, (kind, own) in enumerate(names.items()):
        pairs = [(name, int(slots)) for name in own for slots in capacities]
        share = min(len(pairs), left if i == len(names) - 1 else max(left // (len(names) - i), 1))
        # An even choice of all: every number and every capacity is among them.
        at = np.unique(np.linspace(0, len(pairs) - 1, share).astype(int))
        found[kind] = [pairs[j] for j in at]
        left -= len(found[kind])
    return found


def sweep(trace: Trace, number: int, *, per_layer: bool) -> dict[str, Any]:
    """All configurations on one kind of pool."""
    begun = time.perf_counter()
    tapes, setting = tapes_of(trace), replay.Setting(experts=trace.experts)
    decode = trace.pass_phases() != Phase.PREFILL
    rows = []
    for pairs in policies(number, trace.layers).values():
        made = [
            dataclasses.replace(policy(name), capacity=jnp.int32(slots)) for name, slots in pairs
        ]
        most = max(slots for _, slots in pairs)
        counts = replay.run(tapes, made, most, setting, per_layer=per_layer)
        hits, needed = (counts[n][:, decode].sum(axis=(1, 2)) for n in ("hits", "needed"))
        rows += [
            {"policy": name, "slots": slots, "hit_rate": float(h / n)}
            for (name, slots), h, n in zip(pairs, hits, needed, strict=True)
        ]
    return {"per_layer": per_layer, "seconds": time.perf_counter() - begun, "rows": rows}


def lru_curve(trace: Trace) -> dict[str, Any]:
    """LRU's hits over single accesses at every number of slots per layer, from one pass."""
    begun = time.perf_counter()
    uses = accesses.sequences(trace.picks, trace.experts, per_layer=True)
    distance = stack_distance.distances(uses, trace.experts)
    counted = np.tile(np.repeat(trace.phase != Phase.PREFILL, trace.top_k), (trace.layers, 1))
    capacities = np.arange(1, trace.experts + 1)
    hits = stack_distance.hits(distance, counted & (uses >= 0), capacities)
    rates = hits / (counted & (uses >= 0)).sum()
    return {"seconds": time.perf_counter() - begun, "hit_rates": rates.tolist()}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """The report, without what `common.finish` adds."""
    path = options.data / TRACE
    if not path.exists():
        raise SystemExit(f"the trace is not at {path}: give the folder above as --data")
    # Prompts as the other program ran them are not known: token by token.
    trace = prepared(trace_import.read(path), Asked())
    parts = {
        "per_layer": sweep(trace, options.configurations, per_layer=True),
        "global": sweep(trace, options.configurations, per_layer=False),
    }
    curve = lru_curve(trace)
    seconds = {f"{name}_seconds": part["seconds"] for name, part in parts.items()}
    number = len(parts["global"]["rows"])
    best = {name: max(part["rows"], key=_at_fewest) for name, part in parts.items()}
    targets = common.judged(seconds, LIMITS)
    return {
        **parts,
        "lru_curve": curve,
        "summary": {
            "configurations": number,
            **seconds,
            "lru_curve_seconds": curve["seconds"],
            "best_at_fewest_slots": {name: row["policy"] for name, row in best.items()},
        },
        "targets": targets,
        "verdict": common.verdict(targets),
    }


def _at_fewest(row: dict[str, Any]) -> tuple[int, float]:
    return (-row["slots"], row["hit_rate"])


def plot(report: dict[str, Any], path: pathlib.Path) -> None:
    """Hit rates by slots, the best of each structure."""
    figure, axes = common.figure(1, 2, (11, 4.4))
    figure.suptitle("The best hit rate of each evictor, Qwen3-30B-A3B (48 layers of 128 experts)")
    for axis, name in zip(axes, ("per_layer", "global"), strict=True):
        best: dict[str, dict[int, float]] = {}
        for row in report[name]["rows"]:
            own = best.setdefault(row["policy"].partition(":")[0], {})
            own[row["slots"]] = max(own.get(row["slots"], 0.0), row["hit_rate"])
        looks = zip(LOOKS, ("-", "--", "-.", ":"), strict=False)
        for kind, ((colour, marker), style) in zip(best, looks, strict=False):
            slots, rates = zip(*sorted(best[kind].items()), strict=True)
            look = {"color": colour, "marker": marker, "ms": 5, "ls": style, "label": kind}
            axis.plot(slots, [100 * rate for rate in rates], **look)
        axis.set(xlabel="slots, all 48 layers", ylabel="hit rate in decode, %", ylim=(0, 100))
        axis.set_title("own slots per layer" if name == "per_layer" else "one pool")
        axis.grid(alpha=0.25)
        axis.legend(frameon=False, loc="lower right")
        axis.spines[["top", "right"]].set_visible(False)
    common.save(figure, path)


def main() -> None:
    """Measure, write the JSON and draw."""
    parser = common.arguments(__doc__)
    parser.add_argument("--configurations", type=int)
    options = common.resolved(parser.parse_args(), QUICK, FULL)
    report = {
        "claim": "1,000 configurations over the Qwen3-30B trace in 60 s, 300 s with one pool",
        "command": "python -m experiments.simulate_sweep",
        **measure(options),
    }
    common.finish(report, options, plot)


if __name__ == "__main__":
    main()
