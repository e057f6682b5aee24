"""Documents say what the records say: tables, claims, figures, and the suite that makes records."""

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest
import typer
from typer.testing import CliRunner

from moejax.cli import exits
from moejax.cli import reports as report_commands
from moejax.errors import InputError
from moejax.reports import documents as report_documents
from moejax.reports import files as report_files
from moejax.reports import tables as report_tables
from moejax.reports.paths import value_at

ROOT = pathlib.Path(__file__).parents[1]
RESULTS = sorted((ROOT / "experiments" / "results").glob("*.json"))
sys.path.insert(0, str(ROOT))

ENVIRONMENT = {"cpu": "a processor", "cpus": 2, "versions": {"python": "3.11", "jax": "0.10"}}


def record(**changes):
    """A record that describes its own table."""
    rows = [
        {"name": "lru", "batch": 1, "ms": {"tpot": 2.0}, "kl": None},
        {"name": "a|b", "batch": 1, "ms": {"tpot": 0.5}, "kl": 0.25},
        {"name": "lru", "batch": 3, "ms": {"tpot": 4.0}, "kl": 1.0},
    ]
    columns = [
        {"title": "policy", "value": "name"},
        {"title": "TPOT, ms", "value": "ms.tpot", "form": "{:.2f}"},
        {"title": "KL", "value": "kl", "form": "{:+.1%}"},
    ]
    made = {
        "claim": "a claim",
        "command": "python -m experiments.made",
        "environment": ENVIRONMENT,
        "rows": rows,
        "summary": {
            "gain": {"0.25": 0.5},
            "same": True,
            "none": None,
            "wide": [0.4, 0.7],
            "narrow": [0.45, 0.55],
        },
        "targets": {"gain 0.25": {"value": 0.5, "at_most": 0.4, "met": False}},
        "verdict": "holds",
        "table": {"columns": columns, "where": {"batch": 1}},
    }
    return made | changes


DOCUMENT = "# Title\n\n<!-- table: made -->\nold\n<!-- end -->\n\nText | with a bar.\n"
TABLE = """<!-- table: made -->
| policy | TPOT, ms | KL |
|---|---:|---:|
| lru | 2.00 |  |
| a\\|b | 0.50 | +25.0% |

a processor, 2 cores, Python 3.11, JAX 0.10; `python -m experiments.made`.
<!-- end -->"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "made.json").write_text(json.dumps(record()))
    (tmp_path / "page.md").write_text(DOCUMENT)
    return tmp_path


def command(*arguments):
    """`moejax report` as the command line would register it; its result."""
    app = typer.Typer()
    app.command()(exits.guarded(report_commands.report))
    return CliRunner().invoke(app, [str(a) for a in arguments])


def test_a_document_is_written_and_then_checked(folder):
    files = [folder / "made.json", "--readme", folder / "page.md"]
    checked = command(*files, "--check")
    assert checked.exit_code == 1 and "page.md: made differs" in checked.output
    assert (folder / "page.md").read_text() == DOCUMENT
    assert command(*files).exit_code == 0
    assert (folder / "page.md").read_text() == re.sub(
        r"<!-- table.*end -->", lambda _: TABLE, DOCUMENT, flags=re.DOTALL
    )
    again = command(*files, "--check")
    assert again.exit_code == 0 and "all tables" in again.output
    other = record(rows=[record()["rows"][0] | {"ms": {"tpot": 2.01}}])
    (folder / "made.json").write_text(json.dumps(other))
    assert command(*files, "--check").exit_code == 1
    assert sorted(f.name for f in folder.iterdir()) == ["made.json", "page.md"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda f: (f / "made.json").unlink(), "there is no file"),
        (lambda f: (f / "made.json").write_text("{"), "cannot read"),
        (lambda f: (f / "made.json").write_text("[1]"), "no JSON object"),
        (lambda f: (f / "page.md").unlink(), "there is no file"),
        (lambda f: (f / "made.json").rename(f / "residency.json"), "no made.json was given"),
        (lambda f: (f / "made.json").write_text(json.dumps(record(table={}))), "does not fit"),
    ],
)
def test_bad_input_is_said_and_nothing_is_written(folder, change, said):
    change(folder)
    (folder / "first.md").write_text("<!-- table: made -->\nold\n<!-- end -->\n")
    before = {f.name: f.read_text() for f in folder.iterdir()}
    name = "residency" if (folder / "residency.json").exists() else "made"
    documents = ["--readme", folder / "first.md", "--readme", folder / "page.md"]
    found = command(folder / f"{name}.json", *documents)
    assert found.exit_code == 2 and said in " ".join(found.output.split())
    assert {f.name: f.read_text() for f in folder.iterdir()} == before


def test_a_missing_record_is_said_before_what_else_is_missing(folder):
    found = command(folder / "nothere.json")
    assert found.exit_code == 2 and "there is no file" in found.output
    found = command(folder / "made.json")
    assert found.exit_code == 2 and "give --readme FILE" in found.output


def test_a_document_that_cannot_be_replaced_stays_alone(folder, monkeypatch):
    def failing(*paths):
        raise OSError("no")

    monkeypatch.setattr(report_files.os, "replace", failing)
    with pytest.raises(InputError, match="cannot write .*page.md: no"):
        report_files.replace_text(folder / "page.md", "new")
    assert sorted(f.name for f in folder.iterdir()) == ["made.json", "page.md"]
    assert (folder / "page.md").read_text() == DOCUMENT


def test_a_text_that_is_replaced_keeps_its_mode(tmp_path):
    page, fresh = tmp_path / "page.md", tmp_path / "fresh.md"
    page.write_text("old")
    page.chmod(0o600)
    report_files.replace_text(page, "ä new\n")
    assert (page.read_bytes(), page.stat().st_mode & 0o777) == ("ä new\n".encode(), 0o600)
    page.write_text("usual")
    (tmp_path / "plain").write_text("")
    report_files.replace_text(fresh, "x")
    assert fresh.stat().st_mode == (tmp_path / "plain").stat().st_mode
    with pytest.raises(InputError, match="cannot write"):
        report_files.replace_text(tmp_path / "none" / "page.md", "x")
    assert {f.name for f in tmp_path.iterdir()} == {"page.md", "fresh.md", "plain"}


def test_a_text_is_written_where_nobody_can_have_put_a_link(tmp_path):
    page, other = tmp_path / "page.md", tmp_path / "other"
    other.write_text("somebody's own")
    planted = [tmp_path / f".page.md{end}" for end in (".tmp", f".{os.getpid()}.tmp")]
    for link in planted:
        link.symlink_to(other)
    before = os.umask(0o027)
    try:
        report_files.replace_text(page, "new")
    finally:
        os.umask(before)
    assert (page.read_text(), page.stat().st_mode & 0o777) == ("new", 0o640)
    assert other.read_text() == "somebody's own" and all(link.is_symlink() for link in planted)
    with pytest.raises(UnicodeEncodeError):
        report_files.replace_text(page, "\ud800")
    assert page.read_text() == "new"
    assert {*tmp_path.iterdir()} == {page, other, *planted}


def test_two_records_of_one_name_and_nothing_to_do_are_refused(folder):
    (folder / "b").mkdir()
    (folder / "b" / "made.json").write_text(json.dumps(record()))
    both = [folder / "made.json", folder / "b" / "made.json", "--readme", folder / "page.md"]
    assert "two records" in command(*both).output
    assert command(folder / "made.json").exit_code == 2
    assert command(folder / "made.json", "--check", "--out", folder / "out").exit_code == 2


def test_the_documents_say_what_the_records_say():
    records = report_documents.read_records(RESULTS)
    from experiments import tables

    for page in tables.DOCUMENTS:
        old = page.read_text()
        new = report_documents.filled(old, records, page.parent)
        assert not report_documents.outdated(old, new), f"{page}: python -m experiments.tables"
    assert report_documents.BLOCK.search((ROOT / "README.md").read_text())


def test_paths_name_values():
    made = record()
    assert value_at(made, "rows[name=lru,batch=3].ms.tpot") == 4.0
    assert value_at(made, "rows[1].kl") == 0.25
    assert value_at(made, r"summary.gain.0\.25") == 0.5
    assert value_at(made, "rows[kl=null].name") == "lru"
    for wrong in ("rows[name=lru].kl", "rows[name=none].kl", "rows[9]", "summary.gain.0.25", "x"):
        with pytest.raises(KeyError):
            value_at(made, wrong)


def claim(**changes):
    made = {"paper": "P", "claim": "c", "number": "-8 %", "record": "made", "form": "{:.2f}"}
    return made | changes


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({"value": r"summary.gain.0\.25", "at_most": 0.5}, "holds"),
        ({"value": r"summary.gain.0\.25", "at_most": 0.49}, "**fails**"),
        ({"value": r"summary.gain.0\.25", "at_least": 0.51}, "**fails**"),
        ({"value": r"summary.gain.0\.25", "at_least": 0.4, "at_most": 0.6}, "holds"),
        ({"value": "summary.same", "form": "{}"}, "holds"),
        ({"target": "gain 0.25"}, "**fails**"),
        ({"target": "other"}, "not measured"),
        ({"value": "summary.none", "at_most": 1}, "not measured"),
        ({"value": "summary.absent", "at_most": 1}, "not measured"),
        ({"record": "absent", "value": "summary.same"}, "not measured"),
    ],
)
def test_a_verdict_is_the_number_against_its_limit(changes, verdict):
    lines = report_documents.claims_table([claim(**changes)], {"made": record()})
    cells = [cell.strip() for cell in lines[-1].strip("|").split("|")]
    assert cells[5] == verdict
    assert (cells[3] == "") == (verdict == "not measured")
    name = "made" if changes.get("record") != "absent" else "absent"
    assert cells[6] == f"`python -m experiments.{name}`"


GAIN = r"summary.gain.0\.25"  # 0.5


@pytest.mark.parametrize(
    ("changes", "shown", "verdict"),
    [
        ({"at_most": 0.6, "interval": "summary.wide"}, "0.50 (0.40 to 0.70)", "undecided"),
        ({"at_most": 0.45, "interval": "summary.wide"}, "0.50 (0.40 to 0.70)", "undecided"),
        ({"at_least": 0.6, "interval": "summary.wide"}, "0.50 (0.40 to 0.70)", "undecided"),
        ({"at_most": 0.7, "interval": "summary.wide"}, "0.50 (0.40 to 0.70)", "holds"),
        ({"at_most": 0.6, "interval": "summary.narrow"}, "0.50 (0.45 to 0.55)", "holds"),
        ({"at_most": 0.4, "interval": "summary.narrow"}, "0.50 (0.45 to 0.55)", "**fails**"),
        ({"at_least": 0.6, "interval": "summary.narrow"}, "0.50 (0.45 to 0.55)", "**fails**"),
        ({"at_least": 0.3, "at_most": 0.6, "interval": "summary.wide"}, None, "undecided"),
        ({"at_most": 0.4, "interval": "summary.none"}, "0.50 (no interval)", "**fails**"),
        # In the paper's unit, the interval and the limit too.
        ({"as": "change", "at_most": -0.4, "form": "{:+.0%}"}, "-50%", "holds"),
        (
            {"as": "change", "at_most": -0.4, "form": "{:+.0%}", "interval": "summary.wide"},
            "-50% (-60% to -30%)",
            "undecided",
        ),
        (
            {"as": "inverse", "at_least": 1.4, "interval": "summary.wide"},
            "2.00 (1.43 to 2.50)",
            "holds",
        ),
        ({"over": "rows[name=a|b].ms.tpot", "at_most": 0.9}, "1.00", "**fails**"),
        ({"over": "rows[name=none].ms", "at_most": 0.9}, "", "not measured"),
    ],
)
def test_an_interval_may_leave_a_claim_undecided(changes, shown, verdict):
    found = report_documents.judged(claim(value=GAIN, **changes), record())
    assert found[2] == verdict and shown in (None, found[0])


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, ("0.50", "≤ 0.40", "**fails**")),
        ({"interval": "summary.wide"}, ("0.50 (0.40 to 0.70)", "≤ 0.40", "undecided")),
        ({"interval": "summary.narrow"}, ("0.50 (0.45 to 0.55)", "≤ 0.40", "**fails**")),
        ({"as": "inverse"}, ("2.00", "≥ 2.50", "**fails**")),
        ({"as": "change", "form": "{:+.0%}"}, ("-50%", "≤ -60%", "**fails**")),
    ],
)
def test_a_targets_limit_is_shown_in_the_claims_unit(changes, expected):
    found = report_documents.judged(claim(target="gain 0.25", **changes), record())
    assert found == expected


def test_the_commit_is_named_with_whether_the_code_was_changed():
    environment = ENVIRONMENT | {"commit": "0123456789abcdef"}
    for dirty, said in (([], ""), (["moejax/step.py"], " (changed files)")):
        made = record(environment=environment | {"dirty": dirty})
        source = report_tables.lines_of("made", made)[-1]
        assert f"JAX 0.10, commit 0123456{said}; `python" in source
        row = report_documents.claims_table(
            [claim(value="summary.same", form="{}")], {"made": made}
        )
        assert row[-1].endswith(f"`python -m experiments.made`, commit 0123456{said} |")
    for known in ({}, {"commit": "0123456789"}, {"commit": None, "dirty": None}):
        source = report_tables.lines_of("made", record(environment=ENVIRONMENT | known))[-1]
        assert "commit" not in source


def test_a_claim_without_a_limit_follows_the_records_verdict():
    failing = {"made": record(verdict="fails: x")}
    _, _, verdict = report_documents.judged(claim(value="summary.same", form="{}"), failing["made"])
    assert verdict == "**fails**"


@pytest.mark.parametrize(
    ("changed", "given"),
    [
        ({"summary": {"gain": {"0.25": {"mean": 0.5}}}}, {}),  # an object where a number was
        ({"summary": {"gain": {"0.25": "0.5"}}}, {}),
        ({"summary": {"gain": {"0.25": True}}}, {}),
        ({"summary": {"gain": {"0.25": [0.5]}}}, {"form": "{}"}),
        ({"targets": [{"name": "gain 0.25", "value": 0.5, "met": True}]}, {"target": "gain 0.25"}),
        ({"targets": {"gain 0.25": 0.5}}, {"target": "gain 0.25"}),
        ({"summary": {"gain": {"0.25": 0.5}, "wide": [0.4]}}, {"interval": "summary.wide"}),
        ({"summary": {"gain": {"0.25": 0.5}, "wide": [0, "1"]}}, {"interval": "summary.wide"}),
        ({"summary": {"gain": {"0.25": 0}}}, {"as": "inverse"}),
        ({"targets": {"gain 0.25": {}}}, {"target": "gain 0.25"}),
        ({"targets": {"gain 0.25": {"value": 0.5}}}, {"target": "gain 0.25"}),
        ({"targets": {"gain 0.25": {"value": 0.5, "met": "no"}}}, {"target": "gain 0.25"}),
        ({"targets": {"gain 0.25": {"value": {}, "met": True}}}, {"target": "gain 0.25"}),
        (
            {"targets": {"gain 0.25": {"value": 0.5, "met": True, "at_most": "x"}}},
            {"target": "gain 0.25"},
        ),
    ],
)
def test_a_record_that_a_claim_does_not_fit_is_said(changed, given):
    source = (
        given if "target" in given else {"value": r"summary.gain.0\.25", "at_most": 0.5, **given}
    )
    with pytest.raises(InputError, match="the claim 'c' does not fit made.json"):
        report_documents.judged(claim(**source), record(**changed))


def test_an_interval_that_is_not_there_is_no_reason_to_judge_without():
    for path in ("summary.absent", "rows[name=none].wide", "summary.wide[2]"):
        given = claim(value=GAIN, at_most=0.6, interval=path)
        with pytest.raises(InputError, match=re.escape(f"{path}: nothing at")):
            report_documents.judged(given, record())
    absent = claim(value="summary.nothing", at_most=0.6, interval="summary.absent")
    assert report_documents.judged(absent, record())[2] == "not measured"
    targeted = claim(target="gain 0.25", interval="summary.absent")
    with pytest.raises(InputError, match="summary.absent: nothing at"):
        report_documents.judged(targeted, record())


def test_what_a_record_does_not_hold_is_not_measured():
    source = {"value": "rows[name=lru].x", "at_most": 1}
    for changed in ({"rows": 3}, {"rows": {}}, {"rows": ["lru"]}, {"targets": {}}):
        assert report_documents.judged(claim(**source), record(**changed))[2] == "not measured"
    for changed in ({"targets": {}}, {"targets": {"gain 0.25": None}}):
        made = report_documents.judged(claim(target="gain 0.25"), record(**changed))
        assert made[2] == "not measured"


@pytest.mark.parametrize(
    "text",
    [
        *("{", "{}", "[1]", json.dumps([claim()])),
        json.dumps([claim(value="x", target="y")]),
        json.dumps([claim(value="x", at_most="1")]),
        json.dumps([claim(value="x", at_least=True)]),
        json.dumps([claim(value=["x"])]),
        json.dumps([claim(value="x", paper=1)]),
        json.dumps([claim(value="x", **{"as": "percent"})]),
        json.dumps([claim(value="x", interval=[0, 1])]),
    ],
)
def test_claims_that_are_none_are_refused(tmp_path, text):
    (tmp_path / "claims.json").write_text(text)
    with pytest.raises(InputError, match="claims"):
        report_documents.read_claims(tmp_path / "claims.json")


def test_every_claim_of_ours_names_an_experiment():
    claims = report_documents.read_claims(ROOT / "experiments" / "claims.json")
    known = {file.stem for file in (ROOT / "experiments").glob("*.py")}
    assert {c["record"] for c in claims} <= known
    records = report_documents.read_records(RESULTS)
    found = [c for c in claims if c["record"] in records]
    for one in found:
        targets = records[one["record"]].get("targets", {})
        if "target" in one:
            assert one["target"] in targets
        else:
            value_at(records[one["record"]], one["value"])  # KeyError where there is none
        if "over" in one:
            value_at(records[one["record"]], one["over"])
        if "interval" in one:
            value_at(records[one["record"]], one["interval"])
    assert found


def test_a_folder_gets_a_report_and_figures(folder):
    out = folder / "out"
    found = [ROOT / "experiments" / "results" / f"{n}.json" for n in ("residency", "smoe_disk")]
    done = command(folder / "made.json", *found, "--out", out, "--json")
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    assert document["left_out"] == {"made": "no figure is known for it here"}
    assert {f.name for f in out.iterdir()} == {"report.md", "residency.png", "smoe_disk.png"}
    assert all((out / n).read_bytes()[:4] == b"\x89PNG" for n in ("residency.png", "smoe_disk.png"))
    text = (out / "report.md").read_text()
    assert (
        "## made\n\na claim\n\nVerdict: **holds**" in text and "![residency](residency.png)" in text
    )
    assert TABLE.partition("\n")[2].rpartition("\n")[0] in text


def test_a_figure_of_a_damaged_record_leaves_none(tmp_path):
    why = report_commands.draw("residency", {"rows": [{}]}, tmp_path / "x.png")
    assert "lacks" in why and not list(tmp_path.iterdir())


def test_a_record_that_lacks_what_its_table_shows():
    with pytest.raises(InputError, match="lacks what its table shows"):
        report_tables.lines_of("residency", {"rows": [{}], "environment": ENVIRONMENT})
    with pytest.raises(InputError, match="no table is known"):
        report_tables.lines_of("unknown", {})


SCRIPT = '''"""Made up.

Hardware:  any (--quick: 1).
"""
import json, pathlib, sys
out = pathlib.Path(sys.argv[sys.argv.index("--out") + 1])
assert "--quick" in sys.argv
{body}
'''
GOOD = 'out.write_text(json.dumps({"summary": {"x": 1.5}, "verdict": "holds"}))'


@pytest.fixture
def suite(tmp_path, monkeypatch):
    from experiments import suite

    scripts = tmp_path / "clone" / "experiments"
    scripts.mkdir(parents=True)
    bodies = {"good": GOOD, "half": "out.write_text('{')", "wrong": f"{GOOD}; sys.exit('no text')"}
    for name, body in bodies.items():
        (scripts / f"{name}.py").write_text(SCRIPT.format(body=body))
    (scripts / "other.py").write_text('"""No quick form."""\nraise SystemExit(1)\n')
    monkeypatch.setattr(suite, "HERE", scripts)
    monkeypatch.setattr(suite, "experiments", lambda: sorted(bodies))
    return suite


def test_the_suite_keeps_whole_records_and_goes_on(suite, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["suite", str(out)])
    with pytest.raises(SystemExit, match="without a record: half, wrong"):
        suite.main()
    said = capsys.readouterr().out
    assert re.search(r"^good: holds; x 1.5 \(\d+ s\)$", said, re.MULTILINE)
    assert re.search(r"^wrong: failed: no text ", said, re.MULTILINE)
    assert {f.name for f in out.glob("*.json")} == {"good.json"} and (out / "report.md").exists()
    (suite.HERE / "half.py").write_text(SCRIPT.format(body=GOOD))
    (suite.HERE / "good.py").write_text("raise SystemExit(1)")
    with pytest.raises(SystemExit, match="without a record: wrong"):
        suite.main()
    assert "good: kept, holds; x 1.5\nhalf: holds; x 1.5 (" in capsys.readouterr().out


def test_the_suite_never_writes_over_the_results():
    target = ROOT / "experiments" / "results"
    done = subprocess.run(
        [sys.executable, "-m", "experiments.suite", str(target)],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 2 and "another folder" in done.stderr


def test_the_suite_finds_what_has_a_quick_form():
    from experiments import suite

    names = suite.experiments()
    assert {"residency", "smoe_ablation", "plan_check", "eval_policies"} <= set(names)
    left_out = {"suite", "tables", "gpu_suite", "train_tiny", "peers_cpu", "plan_machine"}
    assert not left_out & set(names)


def test_a_report_without_matplotlib_has_its_tables(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    made = {"written": [], "left_out": {}}
    record = json.loads((ROOT / "experiments/results/residency.json").read_text())
    report_commands._write_folder(tmp_path / "out", {"residency": record}, made)
    assert "matplotlib" in made["left_out"]["residency"]
    assert "| 40.0% | 76 |" in (tmp_path / "out" / "report.md").read_text()
