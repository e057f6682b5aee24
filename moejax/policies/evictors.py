"""Evictors beyond LRU: by router score, by frequency, against scans, by the order of layers.

A use is a step in which a layer routes at least one token to an expert, and a step without valid
tokens is none. Recency is kept as a rank, a permutation with the last used expert on top: unlike a
time of use it never outgrows the number of experts, so an i32 key holds it exactly beside a count.
"""

import jax
import jax.numpy as jnp

from moejax.policies.eviction import CLOCK_LIMIT, Access
from moejax.state import pytree, static

ALL_EXPERTS = 2**31 - 1  # more than any layer has


@pytree
class WindowMemory:
    """The last scores of every layer."""

    scores: jax.Array  # [L, size, E] f32, circular per layer
    next: jax.Array  # [L] i32, the row to fill next
    seen: jax.Array  # [L] i32, steps of the layer, at most size
    means: jax.Array  # [L * E] f32, -inf = the layer was never seen


@pytree
class ScoreWindow:
    """Smallest mean router score over the last `n` steps of its layer, selected or not.

    SMoE, equation 3, whose sum has n + 1 terms; here n is their number, at most `size`. While a
    layer has seen fewer steps, their number divides. The paper does not say what the score of a
    step of several tokens is: here the mean over its valid tokens. Experts of layers that were
    never seen leave first.
    """

    n: jax.Array | int  # [] i32, 1 to size; beyond, the nearer of the two
    size: int = static(default=64)

    def init(self, num_layers: int, num_experts: int) -> WindowMemory:
        """Nothing seen."""
        return WindowMemory(
            scores=jnp.zeros((num_layers, self.size, num_experts), jnp.float32),
            next=jnp.zeros(num_layers, jnp.int32),
            seen=jnp.zeros(num_layers, jnp.int32),
            means=jnp.full(num_layers * num_experts, -jnp.inf, jnp.float32),
        )

    def observe(self, memory: WindowMemory, access: Access) -> WindowMemory:
        """Record the step; renew the means of this layer from its rows."""
        layer, is_step = access.layer, access.valid.any()
        row, size = memory.next[layer], (1, 1, access.scores.shape[1])
        # Slices, not `at`, which XLA makes a loop of: this runs in every layer of every token.
        at = (layer, row, jnp.int32(0))
        old = jax.lax.dynamic_slice(memory.scores, at, size)
        score = jnp.where(is_step, _mean_score(access), old)
        scores = jax.lax.dynamic_update_slice(memory.scores, score, at)
        row = (row + is_step) % self.size
        seen = jnp.minimum(memory.seen[layer] + is_step, self.size)
        # Summed anew each time: running sums would drift.
        age = (row - 1 - jnp.arange(self.size)) % self.size
        terms = jnp.minimum(jnp.maximum(self.n, 1), seen)
        total = jnp.where((age < terms)[:, None], scores[layer], 0.0).sum(axis=0)
        mean = jnp.where(terms > 0, total / jnp.maximum(terms, 1), -jnp.inf)
        return WindowMemory(
            scores=scores,
            next=memory.next.at[layer].set(row),
            seen=memory.seen.at[layer].set(seen),
            means=_with_own(memory.means, access, mean),
        )

    def keys(self, memory: WindowMemory, layer: jax.Array) -> jax.Array:
        """[L * E] f32 mean scores."""
        del layer
        return memory.means


@pytree
class UseMemory:
    """How often and in which order experts were used."""

    count: jax.Array  # [L * E] i32 uses
    recency: jax.Array  # [L * E] i32, a permutation: the last used on top, at first in id order


@pytree
class LFU:
    """Fewest uses, and among equals the least recently used.

    Textbook LFU, whose counts outlive evictions; all are halved when one would not fit the key.
    """

    def init(self, num_layers: int, num_experts: int) -> UseMemory:
        """No expert has been used."""
        ids = num_layers * num_experts
        return UseMemory(count=jnp.zeros(ids, jnp.int32), recency=jnp.arange(ids, dtype=jnp.int32))

    def observe(self, memory: UseMemory, access: Access) -> UseMemory:
        """Count the uses."""
        own = _own(memory.count, access) + access.needed
        full = (own > _greatest_count(memory.count.shape[0])).any()
        count = _with_own(memory.count, access, own)
        return UseMemory(
            count=jnp.where(full, count // 2, count), recency=_used(memory.recency, access)
        )

    def keys(self, memory: UseMemory, layer: jax.Array) -> jax.Array:
        """[L * E] i32: count, then recency."""
        del layer
        return memory.count * memory.count.shape[0] + memory.recency


@pytree
class DecayedLFU:
    """Smallest use count under exponential decay: c = decay * c + (1 if used) per layer step.

    LRFU (Lee et al., IEEE Trans. Computers 2001) with the layer's steps as its clock.
    """

    decay: jax.Array | float  # [] f32, 0 to 1

    def init(self, num_layers: int, num_experts: int) -> jax.Array:
        """[L * E] f32, no uses."""
        return jnp.zeros(num_layers * num_experts, jnp.float32)

    def observe(self, memory: jax.Array, access: Access) -> jax.Array:
        """Let this layer's counts decay and add the uses."""
        old = _own(memory, access)
        new = jnp.where(access.valid.any(), self.decay * old + access.needed, old)
        return _with_own(memory, access, new)

    def keys(self, memory: jax.Array, layer: jax.Array) -> jax.Array:
        """[L * E] f32 counts."""
        del layer
        return memory


@pytree
class ScoreEMA:
    """Smallest moving average of the router score: s = decay * s + (1 - decay) * score per step.

    A step's score is the mean over its valid tokens; only its `top` best experts of the layer
    count, the others as 0 (ties: the lower expert counts). Averages start at 0. HybriMoE (arXiv
    2504.05897, score-aware caching) counts twice as many experts as a token chooses.
    """

    decay: jax.Array | float  # [] f32, 0 to 1
    top: jax.Array | int = ALL_EXPERTS  # [] i32

    def init(self, num_layers: int, num_experts: int) -> jax.Array:
        """[L * E] f32 zeros."""
        return jnp.zeros(num_layers * num_experts, jnp.float32)

    def observe(self, memory: jax.Array, access: Access) -> jax.Array:
        """Average in this layer's scores."""
        old, score = _own(memory, access), _mean_score(access)
        place = jnp.argsort(jnp.argsort(-score, stable=True), stable=True)
        score = jnp.where(place < self.top, score, 0.0)
        new = self.decay * old + (1 - self.decay) * score
        return _with_own(memory, access, jnp.where(access.valid.any(), new, old))

    def keys(self, memory: jax.Array, layer: jax.Array) -> jax.Array:
        """[L * E] f32 averages."""
        del layer
        return memory


@pytree
class ClassMemory:
    """Aged use counts and the order of use."""

    count: jax.Array  # [L * E] i32 uses, halved with age
    recency: jax.Array  # [L * E] i32, a permutation: the last used on top, at first in id order
    steps: jax.Array  # [L] i32, the layer's steps since its counts were halved


@pytree
class ClassLRU:
    """Lowest frequency class, and within it the least recently used.

    The class is the bit length of the use count: 0 for no use, 1 for one, 2 for two or three, and
    so on. In every `period`-th step of a layer its counts are halved, rounding down, before that
    step's uses are added. The idea is the frequency-class LRU of llama.cpp's expert cache
    (`--moe-cache-mib`); the classes and the aging are defined here.
    """

    period: jax.Array | int  # [] i32 steps

    def init(self, num_layers: int, num_experts: int) -> ClassMemory:
        """No expert has been used."""
        ids = num_layers * num_experts
        return ClassMemory(
            count=jnp.zeros(ids, jnp.int32),
            recency=jnp.arange(ids, dtype=jnp.int32),
            steps=jnp.zeros(num_layers, jnp.int32),
        )

    def observe(self, memory: ClassMemory, access: Access) -> ClassMemory:
        """Age this layer's counts if it is time, then count the uses."""
        is_step = access.valid.any()
        steps = jnp.minimum(memory.steps[access.layer] + is_step, CLOCK_LIMIT)
        due = is_step & (steps >= self.period)
        old = _own(memory.count, access)
        new = jnp.where(due, old // 2, old) + access.needed
        return ClassMemory(
            count=_with_own(memory.count, access, jnp.minimum(new, CLOCK_LIMIT)),
            recency=_used(memory.recency, access),
            steps=memory.steps.at[access.layer].set(jnp.where(due, 0, steps)),
        )

    def keys(self, memory: ClassMemory, layer: jax.Array) -> jax.Array:
        """[L * E] i32: class, then recency."""
        del layer
        level = 32 - jax.lax.clz(memory.count)
        return level * memory.count.shape[0] + memory.recency


@pytree
class QueueMemory:
    """Who was used again soon, and the order of use."""

    uses: jax.Array  # [L * E] i32: 0 = never used, 1 = on probation, 2 = used again
    recency: jax.Array  # [L * E] i32, a permutation: the last used on top, at first in id order


@pytree
class TwoQueue:
    """Experts on probation first, then those used again; each least recently used first.

    An expert's distance is the number of other experts used since its last use. A use at a distance
    below `window` is a use again; any other puts the expert on probation, and so does a distance
    that reaches `window`. One pass over many experts hence cannot drive out those in steady use.
    A layer's next step comes at a distance of all experts that the layers use in between: a window
    below that keeps everybody on probation, which is LRU. After 2Q (Johnson and Shasha, VLDB 1994),
    with distances in the place of its queue lengths because evictors do not see evictions.
    """

    window: jax.Array | int  # [] i32 experts

    def init(self, num_layers: int, num_experts: int) -> QueueMemory:
        """No expert has been used."""
        ids = num_layers * num_experts
        return QueueMemory(uses=jnp.zeros(ids, jnp.int32), recency=jnp.arange(ids, dtype=jnp.int32))

    def observe(self, memory: QueueMemory, access: Access) -> QueueMemory:
        """Tell uses again from first uses."""
        old = _own(memory.uses, access)
        near = _own(self._near(memory), access)
        uses = jnp.where(access.needed, jnp.where((old > 0) & near, 2, 1), old)
        return QueueMemory(
            uses=_with_own(memory.uses, access, uses), recency=_used(memory.recency, access)
        )

    def keys(self, memory: QueueMemory, layer: jax.Array) -> jax.Array:
        """[L * E] i32: whether used again, then recency."""
        del layer
        again = (memory.uses == 2) & self._near(memory)
        return again * memory.recency.shape[0] + memory.recency

    def _near(self, memory: QueueMemory) -> jax.Array:
        return memory.recency.shape[0] - 1 - memory.recency < self.window


@pytree
class StaleMemory:
    """Where the model is, and the order of use within each layer."""

    layer: jax.Array  # [] i32, the layer that ran last
    recency: jax.Array  # [L, E] i32, a permutation per layer: the last used on top


@pytree
class LeastStale:
    """Experts of the layer that runs again latest, and within it the least recently used.

    Layers run in a cycle, so the layer that has just run comes again last and its experts leave
    first, those of the next layer last. After SpecMD (arXiv 2602.03921), least-stale eviction.
    """

    def init(self, num_layers: int, num_experts: int) -> StaleMemory:
        """The first layer runs next."""
        order = jnp.arange(num_experts, dtype=jnp.int32)
        return StaleMemory(
            layer=jnp.int32(num_layers - 1), recency=jnp.tile(order, (num_layers, 1))
        )

    def observe(self, memory: StaleMemory, access: Access) -> StaleMemory:
        """Move on to this layer, tokens or not."""
        order = _to_top(memory.recency[access.layer], jnp.int32(0), access)
        return StaleMemory(layer=access.layer, recency=memory.recency.at[access.layer].set(order))

    def keys(self, memory: StaleMemory, layer: jax.Array) -> jax.Array:
        """[L * E] i32: nearness of the layer's next run, then recency within the layer."""
        # Not `layer`: for a prefetch that is a later one, which has not run yet.
        del layer
        layers, experts = memory.recency.shape
        between = (jnp.arange(layers, dtype=jnp.int32) - memory.layer - 1) % layers
        return ((layers - 1 - between)[:, None] * experts + memory.recency).reshape(-1)


def _mean_score(access: Access) -> jax.Array:
    """[E] mean over the valid tokens, 0 without any."""
    total = jnp.where(access.valid[:, None], access.scores, 0.0).sum(axis=0)
    return total / jnp.maximum(access.valid.sum(), 1)


def _own(values: jax.Array, access: Access) -> jax.Array:
    """[E] of the layer's experts among [L * E]."""
    experts = access.needed.shape[0]
    return jax.lax.dynamic_slice(values, (access.layer * experts,), (experts,))


def _with_own(values: jax.Array, access: Access, own: jax.Array) -> jax.Array:
    """[L * E] with those of the layer's experts replaced."""
    start = access.layer * access.needed.shape[0]
    return jax.lax.dynamic_update_slice(values, own.astype(values.dtype), (start,))


def _used(recency: jax.Array, access: Access) -> jax.Array:
    """[L * E] recency after the access."""
    return _to_top(recency, access.layer * access.needed.shape[0], access)


def _to_top(rank: jax.Array, start: jax.Array, access: Access) -> jax.Array:
    """A permutation [M] after the used experts, of indices `start` on, rose in order of last use.

    Without a sort over all M: the others sink by how many of those that rise were below them.
    """
    size, experts = rank.shape[0], access.needed.shape[0]
    own = jax.lax.dynamic_slice(rank, (start,), (experts,))
    marks = jnp.zeros(size, jnp.int32).at[jnp.where(access.needed, own, size)].set(1, mode="drop")
    sunk = rank - jnp.cumsum(marks, dtype=jnp.int32)[rank]
    later = access.needed & (access.last_use > access.last_use[:, None])
    top = size - 1 - later.sum(axis=1, dtype=jnp.int32)
    stayed = jax.lax.dynamic_slice(sunk, (start,), (experts,))
    return jax.lax.dynamic_update_slice(sunk, jnp.where(access.needed, top, stayed), (start,))


def _greatest_count(ids: int) -> int:
    """The greatest count that `count * ids + recency` can hold in an i32."""
    return 2**31 // ids - 1
