"""bench: rows and their arithmetic, refusals; the Hardware record; random models and peers."""

import csv
import functools
import io
import json
import pathlib
import statistics
import subprocess
import sys

import numpy as np
import pytest
from typer.testing import CliRunner

import moejax
from moejax import bench, measure
from moejax.cli import main as cli
from moejax.describe import describe
from moejax.errors import InputError
from moejax.hardware import Hardware
from moejax.kernels import build
from moejax.layout import RecordLayout
from moejax.planner.machines import parse_machine
from moejax.stats import Stats

pytest.importorskip("safetensors")
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from experiments import limits, peers_report, random_model  # noqa: E402

needs_native = pytest.mark.skipif(build.library() is None, reason=build.status())
SLOTS = 12
SHAPE = {"layers": 2, "width": 64, "experts": 8, "top_k": 2, "expert_width": 32}
SHAPE |= {"heads": 2, "kv_heads": 1, "head_dim": 32, "vocab": 97}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    made = tmp_path_factory.mktemp("bench") / "model"
    random_model.write(made, random_model.make_config(**SHAPE), seed=1)
    return made


@pytest.fixture
def small_reads(monkeypatch):
    """Stream reads of 1 MiB and records of 64 KiB: these tests time nothing."""
    monkeypatch.setattr(bench, "StreamRead", functools.partial(measure.StreamRead, 1 << 20))
    small = functools.partial(measure.hardware, store_bytes=1 << 16)
    monkeypatch.setattr(measure, "hardware", small)


def run(*arguments):
    return CliRunner().invoke(cli.app, ["bench", *map(str, arguments)])


def test_rows_of_the_embedded_model(small_reads):
    result = run("--pp", 4, "--tg", 4, "--reps", 2, "--slots", 76, "--json", "--seed", 3)
    assert result.exit_code == 0, result.output
    prompt, decode = json.loads(result.stdout)
    assert (prompt["test"], decode["test"]) == ("pp4", "tg4")
    for row in (prompt, decode):
        assert len(row["samples"]) == 2 and min(row["samples"]) > 0
        assert row["tokens_per_second"] == pytest.approx(statistics.median(row["samples"]))
        assert row["ms_per_token"] > 0 and row["stdev"] >= 0
        assert 0 <= row["hit_rate"] <= 1 and row["bound_fraction"] > 0
        assert row["stream_read_gb_per_s"] > 0 and row["weight_bytes_per_token"] > 0
        assert (row["slots"], row["policy"], row["seed"]) == (76, "lru", 3)
        assert row["label"] == "bit-exact" and row["stall_ms"] == 0
        assert row["environment"]["versions"]["jax"] and row["environment"]["cpu"]
    assert decode["bytes_per_token"] == decode["misses_per_token"] * decode["record_bytes"] > 0


def test_weight_bytes_are_those_of_the_files(directory):
    runtime = moejax.load(directory, context=8)
    [row] = bench.bench(runtime, bench.tests([0], [4]), reps=1, bandwidth=False)
    facts = describe(directory)
    embedding = SHAPE["vocab"] * SHAPE["width"] * 2
    assert row["weight_bytes_per_token"] == 2 * facts.active_parameters - embedding
    assert row["hit_rate"] == 1 and row["bytes_per_token"] == 0
    assert row["bound_fraction"] is row["stream_read_gb_per_s"] is None


def test_a_row_is_the_median_of_its_samples(directory):
    runtime = moejax.load(directory, slots=SLOTS, context=8)
    test = bench.Test("tg10", 1, 11)
    before = Stats(record_bytes=1000, fetched=4, prefill_moved=4)
    samples = [
        bench.Sample(
            seconds=seconds,
            stats=Stats(record_bytes=1000, fetched=24, steps=10, needed=40, hits=20),
            prefill=before,
            tokens=[[1] * 11],
            bandwidth=2.0,
        )
        for seconds in (1.0, 4.0, 2.0)
    ]
    row = bench.row(runtime, test, samples, seed=0)
    assert row["samples"] == [10.0, 2.5, 5.0]
    assert (row["tokens_per_second"], row["ms_per_token"]) == (5.0, 200.0)
    assert row["stdev"] == pytest.approx(np.std([10, 2.5, 5], ddof=1))
    assert (row["hit_rate"], row["misses_per_token"], row["bytes_per_token"]) == (0.5, 2.0, 2000.0)
    assert row["bound_fraction"] == pytest.approx(row["weight_bytes_per_token"] * 10 / 2e9 / 2.0)
    assert row["distinct_tokens"] == 1


def test_a_row_says_whether_drafts_paid(directory):
    runtime = moejax.load(directory, slots=SLOTS, context=8)
    test, plain = bench.Test("tg10", 1, 11), Stats(record_bytes=1000)
    made = [
        Stats(record_bytes=1000, steps=4, row_steps=4, drafted=8, accepted=6, draft_lengths=found)
        for found in ({0: 1, 2: 3}, {0: 2, 4: 2})
    ]
    samples = [bench.Sample(seconds=1.0, stats=s, prefill=plain, tokens=[[1] * 11]) for s in made]
    row = bench.row(runtime, test, samples, seed=0) | {"policy": "made"}
    assert (row["tokens_per_cycle"], row["acceptance"]) == (2.5, 0.75)
    assert (row["drafted_share"], row["plain_step_ms"]) == (0.625, None)
    said = "tg10: 2.50 tokens per cycle, 75% of drafts accepted, 62% of cycles drafted"
    assert f"\n\n{said}." in bench.as_markdown([row])
    # A token took 100 ms of each of two sequences.
    both = row | {"batch": 2, "plain_step_ms": 400.0}
    assert (
        f"{said}; faster than plain steps (200.00 against 400.00 ms per token)."
        in bench.as_markdown([both])
    )
    without = bench.Sample(seconds=1.0, stats=Stats(1000, steps=10), prefill=plain, tokens=[[1]])
    row = bench.row(runtime, test, [without], seed=0) | {"policy": "made"}
    names = ("tokens_per_cycle", "acceptance", "drafted_share", "plain_step_ms")
    assert [row[name] for name in names] == [None] * 4
    assert "drafted" not in bench.as_markdown([row])


def test_what_is_timed_is_what_generate_does(directory):
    runtime = moejax.load(directory, slots=SLOTS, context=32)
    ids = bench.random_ids(SHAPE["vocab"], 2, 5, seed=0, repetition=0)
    sample = bench.run_once(runtime, bench.Test("", 5, 7), ids)
    wanted = runtime.generate([list(map(int, row)) for row in ids], 7, {"temperature": 0.0})
    assert sample.tokens == [[t.id for t in completion.tokens] for completion in wanted]
    assert sample.seconds > 0 and sample.stats.needed == runtime.stats.needed
    assert sample.stats.bytes_moved == runtime.stats.bytes_moved > 0


def test_token_ids_depend_on_seed_and_repetition_alone():
    def ids(seed, repetition):
        return bench.random_ids(1000, 2, 16, seed=seed, repetition=repetition)

    assert ids(0, 0).shape == (2, 16) and ids(0, 0).min() >= 0 and ids(0, 0).max() < 1000
    np.testing.assert_array_equal(ids(5, 2), ids(5, 2))
    assert (ids(5, 2) != ids(5, 3)).any() and (ids(5, 2) != ids(6, 2)).any()


def test_lengths_may_be_several_and_zero_leaves_a_kind_out():
    assert [t.name for t in bench.tests([8, 0, 16], [0])] == ["pp8", "pp16"]
    assert bench.context_for(bench.tests([8], [40])) == 41
    assert bench.context_for(bench.tests([80], [40])) == 80


def test_csv_and_markdown(directory):
    options = ("-m", directory, "--pp", 3, "--tg", 2, "--reps", 1, "--no-bandwidth", "--slots", 8)
    [prompt, decode] = csv.DictReader(io.StringIO(run(*options, "--csv").stdout))
    assert (prompt["test"], decode["test"], decode["slots"]) == ("pp3", "tg2", "8")
    assert float(decode["tokens_per_second"]) > 0 and "samples" not in decode
    head, _, *rows = run(*options, "--batch", 2).stdout.splitlines()
    assert [line.split("|")[5].strip() for line in (head, *rows)] == ["test", "pp3", "tg2"]
    assert all(line.count("|") == head.count("|") for line in rows)


@pytest.mark.parametrize(
    ("code", "arguments", "said"),
    [
        (2, ("--json", "--csv"), "one of --json, --csv"),
        (2, ("--pp", 0, "--tg", 0), "give --pp or --tg"),
        (2, ("--pp", -1), "negative"),
        (2, ("nonsense",), "'nonsense' is unknown"),
        (2, ("hw", "--csv"), "JSON only"),
        (2, ("hw", "--dtype", "float8"), "dtype"),
        (
            2,
            ("--pp", 9, "--tg", 0, "--context", 8, "--no-bandwidth"),
            "do not fit the context of 8",
        ),
        (2, ("--pp", 10**6), "context must be in"),
        (2, ("--quant", "int3"), "quant 'int3'"),
        (4, ("--slots", 1), "slots cannot hold"),
    ],
)
def test_refusals_are_one_line_and_a_code(directory, code, arguments, said):
    result = run(*arguments, "-m", directory, "-q")
    assert (result.exit_code, result.stdout) == (code, "")
    assert said in result.stderr and result.stderr.count("\n") == 1


def test_help_imports_no_jax():
    program = (
        "import sys\nfrom moejax.cli.main import main\nsys.argv = ['moejax', 'bench', '--help']\n"
        "try:\n    main()\nexcept SystemExit as stop:\n    code = stop.code\n"
        "sys.exit(code or ('jax' in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0 and "--reps" in done.stdout, done.stderr


@pytest.mark.parametrize("form", [("float32",), ("bfloat16",), ("bfloat16", "--quant", "int4")])
def test_the_hardware_record_is_measured_for_the_experts_of_a_model(directory, small_reads, form):
    dtype, *quant = form
    result = run("hw", "-m", directory, "-q", "--dtype", dtype, *quant)
    assert result.exit_code == 0, result.output
    found = Hardware.from_json(result.stdout)
    assert found.format == ("int4g32" if quant else dtype) and found.width == SHAPE["width"]
    assert found.store_bytes % found.record_bytes == 0
    rates = (found.link_gb_per_s, found.contended_link_gb_per_s, found.stream_read_gb_per_s)
    assert min(*rates, found.contended_host_us_per_expert, found.cores) > 0
    assert found.link_latency_us >= 0 and found.miss_us >= 0
    for times in (found.host_us_per_expert, found.device_us_per_expert):
        assert tuple(times) == measure.TOKENS and min(times.values()) > 0
    assert Hardware.from_json(found.to_json()) == found
    assert parse_machine(result.stdout, "it").miss_us == found.miss_us


def test_records_of_hardware_from_before_misses_were_timed_are_read(directory, small_reads):
    whole = json.loads(run("hw", "-m", directory, "-q").stdout)
    del whole["miss_us"]
    assert Hardware.from_json(json.dumps(whole)).miss_us == 0.0


@needs_native
@pytest.mark.parametrize("how", ["native", "reference"])
def test_the_layers_whose_misses_are_timed_miss_all_or_nothing(how):
    layout = RecordLayout(width=512, expert_width=64, dtype="int8")
    made = measure.Layers(layout, how)
    assert made.link.record_bytes < layout.stride  # the wider of its sides is cut
    landed = []
    for missing in (False, False, True, True, False):
        assert made.run(missing) == made.layers * made.tokens
        landed.append(made.link.stats(reset=True).landed)
    made.link.close()
    first = made.layers  # what was not there before
    assert landed == [first, 0, landed[2], first * made.tokens, first]
    assert landed[2] == first * (made.tokens - 1)  # its first experts were there


@pytest.mark.skipif(not pathlib.Path("/proc/self/task").is_dir(), reason="no /proc of Linux")
def test_a_validation_gives_each_thread_a_core():
    program = (
        "import json, os, pathlib\nimport jax.numpy as jnp\njnp.ones(8).block_until_ready()\n"
        "from experiments.simulator_validation import spread_threads\nnumber = spread_threads()\n"
        "tasks = pathlib.Path('/proc/self/task').iterdir()\n"
        "own = [int(t.name) for t in tasks if 'XLAEigen' in (t / 'comm').read_text()]\n"
        "where = [sorted(os.sched_getaffinity(thread)) for thread in own]\n"
        "print(json.dumps([number, where, len(os.sched_getaffinity(0))]))"
    )
    root = pathlib.Path(__file__).resolve().parents[1]
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr
    number, where, cores = json.loads(done.stdout)
    assert number == len(where) >= 1 and all(len(own) == 1 for own in where)
    assert len({own[0] for own in where}) == min(number, cores)


@needs_native
def test_a_miss_costs_what_layers_with_misses_take_beside(monkeypatch):
    seconds = {False: 30e-6, True: 50e-6}
    monkeypatch.setattr(measure, "_median_seconds", lambda call: seconds[call()])
    monkeypatch.setattr(measure.Layers, "run", lambda self, missing: missing)
    layout = RecordLayout(width=64, expert_width=32, dtype="bfloat16")
    assert measure.miss_us(layout, "reference") == pytest.approx(20)
    seconds[True] = 10e-6  # lost in the noise
    assert measure.miss_us(layout, "reference") == 0.0
    monkeypatch.setattr(measure.build, "library", lambda: None)  # no link: nothing to measure
    seconds.clear()
    assert measure.miss_us(layout, "reference") == 0.0


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"name": 1}'])
def test_other_documents_are_no_hardware_records(text):
    with pytest.raises(InputError, match="bench hw"):
        Hardware.from_json(text)


def test_a_stream_read_passes_over_all_of_it():
    reader = measure.StreamRead(1 << 20)
    assert reader.gb_per_s() > 0
    assert sum(int(part.sum()) for part in reader._parts) == (1 << 20) // 8


def test_made_up_records_are_ordinary_numbers(directory):
    config = moejax.load(directory).config
    for form in ("float32", "bfloat16"):
        layout = config.record_layout(form)
        values = layout.view(measure.made_up_records(layout, 2), "down").astype(np.float64)
        assert (abs(values) > 1e-3).all() and (abs(values) < 1).all()


def test_a_random_model_runs_and_is_the_same_for_a_seed(directory, tmp_path):
    config = random_model.make_config(**SHAPE)
    parameters = random_model.write(tmp_path / "again", config, seed=1)
    random_model.write(tmp_path / "other", config, seed=2)
    files = sorted(f.name for f in directory.glob("*.safetensors"))
    assert len(files) == SHAPE["layers"] + 1
    for file in files:
        same, other = ((tmp_path / d / file).read_bytes() for d in ("again", "other"))
        assert (directory / file).read_bytes() == same != other
    assert describe(directory).parameters == parameters
    runtime = moejax.load(directory, slots=SLOTS)
    [completion] = runtime.generate([[1, 2, 3]], 5)
    assert len(completion.tokens) == 5
    logits = runtime.logits(np.arange(40)[None] % SHAPE["vocab"])
    assert np.isfinite(logits).all() and logits.std() > 0.05


def test_random_routing_uses_every_expert(directory):
    runtime = moejax.load(directory, context=64)
    ids = bench.random_ids(SHAPE["vocab"], 1, 64, seed=0, repetition=0)
    _, out = runtime.decode_step(runtime.init_state(), ids)
    for picks in np.asarray(out.trace.picks):
        shares = np.bincount(picks.ravel(), minlength=SHAPE["experts"]) / picks.size
        assert shares.min() > 0 and shares.max() < 0.5


def test_the_writer_refuses_a_directory_that_exists(directory, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["random_model", str(directory)])
    with pytest.raises(SystemExit):
        random_model.main()
    assert "exists already" in capsys.readouterr().err


def test_ratios_are_taken_round_by_round():
    def sample(peer, repetition, ms):
        row = {"test": "tg4", "peer": peer, "repetition": repetition, "ms_per_token": ms}
        return row | {"stream_read_gb_per_s": 10.0}

    ours = [sample("moejax bf16", r, ms) for r, ms in enumerate([10.0, 40.0, 30.0])]
    theirs = [sample("llama.cpp BF16", r, ms) for r, ms in enumerate([20.0, 20.0, 30.0])]
    about = {name: {"weight_bytes": 10**8} for name in ("moejax bf16", "llama.cpp BF16")}
    row, other = peers_report.summary(ours + theirs, about)
    assert row["ratios"] == {"llama.cpp BF16": 1.0} and other["ratios"] == {}
    assert row["ms_per_token"] == 30.0 and row["bound_fraction"] == pytest.approx(10 / 30)
    report = {"rows": [row, other], "agreement": [], "missing": {"transformers bf16": "no torch"}}
    table = peers_report.as_markdown(report)
    assert "1.00x llama.cpp BF16" in table and "transformers bf16: missing, no torch" in table


def test_a_memory_limit_counts_files_and_kills_what_needs_more(tmp_path):
    file = tmp_path / "file"
    file.write_bytes(bytes(48 << 20))
    reads = f"with open({str(file)!r}, 'rb') as f:\n    while f.read(1 << 20): pass"
    try:
        with limits.memory_limit(32 << 20) as limit:
            path = limit.path
            limits.drop_cached([file])
            assert limit.start([sys.executable, "-c", reads]).wait(60) == 0
            usage = limit.usage()
            assert usage["limit"] == 32 << 20 and usage["limit_met"] > 0
            needs = "b = bytearray(1 << 30)\nfor i in range(0, len(b), 4096): b[i] = 1"
            assert limit.start([sys.executable, "-c", needs]).wait(60) == -9
    except limits.LimitError as error:
        pytest.skip(str(error))
    assert not path.exists()


def test_files_leave_the_page_cache(tmp_path):
    file = tmp_path / "file"
    file.write_bytes(bytes(1 << 20))
    assert limits.cached_bytes(file) > 0
    if limits.drop_cached([file]):
        pytest.skip(f"the file system of {pathlib.Path(tmp_path)} keeps files in memory")
    assert limits.cached_bytes(file) == 0
