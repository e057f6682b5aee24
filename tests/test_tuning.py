"""Choosing alpha: the fit on hand-made curves, and the commands that choose and list policies."""

import json

import numpy as np
import pytest
from test_cli import ok, run

import moejax
from moejax import tuning
from moejax.errors import InputError, PolicyError
from moejax.generate import generate_step
from moejax.policies.policy import policy
from moejax.tuning import Point, tune

QUICK = ("--tokens", 3, "--rounds", 1, "--alphas", "0,0.3,0.6", "--slots", 76, "--context", 64)


def curve(time):
    """Measures what a function of alpha says, and notes when it was asked."""
    asked = []

    def measure(alphas):
        asked.append(list(alphas))
        return [Point(alpha, time(alpha)) for alpha in alphas]

    return measure, asked


def falling(alpha):
    return 10 - 8 * alpha


@pytest.mark.parametrize(("budget", "alpha"), [(8.0, 0.25), (5.2, 0.6), (10.0, 0.0), (99.0, 0.0)])
def test_the_smallest_alpha_of_the_fit_that_meets_the_budget(budget, alpha):
    measure, asked = curve(falling)
    found = tune(measure, budget + 1e-9, degree=1)
    assert found.alpha == pytest.approx(alpha)
    assert found.predicted_ms == pytest.approx(falling(alpha))
    assert asked == [list(tuning.ALPHAS), [found.alpha]]
    assert found.check.alpha == found.alpha and found.confirmed
    assert np.allclose(found.polynomial, (-8, 10))


def test_alpha_is_chosen_in_steps_and_never_below_what_the_fit_says():
    found = tune(curve(falling)[0], 7.97, degree=1)  # by the line itself from 0.25375 on
    assert found.alpha == 0.255


def test_a_budget_that_no_alpha_meets():
    measure, asked = curve(lambda alpha: 6 + 20 * (alpha - 0.4) ** 2)
    found = tune(measure, 5.9)
    assert found.alpha is None and found.check is None and not found.confirmed
    assert found.predicted_ms == pytest.approx(6.0, abs=1e-3)
    assert found.fastest.alpha == 0.45 and len(asked) == 1


def test_a_fit_that_rises_again_gives_the_smaller_alpha():
    found = tune(curve(lambda alpha: 6 + 20 * (alpha - 0.3) ** 2)[0], 6.2 + 1e-6)
    assert found.alpha == pytest.approx(0.2)


def test_noise_is_smoothed_by_the_fit():
    noise = dict(zip(tuning.ALPHAS, (0.1, -0.2, 0.2, -0.2, 0.1), strict=True))
    found = tune(curve(lambda a: falling(a) + noise.get(a, 0))[0], 7.6, degree=1)
    assert found.alpha == pytest.approx(0.3, abs=0.02)


@pytest.mark.parametrize(("over", "confirmed"), [(1.04, True), (1.06, False)])
def test_a_check_that_misses_the_budget_is_told(over, confirmed):
    def measure(alphas):
        return [Point(a, 8.0 * over if len(alphas) == 1 else falling(a)) for a in alphas]

    assert tune(measure, 8.0, degree=1).confirmed is confirmed


def test_alphas_are_measured_in_order_and_once():
    measure, asked = curve(falling)
    tune(measure, 8.0, (0.5, 0.0, 0.5, 0.2), 1)
    assert asked[0] == [0.0, 0.2, 0.5]


def test_nothing_is_chosen_beyond_the_alphas_measured():
    assert tune(curve(falling)[0], 5.0, (0.0, 0.203, 0.401), 1).alpha is None
    assert tune(curve(falling)[0], falling(0.401) + 1e-9, (0.0, 0.203, 0.401), 1).alpha == 0.401


@pytest.mark.parametrize(
    ("budget", "alphas", "degree"),
    [
        (0.0, (0, 0.5), 1),
        (-1.0, (0, 0.5), 1),
        (float("nan"), (0, 0.5), 1),
        (float("inf"), (0, 0.5), 1),
        (1.0, (0, 1.1), 1),
        (1.0, (-0.1, 0.5), 1),
        (1.0, (0, float("nan")), 1),
        (1.0, (0, 0.5), 2),
        (1.0, (0.5, 0.5), 1),
        (1.0, (0, 0.5), 0),
        (1.0, (), 1),
    ],
)
def test_what_cannot_be_fitted_is_refused_before_anything_is_measured(budget, alphas, degree):
    measure, asked = curve(falling)
    with pytest.raises(InputError):
        tune(measure, budget, alphas, degree)
    assert not asked


@pytest.fixture(scope="module")
def tiny():
    return moejax.load("tiny", slots=76, policy="smoe-fetch", virtual=True, context=64)


def test_alphas_are_measured_without_compiling_in_between(tiny):
    prompt = np.arange(5)
    options = {"tokens": 8, "seed": 1}
    alone = tuning.measured(tiny, prompt, [0.45], rounds=1, **options)[0]
    compiled = generate_step._cache_size()
    none, same, much = tuning.measured(tiny, prompt, [0.0, 0.45, 1.0], rounds=2, **options)
    assert generate_step._cache_size() == compiled
    assert none.hit_rate == none.exact_hit_rate and none.replaced_mass == 0
    assert 0 < same.replaced_mass < much.replaced_mass
    assert same.hit_rate > same.exact_hit_rate
    assert min(none.tpot_ms, same.tpot_ms, much.tpot_ms) > 0
    counts = ("alpha", "hit_rate", "exact_hit_rate", "replaced_mass")
    assert all(getattr(same, name) == getattr(alone, name) for name in counts)


def test_rounds_take_the_alphas_in_turn_and_the_first_does_not_count(tiny, monkeypatch):
    runs, times = [], iter([1e6, 1e6, 1.0, 10.0, 3.0, 30.0, 2.0, 20.0])

    def timed(runtime, prompt, alpha, tokens, seed):
        runs.append(alpha)
        return moejax.stats.Stats(1, steps=1, decode_seconds=next(times) / 1e3)

    monkeypatch.setattr(tuning, "_run", timed)
    found = tuning.measured(tiny, np.arange(3), [0.1, 0.2], tokens=1, rounds=3, seed=0)
    assert runs == [0.1, 0.2] * 4
    assert [point.tpot_ms for point in found] == pytest.approx([2.0, 20.0])


def test_a_policy_without_alpha_cannot_be_measured():
    exact = moejax.load("tiny", slots=76, virtual=True, context=64)
    with pytest.raises(PolicyError, match="no alpha"):
        tuning.measured(exact, np.arange(3), [0.1], tokens=1, rounds=1, seed=0)


def test_tune_prints_a_table_and_the_policy_to_use():
    result = ok("tune", "alpha", "--tpot-budget", 1e6, *QUICK, "-q")
    lines = result.stdout.splitlines()
    assert [line.split()[0] for line in lines[1:5]] == ["0", "0.3", "0.6", "0"]
    assert "(check)" in lines[4]
    assert result.stdout.count("--policy smoe-fetch:alpha=0\n") == 1
    assert "missed" not in result.stdout and result.stderr == ""


def test_tune_keeps_the_other_numbers_of_the_policy_and_says_it_all_as_json():
    named = ("--policy", "smoe-fetch:alpha=0.9,window=4", "--link", "paced:5,10")
    result = ok("tune", "alpha", "--tpot-budget", 1e6, *QUICK, *named, "--json", "-q")
    document = json.loads(result.stdout)
    assert document["policy"] == "smoe-fetch:alpha=0,window=4"
    assert document["settings"]["policy"] == named[1]
    assert document["settings"]["link"] == "paced:5,10"
    assert [point["alpha"] for point in document["points"]] == [0, 0.3, 0.6]
    assert document["check"]["alpha"] == document["alpha"] == 0
    assert document["confirmed"] is True
    chosen = policy(document["policy"])
    assert (float(chosen.router.alpha), int(chosen.evictor.n)) == (0.0, 4)


def test_tune_says_that_no_alpha_will_do_and_which_is_fastest():
    result = run("tune", "alpha", "--tpot-budget", 1e-6, *QUICK, "-q")
    assert result.exit_code == 1 and result.stderr == ""
    assert "No alpha from 0 to 0.6 meets" in result.stdout
    assert "fastest" in result.stdout and "--policy" not in result.stdout
    result = run("tune", "alpha", "--tpot-budget", 1e-6, *QUICK, "-q", "--json")
    document = json.loads(result.stdout)
    assert result.exit_code == 1 and document["alpha"] is None and document["policy"] is None
    assert document["fastest_alpha"] in (0, 0.3, 0.6) and document["confirmed"] is False


def test_tune_says_that_the_check_missed(monkeypatch):
    def slower(runtime, prompt, alphas, **_):
        return [Point(a, 20.0 if len(alphas) == 1 else falling(a)) for a in alphas]

    monkeypatch.setattr(tuning, "measured", slower)
    result = ok("tune", "alpha", "--tpot-budget", 8, *QUICK, "--degree", 1, "-q")
    assert "--policy smoe-fetch:alpha=0.25\n" in result.stdout
    assert "missed the budget by 150%" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("beta", "--tpot-budget", 5), "only alpha"),
        (("alpha", "--tpot-budget", 0), "positive"),
        (("alpha", "--tpot-budget", "nan"), "positive"),
        (("alpha", "--tpot-budget", 5, "--alphas", "0,0.5,1.5"), "from 0 to 1"),
        (("alpha", "--tpot-budget", 5, "--alphas", "0,much"), "numbers"),
        (("alpha", "--tpot-budget", 5, "--alphas", "0,0.5"), "degree 2"),
        (("alpha", "--tpot-budget", 5, "--policy", "lru"), "no alpha"),
        (("alpha", "--tpot-budget", 5, "--policy", "cache-boost"), "no alpha"),
        (("alpha", "--tpot-budget", 5, "--policy", "nope"), "unknown policy"),
        (("alpha", "--tpot-budget", 5, "--policy", "smoe:width=3"), "no number 'width'"),
        (("alpha", "--tpot-budget", 5, "--prompt", "a", "--file", "b"), "--prompt or --file"),
        (("alpha", "--tpot-budget", 5, "--prompt", ""), "empty"),
        (("alpha", "--tpot-budget", 5, "--file", "/does/not/exist"), "there is no file"),
    ],
)
def test_what_cannot_be_tuned_is_one_line(arguments, said, monkeypatch):
    monkeypatch.setattr("moejax.cli.actions.load_model", None)  # found out before the model is read
    result = run("tune", *arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("moejax: ") and result.stderr.count("\n") == 1
    assert said in result.stderr


def test_policies_lists_all_with_their_numbers_and_what_they_do():
    from moejax.policies.policy import policy_names

    rows = json.loads(ok("policies", "--json").stdout)
    assert [row["name"] for row in rows] == policy_names()
    by_name = {row["name"]: row for row in rows}
    assert by_name["smoe-fetch"]["numbers"] == {"alpha": 0.25, "window": 16, "horizon": 1}
    assert by_name["lru"]["numbers"] == {}
    for row in rows:
        assert row["exact"] is policy(row["name"]).exact
        assert row["description"].endswith(".")
        numbers = ",".join(f"{name}={value}" for name, value in row["numbers"].items())
        policy(f"{row['name']}:{numbers}")  # as they are shown, they can be given
    shown = ok("policies").stdout
    assert all(name in shown for name in by_name)
    assert "alpha=0.25, window=16, horizon=1" in shown


def test_policies_lists_those_of_other_packages_and_survives_broken_ones(monkeypatch):
    import importlib.metadata as metadata

    group = "moejax.policies"
    made = metadata.EntryPoint("theirs", "conftest:third_party", group)
    broken = metadata.EntryPoint("broken", "conftest:no_such", group)
    monkeypatch.setattr(
        metadata, "entry_points", lambda group: metadata.EntryPoints([made, broken])
    )
    rows = {row["name"]: row for row in json.loads(ok("policies", "--json").stdout)}
    assert rows["theirs"]["exact"] is True and rows["theirs"]["source"] == "conftest:third_party"
    assert rows["theirs"]["description"] == "A policy as another package would provide it."
    assert rows["broken"]["exact"] is None and "no_such" in rows["broken"]["description"]
    assert rows["lru"]["source"] is None
    assert "theirs" in ok("policies").stdout
