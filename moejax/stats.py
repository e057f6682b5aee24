"""What a run cost: counts of a step summed on the device, and of a run on the host."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moejax.live import DriftStats
from moejax.state import StepTrace, array_fields, pytree


@pytree
class Totals:
    """Sums of a step's trace over layers; counts are experts."""

    needed: jax.Array  # [] i32
    hits: jax.Array  # [] i32
    fetched: jax.Array  # [] i32
    prefetched: jax.Array  # [] i32
    host: jax.Array  # [] i32
    overdue: jax.Array  # [] i32
    low: jax.Array  # [] i32
    exact_needed: jax.Array  # [] i32
    exact_hits: jax.Array  # [] i32
    replaced: jax.Array  # [] i32
    replaced_mass: jax.Array  # [] f32
    predicted: jax.Array  # [] i32
    predicted_right: jax.Array  # [] i32
    prefetch_used: jax.Array  # [] i32
    late: jax.Array  # [] i32
    stall: jax.Array  # [] i32, microseconds
    failure: jax.Array  # [] i32, the greatest of the layers'


def totals_of(trace: StepTrace | None) -> Totals | None:
    """Sums over the layers of a step, None for dense models."""
    if trace is None:
        return None
    # In a fixed order: that of a set changes the program, and the compilation cache misses it.
    names = [name for name in array_fields(Totals) if name != "failure"]
    sums = {name: getattr(trace, name).sum() for name in names}
    return Totals(**sums, failure=trace.failure.max())


@pytree
class DraftCost:
    """What drafting cost so far, and what its steps did."""

    prefetched: jax.Array  # [] i32, records brought in ahead meanwhile
    stall: jax.Array  # [] i32, microseconds waited for the link
    failure: jax.Array  # [] i32, see StepTrace
    steps: StepTrace | None  # [G, ...] of each, if they are recorded

    @classmethod
    def none(cls, steps: StepTrace | None = None) -> "DraftCost":
        """Nothing yet, with room for the traces of `steps`."""
        zero = jnp.int32(0)
        return cls(prefetched=zero, stall=zero, failure=zero, steps=steps)

    def add(self, trace: StepTrace, number: jax.Array) -> "DraftCost":
        """With a step more, the trace of which is kept as that number."""
        put = functools.partial(jax.lax.dynamic_update_index_in_dim, index=number, axis=0)
        return DraftCost(
            prefetched=self.prefetched + trace.prefetched.sum(),
            stall=self.stall + trace.stall.sum(),
            failure=jnp.maximum(self.failure, trace.failure.max()),
            steps=self.steps if self.steps is None else jax.tree.map(put, self.steps, trace),
        )


_IN_DECODE = (
    "needed",
    "hits",
    "late",
    "overdue",
    "exact_needed",
    "exact_hits",
    "replaced",
    "predicted",
    "predicted_right",
    "prefetch_used",
)


@dataclasses.dataclass
class Stats:
    """What a run cost. Counts are experts over all layers; times are seconds."""

    record_bytes: int  # bytes of one expert's record
    prompt_tokens: int = 0
    new_tokens: int = 0
    steps: int = 0  # decode steps or cycles, prefill not included
    row_steps: int = 0  # of each, the sequences that it ran, summed: for cycles
    drafted: int = 0  # tokens proposed
    accepted: int = 0  # of those
    draft_lengths: dict[int, int] = dataclasses.field(default_factory=dict)  # cycles by gamma
    draft_prefetched: int = 0  # of `prefetched`, while drafting
    draft_prefill_seconds: float = 0.0  # a draft model on the prompts: in no other time
    needed: int = 0  # expert uses in decode, per layer and step distinct
    hits: int = 0
    late: int = 0  # of `hits`: the expert had a slot, but its record was still to come over a link
    prefill_needed: int = 0
    prefill_hits: int = 0
    fetched: int = 0  # missing records copied into slots, prefill included; counted if `virtual`
    prefetched: int = 0  # records copied ahead of need, likewise
    prefill_moved: int = 0  # of `fetched` and `prefetched`
    host: int = 0  # experts computed on the host, prefill included
    overdue: int = 0  # of `late`, computed there instead of being waited for
    low: int = 0  # experts computed from low-bit copies, likewise
    # Of decode: what the model's own router would have needed and found resident; its picks that
    # were not made; the router weight that its picks lost.
    exact_needed: int = 0
    exact_hits: int = 0
    replaced: int = 0
    replaced_mass: float = 0.0
    # Of decode: experts predicted, those of them that were needed, prefetched records that were.
    predicted: int = 0
    predicted_right: int = 0
    prefetch_used: int = 0
    prefill_prefetched: int = 0  # of `prefetched`
    load_us: float | None = None  # live cost of a record over the link, microseconds
    host_us: float | None = None  # live cost of an expert on the host
    drift: DriftStats | None = None
    stall_seconds: float = 0.0  # of decode, waited for a link
    link_bytes: int | None = None  # read or begun by the link since the run began, if there is one
    prefill_link_bytes: int = 0  # of those
    virtual: bool = False  # weights are read in place: nothing is copied
    # or "faithful" (same routing, other rounding), "in distribution" (drafted and sampled), "lossy"
    label: str = "bit-exact"
    ttft: float | None = None
    decode_seconds: float = 0.0

    @property
    def hit_rate(self) -> float | None:
        """Share of decode's expert uses that found the expert resident."""
        return self.hits / self.needed if self.needed else None

    @property
    def exact_hit_rate(self) -> float | None:
        """Share of the uses of the model's own router in decode that would have been hits."""
        return self.exact_hits / self.exact_needed if self.exact_needed else None

    @property
    def prediction_precision(self) -> float | None:
        """Share of the predicted experts that were needed."""
        return self.predicted_right / self.predicted if self.predicted else None

    @property
    def prediction_recall(self) -> float | None:
        """Share of decode's expert uses that had been predicted, in layers with and without."""
        return self.predicted_right / self.needed if self.predicted else None

    @property
    def prefetch_use(self) -> float | None:
        """Share of the records given a slot ahead, in decode, that were used before they left.

        Over a link, one that was cancelled on its way counts as prefetched too.
        """
        fetched = self.prefetched - self.prefill_prefetched
        return self.prefetch_used / fetched if fetched else None

    @property
    def acceptance(self) -> float | None:
        """Share of the drafted tokens that were accepted."""
        return self.accepted / self.drafted if self.drafted else None

    @property
    def drafted_share(self) -> float | None:
        """Share of the cycles of which drafts were asked."""
        cycles = sum(self.draft_lengths.values())
        return 1.0 - self.draft_lengths.get(0, 0) / cycles if cycles else None

    @property
    def tokens_per_step(self) -> float | None:
        """Tokens of a sequence that a decode step makes: 1, or what speculation makes of it."""
        if not self.steps:
            return None
        return 1.0 + self.accepted / self.row_steps if self.row_steps else 1.0

    @property
    def tpot(self) -> float | None:
        """Seconds per output token of one sequence, in decode."""
        if not self.steps:
            return None
        return self.decode_seconds / self.steps / self.tokens_per_step

    @property
    def bytes_moved(self) -> int:
        """Bytes moved into slots, as the link counts them; without a link, by records."""
        if self.link_bytes is not None:
            return self.link_bytes
        return (self.fetched + self.prefetched) * self.record_bytes

    @property
    def bytes_per_step(self) -> float | None:
        """Bytes moved per decode step or cycle."""
        if not self.steps:
            return None
        if self.link_bytes is not None:
            return (self.link_bytes - self.prefill_link_bytes) / self.steps
        moved = self.fetched + self.prefetched - self.prefill_moved
        return moved * self.record_bytes / self.steps

    def add(self, totals: Totals | None, *, prefill: bool) -> None:
        """Count one step, whose totals are on the host."""
        if totals is None:
            return
        for name in ("fetched", "prefetched", "host", "low"):
            setattr(self, name, getattr(self, name) + int(getattr(totals, name)))
        if prefill:
            self.prefill_moved += int(totals.fetched) + int(totals.prefetched)
            self.prefill_prefetched += int(totals.prefetched)
            self.prefill_needed += int(totals.needed)
            self.prefill_hits += int(totals.hits)
            return
        for name in _IN_DECODE:
            setattr(self, name, getattr(self, name) + int(getattr(totals, name)))
        self.replaced_mass += float(totals.replaced_mass)
        self.stall_seconds += float(totals.stall) / 1e6

    def add_cycle(self, made: Any, active: np.ndarray, gamma: int, kept: int) -> None:
        """Count a cycle (`speculate.Made`, on the host) of the sequences `active` [B].

        Args:
            gamma: its draft length.
            kept: tokens that count, up to stops.
        """
        self.add(made.totals, prefill=False)
        rows = int(active.sum())
        self.steps += 1
        self.row_steps += rows
        self.drafted += int(made.drafted.sum())
        self.accepted += kept - rows
        self.draft_lengths[gamma] = self.draft_lengths.get(gamma, 0) + 1
        self.prefetched += int(made.prefetched)
        self.draft_prefetched += int(made.prefetched)
        self.stall_seconds += float(made.draft_stall) / 1e6

    def as_dict(self) -> dict[str, Any]:
        """All fields and derived figures, for JSON."""
        names = ("hit_rate", "exact_hit_rate", "prediction_precision", "prediction_recall")
        names += (
            "acceptance",
            "drafted_share",
            "tokens_per_step",
            "prefetch_use",
            "tpot",
            "bytes_moved",
            "bytes_per_step",
        )
        derived = {name: getattr(self, name) for name in names}
        return dataclasses.asdict(self) | derived
