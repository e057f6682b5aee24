"""Budgets of host memory: what does not fit stays on the disk, and the process stays small."""

import json
import os
import pathlib
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from typer.testing import CliRunner

import moejax
from moejax import devices, tiers
from moejax.checkpoints import convert
from moejax.cli import main as cli
from moejax.errors import BudgetError, CheckpointError, InputError, LinkError
from moejax.kernels import build, transport

if build.library() is None:
    pytest.skip(build.status(), allow_module_level=True)

PROMPT = [5, 6, 7, 8]


pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(scope="module")
def resident():
    runtime = moejax.load("tiny", context=128)
    return ids(runtime.generate([PROMPT], 12))


def ids(completions):
    return [token.id for token in completions[0].tokens]


@pytest.mark.parametrize(
    ("text", "link"),
    [
        ("disk", tiers.Link("disk")),
        ("paced:2,100", tiers.Link("paced", 2.0, 100.0)),
        ("paced:0.5,0", tiers.Link("paced", 0.5, 0.0)),
        ("paced:2,100,0", tiers.Link("paced", 2.0, 100.0)),
        ("paced:0.1,1234567.25,33.3", tiers.Link("paced", 0.1, 1234567.25, 33.3)),
    ],
)
def test_links_are_named(text, link):
    assert tiers.parse_link(text) == link
    assert tiers.parse_link(str(link)) == link


@pytest.mark.parametrize(
    "text",
    ["", "tape", "disk:1", "paced", "paced:2", "paced:0,1", "paced:nan,1", "paced:1,-1"]
    + ["paced:1,1,", "paced:1,1,-1", "paced:1,1,nan", "paced:1,1,1e9", "paced:1,1,1,1"],
)
def test_other_links_are_refused(text):
    with pytest.raises(InputError, match="paced:2,100"):
        tiers.parse_link(text)


def test_a_paced_link_states_the_time_of_an_expert_on_the_host():
    link, records = tiers.parse_link("paced:1,0,3000"), np.ones((4, 64), np.uint8)
    store, _ = tiers.open_link(link, pathlib.Path(), records, False)
    with store:
        for count in (0, 2):  # the first compiles
            token = transport.host_begin(store.handle, jnp.zeros(1))
            transport.host_end(store.handle, count, token).block_until_ready()
        assert store.stats().host_us >= 2 * 3000


@pytest.mark.parametrize("link", ["disk", "paced:4,10"])
@pytest.mark.parametrize("kernels", ["native", "reference"])
def test_a_link_changes_no_token(resident, link, kernels):
    runtime = moejax.load("tiny", slots=64, context=128, link=link, kernels=kernels)
    whole = resident
    if kernels == "reference":
        plain = moejax.load("tiny", context=128, kernels=kernels)
        whole = ids(plain.generate([PROMPT], 12))
    assert ids(runtime.generate([PROMPT], 12)) == whole
    assert runtime.stats.label == "bit-exact" and runtime.stats.bytes_moved > 0
    assert (runtime.store.records is None) == (link == "disk")


def test_a_budget_that_holds_everything_needs_no_link(resident):
    runtime = moejax.load("tiny", host_memory="200MiB", context=128)
    assert runtime.link is None and runtime.slots == 192
    assert ids(runtime.generate([PROMPT], 12)) == resident


def test_what_does_not_fit_stays_on_the_disk(resident, own_cache):
    everything = moejax.load("tiny", context=128)
    stride = everything.store.layout.stride
    least = least_budget(everything)
    with pytest.raises(BudgetError, match="read ahead"):
        moejax.load("tiny", host_memory=least - 1, context=128)
    runtime = moejax.load("tiny", host_memory=least + 60 * stride, context=128)
    assert runtime.tier == "disk" and runtime.slots == 60 + 4
    assert ids(runtime.generate([PROMPT], 12)) == resident
    # Converted once, in the cache directory; the second load finds it.
    [bank] = (own_cache / "moejax" / "banks").iterdir()
    before = (bank / convert.BANK).stat().st_mtime_ns
    moejax.load("tiny", host_memory=least + 60 * stride, context=128)
    assert (bank / convert.BANK).stat().st_mtime_ns == before


def least_budget(runtime):
    """Bytes of everything but the slots, and of the top-4 of one layer."""
    parts = [
        devices.dense_bytes(runtime.config, "bfloat16"),
        devices.kv_bytes(runtime.model, 1, 128),
        devices.workspace_bytes(runtime.model, runtime.policy, 1, 128),
    ]
    return sum(parts) + (tiers.BUFFERS + 4) * runtime.store.layout.stride


def test_damage_on_the_disk_is_one_clear_error(tmp_path, resident):
    made = tmp_path / "converted"
    assert CliRunner().invoke(cli.app, ["convert", "tiny", str(made), "-q"]).exit_code == 0
    runtime = moejax.load(made, slots=16, context=128, link="disk", check_records=True)
    assert ids(runtime.generate([PROMPT], 12)) == resident
    with open(made / convert.BANK, "r+b") as file:
        file.seek(-5000, os.SEEK_END)
        file.write(b"\xff" * 4000)
        file.seek(400_000)
        file.write(bytes(3_000_000))
    runtime = moejax.load(made, slots=16, context=128, link="disk", check_records=True)
    with pytest.raises(LinkError, match="damaged"):
        runtime.generate([PROMPT], 12)


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"host_memory": "1GiB", "slots": 8}, InputError, "one of"),
        ({"host_memory": "1GiB", "link": "paced:1,1"}, InputError, "give slots"),
        ({"link": "disk", "slots": 8, "virtual": True}, InputError, "leave the link out"),
        ({"kernels": "cuda"}, InputError, "native"),
        ({"quant": "int8", "group": 3, "link": "tape"}, InputError, "paced"),
    ],
)
def test_what_cannot_be_had_is_refused(options, error, said):
    with pytest.raises(error, match=said):
        moejax.load("tiny", **options)


def test_a_converted_model_keeps_its_format(tmp_path):
    made = tmp_path / "eight"
    arguments = ["convert", "tiny", str(made), "--quant", "int8", "--json", "-q"]
    done = CliRunner().invoke(cli.app, arguments)
    assert done.exit_code == 0 and "experts/down" in json.loads(done.stdout)["errors"]
    loaded = ids(moejax.load("tiny", quant="int8", context=128).generate([PROMPT], 8))
    for options in ({}, {"slots": 32}, {"slots": 32, "link": "disk"}):
        assert ids(moejax.load(made, context=128, **options).generate([PROMPT], 8)) == loaded
    with pytest.raises(CheckpointError, match="load the original"):
        moejax.load(made, quant="int4")


LIMITED = r"""
import re, sys
import moejax
runtime = moejax.load(sys.argv[1], host_memory=int(sys.argv[2]), context=128)
runtime.generate([[1, 2, 3]], 8)
assert runtime.tier == "disk", runtime.tier
# Not getrusage, whose maximum begins with that of the parent.
print(int(re.search(r"VmHWM:\s+(\d+) kB", open("/proc/self/status").read())[1]) * 1024)
"""


def peak(model, budget):
    """Peak memory of a run under a budget, in bytes."""
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(model), str(budget)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_the_process_stays_within_its_budget(tmp_path):
    """Peak memory follows the budget, and stays below it and PROCESS_BYTES."""
    model = tmp_path / "model"
    shape = {"layers": 8, "width": 256, "experts": 96, "top-k": 2, "expert-width": 1024}
    arguments = [str(x) for name, value in shape.items() for x in (f"--{name}", value)]
    command = [sys.executable, "-m", "experiments.random_model", str(model), "--vocab", "512"]
    root = pathlib.Path(__file__).parents[1]
    subprocess.run([*command, *arguments], check=True, cwd=root, capture_output=True)
    done = CliRunner().invoke(cli.app, ["convert", str(model), str(tmp_path / "c"), "-q"])
    assert done.exit_code == 0
    small, large = 100 * 2**20, 400 * 2**20
    assert (tmp_path / "c" / convert.BANK).stat().st_size > large + tiers.PROCESS_BYTES
    peaks = peak(tmp_path / "c", small), peak(tmp_path / "c", large)
    assert peaks[0] < small + tiers.PROCESS_BYTES and peaks[1] < large + tiers.PROCESS_BYTES
    assert peaks[1] - peaks[0] < 1.2 * (large - small)  # two processes differ by tens of MB


def test_an_orbax_directory_is_not_read_over_a_link(tmp_path, resident):
    made = tmp_path / "orbax"
    assert (
        CliRunner().invoke(cli.app, ["convert", "tiny", str(made), "--orbax", "-q"]).exit_code == 0
    )
    paced = moejax.load(made, slots=64, context=128, link="paced:4,10")
    assert ids(paced.generate([PROMPT], 12)) == resident
    with pytest.raises(InputError, match="Orbax"):
        moejax.load(made, slots=64, context=128, link="disk")


def test_without_native_kernels_one_notice_says_so(tmp_path):
    program = "import moejax\nfor _ in range(2):\n    print(moejax.load('tiny').model.kernels)"
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env={**os.environ, "MOEJAX_NATIVE": "0"},
    )
    assert done.stdout.split() == ["reference", "reference"]
    assert done.stderr.count("MOEJAX_NATIVE=0") == 1
