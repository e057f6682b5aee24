"""One HTML page to look at a routing trace with: layers by steps, in any browser, offline."""

import base64
import gzip
import hashlib
import json
import os
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np

from moejax.errors import InputError
from moejax.reports.files import replace_text
from moejax.traces.trace import Outcome, Trace

SOURCES = pathlib.Path(__file__).parent / "page"
SCRIPTS = ("data.js", "table.js", "draw.js", "details.js", "page.js")
MOST_PICKS = 20_000_000  # beyond it a page takes a browser's memory, and seconds to open
TOLD = ("policy", "slots", "link", "dataset", "version")  # entries of `about` in the page's head
LONGEST = 200  # characters of any text of a trace


def write_page(
    trace: Trace,
    path: str | os.PathLike,
    *,
    outcome: np.ndarray | None = None,
    outcome_of: str = "a replay",
    text_of: Callable[[int], str] | None = None,
) -> None:
    """Write the page of a trace; the file is whole or not there.

    It loads nothing and takes a browser with DecompressionStream (all since 2023). Without
    outcomes its colours show reuse: how long ago each expert was used before.

    Args:
        outcome: [N, L, K] u8, `Outcome` of each pick by a replay, instead of the trace's own.
        outcome_of: what that was of, for people.
        text_of: the text of a token's id, such as a tokenizer's `decode`; ids without.

    Raises:
        InputError: too many picks for a page, outcomes of another shape, or no writable file.
    """
    trace.check()
    if trace.picks.size > MOST_PICKS:
        raise InputError(
            f"a page holds up to {MOST_PICKS} picks, the trace has {trace.picks.size}: take fewer "
            "passes (`trace.between`)"
        )
    data = base64.b64encode(gzip.compress(_packed(trace, outcome, outcome_of, text_of), mtime=0))
    replace_text(pathlib.Path(path), _page(data.decode()))


def _page(data: str) -> str:
    """The page around its data; only the hashes of its own style and script may run."""
    style = (SOURCES / "page.css").read_text(encoding="utf-8")
    script = "".join((SOURCES / name).read_text(encoding="utf-8") for name in SCRIPTS)
    page = (SOURCES / "page.html").read_text(encoding="utf-8")
    parts = {"style": style, "script": script, "data": data}
    parts |= {f"{name}_hash": _digest(parts[name]) for name in ("style", "script")}
    for name, part in parts.items():
        page = page.replace("{{" + name + "}}", part)
    return page


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _packed(
    trace: Trace,
    outcome: np.ndarray | None,
    outcome_of: str,
    text_of: Callable[[int], str] | None,
) -> bytes:
    """The header's length, the header as JSON, and arrays at multiples of 8 bytes."""
    arrays: dict[str, np.ndarray] = {
        "sequence": trace.sequence,
        "position": trace.position,
        "run": trace.run,
        "token": trace.token,
        "phase": trace.phase,
        "accepted": trace.accepted.view(np.uint8),
        "picks": trace.picks,
    }
    header = _header(trace, text_of)
    weights = trace.weights
    if weights is not None:
        low = float(weights.min())
        step = (float(weights.max()) - low) / 65535 or 1.0
        arrays["weights"] = np.rint((weights - low) / step).astype(np.uint16)
        header |= {"weightLow": low, "weightStep": step}
    found, told = _outcomes(trace, outcome, outcome_of)
    if found is not None:
        arrays["outcome"] = found
        header["outcomes"] = told
    if trace.exact is not None:
        arrays["exact"] = trace.exact
    for name in ("began", "seconds"):
        if (times := getattr(trace, name)) is not None:
            arrays[name] = times
    if outcome is None and {"fetched", "prefetched"} <= set(trace.counts):
        moved = trace.counts["fetched"] + trace.counts["prefetched"]
        arrays["moved"] = moved.sum(axis=1).astype(np.int32)
    return _joined(header, arrays)


def _header(trace: Trace, text_of: Callable[[int], str] | None) -> dict[str, Any]:
    ids = np.unique(trace.token[trace.token >= 0]).tolist() if text_of else []
    size = trace.about.get("record_bytes")
    about = [f"{n} {trace.about[n]}"[:LONGEST] for n in TOLD if trace.about.get(n) is not None]
    return {
        "model": trace.model[:LONGEST],
        "rows": trace.rows,
        "passes": trace.passes,
        "layers": trace.layers,
        "top": trace.top_k,
        "experts": trace.experts,
        "about": about,
        "recordBytes": size if isinstance(size, int) and size > 0 else None,
        "texts": {number: text_of(number)[:LONGEST] for number in ids},
    }


def _outcomes(
    trace: Trace, outcome: np.ndarray | None, outcome_of: str
) -> tuple[np.ndarray | None, str]:
    """Outcomes [N, L, K] u8 and what to say of them; None where there are none but UNKNOWN."""
    told = "" if outcome is None else f"Hits and misses are those of {outcome_of}."
    found = trace.outcome if outcome is None else outcome
    if found is None:
        return None, ""
    if found.shape != trace.picks.shape or found.dtype != np.uint8 or found.max() > max(Outcome):
        raise InputError(
            f"outcomes must be u8 {list(trace.picks.shape)} of `Outcome`, "
            f"not {found.dtype} {list(found.shape)}"
        )
    return (found, told) if found.any() else (None, "")


def _joined(header: dict[str, Any], arrays: dict[str, np.ndarray]) -> bytes:
    places, offset = {}, 0
    for name, array in arrays.items():
        places[name] = [array.dtype.str[1:], offset, array.size]
        offset += -(-array.nbytes // 8) * 8
    start = 0
    while True:  # the header states offsets, which its own length moves
        at = {name: [kind, start + place, size] for name, (kind, place, size) in places.items()}
        text = json.dumps(header | {"arrays": at}, allow_nan=False).encode()
        if (needed := -(-(4 + len(text)) // 8) * 8) <= start:
            break
        start = needed
    parts = [len(text).to_bytes(4, "little"), text, bytes(start - 4 - len(text))]
    for array in arrays.values():
        little = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
        parts += [little.tobytes(), bytes(-array.nbytes % 8)]
    return b"".join(parts)
