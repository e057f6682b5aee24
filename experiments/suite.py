"""Run every experiment that has a quick form, one after another, and report on all of them.

Command:   python -m experiments.suite build/experiments      (or: make experiments)
Hardware:  any CPU; 2 cores take under 45 minutes; most need the held-out text, and without it are
           left out by name.
Expected:  one line per experiment, then report.md and the figures in the folder.

An experiment takes part by saying in its docstring how many minutes it takes with `--quick`, in
brackets, the option and a colon first. Those whose record is already in the folder are not run
again, so that a run that was stopped goes on; give an empty folder to measure anew. A record is
kept only when its experiment ended well. Quick numbers show that everything runs, not what the
documents claim.

Scripts that say no minutes are left out: `gpu_suite` needs a GPU and writes a folder,
`plan_machine` writes a machine and no record, `peers_cpu` needs llama.cpp and models of several
GB, `train_tiny` trains; the others are parts of those that run, or make what they read.
"""

import argparse
import ast
import json
import pathlib
import re
import subprocess
import sys
import time
from typing import Any

from moejax.cli import reports as report_commands

HERE = pathlib.Path(__file__).parent
RESULTS = HERE / "results"
QUICK = re.compile(r"\(--quick: ")
MOST_SECONDS = 900  # of one experiment


def experiments(folder: pathlib.Path = HERE) -> list[str]:
    """Names of the scripts whose docstring states their quick form."""
    found = []
    for file in sorted(folder.glob("*.py")):
        text = ast.get_docstring(ast.parse(file.read_text())) or ""
        if QUICK.search(text):
            found.append(file.stem)
    return found


def run(name: str, out: pathlib.Path, seconds: float) -> tuple[str, float]:
    """Run one experiment into `out`; what came of it, and the seconds it took."""
    part = out.with_name(f"{out.stem}.part.json")
    log = out.with_suffix(".log")
    command = [sys.executable, "-m", f"experiments.{name}", "--quick", "--out", str(part)]
    begun = time.perf_counter()
    with log.open("w") as file:
        try:
            done = subprocess.run(
                command, stdout=file, stderr=subprocess.STDOUT, cwd=HERE.parent, timeout=seconds
            ).returncode
        except subprocess.TimeoutExpired:
            done = None
    took = time.perf_counter() - begun
    record = read(part)
    picture = part.with_suffix(".png")
    if done == 0 and record is not None:
        part.replace(out)
        if picture.exists():
            picture.replace(out.with_suffix(".png"))
        return line_of(record), took
    for file in (part, picture):
        file.unlink(missing_ok=True)
    if done is None:
        return f"stopped after {seconds:.0f} s", took
    lines = log.read_text().strip().splitlines()
    return f"failed: {lines[-1] if lines else 'no record'}", took


def read(path: pathlib.Path) -> dict[str, Any] | None:
    """A record, None if there is none or it is not whole."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def line_of(record: dict[str, Any]) -> str:
    """The verdict and the first numbers of a record's summary, in one line."""
    numbers = [(k, v) for k, v in record.get("summary", {}).items() if isinstance(v, float)]
    shown = ", ".join(f"{name} {value:.4g}" for name, value in numbers[:4])
    verdict = record.get("verdict", "no verdict")
    return f"{verdict}; {shown}" if shown else str(verdict)


def main() -> None:
    """Run what is missing, then write the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=pathlib.Path, help="a folder; not that of the results")
    parser.add_argument("--only", nargs="+", choices=experiments())
    parser.add_argument("--minutes", type=float, default=45, help="begin no experiment after these")
    options = parser.parse_args()
    out = options.out.resolve()
    if out == RESULTS.resolve():
        parser.error("the results are measured in full: give another folder")
    out.mkdir(parents=True, exist_ok=True)
    end = time.perf_counter() + 60 * options.minutes
    missing = []
    for name in options.only or experiments():
        path = out / f"{name}.json"
        record = read(path)
        if record is not None:
            print(f"{name}: kept, {line_of(record)}", flush=True)
            continue
        left = end - time.perf_counter()
        said, took = ("left for another run: no time", 0.0)
        if left > 0:
            said, took = run(name, path, min(left, MOST_SECONDS))
        if not path.exists():
            missing.append(name)
        print(f"{name}: {said} ({took:.0f} s)", flush=True)
    files = sorted(out.glob("*.json"))
    if files:
        report_commands.write(files, out, [])
    if missing:
        raise SystemExit(f"without a record: {', '.join(missing)}; run it again to go on")


if __name__ == "__main__":
    main()
