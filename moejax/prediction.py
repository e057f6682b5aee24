"""Predictors: which experts a later layer will need; cutoffs: which layers are worth prefetching.

A predictor is asked once per layer with experts, when that layer's routing is known. What it wants
for the layer `horizon` ahead is copied into slots if it is not there, best first, like a miss: into
empty slots, else into those that the evictor gives up first.
"""

from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from moejax.state import pytree, static

# (hidden [N, D], layer) -> scores [N, E] that the router of a layer with experts gives to them
Gate = Callable[[jax.Array, jax.Array], jax.Array]


@pytree
class View:
    """What a predictor sees of one layer with experts in one step."""

    layer: jax.Array  # [] i32
    hidden: jax.Array  # [N, D] f32, residual stream after the layer's attention, before its experts
    scores: jax.Array  # [N, E] f32
    tokens: jax.Array  # [E] i32, how many tokens use each expert
    valid: jax.Array  # [N] bool, False for padding


class Predictor(Protocol):
    """Says what to prefetch."""

    horizon: int  # static: layers ahead, at least 1; 0 = never prefetches

    def init(self, num_layers: int, num_experts: int) -> Any:
        """Memory of a fresh predictor."""
        ...

    def observe(self, memory: Any, view: View) -> Any:
        """Memory after one layer's routing."""
        ...

    def wanted(self, memory: Any, view: View, target: jax.Array, gate: Gate) -> jax.Array:
        """[E] f32 priority of the experts of layer `target`; 0 or less (or NaN) = not wanted."""
        ...


class Cutoff(Protocol):
    """Says for which layers a prefetch can still arrive in time."""

    def allows(self, target: jax.Array) -> jax.Array:
        """[] bool, whether to prefetch for layer `target`."""
        ...


@pytree
class NoPrediction:
    """Prefetches nothing."""

    horizon = 0

    def init(self, num_layers: int, num_experts: int) -> None:
        """Nothing to remember."""
        del num_layers, num_experts

    def observe(self, memory: None, view: View) -> None:
        """Nothing to remember."""
        del memory, view

    def wanted(self, memory: None, view: View, target: jax.Array, gate: Gate) -> jax.Array:
        """No expert."""
        del memory, target, gate
        return jnp.zeros(view.scores.shape[1], jnp.float32)


@pytree
class PreviousToken:
    """The experts that the layer ahead used in the last step, those of most tokens first."""

    limit: jax.Array | int  # experts per layer and step
    horizon: int = static(default=1)

    def init(self, num_layers: int, num_experts: int) -> jax.Array:
        """[L, E] i32 tokens per expert of each layer's last step."""
        return jnp.zeros((num_layers, num_experts), jnp.int32)

    def observe(self, memory: jax.Array, view: View) -> jax.Array:
        """Remember this layer's step."""
        return memory.at[view.layer].set(view.tokens)

    def wanted(self, memory: jax.Array, view: View, target: jax.Array, gate: Gate) -> jax.Array:
        """Tokens that used each expert, for the `limit` most used."""
        del view, gate
        return best(memory[target].astype(jnp.float32), self.limit)


@pytree
class NextGate:
    """The picks of a later layer's router on this layer's hidden state (no attention between).

    Known as gate reuse or speculative loading (Eliseev and Mazur, arXiv 2312.17238, section 3.2).
    """

    limit: jax.Array | int  # experts per layer and step
    horizon: int = static(default=1)

    def init(self, num_layers: int, num_experts: int) -> None:
        """Nothing to remember."""
        del num_layers, num_experts

    def observe(self, memory: None, view: View) -> None:
        """Nothing to remember."""
        del memory, view

    def wanted(self, memory: None, view: View, target: jax.Array, gate: Gate) -> jax.Array:
        """Highest score over the step's tokens, for the `limit` best."""
        del memory
        scores = jnp.where(view.valid[:, None], gate(view.hidden, target), 0.0)
        return best(scores.max(axis=0), self.limit)


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


def best(priority: jax.Array, limit: jax.Array | int) -> jax.Array:
    """Priorities [E] with all but the `limit` greatest set to 0, ties to the lower expert."""
    rank = jnp.argsort(jnp.argsort(-priority, stable=True), stable=True)
    return jnp.where(rank < limit, priority, 0.0)
