"""What experts are worth: a place on the device by average softmax, a weight by its loss."""

import jax
import jax.numpy as jnp
import numpy as np

from moejax.config import RouterRule
from moejax.errors import InputError
from moejax.policies.eviction import Access
from moejax.policies.routing import eligible_scores
from moejax.state import pytree

SWEEPS = 10_000  # at most, of a fit


def averaged(
    old: jax.Array, scores: jax.Array, valid: jax.Array, decay: jax.Array | float
) -> jax.Array:
    """[E] decay * old + (1 - decay) * mean of scores [N, E] over the valid [N] of the tokens.

    Without a valid token, old as it is.
    """
    count = valid.sum(dtype=jnp.int32)
    total = jnp.where(valid[:, None], scores, 0.0).sum(axis=0)
    new = decay * old + (1 - decay) * (total / jnp.maximum(count, 1))
    return jnp.where(count > 0, new, old)


@pytree
class Value:
    """Smallest moving average of the router's softmax, over all experts, first.

    The value of a resident expert is the chance of its next use times what a miss would cost. That
    cost is the same for all, so the order is that of the chance, for which the average stands. It
    starts at 0. In an order without sorts, this is `ScoreEMA` of all experts.
    """

    decay: jax.Array | float  # [] f32, 0 to 1

    def init(self, num_layers: int, num_experts: int) -> jax.Array:
        """[L * E] f32 zeros."""
        return jnp.zeros(num_layers * num_experts, jnp.float32)

    def observe(self, memory: jax.Array, access: Access) -> jax.Array:
        """Average in this layer's scores."""
        experts = access.scores.shape[1]
        start = access.layer * experts
        old = jax.lax.dynamic_slice(memory, (start,), (experts,))
        new = averaged(old, access.scores, access.valid, self.decay)
        return jax.lax.dynamic_update_slice(memory, new, (start,))

    def keys(self, memory: jax.Array, layer: jax.Array) -> jax.Array:
        """[L * E] f32 averages."""
        del layer
        return memory


def replaced_terms(rule: RouterRule, scores: jax.Array, picks: jax.Array, top_k: int) -> jax.Array:
    """[L] f32 sums of w(e)^2 + w(s)^2 over experts left out and stand-ins, in every layer.

    Args:
        rule: of the model's router, which says what a score weighs.
        scores: [L, N, E] f32, the router's.
        picks: [L, N, K] i32, what was used instead of the best; -1 = no token.
    """
    layers, tokens, experts = scores.shape
    eligible = jax.vmap(lambda own: eligible_scores(rule, own))(scores)
    best, exact = jax.lax.top_k(eligible, top_k)
    total = best.sum(axis=-1, keepdims=True) if rule.normalize else 1.0
    weight = jnp.ones_like(scores) * rule.scale if rule.equal else scores / total * rule.scale
    place = jnp.arange(layers)[:, None, None], jnp.arange(tokens)[:, None]
    none = jnp.zeros((layers, tokens, experts + 1), bool)
    used = none.at[*place, jnp.where(picks < 0, experts, picks)].set(True)[..., :experts]
    own = none.at[*place, exact].set(True)[..., :experts] & (picks[..., :1] >= 0)
    return jnp.where(used != own, jnp.square(weight), 0.0).sum(axis=(1, 2))


def fit_kappa(kl: np.ndarray, terms: np.ndarray, shrink: float = 0.0) -> np.ndarray:
    """What a squared weight costs in each layer: least squares of kl over terms, none negative.

    Args:
        kl: [S] of S steps, in the unit that the loss is to have.
        terms: [S, L] the sums of w(e)^2 + w(s)^2 over what a step replaced, per layer.
        shrink: pulls towards the one kappa that fits all layers best; a kappa of 0, which says
            that replacing is free, is often no more than noise. 0 = plain least squares, 1 = as if
            every layer's terms had been seen once more with that kappa.

    Returns:
        [L] f32. A layer without a term gets the kappa that fits all layers best.

    Raises:
        InputError: other shapes, no steps, numbers that are not finite, or a negative shrink.
    """
    kl, terms = np.asarray(kl, np.float64), np.asarray(terms, np.float64)
    fits = terms.ndim == 2 and kl.shape == terms.shape[:1] and terms.size > 0
    if not (fits and np.isfinite(kl).all() and np.isfinite(terms).all() and shrink >= 0):
        raise InputError(
            f"kappa is fitted to finite kl [S] and terms [S, L], S and L at least 1, with shrink "
            f"at least 0, not {kl.shape}, {terms.shape} and {shrink}"
        )
    total = terms.sum(axis=1)
    common = max(0.0, float(kl @ total) / (float(total @ total) or 1.0))
    gram, right = terms.T @ terms, terms.T @ kl
    size = gram.diagonal().copy()
    gram = gram + np.diag(shrink * size)
    right = right + shrink * size * common
    kappa = np.full(terms.shape[1], common)
    seen = np.flatnonzero(size > 0)
    scale = gram.diagonal()
    for _ in range(SWEEPS):  # coordinate descent: the function is convex, its bounds separate
        before = kappa.copy()
        for layer in seen:
            step = (right[layer] - gram[layer] @ kappa) / scale[layer]
            kappa[layer] = max(0.0, kappa[layer] + step)
        if np.abs(kappa - before).max() <= 1e-9 * max(np.abs(kappa).max(), common):
            break
    return kappa.astype(np.float32)
