"""Loops over the threads of a pool that has no memory for what it is asked."""

import os
import pathlib
import shlex
import subprocess

import pytest

from moejax.kernels import build

ROOT = pathlib.Path(__file__).resolve().parents[1]


@pytest.mark.skipif(build.compiler() is None, reason="no C++ compiler")
def test_a_loop_ends_whole_where_memory_runs_out(tmp_path):
    program = tmp_path / "loops"
    flags = ["-std=c++17", "-O1", "-pthread", "-Wall", "-Werror"]
    flags += shlex.split(os.environ.get("MOEJAX_NATIVE_FLAGS", ""))
    include = f"-I{ROOT / 'kernels' / 'native'}"
    source = str(pathlib.Path(__file__).with_name("loops.cc"))
    command = [*build.compiler(), *flags, include, source, "-o", str(program)]
    subprocess.run(command, check=True)
    done = subprocess.run([program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
