"""SMoE without host compute against on-demand LRU, with experts on this machine's disk.

Claim:     on the embedded model, at batch 1 and 40 % residency, substitution, score eviction and
           prefetch read at most 0.65 of the bytes that on-demand LRU reads from the disk.
Command:   python -m experiments.smoe_disk --out experiments/results/smoe_disk.json
Hardware:  2 quiet CPU cores and a disk: about 3 minutes (--quick: 1); and the held-out text.
Expected:  the bytes of `smoe_ablation`; times are the disk's, whose reads of 110 KB may be faster
           than the link there. The disk is one resource: it has no host copy to compute from.
"""

import argparse
import pathlib
import tempfile
from typing import Any

import numpy as np

from experiments import smoe_common as common
from experiments.smoe_ablation import MAIN, STEPS, Bench, Case, cases, find, row_of
from experiments.smoe_common import Text
from moejax.reports.plots import BLUE, GREY

QUICK = {"windows": 1, "tokens": 128, "rounds": 1, "timed": 48}
FULL = {"windows": 2, "tokens": 128, "rounds": 3, "timed": 64}
WINDOW = 32  # n of the score eviction, as `smoe_ablation` chose it
LIMITS = {"moved_bytes_over_lru": 0.65}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """The report, without what `common.finish` adds."""
    text = Text.read(options.windows, 0, common.PROMPT + options.timed, options.data)
    chosen = [c for c in cases(WINDOW, 1.0, 1.0, quick=True, rivals=False) if c.alpha == 0.25]
    chosen = [c for c in chosen if c.name in STEPS[:-1]]
    chosen.append(Case("all resident", 1.0, 1, text="lru", seats="all"))
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(text, options.timed, np.arange(0), pathlib.Path(folder)).over("disk")
        replays = {case: bench.replay(case) for case in chosen}
        found = common.in_rounds(replays, options.rounds, options.seed)
    record = replays[chosen[0]].runtime.store.layout.stride
    rows = [row_of(c, found[c], replays[c].runtime.slots, record) for c in chosen]
    lru, own = find(rows, "lru"), find(rows, STEPS[-2])
    resident = find(rows, "all resident", 1.0)
    summary = {
        "tpot_over_lru": own["tpot_ms"] / lru["tpot_ms"],
        "moved_bytes_over_lru": own["moved_bytes_per_token"] / lru["moved_bytes_per_token"],
        "gap_closed": common.gap_closed(lru["tpot_ms"], own["tpot_ms"], resident["tpot_ms"]),
    }
    targets = common.judged(summary, LIMITS)
    return {
        "residency": MAIN,
        "rows": rows,
        "summary": summary,
        "targets": targets,
        "verdict": common.verdict(targets),
    }


def plot(report: dict[str, Any], path: pathlib.Path) -> None:
    """TPOT and bytes of the steps."""
    figure, (times, reads) = common.figure(1, 2, (10, 3.2))
    rows = report["rows"][::-1]
    names = [row["name"] for row in rows]
    colours = [GREY if name == "all resident" else BLUE for name in names]
    spread = [row["tpot_ms_spread"] / 2 for row in rows]
    times.barh(names, [row["tpot_ms"] for row in rows], xerr=spread, capsize=3, color=colours)
    times.set(xlabel="TPOT (ms)", title="Time per output token")
    moved = [row["moved_bytes_per_token"] / 1e6 for row in rows]
    reads.barh(names, moved, color=colours)
    [lru] = [value for name, value in zip(names, moved, strict=True) if name == "lru"]
    limit = LIMITS["moved_bytes_over_lru"]
    reads.axvline(limit * lru, color="black", ls="--", lw=1, label=f"target: {limit:g} of lru")
    reads.set(xlabel="read per token (MB)", title="Bytes from the disk", yticklabels=[])
    reads.legend(frameon=False, loc="lower right", fontsize=9)
    figure.suptitle("Experts on the disk, 40 % resident, batch 1")
    for axis in (times, reads):
        axis.spines[["top", "right"]].set_visible(False)
    common.save(figure, path)


def main() -> None:
    """Measure, write the JSON and draw."""
    parser = common.arguments(__doc__)
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--timed", type=int, help="decode steps timed of a window")
    options = common.resolved(parser.parse_args(), QUICK, FULL)
    report = {
        "claim": "over the disk SMoE without host compute moves at most 0.65 of LRU's bytes",
        "command": "python -m experiments.smoe_disk",
        **measure(options),
    }
    common.finish(report, options, plot)


if __name__ == "__main__":
    main()
