"""Part of the GPU suite: experts that the host computes beside the GPU, right and fast?"""

import dataclasses
import functools
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.gpu_common import (
    SHAPES,
    TINY,
    Shape,
    each,
    guarded,
    median,
    on_gpu,
    random_records,
    timed,
)
from experiments.gpu_decode import Scripted, lru, qwen3_config, random_params, script, thin_config
from moejax import decode, devices
from moejax.kernels import host as host_kernels
from moejax.kernels import reference
from moejax.layout import RecordLayout
from moejax.models.transformer import Decoder
from moejax.policies.placement import FetchAll, HostAll
from moejax.policies.policy import Policy
from moejax.state import ExpertStore, HostRecords

LIMITS = {"bfloat16": 2e-2}  # of the largest result; 1e-4 for the others
LOGITS_LIMIT = 5e-2


def host(sizes: Any) -> Iterator[dict]:
    """Layers and whole steps, against the same experts on the device, by each way there is."""
    best, meaning = host_kernels.way() if on_gpu() else ("callback", "no GPU")
    ways = dict.fromkeys([best, "callback"])
    shape = sizes.pick(SHAPES[0], TINY)
    for way in ways:
        for format in sizes.pick(("bfloat16", "int8", "int4g32"), ("bfloat16",)):
            for tokens in sizes.pick((1, 8, 64), (2,)):
                row = {"case": "layer", "way": way, "format": format, "tokens": tokens}
                yield guarded(row, functools.partial(_layer, shape, format, tokens, way, sizes))
    for way in each(ways):
        row = {"case": "steps", "way": way, "meaning": meaning if way == best else None}
        yield guarded(row, functools.partial(_steps, way, sizes))


def _opened(store: ExpertStore, way: str) -> tuple[ExpertStore, host_kernels.Records]:
    network = functools.partial(devices.network, store.layout)
    records = host_kernels.Records(store.records, store.layout, network)
    handle = jax.device_put(np.int32(records.handle), jax.devices()[0])
    return dataclasses.replace(store, host=HostRecords(handle=handle, way=way)), records


def _layer(shape: Shape, format: str, tokens: int, way: str, sizes: Any) -> dict:
    rng = np.random.default_rng(2)
    layout = RecordLayout(width=shape.width, expert_width=shape.expert_width, dtype=format)
    source = random_records(shape.experts, layout)
    picks = [rng.permutation(shape.experts)[: shape.top_k] for _ in range(tokens)]
    picks = np.array(picks, np.int32)
    x = rng.standard_normal((tokens, shape.width), np.float32)
    index = jnp.arange(shape.experts, dtype=jnp.int32)
    weight = jnp.full(picks.shape, 1 / shape.top_k, jnp.float32)

    @jax.jit
    def on_device(source, index, picks, x):
        plan = reference.plan(picks, shape.experts)
        rows = reference.empty_rows(plan, layout.width)
        _, rows = reference.experts(layout, source, index, plan, x, rows)
        return reference.combine(plan, rows, weight)

    @jax.jit
    def on_host(hosted, index, picks, x):
        plan = reference.plan(picks, shape.experts)
        rows = reference.empty_rows(plan, layout.width)
        rows, status = host_kernels.experts(layout, hosted, index, plan, x, rows)
        return reference.combine(plan, rows, weight), status

    want = np.asarray(on_device(source, index, picks, x))
    pinned = jax.device_put(source, devices.store_sharding(False))
    store, records = _opened(ExpertStore(records=pinned, layout=layout), way)
    with records:
        got, status = on_host(store.host, index, picks, x)
        nothing = jnp.full_like(index, -1)
        samples = timed(on_host, store.host, index, picks, x, repeats=sizes.pick(20, 1))
        empty = timed(on_host, store.host, nothing, picks, x, repeats=sizes.pick(20, 1))
    error = float(np.abs(np.asarray(got) - want).max() / np.abs(want).max())
    needed = len(np.unique(picks))
    return {
        "ok": int(status) == 0 and error <= LIMITS.get(format, 1e-4),
        "error": error,
        "us": median(samples) * 1e6,
        "us_without_experts": median(empty) * 1e6,
        "experts": needed,
        "gbps": needed * layout.weight_bytes / median(samples) / 1e9,
        "samples": samples,
    }


def _steps(way: str, sizes: Any) -> dict:
    config = qwen3_config(sizes.pick(8, 2))
    if sizes.quick:
        config = dataclasses.replace(thin_config(2), num_experts=8, top_k=2)
    model = Decoder(config, "bfloat16", None, "reference")
    params, layout = random_params(model), config.record_layout("bfloat16")
    ids = config.num_moe_layers * config.num_experts
    records = random_records(ids, layout)
    picks, warm = script(sizes.pick(24, 4), config, 0.4), sizes.pick(8, 2)
    on_device = ExpertStore(records=records, layout=layout)
    want, resident, _ = _run(model, params, on_device, lru(FetchAll()), ids, picks)
    pinned = jax.device_put(records, devices.store_sharding(False))
    store, opened = _opened(ExpertStore(records=pinned, layout=layout), way)
    with opened:
        slots = max(ids // 4, config.top_k)
        got, samples, hosted = _run(model, params, store, lru(HostAll()), slots, picks)
    error = float(np.abs(got - want).max() / np.abs(want).max())
    return {
        "ok": error <= LOGITS_LIMIT and hosted > 0,
        "error": error,
        "ms": median(samples[warm:]) * 1e3,
        "resident_ms": median(resident[warm:]) * 1e3,
        "experts": hosted,
        "samples": samples[warm:],
    }


def _run(
    model: Decoder, params: dict, store: ExpertStore, how: Policy, slots: int, picks: np.ndarray
) -> tuple[np.ndarray, list[float], float]:
    """Logits [T, V] and seconds of each step, and the mean number of experts on the host."""
    state = decode.init_state(model, how, store, slots=slots, context=256)
    logits, samples, hosted = [], [], []
    for step, some in enumerate(picks):
        one = dataclasses.replace(how, router=Scripted(picks=jnp.asarray(some)))
        token = jnp.full((1, 1), step % model.config.vocab_size, jnp.int32)
        start = time.perf_counter()
        state, out = decode.decode_step(model, one, params, store, state, token)
        jax.block_until_ready(out.logits)
        samples.append(time.perf_counter() - start)
        decode.check_arrived(store, out)
        logits.append(np.asarray(out.logits[0]))
        hosted.append(int(out.trace.host.sum()))
    return np.stack(logits), samples, float(np.mean(hosted))
