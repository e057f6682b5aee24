"""Programs that mean harm: none gets out, and none passes that does not reach its end."""

import os
import sys
import threading
import time

import pytest

from moejax.errors import InputError
from moejax.evaluation import sandbox
from moejax.evaluation.sandbox import Limits, run

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="programs run on Linux only")

FLOOD = """
import os
while True:
    for n in range(3, 256):
        try:
            os.write(n, b"x" * 999)
        except OSError:
            pass
"""
SPEAKS = FLOOD.replace("while True:", "if True:").replace('"x" * 999', '"passed"')
SPEAKS = f"{SPEAKS}\nos._exit(0)"
QUICK = Limits(seconds=1, memory=256 << 20, output=4096)


def test_an_honest_program_passes_and_a_wrong_one_says_why():
    assert run(
        "from typing import List\nimport heapq, math, re\nprint(math.pi)"
    ) == sandbox.Outcome("passed", "", "3.141592653589793\n")
    assert run("assert 1 == 2, 'not so'").detail == "AssertionError: not so"
    assert run("def f(:").detail.startswith("SyntaxError")
    assert run("x = '\\ud800'\nprint('ä')").output == "ä\n"


# Each would reach its end, and pass, if what it does were possible.
REFUSED = {
    "writes a file": "open({outside!r}, 'w').write('x')",
    "writes in its folder": "open('x', 'w').write('x')",
    "reads a file": "open('/etc/passwd').read()",
    "reads its environment": "open('/proc/self/environ').read()",
    "reads that of its parent": "import os\nopen(f'/proc/{{os.getppid()}}/environ').read()",
    "removes a file": "import os\nos.remove({victim!r})",
    "renames a file": "import os\nos.rename({victim!r}, {outside!r})",
    "makes a folder": "import os\nos.mkdir({outside!r})",
    "empties a file": "import os\nos.truncate({victim!r}, 0)",
    "changes a file's mode": "import os\nos.chmod({victim!r}, 0)",
    "lists a folder": "import os\nos.listdir('/')",
    "connects": "import _socket\n_socket.socket().connect(('127.0.0.1', 9))",
    "talks to a name server": "import socket\nsocket.getaddrinfo('example.org', 80)",
    "forks": "import os\nos.fork()",
    "starts a program": "import os\nos.execv('/bin/true', ['true'])",
    "starts a shell": "import subprocess\nsubprocess.run(['true'])",
    "starts a thread": "import threading\nthreading.Thread(target=print).start()",
    "kills its parent": "import os\nos.kill(os.getppid(), 9)",
    "kills its group": "import os\nos.killpg(0, 9)",
    "raises its limits": "import resource as r\nr.setrlimit(r.RLIMIT_AS, (-1, -1))",
    "traces": "import ctypes\nassert ctypes.CDLL(None).ptrace(0, 0, 0, 0) != -1",
    "makes a socket by hand": "import ctypes\nassert ctypes.CDLL(None).socket(2, 1, 0) != -1",
    "makes a ring": "import ctypes\nassert ctypes.CDLL(None).syscall(425, 8, bytes(120)) != -1",
    "takes memory": "x = bytearray(1 << 30)",
    "recurses": "def f(): f()\nf()",
    "leaves early": "import sys\nsys.exit(0)",
    "leaves earlier": "import os\nos._exit(0)",
    "crashes": "import ctypes\nctypes.string_at(0)",
    "imports what is installed": "import numpy",
    "speaks for its judge": SPEAKS,
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_a_program_may_not_do_fails(what, tmp_path):
    victim, outside = tmp_path / "victim", tmp_path / "outside"
    victim.write_text("kept")
    names = {"victim": str(victim), "outside": str(outside)}
    outcome = run(REFUSED[what].format(**names), QUICK)
    assert outcome.status == "failed" and outcome.detail, outcome
    assert victim.read_text() == "kept" and os.access(victim, os.R_OK) and not outside.exists()


def test_a_program_has_no_environment(monkeypatch):
    monkeypatch.setenv("SECRET", "of the parent")
    shown = run("import os\nprint(dict(os.environ), os.listdir)").output
    assert "SECRET" not in shown and "parent" not in shown


@pytest.mark.parametrize(
    ("program", "status"),
    [
        ("while True: pass", "timeout"),
        ("import time\ntime.sleep(1000)", "timeout"),
        ("import os\nfor n in range(3): os.close(n)\nwhile True: pass", "timeout"),
        ("while True: print('x' * 999)", "output"),
        (FLOOD, "output"),
    ],
)
def test_a_program_that_does_not_end_is_ended(program, status):
    begun = time.monotonic()
    outcome = run(program, QUICK)
    assert outcome.status == status and not outcome.passed
    assert len(outcome.output) <= QUICK.output
    assert time.monotonic() - begun < 60


def test_nothing_is_left_behind(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    before, open_before = threading.active_count(), len(os.listdir("/proc/self/fd"))
    run("while True: pass", QUICK)
    run("assert False")
    assert not os.listdir(tmp_path) and threading.active_count() == before
    assert len(os.listdir("/proc/self/fd")) == open_before
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def test_without_a_filter_nothing_runs(monkeypatch, tmp_path):
    child = tmp_path / "child.py"
    text = sandbox.CHILD.read_text()
    child.write_text(
        text.replace(
            "NO_NEW_PRIVILEGES, SECCOMP, FILTER = 38, 22, 2",
            "NO_NEW_PRIVILEGES, SECCOMP, FILTER = 38, 22, 99",
        )
    )
    monkeypatch.setattr(sandbox, "CHILD", child)
    with pytest.raises(InputError, match="cannot be confined"):
        sandbox.check()
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(InputError, match="Linux only"):
        run("pass")
    with pytest.raises(InputError, match="positive"):
        Limits(seconds=0)
