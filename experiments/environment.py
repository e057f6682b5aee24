"""What every result records about where it came from."""

import subprocess
from typing import Any

from moejax import doctor


def environment(model: str) -> dict[str, Any]:
    """Model, commit, hardware and versions of a measurement."""
    return {"model": model, "commit": _commit(), **doctor.environment()}


def _commit() -> str | None:
    try:
        command = ["git", "rev-parse", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
