"""The draft set: experts that stay for the next draft, chosen anew in every verification."""

import jax
import jax.numpy as jnp

from moejax.errors import PolicyError
from moejax.policies.eviction import CLOCK_LIMIT, LRU, Access, LRUMemory
from moejax.policies.prediction import ranks
from moejax.state import pytree, static

RULES = ("temporal", "global", "ema", "random")


@pytree
class DraftSetMemory:
    """Uses that the rule counts, the set, and the order of use."""

    use: jax.Array  # [L, E] f32
    pinned: jax.Array  # [L * E] bool
    lru: LRUMemory


@pytree
class DraftSet:
    """Keeps `size` experts of every layer for the next draft; the others leave by LRU.

    SpecMoE (arXiv 2604.10152): a step counts how many of its tokens use each expert, and those used
    most become the layer's draft set, ties to the lower expert. They are pinned as soon as their
    layer is routed, so that the same step does not evict them. Rules: "temporal" counts the last
    step alone (HotTemporal), "global" all steps (HotGlobal, made while running instead of offline),
    "ema" lets counts decay, "random" pins a set drawn once. Experts never used are not pinned,
    except by "random".

    Raises:
        PolicyError: an unknown rule.
    """

    size: jax.Array | int  # N, experts per layer
    decay: jax.Array | float = 0.5  # of "ema"
    seed: jax.Array | int = 0  # of "random"
    rule: str = static(default="temporal")

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise PolicyError(f"rule {self.rule!r} of DraftSet: write one of {', '.join(RULES)}")

    def init(self, num_layers: int, num_experts: int) -> DraftSetMemory:
        """Nothing used; a drawn set is pinned from the start."""
        shape = (num_layers, num_experts)
        use, pinned = jnp.zeros(shape, jnp.float32), jnp.zeros(shape, bool)
        if self.rule == "random":
            use = jax.random.uniform(jax.random.key(self.seed), shape, minval=0.5)
            pinned = jax.vmap(ranks)(use) < self.size
        lru = LRU().init(num_layers, num_experts)
        return DraftSetMemory(use=use, pinned=pinned.reshape(-1), lru=lru)

    def observe(self, memory: DraftSetMemory, access: Access) -> DraftSetMemory:
        """Count this layer's uses and pin its set; a step without tokens changes nothing."""
        lru = LRU().observe(memory.lru, access)
        if self.rule == "random":
            return DraftSetMemory(use=memory.use, pinned=memory.pinned, lru=lru)
        old, tokens = memory.use[access.layer], access.tokens.astype(jnp.float32)
        kept = {"temporal": 0.0, "global": 1.0, "ema": self.decay}[self.rule]
        use = jnp.where(access.valid.any(), kept * old + tokens, old)
        pinned = (ranks(use) < self.size) & (use > 0)
        start = (access.layer * use.shape[0],)
        return DraftSetMemory(
            use=memory.use.at[access.layer].set(use),
            pinned=jax.lax.dynamic_update_slice(memory.pinned, pinned, start),
            lru=lru,
        )

    def keys(self, memory: DraftSetMemory, layer: jax.Array) -> jax.Array:
        """[L * E] i32: pinned or not, then time of last use."""
        del layer
        return memory.lru.last_used + jnp.where(memory.pinned, CLOCK_LIMIT, 0)

    def draft_set(self, memory: DraftSetMemory) -> jax.Array:
        """[L * E] bool experts that a draft may use."""
        return memory.pinned
