"""Choosing alpha: the least that meets a budget of time per token (SMoE, section on alpha)."""

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from moejax.errors import InputError
from moejax.policies.policy import with_alpha
from moejax.sampling import Sampling
from moejax.stats import Stats

ALPHAS = (0.0, 0.15, 0.3, 0.45, 0.6)
STEP = 0.005  # alpha is chosen in these
TOLERANCE = 0.05  # of the budget, by which a measurement at the chosen alpha may be over it


@dataclasses.dataclass(frozen=True)
class Point:
    """One measured alpha."""

    alpha: float
    tpot_ms: float
    hit_rate: float | None = None
    exact_hit_rate: float | None = None  # of the picks of the model's own router
    replaced_mass: float = 0.0  # router weight that these picks lost, per token, over all layers


@dataclasses.dataclass(frozen=True)
class Tuned:
    """What a search for alpha found."""

    budget_ms: float
    alpha: float | None  # None: no alpha within those measured meets the budget
    predicted_ms: float  # by the fit, at alpha or else where it is lowest
    polynomial: tuple[float, ...]  # highest power first
    points: tuple[Point, ...]
    check: Point | None  # measured at alpha

    @property
    def fastest(self) -> Point:
        """The fastest of the measured."""
        return min(self.points, key=lambda point: point.tpot_ms)

    @property
    def confirmed(self) -> bool:
        """Whether the measurement at alpha is within the budget and 5 %."""
        return self.check is not None and self.check.tpot_ms <= self.budget_ms * (1 + TOLERANCE)


Measure = Callable[[Sequence[float]], Sequence[Point]]


def checked(budget_ms: float, alphas: Sequence[float], degree: int) -> list[float]:
    """The alphas in order, each once.

    Raises:
        InputError: a budget that is not positive, an alpha outside [0, 1], or too few of them.
    """
    if not 0 < budget_ms < float("inf"):
        raise InputError(f"the TPOT budget must be a positive number of milliseconds: {budget_ms}")
    if not all(0 <= alpha <= 1 for alpha in alphas):
        raise InputError(f"alphas must be from 0 to 1, not {', '.join(map(str, alphas))}")
    alphas = sorted(set(alphas))
    if not 0 < degree < len(alphas):
        raise InputError(
            f"a fit of degree {degree} needs more alphas than that, and a degree of at least 1; "
            f"there are {len(alphas)}"
        )
    return alphas


def tune(
    measure: Measure, budget_ms: float, alphas: Sequence[float] = ALPHAS, degree: int = 2
) -> Tuned:
    """The smallest alpha whose fitted TPOT is within the budget, and a measurement there.

    The fit need not fall with alpha: what is promised is that no smaller alpha meets it by the fit.

    Args:
        measure: alphas -> a Point of each.
        budget_ms: milliseconds per decode step.
        alphas: those to measure; the fit is not trusted beyond them.
        degree: of the polynomial, less than the number of alphas.

    Raises:
        InputError: see `checked`.
    """
    alphas = checked(budget_ms, alphas, degree)
    points = tuple(measure(alphas))
    fit = np.polyfit(alphas, [point.tpot_ms for point in points], degree)
    grid = np.append(np.arange(alphas[0], alphas[-1] - STEP / 2, STEP), alphas[-1])
    times = np.polyval(fit, grid)
    meets = np.flatnonzero(times <= budget_ms)
    at = int(meets[0]) if meets.size else int(times.argmin())
    alpha = round(float(grid[at]), 6) if meets.size else None
    return Tuned(
        budget_ms=budget_ms,
        alpha=alpha,
        predicted_ms=float(times[at]),
        polynomial=tuple(map(float, fit)),
        points=points,
        check=None if alpha is None else measure([alpha])[0],
    )


def measured(
    runtime: Any,
    prompt: np.ndarray,
    alphas: Sequence[float],
    *,
    tokens: int,
    rounds: int,
    seed: int,
) -> list[Point]:
    """TPOT of the runtime's policy at each alpha: medians of rounds that take the alphas in turn.

    One round more goes before, uncounted. Every run starts without experts on the device, and a
    stop token does not stop it; alpha is a leaf of the policy, so nothing is compiled in between.

    Args:
        prompt: token ids [T].
        tokens: decode steps of each run.

    Raises:
        PolicyError: the policy has no alpha.
    """
    runs: dict[float, list[Stats]] = {alpha: [] for alpha in alphas}
    for counts in range(rounds + 1):
        for alpha, done in runs.items():
            stats = _run(runtime, prompt, alpha, tokens, seed)
            if counts:
                done.append(stats)
    return [
        Point(
            alpha=alpha,
            tpot_ms=1e3 * statistics.median(stats.tpot for stats in done),
            hit_rate=done[0].hit_rate,
            exact_hit_rate=done[0].exact_hit_rate,
            replaced_mass=done[0].replaced_mass / done[0].steps,
        )
        for alpha, done in runs.items()
    ]


def _run(runtime: Any, prompt: np.ndarray, alpha: float, tokens: int, seed: int) -> Stats:
    stats = Stats(runtime.stats.record_bytes)
    engine = dataclasses.replace(runtime.engine, policy=with_alpha(runtime.policy, alpha))
    steps = engine.tokens(
        runtime.init_state(),
        [prompt],
        sampling=Sampling().validate(),
        seed=seed,
        max_new_tokens=tokens + 1,  # the first is the prefill's
        stop_ids=frozenset(),
        stats=stats,
        finished=np.zeros(1, bool),
    )
    for _ in steps:
        pass
    return stats
