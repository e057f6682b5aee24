"""Traces as replaying programs read them: passes of equal size, prompts apart from steps."""

import dataclasses
from collections.abc import Collection, Iterator
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from moejax.errors import InputError
from moejax.state import pytree
from moejax.traces.trace import Phase, Trace

TAPE_BYTES = 128 << 20  # of a tape, if it has more than one pass
MOST_BYTES = 1 << 30  # of one pass


@pytree
class Rows:
    """P passes of at most N tokens, L layers."""

    picks: jax.Array  # [P, L, N, K] i32, -1 = none
    exact: jax.Array | None  # [P, L, N, K] i32, of the model's own router, if others
    scores: jax.Array | None  # [P, L, N, E] f32
    valid: jax.Array  # [P, N] bool


@pytree
class Tape:
    """Passes as programs read them: T in order, each one of `prompts` or of `steps`."""

    prompts: Rows
    steps: Rows
    is_prompt: jax.Array  # [T] bool
    place: jax.Array  # [T] i32, among those of its kind
    learned: dict[str, jax.Array] | None = None  # [T] f32 each, see `live.learned`


def replayed(trace: Trace) -> np.ndarray:
    """[P] bool, the passes of a trace that replays run: all but drafts."""
    return trace.pass_phases() != Phase.DRAFT


def tapes_of(trace: Trace, *, scores: bool = True, learned: Collection[str] = ()) -> "Tapes":
    """The passes of a trace that are replayed, on as many tapes as it takes.

    Args:
        scores: with router scores, if the trace has any.
        learned: counts that hold what the run's policy had learned by each pass.

    Raises:
        InputError: a pass would take more than `MOST_BYTES` of memory.
    """
    kept, counts = replayed(trace), np.diff(trace.offsets())
    found = Tapes(
        trace=trace,
        scores=scores and (trace.scores is not None or trace.top_ids is not None),
        learned=tuple(sorted(learned)),
        number=np.flatnonzero(kept),
        is_prompt=(trace.pass_phases() == Phase.PREFILL)[kept],
        counts=counts[kept],
    )
    if (size := found.bytes_of(1)) > MOST_BYTES:
        raise InputError(
            f"this replay would take {size / 2**30:.1f} GiB, more than {MOST_BYTES >> 30}, for its "
            "longest pass: leave the prompts out (--warm none), or take their tokens one by one "
            "(--prompt-alone)"
        )
    return found


class Passes(Protocol):
    """What a replay reads: passes on tapes of one shape."""

    layers: int  # L
    passes: int  # T, on all tapes; what the last one has more of counts for nothing

    def __iter__(self) -> Iterator[Tape]:
        """The tapes, each made when its turn comes."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tapes:
    """A trace's passes on tapes of one shape, each made when its turn comes.

    The last of several is filled up with its first step, over and over: nothing comes after it, and
    counts beyond the passes that there are belong to nobody.
    """

    trace: Trace
    scores: bool
    learned: tuple[str, ...]
    number: np.ndarray  # [T] of the passes, in the trace
    is_prompt: np.ndarray  # [T] bool
    counts: np.ndarray  # [T] rows

    @property
    def layers(self) -> int:
        """L."""
        return self.trace.layers

    @property
    def passes(self) -> int:
        """T."""
        return len(self.number)

    def bytes_of(self, length: int) -> int:
        """The greatest size of a tape of so many passes, each padded to the longest of its kind."""
        trace = self.trace
        each = trace.top_k * (1 if trace.exact is None else 2)
        each = 4 * trace.layers * (each + (trace.experts if self.scores else 0))
        return each * sum(number * width for number, width in self._room(length))

    def __iter__(self) -> Iterator[Tape]:
        length = max(self.passes, 1)
        while length > 1 and self.bytes_of(length) > TAPE_BYTES:
            length = -(-length // 2)
        for start in range(0, max(self.passes, 1), length):
            yield self._tape(slice(start, start + length), length)

    def _room(self, length: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """The most prompts and steps of a tape of so many passes, and the widest of each."""
        starts = np.arange(0, max(self.passes, 1), length)
        found = []
        for own in (self.is_prompt, ~self.is_prompt):
            held = np.add.reduceat(own, starts, dtype=int) if own.size else np.zeros(1, int)
            # Programs want a pass to look at even if there is none.
            width = max(int(self.counts[own].max(initial=1)), 1)
            found.append((max(int(held.max()), 1), width))
        return tuple(found)

    def _tape(self, part: slice, length: int) -> Tape:
        own, blank = self.is_prompt[part], length - len(self.number[part])
        (prompts, prompt_width), (steps, step_width) = self._room(length)
        place = np.where(own, np.cumsum(own), np.cumsum(~own)) - 1
        columns = {name: self.trace.counts[name][self.number[part], 0] for name in self.learned}
        return Tape(
            prompts=self._rows(part, own, prompts, prompt_width),
            steps=self._rows(part, ~own, steps, step_width),
            is_prompt=jnp.asarray(np.pad(own, (0, blank))),
            place=jnp.asarray(np.pad(place, (0, blank)), jnp.int32),
            learned={n: jnp.asarray(np.pad(c, (0, blank))) for n, c in columns.items()} or None,
        )

    def _rows(self, part: slice, own: np.ndarray, number: int, width: int) -> Rows:
        """The rows of the passes `own` of a part."""
        trace, passes, count = self.trace, self.number[part][own], self.counts[part][own]
        row, column = np.repeat(np.arange(len(passes)), count), _within(count)
        source = np.repeat(trace.offsets()[:-1][passes], count) + column

        def laid(values: np.ndarray | None, fill: int, kind: Any) -> jax.Array | None:
            if values is None:
                return None
            made = np.full((number, width, *values.shape[1:]), fill, kind)
            made[row, column] = values
            return jnp.asarray(made.swapaxes(1, 2) if made.ndim > 2 else made)

        return Rows(
            picks=laid(trace.picks[source], -1, np.int32),
            exact=None if trace.exact is None else laid(trace.exact[source], -1, np.int32),
            scores=laid(full_scores(trace, source) if self.scores else None, 0, np.float32),
            valid=laid(np.ones(len(source), bool), False, bool),
        )


def full_scores(trace: Trace, rows: Any = slice(None)) -> np.ndarray | None:
    """[N, L, E] f32 scores of some rows, those that were not recorded 0; None without any."""
    if trace.scores is not None:
        return np.asarray(trace.scores[rows], np.float32)
    if trace.top_ids is None:
        return None
    ids = trace.top_ids[rows]
    found = np.zeros((len(ids), trace.layers, trace.experts + 1), np.float32)
    at = np.where(ids < 0, trace.experts, ids).astype(np.int64)
    np.put_along_axis(found, at, np.asarray(trace.top_scores[rows], np.float32), axis=2)
    return found[:, :, :-1]


def _within(count: np.ndarray) -> np.ndarray:
    """0 to count - 1 for each."""
    return np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
