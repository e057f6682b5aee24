"""What a run cost, as a table for people and as a document."""

from typing import Any

from moejax.terminal import Terminal
from moejax.units import format_bytes

NOISE = 0.05  # of times
SELDOM = 0.05  # share of cycles drafted, below which times say nothing about drafts


def stats_document(runtime: Any) -> dict[str, Any]:
    """What a run cost, and under which budget."""
    total = runtime.config.num_moe_layers * runtime.config.num_experts
    budget = {"slots": runtime.slots, "experts": total, "context": runtime.context}
    model = runtime.model
    how = {"dtype": model.dtype, "quant": model.quant, "kernels": model.kernels}
    more = {"link": runtime.tier, "plain_step_ms": runtime.plain_step_ms()}
    return runtime.stats.as_dict() | budget | how | more


def show_stats(terminal: Terminal, runtime: Any) -> None:
    """The table under an answer."""
    terminal.facts(stats_rows(runtime))


def stats_rows(runtime: Any) -> list[tuple[str, str]]:
    """What a run cost, for people."""
    stats, config = runtime.stats, runtime.config
    total = config.num_moe_layers * config.num_experts
    rows = [("tokens", f"{stats.prompt_tokens} in, {stats.new_tokens} out")]
    if stats.ttft is not None:
        rows.append(("time to first token", f"{stats.ttft * 1e3:.1f} ms"))
    if stats.tpot is not None:
        rate = f"{1 / stats.tpot:.1f} per second"
        rows.append(("time per output token", f"{stats.tpot * 1e3:.2f} ms ({rate})"))
    rows += _drafts(stats, runtime.plain_step_ms())
    if total:
        rows += [("experts resident", _resident(runtime, total)), *_hits(stats)]
        rows += _traffic(stats, runtime)
    if runtime.tier:
        waited = f"waited {stats.stall_seconds / max(stats.steps, 1) * 1e3:.2f} ms per decode step"
        rows.append(("link", f"{runtime.tier}, {waited}"))
    rows += _drift(stats)
    rows.append(("result", _label(stats, runtime.model.quant)))
    return rows


def drafts_in_words(
    per_cycle: float, acceptance: float | None, share: float, ms: float, plain_ms: float | None
) -> str:
    """What drafts did for a run, in one line.

    Args:
        per_cycle: tokens of a sequence.
        acceptance: share of the drafted tokens; None = there were none.
        share: of the cycles, those of which drafts were asked.
        ms: of a token.
        plain_ms: of a plain step, as the run timed it; None = it did not.
    """
    if acceptance is None:
        return f"{per_cycle:.2f} tokens per cycle, nothing was drafted"
    drafted = f"{acceptance:.0%} of drafts accepted, {share:.0%} of cycles drafted"
    said = f"{per_cycle:.2f} tokens per cycle, {drafted}"
    if plain_ms is None or share < SELDOM:
        return said
    slower = "slower than" if ms > plain_ms else "faster than"
    slower = "as fast as" if abs(ms / plain_ms - 1) < NOISE else slower
    return f"{said}; {slower} plain steps ({ms:.2f} against {plain_ms:.2f} ms per token)"


def _drafts(stats: Any, plain_ms: float | None) -> list[tuple[str, str]]:
    if not stats.row_steps:
        return []
    numbers = (stats.tokens_per_step, stats.acceptance, stats.drafted_share, stats.tpot * 1e3)
    lengths = ", ".join(f"{n} of {g}" for g, n in sorted(stats.draft_lengths.items()))
    rows = [("speculation", drafts_in_words(*numbers, plain_ms))]
    rows.append(("cycles by draft length", lengths))
    seconds = stats.draft_prefill_seconds
    return [*rows, ("draft model's prompt", f"{seconds * 1e3:.1f} ms")] if seconds > 0.01 else rows


def _hits(stats: Any) -> list[tuple[str, str]]:
    if stats.hit_rate is None:
        return []
    uses = f"{stats.hits} of {stats.needed} uses in decode"
    rows = [("expert hit rate", f"{stats.hit_rate:.1%} ({uses})")]
    if stats.label != "lossy":
        return rows
    if stats.exact_hit_rate is not None:
        uses = f"{stats.exact_hits} of {stats.exact_needed} uses"
        rows.append(("of the model's own picks", f"{stats.exact_hit_rate:.1%} ({uses})"))
    rows.append(("picks replaced", f"{stats.replaced / stats.steps:.2f} per decode step"))
    if stats.low:
        rows.append(("experts at low bits", f"{stats.low}, prefill included"))
    return rows


def _resident(runtime: Any, total: int) -> str:
    stats, slots = runtime.stats, runtime.slots_in_use
    if _in_place(runtime):
        return f"all {total} fit: weights are read in place"
    moved, hits = stats.fetched + stats.prefetched, stats.hits + stats.prefill_hits
    if stats.host and not moved and not hits and runtime.residency_file is None:
        empty = f"0 of {slots} slots filled: this policy fills none by itself"
        return f"{empty}, give --residency-file to begin with some"
    return f"{slots} of {total} ({slots / total:.0%})"


def _in_place(runtime: Any) -> bool:
    """Whether every expert has its slot, and nothing would be copied."""
    experts = runtime.config.num_moe_layers * runtime.config.num_experts
    return runtime.stats.virtual and runtime.slots_in_use == experts


def _traffic(stats: Any, runtime: Any) -> list[tuple[str, str]]:
    before = format_bytes(stats.prefill_moved * stats.record_bytes)
    each = format_bytes(stats.bytes_per_step or 0)
    name = "would be copied" if stats.virtual else "read" if runtime.tier == "disk" else "copied"
    rows = [(f"expert bytes {name}", f"{before} in prefill, {each} per decode step")]
    if _in_place(runtime) and not stats.bytes_moved:
        rows = []
    rows += _ahead(stats, runtime.policy)
    if stats.host:
        rows.append(("experts on the host", f"{stats.host}, prefill included"))
    costs = {"record over the link": stats.load_us, "expert on the host": stats.host_us}
    known = [f"{name} {cost:.0f} us" for name, cost in costs.items() if cost is not None]
    return [*rows, ("live costs", ", ".join(known))] if known else rows


def _ahead(stats: Any, policy: Any) -> list[tuple[str, str]]:
    """What came of prefetches, or of what a foresight alone brought in after steps."""
    if stats.prediction_precision is None:
        return []
    used = ""
    if stats.prefetch_use is not None:
        fetched = stats.prefetched - stats.prefill_prefetched
        used = f"{stats.prefetch_use:.0%} of {fetched} records used"
    if not policy.predictor.horizon and not policy.foresight.drafts:
        return [("brought in between steps", used)] if used else []
    said = f"{stats.prediction_precision:.0%} of the predicted experts were needed"
    return [("prefetch", f"{said}, {used}" if used else said)]


def _drift(stats: Any) -> list[tuple[str, str]]:
    drift = stats.drift
    if drift is None:
        return []
    if not drift.probes:
        return [("drift", "not looked at: no decode step was made")]
    share = drift.seconds / stats.decode_seconds
    looked = f"{drift.probes} probes, {share:.1%} of the time"
    return [("drift", f"{drift.nats:.3g} nats per token; alpha {drift.alpha:.3g} ({looked})")]


def _label(stats: Any, quant: str | None) -> str:
    of = f" of the {quant} model" if quant else ""
    each = stats.replaced_mass / max(stats.steps, 1)
    return {
        "bit-exact": f"bit-exact: the bits of the fully resident run{of}",
        "faithful": "faithful: the model's own routing and experts",
        "in distribution": f"in distribution: tokens drawn as from the fully resident run{of}, "
        "not the same ones (at temperature 0 they are)",
        "lossy": f"lossy: the model's own picks lost {each:.3g} of router weight per decode step",
    }[stats.label]
