"""What was recorded of drafts that `moejax plan` goes by, from the frontier of all systems.

Claim:     over a slow link drafts pay `auto` from some residency on, and lose below it.
Command:   python -m experiments.plan_break_even --out moejax/planner/break_even.json
Hardware:  any: it reads experiments/results/speculation_frontier.json and measures nothing.
Expected:  one residency from which on `auto` is faster with drafts than without at every one.
"""

import argparse
import json
import pathlib
from typing import Any

from moejax.planner.layout import read
from moejax.reports.files import replace_text

RECORD = pathlib.Path(__file__).parent / "results" / "speculation_frontier.json"
NAMES = {"lru": "lru_ms", "auto:gamma=0": "plain_ms", "auto": "auto_ms"}


def digest(report: dict[str, Any]) -> dict[str, Any]:
    """Times by residency of plain decoding and of `auto` without and with drafts.

    With what they depend on: the link, the bytes of an expert, and misses per token under lru.
    """
    model, found = report["environment"]["model"], {}
    for row in report["rows"]:
        if row["name"] in NAMES and row["gamma"] == "":
            of_share = found.setdefault(row["residency"], {"residency": row["residency"]})
            of_share[NAMES[row["name"]]] = row["tpot_ms"]
            if row["name"] == "lru":
                of_share["lru_missed"] = row["missed"]
            if row["name"] == "auto":
                of_share["tokens_per_cycle"] = row["tokens_per_cycle"]
    return {
        "command": report["command"],
        "commit": report["environment"]["commit"],
        "model": model,
        "layers": read(model).config.num_moe_layers,
        "link": report["link"],
        "record_bytes": report["record_bytes"],
        "rows": [found[share] for share in sorted(found) if len(found[share]) == len(NAMES) + 3],
    }


def main() -> None:
    """Read, shorten and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="no different")
    parser.add_argument("--out", type=pathlib.Path)
    options = parser.parse_args()
    text = json.dumps(digest(json.loads(RECORD.read_text())), indent=1) + "\n"
    if options.out:
        replace_text(options.out, text)
    print(text)


if __name__ == "__main__":
    main()
