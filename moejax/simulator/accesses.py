"""Uses of experts one after the other: what is usually meant by a cache of experts.

Every pick of every token is an access of its own, in the order of tokens, layers and ranks, and
nothing is shielded: a pick may drive out what the same token needs next.
"""

import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from moejax.simulator import bounds, stack_distance
from moejax.simulator.tape import Rows, Tape
from moejax.traces.trace import Trace

BLOCK = 1 << 18  # accesses at once


def sequences(picks: np.ndarray, experts: int, per_layer: bool) -> np.ndarray:
    """[Q, M] i32 ids in the order of use, -1 = none: one sequence, or one per layer.

    Args:
        picks: [N, L, K] experts of the layer, -1 = none.
    """
    layers = picks.shape[1]
    if per_layer:
        return picks.swapaxes(0, 1).reshape(layers, -1).astype(np.int32)
    ids = picks + np.arange(layers, dtype=np.int32)[:, None] * np.int32(experts)
    return np.where(picks < 0, -1, ids).reshape(1, -1)


def unfolded(values: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Values [Q, M] of `sequences` as [N, L, K] again."""
    tokens, layers, top_k = shape
    if len(values) == 1:
        return values.reshape(shape)
    return values.reshape(layers, tokens, top_k).swapaxes(0, 1)


def blocks(trace: Trace, per_layer: bool) -> Iterator[tuple[slice, np.ndarray]]:
    """Tokens in order, and their `sequences`: some `BLOCK` accesses at a time."""
    tokens = max(BLOCK // (trace.layers * trace.top_k), 1)
    for start in range(0, trace.rows, tokens):
        part = slice(start, min(start + tokens, trace.rows))
        yield part, sequences(trace.picks[part], trace.experts, per_layer)


def lru(trace: Trace, capacities: list[int], per_layer: bool) -> list[np.ndarray]:
    """[N, L] i32 for each capacity, of each sequence's cache: hits of each token."""
    ids = trace.experts * (1 if per_layer else trace.layers)
    stacks = stack_distance.Stacks(trace.layers if per_layer else 1, ids)
    shape = (len(capacities), trace.rows, trace.layers)
    hits = np.zeros(shape, np.int32)
    for part, uses in blocks(trace, per_layer):
        found = unfolded(stacks.distances(uses), trace.picks[part].shape)
        for own, capacity in zip(hits, capacities, strict=True):
            own[part] = ((found >= 0) & (found < capacity)).sum(axis=2)
    return [*hits]


def belady(
    picks: np.ndarray, experts: int, capacity: int, per_layer: bool, *, shielded: bool
) -> np.ndarray:
    """[N, L, K] bool, hits when who is used again latest leaves; see `bounds.belady`.

    Args:
        shielded: what a token (or pass) uses in a layer is used at one moment.
    """
    uses = sequences(picks, experts, per_layer)
    hits = np.zeros(uses.shape, bool)
    for own, found in zip(uses, hits, strict=True):
        used = np.flatnonzero(own >= 0)  # passes are as wide as the widest of them
        moment = used // picks.shape[2] if shielded else used
        found[used] = bounds.belady(own[used], capacity, moment)
    return unfolded(hits, picks.shape)


@dataclasses.dataclass(frozen=True)
class Singles:
    """Tapes whose passes are single accesses, for evictors that look at nothing else.

    With slots of its own every layer takes an access in each pass; one pool of all layers is that
    of a model of one layer that has all experts. Each tape is made when its turn comes; the last
    one is filled up, as those of `Tapes` are.
    """

    trace: Trace
    per_layer: bool

    @property
    def layers(self) -> int:
        """Of the model that takes the accesses."""
        return self.trace.layers if self.per_layer else 1

    @property
    def experts(self) -> int:
        """Of each of its layers."""
        return self.trace.experts * self.trace.layers // self.layers

    @property
    def passes(self) -> int:
        """T."""
        return self.trace.picks.size // self.layers

    def __iter__(self) -> Iterator[Tape]:
        length = 0
        for _, uses in blocks(self.trace, self.per_layer):
            picks = uses.swapaxes(0, 1)  # of a layer, in the same order: by token, then by rank
            length = length or len(picks)
            picks = np.pad(picks, ((0, length - len(picks)), (0, 0)), constant_values=-1)
            rows = Rows(
                picks=jnp.asarray(picks[:, :, None, None], jnp.int32),
                exact=None,
                scores=None,
                valid=jnp.ones((length, 1), bool),
            )
            yield Tape(
                prompts=jax.tree.map(lambda column: column[:1], rows),
                steps=rows,
                is_prompt=jnp.zeros(length, bool),
                place=jnp.arange(length, dtype=jnp.int32),
            )

    def by_token(self, hits: np.ndarray) -> np.ndarray:
        """[N, L] how many of the hits [T, L] each token had."""
        trace = self.trace
        shape = (trace.rows, trace.top_k, self.layers) if self.per_layer else trace.picks.shape
        return hits.reshape(shape).sum(axis=1 if self.per_layer else 2, dtype=np.int32)


def first_uses(trace: Trace) -> np.ndarray:
    """[P, L] i64 experts that a pass is the first to use."""
    found = np.zeros((trace.passes, trace.layers), np.int64)
    for layer, own in _by_layer(trace):
        ids, at = np.unique(own, return_index=True)
        first = trace.run[at[ids >= 0] // trace.top_k]
        found[:, layer] = np.bincount(first, minlength=trace.passes)
    return found


def needed(trace: Trace) -> np.ndarray:
    """[P, L] i64 distinct experts of each pass."""
    found = np.zeros((trace.passes, trace.layers), np.int64)
    for layer, own in _by_layer(trace):
        run = np.repeat(trace.run.astype(np.int64), trace.top_k)[own >= 0]
        pairs = np.unique(run * trace.experts + own[own >= 0])
        found[:, layer] = np.bincount(pairs // trace.experts, minlength=trace.passes)
    return found


def _by_layer(trace: Trace) -> Iterator[tuple[int, np.ndarray]]:
    """Layers, and the uses [N * K] of each in order, -1 = none."""
    for layer in range(trace.layers):
        yield layer, trace.picks[:, layer].ravel()


def distinct(trace: Trace) -> np.ndarray:
    """[P, L, M] i16 experts that each pass needs in each layer, by first use, -1 = none.

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
    found = np.full((trace.passes, trace.layers, max(width, 1)), -1, np.int16)
    for number, rows in enumerate(lists):
        for layer, own in enumerate(rows):
            found[number, layer, : len(own)] = own
    return found
