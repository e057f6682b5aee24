"""What the experiments on speculation share: runs that generate, and what a token of them cost."""

import dataclasses
import math
from typing import Any

import jax
import numpy as np

import moejax
from experiments.smoe_common import Text, link_text
from moejax.sampling import Sampling
from moejax.stats import Stats

PROMPT = 64  # tokens of a prompt: one chunk of prefill
# Of `smoe_ablation.json`: the paced link on which LRU at 40 % residency and batch 1 spends 70 % of
# its TPOT on loads, and an expert on the host takes a third of a load.
LOAD_US, HOST_US = 159.0, 53.0


def link(record_bytes: int, load_us: float = LOAD_US, host_us: float = HOST_US) -> str:
    """The paced link of these experiments."""
    return link_text(load_us, host_us, record_bytes)


def prompts_of(text: Text, batch: int) -> list[list[np.ndarray]]:
    """Groups of `batch` prompts of PROMPT tokens, each of one domain, domains in turn."""
    groups = []
    for rows in text.measured.values():
        rows = rows[:, :PROMPT]
        groups += [[*rows[i : i + batch]] for i in range(0, len(rows) - batch + 1, batch)]
    return groups


class Generation:
    """One configuration that continues prompts again and again, its experts staying in slots.

    Greedy unless a temperature is given, and to the same length, stop tokens or not. The first
    runs compile: `smoe_common.in_rounds` does not count them.
    """

    def __init__(
        self,
        runtime: moejax.Runtime,
        groups: list[list[np.ndarray]],
        new_tokens: int,
        *,
        temperature: float = 0.0,
        seed: int = 0,
    ):
        """Groups of prompts [B][T]."""
        self.runtime, self.groups, self.new = runtime, groups, new_tokens
        self.sampling = Sampling(temperature=temperature).validate()
        self.seed = seed
        context = max(len(p) for group in groups for p in group) + new_tokens
        self.state = runtime.init_state(len(groups[0]), context=context)
        self.tokens: list[list[int]] = []
        self.times: list[list[float]] = []  # of every run, by group: seconds per token

    def run(self) -> dict[str, float]:
        """All groups once: seconds and counts per token of a sequence, in decode."""
        sums, self.tokens, times = _Sums(), [], []
        for group in self.groups:
            empty = jax.device_put(np.zeros(len(group), np.int32), self.state.length.sharding)
            stats = self.runtime._fresh_stats()
            made = [[] for _ in group]
            engine = dataclasses.replace(self.runtime.engine, context=10**6)
            steps = engine.tokens(
                dataclasses.replace(self.state, length=empty),
                group,
                sampling=self.sampling,
                seed=self.seed,
                max_new_tokens=self.new,
                stop_ids=frozenset(),
                stats=stats,
                finished=np.zeros(len(group), bool),
            )
            for self.state, tokens in steps:
                for token in tokens:
                    made[token.sequence].append(token.id)
            self.tokens += made
            sums.add(stats, len(group), self.new - 1)
            times.append(stats.decode_seconds / (self.new - 1))
        self.times.append(times)
        return sums.row()


class _Sums:
    """Counts of several runs."""

    COUNTS = ("needed", "hits", "late", "host", "overdue", "prefetch_used", "stall_seconds")

    def __init__(self) -> None:
        self.tokens = self.cycles = self.rows = self.drafted = self.accepted = 0
        self.seconds = self.moved = self.prefetched = 0.0
        self.ttft: list[float] = []
        self.counts = dict.fromkeys(self.COUNTS, 0.0)
        self.lengths: dict[int, int] = {}

    def add(self, stats: Stats, batch: int, new: int) -> None:
        self.tokens += new * batch
        self.cycles += stats.steps
        self.rows += stats.row_steps or stats.steps * batch
        self.drafted += stats.drafted
        self.accepted += stats.accepted
        self.seconds += stats.decode_seconds
        self.moved += (stats.bytes_per_step or 0.0) * stats.steps
        self.prefetched += stats.prefetched - stats.prefill_prefetched
        self.ttft.append(stats.ttft)
        self.batch = batch
        for name in self.COUNTS:
            self.counts[name] += getattr(stats, name)
        for gamma, count in stats.draft_lengths.items():
            self.lengths[gamma] = self.lengths.get(gamma, 0) + count

    def row(self) -> dict[str, float]:
        each = 1 / self.tokens
        drafts = sum(gamma * count for gamma, count in self.lengths.items())
        return {
            "tpot": self.seconds * self.batch * each,
            "tokens_per_second": self.tokens / self.seconds,
            "ttft": math.fsum(self.ttft) / len(self.ttft),
            "tokens_per_cycle": self.tokens / self.rows,
            "draft_length": drafts / self.cycles,
            "acceptance": self.accepted / max(self.drafted, 1),
            "missed": (self.counts["needed"] - self.counts["hits"]) * each,
            "moved_bytes": self.moved * each,
            "prefetched": self.prefetched * each,
            **{name: count * each for name, count in self.counts.items()},
        }


def base_runtime(slots: int, over: str | None, **options: Any) -> moejax.Runtime:
    """The embedded model behind a link, with its draft model."""
    runtime = moejax.load("tiny", slots=slots, link=over, **options)
    draft = moejax.load("tiny-draft", context=runtime.context)
    return dataclasses.replace(runtime, draft=draft)
