"""Recordings: the tokens of the unrecorded run, and outcomes that its counts bear out."""

import dataclasses
import json
import pathlib
import re
import sys

import numpy as np
import pytest
from cli_models import write_model
from typer.testing import CliRunner

import moejax
from moejax.cli import trace_actions
from moejax.cli.traces import app
from moejax.errors import InputError, NonFiniteError, PolicyError
from moejax.kernels import build
from moejax.policies.policy import policy
from moejax.simulator import labels, runs
from moejax.simulator.simulate import Asked, simulate
from moejax.traces import record
from moejax.traces.recorder import outcomes
from moejax.traces.statistics import statistics
from moejax.traces.trace import Outcome, Phase, Trace

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from experiments import record_traces  # noqa: E402

PROMPTS = [[3, 1, 4, 1, 5], [9, 2], [6, 5, 3, 5], [8]]
NEW = 12
ENGINE = Asked(semantics="engine")
LEARNED = {"load_us", "host_us", "host_fixed_us", "host_token_us", "device_us", "rate"}
needs_native = pytest.mark.skipif(build.library() is None, reason="no native kernels")


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> pathlib.Path:
    return write_model(tmp_path_factory.mktemp("models") / "model")


@pytest.fixture(scope="module")
def loaded(directory):
    """The model under a policy, each loaded once."""
    made = {}

    def load(name, **options):
        key = (name, *options.items())
        if key not in made:
            options = {"slots": 5, "context": 128, "virtual": True} | options
            made[key] = moejax.load(directory, policy=name, **options)
        return made[key]

    return load


def check_counts(trace: Trace) -> None:
    """Hits and misses of each pass and layer follow from picks and residency; outcomes agree."""
    for p in range(trace.passes):
        rows = trace.rows_of(p)
        for layer in range(trace.layers):
            picks, kinds = trace.picks[rows, layer], trace.outcome[rows, layer]
            used = set(picks[picks >= 0].tolist())
            there = {e for e in used if trace.resident[p, layer, e]}
            low = {e for e in used if (kinds[picks == e] == Outcome.LOW).any()}
            count = {name: column[p, layer] for name, column in trace.counts.items()}
            assert (count["needed"], count["hits"]) == (len(used), len(there - low))
            for e in used:
                [kind] = set(kinds[picks == e].tolist()) - {Outcome.SUBSTITUTE} or {Outcome.HIT}
                assert (kind in (Outcome.HIT, Outcome.PREFETCHED)) == (e in there - low)
            hosted = {e for e in used if (kinds[picks == e] == Outcome.HOST).any()}
            assert count["host"] == len(hosted)
            fresh = {e for e in used if (kinds[picks == e] == Outcome.PREFETCHED).any()}
            if not (kinds == Outcome.SUBSTITUTE).any():
                assert count["prefetch_used"] == len(fresh)
            own = picks if trace.exact is None else trace.exact[rows, layer]
            lost = (own[:, :, None] != picks[:, None, :]).all(axis=2)
            assert count["replaced"] == lost.sum()


@pytest.mark.parametrize(
    ("name", "seen"),
    [
        ("lru", {Outcome.HIT, Outcome.MISS}),
        ("smoe:alpha=0.6", set(Outcome) - {Outcome.UNKNOWN, Outcome.LOW}),
    ],
)
def test_a_recording_is_of_the_run_that_it_records(loaded, name, seen):
    runtime = loaded(name)
    sampling = {"temperature": 0.9, "repetition_penalty": 1.3}
    told = []
    keep = record.Keep(residency=True)
    options = {"max_new_tokens": NEW, "sampling": sampling, "seed": 3, "batch": 2, "keep": keep}
    trace = record.record(runtime, PROMPTS, **options, progress=lambda *done: told.append(done))
    assert told == [(2, 4), (4, 4)]
    check_counts(trace)
    assert seen <= set(np.unique(trace.outcome).tolist())
    assert trace.passes == trace.began.size and (np.diff(trace.began) > 0).all()
    assert (trace.exact is None) == runtime.policy.exact
    # The same tokens as without recording: of the first group, which no experts stayed for.
    written = runtime.generate(PROMPTS[:2], NEW, sampling, seed=3)
    for b, completion in enumerate(written):
        own = trace.of_sequences(b)
        ids = [*PROMPTS[b], *(t.id for t in completion.tokens)]
        assert own.token.tolist() == ids[:-1]  # the last one is never fed
        assert own.position.tolist() == list(range(len(ids) - 1))
        assert (own.phase == Phase.PREFILL).sum() == len(PROMPTS[b])
    stats, first = runtime.stats, trace.between(0, 1 + runtime.stats.steps)
    sums = {n: c[first.pass_phases() == Phase.DECODE].sum() for n, c in first.counts.items()}
    assert (sums["needed"], sums["hits"]) == (stats.needed, stats.hits)
    assert (sums["replaced"], sums["predicted"]) == (stats.replaced, stats.predicted)


def test_given_tokens_are_fed_as_in_decoding(loaded):
    """Against a loop of one's own, over steps and picks; lengths differ and a text ends early."""
    runtime, rng = loaded("lru"), np.random.default_rng(0)
    texts = [rng.integers(0, 50, n).tolist() for n in (9, 6, 8)]
    trace = record.follow(runtime, texts, prompt=3, tokens=5, keep=record.Keep(scores=0))
    assert trace.scores is None and trace.top_ids is None and trace.accepted.all()
    state, row = runtime.init_state(), 0
    for number, text in enumerate(texts):
        state = moejax.decode.rewind(state, np.zeros(1))
        chunks = [np.array(text[:3])] + [np.array([t]) for t in text[3:8]]
        for n, chunk in enumerate(chunks):
            padded = np.full((1, 64 if n == 0 else 1), -1, np.int32)
            padded[0, : len(chunk)] = chunk
            state, out = runtime.decode_step(state, padded)
            picks = np.asarray(out.trace.picks)[:, : len(chunk)].swapaxes(0, 1)
            rows = slice(row, row + len(chunk))
            np.testing.assert_array_equal(trace.picks[rows], picks)
            weights = np.asarray(out.trace.weights)[:, : len(chunk)].swapaxes(0, 1)
            np.testing.assert_array_equal(trace.weights[rows], weights)
            number_of = trace.run[row]
            hits = trace.counts["hits"][number_of]
            np.testing.assert_array_equal(hits, np.asarray(out.trace.hits))
            assert (trace.sequence[rows] == number).all()
            assert (trace.phase[rows] == (Phase.PREFILL if n == 0 else Phase.DECODE)).all()
            row += len(chunk)
    assert row == trace.rows


def test_scores_are_the_routers_own(loaded):
    runtime, text = loaded("lru"), [list(range(2, 14))]
    whole = record.follow(runtime, text, prompt=4)
    most = record.follow(runtime, text, prompt=4, keep=record.Keep(scores=3))
    assert whole.scores.shape == (12, 2, 8) and most.scores is None
    np.testing.assert_allclose(whole.scores.astype(float).sum(axis=2), 1, atol=4e-3)
    state, out = runtime.decode_step(runtime.init_state(), np.array(text), scores=True)
    own = np.asarray(out.trace.scores).swapaxes(0, 1)
    np.testing.assert_allclose(whole.scores, own, atol=2e-2)
    # Of the model's own router, the picks are the greatest scores.
    best = np.argsort(-whole.scores.astype(np.float32), axis=2, kind="stable")
    apart = np.abs(np.diff(-np.sort(-whole.scores.astype(np.float32), axis=2), axis=2)).min(2) > 0
    np.testing.assert_array_equal(whole.picks[apart], best[apart][:, :2])
    np.testing.assert_array_equal(most.top_ids[apart], best[apart][:, :3])
    np.testing.assert_array_equal(
        most.top_scores, np.take_along_axis(whole.scores, most.top_ids.astype(int), axis=2)
    )


def test_sequences_stop_where_they_would_and_a_last_group_may_be_smaller(loaded):
    """Stop tokens are whatever the run without them made half-way."""
    runtime, sampling = loaded("lru"), {"temperature": 0.9}
    options = {"max_new_tokens": NEW, "sampling": sampling, "seed": 5}
    free = [t.id for t in runtime.generate(PROMPTS[:1], **options)[0].tokens]
    stopping = dataclasses.replace(runtime, generation_config={"eos_token_id": [free[4]]})
    trace = record.record(
        stopping, PROMPTS[:3], batch=2, keep=record.Keep(residency=True), **options
    )
    check_counts(trace)
    written = stopping.generate(PROMPTS[:2], **options)
    assert min(len(w.tokens) for w in written) < NEW
    for b, completion in enumerate(written):
        ids = [*PROMPTS[b], *(t.id for t in completion.tokens)]
        assert trace.of_sequences(b).token.tolist() == ids[:-1]
    third = trace.of_sequences(2)  # alone, but with the experts of those before it
    assert third.resident[0].any() and third.position[0] == 0


@needs_native
def test_draft_windows_are_recorded_with_what_was_rejected(loaded):
    runtime, sampling = loaded("lookup:gamma=2"), {"temperature": 0.2}
    prompt = [[5, 6, 7, 8, 9, 5, 6, 7, 8, 9, 5, 6, 7], [3, 4, 3, 4, 3, 4]]
    options = {"max_new_tokens": 20, "sampling": sampling, "seed": 1}
    trace = record.record(runtime, prompt, **options, keep=record.Keep(residency=True))
    check_counts(trace)
    runtime.generate(prompt[:1], **options)
    stats = runtime.stats
    first = trace.of_sequences(0)
    verified = first.of_phase(Phase.VERIFY)
    assert verified.passes == stats.steps and Phase.DECODE not in set(first.phase)
    assert verified.rows == stats.steps + stats.drafted and stats.accepted > 0
    assert (~verified.accepted).sum() == stats.drafted - stats.accepted > 0
    assert verified.counts["hits"].sum() == stats.hits
    for b in (0, 1):
        written = runtime.generate([prompt[b]], **options)[0]
        own = trace.of_sequences(b)
        ids = [*prompt[b], *(t.id for t in written.tokens)]
        taken = own.token[own.accepted].tolist()
        assert taken[: len(ids) - 1] == ids[: len(taken)]
        places = own.position[own.accepted].tolist()
        assert places == list(range(len(places)))
    for p in range(verified.passes):  # a rejected draft is never followed by an accepted one
        own = verified.accepted[verified.rows_of(p)]
        assert own[0] and not (np.diff(own.astype(int)) > 0).any()


@needs_native
def test_reads_over_a_link_are_those_of_the_passes(directory):
    records = moejax.load(directory).store.layout.stride
    link = f"paced:{records / 20e3},10"
    runtime = moejax.load(directory, slots=5, context=128, policy="lru", link=link)
    trace = record.record(runtime, PROMPTS[:2], max_new_tokens=NEW)
    reads = trace.reads
    demanded = reads["kind"] == 0
    fetched = np.bincount(reads["run"][demanded], minlength=trace.passes)
    np.testing.assert_array_equal(fetched, trace.counts["fetched"].sum(axis=1))
    # What missed is what came, pass by pass.
    for p in range(trace.passes):
        rows = trace.rows_of(p)
        missed = np.argwhere(trace.outcome[rows] == Outcome.MISS)
        wanted = {8 * layer + trace.picks[rows][n, layer, k] for n, layer, k in missed}
        assert set(reads["expert"][reads["run"] == p].tolist()) == wanted
    begun, ended = trace.began[reads["run"]], (trace.began + trace.seconds)[reads["run"]]
    # The clocks of both are compared to a few microseconds.
    assert (reads["requested_us"] >= begun * 1e6 - 50).all()
    assert (reads["landed_us"] <= ended * 1e6 + 50).all()


@needs_native
@pytest.mark.parametrize(
    ("name", "batch", "numbers"),
    [
        ("balanced:load=1,host=1", 2, {"load_us", "host_us"}),
        ("auto:load=1,gamma=2", 1, LEARNED),
    ],
)
def test_what_a_run_learned_is_recorded_and_replayed(directory, tmp_path, name, batch, numbers):
    """Costs and rates by each pass, through a file: the replay decides in every layer alike."""
    runtime = moejax.load(directory, slots=5, context=128, policy=name, link="paced:0.001,50")
    keep = record.Keep(residency=True, full=True)
    options = {"max_new_tokens": NEW, "keep": keep, "batch": batch}
    record.record(runtime, PROMPTS, **options).save(tmp_path / "t.npz")
    trace = Trace.load(tmp_path / "t.npz")
    load = trace.counts["load_us"]
    assert load[0, 0] == 1 and load[-1, 0] > 50 and (load == load[:, :1]).all()
    assert {n for n in trace.counts if n.endswith("_us") or n == "rate"} == numbers
    asked = Asked(semantics="engine", check=True)
    [found] = simulate(trace, [name], [5], asked, keep=True)
    assert found.label == "exact" and found.total("host") > 0
    assert trace.about["policy"] == name
    for count in ("needed", "hits", "fetched", "prefetched", "host", "passes", "prefetch_used"):
        np.testing.assert_array_equal(found.counts[count], trace.counts[count], count)
    np.testing.assert_array_equal(found.resident, trace.resident)
    counts = {n: c for n, c in trace.counts.items() if n not in numbers}
    [without] = simulate(dataclasses.replace(trace, counts=counts), [name], [5], asked)
    assert without.label.startswith("open-loop, learns costs")
    assert without.total("host") != found.total("host")
    if "rate" in numbers:
        slow = trace.counts | {"rate": np.zeros_like(trace.counts["rate"])}
        [slow] = simulate(dataclasses.replace(trace, counts=slow), [name], [5], asked, keep=True)
        assert slow.total("prefetched") == 0 < found.total("prefetched")
    others = {
        "balanced:load=1,host=1": ("balanced:load=1,host=2", labels.OTHER_COSTS),
        "auto:load=1,gamma=2": ("auto:load=1,gamma=2,decay=0.5", labels.OTHER_WINDOWS),
    }
    other, label = others[name]
    for made, slots in ((other, 5), (name, 6)):
        made = dataclasses.replace(policy(made), capacity=np.int32(slots))
        assert labels.unknown(trace, made, False, found.counts) == label


@needs_native
def test_costs_that_no_file_holds_are_left_out_whole(directory, tmp_path):
    """Of a link that was free, the host's cost is infinite until an expert ran there."""
    name = "balanced:load=0,host=1"
    runtime = moejax.load(directory, slots=5, context=128, policy=name, link="paced:0.001,50")
    record.record(runtime, PROMPTS[:1], max_new_tokens=4).save(tmp_path / "t.npz")
    trace = Trace.load(tmp_path / "t.npz")
    assert "hits" in trace.counts and not {"load_us", "host_us"} & set(trace.counts)
    [found] = simulate(trace, [name], [5], ENGINE)
    assert found.label == labels.UNKNOWN_COSTS


def test_a_recording_says_whose_run_it_is(loaded):
    """By the numbers that ran, whatever name the policy was loaded by."""
    runtime = loaded("lookup:gamma=2")
    about = record.follow(loaded("lru"), [[1, 2, 3]], prompt=2).about
    assert about["policy"] == "lru" and about["capacity"] == 5 and about["per_layer"] is False
    assert about[runs.PARTS] == runs.parts_of(policy("lru"))
    made = dataclasses.replace(policy("lookup:gamma=1"), capacity=np.int32(4))
    changed = dataclasses.replace(runtime, policy=made)
    about = record.record(changed, [[1, 2, 3]], max_new_tokens=3).about
    assert about["policy"] is None and about["capacity"] == 4
    assert about[runs.PARTS] == runs.parts_of(made) != runs.parts_of(runtime.policy)


@needs_native
def test_windows_of_the_text_are_those_of_a_run_with_more_slots(loaded):
    """What a replay calls exact, against a real run with the budget that it was asked for."""
    options = {"max_new_tokens": 16, "keep": record.Keep(residency=True)}
    options |= {"sampling": {"temperature": 0.2}, "seed": 1}
    prompts = [[5, 6, 7, 8, 9, 5, 6, 7, 8, 9, 5, 6, 7], [3, 4, 3, 4, 3, 4]]
    name = "lookup:gamma=2"
    few, many = (record.record(loaded(name, slots=n), prompts, **options) for n in (5, 9))
    assert runs.drafted(few) and few.counts["hits"].sum() < many.counts["hits"].sum()
    replays = simulate(few, [name], [5, 9], ENGINE, keep=True)
    for trace, found in zip((few, many), replays, strict=True):
        assert found.label == "exact"
        np.testing.assert_array_equal(found.resident, trace.resident)
        for count in runs.COUNTED:
            np.testing.assert_array_equal(found.counts[count], trace.counts[count], count)


@needs_native
def test_drafts_are_recorded_token_by_token(loaded, tmp_path):
    """A self-draft runs those of its gate's best that are resident, before each verification."""
    runtime = loaded("self-draft:gamma=3")
    options = {"max_new_tokens": 16, "batch": 2, "seed": 2, "sampling": {"temperature": 0.3}}
    keep = record.Keep(residency=True, full=True, drafts=True)
    record.record(runtime, PROMPTS, **options, keep=keep).save(tmp_path / "t.npz")
    trace = Trace.load(tmp_path / "t.npz")
    phases = trace.pass_phases()
    check_counts(trace.of_passes(phases != Phase.DRAFT))
    kept, lost = 0, 0
    for p in np.flatnonzero(phases == Phase.DRAFT):
        window = next(v for v in range(p, trace.passes) if phases[v] == Phase.VERIFY)
        rows = trace.rows_of(window)
        fed = {
            (trace.sequence[r], trace.position[r]): (trace.token[r], trace.accepted[r], r)
            for r in range(rows.start, rows.stop)
        }
        place = p - max(v for v in range(p) if phases[v] != Phase.DRAFT) - 1
        for r in range(trace.rows_of(p).start, trace.rows_of(p).stop):
            *own, verified = fed[trace.sequence[r], trace.position[r]]
            assert own == [trace.token[r], trace.accepted[r]]
            # The first layer has yet lost nothing of what the model would have computed.
            np.testing.assert_allclose(trace.scores[r, 0], trace.scores[verified, 0], atol=1e-5)
            least = min(at for sequence, at in fed if sequence == trace.sequence[r])
            assert trace.position[r] == least + place
            kept, lost = kept + own[1], lost + (not own[1])
            for layer in range(trace.layers):
                best = np.argsort(-trace.scores[r, layer], kind="stable")[:2]
                there = {*best[trace.resident[p, layer][best]].tolist()}
                assert {*trace.picks[r, layer].tolist()} - {-1} == there
    verified = np.flatnonzero(phases == Phase.VERIFY)
    windows = trace.of_passes(phases == Phase.VERIFY)
    # All but the last draft of a sequence's window are drafted upon.
    sizes = sum(len(np.unique(windows.sequence[windows.rows_of(p)])) for p in range(len(verified)))
    assert kept + lost == windows.rows - sizes and kept > sizes and lost > 0

    plain = record.record(runtime, PROMPTS, **options, keep=dataclasses.replace(keep, drafts=False))
    own = trace.of_passes(phases != Phase.DRAFT)
    for name in ("sequence", "position", "run", "token", "accepted", "picks", "scores", "resident"):
        np.testing.assert_array_equal(getattr(own, name), getattr(plain, name), name)
    for asked, policies in ((Asked(), ["lru", "belady"]), (ENGINE, ["self-draft:gamma=3"])):
        for one, other in zip(
            *(simulate(t, policies, [5, 6], asked) for t in (trace, plain)), strict=True
        ):
            assert one.as_dict() == other.as_dict()
            own = asked is ENGINE and one.slots == 5
            assert own == (one.label == "exact")
    found, without = statistics(trace), statistics(plain)
    assert without.drafts is None and found.drafts.rows == kept + lost
    assert dataclasses.replace(found, drafts=None) == without


def test_drafts_of_another_kind_are_refused(loaded):
    for name in ("lru", "lookup"):
        with pytest.raises(PolicyError, match="only drafts that the model itself makes"):
            record.record(loaded(name), [[1, 2]], keep=record.Keep(drafts=True))


@pytest.mark.parametrize("first", [0, 1])
def test_outcomes_by_hand(first):
    """One token, one layer: experts 0 to 5 are hit, missed, prefetched, hosted, low, stand-in."""
    mask = np.eye(6, dtype=bool)
    resident = (mask[0] | mask[2] | mask[4] | mask[5])[None]
    picks = np.array([[[0, 1, 2, 3, 4, 5, -1]]])
    exact = np.array([[[0, 1, 2, 3, 4, 7, 8]]])
    found = outcomes(picks, exact, resident, mask[2:3], mask[3:4], mask[4:5])
    names = ("HIT", "MISS", "PREFETCHED", "HOST", "LOW", "SUBSTITUTE", "UNKNOWN")
    assert found[0, 0].tolist() == [Outcome[name] for name in names]


def test_what_cannot_be_recorded_is_refused(loaded, directory):
    runtime = loaded("lru")
    for texts in ([], "text", [[]], [[10**6]], [[1.5]]):
        with pytest.raises(InputError):
            record.record(runtime, texts, max_new_tokens=2)
    for options in ({"max_new_tokens": 0}, {"batch": 0}, {"seed": -1}, {"max_new_tokens": 500}):
        with pytest.raises(InputError):
            record.record(runtime, [[1]], **options)
    with pytest.raises(InputError, match="text 2 has 120 tokens"):
        record.record(runtime, [[1], [1] * 120], max_new_tokens=10)
    with pytest.raises(InputError, match="text 2 has 129 tokens"):
        record.follow(runtime, [[1], [1] * 129])
    with pytest.raises(InputError, match="8 experts"):
        record.record(runtime, [[1]], keep=record.Keep(scores=9))
    with pytest.raises(InputError, match="-1 scores"):
        record.Keep(scores=-1)
    with pytest.raises(InputError, match="prompt -1"):
        record.follow(runtime, [[1, 2]], prompt=-1)
    with pytest.raises(PolicyError, match="drafts"):
        record.follow(dataclasses.replace(runtime, policy=policy("lookup")), [[1, 2]])
    with pytest.raises(InputError, match="no experts"):
        record.record(dataclasses.replace(runtime, policy=None, store=None), [[1]])
    params = {**runtime.params, "final_norm": {"weight": runtime.params["final_norm"]["weight"]}}
    params["final_norm"]["weight"] = params["final_norm"]["weight"] * np.nan
    with pytest.raises(NonFiniteError):
        record.record(dataclasses.replace(runtime, params=params), [[1]], max_new_tokens=2)


def test_the_command_writes_what_it_recorded(directory, tmp_path):
    rows = [{"turns": [t, "more"], "x": 1} for t in ("abc", "hello there", "not this")]
    (tmp_path / "set.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    out, base = tmp_path / "trace.npz", ["--model", str(directory), "--slots", "5", "--json"]
    texts = ["--dataset", str(tmp_path / "set.jsonl"), "--field", "turns", "--limit", "2"]
    options = ["--tokens", "4", "--prompt-tokens", "2", "--top", "4", "--residency"]
    done = CliRunner().invoke(app, ["record", str(out), *texts, *options, *base])
    assert done.exit_code == 0, done.output
    said, trace = json.loads(done.stdout), Trace.load(out)
    assert said["rows"] == {"prefill": 4, "decode": trace.rows - 4} and said["bytes"] > 0
    assert sum(said["outcomes"].values()) == pytest.approx(1)
    page = pathlib.Path(trace_actions.__file__).parents[1] / "traces" / "page" / "table.js"
    kinds = page.read_text().partition("const OUTCOMES")[2].partition("];")[0]
    labels = re.findall(r'name: "(\w+)", label: "([^"]+)"', kinds)
    assert dict(labels) == trace_actions.OUTCOMES
    before = out.read_bytes()
    kept = CliRunner().invoke(app, ["record", str(out), *texts, *options, *base])
    assert kept.exit_code == 2 and f"{out} exists" in kept.stderr and "--force" in kept.stderr
    assert out.read_bytes() == before and kept.stderr.count("\n") == 1
    again = CliRunner().invoke(app, ["record", str(out), "--force", *texts, *options, *base[:-1]])
    assert "of all picks" in again.stderr and "miss, moved" in again.stderr
    assert trace.top_ids.shape[2] == 4 and trace.resident is not None
    assert trace.about["policy"] == "lru" and trace.about["virtual"] and trace.about["slots"] == 5
    assert trace.about["dataset"] == "set.jsonl" and trace.of_sequences(1).rows == 6
    for wrong in (
        ["--prompt-tokens", "3"],
        ["text", "--tokens", "3", "--temperature", "1"],
        ["--dataset", str(tmp_path / "set.jsonl"), "--field", "x"],
        ["--dataset", str(tmp_path / "none.txt")],
        ["--dataset", str(tmp_path / "set.csv")],
        ["--limit", "3"],
        ["text", "--drafts", "--policy", "lookup"],
    ):
        done = CliRunner().invoke(app, ["record", str(tmp_path / "no.npz"), *wrong, *base])
        assert done.exit_code == 2 and not (tmp_path / "no.npz").exists()
    done = CliRunner().invoke(app, ["record", str(tmp_path / "a" / "b.npz"), "text", *base])
    assert done.exit_code == 2 and "folder that exists" in done.stderr


def test_the_trace_that_is_shipped_is_of_the_embedded_model():
    path = ROOT / "experiments" / "traces" / "tiny_held_out.npz"
    trace = Trace.load(path)
    assert trace.rows > 20_000 and path.stat().st_size < record_traces.MOST_BYTES
    assert (path.parent / "README.md").read_text() == record_traces.readme(path, trace)
    runtime = moejax.load("tiny", slots=76, virtual=True, context=192)
    trace.check_model(runtime.config)
    first = trace.of_sequences(0)
    given = first.token[:192]
    again = record.follow(runtime, [given], keep=record.Keep(scores=record_traces.SCORES))
    # Other processors round differently.
    assert (again.picks == first.picks[:192]).mean() > 0.97
    assert (again.outcome == first.outcome[:192]).mean() > 0.97
    np.testing.assert_allclose(again.top_scores, first.top_scores[:192], atol=0.02)
