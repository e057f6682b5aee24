"""Traces as replaying programs read them: passes of equal size, prompts apart from steps."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moejax.state import pytree
from moejax.trace import Phase, Trace


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


def tape_of(trace: Trace) -> Tape:
    """The passes of a trace that are replayed."""
    phases, scores = trace.pass_phases(), full_scores(trace)
    chosen = [np.flatnonzero(phases == Phase.PREFILL)]
    chosen.append(np.flatnonzero((phases == Phase.DECODE) | (phases == Phase.VERIFY)))
    kept = replayed(trace)
    is_prompt = (phases == Phase.PREFILL)[kept]
    place = np.where(is_prompt, np.cumsum(is_prompt), np.cumsum(~is_prompt)) - 1
    costs = trace.about.get("live_costs", {})
    return Tape(
        prompts=_rows(trace, chosen[0], scores),
        steps=_rows(trace, chosen[1], scores),
        is_prompt=jnp.asarray(is_prompt),
        place=jnp.asarray(place, jnp.int32),
        **{name: jnp.asarray(costs[name], jnp.float32)[kept] for name in costs},
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
