"""Uses of experts one after the other: what is usually meant by a cache of experts.

Every pick of every token is an access of its own, in the order of tokens, layers and ranks, and
nothing is shielded: a pick may drive out what the same token needs next.
"""

import dataclasses

import numpy as np

from moejax.simulator import bounds, stack_distance
from moejax.traces.trace import Trace


def sequences(picks: np.ndarray, experts: int, per_layer: bool) -> np.ndarray:
    """[Q, M] i64 ids in the order of use, -1 = none: one sequence, or one per layer.

    Args:
        picks: [N, L, K] experts of the layer, -1 = none.
    """
    layers = picks.shape[1]
    if per_layer:
        return picks.swapaxes(0, 1).reshape(layers, -1).astype(np.int64)
    ids = picks + np.arange(layers)[:, None] * experts
    return np.where(picks < 0, -1, ids).reshape(1, -1)


def unfolded(values: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Values [Q, M] of `sequences` as [N, L, K] again."""
    tokens, layers, top_k = shape
    if len(values) == 1:
        return values.reshape(shape)
    return values.reshape(layers, tokens, top_k).swapaxes(0, 1)


def lru(trace: Trace, capacities: list[int], per_layer: bool) -> list[np.ndarray]:
    """[N, L, K] bool for each capacity, of each sequence's cache: which accesses hit."""
    uses = sequences(trace.picks, trace.experts, per_layer)
    ids = trace.experts * (1 if per_layer else trace.layers)
    found = unfolded(stack_distance.distances(uses, ids), trace.picks.shape)
    return [(found >= 0) & (found < capacity) for capacity in capacities]


def belady(
    picks: np.ndarray, experts: int, capacity: int, per_layer: bool, *, shielded: bool
) -> np.ndarray:
    """[N, L, K] bool, hits when who is used again latest leaves; see `bounds.belady`.

    Args:
        shielded: what a token (or pass) uses in a layer is used at one moment.
    """
    uses = sequences(picks, experts, per_layer)
    moment = np.arange(uses.shape[1])
    moment = moment // picks.shape[2] if shielded else moment
    return unfolded(np.stack([bounds.belady(own, capacity, moment) for own in uses]), picks.shape)


def infinite(picks: np.ndarray, experts: int) -> np.ndarray:
    """[N, L, K] bool, hits of a cache that has room for all experts."""
    uses = sequences(picks, experts, per_layer=False)
    return unfolded(np.stack([bounds.seen_before(own) for own in uses]), picks.shape)


def one_by_one(trace: Trace, per_layer: bool) -> Trace:
    """A trace whose passes are single accesses, for evictors that look at nothing else.

    With slots of its own every layer takes an access in each pass; one pool of all layers is that
    of a model of one layer that has all experts.
    """
    if per_layer:
        picks = trace.picks.swapaxes(1, 2).reshape(-1, trace.layers, 1)
        source = np.repeat(np.arange(trace.rows), trace.top_k)
        experts = trace.experts
    else:
        uses = sequences(trace.picks, trace.experts, per_layer=False)[0]
        picks, experts = uses.reshape(-1, 1, 1), trace.experts * trace.layers
        source = np.repeat(np.arange(trace.rows), trace.layers * trace.top_k)
    rows = {name: getattr(trace, name)[source] for name in ("sequence", "position", "token")}
    return Trace(
        model=trace.model,
        experts=experts,
        **rows,
        run=np.arange(len(source), dtype=np.int32),
        phase=trace.phase[source],
        accepted=trace.accepted[source],
        picks=picks,
    )


def distinct(trace: Trace) -> np.ndarray:
    """[P, L, M] the experts that each pass needs in each layer, by first use, -1 = none.

    M is the most that any needs.
    """
    offsets = trace.offsets()
    lists = [
        [list(dict.fromkeys(x for x in own.ravel().tolist() if x >= 0)) for own in rows]
        for rows in (
            trace.picks[a:b].swapaxes(0, 1) for a, b in zip(offsets, offsets[1:], strict=False)
        )
    ]
    width = max((len(x) for rows in lists for x in rows), default=1)
    found = np.full((trace.passes, trace.layers, max(width, 1)), -1, np.int64)
    for number, rows in enumerate(lists):
        for layer, own in enumerate(rows):
            found[number, layer, : len(own)] = own
    return found


def alone(trace: Trace) -> Trace:
    """The trace with every token in a pass of its own."""
    dropped = {"resident": None, "began": None, "seconds": None, "counts": {}, "reads": {}}
    return dataclasses.replace(trace, run=np.arange(trace.rows, dtype=np.int32), **dropped)
