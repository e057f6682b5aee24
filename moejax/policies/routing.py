"""Routers: which experts a token uses, with which weights, from scores and residency."""

from typing import Any, Protocol

import jax
import jax.numpy as jnp

from moejax.config import RouterRule
from moejax.state import pytree, static


@pytree
class Scored:
    """What a router sees of one layer in one step; N tokens."""

    layer: jax.Array  # [] i32
    scores: jax.Array  # [N, E] f32 softmax over all experts of the layer
    resident: jax.Array  # [E] bool, logical residency when the layer begins
    valid: jax.Array  # [N] bool, False for padding
    rule: RouterRule = static()
    top_k: int = static()
    prefill: bool = static(default=False)  # many positions of a prompt at once


@pytree
class Routing:
    """The routing of N tokens in one layer."""

    expert: jax.Array  # [N, K] i32, by rank; -1 = a pick that is left out
    weight: jax.Array  # [N, K] f32
    exact: jax.Array  # [N, K] i32, picks of the model's own router
    replaced_mass: jax.Array  # [N] f32, see `displaced`
    low: jax.Array | None = None  # [E] bool, experts to be run from their low-bit copies


class Router(Protocol):
    """Chooses experts from router scores; lossy routers may look at which are resident."""

    exact: bool
    low_bit: bool  # static: some experts may run from low-bit copies

    def init(self, num_layers: int, num_experts: int) -> Any:
        """Memory of a fresh router."""
        ...

    def route(self, memory: Any, seen: Scored) -> tuple[Routing, Any]:
        """Route N tokens; also the memory after them."""
        ...


def eligible_scores(rule: RouterRule, scores: jax.Array) -> jax.Array:
    """Scores with the groups that are out of the running set to 0 (DeepSeek-V2). scores: [N, E]."""
    if rule.num_groups == 1:
        return scores
    tokens, experts = scores.shape
    grouped = scores.reshape(tokens, rule.num_groups, experts // rule.num_groups)
    best = jax.lax.top_k(grouped.max(axis=-1), rule.top_groups)[1]
    kept = (
        jnp.zeros((tokens, rule.num_groups), bool).at[jnp.arange(tokens)[:, None], best].set(True)
    )
    return jnp.where(kept[:, :, None], grouped, 0.0).reshape(tokens, experts)


def pick_weights(rule: RouterRule, chosen: jax.Array) -> jax.Array:
    """Mixing weights [N, K] of chosen scores [N, K], renormalised and scaled as the family does.

    Where all weigh alike, so do those whose score is 0: a softmax rounds small ones to that.
    """
    if rule.equal:
        return jnp.full_like(chosen, rule.scale)
    if rule.normalize:
        chosen = chosen / chosen.sum(axis=-1, keepdims=True)
    return chosen * rule.scale


def displaced(
    exact: jax.Array, exact_weight: jax.Array, expert: jax.Array, weight: jax.Array
) -> jax.Array:
    """[N] f32 router weight that the exact picks lost: sum of max(0, exact weight - weight used).

    All four are [N, K]. It is the whole weight of picks that were replaced or left out, and the
    part taken from those that were attenuated.
    """
    same = exact[:, :, None] == expert[:, None, :]
    used = jnp.where(same, weight[:, None, :], 0.0).sum(axis=-1)
    return jnp.maximum(exact_weight - used, 0.0).sum(axis=-1)


@pytree
class TopK:
    """The family's own top-k router: exact."""

    low_bit = False

    @property
    def exact(self) -> bool:
        """True: this is the model's routing."""
        return True

    def init(self, num_layers: int, num_experts: int) -> None:
        """Nothing to remember."""
        del num_layers, num_experts

    def route(self, memory: Any, seen: Scored) -> tuple[Routing, Any]:
        """Best K of the eligible scores, ties to the lower expert; the memory stays as it is."""
        chosen, expert = jax.lax.top_k(eligible_scores(seen.rule, seen.scores), seen.top_k)
        expert = expert.astype(jnp.int32)
        return Routing(
            expert=expert,
            weight=pick_weights(seen.rule, chosen),
            exact=expert,
            replaced_mass=jnp.zeros(expert.shape[0], jnp.float32),
        ), memory
