"""Foresight: what to bring in for a layer's next run, a whole step or window ahead.

A predictor looks some layers ahead within a step; a foresight looks from one step to the next. It
is asked in every layer of a draft, where drafted tokens pass before they are verified, or in every
layer of a step that has just run. What it wants is given slots: empty ones, else those that the
evictor gives up first, but never those of predicted experts or of the next draft. Over a link its
records move while the link has nothing more urgent to do.
"""

import dataclasses
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from moejax.policies.prediction import MANY, best
from moejax.policies.utility import MAX_CAP, Costs, Work, balance
from moejax.state import pytree, static


@pytree
class Glimpse:
    """What a foresight sees of one layer; N tokens, drafted or of the step that has run."""

    layer: jax.Array  # [] i32
    scores: jax.Array  # [N, E] f32, the layer's gate on these tokens
    chance: jax.Array  # [N] f32, how likely a token's predecessors will all be accepted; else 1
    missed: jax.Array  # [E] bool, needed by the step and not resident; of a draft, none
    resident: jax.Array  # [E] bool
    keys: jax.Array  # [E], of the evictor: who leaves last
    levels: jax.Array | None  # [E] i32, utility levels, of evictors that have them
    work: Work | None  # of the step that has run, for foresights that balance it
    slots: jax.Array  # [] i32, in use
    valid: jax.Array  # [N] bool
    top_k: int = static()
    drafting: bool = static(default=False)

    def expected(self, limit: jax.Array | int) -> jax.Array:
        """[E] f32 greatest chance times score that a token gives, 0 beyond its `limit` best."""
        chosen, expert = jax.lax.top_k(self.scores, self.top_k)
        critical = (jnp.arange(self.top_k) < limit) & self.valid[:, None]
        value = jnp.where(critical, chosen * self.chance[:, None], 0.0)
        return jnp.zeros(self.missed.shape, jnp.float32).at[expert].max(value)


class Foresight(Protocol):
    """Says what to prefetch for the layer's next run."""

    drafts: bool  # static: asked in every layer of a draft
    after: bool  # static: asked in every layer of a step that has run
    gains: bool  # static: only experts that are worth more than the key of who would leave

    def init(self, num_layers: int, num_experts: int) -> Any:
        """Memory of a fresh foresight."""
        ...

    def wanted(self, memory: Any, glimpse: Glimpse) -> tuple[jax.Array, Any]:
        """[E] f32 priority of the layer's experts, 0 or less = not wanted; also the new memory."""
        ...

    def worth(self, glimpse: Glimpse) -> jax.Array:
        """[E] what experts are worth if it `gains`, in the unit of the evictor's keys."""
        ...

    def spent(self, memory: Any, count: jax.Array) -> Any:
        """Memory after `count` [] i32 records were given slots."""
        ...

    def drained(self, evictor: Any, memory: Any) -> Any:
        """The evictor's memory when it is asked: what it keeps from being wanted twice."""
        ...


class _Stateless:
    """A foresight without memory."""

    drafts = False
    after = False
    gains = False

    def init(self, num_layers: int, num_experts: int) -> None:
        """Nothing to remember."""
        del num_layers, num_experts

    def worth(self, glimpse: Glimpse) -> jax.Array:
        """The evictor's keys."""
        return glimpse.keys

    def spent(self, memory: None, count: jax.Array) -> None:
        """Nothing to remember."""
        del memory, count

    def drained(self, evictor: Any, memory: Any) -> Any:
        """As it is."""
        del evictor
        return memory


@pytree
class NoForesight(_Stateless):
    """Brings nothing in."""

    def wanted(self, memory: None, glimpse: Glimpse) -> tuple[jax.Array, None]:
        """No expert."""
        return jnp.zeros(glimpse.missed.shape, jnp.float32), memory


@pytree
class DraftRouting(_Stateless):
    """The best-scoring experts of the layer's gate on every drafted token.

    SP-MoE (arXiv 2510.10302) puts the attention output of a draft model through the target's gate;
    a self-draft passes that gate itself. `limit` experts per token are critical; a priority is the
    greatest score times the chance that the token is still wanted when its turn comes.
    """

    drafts = True

    limit: jax.Array | int = MANY  # experts per layer and token, at most the model's top-k
    # which norm the hidden state of a draft model gets before the gate: "target" or "draft"
    norm: str = static(default="target")

    def wanted(self, memory: None, glimpse: Glimpse) -> tuple[jax.Array, None]:
        """Chance times score, of critical experts."""
        return glimpse.expected(self.limit), memory


@pytree
class Savings:
    """What the link has had time for."""

    records: jax.Array  # [] f32
    layers: jax.Array  # [] f32, L


@pytree
class Promote(_Stateless):
    """Experts that the step had to do without, if they are worth more than who would leave.

    Worth is the evictor's key. The link so works on what the host computed meanwhile (FreeToken,
    arXiv 2608.16157: background promotion). `rate` is how many records the link moves in the time
    of a step: what is saved up, at most `most`, may be spent in any layer.
    """

    after = True
    gains = True

    rate: jax.Array | float = 3.0
    most: jax.Array | float = 8.0

    def with_rate(self, rate: float) -> "Promote":
        """The same at another rate; does not recompile."""
        return dataclasses.replace(self, rate=np.float32(rate))

    def init(self, num_layers: int, num_experts: int) -> Savings:
        """Nothing saved."""
        del num_experts
        return Savings(records=jnp.float32(0), layers=jnp.float32(num_layers))

    def wanted(self, memory: Savings, glimpse: Glimpse) -> tuple[jax.Array, Savings]:
        """One plus the place in the order of keys, of missed experts, as many as there is time."""
        more = self.rate / memory.layers * glimpse.valid.any()
        saved = jnp.minimum(memory.records + more, self.most)
        mine, other = glimpse.keys[:, None], glimpse.keys[None, :]
        order = (other < mine).sum(axis=1)
        priority = jnp.where(glimpse.missed & ~glimpse.resident, 1.0 + order, 0.0)
        memory = dataclasses.replace(memory, records=saved)
        return best(priority, jnp.floor(saved).astype(jnp.int32)), memory

    def spent(self, memory: Savings, count: jax.Array) -> Savings:
        """That much time less."""
        return dataclasses.replace(memory, records=memory.records - count)


@pytree
class Lookahead(Promote):
    """`Promote`, and while drafting what the drafts route to, from the same savings.

    Worth is then the greatest score that a drafted token gives an expert, times the chance that it
    will be kept, or the evictor's key if that is more: for `Value`, whose keys are averages of
    such scores.
    """

    drafts = True

    limit: jax.Array | int = MANY  # experts per layer and token, at most the model's top-k
    norm: str = static(default="target")  # see `DraftRouting`

    def wanted(self, memory: Savings, glimpse: Glimpse) -> tuple[jax.Array, Savings]:
        """In a draft, what it routes to and is absent, as many as there is time."""
        if not glimpse.drafting:
            return Promote.wanted(self, memory, glimpse)
        priority = jnp.where(glimpse.resident, 0.0, glimpse.expected(self.limit))
        return best(priority, jnp.floor(memory.records).astype(jnp.int32)), memory

    def worth(self, glimpse: Glimpse) -> jax.Array:
        """Chance times score, or the key."""
        if not glimpse.drafting:
            return glimpse.keys
        return jnp.maximum(glimpse.keys, glimpse.expected(self.limit))


@pytree
class UtilityQueue(_Stateless):
    """Experts of a utility level of at least `threshold`, the highest level first.

    MoE-SpAc (arXiv 2603.09983): what a window says of the next one. Asked when a layer's window has
    run, so that records move while other layers run and tokens are drafted. The evictor has to
    have levels (`utility.Utility`). With costs, the threshold of each layer is the one by which
    device, host and link are done earliest, but never below the number.
    """

    after = True

    threshold: jax.Array | int = 1
    costs: Costs | None = None  # see `utility.balance`

    def wanted(self, memory: None, glimpse: Glimpse) -> tuple[jax.Array, None]:
        """The level, where it reaches the threshold."""
        level, threshold = glimpse.levels, self.threshold
        if self.costs is not None:
            balanced = balance(glimpse.work, self.costs, MAX_CAP, glimpse.slots)
            threshold = jnp.maximum(threshold, balanced.threshold)
        return jnp.where(level >= threshold, level, 0).astype(jnp.float32), memory

    def drained(self, evictor: Any, memory: Any) -> Any:
        """What is in the queue has its place again, whether it is there or comes now."""
        return evictor.drain(memory, self.threshold)
