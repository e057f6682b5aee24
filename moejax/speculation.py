"""Speculation: how many tokens to draft before the model verifies them."""

from typing import Any, Protocol

import jax
import jax.numpy as jnp

from moejax.state import pytree


class Speculation(Protocol):
    """Chooses the draft length of each cycle; zero is always a valid choice."""

    max_length: int  # static: gamma never exceeds it; 0 = decode token by token

    def init(self) -> Any:
        """Memory before the first cycle."""
        ...

    def length(self, memory: Any) -> jax.Array:
        """[] i32 gamma of the next cycle, in [0, max_length]."""
        ...

    def observe(self, memory: Any, drafted: jax.Array, accepted: jax.Array) -> Any:
        """Memory after a cycle that drafted [B] i32 tokens, of which [B] i32 were accepted."""
        ...


@pytree
class NoSpeculation:
    """Decodes token by token."""

    max_length = 0

    def init(self) -> None:
        """Nothing to remember."""

    def length(self, memory: None) -> jax.Array:
        """Zero."""
        del memory
        return jnp.int32(0)

    def observe(self, memory: None, drafted: jax.Array, accepted: jax.Array) -> None:
        """Nothing to remember."""
        del memory, drafted, accepted
