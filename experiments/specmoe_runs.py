"""What `specmoe_batch` measures with: full batches that go on from prompts read once."""

import dataclasses
import functools
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import moejax
from experiments import smoe_common as common
from experiments.smoe_common import PROMPT
from moejax.cycles import Cycles
from moejax.decode import rewind, step
from moejax.drafters import completed
from moejax.policies.eviction import CLOCK_LIMIT, LRU, Access
from moejax.policies.policy import Policy, policy
from moejax.sampling import Sampling
from moejax.speculate import Target
from moejax.state import pytree
from moejax.stats import totals_of

ENDINGS = {"all resident": 1.0, "60 % resident": 0.6}  # of names, and what they mean
MOST_DRAFTS = 10  # of any configuration
COUNTS = ("seconds", "tokens", "stall", "busy", "bytes", "hits", "needed", "drafted")


@pytree
class Pinned:
    """LRU that gives up the experts `pinned` [L * E] bool last."""

    pinned: jax.Array

    def init(self, num_layers: int, num_experts: int) -> Any:
        """No expert has been used."""
        return LRU().init(num_layers, num_experts)

    def observe(self, memory: Any, access: Access) -> Any:
        """As LRU."""
        return LRU().observe(memory, access)

    def keys(self, memory: Any, layer: jax.Array) -> jax.Array:
        """[L * E] i32: pinned or not, then time of last use."""
        return LRU().keys(memory, layer) + jnp.where(self.pinned, CLOCK_LIMIT, 0)


def most_popular(order: np.ndarray, layers: int, experts: int, share: float) -> np.ndarray:
    """[L * E] bool, the first share of each layer's experts in an order of ids, rounded down."""
    chosen = np.zeros(layers * experts, bool)
    for layer in range(layers):
        own = order[order // experts == layer]
        chosen[own[: common.slots_of(share, experts)]] = True
    return chosen


def pieces(windows: np.ndarray) -> np.ndarray:
    """Prompts [n, PROMPT] of windows [W, T + 1]: the first of every window, then the second, ..."""
    count = (windows.shape[1] - 1) // PROMPT
    parts = windows[:, : count * PROMPT].reshape(len(windows), count, PROMPT)
    return parts.transpose(1, 0, 2).reshape(-1, PROMPT)


def groups(domains: dict[str, np.ndarray], batch: int, mixed: bool) -> np.ndarray:
    """Prompts [G, B, PROMPT]: a group of each domain, or one of all domains in turn.

    Raises:
        ValueError: too little text.
    """
    parts = [pieces(rows) for rows in domains.values()]
    if mixed:
        parts = [np.stack(parts, axis=1).reshape(-1, PROMPT)]
    if min(len(rows) for rows in parts) < batch:
        raise ValueError(f"the text is too short for a batch of {batch}: give more --windows")
    return np.stack([rows[:batch] for rows in parts])


@dataclasses.dataclass(frozen=True)
class Prompted:
    """Groups of prompts that the model has read: every configuration goes on from here."""

    prompts: np.ndarray  # [G, B, PROMPT] i32
    pending: np.ndarray  # [G, B] i32, the first token after each prompt
    kv: list[Any]  # of each group, on the host
    new: int  # tokens that a sequence makes

    @classmethod
    def read(cls, prompts: np.ndarray, new: int) -> "Prompted":
        """Feed prompts [G, B, PROMPT] through the model with everything resident."""
        whole, context = moejax.load(common.MODEL), PROMPT + new + MOST_DRAFTS + 1
        pending, kv = [], []
        for group in np.asarray(prompts, np.int32):
            state = whole.init_state(len(group), context=context)
            state, out = whole.decode_step(state, group)
            pending.append(np.asarray(out.logits).argmax(axis=-1).astype(np.int32))
            kv.append(jax.device_get(state.kv))
        return cls(np.asarray(prompts, np.int32), np.stack(pending), kv, new)


@functools.partial(jax.jit, static_argnames="model", donate_argnames="state")
def plain_step(model: Any, policy: Policy, params: Any, store: Any, state: Any, tokens: Any):
    """The state, the likeliest next tokens [B] and the totals of one step; donates `state`."""
    state, out = step(model, policy, params, store, state, tokens)
    return state, out.logits.argmax(axis=-1).astype(jnp.int32), totals_of(out.trace)


class Batches:
    """One configuration that continues all groups again and again, its experts staying in slots.

    The first run is short: it compiles, and fills the slots. With a slot for every expert it is
    whole, so that nothing is left to be moved.
    """

    def __init__(self, runtime: moejax.Runtime, read: Prompted):
        """The runtime's policy drafts with the model itself, or not at all."""
        self.runtime, self.read = runtime, read
        self.warm = runtime.slots == common.experts_of(runtime)
        self.batch = read.pending.shape[1]
        context = read.kv[0].keys.shape[2]
        self.state = runtime.init_state(self.batch, context=context)
        self.tokens: list[np.ndarray] = []  # [B, new] of each group, -1 = not made
        self.steps: list[tuple] = []

    def run(self) -> dict[str, float]:
        """All groups once, each until it has made all tokens in sum; what they cost."""
        self.tokens, self.steps = [], []
        new = self.read.new if self.warm else min(self.read.new, 4)
        for group in range(len(self.read.kv) if self.warm else 1):
            kv = jax.device_put(self.read.kv[group], self.state.length.sharding)
            state = dataclasses.replace(self.state, kv=kv)
            self.state = rewind(state, np.full(self.batch, PROMPT))
            drafts = self.runtime.policy.speculation.max_length
            self.tokens.append((self._cycles if drafts else self._plain)(group, new))
        self.warm = True
        return figures(np.array(self.steps), self.batch)

    def _plain(self, group: int, new: int) -> np.ndarray:
        runtime, token, made = self.runtime, self.read.pending[group], []
        fixed = (runtime.model, runtime.policy, runtime.params, runtime.store)
        for _ in range(new):
            begun, link = time.perf_counter(), runtime.link.stats()
            self.state, *found = plain_step(*fixed, self.state, token[:, None])
            token, totals = jax.device_get(found)
            self._count(begun, link, totals, self.batch)
            made.append(token)
        return np.stack(made, axis=1)

    def _cycles(self, group: int, new: int) -> np.ndarray:
        runtime, batch = self.runtime, self.batch
        fixed = {"model": runtime.model, "params": runtime.params, "store": runtime.store}
        target, greedy = Target(policy=runtime.policy, **fixed), Sampling(temperature=0.0)
        loop = Cycles(target, None, runtime._fresh_stats(), greedy, jax.random.key(0))
        texts = zip(self.read.prompts[group], self.read.pending[group], strict=True)
        loop.begin(self.state, [[*prompt, token] for prompt, token in texts], None)
        first = np.full((batch, self.read.new), -1, np.int32)
        place, total = np.zeros(batch, int), 0
        while total < batch * new:
            begun, link = time.perf_counter(), runtime.link.stats()
            made = loop.step(np.ones(batch, bool), np.full(batch, 2**20))
            count = np.asarray(made.count)
            drafts = (int(made.draft_stall), int(made.drafted.sum()))
            self._count(begun, link, made.totals, int(count.sum()), *drafts)
            for row, at, tokens, n in zip(first, place, made.token, count, strict=True):
                row[at : at + n] = tokens[: min(n, len(row) - at)]
            total += int(count.sum())
            place = np.where(place + count < self.read.new, place + count, 0)
            state = rewind(loop.run.state, PROMPT + place)
            loop.run = dataclasses.replace(loop.run, state=state)
        self.state = loop.run.state
        return first

    def _count(
        self, begun: float, before: Any, totals: Any, made: int, stall: int = 0, drafted: int = 0
    ) -> None:
        seconds, now = time.perf_counter() - begun, self.runtime.link.stats()
        if totals.failure:
            raise RuntimeError("expert records did not arrive over the link")
        stall, busy = (stall + int(totals.stall)) / 1e6, (now.busy_us - before.busy_us) / 1e6
        moved, hits, needed = now.bytes - before.bytes, int(totals.hits), int(totals.needed)
        self.steps.append((seconds, made, stall, busy, moved, hits, needed, drafted))


def figures(steps: np.ndarray, batch: int) -> dict[str, float]:
    """What steps or cycles [n, COUNTS] of a batch cost, by step and by token made."""
    count, sums = len(steps), dict(zip(COUNTS, steps.sum(axis=0).tolist(), strict=True))
    seconds, stall, busy = (steps[:, COUNTS.index(n)] for n in ("seconds", "stall", "busy"))
    tokens, accepted = sums["tokens"], sums["tokens"] - count * batch
    return {
        "tokens_per_second": tokens / sums["seconds"],
        "tokens_per_cycle": tokens / count / batch,
        "acceptance": accepted / max(sums["drafted"], 1),
        "step_ms": sums["seconds"] / count * 1e3,
        "stall_ms": sums["stall"] / count * 1e3,
        "link_busy_ms": sums["busy"] / count * 1e3,
        "overlapped_ms": float(np.maximum(busy, seconds - stall).mean()) * 1e3,
        "bytes_per_token": sums["bytes"] / tokens,
        "bytes_per_step": sums["bytes"] / count,
        "missed_per_token": (sums["needed"] - sums["hits"]) / tokens,
        "needed_per_step": sums["needed"] / count,
        "hits_per_step": sums["hits"] / count,
    }


def row_of(runs: list[dict]) -> dict[str, float]:
    """Means over rounds, of times and throughput the median and the spread."""
    row = {name: float(np.mean([run[name] for run in runs])) for name in runs[0]}
    for name in ("tokens_per_second", "step_ms", "overlapped_ms"):
        row[name] = float(np.median([run[name] for run in runs]))
    row["tokens_per_second_spread"] = float(np.ptp([run["tokens_per_second"] for run in runs]))
    return row


def differing(own: list[np.ndarray], other: list[np.ndarray]) -> float:
    """Share of the tokens made by both [G][B, new] that are not the same."""
    pairs = zip(own, other, strict=True)
    return float(np.mean(np.concatenate([(a != b)[(a >= 0) & (b >= 0)] for a, b in pairs])))


@dataclasses.dataclass
class Bench:
    """Runs of policies over one link."""

    runtime: moejax.Runtime
    seed: int

    @classmethod
    def over(cls, link: str, share: float, seed: int) -> "Bench":
        """The embedded model with slots for a share of its experts."""
        runtime = moejax.load(common.MODEL, link=link)
        slots = common.slots_of(share, common.experts_of(runtime))
        return cls(dataclasses.replace(runtime, slots=slots), seed)

    def batches(self, name: str, chosen: Policy, read: Prompted) -> Batches:
        """A policy, ready to run; its name may end with another share of resident experts."""
        shares = [share for end, share in ENDINGS.items() if name.endswith(end)]
        slots = self.runtime.slots
        if shares:
            slots = common.slots_of(shares[0], common.experts_of(self.runtime))
        chosen = completed(chosen, self.runtime)
        return Batches(common.with_policy(self.runtime, chosen, slots), read)

    def rows(self, policies: dict[str, Policy], reads: dict, rounds: int) -> list[dict]:
        """A row for each policy and each kind of `reads`, in interleaved rounds."""
        made = {
            (name, kind): self.batches(name, chosen, read)
            for kind, read in reads.items()
            for name, chosen in policies.items()
        }
        found, rows = common.in_rounds(made, rounds, self.seed), []
        for (name, kind), runs in found.items():
            own = made[name, kind]
            changed = differing(own.tokens, made["lru", kind].tokens)
            row = {"name": name, "batch": own.batch, "prompts": kind, **row_of(runs)}
            rows.append(row | {"tokens_changed": changed})
        return rows

    def misses(self, chosen: Policy, read: Prompted) -> float:
        """Experts missed per token."""
        own = self.batches("", chosen, read)
        return [own.run() for _ in range(2)][1]["missed_per_token"]

    def tuned(self, windows: Sequence[int], read: Prompted) -> dict[str, Any]:
        """Which of the windows of two-queue misses least, and whether least-stale misses less."""
        table = {w: self.misses(policy(f"two-queue:window={w}"), read) for w in windows}
        best = min(table, key=lambda window: (table[window], window))
        rivals = {"two-queue": table[best], "least-stale": self.misses(policy("least-stale"), read)}
        rivals["lru"] = self.misses(policy("lru"), read)
        resisting = min(("two-queue", "least-stale"), key=lambda name: rivals[name])
        about = {"missed_per_token": rivals, "by_window": table}
        return {"window": best, "scan_resistant": resisting, **about}
