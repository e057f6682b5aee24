"""Where things live: memory kinds, the memory budget, and the compilation cache."""

import dataclasses
import functools
import math
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moejax import decode
from moejax.config import ModelConfig
from moejax.errors import BudgetError, InputError
from moejax.generate import generate_step
from moejax.kernels import NAMES, build, host, notice
from moejax.kernels.transport import Store
from moejax.layout import BITS, DTYPES, RecordLayout
from moejax.models.shapes import held_parameters
from moejax.models.transformer import Decoder
from moejax.policies.policy import Policy
from moejax.policies.policy import policy as named_policy
from moejax.quantise import dequantise
from moejax.sampling import Sampling
from moejax.speculate import DraftModel, Speculating, Target, cycle
from moejax.state import DecodeState, ExpertStore, HostRecords
from moejax.units import format_bytes


def use_compilation_cache() -> None:
    """Keep compiled programs on disk, unless the user has already said where or not to."""
    if jax.config.jax_compilation_cache_dir or os.environ.get("JAX_COMPILATION_CACHE_DIR") == "":
        return
    if not jax.config.jax_enable_compilation_cache:
        return
    home = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    jax.config.update("jax_compilation_cache_dir", str(pathlib.Path(home) / "moejax" / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


def exactness() -> str:
    """What a run with the model's own routing is on this backend."""
    return "bit-exact" if jax.default_backend() == "cpu" else "faithful"


def dense_params(flat: dict[str, np.ndarray]) -> dict[str, dict[str, jax.Array]]:
    """Parameters by "group/name" as the nested dict that the decoder takes, on the device.

    NumPy arrays come as floats, or as the bytes of quantised weights; JAX arrays as they are held.
    """
    params: dict[str, dict[str, jax.Array]] = {}
    for path, array in flat.items():
        group, name = path.split("/")
        if isinstance(array, np.ndarray):
            array = array.view(BITS.get(array.dtype.name, array.dtype))
        # Not jnp.asarray, which copies: on a CPU this aliases aligned arrays.
        params.setdefault(group, {})[name] = jax.device_put(array)
    return params


def store(
    config: ModelConfig,
    records: np.ndarray | None,
    format: str,
    *,
    on_device: bool,
    link: Store | None = None,
) -> ExpertStore | None:
    """The expert store of records [L * E, R], or of what is behind a link (or both).

    On a CPU it aliases the records. On a GPU they lie in pinned host memory, or on the device when
    all of them fit (`on_device`).
    """
    if records is None and link is None:
        return None
    return ExpertStore(
        records=None if records is None else jax.device_put(records, store_sharding(on_device)),
        link=None if link is None else jax.device_put(np.int32(link.handle)),
        layout=config.record_layout(format),
    )


def open_to_host(
    store: ExpertStore | None, policy: Policy | None
) -> tuple[ExpertStore | None, host.Records | None]:
    """The store, with its records open to the host where a policy computes experts beside a GPU.

    Programs that use it fail once the records are closed: hold them as long as the store.

    Raises:
        MoejaxError: the host cannot reach the records.
    """
    hosted = policy is not None and policy.placement.uses_host
    if not hosted or store is None or store.records is None or not _beside_gpu(store.records):
        return store, None
    way, meaning = host.way()
    if way == "callback":
        notice.once(f"experts on the host: {meaning}; slow")
    records = host.Records(store.records, store.layout, functools.partial(network, store.layout))
    handle = jax.device_put(np.int32(records.handle), jax.devices()[0])
    return dataclasses.replace(store, host=HostRecords(handle=handle, way=way)), records


def _beside_gpu(records: jax.Array) -> bool:
    return records.sharding.memory_kind == "pinned_host"


def network(layout: RecordLayout, record: np.ndarray, x: np.ndarray) -> np.ndarray:
    """One expert [R] bits of x [M, D] f32 in NumPy: [M, D] f32, rounded as `kernels` says."""
    weights = {}
    for name, matrix in layout.matrices.items():
        part = layout.view(record, name)
        weights[name] = dequantise(part, matrix) if layout.quantised else part.astype(np.float32)

    def linear(x: np.ndarray, name: str) -> np.ndarray:
        if layout.dtype == "bfloat16":
            x = x.astype(DTYPES["bfloat16"]).astype(np.float32)
        return x @ weights[name].T

    gate, up = np.split(linear(x, "gate_up"), 2, axis=-1)
    with np.errstate(over="ignore"):  # exp of a large number: a gate of 0
        return linear(gate / (1 + np.exp(-gate)) * up, "down")


def kernels(name: str | None) -> str:
    """The kernels to run with: those named, else the native ones where they can be had.

    On a GPU the reference is the default as long as no GPU has confirmed the Pallas kernels.

    Raises:
        InputError: no such kernels, or not on this machine.
    """
    if name not in (None, *NAMES):
        raise InputError(f"kernels {name!r:.80} are not one of {', '.join(NAMES)}")
    on_cpu = jax.default_backend() == "cpu"
    if name == ("pallas" if on_cpu else "native"):
        raise InputError(f"{name} kernels are for {'GPUs' if on_cpu else 'CPUs'}: leave them out")
    if name == "reference" or not on_cpu:
        return name or "reference"
    if build.library() is not None:
        return "native"
    if name == "native":
        raise InputError(build.status())
    notice.once(build.status())
    return "reference"


def store_sharding(on_device: bool) -> jax.sharding.SingleDeviceSharding:
    """Where the expert store lies; see `store`."""
    device = jax.devices()[0]
    kind = None if device.platform == "cpu" or on_device else "pinned_host"
    return jax.sharding.SingleDeviceSharding(device, memory_kind=kind)


def abstract_params(model: Decoder) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
    """Shapes and dtypes of the decoder's parameters."""
    params: dict[str, dict[str, jax.ShapeDtypeStruct]] = {}
    for path, held in held_parameters(model.config, model.dtype, model.quant).items():
        group, name = path.split("/")
        params.setdefault(group, {})[name] = jax.ShapeDtypeStruct(held.shape, held.dtype)
    return params


def abstract_store(model: Decoder, policy: Policy | None = None) -> ExpertStore:
    """Shape and dtype of the expert store, as `open_to_host` leaves it for a policy."""
    config, layout = model.config, model.config.record_layout(model.quant or model.dtype)
    shape = (config.num_moe_layers * config.num_experts, layout.elements)
    hosted = None
    if policy is not None and policy.placement.uses_host and jax.default_backend() != "cpu":
        hosted = HostRecords(handle=jax.ShapeDtypeStruct((), jnp.int32), way=host.way()[0])
    records = jax.ShapeDtypeStruct(shape, layout.bits)
    return ExpertStore(records=records, host=hosted, layout=layout)


def dense_bytes(config: ModelConfig, dtype: str, quant: str | None = None) -> int:
    """Bytes of all parameters but the experts."""
    held = held_parameters(config, dtype, quant).values()
    return sum(math.prod(h.shape) * h.dtype.itemsize for h in held)


def kv_bytes(model: Decoder, batch: int, context: int) -> int:
    """Bytes of the KV cache."""
    kv = jax.eval_shape(lambda: decode.init_kv(model.config, batch, context, model.dtype))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(kv))


def workspace_bytes(
    model: Decoder,
    policy: Policy | None,
    batch: int,
    context: int,
    draft: Decoder | None = None,
) -> int:
    """Scratch memory that XLA's plans of the steps ask for, measured by compiling them.

    That of the prefill step, or of a speculative cycle under a policy that drafts: the larger, as
    one runs after the other. A cycle holds logits for every token of its verification, and of its
    drafts where it samples.

    Args:
        draft: the model that drafts, for policies that want one.
    """
    config = model.config
    experts = abstract_store(model, policy) if config.moe_layers else None

    def arguments() -> tuple:
        state = decode.init_state(
            model, policy, experts, slots=max(config.top_k, 1), batch=batch, context=context
        )
        return state, jax.random.key(0), Sampling().validate()

    state, key, sampling = jax.eval_shape(arguments)
    chunk = decode.LONG_CHUNK if context >= decode.LONG_FROM else decode.SHORT_CHUNK
    tokens = jax.ShapeDtypeStruct((batch, chunk), jnp.int32)
    fixed = (model, policy, abstract_params(model), experts)
    needed = _scratch(generate_step.lower(*fixed, state, tokens, sampling, key, None))
    if policy is None or not policy.speculation.max_length:
        return needed
    return max(needed, _cycle_bytes(model, policy, state, sampling, key, draft))


def _cycle_bytes(
    model: Decoder,
    policy: Policy,
    state: DecodeState,
    sampling: Any,
    key: Any,
    draft: Decoder | None,
) -> int:
    """Scratch memory of the widest cycle, for sequences that sample, and the text it keeps."""
    batch, width = state.length.shape[0], policy.speculation.max_length + 1
    context = decode.capacity(state)
    helper = other = None
    if draft is not None:
        # As a draft model is loaded: all its experts in memory, if it has any.
        experts = abstract_store(draft) if draft.config.moe_layers else None
        rule = None if experts is None else named_policy("lru")
        helper = DraftModel(model=draft, policy=rule, params=abstract_params(draft), store=experts)
        slots = draft.config.num_moe_layers * draft.config.num_experts
        init = functools.partial(decode.init_state, draft, rule, slots=slots, batch=batch)
        other = jax.eval_shape(lambda: init(experts, context=context))
    text = jax.ShapeDtypeStruct((batch, context + 1), jnp.int32)
    target = Target(
        model=model,
        policy=_with_distances(policy, model.config),
        params=abstract_params(model),
        store=abstract_store(model, policy),
    )
    rows = jax.ShapeDtypeStruct((batch,), jnp.int32)
    lowered = cycle.lower(
        target,
        helper,
        Speculating(state=state, draft=other, text=text, seen=None),
        jax.ShapeDtypeStruct((), jnp.int32),
        rows,
        jax.ShapeDtypeStruct((batch,), jnp.bool_),
        sampling,
        key,
        width=width,
        greedy=False,
    )
    return _scratch(lowered) + text.size * text.dtype.itemsize


def _with_distances(policy: Policy, config: ModelConfig) -> Policy:
    """The policy with distances between experts [L, E, E] of no values, where drafts go by them."""
    speculation = policy.speculation
    router = getattr(speculation.draft, "router", None)
    if router is None or not hasattr(router, "distance") or router.distance is not None:
        return policy
    shape = (config.num_moe_layers, config.num_experts, config.num_experts)
    router = dataclasses.replace(router, distance=jax.ShapeDtypeStruct(shape, jnp.float32))
    draft = dataclasses.replace(speculation.draft, router=router)
    speculation = dataclasses.replace(speculation, draft=draft)
    return dataclasses.replace(policy, speculation=speculation)


def _scratch(lowered: Any) -> int:
    plan = lowered.compile().memory_analysis()
    return int(plan.temp_size_in_bytes + plan.output_size_in_bytes - plan.alias_size_in_bytes)


def draft_bytes(draft: Decoder, batch: int, context: int) -> int:
    """Bytes of a model that drafts: all its weights, and keys and values of its own."""
    config = draft.config
    stride = config.record_layout(draft.quant or draft.dtype).stride if config.moe_layers else 0
    records = config.num_moe_layers * config.num_experts * stride
    dense = dense_bytes(config, draft.dtype, draft.quant)
    return dense + records + kv_bytes(draft, batch, context)


def slots_for(
    model: Decoder,
    policy: Policy | None,
    memory: int,
    context: int,
    batch: int = 1,
    *,
    ahead: int = 0,
    draft: Decoder | None = None,
) -> int:
    """Slots that fit `memory` bytes beside dense weights, KV cache and workspace.

    Args:
        ahead: bytes for records that are read ahead.
        draft: a model that drafts, as `load` brings it: whole, in memory.

    Raises:
        BudgetError: not even one layer's top-k fits; the message lists what takes the memory.
    """
    config = model.config
    parts = {
        "dense weights": dense_bytes(config, model.dtype, model.quant),
        f"KV cache of {batch} x {context} tokens": kv_bytes(model, batch, context),
        "workspace": workspace_bytes(model, policy, batch, context, draft),
    }
    if draft is not None:
        parts["draft model"] = draft_bytes(draft, batch, context)
    if ahead:
        parts["records read ahead"] = ahead
    left = memory - sum(parts.values())
    if not config.moe_layers:
        slots, least, stride = 0, 0, 0
    else:
        stride = config.record_layout(model.quant or model.dtype).stride
        slots, least = max(left, 0) // stride, config.top_k
    if left < 0 or slots < least:
        needed = sum(parts.values()) + least * stride
        listed = ", ".join(f"{name} {format_bytes(size)}" for name, size in parts.items())
        raise BudgetError(
            f"{format_bytes(memory)} is too little: {listed}, and {least} experts of "
            f"{format_bytes(stride)} each; give at least {format_bytes(needed, up=True)} or "
            "shorten the context"
        )
    return slots
