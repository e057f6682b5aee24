"""Parts of the GPU suite: how fast records come to the device, and what runs meanwhile."""

import concurrent.futures
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.gpu_common import guarded, median, on_gpu, random_records, timed
from moejax.kernels import pallas
from moejax.layout import RecordLayout


def _pinned() -> jax.sharding.SingleDeviceSharding:
    kind = "pinned_host" if on_gpu() else None
    return jax.sharding.SingleDeviceSharding(jax.devices()[0], memory_kind=kind)


def _records(rows: int, mebibytes: float) -> jax.Array:
    """Records of a size in pinned host memory."""
    elements = max(int(mebibytes * (1 << 19)), 64)
    return jax.device_put(jnp.ones((rows, elements), jnp.uint16), _pinned())


def fetch(sizes: Any) -> Iterator[dict]:
    """The copy in the step: right, and in place?"""
    layout = RecordLayout(width=64, expert_width=48, dtype="bfloat16")
    on_device = random_records(12, layout)
    store = jax.device_put(on_device, _pinned())
    slot, expert = jnp.array([4, 0, 2, 1], jnp.int32), jnp.array([7, 3, 11, 0], jnp.int32)
    yield guarded({"case": "values"}, functools.partial(_values, on_device, store, slot, expert))
    for slots in (64, 512):
        row = {"case": "scratch bytes", "slots": slots}
        yield guarded(row, functools.partial(_scratch, layout, store, slots, slot, expert))


def _copy(pool, store, slot, expert, count, after):
    return pallas.fetch(pool, store, slot, expert, count, after)


def _values(on_device, store, slot, expert) -> dict:
    pool = jnp.zeros((6, on_device.shape[1]), on_device.dtype)
    copy = jax.jit(_copy, donate_argnums=0)
    got = np.asarray(copy(pool, store, slot, expert, jnp.int32(3), jnp.ones(3)))
    want = np.zeros_like(got)
    want[np.asarray(slot)[:3]] = np.asarray(on_device)[np.asarray(expert)[:3]]
    return {"ok": bool((got == want).all()), "store": str(store.sharding.memory_kind)}


def _scratch(layout, store, slots, slot, expert) -> dict:
    pool = jnp.zeros((slots, layout.elements), layout.bits)
    arguments = (pool, store, slot, expert, jnp.int32(3), jnp.ones(3))
    compiled = jax.jit(_copy, donate_argnums=0).lower(*arguments).compile()
    plan = compiled.memory_analysis()
    copied = plan.temp_size_in_bytes >= pool.nbytes
    return {"temp_bytes": plan.temp_size_in_bytes, "pool_bytes": pool.nbytes, "ok": not copied}


def link(sizes: Any) -> Iterator[dict]:
    """GB/s from pinned host memory by record size: in the graph, and eagerly by threads."""
    for mebibytes in sizes.pick((0.5, 1, 2.25, 4.5, 9, 18, 64, 336), (0.01,)):
        count = sizes.pick(max(4, min(64, int(1024 / mebibytes))), 4)
        make = functools.partial(_records, count, mebibytes)
        for name, case in (
            ("in graph", _in_graph),
            ("eager, pinned array each", functools.partial(_eager, True, 1)),
            ("eager, numpy", functools.partial(_eager, False, 1)),
            ("eager, numpy, 2 threads", functools.partial(_eager, False, 2)),
        ):
            row = {"how": name, "MiB": mebibytes}
            yield guarded(row, lambda case=case, make=make: case(make, sizes))


def _rate(bytes_moved: int, samples: list[float]) -> dict:
    return {"gbps": bytes_moved / median(samples) / 1e9, "samples": samples}


def _in_graph(make: Callable, sizes: Any) -> dict:
    store = make()
    count = store.shape[0]
    copy = jax.jit(_copy, donate_argnums=0)
    order = jnp.arange(count, dtype=jnp.int32)[::-1]
    pool = jnp.zeros((count, store.shape[1]), store.dtype)
    samples = []
    for _ in range(sizes.pick(4, 2)):
        start = time.perf_counter()
        pool = copy(pool, store, order, order, jnp.int32(count), jnp.ones(1))
        jax.block_until_ready(pool)
        samples.append(time.perf_counter() - start)
    return _rate(pool.nbytes, samples[1:])


def _eager(pinned: bool, threads: int, make: Callable, sizes: Any) -> dict:
    store = make()
    device = jax.devices()[0]
    if pinned:
        records = [jax.device_put(np.asarray(row), _pinned()) for row in store]
    else:
        records = list(np.asarray(store))
    total = sum(record.nbytes for record in records)
    target = jax.sharding.SingleDeviceSharding(device)
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:

        def copy_all(some: list) -> list:
            return [jax.device_put(record, target) for record in some]

        samples = []
        for _ in range(sizes.pick(4, 2)):
            start = time.perf_counter()
            parts = [records[i::threads] for i in range(threads)]
            jax.block_until_ready(list(pool.map(copy_all, parts)))
            samples.append(time.perf_counter() - start)
    return _rate(total, samples[1:])


def overlap(sizes: Any) -> Iterator[dict]:
    """Time of copies and of compute, alone and together; 1 = fully hidden, 0 = one by one."""
    store = _records(sizes.pick(32, 4), sizes.pick(9, 0.01))
    work = jnp.ones((sizes.pick(6144, 64),) * 2, jnp.bfloat16) * 1e-3
    turns = sizes.pick(40, 2)

    @jax.jit
    def compute(a):
        for _ in range(turns):
            a = (a @ a) * 1e-3
        return a

    for name, case in (("eager on a thread", _eager_overlap), ("in graph", _graph_overlap)):
        measure = functools.partial(case, store, work, compute, turns, sizes)
        yield guarded({"how": name}, measure)


def _hidden(copies: list[float], computes: list[float], both: list[float]) -> dict:
    copy, compute, together = median(copies), median(computes), median(both)
    return {
        "copy_ms": copy * 1e3,
        "compute_ms": compute * 1e3,
        "both_ms": together * 1e3,
        "hidden": (copy + compute - together) / min(copy, compute),
        "samples": {"copy": copies, "compute": computes, "both": both},
    }


def _eager_overlap(store, work, compute, turns, sizes) -> dict:
    target = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    records = [jax.device_put(np.asarray(row), _pinned()) for row in store]
    with concurrent.futures.ThreadPoolExecutor(1) as pool:

        def copy() -> list:
            return [jax.device_put(record, target) for record in records]

        def both() -> list:
            copies = pool.submit(copy)
            return [compute(work), copies.result()]

        copies, computes, together = timed(copy), timed(compute, work), timed(both)
        if not sizes.quick:
            with jax.profiler.trace(str(sizes.out / "trace")):
                jax.block_until_ready(both())
    return _hidden(copies, computes, together)


def _graph_overlap(store, work, compute, turns, sizes) -> dict:
    order = jnp.arange(store.shape[0], dtype=jnp.int32)
    pool = jnp.zeros(store.shape, store.dtype)

    @jax.jit
    def copy(store):
        return pallas.fetch(pool, store, order, order, jnp.int32(len(order)), jnp.ones(1))

    @jax.jit
    def both(store, work):
        return copy(store), compute(work)

    if not sizes.quick:
        jax.block_until_ready(both(store, work))
        with jax.profiler.trace(str(sizes.out / "trace_graph")):
            jax.block_until_ready(both(store, work))
    return _hidden(timed(copy, store), timed(compute, work), timed(both, store, work))
