"""What is asked of a plan, and what of a model fits where: by the functions that loading calls."""

import dataclasses
import math
import pathlib

from moejax import allocator, decode, describe, devices, loading, tiers
from moejax.checkpoints import convert, gguf_file, headers
from moejax.config import ModelConfig
from moejax.errors import BudgetError, HubError, InputError
from moejax.models import config_from_hf
from moejax.models.shapes import held_parameters, parameter_shapes
from moejax.models.transformer import Decoder
from moejax.planner import catalogue, reuse
from moejax.planner.machines import Machine
from moejax.planner.predict import Work
from moejax.policies.policy import policy as named_policy
from moejax.units import format_bytes

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
    link: str | None = None  # what experts are moved over on a machine without a GPU: "paced:..."
    policy: str | None = None  # instead of the one that is recommended
    curve: reuse.Curve | None = None  # of a trace


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
    directory = _resolved(name)
    if convert.is_converted(directory):
        facts = describe.describe(directory, context)
        config = config_from_hf(loading.read_config(directory))
        return Source(name, config, facts.quant, fixed=True)
    if any(directory.glob("*.safetensors")):
        describe.describe(directory, context)
    return Source(name, config_from_hf(loading.read_config(directory)))


def _resolved(name: str) -> pathlib.Path:
    try:
        return loading.resolve(name, download=False)
    except HubError as error:
        raise HubError(
            f"{name} is no directory here and no model in the local cache, and a plan downloads "
            f"nothing: run `hf download {name} config.json`, which is all that it needs. Known "
            f"without: {', '.join(catalogue.CONFIGS)}"
        ) from error


@dataclasses.dataclass(frozen=True)
class Layout:
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
    link: tiers.Link | None = None

    @property
    def total(self) -> int:
        """Experts in all layers."""
        return self.model.config.num_moe_layers * self.model.config.num_experts

    @property
    def tier(self) -> str:
        """One of `predict.TIERS`."""
        return "resident" if self.slots == self.total else self.base

    @property
    def form(self) -> str:
        """The format that experts are held in."""
        return self.model.quant or self.model.dtype

    @property
    def record(self) -> int:
        """Bytes of an expert."""
        return self.model.config.record_layout(self.form).stride


def layout_of(
    asked: Asked,
    planned_for: Machine,
    config: ModelConfig,
    form: str | None,
    context: int,
    policy: str,
) -> Layout:
    """What the budget holds beside what a policy needs, by the functions that loading calls.

    Raises:
        BudgetError: nothing fits; the message lists what takes the memory.
        InputError: a budget or a link that this machine cannot have.
    """
    on_gpu = planned_for.kind == "gpu"
    link = _checked_link(asked, on_gpu)
    model = Decoder(config, asked.dtype, form, "reference" if on_gpu else devices.kernels(None))
    total = config.num_moe_layers * config.num_experts
    record = config.record_layout(form or asked.dtype).stride
    dense = devices.dense_bytes(config, asked.dtype, form)
    kv, chosen = devices.kv_bytes(model, 1, context), named_policy(policy)
    if getattr(chosen.speculation.draft, "kind", None) == "model":
        raise InputError(f"plans do not know the model that drafts under {policy}: load counts it")
    sizes = {"dense": dense, "kv": kv, "link": link}
    if on_gpu or asked.device_memory is not None:
        memory = asked.device_memory or _floor(planned_for.device_memory - GPU_RESERVE)
        _check(memory, planned_for.device_memory, planned_for)
        slots = min(devices.slots_for(model, chosen, memory, context), total)
        stored = total * record if slots < total else 0
        missing = lacking(planned_for, asked, stored, memory)
        if missing:
            raise BudgetError(missing)
        option = ("--device-memory", _text(memory), *(("--link", str(link)) if link else ()))
        base = "link" if on_gpu or link else "memory"
        return Layout(model, context, base, slots, memory, option, **sizes)
    whole = dense + kv + total * record + tiers.PROCESS_BYTES
    if asked.host_memory is None and whole <= planned_for.host_memory:
        return Layout(model, context, "disk", total, None, (), **sizes)
    memory = asked.host_memory or _floor(planned_for.host_memory - 2 * tiers.PROCESS_BYTES)
    _check(memory, planned_for.host_memory, planned_for)
    over, slots = tiers.on_host(model, chosen, memory, context, 1, None)
    ahead, option = tiers.BUFFERS * record if over else 0, ("--host-memory", _text(memory))
    return Layout(model, context, "disk", min(slots, total), memory, option, **sizes, ahead=ahead)


def _check(memory: int, most: int, planned_for: Machine) -> None:
    if memory > most:
        raise InputError(
            f"a budget of {format_bytes(memory)} is more than {planned_for.name} has: "
            f"{format_bytes(most)}"
        )


def _checked_link(asked: Asked, on_gpu: bool) -> tiers.Link | None:
    link = tiers.parse_link(asked.link)
    if link is None:
        return None
    if on_gpu:
        raise InputError(tiers.NO_GPU)
    if link.kind == "disk":
        raise InputError("a plan takes the disk where host_memory does not hold the model")
    if asked.device_memory is None:
        raise InputError("a paced link keeps all experts in memory: give device_memory for slots")
    return link


def behind(planned_for: Machine, link: tiers.Link | None, work: Work) -> Machine:
    """The machine with a paced link, and its host as slow as the link says."""
    if link is None:
        return planned_for
    reached = planned_for.reached | {"link": 1.0}
    host = planned_for.host_gb_per_s
    if link.host_us:
        host = min(host, work.expert_bytes / link.host_us / 1e3 / reached["host"])
    return dataclasses.replace(
        planned_for,
        link="paced link",
        link_gb_per_s=link.gigabytes_per_second,
        link_latency_us=link.latency_us,
        host_gb_per_s=host,
        reached=reached,
    )


def _floor(memory: int) -> int:
    return max(memory // MIB, 1) * MIB


def _text(memory: int) -> str:
    return f"{memory // MIB}MiB" if memory % MIB == 0 else str(memory)


def lacking(planned_for: Machine, asked: Asked, stored: int, budget: int | None) -> str | None:
    """Why the host's memory does not hold the records `stored` in it, None if it does.

    Args:
        budget: bytes of slots and the rest, which are the host's memory too without a GPU.
    """
    on_gpu = planned_for.kind == "gpu"
    memory = asked.host_memory if on_gpu and asked.host_memory else planned_for.host_memory
    beside = allocator.HOST_MARGIN if on_gpu else budget or 0
    if not stored or stored + beside <= memory:
        return None
    return (
        f"all experts are to lie in the host's memory: {format_bytes(stored)}, and "
        f"{format_bytes(beside)} beside them, of {format_bytes(memory)}: quantise them, or plan "
        "for more memory"
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
        vocabulary=config.vocab_size,
        format=form or dtype,
    )


def chunk_of(tokens: int) -> int:
    """Tokens of one step of a prompt, as the engine cuts it."""
    return decode.LONG_CHUNK if tokens >= decode.LONG_FROM else decode.SHORT_CHUNK
