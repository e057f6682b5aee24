"""Placement of misses: which missing experts are fetched; the others are computed on the host."""

from typing import Protocol

import jax
import jax.numpy as jnp

from moejax.state import pytree


class Placement(Protocol):
    """Splits a layer's missing experts between the link and the host."""

    uses_host: bool  # static: False = fetches everything

    def fetch(self, missing: jax.Array, tokens: jax.Array, scores: jax.Array) -> jax.Array:
        """[E] which of the missing experts to fetch.

        Args:
            missing: [E] bool, needed and not resident.
            tokens: [E] i32, how many tokens use each expert.
            scores: [N, E] f32 router scores.
        """
        ...


@pytree
class FetchAll:
    """Fetch every missing expert (on-demand offloading)."""

    uses_host = False

    def fetch(self, missing: jax.Array, tokens: jax.Array, scores: jax.Array) -> jax.Array:
        """All of them."""
        del tokens, scores
        return missing


@pytree
class HostAll:
    """Compute every missing expert where its weights lie; residency never changes."""

    uses_host = True

    def fetch(self, missing: jax.Array, tokens: jax.Array, scores: jax.Array) -> jax.Array:
        """None of them."""
        del tokens, scores
        return jnp.zeros_like(missing)
