"""One price for every decision about a missing expert: milliseconds against loss.

An expert that no token of a step finds on the device is fetched or computed on the host, which
costs time, or replaced for all of them, which costs accuracy. The price says how much of the one
is worth how much of the other.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from moejax.policies.placement import Demand
from moejax.policies.routing import Routing, Scored, TopK, eligible_scores
from moejax.policies.substitution import Lossy, in_prompt, rerouted
from moejax.policies.value import averaged
from moejax.state import array_fields, pytree, static


@pytree
class Costs:
    """Milliseconds of one expert in each place; an infinite (or NaN) cost is a place not there."""

    load: jax.Array | float  # of one record over the link
    host0: jax.Array | float = np.inf  # of one expert on the host, before its first token
    host1: jax.Array | float = 0.0  # of each of its tokens
    device: jax.Array | float = 0.0  # of one expert on the device, whatever its tokens
    # Steps that a record stays useful. An expert's average softmax times these is how often it is
    # expected to be used; the averages of a layer sum to 1, so k is to be a part of it.
    horizon: jax.Array | float = 0.0

    @property
    def has_link(self) -> jax.Array:
        """[] bool."""
        return jnp.asarray(self.load) < jnp.inf

    @property
    def has_host(self) -> jax.Array:
        """[] bool."""
        return self.host(1) < jnp.inf

    def host(self, tokens: jax.Array | int) -> jax.Array:
        """Milliseconds of one expert on the host for a number of tokens, elementwise."""
        return jnp.asarray(self.host0 + self.host1 * tokens, jnp.float32)


@pytree
class _Clocks:
    """When each place is done, in ms from the start of the layer; the device waits for the link."""

    link: jax.Array  # [] f32
    host: jax.Array  # [] f32
    device: jax.Array  # [] f32, at least `link`

    @classmethod
    def start(cls, costs: Costs, residents: jax.Array) -> "_Clocks":
        zero = jnp.float32(0)
        return cls(link=zero, host=zero, device=zero + residents * costs.device)

    @property
    def last(self) -> jax.Array:
        return jnp.maximum(self.host, self.device)

    def fetch(self, costs: Costs) -> "_Clocks":
        link = self.link + jnp.where(costs.has_link, costs.load, 0.0)
        device = jnp.maximum(self.device, link) + costs.device
        return _Clocks(link=link, host=self.host, device=device)

    def compute(self, costs: Costs, tokens: jax.Array) -> "_Clocks":
        time = jnp.where(costs.has_host, costs.host(tokens), 0.0)
        return _Clocks(link=self.link, host=self.host + time, device=self.device)


@pytree
class _Missing:
    """What is missing, by expert."""

    picked: jax.Array  # [N, E] bool, by which tokens
    square: jax.Array  # [N, E] f32, of the weight that they give it, else 0
    tokens: jax.Array  # [E] i32
    saving: jax.Array  # [E] f32, ms of later loads that one now is expected to save


@pytree
class _Candidates:
    """The C experts behind a token's picks, best first: what may stand in."""

    expert: jax.Array  # [N, C] i32
    score: jax.Array  # [N, C] f32
    square: jax.Array  # [N, C] f32, of the weight
    open: jax.Array  # [N, C] bool, resident, with a score above 0


@pytree
class _Progress:
    """Where the walk over the missing experts is."""

    clocks: _Clocks
    open: jax.Array  # [N, C] bool, with those that were kept
    used: jax.Array  # [N, C] bool, stands in for something
    left: jax.Array  # [E] bool, not yet decided
    replaced: jax.Array  # [E] bool


@pytree
class Priced(Lossy):
    """Keeps a missing expert where the loss of replacing it is worth the time that it takes.

    The step's valid tokens are one window. With w the family's router weights (over the sum of the
    model's own picks where the family renormalises, and scaled as it does):

    - loss(e) = kappa[layer] * sum over the tokens t that pick e of w_t(e)^2 + w_t(s_t)^2, where the
      stand-in s_t is the best of t's experts of rank up to reach * k that t does not use and that
      is resident or already kept. It weighs its own score. Infinite if a token has none.
    - fetch(e) = the ms by which a load delays the end of the layer, less the loads it is expected
      to save: average softmax * horizon * load. The average includes this step.
    - host(e) = the same of host0 + host1 * (tokens that pick e), and nothing is saved.

    Experts are taken by the loss that they have at first (without kappa), the greatest first, ties
    to the lower id. One is kept if loss >= alpha * min(fetch, host), with the loss and the clocks
    of that moment; it goes where it costs less, the link when level, and that clock advances. The
    layer ends when the host and the device do. The device starts with the resident experts that
    are picked, and runs what is fetched after it has come; the work of stand-ins counts nothing.
    An expert that is not kept is replaced in all tokens. In a second pass the stand-ins of
    each token are chosen anew, from all that are resident or kept for whomever (SMoE's set C, which
    has been paid for); the best one takes the best rank.

    What costs nothing (hidden behind other work, or saving as much as it takes) is kept whatever
    alpha. The clocks only price: a `Placement` splits what was kept. For one token and no reuse, a
    greater alpha never keeps more experts: the clocks then depend on their number alone. A window
    of several tokens may keep one more. Where alpha or kappa is NaN, the model's own picks stay.

    alpha: loss per millisecond, 1 / lambda, in the unit of loss that kappa gives; 0 = exact. The
    terms can be left out. reuse: the expected saving. critical_path: without it, costs are whole
    durations of load and of host, hidden or not. window: without it, the loss is that of the token
    which loses most. share: without it, only residents stand in, in both passes.
    """

    alpha: jax.Array | float
    costs: Costs
    kappa: jax.Array | None = None  # [L] f32, see `value.fit_kappa`; None = 1 everywhere
    decay: jax.Array | float = 0.9  # of the average softmax
    reach: int = static(default=3)
    reuse: bool = static(default=True)
    critical_path: bool = static(default=True)
    window: bool = static(default=True)
    share: bool = static(default=True)
    prefill: bool = static(default=False)

    def init(self, num_layers: int, num_experts: int) -> jax.Array:
        """[L, E] f32 average softmax: zeros."""
        return jnp.zeros((num_layers, num_experts), jnp.float32)

    def route(self, memory: jax.Array, seen: Scored) -> tuple[Routing, jax.Array]:
        """Top-k with missing experts replaced where that is cheaper; learns from prompts too."""
        rho = averaged(memory[seen.layer], seen.scores, seen.valid, self.decay)
        memory = jax.lax.dynamic_update_index_in_dim(memory, rho, seen.layer, 0)
        k = seen.top_k
        width = min(self.reach * k, seen.scores.shape[1])
        if in_prompt(self, seen) or width <= k:
            return TopK().route(None, seen)[0], memory
        scores = eligible_scores(seen.rule, seen.scores)
        # without the barrier, XLA's CPU backend makes of top_k and the slices below a full sort
        best, order = jax.lax.optimization_barrier(jax.lax.top_k(scores, width))
        order = order.astype(jnp.int32)
        chosen, exact = best[:, :k], order[:, :k]
        total = chosen.sum(axis=-1, keepdims=True) if seen.rule.normalize else 1.0
        square = jnp.square(best / total * seen.rule.scale)
        there = seen.resident[order]
        candidates = _Candidates(
            expert=order[:, k:],
            score=best[:, k:],
            square=square[:, k:],
            open=there[:, k:] & (best[:, k:] > 0),
        )
        absent = ~there[:, :k] & seen.valid[:, None]
        missing = self._missing(exact, absent, square[:, :k], rho)
        hits = jnp.zeros_like(seen.resident).at[exact].max(there[:, :k] & seen.valid[:, None])
        start = _Clocks.start(self.costs, hits.sum(dtype=jnp.int32))
        kappa = 1.0 if self.kappa is None else self.kappa[seen.layer]
        done = self._walk(kappa, missing, candidates, start)
        replaced = absent & done.replaced[exact]
        used = _filled(exact, chosen, replaced, candidates, done.open)
        return rerouted(seen, (exact, chosen), used), memory

    def _missing(
        self, exact: jax.Array, absent: jax.Array, square: jax.Array, rho: jax.Array
    ) -> _Missing:
        """From picks, whether they are missing, and their squared weights, all [N, K]."""
        token = jnp.arange(exact.shape[0])[:, None]
        shape = (exact.shape[0], rho.shape[0])
        picked = jnp.zeros(shape, bool).at[token, exact].set(absent, unique_indices=True)
        squares = jnp.zeros(shape, square.dtype).at[token, exact]
        saved = rho * self.costs.horizon * self.costs.load if self.reuse else jnp.zeros_like(rho)
        return _Missing(
            picked=picked,
            square=squares.set(jnp.where(absent, square, 0.0), unique_indices=True),
            tokens=picked.sum(axis=0, dtype=jnp.int32),
            saving=jnp.where(self.costs.has_link, saved, 0.0),
        )

    def _walk(
        self, kappa: jax.Array | float, missing: _Missing, candidates: _Candidates, clocks: _Clocks
    ) -> _Progress:
        """Decide over all missing experts, one after the other."""
        number = jnp.arange(missing.tokens.shape[0], dtype=jnp.int32)
        _, square, found = _next(candidates.open, candidates.square)
        at_first = self._loss(missing.picked, missing.square, square[:, None], found[:, None])

        def decide(now: _Progress) -> _Progress:
            # not sorted before: the walk is most often short
            at = jnp.argmax(jnp.where(now.left, at_first, -jnp.inf))
            picked, tokens = missing.picked[:, at], missing.tokens[at]
            first, square, found = _next(now.open & ~now.used, candidates.square)
            loss = kappa * self._loss(picked, missing.square[:, at], square, found)
            cost, after = self._cheapest(now.clocks, tokens, missing.saving[at])
            replace = loss < self.alpha * cost
            opened = now.open
            if self.share:
                opened |= (candidates.expert == at) & (candidates.score > 0) & ~replace
            return _Progress(
                clocks=jax.tree.map(lambda a, b: jnp.where(replace, a, b), now.clocks, after),
                open=opened,
                used=now.used | (first & picked[:, None] & replace),
                left=now.left & (number != at),
                replaced=now.replaced | ((number == at) & replace),
            )

        start = _Progress(
            clocks=clocks,
            open=candidates.open,
            used=jnp.zeros_like(candidates.open),
            left=missing.tokens > 0,
            replaced=jnp.zeros(number.shape, bool),
        )
        return jax.lax.while_loop(lambda now: now.left.any(), decide, start)

    def _loss(
        self, picked: jax.Array, own: jax.Array, standin: jax.Array, found: jax.Array
    ) -> jax.Array:
        """Without kappa, over the tokens [N, ...]; infinite where one has no stand-in."""
        terms = jnp.where(picked, jnp.where(found, own + standin, jnp.inf), 0.0)
        return terms.sum(axis=0) if self.window else terms.max(axis=0)

    def _cheapest(
        self, clocks: _Clocks, tokens: jax.Array, saving: jax.Array
    ) -> tuple[jax.Array, _Clocks]:
        """Ms of one expert where it costs least, and the clocks after it."""
        costs = self.costs
        by_link, by_host = clocks.fetch(costs), clocks.compute(costs, tokens)
        if self.critical_path:
            fetch, host = by_link.last - clocks.last, by_host.last - clocks.last
        else:
            fetch, host = costs.load, costs.host(tokens)
        fetch = jnp.where(costs.has_link, fetch - saving, jnp.inf)
        host = jnp.where(costs.has_host, host, jnp.inf)
        cost = jnp.minimum(fetch, host)
        return cost, jax.tree.map(lambda a, b: jnp.where(host < fetch, b, a), by_link, by_host)


def _next(free: jax.Array, square: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The first free one [N, C] of each token, its squared weight [N], and if there is one [N]."""
    number, count = jnp.arange(free.shape[1], dtype=jnp.int32), free.shape[1]
    place = jnp.where(free, number, count).min(axis=-1)
    first = number == place[:, None]
    return first, jnp.where(first, square, 0.0).sum(axis=-1), place < count


def _filled(
    exact: jax.Array,
    chosen: jax.Array,
    replaced: jax.Array,
    candidates: _Candidates,
    opened: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Experts and scores [N, K] with picks replaced, in order, by candidates that are open."""
    k, count = exact.shape[1], candidates.expert.shape[1]
    rank, number = jnp.arange(k), jnp.arange(count)
    turn = (replaced[:, None, :] & (rank[:, None] > rank)).sum(axis=-1, dtype=jnp.int32)
    place = (opened[:, None, :] & (number[:, None] > number)).sum(-1, dtype=jnp.int32)
    takes = opened[:, None, :] & (turn[:, :, None] == place[:, None, :])
    expert = jnp.where(takes, candidates.expert[:, None, :], 0).sum(axis=-1)
    score = jnp.where(takes, candidates.score[:, None, :], 0.0).sum(axis=-1)
    return jnp.where(replaced, expert, exact), jnp.where(replaced, score, chosen)


@pytree
class PricedPlacement:
    """The split of the missing experts with which the layer ends first, by the clocks of `Costs`.

    The link takes the experts of most tokens, then of greatest score, then of lowest id, as many
    as make the end earliest, and the more of them when level: what is fetched may be used again.
    However many are fetched, those of most tokens save the host most, so that no other subset ends
    earlier. The average softmax is not known here, and savings count nothing.

    Infinite (or NaN) costs as in `TwoPointer`.
    """

    uses_host = True

    costs: Costs

    @property
    def load(self) -> jax.Array | float:
        """Of one expert over the link."""
        return self.costs.load

    @property
    def host(self) -> jax.Array:
        """Of one expert on the host, for one token."""
        return self.costs.host(1)

    def fetch(self, demand: Demand) -> jax.Array:
        """[E] the first few of the missing."""
        costs, missing = self.costs, demand.missing
        number = jnp.arange(missing.shape[0], dtype=jnp.int32)

        def end(device: jax.Array, left: jax.Array) -> jax.Array:
            tokens = jnp.where(left, demand.tokens, 0).sum()
            return jnp.maximum(device, left.sum() * costs.host0 + tokens * costs.host1)

        def take(now: tuple) -> tuple:
            clocks, left, _ = now
            most = left & (demand.tokens == jnp.where(left, demand.tokens, 0).max())
            at = jnp.argmax(jnp.where(most, demand.score, -jnp.inf))
            after, fewer = clocks.fetch(costs), left & (number != at)
            # the end falls as the host's work does, then rises with the device's: no need to go on
            better = end(after.device, fewer) <= end(clocks.device, left)
            clocks = jax.tree.map(lambda a, b: jnp.where(better, a, b), after, clocks)
            left = jnp.where(better, fewer, left)
            return clocks, left, better & left.any()

        start = _Clocks.start(costs, demand.hits.sum(dtype=jnp.int32))
        both = costs.has_link & costs.has_host
        done = jax.lax.while_loop(lambda now: now[2], take, (start, missing, both & missing.any()))
        return missing & (~done[1] | ~costs.has_host)

    def with_costs(self, load: jax.Array | float, host: jax.Array | float) -> "PricedPlacement":
        """The same with other costs of an expert over the link, and on the host for one token.

        They may be in another unit: the device's cost keeps its ratio to the link's, and the two
        parts of the host's keep theirs (all is per token if there was no host). Leaves become f32
        scalars; where they were that before, nothing recompiles.
        """
        # On the host, after every step: no arrays are made.
        old = {name: float(getattr(self.costs, name)) for name in array_fields(Costs)}
        load, host = float(load), float(host)
        unit = load / old["load"] if 0 < old["load"] < math.inf and load < math.inf else 1.0
        each = old["host0"] + old["host1"]
        fixed = (old["host0"] / each if 0 < each < math.inf else 0.0) * host
        costs = dataclasses.replace(
            self.costs,
            load=np.float32(load),
            host0=np.float32(fixed),
            host1=np.float32(host - fixed if host < math.inf else 0.0),
            device=np.float32(old["device"] * unit),
        )
        return dataclasses.replace(self, costs=costs)
