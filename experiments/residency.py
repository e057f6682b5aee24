"""How hit rate, bytes and TPOT follow the expert budget, and that the bits do not.

Claim:     any budget gives the tokens and log-probabilities of the fully resident run, bit for bit;
           what it costs is the bytes of the misses.
Command:   python -m experiments.residency --out experiments/results/residency.json
Hardware:  any CPU; 2 cores take about 2 minutes (--quick: one).
Expected:  equal bits on every row; hit rate rises with residency and is 1 at 100 %.
"""

import argparse
import json
import pathlib
import statistics

import numpy as np

import moejax
from experiments.environment import environment

SHARES = (0.125, 0.25, 0.4, 0.5, 0.75, 1.0)
PROMPTS = (
    "It was a cold night in November, and the old man",
    "The :mod:`json` module provides functions to",
    "import os\nimport sys\n\n\ndef main(",
    "Question: Anna has 12 apples and gives 5 to her brother. How many are left?\nAnswer:",
)


def measure(runtime: moejax.Runtime, new_tokens: int) -> dict:
    """One greedy run per prompt: figures, and the log-probabilities that must not change."""
    needed = hits = moved = tokens = 0
    tpot, chosen = [], []
    for prompt in PROMPTS:
        result = runtime.generate(prompt, new_tokens, {"temperature": 0.0}, logprobs=5)[0]
        stats = runtime.stats
        needed, hits = needed + stats.needed, hits + stats.hits
        moved += (stats.needed - stats.hits) * stats.record_bytes
        tokens += stats.steps
        tpot.append(stats.tpot)
        chosen.append([(t.id, t.logprob, t.top_logprobs) for t in result.tokens])
    return {
        "hit_rate": hits / needed,
        "bytes_per_token": moved / tokens,
        "tpot_ms": statistics.median(tpot) * 1e3,
        "chosen": chosen,
    }


def sweep(model: str, new_tokens: int, rounds: int) -> list[dict]:
    """Rows by residency; rounds go over all budgets in turn, so that noise hits them alike."""
    total = moejax.load(model, slots=None)
    experts = total.config.num_moe_layers * total.config.num_experts
    runtimes = [moejax.load(model, slots=int(share * experts), context=512) for share in SHARES]
    for runtime in runtimes:
        runtime.warm_up(logprobs=5)
    found = [[measure(runtime, new_tokens) for runtime in runtimes] for _ in range(rounds)]
    exact = found[0][-1]["chosen"]
    rows = []
    for i, (share, runtime) in enumerate(zip(SHARES, runtimes, strict=True)):
        column = [turn[i] for turn in found]
        rows.append(
            {
                "residency": share,
                "slots": runtime.slots,
                "hit_rate": column[0]["hit_rate"],
                "bytes_per_token": column[0]["bytes_per_token"],
                "tpot_ms": statistics.median(c["tpot_ms"] for c in column),
                "tpot_ms_spread": float(np.ptp([c["tpot_ms"] for c in column])),
                "same_bits": all(c["chosen"] == exact for c in column),
            }
        )
    return rows


def main() -> None:
    """Measure and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=pathlib.Path)
    options = parser.parse_args()
    rows = sweep(options.model, *((40, 1) if options.quick else (128, 5)))
    same = all(row["same_bits"] for row in rows)
    report = {
        "claim": "any expert budget gives the bits of the fully resident run",
        "command": "python -m experiments.residency",
        "environment": environment(options.model),
        "rows": rows,
        "summary": {"same_bits": same, "hit_rate_40": rows[2]["hit_rate"]},
        "verdict": "holds" if same else "fails",
    }
    text = json.dumps(report, indent=1)
    if options.out:
        options.out.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
