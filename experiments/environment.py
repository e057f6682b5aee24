"""What every result records about where it came from."""

import importlib.metadata
import os
import platform
import subprocess
from typing import Any

PACKAGES = ("jax", "jaxlib", "flax", "numpy", "transformers", "moejax")


def environment(model: str) -> dict[str, Any]:
    """Hardware, versions, commit and model of a measurement."""
    import jax

    return {
        "model": model,
        "commit": _output("git", "rev-parse", "HEAD"),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "device": jax.devices()[0].device_kind,
        "system": platform.platform(),
    }


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _cpu() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            names = (line.split(":")[1].strip() for line in lines if line.startswith("model name"))
            return next(names)
    except (OSError, StopIteration):
        return platform.processor()
