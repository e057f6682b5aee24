"""Traces from elsewhere: the CSV of BigMoeOnEdge, and plain tables of (token, layer) -> experts."""

import array
import csv
import gzip
import json
import lzma
import math
import os
import pathlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import IO, Any

import numpy as np

from moejax.errors import InputError, unreadable
from moejax.traces.form import MOST_EXPERTS, MOST_LAYERS
from moejax.traces.trace import Outcome, Phase, Trace

OPENERS: dict[str, Callable[..., IO[str]]] = {".xz": lzma.open, ".gz": gzip.open}
# BigMoeOnEdge's residency: 0 = miss, 1 = hit, 2 = hit by prefetch.
OUTCOMES = (Outcome.MISS, Outcome.HIT, Outcome.PREFETCHED)
PHASES = {"prefill": Phase.PREFILL, "decode": Phase.DECODE}
MOST_PICKS, LONGEST_LINE = 1 << 10, 1 << 20
MOST_TEXT = 1 << 30  # characters of a file once decompressed
EMPTIEST = 64  # places of a trace for each pick that a table holds


def read(path: str | os.PathLike, *, experts: int | None = None, name: str | None = None) -> Trace:
    """The trace that a file of another program holds; .xz and .gz are unpacked.

    A BigMoeOnEdge CSV (`route_trace v1`), or a table: CSV with a header, or JSON lines, one row per
    token and layer with `token` (its place in the sequence), `layer`, `experts` (ids by rank, in
    CSV with spaces between) and optionally `weights`, `phase` (prefill or decode, the default),
    `sequence` and `id` (of the token). Tokens come in the order of execution.

    Args:
        experts: E of a table; by default one more than the greatest id in it.
        name: of the model; by default what the file says, or its own name.

    Raises:
        InputError: a file that cannot be read, or a line that is wrong; the message says which.
    """
    path = pathlib.Path(path)
    plain = path.with_suffix("") if path.suffix in OPENERS else path
    name = name or plain.name.partition(".")[0]
    try:
        with OPENERS.get(path.suffix, open)(path, "rt", encoding="utf-8") as file:
            lines = _Lines(path, file)
            if plain.suffix in (".jsonl", ".ndjson"):
                return _table(lines, _json_rows(lines), experts, name)
            if lines.comments():
                return _big_moe(lines, experts, name)
            return _table(lines, _csv_rows(lines), experts, name)
    except (OSError, EOFError, lzma.LZMAError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(unreadable(path, error)) from error


class _Lines:
    """Lines of a file, counted, those that begin it with # apart."""

    def __init__(self, path: pathlib.Path, file: IO[str]):
        self.path, self.number, self.size = path, 0, 0
        self._file, self._next = file, ""
        self._comments: list[str] | None = None

    def comments(self) -> list[str]:
        """The lines at the beginning that start with #."""
        if self._comments is None:
            self._comments = []
            while (line := self._read()).startswith("#"):
                self._comments.append(line[1:].strip())
            self._next = line
        return self._comments

    def _read(self) -> str:
        if self._next:
            line, self._next = self._next, ""
            return line
        line = self._file.readline(LONGEST_LINE)
        if len(line) == LONGEST_LINE:
            raise self.error("is too long")
        self.number += bool(line)
        self.size += len(line)
        if self.size > MOST_TEXT:
            raise self.error(f"ends more than {MOST_TEXT} characters: cut the table in parts")
        return line

    def __iter__(self) -> Iterator[str]:
        while line := self._read():
            yield line

    def error(self, why: str) -> InputError:
        """An error in the current line."""
        return InputError(f"{self.path}: line {self.number} {why}")

    def whole(self, row: dict[str, Any], name: str, limit: int, default: Any = None) -> int:
        """The number in [0, limit) of a row, as text or as JSON has it."""
        given = value = row.get(name, default)
        if isinstance(value, str) and re.fullmatch(r"\s*[0-9]{1,18}\s*", value):
            value = int(value)
        if type(value) is not int or not 0 <= value < limit:
            raise self.error(f"has {name} {given!r:.40}, not a whole number in [0, {limit})")
        return value

    def real(self, value: Any, name: str) -> float:
        """A finite number."""
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number) or isinstance(value, bool):
            raise self.error(f"has {name} {value!r:.40}, not a finite number")
        return number


class _Picks:
    """Picks as they come, and the rows that they belong to, in the order in which these began."""

    def __init__(self) -> None:
        self.rows: dict[tuple[int, int], int] = {}  # of (sequence, place)
        self.phase, self.id = array.array("B"), array.array("i")
        self.where = {name: array.array("i") for name in ("row", "layer", "slot", "expert")}
        self.weight, self.outcome = array.array("f"), array.array("B")

    def row(self, sequence: int, place: int, phase: int, token: int) -> int:
        """The row of a token; -1 if it had another phase or id before."""
        found = self.rows.setdefault((sequence, place), len(self.rows))
        if found == len(self.phase):
            self.phase.append(phase)
            self.id.append(token)
        alike = (self.phase[found], self.id[found]) == (phase, token)
        return found if alike else -1

    def add(self, row: int, layer: int, slot: int, expert: int) -> None:
        """One pick."""
        for name, value in zip(self.where, (row, layer, slot, expert), strict=True):
            self.where[name].append(value)

    def trace(self, path: pathlib.Path, model: str, experts: int | None, about: dict) -> Trace:
        """All of them as a trace; InputError if there are none, or one is there twice."""
        if not self.rows:
            raise InputError(f"{path} holds no picks: a header and nothing below it")
        row, number, slot, expert = (np.array(v, np.int64) for v in self.where.values())
        numbers, layer = np.unique(number, return_inverse=True)
        if experts is None:
            experts, about = int(expert.max()) + 1, about | {"experts_assumed": True}
        if expert.max() >= experts:
            raise InputError(f"{path} has expert {expert.max()}, but the model {experts} experts")
        if not (numbers == np.arange(len(numbers))).all():
            about = about | {"layer_numbers": numbers.tolist()}
        shape = (len(self.rows), len(numbers), int(slot.max()) + 1)
        if math.prod(shape) > max(EMPTIEST * len(row), 1 << 20):
            raise InputError(f"{path} is too empty to be a trace: {len(row)} picks for {shape}")
        place = np.ravel_multi_index((row, layer, slot), shape)
        if len(np.unique(place)) != len(place):
            raise InputError(f"{path} has picks of one token and layer more than once")

        def filled(values: Any, kind: str, empty: int) -> np.ndarray:
            made = np.full(shape, empty, kind)
            made.reshape(-1)[place] = values
            return made

        sequence, position = np.array([*self.rows], np.int32).T
        phase = np.array(self.phase, np.uint8)
        # The rows of a prompt run at once, every other one alone.
        alone = (phase[1:] != Phase.PREFILL) | (phase[:-1] != Phase.PREFILL)
        alone |= np.diff(sequence) != 0
        optional = {"weights": (self.weight, "f4", 0), "outcome": (self.outcome, "u1", 0)}
        made = Trace(
            model=model,
            experts=experts,
            sequence=np.ascontiguousarray(sequence),
            position=np.ascontiguousarray(position),
            run=np.concatenate([[0], np.cumsum(alone)]).astype(np.int32),
            phase=phase,
            token=np.array(self.id, np.int32),
            accepted=np.ones(len(phase), bool),
            picks=filled(expert, "i2", -1),
            **{n: filled(*given) for n, given in optional.items() if len(given[0])},
            about=about,
        )
        return made.check()


def _big_moe(lines: _Lines, experts: int | None, name: str) -> Trace:
    said = " ".join(lines.comments())
    if not said.startswith("route_trace v1"):
        raise InputError(f"{lines.path} begins with {said!r:.40}, not with 'route_trace v1'")
    facts = (
        dict(re.findall(r"(\w+)=(\S+)", lines.comments()[1])) if len(lines.comments()) > 1 else {}
    )
    if "n_expert" in facts:
        experts = lines.whole(facts, "n_expert", MOST_EXPERTS + 1)
    sizes = {int(n): int(b) for n, b in re.findall(r"layer=(\d+) expert_bytes=(\d+)", said)}
    picks, last, sequence = _Picks(), (-1, -1), 0
    for row in _csv_rows(lines):
        turn, place = lines.whole(row, "turn", 1 << 30), lines.whole(row, "step", 1 << 30)
        if turn != last[0] and place <= last[1]:
            sequence += 1  # it starts anew, instead of going on
        last = (turn, max(place, last[1] if turn == last[0] else -1))
        phase = lines.whole(row, "phase", 2)
        at = picks.row(sequence, place, phase, -1)
        if at < 0:
            raise lines.error("gives a token another phase")
        layer, slot = lines.whole(row, "layer", MOST_LAYERS), lines.whole(row, "slot", MOST_PICKS)
        picks.add(at, layer, slot, lines.whole(row, "expert", experts or MOST_EXPERTS))
        picks.weight.append(lines.real(row.get("weight"), "weight"))
        picks.outcome.append(OUTCOMES[lines.whole(row, "residency", len(OUTCOMES))])
    about = {"source": "BigMoeOnEdge", **facts}
    if sizes:
        about |= {"expert_bytes": [*sizes.values()], "record_bytes": max(sizes.values())}
    model = re.sub(r"\.gguf$", "", facts.get("model", name).rpartition("/")[2])
    return picks.trace(lines.path, model, experts, about)


def _csv_rows(lines: _Lines) -> Iterator[dict[str, Any]]:
    yield from csv.DictReader(iter(lines))


def _json_rows(lines: _Lines) -> Iterator[dict[str, Any]]:
    for line in lines:
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            raise lines.error("is no JSON object")
        yield row


def _table(lines: _Lines, rows: Iterator[dict[str, Any]], experts: int | None, name: str) -> Trace:
    picks, weighted, limit = _Picks(), None, experts or MOST_EXPERTS
    for row in rows:
        if missing := [
            column for column in ("token", "layer", "experts") if row.get(column) is None
        ]:
            raise lines.error(f"has no {missing[0]}: a table has token, layer, experts")
        phase = PHASES.get(str(row.get("phase") or "decode"))
        if phase is None:
            raise lines.error(f"has phase {row['phase']!r:.40}, not {' or '.join(PHASES)}")
        token = -1 if row.get("id") in (None, "") else lines.whole(row, "id", 1 << 31)
        place = lines.whole(row, "token", 1 << 30)
        at = picks.row(lines.whole(row, "sequence", 1 << 30, 0), place, phase, token)
        if at < 0:
            raise lines.error("gives a token another phase or id")
        chosen, layer = _several(lines, row["experts"]), lines.whole(row, "layer", MOST_LAYERS)
        for slot, expert in enumerate(chosen):
            picks.add(at, layer, slot, lines.whole({"expert": expert}, "expert", limit))
        given = row.get("weights") not in (None, "")
        if weighted not in (None, given):
            raise lines.error("has weights or not, unlike those before")
        weighted = given
        if given:
            weights = _several(lines, row["weights"])
            if len(weights) != len(chosen):
                raise lines.error(f"has {len(weights)} weights for {len(chosen)} experts")
            picks.weight.extend(lines.real(weight, "weight") for weight in weights)
    return picks.trace(lines.path, name, experts, {"source": lines.path.name})


def _several(lines: _Lines, value: Any) -> Sequence[Any]:
    found = value.split() if isinstance(value, str) else value
    if not isinstance(found, list) or not 0 < len(found) <= MOST_PICKS:
        raise lines.error(f"has {value!r:.40} where 1 to {MOST_PICKS} numbers belong")
    return found
