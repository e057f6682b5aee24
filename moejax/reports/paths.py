"""Values of a JSON record by a path such as `rows[name=lru,batch=1].tpot_ms`."""

import json
import re
from typing import Any

STEP = re.compile(r"([^.\[\]]+)|\[([^\]]*)\]")


def value_at(record: Any, path: str) -> Any:
    """What a path names.

    Names are separated by dots, "\\." is a dot within one (`hits.0\\.25`). [3] takes an element of
    a list, [name=lru,batch=1] its only row that has these values, as JSON writes them.

    Raises:
        KeyError: nothing, or several rows, are there.
    """
    held = path.replace("\\.", "\0")
    at = record
    for name, choice in STEP.findall(held):
        try:
            at = at[name.replace("\0", ".")] if name else _chosen(at, choice.replace("\0", "."))
        except (KeyError, IndexError, TypeError, ValueError, AttributeError):
            raise KeyError(f"{path}: nothing at {name or choice!r}") from None
    return at


def _chosen(rows: list, choice: str) -> Any:
    if "=" not in choice:
        return rows[int(choice)]
    wanted = dict(part.split("=", 1) for part in choice.split(","))
    found = [r for r in rows if all(_text(r.get(k)) == v for k, v in wanted.items())]
    if len(found) != 1:
        raise KeyError(choice)
    return found[0]


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
