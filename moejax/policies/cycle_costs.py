"""What cycles of draft and verification cost, as estimated from how long they took."""

import collections

import numpy as np

from moejax.policies.lengths import CycleCosts


class LiveCycles:
    """Estimates what cycles cost from how long they took; lives on the host.

    A plain step's cost is the mean of the latest ones. All others come from one regression on
    the latest cycles of every length: plain ones cost base + miss_ms * missed, speculative ones
    fixed_ms + draft_ms * drafted + token_ms * verified + miss_ms * missed. Each coefficient starts
    as a share of the plain step, as uncertain as it is large, and none falls below 0; a time is
    right to a tenth of a plain step times the root of the tokens verified; repeated and old cycles
    count less.

    Outliers, as when a program is compiled: a cycle of more than 20 median plain steps per token
    verified is not noted, unless it is the fourth in a row; the first of its length counts for at
    most 3 times what was expected, and if it took longer, only until the second; no other counts
    for more than twice the median of its length.
    """

    SHARES = (0.5, 0.5, 0.2, 0.1, 0.5)  # of the plain step: base, fixed, draft, token, misses
    AGE, KEPT, LEAST, ODD, ENOUGH = 48, 16, 6, 3, 4  # cycles
    NOISE, OUTLIER, UNLIKELY, FAR, MUCH = 0.1, 20.0, 3.0, 2.0, 4.0

    def __init__(self) -> None:
        # by gamma, of the latest cycles: number, milliseconds, row of the regression
        self._noted: dict[int, collections.deque] = {}
        self._doubtful: set[int] = set()  # lengths of which only an unlikely first cycle is noted
        self._cycle = self._odd = 0
        self._plain: float | None = None  # what `plain_ms` found, until one more is noted
        self._fitted: np.ndarray | None = None

    def add(self, gamma: int, seconds: float, drafted: int, verified: int, missed: int) -> None:
        """Note one cycle, before `LiveLength.observe`, whose account then has its true cost.

        It drafted and verified so many tokens per sequence, the greatest of the batch. Raises
        ValueError for a time that is not a positive number.
        """
        if not 0 < seconds < np.inf:
            raise ValueError(f"a cycle of {seconds} s: it must be a positive number")
        self._cycle += 1
        ms, live = 1e3 * seconds, gamma > 0
        odd = 0 in self._noted and ms > self.OUTLIER * self.plain_ms * max(verified, 1.0)
        self._odd = self._odd + 1 if odd else 0
        if 0 < self._odd <= self.ODD:
            return
        row = (1.0 - live, 1.0 * live, 1.0 * live * drafted, 1.0 * live * verified, 1.0 * missed)
        if gamma in self._doubtful:
            self._doubtful.remove(gamma)
            self._noted[gamma].clear()
        elif (
            live
            and gamma not in self._noted
            and ms > (most := self.UNLIKELY * self._fit() @ np.array(row))
        ):
            self._doubtful.add(gamma)
            ms = most
        noted = self._noted.setdefault(gamma, collections.deque(maxlen=self.KEPT))
        noted.append((self._cycle, ms, row))
        self._fitted = None
        if not live:
            self._plain = None

    @property
    def plain_ms(self) -> float:
        """Mean of the latest plain steps of up to `MUCH` medians: some miss much."""
        if self._plain is None:
            times = [ms for _, ms, _ in self._recent(0)] or [1.0]
            most = self.MUCH * _median(times)
            times = [ms for ms in times if ms <= most]
            self._plain = sum(times) / len(times)
        return self._plain

    def costs(self) -> CycleCosts:
        """The estimates, as f32 scalars: replacing those of a policy does not recompile."""
        names = ("fixed_ms", "draft_ms", "token_ms", "miss_ms")
        found = dict(zip(names, self._fit()[1:], strict=True)) | {"plain_ms": self.plain_ms}
        return CycleCosts(**{name: np.float32(value) for name, value in found.items()})

    def _recent(self, gamma: int) -> list[tuple[int, float, tuple[float, ...]]]:
        noted = list(self._noted.get(gamma, ()))
        kept = [cycle for cycle in noted if cycle[0] > self._cycle - self.AGE]
        return kept if len(kept) >= self.LEAST else noted[-self.LEAST :]

    def _fit(self) -> np.ndarray:
        """[5] base, fixed, draft, token and miss, in milliseconds."""
        if self._fitted is None:
            plain, rows, times, noise = self.plain_ms, [], [], []
            for cycles in map(self._recent, self._noted):
                most = self.FAR * _median([ms for _, ms, _ in cycles])
                certain = self.NOISE * plain * max(len(cycles) / self.ENOUGH, 1.0) ** 0.5
                for number, ms, row in cycles:
                    rows.append(row)
                    times.append(min(ms, most))
                    old = 1.0 + (self._cycle - number) / self.AGE
                    noise.append(certain * max(row[3], 1.0) ** 0.5 * old)
            start = plain * np.array(self.SHARES)
            missed = [row[-1] for _, _, row in self._recent(0)] or [1.0]
            start[-1] /= max(sum(missed) / len(missed), 1.0)
            rows = np.array(rows).reshape(-1, 5)
            self._fitted = _regression(rows, np.array(times), start, np.array(noise))
        return self._fitted


def _median(times: list[float]) -> float:
    """The lower of the two in the middle: of two times, the one without an outlier."""
    return sorted(times)[(len(times) - 1) // 2]


def _regression(
    rows: np.ndarray, times: np.ndarray, start: np.ndarray, noise: np.ndarray
) -> np.ndarray:
    """[n] most likely coefficients of rows [m, n] for times [m], none below 0.

    Each one is `start` before any row, give or take as much; times have a noise [m].
    """
    scaled, free = rows * start / noise[:, None], np.ones(len(start), bool)
    gram, right = scaled.T @ scaled + np.eye(len(start)), scaled.T @ (times / noise) + 1.0
    while True:
        found = np.zeros(len(start))
        found[free] = np.linalg.solve(gram[np.ix_(free, free)], right[free])
        if (found >= 0).all():
            return found * start
        free[np.argmin(found)] = False
