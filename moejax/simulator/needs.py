"""What a policy has to be told before it can be replayed, and whether its parts keep their word."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moejax import live
from moejax.config import RouterRule
from moejax.errors import InputError, PolicyError
from moejax.policies.eviction import Access
from moejax.policies.placement import Demand
from moejax.policies.policy import Policy
from moejax.policies.prediction import Ahead, NoCutoff, NoPrediction, View
from moejax.policies.routing import Scored
from moejax.traces.trace import Trace

PREFETCHES = ("own", "none", "oracle")


def reads_scores(policy: Policy, layers: int, experts: int) -> list[str]:
    """The parts of a policy that look at router scores."""
    parts = [] if policy.router.exact else ["router"]
    access = _access(experts)
    memory = policy.evictor.init(layers, experts)

    def observe(scores: jax.Array) -> Any:
        return policy.evictor.observe(memory, dataclasses.replace(access, scores=scores))

    if _reads(observe, access.scores):
        parts.append("evictor")
    if policy.placement.uses_host and _reads(
        lambda score: policy.placement.fetch(_demand(score)), jnp.zeros(experts)
    ):
        parts.append("placement")
    if policy.foresight.after:
        parts.append("foresight")
    return parts


def asks_model(policy: Policy, layers: int, experts: int) -> bool:
    """Whether the predictor asks the model: its gates, norms or attention, which no trace holds."""
    predictor = policy.predictor
    if not predictor.horizon:
        return False
    asked = []

    def gate(hidden: jax.Array, target: jax.Array) -> jax.Array:
        asked.append("gate")
        return jnp.zeros((hidden.shape[0], experts))

    def norm(hidden: jax.Array, target: jax.Array) -> jax.Array:
        asked.append("norm")
        return hidden

    def attend(hidden: jax.Array, kv: Any, layer: jax.Array, target: jax.Array) -> tuple:
        return hidden, kv

    ahead = Ahead(gate=gate, input_norm=norm, attend=attend)
    memory, zero = predictor.init(layers, experts), jnp.int32(0)
    jax.eval_shape(lambda: predictor.wanted(memory, _view(experts), zero, ahead))
    return bool(asked) or predictor.attends


def with_prefetch(policy: Policy, prefetch: str) -> Policy:
    """The policy with its own predictor ("own", "oracle") or without one ("none")."""
    if prefetch != "none":
        return policy
    return dataclasses.replace(policy, predictor=NoPrediction(), cutoff=NoCutoff())


def check(
    policy: Policy,
    name: str,
    layers: int,
    experts: int,
    *,
    scores: bool,
    windows: bool,
    prefetch: str,
) -> None:
    """Raise PolicyError for a policy that cannot be replayed on a trace, with what to do.

    Args:
        scores: whether the trace has any.
        windows: whether it has verified drafts.
    """
    if not scores and (parts := reads_scores(policy, layers, experts)):
        raise PolicyError(
            f"policy {name!r} needs router scores ({', '.join(parts)}), and the trace has picks "
            "only: record one with scores, or choose a policy such as lru or lfu"
        )
    if policy.foresight.drafts:
        raise PolicyError(
            f"policy {name!r} prefetches what drafts route to, which a trace of what the model "
            "itself routed to does not hold: choose another"
        )
    if policy.speculation.max_length and not windows:
        raise PolicyError(
            f"policy {name!r} drafts, and the trace has no verified drafts: record one under it"
        )
    if policy.predictor.horizon >= max(layers, 2):
        raise PolicyError(
            f"policy {name!r} prefetches {policy.predictor.horizon} layers ahead, and the trace "
            f"has {layers}"
        )
    if prefetch == "own" and asks_model(policy, layers, experts):
        raise PolicyError(
            f"policy {name!r} predicts from hidden states, which traces do not hold: replay it "
            "without its prefetch (--prefetch none) or with one that is always right (--prefetch "
            "oracle)"
        )


def recorded(trace: Trace, policy: Policy) -> set[str]:
    """The counts with what the policy learns, if the trace has all of it; lossy ones learn none."""
    names = live.names_of(policy) or set()
    return names if policy.exact and names <= set(trace.counts) else set()


def check_start(start: np.ndarray, trace: Trace, slots: int) -> None:
    """Raise InputError for owners that slots cannot have."""
    there = np.asarray(start)
    if there.shape != (slots,) or there.dtype.kind != "i":
        raise InputError(f"the slots begin with i32 [{slots}] owners, -1 = empty")
    own = there[there >= 0]
    if not (there >= -1).all() or not (own < trace.layers * trace.experts).all():
        raise InputError(f"owners of slots are in [-1, {trace.layers * trace.experts})")
    if len(np.unique(own)) < len(own):
        raise InputError("an expert has two slots at the start: name each once")


def check_parts(policy: Policy, name: str, layers: int, experts: int, top_k: int) -> None:
    """Raise PolicyError where an evictor, a placement or a router does not give what it has to."""
    _check_evictor(policy.evictor, name, layers, experts)
    if policy.placement.uses_host:
        placement, demand = policy.placement, _demand(jnp.zeros(experts))
        fetched = _shaped(name, placement, "fetch", lambda: placement.fetch(demand))
        _check_form(name, placement, "fetch", fetched, (experts,), "b", "a bool for each expert")
    if not policy.router.exact:
        router = policy.router

        def route() -> Any:
            return router.route(router.init(layers, experts), _scored(experts, top_k))[0].expert

        chosen = _shaped(name, router, "route", route)
        _check_form(name, router, "route", chosen, (1, top_k), "i", "an id for each pick")


def _check_evictor(evictor: Any, name: str, layers: int, experts: int) -> None:
    memory = _shaped(name, evictor, "init", lambda: evictor.init(layers, experts))
    after = _shaped(
        name, evictor, "observe", lambda m: evictor.observe(m, _access(experts)), memory
    )
    forms = [jax.tree.map(lambda x: (x.shape, x.dtype), made) for made in (memory, after)]
    if jax.tree.structure(memory) != jax.tree.structure(after) or forms[0] != forms[1]:
        kind = type(evictor).__name__
        raise PolicyError(f"policy {name!r}: {kind}.observe changes the form of its memory")
    keys = _shaped(name, evictor, "keys", lambda m: _told(evictor.keys(m, jnp.int32(0))), after)
    every = (layers * experts,)
    _check_form(name, evictor, "keys", keys, every, "iuf", "a number for each expert of all layers")


def _shaped(name: str, part: Any, method: str, call: Any, *given: Any) -> Any:
    """What a method of a part gives, as shapes; PolicyError where it cannot be run under jit."""
    try:
        return jax.eval_shape(lambda *own: call(*own), *given)
    except Exception as error:  # whatever another's code may raise
        why = str(error).strip().split("\n")[0]
        raise PolicyError(
            f"policy {name!r}: {type(part).__name__}.{method} cannot be run: "
            f"{type(error).__name__}: {why}"
        ) from error


def _told(keys: Any) -> Any:
    """The keys, unless they are a NumPy array, which no program can index by what it computes."""
    if isinstance(keys, np.ndarray):
        raise TypeError("it gives a NumPy array: give one of JAX")
    return keys


def _check_form(
    name: str, part: Any, method: str, made: Any, shape: tuple, kinds: str, what: str
) -> None:
    there = isinstance(made, jax.ShapeDtypeStruct)
    if there and made.shape == shape and np.dtype(made.dtype).kind in kinds:
        return
    given = f"{made.dtype} {list(made.shape)}" if there else type(made).__name__
    own = f"{type(part).__name__}.{method}"
    raise PolicyError(f"policy {name!r}: {own} must give {what} {list(shape)}, not {given}")


def _reads(function: Any, value: jax.Array) -> bool:
    jaxpr = jax.make_jaxpr(function)(value).jaxpr
    [own] = jaxpr.invars
    used = [*jaxpr.outvars, *(v for equation in jaxpr.eqns for v in equation.invars)]
    return any(own is v for v in used)


def _access(experts: int) -> Access:
    return Access(
        layer=jnp.int32(0),
        scores=jnp.zeros((1, experts), jnp.float32),
        needed=jnp.zeros(experts, bool),
        tokens=jnp.zeros(experts, jnp.int32),
        last_use=jnp.full(experts, -1, jnp.int32),
        valid=jnp.ones(1, bool),
    )


def _demand(score: jax.Array) -> Demand:
    none = jnp.zeros(score.shape, bool)
    return Demand(missing=none, hits=none, tokens=none.astype(jnp.int32), score=score)


def _scored(experts: int, top_k: int) -> Scored:
    return Scored(
        layer=jnp.int32(0),
        scores=jnp.full((1, experts), 1 / experts, jnp.float32),
        resident=jnp.zeros(experts, bool),
        valid=jnp.ones(1, bool),
        rule=RouterRule(normalize=True),
        top_k=top_k,
        prefill=False,
    )


def _view(experts: int) -> View:
    wide = jnp.zeros((1, 0), jnp.float32)
    return View(
        layer=jnp.int32(0),
        hidden=wide,
        x=wide,
        shared=None,
        partial=wide,
        ahead=wide,
        scores=jnp.zeros((1, experts), jnp.float32),
        tokens=jnp.zeros(experts, jnp.int32),
        missed=jnp.bool_(False),
        resident=jnp.zeros(experts, bool),
        valid=jnp.ones(1, bool),
        top_k=1,
    )
