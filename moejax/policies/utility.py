"""MoE-SpAc's utility of experts: levels from windows of tokens, and the hot and cold threshold.

A window is what verifies one draft: the tokens of one step. How many of them use an expert tells
more about its near future than the yes or no of a single token. One level per expert, made from
these counts, orders prefetches and evictions, and a threshold on it splits a layer's work between
the device (hot, resident) and the host (everything else). A step without valid tokens is none.
"""

import dataclasses

import jax
import jax.numpy as jnp

from moejax.errors import PolicyError
from moejax.policies.eviction import Access
from moejax.state import pytree, static

MAX_CAP = 8  # the highest level there can be
REFERENCE = 9  # tokens of the window that `up` is given for
STAMPS = 2**27  # times of use that an i32 key holds beside a level


@pytree
class UtilityMemory:
    """Levels, the window that is filling up, and the order of use."""

    level: jax.Array  # [L, E] i32, 0 to MAX_CAP
    count: jax.Array  # [L, E] i32, uses in the window that is not full yet
    seen: jax.Array  # [L] i32, tokens in it
    up: jax.Array | None  # [L] f32, the calibrated boundary; None = not calibrated
    layer: jax.Array  # [] i32, the layer that ran last
    promoted: jax.Array  # [L, E] bool, taken from the queue since its layer ran
    clock: jax.Array  # [] i32, picks seen so far
    last_used: jax.Array  # [L, E] i32, 0 = never


@pytree
class Utility:
    """Lowest level, and within it the least recently used; levels move by one per window.

    Of a window of n tokens c use an expert of level s. If c - s >= up_n it rises, to `cap` at most;
    else if s - c >= down it falls, to 0 at least. As released, up is 5 and a window 9 tokens; for
    others up_n = max(1, round(up * n / 9)), half to even, or short windows would make nothing hot.

    window: steps of a layer are gathered until they have this many tokens, and then are one window;
    0 or 1 = each step is one. With 9 and plain decoding this is the control: the same counter fed
    by tokens that were decoded anyway.

    after_use: "demote" gives experts of layers that have run in this step, the running one's too,
    the status 0 in the place of their level: first to leave. They get it back when `drain` takes
    them from the queue, at the latest when the next step begins; the released code does so as its
    queue comes to them. "restore" keeps the level throughout.

    calibrate: the paper calibrates its boundaries by equations that are not available; this rule is
    ours. Precision is the share of a layer's hot experts (level 1 or more) that the next window
    uses, 1 if none is hot. After each window, `up` of that layer rises by
    rate * (target - precision), between 1 and 9; the numbers above are where it begins.

    Raises:
        PolicyError: an unknown after_use.

    Source: MoE-SpAc's released state machine, with K = cap. Levels beyond MAX_CAP are cut.
    """

    cap: jax.Array | int = 5
    up: jax.Array | float = 5.0  # tokens of 9
    down: jax.Array | int = 1  # tokens
    window: jax.Array | int = 0  # tokens
    target: jax.Array | float = 0.85
    rate: jax.Array | float = 1.0
    calibrate: bool = static(default=False)
    after_use: str = static(default="demote")

    def __post_init__(self) -> None:
        if self.after_use not in ("demote", "restore"):
            raise PolicyError(f"after_use {self.after_use!r} of Utility: write demote or restore")

    def init(self, num_layers: int, num_experts: int) -> UtilityMemory:
        """Nothing is hot."""
        shape = (num_layers, num_experts)
        return UtilityMemory(
            level=jnp.zeros(shape, jnp.int32),
            count=jnp.zeros(shape, jnp.int32),
            seen=jnp.zeros(num_layers, jnp.int32),
            up=jnp.full(num_layers, self.up, jnp.float32) if self.calibrate else None,
            layer=jnp.int32(num_layers - 1),
            promoted=jnp.zeros(shape, bool),
            clock=jnp.int32(0),
            last_used=jnp.zeros(shape, jnp.int32),
        )

    def observe(self, memory: UtilityMemory, access: Access) -> UtilityMemory:
        """Count the uses, and move the levels if the window is full."""
        layer, tokens = access.layer, access.valid.sum(dtype=jnp.int32)
        is_step = tokens > 0
        level, count = _row(memory.level, layer), _row(memory.count, layer) + access.tokens
        seen = _row(memory.seen, layer) + tokens
        full = is_step & (seen >= self.window)
        up = memory.up
        if up is not None:
            mine = _row(up, layer)
            up = _with_row(up, layer, jnp.where(full, self._calibrated(mine, level, count), mine))
        moved = self._moved(level, count, seen, self.up if memory.up is None else mine)
        level = jnp.where(full, moved, level)
        stamp = memory.clock + 1 + access.last_use
        used = jnp.where(access.needed, stamp, _row(memory.last_used, layer))
        last_used = _with_row(memory.last_used, layer, used)
        clock = memory.clock + 1 + access.last_use.max(initial=-1)
        back = jnp.where(clock < STAMPS - 1, 0, STAMPS // 2)
        return UtilityMemory(
            level=_with_row(memory.level, layer, level),
            count=_with_row(memory.count, layer, jnp.where(full, 0, count)),
            seen=_with_row(memory.seen, layer, jnp.where(full, 0, seen)),
            up=up,
            layer=jnp.where(is_step, layer, memory.layer),
            promoted=_with_row(memory.promoted, layer, _row(memory.promoted, layer) & ~is_step),
            clock=clock - back,
            last_used=jnp.maximum(last_used - back, 0),
        )

    def keys(self, memory: UtilityMemory, layer: jax.Array) -> jax.Array:
        """[L * E] i32: status, then time of last use."""
        del layer
        status = memory.level
        if self.after_use == "demote":
            to_run = jnp.arange(status.shape[0])[:, None] > memory.layer
            status = jnp.where(to_run | memory.promoted, status, 0)
        return (status * STAMPS + memory.last_used).reshape(-1)

    def levels(self, memory: UtilityMemory) -> jax.Array:
        """[L * E] i32 levels, 0 = cold."""
        return memory.level.reshape(-1)

    def drain(self, memory: UtilityMemory, threshold: jax.Array | int) -> UtilityMemory:
        """Memory after all of a level were taken from the queue, `threshold` or above, at least 1.

        Those that are resident get their status back.
        """
        queued = memory.level >= jnp.maximum(threshold, 1)
        return dataclasses.replace(memory, promoted=memory.promoted | queued)

    def _moved(
        self, level: jax.Array, count: jax.Array, tokens: jax.Array, up: jax.Array | float
    ) -> jax.Array:
        """Levels [E] after a window of so many tokens."""
        rise = count - level >= jnp.maximum(jnp.round(up * tokens / REFERENCE), 1)
        fall = level - count >= self.down
        moved = level + jnp.where(rise, 1, jnp.where(fall, -1, 0))
        return jnp.clip(moved, 0, jnp.minimum(self.cap, MAX_CAP))

    def _calibrated(self, up: jax.Array, level: jax.Array, count: jax.Array) -> jax.Array:
        """The boundary [] of a layer after a window that its levels [E] did not know yet."""
        hot = level > 0
        number = hot.sum(dtype=jnp.int32)
        precision = jnp.where(number > 0, (hot & (count > 0)).sum() / jnp.maximum(number, 1), 1.0)
        return jnp.clip(up + self.rate * (self.target - precision), 1.0, float(REFERENCE))


@pytree
class SoftUtility:
    """Smallest decayed router mass: u = decay * u + the layer's scores, summed over the window.

    Scores are the whole softmax: tokens that do not use an expert count too, which SMoE's windows
    have and MoE-SpAc's counts have not. A window is a step; its tokens weigh the same.
    """

    decay: jax.Array | float = 0.9  # per window, 0 to 1

    def init(self, num_layers: int, num_experts: int) -> jax.Array:
        """[L * E] f32, no mass."""
        return jnp.zeros(num_layers * num_experts, jnp.float32)

    def observe(self, memory: jax.Array, access: Access) -> jax.Array:
        """Let this layer's mass decay and add the window's."""
        start, size = access.layer * access.needed.shape[0], access.needed.shape[0]
        old = jax.lax.dynamic_slice(memory, (start,), (size,))
        # A choice, not a product: scores of padding may be NaN.
        mass = jnp.where(access.valid[:, None], access.scores, 0.0).sum(axis=0)
        new = jnp.where(access.valid.any(), self.decay * old + mass, old)
        return jax.lax.dynamic_update_slice(memory, new, (start,))

    def keys(self, memory: jax.Array, layer: jax.Array) -> jax.Array:
        """[L * E] f32 mass."""
        del layer
        return memory


@pytree
class Work:
    """One layer's window, as the balancer sees it."""

    level: jax.Array  # [E] i32
    tokens: jax.Array  # [E] i32, tokens of the window that use each expert
    needed: jax.Array  # [E] bool
    resident: jax.Array  # [E] bool
    hot: jax.Array  # [MAX_CAP + 2] i32, experts of all layers at each threshold, see `at_least`
    coming: jax.Array  # [MAX_CAP + 2] i32, of those, what would be brought for later layers


@pytree
class Costs:
    """What the balancer counts with, at least 0 and in one unit; infinite or NaN = not there."""

    device: jax.Array | float  # the device's part of a layer, before any token (g0)
    device_token: jax.Array | float  # one token through one expert on the device (g1)
    host: jax.Array | float  # one expert on the host: reading its weights (c0)
    host_token: jax.Array | float  # one token through one expert on the host (c1)
    hidden: jax.Array | float  # hidden states to the host and back, once per layer (T_h)
    load: jax.Array | float  # one expert over the link (t_io)


@pytree
class Balance:
    """The chosen threshold, and the times of every threshold from 0 on, in the unit of the costs.

    Those beyond the cap + 1 are those of the cap + 1.
    """

    threshold: jax.Array  # [] i32
    device: jax.Array  # [MAX_CAP + 2] f32
    host: jax.Array  # [MAX_CAP + 2] f32
    link: jax.Array  # [MAX_CAP + 2] f32


def balance(work: Work, costs: Costs, cap: jax.Array | int, slots: jax.Array | int) -> Balance:
    """The threshold k from 0 to cap + 1 whose slowest resource is done first, by trying each.

    Experts of level k or above are hot. Hot residents run on the device, every other needed expert
    on the host; what is missing is not fetched for this layer. Meanwhile the link brings hot
    experts for later layers. The hot ones of all layers must fit into `slots`; cap + 1, with which
    none is hot, always may be chosen. Ties go to the greater k: fewer transfers.

    The paper does not give its equations. Here `device` and `hidden` are charged even if that side
    gets no expert, a needed expert counts as on the host if it is absent whatever its level, and
    levels beyond the cap count as the cap.

    Source: MoE-SpAc's workload balancer, as reconstructed from its published description.
    """
    threshold = jnp.minimum(jnp.arange(MAX_CAP + 2, dtype=jnp.int32), cap + 1)
    hot = jnp.minimum(work.level, cap) >= threshold[:, None]
    on_device = hot & work.resident & work.needed
    tokens = jnp.where(work.needed, work.tokens, 0)
    device_tokens = jnp.where(on_device, tokens, 0).sum(axis=1)
    host_experts = (work.needed & ~on_device).sum(axis=1)
    device = _times(1, costs.device) + _times(device_tokens, costs.device_token)
    host = _times(host_experts, costs.host) + _times(1, costs.hidden)
    host = host + _times(tokens.sum() - device_tokens, costs.host_token)
    none = threshold > cap
    link = _times(jnp.where(none, 0, work.coming), costs.load)
    allowed = work.hot <= slots
    slowest = jnp.maximum(jnp.maximum(device, host), link)
    least = jnp.where(allowed, slowest, jnp.inf).min()
    best = jnp.where(allowed & (slowest == least), threshold, 0).max()
    return Balance(threshold=best, device=device, host=host, link=link)


def at_least(level: jax.Array, chosen: jax.Array) -> jax.Array:
    """[MAX_CAP + 2] i32 how many of the chosen have each level or a higher one.

    Args:
        level: [M] i32.
        chosen: [M] bool.
    """
    threshold = jnp.arange(MAX_CAP + 2, dtype=jnp.int32)
    reached = (level >= threshold[:, None]).astype(jnp.float32)
    # A product, as XLA's CPU backend does not vectorise the sum; counts below 2**24 are exact.
    return (reached @ chosen.astype(jnp.float32)).astype(jnp.int32)


def _times(number: jax.Array | int, cost: jax.Array | float) -> jax.Array:
    """Cost of so many; nothing costs nothing, even where one is infinite or NaN."""
    cost = jnp.asarray(cost, jnp.float32)
    cost = jnp.where(jnp.isnan(cost), jnp.inf, cost)
    return jnp.where(jnp.asarray(number) > 0, number * cost, 0.0)


def _row(values: jax.Array, layer: jax.Array) -> jax.Array:
    """A layer's part [...] of [L, ...]."""
    return jax.lax.dynamic_index_in_dim(values, layer, keepdims=False)


def _with_row(values: jax.Array, layer: jax.Array, row: jax.Array) -> jax.Array:
    """[L, ...] with a layer's part replaced."""
    return jax.lax.dynamic_update_index_in_dim(values, row, layer, 0)
