"""Documents whose tables come from records: what stands between their markers.

`<!-- table: NAME -->` ... `<!-- end -->` holds the table of NAME.json, `<!-- claims: FILE -->` ...
`<!-- end -->` the claims of a JSON file beside the document, see `claims_table`.
"""

import json
import math
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from moejax.errors import InputError, unreadable
from moejax.reports.paths import value_at
from moejax.reports.tables import commit_of, lines_of

BLOCK = re.compile(r"(<!-- (table|claims): ([\w.-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
Records = Mapping[str, dict[str, Any]]


def read_records(files: Sequence[pathlib.Path]) -> dict[str, dict[str, Any]]:
    """Records by the names of their files, without ".json".

    Raises:
        InputError: a file cannot be read, is no JSON object, or two have one name.
    """
    records: dict[str, dict[str, Any]] = {}
    for file in files:
        try:
            found = json.loads(file.read_text())
        except (OSError, ValueError) as error:
            raise InputError(unreadable(file, error)) from error
        if not isinstance(found, dict):
            raise InputError(f"{file} holds no JSON object: give records of experiments")
        if file.stem in records:
            raise InputError(f"two records are named {file.name}: give one of them")
        records[file.stem] = found
    return records


def filled(text: str, records: Records, folder: pathlib.Path) -> str:
    """The text with everything between markers written anew.

    Args:
        folder: of the document, where files of claims lie.

    Raises:
        InputError: a record is missing or does not fit its table.
    """

    def replace(found: re.Match) -> str:
        start, kind, name, end = found.groups()
        if kind == "claims":
            lines = claims_table(read_claims(folder / name), records)
        elif name not in records:
            raise InputError(f"the document shows {name}, but no {name}.json was given")
        else:
            lines = lines_of(name, records[name])
        return start + "\n".join(lines) + "\n" + end

    return BLOCK.sub(replace, text)


def outdated(old: str, new: str) -> list[str]:
    """Names of the blocks that differ between two versions of a document."""
    blocks = zip(BLOCK.finditer(old), BLOCK.finditer(new), strict=True)
    return [a[3] for a, b in blocks if a[0] != b[0]]


FIELDS = {"paper", "claim", "number", "record", "form"}
SOURCES = {"value", "target"}
OPTIONS = {"interval", "over", "as"}
LIMITS = {"at_least": "≥", "at_most": "≤"}
OPPOSITE = {"at_least": "at_most", "at_most": "at_least"}
# Of a record's number x, that in the claim's own unit.
UNITS = {"change": lambda x: x - 1, "inverse": lambda x: 1 / x}
# What a record raises that its claim does not fit.
LACKS = (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError)


def read_claims(path: pathlib.Path) -> list[dict[str, Any]]:
    """Claims as a JSON list: paper, claim, number, record, form, and what is held against it.

    That is `value`, a path in the record, with `at_least` or `at_most` (without either the record's
    verdict counts), or `target`, one of the record's own targets. `over` is the path of what the
    value is divided by, `interval` that of the number's 95 % interval, which is there: null where
    the record can have none. `as` turns a ratio of the record into the claim's unit: its "change"
    (less 1) or "inverse"; `at_least` and `at_most` are in that unit, a target's limits are turned.

    Raises:
        InputError: the file is missing or is not such a list.
    """
    try:
        claims = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"the claims: {unreadable(path, error)}") from error
    whole = isinstance(claims, list) and all(isinstance(c, dict) for c in claims)
    allowed = FIELDS | SOURCES | OPTIONS | LIMITS.keys()
    if not whole or not all(
        c.keys() >= FIELDS
        and c.keys() <= allowed
        and len(c.keys() & SOURCES) == 1
        and c.get("as", "change") in UNITS
        and all(_number(c[name]) if name in LIMITS else isinstance(c[name], str) for name in c)
        for c in claims
    ):
        raise InputError(
            f"{path} is no list of claims with {', '.join(sorted(FIELDS))} and value or target, "
            f"all texts, limits being numbers, and `as` one of {', '.join(UNITS)}"
        )
    return claims


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def claims_table(claims: Sequence[Mapping[str, Any]], records: Records) -> list[str]:
    """The Markdown lines of claims beside what records say of them."""
    lines = [
        "| paper | claim | paper's number | ours (95 %) | held against | verdict | command |",
        "|---|---|---|---:|---:|---|---|",
    ]
    for claim in claims:
        record = records.get(claim["record"])
        cells = [claim["paper"], claim["claim"], claim["number"], *judged(claim, record)]
        command = (record or {}).get("command", f"python -m experiments.{claim['record']}")
        cells.append(f"`{command}`{commit_of(record or {})}")
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return lines


def judged(claim: Mapping[str, Any], record: Mapping[str, Any] | None) -> tuple[str, str, str]:
    """Our number and its interval, what it is held against, and the verdict; as text.

    The verdict is "undecided" where the record has an interval and a limit lies within it. Where
    it says that it has none (None), the number stands with that, and decides alone.

    Raises:
        InputError: the record has something else where the claim looks for its number, or nothing
            where it looks for the interval.
    """
    try:
        value, limits, verdict = (None, claim, "") if record is None else _found(claim, record)
        if value is None:
            return "", _limits(limits, claim), "not measured"
        interval = _interval(claim, record)
        if interval and limits.keys() & LIMITS.keys():
            verdict = _verdict(value, interval, limits)
        parts = [claim["form"].format(number) for number in (value, *interval)]
        if "interval" in claim:
            parts[0] += f" ({' to '.join(parts[1:]) or 'no interval'})"
        return parts[0], _limits(limits, claim), verdict
    except LACKS as error:
        raise InputError(
            f"the claim {claim['claim']!r} does not fit {claim['record']}.json: {error!r}"
        ) from error


def _found(claim: Mapping[str, Any], record: Mapping[str, Any]) -> tuple:
    """Value, limits and verdict of a claim without intervals; None where the record has nothing."""
    if "target" in claim:
        target = record.get("targets", {}).get(claim["target"])
        if target is None:
            return None, claim, ""
        held = _truth(target["met"])
        return _in_unit(target["value"], claim), _own_limits(target, claim), _word(held)
    try:
        value = value_at(record, claim["value"])
        value = value / value_at(record, claim["over"]) if "over" in claim else value
        value = _in_unit(value, claim)
    except KeyError:
        return None, claim, ""
    if value is None or not claim.keys() & LIMITS.keys():
        return value, claim, _word(str(record.get("verdict", "")).startswith("holds"))
    return value, claim, _verdict(value, (), claim)


def _in_unit(value: Any, claim: Mapping[str, Any]) -> Any:
    return value if value is None or "as" not in claim else UNITS[claim["as"]](value)


def _own_limits(target: Mapping[str, Any], claim: Mapping[str, Any]) -> dict[str, Any]:
    """A target's limits in the claim's unit."""
    turned = claim.get("as") == "inverse"
    return {
        OPPOSITE[name] if turned else name: _in_unit(target[name], claim)
        for name in LIMITS
        if target.get(name) is not None
    }


def _interval(claim: Mapping[str, Any], record: Mapping[str, Any]) -> tuple[float, ...]:
    """The ends in the claim's unit, the lower first; empty where the record says there are none."""
    found = value_at(record, claim["interval"]) if "interval" in claim else None
    if found is None:
        return ()
    low, high = found
    if not (_number(low) and _number(high)):
        raise TypeError(f"{found!r:.40} is no interval")
    return tuple(sorted(_in_unit(end, claim) for end in (low, high)))


def _truth(met: Any) -> bool:
    if not isinstance(met, bool):
        raise TypeError(f"a target is met or not, not {met!r:.40}")
    return met


def _word(held: bool) -> str:
    return "holds" if held else "**fails**"


def _verdict(value: Any, interval: tuple[float, ...], limits: Mapping[str, Any]) -> str:
    """ "undecided" where the value or an end of its interval lies on the limit's other side."""
    if not _number(value):
        raise TypeError(f"{value!r:.40} is no number to hold against a limit")
    low, high = min(value, *interval, value), max(value, *interval, value)
    least, most = limits.get("at_least", -math.inf), limits.get("at_most", math.inf)
    if least <= low and high <= most:
        return _word(True)
    return _word(False) if high < least or most < low else "undecided"


def _limits(given: Mapping[str, Any], claim: Mapping[str, Any]) -> str:
    named = [(sign, given[name]) for name, sign in LIMITS.items() if given.get(name) is not None]
    return ", ".join(f"{sign} {claim['form'].format(limit)}" for sign, limit in named)
