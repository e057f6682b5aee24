"""Evictors: which resident expert leaves first. State is explicit; rules are pure functions."""

from typing import Any, Protocol

import jax
import jax.numpy as jnp

from moejax.state import pytree


@pytree
class Access:
    """What one layer used in one step, as an evictor sees it."""

    layer: jax.Array  # [] i32
    scores: jax.Array  # [N, E] f32
    needed: jax.Array  # [E] bool, used by any token
    tokens: jax.Array  # [E] i32, how many tokens use it
    last_use: jax.Array  # [E] i32, position of the last use among the step's N * K picks, or -1
    valid: jax.Array  # [N] bool


class Evictor(Protocol):
    """Orders resident experts by how little they are worth."""

    def init(self, num_layers: int, num_experts: int) -> Any:
        """Memory of a fresh evictor."""
        ...

    def observe(self, memory: Any, access: Access) -> Any:
        """Memory after one layer's access."""
        ...

    def keys(self, memory: Any, layer: jax.Array) -> jax.Array:
        """[L * E] keys, all of one dtype: the smallest among the evictable slots leaves first.

        Args:
            memory: observed up to and with the running layer.
            layer: whose expert the slot is for: the running layer's, or a later one's (prefetch).
        """
        ...


CLOCK_LIMIT = 2**30  # the clock is set back here, long before an i32 would wrap


@pytree
class LRUMemory:
    """When each expert was last used."""

    clock: jax.Array  # [] i32, picks seen so far
    last_used: jax.Array  # [L * E] i32, -1 = never


@pytree
class LRU:
    """Least recently used; picks of one layer count in token order, then by rank."""

    def init(self, num_layers: int, num_experts: int) -> LRUMemory:
        """No expert has been used."""
        return LRUMemory(
            clock=jnp.int32(0), last_used=jnp.full(num_layers * num_experts, -1, jnp.int32)
        )

    def observe(self, memory: LRUMemory, access: Access) -> LRUMemory:
        """Stamp the experts in use."""
        experts = access.needed.shape[0]
        start = access.layer * experts
        old = jax.lax.dynamic_slice(memory.last_used, (start,), (experts,))
        new = jnp.where(access.needed, memory.clock + access.last_use, old)
        last_used = jax.lax.dynamic_update_slice(memory.last_used, new, (start,))
        clock = memory.clock + access.last_use.max(initial=-1) + 1
        back = jnp.where(clock < CLOCK_LIMIT, 0, CLOCK_LIMIT // 2)
        return LRUMemory(clock=clock - back, last_used=jnp.maximum(last_used - back, -1))

    def keys(self, memory: LRUMemory, layer: jax.Array) -> jax.Array:
        """Time of last use."""
        del layer
        return memory.last_used
