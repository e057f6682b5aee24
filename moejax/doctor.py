"""Checks of this machine and installation, each ok, warn or fail with what to do."""

import dataclasses
import functools
import importlib.metadata
import os
import pathlib
import platform
import re
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from moejax import allocator
from moejax.errors import MoejaxError
from moejax.units import format_bytes

PACKAGES = (
    "moejax jax jaxlib flax orbax-checkpoint numpy ml_dtypes safetensors tokenizers transformers "
    "huggingface_hub chex typer rich torch"
).split()
# moejax is missing where it runs from a source tree, the others where nothing needs them.
OPTIONAL = {"moejax", "safetensors", "torch", "transformers"}
OLDEST_JAX = (0, 10, 2)
BAD_JAX = {(0, 11, 0), (0, 11, 1)}
OLDEST_PYTHON, NEWEST_PYTHON = (3, 11), (3, 14)
FEATURES = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_int8", "asimd", "bf16", "i8mm")
RECORD, SLOTS = 1 << 16, 1 << 10  # bytes and slots of the pool that the write check fills
COPY_SHARE = 0.25  # of the time of a whole copy: a write in place takes far less


@dataclasses.dataclass(frozen=True)
class Check:
    """One line of the report."""

    name: str
    status: str  # "ok", "warn" or "fail"
    detail: str


def checks() -> Iterator[Check]:
    """Run every check in turn; a check that raises is reported as failed."""
    for name, check in _CHECKS.items():
        try:
            status, detail = check()
        except Exception as error:
            status, detail = "fail", f"{type(error).__name__}: {error}"
            if isinstance(error, MoejaxError):
                detail = str(error)
        yield Check(name, status, detail)


def versions() -> dict[str, str]:
    """Installed version of everything that moejax uses, and of Python."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def environment() -> dict[str, Any]:
    """Where a run took place: versions, system and device; starts JAX."""
    import jax

    from moejax.kernels import build

    device = jax.devices()[0]
    return {
        "versions": versions(),
        "system": platform.platform(),
        "cpu": _cpu_name(),
        "cpus": os.cpu_count(),
        "native_kernels": build.in_use(),
        "device": device.device_kind,
        "backend": device.platform,
    }


def release(version: str) -> tuple[int, ...]:
    """The numbers at the start of a version, three at most."""
    numbers = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(n) for n in numbers[0].split(".")[:3]) if numbers else ()


def judge_jax(jax: str, jaxlib: str) -> tuple[str, str]:
    """Whether a pair of versions is known to work, and what to install if not."""
    shown = f"jax {jax}, jaxlib {jaxlib}"
    if release(jax) in BAD_JAX or release(jaxlib) in BAD_JAX:
        return "fail", (
            f"{shown}: 0.11.0 and 0.11.1 have bugs that moejax meets; "
            "pip install -U 'jax!=0.11.0,!=0.11.1'"
        )
    if min(release(jax), release(jaxlib)) < OLDEST_JAX:
        return "fail", f"{shown}: too old; pip install -U 'jax>=0.10.2,!=0.11.0,!=0.11.1'"
    if release(jax) != release(jaxlib):
        return "warn", f"{shown}: versions differ; pip install -U jax jaxlib"
    return "ok", shown


def judge_python(version: tuple[int, ...]) -> tuple[str, str]:
    """Whether a Python version is supported."""
    shown = ".".join(map(str, version))
    supported = "{}.{} to {}.{}".format(*OLDEST_PYTHON, *NEWEST_PYTHON)
    if version[:2] < OLDEST_PYTHON:
        return "fail", f"{shown}: moejax needs Python {supported}"
    if version[:2] > NEWEST_PYTHON:
        return "warn", f"{shown}: not tested; moejax is tested on Python {supported}"
    return "ok", shown


def judge_write(write: float, copy: float, pool: int) -> tuple[str, str]:
    """Whether writing a slot (seconds) happens in place, against copying the whole pool."""
    shown = (
        f"one slot of {format_bytes(RECORD)} in a pool of {format_bytes(pool)}: "
        f"{write * 1e6:.0f} us, copying the pool: {copy * 1e6:.0f} us"
    )
    if write > COPY_SHARE * copy:
        return "fail", f"{shown}; XLA copies the pool on every fetch: use another JAX version"
    return "ok", shown


def _python() -> tuple[str, str]:
    return judge_python(sys.version_info[:3])


def _jax() -> tuple[str, str]:
    found = versions()
    return judge_jax(found["jax"], found["jaxlib"])


def _packages() -> tuple[str, str]:
    found = versions()
    missing = [p for p in PACKAGES if p not in found and p not in OPTIONAL]
    if missing:
        return "fail", f"missing: {', '.join(missing)}; pip install {' '.join(missing)}"
    return "ok", ", ".join(f"{n} {v}" for n, v in found.items() if n not in ("python", "jaxlib"))


def _devices() -> tuple[str, str]:
    import jax

    devices = jax.devices()
    kinds = sorted({memory.kind for memory in devices[0].addressable_memories()})
    shown = f"{len(devices)} x {devices[0].device_kind} ({devices[0].platform})"
    shown += f", memory kinds {', '.join(kinds)}"
    if devices[0].platform == "cpu" and allocator.gpu_memory():
        return "warn", f"{shown}; there is an NVIDIA GPU: pip install 'jax[cuda12]'"
    if devices[0].platform != "cpu" and "pinned_host" not in kinds:
        return "fail", f"{shown}; experts need pinned_host memory, update JAX and the driver"
    return "ok", shown


def judge_gpu(total: int | None, variables: dict[str, str]) -> tuple[str, str]:
    """What the GPU's allocators may take: total is the GPU's bytes, variables the environment."""
    if total is None:
        return "ok", "no NVIDIA GPU: the budget counts slots, and nothing has to be set"
    both = allocator.FRACTION in variables and allocator.OLD_FRACTION in variables
    if both:
        return "fail", f"unset {allocator.OLD_FRACTION}: JAX refuses it beside {allocator.FRACTION}"
    fraction = variables.get(allocator.FRACTION) or variables.get(allocator.OLD_FRACTION) or "0.75"
    share = f"{format_bytes(float(fraction) * total)} of {format_bytes(total)}"
    preallocated = variables.get(allocator.PREALLOCATE, "") not in ("false", "False", "0")
    limit = variables.get(allocator.HOST_LIMIT) or str(allocator.DEFAULT_HOST_LIMIT)
    return "ok", (
        f"JAX may take {share}, {'at once' if preallocated else 'as needed'} "
        f"({allocator.FRACTION}, {allocator.PREALLOCATE}); pinned host memory up to {limit} GiB "
        f"({allocator.HOST_LIMIT}); --device-memory and large models set both"
    )


def _gpu() -> tuple[str, str]:
    return judge_gpu(allocator.gpu_memory(), dict(os.environ))


def _slot_write() -> tuple[str, str]:
    import jax
    import jax.numpy as jnp

    @functools.partial(jax.jit, donate_argnums=0)
    def write(pool, record, slot):
        return jax.lax.dynamic_update_slice(pool, record[None], (slot, 0))

    pool = jnp.zeros((SLOTS, RECORD // 2), jnp.uint16)
    record = jnp.ones(RECORD // 2, jnp.uint16)
    copy = _fastest(lambda: jnp.array(pool, copy=True).block_until_ready())
    slot = jnp.int32(3)

    def once():
        nonlocal pool
        pool = write(pool, record, slot).block_until_ready()

    return judge_write(_fastest(once), copy, SLOTS * RECORD)


def _fastest(call: Callable[[], Any], repeats: int = 7) -> float:
    times = []
    for _ in range(repeats):
        begun = time.perf_counter()
        call()
        times.append(time.perf_counter() - begun)
    return min(times)


def _compile_cache() -> tuple[str, str]:
    import jax

    from moejax.devices import use_compilation_cache

    use_compilation_cache()
    place = jax.config.jax_compilation_cache_dir
    if not place or not jax.config.jax_enable_compilation_cache:
        return "warn", "off: every run compiles anew; unset JAX_COMPILATION_CACHE_DIR to switch on"
    files = [f for f in pathlib.Path(place).rglob("*") if f.is_file()]
    size = format_bytes(sum(f.stat().st_size for f in files))
    parent = next(p for p in (pathlib.Path(place), *pathlib.Path(place).parents) if p.exists())
    if not os.access(parent, os.W_OK):
        return "warn", f"{place} cannot be written: every run compiles anew"
    return "ok", f"{place}: {len(files)} files, {size}"


def _cpu() -> tuple[str, str]:
    found = _cpu_info("flags") or _cpu_info("Features")
    features = [f for f in FEATURES if f in found.split()]
    return "ok", f"{_cpu_name()}, {os.cpu_count()} cores, {' '.join(features) or 'no known SIMD'}"


def _cpu_name() -> str:
    return _cpu_info("model name") or platform.processor() or platform.machine()


def _cpu_info(field: str) -> str:
    try:
        text = pathlib.Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""
    found = re.search(rf"^{field}\s*:\s*(.*)$", text, re.MULTILINE)
    return found[1] if found else ""


def _native() -> tuple[str, str]:
    from moejax.kernels import build

    return ("warn" if build.library() is None else "ok"), build.status()


def judge_host(gpu: bool, way: tuple[str, str]) -> tuple[str, str]:
    """How placements that compute experts on the host do so; `way` as `kernels.host.way` has it."""
    if not gpu:
        return "ok", "no NVIDIA GPU: experts are computed where their records lie"
    kind, meaning = way
    detail = f"{meaning}; written, but not confirmed on a GPU yet"
    return ("ok" if kind == "stream" else "warn"), detail


def _host() -> tuple[str, str]:
    import jax

    from moejax.kernels import host

    gpu = jax.default_backend() == "gpu"
    return judge_host(gpu, host.way() if gpu else ("", ""))


def _memory() -> tuple[str, str]:
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    shown = f"{format_bytes(total)} in all"
    try:
        text = pathlib.Path("/proc/meminfo").read_text()
    except OSError:
        return "ok", shown
    free = int(re.search(r"MemAvailable:\s+(\d+) kB", text)[1]) << 10
    shown += f", {format_bytes(free)} free"
    return ("warn" if free < 2 << 30 else "ok"), shown


def _embedded() -> tuple[str, str]:
    from moejax.hub import resolve
    from moejax.loading import load

    directory = resolve("tiny")
    if not (directory / "config.json").is_file():
        return "warn", f"{directory} is missing: give --model"
    runtime = load("tiny", context=64)
    completion = runtime.generate("The", 2)[0]
    return "ok", f"{directory}: {runtime.slots} experts, wrote {len(completion.tokens)} tokens"


_CHECKS: dict[str, Callable[[], tuple[str, str]]] = {
    "python": _python,
    "jax": _jax,
    "packages": _packages,
    "devices": _devices,
    "gpu memory": _gpu,
    "slot write": _slot_write,
    "compile cache": _compile_cache,
    "cpu": _cpu,
    "native kernels": _native,
    "experts on the host": _host,
    "memory": _memory,
    "embedded model": _embedded,
}
