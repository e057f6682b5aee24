"""Throughput of a loaded model, as llama-bench shapes it, with what an offload engine adds.

`ppN` processes a prompt of N random tokens, `tgN` generates N tokens greedily after one random
token; every repetition starts from a fresh state, so an expert cache starts empty. Both run the
engine that `generate` runs, and its clocks.
"""

import collections
import copy
import csv
import dataclasses
import io
import statistics
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from moejax.decode import chunks
from moejax.errors import InputError
from moejax.measure import StreamRead
from moejax.report import drafts_in_words
from moejax.runtime import Runtime
from moejax.sampling import Sampling
from moejax.stats import Stats


@dataclasses.dataclass(frozen=True)
class Test:
    """One thing to time: a prompt of `prompt` tokens, then `new` tokens."""

    name: str
    prompt: int
    new: int  # 1 for a prompt test: the token that ends the prefill


@dataclasses.dataclass(frozen=True)
class Sample:
    """One repetition of a test."""

    seconds: float
    stats: Stats
    prefill: Stats  # as `stats` was when the prompt had been processed
    tokens: list[list[int]]  # generated, by sequence
    bandwidth: float | None = None  # 1e9 bytes per second, read just before and after


def tests(pp: Sequence[int], tg: Sequence[int]) -> list[Test]:
    """The tests of these lengths; zeros are left out.

    Raises:
        InputError: nothing is left, or a length is negative.
    """
    if min([*pp, *tg], default=0) < 0:
        raise InputError("a test has a negative length: give --pp and --tg tokens, 0 for none")
    found = [Test(f"pp{n}", n, 1) for n in pp if n] + [Test(f"tg{n}", 1, n + 1) for n in tg if n]
    if not found:
        raise InputError("nothing to measure: give --pp or --tg above 0")
    return found


def context_for(chosen: Sequence[Test]) -> int:
    """Tokens per sequence that the KV cache must hold."""
    return max(test.prompt + test.new - 1 for test in chosen)


def random_ids(
    vocab_size: int, batch: int, tokens: int, *, seed: int, repetition: int
) -> np.ndarray:
    """Token ids [batch, tokens], the same wherever the seed and the repetition are."""
    rng = np.random.default_rng((seed, repetition))
    return rng.integers(0, vocab_size, (batch, tokens), dtype=np.int32)


def run_once(runtime: Runtime, test: Test, ids: np.ndarray) -> Sample:
    """Run one test on prompts [batch, test.prompt]; a stop token does not stop it."""
    blank = runtime.stats
    stats = Stats(blank.record_bytes, label=blank.label, virtual=blank.virtual)
    state = jax.block_until_ready(runtime.init_state(len(ids)))
    tokens: list[list[int]] = [[] for _ in ids]
    steps = runtime.engine.tokens(
        state,
        list(ids),
        sampling=Sampling(temperature=0.0).validate(),
        seed=0,
        max_new_tokens=test.new,
        stop_ids=frozenset(),
        stats=stats,
        finished=np.zeros(len(ids), bool),
    )
    prefill = None
    for _, drawn in steps:
        prefill = prefill or copy.deepcopy(stats)
        for token in drawn:
            tokens[token.sequence].append(token.id)
    seconds = stats.decode_seconds if stats.steps else stats.ttft
    return Sample(seconds, stats, prefill, tokens)


def bench(
    runtime: Runtime,
    chosen: Sequence[Test],
    *,
    reps: int = 5,
    batch: int = 1,
    seed: int = 0,
    bandwidth: bool = True,
) -> list[dict[str, Any]]:
    """Time the tests in turn, repetition by repetition; one row per test, see `row`.

    Every test runs once before it counts. With `bandwidth`, a stream read is timed before and
    after each repetition (it needs 1 GiB of memory), which gives `bound_fraction`.
    """
    reader = StreamRead() if bandwidth else None
    vocab = runtime.config.vocab_size
    samples: list[list[Sample]] = [[] for _ in chosen]
    for repetition in range(-1, reps):
        before = reader.gb_per_s() if reader else None
        done = [
            run_once(
                runtime,
                test,
                random_ids(vocab, batch, test.prompt, seed=seed, repetition=repetition + 1),
            )
            for test in chosen
        ]
        after = reader.gb_per_s() if reader else None
        rate = (before + after) / 2 if reader else None
        if repetition >= 0:
            for found, sample in zip(samples, done, strict=True):
                found.append(dataclasses.replace(sample, bandwidth=rate))
    return [row(runtime, t, s, seed=seed) for t, s in zip(chosen, samples, strict=True)]


def row(runtime: Runtime, test: Test, samples: Sequence[Sample], *, seed: int) -> dict[str, Any]:
    """What repetitions of a test say; rates are medians, counts and bytes are those of one token.

    `bytes_per_token` crossed the link, `weight_bytes_per_token` had to be read for the step: the
    dense weights (an untied embedding aside) and each expert in use, once per step or chunk of a
    prompt. `bound_fraction` is the time to stream-read the latter over the time it took; a long
    prompt is bound by arithmetic, so there it only says how far away the memory's bound is.
    `stall_ms` is time of decoding steps that waited for the link.
    """
    batch = len(samples[0].tokens)
    count = batch * (test.new - 1 or test.prompt)
    rates = [count / s.seconds for s in samples]
    counts = [_counts(runtime, test, s) for s in samples]
    mean = {name: statistics.fmean(c[name] for c in counts) / count for name in counts[0]}
    hits = sum(c["hits"] for c in counts)
    needed = sum(c["needed"] for c in counts)
    bounds = [
        c["weight_bytes"] / (s.bandwidth * 1e9) / s.seconds
        for c, s in zip(counts, samples, strict=True)
        if s.bandwidth is not None
    ]
    bandwidths = [s.bandwidth for s in samples if s.bandwidth is not None]
    return {
        "test": test.name,
        "tokens_per_second": statistics.median(rates),
        "mean": statistics.fmean(rates),
        "stdev": statistics.stdev(rates) if len(rates) > 1 else 0.0,
        "samples": rates,
        "ms_per_token": statistics.median(1e3 / rate for rate in rates),
        "hit_rate": hits / needed if needed else None,
        "misses_per_token": mean["needed"] - mean["hits"],
        "bytes_per_token": mean["moved"],
        "host_experts_per_token": mean["host"],
        "weight_bytes_per_token": mean["weight_bytes"],
        "stall_ms": mean["stall_ms"],
        "bound_fraction": statistics.median(bounds) if bounds else None,
        "stream_read_gb_per_s": statistics.median(bandwidths) if bandwidths else None,
        "stream_read_samples": bandwidths,
        **_drafts(runtime, samples),
        # Greedy decoding of a bad model may repeat itself, which flatters the hit rate.
        "distinct_tokens": len({t for s in samples for row in s.tokens for t in row}),
        **_budget(runtime),
        "batch": batch,
        "reps": len(samples),
        "seed": seed,
    }


def _drafts(runtime: Runtime, samples: Sequence[Sample]) -> dict[str, float | None]:
    """Whether drafts paid, over all repetitions; None where none could be made."""
    total, lengths = Stats(record_bytes=0), collections.Counter()
    for sample in samples:
        for name in ("steps", "row_steps", "drafted", "accepted"):
            setattr(total, name, getattr(total, name) + getattr(sample.stats, name))
        lengths.update(sample.stats.draft_lengths)
    total.draft_lengths = dict(lengths)
    return {
        "tokens_per_cycle": total.tokens_per_step if total.row_steps else None,
        "acceptance": total.acceptance,
        "drafted_share": total.drafted_share,
        "plain_step_ms": runtime.plain_step_ms(total),
    }


def _counts(runtime: Runtime, test: Test, sample: Sample) -> dict[str, float]:
    """Sums over the part of one repetition that is timed."""
    stats, before = sample.stats, sample.prefill
    if stats.steps:
        steps, needed, hits = stats.steps, stats.needed, stats.hits
        moved, host = stats.bytes_moved - before.bytes_moved, stats.host - before.host
    else:
        steps = sum(1 for _ in chunks([np.zeros(test.prompt, np.int32)]))
        needed, hits = stats.prefill_needed, stats.prefill_hits
        moved, host = stats.bytes_moved, stats.host
    expert = runtime.store.layout.weight_bytes if runtime.store else 0
    return {
        "needed": needed,
        "hits": hits,
        "moved": moved,
        "host": host,
        "stall_ms": stats.stall_seconds * 1e3,
        "weight_bytes": steps * dense_bytes_read(runtime) + needed * expert,
    }


def dense_bytes_read(runtime: Runtime) -> int:
    """Bytes of the dense weights that every step reads; of an untied embedding it reads rows."""
    held = {
        group: sum(array.nbytes for array in jax.tree.leaves(arrays))
        for group, arrays in runtime.params.items()
    }
    return sum(held.values()) - (0 if runtime.config.tied_embeddings else held["embed"])


def _budget(runtime: Runtime) -> dict[str, Any]:
    config, stats = runtime.config, runtime.stats
    return {
        "model": str(runtime.directory),
        "dtype": runtime.model.dtype,
        "quant": runtime.model.quant,
        "kernels": runtime.model.kernels,
        "link": runtime.tier,
        "expert_format": runtime.store.layout.dtype if runtime.store else None,
        "label": stats.label,
        "virtual": stats.virtual,
        "slots": runtime.slots,
        "experts": config.num_moe_layers * config.num_experts,
        "record_bytes": stats.record_bytes,
        "context": runtime.context,
    }


COLUMNS = {
    "model": lambda r: r["model"].rstrip("/").rsplit("/", 1)[-1],
    "format": lambda r: r["expert_format"] or r["dtype"],
    "policy": lambda r: r["policy"],
    "slots": lambda r: f"{r['slots']} of {r['experts']}",
    "test": lambda r: r["test"],
    "t/s": lambda r: f"{r['tokens_per_second']:.2f} ± {r['stdev']:.2f}",
    "ms/token": lambda r: f"{r['ms_per_token']:.2f}",
    "hit rate": lambda r: _or_dash(r["hit_rate"], ".1%"),
    "misses/token": lambda r: f"{r['misses_per_token']:.1f}",
    "MiB/token": lambda r: f"{r['bytes_per_token'] / 2**20:.2f}",
    "of bound": lambda r: _or_dash(r["bound_fraction"], ".0%"),
}


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def as_markdown(rows: Sequence[dict[str, Any]]) -> str:
    """A table of the main columns: median and standard deviation, MiB moved over the link."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---" * 5 + "|---:" * (len(COLUMNS) - 5) + "|"]
    lines += ["| " + " | ".join(cell(r) for cell in COLUMNS.values()) + " |" for r in rows]
    drafted = [r for r in rows if r["tokens_per_cycle"] is not None]
    lines += [""] * bool(drafted)
    lines += [f"{r['test']}: {_speculation(r)}." for r in drafted]
    rates = [r["stream_read_gb_per_s"] for r in rows if r["stream_read_gb_per_s"]]
    if rates:
        lines += ["", f"Stream reads in between: {statistics.median(rates):.1f} GB/s."]
    return "\n".join(lines)


def _speculation(row: dict[str, Any]) -> str:
    made = [row[name] for name in ("tokens_per_cycle", "acceptance", "drafted_share")]
    # a step makes a token of each sequence
    return drafts_in_words(*made, row["ms_per_token"] * row["batch"], row["plain_step_ms"])


def as_csv(rows: Sequence[dict[str, Any]]) -> str:
    """Every column but lists and records, with a header."""
    names = [name for name, value in rows[0].items() if not isinstance(value, list | dict)]
    out = io.StringIO()
    writer = csv.DictWriter(out, names, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().rstrip("\n")
