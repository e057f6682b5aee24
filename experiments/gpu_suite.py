"""Check and measure the GPU path: kernels, link, overlap, control flow, whole decode steps.

Claim:     the kernels reach 80 % of the memory bound, an offloaded token takes at most 1.25 times
           the slower of link and memory, and the host adds at most 1 ms per token.
Command:   python -m experiments.gpu_suite --out DIR [--quick] [--parts NAME ...] [--budget S]
Hardware:  one NVIDIA GPU with 80 GB and 96 GB of host memory for the whole of it (about 9 minutes);
           without a GPU, `--quick` runs every part with tiny sizes, kernels interpreted.
Expected:  DIR/gpu_suite.json with every sample, DIR/gpu_suite.md, a profiler trace in DIR/trace.

Every part is a process of its own with a time limit: a fault of one leaves the others a sound
device, and what a part has measured before a fault or its limit is kept.
"""

import argparse
import dataclasses
import importlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

ROOT = pathlib.Path(__file__).parent.parent
SEED = 0
HIDDEN = ("samples", "trace")  # in the JSON only


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of the suite: a generator of rows `function(sizes)` in a module of experiments."""

    module: str
    function: str
    seconds: int  # its limit


PARTS = {
    "environment": Part("gpu_kernels", "environment", 60),
    "correctness": Part("gpu_kernels", "correctness", 120),
    "fetch": Part("gpu_link", "fetch", 60),
    "link": Part("gpu_link", "link", 60),
    "overlap": Part("gpu_link", "overlap", 60),
    "control": Part("gpu_decode", "control", 45),
    "overhead": Part("gpu_decode", "overhead", 60),
    "bandwidth": Part("gpu_kernels", "bandwidth", 150),
    "tpot": Part("gpu_decode", "tpot", 200),
    "host": Part("gpu_host", "host", 90),
    "memory": Part("gpu_decode", "memory", 60),
    "tiles": Part("gpu_kernels", "tile_sweep", 90),
    "peer": Part("gpu_peer", "peer", 90),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """How large a run is; `quick` ones take a CPU seconds."""

    quick: bool
    out: pathlib.Path

    def pick(self, full: Any, quick: Any) -> Any:
        """The value for this run."""
        return quick if self.quick else full


def child(name: str, sizes: Sizes, rows: pathlib.Path) -> None:
    """Run one part in this process; rows go to a file, one JSON object a line."""
    # Faults and limits lose nothing: a row is on disk before the next is measured.
    part = PARTS[name]
    function = getattr(importlib.import_module(f"experiments.{part.module}"), part.function)
    with rows.open("w") as file:
        for row in function(sizes):
            file.write(json.dumps(row) + "\n")
            file.flush()


def child_environment() -> dict[str, str]:
    """Memory for records of 58 GB, on the device or pinned; compiled programs are kept."""
    environment = dict(os.environ)
    environment.setdefault("XLA_CLIENT_MEM_FRACTION", "0.93")
    environment.setdefault("JAX_TRACEBACK_FILTERING", "off")
    environment.setdefault("XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB", "100")
    return environment


def run_part(name: str, sizes: Sizes, seconds: float) -> dict:
    """One part in a process of its own: {"part", "seconds", "error", "rows"}."""
    rows = sizes.out / "parts" / f"{name}.jsonl"
    rows.parent.mkdir(parents=True, exist_ok=True)
    rows.unlink(missing_ok=True)
    command = [sys.executable, "-m", "experiments.gpu_suite", "--out", str(sizes.out)]
    command += ["--only", name] + ["--quick"] * sizes.quick
    start, error = time.monotonic(), None
    log = sizes.out / "parts" / f"{name}.log"
    with log.open("w") as file:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=child_environment(),
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            if code := process.wait(timeout=max(seconds, 1)):
                error = f"exit status {code}: {log.read_text()[-2000:]}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            error = f"longer than {seconds:.0f} s: {log.read_text()[-1000:]}"
    found = [json.loads(line) for line in rows.read_text().splitlines()] if rows.exists() else []
    spent = time.monotonic() - start
    return {"part": name, "seconds": round(spent, 1), "error": error, "rows": found}


def run(names: list[str], sizes: Sizes, budget: float) -> Iterator[dict]:
    """The parts that fit the budget of seconds; others say so."""
    start = time.monotonic()
    for name in names:
        left = budget - (time.monotonic() - start)
        if left < 10:
            yield {"part": name, "seconds": 0, "error": "no time left in the budget", "rows": []}
            continue
        yield run_part(name, sizes, min(PARTS[name].seconds, left))


def table(report: dict) -> str:
    """All parts and their rows as markdown."""
    lines = ["| part | seconds | rows | error |", "|---|---:|---:|---|"]
    for part in report["parts"]:
        last = (part["error"] or "").strip().splitlines()[-1:] or [""]
        lines.append(
            f"| {part['part']} | {part['seconds']} | {len(part['rows'])} | {last[0][:160]} |"
        )
    for part in report["parts"]:
        rows = [{k: v for k, v in row.items() if k not in HIDDEN} for row in part["rows"]]
        heads = list(dict.fromkeys(key for row in rows for key in row))
        if rows and part["part"] != "environment":
            lines += ["", f"## {part['part']}", "", f"| {' | '.join(heads)} |"]
            lines.append("|" + "---|" * len(heads))
            lines += [f"| {' | '.join(_cell(row.get(h)) for h in heads)} |" for row in rows]
    return "\n".join(lines) + "\n"


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else str(value).replace("|", "/").replace("\n", " ")[:200]


def write(report: dict, out: pathlib.Path) -> None:
    """The report as JSON and as markdown."""
    (out / "gpu_suite.json").write_text(json.dumps(report, indent=1) + "\n")
    (out / "gpu_suite.md").write_text(table(report))


def main() -> None:
    """Run the parts that the options ask for and write the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--budget", type=float, default=560.0, help="seconds in all")
    parser.add_argument("--only", choices=PARTS, help="run one part in this process")
    options = parser.parse_args()
    sizes = Sizes(quick=options.quick, out=options.out.resolve())
    sizes.out.mkdir(parents=True, exist_ok=True)
    if options.only:
        child(options.only, sizes, sizes.out / "parts" / f"{options.only}.jsonl")
        return
    names = list(dict.fromkeys(["environment", *options.parts]))
    report = {"command": " ".join(["python -m experiments.gpu_suite", *sys.argv[1:]])}
    report |= {"seed": SEED, "environment": {}, "interpret": None, "parts": []}
    for part in run(names, sizes, options.budget):
        if part["part"] == "environment" and part["rows"]:
            (report["environment"],) = part["rows"]
            report["interpret"] = report["environment"]["interpret"]
        report["parts"].append(part)
        print(f"{part['part']}: {part['seconds']} s, {len(part['rows'])} rows", flush=True)
        if part["error"]:
            print(f"  {part['error'].strip().splitlines()[-1][:300]}", flush=True)
        write(report, sizes.out)
    print(table(report))


if __name__ == "__main__":
    main()
