"""The worst of several tasks in the experiment on answers, and what single items leave open."""

import pathlib
import sys

import numpy as np
import pytest
from scipy.stats import norm

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from experiments import eval_policies, smoe_common  # noqa: E402
from moejax.evaluation import compare  # noqa: E402

SIZES = {"mmlu": 20, "gaokao": 6, "wikitext": 3}
FLIPS = {"mmlu": 1, "gaokao": 0}


def made(seed=0, sizes=SIZES):
    """Rows and items of tasks on which every lossy policy loses, most on the last one."""
    rng, rows, items = np.random.default_rng(seed), [], {}
    for place, (task, n) in enumerate(sizes.items()):
        tokens = rng.integers(5, 50, n)
        first = -rng.exponential(1, n) * tokens
        items[f"{task} lru"] = [
            {"id": str(i), "logprob": x, "tokens": k}
            for i, (x, k) in enumerate(zip(first, tokens, strict=True))
        ]
        for policy in eval_policies.LOSSY:
            own = first + rng.normal(-0.1 * (1 + place), 0.2, n) * tokens
            items[f"{task} {policy}"] = [
                {"id": str(i), "logprob": x, "tokens": k}
                for i, (x, k) in enumerate(zip(own, tokens, strict=True))
            ]
            change = compare._ratio(own - first, tokens, 0)
            row = {"task": task, "policy": policy, "logprob_change": change}
            if task in FLIPS:
                share = FLIPS[task] / n
                ends = [*compare.wilson(share, n)]
                row["flips"] = {"value": share, "interval": ends, "n": n}
            rows.append(row)
    return rows, items


def test_the_worst_task_has_an_interval_of_the_worst():
    rows, items = made()
    items["gaokao lru"][2].pop("logprob")  # an item that was not scored
    found = eval_policies.worst(rows, items, seed=5)
    for policy in eval_policies.LOSSY:
        own = [row for row in rows if row["policy"] == policy]
        ends, rare = [], 1 - 0.975 ** (1 / 3)
        for task in SIZES:
            pairs = [*zip(items[f"{task} lru"], items[f"{task} {policy}"], strict=True)]
            pairs = [(a, b) for a, b in pairs if "logprob" in a]
            lost = np.array([a["logprob"] - b["logprob"] for a, b in pairs])
            tokens = np.array([a["tokens"] for a, _ in pairs], float)
            ends.append(compare.bootstrap(lost, tokens, 5, 40_000, (rare, 0.025)))
        value = max(-row["logprob_change"]["value"] for row in own)
        low, high = found[f"worst loss {policy} interval"]
        assert found[f"worst loss {policy}"] == value and low < value < high
        expected = [max(e) for e in zip(*ends, strict=True)]
        assert [low, high] == pytest.approx(expected, abs=0.05 * (high - low))
        # It reaches as far as any task's own does, and further down than the worst one's.
        assert high == pytest.approx(max(-r["logprob_change"]["interval"][0] for r in own), abs=0.1)
        assert found[f"worst flips {policy}"] == 1 / 20
        low, high = found[f"worst flips {policy} interval"]
        assert high == compare.wilson(0.0, 6)[1] > compare.wilson(1 / 20, 20)[1]
        z = norm.isf(1 - 0.975**0.5)
        assert (1 / 20 - low) == pytest.approx(z * np.sqrt(low * (1 - low) / 20))


def test_a_task_of_a_single_item_leaves_the_worst_open():
    rows, items = made(sizes=SIZES | {"wikitext": 1})
    found = eval_policies.worst(rows, items, seed=0)
    targets = eval_policies._targets(rows)
    for policy in eval_policies.LOSSY:
        assert found[f"worst loss {policy} interval"] is None
        open_one, other = (targets[f"loss {task} {policy}"] for task in ("wikitext", "mmlu"))
        assert open_one["undecided"] and open_one["interval"] is None
        change = next(r for r in rows if (r["task"], r["policy"]) == ("mmlu", policy))
        low, high = change["logprob_change"]["interval"]
        assert other["interval"] == [-high, -low]
    assert "loss wikitext" in smoe_common.verdict(targets).partition("undecided")[2]
