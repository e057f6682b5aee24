"""Intervals over rounds, prompts and windows, and what the frontier's record makes of them."""

import itertools
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from experiments import (  # noqa: E402
    environment,
    frontier_lossy,
    intervals,
    smoe_common,
    speculation_frontier,
)


@given(
    rounds=st.integers(1, 5),
    prompts=st.integers(1, 6),
    seed=st.integers(0, 99),
)
@settings(max_examples=25, deadline=None)
def test_rounds_and_prompts_are_drawn_for_all_systems_alike(rounds, prompts, seed):
    rng = np.random.default_rng(seed)
    times = rng.uniform(1, 2, (rounds, prompts))
    own, twice = intervals.by_round([times, 2 * times], seed, draws=50)
    assert own.shape == (51, rounds)
    np.testing.assert_allclose(own[0], times.mean(axis=1))
    np.testing.assert_allclose(twice, 2 * own)
    # Every drawn number is a mean of one round over one draw of the prompts, the same in a draw.
    draws = list(itertools.combinations_with_replacement(range(prompts), prompts))[:500]
    means = np.array([times[:, list(draw)].mean(axis=1) for draw in draws])
    for row in own[1:11] if len(draws) < 500 else ():
        fits = [np.isclose(row[:, None], known[None]).any(axis=1).all() for known in means]
        assert any(fits)


def test_a_ratio_within_rounds_does_not_hear_the_noise_of_rounds():
    rng = np.random.default_rng(0)
    prompts, noise = rng.uniform(1, 3, 8), rng.uniform(0.5, 2, (6, 1))
    other = noise * prompts
    value, (low, high) = intervals.paired(intervals.ratio, 1.05 * other, other)
    assert (value, low, high) == pytest.approx((1.05, 1.05, 1.05))
    value, (low, high) = intervals.paired(intervals.change, 1.05 * other, other)
    assert (value, low, high) == pytest.approx((0.05, 0.05, 0.05))
    value, (low, high) = intervals.paired(intervals.gap_closed, 3 * other, 2 * other, other)
    assert (value, low, high) == pytest.approx((0.5, 0.5, 0.5))
    assert intervals.paired(intervals.gap_closed, other, other, other) == (None, None)
    few = np.full((3, 2), 2.0)
    assert intervals.paired(intervals.ratio, few, few / 2) == (2.0, None)


def test_intervals_hold_the_ratio_they_are_about():
    rng, inside = np.random.default_rng(0), 0
    for seed in range(100):
        prompts = np.exp(rng.normal(0, 0.5, 8))
        own, other = (prompts * np.exp(rng.normal(0, 0.05, (4, 8))) for _ in range(2))
        _, (low, high) = intervals.paired(intervals.ratio, 0.9 * own, other, seed=seed)
        inside += low <= 0.9 <= high
    assert inside >= 85


def test_windows_are_drawn_within_their_domains():
    groups = [0, 0, 0, 1, 1]
    level = [1.0, 1.0, 1.0, 6.0, 6.0]
    values = [level, [0, 3, 0, 5, 5]]
    found = intervals.windows(values, groups, seed=3)
    np.testing.assert_allclose(found[0], 3.0)
    assert found[1, 0] == pytest.approx(13 / 5)
    possible = [(1.5 * sum(draw) + 10) / 5 for draw in itertools.product((0, 3, 0), repeat=2)]
    assert set(np.round(found[1, 1:], 9)) == set(np.round(possible, 9))
    # Two windows of one domain: the draws vary as the mean of two does, not half as much.
    drawn = intervals.windows([[0.0, 2.0]], [0, 0], draws=4000)[0, 1:]
    assert drawn.var() == pytest.approx(np.var([0.0, 2.0], ddof=1) / 2, rel=0.05)
    alone = intervals.windows([[1.0, 2.0, 3.0]], [0, 0, 1])[0]
    assert alone[0] == 2 and intervals.interval(alone[1:]) is None


def row_of(name, share, times, gamma="", **others):
    times = np.asarray(times, float)
    median = float(np.median(times.mean(axis=1)))
    return {
        "name": name,
        "residency": share,
        "gamma": gamma,
        "tpot_ms": median,
        "times_ms": times.tolist(),
    } | others


def test_auto_is_compared_with_the_best_preset_round_by_round():
    base = np.array([[1.0, 2.0], [2.0, 4.0], [1.5, 3.0], [1.2, 2.4]])
    rows = [
        row_of("lru", 0.5, 3 * base),
        row_of("host", 0.5, 2 * base),
        row_of("host", 0.5, 0.1 * base, gamma=2),
        row_of("auto:gamma=0", 0.5, 0.5 * base),
        row_of("auto", 0.5, 2.1 * base),
        row_of("all resident", 1.0, base),
    ]
    summary = speculation_frontier.exact_summary(rows, (0.25, 0.5))
    assert summary["best_preset"] == {"0.5": "host"}
    assert summary["exact_over_best_preset"] == {"0.5": pytest.approx(1.05)}
    assert summary["exact_over_best_preset_interval"]["0.5"] == pytest.approx([1.05, 1.05])
    assert summary["exact_gap_closed"] == {"0.5": pytest.approx(0.45)}
    assert summary["exact_gap_closed_interval"]["0.5"] == pytest.approx([0.45, 0.45])


def lossy_rows(rng, noise=0.0):
    """Ours has kl = alpha and 10 - alpha missed, SMoE 12 - 2 alpha; times twice as many."""

    def of(name, alpha, number):
        spread = 1 + noise * rng.normal(size=4)
        return row_of(
            *(name, 0.5, 2 * number * np.ones((4, 3))),
            alpha=alpha,
            kl=alpha,
            perplexity_over_exact=1 + alpha / 100,
            kl_by_window=[alpha] * 4,
            missed_by_window=(number * spread).tolist(),
            moved_by_window=(number * spread).tolist(),
        )

    rows = [of("auto-lossy", a, 10 - a) for a in (0.5, 2.0, 4.0)]
    for name in ("smoe", frontier_lossy.NO_PREFETCH):
        rows += [of(name, a, 12 - 2 * a) for a in (0.1, 1.0, 3.0)]
    rows += [row_of("lru", 0.5, np.full((4, 3), 40.0), alpha="")]
    return [*rows, row_of("all resident", 1.0, np.full((4, 3), 10.0), alpha="")]


def test_systems_are_compared_where_their_divergence_is_equal():
    domain = [0, 0, 1, 1]
    summary = frontier_lossy.lossy_summary(lossy_rows(np.random.default_rng(0)), domain)
    expected = np.mean([9 / 10, 7 / 6])  # at a divergence of 1 and 3; ours does not reach 0.1
    for name in ("missed_bytes", "moved_bytes", "tpot"):
        assert summary[f"{name}_over_smoe_at_equal_kl"] == pytest.approx(expected)
        ends = summary[f"{name}_over_smoe_at_equal_kl_interval"]
        assert ends == pytest.approx([expected] * 2)
    # Within 1 % of perplexity is alpha 0.5 alone: 19 ms between 40 and 10.
    assert summary["lossy_gap_closed"] == pytest.approx(0.7)
    assert summary["lossy_gap_closed_interval"] == pytest.approx([0.7, 0.7])
    rows = lossy_rows(np.random.default_rng(0), noise=0.05)
    low, high = frontier_lossy.lossy_summary(rows, domain)[
        "missed_bytes_over_smoe_at_equal_kl_interval"
    ]
    assert low < high and low < expected < high
    far = [row | {"kl_by_window": [9.0] * 4} if row["name"] == "smoe" else row for row in rows]
    summary = frontier_lossy.lossy_summary(far, domain)
    assert summary["tpot_over_smoe_at_equal_kl"] is None
    assert summary["tpot_over_smoe_at_equal_kl_interval"] is None


def test_a_verdict_says_what_its_intervals_leave_open():
    values = {"a": 0.5, "b": 0.6, "c": 0.6, "d": 0.5, "e": None}
    ends = {"a": [0.4, 0.6], "b": [0.45, 0.7], "c": [0.55, 0.7], "d": [0.4, 0.5], "e": [0, 1]}
    targets = smoe_common.judged(values, dict.fromkeys(values, 0.5), ends)
    assert {name: t.get("undecided") for name, t in targets.items()} == {
        **{"a": True, "b": True, "c": False, "d": False, "e": None}
    }
    assert smoe_common.verdict(targets) == "fails: c, e; undecided: a, b"
    assert smoe_common.verdict({"a": targets["a"]}) == "undecided: a"
    assert smoe_common.verdict({"d": targets["d"]}) == "holds"


def test_targets_of_the_frontier_turn_gaps_and_their_intervals():
    summary = {
        "exact_gap_closed": {"0.5": 0.7},
        "exact_gap_closed_interval": {"0.5": [0.3, 0.8]},
        "exact_over_best_preset": {"0.5": 1.0},
        "exact_over_best_preset_interval": {"0.5": [0.99, 1.01]},
        "lossy_gap_closed": None,
        "lossy_gap_closed_interval": None,
        "missed_bytes_over_smoe_at_equal_kl": 0.8,
        "missed_bytes_over_smoe_at_equal_kl_interval": None,
    }
    targets = speculation_frontier.targets_of(summary)
    assert targets["gap left 0.5"]["interval"] == pytest.approx([0.2, 0.7])
    assert smoe_common.verdict(targets) == "fails: lossy gap left; undecided: gap left 0.5"


@pytest.fixture
def clone(tmp_path):
    def git(*arguments):
        command = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.c"]
        subprocess.run([*command, *arguments], check=True, capture_output=True)

    for name in ("moejax/a.py", "experiments/b.py", "experiments/results/c.json", "README.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1")
    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "x")
    return tmp_path


def test_a_record_names_the_changes_since_its_commit(clone):
    source = environment.source.__wrapped__
    head, dirty = source(clone)
    assert len(head) == 40 and dirty == []
    (clone / "README.md").write_text("2")
    (clone / "experiments/results/c.json").write_text("2")
    (clone / "moejax/new.py").write_text("2")  # not tracked
    assert source(clone) == (head, [])
    (clone / "moejax/a.py").write_text("2")
    (clone / "experiments/b.py").unlink()
    assert source(clone) == (head, ["experiments/b.py", "moejax/a.py"])
    assert source(clone / "moejax") == (None, None)  # a folder within a clone of something else


def test_a_record_without_git_says_that_nothing_is_known(tmp_path, monkeypatch):
    source = environment.source.__wrapped__
    assert source(tmp_path) == (None, None)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert source(ROOT) == (None, None)


def test_records_hold_commit_and_changes():
    found = environment.environment("m")
    assert (found["commit"], found["dirty"]) == environment.source() and found["model"] == "m"
