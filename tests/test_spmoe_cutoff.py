"""SP-MoE's cutoff: the simulation against a clock that ticks, counts by hand, one small run."""

import argparse
import json
import lzma
import pathlib
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import moejax

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from experiments import (  # noqa: E402
    held_out,
    smoe_common,
    spmoe_cutoff,
    spmoe_quality,
    spmoe_simulation,
)
from experiments.spmoe_cutoff import Window  # noqa: E402
from experiments.spmoe_simulation import Costs, Profile, simulate  # noqa: E402
from moejax.kernels import build  # noqa: E402


class Clock:
    """The simulation's rules at whole times, one after another."""

    def __init__(self, windows, predicted, cutoff, slots, costs, cancels):
        self.windows, self.predicted, self.cutoff = windows, predicted, cutoff
        self.slots, self.costs, self.cancels = slots, costs, cancels
        self.seats, self.lands = [], {}  # least recently used first
        self.queue, self.demands, self.running = [], [], []
        self.link_free = self.missed = self.prefetched = self.stall = 0

    def run(self):
        now, verification = 0, self.verification()
        waiting = next(verification)
        while True:
            try:
                while waiting(now):
                    waiting = verification.send(now)
            except StopIteration:
                return now
            self.move(now)
            now += 1

    def verification(self):
        now = yield lambda t: True
        for window, guess in zip(self.windows, self.predicted, strict=True):
            drafts, layers, _ = guess.shape
            self.running, begun, known = [], now, set(self.queue)
            for t in range(begun + 1, begun + drafts * self.costs.draft + 1):
                now = yield lambda at, t=t: at >= t
                place, rest = divmod((t - begun) * layers, self.costs.draft)
                if rest:
                    continue
                token, layer = divmod(place - 1, layers)
                for expert in guess[token, layer] if layer <= self.cutoff else []:
                    if expert not in known:
                        known.add(expert)
                        self.queue.append(expert)
            for layer in range(layers):
                needed = []
                for expert in window[:, layer].ravel():
                    if expert not in needed:
                        needed.append(expert)
                drop = set(needed) | (set(guess[:, layer].ravel()) if self.cancels else set())
                self.queue = [e for e in self.queue if e not in drop]
                self.running, start = needed, now
                for expert in needed:
                    if expert in self.seats:
                        self.seats.remove(expert)
                        self.seats.append(expert)
                    else:
                        self.demands.append(expert)
                self.missed += len(self.demands)
                now = yield lambda t, n=needed: all(self.lands.get(e, t + 1) <= t for e in n)
                self.stall += now - start
                until = now + self.costs.layer
                now = yield lambda t, until=until: t >= until

    def seated(self, expert, now):
        if len(self.seats) == self.slots:
            idle = [e for e in self.seats if e not in self.running and self.lands[e] <= now]
            if not idle:
                return False
            self.seats.remove(idle[0])
            del self.lands[idle[0]]
        self.seats.append(expert)
        self.lands[expert] = 10**9
        return True

    def move(self, now):
        if now < self.link_free:
            return
        urgent = bool(self.demands)
        source, taken = (self.demands if urgent else self.queue), []
        while source and len(taken) < self.costs.batch:
            expert = source.pop(0)
            if expert not in self.seats and self.seated(expert, now):
                taken.append(expert)
        if taken:
            self.link_free = now + self.costs.latency
            for expert in taken:
                self.link_free += self.costs.record
                self.lands[expert] = self.link_free
        self.prefetched += 0 if urgent else len(taken)


@st.composite
def runs(draw):
    layers, width, cycles, k, experts = draw(st.integers(1, 3)), 3, 4, 2, 6
    seed = draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)

    def picks(tokens):
        found = [rng.permutation(experts)[:k] for _ in range(cycles * tokens * layers)]
        own = np.stack(found).reshape(cycles, tokens, layers, k)
        return own + np.arange(layers)[:, None] * experts

    windows, predicted = picks(width), picks(width - 1)
    if draw(st.booleans()):
        predicted = windows[:, :-1].copy()
    costs = Costs(
        record=draw(st.integers(1, 5)),
        draft=layers * draw(st.integers(1, 8)),
        layer=draw(st.integers(1, 6)),
        latency=draw(st.integers(0, 4)),
        batch=draw(st.integers(1, 4)),
    )
    slots = draw(st.integers(10, 20))
    return windows, predicted, draw(st.integers(-1, layers - 1)), slots, costs, draw(st.booleans())


@given(runs())
def test_the_simulation_follows_the_clock(run):
    *fixed, cancels = run
    clock = Clock(*run)
    total = clock.run()
    found = simulate(*fixed, cancels=cancels)
    cycles = len(run[0])
    assert found.cycle_ms * cycles == pytest.approx(total)
    assert found.stall_ms * cycles == pytest.approx(clock.stall)
    assert found.profile.missed.sum() == clock.missed
    assert found.profile.prefetched == clock.prefetched


def one_layer(*picks):
    """Windows [C, W, 1, 1] of tokens that pick one expert each."""
    return np.array(picks)[:, :, None, None]


def test_what_a_prefetch_hides():
    windows, costs = one_layer([0, 1], [2, 2], [0, 0]), Costs(record=4.0, draft=3.0, layer=2.0)
    guess = windows[:, :1]
    none = simulate(windows, guess, -1, 6, costs)
    # three drafts and layers, three records; the last window finds its expert there
    assert none.cycle_ms * 3 == 3 * 5 + 12 and none.profile.missed.tolist() == [3]
    assert none.profile.absent.tolist() == [3]
    assert (none.profile.asked.tolist(), none.profile.right.tolist()) == ([2], [2])
    assert none.profile.empty == 6 + 4 + 3
    every = simulate(windows, guess, 0, 6, costs)
    # 0 is asked for as the draft ends: demand goes first, and it is demand by then
    assert every.cycle_ms == none.cycle_ms and every.profile.prefetched == 0
    ahead = simulate(one_layer([0, 0, 1]), one_layer([0, 1]), 0, 6, costs)
    assert ahead.cycle_ms == 6 + (3 + 4 - 6) + 4 + 2  # 1 is asked for when the draft ends
    assert (ahead.profile.prefetched, ahead.profile.used) == (1, 1)
    assert ahead.stall_ms == 5


def test_a_draft_may_take_the_slots_of_the_layer_before_it():
    windows = np.array([[[0, 1]] * 3, [[2, 3]] * 3])[:, :, None]
    found = simulate(windows, windows[:, :2], 0, 3, Costs(record=1.0, draft=9.0))
    assert found.profile.prefetched == 4 and found.stall_ms == 0


def test_warm_experts_are_the_last_used():
    windows = one_layer([1, 2])
    found = simulate(windows, windows[:, :1], -1, 2, Costs(1.0), warm=[2, 1, 0, 1])
    assert found.profile.missed.tolist() == [1]  # 0 and 1 are there
    with pytest.raises(ValueError, match="too few"):
        simulate(one_layer([0, 1, 2]), one_layer([0, 1]), -1, 2, Costs(1.0))


def test_reading_a_trace(tmp_path):
    lines = ["# preamble", "turn,phase,step,layer,slot,expert,weight,residency,expert_bytes"]
    lines += [
        "0,0,0,0,0,5,.6,0,9",
        "0,0,0,0,1,7,.4,0,9",
        "0,1,1,0,0,3,.9,1,0",
        "0,1,1,0,1,4,.1,1,0",
    ]
    lines += ["0,1,1,1,0,9,.9,1,0", "0,1,1,1,1,0,.1,1,0"]
    path = tmp_path / "trace.csv.xz"
    path.write_bytes(lzma.compress("\n".join(lines).encode()))
    prompt, decode = spmoe_simulation.read_trace(path)
    assert prompt.tolist() == [[[5, 7], [-1, -1]]]
    assert decode.tolist() == [[[3, 4], [137, 128]]]
    assert spmoe_simulation.windows_of(np.zeros((7, 2, 3)), 3).shape == (2, 3, 2, 3)


def test_guesses_are_as_good_as_they_say():
    rng = np.random.default_rng(0)
    picks = np.stack([rng.permutation(16)[:4] for _ in range(60 * 3 * 2)]).reshape(60, 3, 2, 4)
    windows = picks + np.array([0, 16])[:, None]
    quality = np.array([0.3, 0.8])
    found = spmoe_simulation.guesses(windows, quality, 16, 1)
    assert found.shape == (60, 2, 2, 4)
    right = (found == windows[:, :-1]).mean(axis=(0, 1, 3))
    assert right == pytest.approx(quality, abs=0.08)
    wrong = found[found != windows[:, :-1]]
    assert (
        not (found[..., None] == windows[:, :-1][..., None, :])
        .any(-1)[found != windows[:, :-1]]
        .any()
    )
    assert len(wrong) and set(np.unique(found[:, :, 1] // 16)) == {1}
    sure = spmoe_simulation.guesses(windows, np.ones(2), 16, 1)
    assert (sure == windows[:, :-1]).all()


def profile_of(**changes):
    parts = {"missed": [4.0, 2.0], "absent": [4.0, 2.0], "asked": [4.0, 0.0], "right": [2.0, 0.0]}
    arrays = {name: np.array(changes.pop(name, value)) for name, value in parts.items()}
    return Profile(**({"cycles": 2} | arrays | changes))


def test_what_the_model_is_given():
    none = profile_of(empty=6)
    every = profile_of(missed=[3.5, 2.0], prefetched=4, used=2)
    # per cycle: 3 missed, of which 1 was served; 2.75 are left: 0.75 more, for 2 records
    assert every.reuse_after(none) == pytest.approx(0.375)
    assert none.reuse_after(none) == 0.0
    assert profile_of(missed=[0.0, 0.0], prefetched=4).reuse_after(none) == 0.0  # never less
    found = spmoe_simulation.modelled(none, every, Costs(0.5, draft=2.0, layer=0.25), 3)
    assert found["missing"] == [2.0, 1.0] and found["reuse"] == pytest.approx(0.375)
    assert found["precision"] == [0.5, 0.0] and found["recall"] == [0.5, 0.0]
    assert (found["free"], found["draft_ms"], found["record_ms"]) == (3.0, 6.0, 0.5)
    assert found["cycle_ms"][0] == pytest.approx(6 + 2 * 0.25 + 3 * 0.5)
    # 2 of layer 0's records fit the draft: half of what is missing; no slot is lost to them
    assert found["cycle_ms"][1] == pytest.approx(6 + 2 * 0.25 + 2 * 0.5)
    assert found["best_cutoff"] == 0


def test_simulated_and_modelled_agree_where_nothing_is_in_doubt():
    """Two layers of two experts each, always predicted and never there; the link has time."""
    cycles, slots = 6, 4
    windows = np.arange(cycles * 4).reshape(cycles, 1, 2, 2)
    windows = np.repeat(windows, 2, axis=1)
    costs = Costs(record=1.0, draft=8.0, layer=1.0)
    runs = [simulate(windows, windows[:, :1], c, slots, costs) for c in (-1, 0, 1)]
    model = spmoe_simulation.modelled(runs[0].profile, runs[2].profile, costs, 1)
    assert runs[0].cycle_ms == model["cycle_ms"][0] == 8 + 2 + 4
    # in truth layer 0 is known only after half of the draft, layer 1 at its end
    assert model["cycle_ms"][1:] == [12.0, 10.0]
    assert [r.cycle_ms for r in runs[1:]] == [12.0, 11.0]


def window_of(**changes):
    parts = {
        "resident": np.array([[1, 0, 0, 0], [0, 0, 0, 0]], bool),
        "predicted": np.array([[1, 1, 1, 0], [0, 1, 0, 1]], bool),
        # layer 0: kept tokens pick 0 and 1, the rejected one 2; layer 1: 3, 3, and 1
        "picks": np.array([[[0], [1], [2], [-1]], [[3], [3], [1], [-1]]]),
        "kept": 2,
        "missed": np.array([2, 2]),
        "empty": 1,
        "prefetched": 4,
        "used": 3,
    }
    return Window(**(parts | changes))


def test_what_became_of_prefetched_records():
    window = window_of()
    kept, rejected = window.needed
    assert kept.tolist() == [[True, True, False, False], [False, False, False, True]]
    assert rejected.tolist() == [[False, False, True, False], [False, True, False, False]]
    other = window_of(kept=3, predicted=np.array([[1, 0, 1, 1], [0] * 4], bool))
    total, first, second = spmoe_cutoff.wasted([window, other])
    assert (total["layer"], first["layer"], second["layer"]) == ("all", 0, 1)
    assert first["asked_per_cycle"] == 2 and second["asked_per_cycle"] == 1
    # layer 0: 1 kept and 2 rejected, then 2 kept and 3 unused
    assert first["kept_share"] == 0.5
    assert first["rejected_share"] == first["unused_share"] == 0.25
    assert first["rejected_share_of_used"] == pytest.approx(1 / 3)
    assert second["rejected_share"] == 0.5 and second["unused_share"] == 0
    assert total["rejected_share"] == pytest.approx(2 / 6)
    assert (total["prefetched_per_cycle"], total["use"]) == (4, 0.75)
    both = window_of(picks=np.array([[[1], [1], [1], [-1]]] * 2))
    assert spmoe_cutoff.wasted([both])[0]["rejected_share"] == 0
    # absent: 1 and 2 in layer 0, 1 and 3 in layer 1, twice
    assert first["recalled"] == 3 / 4 and second["recalled"] == 2 / 4


def test_profiles_count_what_the_draft_could_do():
    found = spmoe_cutoff.profiled([window_of(), window_of(missed=np.array([1, 0]))])
    assert (found.cycles, found.prefetched, found.used, found.empty) == (2, 8, 6, 2)
    assert found.missed.tolist() == [3, 2]
    assert found.absent.tolist() == [4, 4]
    assert found.asked.tolist() == [4, 4] and found.right.tolist() == [4, 4]


def test_comparing_states_and_scores():
    own = np.array([[[1.0, 0.0], [0.0, 2.0]]])
    exact = np.array([[[3.0, 0.0], [1.0, 1.0]]])
    scores = np.array([[[0.5, 0.3, 0.2], [0.1, 0.2, 0.7]]])
    wanted = np.array([[[0.5, 0.2, 0.3], [0.5, 0.1, 0.4]]])
    cosine, top1, coverage = spmoe_quality.compared(own, exact, scores, wanted, 2)
    assert cosine[0] == pytest.approx([1, 0.5**0.5])
    assert top1.tolist() == [[1, 0]] and coverage.tolist() == [[0.5, 0.5]]
    parts = [np.stack([cosine, top1, coverage])] * 2
    total, layer = spmoe_quality.quality_rows("draft model", "draft", parts, "")
    assert (total["layer"], layer["layer"], layer["top1"]) == ("all", 0, 0.5)
    assert {total["source"], total["norm"], total["part"]} == {"draft model", "draft", "predictor"}


def test_the_gate_gives_the_recorded_scores():
    runtime = moejax.load("tiny", virtual=True)
    tokens = np.arange(40, 56)[None]
    options = {"hidden": "raw", "scores": True}
    _, out = runtime.decode_step(runtime.init_state(1, context=16), tokens, **options)
    x = spmoe_quality.normed(
        runtime.params, np.asarray(out.hidden, np.float64), runtime.config.norm_eps
    )
    found = spmoe_quality.gate_scores(runtime.params, x)
    assert found == pytest.approx(np.asarray(out.trace.scores), abs=1e-5)
    assert np.ptp(found) > 0.1


def rows_of_cutoffs(tpot):
    names = ("missed", "moved_bytes", "prefetched", "prefetch_used", "late")
    fixed = {"draft_length": 4.0, "tokens_per_cycle": 2.0, "stall_seconds": 0.5, "tpot_spread": 0.1}
    fixed |= {"ttft": 1.0, "ttft_spread": 0.0, "acceptance": 0.25} | dict.fromkeys(names, 0.0)
    return [
        spmoe_cutoff.row_of(
            spmoe_cutoff.Case("sp-moe", "standard", i - 1), [{**fixed, "tpot": value}]
        )
        for i, value in enumerate(tpot)
    ]


def test_a_curve_and_its_judgement():
    rows = rows_of_cutoffs([5.0, 4.0, 4.0])
    assert rows[0]["tpot_ms"] == 5000 and rows[0]["stall_ms"] == 500
    lru = {"tpot_ms": 6000.0}
    seen = profile_of(), profile_of(missed=[2.0, 2.0], prefetched=4, used=2)
    curve = spmoe_cutoff.curve_of(rows, lru, seen, verify=3000.0, record=100.0)
    # a cycle makes 2 tokens and computes for 9 s, of which 3 are verification
    assert curve["model"]["draft_ms"] == pytest.approx(6000)
    assert curve["model"]["layer_ms"] == pytest.approx(1500)
    assert curve["model_tpot_ms"][0] == pytest.approx((6000 + 3000 + 3 * 100) / 2)
    assert (curve["best_cutoff"], curve["best_cutoff_model"]) == (0, 0)
    assert curve["level_with_best"] == [0, 1] and curve["tpot_ms_at_model"] == 4000
    targets = spmoe_cutoff.judge([curve])
    assert targets["best over none, engine"] == {"value": 0.8, "at_most": 0.99, "met": True}
    assert not targets["best over all layers, engine"]["met"]
    assert targets["model's over best, engine"]["value"] == 1
    assert targets["best over LRU, engine"]["met"] and len(targets) == 4


@pytest.mark.skipif(not held_out.DATA.is_dir(), reason=f"no held-out text at {held_out.DATA}")
@pytest.mark.skipif(build.library() is None, reason="links need the native library")
def test_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(spmoe_cutoff, "PRESETS", {"sp-moe": 1})
    monkeypatch.setattr(spmoe_cutoff, "LINKS", {"standard": 159.0})
    monkeypatch.setattr(spmoe_quality, "self_quality", lambda *_: [])
    sizes = {"windows": 1, "tokens": 16, "rounds": 1, "new": 6, "step": 24, "seed": 0}
    options = argparse.Namespace(data=held_out.DATA, **sizes)
    report = spmoe_cutoff.measure(options)
    assert set(report["summary"]) == {"best_cutoff_measured", "best_cutoff_model"}
    assert all(-1 <= value <= 5 for value in report["summary"].values())
    rows = json.loads(json.dumps(report))["rows"]
    total = spmoe_cutoff.find(rows, "predictor", norm="target", layer="all")
    assert 0.5 < total["cosine"] <= 1 and 0.2 < total["coverage"] <= 1
    waste = spmoe_cutoff.find(rows, "waste", layer="all")
    shares = [waste[name] for name in ("kept_share", "rejected_share", "unused_share")]
    assert sum(shares) == pytest.approx(1)
    curve = spmoe_cutoff.find(rows, "cutoff", preset="sp-moe")
    assert curve["cutoffs"] == [-1, 0, 1, 2, 3, 4, 5] and len(curve["model_tpot_ms"]) == 7
    assert curve["model"]["record_ms"] == pytest.approx(0.159, rel=0.02)
    none, every = (spmoe_cutoff.find(rows, "engine", cutoff=c) for c in (-1, 5))
    assert none["prefetched"] == 0 < every["prefetched"]
    assert none["tokens_per_cycle"] == every["tokens_per_cycle"]  # prefetch changes no token
    if (held_out.DATA / spmoe_simulation.TRACE).is_file():
        assert len([row for row in rows if row["part"] == "trace"]) == 18
    spmoe_cutoff.plot(report, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_a_missing_trace_is_said(tmp_path):
    rows, why = spmoe_simulation.sweep(tmp_path, np.ones(6), 1, 0)
    assert rows == [] and str(tmp_path) in why


def test_options_have_a_small_form():
    assert set(spmoe_cutoff.QUICK) == set(spmoe_cutoff.FULL)
    assert spmoe_cutoff.FULL["tokens"] <= held_out.LENGTH
    assert spmoe_cutoff.FULL["new"] + smoe_common.PROMPT <= held_out.LENGTH
