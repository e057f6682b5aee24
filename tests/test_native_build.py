"""How the native kernels are built, found again and done without."""

import concurrent.futures
import os
import platform
import stat
import subprocess
import sys

import pytest

from moejax.errors import MoejaxError
from moejax.kernels import build

needs_compiler = pytest.mark.skipif(build.compiler() is None, reason="no C++ compiler")


def status_with(**environment):
    """The status line of a fresh process."""
    code = "from moejax.kernels import build; assert build.library() is None; print(build.status())"
    variables = {**os.environ, "JAX_PLATFORMS": "cpu", **environment}
    done = subprocess.run(
        [sys.executable, "-c", code], env=variables, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def fake_compiler(path, body):
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def test_switched_off():
    assert status_with(MOEJAX_NATIVE="0") == (
        "reference path: native kernels are switched off (MOEJAX_NATIVE=0)"
    )


@needs_compiler
def test_an_instruction_set_can_be_chosen():
    known = build.library()
    if known is None:
        pytest.skip(build.status())
    code = "from moejax.kernels import build; print(build.status())"

    def run(name):
        variables = {**os.environ, "JAX_PLATFORMS": "cpu", "MOEJAX_ISA": name}
        command = [sys.executable, "-c", code]
        return subprocess.run(command, env=variables, capture_output=True, text=True)

    plain = {"x86_64": "baseline", "aarch64": "neon"}[platform.machine()]
    assert run(plain).stdout.startswith(f"native kernels: {plain} (")
    refused = run("sse9").stderr
    assert "MOEJAX_ISA=sse9: this machine has kernels for " in refused and plain in refused


def has_tiles():
    library = build.library()
    if library is None:
        return False
    before = library.moejax_isa()
    found = library.moejax_set_isa(b"amx")
    library.moejax_set_isa(before)
    return bool(found)


@pytest.mark.skipif(not has_tiles(), reason="no AMX here")
def test_tiles_are_asked_for_only_if_they_are_used():
    # Once a process has tiles, Linux refuses it a small signal stack; with one, it refuses tiles.
    code = """if True:
        import ctypes, sys
        from moejax.kernels import build
        class Stack(ctypes.Structure):
            _fields_ = [("sp", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]
        memory = ctypes.create_string_buffer(8192)
        def small():
            stack = Stack(ctypes.addressof(memory), 0, 8192)
            return ctypes.CDLL(None).sigaltstack(ctypes.byref(stack), None)
        if sys.argv[1] == "before":
            assert small() == 0
        print(build.status())
        if sys.argv[1] == "after":
            print(small())
    """

    def run(when, name):
        variables = {**os.environ, "JAX_PLATFORMS": "cpu", "MOEJAX_ISA": name}
        command = [sys.executable, "-c", code, when]
        done = subprocess.run(command, env=variables, capture_output=True, text=True)
        return done.stdout + done.stderr

    assert run("after", "avx2").splitlines()[-1] == "0"
    assert run("after", "").splitlines()[-1] == "-1"
    refused = "no tiles of AMX: a signal stack of the process is too small for them"
    assert "native kernels: avx512bf16 (" in run("before", "") and refused in run("before", "")
    assert refused in run("before", "amx").splitlines()[-1]


def test_without_a_compiler(tmp_path):
    status = status_with(PATH=str(tmp_path), CXX="")
    assert status.startswith("reference path: no C++ compiler found (install g++ or clang")


def test_a_compiler_that_is_not_there(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", str(tmp_path / "missing"))
    with pytest.raises(MoejaxError, match="cannot run the C\\+\\+ compiler .*missing"):
        build.build()


def test_a_failed_build_shows_what_the_compiler_said(monkeypatch, tmp_path):
    says = 'case "$*" in *-c*) echo "error: too old" >&2; exit 1;; esac'
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", fake_compiler(tmp_path / "c++", says))
    with pytest.raises(MoejaxError, match="do not compile:(.|\n)*error: too old"):
        build.build()
    assert not list(tmp_path.rglob("*.so"))


def test_an_instruction_set_that_does_not_compile_is_left_out(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(build, "_isas", lambda command: {"plain": [], "odd": ["-modd"]})
    says = f'echo "$*" >> {tmp_path}/log; case "$*" in *-modd*) exit 1;; esac\n'
    writes = 'while [ $# -gt 0 ]; do [ "$1" = -o ] && echo library > "$2"; shift; done; exit 0'
    monkeypatch.setenv("CXX", fake_compiler(tmp_path / "c++", says + writes))
    with pytest.warns(UserWarning, match="no native kernels for odd"):
        assert build.build().exists()
    log = (tmp_path / "log").read_text()
    assert "-DMOEJAX_HAS_plain" in log and "-DMOEJAX_HAS_odd" not in log


@needs_compiler
def test_a_cache_that_cannot_be_written(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(MoejaxError, match="set XDG_CACHE_HOME"):
        build.build()


def test_builds_at_the_same_time_leave_one_library(monkeypatch, tmp_path):
    writes = 'while [ $# -gt 0 ]; do [ "$1" = -o ] && echo library > "$2"; shift; done; exit 0'
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", fake_compiler(tmp_path / "c++", writes))
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        paths = set(pool.map(lambda _: build.build(force=True), range(4)))
    (path,) = paths
    assert path.read_text() == "library\n"
    assert list(path.parent.iterdir()) == [path]
    monkeypatch.setattr(build, "_compile", None)  # the second time nothing is compiled
    assert build.build() == path


@needs_compiler
def test_every_source_and_flag_is_part_of_the_key(monkeypatch, tmp_path):
    monkeypatch.setattr(build, "SOURCES", tmp_path)
    command = build.compiler()
    keys = set()
    for text in ("1", "2"):
        (tmp_path / "math.cc").write_text(text)
        keys |= {build._key(command, {}), build._key(command, {"baseline": []})}
        monkeypatch.setattr(build, "FLAGS", [*build.FLAGS, "-g"])
        keys.add(build._key(command, {}))
    monkeypatch.setenv("MOEJAX_NATIVE_FLAGS", "-O1")
    keys.add(build._key(command, {}))
    assert len(keys) == 7
