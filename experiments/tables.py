"""Write the tables of the documents from experiments/results/*.json.

Command:   python -m experiments.tables            (--check: fail if a table is out of date)

It is `moejax report experiments/results/*.json` with every document that has tables.
"""

import argparse
import pathlib

from moejax.cli import reports as report_commands

ROOT = pathlib.Path(__file__).parent.parent
RESULTS = ROOT / "experiments" / "results"
DOCUMENTS = (ROOT / "README.md", ROOT / "experiments" / "README.md", ROOT / "docs" / "planner.md")


def main() -> None:
    """Rewrite the documents, or check them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    files = sorted(RESULTS.glob("*.json"))
    if not report_commands.write(files, None, DOCUMENTS, check):
        raise SystemExit("documents are out of date: run python -m experiments.tables")


if __name__ == "__main__":
    main()
