"""Documents whose tables come from records: what stands between their markers.

`<!-- table: NAME -->` ... `<!-- end -->` holds the table of NAME.json, `<!-- claims: FILE -->` ...
`<!-- end -->` the claims of a JSON file beside the document, see `claims_table`.
"""

import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from moejax.errors import InputError, unreadable
from moejax.reports.paths import value_at
from moejax.reports.tables import lines_of

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
LIMITS = {"at_least": "≥", "at_most": "≤"}
LACKS = (KeyError, TypeError, ValueError, AttributeError)  # a record that its claim does not fit


def read_claims(path: pathlib.Path) -> list[dict[str, Any]]:
    """Claims as a JSON list: paper, claim, number, record, form, and what is held against it.

    That is `value`, a path in the record, with `at_least` or `at_most` (without either the record's
    verdict counts), or `target`, one of the record's own targets.

    Raises:
        InputError: the file is missing or is not such a list.
    """
    try:
        claims = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read the claims {path}: {error}") from error
    whole = isinstance(claims, list) and all(isinstance(c, dict) for c in claims)
    allowed = FIELDS | SOURCES | LIMITS.keys()
    if not whole or not all(
        c.keys() >= FIELDS
        and c.keys() <= allowed
        and len(c.keys() & SOURCES) == 1
        and all(_number(c[name]) if name in LIMITS else isinstance(c[name], str) for name in c)
        for c in claims
    ):
        raise InputError(
            f"{path} is no list of claims with {', '.join(sorted(FIELDS))} and value or target, "
            "all texts, limits being numbers"
        )
    return claims


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def claims_table(claims: Sequence[Mapping[str, Any]], records: Records) -> list[str]:
    """The Markdown lines of claims beside what records say of them."""
    lines = [
        "| paper | claim | paper's number | ours | held against | verdict | command |",
        "|---|---|---|---:|---:|---|---|",
    ]
    for claim in claims:
        record = records.get(claim["record"])
        cells = [claim["paper"], claim["claim"], claim["number"], *judged(claim, record)]
        command = (record or {}).get("command", f"python -m experiments.{claim['record']}")
        cells.append(f"`{command}`")
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return lines


def judged(claim: Mapping[str, Any], record: Mapping[str, Any] | None) -> tuple[str, str, str]:
    """Our number, what it is held against, and whether it holds; as text.

    Raises:
        InputError: the record has something else where the claim looks for its number.
    """
    try:
        found = None if record is None else _found(claim, record)
        if found is None:
            return "", _limits(claim, claim), "not measured"
        value, limits, held = found
        if value is None:
            return "", _limits(limits, claim), "not measured"
        return claim["form"].format(value), _limits(limits, claim), "holds" if held else "**fails**"
    except LACKS as error:
        raise InputError(
            f"the claim {claim['claim']!r} does not fit {claim['record']}.json: {error!r}"
        ) from error


def _found(claim: Mapping[str, Any], record: Mapping[str, Any]) -> tuple | None:
    """Value, limits and verdict of a claim, None where the record has nothing of it."""
    if "target" in claim:
        target = record.get("targets", {}).get(claim["target"])
        return None if target is None else (target["value"], target, _truth(target["met"]))
    try:
        value = value_at(record, claim["value"])
    except KeyError:
        return None
    return value, claim, _held(value, claim, str(record.get("verdict", "")))


def _truth(met: Any) -> bool:
    if not isinstance(met, bool):
        raise TypeError(f"a target is met or not, not {met!r:.40}")
    return met


def _held(value: Any, claim: Mapping[str, Any], verdict: str) -> bool:
    if value is None or not claim.keys() & LIMITS.keys():
        return verdict.startswith("holds")
    if not _number(value):
        raise TypeError(f"{value!r:.40} is no number to hold against a limit")
    return claim.get("at_least", value) <= value <= claim.get("at_most", value)


def _limits(given: Mapping[str, Any], claim: Mapping[str, Any]) -> str:
    named = [(sign, given[name]) for name, sign in LIMITS.items() if given.get(name) is not None]
    return ", ".join(f"{sign} {claim['form'].format(limit)}" for sign, limit in named)
