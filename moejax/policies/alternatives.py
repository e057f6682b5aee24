"""Lossy routers of other papers: a boost for resident experts, and low-bit copies for missing ones.

Their numbers are leaves. Positions of a prompt are routed exactly unless `prefill` is set.
"""

import dataclasses

import jax
import jax.numpy as jnp

from moejax.errors import PolicyError
from moejax.policies.routing import Routing, Scored, TopK, eligible_scores, pick_weights
from moejax.policies.substitution import Lossy, in_prompt, rerouted, score_band
from moejax.state import pytree, static

TINY = float(jnp.finfo(jnp.float32).tiny)  # stands for a score of 0 where a logarithm is taken
MOST = 60.0  # largest boost in nats: a score times exp(MOST) stays below 2^KEPT, and finite
KEPT = 126


@pytree
class LogitRange:
    """Running mean of max - min over the logits of each layer, over all valid tokens so far."""

    mean: jax.Array  # [L] f32
    tokens: jax.Array  # [L] i32


@pytree
class CacheBoost(Lossy):
    """Raises the logits of resident experts before the top-k choice.

    A resident expert's logit gets boost times the mean logit range of its layer, this step's
    tokens included, and those of prompts whether they are routed exactly or not. The `keep` best
    of the model's own picks always stay. Weights are the original scores. At most 60 nats are
    added. Ranks: the kept picks by score, then the others by boosted score.

    Source: Mixture of cache-conditional experts, arXiv 2412.00099.
    """

    boost: jax.Array | float
    keep: jax.Array | int = 1
    prefill: bool = static(default=False)

    def init(self, num_layers: int, num_experts: int) -> LogitRange:
        """No token has been seen."""
        del num_experts
        return LogitRange(
            mean=jnp.zeros(num_layers, jnp.float32), tokens=jnp.zeros(num_layers, jnp.int32)
        )

    def _observe(self, memory: LogitRange, seen: Scored) -> LogitRange:
        span = jnp.log(jnp.maximum(seen.scores.max(axis=-1), TINY))
        span = span - jnp.log(jnp.maximum(seen.scores.min(axis=-1), TINY))
        mean = memory.mean[seen.layer]
        tokens = memory.tokens[seen.layer] + seen.valid.sum(dtype=jnp.int32)
        step = jnp.where(seen.valid, span - mean, 0.0).sum() / jnp.maximum(tokens, 1)
        return LogitRange(
            mean=memory.mean.at[seen.layer].set(mean + step),
            tokens=memory.tokens.at[seen.layer].set(tokens),
        )

    def route(self, memory: LogitRange, seen: Scored) -> tuple[Routing, LogitRange]:
        """Top-k of the boosted scores, with the best `keep` as they are."""
        memory = self._observe(memory, seen)
        if in_prompt(self, seen):
            return TopK().route(None, seen)[0], memory
        scores = eligible_scores(seen.rule, seen.scores)
        chosen, exact = jax.lax.top_k(scores, seen.top_k)
        exact = exact.astype(jnp.int32)
        kept = (jnp.arange(seen.top_k) < self.keep) | ~seen.valid[:, None]
        kept = ((exact[:, :, None] == jnp.arange(scores.shape[1])) & kept[:, :, None]).any(axis=1)
        # on scores, not on their logarithms, which round unlike scores to the same number
        factor = jnp.exp(jnp.minimum(self.boost * memory.mean[seen.layer], MOST))
        boosted = jnp.where(seen.resident, scores * factor, scores)
        boosted = jnp.where(kept, scores * 2.0**KEPT, boosted)
        expert = jax.lax.top_k(boosted, seen.top_k)[1].astype(jnp.int32)
        used = (expert, jnp.take_along_axis(scores, expert, axis=1))
        return rerouted(seen, (exact, chosen), used), memory


@pytree
class LowBitFallback(Lossy):
    """Runs missing experts of little weight from their low-bit copies; picks and weights stay.

    An expert is run so if it is not resident and matters little to every valid token that picks
    it. variant "band": a pick matters little in SMoE's band, S < score < (1 + alpha) S. variant
    "share": if the picks before it hold more than the share alpha of the k scores (HOBBIT's T1).
    `replaced_mass` is the weight run at low bits.

    Raises:
        PolicyError: an unknown variant.

    Source: HOBBIT, arXiv 2411.01433 (thresholds); SMoE, Algorithm 1 (band).
    """

    alpha: jax.Array | float
    variant: str = static(default="band")
    prefill: bool = static(default=False)
    low_bit = True

    def __post_init__(self) -> None:
        if self.variant not in ("band", "share"):
            raise PolicyError(f"unknown variant {self.variant!r}; known: band, share")

    def route(self, memory: None, seen: Scored) -> tuple[Routing, None]:
        """Top-k, and the experts that may be run from low-bit copies."""
        experts = jnp.arange(seen.scores.shape[1])
        if in_prompt(self, seen):
            routing = TopK().route(memory, seen)[0]
            return dataclasses.replace(routing, low=jnp.zeros(experts.shape, bool)), None
        band = score_band(self.alpha, seen)
        minor = band.low
        if self.variant == "share":
            rank = jnp.arange(seen.top_k)
            before = jnp.where(rank[:, None] > rank, band.chosen[:, None, :], 0.0).sum(axis=-1)
            minor = before > self.alpha * band.chosen.sum(axis=-1, keepdims=True)
        picked = (band.exact[:, :, None] == experts) & seen.valid[:, None, None]
        wanted = (picked & minor[:, :, None]).any(axis=(0, 1))
        vital = (picked & ~minor[:, :, None]).any(axis=(0, 1))
        low = ~seen.resident & wanted & ~vital
        weight = pick_weights(seen.rule, band.chosen)
        return Routing(
            expert=band.exact,
            weight=weight,
            exact=band.exact,
            replaced_mass=jnp.where(low[band.exact] & seen.valid[:, None], weight, 0.0).sum(
                axis=-1
            ),
            low=low,
        ), None
