"""Sizes as people write them: 1MB is 1e6 bytes, 1MiB is 2**20; what is printed is binary."""

import decimal
import math
import re

from moejax.errors import InputError

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_UNITS |= {f"{prefix}i": 2 ** (10 * (i + 1)) for i, prefix in enumerate("kmgt")}
_NAMES = ("B", "KiB", "MiB", "GiB", "TiB")
MOST = 2**63


def parse_bytes(size: int | str) -> int:
    """Bytes of 6442450944, "6GiB", "6.5 GB" or "512M" (1e6 each); InputError for anything else."""
    if isinstance(size, int) and not isinstance(size, bool):
        value = size
    else:
        found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?\s*", str(size).lower())
        if not found or found[2] not in _UNITS:
            raise InputError(
                f"{size!r:.80} is not a size; write for example 6GiB, 800MB or 1000000"
            )
        value = int(decimal.Decimal(found[1]) * _UNITS[found[2]])
    if not 0 < value < MOST:
        raise InputError(f"{size!r:.80} is not a size: it must be positive, and below 8 EiB")
    return value


def parse_slots(slots: int | str, experts: int) -> int:
    """Slots of 76, "76" or "40%", a share of all experts that is rounded down.

    Raises:
        InputError: neither a whole number nor a share above 0 % and up to 100 %.
    """
    found = re.fullmatch(r"\s*([0-9]{1,18})(\.[0-9]{1,18})?\s*(%?)\s*", str(slots))
    if found and found[3]:
        percent = decimal.Decimal(found[1] + (found[2] or ""))
        if 0 < percent <= 100:
            return int(percent * experts / 100)
    elif found and not found[2]:
        return int(found[1])
    raise InputError(
        f"{slots!r:.40} is not a number of slots: write how many, such as 76, or a share of all "
        "experts, such as 40%"
    )


def format_bytes(size: float, *, up: bool = False) -> str:
    """Bytes in the largest binary unit that keeps one digit before the point: "1.5 GiB".

    Args:
        up: rounded so that what is printed is enough, for sizes that somebody is to give.
    """
    for power in range(len(_NAMES)):
        tenths = size / 1024**power * 10
        tenths = math.ceil(tenths) if up else round(tenths)
        if abs(tenths) < 10240:
            break
    return f"{tenths / 10:.1f} {_NAMES[power]}" if power else f"{size:.0f} B"
