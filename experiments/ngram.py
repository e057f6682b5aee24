"""Interpolated modified Kneser-Ney 3-gram, the baseline of the tiny models."""

from dataclasses import dataclass

import numpy as np


@dataclass
class Level:
    """One n-gram order: discounted counts by key, totals and back-off mass by context."""

    keys: np.ndarray
    kept: np.ndarray
    contexts: np.ndarray
    totals: np.ndarray
    backoff: np.ndarray

    @classmethod
    def fit(cls, keys: np.ndarray, counts: np.ndarray, vocab: int) -> "Level":
        """Level of sorted unique keys (context * vocab + token) with their counts."""
        n1, n2, n3, n4 = (max(int(np.sum(counts == i)), 1) for i in (1, 2, 3, 4))
        y = n1 / (n1 + 2 * n2)
        discounts = np.array([0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3])
        bound = np.minimum(counts, 3)
        taken = np.clip(discounts, 0.05, [0.05, 0.95, 1.95, 2.95])[bound]
        contexts, first = np.unique(keys // vocab, return_index=True)
        totals = np.add.reduceat(counts, first).astype(np.float64)
        backoff = np.add.reduceat(taken, first) / totals
        return cls(keys, counts - taken, contexts, totals, backoff)

    def interpolate(self, context: np.ndarray, keys: np.ndarray, lower: np.ndarray) -> np.ndarray:
        """Probabilities of keys given their contexts and the lower order's probabilities."""
        place = np.minimum(np.searchsorted(self.contexts, context), len(self.contexts) - 1)
        seen = self.contexts[place] == context
        at = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
        kept = np.where(self.keys[at] == keys, self.kept[at], 0.0)
        mixed = kept / self.totals[place] + self.backoff[place] * lower
        return np.where(seen, mixed, lower)


class KneserNey:
    """3-gram model over token ids below `vocab`, fitted to one stream of tokens.

    With a boolean array `seen` of the stream's length, only 3-grams of seen tokens count.
    """

    def __init__(self, stream: np.ndarray, vocab: int, seen: np.ndarray | None = None):
        s = stream.astype(np.int64)
        self.vocab = vocab
        keys = (s[:-2] * vocab + s[1:-1]) * vocab + s[2:]
        if seen is not None:
            keys = keys[seen[:-2] & seen[1:-1] & seen[2:]]
        keys, counts = np.unique(keys, return_counts=True)
        self.three = Level.fit(keys, counts, vocab)
        keys, counts = np.unique(keys % vocab**2, return_counts=True)
        self.two = Level.fit(keys, counts, vocab)
        keys, counts = np.unique(keys % vocab, return_counts=True)
        self.one = Level.fit(keys, counts, vocab)

    def probability(self, a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
        """P(c | a, b) for arrays of token ids."""
        a, b, c = (np.asarray(x, np.int64) for x in (a, b, c))
        lower = np.full(c.shape, 1 / self.vocab)
        lower = self.one.interpolate(np.zeros_like(c), c, lower)
        lower = self.two.interpolate(b, b * self.vocab + c, lower)
        context = a * self.vocab + b
        return self.three.interpolate(context, context * self.vocab + c, lower)

    def distribution(self, a: int, b: int) -> np.ndarray:
        """P(. | a, b) over the whole vocabulary."""
        every = np.arange(self.vocab)
        return self.probability(np.full_like(every, a), np.full_like(every, b), every)

    def losses(self, stream: np.ndarray) -> np.ndarray:
        """Negative log probability in nats of every token from the third on."""
        return -np.log(self.probability(stream[:-2], stream[1:-1], stream[2:]))
