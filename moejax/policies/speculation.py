"""Speculation: who drafts tokens that the model then verifies in one pass, and how many.

A cycle drafts gamma tokens, feeds them and the pending one through the model, keeps the longest
prefix that the model agrees with, and takes the model's own token after it. So a cycle makes at
least one token, and gamma = 0 is a plain step.
"""

from typing import Any, Protocol

import jax
import jax.numpy as jnp

from moejax.errors import PolicyError
from moejax.policies.lengths import Cycle, FixedLength, Lengths
from moejax.policies.routing import Router
from moejax.state import pytree, static


@pytree
class SelfDraft:
    """The model itself, with resident experts only: nothing is moved, the KV cache is shared.

    SpecMoE (arXiv 2604.10152): verification writes the cache anew. The router may use what is
    resident and nothing else, or the int4 copies (`drafting.AllLowBits`, as MoE-SpeQ).
    """

    kind = "self"

    router: Router
    skip: tuple[int, ...] = static(default=())  # layers of the model that a draft leaves out


@pytree
class LookupDraft:
    """What followed the last occurrence of the newest tokens in the text so far; costs nothing.

    Known as prompt lookup or n-gram speculation: the longest of the last one to three tokens that
    has occurred before counts, the latest occurrence of it.
    """

    kind = "lookup"

    least: jax.Array | int = 2  # tokens that must match, 1 to 3


@pytree
class ModelDraft:
    """Another, smaller model with the same tokens, whose KV cache is its own."""

    kind = "model"


Draft = SelfDraft | LookupDraft | ModelDraft


class Speculation(Protocol):
    """Who drafts, and the draft length of each cycle; zero is always a valid choice."""

    max_length: int  # static: gamma never exceeds it; 0 = decode token by token
    draft: Draft | None

    def init(self) -> Any:
        """Memory before the first cycle."""
        ...

    def length(self, memory: Any) -> jax.Array:
        """[] i32 gamma of the next cycle, in [0, max_length]."""
        ...

    def observe(self, memory: Any, cycle: Cycle) -> Any:
        """Memory after a cycle."""
        ...


@pytree
class NoSpeculation:
    """Decodes token by token."""

    max_length = 0
    draft = None

    def init(self) -> None:
        """Nothing to remember."""

    def length(self, memory: None) -> jax.Array:
        """Zero."""
        del memory
        return jnp.int32(0)

    def observe(self, memory: None, cycle: Cycle) -> None:
        """Nothing to remember."""
        del memory, cycle


@pytree
class Speculate:
    """Drafts as many tokens as `lengths` says.

    Raises:
        PolicyError: no room for a draft.
    """

    draft: Draft
    lengths: Lengths = FixedLength(gamma=4)
    max_length: int = static(default=8)

    def __post_init__(self) -> None:
        if not 1 <= self.max_length <= 64:
            raise PolicyError(f"drafts of at most {self.max_length} tokens: give 1 to 64")

    def init(self) -> Any:
        """Memory of `lengths`."""
        return self.lengths.init()

    def length(self, memory: Any) -> jax.Array:
        """[] i32, never beyond `max_length`."""
        return jnp.clip(self.lengths.length(memory, self.max_length), 0, self.max_length)

    def observe(self, memory: Any, cycle: Cycle) -> Any:
        """Memory of `lengths` after the cycle."""
        return self.lengths.observe(memory, cycle)
