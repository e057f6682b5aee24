"""A Policy bundles a router, an evictor, a placement and their numbers; presets have names."""

import dataclasses
import importlib.metadata

import jax
import jax.numpy as jnp

from moejax.errors import PolicyError
from moejax.eviction import LRU, Evictor
from moejax.placement import FetchAll, Placement
from moejax.prediction import Cutoff, NoCutoff, NoPrediction, Predictor
from moejax.routing import Router, TopK
from moejax.speculation import NoSpeculation, Speculation
from moejax.state import PolicyMemory, pytree

UNLIMITED = jnp.iinfo(jnp.int32).max


@pytree
class Policy:
    """How experts are chosen, kept, fetched and prefetched, and how far tokens are drafted.

    Structure is static, every number is a leaf.
    """

    router: Router
    evictor: Evictor
    placement: Placement
    capacity: jax.Array | int  # slots in use: at most S, at least one (per layer if divided)
    predictor: Predictor = dataclasses.field(default_factory=NoPrediction)
    cutoff: Cutoff = dataclasses.field(default_factory=NoCutoff)
    speculation: Speculation = dataclasses.field(default_factory=NoSpeculation)

    @property
    def exact(self) -> bool:
        """Whether every run under this policy is bit-exact."""
        return self.router.exact

    def init(self, num_layers: int, num_experts: int) -> PolicyMemory:
        """The policy's memory before the first token."""
        return PolicyMemory(
            evictor=self.evictor.init(num_layers, num_experts),
            predictor=self.predictor.init(num_layers, num_experts),
            speculation=self.speculation.init(),
        )


def _lru() -> Policy:
    return Policy(router=TopK(), evictor=LRU(), placement=FetchAll(), capacity=jnp.int32(UNLIMITED))


_PRESETS = {"lru": _lru}


def policy_names() -> list[str]:
    """Names accepted by `policy`, third-party ones (entry points `moejax.policies`) included."""
    return sorted({*_PRESETS, *(p.name for p in _entry_points())})


def _entry_points() -> importlib.metadata.EntryPoints:
    return importlib.metadata.entry_points(group="moejax.policies")


def policy(name: str | Policy) -> Policy:
    """The preset of that name, or the given policy itself.

    Raises:
        PolicyError: no such policy (the message lists those that exist), or one that drafts.
    """
    if isinstance(name, Policy):
        return _runnable(name)
    if name in _PRESETS:
        return _PRESETS[name]()
    for entry in _entry_points():
        if entry.name == name:
            made = entry.load()()
            if not isinstance(made, Policy):
                raise PolicyError(f"policy {name!r} ({entry.value}) does not make a moejax.Policy")
            return _runnable(made)
    raise PolicyError(f"unknown policy {name!r}; known: {', '.join(policy_names())}")


def _runnable(policy: Policy) -> Policy:
    if policy.speculation.max_length:
        raise PolicyError(
            "this policy drafts tokens, and there is no decoding loop that verifies drafts yet: "
            "leave its speculation at NoSpeculation()"
        )
    return policy
