"""The experiments that make the tables: their commands, held-out text and arithmetic."""

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from experiments import held_out, plan_check, quantisation, tiny_data  # noqa: E402

needs_text = pytest.mark.skipif(
    not held_out.DATA.is_dir(), reason=f"the held-out text is not at {held_out.DATA}"
)


def experiment(name, *arguments):
    command = [sys.executable, "-W", "error", "-m", f"experiments.{name}", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)


@needs_text
def test_quantisation_runs(tmp_path):
    done = experiment("quantisation", "--quick", "--out", tmp_path / "report.json")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["verdict"] in ("holds", "fails")
    assert report["windows"] == dict.fromkeys(tiny_data.DOMAINS, 2)
    rows = {row["format"]: row for row in report["rows"]}
    # Parts gate_up [192, 192] and down [192, 96]; int4 pads columns to 256 and 128.
    assert {name: row["weight_bytes"] for name, row in rows.items()} == {
        "bfloat16": 2 * 192 * 288,
        "float32": 4 * 192 * 288,
        "int8": 192 * 288 + 4 * (192 + 192),
        "int4g32": 192 * 384 // 2 + 2 * 192 * 384 // 32,
        "int4g64": 192 * 384 // 2 + 2 * 192 * 384 // 64,
    }
    for name, row in rows.items():
        held = row["held_out"]
        for table in held.values():
            low, high = table["interval"]
            assert low <= table["change"] + 1e-12 and table["change"] <= high + 1e-12
            assert abs(table["change"]) < (0.02 if "int4" not in name else 0.2)
            assert 0.7 < table["greedy_agreement"] <= 1
        quantised = {kind for kind, e in row["errors"].items() if 0 < e["mean"] <= e["max"] < 0.12}
        maps = {"attention/q", "attention/k", "attention/v", "attention/o"}
        expected = maps | {"experts/gate_up", "experts/down"} if "int" in name else set()
        assert quantised == set(row["errors"]) == expected
        assert row["total_bytes"] == row["dense_bytes"] + 192 * row["record_bytes"]
    assert all(t["change"] == 0 for t in rows["bfloat16"]["held_out"].values())


def test_quantisation_says_that_the_text_is_missing(tmp_path):
    done = experiment("quantisation", "--quick", "--data", tmp_path / "none")
    assert done.returncode != 0 and not done.stdout
    assert f"the held-out text is not at {tmp_path / 'none'}" in done.stderr


def test_intervals_are_those_of_the_normal_distribution_for_many_windows():
    rng = np.random.default_rng(0)
    groups = [rng.normal(mean, 1, 400) for mean in (0.0, 1.0, 5.0)]
    low, high = quantisation.interval(groups)
    error = np.sqrt(sum(g.var() / len(g) for g in groups)) / len(groups)
    middle = np.mean([g.mean() for g in groups])
    np.testing.assert_allclose(
        [low, high], [middle - 1.96 * error, middle + 1.96 * error], atol=4e-3
    )


@needs_text
@pytest.mark.parametrize("domain", ["docs", "code"])
def test_held_out_files_are_those_that_training_left_out(domain):
    documents = set(held_out.documents(domain))
    if domain == "code":
        named = tiny_data.stdlib_sources()
    else:
        rows = tiny_data.read_jsonl(held_out.DATA / "corpus/python311_docs.jsonl.xz")
        named = [(row["src"], row["text"]) for row in rows]
    trained = {text for name, text in named if not tiny_data.held_out(name)}
    assert documents and not documents & trained
    assert 0.01 < len(documents) / len(named) < 0.08


def test_losses_are_those_of_a_softmax():
    logits = np.random.default_rng(0).normal(size=(7, 11)).astype(np.float32) * 30
    wanted = np.arange(7)
    p = np.exp(logits.astype(np.float64))
    expected = -np.log(p[wanted, wanted] / p.sum(axis=1))
    np.testing.assert_allclose(held_out.losses(logits, wanted), expected, atol=1e-12)


def test_errors_of_plans_are_told_apart_by_what_was_planned():
    def row(group, error, measured=1.0, late=0.0):
        return {
            "group": group,
            "what": group,
            "error": error,
            "error_with_hit_rate": error,
            "measured_ms": measured,
            "predicted_ms": measured * (1 + error),
            "with_hit_rate_ms": measured * (1 + error),
            "late_per_token": late,
            "late_ms": late * 0.2,
        }

    base = row("tokens, all resident", -0.3)
    rows = [base, row("tokens, disk", -0.1), row("tokens, disk", 0.2), row("prompts, x", 0.9)]
    summary = plan_check.summarise(rows)
    assert summary["median_error_of_tokens"] == 0.2 and summary["median_error_of_prompts"] == 0.9
    assert summary["median_error"] == 0.25 and summary["largest_error"] == 0.9
    assert [(g["group"], g["rows"]) for g in summary["by_group"]] == [
        *(("prompts, x", 1), ("tokens, all resident", 1), ("tokens, disk", 2)),
    ]
    disk = summary["by_group"][-1]
    assert disk["median_error"] == 0.15000000000000002 and disk["median_bias"] == 0.05
    # What all rows of a record have too much goes; a record that is late takes a load.
    [found] = plan_check.beyond_resident([base, row("tokens, link", -0.2, 3.0, late=0.5)])
    assert found["measured_ms"] == 2.0 and found["late_per_token"] == 0.5
    assert (found["predicted_ms"], found["with_late_ms"]) == pytest.approx((1.7, 1.8))
