"""The command `report`: tables and figures from the JSON records of experiments."""

import importlib
import pathlib
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from moejax.cli import options as opt
from moejax.errors import InputError, unreadable

CLONE = pathlib.Path(__file__).resolve().parents[2]


def report(
    files: Annotated[list[pathlib.Path], typer.Argument(help="JSON records of experiments.")],
    out: Annotated[
        pathlib.Path | None, typer.Option(help="A folder for report.md and the figures.")
    ] = None,
    readme: Annotated[
        list[pathlib.Path] | None,
        typer.Option(help="A document whose marked tables are written anew; several times."),
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Write nothing; exit code 1 if a table is out of date.")
    ] = False,
    json: opt.AsJson = False,
    quiet: opt.Quiet = False,
) -> None:
    """Draw tables and figures from the records of experiments, and keep documents up to date."""
    if not write(files, out, readme or [], check, json, quiet):
        raise typer.Exit(1)


def write(
    files: Sequence[pathlib.Path],
    out: pathlib.Path | None,
    documents: Sequence[pathlib.Path],
    check: bool = False,
    as_json: bool = False,
    quiet: bool = False,
) -> bool:
    """Write tables and figures of records; whether everything is (or was) up to date.

    Args:
        out: a folder for report.md and the figures.
        documents: Markdown files whose marked tables are written anew.
        check: only compare the documents' tables with the records.
    """
    from moejax.reports import documents as report_documents
    from moejax.reports.files import replace_text
    from moejax.terminal import Terminal

    terminal = Terminal(quiet)
    records = report_documents.read_records(files)
    if not documents and (check or out is None):
        raise InputError("nothing to do: give --readme FILE, --out DIR, or both")
    if check and out is not None:
        raise InputError("--check writes nothing: leave --out away")
    changed = _changed(documents, records)
    outdated = {
        str(path): report_documents.outdated(old, new) for path, (old, new) in changed.items()
    }
    made: dict[str, Any] = {"outdated": outdated, "written": [], "left_out": {}}
    if not check:
        for path, (_, new) in changed.items():
            replace_text(path, new)
            made["written"].append(str(path))
        if out is not None:
            with terminal.status("drawing"):
                _write_folder(out, records, made)
    _show(terminal, made, check, as_json)
    return not (check and changed)


def _changed(
    documents: Sequence[pathlib.Path], records: dict[str, dict]
) -> dict[pathlib.Path, tuple[str, str]]:
    """Old and new text of the documents that differ; all are read before one is written."""
    from moejax.reports import documents as report_documents

    found = {}
    for path in documents:
        try:
            old = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(unreadable(path, error)) from error
        try:
            new = report_documents.filled(old, records, path.parent)
        except InputError as error:
            raise InputError(f"{path}: {error}") from None
        if new != old:
            found[path] = (old, new)
    return found


def _write_folder(out: pathlib.Path, records: dict[str, dict], made: dict[str, Any]) -> None:
    from moejax.reports.files import replace_text
    from moejax.reports.tables import commit_of, has_table, lines_of

    out.mkdir(parents=True, exist_ok=True)
    sections = ["# Report"]
    for name, record in sorted(records.items()):
        lines = [f"## {name}", "", f"{record.get('claim', '')}", ""]
        lines += [f"Verdict: **{record['verdict']}**", ""] if "verdict" in record else []
        lines += [f"`{record['command']}`{commit_of(record)}", ""] if "command" in record else []
        if has_table(name, record):
            lines += [*lines_of(name, record), ""]
        why = draw(name, record, out / f"{name}.png")
        if why is None:
            lines += [f"![{name}]({name}.png)", ""]
            made["written"].append(str(out / f"{name}.png"))
        else:
            made["left_out"][name] = why
        sections.append("\n".join(lines))
    replace_text(out / "report.md", "\n\n".join(sections) + "\n")
    made["written"].append(str(out / "report.md"))


def draw(name: str, record: dict[str, Any], path: pathlib.Path) -> str | None:
    """Draw a record by the package or by its experiment; why not, None if it was drawn."""
    from moejax.reports import plots

    beside = path.with_name(f".{path.stem}.part.png")
    try:
        if name in plots.FIGURES:
            plots.draw(name, record, beside)
        elif name.isidentifier() and (CLONE / "experiments" / f"{name}.py").is_file():
            plot = getattr(_experiment(name), "plot", None)
            if plot is None:
                return "its experiment draws none"
            plots.figure(1, (1, 1))  # says so if matplotlib is missing
            plot(record, beside)
        else:
            return "no figure is known for it here"
        beside.replace(path)
    except InputError as error:  # matplotlib is missing: tables need none
        return str(error)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        return f"it lacks what its figure shows: {error!r}"
    finally:
        beside.unlink(missing_ok=True)
    return None


def _experiment(name: str) -> Any:
    """The experiment that stands beside the package, as in a clone."""
    if str(CLONE) not in sys.path:
        sys.path.insert(0, str(CLONE))
    return importlib.import_module(f"experiments.{name}")


def _show(terminal: Any, made: dict[str, Any], check: bool, as_json: bool) -> None:
    if as_json:
        from moejax.cli.actions import print_json

        print_json(made)
        return
    for path, names in made["outdated"].items():
        said = "differs from the records" if check else "brought up to date"
        print(f"{path}: {', '.join(names)} {said}")
    for name, why in made["left_out"].items():
        terminal.note(f"{name}: no figure, {why}")
    if check and not made["outdated"]:
        print("all tables are what the records say")
    for path in made["written"]:
        if path not in made["outdated"]:
            print(path)
