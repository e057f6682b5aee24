"""What a step drew: the next tokens with their log-probabilities, in a program and on the host."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moejax.errors import NonFiniteError
from moejax.sampling import (
    Sampling,
    nonfinite_rows,
    sample,
    sequence_keys,
    token_logprobs,
    top_logprobs,
)
from moejax.speculate import Made
from moejax.state import StepOutput, pytree
from moejax.stats import Totals, totals_of

NONFINITE = (
    "the logits hold NaN or infinity; check the weights (`moejax inspect --verify`) or run in "
    "float32"
)


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


def draw(
    out: StepOutput,
    length: jax.Array,
    sampling: Sampling,
    key: jax.Array,
    seen: Any,
    top: int,
) -> Drawn:
    """The next token of every sequence, and what is told about it; inside a program."""
    numbers = jnp.arange(out.logits.shape[0], dtype=jnp.int32)
    token = sample(out.logits, sampling, sequence_keys(key, numbers, length), seen)
    values, ids = top_logprobs(out.logits, top)
    return Drawn(
        token=token,
        logprob=token_logprobs(out.logits, token),
        top_logprob=values,
        top_token=ids,
        bad=nonfinite_rows(out.logits),
        totals=totals_of(out.trace),
    )


def collect(drawn: Drawn, active: np.ndarray) -> list[Token]:
    """The tokens of the active sequences; NonFiniteError for NaN or infinity in their logits."""
    if (drawn.bad & active).any():
        raise NonFiniteError(NONFINITE)
    return [token_of(drawn, int(i)) for i in np.flatnonzero(active)]


def token_of(drawn: Drawn | Made, sequence: int, place: int | None = None) -> Token:
    """The token of a sequence, the one at `place` of a cycle."""
    at = sequence if place is None else (sequence, place)
    top = zip(drawn.top_token[at], drawn.top_logprob[at], strict=True)
    return Token(
        sequence=sequence,
        id=int(drawn.token[at]),
        logprob=float(drawn.logprob[at]),
        top_logprobs=tuple((int(t), float(v)) for t, v in top),
    )
