"""Figures of records that the package itself draws; others are drawn by their experiments."""

import pathlib
from collections.abc import Callable
from typing import Any

from moejax.errors import InputError

Record = dict[str, Any]
# Okabe and Ito's colours, which all kinds of colour vision tell apart; markers differ too.
BLUE, ORANGE, GREEN, GREY, BLACK = "#0072B2", "#D55E00", "#009E73", "#999999", "#000000"
SKY, AMBER, PINK = "#56B4E9", "#E69F00", "#CC79A7"
MULTIPLES = (0.5, 1, 2, 4, 8, 16)  # ticks of a logarithmic axis
# Curves of one picture, in order: colour, marker.
LOOKS = tuple(zip((BLUE, ORANGE, GREEN, PINK, BLACK, AMBER, SKY, GREY), "os^Dv<>P", strict=True))


def figure(columns: int, size: tuple[float, float]) -> tuple[Any, Any]:
    """A matplotlib figure without a screen and its axes in one row.

    Raises:
        InputError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("figures need matplotlib: pip install matplotlib") from None
    made = Figure(figsize=size, layout="constrained")
    axes = made.subplots(1, columns, squeeze=False)[0]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", alpha=0.25)
    return made, axes


def residency(report: Record) -> Any:
    """TPOT with its bound, hit rate, and bytes, over the share of experts that are resident."""
    rows = report["rows"]
    made, (times, hits, moved) = figure(3, (12, 3.6))
    shares = [100 * row["residency"] for row in rows]
    spread = [row["tpot_ms_spread"] / 2 for row in rows]
    times.errorbar(shares, [r["tpot_ms"] for r in rows], spread, fmt="o-", color=BLUE, capsize=3)
    resident = rows[-1]["tpot_ms"]
    times.axhline(resident, color=BLACK, ls="--", lw=1)
    below = {"xytext": (0, -6), "textcoords": "offset points", "va": "top"}
    times.annotate("all resident", (shares[0], resident), **below)
    times.set(ylabel="time per output token, ms", ylim=(0, None))
    hits.plot(shares, [100 * row["hit_rate"] for row in rows], "s-", color=ORANGE)
    hits.plot([0, 100], [0, 100], color=BLACK, ls="--", lw=1)
    hits.annotate("uniform routing", (55, 45))
    hits.set(ylabel="hit rate, %", ylim=(0, 102))
    moved.plot(shares, [row["bytes_per_token"] / 1e6 for row in rows], "^-", color=GREEN)
    moved.set(ylabel="copied per token, MB", ylim=(0, None))
    for axis in (times, hits, moved):
        axis.set(xlabel="experts resident, %", xlim=(0, 102))
    return made


def peers_cpu(report: Record) -> Any:
    """Milliseconds per generated token of each peer, with the bandwidth bound of ours."""
    rows = sorted(
        (row for row in report["rows"] if row["test"].startswith("tg")),
        key=lambda row: -row["ms_per_token"],
    )
    made, (axis,) = figure(1, (7.5, 3.6))
    names = [f"{row['peer']}" for row in rows]
    colours = [BLUE if name.startswith("moejax") else GREY for name in names]
    axis.barh(names, [row["ms_per_token"] for row in rows], color=colours)
    for i, row in enumerate(rows):
        axis.text(row["ms_per_token"], i, f" {row['ms_per_token']:.1f}", va="center")
        if row["bound_fraction"]:
            bound = row["ms_per_token"] * row["bound_fraction"]
            axis.plot([bound, bound], [i - 0.4, i + 0.4], color=ORANGE, lw=2.5)
    axis.plot([], [], color=ORANGE, lw=2.5, label="each weight read once at stream bandwidth")
    axis.legend(loc="upper right", frameon=False)
    most = rows[0]["ms_per_token"]
    axis.set(xlabel=f"ms per generated token ({rows[0]['test']})", xlim=(0, 1.1 * most))
    axis.grid(axis="y", visible=False)
    axis.grid(axis="x", alpha=0.25)
    return made


def plan_check(report: Record) -> Any:
    """Predicted over measured times, with the line of equality and a band of 25 %."""
    made, (axis,) = figure(1, (5.6, 5.2))
    rows = report["rows"]
    low = min(min(r["measured_ms"], r["predicted_ms"]) for r in rows) / 1.5
    high = max(max(r["measured_ms"], r["predicted_ms"]) for r in rows) * 1.5
    axis.plot([low, high], [low, high], color=BLACK, lw=1)
    axis.fill_between([low, high], [low * 0.75, high * 0.75], [low * 1.25, high * 1.25], color=GREY)
    axis.collections[-1].set(alpha=0.25, label="within 25 %")
    looks = zip(dict.fromkeys(row["kind"] for row in rows), ("o", "s", "^", "D", "v"), strict=False)
    for (kind, marker), colour in zip(looks, (BLUE, ORANGE, GREEN, BLACK, GREY), strict=False):
        own = [row for row in rows if row["kind"] == kind]
        points = [r["measured_ms"] for r in own], [r["predicted_ms"] for r in own]
        axis.plot(*points, marker, color=colour, label=kind)
    axis.set(xscale="log", yscale="log", xlabel="measured, ms", ylabel="predicted, ms")
    axis.set(xlim=(low, high), ylim=(low, high))
    axis.legend(frameon=False)
    return made


def plan_reuse(report: Record) -> Any:
    """Hit rates of recorded routing over slots, by both units."""
    made, axes = figure(2, (9, 3.6))
    looks = zip(("o-", "s-", "^-"), (BLUE, ORANGE, GREEN), strict=True)
    for curve, (style, colour) in zip(report["curves"], looks, strict=False):
        rates = [100 * rate for rate in curve["hit_rates"]]
        shares = [100 * m * curve["top_k"] / curve["experts"] for m in curve["multiples"]]
        axes[0].plot(curve["multiples"], rates, style, color=colour, label=curve["model"])
        axes[1].plot(shares, rates, style, color=colour)
    axes[0].set(xlabel="slots per layer over experts per token", xscale="log")
    axes[0].set_xticks(MULTIPLES, [f"{multiple:g}" for multiple in MULTIPLES], minor=False)
    axes[0].minorticks_off()
    axes[0].legend(frameon=False)
    axes[1].plot([0, 100], [0, 100], color=BLACK, ls="--", lw=1)
    axes[1].annotate("uniform routing", (55, 45))
    axes[1].set(xlabel="experts in slots, %")
    for axis in axes:
        axis.set(ylabel="hit rate, %", ylim=(0, 102))
    return made


FIGURES: dict[str, Callable[[Record], Any]] = {
    "residency": residency,
    "peers_cpu": peers_cpu,
    "plan_check": plan_check,
    "plan_reuse": plan_reuse,
}


def draw(name: str, report: Record, path: pathlib.Path) -> None:
    """Write the figure of a record to a file; InputError if matplotlib is not installed."""
    FIGURES[name](report).savefig(path, dpi=130)
