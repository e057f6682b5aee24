"""`load`: from a name and a budget to a Runtime."""

import os
import pathlib
from typing import Any

from moejax import allocator, decode, devices, drafters, low_bits, orbax_directory, tiers, warm
from moejax.checkpoints import convert, gguf_file, gguf_model, headers, hf
from moejax.checkpoints.rules import WeightMap
from moejax.config import ModelConfig, read_config_json
from moejax.errors import BudgetError, CheckpointError, InputError
from moejax.formats import quant_format
from moejax.hub import resolve
from moejax.kernels.host import Records
from moejax.kernels.transport import Store
from moejax.layout import DTYPES
from moejax.models import config_from_hf, family
from moejax.models.family import weight_map
from moejax.models.transformer import Decoder
from moejax.policies.policy import Policy
from moejax.policies.policy import policy as named_policy
from moejax.runtime import Runtime
from moejax.state import ExpertStore
from moejax.units import parse_bytes


def load(
    path_or_name: str | os.PathLike = "tiny",
    *,
    dtype: str = "bfloat16",
    quant: str | None = None,
    group: int = 32,
    device_memory: int | str | None = None,
    host_memory: int | str | None = None,
    slots: int | None = None,
    policy: str | Policy = "lru",
    context: int | None = None,
    batch: int = 1,
    virtual: bool = False,
    link: str | None = None,
    kernels: str | None = None,
    check_finite: bool = True,
    check_records: bool = False,
    residency_file: str | os.PathLike | None = None,
    draft: str | os.PathLike | None = None,
    progress: Any = None,
) -> Runtime:
    """Load a model so that it runs under a budget.

    Args:
        path_or_name: "tiny" (the embedded model), a Hugging Face or converted directory, a .gguf
            file, or a hub id such as "Qwen/Qwen3-30B-A3B".
        dtype: "bfloat16" or "float32"; weights are converted, sums are always f32.
        quant: "int8" or "int4" quantises the experts and the other linear maps while they are
            read; None takes what a converted directory holds.
        group: columns that share a scale with "int4", 32 or 64.
        device_memory: bytes, or text such as "6GiB": dense weights, KV cache and workspace are
            counted, the rest becomes expert slots.
        host_memory: likewise, on a machine without a GPU; what does not fit stays on the disk, in
            a converted directory (made once, in the cache directory, if the model is none).
        slots: experts in fast memory at once, instead of a budget; None = all.
        policy: a preset's name or a Policy.
        context: tokens per sequence that the KV cache holds; default the model's, at most 4096.
        batch: sequences at once that a budget must hold the KV caches of.
        virtual: the tables say what is resident, weights are read in place and nothing is copied.
        link: "disk" reads experts from a bank into slots; "paced:GB_PER_S,LATENCY_US[,HOST_US]"
            moves them from memory at that rate, and takes at least HOST_US microseconds for each
            that is computed on the host. Without a GPU only.
        kernels: "reference", "native" (for CPUs, there the default where they can be built) or
            "pallas" (for GPUs, not confirmed on one yet).
        check_records: compare the checksum of every record read from a disk.
        residency_file: which experts were resident at the end of the last run; read if it exists,
            so that this one starts warm, and written when a generation ends.
        draft: a smaller model with the same tokens, for policies that draft with one; of "tiny" it
            is "tiny-draft" by default.
        progress: called with (bytes read, bytes in all).

    Raises:
        MoejaxError: a subclass that says what to do.
    """
    _check_arguments(dtype, slots, device_memory, host_memory, batch)
    over, residency_file = tiers.parse_link(link), warm.checked_path(residency_file)
    devices.use_compilation_cache()
    source = source_path(path_or_name)
    directory = source.parent if gguf_file.is_gguf(source) else source
    config = config_from_hf(read_config(source))
    quant = _quantised(source, quant_format(quant, group))
    memory = _allocated(config, quant or dtype, device_memory)  # before anything starts JAX
    budgeted = memory is not None or host_memory is not None
    chosen, context = _policy(config, policy, budgeted), decode.checked_context(config, context)
    model = Decoder(config, dtype, quant, devices.kernels(kernels))
    if budgeted:
        helper, sizes = _helper(model, chosen, path_or_name, draft), (context, batch)
        over, slots = _fitting(model, chosen, (memory, host_memory), sizes, over, helper)
    slots, total = _checked_slots(config, slots), config.num_moe_layers * config.num_experts
    tiers.check(over, model, chosen, virtual)
    source = _banked(source, over, model, quant, progress)
    flat, records = _read(source, model, slots == total, check_finite, progress)
    opened, store, hosted = _store(model, chosen, records, slots, (over, source, check_records))
    made = Runtime(
        config=config,
        model=model,
        params=devices.dense_params(flat),
        store=store,
        policy=chosen,
        slots=slots,
        context=context,
        generation_config=_generation_config(directory),
        directory=directory,
        virtual=virtual,
        max_batch=batch if budgeted else None,
        link=opened,
        hosted=hosted,
        tier=str(over) if over else None,
        residency_file=residency_file,
        policy_name=policy if isinstance(policy, str) else None,
    )
    return drafters.equipped(made, path_or_name, draft, kernels, load)


def _check_arguments(dtype: str, slots: Any, device: Any, host: Any, batch: Any) -> None:
    if dtype not in DTYPES:
        raise InputError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    if sum(budget is not None for budget in (slots, device, host)) > 1:
        raise InputError(
            "give only one of --slots (slots), --device-memory (device_memory) and --host-memory "
            "(host_memory)"
        )
    if not isinstance(slots, int | None) or not isinstance(batch, int) or batch < 1:
        raise InputError(f"slots and batch must be whole numbers, not {slots!r} and {batch!r}")


def _policy(config: ModelConfig, policy: str | Policy, budgeted: bool) -> Policy | None:
    """The policy of that name, None for dense models."""
    if not config.moe_layers:
        return None
    chosen = named_policy(policy)
    low_bits.check(chosen, budgeted)
    return chosen


def _fitting(
    model: Decoder,
    policy: Policy | None,
    budgets: tuple[int | None, int | str | None],
    sizes: tuple[int, int],
    over: tiers.Link | None,
    helper: Decoder | None,
) -> tuple[tiers.Link | None, int]:
    """The link and the slots of a budget of device or of host memory, for a context and a batch."""
    device, host = budgets
    if device is not None:
        return over, devices.slots_for(model, policy, device, *sizes, draft=helper)
    return tiers.on_host(model, policy, parse_bytes(host), *sizes, over, helper)


def _helper(
    model: Decoder,
    policy: Policy | None,
    name: str | os.PathLike,
    draft: str | os.PathLike | None,
) -> Decoder | None:
    """The model that will draft, as far as its config tells; None where none does.

    Raises:
        PolicyError: it cannot draft for this one.
    """
    found = None if policy is None else drafters.wanted(policy, name, draft)
    if found is None:
        return None
    source = source_path(found)
    quant = _quantised(source, None)
    other = Decoder(config_from_hf(read_config(source)), model.dtype, quant, model.kernels)
    drafters.check(other, model, policy)
    return other


def _checked_slots(config: ModelConfig, slots: int | None) -> int:
    """Slots, at most one per expert; BudgetError if a layer's top-k do not fit."""
    total = config.num_moe_layers * config.num_experts
    slots = total if slots is None else min(slots, total)
    if config.moe_layers and slots < config.top_k:
        raise BudgetError(
            f"{slots} slots cannot hold the top-{config.top_k} of one layer: give at "
            f"least {config.top_k}"
        )
    return slots


def source_path(path_or_name: str | os.PathLike) -> pathlib.Path:
    """The .gguf file, or the directory that `hub.resolve` finds."""
    path = pathlib.Path(path_or_name).expanduser()
    return path if gguf_file.is_gguf(path) else resolve(path_or_name)


def read_config(source: pathlib.Path) -> dict[str, Any]:
    """The config.json of a model directory, or what it would say of a .gguf file."""
    return (gguf_model.read_config if gguf_file.is_gguf(source) else read_config_json)(source)


def _quantised(source: pathlib.Path, quant: str | None) -> str | None:
    """Format of the quantised weights once loaded, None for floats."""
    converted = convert.is_converted(source)
    if not converted and not orbax_directory.is_orbax(source):
        return quant
    about = convert.quantisation(source) if converted else None
    stored = about and about["quant"]
    if quant not in (None, stored):
        raise CheckpointError(
            f"{source} is converted, to {stored or 'floats'}: load the original with quant, or "
            f"convert it to {quant}"
        )
    return stored


def _allocated(config: ModelConfig, dtype: str, device_memory: int | str | None) -> int | None:
    """The budget in bytes, to which JAX's allocator is bound."""
    memory = None if device_memory is None else parse_bytes(device_memory)
    experts = config.num_moe_layers * config.num_experts
    host = experts * config.record_layout(dtype).stride if experts else 0
    allocator.apply(allocator.environment_for(memory, allocator.gpu_memory(), host))
    return memory


def _banked(
    source: pathlib.Path, over: tiers.Link | None, model: Decoder, quant: str | None, progress: Any
) -> pathlib.Path:
    """The converted directory if experts come from the disk, else the source itself."""
    if over is None or over.kind != "disk":
        return source
    return tiers.bank_directory(source, _weights(model), quant, progress)


def _read(
    source: pathlib.Path, model: Decoder, on_device: bool, check_finite: bool, progress: Any
) -> tuple[dict[str, Any], Any]:
    if orbax_directory.is_orbax(source):
        return orbax_directory.load_directory(source, model, on_device=on_device)
    weights = _weights(model)
    if convert.is_converted(source):
        return convert.load_converted(source, weights)
    weights = weights.quantised(model.quant)
    return hf.load(source, weights, check_finite=check_finite, progress=progress)


def _store(
    model: Decoder,
    chosen: Policy | None,
    records: Any,
    slots: int,
    link: tuple[tiers.Link | None, pathlib.Path, bool],
) -> tuple[Store | None, ExpertStore | None, Records | None]:
    """What experts are moved over, the store, and what the host computes from beside a GPU.

    Args:
        link: which, from what source, and whether records are checked.
    """
    over, source, checked = link
    opened, records = tiers.open_link(over, source, records, checked)
    config, form = model.config, model.quant or model.dtype
    on_device = slots == config.num_moe_layers * config.num_experts
    store = devices.store(config, records, form, on_device=on_device, link=opened)
    return opened, *devices.open_to_host(low_bits.for_policy(chosen, store), chosen)


def _weights(model: Decoder) -> WeightMap:
    """How the float model's weights are found and where they go."""
    return weight_map(model.config, family(model.config.model_type).rules, model.dtype)


def _generation_config(directory: pathlib.Path) -> dict[str, Any]:
    path = directory / "generation_config.json"
    if not path.is_file():
        return {}
    return headers.parse_json(headers.read_small(path), str(path))
