"""What a token and a prompt take on a machine, from sizes and a hit rate: plain arithmetic.

The model, which docs/planner.md compares with measurements: a step reads its weights once at the
device's rate (or is bound by its products; or takes what kernels were measured to take for so many
tokens), every layer and step costs a constant beside that, choosing a token costs by the size of
the vocabulary, and misses are fetched on demand, while nothing else runs. Everything else, overlap
among it, is left out.
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
    vocabulary: int = 0
    format: str = "bfloat16"  # of the experts and most other weights

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
    kernels_ms: float = 0.0  # that measured kernels take more, or less, than both of them
    drawing_ms: float = 0.0  # choosing the next token
    host_ms: float = 0.0  # misses computed where they lie; with those moved, one after another

    @property
    def total_ms(self) -> float:
        """The time of the step or prompt."""
        after = self.moving_ms + self.host_ms + self.constant_ms + self.drawing_ms
        return max(self.reading_ms, self.computing_ms) + self.kernels_ms + after

    def limit(self, machine: Machine, tier: str) -> str:
        """The resource that takes most of the time, by name."""
        moving = "disk" if tier == "disk" else f"link ({machine.link})"
        memory = "device memory bandwidth" if machine.kind == "gpu" else "memory bandwidth"
        parts = {
            memory: self.reading_ms,
            "compute": self.computing_ms,
            moving: self.moving_ms,
            "misses computed on the host": self.host_ms,
            "launches and dispatch": self.constant_ms,
            "choosing the token": self.drawing_ms,
        }
        return max(parts, key=parts.__getitem__)

    def as_dict(self) -> dict[str, Any]:
        """Fields and the total, for JSON."""
        return dataclasses.asdict(self) | {"total_ms": self.total_ms}


def token(
    work: Work,
    machine: Machine,
    tier: str,
    hit_rate: float,
    position: float,
    *,
    hosted: bool = False,
    drawn: bool = True,
) -> Times:
    """A decode step of one sequence.

    Args:
        tier: one of TIERS.
        hit_rate: share of the uses of experts whose expert is in a slot.
        position: tokens whose keys and values are read.
        hosted: misses are split between the link and the host as `split` has them.
        drawn: the next token is chosen, greedily; False for given tokens.
    """
    uses = work.moe_layers * work.top_k
    misses = 0.0 if tier == "resident" else uses * (1 - hit_rate)
    share = split(work, machine, tier, misses / work.moe_layers) if hosted and misses else None
    moved = misses if share is None else misses * share.moved
    slots = uses - misses + moved  # uses that the device computes
    parts = [(work.dense_weights, 1.0), (slots * work.expert_weights, 1.0)]
    read = work.dense_bytes + work.kv_bytes(position) + slots * work.expert_bytes
    products = 2 * sum(weights for weights, _ in parts)
    products += 4 * work.layers * work.attention_width * position
    moving = moving_ms(work, machine, tier, moved)
    return Times(
        **_reading(work, machine, read, products, parts, work.kv_bytes(position)),
        moving_ms=moving,
        host_ms=0.0 if share is None else max(misses * share.each_us / 1e3 - moving, 0.0),
        constant_ms=(machine.step_us + work.layers * machine.layer_us) / 1e3,
        drawing_ms=work.vocabulary * machine.draw_us / 1e6 if drawn else 0.0,
    )


def prompt(
    work: Work, machine: Machine, tier: str, slots: int, tokens: int, chunk: int, held: int = 0
) -> Times:
    """A prompt until its first token, from empty slots.

    Experts of a chunk are as many as random choices give, which is more than text uses. Chunks go
    through the layers in turn, so slots for fewer experts than that hold nothing from one chunk to
    the next. A chunk that is not full costs the dense weights as much as a full one.

    Args:
        chunk: tokens of one step.
        held: experts that are in slots when it begins.
    """
    steps = math.ceil(tokens / chunk)
    fed = min(tokens, chunk)
    distinct = work.moe_layers * work.distinct(fed)
    moved = 0.0
    if tier != "resident":
        moved = max(distinct - held, 0.0) if slots >= distinct else distinct * steps
    kv = work.kv_bytes(tokens)
    read = steps * (work.dense_bytes + distinct * work.expert_bytes) + kv
    uses = work.moe_layers * work.top_k
    dense = work.dense_weights - work.head_weights
    products = 2 * (dense * steps * chunk + work.head_weights * steps)
    products += 2 * uses * work.expert_weights * tokens
    attention = 2 * work.layers * work.attention_width * tokens**2
    parts = [
        (steps * dense, float(chunk)),
        (steps * work.head_weights, 1.0),
        (steps * distinct * work.expert_weights, tokens / steps * uses / distinct),
    ]
    return Times(
        **_reading(work, machine, read, products + attention, parts, kv, attention),
        moving_ms=moving_ms(work, machine, tier, moved),
        constant_ms=steps * (machine.step_us + work.layers * machine.layer_us) / 1e3,
        drawing_ms=steps * work.vocabulary * machine.draw_us / 1e6,
    )


def _reading(
    work: Work,
    machine: Machine,
    read: float,
    products: float,
    parts: list[tuple[float, float]],
    kv: float,
    attention: float = 0.0,
) -> dict[str, float]:
    """The first two times, and what measured kernels take beyond the larger.

    Args:
        parts: weights, and for how many tokens at once.
        kv: of the bytes `read`, those that are no weights.
        attention: of the products, those without weights.
    """
    reading = read / machine.rate("device") * 1e3
    computing = products / machine.flops * 1e3
    found = {"reading_ms": reading, "computing_ms": computing}
    each = [machine.kernel_us(work.format, tokens) for _, tokens in parts]
    if None in each:
        return found
    took = sum(weights / 1e9 * us for (weights, _), us in zip(parts, each, strict=True))
    took += kv / machine.rate("device") * 1e3 + attention / machine.flops * 1e3
    return found | {"kernels_ms": took - max(reading, computing)}


@dataclasses.dataclass(frozen=True)
class Split:
    """How a layer's misses go to the link and the host at the same time."""

    moved: float  # share that is fetched
    each_us: float  # time of a miss, in the mean, beside reading those that are fetched


def miss_us(work: Work, machine: Machine, tier: str) -> tuple[float, float]:
    """Microseconds of a miss: moved into a slot, and computed where its weights lie instead."""
    host = work.expert_bytes / machine.rate("host") * 1e6
    kernel = machine.kernel_us(work.format, 1) if machine.kind == "cpu" else None
    if kernel is not None:
        host = max(host, kernel * work.expert_weights / 1e6)
    return moving_ms(work, machine, tier, 1) * 1e3, host


def split(work: Work, machine: Machine, tier: str, misses: float) -> Split:
    """The split of a layer's misses that ends first, the computing of what is moved included.

    Moving and computing share one memory in tier "memory", so there they do not overlap, and it
    is one or the other.

    Args:
        misses: of one layer and token, in the mean; split as the nearest whole number of them.
    """
    load, host = miss_us(work, machine, tier)
    slot = work.expert_bytes / machine.rate("device") * 1e6
    if tier == "memory":
        return Split(0.0, host) if host < load + slot else Split(1.0, load)
    count = max(round(misses), 1)
    waits = [max(moved * load, (count - moved) * host) for moved in range(count + 1)]
    moved = min(range(count + 1), key=lambda n: waits[n] + n * slot)
    return Split(moved / count, waits[moved] / count)


def moving_ms(work: Work, machine: Machine, tier: str, records: float) -> float:
    """Milliseconds that records take over what the tier moves them over, one after another."""
    if not records:
        return 0.0
    what = "disk" if tier == "disk" else "link"
    latency = machine.disk_latency_us if tier == "disk" else machine.link_latency_us
    return records * (work.record_bytes / machine.rate(what) * 1e3 + latency / 1e3)
