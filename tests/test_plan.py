"""Plans agree with loading, with the command line and with plain arithmetic."""

import dataclasses
import json
import pathlib
import shlex
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

import moejax
from moejax import hardware, tiers
from moejax.cli import exits
from moejax.cli import main as cli
from moejax.cli import plan as plan_commands
from moejax.errors import BudgetError, CheckpointError, InputError
from moejax.planner import machines, predict, reuse
from moejax.planner import verify as plan_verify
from moejax.planner.machines import PRESETS, machine
from moejax.planner.plan import OFFLOADED, RESIDENT, Asked, make, read
from moejax.planner.predict import Work
from moejax.policies.policy import policy
from moejax.traces.trace import Outcome, Trace
from moejax.units import parse_bytes

ROOT = pathlib.Path(__file__).parents[1]
DATA = ROOT.parent / "shared" / "data" / "traces" / "bigmoeonedge"
SERVER, GPU = machine("server-2core"), machine("rtx-4090")
PAGES = 4 << 30  # what a GPU's host keeps free


@pytest.mark.parametrize(
    "options",
    [
        {"device_memory": "6MiB", "context": 128},
        {"device_memory": "14MiB"},
        {"device_memory": "14MiB", "quant": "int8", "context": 512},
        {"device_memory": "40MiB"},
        {"host_memory": "14MiB", "context": 512},
        {"host_memory": "40MiB"},
        {"device_memory": "8MiB", "context": 128, "link": "paced:0.7,0,53"},
    ],
    ids=str,
)
def test_slots_are_those_of_loading(options, own_cache):
    budgets = {n: parse_bytes(v) for n, v in options.items() if n.endswith("memory")}
    plan = make(Asked(model="tiny", **options | budgets), SERVER)
    runtime = moejax.load("tiny", policy=plan.policy, **options)
    assert (plan.slots, plan.context) == (runtime.slots, runtime.context)
    assert {"disk": "disk", "link": options.get("link")}.get(plan.tier) == runtime.tier
    assert sum(plan.memory.values()) == plan.budget == [*budgets.values()][0]
    assert plan.memory["workspace and rest"] > 0
    ahead = tiers.BUFFERS * runtime.store.layout.stride if plan.tier == "disk" else 0
    assert plan.memory.get("records read ahead", 0) == ahead
    assert plan.memory["expert slots"] == plan.slots * runtime.store.layout.stride
    assert (plan.policy == RESIDENT) == (plan.slots == 192) == (plan.tier == "resident")


@pytest.mark.parametrize(
    ("options", "planned_for"),
    [
        ({}, "server-2core"),
        ({"host_memory": 14_000_001, "quant": "int4", "group": 64, "context": 300}, "server-2core"),
        ({"device_memory": 12 << 20, "dtype": "float32", "context": 128}, "rtx-4090"),
    ],
    ids=str,
)
def test_the_command_is_one_that_the_command_line_takes(options, planned_for):
    plan = make(Asked(model="tiny", **options), machine(planned_for))
    program, name, *words = shlex.split(plan.command)
    assert (program, name) == ("moejax", "generate")
    parsed = typer.main.get_command(cli.app).commands[name].make_context(name, words).params
    policy(parsed["policy"])
    assert parsed["model"] == "tiny" and parsed["policy"] == plan.policy
    assert parsed["context"] == plan.context == options.get("context", 2048)
    assert (parsed["quant"], parsed["group"]) == (options.get("quant"), options.get("group", 32))
    assert parsed["dtype"] == options.get("dtype", "bfloat16")
    for budget in ("device_memory", "host_memory"):
        text = parsed[budget]
        assert (None if text is None else parse_bytes(text)) == options.get(budget)


def test_a_model_that_does_not_fit_is_quantised_and_said_so():
    small = {"model": "tiny", "context": 128}
    tight = dataclasses.replace(GPU, host_memory=PAGES + (15 << 20))
    plan = make(Asked(**small, device_memory=9 << 20), tight)
    assert (plan.quant, plan.format, plan.tier) == ("int8", "int8", "link")
    assert "--quant int8" in plan.command and "planned with int8" in plan.notes[0]
    assert [row["format"] for row in plan.alternatives] == ["int8", "int4g32"]
    full = dataclasses.replace(GPU, host_memory=PAGES)
    with pytest.raises(BudgetError, match="host's memory"):
        make(Asked(**small, device_memory=9 << 20, quant="int8"), full)
    with pytest.raises(BudgetError, match="^1.0 MiB is too little"):
        make(Asked(**small, device_memory=1 << 20, quant="int8"), GPU)
    with pytest.raises(BudgetError, match="^even with int4 weights: 1.0 MiB is too little"):
        make(Asked(**small, device_memory=1 << 20), GPU)
    with pytest.raises(InputError, match="1.0 TiB is more than laptop with NVMe has: 16.0 GiB"):
        make(Asked(**small, host_memory=1 << 40), machine("laptop"))
    with pytest.raises(InputError, match="more than RTX 4090 has"):
        make(Asked(**small, device_memory=25 << 30), GPU)


def test_what_does_not_fit_is_no_alternative_either():
    """Without a GPU the records and the slots lie in the same memory."""
    link = {"device_memory": 10 << 20, "link": "paced:0.7,0,53"}
    for room, formats in ((31 << 20, ["bfloat16", "int8", "int4g32"]), (22 << 20, ["int8"])):
        narrow = dataclasses.replace(SERVER, host_memory=room)
        plan = make(Asked(model="tiny", context=128, **link), narrow)
        assert plan.format == formats[0]
        assert [row["format"] for row in plan.alternatives][: len(formats)] == formats


def test_the_pinned_pool_is_raised_where_it_must_be():
    roomy = dataclasses.replace(GPU, host_memory=256 << 30)
    plan = make(Asked(model="mistralai/Mixtral-8x7B-v0.1", context=128), roomy)
    records = plan.store["in pinned host memory"]
    assert records == 32 * 8 * 3 * 4096 * 14336 * 2
    assert int(plan.environment["XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB"]) >= records / 2**30
    assert plan.environment["XLA_CLIENT_MEM_FRACTION"].startswith("0.95")
    assert any("raised" in note for note in plan.notes)
    assert any("no GPU has confirmed it" in note for note in plan.notes)
    assert plan.limit == "link (PCIe 4.0 x16)"


def test_models_are_read_from_configs_alone(tmp_path):
    config = (ROOT / "checkpoints" / "tiny" / "config.json").read_text()
    (tmp_path / "config.json").write_text(config)
    sources = [read(str(p)) for p in (tmp_path, tmp_path / "config.json")]
    assert [s.config for s in sources] == [read("tiny").config] * 2
    assert sources[1].name == str(tmp_path)
    plan = make(Asked(model=str(tmp_path / "config.json")), SERVER)
    assert f"--model {tmp_path} " in plan.command
    qwen = read("Qwen/Qwen3-30B-A3B").config
    assert (qwen.num_moe_layers, qwen.num_experts, qwen.top_k) == (48, 128, 8)
    with pytest.raises(CheckpointError, match="no directory"):
        read("./nowhere")
    with pytest.raises(InputError, match="no experts"):
        make(Asked(model="tiny-draft"), SERVER)
    with pytest.raises(InputError, match="only one of"):
        make(Asked(model="tiny", device_memory=1 << 30, host_memory=1 << 30), SERVER)


# The arithmetic


works = st.builds(
    Work,
    layers=st.integers(1, 60),
    moe_layers=st.integers(1, 60),
    experts=st.integers(8, 256),
    top_k=st.integers(1, 8),
    record_bytes=st.integers(4096, 10**9),
    expert_bytes=st.integers(1, 10**9),
    expert_weights=st.integers(1, 10**9),
    dense_bytes=st.integers(1, 10**10),
    dense_weights=st.integers(1, 10**10),
    kv_bytes_per_token=st.floats(0, 1e6),
    attention_width=st.integers(1, 10**4),
)


@given(works, st.sampled_from(["rtx-4090", "laptop", "h100-pcie"]), st.floats(0, 1))
def test_a_token_takes_the_sum_over_its_layers(work, name, hit_rate):
    chosen, at = machine(name), 100
    share = chosen.reached
    read_s = (work.dense_bytes + work.kv_bytes_per_token * at) / chosen.device_gb_per_s
    product = 2 * work.dense_weights + 4 * work.attention_width * at * work.layers
    moved_s = constant = 0.0
    for _ in range(work.moe_layers):
        for _ in range(work.top_k):
            read_s += work.expert_bytes / chosen.device_gb_per_s
            product += 2 * work.expert_weights
            copy = work.record_bytes / chosen.link_gb_per_s / 1e9 / share["link"]
            moved_s += (1 - hit_rate) * (copy + chosen.link_latency_us / 1e6)
    for _ in range(work.layers):
        constant += chosen.layer_us / 1e6
    constant += chosen.step_us / 1e6
    busy = max(
        read_s / 1e9 / share["device"], product / chosen.device_gflops / 1e9 / share["compute"]
    )
    found = predict.token(work, chosen, "link", hit_rate, at)
    np.testing.assert_allclose(found.total_ms / 1e3, busy + moved_s + constant, rtol=1e-9)
    resident = predict.token(work, chosen, "resident", hit_rate, at)
    assert resident.moving_ms == 0 and resident.reading_ms == found.reading_ms
    parts = {"link": found.moving_ms, "compute": found.computing_ms}
    said = found.limit(chosen, "link")
    worst = max(found.moving_ms, found.computing_ms, found.reading_ms, found.constant_ms)
    assert all((key in said) <= (value == worst) for key, value in parts.items())


def test_prompts_move_what_slots_do_not_keep():
    work = Work(
        layers=2,
        moe_layers=2,
        experts=4,
        top_k=4,  # every token uses every expert: 8 in all
        record_bytes=10**6,
        expert_bytes=10**6,
        expert_weights=1,
        dense_bytes=10**6,
        dense_weights=1,
        kv_bytes_per_token=0.0,
        attention_width=1,
    )
    one = dataclasses.replace(GPU, link_latency_us=0.0, reached=dict.fromkeys(GPU.reached, 1.0))
    record_ms = 1e6 / (one.link_gb_per_s * 1e9) * 1e3

    def moved(tier, slots, tokens, held=0):
        return predict.prompt(work, one, tier, slots, tokens, 64, held).moving_ms / record_ms

    assert moved("link", 8, 64) == pytest.approx(8)
    assert moved("link", 8, 640) == pytest.approx(8)
    assert moved("link", 7, 640) == pytest.approx(80)
    assert moved("link", 8, 640, held=3) == pytest.approx(5)
    assert moved("resident", 8, 640) == 0
    # One token of each step goes through the head: 3 steps of at most 64 for 150 tokens.
    headed = dataclasses.replace(work, dense_weights=1000, head_weights=900)
    flat = dataclasses.replace(work, dense_weights=100)
    took, rest = (
        predict.prompt(w, one, "resident", 8, 150, 64).computing_ms for w in (headed, flat)
    )
    assert took - rest == pytest.approx(2 * 900 * 3 / (one.device_gflops * 1e9) * 1e3, rel=1e-6)
    # Distinct experts of random choices, against drawing them.
    wide = dataclasses.replace(work, experts=64, top_k=6)
    rng = np.random.default_rng(0)
    drawn = [
        len({e for _ in range(20) for e in rng.choice(64, 6, replace=False)}) for _ in range(400)
    ]
    assert wide.distinct(20) == pytest.approx(np.mean(drawn), rel=0.01)


# Hit rates


@given(
    st.lists(
        st.tuples(st.booleans(), st.integers(0, 2), st.sets(st.integers(0, 5), min_size=1)),
        min_size=1,
        max_size=40,
    ),
    st.integers(6, 18),
)
def test_a_pool_is_that_of_a_list_in_order_of_use(drawn, slots):
    uses = [(counted, layer, sorted(experts)) for counted, layer, experts in drawn]
    uses.append((True, 0, [0]))
    order, hits, needed = [], 0, 0
    for counted, layer, experts in uses:
        keys = [(layer, e) for e in experts]
        hits += counted * sum(key in order for key in keys)
        needed += counted * len(keys)
        order = ([key for key in order if key not in keys] + keys)[-slots:]
    assert reuse.pool_hit_rate(uses, slots) == hits / needed


def test_recorded_curves_rise_to_one_and_stay_above_uniform_routing():
    for curve in reuse.curves():
        rates = [curve.at(slots, 6, 32, 4) for slots in range(193)]
        assert np.all(np.diff(rates) >= 0) and rates[-1] == 1.0 and rates[0] == 0
        assert all(r >= reuse.uniform(slots, 6, 32, 4) for slots, r in enumerate(rates))
    for slots in (24, 40, 96):
        drawn = np.random.default_rng(slots)
        uses = [
            (step > 40, layer, drawn.choice(32, 4, replace=False))
            for step in range(800)
            for layer in range(6)
        ]
        uses = [(counted, layer, chosen.tolist()) for counted, layer, chosen in uses]
        exact = reuse.pool_hit_rate(uses, slots)
        assert reuse.uniform(slots, 6, 32, 4) == pytest.approx(exact, abs=0.02)
    assert reuse.uniform(23, 6, 32, 4) == 0 and reuse.pool_hit_rate(uses, 12) < 0.01
    assert reuse.uniform(3, 1, 4, 4) == 0 and reuse.uniform(4, 1, 4, 4) == 1
    hits = reuse.expected(76, 6, 32, 4)
    assert 0.3 < hits.low <= 76 / 192 < hits.middle < hits.high < 1
    with pytest.raises(InputError):
        reuse.expected(76, 6, 32, 4, known=[])


@pytest.mark.skipif(not DATA.is_dir(), reason=f"the traces are not at {DATA}")
def test_recorded_curves_are_those_of_the_traces():
    sys.path.insert(0, str(ROOT))
    from experiments import plan_reuse

    curve = next(c for c in reuse.curves() if c.model == "gemma-4-26B-A4B")
    found = plan_reuse.traced(curve.model, DATA.parents[1], plan_reuse.SHARES[3:8:2])
    kept = dict(zip(curve.multiples, curve.hit_rates, strict=True))
    assert {m: kept[m] for m in found["multiples"]} == dict(
        zip(found["multiples"], found["hit_rates"], strict=True)
    )


@pytest.mark.skipif(not DATA.is_dir(), reason=f"the traces are not at {DATA}")
@pytest.mark.parametrize(("slots", "rate"), [(8, 0.429), (16, 0.612), (32, 0.817)])
def test_replays_of_single_layers_are_those_published_with_the_trace(slots, rate):
    sys.path.insert(0, str(ROOT))
    from experiments import plan_reuse

    trace = plan_reuse.uses(DATA / "qwen.route.csv.xz")
    layers = [[use for use in trace if use[1] == layer] for layer in range(48)]
    # In the last layer the prompt keeps its last token only; decode is alike in all.
    found = np.mean([reuse.pool_hit_rate(uses, slots) for uses in layers])
    assert found == pytest.approx(rate, abs=0.005)


def made_trace(phases, picks=None):
    """Two layers of 8 experts, top-2, the same two experts again and again or those given."""
    rows = len(phases)
    zeros = np.zeros(rows, np.int32)
    if picks is None:
        picks = np.broadcast_to(np.array([0, 1], np.int16), (rows, 2, 2))
    return Trace(
        model="made",
        experts=8,
        sequence=zeros,
        position=np.arange(rows, dtype=np.int32),
        run=np.arange(rows, dtype=np.int32),
        phase=np.array(phases, np.uint8),
        token=zeros,
        accepted=np.ones(rows, bool),
        picks=picks,
    )


def test_a_trace_gives_its_own_hit_rate(tmp_path):
    curve = reuse.of_trace(made_trace([0, 1, 1, 1]))
    assert set(curve.hit_rates) == {1.0} and "4 tokens" in curve.source
    made_trace([0, 1, 1]).save(tmp_path / "t.trace")
    assert plan_commands.curve_of(tmp_path / "t.trace").model == "made"
    with pytest.raises(InputError, match="no decode step"):
        reuse.of_trace(made_trace([0, 0]))
    plan = make(Asked(model="tiny", host_memory=12 << 20, context=128, curve=curve), SERVER)
    assert plan.hits.low == plan.hits.high and "made" in plan.hits.source
    assert plan.tpot_range_ms[0] == plan.tpot_range_ms[1]


@pytest.mark.parametrize(
    "signs",
    [
        {"about": {"exact": False}},
        {"outcome": np.full((4, 2, 2), Outcome.SUBSTITUTE, np.uint8)},
        {"counts": {"replaced": np.array([[0, 0], [0, 1], [0, 0], [0, 0]], np.int32)}},
    ],
    ids=lambda signs: next(iter(signs)),
)
def test_the_picks_of_a_lossy_run_are_not_taken_for_the_models_own(signs):
    lossy = dataclasses.replace(made_trace([0, 1, 1, 1]), **signs)
    with pytest.raises(InputError, match="lossy run and lacks"):
        reuse.of_trace(lossy)
    # The model's own: others in every step.
    own = np.arange(4 * 4, dtype=np.int16).reshape(4, 2, 2) % 8
    curve = reuse.of_trace(dataclasses.replace(lossy, exact=own))
    assert curve.hit_rates == reuse.of_trace(made_trace([0, 1, 1, 1], own)).hit_rates
    assert min(curve.hit_rates) < 1


# Machines


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_whole_and_survive_json(name, tmp_path):
    made = machine(name)
    assert {"device", "link", "disk", "overheads"} <= made.sources.keys()
    assert made.reached.keys() == machines.REACHED.keys()
    (tmp_path / "m.json").write_text(made.to_json())
    assert machine(str(tmp_path / "m.json")) == made
    published = [made.sources[part] for part in ("device", "link", "disk")]
    assert made.kernels or all("https://" in s or "copies within" in s for s in published)
    if made.kind == "gpu":
        assert made.host_gb_per_s > made.rate("link") / 1e9 and made.device_gb_per_s > 200


def test_a_measured_record_is_a_machine(tmp_path):
    measured = hardware.Hardware(
        **{"name": "cpu", "cores": 2, "device": "cpu", "backend": "cpu", "versions": {}},
        **{"format": "bfloat16", "kernels": "native", "width": 100, "expert_width": 10},
        **{"record_bytes": 6000, "store_bytes": 6000, "link": "memory copy"},
        **{"link_gb_per_s": 5.0, "link_latency_us": 1.0, "stream_read_gb_per_s": 9.0},
        **{"stream_read_bytes": 1, "host_us_per_expert": {1: 3.0}},
        **{"device_us_per_expert": {1: 2.0, 64: 12.8}},
        **{"contended_link_gb_per_s": 1.0, "contended_host_us_per_expert": 1.0},
    )
    (tmp_path / "hw.json").write_text(measured.to_json())
    made = machine(str(tmp_path / "hw.json"))
    assert (made.rate("device"), made.rate("host"), made.rate("link")) == (3e9, 2e9, 5e9)
    assert made.flops == pytest.approx(2 * 3000 * 64 / 12.8e-6)
    assert made.kernels == {
        "bfloat16": {"1": pytest.approx(2e6 / 3000), "64": pytest.approx(12.8e6 / 3000)}
    }
    assert (
        made.disk_gb_per_s == SERVER.disk_gb_per_s and "not in the record" in made.sources["disk"]
    )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"kind": "tpu"}, "kind"),
        ({"device_gb_per_s": 0.0}, "positive"),
        ({"link_latency_us": -1.0}, "negative"),
        ({"reached": {}}, "neither"),
        ({"kernels": {"int8": {"1": 0.0}}}, "positive"),
        ({"kernels": {"int8": {}}}, "positive"),
        ({"kernels": {"int8": {"one": 2.0}}}, "neither"),
        ({"draw_us": -1.0}, "negative"),
        ({"name": 3}, "text"),
        ({"extra": 1}, "extra"),
    ],
)
def test_files_that_are_no_machine_are_refused(tmp_path, change, said):
    path = tmp_path / "m.json"
    path.write_text(json.dumps(json.loads(SERVER.to_json()) | change))
    with pytest.raises(InputError, match=said):
        machine(str(path))
    for text, said in (("{", "not JSON"), ("[]", "neither"), ('{"record_bytes": 1}', "bench hw")):
        path.write_text(text)
        with pytest.raises(InputError, match=said):
            machine(str(path))
    with pytest.raises(InputError, match="known: rtx-3080-ti"):
        machine("rtx-9999")


@pytest.mark.parametrize(
    ("name", "preset"),
    [
        ("NVIDIA GeForce RTX 3080 Ti", "rtx-3080-ti"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("NVIDIA A100-SXM4-80GB", "a100-80-sxm"),
        ("NVIDIA A100-PCIE-40GB", "a100-40-pcie"),
        ("NVIDIA H100 80GB HBM3", "h100-sxm"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA RTX A6000", "a6000"),
        ("NVIDIA GeForce RTX 3080", None),
        ("", None),
    ],
)
def test_presets_are_found_by_a_drivers_name(name, preset):
    assert plan_commands.preset_of(name) == preset


# The command


def command(*arguments):
    """`moejax plan` as the command line registers it."""
    app = typer.Typer()
    app.command()(exits.guarded(plan_commands.plan))
    return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.mark.parametrize(
    ("options", "shown"),
    [
        ((), "this machine at the rates of server-2core, "),
        (("--hardware", "laptop"), "laptop with NVMe, "),
    ],
)
def test_the_heading_says_whose_figures_these_are(options, shown, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    done = command("tiny", "--context", 64, *options)
    assert done.exit_code == 0, done.output
    [heading] = [line for line in done.stdout.splitlines() if line.strip().startswith("machine ")]
    assert heading.split(None, 1)[1].startswith(shown)


def test_the_slower_policy_is_left():
    samples = {OFFLOADED: [2.0, 5.0, 2.1], RESIDENT: [2.0, 2.0, 9.0]}
    chosen, found = plan_verify.judged(OFFLOADED, samples, 40)
    assert chosen == RESIDENT and found.fell_back and "falls back" in found.said
    chosen, found = plan_verify.judged(OFFLOADED, samples | {OFFLOADED: [1.9] * 3}, 40)
    assert chosen == OFFLOADED and not found.fell_back and "it stays" in found.said


def test_a_plan_is_verified_here(monkeypatch):
    monkeypatch.setattr(plan_verify, "TOKENS", 4)
    monkeypatch.setattr(plan_verify, "ROUNDS", 1)
    real, ran = plan_verify.measured, {}

    def measured(runtimes):
        ran.update({name: (r.policy, r.slots) for name, r in runtimes.items()}, took=real(runtimes))
        return {name: [2.0 + (name != RESIDENT)] for name in runtimes}

    monkeypatch.setattr(plan_verify, "measured", measured)
    options = ["tiny", "--device-memory", "6MiB", "--context", 64, "--verify", "--json"]
    done = command(*options)
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    assert document["verified"]["fell_back"] and document["policy"] == RESIDENT
    assert "was faster than host" in document["reason"]
    assert "--policy lru " in document["command"]
    assert document["verified"]["slots"] == document["slots"] == ran[RESIDENT][1]
    # What the plan says is lru's: misses are moved again.
    assert not document["hosted"] and document["tpot"]["moving_ms"] > 0
    assert ran["host"][0].placement.uses_host and not ran[RESIDENT][0].placement.uses_host
    assert all(time > 0 for times in ran["took"].values() for time in times)
    refused = command("tiny", "--verify", "--hardware", "rtx-4090")
    assert refused.exit_code == 2 and "runs on this machine" in refused.output


def test_policies_are_timed_by_the_token_on_text(monkeypatch, tmp_path):
    plain, ran = moejax.load("tiny", slots=192, context=64), []

    def run_once(runtime, test, ids):
        # Three cycles made all tokens after the first.
        ran.append((test, ids))
        return SimpleNamespace(seconds=0.5 * len(ran), stats=SimpleNamespace(steps=3))

    monkeypatch.setattr(plan_verify.bench, "run_once", run_once)
    found = plan_verify.measured({RESIDENT: plain, "other": plain})
    news = {test.new for test, _ in ran}
    assert news == {32}  # half of the context
    assert found == {
        RESIDENT: [0.5 * n / 31 * 1e3 for n in (3, 5, 7)],
        "other": [0.5 * n / 31 * 1e3 for n in (4, 6, 8)],
    }
    for turn, text in enumerate((*plan_verify.TEXTS, plan_verify.TEXTS[0])):
        whole = plain.tokenizer.encode(text)[:32]
        assert all(ids.tolist() == [whole] for _, ids in ran[2 * turn : 2 * turn + 2])
        assert ran[2 * turn][0].prompt == len(whole)
    bare = dataclasses.replace(plain, directory=tmp_path)
    drawn = plan_verify.prompt_of(bare, 1)
    assert drawn.shape == (1, 32) and 0 <= drawn.min() and drawn.max() < 4096


def test_the_command_prints_the_plan_and_exits_with_codes():
    small = ["tiny", "--context", 128, "--quant", "int8"]
    done = command(*small, "--hardware", "rtx-4090", "--device-memory", "9MiB")
    assert done.exit_code == 0, done.output
    text = " ".join(done.output.split())
    for said in ("RTX 4090, PCIe 4.0 x16", "limited by", "in pinned host memory", "reuse curves"):
        assert said in text
    assert "XLA_PJRT" not in text and "raised" not in text
    assert text.endswith("--context 128 --quant int8")
    assert command(*small, "--device-memory", "1MiB").exit_code == 4
    assert command("tiny", "--device-memory", "much").exit_code == 2
    assert command("tiny", "--trace", "nowhere.trace").exit_code in (2, 3)
    unknown = command("nobody/nothing")
    assert unknown.exit_code == 5 and "hf download nobody/nothing config.json" in unknown.output
    assert "Qwen/Qwen3-30B-A3B" in unknown.output


def test_the_commands_import_nothing_that_takes_time():
    program = (
        "import sys, moejax.cli.plan, moejax.cli.reports\n"
        "print([m for m in ('jax', 'numpy', 'matplotlib', 'rich') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() in ("[]", "['rich']"), done.stderr
