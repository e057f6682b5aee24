"""LRU at every capacity from one pass over the uses: stack distances.

Mattson et al., Evaluation techniques for storage hierarchies (IBM Systems Journal, 1970).
"""

import numpy as np


class Stacks:
    """Independent sequences of uses, walked side by side, as many uses at a time as one likes."""

    def __init__(self, sequences: int, ids: int):
        """Nothing used yet, of so many ids."""
        self._last = np.full((sequences, ids), -1, np.int64)
        self._time = 0

    def distances(self, uses: np.ndarray) -> np.ndarray:
        """[Q, M] i32 how many others were used since each use's last one, of uses that go on.

        It is -1 for first uses and for no use. A use is a hit of an LRU cache of C slots if and
        only if its distance is in [0, C).

        Args:
            uses: [Q, M] ids, or -1 where there is no use.
        """
        found, last = np.full(uses.shape, -1, np.int32), self._last
        for time in range(uses.shape[1]):
            at = np.flatnonzero(uses[:, time] >= 0)
            own = uses[at, time]
            before = last[at, own]
            since = (last[at] > before[:, None]).sum(axis=1)
            found[at, time] = np.where(before >= 0, since, -1)
            last[at, own] = self._time + time
        self._time += uses.shape[1]
        return found


def distances(uses: np.ndarray, ids: int) -> np.ndarray:
    """[Q, M] i32 `Stacks.distances` of whole sequences."""
    return Stacks(len(uses), ids).distances(uses)


def hits(distance: np.ndarray, counted: np.ndarray, capacities: np.ndarray) -> np.ndarray:
    """[len(capacities)] i64 hits of LRU caches of these capacities, over the uses `counted`.

    Args:
        distance: see `distances`.
        counted: of the same shape, bool.
    """
    seen = distance[counted & (distance >= 0)]
    upto = np.cumsum(np.bincount(seen, minlength=int(max(capacities)) + 1))
    return upto[np.asarray(capacities) - 1] * (np.asarray(capacities) > 0)
