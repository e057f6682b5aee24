"""Generation: prefill, then one jitted program per token that decodes and samples."""

import dataclasses
import functools
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moejax.decode import check_room, chunks, step, token_ids
from moejax.errors import InputError, LinkError, NonFiniteError
from moejax.kernels.transport import Store
from moejax.models.transformer import Decoder
from moejax.policy import Policy
from moejax.sampling import (
    Sampling,
    mark_seen,
    nonfinite_rows,
    sample,
    sequence_keys,
    token_logprobs,
    top_logprobs,
)
from moejax.state import DecodeState, ExpertStore, StepOutput, StepTrace, pytree


@pytree
class Totals:
    """Sums of a step's trace over layers; counts are experts."""

    needed: jax.Array  # [] i32
    hits: jax.Array  # [] i32
    fetched: jax.Array  # [] i32
    prefetched: jax.Array  # [] i32
    host: jax.Array  # [] i32
    replaced_mass: jax.Array  # [] f32
    late: jax.Array  # [] i32
    stall: jax.Array  # [] i32, microseconds
    failure: jax.Array  # [] i32, the greatest of the layers'


@pytree
class Drawn:
    """The tokens that a step chose."""

    token: jax.Array  # [B] i32
    logprob: jax.Array  # [B] f32, in the model's own distribution
    top_logprob: jax.Array  # [B, n] f32
    top_token: jax.Array  # [B, n] i32
    bad: jax.Array  # [B] bool, NaN or infinity in the logits
    totals: Totals | None


@dataclasses.dataclass(frozen=True)
class Token:
    """One generated token of one sequence."""

    sequence: int
    id: int
    logprob: float
    top_logprobs: tuple[tuple[int, float], ...]  # (token id, log-probability), likeliest first


@dataclasses.dataclass
class Stats:
    """What a run cost. Counts are experts over all layers; times are seconds."""

    record_bytes: int  # bytes of one expert's record
    prompt_tokens: int = 0
    new_tokens: int = 0
    steps: int = 0  # decode steps, prefill not included
    needed: int = 0  # expert uses in decode, per layer and step distinct
    hits: int = 0
    late: int = 0  # of `hits`: the expert had a slot, but its record was still to come over a link
    prefill_needed: int = 0
    prefill_hits: int = 0
    fetched: int = 0  # missing records copied into slots, prefill included; counted if `virtual`
    prefetched: int = 0  # records copied ahead of need, likewise
    prefill_moved: int = 0  # of `fetched` and `prefetched`
    host: int = 0  # experts computed on the host, prefill included
    replaced_mass: float = 0.0
    stall_seconds: float = 0.0  # of decode, waited for a link
    link_bytes: int | None = None  # read or begun by the link since the run began, if there is one
    prefill_link_bytes: int = 0  # of those
    virtual: bool = False  # weights are read in place: nothing is copied
    label: str = "bit-exact"  # or "faithful" (same routing, other rounding) or "lossy"
    ttft: float | None = None
    decode_seconds: float = 0.0

    @property
    def hit_rate(self) -> float | None:
        """Share of decode's expert uses that found the expert resident."""
        return self.hits / self.needed if self.needed else None

    @property
    def tpot(self) -> float | None:
        """Seconds per decode step (time per output token of one sequence)."""
        return self.decode_seconds / self.steps if self.steps else None

    @property
    def bytes_moved(self) -> int:
        """Bytes moved into slots, as the link counts them; without a link, by records."""
        if self.link_bytes is not None:
            return self.link_bytes
        return (self.fetched + self.prefetched) * self.record_bytes

    @property
    def bytes_per_step(self) -> float | None:
        """Bytes copied per decode step."""
        if not self.steps:
            return None
        if self.link_bytes is not None:
            return (self.link_bytes - self.prefill_link_bytes) / self.steps
        moved = self.fetched + self.prefetched - self.prefill_moved
        return moved * self.record_bytes / self.steps

    def add(self, totals: Totals | None, *, prefill: bool) -> None:
        """Count one step, whose totals are on the host."""
        if totals is None:
            return
        counted = totals
        self.fetched += int(counted.fetched)
        self.prefetched += int(counted.prefetched)
        self.host += int(counted.host)
        self.replaced_mass += float(counted.replaced_mass)
        if prefill:
            self.prefill_moved += int(counted.fetched) + int(counted.prefetched)
            self.prefill_needed += int(counted.needed)
            self.prefill_hits += int(counted.hits)
        else:
            self.needed += int(counted.needed)
            self.hits += int(counted.hits)
            self.late += int(counted.late)
            self.stall_seconds += float(counted.stall) / 1e6

    def as_dict(self) -> dict[str, Any]:
        """All fields and derived figures, for JSON."""
        names = ("hit_rate", "tpot", "bytes_moved", "bytes_per_step")
        derived = {name: getattr(self, name) for name in names}
        return dataclasses.asdict(self) | derived


def _totals(trace: StepTrace | None) -> Totals | None:
    if trace is None:
        return None
    return Totals(
        needed=trace.needed.sum(),
        hits=trace.hits.sum(),
        fetched=trace.fetched.sum(),
        prefetched=trace.prefetched.sum(),
        host=trace.host.sum(),
        replaced_mass=trace.replaced_mass.sum(),
        late=trace.late.sum(),
        stall=trace.stall.sum(),
        failure=trace.failure.max(),
    )


def _draw(
    out: StepOutput, length: jax.Array, sampling: Sampling, key: jax.Array, seen: Any, top: int
) -> Drawn:
    numbers = jnp.arange(out.logits.shape[0], dtype=jnp.int32)
    token = sample(out.logits, sampling, sequence_keys(key, numbers, length), seen)
    values, ids = top_logprobs(out.logits, top)
    return Drawn(
        token=token,
        logprob=token_logprobs(out.logits, token),
        top_logprob=values,
        top_token=ids,
        bad=nonfinite_rows(out.logits),
        totals=_totals(out.trace),
    )


@functools.partial(jax.jit, static_argnames=("model", "top"), donate_argnames=("state", "seen"))
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
) -> tuple[DecodeState, jax.Array | None, Drawn]:
    """Process tokens [B, T] (-1 = padding or a finished sequence) and draw the next ones.

    Donates `state` and `seen` [B, V], the mask of the repetition penalty (None without one).
    """
    if seen is not None:
        seen = mark_seen(seen, jnp.maximum(tokens, 0), tokens >= 0)
    state, out = step(model, policy, params, store, state, tokens)
    return state, seen, _draw(out, state.length, sampling, key, seen, top)


@dataclasses.dataclass
class Engine:
    """The fixed parts of a run; its methods are loops over the jitted step."""

    model: Decoder
    policy: Policy | None
    params: dict
    store: ExpertStore | None
    context: int  # tokens per sequence
    link: Store | None = None  # of a store behind a link

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
    ) -> Iterator[tuple[DecodeState, list[Token]]]:
        """Prefill the prompts, then yield the state and each step's new tokens.

        A sequence ends at a stop token (yielded too) or when the caller sets its entry of
        `finished` [B]; the loop ends when all have, or after `max_new_tokens`.

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
        key = jax.random.key(seed)
        fixed = (self.model, self.policy, self.params, self.store)
        pending = np.full(len(prompts), -1, np.int32)
        drawn, done = None, 0
        before = self.link.stats().bytes if self.link else 0
        stats.prompt_tokens += sum(len(p) for p in prompts)
        for tokens in chunks(prompts):
            state, seen, drawn = generate_step(*fixed, state, tokens, sampling, key, seen, top=top)
            drawn = self._taken(drawn, stats, before, prefill=True)
            size = tokens.shape[1]
            ends = [done < len(p) <= done + size for p in prompts]
            done += size
            first = _collect(drawn, np.array(ends))
            for token in first:
                pending[token.sequence] = token.id
            if all(len(p) <= done for p in prompts):
                stats.ttft = time.perf_counter() - begun
            if first:
                stats.new_tokens += len(first)
                yield state, first
                finished |= np.isin(pending, list(stop_ids)) & np.array(ends)
        for _ in range(max_new_tokens - 1):
            if finished.all():
                return
            begun = time.perf_counter()
            tokens = np.where(finished, -1, pending)[:, None].astype(np.int32)
            state, seen, drawn = generate_step(*fixed, state, tokens, sampling, key, seen, top=top)
            drawn = self._taken(drawn, stats, before, prefill=False)
            fresh = _collect(drawn, ~finished)
            stats.decode_seconds += time.perf_counter() - begun
            stats.steps += 1
            stats.new_tokens += len(fresh)
            for token in fresh:
                pending[token.sequence] = token.id
            yield state, fresh
            finished |= np.isin(pending, list(stop_ids))

    def _taken(self, drawn: Drawn, stats: Stats, before: int, *, prefill: bool) -> Drawn:
        """What a step chose, on the host and counted; LinkError if it was not made."""
        drawn = jax.device_get(drawn)
        if drawn.totals is not None and drawn.totals.failure:
            why = self.link.last_error() if self.link else f"status {int(drawn.totals.failure)}"
            raise LinkError(f"expert records did not arrive: {why}; the step was not made")
        stats.add(drawn.totals, prefill=prefill)
        if self.link is not None:
            stats.link_bytes = self.link.stats().bytes - before
            if prefill:
                stats.prefill_link_bytes = stats.link_bytes
        return drawn


def _collect(drawn: Drawn, active: np.ndarray) -> list[Token]:
    """The tokens of the active sequences; NonFiniteError for NaN or infinity in their logits."""
    if (drawn.bad & active).any():
        raise NonFiniteError(
            "the logits hold NaN or infinity; check the weights (`moejax inspect --verify`) or "
            "run in float32"
        )
    return [
        Token(
            sequence=int(i),
            id=int(drawn.token[i]),
            logprob=float(drawn.logprob[i]),
            top_logprobs=tuple(
                (int(t), float(v))
                for t, v in zip(drawn.top_token[i], drawn.top_logprob[i], strict=True)
            ),
        )
        for i in np.flatnonzero(active)
    ]
