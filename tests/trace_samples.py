"""Random traces, shared by the tests of what is made of them."""

import numpy as np

from moejax.traces.trace import Outcome, Phase, Trace


def make_trace(passes=40, layers=3, experts=8, top=2, seed=0, outcomes=True, **changes):
    """Passes of 1 to 5 rows in all phases and three sequences, some drafts rejected.

    An expert has one outcome in a pass and layer, as in a run.
    """
    rng = np.random.default_rng(seed)
    kinds = rng.choice(
        [Phase.DECODE, Phase.DECODE, Phase.PREFILL, Phase.DRAFT, Phase.VERIFY], passes
    )
    sizes = np.where(kinds == Phase.PREFILL, 5, np.where(kinds == Phase.VERIFY, 3, 1))
    run = np.repeat(np.arange(passes), sizes).astype(np.int32)
    rows = len(run)
    picks = rng.random((rows, layers, experts)).argsort(-1)[..., :top].astype(np.int16)
    picks[rng.random(picks.shape) < 0.05] = -1
    table = rng.integers(1, max(Outcome) + 1, (passes, layers, experts)).astype(np.uint8)
    table[rng.random(table.shape) < 0.4] = Outcome.HIT
    at = run[:, None, None], np.arange(layers)[:, None], picks
    outcome = np.where(picks < 0, 0, table[at]).astype(np.uint8)
    exact = np.where(outcome == Outcome.SUBSTITUTE, (picks + 1) % experts, picks).astype(np.int16)
    seconds = rng.uniform(0.001, 0.01, passes)
    columns = {
        "sequence": (run // 7 % 3).astype(np.int32),
        "position": np.arange(rows, dtype=np.int32),
        "run": run,
        "phase": kinds[run].astype(np.uint8),
        "token": rng.integers(-1, 9, rows).astype(np.int32),
        "accepted": (kinds[run] != Phase.VERIFY) | (rng.random(rows) < 0.5),
        "picks": picks,
        "weights": rng.random(picks.shape).astype(np.float32),
        "outcome": outcome if outcomes else None,
        "exact": exact if outcomes else None,
        "began": np.cumsum(seconds) - seconds,
        "seconds": seconds,
        "about": {"policy": "lru", "record_bytes": 1000},
    }
    return Trace(**{"model": "small", "experts": experts, **columns, **changes}).check()


def distinct(trace, rows, layer, outcomes):
    """How many distinct experts of some rows have one of the outcomes in a layer."""
    found = set()
    for row in rows:
        for expert, outcome in zip(trace.picks[row, layer], trace.outcome[row, layer], strict=True):
            if expert >= 0 and outcome in outcomes:
                found.add(int(expert))
    return len(found)
