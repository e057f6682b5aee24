"""The rates of this machine that plans go by: what `bench hw` measures, the disk, and constants.

Command:   python -m experiments.plan_machine --out moejax/planner/server_2core.json
Hardware:  any CPU and disk, quiet; 2 cores take 2 minutes; 2 GiB of memory and of the disk.
Expected:  a machine that `moejax plan --hardware FILE` reads.

Constants: models with hardly any weights and few or many layers are timed, and a line through their
times gives the time of a step and of a layer. Choosing a token: what a generated token takes more
than a given one, of vocabularies of several sizes; the slope of a line through that. Kernels: the
times of one expert for 1 to 64 tokens, in each format, of `moejax bench hw`. Disk: random reads
past the page cache by as many threads as the engine has, of a small and a large size; a line
through their times gives the rate and the latency, both per record.
"""

import argparse
import concurrent.futures
import dataclasses
import mmap
import os
import pathlib
import tempfile
import time

import numpy as np

import moejax
from experiments import random_model
from moejax import bench, devices, measure, tiers
from moejax.models import config_from_hf
from moejax.planner import machines
from moejax.reports.files import replace_text

TINY = {"width": 64, "experts": 8, "top_k": 2, "expert_width": 32, "heads": 2, "kv_heads": 1}
LAYERS = (2, 6, 18)
VOCABULARY = 512  # of those
VOCABULARIES = (VOCABULARY, 4096, 32768)
FORMATS = ("bfloat16", "int8", "int4g32")
TOKENS = 100
READS = (128 << 10, 4 << 20)  # bytes of one read
FILE = 1 << 30


def constants(folder: pathlib.Path, reps: int) -> tuple[float, float, float]:
    """Microseconds of a step, of each layer, and of choosing from a thousand tokens."""
    runtimes = {(layers, VOCABULARY): None for layers in LAYERS}
    runtimes |= {(LAYERS[0], vocabulary): None for vocabulary in VOCABULARIES}
    for layers, vocabulary in runtimes:
        config = random_model.make_config(**TINY, head_dim=32, vocab=vocabulary, layers=layers)
        path = folder / f"model{layers}-{vocabulary}"
        random_model.write(path, config)
        runtimes[layers, vocabulary] = moejax.load(path, context=2 * TOKENS)
    times: dict[tuple[int, int], list[tuple[float, float]]] = {key: [] for key in runtimes}
    for turn in range(-1, reps):
        for key, runtime in runtimes.items():
            found = (generated(runtime), given(runtime))
            times[key] += [found] if turn >= 0 else []
    each = {key: np.median(found, axis=0) * 1e6 for key, found in times.items()}
    more = [each[LAYERS[0], vocabulary] @ (1, -1) for vocabulary in VOCABULARIES]
    draw_us, _ = np.polyfit(np.array(VOCABULARIES) / 1e3, more, 1)
    steps = [each[layers, VOCABULARY][0] - draw_us * VOCABULARY / 1e3 for layers in LAYERS]
    layer_us, step_us = np.polyfit(LAYERS, steps, 1)
    return tuple(max(float(us), 0.0) for us in (step_us, layer_us, draw_us))


def generated(runtime: moejax.Runtime) -> float:
    """Seconds of a greedily chosen token."""
    ids = bench.random_ids(runtime.config.vocab_size, 1, 1, seed=0, repetition=0)
    return bench.run_once(runtime, bench.Test("", 1, TOKENS + 1), ids).seconds / TOKENS


def given(runtime: moejax.Runtime) -> float:
    """Seconds of a step with a given token."""
    state, token = runtime.init_state(), np.zeros((1, 1), np.int32)
    state, out = runtime.decode_step(state, token)
    out.logits.block_until_ready()
    begun = time.perf_counter()
    for _ in range(TOKENS):
        state, out = runtime.decode_step(state, token)
        out.logits.block_until_ready()
    return (time.perf_counter() - begun) / TOKENS


def disk(folder: pathlib.Path, seconds: float) -> tuple[float, float]:
    """1e9 bytes per second of large reads, and the latency of one read in microseconds."""
    path = folder / "disk"
    block = np.random.default_rng(0).integers(0, 256, 16 << 20, dtype=np.uint8).tobytes()
    with path.open("wb") as file:
        for _ in range(FILE // len(block)):
            file.write(block)
        os.fsync(file.fileno())
    small, large = (_seconds_per_read(path, size, seconds) for size in READS)
    rate = (READS[1] - READS[0]) / max(large - small, 1e-9)
    return rate / 1e9, max(small - READS[0] / rate, 0.0) * 1e6


def _seconds_per_read(path: pathlib.Path, size: int, seconds: float) -> float:
    """Seconds of the clock per read of `size` bytes, all threads at it."""
    places = np.random.default_rng(size).integers(0, FILE // size, 1 << 16) * size

    def reading(start: int) -> int:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_DIRECT", 0))
        done = 0
        try:
            with mmap.mmap(-1, size) as buffer:
                while time.perf_counter() < end:
                    at = int(places[(start + done * tiers.THREADS) % len(places)])
                    done += os.preadv(descriptor, [buffer], at) == size
        finally:
            os.close(descriptor)
        return done

    with concurrent.futures.ThreadPoolExecutor(tiers.THREADS) as workers:
        begun = time.perf_counter()
        end = begun + seconds
        reads = sum(workers.map(reading, range(tiers.THREADS)))
        return (time.perf_counter() - begun) / reads


def main() -> None:
    """Measure and write the machine."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer repetitions")
    parser.add_argument("--folder", type=pathlib.Path, help="on the disk to measure")
    parser.add_argument("--out", type=pathlib.Path)
    options = parser.parse_args()
    config = config_from_hf(random_model.make_config())
    records = [measure.hardware(config, form, how=devices.kernels(None)) for form in FORMATS]
    measured = records[0]
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = pathlib.Path(name)
        rate, latency = disk(folder, 2.0 if options.quick else 6.0)
        step_us, layer_us, draw_us = constants(folder, 3 if options.quick else 9)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    made = machines.from_hardware(measured, base=machines.PRESETS["laptop"]())
    kernels = {r.format: machines.from_hardware(r).kernels[r.format] for r in records}
    here = f"`python -m experiments.plan_machine`, JAX {measured.versions['jax']}"
    made = dataclasses.replace(
        made,
        name=f"{measured.name}, {measured.cores} cores",
        device_memory=memory,
        host_memory=memory,
        disk_gb_per_s=rate,
        disk_latency_us=latency,
        layer_us=layer_us,
        step_us=step_us,
        kernels=kernels,
        draw_us=draw_us,
        sources={
            **made.sources,
            "disk": f"{here}: reads of {READS[0]} and {READS[1]} bytes by {tiers.THREADS} threads",
            "overheads": f"{here}: models of {LAYERS} small layers and {VOCABULARIES} tokens",
            "memory": "the operating system",
        },
    )
    text = made.to_json() + "\n"
    if options.out:
        replace_text(options.out, text)
    print(text)


if __name__ == "__main__":
    main()
