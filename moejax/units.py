"""Sizes as people write them."""

import re

from moejax.errors import InputError

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_UNITS |= {f"{prefix}i": 2 ** (10 * (i + 1)) for i, prefix in enumerate("kmgt")}


def parse_bytes(size: int | str) -> int:
    """Bytes of 6442450944, "6GiB", "6.5 GB" or "512M"; InputError for anything else."""
    if isinstance(size, int) and not isinstance(size, bool):
        value = size
    else:
        found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?\s*", str(size).lower())
        if not found or found[2] not in _UNITS:
            raise InputError(f"{size!r} is not a size; write for example 6GiB, 800MB or 1000000")
        value = int(float(found[1]) * _UNITS[found[2]])
    if value <= 0:
        raise InputError(f"{size!r} is not a size: it must be positive")
    return value


def format_bytes(size: float) -> str:
    """Bytes in the largest binary unit that keeps one digit before the point: "1.5 GiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
