"""Long routing traces of the embedded model, with scores, on held-out text of four domains.

Claim:     none: these are data, for the simulator and for whoever studies caches of experts.
Command:   python -m experiments.record_traces --out experiments/traces
Hardware:  any CPU; 2 cores take about 2 minutes (a few seconds with --quick, for a shorter trace).
Expected:  a file of at most 6 MB, the same routing each time, and a README with its statistics.
"""

import argparse
import json
import pathlib

import numpy as np
from tokenizers import Tokenizer

import moejax
from experiments import held_out, tiny_data
from experiments.environment import environment
from moejax.traces import record
from moejax.traces.statistics import TraceStats, statistics
from moejax.traces.trace import Trace

LENGTH = 1792
SCORES = 16  # of 32: all of them would take 9 MB
PROMPT = 64
MOST_BYTES = 6_000_000
ABOUT = """# Routing traces

`{name}` ({megabytes:.1f} MB): the embedded model ([card](../../checkpoints/tiny/README.md)) reads
{windows} windows of {length} tokens of text that it was not trained on, from {domains} in
turn. Of each, {prompt} tokens go in at once and {decoded:,} one by one, as if the model had written
them: {tokens:,} tokens in all. Kept are the picks, the {scores} greatest scores of each layer, and
where each expert was: 40 % of the experts have slots ({slots} of {experts}), the least recently
used leaves, and experts stay from one window to the next. The weights of the picks are not there:
they are the picks' scores over the sum of these. Made by

```bash
python -m experiments.record_traces --out experiments/traces
```

with moejax {version} on {cpu} ({kernels} kernels; another processor may round
differently and now and then pick another expert). [docs/traces.md](../../docs/traces.md) describes
the file; `about["domains"]` names the domain of each sequence.

The file holds the text as token ids. Novels are in the public domain in the USA (Project
Gutenberg); docs and code are of Python 3.11 and its standard library (PSF License 2.0); maths is
GSM8K's test split (MIT).

| decode steps of | {columns} |
|---|{rules}|
"""
TABLE = {
    "picks to the top 10 % of experts": lambda s: f"{s.top_share['10%']:.1%}",
    "normalised entropy": lambda s: f"{s.entropy:.3f}",
    "overlap at lag 1": lambda s: f"{s.overlap[1]:.3f}",
    "at lag 2": lambda s: f"{s.overlap[2]:.3f}",
    "at lag 8": lambda s: f"{s.overlap[8]:.3f}",
    "at lag 32": lambda s: f"{s.overlap[32]:.3f}",
    "median other experts between uses": lambda s: f"{s.stack_distance['0.5']:.0f}",
    "experts of 8 tokens over those of one": lambda s: f"{s.union[8]:.2f}",
    "score after the last pick over its own": lambda s: f"{s.score_step:.3f}",
}


def texts(windows: int, length: int, data: pathlib.Path) -> tuple[list[np.ndarray], list[str]]:
    """Windows of tokens, domains in turn, and the domain of each."""
    directory = moejax.load("tiny").directory
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    found = {}
    for domain in tiny_data.DOMAINS:
        documents = held_out.documents(domain, data)
        stream = tiny_data.encode_documents(tokenizer, documents, held_out.ORDER)
        found[domain] = tiny_data.val_windows(stream, length, windows)[:, :length]
    order = [(w, domain) for w in range(windows) for domain in found]
    return [found[domain][w] for w, domain in order], [domain for _, domain in order]


def by_domain(trace: Trace) -> dict[str, TraceStats]:
    """Statistics of each domain's decode steps, and of all."""
    domains = np.array(trace.about["domains"])
    parts = {
        domain: trace.of_sequences(*np.flatnonzero(domains == domain))
        for domain in tiny_data.DOMAINS
    }
    return {name: statistics(part) for name, part in (parts | {"all": trace}).items()}


def readme(path: pathlib.Path, trace: Trace) -> str:
    """What the folder's README says of a trace."""
    about = trace.about
    text = ABOUT.format(
        name=path.name,
        megabytes=path.stat().st_size / 1e6,
        windows=len(about["domains"]),
        length=np.bincount(trace.sequence).max(),
        domains=f"{', '.join(tiny_data.DOMAINS[:-1])} and {tiny_data.DOMAINS[-1]}",
        prompt=PROMPT,
        decoded=np.bincount(trace.sequence).max() - PROMPT,
        tokens=trace.rows,
        scores=trace.top_scores.shape[2],
        slots=about["slots"],
        experts=trace.layers * trace.experts,
        version=about["version"],
        cpu=about["environment"]["cpu"],
        kernels=about["kernels"],
        columns=" | ".join(TABLE),
        rules="|".join(["---:"] * len(TABLE)),
    )
    for name, found in by_domain(trace).items():
        text += f"| {name} | {' | '.join(say(found) for say in TABLE.values())} |\n"
    return text


def main() -> None:
    """Record, write, and say what was written."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=pathlib.Path, help="the folder; without, nothing is kept")
    parser.add_argument("--data", type=pathlib.Path, default=held_out.DATA)
    parser.add_argument("--windows", type=int, default=3, help="of each domain")
    options = parser.parse_args()
    if not options.data.is_dir():
        raise SystemExit(f"the held-out text is not at {options.data}: give its folder as --data")
    windows, length = (1, 256) if options.quick else (options.windows, LENGTH)
    rows, domains = texts(windows, length, options.data)
    runtime = moejax.load("tiny", slots=76, context=length, virtual=True)
    trace = record.follow(
        runtime,
        rows,
        prompt=PROMPT,
        keep=record.Keep(scores=SCORES, weights=False),
        name="tiny",
        about={"policy": "lru", "domains": domains, "environment": environment("tiny")},
    )
    found = {name: stats.as_dict() for name, stats in by_domain(trace).items()}
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        path = options.out / "tiny_held_out.npz"
        trace.save(path)
        if path.stat().st_size > MOST_BYTES:
            raise SystemExit(f"{path} has {path.stat().st_size} bytes, over {MOST_BYTES}")
        (options.out / "README.md").write_text(readme(path, trace))
    print(json.dumps({"tokens": trace.rows, "statistics": found}, indent=1))


if __name__ == "__main__":
    main()
