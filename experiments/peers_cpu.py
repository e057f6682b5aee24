"""How moejax compares with transformers and llama.cpp on the same weights, in turn.

Claim:     decoding takes no longer per token than llama.cpp (without its repacked weights) at the
           same bits, and transformers takes at least 2.6 times as long; prompts are processed at
           least as fast as by llama.cpp.
Command:   python -m experiments.peers_cpu MODEL --gguf DIR --llama-python PYTHON \\
               --out experiments/results/peers_cpu.json
           MODEL comes from `experiments.random_model`, DIR from `peers_llama.py convert`.
Hardware:  any CPU with memory for every peer at once (15 GB for the default random model).
Expected:  ratios, the smaller the better for moejax; logits that show it is the same model.

Each peer is a process that stays alive and is asked in turn (A, B, C, A, B, C, ...), so that noise
hits all alike. `--limit 1.5GB` instead runs each alone under that memory limit, files uncached.
"""

import argparse
import contextlib
import importlib.util
import json
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import numpy as np

from experiments.environment import environment
from experiments.limits import LimitError, cached_bytes, drop_cached, memory_limit
from experiments.peers_report import as_markdown, summary
from moejax.bench import random_ids
from moejax.measure import StreamRead, cores
from moejax.units import parse_bytes

HERE = pathlib.Path(__file__).parent
MOEJAX = {
    "moejax bf16": None,
    "moejax bf16 on tiles": None,
    "moejax int8": "int8",
    "moejax int4": "int4",
}
CHOSEN = {"moejax bf16 on tiles": "amxbf16"}  # instruction sets that are not the default
LLAMA = {"llama.cpp BF16": "BF16", "llama.cpp Q8_0": "Q8_0", "llama.cpp Q4_0": "Q4_0"}
TRANSFORMERS = "transformers bf16"
NAMES = [*MOEJAX, TRANSFORMERS, *LLAMA]
LOGIT_TOKENS = 32


class Missing(RuntimeError):
    """A peer cannot run here; the message says why."""


class Peer:
    """A worker that answers one JSON request per line.

    {"op": "time", "ids", "new"} gives seconds and tokens: of the prompt if `new` is 1, else of the
    `new - 1` tokens after the first. {"op": "logits", "ids", "out"} saves logits [T, V].
    """

    def __init__(self, name: str, command: list[str], start: Any = subprocess.Popen):
        self.name = name
        self.log = tempfile.TemporaryFile("w+")
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.log}
        self.process = start(command, text=True, cwd=HERE.parent, **pipes)
        self.about = self._answer()

    def ask(self, op: str, **request: Any) -> dict[str, Any]:
        """The answer to one request; Missing if the worker has died."""
        try:
            self.process.stdin.write(json.dumps({"op": op, **request}) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # its log, read below, tells more
        return self._answer()

    def close(self) -> None:
        """End the worker."""
        self.process.stdin.close()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()
        self.log.close()

    def _answer(self) -> dict[str, Any]:
        line = self.process.stdout.readline()
        if line:
            return json.loads(line)
        code = self.process.wait()
        self.log.seek(0)
        said = [line.strip() for line in self.log.read().splitlines() if line.strip()]
        errors = [line for line in said if "Error: " in line] or said or ["no message"]
        ended = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
        raise Missing(f"{ended}: {errors[-1]}")


def command_of(name: str, options: argparse.Namespace) -> list[str]:
    """The command line of a peer's worker; Missing where a file or package is."""
    if name in LLAMA:
        file = options.gguf and options.gguf / f"{LLAMA[name]}.gguf"
        if not options.llama_python or not file or not file.exists():
            raise Missing(f"no --llama-python, or no {LLAMA[name]}.gguf in --gguf")
        context = ["--threads", str(cores()), "--context", str(options.context)]
        script = str(HERE / "peers_llama.py")
        return [options.llama_python, script, "serve", str(file), *context]
    if name == TRANSFORMERS and not importlib.util.find_spec("torch"):
        raise Missing("torch is not installed")
    load: dict[str, Any] = {"context": options.context}
    if name in MOEJAX:
        load |= {"quant": MOEJAX[name], **json.loads(options.moejax_options)}
    what = {"name": name, "model": str(options.bank or options.model), "load": load}
    if name == TRANSFORMERS:
        what["model"] = str(options.model)
    chosen = ["env", f"MOEJAX_ISA={CHOSEN[name]}"] if name in CHOSEN else []
    return [*chosen, sys.executable, "-m", "experiments.peers_workers", json.dumps(what)]


def start_all(options: argparse.Namespace) -> tuple[dict[str, Peer], dict[str, str]]:
    """Every peer that can run, and why the others cannot."""
    peers, missing = {}, {}
    for name in options.peers:
        try:
            peers[name] = Peer(name, command_of(name, options))
        except Missing as error:
            missing[name] = str(error)
        print(f"{name}: {missing.get(name, 'ready')}", file=sys.stderr)
    return peers, missing


def interleaved(
    peers: dict[str, Peer], options: argparse.Namespace, missing: dict[str, str]
) -> Iterator[dict[str, Any]]:
    """Times of every test and peer: one round per repetition, the first of which only warms up.

    The stream-read bandwidth is the mean of one read just before and one just after. A peer that
    dies is left out from then on and becomes `missing`.
    """
    alive = dict(peers)
    tests = [(f"pp{n}", n, 1) for n in options.pp] + [(f"tg{options.tg}", 1, options.tg + 1)]
    reader, order = StreamRead(), np.random.default_rng(options.seed)
    for repetition in range(options.reps + 1):
        for test, prompt, new in tests:
            ids = random_ids(options.vocab, 1, prompt, seed=options.seed, repetition=repetition)
            # In another order each time, so that none always comes after the same one.
            for name in order.permutation([*alive]).tolist():
                before = reader.gb_per_s()
                try:
                    answer = alive[name].ask("time", ids=ids[0].tolist(), new=new)
                except Missing as error:
                    missing[name] = f"in {test}, {error}"
                    del alive[name]
                    continue
                rate = (before + reader.gb_per_s()) / 2
                if repetition:
                    count = new - 1 or prompt
                    row = {"test": test, "peer": name, "repetition": repetition}
                    row |= {"ms_per_token": answer["seconds"] * 1e3 / count}
                    yield row | {"stream_read_gb_per_s": rate, "tokens": answer["tokens"]}
            print(f"round {repetition} of {options.reps}: {test}", file=sys.stderr)


def agreement(peers: dict[str, Peer], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Logits of every peer against the first one's: the same weights give about the same."""
    ids = random_ids(options.vocab, 1, LOGIT_TOKENS, seed=options.seed, repetition=0)[0].tolist()
    logits = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, peer in peers.items():
            out = f"{folder}/logits.npy"
            with contextlib.suppress(Missing):  # one that died has no times either, and a reason
                peer.ask("logits", ids=ids, out=out)
                logits[name] = np.load(out)
    if not logits:
        return []
    base, *others = logits
    scale = float(logits[base].std())
    return [
        {
            "peer": name,
            "against": base,
            "max_difference": float(np.abs(logits[name] - logits[base]).max()),
            "mean_difference": float(np.abs(logits[name] - logits[base]).mean()),
            "standard_deviation_of_logits": scale,
            "same_argmax": float((logits[name].argmax(-1) == logits[base].argmax(-1)).mean()),
        }
        for name in others
    ]


def limited(options: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Decode time of each peer alone under the memory limit, and why peers are missing."""
    size, found, missing = parse_bytes(options.limit), [], {}
    for name in options.peers:
        try:
            with memory_limit(size) as limit:
                found.append(_limited_one(name, limit, options))
        except (LimitError, Missing) as error:
            missing[name] = str(error)
        print(f"{name}: {missing.get(name, found and found[-1])}", file=sys.stderr)
    return found, missing


def _limited_one(name: str, limit: Any, options: argparse.Namespace) -> dict[str, Any]:
    command = command_of(name, options)
    source = options.gguf / f"{LLAMA[name]}.gguf" if name in LLAMA else options.model
    source = options.bank if options.bank and name in MOEJAX else source
    files = [f for f in source.rglob("*") if f.is_file()] if source.is_dir() else [source]
    cached = drop_cached(files)
    peer = Peer(name, command, limit.start)
    try:
        times = []
        for repetition in range(options.reps):
            ids = random_ids(options.vocab, 1, 1, seed=options.seed, repetition=repetition)
            answer = peer.ask("time", ids=ids[0].tolist(), new=options.tg + 1)
            times.append(answer["seconds"] * 1e3 / options.tg)
        return {
            "test": f"tg{options.tg}",
            "peer": name,
            "ms_per_token": float(np.median(times)),
            "samples": times,
            "memory": limit.usage(),
            "file_bytes": sum(f.stat().st_size for f in files),
            "cached_before": cached,
            "cached_after": sum(cached_bytes(f) for f in files),
        }
    finally:
        peer.close()


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=pathlib.Path)
    parser.add_argument("--bank", type=pathlib.Path, help="the converted model, for moejax")
    parser.add_argument("--gguf", type=pathlib.Path, help="directory of BF16.gguf and so on")
    parser.add_argument("--llama-python", help="a Python that has llama-cpp-python and gguf")
    parser.add_argument("--moejax-options", default="{}", help="JSON options of moejax.load")
    parser.add_argument("--peers", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--pp", type=int, nargs="*", default=[32, 128, 512])
    parser.add_argument("--tg", type=int, default=40)
    parser.add_argument("--reps", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", help="a memory limit such as 1.5GB, for each peer alone")
    parser.add_argument("--out", type=pathlib.Path)
    options = parser.parse_args()
    options.context = max([*options.pp, LOGIT_TOKENS, options.tg + 1])
    options.vocab = json.loads((options.model / "config.json").read_text())["vocab_size"]
    return options


def main() -> None:
    """Measure, print a table and write the JSON."""
    options = parse()
    report: dict[str, Any] = {
        "claim": __doc__.split("Claim:")[1].split("Command:")[0],
        "command": f"python -m experiments.peers_cpu {' '.join(sys.argv[1:])}",
        "environment": environment(str(options.model)),
        "seed": options.seed,
    }
    report["claim"] = " ".join(report["claim"].split())
    if options.limit:
        rows, missing = limited(options)
        report |= {"limited": rows, "missing": missing}
    else:
        peers, missing = start_all(options)
        if not peers:
            raise SystemExit(f"no peer can run: {missing}")
        try:
            report |= {"agreement": agreement(peers, options), "missing": missing}
            about = {name: peer.about for name, peer in peers.items()}
            rows = []
            # What was measured before Ctrl-C is kept.
            with contextlib.suppress(KeyboardInterrupt):
                rows.extend(interleaved(peers, options, missing))
        finally:
            for peer in peers.values():
                peer.close()
        report |= {"peers": about, "samples": rows, "rows": summary(rows, about)}
    if options.out:
        options.out.write_text(json.dumps(report, indent=1) + "\n")
    print(as_markdown(report))


if __name__ == "__main__":
    main()
