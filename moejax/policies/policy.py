"""A Policy bundles a router, an evictor, a placement and their numbers; presets have names."""

import dataclasses
import difflib
import importlib.metadata

import jax
import jax.numpy as jnp

from moejax.errors import PolicyError
from moejax.policies.eviction import Evictor
from moejax.policies.foresight import Foresight, NoForesight
from moejax.policies.placement import Placement
from moejax.policies.prediction import (
    Cutoff,
    NextAttention,
    NextResidual,
    NoCutoff,
    NoPrediction,
    Predictor,
)
from moejax.policies.routing import Router
from moejax.policies.speculation import NoSpeculation, Speculation
from moejax.state import Forecast, PolicyMemory, pytree, static

UNLIMITED = jnp.iinfo(jnp.int32).max


@pytree
class Policy:
    """How experts are chosen, kept, fetched and prefetched, and how far tokens are drafted.

    Structure is static, every number is a leaf.

    Raises:
        PolicyError: a lossy part in a policy that `must_be_exact`, as the exact presets do.
    """

    router: Router
    evictor: Evictor
    placement: Placement
    capacity: jax.Array | int  # slots in use: at most S, at least one (per layer if divided)
    predictor: Predictor = dataclasses.field(default_factory=NoPrediction)
    cutoff: Cutoff = dataclasses.field(default_factory=NoCutoff)
    foresight: Foresight = dataclasses.field(default_factory=NoForesight)
    speculation: Speculation = dataclasses.field(default_factory=NoSpeculation)
    must_be_exact: bool = static(default=False)

    def __post_init__(self) -> None:
        if self.must_be_exact and not getattr(self.router, "exact", True):
            raise PolicyError(
                f"this policy is exact, and the router {type(self.router).__name__} is lossy: "
                "say must_be_exact=False to measure its loss instead"
            )

    @property
    def exact(self) -> bool:
        """Whether every run under this policy is bit-exact."""
        return self.router.exact

    @property
    def low_bit(self) -> bool:
        """Whether its router, or that of its drafts, runs low-bit copies."""
        draft = getattr(self.speculation.draft, "router", None)
        return bool(self.router.low_bit or (draft is not None and draft.low_bit))

    @property
    def looks_ahead(self) -> bool:
        """Whether experts are brought in before their layer asks for them."""
        foresight = self.foresight
        return bool(self.predictor.horizon or foresight.drafts or foresight.after)

    def init(self, num_layers: int, num_experts: int) -> PolicyMemory:
        """The policy's memory before the first token."""
        none = jnp.zeros(num_layers * num_experts, bool)
        return PolicyMemory(
            router=self.router.init(num_layers, num_experts),
            evictor=self.evictor.init(num_layers, num_experts),
            predictor=self.predictor.init(num_layers, num_experts),
            foresight=self.foresight.init(num_layers, num_experts),
            speculation=self.speculation.init(),
            forecast=Forecast(wanted=none, fresh=none) if self.looks_ahead else None,
        )


def policy_names() -> list[str]:
    """Names accepted by `policy`, third-party ones (entry points `moejax.policies`) included."""
    from moejax.policies.presets import PRESETS

    return sorted({*PRESETS, *(p.name for p in _entry_points())})


def _entry_points() -> importlib.metadata.EntryPoints:
    return importlib.metadata.entry_points(group="moejax.policies")


def policy(name: str | Policy) -> Policy:
    """The preset of that name, or the given policy itself.

    A name may be followed by numbers: "smoe:alpha=0.35,window=32".

    Raises:
        PolicyError: no such policy (the message lists those that exist), no such number, or parts
            that do not go together.
    """
    from moejax.policies.presets import PRESETS, build

    if isinstance(name, Policy):
        return _runnable(name)
    name, _, numbers = name.partition(":")
    if name in PRESETS:
        return build(name, PRESETS[name], numbers)
    for entry in _entry_points():
        if entry.name == name:
            made = build(name, entry.load(), numbers)
            if not isinstance(made, Policy):
                raise PolicyError(f"policy {name!r} ({entry.value}) does not make a moejax.Policy")
            return _runnable(made)
    known = policy_names()
    near = difflib.get_close_matches(name.replace(" ", "-"), known, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    raise PolicyError(f"unknown policy {name!r}{hint}; known: {', '.join(known)}")


PARTS = {
    "router": ("exact", "low_bit", "init", "route"),
    "evictor": ("init", "observe", "keys"),
    "placement": ("uses_host", "fetch"),
    "predictor": ("horizon", "attends", "init", "observe", "wanted"),
    "cutoff": ("allows",),
    "foresight": ("drafts", "after", "gains", "init", "wanted", "worth", "spent", "drained"),
    "speculation": ("max_length", "draft", "init", "length", "observe"),
}


def _runnable(policy: Policy) -> Policy:
    """The policy, if its parts have what the engine asks of them; PolicyError otherwise."""
    for name, wanted in PARTS.items():
        part = getattr(policy, name)
        kind = type(part).__name__
        if missing := [attribute for attribute in wanted if not hasattr(part, attribute)]:
            raise PolicyError(f"{kind} is no {name}: it has no {', '.join(missing)}")
        if jax.tree_util.all_leaves([part]):
            raise PolicyError(f"{kind} is no pytree: decorate it with moejax.state.pytree")
    kind = getattr(policy.speculation.draft, "kind", None)
    if policy.speculation.max_length and kind is None:
        raise PolicyError("this policy speculates, but names no draft")
    if policy.foresight.drafts and kind in (None, "lookup"):
        raise PolicyError("this policy prefetches what drafts route to, but no model drafts")
    needed = hasattr(policy.foresight, "threshold") and ("levels", "drain") or ()
    if not all(hasattr(policy.evictor, name) for name in needed):
        raise PolicyError(f"{type(policy.evictor).__name__} has no queue: take utility.Utility")
    return policy


def with_alpha(policy: Policy, alpha: float) -> Policy:
    """The policy with this alpha in its router, and in its predictor if that prefetches top scores.

    Raises:
        PolicyError: the router has none.
    """
    if not hasattr(policy.router, "alpha"):
        raise PolicyError(f"the router {type(policy.router).__name__} has no alpha")
    alpha = jnp.float32(alpha)
    parts = {"router": dataclasses.replace(policy.router, alpha=alpha)}
    if isinstance(policy.predictor, NextAttention | NextResidual):
        parts["predictor"] = dataclasses.replace(policy.predictor, alpha=alpha)
    return dataclasses.replace(policy, **parts)
