"""A memory budget that a GPU's allocator keeps: variables that JAX reads when it starts."""

import functools
import math
import os
import subprocess
import sys
import warnings
from collections.abc import Mapping

from moejax.errors import BudgetError
from moejax.units import format_bytes

FRACTION = "XLA_CLIENT_MEM_FRACTION"
OLD_FRACTION = "XLA_PYTHON_CLIENT_MEM_FRACTION"  # jaxlib raises ValueError when both are set
PREALLOCATE = "XLA_PYTHON_CLIENT_PREALLOCATE"
HOST_LIMIT = "XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB"
DEFAULT_HOST_LIMIT = 64  # GiB of pinned host memory that XLA allows itself
HOST_MARGIN = 4 << 30  # bytes: the pool also serves XLA's staging buffers


def environment_for(
    device_memory: int | None, gpu_total: int | None, host_bytes: int
) -> dict[str, str]:
    """Variables that make a GPU's allocator keep a budget.

    Args:
        device_memory: the budget in bytes; None = JAX's default.
        gpu_total: bytes of the GPU; None = no GPU, for which nothing is set.
        host_bytes: bytes of expert records that will lie in pinned host memory.

    Raises:
        BudgetError: the GPU is smaller than the budget.
    """
    if gpu_total is None:
        return {}
    variables = {}
    if device_memory is not None:
        if device_memory > gpu_total:
            raise BudgetError(
                f"a budget of {format_bytes(device_memory)} is more than the GPU's "
                f"{format_bytes(gpu_total)}"
            )
        # Rounded down, so that the pool is never larger than the budget.
        variables[FRACTION] = f"{math.floor(device_memory / gpu_total * 1e6) / 1e6:.6f}"
    limit = math.ceil((host_bytes + HOST_MARGIN) / 2**30)
    if limit > DEFAULT_HOST_LIMIT:
        variables[HOST_LIMIT] = str(limit)
    return variables


def gpu_memory() -> int | None:
    """Bytes of the first visible NVIDIA GPU, asked of nvidia-smi without starting JAX."""
    platforms = os.environ.get("JAX_PLATFORMS", "")
    if platforms and not {"cuda", "gpu"} & set(platforms.split(",")):
        return None
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    first = "0" if visible is None else visible.split(",")[0].strip()
    if first in ("", "-1"):
        return None
    return _ask_nvidia_smi(first)


@functools.cache
def _ask_nvidia_smi(gpu: str) -> int | None:
    command = ["nvidia-smi", f"--id={gpu}", "--query-gpu=memory.total"]
    try:
        asked = subprocess.run(
            [*command, "--format=csv,noheader,nounits"], capture_output=True, text=True, timeout=20
        )
        return int(asked.stdout.split()[0]) << 20 if asked.returncode == 0 else None
    except (OSError, subprocess.TimeoutExpired, ValueError, IndexError):
        return None


def jax_has_started() -> bool:
    """Whether JAX has already opened its devices and read its variables."""
    bridge = sys.modules.get("jax._src.xla_bridge")
    return bridge is not None and bridge.backends_are_initialized()


def apply(variables: Mapping[str, str]) -> None:
    """Set variables before JAX starts; what the user has set stays. Warns where it is too late."""
    missing = {name: value for name, value in variables.items() if not _given(name)}
    if not missing:
        return
    if jax_has_started():
        if sys.modules["jax"].default_backend() == "gpu":
            _warn_too_late(" ".join(f"{name}={value}" for name, value in missing.items()))
        return
    os.environ.update(missing)


def _given(name: str) -> bool:
    names = (FRACTION, OLD_FRACTION) if name == FRACTION else (name,)
    return any(os.environ.get(n) for n in names)


@functools.cache
def _warn_too_late(settings: str) -> None:
    warnings.warn(
        "JAX has already started, so its allocator does not keep the budget: load the model before "
        f"JAX does anything, or set {settings}",
        stacklevel=5,
    )
