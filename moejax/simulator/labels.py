"""What the counts of a replay hold for, in a few words."""

import numpy as np

from moejax import live
from moejax.policies.policy import Policy
from moejax.simulator import needs, runs
from moejax.traces.trace import Trace

# Who is used again latest leaves: by tokens, as is usual, or by single uses, which is the optimum.
FUTURE = {"belady": "knows the future", "optimal": "bound"}
LOSSY_RUN = "open-loop, the run was lossy"
OTHER_WINDOWS = "open-loop, windows of another drafter"
OTHER_COSTS = "open-loop, costs of another run"
UNKNOWN_COSTS = "open-loop, learns costs that were not recorded"
CLOSE = 0.01  # of the tokens: picks that differ by the rounding of recorded scores alone


def foreseen(trace: Trace, name: str) -> str:
    """Of a replay that knows the future."""
    if trace.replaced:
        return f"{FUTURE[name]}, the run was lossy"
    return FUTURE[name] + ", windows of a drafter" * runs.drafted(trace)


def accessed(trace: Trace) -> str:
    """Of an exact policy that takes one access after another."""
    if trace.replaced:
        return LOSSY_RUN
    return OTHER_WINDOWS if runs.drafted(trace) else "exact"


def replayed(
    trace: Trace, policy: Policy, counts: dict[str, np.ndarray], *, per_layer: bool, oracle: bool
) -> str | None:
    """Of a replay with engine semantics; None if the recorded picks should be followed instead.

    Args:
        trace: what was replayed: of exact policies, what the model's own router picks.
        counts: [P, L] of the replay, by name.
        oracle: whether its prefetch was always right.
    """
    if policy.exact:
        label = unknown(trace, policy, per_layer, counts)
        if label and label.startswith("open-loop"):
            return label
        if oracle and policy.predictor.horizon:
            return "bound, prefetch always right"
        return label or "exact"
    picks = (trace.picks >= 0).any(axis=2).sum()
    other = counts["differing"].sum() / picks
    whole = not (other or _missing_scores(trace, policy))
    own = runs.same(trace, policy, per_layer) and runs.agrees(trace, counts, whole=whole)
    if not runs.has_windows(trace, policy, own):
        return f"{OTHER_WINDOWS}, {other:.1%} of picks differ"
    if trace.exact is not None and other == 0:
        return "closed-loop"
    if trace.exact is not None and other < CLOSE and not policy.low_bit:
        return None
    return f"open-loop, {other:.1%} of picks differ"


def unknown(
    trace: Trace, policy: Policy, per_layer: bool, counts: dict[str, np.ndarray]
) -> str | None:
    """Why an exact policy may do otherwise than it was replayed, None if it does the same.

    Args:
        counts: [P, L] of the replay, by name.
    """
    scores = _missing_scores(trace, policy)
    own = runs.same(trace, policy, per_layer) and runs.agrees(trace, counts, whole=not scores)
    told = needs.recorded(trace, policy)
    learns = live.names_of(policy) != set() and bool(told or trace.about.get("link"))
    if learns and not told:
        return UNKNOWN_COSTS
    if not runs.has_windows(trace, policy, own):
        return OTHER_WINDOWS
    return OTHER_COSTS if learns and not own else scores


def _missing_scores(trace: Trace, policy: Policy) -> str | None:
    """What a trace lacks of the router scores, if the policy reads them."""
    if not needs.reads_scores(policy, trace.layers, trace.experts):
        return None
    if trace.scores is None:
        return "truncated scores"
    return "rounded scores" if trace.scores.dtype == np.float16 else None
