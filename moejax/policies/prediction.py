"""Predictors: which experts a later layer will need; cutoffs: which layers are worth prefetching.

A predictor is asked once per layer with experts, when that layer's resident experts have run. What
it wants for the layer `horizon` ahead is copied into slots if it is not there, best first: into
empty slots, else into those that the evictor gives up first, but never into those of experts that
the running layer needs or that were predicted before. Until their layer runs, predicted experts
leave last, at most half of the slots.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from moejax.state import pytree, static


@dataclasses.dataclass(frozen=True)
class Ahead:
    """The layers to come, as a predictor may ask them; targets count layers with experts."""

    # (hidden [N, D], target) -> scores [N, E], 0 for experts of groups that are out
    gate: Callable[[jax.Array, jax.Array], jax.Array]
    input_norm: Callable[[jax.Array, jax.Array], jax.Array]  # (hidden [N, D], target) -> [N, D]
    # (hidden [N, D], KV cache, layer, target) -> hidden after the attention of all layers from the
    # one behind `layer` to `target`, without their experts, and the KV cache. It writes the rows
    # of this step only, which those layers write again before they read them.
    attend: Callable[[jax.Array, Any, jax.Array, jax.Array], tuple[jax.Array, Any]]


@pytree
class View:
    """What a predictor sees of one layer with experts in one step."""

    layer: jax.Array  # [] i32
    hidden: jax.Array  # [N, D] f32, residual stream after the layer's attention, before its experts
    x: jax.Array  # [N, D] f32, its norm: what the experts work on
    shared: jax.Array | None  # [N, D] f32, output of the shared expert
    partial: jax.Array  # [N, D] f32, hidden with the shared and the resident experts added
    ahead: jax.Array | None  # [N, D] f32, partial after the next attention; for those who `attend`
    scores: jax.Array  # [N, E] f32
    tokens: jax.Array  # [E] i32, how many tokens use each expert
    missed: jax.Array  # [] bool, whether the layer had a miss
    resident: jax.Array  # [E] bool, logical residency of the target's experts
    valid: jax.Array  # [N] bool, False for padding
    top_k: int = static()


class Predictor(Protocol):
    """Says what to prefetch."""

    horizon: int  # static: layers ahead, at least 1; 0 = never prefetches
    attends: bool  # static: wants `View.ahead`; not asked during prefill

    def init(self, num_layers: int, num_experts: int) -> Any:
        """Memory of a fresh predictor."""
        ...

    def observe(self, memory: Any, view: View) -> Any:
        """Memory after one layer's routing."""
        ...

    def wanted(self, memory: Any, view: View, target: jax.Array, ahead: Ahead) -> jax.Array:
        """[E] f32 priority of the experts of layer `target`; 0 or less (or NaN) = not wanted."""
        ...


class Cutoff(Protocol):
    """Says for which layers a prefetch can still arrive in time."""

    def allows(self, target: jax.Array) -> jax.Array:
        """[] bool, whether to prefetch for layer `target`."""
        ...


MANY = jnp.iinfo(jnp.int32).max  # a limit that does not limit
EVERY = -1.0  # an alpha with which every expert is a top-score expert


@pytree
class NoPrediction:
    """Prefetches nothing."""

    horizon = 0
    attends = False

    def init(self, num_layers: int, num_experts: int) -> None:
        """Nothing to remember."""
        del num_layers, num_experts

    def observe(self, memory: None, view: View) -> None:
        """Nothing to remember."""
        del memory, view

    def wanted(self, memory: None, view: View, target: jax.Array, ahead: Ahead) -> jax.Array:
        """No expert."""
        del memory, target, ahead
        return jnp.zeros(view.scores.shape[1], jnp.float32)


@pytree
class PreviousToken:
    """The experts that the layer ahead used in the last step, those of most tokens first."""

    limit: jax.Array | int = MANY  # experts per layer and step
    horizon: int = static(default=1)
    attends = False

    def init(self, num_layers: int, num_experts: int) -> jax.Array:
        """[L, E] i32 tokens per expert of each layer's last step."""
        return jnp.zeros((num_layers, num_experts), jnp.int32)

    def observe(self, memory: jax.Array, view: View) -> jax.Array:
        """Remember this layer's step."""
        return memory.at[view.layer].set(view.tokens)

    def wanted(self, memory: jax.Array, view: View, target: jax.Array, ahead: Ahead) -> jax.Array:
        """Tokens that used each expert, for the `limit` most used."""
        del view, ahead
        return best(memory[target].astype(jnp.float32), self.limit)


class _Forgetful:
    """A predictor without memory."""

    attends = False

    def init(self, num_layers: int, num_experts: int) -> None:
        """Nothing to remember."""
        del num_layers, num_experts

    def observe(self, memory: None, view: View) -> None:
        """Nothing to remember."""
        del memory, view


@pytree
class NextGate(_Forgetful):
    """The picks of a later layer's router on this layer's hidden state (no attention between).

    Known as gate reuse or speculative loading (Eliseev and Mazur, arXiv 2312.17238, section 3.2).
    """

    limit: jax.Array | int = MANY  # experts per layer and step
    alpha: jax.Array | float = EVERY  # see `top_scores`
    horizon: int = static(default=1)

    def wanted(self, memory: None, view: View, target: jax.Array, ahead: Ahead) -> jax.Array:
        """Highest score over the step's tokens, for the `limit` best."""
        del memory
        return best(top_scores(ahead.gate(view.hidden, target), view, self.alpha), self.limit)


@pytree
class NextAttention(_Forgetful):
    """The top-score experts of a later layer, from its attention on the partial hidden state.

    SMoE (arXiv 2508.18983): as soon as the shared and the resident experts of a layer have run, the
    next attention reads its KV cache, and its gate follows; experts that are missing are absent
    from the hidden state, and so are those of layers in between when the horizon is beyond one.
    """

    alpha: jax.Array | float = 0.0  # see `top_scores`; as the router's
    limit: jax.Array | int = MANY
    horizon: int = static(default=1)
    attends = True

    def wanted(self, memory: None, view: View, target: jax.Array, ahead: Ahead) -> jax.Array:
        """Highest score over the step's tokens, where it is a top score."""
        del memory
        return best(top_scores(ahead.gate(view.ahead, target), view, self.alpha), self.limit)


@pytree
class NextResidual(_Forgetful):
    """The top-score experts of a later layer, from norms of the residual stream alone.

    What SMoE's released code does instead of attention. As there, with `only_missing` the best
    absent one counts and only if the running layer had a miss.
    """

    alpha: jax.Array | float = 0.0  # see `top_scores`
    limit: jax.Array | int = MANY
    horizon: int = static(default=1)
    only_missing: bool = static(default=False)

    def wanted(self, memory: None, view: View, target: jax.Array, ahead: Ahead) -> jax.Array:
        """Highest score over the step's tokens, where it is a top score."""
        del memory
        hidden = view.hidden + view.x
        if view.shared is not None:
            hidden = hidden + view.shared
        hidden = ahead.input_norm(hidden, target) + hidden
        priority = top_scores(ahead.gate(hidden, target), view, self.alpha)
        if self.only_missing:
            priority = jnp.where(view.missed & ~view.resident, priority, 0.0)
        return best(priority, self.limit)


@pytree
class Everything(_Forgetful):
    """All experts of a later layer: with room for two layers, this is layer streaming."""

    horizon: int = static(default=1)

    def wanted(self, memory: None, view: View, target: jax.Array, ahead: Ahead) -> jax.Array:
        """One for each."""
        del memory, target, ahead
        return jnp.ones(view.scores.shape[1], jnp.float32)


@pytree
class NoCutoff:
    """Every layer may be prefetched."""

    def allows(self, target: jax.Array) -> jax.Array:
        """Always."""
        del target
        return jnp.bool_(True)


@pytree
class LastLayer:
    """Layers up to `last` are prefetched, as in SP-MoE (its L*)."""

    last: jax.Array | int

    def allows(self, target: jax.Array) -> jax.Array:
        """Whether `target` is not beyond the last."""
        return target <= self.last


def top_scores(scores: jax.Array, view: View, alpha: jax.Array | float) -> jax.Array:
    """[E] greatest score over the tokens to whom an expert is a top-score expert, else 0.

    That is, whose score [N, E] is at least (1 + alpha) times the (k + 1)-th greatest (SMoE).
    """
    if view.top_k == scores.shape[1]:
        bound = jnp.zeros((scores.shape[0], 1), scores.dtype)
    else:
        bound = (1 + alpha) * jax.lax.top_k(scores, view.top_k + 1)[0][:, -1:]
    return jnp.where((scores >= bound) & (scores > 0) & view.valid[:, None], scores, 0.0).max(
        axis=0
    )


def best(priority: jax.Array, limit: jax.Array | int) -> jax.Array:
    """Priorities [E] with all but the `limit` greatest set to 0, ties to the lower expert."""
    return jnp.where(ranks(priority) < limit, priority, 0.0)


def ranks(priority: jax.Array) -> jax.Array:
    """[E] i32 position of each expert from the greatest priority down, ties to the lower expert.

    All pairs are compared: for the experts of one layer that is faster than sorting them.
    """
    number = jnp.arange(priority.shape[0])
    # NaN is not wanted: it comes last.
    priority = jnp.where(jnp.isnan(priority), -jnp.inf, priority)
    mine, other = priority[:, None], priority[None, :]
    before = (other > mine) | ((other == mine) & (number[None, :] < number[:, None]))
    return before.sum(axis=1, dtype=jnp.int32)


def in_order(rank: jax.Array) -> jax.Array:
    """[E] i32 the experts from rank 0 on."""
    number = jnp.arange(rank.shape[0], dtype=jnp.int32)
    return jnp.where(rank[None, :] == number[:, None], number[None, :], 0).sum(axis=1)


def first(chosen: jax.Array, rank: jax.Array, count: jax.Array) -> jax.Array:
    """[E] the `count` of the chosen that have the lowest ranks."""
    before = (chosen[None, :] & (rank[None, :] < rank[:, None])).sum(axis=1)
    return chosen & (before < count)
