"""What the documentation shows works.

A ```bash or ```python block right after a line `<!-- test -->` is run: the blocks of one page in
order, in one empty folder, so that a later one may use what an earlier one made.
"""

import os
import pathlib
import re
import subprocess
import sys

import pytest

from moejax.cli import main as cli

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^<!-- test -->\n```(bash|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SHELL = re.compile(r"^```bash\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SECONDS = 300


def blocks(page):
    """(language, text) of every block of a page that is to be run."""
    return [(found[1], found[2]) for found in BLOCK.finditer(page.read_text())]


def commands(text):
    """The subcommand of every `moejax ...` line in a page's shell blocks."""
    lines = "".join(found[1] for found in SHELL.finditer(text))
    return re.findall(r"^moejax (\w\S*)", lines, re.MULTILINE)


def run(language, text, folder):
    """Run a block in a folder and return the finished process."""
    interpreter = {
        "bash": ["bash", "-euo", "pipefail", "-c"],
        "python": [sys.executable, "-W", "error", "-c"],
    }[language]
    path = f"{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        [*interpreter, text],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "PATH": path},
        stdin=subprocess.DEVNULL,
        timeout=SECONDS,
    )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_blocks_of_a_page_run(page, tmp_path):
    for language, text in blocks(page):
        done = run(language, text, tmp_path)
        assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_pages_name_commands_that_exist(page):
    known = {c.name or c.callback.__name__ for c in cli.app.registered_commands}
    known |= {group.name for group in cli.app.registered_groups}
    assert set(commands(page.read_text())) <= known


def test_a_block_is_found_by_its_mark(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "Text.\n\n<!-- test -->\n```bash\necho made > file\n```\n\n```bash\nmoejax nope -x\n```\n"
        "<!-- test -->\n```python\nassert open('file').read() == 'made\\n'\n```\n"
        "<!-- test -->\n\n```bash\nnot run: the mark stands apart\n```\n"
    )
    found = blocks(page)
    assert [language for language, _ in found] == ["bash", "python"]
    assert [run(*block, tmp_path).returncode for block in found] == [0, 0]
    assert commands(page.read_text()) == ["nope"]


def test_a_failing_line_fails_its_block(tmp_path):
    assert run("bash", "false\ntrue", tmp_path).returncode != 0
    assert run("bash", "false | true", tmp_path).returncode != 0
    assert run("python", "import warnings; warnings.warn('x')", tmp_path).returncode != 0


def test_tables_come_from_the_results():
    done = run("bash", f"cd {ROOT} && python -m experiments.tables --check", ROOT)
    assert done.returncode == 0, done.stderr
