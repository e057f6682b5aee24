"""Write the result tables of README.md from experiments/results/*.json.

Command:   python -m experiments.tables            (--check: fail if a table is out of date)
"""

import argparse
import json
import pathlib
import re

ROOT = pathlib.Path(__file__).parent.parent
RESULTS = ROOT / "experiments" / "results"
BLOCK = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def residency(report: dict) -> list[str]:
    """Rows of `experiments.residency`."""
    lines = [
        "| experts resident | slots | hit rate | MB copied per token | TPOT, ms | same bits |",
        "|---:|---:|---:|---:|---:|---|",
    ]
    for row in report["rows"]:
        lines.append(
            f"| {row['residency']:.1%} | {row['slots']} | {row['hit_rate']:.1%} "
            f"| {row['bytes_per_token'] / 1e6:.2f} | {row['tpot_ms']:.2f} "
            f"| {'yes' if row['same_bits'] else 'NO'} |"
        )
    return [*lines, "", _source(report)]


def quantisation(report: dict) -> list[str]:
    """Rows of `experiments.quantisation`."""
    domains = list(report["windows"])
    lines = [
        f"| weights | KB per expert | MB in all | {' | '.join(domains)} | change (95 %) | greedy |",
        "|---|---:|---:|" + "---:|" * len(domains) + "---:|---:|",
    ]
    for row in report["rows"]:
        table = row["held_out"]
        low, high = table["all"]["interval"]
        change = f"{table['all']['change']:+.2%} ({low:+.2%} to {high:+.2%})"
        lines.append(
            f"| {row['format']} | {row['record_bytes'] / 1e3:.1f} | {row['total_bytes'] / 1e6:.1f} "
            f"| {' | '.join(format(table[d]['perplexity'], '.2f') for d in domains)} "
            f"| {change if high > low else '–'} | {table['all']['greedy_agreement']:.1%} |"
        )
    return [*lines, "", _source(report)]


def _source(report: dict) -> str:
    """Hardware, versions and command of a result."""
    environment = report["environment"]
    versions = environment["versions"]
    return (
        f"{environment['cpu']}, {environment['cpus']} cores, Python {versions['python']}, JAX "
        f"{versions['jax']}; `{report['command']}`."
    )


TABLES = {"residency": residency, "quantisation": quantisation}


def filled(text: str) -> str:
    """The text with every marked table rewritten."""

    def replace(found: re.Match) -> str:
        report = json.loads((RESULTS / f"{found[2]}.json").read_text())
        return found[1] + "\n".join(TABLES[found[2]](report)) + "\n" + found[3]

    return BLOCK.sub(replace, text)


def main() -> None:
    """Rewrite README.md, or check it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    readme = ROOT / "README.md"
    old = readme.read_text()
    new = filled(old)
    if parser.parse_args().check and new != old:
        raise SystemExit("README.md is out of date: run python -m experiments.tables")
    readme.write_text(new)


if __name__ == "__main__":
    main()
