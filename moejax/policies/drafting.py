"""Routers of a self-draft: only resident experts run, nothing is moved, and verification repairs.

None ever returns an expert that is not resident, but for `AllLowBits`. A pick that cannot be had is
left out (expert -1, weight 0), and so is all of padding. Two picks of a token that end at the same
expert become one: their scores add up in the better rank, the other pick is left out. Mixing
weights are those that the family's rule gives the scores that are left: where it renormalises, they
sum to 1. Of the model's k picks the best `picks` count. All numbers are leaves, and prompts are
routed like other tokens.

With everything resident and all picks counted, each gives the bits of `routing.TopK`.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from moejax.errors import PolicyError
from moejax.policies.alternatives import MOST, TINY
from moejax.policies.prediction import MANY
from moejax.policies.routing import Routing, Scored, eligible_scores
from moejax.policies.substitution import Lossy, Substitute, mixed, rerouted
from moejax.state import pytree, static

Picks = tuple[jax.Array, jax.Array]  # experts [N, K] i32 by rank, and their scores [N, K] f32


def _own_picks(seen: Scored) -> Picks:
    """The model's own picks, whatever is resident."""
    best = jax.lax.top_k(eligible_scores(seen.rule, seen.scores), seen.top_k)
    # without the barrier, XLA's CPU backend makes of top_k and a slice of it a full sort
    score, expert = jax.lax.optimization_barrier(best)
    return expert.astype(jnp.int32), score


def _counted(picks: jax.Array | int, seen: Scored) -> jax.Array:
    """[N, K] bool, the picks that count: the best `picks` of each token that is no padding."""
    return (jnp.arange(seen.top_k) < picks) & seen.valid[:, None]


def _kept(seen: Scored, exact: Picks, used: Picks, kept: jax.Array) -> Routing:
    """The used picks, less those that are not kept [N, K] bool; padding has lost nothing."""
    used = jnp.where(kept, used[0], -1), jnp.where(kept, used[1], 0.0)
    routing = rerouted(seen, exact, used)
    return dataclasses.replace(
        routing,
        weight=jnp.where(kept, routing.weight, 0.0),  # NaN where a kept score is
        replaced_mass=jnp.where(seen.valid, routing.replaced_mass, 0.0),
    )


def _replaced(
    seen: Scored, exact: Picks, standin: jax.Array, counted: jax.Array, own: bool
) -> Routing:
    """Missing picks replaced by resident experts [N, K], -1 = there is none; duplicates merged."""
    there = seen.resident[exact[0]]
    expert, score = jnp.where(there, exact[0], standin), exact[1]
    if own:
        drawn = jnp.take_along_axis(seen.scores, jnp.maximum(expert, 0), axis=1)
        score = jnp.where(there, score, drawn)
    counted = counted & (expert >= 0)
    same = (expert[:, :, None] == expert[:, None, :]) & counted[:, None, :]
    rank = jnp.arange(seen.top_k)
    again = (same & (rank[None, :] < rank[:, None])).any(axis=-1)
    total = jnp.where(same, score[:, None, :], 0.0).sum(axis=-1)
    return _kept(seen, exact, (expert, total), counted & ~again)


@pytree
class NearestResident(Lossy):
    """Replaces each missing pick by the resident expert whose weights are nearest to its own.

    Ties go to the lower expert. A resident at a distance of NaN or infinity never stands in.

    distance: [L, E, E] f32, L2 between weights (`distances.distances_of`); None = still to be
    filled in. weights: "inherit" gives a stand-in the score of the pick that it replaces, "own" its
    own score over all experts, counted once for every pick that ends at it.

    Raises:
        PolicyError: other weights, or routing without distances.

    Source: SpecMoE, arXiv 2604.10152; that a stand-in inherits is a reimplementation's choice.
    """

    distance: jax.Array | None = None
    picks: jax.Array | int = MANY
    weights: str = static(default="inherit")

    def __post_init__(self) -> None:
        if self.weights not in ("inherit", "own"):
            raise PolicyError(f"unknown weights {self.weights!r}; known: inherit, own")

    def route(self, memory: None, seen: Scored) -> tuple[Routing, None]:
        """Top-k with missing picks replaced by the nearest residents."""
        if self.distance is None:
            raise PolicyError("the nearest resident is known by distances: see distances_of")
        exact, experts = _own_picks(seen), seen.scores.shape[1]
        away = self.distance[seen.layer, exact[0]]
        away = jnp.where(seen.resident & (away < jnp.inf), away, jnp.inf)
        least = away.min(axis=-1, keepdims=True)
        nearest = jnp.where(away == least, jnp.arange(experts, dtype=jnp.int32), experts)
        standin = jnp.where(least[:, :, 0] < jnp.inf, nearest.min(axis=-1), -1)
        counted = _counted(self.picks, seen)
        return _replaced(seen, exact, standin, counted, self.weights == "own"), None


@pytree
class RandomResident(Lossy):
    """Replaces each missing pick by a random resident expert, which inherits its score.

    All residents are equally likely, picked or not. The draw is a function of seed, layer, the
    token's scores and the missing expert. A control: what is the choice by distance worth?
    """

    seed: jax.Array | int = 0
    picks: jax.Array | int = MANY

    def route(self, memory: None, seen: Scored) -> tuple[Routing, None]:
        """Top-k with missing picks replaced at random."""
        exact = _own_picks(seen)
        number = jnp.arange(seen.scores.shape[1], dtype=jnp.int32)
        odd = 2 * number.astype(jnp.uint32) + 1
        bits = jax.lax.bitcast_convert_type(seen.scores, jnp.uint32)
        token = mixed(bits * odd).sum(axis=-1, keepdims=True, dtype=jnp.uint32)
        seed = jnp.asarray(self.seed).astype(jnp.uint32)
        start = mixed(mixed(seed) + jnp.asarray(seen.layer).astype(jnp.uint32))
        pick = (2 * exact[0].astype(jnp.uint32) + 1) * jnp.uint32(0x9E3779B1)
        drawn = mixed(mixed(token ^ start) + pick)
        count = seen.resident.sum(dtype=jnp.uint32)
        place = (drawn % jnp.maximum(count, 1)).astype(jnp.int32)
        before = (seen.resident & (number < number[:, None])).sum(axis=-1, dtype=jnp.int32)
        chosen = seen.resident & (before == place[:, :, None])
        standin = jnp.where(chosen, number, 0).sum(axis=-1)
        standin = jnp.where(count > 0, standin, -1)
        return _replaced(seen, exact, standin, _counted(self.picks, seen), own=False), None


@pytree
class SkipMissing(Lossy):
    """Leaves out missing picks."""

    picks: jax.Array | int = MANY

    def route(self, memory: None, seen: Scored) -> tuple[Routing, None]:
        """The resident ones of the top-k."""
        exact = _own_picks(seen)
        kept = _counted(self.picks, seen) & seen.resident[exact[0]]
        return _kept(seen, exact, exact, kept), None


@pytree
class BandThenSkip(Lossy):
    """Replaces missing picks in SMoE's band as `substitution.Substitute` does, then skips the rest.

    Every token by itself: what another one must have is not fetched for it here, so it is no
    stand-in. Those are dealt out as for all k picks, whatever `picks` is.
    """

    alpha: jax.Array | float
    picks: jax.Array | int = MANY

    def route(self, memory: None, seen: Scored) -> tuple[Routing, None]:
        """Top-k with missing low-score picks replaced and other missing ones left out."""
        rule = Substitute(alpha=self.alpha, prefill=True)

        def alone(scores: jax.Array, valid: jax.Array) -> tuple[jax.Array, jax.Array]:
            token = dataclasses.replace(seen, scores=scores[None], valid=valid[None])
            routing = rule.route(None, token)[0]
            return routing.exact[0], routing.expert[0]

        exact, expert = jax.vmap(alone)(seen.scores, seen.valid)
        scores = eligible_scores(seen.rule, seen.scores)
        exact = exact, jnp.take_along_axis(scores, exact, axis=1)
        used = expert, jnp.take_along_axis(scores, expert, axis=1)
        kept = _counted(self.picks, seen) & seen.resident[expert]
        return _kept(seen, exact, used, kept), None


@pytree
class GatedBias(Lossy):
    """Raises the logits of resident experts when many picks are missing, then skips the rest.

    For a token that misses the share m of its picks, the gate is (m - low) / (high - low), within 0
    and 1, and residents get strength * gate * (0.2 + 0.8 * entropy) nats, at most 60, where entropy
    is that of the token's scores over its maximum, log E. The model's best pick stays a pick even
    where it is missing. Ranks: the best pick, then the others by raised score.

    reach: only the router's best reach * k experts are raised; 0 = all.

    Source: nano-vLLM-moe's draft rerouting study, its rule Alg2_v2.
    """

    low: jax.Array | float = 0.25
    high: jax.Array | float = 0.5
    strength: jax.Array | float = 4.0
    reach: jax.Array | int = 0
    picks: jax.Array | int = MANY

    def _raised(self, seen: Scored, exact: jax.Array, scores: jax.Array) -> jax.Array:
        """[N, E] scores with those of residents raised."""
        counted = _counted(self.picks, seen)
        missing = (counted & ~seen.resident[exact]).sum(axis=-1, keepdims=True)
        share = missing / jnp.clip(self.picks, 1, seen.top_k)
        gate = jnp.clip((share - self.low) / jnp.maximum(self.high - self.low, TINY), 0, 1)
        entropy = -(seen.scores * jnp.log(jnp.maximum(seen.scores, TINY))).sum(-1, keepdims=True)
        entropy = jnp.clip(entropy / math.log(scores.shape[1]), 0, 1)
        nats = self.strength * gate * (0.2 + 0.8 * entropy)
        # on scores, not on their logarithms, which round unlike scores to the same number
        raised = scores * jnp.exp(jnp.minimum(nats, MOST))
        return jnp.where(seen.resident & self._reached(seen, scores), raised, scores)

    def _reached(self, seen: Scored, scores: jax.Array) -> jax.Array:
        """[N, E] bool, the best reach * k experts of each token, ties to the lower expert."""
        number = jnp.arange(scores.shape[1])
        within = jnp.asarray(self.reach * seen.top_k)

        def some() -> jax.Array:
            mine, other = scores[:, None, :], scores[:, :, None]
            before = (other > mine) | ((other == mine) & (number[:, None] < number))
            return before.sum(axis=1, dtype=jnp.int32) < within

        return jax.lax.cond(within > 0, some, lambda: jnp.ones(scores.shape, bool))

    def route(self, memory: None, seen: Scored) -> tuple[Routing, None]:
        """Top-k of the raised scores, less what is missing."""
        exact = _own_picks(seen)
        scores = eligible_scores(seen.rule, seen.scores)
        raised = self._raised(seen, exact[0], scores)
        best = jnp.arange(scores.shape[1]) == exact[0][:, :1]
        expert = jax.lax.top_k(jnp.where(best, jnp.inf, raised), seen.top_k)[1].astype(jnp.int32)
        used = expert, jnp.take_along_axis(scores, expert, axis=1)
        kept = _counted(self.picks, seen) & seen.resident[expert]
        return _kept(seen, exact, used, kept), None


@pytree
class AllLowBits(Lossy):
    """The model's own picks, all run from their low-bit copies, whatever is resident.

    `replaced_mass` counts picks that do not count, not the loss of bits.

    Source: MoE-SpeQ, arXiv 2511.14102.
    """

    low_bit = True

    picks: jax.Array | int = MANY

    def route(self, memory: None, seen: Scored) -> tuple[Routing, None]:
        """Top-k, and every expert of the layer as low."""
        exact = _own_picks(seen)
        routing = _kept(seen, exact, exact, _counted(self.picks, seen))
        return dataclasses.replace(routing, low=jnp.ones(seen.scores.shape[1], bool)), None
