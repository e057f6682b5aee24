"""Traces as replaying programs read them: passes of equal size, prompts apart from steps."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moejax.errors import InputError
from moejax.state import pytree
from moejax.traces.trace import Phase, Trace

MOST_BYTES = 4 << 30  # of a tape


@pytree
class Rows:
    """P passes of at most N tokens, L layers."""

    picks: jax.Array  # [P, L, N, K] i32, -1 = none
    exact: jax.Array | None  # [P, L, N, K] i32, of the model's own router, if others
    scores: jax.Array | None  # [P, L, N, E] f32
    valid: jax.Array  # [P, N] bool


@pytree
class Tape:
    """A trace as programs read it: T passes in order, each one of `prompts` or of `steps`."""

    prompts: Rows
    steps: Rows
    is_prompt: jax.Array  # [T] bool
    place: jax.Array  # [T] i32, among those of its kind
    load: jax.Array | None = None  # [T] f32, live cost of a record over the link, when known
    host: jax.Array | None = None  # [T] f32, of an expert on the host


def replayed(trace: Trace) -> np.ndarray:
    """[P] bool, the passes of a trace that replays run: all but drafts."""
    return trace.pass_phases() != Phase.DRAFT


def tape_of(trace: Trace, *, scores: bool = True) -> Tape:
    """The passes of a trace that are replayed.

    Args:
        scores: with router scores, if the trace has any.

    Raises:
        InputError: it would take more than `MOST_BYTES` of memory.
    """
    phases = trace.pass_phases()
    wide = scores and (trace.scores is not None or trace.top_ids is not None)
    _check_size(trace, phases, wide)
    values = full_scores(trace) if wide else None
    chosen = [np.flatnonzero(phases == Phase.PREFILL)]
    chosen.append(np.flatnonzero((phases == Phase.DECODE) | (phases == Phase.VERIFY)))
    kept = replayed(trace)
    is_prompt = (phases == Phase.PREFILL)[kept]
    place = np.where(is_prompt, np.cumsum(is_prompt), np.cumsum(~is_prompt)) - 1
    costs = {"load": trace.counts.get("load_us"), "host": trace.counts.get("host_us")}
    if any(cost is None for cost in costs.values()):
        costs = {}
    return Tape(
        prompts=_rows(trace, chosen[0], values),
        steps=_rows(trace, chosen[1], values),
        is_prompt=jnp.asarray(is_prompt),
        place=jnp.asarray(place, jnp.int32),
        **{name: jnp.asarray(cost[kept, 0], jnp.float32) for name, cost in costs.items()},
    )


def _check_size(trace: Trace, phases: np.ndarray, scores: bool) -> None:
    """Raise InputError where the padded passes would not fit."""
    picks = trace.layers * trace.top_k * 4 * (1 if trace.exact is None else 2)
    each = picks + (trace.layers * trace.experts * 4 if scores else 0)
    counts, rows = np.diff(trace.offsets()), 0
    for own in (phases == Phase.PREFILL, (phases == Phase.DECODE) | (phases == Phase.VERIFY)):
        rows += int(own.sum()) * int(counts[own].max(initial=0))
    unpacked = trace.rows * trace.layers * (trace.experts + 1) * 4 if scores else 0
    if (size := rows * each + unpacked) > MOST_BYTES:
        raise InputError(
            f"this replay would take {size / 2**30:.1f} GiB, more than {MOST_BYTES >> 30}, with "
            "every pass padded to the longest: leave the prompts out (--warm none), take their "
            "tokens one by one (--prompt-alone), or cut the trace"
        )


def full_scores(trace: Trace) -> np.ndarray | None:
    """[N, L, E] f32 scores, those beyond the recorded ones 0; None of a trace without any."""
    if trace.scores is not None:
        return np.asarray(trace.scores, np.float32)
    if trace.top_ids is None:
        return None
    found = np.zeros((trace.rows, trace.layers, trace.experts + 1), np.float32)
    at = np.where(trace.top_ids < 0, trace.experts, trace.top_ids).astype(np.int64)
    np.put_along_axis(found, at, np.asarray(trace.top_scores, np.float32), axis=2)
    return found[:, :, :-1]


def _rows(trace: Trace, passes: np.ndarray, scores: np.ndarray | None) -> Rows:
    """The rows of some passes, as many for each as the longest has."""
    first, count = trace.offsets()[:-1][passes], np.diff(trace.offsets())[passes]
    # Programs want a pass to look at even if there is none.
    number, width = max(len(passes), 1), int(count.max(initial=1))
    row, column = np.repeat(np.arange(len(passes)), count), _within(count)
    source = np.repeat(first, count) + column

    def laid(values: np.ndarray | None, fill: int, kind: Any) -> jax.Array | None:
        if values is None:
            return None
        made = np.full((number, width, *values.shape[1:]), fill, kind)
        made[row, column] = values[source]
        return jnp.asarray(made.swapaxes(1, 2) if made.ndim > 2 else made)

    return Rows(
        picks=laid(trace.picks, -1, np.int32),
        exact=laid(trace.exact, -1, np.int32),
        scores=laid(scores, 0, np.float32),
        valid=laid(np.ones(trace.rows, bool), False, bool),
    )


def _within(count: np.ndarray) -> np.ndarray:
    """0 to count - 1 for each."""
    return np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
