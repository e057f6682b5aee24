"""Intervals of what is timed in rounds: rounds and prompts drawn again, with replacement.

In a round every system runs once over the same prompts, so systems are compared within rounds and
on the same draws: what a slow round or a long prompt does to all of them is not in the interval.
A system that was chosen because it was the fastest stays chosen in every draw.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

DRAWS = 2000
EDGES = (0.025, 0.975)  # of 95 %
# With fewer, draws of rounds vary too little: of a hundred simulated intervals over 8 prompts 67 to
# 90 hold the truth with 2 or 3 rounds, 85 to 95 with 4 to 8.
LEAST_ROUNDS = 4


def milliseconds(run: Any, rounds: int) -> list[list[float]]:
    """Time per token [R][G] of a `Generation` or `Replay` in its last rounds, by group."""
    return [[round(1e3 * seconds, 5) for seconds in one] for one in run.times[-rounds:]]


def by_round(times: Sequence[Any], seed: int = 0, draws: int = DRAWS) -> list[np.ndarray]:
    """Means over prompts of each round [1 + D, R], of systems' times [R, G].

    The first row is what was measured; in each other one rounds and prompts are drawn, the same for
    all systems.
    """
    each = [np.asarray(own, float) for own in times]
    rng, (rounds, prompts) = np.random.default_rng(seed), each[0].shape
    chosen = rng.integers(0, rounds, (draws, rounds))
    weights = rng.multinomial(prompts, np.full(prompts, 1 / prompts), draws) / prompts
    found = []
    for own in each:
        means = np.take_along_axis(weights @ own.T, chosen, axis=1)
        found.append(np.concatenate([own.mean(axis=1)[None], means]))
    return found


def interval(drawn: np.ndarray) -> list[float] | None:
    """The 95 % between draws [D]; None where one of them has no value (NaN)."""
    return np.quantile(drawn, EDGES).tolist() if np.isfinite(drawn).all() else None


def paired(
    of: Callable[..., np.ndarray], *times: Any, seed: int = 0
) -> tuple[float | None, list[float] | None]:
    """The median over rounds of a number of several systems' times [R, G], and its interval.

    None with fewer than LEAST_ROUNDS.
    """
    found = np.median(of(*by_round(times, seed)), axis=1)
    value = float(found[0]) if np.isfinite(found[0]) else None
    return value, interval(found[1:]) if len(times[0]) >= LEAST_ROUNDS else None


def ratio(own: np.ndarray, other: np.ndarray) -> np.ndarray:
    """One time over another."""
    return own / other


def change(own: np.ndarray, other: np.ndarray) -> np.ndarray:
    """By how much of another a time is longer."""
    return own / other - 1


def gap_closed(lru: np.ndarray, own: np.ndarray, resident: np.ndarray) -> np.ndarray:
    """(T_LRU - T) / (T_LRU - T_resident), NaN where LRU loses nothing."""
    return (lru - own) / np.where(lru > resident, lru - resident, np.nan)


def windows(values: Sequence[Any], groups: Any, seed: int = 0, draws: int = DRAWS) -> np.ndarray:
    """Means over windows [S, 1 + D] of systems' values [S, W]: all, then drawn within groups [W].

    Of each group one window less than it has is drawn, each weighing so much more: of groups as
    small as these, as many draws as windows would vary too little. NaN where a group has only one.

    Args:
        groups: to which domain each window belongs.

    Source: Rao and Wu, Resampling inference with complex survey data, JASA 83 (1988).
    """
    values, groups, rng = np.asarray(values, float), np.asarray(groups), np.random.default_rng(seed)
    weights = np.zeros((draws, values.shape[1]))
    for group in np.unique(groups):
        own = np.flatnonzero(groups == group)
        n = len(own)
        each = n / (n - 1) if n > 1 else np.nan
        weights[:, own] = each * rng.multinomial(n - 1, np.full(n, 1 / n), draws)
    weights = np.concatenate([np.ones((1, values.shape[1])), weights]) / values.shape[1]
    return values @ weights.T
