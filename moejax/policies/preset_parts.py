"""What presets are made of."""

import jax.numpy as jnp

from moejax.policies.eviction import Evictor
from moejax.policies.evictors import ScoreWindow
from moejax.policies.placement import FetchAll
from moejax.policies.policy import UNLIMITED, Policy
from moejax.policies.routing import TopK

WINDOW_SIZE = 64  # steps that a window's memory has room for: to change n below never recompiles


def window_of(steps: int) -> ScoreWindow:
    """SMoE's eviction, with room for other numbers of steps."""
    return ScoreWindow(n=jnp.int32(steps), size=max(steps, WINDOW_SIZE))


def exact(evictor: Evictor, **parts: object) -> Policy:
    """An exact policy that fetches every miss, but for the parts given."""
    return Policy(
        **{"router": TopK(), "evictor": evictor, "placement": FetchAll()} | parts,
        capacity=jnp.int32(UNLIMITED),
        must_be_exact=True,
    )
