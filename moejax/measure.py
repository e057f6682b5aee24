"""Measured rates of this machine: stream reads, the link, experts, and what a miss costs."""

import concurrent.futures
import dataclasses
import functools
import os
import statistics
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moejax import devices, doctor, experts, kernels
from moejax.config import ModelConfig
from moejax.hardware import Hardware
from moejax.kernels import build
from moejax.kernels.transport import Store
from moejax.layout import RECORD_ALIGNMENT, RecordLayout, aligned_empty
from moejax.policies import residency as tables
from moejax.policies.policy import Policy, policy
from moejax.policies.prediction import Ahead
from moejax.policies.routing import Routing
from moejax.state import ExpertCache, ExpertStore, PolicyMemory

STREAM_BYTES = 1 << 30  # more than the last-level cache of any CPU at hand
STORE_BYTES = 1 << 30
CALL_BYTES = 1 << 26  # copied or computed with per timed call, so that dispatch does not count
TOKENS = (1, 2, 4, 8, 16, 32, 64)
REPEATS = 5
SMALL = {"width": 256, "expert_width": 128}  # at most, of experts whose misses are timed
AT_ONCE_GB_PER_S = 1e6  # of a link on which no record is waited for


def cores() -> int:
    """Cores that this process may use, which is also the size of XLA's thread pool on a CPU."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class StreamRead:
    """Reads one large array with all cores: the bound on anything that reads weights once.

    NumPy's sum of 64-bit integers releases the GIL and reads as fast as a loop in C.
    """

    def __init__(self, size: int = STREAM_BYTES):
        self.bytes = size
        self._parts = np.array_split(np.ones(size // 8, np.uint64), cores())
        self._workers = concurrent.futures.ThreadPoolExecutor(cores())

    def gb_per_s(self) -> float:
        """One pass over the array, in 1e9 bytes per second."""
        begun = time.perf_counter()
        list(self._workers.map(np.add.reduce, self._parts))
        return self.bytes / (time.perf_counter() - begun) / 1e9


def hardware(
    config: ModelConfig, form: str, *, how: str = "reference", store_bytes: int = STORE_BYTES
) -> Hardware:
    """Measure this machine for the experts of a model; reads no weights.

    Args:
        form: the format that records are held in, such as "bfloat16" or "int8".
        how: the kernels to measure, one of `kernels.NAMES`.
        store_bytes: memory for the records made up for it, at most the model's own.
    """
    layout = config.record_layout(form)
    total = config.num_moe_layers * config.num_experts
    count = max(2, min(total, store_bytes // layout.stride))
    records = made_up_records(layout, count)
    source = jax.device_put(records, devices.store_sharding(on_device=False))
    link = Link(source, how)
    rate = layout.stride / link.seconds_per_record() / 1e9
    small = RECORD_ALIGNMENT // layout.bits.itemsize
    tiny = Link(jax.device_put(records[:, :small].copy(), source.sharding), how)
    latency = tiny.seconds_per_record() - RECORD_ALIGNMENT / rate / 1e9
    # Where the store is the host's memory, an array of the CPU backend is the same memory.
    there = jax.device_put(records, jax.local_devices(backend="cpu")[0])
    host = Experts(layout, there, how if link.copies_memory else "reference")
    slots = host if link.copies_memory else Experts(layout, link.pool_like(), how)
    busy_link, busy_host = contention(link, host)
    reader = StreamRead(min(STREAM_BYTES, max(store_bytes, 1 << 20)))
    found = doctor.environment()
    return Hardware(
        name=found["cpu"],
        cores=cores(),
        device=found["device"],
        backend=found["backend"],
        versions=found["versions"],
        format=form,
        kernels=how,
        width=config.width,
        expert_width=config.expert_width,
        record_bytes=layout.stride,
        store_bytes=records.nbytes,
        link="memory copy" if link.copies_memory else "pinned host memory to device",
        link_gb_per_s=rate,
        link_latency_us=max(latency, 0.0) * 1e6,
        stream_read_gb_per_s=statistics.median(reader.gb_per_s() for _ in range(REPEATS)),
        stream_read_bytes=reader.bytes,
        host_us_per_expert={n: host.seconds(n) * 1e6 for n in TOKENS},
        device_us_per_expert={n: slots.seconds(n) * 1e6 for n in TOKENS},
        contended_link_gb_per_s=layout.stride / busy_link / 1e9,
        contended_host_us_per_expert=busy_host * 1e6,
        miss_us=miss_us(layout, how),
    )


def made_up_records(layout: RecordLayout, count: int) -> np.ndarray:
    """Records [count, R] in pages of their own; these bytes are ordinary numbers in any format."""
    records = aligned_empty((count, layout.elements), layout.bits)
    records.view(np.uint8).fill(0x3C)
    return records


@functools.partial(jax.jit, static_argnames=("count", "how"), donate_argnames="pool")
def _copy(
    pool: jax.Array, store: jax.Array, first: jax.Array, *, count: int, how: str
) -> jax.Array:
    numbers = jnp.arange(count, dtype=jnp.int32)
    slot, record = numbers % pool.shape[0], (first + numbers) % store.shape[0]
    with kernels.using(how):
        return kernels.fetch(pool, store, slot, record, jnp.int32(count), first)


class Link:
    """Copies records of a store [n, R] into slots, as a miss does."""

    def __init__(self, store: jax.Array, how: str):
        self.store, self.how = store, how
        self.copies_memory = jax.default_backend() == "cpu"
        self.record_bytes = store.shape[1] * store.dtype.itemsize
        self.count = max(1, min(CALL_BYTES // self.record_bytes, 4096))
        self._pool = self.pool_like(max(1, store.shape[0] // 2))
        self._next = 0

    def pool_like(self, slots: int | None = None) -> jax.Array:
        """A pool on the device with as many slots as the store has records, or `slots`."""
        shape = (slots or self.store.shape[0], self.store.shape[1])
        return jax.device_put(jnp.ones(shape, self.store.dtype), jax.devices()[0])

    def copy(self) -> int:
        """Copy some records, others than the last time, and return how many."""
        first = jnp.int32(self._next % self.store.shape[0])
        options = {"count": self.count, "how": self.how}
        self._pool = _copy(self._pool, self.store, first, **options).block_until_ready()
        self._next += self.count
        return self.count

    def seconds_per_record(self) -> float:
        """Median over calls."""
        return _median_seconds(self.copy)


@functools.partial(jax.jit, static_argnames=("layout", "tokens", "count", "how"))
def _compute(
    layout: RecordLayout, source: jax.Array, first: jax.Array, *, tokens: int, count: int, how: str
) -> jax.Array:
    numbers = jnp.arange(count, dtype=jnp.int32)
    index = (first + numbers) % source.shape[0]
    x = jnp.full((tokens, layout.width), 0.5, jnp.float32)
    with kernels.using(how):
        plan = kernels.plan(jnp.broadcast_to(numbers, (tokens, count)), count)
        rows = kernels.empty_rows(plan, layout.width)
        return kernels.experts(layout, source, index, plan, x, rows)[1]


class Experts:
    """Computes the FFN of experts whose records are source [n, R], where that lies."""

    def __init__(self, layout: RecordLayout, source: jax.Array, how: str):
        self.layout, self.source, self.how = layout, source, how
        self.count = max(1, min(CALL_BYTES // layout.stride, source.shape[0]))
        self._next = 0

    def compute(self, tokens: int) -> int:
        """Some experts, others than the last time, for `tokens` tokens each; returns how many."""
        first = jax.device_put(np.int32(self._next % self.source.shape[0]), self.source.sharding)
        options = {"tokens": tokens, "count": self.count, "how": self.how}
        _compute(self.layout, self.source, first, **options).block_until_ready()
        self._next += self.count
        return self.count

    def seconds(self, tokens: int) -> float:
        """Seconds per expert, median over calls."""
        return _median_seconds(lambda: self.compute(tokens))


@functools.partial(jax.jit, static_argnames=("how",), donate_argnames=("cache", "memory"))
def _decode(
    chosen: Policy,
    store: ExpertStore,
    cache: ExpertCache,
    memory: PolicyMemory,
    picks: jax.Array,
    *,
    how: str,
) -> tuple[ExpertCache, PolicyMemory, jax.Array]:
    """Tokens with one expert in each layer, picks [T, L]; also what comes out, x [1, D]."""
    layers = picks.shape[1]
    per_layer = store.records.shape[0] // layers

    def one(carry: tuple, at: tuple) -> tuple:
        (cache, memory, x), (index, pick) = carry, at
        expert, weight = pick.reshape(1, 1), jnp.ones((1, 1), jnp.float32)
        layer = experts.Layer(
            index=index,
            hidden=x,
            x=x,
            shared=None,
            scores=jnp.zeros((1, per_layer), jnp.float32),
            routing=Routing(expert=expert, weight=weight, exact=expert, replaced_mass=jnp.zeros(1)),
            valid=jnp.ones(1, bool),
        )
        ahead = Ahead(gate=None, input_norm=None, attend=None)
        y, cache, memory, _, _ = experts.apply(chosen, store, cache, memory, layer, ahead)
        # Of y, so that a layer begins when the one before is done, as those of a model do.
        return (cache, memory, x + 1e-6 * y), None

    def token(carry: tuple, own: jax.Array) -> tuple:
        return jax.lax.scan(one, carry, (jnp.arange(layers, dtype=jnp.int32), own))

    x = jnp.full((1, store.layout.width), 0.5, jnp.float32)
    with kernels.using(how):
        (cache, memory, x), _ = jax.lax.scan(token, (cache, memory, x), picks)
    return cache, memory, x


class Layers:
    """Layers of one small expert each, which is in its slot or comes over a link.

    That link takes no time. All run in one program, whose beginning therefore does not count.
    """

    layers, experts, tokens = 8, 4, 64

    def __init__(self, layout: RecordLayout, how: str):
        most = {name: min(getattr(layout, name), size) for name, size in SMALL.items()}
        layout = dataclasses.replace(layout, **most)
        records = made_up_records(layout, self.layers * self.experts)
        self.link = Store.open_paced(records, gigabytes_per_second=AT_ONCE_GB_PER_S)
        handle = jnp.int32(self.link.handle)
        self._store = ExpertStore(records=jnp.asarray(records), link=handle, layout=layout)
        self._how = how
        slots = 2 * self.layers  # for the experts of two tokens: one that needs others misses all
        self._policy = dataclasses.replace(policy("lru"), capacity=jnp.int32(slots))
        self._memory = self._policy.init(self.layers, self.experts)
        self._cache = ExpertCache(
            pool=jnp.zeros((slots, layout.elements), layout.bits),
            residency=tables.empty(len(records), slots),
            arriving=jnp.zeros(slots, bool),
        )

    def run(self, missing: bool) -> int:
        """Run all layers for some tokens, which need other experts if they are to be `missing`.

        Returns how many layers that were.
        """
        turn = np.arange(self.tokens, dtype=np.int32) % self.experts * missing
        picks = jnp.asarray(np.repeat(turn[:, None], self.layers, axis=1))
        self._cache, self._memory, x = _decode(
            self._policy, self._store, self._cache, self._memory, picks, how=self._how
        )
        x.block_until_ready()
        return picks.size


def miss_us(layout: RecordLayout, how: str) -> float:
    """Microseconds that a layer takes for a missing expert beside the time of its record.

    0 where experts come over no link. Measured on small experts: it is what does not grow with
    them.
    """
    if jax.default_backend() != "cpu" or build.library() is None:
        return 0.0
    made = Layers(layout, how)
    try:
        hit, miss = (_median_seconds(lambda m=m: made.run(m)) for m in (False, True))
    finally:
        made.link.close()
    return max(miss - hit, 0.0) * 1e6


def contention(link: Link, host: Experts) -> tuple[float, float]:
    """Seconds per record copied and per expert computed for one token, both at the same time."""
    computing, done = threading.Event(), threading.Event()
    copied: list[float] = []
    failed: list[Exception] = []

    def copying() -> None:
        try:
            while not done.is_set():
                begun = time.perf_counter()
                count = link.copy()
                if computing.is_set():
                    copied.append((time.perf_counter() - begun) / count)
        except Exception as error:
            failed.append(error)

    copier = threading.Thread(target=copying)
    copier.start()
    try:
        host.compute(1)
        computing.set()
        enough = lambda: failed or len(copied) >= REPEATS  # noqa: E731
        computed = _median_seconds(lambda: host.compute(1), enough)
    finally:
        done.set()
        copier.join()
    if failed:
        raise failed[0]
    return statistics.median(copied), computed


def _median_seconds(call: Callable[[], int], enough: Callable[[], Any] = lambda: True) -> float:
    """Median seconds per item of calls that return how many they did; the first warms up."""
    call()
    times: list[float] = []
    while len(times) < REPEATS or not enough():
        begun = time.perf_counter()
        count = call()
        times.append((time.perf_counter() - begun) / count)
    return statistics.median(times)
