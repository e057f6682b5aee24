"""What of a model fits where, how fast it will be and what limits it, before anything is read."""

import dataclasses
import shlex
from typing import Any

from moejax import allocator, decode, devices, tiers
from moejax.config import ModelConfig
from moejax.errors import BudgetError, InputError
from moejax.formats import quant_format
from moejax.layout import DTYPES
from moejax.planner import reuse
from moejax.planner.layout import (
    Asked,
    Layout,
    Source,
    behind,
    chunk_of,
    lacking,
    layout_of,
    read,
    work_of,
)
from moejax.planner.machines import Machine
from moejax.planner.predict import Times, moving_ms, prompt, token
from moejax.planner.recommend import (
    IN_PLACE,
    OFFLOADED,
    RESIDENT,
    Proposal,
    forced,
    recommended,
)
from moejax.units import format_bytes

FORMATS = (None, "int8", "int4")
MOVERS = {"link": "the link", "disk": "the disk", "memory": "copies"}  # by tier


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """Where everything lies under a budget, and what that costs; sizes in bytes."""

    model: str
    machine: Machine
    format: str
    quant: str | None  # as --quant takes it
    tier: str  # one of predict.TIERS
    context: int
    prompt: int
    slots: int
    experts: int  # in all layers
    slots_per_layer: float
    hosted: bool  # misses are computed on the host where that is sooner
    budget: int | None  # of fast memory; None = nothing limits it
    memory: dict[str, int]  # in fast memory, by part
    store: dict[str, int]  # elsewhere, by place
    environment: dict[str, str]  # variables that loading sets
    hits: reuse.Hits
    tpot: Times  # at half of the context
    tpot_range_ms: tuple[float, float]  # from the best routing to expect to the worst
    ttft: Times
    limit: str
    ttft_limit: str
    bounds_ms: dict[str, float]
    policy: str
    reason: str
    command: str
    notes: list[str]
    alternatives: list[dict[str, Any]]

    def as_dict(self) -> dict[str, Any]:
        """All fields, for JSON."""
        times = {"tpot": self.tpot.as_dict(), "ttft": self.ttft.as_dict()}
        return dataclasses.asdict(self) | times


def make(asked: Asked, planned_for: Machine) -> Plan:
    """The plan for a machine: in the format asked for, else the first of FORMATS that fits.

    Raises:
        BudgetError: nothing fits; the message lists what takes the memory.
        InputError: options that contradict each other or the model.
    """
    source = read(asked.model, asked.context)
    config = source.config
    if not config.moe_layers:
        raise InputError(f"{asked.model} has no experts to plan for: see `moejax inspect`")
    if asked.dtype not in DTYPES:
        raise InputError(f"dtype {asked.dtype!r} is not one of {', '.join(DTYPES)}")
    if asked.prompt < 1:
        raise InputError(f"a prompt has at least one token, not {asked.prompt}")
    if planned_for.kind == "cpu" and None not in (asked.device_memory, asked.host_memory):
        raise InputError("without a GPU give only one of --device-memory and --host-memory")
    context = decode.checked_context(config, asked.context)
    formats = FORMATS if asked.quant is None and not source.fixed else (asked.quant,)
    failures: list[BudgetError] = []
    for quant in formats:
        form = source.quant if source.fixed else quant_format(quant, asked.group)
        try:
            fixed = (asked, planned_for, config, form, context)
            layout, chosen = _proposed(*fixed)
            return _plan(asked, planned_for, source, layout, chosen, quant, bool(failures))
        except BudgetError as error:
            failures.append(error)
    if len(failures) == 1:
        raise failures[0]
    raise BudgetError(f"even with {formats[-1]} weights: {failures[-1]}")


def _proposed(
    asked: Asked, planned_for: Machine, config: ModelConfig, form: str | None, context: int
) -> tuple[Layout, Proposal]:
    """What the budget holds, with the policy that the plan's own times recommend, or asked for.

    A policy may need memory of its own, and so have fewer slots than those for which it was
    recommended: it is taken only if it is recommended for what it leaves, too.
    """
    fixed = (asked, planned_for, config, form, context)
    layout = layout_of(*fixed, asked.policy or OFFLOADED)
    if asked.policy is not None:
        return layout, forced(asked.policy, layout, planned_for)
    work = work_of(config, asked.dtype, form, layout.kv / context)
    machine = behind(planned_for, layout.link, work)
    refused: dict[str, str] = {}

    def proposed(within: Layout) -> Proposal:
        rate = _hits(asked, config, within.slots).middle
        return recommended(within, work, machine, rate, context / 2, refused)

    while (chosen := proposed(layout)).policy != OFFLOADED:
        try:
            own = layout_of(*fixed, chosen.policy)
        except BudgetError as error:
            refused[chosen.policy] = f"what they need beside the model does not fit: {error}"
            continue
        again = proposed(own)
        if again.policy == chosen.policy:
            return own, again
        why = "; ".join(again.against) or again.reason
        refused[chosen.policy] = (
            f"what they need beside the model leaves {own.slots} of {own.total} slots; with those: "
            f"{why}"
        )
    return layout, chosen


def _plan(
    asked: Asked,
    planned_for: Machine,
    source: Source,
    layout: Layout,
    chosen: Proposal,
    quant: str | None,
    cut: bool,
) -> Plan:
    config, at, tier = source.config, layout.context / 2, layout.tier
    work = work_of(config, asked.dtype, layout.model.quant, layout.kv / layout.context)
    machine = behind(planned_for, layout.link, work)
    hits = _hits(asked, config, layout.slots, chosen.policy)
    lru = _hits(asked, config, layout.slots).middle

    def step(rate: float, tier: str = tier, hosted: bool = chosen.hosted) -> Times:
        return token(work, machine, tier, rate, at, hosted=hosted)

    moved = "resident" if chosen.policy == IN_PLACE else tier  # in a prompt, likewise
    first = prompt(work, machine, moved, layout.slots, asked.prompt, chunk_of(asked.prompt))
    middle, misses = step(hits.middle), work.moe_layers * work.top_k * (1 - lru)
    bounds = {"all experts resident": step(1.0, "resident").total_ms}
    if tier != "resident":
        bounds[f"{MOVERS[tier]} alone"] = moving_ms(work, machine, tier, misses)
    if chosen.hosted:
        bounds["all misses moved"] = step(lru, hosted=False).total_ms
    gpu = machine.device_memory if machine.kind == "gpu" else None
    pinned = layout.total * layout.record if tier == "link" else 0
    return Plan(
        model=source.name,
        machine=machine,
        format=layout.form,
        quant=quant,
        tier=tier,
        context=layout.context,
        prompt=asked.prompt,
        slots=layout.slots,
        experts=layout.total,
        slots_per_layer=layout.slots / config.num_moe_layers,
        hosted=chosen.hosted,
        budget=layout.budget,
        memory=_memory(layout),
        store=_store(layout, machine),
        environment=allocator.environment_for(gpu and layout.budget, gpu, pinned),
        hits=hits,
        tpot=middle,
        tpot_range_ms=(step(hits.high).total_ms, step(hits.low).total_ms),
        ttft=first,
        limit=middle.limit(machine, tier),
        ttft_limit=first.limit(machine, tier),
        bounds_ms=bounds,
        policy=chosen.policy,
        reason=chosen.reason,
        command=_command(asked, source, layout, quant, chosen.policy),
        notes=_notes(asked, source, machine, layout, cut, chosen),
        alternatives=_alternatives(asked, planned_for, source, layout, chosen),
    )


def _store(layout: Layout, machine: Machine) -> dict[str, int]:
    """Bytes of the records that are elsewhere, by place."""
    if layout.tier == "resident":
        return {}
    pinned = layout.tier == "link" and machine.kind == "gpu"
    place = "on the disk" if layout.tier == "disk" else "in memory"
    return {"in pinned host memory" if pinned else place: layout.total * layout.record}


def _memory(layout: Layout) -> dict[str, int]:
    """Bytes of fast memory by part, which sum up to the budget."""
    memory = {"dense weights": layout.dense, "KV cache": layout.kv}
    memory |= {"records read ahead": layout.ahead} if layout.ahead else {}
    memory |= {"expert slots": layout.slots * layout.record}
    if layout.budget is not None:
        memory["workspace and rest"] = layout.budget - sum(memory.values())
    return memory


def _hits(asked: Asked, config: ModelConfig, slots: int, policy: str = RESIDENT) -> reuse.Hits:
    sizes = (slots, config.num_moe_layers, config.num_experts, config.top_k)
    if policy == IN_PLACE:
        return reuse.Hits(0.0, 0.0, 0.0, "this policy moves nothing into slots, which begin empty")
    if asked.curve is None:
        return reuse.expected(*sizes)
    rate = asked.curve.at(*sizes)
    return reuse.Hits(rate, rate, rate, f"by a trace of {asked.curve.model}: {asked.curve.source}")


def _command(asked: Asked, source: Source, layout: Layout, quant: str | None, policy: str) -> str:
    words = ["moejax", "generate", "--model", source.name, *layout.options, "--policy", policy]
    words += ["--context", str(layout.context)]
    words += ["--quant", quant] if quant else []
    words += ["--group", str(asked.group)] if quant == "int4" and asked.group != 32 else []
    words += ["--dtype", asked.dtype] if asked.dtype != "bfloat16" else []
    return shlex.join(words)


def _notes(
    asked: Asked, source: Source, machine: Machine, layout: Layout, cut: bool, chosen: Proposal
) -> list[str]:
    notes = []
    if cut:
        notes.append(
            f"it does not fit with {asked.dtype} weights: planned with {layout.form}, which changes"
            " results a little"
        )
    notes += chosen.against
    if layout.tier == "memory":
        notes.append(
            "without a GPU all experts lie in memory anyway, and --device-memory only bounds the "
            "slots: leave it out, or give --host-memory to take less memory"
        )
    if machine.kind == "gpu":
        notes.append("the GPU path is written, but no GPU has confirmed it yet, nor these times")
    if layout.tier == "link" and not layout.link:
        pinned = layout.total * layout.record
        limit = allocator.DEFAULT_HOST_LIMIT << 30
        if pinned + allocator.HOST_MARGIN <= limit:
            then = "which holds the records"
        else:
            then = "less than the records take: loading has it raised, as shown above"
        notes.append(f"XLA pins at most {format_bytes(limit)} of host memory by default, {then}")
        notes.append("XLA's workspace is that of a compilation for this machine, not for the GPU")
    if layout.tier == "disk" and not source.fixed:
        size = format_bytes(layout.total * layout.record + layout.dense)
        notes.append(f"the first run converts the model into {size} on the disk, once")
    if "assumed" in " ".join(machine.sources.values()):
        notes.append("rates come from published figures and assumptions, see `machine` in --json")
    return notes


def _alternatives(
    asked: Asked, planned_for: Machine, source: Source, layout: Layout, chosen: Proposal
) -> list[dict[str, Any]]:
    """Each other format in the same budget, as far as sizes tell; empty if the format is fixed.

    The workspace counts as large as that of the planned format.
    """
    config, total = source.config, layout.total
    taken = layout.dense + layout.kv + layout.ahead + layout.slots * layout.record
    rest = max((layout.budget or taken) - taken, 0) if layout.slots < total else 0
    rows = []
    for quant in () if source.fixed else FORMATS:
        form = quant_format(quant, asked.group)
        work = work_of(config, asked.dtype, form, layout.kv / layout.context)
        dense, slots = devices.dense_bytes(config, asked.dtype, form), total
        if layout.budget is not None:
            ahead = tiers.BUFFERS * work.record_bytes if layout.ahead else 0
            left = layout.budget - dense - layout.kv - ahead - rest
            slots = min(max(left, 0) // work.record_bytes, total)
        tier = "resident" if slots == total else layout.base
        stored = total * work.record_bytes if tier in ("link", "memory") else 0
        if slots < config.top_k or lacking(planned_for, asked, stored, layout.budget):
            continue
        hits = _hits(asked, config, slots, chosen.policy).middle
        machine = behind(planned_for, layout.link, work)
        how = {"hosted": chosen.hosted}
        times = token(work, machine, tier, hits, layout.context / 2, **how)
        rows.append(
            {
                "format": form or asked.dtype,
                "slots": slots,
                "share": slots / total,
                "tpot_ms": times.total_ms,
                "limit": times.limit(machine, tier),
            }
        )
    return rows
