"""What a trace is made of: its columns, their codes, and the checks that they pass."""

import dataclasses
import enum
from collections.abc import Sequence
from typing import Any

import numpy as np

from moejax.config import RouterRule
from moejax.errors import InputError

FORMAT, VERSION = "moejax-trace", 1
MOST_EXPERTS = np.iinfo(np.int16).max
MOST_LAYERS, MOST_IN_ALL = 1 << 12, 10**6  # experts of all layers
MOST_RECORD = 1 << 40  # bytes
LATEST = 1e9  # seconds, thirty years


class Phase(enum.IntEnum):
    """What a pass was for."""

    PREFILL = 0
    DECODE = 1
    DRAFT = 2
    VERIFY = 3


class Outcome(enum.IntEnum):
    """Where the expert of a pick was when its layer began, in the run that was recorded."""

    UNKNOWN = 0
    HIT = 1
    MISS = 2  # moved over the link
    PREFETCHED = 3  # a hit thanks to a prefetch, its first use
    HOST = 4  # a miss computed on the host
    SUBSTITUTE = 5  # stands in for an expert that the model's own router chose
    LOW = 6  # run from its low-bit copy


# The type of each column and its dimensions: see `Trace`, and R reads, M greatest scores.
COLUMNS = {
    "sequence": ("i4", "N"),
    "position": ("i4", "N"),
    "run": ("i4", "N"),
    "phase": ("u1", "N"),
    "token": ("i4", "N"),
    "accepted": ("?", "N"),
    "picks": ("i2", "NLK"),
    "weights": ("f4", "NLK"),
    "scores": ("f2", "NLE"),
    "top_ids": ("i2", "NLM"),
    "top_scores": ("f2", "NLM"),
    "outcome": ("u1", "NLK"),
    "exact": ("i2", "NLK"),
    "resident": ("?", "PLE"),
    "began": ("f8", "P"),
    "seconds": ("f8", "P"),
}
ALSO = {"scores": ("f4", "NLE"), "top_scores": ("f4", "NLM")}  # where nothing is to be rounded
NEEDED = tuple(COLUMNS)[:7]
READS = {
    "expert": ("i4", "R"),
    "requested_us": ("f8", "R"),
    "begun_us": ("f8", "R"),
    "landed_us": ("f8", "R"),
    "kind": ("u1", "R"),
    "run": ("i4", "R"),
}
COUNT = (("i4", "PL"), ("f4", "PL"))  # numbers of experts, and sums of router weight


def forms(name: str) -> tuple[tuple[str, str], ...]:
    """The types that a column may have, with its dimensions, the usual one first."""
    return (COLUMNS[name], ALSO[name]) if name in ALSO else (COLUMNS[name],)


def check_array(name: str, array: Any, form: Sequence[tuple[str, str]], sizes: dict) -> None:
    """`check_column` of an array; InputError if it is none."""
    if not isinstance(array, np.ndarray):
        raise InputError(f"{name} of a trace must be a NumPy array, not {type(array).__name__}")
    check_column(name, array.dtype, array.shape, form, sizes)


def check_column(
    name: str,
    dtype: np.dtype,
    shape: tuple[int, ...],
    form: Sequence[tuple[str, str]],
    sizes: dict[str, int],
) -> None:
    """Raise InputError unless a column has one of the types, and the shape that `sizes` give.

    A size that is not known yet is noted.
    """
    types, dimensions = [np.dtype(kind) for kind, _ in form], form[0][1]
    if dtype not in types:
        wanted = " or ".join(map(str, types))
        raise InputError(f"{name} of a trace must be {wanted}, not {dtype}")
    alike = len(shape) == len(dimensions)
    if alike:
        known = [sizes.setdefault(d, n) for d, n in zip(dimensions, shape, strict=True)]
        alike = list(shape) == known
    if not alike:
        wanted = ", ".join(f"{d}={sizes[d]}" if d in sizes else d for d in dimensions)
        raise InputError(f"{name} of a trace must be [{wanted}], not {list(shape)}")


def check_form(trace: Any) -> None:
    if not isinstance(trace.experts, int) or not 0 < trace.experts <= MOST_EXPERTS:
        raise InputError(f"a trace has 1 to {MOST_EXPERTS} experts, not {trace.experts!r}")
    sizes = {"E": trace.experts}
    if missing := [name for name in NEEDED if getattr(trace, name) is None]:
        raise InputError(f"a trace must have {', '.join(missing)}")
    check_array("run", trace.run, [COLUMNS["run"]], sizes)
    if not len(trace.run):
        raise InputError("the trace has no rows: record at least one token")
    sizes["P"] = int(trace.run[-1]) + 1
    for name, column in trace.columns().items():
        check_array(name, column, forms(name), sizes)
    if (trace.top_ids is None) != (trace.top_scores is None):
        raise InputError("top_ids and top_scores of a trace belong together: give both")
    if trace.began is not None and trace.seconds is None:
        raise InputError("began of a trace needs seconds, too")
    for name, count in trace.counts.items():
        check_array(f"counts/{name}", count, COUNT, sizes)
    if unknown := set(trace.reads) - set(READS):
        raise InputError(f"unknown reads/{sorted(unknown)[0]}; known: {', '.join(READS)}")
    for name, column in trace.reads.items():
        check_array(f"reads/{name}", column, [READS[name]], sizes)
    if 0 in (sizes["L"], sizes["K"], sizes.get("M", 1)):
        raise InputError("a trace has at least one layer, one pick and one score")
    if sizes["L"] > MOST_LAYERS or sizes["L"] * trace.experts > MOST_IN_ALL:
        raise InputError(
            f"a trace has up to {MOST_LAYERS} layers and {MOST_IN_ALL} experts in all, not "
            f"{sizes['L']} layers of {trace.experts}"
        )
    check_about(trace.about)
    router = trace.about.get("router", {})
    groups, best = router.get("num_groups", 1), router.get("top_groups", 1)
    if trace.experts % groups or best > groups:
        raise InputError(
            f"the router of a trace cannot choose {best} of {groups} groups of its "
            f"{trace.experts} experts"
        )


def check_about(about: Any) -> None:
    """Raise InputError unless what programs read of `about` is what they take it for."""
    if not isinstance(about, dict):
        raise InputError(f"about of a trace must be an object, not {type(about).__name__}")
    size = about.get("record_bytes")
    if size is not None and (type(size) is not int or not 0 < size <= MOST_RECORD):
        raise InputError(
            f"record_bytes {size!r:.40} of a trace is not a number of bytes in [1, {MOST_RECORD}]"
        )
    for name in ("source", "link", "policy"):
        if not isinstance(about.get(name), str | None):
            raise InputError(f"{name} of a trace must be text, not {about[name]!r:.40}")
    for name in ("exact", "per_layer"):
        if not isinstance(about.get(name), bool | None):
            raise InputError(f"{name} {about[name]!r:.40} of a trace is not true or false")
    capacity, parts = about.get("capacity"), about.get("policy_parts")
    if capacity is not None and (type(capacity) is not int or capacity < 1):
        raise InputError(f"capacity {capacity!r:.40} of a trace is not a number of slots")
    if parts is not None and not (
        isinstance(parts, dict) and all(isinstance(said, str) for said in parts.values())
    ):
        raise InputError(f"policy_parts {parts!r:.40} of a trace are not texts by name")
    if "router" in about:
        _check_router(about["router"])


def _check_router(given: Any) -> None:
    fields = {field.name: field for field in dataclasses.fields(RouterRule)}
    if not isinstance(given, dict) or not {"normalize"} <= set(given) <= set(fields):
        raise InputError(
            f"router {given!r:.60} of a trace must have normalize, and may have "
            f"{', '.join([*fields][1:])}"
        )
    for name, value in given.items():
        kind = fields[name].type
        right = type(value) is kind or (kind is float and type(value) is int)
        if kind is not bool:
            right = right and 0 < value < 1e9
        if not right:
            raise InputError(f"router {name} {value!r:.40} of a trace is not a {kind.__name__}")


def check_rows(trace: Any) -> None:
    steps = np.diff(trace.run)
    if trace.run[0] != 0 or not np.isin(steps, (0, 1)).all():
        raise InputError(
            "the rows of a pass must be adjacent, and passes numbered from 0 without gaps"
        )
    changed = np.flatnonzero((steps == 0) & (np.diff(trace.phase.astype(int)) != 0))
    if changed.size:
        raise InputError(f"pass {trace.run[changed[0]]} has rows of several phases")
    if trace.phase.max() > max(Phase):
        raise InputError(f"phase {trace.phase.max()} is unknown")
    for name, least in (("sequence", 0), ("position", 0), ("token", -1)):
        lowest = getattr(trace, name).min()
        if lowest < least:
            raise InputError(f"{name} {lowest} of a trace is out of range")


def check_values(trace: Any) -> None:
    for name in ("picks", "top_ids", "exact"):
        _check_ids(name, getattr(trace, name), trace.experts)
    if trace.outcome is not None and trace.outcome.max() > max(Outcome):
        raise InputError(f"outcome {trace.outcome.max()} is unknown")
    floats = {name: getattr(trace, name) for name in ("weights", "scores", "top_scores")}
    floats |= {f"counts/{n}": c for n, c in trace.counts.items() if c.dtype.kind == "f"}
    floats |= {f"reads/{n}": c for n, c in trace.reads.items() if c.dtype.kind == "f"}
    for name, column in floats.items():
        if column is None:
            continue
        # In parts of some 64 MiB: the mask of all scores would take half as much as they do.
        parts = np.array_split(column, 1 + (column.nbytes >> 26))
        if not all(np.isfinite(part).all() for part in parts):
            raise InputError(f"{name} of a trace hold NaN or infinity")
    for name in ("began", "seconds"):
        times = getattr(trace, name)
        if times is not None and not ((times >= 0) & (times <= LATEST)).all():
            raise InputError(f"{name} of a trace must be in [0, {LATEST:g}] seconds")
    for name, column in trace.reads.items():
        if name.endswith("_us") and not (np.abs(column) <= LATEST * 1e6).all():
            raise InputError(f"reads/{name} of a trace is further than {LATEST:g} seconds away")
    _check_ids("reads/expert", trace.reads.get("expert"), trace.layers * trace.experts)
    _check_ids("reads/run", trace.reads.get("run"), trace.passes)


def _check_ids(name: str, ids: np.ndarray | None, limit: int) -> None:
    if ids is not None and ids.size and not -1 <= ids.min() <= ids.max() < limit:
        raise InputError(
            f"{name} of a trace must be in [-1, {limit}), not {ids.min()} to {ids.max()}"
        )
