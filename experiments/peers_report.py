"""Medians, ratios and the table of `peers_cpu`."""

import statistics
from typing import Any

# What each is compared with: the time per token of the left over that of the right.
PAIRS = [
    ("moejax bf16", "llama.cpp BF16"),
    ("moejax bf16", "transformers bf16"),
    ("moejax bf16 on tiles", "llama.cpp BF16"),
    ("moejax bf16 on tiles", "transformers bf16"),
    ("moejax int8", "llama.cpp Q8_0"),
    ("moejax int4", "llama.cpp Q4_0"),
]


def summary(samples: list[dict[str, Any]], about: dict[str, dict]) -> list[dict[str, Any]]:
    """One row per test and peer: medians, fraction of the memory bound, and ratios to peers.

    A ratio is the median over rounds of a peer's time per token over another's in that round.
    """
    grouped: dict[tuple[str, str], dict[int, dict[str, Any]]] = {}
    for sample in samples:
        rounds = grouped.setdefault((sample["test"], sample["peer"]), {})
        rounds[sample["repetition"]] = sample
    rows = []
    for (test, peer), rounds in grouped.items():
        times = [s["ms_per_token"] for s in rounds.values()]
        row = {
            "test": test,
            "peer": peer,
            "ms_per_token": statistics.median(times),
            "stdev": statistics.stdev(times) if len(times) > 1 else 0.0,
            "tokens_per_second": 1e3 / statistics.median(times),
            "stream_read_gb_per_s": statistics.median(
                s["stream_read_gb_per_s"] for s in rounds.values()
            ),
            "bound_fraction": None,
            "ratios": {},
        }
        if test.startswith("tg"):
            read = about[peer]["weight_bytes"]
            row["bound_fraction"] = statistics.median(
                read / s["stream_read_gb_per_s"] / 1e6 / s["ms_per_token"] for s in rounds.values()
            )
        for left, right in PAIRS:
            other = grouped.get((test, right), {})
            both = rounds.keys() & other.keys()
            if left == peer and both:
                row["ratios"][right] = statistics.median(
                    rounds[r]["ms_per_token"] / other[r]["ms_per_token"] for r in both
                )
        rows.append(row)
    return sorted(rows, key=lambda row: row["test"])


def as_markdown(report: dict[str, Any]) -> str:
    """The tables of a report of `peers_cpu`."""
    lines = []
    if "rows" in report:
        lines += [
            "| test | peer | ms per token | tokens/s | of the bound | time over a peer's |",
            "|---|---|---:|---:|---:|---|",
        ]
        lines += [_row(row) for row in report["rows"]]
        lines += ["", "| peer | same argmax as | share | largest logit difference (deviation) |"]
        lines += ["|---|---|---:|---:|"]
        lines += [
            f"| {a['peer']} | {a['against']} | {a['same_argmax']:.0%} "
            f"| {a['max_difference']:.3f} ({a['standard_deviation_of_logits']:.2f}) |"
            for a in report["agreement"]
        ]
        rates = [row["stream_read_gb_per_s"] for row in report["rows"]]
        lines += ["", f"Stream reads in between: {min(rates):.1f} to {max(rates):.1f} GB/s."]
    if "limited" in report:
        lines += [
            "| test | peer | ms per token | limit, GB | peak, GB | times it was met | file, GB |",
            "|---|---|---:|---:|---:|---:|---:|",
        ]
        lines += [_limited(row) for row in report["limited"]]
    missing = [f"- {name}: missing, {why}" for name, why in report["missing"].items()]
    return "\n".join([*lines, *([""] if missing else []), *missing])


def _row(row: dict[str, Any]) -> str:
    bound = "" if row["bound_fraction"] is None else f"{row['bound_fraction']:.0%}"
    ratios = ", ".join(f"{ratio:.2f}x {name}" for name, ratio in row["ratios"].items())
    return (
        f"| {row['test']} | {row['peer']} | {row['ms_per_token']:.2f} ± {row['stdev']:.2f} "
        f"| {row['tokens_per_second']:.1f} | {bound} | {ratios} |"
    )


def _limited(row: dict[str, Any]) -> str:
    memory = row["memory"]
    limit, peak = (f"{n / 1e9:.2f}" if n else "" for n in (memory["limit"], memory["peak"]))
    return (
        f"| {row['test']} | {row['peer']} | {row['ms_per_token']:.1f} | {limit} "
        f"| {peak} | {memory['limit_met']} | {row['file_bytes'] / 1e9:.2f} |"
    )
