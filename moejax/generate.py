"""Generation: prefill, then one jitted program per token that decodes and samples."""

import dataclasses
import functools
import time
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from moejax.cycles import Cycles, Helper, Live, tokens_of
from moejax.decode import (
    check_arrived,
    check_room,
    chunks,
    decode_step,
    rewind,
    step,
    token_ids,
)
from moejax.drawn import NONFINITE, Drawn, Token, collect, draw, token_of
from moejax.errors import InputError, LinkError, NonFiniteError
from moejax.kernels.transport import Store
from moejax.live import Costs, Drift, DriftBudget
from moejax.models.transformer import Decoder
from moejax.packing import Packed, pack
from moejax.policies.policy import Policy
from moejax.sampling import (
    Sampling,
    divergence,
    mark_seen,
)
from moejax.speculate import Target
from moejax.state import DecodeState, ExpertStore
from moejax.stats import Stats, Totals, totals_of


@functools.partial(
    jax.jit, static_argnames=("model", "top", "logits"), donate_argnames=("state", "seen")
)
def generate_step(
    model: Decoder,
    policy: Policy | None,
    params: dict,
    store: ExpertStore | None,
    state: DecodeState,
    tokens: jax.Array,
    sampling: Sampling,
    key: jax.Array,
    seen: jax.Array | None,
    *,
    top: int = 0,
    logits: bool = False,
) -> tuple[DecodeState, jax.Array | None, Packed, jax.Array | None]:
    """Process tokens [B, T] (-1 = padding or a finished sequence) and draw the next ones.

    Donates `state` and `seen` [B, V], the mask of the repetition penalty (None without one).

    Returns:
        The state, the mask, a packed `Drawn`, and the logits [B, V] if they were asked for.
    """
    if seen is not None:
        seen = mark_seen(seen, jnp.maximum(tokens, 0), tokens >= 0)
    state, out = step(model, policy, params, store, state, tokens)
    drawn = pack(draw(out, state.length, sampling, key, seen, top))
    return state, seen, drawn, out.logits if logits else None


@dataclasses.dataclass
class Engine:
    """The fixed parts of a run; its methods are loops over the jitted step."""

    model: Decoder
    policy: Policy | None
    params: dict
    store: ExpertStore | None
    context: int  # tokens per sequence
    link: Store | None = None  # of a store behind a link
    drift: DriftBudget | None = None
    helper: Helper | None = None  # a draft model
    live: Live | None = None  # what speculative cycles were found to cost before

    def tokens(
        self,
        state: DecodeState,
        prompts: Sequence[np.ndarray],
        *,
        sampling: Sampling,
        seed: int,
        max_new_tokens: int,
        stop_ids: frozenset[int],
        stats: Stats,
        finished: np.ndarray,
        seen: jax.Array | None = None,
        top: int = 0,
        history: Sequence[np.ndarray] | None = None,
    ) -> Iterator[tuple[DecodeState, list[Token]]]:
        """Prefill the prompts, then yield the state and each step's new tokens.

        A sequence ends at a stop token (yielded too) or when the caller sets its entry of
        `finished` [B]; the loop ends when all have, or after `max_new_tokens`. Under a policy that
        drafts, a step may make several tokens of a sequence.

        Args:
            history: tokens that the KV cache already holds, for drafts from the text.

        Raises:
            InputError: an empty prompt, a token out of range, or a context too small.
            NonFiniteError: NaN or infinity in the logits.
            LinkError: expert records did not arrive.
        """
        prompts = [token_ids(p, self.model.config.vocab_size) for p in prompts]
        if max_new_tokens < 1:
            raise InputError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        if not 0 <= seed < 2**32:
            raise InputError(f"seed must be in [0, 2^32), got {seed}")
        check_room(state, [len(p) for p in prompts], max_new_tokens - 1, context=self.context)
        begun = time.perf_counter()
        run = _Run(self, stats, sampling, jax.random.key(seed), seen, top)
        pending = np.full(len(prompts), -1, np.int32)
        done = 0
        stats.prompt_tokens += sum(len(p) for p in prompts)
        for tokens in chunks(prompts):
            state, drawn, _ = run.step(state, tokens, prefill=True)
            size = tokens.shape[1]
            ends = [done < len(p) <= done + size for p in prompts]
            done += size
            first = collect(drawn, np.array(ends))
            for token in first:
                pending[token.sequence] = token.id
            if all(len(p) <= done for p in prompts):
                stats.ttft = time.perf_counter() - begun
            if first:
                stats.new_tokens += len(first)
                yield state, first
                finished |= np.isin(pending, list(stop_ids)) & np.array(ends)
        if self.policy is not None and self.policy.speculation.max_length:
            before = history or [np.zeros(0, np.int32)] * len(prompts)
            texts = [[*h, *p, t] for h, p, t in zip(before, prompts, pending, strict=True)]
            yield from run.cycles(state, texts, max_new_tokens, stop_ids, finished)
            return
        yield from run.steps(state, pending, max_new_tokens, stop_ids, finished)

    def compile_cycles(
        self, state: DecodeState, sampling: Sampling, seen: jax.Array | None, top: int = 0
    ) -> None:
        """Compile the programs of all draft lengths, for the batch of a fresh state."""
        fixed = {"model": self.model, "params": self.params, "store": self.store}
        stats, key = Stats(record_bytes=0), jax.random.key(0)
        target = Target(policy=jax.device_put(self.policy), **fixed)
        loop = Cycles(target, self.helper, stats, sampling, key, top=top, live=self.live)
        batch = state.length.shape[0]
        loop.begin(state, [np.zeros(1, np.int32)] * batch, seen)
        loop.compile(batch)


class _Run:
    """One run of an engine: what changes from step to step beside the state."""

    def __init__(
        self,
        engine: Engine,
        stats: Stats,
        sampling: Sampling,
        key: jax.Array,
        seen: jax.Array | None,
        top: int,
    ):
        self.engine, self.stats, self.link = engine, stats, engine.link
        # once, not in every step
        self.sampling, self.policy = jax.device_put((sampling, engine.policy))
        self.key, self.seen, self.top = key, seen, top
        self.costs = Costs(engine.policy, engine.link)
        drafts = engine.policy is not None and engine.policy.speculation.max_length
        if drafts and stats.label == "bit-exact" and np.any(np.asarray(sampling.temperature) > 0):
            stats.label = "in distribution"
        self.drift = engine.drift and Drift(engine.drift, engine.policy)
        stats.drift = self.drift and self.drift.stats
        self.before = self.link.moved() if self.link else 0

    def steps(
        self,
        state: DecodeState,
        pending: np.ndarray,
        max_new_tokens: int,
        stop_ids: frozenset[int],
        finished: np.ndarray,
    ) -> Iterator[tuple[DecodeState, list[Token]]]:
        """Steps of one token of each sequence; the `pending` [B] have been made."""
        stats, begun = self.stats, time.perf_counter()
        for _ in range(max_new_tokens - 1):
            if finished.all():
                return
            tokens = np.where(finished, -1, pending)[:, None].astype(np.int32)
            state, drawn = self.decode(state, tokens, ~finished)
            fresh = collect(drawn, ~finished)
            stats.steps += 1
            stats.new_tokens += len(fresh)
            for token in fresh:
                pending[token.sequence] = token.id
            stats.decode_seconds += time.perf_counter() - begun
            yield state, fresh
            begun = time.perf_counter()
            for token in fresh:
                finished[token.sequence] |= token.id in stop_ids

    def cycles(
        self,
        state: DecodeState,
        texts: list[list[int]],
        max_new_tokens: int,
        stop_ids: frozenset[int],
        finished: np.ndarray,
    ) -> Iterator[tuple[DecodeState, list[Token]]]:
        """Speculative cycles; one token of each sequence has been made."""
        if max_new_tokens < 2 or finished.all():
            return
        engine, stats = self.engine, self.stats
        fixed = {"model": engine.model, "params": engine.params, "store": engine.store}
        target = Target(policy=self.policy, **fixed)
        fixed = (target, engine.helper, stats, self.sampling, self.key)
        loop = Cycles(*fixed, top=self.top, live=engine.live)
        begun = time.perf_counter()
        loop.begin(state, texts, self.seen)
        stats.draft_prefill_seconds += time.perf_counter() - begun
        room = np.full(len(texts), max_new_tokens - 1, np.int32)
        begun = time.perf_counter()
        while True:
            active = ~finished & (room > 0)
            if not active.any():
                return
            looked = self.drift is not None and self.drift.due()
            try:
                made = loop.step(active, room, looked=looked)
                places = [*tokens_of(made, ~active, room, stop_ids)]
                stats.add_cycle(made, active, loop.drafted, len(places))
                if (made.bad & active).any():
                    raise NonFiniteError(NONFINITE)
                if looked:
                    self._probe_cycle(loop, active)
            except LinkError as error:
                why = self.link.last_error() if self.link else str(error)
                raise LinkError(f"expert records did not arrive: {why}") from None
            seconds = time.perf_counter() - begun
            loop.learn(made, seconds)
            learned = self._learned(loop.target.policy, seconds)
            loop.target = dataclasses.replace(loop.target, policy=learned)
            self._count_bytes(prefill=False)
            fresh = [token_of(made, b, i) for b, i in places]
            stats.new_tokens += len(fresh)
            for token in fresh:
                room[token.sequence] -= 1
            stats.decode_seconds += time.perf_counter() - begun
            yield loop.run.state, fresh
            begun = time.perf_counter()
            for token in fresh:
                finished[token.sequence] |= token.id in stop_ids

    def _count_bytes(self, *, prefill: bool) -> None:
        if self.link is None:
            return
        self.stats.link_bytes = self.link.moved() - self.before
        if prefill:
            self.stats.prefill_link_bytes = self.stats.link_bytes

    def decode(
        self, state: DecodeState, tokens: np.ndarray, active: np.ndarray
    ) -> tuple[DecodeState, Drawn]:
        """One decode step of tokens [B, 1], after which the policy's live numbers follow."""
        looked = self.drift is not None and self.drift.due()
        before, begun = np.asarray(state.length) if looked else None, time.perf_counter()
        state, drawn, logits = self.step(state, tokens, prefill=False, logits=looked)
        if looked:
            state, nats = self._probe(rewind(state, before), tokens, logits)
            self.policy = self.drift.learn(self.policy, nats[active])
        self.policy = self._learned(self.policy, time.perf_counter() - begun)
        return state, drawn

    def _learned(self, policy: Policy, seconds: float) -> Policy:
        """The policy after a decode step or cycle that took so long."""
        if not self.costs.active:
            return policy
        policy = self.costs.learn(policy, seconds)
        self.stats.load_us, self.stats.host_us = self.costs.load_us, self.costs.host_us
        return policy

    def step(
        self,
        state: DecodeState,
        tokens: np.ndarray,
        *,
        prefill: bool,
        logits: bool = False,
    ) -> tuple[DecodeState, Drawn, jax.Array | None]:
        """One step, counted, and what it chose, on the host; LinkError if it was not made."""
        engine, stats = self.engine, self.stats
        state, self.seen, packed, kept = generate_step(
            engine.model,
            self.policy,
            engine.params,
            engine.store,
            state,
            tokens,
            self.sampling,
            self.key,
            self.seen,
            top=self.top,
            logits=logits,
        )
        drawn = packed.unpacked()
        if drawn.totals is not None and drawn.totals.failure:
            why = self.link.last_error() if self.link else f"status {int(drawn.totals.failure)}"
            raise LinkError(f"expert records did not arrive: {why}; the step was not made")
        stats.add(drawn.totals, prefill=prefill)
        self._count_bytes(prefill=prefill)
        return state, drawn, kept

    def _probe(
        self, state: DecodeState, tokens: np.ndarray, lossy: np.ndarray
    ) -> tuple[DecodeState, np.ndarray]:
        """Make a step again with the model's own routing; also the drift [B] of its logits.

        After the lossy step, not before: its experts would be resident by then and the drift less.
        The keys and values of this step stay.
        """
        engine, begun = self.engine, time.perf_counter()
        router = dataclasses.replace(self.policy.router, alpha=jnp.float32(0))
        exact = dataclasses.replace(self.policy, router=router)
        memory = jax.tree.map(jnp.copy, state.policy)  # not to observe one step twice
        state, out = decode_step(engine.model, exact, engine.params, engine.store, state, tokens)
        state = dataclasses.replace(state, policy=memory)
        check_arrived(engine.store, out)
        nats = np.asarray(_divergence(out.logits, lossy))
        self._count_probe(jax.device_get(totals_of(out.trace)), begun)
        return state, nats

    def _probe_cycle(self, loop: Cycles, active: np.ndarray) -> None:
        """The same for the cycle that was just made."""
        begun = time.perf_counter()
        nats, totals = loop.probe()
        policy = self.drift.learn(loop.target.policy, nats[active])
        loop.target = dataclasses.replace(loop.target, policy=policy)
        self._count_probe(totals, begun)

    def _count_probe(self, totals: Totals, begun: float) -> None:
        stats = self.stats
        stats.fetched += int(totals.fetched)
        stats.prefetched += int(totals.prefetched)
        stats.prefetch_used += int(totals.prefetch_used)
        stats.host += int(totals.host)
        stats.drift.fetched += int(totals.fetched) + int(totals.prefetched)
        self._count_bytes(prefill=False)
        stats.drift.seconds += time.perf_counter() - begun


_divergence = jax.jit(divergence)
