"""Replay of traces through the engine's own code: routing, tables, eviction, placement, prefetch.

What `experts.apply` does in every layer happens here too, but for the weights: the supply moves no
record and computes no expert. So hits, misses and evictions are those of a real run on the same
picks. A pass that has no token is left out, and so are drafts, which change no table.
"""

import concurrent.futures
import dataclasses
import functools
import os
from collections.abc import Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moejax import experts
from moejax.config import RouterRule
from moejax.errors import PolicyError
from moejax.live import with_learned
from moejax.policies import evictors
from moejax.policies import residency as tables
from moejax.policies.eviction import LRU
from moejax.policies.policy import Policy
from moejax.policies.prediction import Ahead
from moejax.policies.routing import Routing, Scored, eligible_scores
from moejax.simulator.bookkeeping import Tables
from moejax.simulator.tape import Passes, Rows, Tape
from moejax.state import ExpertCache, ExpertStore, Residency

COUNTS = (
    *("needed", "hits", "fetched", "prefetched", "host", "low", "passes"),
    *("exact_needed", "exact_hits", "replaced", "predicted", "predicted_right", "prefetch_used"),
)
# Beside those: owners that lost their slot; router weight lost; tokens whose picks are not those
# that were recorded; tables that contradict themselves or the layer's needs (if asked to look).
MORE = ("evicted", "replaced_mass", "differing", "broken")
TOGETHER = 64  # configurations of one batched program
# Evictors for which what other layers do never changes the order within a layer.
SEPARABLE = (
    LRU,
    evictors.LFU,
    evictors.DecayedLFU,
    evictors.ClassLRU,
    evictors.ScoreEMA,
    evictors.ScoreWindow,
    evictors.LeastStale,
)


@dataclasses.dataclass(frozen=True)
class Setting:
    """What a program is compiled for."""

    experts: int  # E
    rule: RouterRule = RouterRule(normalize=True)
    recorded: bool = False  # routers make the recorded picks, whatever they would have chosen
    keep: bool = False  # what was resident when each layer began, [C, T, L, E]
    check: bool = False  # the tables' invariants
    wide: bool = False  # many small tables at once, see `Tables`


def separable(policy: Policy) -> bool:
    """Whether layers with slots of their own can be replayed one by one."""
    exact = policy.exact and policy.router.init(1, 1) is None
    return exact and not policy.looks_ahead and isinstance(policy.evictor, SEPARABLE)


def run(
    tapes: Passes,
    policies: Sequence[Policy],
    slots: int,
    setting: Setting,
    *,
    per_layer: bool = False,
    start: np.ndarray | None = None,
    only: Collection[str] | None = None,
) -> dict[str, np.ndarray]:
    """Counts [C, T, L] of C policies of one structure, by name; see COUNTS and MORE.

    Args:
        slots: S of the tables; each policy uses the first `capacity` of them.
        per_layer: whether slots are divided among the layers: slot s is of layer s % L.
        start: [S] i32 owners when it begins, -1 = empty; default all.
        only: the counts to return; default all.

    Raises:
        PolicyError: policies that differ in more than their numbers.
    """
    layers = tapes.layers
    stacked = _stacked(policies)
    even = not (np.asarray(stacked.capacity) % layers).any()
    if per_layer and even and start is None and not setting.keep and separable(policies[0]):
        alone = dataclasses.replace(stacked, capacity=stacked.capacity // layers)
        wide = dataclasses.replace(setting, wide=True)
        empty = tables.empty(setting.experts, -(-slots // layers))
        found = _in_batches(_by_layer, alone, empty, tapes, wide, only)
        return {name: x[:, :, :, 0].swapaxes(1, 2) for name, x in found.items()}
    residency = tables.empty(layers * setting.experts, slots, layers=layers if per_layer else 0)
    if start is not None:
        residency = seated(residency, start)
    return _in_batches(_in_turn, stacked, residency, tapes, setting, only)


def seated(residency: Residency, owner: np.ndarray) -> Residency:
    """The tables with the given owners [S] of the slots."""
    slot_of = np.full(residency.slot_of.shape, -1, np.int32)
    slot_of[owner[owner >= 0]] = np.flatnonzero(owner >= 0)
    return dataclasses.replace(
        residency, slot_of=jnp.asarray(slot_of), owner=jnp.asarray(owner, jnp.int32)
    )


def _stacked(policies: Sequence[Policy]) -> Policy:
    """Policies as one whose leaves have a leading axis."""
    try:
        return jax.tree.map(lambda *leaves: jnp.stack([jnp.asarray(x) for x in leaves]), *policies)
    except (ValueError, TypeError):
        raise PolicyError(
            "policies of one replay differ in their numbers only: replay these in turn"
        ) from None


def _in_batches(
    program: Any,
    stacked: Policy,
    residency: Residency,
    tapes: Passes,
    setting: Setting,
    only: Collection[str] | None,
) -> dict[str, np.ndarray]:
    number = len(stacked.capacity)
    size = min(TOGETHER, number)

    def batch(begin: int) -> dict[str, np.ndarray]:
        # The last batch is filled up: another size would compile anew.
        at = np.minimum(np.arange(begin, begin + size), number - 1)
        own = jax.tree.map(lambda leaf: leaf[at], stacked)
        made = _in_chunks(program, own, residency, tapes, setting, only)
        return {name: x[: number - begin] for name, x in made.items()}

    # The first one compiles. A program of many small steps keeps one core busy, no more.
    found = [batch(0)]
    if number <= size:
        return found[0]
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count() or 1) as workers:
        found += workers.map(batch, range(size, number, size))
    return {name: np.concatenate([part[name] for part in found]) for name in found[0]}


def _in_chunks(
    program: Any,
    policies: Policy,
    residency: Residency,
    tapes: Passes,
    setting: Setting,
    only: Collection[str] | None,
) -> dict[str, np.ndarray]:
    """Counts of a program that goes on from tape to tape."""
    state, found, begin = None, {}, 0
    by_layer = program is _by_layer
    for tape in tapes:
        length = len(tape.place)
        if state is None:
            state = _begun(policies, residency, tapes.layers, setting, by_layer=by_layer)
        state, made = program(policies, state, tape, setting)
        axis = 2 if by_layer else 1
        for name in made if only is None else only:
            counts = np.asarray(made[name]).swapaxes(0, axis)
            if name not in found:  # filled tape by tape: parts to be joined would be there twice
                found[name] = np.empty((tapes.passes, *counts.shape[1:]), counts.dtype)
            found[name][begin : begin + length] = counts[: tapes.passes - begin]
        begin += length
    found = {name: counts.swapaxes(0, axis) for name, counts in found.items()}
    return found


@functools.partial(jax.jit, static_argnames=("layers", "setting", "by_layer"))
def _begun(
    policies: Policy, residency: Residency, layers: int, setting: Setting, *, by_layer: bool
) -> tuple:
    """Tables and memories [C, ...] of policies, or [C, L, ...] of layers that stand alone."""

    def one(policy: Policy) -> tuple:
        cache = ExpertCache(pool=jnp.zeros((0, 0), jnp.uint8), residency=residency)
        return cache, policy.init(1 if by_layer else layers, setting.experts)

    def each(policy: Policy) -> tuple:
        return jax.vmap(lambda _: one(policy))(jnp.arange(layers)) if by_layer else one(policy)

    return jax.vmap(each)(policies)


@functools.partial(jax.jit, static_argnames=("setting",))
def _in_turn(policies: Policy, states: tuple, tape: Tape, setting: Setting) -> tuple:
    # Not `vmap`: its loops would copy the tables of all experts for each slot that is filled.
    def one(at: tuple) -> tuple:
        return _replay(*at, tape, setting)

    if len(policies.capacity) > 1:
        return jax.lax.map(one, (policies, states))
    alone = one(jax.tree.map(lambda leaf: leaf[0], (policies, states)))
    return jax.tree.map(lambda leaf: leaf[None], alone)


@functools.partial(jax.jit, static_argnames=("setting",))
def _by_layer(policies: Policy, states: tuple, tape: Tape, setting: Setting) -> tuple:
    """States, and counts [C, L, T, 1]: every layer is a model of one layer."""

    def spread(rows: Rows, move: Any) -> Rows:
        parts = {name: getattr(rows, name) for name in ("picks", "exact", "scores")}
        moved = {name: None if x is None else move(x) for name, x in parts.items()}
        return dataclasses.replace(rows, **moved)

    alone = {
        name: spread(getattr(tape, name), lambda x: x.swapaxes(0, 1)[:, :, None])
        for name in ("prompts", "steps")
    }
    axes = {
        name: dataclasses.replace(spread(rows, lambda _: 0), valid=None)
        for name, rows in alone.items()
    }
    kinds = Tape(**axes, is_prompt=None, place=None)
    tape = dataclasses.replace(tape, **alone)

    def layer(policy: Policy, state: tuple, tape: Tape) -> tuple:
        return _replay(policy, state, tape, setting)

    layers = jax.vmap(layer, in_axes=(None, 0, kinds))
    return jax.vmap(layers, in_axes=(0, 0, None))(policies, states, tape)


def _replay(policy: Policy, state: tuple, tape: Tape, setting: Setting) -> tuple:
    """The cache and the memory after the tape, and counts [T, L] by name."""

    def one(carry: tuple, at: tuple) -> tuple:
        is_prompt, place, learned = at
        own = policy if learned is None else with_learned(policy, learned)

        def kind(rows: Rows, prompt: bool) -> Any:
            def go(carry: tuple) -> tuple:
                part = jax.tree.map(
                    lambda x: jax.lax.dynamic_index_in_dim(x, place, keepdims=False), rows
                )
                return _pass(own, carry, part, prompt, setting)

            return go

        kinds = (kind(tape.prompts, True), kind(tape.steps, False))
        carry, counts = jax.lax.cond(is_prompt, *kinds, carry)
        return carry, counts

    return jax.lax.scan(one, state, (tape.is_prompt, tape.place, tape.learned))


def _pass(policy: Policy, carry: tuple, rows: Rows, prompt: bool, setting: Setting) -> tuple:
    """All layers of one pass."""

    def one(carry: tuple, at: tuple) -> tuple:
        return _layer(policy, carry, at, rows, prompt, setting)

    index = jnp.arange(rows.picks.shape[0], dtype=jnp.int32)
    return jax.lax.scan(one, carry, (index, rows.picks, rows.exact, rows.scores))


def _layer(
    policy: Policy, carry: tuple, at: tuple, rows: Rows, prompt: bool, setting: Setting
) -> tuple:
    (cache, memory), (index, picks, exact, scores) = carry, at
    tokens, valid = picks.shape[0], rows.valid
    if scores is None:  # no part of the policy reads them
        scores = jnp.zeros((tokens, setting.experts), jnp.float32)
    routing = _recorded(picks, exact)
    if not (policy.router.exact or setting.recorded):
        seen = Scored(
            layer=index,
            scores=scores,
            resident=experts.resident(policy, cache, index, setting.experts),
            valid=valid,
            rule=setting.rule,
            top_k=picks.shape[1],
            prefill=prompt,
        )
        routing, remembered = policy.router.route(memory.router, seen)
        memory = dataclasses.replace(memory, router=remembered)
    none = jnp.zeros((tokens, 0), jnp.float32)
    layer = experts.Layer(
        index=index,
        hidden=none,
        x=none,
        shared=None,
        scores=scores,
        routing=routing,
        valid=valid,
        prefill=prompt,
        rule=setting.rule,
    )
    before = (cache.residency.owner >= 0).sum(dtype=jnp.int32)
    store = ExpertStore(records=cache.pool, layout=None)
    supply = Tables(policy, store, index, setting.experts, True, setting.wide)
    _, cache, memory, _, found = experts.served(supply, cache, memory, layer, _ahead(rows, setting))
    counts = {name: getattr(found, name) for name in COUNTS}
    filled = (cache.residency.owner >= 0).sum(dtype=jnp.int32) - before
    counts["evicted"] = counts["fetched"] + counts["prefetched"] - filled
    counts["replaced_mass"] = jnp.where(valid, routing.replaced_mass, 0.0).sum()
    other = (routing.expert != picks).any(axis=1) & (picks >= 0).any(axis=1)
    counts["differing"] = (valid & other).sum(dtype=jnp.int32)
    broken = _broken(supply, cache, layer, found) if setting.check else jnp.bool_(False)
    counts["broken"] = broken.astype(jnp.int32)
    if setting.keep:
        counts["resident"] = found.resident
    return (cache, memory), counts


def _recorded(picks: jax.Array, exact: jax.Array | None) -> Routing:
    return Routing(
        expert=picks,
        weight=jnp.zeros(picks.shape, jnp.float32),
        exact=picks if exact is None else exact,
        replaced_mass=jnp.zeros(picks.shape[0], jnp.float32),
    )


def _ahead(rows: Rows, setting: Setting) -> Ahead:
    """Later layers as an oracle knows them: their gates give what they will give."""

    def gate(hidden: jax.Array, target: jax.Array) -> jax.Array:
        if rows.scores is not None:
            return eligible_scores(setting.rule, rows.scores[target])
        picks = rows.picks[target]
        tokens, top_k = picks.shape
        worth = 1.0 - jnp.arange(top_k, dtype=jnp.float32) / top_k
        at = jnp.where(picks >= 0, picks, setting.experts)
        none = jnp.zeros((tokens, setting.experts), jnp.float32)
        return none.at[jnp.arange(tokens)[:, None], at].set(worth, mode="drop")

    return Ahead(
        gate=gate,
        input_norm=lambda hidden, target: hidden,
        attend=lambda hidden, kv, layer, target: (hidden, kv),
    )


def _broken(supply: Tables, cache: ExpertCache, layer: Any, found: Any) -> jax.Array:
    """Whether a slot or an expert has two of the other, or the layer has lost what it needs."""
    residency, size = cache.residency, layer.experts
    owned = residency.owner >= 0
    slots = jnp.arange(len(owned))
    owner = jnp.maximum(residency.owner, 0)
    wrong = (owned & (residency.slot_of[owner] != slots)).any()
    wrong |= owned.sum() != (residency.slot_of >= 0).sum()
    wrong |= (owned & (residency.home >= 0) & (residency.home != owner // size)).any()
    if not supply.policy.foresight.after:  # which may take the slots of those that have run
        needed = experts.access(layer).needed
        away = needed & (supply.slots(residency) < 0) & ~found.hosted & ~found.lowered
        wrong |= (needed.sum() <= supply.capacity(residency)) & away.any()
    return wrong
