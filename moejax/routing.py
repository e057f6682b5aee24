"""Routers: which experts a token uses, with which weights, from scores and residency."""

from typing import Protocol

import jax
import jax.numpy as jnp

from moejax.config import RouterRule
from moejax.state import pytree


@pytree
class Routing:
    """The routing of N tokens in one layer."""

    expert: jax.Array  # [N, K] i32, by rank
    weight: jax.Array  # [N, K] f32
    replaced_mass: jax.Array  # [N] f32, weight of picks that the exact router would not have made


class Router(Protocol):
    """Chooses experts from router scores; lossy routers may look at which are resident."""

    exact: bool

    def route(
        self, rule: RouterRule, top_k: int, scores: jax.Array, resident: jax.Array, valid: jax.Array
    ) -> Routing:
        """Route N tokens.

        Args:
            scores: [N, E] f32 softmax over all experts of the layer.
            resident: [E] bool, logical residency when the layer begins.
            valid: [N] bool, False for padding.
        """
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
    """Mixing weights [N, K] of chosen scores [N, K], renormalised and scaled as the family does."""
    if rule.normalize:
        chosen = chosen / chosen.sum(axis=-1, keepdims=True)
    return chosen * rule.scale


@pytree
class TopK:
    """The family's own top-k router: exact."""

    @property
    def exact(self) -> bool:
        """True: this is the model's routing."""
        return True

    def route(
        self, rule: RouterRule, top_k: int, scores: jax.Array, resident: jax.Array, valid: jax.Array
    ) -> Routing:
        """Best K of the eligible scores, ties to the lower expert."""
        del resident, valid
        chosen, expert = jax.lax.top_k(eligible_scores(rule, scores), top_k)
        return Routing(
            expert=expert.astype(jnp.int32),
            weight=pick_weights(rule, chosen),
            replaced_mass=jnp.zeros(scores.shape[0], jnp.float32),
        )
