"""What a replay says of itself: whose windows and costs are in a trace, by header and counts."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from typer.testing import CliRunner

from moejax.cli import main as cli
from moejax.errors import InputError
from moejax.policies.placement import TwoPointer
from moejax.policies.policy import policy, policy_names
from moejax.policies.speculation import LookupDraft
from moejax.simulator import labels, runs
from moejax.simulator.simulate import Asked, simulate
from moejax.traces.trace import Outcome, Phase, Trace, concatenated

ENGINE = Asked(semantics="engine")
WINDOWS = "open-loop, windows of another drafter"
LAYERS, EXPERTS, PROMPT, SLOTS = 2, 6, 4, 8


def trace_of(windows, name=None, *, link=None, phase=Phase.VERIFY, slots=SLOTS, **about):
    """A prompt, then passes of so many tokens each, all but the first of each drafts."""
    rows = PROMPT + sum(windows)
    rng = np.random.default_rng(rows)
    weight = rng.gumbel(size=(rows, LAYERS, EXPERTS)) + np.linspace(0, 2, EXPERTS)
    scores = np.exp(weight) / np.exp(weight).sum(axis=2, keepdims=True)
    run = np.repeat(np.arange(1 + len(windows), dtype=np.int32), [PROMPT, *windows])
    place = np.arange(rows) - np.searchsorted(run, run)
    header = {"source": "moejax", "link": link} | about
    if name is not None:
        header |= {"policy": name, "capacity": slots, "per_layer": False}
        header["policy_parts"] = runs.parts_of(policy(name))
    return Trace(
        model="made up",
        experts=EXPERTS,
        sequence=np.zeros(rows, np.int32),
        position=np.arange(rows, dtype=np.int32),
        run=run,
        phase=np.where(run == 0, Phase.PREFILL, phase).astype(np.uint8),
        token=np.full(rows, -1, np.int32),
        accepted=(run == 0) | (place < 2),
        picks=np.argsort(-scores, axis=2)[:, :, :2].astype(np.int16),
        scores=scores.astype(np.float32),
        about=header,
    ).check()


def counted(trace, made, slots=SLOTS, **asked):
    """The trace with the counts of a run of this policy; of nothing else is the replay one."""
    [found] = simulate(trace, [made], [slots], dataclasses.replace(ENGINE, **asked))
    counts = {name: found.counts[name].astype(np.int32) for name in runs.COUNTED}
    return dataclasses.replace(trace, counts=trace.counts | counts)


def label_of(trace, made, slots=SLOTS, asked=ENGINE):
    return simulate(trace, [made], [slots], asked)[0].label


def told(trace, made, slots=SLOTS, per_layer=False):
    """The label of a replay that counted what the trace did."""
    made = dataclasses.replace(policy(made), capacity=jnp.int32(slots))
    return labels.replayed(trace, made, trace.counts, per_layer=per_layer, oracle=False)


def without(trace, *names):
    about = {name: value for name, value in trace.about.items() if name not in names}
    return dataclasses.replace(trace, about=about)


def test_windows_of_the_text_alone_are_those_of_any_budget():
    trace = trace_of([3, 1, 2, 3], "lookup:gamma=2")
    own, fewer = simulate(trace, ["lookup:gamma=2"], [SLOTS, SLOTS - 3], ENGINE)
    assert own.label == fewer.label == "exact" and own.hit_rate > fewer.hit_rate
    [other] = simulate(trace, ["lru"], [SLOTS], ENGINE)
    assert other.label == WINDOWS
    for other in ("lookup:gamma=3", "lookup:gamma=2,least=1", "self-draft:gamma=2", "lru"):
        assert told(trace, other) == WINDOWS
    parts = trace.about["policy_parts"] | {"speculation.tree": "2"}  # of a version to come
    later = dataclasses.replace(trace, about=trace.about | {"policy_parts": parts})
    assert told(later, "lookup:gamma=2") == WINDOWS
    for unsaid in ("policy_parts", "policy"):
        gone = without(trace, unsaid)
        assert (told(gone, "lookup:gamma=2") == "exact") == (unsaid == "policy")
    # Plain steps among the windows were made by somebody else.
    mixed = np.where(trace.run == 2, Phase.DECODE, trace.phase).astype(np.uint8)
    assert told(dataclasses.replace(trace, phase=mixed), "lookup:gamma=2") == WINDOWS


def test_single_accesses_and_bounds_say_whose_windows_they_are_over():
    trace, plain = trace_of([3, 1, 2], "lookup:gamma=2"), trace_of([1, 1], phase=Phase.DECODE)
    for asked in (ENGINE, Asked()):
        assert label_of(trace, "lfu", asked=asked) == WINDOWS
        assert label_of(plain, "lfu", asked=asked) == "exact"
        for name, label in labels.FUTURE.items():
            assert label_of(trace, name, asked=asked) == f"{label}, windows of a drafter"
            assert label_of(plain, name, asked=asked) == label


def test_windows_without_drafts_are_plain_steps():
    """A drafter that never found a draft did what a policy that has none does."""
    trace = trace_of([1, 1, 1], "lookup:gamma=2")
    assert told(trace, "lru") == told(trace, "lookup:gamma=2") == "exact"
    assert label_of(trace, "lru", asked=Asked()) == "exact"
    assert told(trace, "self-draft:gamma=2") == WINDOWS


@pytest.mark.parametrize("name", ["self-draft:gamma=2", "auto:gamma=2"])
def test_drafts_by_residents_are_of_their_own_run_only(name):
    trace = counted(trace_of([3, 1, 2, 3], name), name)
    assert label_of(trace, name) == told(trace, name) == "exact"
    assert told(trace, name, SLOTS - 1) == told(trace, name, per_layer=True) == WINDOWS
    for unsaid in ("policy_parts", "capacity", "per_layer"):
        assert told(without(trace, unsaid), name) == WINDOWS
    parts = trace.about["policy_parts"]
    for changed in (
        {"evictor": "moejax.policies.evictors.OfAnotherVersion"},
        {"evictor.more": "1"},
        {"speculation.max_length": "3"},
    ):
        about = trace.about | {"policy_parts": parts | changed}
        assert told(dataclasses.replace(trace, about=about), name) == WINDOWS


def test_runs_that_began_otherwise_are_others():
    """Of the same policy and budget: with residents, or a part of a run, or two."""
    name = "self-draft:gamma=2"
    trace = counted(trace_of([3, 1, 2, 3], name), name)
    for asked in ({"warm": "none"}, {"alone": True}):
        assert label_of(trace, name, asked=dataclasses.replace(ENGINE, **asked)) == WINDOWS
    hits = trace.counts["hits"] + (np.arange(trace.passes) == 0)[:, None].astype(np.int32)
    began = dataclasses.replace(trace, counts=trace.counts | {"hits": hits})
    for other in (began, trace.between(1, 5), concatenated([trace, trace])):
        assert label_of(other, name) == WINDOWS
    assert label_of(trace.between(0, 3), name) == "exact"  # how the run began
    # Residents after rounding may be others; where it began they are the same, if it is the run.
    scores = trace.scores.astype(np.float16)
    rounded, warm = (dataclasses.replace(t, scores=scores) for t in (trace, began))
    assert label_of(rounded, name) == "rounded scores" and label_of(warm, name) == WINDOWS


@pytest.mark.parametrize("name", ["balanced:load=1,host=1", "auto:gamma=0"])
def test_costs_are_of_their_own_run_only(name):
    costs = {"load_us", "host_us", "host_fixed_us", "host_token_us", "device_us", "rate"}
    names = costs if name.startswith("auto") else {"load_us", "host_us"}
    trace = trace_of([1] * 5, name, link="paced:1,1", phase=Phase.DECODE)
    numbers = {n: np.full((trace.passes, LAYERS), 3.0, np.float32) for n in names}
    trace = counted(dataclasses.replace(trace, counts=numbers), name)
    assert label_of(trace, name) == told(trace, name) == "exact"
    assert told(trace, name, SLOTS - 1) == labels.OTHER_COSTS
    more = {"balanced:load=1,host=1": "balanced:load=2,host=1"}.get(name, "auto:gamma=0,decay=0.5")
    assert label_of(trace, more) == labels.OTHER_COSTS
    assert told(trace, "lru") == told(trace, "score-window:window=3") == "exact"
    for unsaid in ("policy_parts", "capacity", "per_layer"):
        assert told(without(trace, unsaid), name) == labels.OTHER_COSTS
    # Numbers that are there were learned, whatever the header says of a link.
    assert told(without(trace, "link", "policy_parts"), name) == labels.OTHER_COSTS
    lacking = dataclasses.replace(trace, counts={n: trace.counts[n] for n in runs.COUNTED})
    assert told(lacking, name) == labels.UNKNOWN_COSTS
    assert told(without(lacking, "link"), name) == "exact"  # no link, so nothing to learn


def test_a_lossy_run_says_so_by_any_sign():
    trace = trace_of([1, 1], phase=Phase.DECODE)
    outcome = np.full(trace.picks.shape, Outcome.SUBSTITUTE, np.uint8)
    for signs in (
        {"about": trace.about | {"exact": False}},
        {"outcome": outcome},
        {"exact": trace.picks},
    ):
        run = dataclasses.replace(trace, **signs)
        for asked in (ENGINE, Asked()):
            assert label_of(run, "lru", asked=asked) == labels.LOSSY_RUN
            assert label_of(run, "optimal", asked=asked) == "bound, the run was lossy"


def test_lossy_drafts_are_of_their_own_run_only():
    name = "auto-lossy:gamma=2,alpha=0"
    trace = trace_of([3, 1, 2], name)
    trace = counted(dataclasses.replace(trace, exact=trace.picks), name)
    assert label_of(trace, name) == "closed-loop"
    assert label_of(without(trace, "policy_parts"), name).startswith(WINDOWS)


def test_traces_are_joined_under_what_they_have_alike():
    one, other = trace_of([2, 1], "lookup:gamma=1"), trace_of([2, 1], "lookup:gamma=2")
    assert concatenated([one, one]).about == one.about
    both = concatenated([one, other])
    assert "policy_parts" not in both.about and both.about["capacity"] == SLOTS
    assert told(concatenated([one, one]), "lookup:gamma=1") == "exact"
    assert told(both, "lookup:gamma=1") == WINDOWS
    exact, lossy = (dataclasses.replace(one, about={"exact": said}) for said in (True, False))
    for parts in ([exact, lossy], [lossy, exact], [dataclasses.replace(one, about={}), lossy]):
        assert concatenated(parts).replaced
    assert not concatenated([exact, exact]).replaced


WRONG = {
    "capacity": ("8", True, 0, 1.5, [8]),
    "per_layer": ("no", 1, []),
    "exact": ("no", 0),
    "policy_parts": ("lru", [1], {"evictor": 3}, {"evictor": {"n": "1"}}),
    "policy": (3, ["lru"]),
}


@pytest.mark.parametrize("name", WRONG)
def test_headers_that_cannot_be_are_refused(name):
    trace = trace_of([1, 1])
    for value in WRONG[name]:
        with pytest.raises(InputError, match=f"{name} (.* )?of a trace"):
            dataclasses.replace(trace, about=trace.about | {name: value}).check()


def test_parts_tell_policies_apart():
    """Of all presets, by one number more or less; numbers are alike as programs read them."""
    found = {name: runs.parts_of(policy(name)) for name in policy_names()}
    assert len({json.dumps(parts) for parts in found.values()}) == len(found)
    plain, other = policy("balanced:load=1"), policy("balanced:load=2")
    assert runs.parts_of(plain) != runs.parts_of(other)
    python = dataclasses.replace(plain, placement=TwoPointer(load=0.1, host=1.0))
    assert runs.parts_of(python) == runs.parts_of(policy("balanced:load=0.1"))
    assert runs.parts_of(plain) == runs.parts_of(dataclasses.replace(plain, capacity=3))
    assert runs.name_of(plain, "balanced:load=1") == "balanced:load=1"
    assert runs.name_of(plain, "lru") is runs.name_of(plain, "nobody") is None
    assert runs.name_of(plain, None) is None
    # Distances are the model's: a policy has them from its loading on.
    made = policy("specmoe")
    router = dataclasses.replace(made.speculation.draft.router, distance=jnp.ones((2, 3, 3)))
    draft = dataclasses.replace(made.speculation.draft, router=router)
    ran = dataclasses.replace(made, speculation=dataclasses.replace(made.speculation, draft=draft))
    assert runs.name_of(ran, "specmoe") == "specmoe" != runs.name_of(ran, "specmoe:gamma=2")
    own = dataclasses.replace(made.speculation, draft=LookupDraft(least=2))
    assert runs.name_of(dataclasses.replace(made, speculation=own), "specmoe") is None


def test_the_command_says_it_too(tmp_path):
    path, trace = tmp_path / "trace.npz", trace_of([3, 1, 2])
    times = {"began": np.arange(trace.passes) * 1.0, "seconds": np.full(trace.passes, 0.5)}
    dataclasses.replace(trace, **times).save(path)
    given = ["simulate", str(path), "--policy", "lru", "--slots", "8"]
    done = CliRunner().invoke(cli.app, [*given, "--semantics", "engine", "--json"])
    assert done.exit_code == 0 and json.loads(done.stdout)["rows"][0]["label"] == WINDOWS
    done = CliRunner().invoke(cli.app, given, env={"COLUMNS": "200"})
    assert done.exit_code == 0 and WINDOWS in done.stdout
    for command in (["trace", "view"], ["trace", "perfetto"]):
        made = CliRunner().invoke(cli.app, [*command, str(path), str(tmp_path / command[1])])
        assert made.exit_code == 0, made.output
