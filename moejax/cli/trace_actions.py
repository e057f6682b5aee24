"""What the commands of `moejax trace` do; `traces` declares their options."""

import json
import pathlib
from collections.abc import Sequence
from typing import Any

from rich.console import Console

from moejax.cli import actions as commands
from moejax.errors import InputError, unreadable
from moejax.terminal import Terminal, facts_table, table
from moejax.traces.file import read_header
from moejax.traces.importers import OPENERS, read
from moejax.traces.statistics import DraftStats, statistics
from moejax.traces.trace import Outcome, Phase, Trace
from moejax.units import format_bytes

PROMPT_TOKENS = 64
# What the page calls them, too; it counts the distinct experts of a pass instead of picks.
OUTCOMES = {
    "unknown": "unknown",
    "hit": "hit",
    "miss": "miss, moved",
    "prefetched": "hit by a prefetch",
    "host": "miss, on the host",
    "substitute": "substituted",
    "low": "from low bits",
}


def texts(
    given: Sequence[str],
    files: Sequence[pathlib.Path],
    dataset: pathlib.Path | None,
    field: str,
    limit: int | None,
) -> list[str]:
    """Texts of the command line and of files, then those of a set; from stdin if there are none.

    Raises:
        InputError: no text, an empty one, or a file or set that cannot be read.
    """
    if dataset is None:
        if limit is not None:
            raise InputError("--limit says how many texts of a set: give --dataset too")
        return commands.read_prompts(given, files)
    found = commands.read_prompts(given, files) if given or files else []
    return [*found, *_of_set(dataset, field, limit)]


def _of_set(path: pathlib.Path, field: str, limit: int | None) -> list[str]:
    plain = path.with_suffix("") if path.suffix in OPENERS else path
    if plain.suffix not in (".txt", ".jsonl", ".json"):
        raise InputError(f"{path} is not a set of texts: give a .txt or .jsonl file")
    found: list[str] = []
    try:
        with OPENERS.get(path.suffix, open)(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if len(found) == limit:
                    break
                if line.strip():
                    where = f"{path}, line {number}"
                    text = line.strip() if plain.suffix == ".txt" else _field(line, field, where)
                    found.append(text)
    except (OSError, EOFError, ValueError) as error:
        raise InputError(unreadable(path, error)) from error
    if not found:
        raise InputError(f"{path} holds no texts")
    return found


def _field(line: str, field: str, where: str) -> str:
    """The text of a row of JSON lines; of several turns the first."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        raise InputError(f"{where}: no JSON") from None
    text = row.get(field) if isinstance(row, dict) else None
    if isinstance(text, list) and text:
        text = text[0]
    if not isinstance(text, str) or not text:
        names = ", ".join(map(str, row))[:200] if isinstance(row, dict) else "none"
        raise InputError(f"{where}: no text in field {field!r}; --field may name one of: {names}")
    return text


def record(
    terminal: Terminal,
    out: pathlib.Path,
    model: str,
    given_texts: list[str],
    load: dict[str, Any],
    how: dict[str, Any],
    given: dict[str, Any],
    written: dict[str, Any],
    keep: dict[str, Any],
    as_json: bool,
) -> None:
    """Record texts and write the trace.

    Args:
        load: options of `moejax.load`.
        how: `batch`, `name` and `dataset`, where texts are from.
        given: `tokens` and `prompt_tokens`, None where the model writes.
        written: `max_new_tokens`, `sampling` and `seed`.
        keep: as `record.Keep` takes them.
    """
    if given["tokens"] is None and given["prompt_tokens"] is not None:
        raise InputError("--prompt-tokens comes before given tokens: give --tokens too")
    if given["tokens"] is not None and written["sampling"]:
        raise InputError("--tokens feeds given tokens, none is drawn: leave sampling options out")
    from moejax.doctor import environment
    from moejax.policies.policy import policy
    from moejax.traces import record as recording

    kept = recording.Keep(**keep)
    recording.check_drafts(policy(load["policy"]), kept)
    runtime = commands.load_model(terminal, model, batch=how["batch"], **load)
    about = {"policy": load["policy"], "environment": environment()}
    if how["dataset"] is not None:
        about["dataset"] = how["dataset"].name
    options = {
        "batch": how["batch"],
        "name": how["name"] or model,
        "keep": kept,
        "about": about,
    }
    with terminal.progress("recording") as progress:
        if given["tokens"] is None:
            trace = recording.record(runtime, given_texts, **written, **options, progress=progress)
        else:
            before = given["prompt_tokens"]
            lengths = {"prompt": PROMPT_TOKENS if before is None else before}
            lengths["tokens"] = given["tokens"]
            trace = recording.follow(runtime, given_texts, **lengths, **options, progress=progress)
    _write(terminal, trace, out, as_json)


def check_place(out: pathlib.Path, force: bool) -> None:
    """Raise InputError before a long run where its trace could not be written, or would replace."""
    if out.is_dir() or not out.absolute().parent.is_dir():
        raise InputError(f"cannot write {out}: give a file in a folder that exists")
    if out.exists() and not force:
        raise InputError(f"{out} exists: give another name, or --force to replace it")


def import_(
    terminal: Terminal,
    path: pathlib.Path,
    out: pathlib.Path,
    experts: int | None,
    name: str | None,
    as_json: bool,
) -> None:
    """Write the trace that another program's file holds."""
    trace = read(path, experts=experts, name=name)
    if "experts_assumed" in trace.about:
        terminal.note(
            f"the file does not say how many experts a layer has: taken as {trace.experts}, one "
            "more than the greatest id (--experts says otherwise)"
        )
    _write(terminal, trace, out, as_json)


def _write(terminal: Terminal, trace: Trace, out: pathlib.Path, as_json: bool) -> None:
    trace.save(out)
    document = _summary(trace) | {"file": str(out), "bytes": out.stat().st_size}
    if as_json:
        commands.print_json(document)
        return
    hits = document["outcomes"]
    rows = [
        ("trace", f"{out}, {format_bytes(document['bytes'])}"),
        ("model", f"{trace.model}: {trace.layers} layers of {trace.experts}, top-{trace.top_k}"),
        ("tokens", ", ".join(f"{n} {phase}" for phase, n in document["rows"].items())),
        ("passes", str(trace.passes)),
    ]
    if hits:
        shares = [f"{n:.1%} {OUTCOMES[name]}" for name, n in hits.items()]
        rows.append(("of all picks", "; ".join(shares)))
    terminal.facts(rows)


def _summary(trace: Trace) -> dict[str, Any]:
    phases = {phase.name.lower(): int((trace.phase == phase).sum()) for phase in Phase}
    outcomes = {}
    if trace.outcome is not None:
        made = trace.outcome[trace.picks >= 0]
        shares = {o.name.lower(): float((made == o).mean()) if made.size else 0.0 for o in Outcome}
        outcomes = {name: share for name, share in shares.items() if share}
    return {
        "model": trace.model,
        "layers": trace.layers,
        "experts": trace.experts,
        "top_k": trace.top_k,
        "passes": trace.passes,
        "rows": {name: count for name, count in phases.items() if count},
        "rejected": int((~trace.accepted).sum()),
        "outcomes": outcomes,
        "reads": len(next(iter(trace.reads.values()), ())),
    }


def part(path: pathlib.Path, start: int, stop: int | None) -> Trace:
    """The trace of the passes from `start` up to `stop`, all by default."""
    trace = Trace.load(path)
    if start == 0 and stop is None:
        return trace
    return trace.between(start, trace.passes if stop is None else stop)


def note_written(terminal: Terminal, out: pathlib.Path, advice: str) -> None:
    """Say on stderr what was written, and what to do with it."""
    terminal.note(f"{out}: {format_bytes(out.stat().st_size)}, {advice}")


def view(
    terminal: Terminal,
    path: pathlib.Path,
    out: pathlib.Path,
    start: int,
    stop: int | None,
    model: str | None,
) -> None:
    """Write the page of a trace, with the text of its tokens if `model` has a tokenizer for it."""
    from moejax.hub import resolve
    from moejax.text import Tokenizer
    from moejax.traces.view import write_page

    trace, text_of = part(path, start, stop), None
    if model is not None:
        tokenizer = Tokenizer.load(resolve(model))

        def text_of(number: int) -> str:
            return tokenizer.decode([number], skip_special_tokens=False)

    write_page(trace, out, text_of=text_of)
    note_written(terminal, out, "open it in a browser")


def info(path: pathlib.Path, as_json: bool) -> None:
    """Print a trace's header."""
    header = read_header(path)
    if as_json:
        commands.print_json(header)
        return
    rows, layers, top_k = header["columns"]["picks"]["shape"]
    about = {n: v for n, v in header["about"].items() if not isinstance(v, dict | list)}
    facts = [
        ("model", f"{header['model']}: {layers} layers of {header['experts']}, top-{top_k}"),
        ("rows", str(rows)),
        ("columns", ", ".join(header["columns"])),
        *((name, str(value)) for name, value in about.items()),
    ]
    Console(highlight=False, markup=False).print(facts_table(facts))


def stats(path: pathlib.Path, phase: str, as_json: bool) -> None:
    """Print a trace's statistics."""
    found = statistics(Trace.load(path), phase)
    if as_json:
        commands.print_json(found.as_dict())
        return
    console = Console(highlight=False, markup=False)
    console.print(facts_table(_facts(found)))
    columns = ("", *(f"{q:.0%}" for q in map(float, found.reuse_tokens)))
    rows = [
        (name, *map(_number, quantiles.values()))
        for name, quantiles in (
            ("tokens since the last use", found.reuse_tokens),
            ("other experts since then", found.stack_distance),
        )
    ]
    console.print()
    console.print(table(columns, rows))
    entropy = enumerate(zip(found.entropy_by_layer, found.gini_by_layer, strict=True))
    layers = [
        (n, f"{h:.3f}", f"{g:.3f}", _number(found.overlap_by_layer[1][n], 3), _number(d))
        for (n, (h, g)), d in zip(entropy, found.stack_median_by_layer, strict=True)
    ]
    names = ("layer", "entropy", "Gini", "overlap of neighbours", "median other experts between")
    console.print()
    console.print(table(names, layers))
    if found.drafts is not None:
        console.print()
        console.print(_drafts_table(found.drafts))


def _drafts_table(drafts: DraftStats) -> Any:
    """By layer, what of a verification's picks its drafts had."""
    gate = drafts.gate_by_layer or [None] * len(drafts.found_by_layer)
    pairs = enumerate(zip(drafts.found_by_layer, gate, strict=True))
    rows = [(n, _number(found, 3), _number(best, 3)) for n, (found, best) in pairs]
    return table(("layer", "picks of verification in its draft's", "in its gate's best"), rows)


def _facts(found: Any) -> list[tuple[str, str]]:
    of = f"{found.layers} layers of {found.experts}, top-{found.top_k}"
    shares = ", ".join(f"{s:.1%} to the top {top}" for top, s in found.top_share.items())
    overlap = ", ".join(f"{_number(v, 3)} at {lag}" for lag, v in found.overlap.items())
    near = ", ".join(f"{share:.1%} in {n}" for n, share in found.reused_within.items())
    union = ", ".join(
        f"{_number(v, 2)} at {w}" for w, v in found.union.items() if w in (2, 4, 8, 16)
    )
    rows = [
        ("tokens", f"{found.rows} in {found.sequences} sequences, {found.phase}; {of}"),
        ("uses", f"{shares}; {found.unused:.1%} of the experts have none"),
        ("Gini", f"{found.gini:.3f}"),
        ("normalised entropy", f"{found.entropy:.3f}"),
        ("overlap by lag", f"{overlap}; by chance {found.chance:.3f}"),
        ("used again within", f"{near} tokens; {found.first_uses:.1%} are first uses"),
        ("experts of a window", f"{union} tokens, over those of one"),
    ]
    if found.score_by_rank is not None:
        around = range(max(found.top_k - 2, 0), min(found.top_k + 2, len(found.score_by_rank)))
        scores = ", ".join(f"{found.score_by_rank[r]:.4f}" for r in around)
        ranks = f"{around[0] + 1} to {around[-1] + 1}"
        rows.append(("mean score", f"{scores} of ranks {ranks}"))
        rows.append(("next after the last pick", f"{_number(found.score_step, 3)} of its score"))
    if (drafts := found.drafts) is not None:
        places = ", ".join(f"{s:.3f} at {n}" for n, s in drafts.found_by_place.items())
        rows.append(("drafted upon", f"{drafts.rows} tokens, {drafts.kept:.1%} of them kept"))
        rows.append(("picks foretold", f"{drafts.found:.3f} by drafts' picks ({places} drafts)"))
        if drafts.gate is not None:
            rows.append(("", f"{drafts.gate:.3f} by the best of their gates"))
    return rows


def _number(value: float | None, digits: int = 0) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
