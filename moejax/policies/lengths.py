"""Draft lengths: how many tokens to draft in each cycle of draft and verification.

The live rule takes the gamma of most expected tokens per expected time, zero included, and keeps an
account, so that a run is never much slower than plain decoding whatever the model drafts.
"""

import dataclasses
import functools
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from moejax.errors import PolicyError
from moejax.state import array_fields, pytree, static

LEAST_MISSES = 0.05  # averages below it count as this: their logarithm is taken
SHORTEST_ROW = 4  # speculative cycles between plain steps that are only for their cost
STEEPEST = 2.0  # greatest exponent of a window's misses
FEW_SEEN = 4.0  # drafts: what is known of the first position never weighs less for its age


@pytree
class Cycle:
    """What one cycle of draft and verification did."""

    gamma: jax.Array  # [] i32, asked draft length; 0 = a plain step
    drafted: jax.Array  # [B] i32, tokens really drafted per sequence, 0 to gamma
    accepted: jax.Array  # [B] i32, of those
    active: jax.Array  # [B] bool, sequences that were running
    missed: jax.Array  # [] i32, distinct experts verified with and not resident, over all layers
    # [B] i32, where nothing was drafted: whether a free draft's first token was right; -1 = unknown
    shadow: jax.Array


class Lengths(Protocol):
    """Chooses the draft length of each cycle."""

    def init(self) -> Any:
        """Memory before the first cycle."""
        ...

    def length(self, memory: Any, max_length: int) -> jax.Array:
        """[] i32 gamma of the next cycle, in [0, max_length]."""
        ...

    def observe(self, memory: Any, cycle: Cycle) -> Any:
        """Memory after a cycle."""
        ...


@pytree
class FixedLength:
    """Always the same draft length, as in the papers."""

    gamma: jax.Array | int

    def init(self) -> None:
        """Nothing to remember."""

    def length(self, memory: None, max_length: int) -> jax.Array:
        """[] i32 gamma, at most `max_length`."""
        del memory
        return jnp.clip(jnp.asarray(self.gamma, jnp.int32), 0, max_length)

    def observe(self, memory: None, cycle: Cycle) -> None:
        """Nothing to remember."""
        del memory, cycle


@pytree
class CycleCosts:
    """What cycles cost, in milliseconds."""

    plain_ms: jax.Array | float  # a plain step, its misses included
    fixed_ms: jax.Array | float  # a speculative cycle, beside what follows
    draft_ms: jax.Array | float  # per drafted token of a sequence
    token_ms: jax.Array | float  # per token of a sequence's verification window
    miss_ms: jax.Array | float  # per expert missed in verification, as far as it is waited for


def expected_tokens(acceptance: jax.Array) -> jax.Array:
    """[n + 1] f32 tokens per cycle A(gamma) = 1 + sum_i prod_(j <= i) p_j of 0 to n drafts.

    p_j is the `acceptance` [n] of draft position j given that all before it were accepted.
    """
    return jnp.append(1.0, 1.0 + jnp.cumsum(jnp.cumprod(acceptance)))


def expected_ms(costs: CycleCosts, misses: jax.Array) -> jax.Array:
    """[n + 1] f32 milliseconds per cycle T(gamma) of 0 to n drafts; 0 is a plain step.

    The expected `misses` [n + 1] are those of windows of 1 to n + 1 tokens.
    """
    gamma = jnp.arange(misses.shape[0])
    return jnp.where(gamma == 0, costs.plain_ms, speculative_ms(costs, gamma, misses))


def speculative_ms(costs: CycleCosts, gamma: jax.Array, misses: jax.Array) -> jax.Array:
    """Milliseconds: fixed + gamma * draft + (gamma + 1) * token + miss * misses, in any shape."""
    drafted = costs.fixed_ms + gamma * costs.draft_ms + (gamma + 1) * costs.token_ms
    return drafted + costs.miss_ms * misses


@pytree
class LengthMemory:
    """What `LiveLength` remembers; counts are discounted."""

    seen: jax.Array  # [size] f32, drafts verified at each position
    right: jax.Array  # [size] f32, of those, accepted
    misses: jax.Array  # [size + 1] f32, average misses of windows of 1, 2, ... tokens
    weight: jax.Array  # [size + 1] f32, cycles behind each average
    credit: jax.Array  # [] f32, plain steps that speculation may still lose
    interval: jax.Array  # [] i32, plain steps before the next probe
    since: jax.Array  # [] i32, plain steps since the last speculative cycle
    row: jax.Array  # [] i32, speculative cycles since the last plain step
    plain: jax.Array  # [] i32, plain steps so far
    shadowed: jax.Array  # [] bool, whether the last plain step's shadow was known
    tried: jax.Array  # [] bool, whether there was a speculative cycle


@pytree
class LiveLength:
    """The draft length of most expected tokens per expected time, zero included.

    gamma = argmax of A(gamma) / T(gamma), see `expected_tokens` and `expected_ms`, ties to the
    smaller; it has to beat the plain step by more than `margin`, and is at most `probe` or twice
    the longest so far. Acceptance is averaged by draft position, and shrinks towards the position
    before by `strength` observations, that of the first one towards `prior`. A window of n tokens
    misses M(1) * n^b experts, with M(1) averaged over plain steps and b fitted to the averages of
    the speculative cycles. NaN or infinite costs, or a plain step that costs nothing, give zero.

    While zero is best, a probe of `probe` tokens is made every `first` plain steps, an interval
    that doubles up to `longest` after each speculative cycle that took longer than its tokens would
    have plainly and leaves zero the best, and is `first` again after any other. Where free drafts
    are watched (`Cycle.shadow`) acceptance is known without: after the first cycle, which is for
    the costs, probes come every `longest` steps. While speculation wins, plain steps that cost a
    share `recheck` of the time keep their cost known, and lengths twice and half the best are tried
    when their discounted count is below `explore`: one length does not tell what others cost. A
    run of plain steps weighs the lengths after its first step and then after every `pause` steps:
    that takes a few per cent of a short step.

    The promise: a speculative cycle needs credit for what it is expected to lose. Counted in plain
    steps, credit is `grace` at first; a token per sequence earns `budget`; a speculative cycle
    spends T / T(0) less its tokens, its misses as they were; `purse` is the most. So, by the costs
    given, n tokens per sequence never take longer than (1 + budget) * n + grace plain steps and the
    loss of one cycle, T(gamma) / T(0) - 1: with the defaults and cycles of up to 5 plain steps, at
    worst 10 % more in the first 100 and 5 % from 350 on. A probe of more than `purse` is not made.

    Source: the utility of Cascade (arXiv 2506.20675), zero included.
    """

    costs: CycleCosts
    decay: jax.Array | float = 0.93  # of what was seen, per cycle that sees it anew
    forget: jax.Array | float = 0.98  # of what was seen, per other cycle
    prior: jax.Array | float = 0.7  # acceptance before anything was drafted
    strength: jax.Array | float = 1.0  # more than 0
    exponent: jax.Array | float = 0.9  # b before anything was drafted
    margin: jax.Array | float = 0.02
    probe: jax.Array | int = 2
    budget: jax.Array | float = 0.03
    grace: jax.Array | float = 3.0
    purse: jax.Array | float = 8.0
    settle: jax.Array | int = 4  # plain steps before the first speculative cycle
    pause: jax.Array | int = 4  # plain steps from one look at what would pay to the next
    first: jax.Array | int = 8
    longest: jax.Array | int = 256
    recheck: jax.Array | float = 0.02
    explore: jax.Array | float = 0.5
    size: int = static(default=16)  # draft positions remembered: the greatest `max_length`

    def init(self) -> LengthMemory:
        """Nothing seen, and the first credit."""
        sizes = {"seen": 0, "right": 0, "misses": 1, "weight": 1}
        return LengthMemory(
            **{name: jnp.zeros(self.size + more, jnp.float32) for name, more in sizes.items()},
            **{name: jnp.zeros((), jnp.int32) for name in ("since", "row", "plain")},
            **{name: jnp.zeros((), bool) for name in ("shadowed", "tried")},
            credit=jnp.array(self.grace, jnp.float32),  # a copy: memory may be donated
            interval=jnp.array(self.first, jnp.int32),
        )

    def with_costs(self, costs: CycleCosts) -> "LiveLength":
        """The same with other costs; does not recompile."""
        return dataclasses.replace(self, costs=costs)

    def acceptance(self, memory: LengthMemory) -> jax.Array:
        """[size] f32 chance that a draft is accepted if all before it were, by position."""
        strength = jnp.maximum(self.strength, 1e-6)
        # p_j = own_j + pull_j * p_(j - 1), from p_0 = prior on: all at once.
        own = memory.right / (memory.seen + strength)
        pull = jnp.cumsum(jnp.log(strength / (memory.seen + strength)))
        reach = jnp.where(jnp.tri(self.size, dtype=bool), pull[:, None] - pull, -jnp.inf)
        chance = (jnp.exp(reach) * own).sum(axis=1) + jnp.exp(pull) * self.prior
        return jnp.clip(chance, 0.0, 1.0)

    def window_misses(self, memory: LengthMemory) -> jax.Array:
        """[size + 1] f32 expected misses of windows of 1, 2, ... tokens."""
        tokens = jnp.log(jnp.arange(1, self.size + 2, dtype=jnp.float32))
        level = jnp.log(jnp.maximum(memory.misses, LEAST_MISSES))
        weight = jnp.where(memory.weight[0] > 0, memory.weight, 0.0)
        before = jnp.maximum(self.strength, 1e-6) * tokens[1] ** 2
        over = (weight * tokens * (level - level[0])).sum() + before * self.exponent
        power = over / ((weight * tokens**2).sum() + before)
        return jnp.exp(level[0] + jnp.clip(power, 0.0, STEEPEST) * tokens)

    def gain(self, memory: LengthMemory) -> tuple[jax.Array, jax.Array]:
        """Expected tokens A and relative time T / T(0), [size + 1] f32 each, of every gamma."""
        ms = expected_ms(self.costs, self.window_misses(memory))
        return expected_tokens(self.acceptance(memory)), ms / ms[0]

    def length(self, memory: LengthMemory, max_length: int) -> jax.Array:
        """[] i32 gamma of the next cycle; raises PolicyError for a `max_length` beyond `size`."""
        if max_length > self.size:
            raise PolicyError(f"draft lengths up to {max_length}: LiveLength has size {self.size}")
        ready = (memory.plain >= self.settle) & (memory.credit >= 0)
        looks = (memory.since <= 1) | (memory.since % jnp.maximum(self.pause, 1) == 0)
        choice = functools.partial(self._choice, memory, max_length)
        return jax.lax.cond(ready & looks, choice, lambda: jnp.int32(0))

    def _choice(self, memory: LengthMemory, max_length: int) -> jax.Array:
        """[] i32 gamma where speculation is possible at all."""
        tokens, time = (each[: max_length + 1] for each in self.gain(memory))
        lost = time - tokens
        best = self._best(memory, tokens, time)
        probe = jnp.clip(jnp.asarray(self.probe, jnp.int32), 0, max_length)
        wait = jnp.where(memory.shadowed & memory.tried, self.longest, memory.interval)
        due = (memory.since >= wait) & (time[probe] > 0) & (memory.credit >= lost[probe])
        gamma = jnp.where(best > 0, self._other(memory, best, lost), probe * due)
        row = (tokens[best] / time[best] - 1.0) / (self.recheck * tokens[best])
        stale = (best > 0) & (memory.row >= jnp.maximum(row, SHORTEST_ROW))
        return jnp.where(stale, 0, gamma).astype(jnp.int32)

    def observe(self, memory: LengthMemory, cycle: Cycle) -> LengthMemory:
        """Memory after a cycle; one without an active sequence changes nothing."""
        active, speculated, ran = cycle.active, cycle.gamma > 0, cycle.active.any()
        drafted = active * cycle.drafted
        length = drafted.max()
        seen, right, shadowed = self._positions(memory, drafted, cycle)
        misses, weight = self._averages(memory, length, cycle)
        kept = dataclasses.replace(memory, seen=seen, right=right, misses=misses, weight=weight)
        tokens = 1.0 + (active * cycle.accepted).sum() / jnp.maximum(active.sum(), 1)
        time = speculative_ms(self.costs, length, cycle.missed) / self.costs.plain_ms
        lost = jnp.where(speculated & jnp.isfinite(time), time - tokens, 0.0)
        credit = jnp.minimum(memory.credit + self.budget * tokens - lost, self.purse)
        loses = speculated & (lost > 0)
        losing = jax.lax.cond(
            loses, lambda: self._best(kept, *self.gain(kept)) == 0, lambda: jnp.bool(False)
        )
        interval = jnp.where(losing, jnp.minimum(2 * memory.interval, self.longest), self.first)
        after = dataclasses.replace(
            kept,
            credit=credit,
            interval=jnp.where(speculated, interval, memory.interval).astype(jnp.int32),
            since=jnp.where(speculated, 0, memory.since + 1),
            row=jnp.where(speculated, memory.row + 1, 0),
            plain=memory.plain + ~speculated,
            shadowed=jnp.where(speculated, memory.shadowed, shadowed),
            tried=memory.tried | speculated,
        )
        same = {"seen", "right", "misses", "weight"}  # they heed `ran` themselves, so that a
        # program computes what `length` sees of them once, not before and after a choice.
        chosen = {
            name: jnp.where(ran, getattr(after, name), getattr(memory, name))
            for name in array_fields(LengthMemory)
            if name not in same
        }
        return dataclasses.replace(kept, **chosen)

    def _best(self, memory: LengthMemory, tokens: jax.Array, time: jax.Array) -> jax.Array:
        """[] i32 gamma of the greatest gain, if more than the margin and not a leap."""
        number = jnp.arange(tokens.shape[0])
        longest = jnp.where(memory.weight[: tokens.shape[0]] > 0, number, 0).max()
        allowed = (number > 0) & (number <= jnp.maximum(2 * longest, self.probe))
        better = (tokens / time > 1.0 + self.margin) & (time > 0) & allowed
        return jnp.argmax(jnp.where(better, tokens / time, 0.0)).astype(jnp.int32)

    def _other(self, memory: LengthMemory, best: jax.Array, lost: jax.Array) -> jax.Array:
        """[] i32 twice or half the best length, if not seen for long, else the best itself."""
        chosen = best
        for other in (best // 2, jnp.minimum(2 * best, lost.shape[0] - 1)):
            seldom = (other > 0) & (memory.weight[other] < self.explore)
            chosen = jnp.where(seldom & (memory.credit >= lost[other]), other, chosen)
        return chosen

    def _positions(self, memory: LengthMemory, drafted: jax.Array, cycle: Cycle) -> tuple:
        """Discounted counts of drafts verified and accepted by position, and if a shadow is."""
        accepted = cycle.accepted
        shadow = jnp.where(cycle.active & (drafted == 0), cycle.shadow, -1)
        position = jnp.arange(1, self.size + 1)
        reached = position <= jnp.minimum(drafted, accepted + 1)[:, None]
        guessed = (shadow >= 0)[:, None] & (position == 1)
        count = (reached | guessed).sum(axis=0)
        good = jnp.where(guessed, shadow[:, None] == 1, reached & (position <= accepted[:, None]))
        # Deeper positions fade towards those before them; the first one's prior is no evidence.
        floor = jnp.where(position == 1, FEW_SEEN / jnp.maximum(memory.seen, FEW_SEEN), 0.0)
        keep = jnp.where(count > 0, self.decay, jnp.maximum(self.forget, floor))
        keep = jnp.where(cycle.active.any(), keep, 1.0)
        seen, right = memory.seen * keep + count, memory.right * keep + good.sum(axis=0)
        return seen, right, guessed.any()

    def _averages(self, memory: LengthMemory, length: jax.Array, cycle: Cycle) -> tuple:
        """Average misses by window and the weights behind them, [size + 1] f32 each."""
        ran = cycle.active.any()
        here = (jnp.arange(self.size + 1) == length) & ran
        fade = jnp.where(here, self.decay, jnp.where(ran, self.forget, 1.0))
        kept = memory.weight * fade
        weight = kept + here
        average = (kept * memory.misses + cycle.missed) / jnp.maximum(weight, 1.0)
        return jnp.where(here, average, memory.misses), weight
