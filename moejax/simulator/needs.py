"""What a policy has to be told before it can be replayed, and whether its parts keep their word."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from moejax.errors import PolicyError
from moejax.policies.eviction import Access
from moejax.policies.placement import Demand
from moejax.policies.policy import Policy
from moejax.policies.prediction import Ahead, NoCutoff, NoPrediction, View

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
    _check_evictor(policy, name, layers, experts)
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
            "without its prefetch (none) or with one that is always right (oracle)"
        )


def _check_evictor(policy: Policy, name: str, layers: int, experts: int) -> None:
    evictor, kind = policy.evictor, type(policy.evictor).__name__
    memory = jax.eval_shape(lambda: evictor.init(layers, experts))
    try:
        after = jax.eval_shape(evictor.observe, memory, _access(experts))
        keys = jax.eval_shape(evictor.keys, after, jnp.int32(0))
    except (TypeError, ValueError, AttributeError) as error:
        raise PolicyError(f"policy {name!r}: {kind} cannot be run: {error}") from error
    forms = [jax.tree.map(lambda x: (x.shape, x.dtype), made) for made in (memory, after)]
    if jax.tree.structure(memory) != jax.tree.structure(after) or forms[0] != forms[1]:
        raise PolicyError(f"policy {name!r}: {kind}.observe changes the form of its memory")
    if getattr(keys, "shape", None) != (layers * experts,):
        raise PolicyError(
            f"policy {name!r}: {kind}.keys must be one key per expert of all layers "
            f"[{layers * experts}], not {getattr(keys, 'shape', keys)}"
        )


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
