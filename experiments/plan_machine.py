"""The rates of this machine that plans go by: what `bench hw` measures, the disk, and constants.

Command:   python -m experiments.plan_machine --out moejax/planner/server_2core.json
Hardware:  any CPU and disk, quiet; 2 cores take 2 minutes; 2 GiB of memory and of the disk.
Expected:  a machine that `moejax plan --hardware FILE` reads.

Constants: models with hardly any weights and few or many layers are timed, and a line through their
times gives the time of a step and of a layer. Disk: random reads past the page cache by as many
threads as the engine has, of a small and a large size; a line through their times gives the rate
and the latency, both per record.
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
from moejax.reports import documents as report_documents

TINY = {"width": 64, "experts": 8, "top_k": 2, "expert_width": 32, "heads": 2, "kv_heads": 1}
LAYERS = (2, 6, 18)
READS = (128 << 10, 4 << 20)  # bytes of one read
FILE = 1 << 30


def constants(folder: pathlib.Path, reps: int) -> tuple[float, float]:
    """Microseconds of a step and of each of its layers, whatever they read."""
    times = []
    for layers in LAYERS:
        config = random_model.make_config(**TINY, head_dim=32, vocab=512, layers=layers)
        random_model.write(folder / f"layers{layers}", config)
        runtime = moejax.load(folder / f"layers{layers}", context=128)
        [row] = bench.bench(runtime, bench.tests([], [100]), reps=reps, bandwidth=False)
        times.append(row["ms_per_token"] * 1e3)
    layer_us, step_us = np.polyfit(LAYERS, times, 1)
    return max(float(step_us), 0.0), max(float(layer_us), 0.0)


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
    measured = measure.hardware(config, "bfloat16", how=devices.kernels(None))
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = pathlib.Path(name)
        rate, latency = disk(folder, 2.0 if options.quick else 6.0)
        step_us, layer_us = constants(folder, 3 if options.quick else 9)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    made = machines.from_hardware(measured, base=machines.PRESETS["laptop"]())
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
        sources={
            **made.sources,
            "disk": f"{here}: reads of {READS[0]} and {READS[1]} bytes by {tiers.THREADS} threads",
            "overheads": f"{here}: models of {', '.join(map(str, LAYERS))} small layers",
            "memory": "the operating system",
        },
    )
    text = made.to_json() + "\n"
    if options.out:
        report_documents.write(options.out, text)
    print(text)


if __name__ == "__main__":
    main()
