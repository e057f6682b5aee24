"""What a token and a prompt take on a machine, from sizes and a hit rate: plain arithmetic.

The model, which docs/planner.md compares with measurements: a step reads its weights once at the
device's rate (or is bound by its products), every layer and step costs a constant beside that, and
misses are fetched on demand, while nothing else runs. Everything else, overlap among it, is left
out, so that predictions err on one known side.
"""

import dataclasses
import math
from typing import Any

from moejax.planner.machines import Machine

TIERS = {
    "resident": "all experts in fast memory",
    "memory": "experts in slots, the others in the same memory",
    "link": "experts in slots, the others in the host's memory behind the link",
    "disk": "experts in slots, the others on the disk",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """What one token of a model reads and computes; sizes in bytes."""

    layers: int
    moe_layers: int  # L
    experts: int  # E, per layer
    top_k: int  # K
    record_bytes: int  # moved per miss
    expert_bytes: int  # read per expert in use
    expert_weights: int
    dense_bytes: int  # read by every step: an untied embedding is not
    dense_weights: int
    kv_bytes_per_token: float
    attention_width: int  # heads times channels
    head_weights: int = 0  # of the dense ones, the output head's: one token of a step needs it

    def kv_bytes(self, tokens: float) -> float:
        """Bytes of the keys and values of so many tokens."""
        return self.kv_bytes_per_token * tokens

    def distinct(self, tokens: int) -> float:
        """Experts of a layer that so many tokens use, if each chose at random."""
        return self.experts * (1 - (1 - self.top_k / self.experts) ** tokens)


@dataclasses.dataclass(frozen=True)
class Times:
    """Milliseconds by resource; those of `serial` follow one another."""

    reading_ms: float  # weights and keys from the device's memory, or
    computing_ms: float  # products, if they take longer
    moving_ms: float  # misses, over the link or from the disk
    constant_ms: float  # per layer and step

    @property
    def total_ms(self) -> float:
        """The time of the step or prompt."""
        return max(self.reading_ms, self.computing_ms) + self.moving_ms + self.constant_ms

    def limit(self, machine: Machine, tier: str) -> str:
        """The resource that takes most of the time, by name."""
        moving = "disk" if tier == "disk" else f"link ({machine.link})"
        memory = "device memory bandwidth" if machine.kind == "gpu" else "memory bandwidth"
        parts = {
            memory: self.reading_ms,
            "compute": self.computing_ms,
            moving: self.moving_ms,
            "launches and dispatch": self.constant_ms,
        }
        return max(parts, key=parts.__getitem__)

    def as_dict(self) -> dict[str, Any]:
        """Fields and the total, for JSON."""
        return dataclasses.asdict(self) | {"total_ms": self.total_ms}


def token(work: Work, machine: Machine, tier: str, hit_rate: float, position: float) -> Times:
    """A decode step of one sequence.

    Args:
        tier: one of TIERS.
        hit_rate: share of the uses of experts whose expert is in a slot.
        position: tokens whose keys and values are read.
    """
    uses = work.moe_layers * work.top_k
    read = work.dense_bytes + work.kv_bytes(position) + uses * work.expert_bytes
    weights = work.dense_weights + uses * work.expert_weights
    misses = 0.0 if tier == "resident" else uses * (1 - hit_rate)
    products = 2 * weights + 4 * work.layers * work.attention_width * position
    return _times(work, machine, tier, read, products, misses, steps=1)


def prompt(
    work: Work, machine: Machine, tier: str, slots: int, tokens: int, chunk: int, held: int = 0
) -> Times:
    """A prompt until its first token, from empty slots.

    Experts of a chunk are as many as random choices give, which is more than text uses. Chunks go
    through the layers in turn, so slots for fewer experts than that hold nothing from one chunk to
    the next.

    Args:
        chunk: tokens of one step.
        held: experts that are in slots when it begins.
    """
    steps = math.ceil(tokens / chunk)
    distinct = work.moe_layers * work.distinct(min(tokens, chunk))
    moved = 0.0
    if tier != "resident":
        moved = max(distinct - held, 0.0) if slots >= distinct else distinct * steps
    read = steps * (work.dense_bytes + distinct * work.expert_bytes) + work.kv_bytes(tokens)
    weights = work.dense_weights + work.moe_layers * work.top_k * work.expert_weights
    head = work.head_weights * (tokens - steps)
    products = 2 * (weights * tokens - head) + 2 * work.layers * work.attention_width * tokens**2
    return _times(work, machine, tier, read, products, moved, steps)


def _times(
    work: Work,
    machine: Machine,
    tier: str,
    read: float,
    products: float,
    moved: float,
    steps: int,
) -> Times:
    constant = steps * (machine.step_us + work.layers * machine.layer_us)
    return Times(
        reading_ms=read / machine.rate("device") * 1e3,
        computing_ms=products / machine.flops * 1e3,
        moving_ms=moving_ms(work, machine, tier, moved),
        constant_ms=constant / 1e3,
    )


def moving_ms(work: Work, machine: Machine, tier: str, records: float) -> float:
    """Milliseconds that records take over what the tier moves them over, one after another."""
    if not records:
        return 0.0
    what = "disk" if tier == "disk" else "link"
    latency = machine.disk_latency_us if tier == "disk" else machine.link_latency_us
    return records * (work.record_bytes / machine.rate(what) * 1e3 + latency / 1e3)
