"""`load`: from a name and a budget to a Runtime."""

import os
import pathlib
from typing import Any

from moejax import allocator, decode, devices, orbax_directory
from moejax.checkpoints import convert, headers, hf
from moejax.config import ModelConfig, read_config_json
from moejax.errors import BudgetError, InputError
from moejax.hub import resolve
from moejax.layout import DTYPES
from moejax.models import config_from_hf, family
from moejax.models.family import weight_map
from moejax.models.transformer import Decoder
from moejax.policy import Policy
from moejax.policy import policy as named_policy
from moejax.runtime import Runtime
from moejax.units import parse_bytes


def load(
    path_or_name: str | os.PathLike = "tiny",
    *,
    dtype: str = "bfloat16",
    device_memory: int | str | None = None,
    slots: int | None = None,
    policy: str | Policy = "lru",
    context: int | None = None,
    batch: int = 1,
    virtual: bool = False,
    check_finite: bool = True,
    progress: Any = None,
) -> Runtime:
    """Load a model so that it runs under a budget.

    Args:
        path_or_name: "tiny" (the embedded model), a Hugging Face or converted directory, or a hub
            id such as "Qwen/Qwen3-30B-A3B".
        dtype: "bfloat16" or "float32"; weights are converted, sums are always f32.
        device_memory: bytes, or text such as "6GiB": dense weights, KV cache and workspace are
            counted, the rest becomes expert slots.
        slots: experts on the device at once, instead of `device_memory`; None = all.
        policy: a preset's name or a Policy.
        context: tokens per sequence that the KV cache holds; default the model's, at most 4096.
        batch: sequences at once that `device_memory` must hold the KV caches of.
        virtual: the tables say what is resident, weights are read in place and nothing is copied.
        progress: called with (bytes read, bytes in all).

    Raises:
        MoejaxError: a subclass that says what to do.
    """
    if dtype not in DTYPES:
        raise InputError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    if slots is not None and device_memory is not None:
        raise BudgetError("give device_memory or slots, not both")
    if not isinstance(slots, int | None) or not isinstance(batch, int) or batch < 1:
        raise InputError(f"slots and batch must be whole numbers, not {slots!r} and {batch!r}")
    devices.use_compilation_cache()
    directory = resolve(path_or_name)
    config = config_from_hf(read_config_json(directory))
    memory = None if device_memory is None else parse_bytes(device_memory)
    _bound_allocator(config, dtype, memory)  # before anything starts JAX
    chosen = named_policy(policy) if config.moe_layers else None
    context = decode.checked_context(config, context)
    model = Decoder(config, dtype)
    total = config.num_moe_layers * config.num_experts
    if memory is not None:
        slots = devices.slots_for(model, chosen, memory, context, batch)
    slots = total if slots is None else min(slots, total)
    if config.moe_layers and slots < config.top_k:
        raise BudgetError(
            f"{slots} slots cannot hold the top-{config.top_k} of one layer: give {config.top_k}"
        )
    everything = slots == total
    flat, records = _read(directory, model, everything, check_finite, progress)
    return Runtime(
        config=config,
        model=model,
        params=devices.dense_params(flat),
        store=devices.store(config, records, dtype, on_device=everything),
        policy=chosen,
        slots=slots,
        context=context,
        generation_config=_generation_config(directory),
        directory=directory,
        virtual=virtual,
        max_batch=None if memory is None else batch,
    )


def _bound_allocator(config: ModelConfig, dtype: str, memory: int | None) -> None:
    experts = config.num_moe_layers * config.num_experts
    host = experts * config.record_layout(dtype).stride if experts else 0
    allocator.apply(allocator.environment_for(memory, allocator.gpu_memory(), host))


def _read(
    directory: pathlib.Path, model: Decoder, on_device: bool, check_finite: bool, progress: Any
) -> tuple[dict[str, Any], Any]:
    if orbax_directory.is_orbax(directory):
        return orbax_directory.load_directory(directory, model, on_device=on_device)
    weights = weight_map(model.config, family(model.config.model_type).rules, model.dtype)
    if convert.is_converted(directory):
        return convert.load_converted(directory, weights)
    return hf.load(directory, weights, check_finite=check_finite, progress=progress)


def _generation_config(directory: pathlib.Path) -> dict[str, Any]:
    path = directory / "generation_config.json"
    if not path.is_file():
        return {}
    return headers.parse_json(headers.read_small(path), str(path))
