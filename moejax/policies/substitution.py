"""Routers that replace missing low-score experts by resident ones (SMoE), and their controls.

All of them share SMoE's score band and differ only in what they do inside it. Their numbers are
leaves: any may be changed without recompiling. Positions of a prompt are routed exactly unless
`prefill` is set, and padding always is.
"""

import jax
import jax.numpy as jnp

from moejax.errors import PolicyError
from moejax.policies.routing import Routing, Scored, TopK, displaced, eligible_scores, pick_weights
from moejax.state import pytree, static


@pytree
class Band:
    """Where the experts of one layer lie relative to S, the (k+1)-th best eligible score."""

    scores: jax.Array  # [N, E] f32 eligible scores
    exact: jax.Array  # [N, K] i32, the model's own picks
    chosen: jax.Array  # [N, K] f32, their scores
    bar: jax.Array  # [N, 1] f32, S; 0 where K = E
    low: jax.Array  # [N, K] bool, picks with S < score < (1 + alpha) S
    missing: jax.Array  # [N, K] bool, low picks that are not present; none of padding
    shared: jax.Array  # [E] bool, C: top-score picks of any token
    present: jax.Array  # [E] bool, resident or in C
    spare: jax.Array  # [N, E] bool, present and not picked, with a score above 0
    standin: jax.Array  # [N, E] bool, spare with (1 - alpha) S < score (<= S)


def score_band(alpha: jax.Array | float, seen: Scored) -> Band:
    """The band of SMoE's Algorithm 1 around each token's (k+1)-th score; see `Band`.

    C is made over all valid tokens before anything is missing. Picks with the score S itself (ties
    across rank k) are neither top nor low: they stay, and do not enter C.

    Source: SMoE, Algorithm 1 and the text around it, in its strict form.
    """
    scores, k = eligible_scores(seen.rule, seen.scores), seen.top_k
    experts = scores.shape[1]
    # without the barrier, XLA's CPU backend makes of top_k and the slices below a full sort
    best, order = jax.lax.optimization_barrier(jax.lax.top_k(scores, min(k + 1, experts)))
    order = order.astype(jnp.int32)
    chosen, exact = best[:, :k], order[:, :k]
    if k < experts:
        bar, first_out = best[:, k:], order[:, k:]
    else:
        bar, first_out = jnp.zeros_like(best[:, :1]), jnp.full_like(order[:, :1], experts)
    top = (1 + alpha) * bar
    shared = ((scores > bar) & (scores >= top) & seen.valid[:, None]).any(axis=0)
    present = seen.resident | shared
    low = (chosen > bar) & (chosen < top)
    # the first expert that is left out is the lowest of those with score S that are
    out = (scores < bar) | ((scores == bar) & (jnp.arange(experts) >= first_out))
    spare = out & present & (scores > 0)
    return Band(
        scores=scores,
        exact=exact,
        chosen=chosen,
        bar=bar,
        low=low,
        missing=low & ~present[exact] & seen.valid[:, None],
        shared=shared,
        present=present,
        spare=spare,
        standin=spare & (scores > (1 - alpha) * bar),
    )


def rerouted(
    seen: Scored, exact: tuple[jax.Array, jax.Array], used: tuple[jax.Array, jax.Array]
) -> Routing:
    """A Routing from the exact and the used (experts, scores), all [N, K].

    A token whose routing did not change has lost nothing, whatever rounding says; one that changed
    and has no score above 0 left gets weights 0.
    """
    changed = ((used[0] != exact[0]) | (used[1] != exact[1])).any(axis=-1)
    nothing = changed & ~(used[1] > 0).any(axis=-1)  # would divide by zero where normalised
    weight = pick_weights(seen.rule, jnp.where(nothing[:, None], 1.0, used[1]))
    weight = jnp.where(nothing[:, None] | (used[0] < 0), 0.0, weight)
    lost = displaced(exact[0], pick_weights(seen.rule, exact[1]), used[0], weight)
    return Routing(
        expert=used[0],
        weight=weight,
        exact=exact[0],
        replaced_mass=jnp.where(changed, lost, 0.0),
    )


def _filled(seen: Scored, band: Band, candidate: jax.Array, key: jax.Array) -> Routing:
    """Missing picks replaced by candidates [N, E] bool, those of the largest key [N, E] f32 first.

    With too few candidates, the missing picks of the lowest rank are the ones replaced.
    """
    best, standin = jax.lax.top_k(jnp.where(candidate, key, -jnp.inf), seen.top_k)
    found = (best > -jnp.inf).sum(axis=-1, keepdims=True)
    rank = jnp.arange(seen.top_k)
    later = rank[:, None] <= rank[None, :]
    from_the_last = (band.missing[:, None, :] & later).sum(axis=-1)
    replaced = band.missing & (from_the_last <= found)
    before = (replaced[:, None, :] & (rank[:, None] > rank[None, :])).sum(axis=-1)
    expert = jnp.where(
        replaced, jnp.take_along_axis(standin.astype(jnp.int32), before, axis=1), band.exact
    )
    score = jnp.take_along_axis(band.scores, expert, axis=1)
    return rerouted(seen, (band.exact, band.chosen), (expert, score))


class Lossy:
    """A router without memory that changes which experts are used, or how much they weigh."""

    low_bit = False

    @property
    def exact(self) -> bool:
        """False: the routing depends on which experts are resident."""
        return False

    def init(self, num_layers: int, num_experts: int) -> None:
        """Nothing to remember."""
        del num_layers, num_experts


def in_prompt(router: Lossy, seen: Scored) -> bool:
    """Whether these are positions of a prompt that `router` is to route exactly (static)."""
    return seen.prefill and not router.prefill


@pytree
class Substitute(Lossy):
    """Replaces missing low-score picks by the best resident experts just below the cut.

    A stand-in takes the rank of the pick it replaces and weighs its own score; the better stand-in
    takes the better rank. The paper leaves open what happens when there are too few: here the
    lowest-scoring missing picks are replaced, the others are fetched. Experts of a group that is
    out of the running are never stand-ins.

    alpha: half the relative width of the band, 0 replaces nothing. variant: "paper", or "released"
    for the published code, which takes stand-ins by ascending id and never those with score S.

    Raises:
        PolicyError: an unknown variant.

    Source: SMoE, arXiv 2508.18983, Algorithm 1.
    """

    alpha: jax.Array | float
    variant: str = static(default="paper")
    prefill: bool = static(default=False)

    def __post_init__(self) -> None:
        if self.variant not in ("paper", "released"):
            raise PolicyError(f"unknown variant {self.variant!r}; known: paper, released")

    def route(self, memory: None, seen: Scored) -> tuple[Routing, None]:
        """Top-k with missing low-score picks replaced."""
        if in_prompt(self, seen):
            return TopK().route(memory, seen)
        band = score_band(self.alpha, seen)
        if self.variant == "paper":
            return _filled(seen, band, band.standin, band.scores), None
        by_id = jnp.broadcast_to(
            -jnp.arange(band.scores.shape[1], dtype=jnp.float32), band.spare.shape
        )
        return _filled(seen, band, band.standin & (band.scores < band.bar), by_id), None


def mixed(word: jax.Array) -> jax.Array:
    """u32 with its bits well mixed: the finaliser of MurmurHash3."""
    word = (word ^ (word >> 16)) * jnp.uint32(0x85EBCA6B)
    word = (word ^ (word >> 13)) * jnp.uint32(0xC2B2AE35)
    return word ^ (word >> 16)


@pytree
class RandomStandIn(Lossy):
    """Replaces what `Substitute` would, by random resident experts whatever their score.

    The draw is a function of seed, layer and the token's scores alone. Stand-ins are distinct and
    weigh their own score, so those with score 0 are not drawn. A control: what is the choice of
    stand-ins by score worth?
    """

    alpha: jax.Array | float
    seed: jax.Array | int = 0
    prefill: bool = static(default=False)

    def route(self, memory: None, seen: Scored) -> tuple[Routing, None]:
        """Top-k with missing low-score picks replaced at random."""
        if in_prompt(self, seen):
            return TopK().route(memory, seen)
        band = score_band(self.alpha, seen)
        odd = 2 * jnp.arange(band.scores.shape[1], dtype=jnp.uint32) + 1
        bits = jax.lax.bitcast_convert_type(seen.scores, jnp.uint32)
        token = mixed(bits * odd).sum(axis=-1, keepdims=True, dtype=jnp.uint32)
        seed = jnp.asarray(self.seed).astype(jnp.uint32)
        start = mixed(mixed(seed) + jnp.asarray(seen.layer).astype(jnp.uint32))
        drawn = mixed(mixed(token ^ start) + odd * jnp.uint32(0x9E3779B1))
        return _filled(seen, band, band.spare, (drawn >> 8).astype(jnp.float32)), None


@pytree
class SkipLow(Lossy):
    """Leaves out the missing low-score picks; the rest weigh as if they were all picks.

    Where the family renormalises, the kept picks sum to 1; elsewhere they keep their weights. A
    token whose picks are all left out has weights 0. A control: the expert skipping that SMoE
    compares with in Table V, in SMoE's own band.
    """

    alpha: jax.Array | float
    prefill: bool = static(default=False)

    def route(self, memory: None, seen: Scored) -> tuple[Routing, None]:
        """Top-k with missing low-score picks at expert -1 and weight 0."""
        if in_prompt(self, seen):
            return TopK().route(memory, seen)
        band = score_band(self.alpha, seen)
        expert = jnp.where(band.missing, -1, band.exact)
        return _attenuated(seen, band, expert, 0.0), None


@pytree
class AttenuateLow(Lossy):
    """Keeps and fetches all picks, but lowers the scores of the missing low-score ones.

    Scores are multiplied by `factor` before the family renormalises: its weights still sum to 1,
    the lowered ones give theirs to the others, and factor 0 weighs like `SkipLow`. Elsewhere the
    weight is lost. A control (SMoE, Table VI): how much of a gain needs no substitution at all?
    """

    alpha: jax.Array | float
    factor: jax.Array | float
    prefill: bool = static(default=False)

    def route(self, memory: None, seen: Scored) -> tuple[Routing, None]:
        """Top-k with smaller weights for missing low-score picks."""
        if in_prompt(self, seen):
            return TopK().route(memory, seen)
        band = score_band(self.alpha, seen)
        return _attenuated(seen, band, band.exact, self.factor), None


def _attenuated(seen: Scored, band: Band, expert: jax.Array, factor: jax.Array | float) -> Routing:
    """Experts [N, K] with the scores of missing picks times factor; rerouted."""
    score = jnp.where(band.missing, band.chosen * factor, band.chosen)
    return rerouted(seen, (band.exact, band.chosen), (expert, score))
