"""How well SMoE's three predictors say which experts a later layer needs.

Claim:     the attention of the next layer on the partial hidden state (A, the paper) predicts
           experts of which at least 82 % are top-score experts and at least 95 % active, as the
           paper reports, and is better than the residual stream alone (B, the released code).
Command:   python -m experiments.smoe_predictors --out experiments/results/smoe_predictors.json
Hardware:  any CPU; 2 cores take about 5 minutes (--quick: 1); and the held-out text.
Expected:  A's precision is the highest at horizon 1; all fall with the horizon.

C is the next layer's gate on this layer's hidden state. All three keep what they take for top-score
experts: score >= (1 + alpha) times the (k + 1)-th best. Residency is 40 %, alpha 0.25, batch 1;
experts that are missing are absent from the partial hidden state, so residency matters. "Exact" is
the model's own router, "substituted" SMoE's. A layer that has no layer `horizon` before it is never
predicted and does not count in recalls. A predicted expert that found no room does not count.
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
from experiments.smoe_common import Text
from moejax import decode
from moejax.policies.policy import Policy, policy
from moejax.policies.prediction import NextAttention, NextGate, NextResidual
from moejax.policies.routing import TopK
from moejax.reports.plots import LOOKS

ALPHA, RESIDENCY, HORIZONS = 0.25, 0.4, (1, 2, 3)
QUICK = {"windows": 1, "tokens": 48, "horizons": HORIZONS}
FULL = {"windows": 4, "tokens": 192, "horizons": HORIZONS}
PREDICTORS = {"A": NextAttention, "B": NextResidual, "C": NextGate}
LABELS = {
    "A": "A: next attention (paper)",
    "B": "B: residual only (released code)",
    "C": "C: next gate",
}
ROUTERS = ("exact", "substituted")
PAPER = {"precision_top": 0.82, "precision_active": 0.95}
COUNTS = ("predicted", "right_top", "right_active", "top", "active", "found_top", "found_active")


def made(name: str, horizon: int, router: str) -> Policy:
    """SMoE without host compute, with a predictor and a router."""
    whole = policy(f"smoe-fetch:alpha={ALPHA}")
    predictor = PREDICTORS[name](alpha=jnp.float32(ALPHA), horizon=horizon)
    parts = {"predictor": predictor}
    if router == "exact":
        parts["router"] = TopK()
    return dataclasses.replace(whole, **parts)


def counted(
    scores: np.ndarray, picks: np.ndarray, forecast: np.ndarray, alpha: float, horizon: int
) -> dict[str, np.ndarray]:
    """COUNTS by layer [L], over tokens, of traces of single tokens.

    Args:
        scores: [T, L, E] true router scores.
        picks: [T, L, K] experts used.
        forecast: [T, L, E] bool, what had been predicted.
    """
    k, layers = picks.shape[2], scores.shape[1]
    bar = -np.partition(-scores, k, axis=2)[:, :, k : k + 1]
    top = scores >= np.float32(1 + alpha) * bar
    active = np.zeros(scores.shape, bool)
    np.put_along_axis(active, picks, True, axis=2)
    could = (np.arange(layers) >= horizon)[None, :, None]
    table = (
        *(forecast, forecast & top, forecast & active),
        *(top & could, active & could, top & could & forecast, active & could & forecast),
    )
    return {name: part.sum(axis=(0, 2)) for name, part in zip(COUNTS, table, strict=True)}


def rates(counts: dict[str, Any]) -> dict[str, float | None]:
    """Precision and recall of counts that may have been summed; None of nothing."""
    return {
        "precision_top": common.ratio(float(counts["right_top"]), float(counts["predicted"])),
        "precision_active": common.ratio(float(counts["right_active"]), float(counts["predicted"])),
        "recall_top": common.ratio(float(counts["found_top"]), float(counts["top"])),
        "recall_active": common.ratio(float(counts["found_active"]), float(counts["active"])),
    }


def recorded(runtime: moejax.Runtime, windows: np.ndarray) -> dict[str, np.ndarray]:
    """The traces of windows [W, T + 1] fed token by token, one after another."""
    state, traces = runtime.init_state(1, context=windows.shape[1]), []
    for window in windows:
        state = decode.rewind(state, np.zeros(1))
        for token in window[:-1]:
            state, out = runtime.decode_step(state, token[None, None], scores=True)
            traces.append(out.trace)
        traces = jax.device_get(traces)
    return {
        "scores": np.stack([trace.scores[:, 0] for trace in traces]),
        "picks": np.stack([trace.picks[:, 0] for trace in traces]),
        "forecast": np.stack([trace.forecast for trace in traces]),
        "prefetched": sum(int(trace.prefetched.sum()) for trace in traces),
        "used": sum(int(trace.prefetch_used.sum()) for trace in traces),
    }


def rows_of(name: str, horizon: int, router: str, traces: dict[str, Any]) -> list[dict]:
    """A row for all layers, and one for each that can be predicted."""
    parts = (traces[part] for part in ("scores", "picks", "forecast"))
    counts = counted(*parts, ALPHA, horizon)
    tokens = len(traces["scores"])
    about = {"predictor": name, "horizon": horizon, "router": router}
    total = {key: int(value.sum()) for key, value in counts.items()}
    rows = [
        {
            **about,
            "layer": "all",
            **rates(total),
            "predicted_per_token": total["predicted"] / tokens,
            "top_per_token": total["top"] / tokens,
            "prefetched_per_token": traces["prefetched"] / tokens,
            "prefetch_use": common.ratio(traces["used"], traces["prefetched"]),
        }
    ]
    for layer in range(horizon, len(counts["top"])):
        own = {key: int(value[layer]) for key, value in counts.items()}
        rows.append({**about, "layer": layer, **rates(own)})
    return rows


def find(rows: list[dict], name: str, horizon: int = 1, router: str = "exact", layer: Any = "all"):
    """The row of a predictor."""
    wanted = (name, horizon, router, layer)
    for row in rows:
        if (row["predictor"], row["horizon"], row["router"], row["layer"]) == wanted:
            return row
    raise KeyError(wanted)


def judge(rows: list[dict]) -> dict[str, dict]:
    """The claim's parts: A reaches the paper's shares, and its precision is above B's."""
    ours, theirs = find(rows, "A"), find(rows, "B")
    limits = {f"A {name}": (ours[name], share) for name, share in PAPER.items()}
    limits["A precision_top over B's"] = (ours["precision_top"], theirs["precision_top"])
    return {
        name: {
            "value": value,
            "at_least": least,
            "met": value is not None and (least is None or value >= least),
        }
        for name, (value, least) in limits.items()
    }


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """The report, without what `common.finish` adds."""
    text = Text.read(options.windows, 0, options.tokens, options.data)
    windows, _ = text.stacked()
    runtime = moejax.load(common.MODEL, virtual=True)
    slots = common.slots_of(RESIDENCY, common.experts_of(runtime))
    rows = []
    for router in ROUTERS:
        for name in PREDICTORS:
            for horizon in options.horizons:
                chosen = common.with_policy(runtime, made(name, horizon, router), slots)
                rows += rows_of(name, horizon, router, recorded(chosen, windows))
    targets = judge(rows)
    return {
        "residency": RESIDENCY,
        "slots": slots,
        "alpha": ALPHA,
        "horizons": options.horizons,
        "paper": PAPER,
        "windows": {name: len(part) for name, part in text.measured.items()},
        "window_tokens": windows.shape[1] - 1,
        "rows": rows,
        "summary": {
            f"{name}, {router}": {
                key: find(rows, name, router=router)[key]
                for key in ("precision_top", "precision_active", "recall_top", "prefetch_use")
            }
            for name in PREDICTORS
            for router in ROUTERS
        },
        "targets": targets,
        "verdict": common.verdict(targets),
    }


def plot(report: dict[str, Any], path: pathlib.Path) -> None:
    """Precision and recall by horizon and by layer, under exact routing.

    Curves that meet are told apart by width and marker: a broad one lies below a narrow one.
    """
    rows, horizons = report["rows"], report["horizons"]
    figure, axes = common.figure(1, 3, (13.5, 5.2))
    for name, (colour, marker), (wide, size) in zip(
        PREDICTORS, LOOKS, ((1.6, 6), (5, 11), (1.4, 5)), strict=False
    ):
        look = {"color": colour, "marker": marker, "lw": wide, "ms": size}
        found = [find(rows, name, horizon) for horizon in horizons]
        layers = [row for row in rows if _is(row, name) and row["layer"] != "all"]
        precise, recalled, by_layer = axes
        label = LABELS[name]
        for key, style in (("top", "-"), ("active", "--")):
            precise.plot(horizons, _percent(found, f"precision_{key}"), style, **look)
            recalled.plot(horizons, _percent(found, f"recall_{key}"), style, **look)
        recalled.lines[-2].set_label(label)
        where = [row["layer"] for row in layers]
        by_layer.plot(where, _percent(layers, "precision_top"), "-", **look)
        by_layer.plot(where, _percent(layers, "recall_top"), ":", **look)
    precise.plot(1, 82, "kX", ms=9, mfc="none", label="paper: top-score, 82 %")
    precise.plot(1, 95, "kP", ms=9, mfc="none", label="paper: active, 95 %")
    titles = (
        "Precision: predicted experts that are right",
        "Recall: right experts that are predicted",
        "By layer, one layer ahead",
    )
    for axis, title in zip(axes, titles, strict=True):
        axis.set(title=title, ylabel="Share (%)", ylim=(0, 102), xlabel="Horizon (layers ahead)")
        axis.set_xticks(horizons)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    by_layer.set(xlabel="Layer", xticks=sorted({row["layer"] for row in layers}))
    for axis, style, meaning in (
        *((precise, "-", "top-score"), (precise, "--", "active")),
        *((recalled, "-", "of top-score"), (recalled, "--", "of active")),
        *((by_layer, "-", "precision, top-score"), (by_layer, ":", "recall, top-score")),
    ):
        axis.plot([], [], "k" + style, label=meaning)
        axis.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(0, -0.13), ncols=2)
    common.save(figure, path)


def _is(row: dict, name: str) -> bool:
    return (row["predictor"], row["horizon"], row["router"]) == (name, 1, "exact")


def _percent(rows: list[dict], key: str) -> list[float]:
    return [np.nan if row[key] is None else 100 * row[key] for row in rows]


def main() -> None:
    """Measure, write the JSON and draw."""
    parser = common.arguments(__doc__)
    parser.add_argument("--horizons", type=int, nargs="+", help="layers ahead, 1 among them")
    options = common.resolved(parser.parse_args(), QUICK, FULL)
    report = {
        "claim": "of what the next attention predicts, 82 % are top-score and 95 % active experts",
        "command": "python -m experiments.smoe_predictors",
        **measure(options),
    }
    common.finish(report, options, plot)


if __name__ == "__main__":
    main()
