"""What of a model fits where, how fast it will be and what limits it, before anything is read."""

import dataclasses
import math
import pathlib
import shlex
from typing import Any

from moejax import allocator, decode, describe, devices, loading, tiers
from moejax.checkpoints import convert, gguf_file, headers
from moejax.config import ModelConfig
from moejax.errors import BudgetError, InputError
from moejax.formats import quant_format
from moejax.layout import DTYPES
from moejax.models import config_from_hf
from moejax.models.shapes import held_parameters, parameter_shapes
from moejax.models.transformer import Decoder
from moejax.planner import catalogue, reuse
from moejax.planner.machines import Machine
from moejax.planner.predict import Times, Work, moving_ms, prompt, token
from moejax.policies.policy import policy as named_policy
from moejax.units import format_bytes

OFFLOADED, RESIDENT = "score-window:window=32", "lru"
REASONS = {
    OFFLOADED: "exact, misses less than lru on the embedded model; `--verify` compares them here",
    RESIDENT: "all experts are in fast memory: nothing is ever evicted",
}
FORMATS = (None, "int8", "int4")
GPU_RESERVE = 1 << 30  # bytes: CUDA's context, libraries and other programs; not measured
MIB = 1 << 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asked:
    """What a plan is asked for; sizes in bytes."""

    model: str
    device_memory: int | None = None
    host_memory: int | None = None
    context: int | None = None
    prompt: int = 512  # tokens
    dtype: str = "bfloat16"
    quant: str | None = None
    group: int = 32
    curve: reuse.Curve | None = None  # of a trace


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


@dataclasses.dataclass(frozen=True)
class Source:
    """A model as far as its config and headers tell."""

    name: str
    config: ModelConfig
    quant: str | None = None  # of a converted directory, whose format is fixed
    fixed: bool = False


def read(name: str, context: int | None = None) -> Source:
    """The config of a known name, a config.json, a .gguf file or a directory, headers checked.

    Raises:
        MoejaxError: there is no such model, or what there is cannot be used.
    """
    path = pathlib.Path(name).expanduser()
    if name in catalogue.CONFIGS and not path.exists():
        return Source(name, config_from_hf(catalogue.CONFIGS[name]))
    if path.suffix == ".json" and path.is_file():
        found = headers.parse_json(headers.read_small(path), str(path))
        return Source(str(path.parent), config_from_hf(found))
    if gguf_file.is_gguf(path):
        return Source(name, config_from_hf(loading.read_config(path)))
    directory = loading.resolve(name, download=False)
    if convert.is_converted(directory):
        facts = describe.describe(directory, context)
        config = config_from_hf(loading.read_config(directory))
        return Source(name, config, facts.quant, fixed=True)
    if any(directory.glob("*.safetensors")):
        describe.describe(directory, context)
    return Source(name, config_from_hf(loading.read_config(directory)))


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
        raise InputError("without a GPU give only one of device_memory and host_memory")
    context = decode.checked_context(config, asked.context)
    formats = FORMATS if asked.quant is None and not source.fixed else (asked.quant,)
    failures: list[BudgetError] = []
    for quant in formats:
        form = source.quant if source.fixed else quant_format(quant, asked.group)
        try:
            layout = _layout(asked, planned_for, config, form, context)
            return _plan(asked, planned_for, source, layout, quant, bool(failures))
        except BudgetError as error:
            failures.append(error)
    raise failures[-1]


@dataclasses.dataclass(frozen=True)
class _Layout:
    """Slots and sizes of a model under a budget, by the arithmetic of loading."""

    model: Decoder
    context: int
    base: str  # tier of experts that have no slot
    slots: int
    budget: int | None
    options: tuple[str, ...]  # of the command
    dense: int
    kv: int
    ahead: int = 0

    @property
    def tier(self) -> str:
        config = self.model.config
        whole = self.slots == config.num_moe_layers * config.num_experts
        return "resident" if whole else self.base

    @property
    def form(self) -> str:
        return self.model.quant or self.model.dtype

    @property
    def record(self) -> int:
        return self.model.config.record_layout(self.form).stride


def _layout(
    asked: Asked, planned_for: Machine, config: ModelConfig, form: str | None, context: int
) -> _Layout:
    """What the budget holds, by the functions that loading calls."""
    on_gpu = planned_for.kind == "gpu"
    model = Decoder(config, asked.dtype, form, "reference" if on_gpu else devices.kernels(None))
    total = config.num_moe_layers * config.num_experts
    record = config.record_layout(form or asked.dtype).stride
    dense = devices.dense_bytes(config, asked.dtype, form)
    kv, chosen = devices.kv_bytes(model, 1, context), named_policy(OFFLOADED)
    sizes = {"dense": dense, "kv": kv}
    if on_gpu or asked.device_memory is not None:
        memory = asked.device_memory or _floor(planned_for.device_memory - GPU_RESERVE)
        if memory > planned_for.device_memory:
            raise InputError(
                f"a budget of {format_bytes(memory)} is more than {planned_for.name} has"
            )
        slots = min(devices.slots_for(model, chosen, memory, context), total)
        stored = total * record if slots < total else 0
        lacking = _lacking(planned_for, asked, stored if on_gpu else stored + memory)
        if lacking:
            raise BudgetError(lacking)
        option, base = ("--device-memory", _text(memory)), "link" if on_gpu else "memory"
        return _Layout(model, context, base, slots, memory, option, **sizes)
    whole = dense + kv + total * record + tiers.PROCESS_BYTES
    if asked.host_memory is None and whole <= planned_for.host_memory:
        return _Layout(model, context, "disk", total, None, (), **sizes)
    memory = asked.host_memory or _floor(planned_for.host_memory - 2 * tiers.PROCESS_BYTES)
    link, slots = tiers.on_host(model, chosen, memory, context, 1, None)
    ahead, option = tiers.BUFFERS * record if link else 0, ("--host-memory", _text(memory))
    return _Layout(model, context, "disk", min(slots, total), memory, option, **sizes, ahead=ahead)


def _floor(memory: int) -> int:
    return max(memory // MIB, 1) * MIB


def _text(memory: int) -> str:
    return f"{memory // MIB}MiB" if memory % MIB == 0 else str(memory)


def _lacking(planned_for: Machine, asked: Asked, needed: int) -> str | None:
    """Why the host's memory does not hold so many bytes, None if it does."""
    given = asked.host_memory if planned_for.kind == "gpu" else None
    memory = given or planned_for.host_memory
    needed += allocator.HOST_MARGIN if planned_for.kind == "gpu" and needed else 0
    if needed <= memory:
        return None
    return (
        f"{format_bytes(needed)} of the host's memory are needed, which has {format_bytes(memory)}:"
        " quantise the experts, or plan for more memory"
    )


def work_of(config: ModelConfig, dtype: str, form: str | None, kv_bytes_per_token: float) -> Work:
    """What a token of a model reads and computes."""
    held = held_parameters(config, dtype, form)
    rows = () if config.tied_embeddings else ("embed",)  # of an untied embedding only rows are read
    read = {path: h for path, h in held.items() if path.split("/")[0] not in rows}
    shapes, layout = parameter_shapes(config), config.record_layout(form or dtype)
    return Work(
        layers=config.num_layers,
        moe_layers=config.num_moe_layers,
        experts=config.num_experts,
        top_k=config.top_k,
        record_bytes=layout.stride,
        expert_bytes=layout.weight_bytes,
        expert_weights=3 * config.width * config.expert_width,
        dense_bytes=sum(math.prod(h.shape) * h.dtype.itemsize for h in read.values()),
        dense_weights=sum(math.prod(shapes[path]) for path in read),
        kv_bytes_per_token=kv_bytes_per_token,
        attention_width=config.num_heads * config.head_dim,
        head_weights=config.vocab_size * config.width,
    )


def chunk_of(tokens: int) -> int:
    """Tokens of one step of a prompt, as the engine cuts it."""
    return decode.LONG_CHUNK if tokens >= decode.LONG_FROM else decode.SHORT_CHUNK


def _plan(
    asked: Asked, planned_for: Machine, source: Source, layout: _Layout, quant: str | None, cut
) -> Plan:
    config, form = source.config, layout.model.quant
    total = config.num_moe_layers * config.num_experts
    work = work_of(config, asked.dtype, form, layout.kv / layout.context)
    hits = _hits(asked, config, layout.slots)
    at = layout.context / 2

    def step(rate: float, tier: str = layout.tier) -> Times:
        return token(work, planned_for, tier, rate, at)

    first = prompt(
        work, planned_for, layout.tier, layout.slots, asked.prompt, chunk_of(asked.prompt)
    )
    middle = step(hits.middle)
    misses = work.moe_layers * work.top_k * (1 - hits.middle)
    policy = RESIDENT if layout.tier == "resident" else OFFLOADED
    records = total * layout.record
    memory = {"dense weights": layout.dense, "KV cache": layout.kv}
    memory |= {"records read ahead": layout.ahead} if layout.ahead else {}
    memory |= {"expert slots": layout.slots * layout.record}
    if layout.budget is not None:
        memory["workspace and rest"] = layout.budget - sum(memory.values())
    pinned = records if layout.tier == "link" else 0
    gpu = planned_for.device_memory if planned_for.kind == "gpu" else None
    return Plan(
        model=source.name,
        machine=planned_for,
        format=layout.form,
        quant=quant,
        tier=layout.tier,
        context=layout.context,
        prompt=asked.prompt,
        slots=layout.slots,
        experts=total,
        slots_per_layer=layout.slots / config.num_moe_layers,
        budget=layout.budget,
        memory=memory,
        store={} if layout.tier == "resident" else {_place(layout.tier): records},
        environment=allocator.environment_for(gpu and layout.budget, gpu, pinned),
        hits=hits,
        tpot=middle,
        tpot_range_ms=(step(hits.high).total_ms, step(hits.low).total_ms),
        ttft=first,
        limit=middle.limit(planned_for, layout.tier),
        ttft_limit=first.limit(planned_for, layout.tier),
        bounds_ms={
            "all experts resident": step(1.0, "resident").total_ms,
            "link alone": 0.0
            if layout.tier == "resident"
            else moving_ms(work, planned_for, layout.tier, misses),
        },
        policy=policy,
        reason=REASONS[policy],
        command=_command(asked, layout, quant, policy),
        notes=_notes(asked, planned_for, layout, cut, pinned),
        alternatives=_alternatives(asked, planned_for, source, layout),
    )


def _place(tier: str) -> str:
    return {"link": "in pinned host memory", "memory": "in memory", "disk": "on the disk"}[tier]


def _hits(asked: Asked, config: ModelConfig, slots: int) -> reuse.Hits:
    sizes = (slots, config.num_moe_layers, config.num_experts, config.top_k)
    if asked.curve is None:
        return reuse.expected(*sizes)
    rate = asked.curve.at(*sizes)
    return reuse.Hits(rate, rate, rate, f"trace of {asked.curve.model}: {asked.curve.source}")


def _command(asked: Asked, layout: _Layout, quant: str | None, policy: str) -> str:
    words = ["moejax", "generate", "--model", asked.model, *layout.options, "--policy", policy]
    words += ["--context", str(layout.context)]
    words += ["--quant", quant] if quant else []
    words += ["--group", str(asked.group)] if quant == "int4" and asked.group != 32 else []
    words += ["--dtype", asked.dtype] if asked.dtype != "bfloat16" else []
    return shlex.join(words)


def _notes(asked: Asked, planned_for: Machine, layout: _Layout, cut: bool, pinned: int) -> list:
    notes = []
    if cut:
        notes.append(
            f"it does not fit with {asked.dtype} weights: planned with {layout.form}, which changes"
            " results a little"
        )
    if layout.tier == "link":
        limit = allocator.DEFAULT_HOST_LIMIT << 30
        fits = "fit" if pinned + allocator.HOST_MARGIN <= limit else "do not fit, so it is raised,"
        notes.append(
            f"XLA pins at most {format_bytes(limit)} of host memory by default: the records {fits} "
            "(set before JAX starts)"
        )
        notes.append("XLA's workspace is that of a compilation for this machine, not for the GPU")
    if layout.tier == "disk":
        notes.append("the first run converts the model once, as large again, unless it already is")
    if "assumed" in " ".join(planned_for.sources.values()):
        notes.append("rates come from datasheets and assumptions, see `machine` in --json")
    return notes


def _alternatives(
    asked: Asked, planned_for: Machine, source: Source, layout: _Layout
) -> list[dict[str, Any]]:
    """Each other format in the same budget, as far as sizes tell; empty if the format is fixed.

    The workspace counts as large as that of the planned format.
    """
    config = source.config
    total = config.num_moe_layers * config.num_experts
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
        if slots < config.top_k or _lacking(planned_for, asked, stored):
            continue
        hits = _hits(asked, config, slots)
        times = token(work, planned_for, tier, hits.middle, layout.context / 2)
        rows.append(
            {
                "format": form or asked.dtype,
                "slots": slots,
                "share": slots / total,
                "tpot_ms": times.total_ms,
                "limit": times.limit(planned_for, tier),
            }
        )
    return rows
