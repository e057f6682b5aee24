"""The doctor's verdicts, and the budget that a GPU allocator is given (by a fake nvidia-smi)."""

import json
import os
import subprocess
import sys

import pytest
from cli_models import write_model
from typer.testing import CliRunner

from moejax import allocator, doctor
from moejax.cli import main as cli
from moejax.errors import BudgetError

GIB = 1 << 30


@pytest.mark.parametrize(
    ("jax", "jaxlib", "status", "said"),
    [
        ("0.10.2", "0.10.2", "ok", ""),
        ("0.12.0.1", "0.12.0.1", "ok", ""),
        ("0.11.2", "0.11.2", "ok", ""),
        ("0.11.0", "0.11.0", "fail", "pip install"),
        ("0.12.0", "0.11.1", "fail", "0.11.1"),
        ("0.9.1", "0.9.1", "fail", "too old"),
        ("0.12.0", "0.12.1", "warn", "differ"),
    ],
)
def test_jax_versions(jax, jaxlib, status, said):
    verdict, detail = doctor.judge_jax(jax, jaxlib)
    assert verdict == status and said in detail


@pytest.mark.parametrize(
    ("version", "status"),
    [((3, 10, 4), "fail"), ((3, 11, 0), "ok"), ((3, 14, 2), "ok"), ((3, 15, 0), "warn")],
)
def test_python_versions(version, status):
    assert doctor.judge_python(version)[0] == status


def test_a_slot_write_that_copies_the_pool_fails():
    assert doctor.judge_write(write=5e-6, copy=8e-3, pool=GIB)[0] == "ok"
    verdict, detail = doctor.judge_write(write=7e-3, copy=8e-3, pool=GIB)
    assert verdict == "fail" and "copies the pool" in detail


def test_the_gpu_line_names_the_variables():
    assert doctor.judge_gpu(None, {})[0] == "ok"
    _, detail = doctor.judge_gpu(24 * GIB, {})
    assert "18.0 GiB of 24.0 GiB, at once" in detail and "64 GiB" in detail
    _, detail = doctor.judge_gpu(24 * GIB, {allocator.FRACTION: "0.5", allocator.PREALLOCATE: "0"})
    assert "12.0 GiB of 24.0 GiB, as needed" in detail
    both = {allocator.FRACTION: "0.5", allocator.OLD_FRACTION: "0.5"}
    assert doctor.judge_gpu(24 * GIB, both)[0] == "fail"


def test_doctor_reports_every_check_and_its_code_follows_them(monkeypatch):
    checks = {"good": lambda: ("ok", "fine"), "bad": lambda: ("warn", "hm")}
    monkeypatch.setattr(doctor, "_CHECKS", checks)
    result = CliRunner().invoke(cli.app, ["doctor"])
    assert result.exit_code == 0
    assert result.stdout.splitlines() == ["ok    good: fine", "warn  bad: hm"]

    def broken():
        raise RuntimeError("no device")

    checks["worse"] = broken
    result = CliRunner().invoke(cli.app, ["doctor", "--json"])
    assert result.exit_code == 1
    document = json.loads(result.stdout)
    assert document["checks"][-1] == {
        "name": "worse",
        "status": "fail",
        "detail": "RuntimeError: no device",
    }
    assert document["versions"]["jax"]


def test_nothing_fails_here():
    found = {check.name: check for check in doctor.checks()}
    assert {c.status for c in found.values()} <= {"ok", "warn"}, found
    assert found["slot write"].status == "ok"
    assert "GiB" in found["memory"].detail and found["cpu"].detail


def test_a_budget_becomes_the_allocators_fraction():
    made = allocator.environment_for(6 * GIB, 24 * GIB, 0)
    assert made == {allocator.FRACTION: "0.250000"}
    third = allocator.environment_for(8 * GIB, 24 * GIB, 0)[allocator.FRACTION]
    assert float(third) * 24 * GIB <= 8 * GIB


def test_large_hosts_get_a_larger_pinned_pool():
    assert allocator.environment_for(None, 24 * GIB, 59 * GIB) == {}
    assert allocator.environment_for(None, 24 * GIB, 61 * GIB) == {allocator.HOST_LIMIT: "65"}


def test_without_a_gpu_nothing_is_set():
    assert allocator.environment_for(6 * GIB, None, 100 * GIB) == {}


def test_a_budget_above_the_gpu_is_refused():
    with pytest.raises(BudgetError, match="24.0 GiB"):
        allocator.environment_for(25 * GIB, 24 * GIB, 0)


@pytest.fixture
def fake_gpu(tmp_path, monkeypatch):
    """A nvidia-smi that knows two GPUs, of 24 and 80 GiB."""
    script = tmp_path / "bin" / "nvidia-smi"
    script.parent.mkdir()
    script.write_text(
        '#!/bin/sh\ncase "$1" in\n--id=0) echo 24576;;\n--id=1) echo 81920;;\n*) exit 6;;\nesac\n'
    )
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{script.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for name in (allocator.FRACTION, allocator.OLD_FRACTION, allocator.HOST_LIMIT):
        monkeypatch.delenv(name, raising=False)
    allocator._ask_nvidia_smi.cache_clear()
    yield
    allocator._ask_nvidia_smi.cache_clear()


@pytest.mark.parametrize(
    ("variables", "gib"),
    [
        ({}, 24),
        ({"CUDA_VISIBLE_DEVICES": "1,0"}, 80),
        ({"CUDA_VISIBLE_DEVICES": ""}, None),
        ({"CUDA_VISIBLE_DEVICES": "-1"}, None),
        ({"CUDA_VISIBLE_DEVICES": "7"}, None),
        ({"JAX_PLATFORMS": "cpu"}, None),
        ({"JAX_PLATFORMS": "cuda,cpu"}, 24),
    ],
)
def test_the_first_visible_gpu_is_asked(fake_gpu, monkeypatch, variables, gib):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert allocator.gpu_memory() == (gib and gib * GIB)


def test_no_nvidia_smi_is_no_gpu(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    allocator._ask_nvidia_smi.cache_clear()
    assert allocator.gpu_memory() is None
    allocator._ask_nvidia_smi.cache_clear()


LOAD = (
    "import os, sys\nfrom moejax import allocator, load\n"
    "runtime = load(sys.argv[1], device_memory='6GiB')\n"
    "print(os.environ.get(allocator.FRACTION), runtime.slots)"
)


@pytest.mark.parametrize(
    ("given", "fraction"),
    [
        ({}, "0.250000"),
        ({allocator.FRACTION: "0.9"}, "0.9"),
        ({allocator.OLD_FRACTION: "0.9"}, "None"),  # both together are an error in jaxlib
    ],
)
def test_load_sets_the_fraction_before_jax_starts(fake_gpu, tmp_path, given, fraction):
    model = write_model(tmp_path / "model")
    environment = {**os.environ, **given}
    done = subprocess.run(
        [sys.executable, "-c", LOAD, model], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [fraction, "16"]


def test_too_late_is_said_once_and_only_on_a_gpu(monkeypatch):
    import jax

    allocator._warn_too_late.cache_clear()
    monkeypatch.delenv(allocator.FRACTION, raising=False)
    monkeypatch.delenv(allocator.OLD_FRACTION, raising=False)
    assert jax.devices() and allocator.jax_has_started()
    allocator.apply({allocator.FRACTION: "0.25"})  # no warning: warnings are errors here
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with pytest.warns(UserWarning, match="XLA_CLIENT_MEM_FRACTION=0.25"):
        allocator.apply({allocator.FRACTION: "0.25"})
    allocator.apply({allocator.FRACTION: "0.25"})
    assert allocator.FRACTION not in os.environ


def test_saying_where_a_run_took_place_loads_no_kernels(tmp_path):
    code = "from moejax import doctor; print(doctor.environment()['native_kernels'])"
    compiler = tmp_path / "c++"
    compiler.write_text(f"#!/bin/sh\ntouch {tmp_path / 'asked'}\nexit 1\n")
    compiler.chmod(0o700)
    variables = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "CXX": str(compiler)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=variables)
    assert done.stdout == "None\n" and not (tmp_path / "asked").exists()


def test_where_a_run_took_place_names_the_kernels_that_it_used():
    from moejax.kernels import build

    loaded = build.library()
    assert doctor.environment()["native_kernels"] == (loaded and loaded.moejax_isa().decode())
