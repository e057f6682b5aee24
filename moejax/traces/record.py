"""Recording: runs a model over texts and writes down what its routers chose, as a `Trace`."""

import dataclasses
import functools
import importlib.metadata
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moejax import decode, warm
from moejax.cycles import Cycles, tokens_of
from moejax.drawn import NONFINITE
from moejax.errors import InputError, LinkError, NonFiniteError, PolicyError
from moejax.live import Costs, learned
from moejax.policies.policy import Policy
from moejax.runtime import Runtime
from moejax.sampling import (
    Sampling,
    mark_seen,
    nonfinite_rows,
    sample,
    sampling_from,
    sequence_keys,
)
from moejax.simulator import runs
from moejax.speculate import Made, Target
from moejax.state import DecodeState
from moejax.stats import Stats
from moejax.traces.recorder import Keep, Recorder
from moejax.traces.trace import Phase, Trace

Texts = Sequence[str | Sequence[int]]
Progress = Callable[[int, int], None]  # texts done, of all


def record(
    runtime: Runtime,
    texts: Texts,
    *,
    max_new_tokens: int = 128,
    sampling: Sampling | dict[str, Any] | None = None,
    seed: int = 0,
    batch: int = 1,
    keep: Keep | None = None,
    name: str | None = None,
    about: dict[str, Any] | None = None,
    progress: Progress | None = None,
) -> Trace:
    """Complete prompts and return what happened; the tokens are those of `Runtime.generate`.

    Experts stay in their slots from one prompt to the next, as in a server. A policy that drafts
    drafts; of its cycles the verifications are recorded, with the drafts that were rejected, and
    before each the passes of a self-draft, if they are to be kept.

    Args:
        texts: texts or lists of token ids.
        batch: prompts that run together.
        keep: what to record beside picks, weights, outcomes, counts and times.
        name: of the model, for people; its directory's by default.
        about: entries for `Trace.about`.

    Raises:
        InputError: bad prompts or options, or a model without experts.
        PolicyError: drafts are to be kept of a policy under which the model makes none itself.
        LinkError: expert records did not arrive.
        NonFiniteError: NaN or infinity in the logits.
    """
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if not isinstance(sampling, Sampling):
        sampling = sampling_from(runtime.generation_config, sampling)
    run = _Run(runtime, keep or Keep(), sampling.validate(), seed)
    ids = _ids(runtime, texts)
    _check_room(runtime, ids, max_new_tokens - 1)
    run.warm_up(ids, batch, max_new_tokens > 1)
    settings = {"max_new_tokens": max_new_tokens, "seed": seed, "batch": batch} | (about or {})
    each = functools.partial(run.generate, max_new_tokens=max_new_tokens)
    return run.whole(run.groups(ids, batch, progress), each, name, settings)


def follow(
    runtime: Runtime,
    texts: Texts,
    *,
    prompt: int = 64,
    tokens: int | None = None,
    batch: int = 1,
    keep: Keep | None = None,
    name: str | None = None,
    about: dict[str, Any] | None = None,
    progress: Progress | None = None,
) -> Trace:
    """Feed given texts as if the model had written them, and return what happened.

    The first `prompt` tokens of each go in at once, the others one per step, as in decoding, up to
    `tokens` of them. Experts stay in their slots from one text to the next.

    Raises:
        InputError, LinkError: as `record`.
        PolicyError: the policy drafts, which given tokens leave nothing to do for.
    """
    if prompt < 0 or (tokens is not None and tokens < 0):
        raise InputError(f"bad numbers of tokens: prompt {prompt}, tokens {tokens}")
    if runtime.policy is not None and runtime.policy.speculation.max_length:
        raise PolicyError("a policy that drafts writes its own text: record without given tokens")
    run = _Run(runtime, keep or Keep(), None, 0)
    ids = _ids(runtime, texts)
    if tokens is not None:
        ids = [row[: prompt + tokens] for row in ids]
    _check_room(runtime, ids)
    run.warm_up([row[:prompt] for row in ids], batch, max(map(len, ids)) > prompt)
    settings = {"teacher_forced": True, "batch": batch} | (about or {})
    each = functools.partial(run.follow, prompt=prompt)
    return run.whole(run.groups(ids, batch, progress), each, name, settings)


def check_drafts(policy: Policy, keep: Keep) -> None:
    """Raise PolicyError where drafts are to be kept that the model itself does not make."""
    if keep.drafts and getattr(policy.speculation.draft, "kind", None) != "self":
        raise PolicyError(
            "only drafts that the model itself makes can be kept: take a policy such as "
            "self-draft, or leave them out"
        )


def _ids(runtime: Runtime, texts: Texts) -> list[np.ndarray]:
    if isinstance(texts, str | bytes) or not texts:
        raise InputError("no texts to record: give a list of at least one")
    vocabulary, found = runtime.config.vocab_size, []
    for text in texts:
        ids = runtime.tokenizer.encode(text) if isinstance(text, str) else text
        found.append(decode.token_ids(ids, vocabulary))
    return found


def _check_room(runtime: Runtime, ids: list[np.ndarray], extra: int = 0) -> None:
    """Raise InputError for a text that is empty, or does not fit with `extra` tokens after it."""
    for number, row in enumerate(ids, 1):
        if not 0 < len(row) <= runtime.context - extra:
            raise InputError(
                f"text {number} has {len(row)} tokens, which must be at least 1 and fit the "
                f"context of {runtime.context} with {extra} more: cut it or raise the context"
            )


@functools.partial(jax.jit, donate_argnames=("seen",))
def _draw(
    logits: jax.Array,
    length: jax.Array,
    tokens: jax.Array,
    sampling: Sampling,
    key: jax.Array,
    seen: jax.Array | None,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Tokens [B] i32 drawn after `tokens` [B, T], as a generating step draws them."""
    if seen is not None:
        seen = mark_seen(seen, jnp.maximum(tokens, 0), tokens >= 0)
    numbers = jnp.arange(logits.shape[0], dtype=jnp.int32)
    drawn = sample(logits, sampling, sequence_keys(key, numbers, length), seen)
    return drawn, nonfinite_rows(logits), seen


class _Run:
    """One recording."""

    def __init__(self, runtime: Runtime, keep: Keep, sampling: Sampling | None, seed: int):
        if runtime.policy is None:
            raise InputError("this model has no experts, so that there is no routing to record")
        if not 0 <= seed < 2**32:
            raise InputError(f"seed must be in [0, 2^32), got {seed}")
        self.runtime, self.sampling = runtime, sampling
        self.key = jax.random.key(seed)
        self.policy = runtime.policy
        check_drafts(self.policy, keep)
        self.state: DecodeState | None = None
        self.sequences = 0  # recorded so far
        self.lengths = np.zeros(0, np.int64)  # of the sequences at hand
        self.recorder = Recorder(
            experts=runtime.config.num_experts,
            keep=keep,
            exact=not runtime.policy.router.exact,
            link=runtime.link,
        )

    def warm_up(self, prompts: list[np.ndarray], batch: int, decodes: bool) -> None:
        """Compile what the run needs, so that no pass is timed with it."""
        if batch < 1:
            raise InputError(f"a batch of {batch} is too small: give at least 1")
        starts = range(0, len(prompts), batch)
        groups = [prompts[start : start + batch] for start in starts]
        shapes = {c.shape for g in groups if max(map(len, g)) for c in decode.chunks(g)}
        drafts = self.policy.speculation.max_length
        shapes |= {(len(g), 1) for g in groups if decodes and not drafts}
        fixed = (self.runtime.model, self.policy, self.runtime.params, self.runtime.store)
        for shape in sorted(shapes):
            state = self.runtime.init_state(shape[0])
            _, out = decode.decode_step(*fixed, state, np.zeros(shape, np.int32), scores=True)
            out.logits.block_until_ready()
        for size in sorted({len(g) for g in groups if decodes and drafts}):
            texts = [np.zeros(1, np.int32)] * size
            loop = self._loop(self.runtime.init_state(size), texts, self._unseen(size))
            loop.compile(size)
        self.costs = Costs(self.policy, self.runtime.link)
        # A file holds no infinity, which a host may cost before it is measured.
        self.weighs = self.costs.active and bool(learned(self.policy))
        self.recorder.start()

    def groups(
        self, ids: list[np.ndarray], batch: int, progress: Progress | None
    ) -> Iterator[list[np.ndarray]]:
        """Texts that run together, each group on an empty KV cache."""
        for start in range(0, len(ids), batch):
            rows = ids[start : start + batch]
            self.state, self.lengths = self._fresh(len(rows)), np.zeros(len(rows), np.int64)
            yield rows
            self.sequences += len(rows)
            if progress:
                progress(start + len(rows), len(ids))

    def _fresh(self, batch: int) -> DecodeState:
        runtime, state = self.runtime, self.state
        if state is None:
            return runtime.init_state(batch)
        if state.length.shape[0] == batch:
            return decode.rewind(state, np.zeros(batch))
        kv = decode.init_kv(runtime.config, batch, runtime.context, runtime.model.dtype)
        fresh = {"kv": kv, "length": jnp.zeros(batch, jnp.int32)}
        return dataclasses.replace(state, **jax.device_put(fresh, jax.devices()[0]))

    def follow(self, rows: list[np.ndarray], prompt: int) -> None:
        """Feed texts."""
        if prompt:
            for tokens in decode.chunks([row[:prompt] for row in rows]):
                self._step(tokens, Phase.PREFILL)
        for t in range(prompt, max(map(len, rows))):
            column = [row[t] if t < len(row) else -1 for row in rows]
            self._step(np.array(column, np.int32)[:, None], Phase.DECODE)

    def generate(self, rows: list[np.ndarray], max_new_tokens: int) -> None:
        """Complete prompts."""
        pending, done = np.full(len(rows), -1, np.int32), 0
        stops = [*self.runtime.stop_ids]
        seen = self._unseen(len(rows))
        for tokens in decode.chunks(rows):
            logits = self._step(tokens, Phase.PREFILL)
            ends = np.array([done < len(row) <= done + tokens.shape[1] for row in rows])
            done += tokens.shape[1]
            drawn, seen = self._drawn(logits, tokens, seen, ends)
            pending = np.where(ends, drawn, pending)
        finished = np.isin(pending, stops)
        if self.policy.speculation.max_length:
            texts = [np.append(row, token) for row, token in zip(rows, pending, strict=True)]
            self._cycles(texts, finished, seen, max_new_tokens - 1)
            return
        for _ in range(max_new_tokens - 1):
            if finished.all():
                return
            tokens = np.where(finished, -1, pending)[:, None].astype(np.int32)
            logits = self._step(tokens, Phase.DECODE)
            pending, seen = self._drawn(logits, tokens, seen, ~finished)
            finished |= np.isin(pending, stops)

    def _unseen(self, batch: int) -> jax.Array | None:
        """The mask of the repetition penalty at the beginning, None without one."""
        if not self.sampling.needs_seen():
            return None
        seen = jnp.zeros((batch, self.runtime.config.vocab_size), bool)
        return jax.device_put(seen, jax.devices()[0])

    def _step(self, tokens: np.ndarray, phase: Phase) -> jax.Array:
        """Logits [B, V] after a recorded step of tokens [B, T]."""
        runtime, begun = self.runtime, time.perf_counter()
        fixed = (runtime.model, self.policy, runtime.params, runtime.store)
        weighed = self._weighed(self.policy)
        self.state, out = decode.decode_step(*fixed, self.state, tokens, scores=True)
        out.logits.block_until_ready()
        times = (begun, time.perf_counter())
        decode.check_arrived(runtime.store, out)
        where = (self.lengths, self.sequences)
        self.recorder.add(phase, tokens, *where, out.trace, times, learned=weighed)
        self.lengths = self.lengths + (tokens >= 0).sum(axis=1)
        if phase == Phase.DECODE and self.costs.active:
            self.policy = self.costs.learn(self.policy, times[1] - times[0])
        return out.logits

    def _weighed(self, policy: Policy) -> dict[str, float] | None:
        """The numbers that are renewed from step to step, as the next one reads them."""
        return learned(policy) if self.weighs else None

    def _drawn(
        self, logits: jax.Array, tokens: np.ndarray, seen: jax.Array | None, active: np.ndarray
    ) -> tuple[np.ndarray, jax.Array | None]:
        """The next tokens [B], those of the `active` [B] sequences to be used."""
        options = (self.sampling, self.key, seen)
        drawn, bad, seen = _draw(logits, self.state.length, tokens, *options)
        if (np.asarray(bad) & active).any():
            raise NonFiniteError(NONFINITE)
        return np.asarray(drawn), seen

    def _cycles(
        self, texts: list[np.ndarray], finished: np.ndarray, seen: jax.Array | None, most: int
    ) -> None:
        """Speculative cycles, until every sequence is finished or has `most` more tokens."""
        runtime, room = self.runtime, np.full(len(texts), most)
        if (finished | (room < 1)).all():
            return
        loop = self._loop(self.state, texts, seen)
        while not (finished | (room < 1)).all():
            active = ~finished & (room > 0)
            pending, begun = np.asarray(loop.run.pending), time.perf_counter()
            weighed = self._weighed(loop.target.policy)
            made = self._cycle(loop, active, room)
            times = (begun, time.perf_counter())
            place = np.arange(made.token.shape[1])
            fed = np.concatenate([pending, made.proposed], axis=1)
            fed = np.where((place <= made.drafted[:, None]) & active[:, None], fed, -1)
            accepted = place < made.count[:, None]
            start = (self.lengths, self.sequences)
            if self.recorder.keep.drafts and loop.drafts is not None:
                drafted, own = np.where(active, made.drafted, 0), (begun, accepted, weighed)
                self.recorder.add_drafts(fed, drafted, *start, loop.drafts, *own)
            self.recorder.add(Phase.VERIFY, fed, *start, loop.trace, times, accepted, weighed)
            self.lengths = self.lengths + made.count
            places = [*tokens_of(made, ~active, room, runtime.stop_ids)]
            loop.stats.add_cycle(made, active, loop.drafted, len(places))
            for b, i in places:
                room[b] -= 1
                finished[b] |= int(made.token[b, i]) in runtime.stop_ids
            if self.costs.active:
                renewed = self.costs.learn(loop.target.policy, times[1] - times[0])
                loop.target = dataclasses.replace(loop.target, policy=renewed)
        self.policy, self.state = loop.target.policy, loop.run.state

    def _loop(self, state: DecodeState, texts: list[np.ndarray], seen: jax.Array | None) -> Cycles:
        """Recorded cycles that go on from a state."""
        runtime, engine = self.runtime, self.runtime.engine
        target = Target(
            model=runtime.model, policy=self.policy, params=runtime.params, store=runtime.store
        )
        stats = Stats(record_bytes=runtime.store.layout.stride)
        fixed = (target, engine.helper, stats, self.sampling, self.key)
        loop = Cycles(*fixed, record=True, live=engine.live)
        loop.begin(state, texts, seen)
        return loop

    def _cycle(self, loop: Cycles, active: np.ndarray, room: np.ndarray) -> Made:
        begun = time.perf_counter()
        try:
            made = loop.step(active, room)
        except LinkError as error:
            link = self.runtime.link
            why = link.last_error() if link else str(error)
            raise LinkError(f"expert records did not arrive: {why}") from None
        if (made.bad & active).any():
            raise NonFiniteError(NONFINITE)
        loop.learn(made, time.perf_counter() - begun)
        return made

    def whole(
        self,
        groups: Iterator[list[np.ndarray]],
        each: Callable[[list[np.ndarray]], None],
        name: str | None,
        about: dict[str, Any],
    ) -> Trace:
        """The trace of all groups of texts, with what it was recorded with."""
        runtime = self.runtime
        try:
            for rows in groups:
                each(rows)
        finally:
            self.recorder.stop()
        if runtime.residency_file is not None:
            warm.save(runtime.residency_file, runtime, self.state)
        setting = {
            "source": "moejax",
            "version": importlib.metadata.version("moejax"),
            "model_type": runtime.config.model_type,
            "router": dataclasses.asdict(runtime.config.router),
            "policy": runs.name_of(runtime.policy, runtime.policy_name),
            runs.PARTS: runs.parts_of(runtime.policy),
            "slots": runtime.slots,
            "capacity": runtime.slots_in_use,
            "per_layer": runtime.per_layer,
            "virtual": runtime.virtual,
            "link": runtime.tier,
            "record_bytes": runtime.store.layout.stride,
            "dtype": runtime.model.dtype,
            "quant": runtime.model.quant,
            "kernels": runtime.model.kernels,
            "exact": runtime.policy.exact,
        }
        return self.recorder.finished(name or runtime.directory.name, setting | about)
