"""A Policy bundles a router, an evictor, a placement and their numbers; presets have names."""

import importlib.metadata
from typing import Any

import jax
import jax.numpy as jnp

from moejax.errors import PolicyError
from moejax.eviction import LRU, Evictor
from moejax.placement import FetchAll, Placement
from moejax.routing import Router, TopK
from moejax.state import pytree

UNLIMITED = jnp.iinfo(jnp.int32).max


@pytree
class Policy:
    """How experts are chosen, kept and fetched. Structure is static, every number is a leaf."""

    router: Router
    evictor: Evictor
    placement: Placement
    capacity: jax.Array | int  # slots in use: at most S, at least one (per layer if divided)

    @property
    def exact(self) -> bool:
        """Whether every run under this policy is bit-exact."""
        return self.router.exact

    def init(self, num_layers: int, num_experts: int) -> Any:
        """The policy's memory before the first token."""
        return self.evictor.init(num_layers, num_experts)


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
        PolicyError: no such policy; the message lists those that exist.
    """
    if isinstance(name, Policy):
        return name
    if name in _PRESETS:
        return _PRESETS[name]()
    for entry in _entry_points():
        if entry.name == name:
            made = entry.load()()
            if not isinstance(made, Policy):
                raise PolicyError(f"policy {name!r} ({entry.value}) does not make a moejax.Policy")
            return made
    raise PolicyError(f"unknown policy {name!r}; known: {', '.join(policy_names())}")
