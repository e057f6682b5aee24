"""What the future would allow: Belady's choice of who leaves."""

import numpy as np

NEVER = np.iinfo(np.int64).max


def next_uses(uses: np.ndarray) -> np.ndarray:
    """[M] i64 when each use's id is used next, NEVER if it is not; uses [M], -1 = none."""
    order = np.argsort(uses, kind="stable")
    same = uses[order][1:] == uses[order][:-1]
    found = np.full(len(uses), NEVER, np.int64)
    found[order[:-1][same]] = order[1:][same]
    return found


def belady(uses: np.ndarray, capacity: int, moment: np.ndarray | None = None) -> np.ndarray:
    """[M] bool, hits when the resident that is used again latest leaves; every use is let in.

    Without moments no cache that fetches on demand has more hits. With them, uses of one moment are
    one: what is used in it, before or after, stays; of others that are used again at the same
    moment who came first leaves.

    Args:
        uses: [M] ids, -1 = none.
        capacity: slots.
        moment: [M] ascending, such as the token of each use; by default every use is its own.

    Source: Belady, A study of replacement algorithms (IBM Systems Journal, 1966).
    """
    size = len(uses)
    moment = np.arange(size) if moment is None else np.asarray(moment, np.int64)
    then = _later(uses, moment)
    ids = int(uses.max(initial=-1)) + 1
    hits, resident = np.zeros(size, bool), np.zeros(ids, bool)
    again, last, came = (np.full(ids, -1, np.int64) for _ in range(3))
    filled = 0
    for time in np.flatnonzero(uses >= 0).tolist():
        own, now = uses[time], moment[time]
        if resident[own]:
            hits[time] = True
        else:
            if filled == capacity:
                there = np.flatnonzero(resident)
                wanted = np.where(last[there] == now, now, again[there])
                latest = there[wanted == wanted.max()]
                resident[latest[came[latest].argmin()]] = False
            else:
                filled += 1
            resident[own], came[own] = True, time
        again[own], last[own] = then[time], now
    return hits


def _later(uses: np.ndarray, moment: np.ndarray) -> np.ndarray:
    """[M] the moment at which each use's id is used next after this moment, NEVER if it is not."""
    after = next_uses(uses)
    when = np.append(moment, NEVER)
    after = np.append(np.minimum(after, len(uses)), len(uses))
    while (same := (when[after[:-1]] == moment)).any():
        after[:-1] = np.where(same, after[after[:-1]], after[:-1])
    return when[after[:-1]]
