"""What a run says of itself: whether drafts paid, and how many programs it waits for."""

import pytest

import moejax
from moejax import cycles, generate, report
from moejax.cli import actions
from moejax.terminal import Terminal

LINK = {"slots": 96, "context": 128, "link": "paced:1,0,30"}


@pytest.mark.parametrize(
    ("numbers", "said"),
    [
        ((1.0, None, 0.0, 2.0, 1.0), "1.00 tokens per cycle, nothing was drafted"),
        (
            (2.5, 0.75, 0.625, 2.0, None),
            "2.50 tokens per cycle, 75% of drafts accepted, 62% of cycles drafted",
        ),
        (
            (2.5, 0.75, 1.0, 2.0, 4.0),
            "2.50 tokens per cycle, 75% of drafts accepted, 100% of cycles drafted; faster than "
            "plain steps (2.00 against 4.00 ms per token)",
        ),
        (
            (2.5, 0.75, 1.0, 4.1, 4.0),
            "2.50 tokens per cycle, 75% of drafts accepted, 100% of cycles drafted; as fast as "
            "plain steps (4.10 against 4.00 ms per token)",
        ),
        (
            (1.01, 0.5, 0.02, 5.0, 4.0),
            "1.01 tokens per cycle, 50% of drafts accepted, 2% of cycles drafted",
        ),
    ],
)
def test_drafts_are_told_in_one_line(numbers, said):
    assert report.drafts_in_words(*numbers) == said


@pytest.mark.parametrize("policy", ["lru", "lookup:gamma=3", "sp-moe:gamma=1"])
def test_the_programs_that_are_waited_for_are_counted(policy):
    runtime = moejax.load("tiny", policy=policy, **LINK)
    compiled = (generate.generate_step, cycles.cycle, cycles.decode_step)
    for program in compiled:
        program.clear_cache()
    actions.warm_up(Terminal(quiet=True), runtime, sampling={"temperature": 0.0})
    made = [program._cache_size() for program in compiled]
    assert actions.programs(runtime) == sum(made)
    assert (made[1] > 0, made[2]) == (policy != "lru", policy.startswith("sp-moe"))


def test_auto_gives_its_account_of_plain_steps():
    runtime = moejax.load("tiny", policy="auto", **LINK)
    assert runtime.plain_step_ms() is None
    runtime.warm_up(sampling={"temperature": 0.0})
    runtime.generate("The old man", 60, {"temperature": 0.0})
    stats, document = runtime.stats, report.stats_document(runtime)
    cycles_made = sum(stats.draft_lengths.values())
    assert cycles_made == stats.steps and stats.draft_lengths[0] > 1
    assert document["drafted_share"] == 1 - stats.draft_lengths[0] / cycles_made
    plain = document["plain_step_ms"]
    times = [ms for _, ms, _ in runtime._live.latest.costs._noted[0]]
    assert min(times) <= plain <= max(times)
    rows = dict(report.stats_rows(runtime))
    ms = stats.tpot * 1e3
    said = f" plain steps ({ms:.2f} against {plain:.2f} ms"
    often = document["drafted_share"] >= report.SELDOM
    assert (said in rows["speculation"]) == often == ("plain steps" in rows["speculation"])
    fixed = moejax.load("tiny", policy="lookup:gamma=2", **LINK)
    fixed.generate([[1, 2, 3] * 4], 8, {"temperature": 0.0})
    assert report.stats_document(fixed)["plain_step_ms"] is None
    assert "plain step" not in dict(report.stats_rows(fixed))["speculation"]


@pytest.mark.parametrize(
    ("policy", "temperature", "kernels", "label"),
    [
        ("lookup:gamma=2", 0.7, None, "in distribution"),
        ("lookup:gamma=2", 0.0, None, "bit-exact"),
        ("lru", 0.7, None, "bit-exact"),
        ("auto-lossy:gamma=2", 0.7, None, "lossy"),
        # where passes round otherwise than steps, the distribution is not the same either
        ("lookup:gamma=1", 0.7, "reference", "faithful"),
    ],
)
def test_a_sampled_run_with_drafts_has_not_the_tokens_of_one_without(
    policy, temperature, kernels, label
):
    runtime = moejax.load("tiny", slots=70, context=64, policy=policy, kernels=kernels)
    runtime.generate([[1, 2, 3] * 4], 6, {"temperature": temperature})
    if runtime.stats.label == "faithful" != label:
        pytest.skip("without native kernels passes round otherwise than steps")
    assert runtime.stats.label == label
    assert dict(report.stats_rows(runtime))["result"].startswith(label)
