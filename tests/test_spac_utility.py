"""The experiments on MoE-SpAc's utility and on resident routing: their arithmetic against loops."""

import dataclasses
import lzma
import math
import pathlib
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import moejax  # noqa: E402
from experiments import resident_routing, spac_runs, spac_utility, spac_windows  # noqa: E402
from experiments.spac_windows import Recorded  # noqa: E402
from moejax.policies.policy import policy  # noqa: E402
from moejax.policies.utility import STAMPS, SoftUtility  # noqa: E402
from moejax.state import array_fields  # noqa: E402

P, C, L, W, K, E = 2, 7, 3, 4, 2, 6


def recorded(seed=0, warm=0):
    """Two prompts, the second of fewer cycles; what padding holds must not matter."""
    rng = np.random.default_rng(seed)
    picks = np.argsort(rng.random((P, C, L, W, E)), axis=-1)[..., :K].astype(np.int32)
    count = rng.integers(1, W + 1, (P, C)).astype(np.int32)
    count[1, 5:] = 0
    return Recorded(
        picks=picks,
        scores=rng.dirichlet(np.ones(E), (P, C, L, W)).astype(np.float32),
        token=rng.integers(0, 9, (P, C, W)),
        count=count,
        level=rng.integers(0, 4, (P, C, L, E)).astype(np.int32),
        resident=rng.random((P, C, L, E)) < 0.4,
        warm=warm,
    )


def made_tokens(given, p):
    """(cycle, position) of the tokens that were really made, in order."""
    return [(c, w) for c in range(C) for w in range(int(given.count[p, c]))]


def window_of(given, kind, p, c):
    """(cycle, position) of the tokens that an estimator is fed with cycle c."""
    if not given.count[p, c]:
        return []
    if kind == "fed":
        return [(c, w) for w in range(W)]
    if kind == "made":
        return [(c, w) for w in range(int(given.count[p, c]))]
    return [at for at in made_tokens(given, p) if at[0] <= c][-9:]


def counts(given, p, layer, tokens):
    found = [0] * E
    for c, w in tokens:
        for e in given.picks[p, c, layer, w]:
            found[e] += 1
    return found


def test_uses_count_the_picks_of_the_chosen_positions():
    given = recorded()
    for kind in ("fed", "made"):
        found = given.uses(getattr(given, kind))
        for p, c, layer in np.ndindex(P, C, L):
            want = counts(given, p, layer, window_of(given, kind, p, c))
            assert found[p, c, layer].tolist() == want


@pytest.mark.parametrize("kind", ["fed", "made", "last"])
def test_levels_are_those_of_the_machine_fed_with_these_tokens(kind):
    given = recorded(3)
    steps = spac_windows.last(given) if kind == "last" else None
    steps = steps or spac_windows.whole(given, getattr(given, kind))
    found = spac_windows.replayed(spac_utility.utility(cap=3, up=3.0), steps)
    for p, layer in np.ndindex(P, L):
        level = [0] * E
        for c in range(C):
            tokens = window_of(given, kind, p, c)
            up = max(1, round(3.0 * len(tokens) / 9))
            for e, n in enumerate(counts(given, p, layer, tokens) if tokens else []):
                if n - level[e] >= up:
                    level[e] = min(3, level[e] + 1)
                elif level[e] - n >= 1:
                    level[e] -= 1
            assert found[p, c, layer].tolist() == level
    assert found.max() > 1


def test_single_tokens_are_those_made_and_are_asked_for_after_their_cycle():
    given = recorded(1)
    decay = 0.5
    keys = spac_windows.replayed(
        SoftUtility(decay=jnp.float32(decay)), spac_windows.single(given), "keys"
    )
    for p in range(P):
        mass = np.zeros((L, E))
        for c in range(C):
            for w in range(int(given.count[p, c])):
                mass = decay * mass + given.scores[p, c, :, w]
            np.testing.assert_allclose(keys[p, c], mass, rtol=1e-5)


def test_the_first_tokens_are_those_of_the_first_cycles():
    given = recorded()
    tokens = int(given.count[0, :3].sum())
    short = given.until(tokens)
    assert short.count[0].tolist() == [*given.count[0, :3], 0, 0, 0, 0]
    assert given.until(tokens - 1).count[0].tolist() == [*given.count[0, :2], 0, 0, 0, 0, 0]
    assert not short.uses(short.made)[0, 3:].any()


@pytest.mark.parametrize("warm", [0, 6])
def test_hot_experts_are_held_against_the_cycle_after(warm):
    given = recorded(5, warm)
    rng = np.random.default_rng(0)
    hot, uses = rng.random((P, C, L, E)) < 0.5, given.uses(given.made)
    sums = spac_windows.tally(hot, uses, given)
    for p, layer in np.ndindex(P, L):
        want = dict.fromkeys(sums, 0)
        for c in range(C - 1):
            if given.count[p, : c + 1].sum() < warm or not given.count[p, c + 1]:
                continue
            want["windows"] += 1
            for e in range(E):
                is_hot, n = bool(hot[p, c, layer, e]), int(uses[p, c + 1, layer, e])
                want["hot"] += is_hot
                want["right"] += is_hot and n > 0
                want["carried"] += n if is_hot else 0
                want["picks"] += n
                want["agreed"] += is_hot == (n > 0)
                want["used"] += n > 0
                want["experts"] += 1
        assert {name: part[p, layer] for name, part in sums.items()} == want
    assert (sums["windows"][0, 0] < C - 1) == (warm > 0)


def test_rates_are_ratios_of_sums_and_the_last_layer_is_apart():
    sums = {
        "hot": np.array([[4, 2], [4, 0]]),
        "right": np.array([[3, 1], [1, 0]]),
        "carried": np.array([[6, 2], [2, 0]]),
        "picks": np.array([[10, 10], [10, 10]]),
        "agreed": np.array([[9, 5], [3, 2]]),
        "used": np.array([[3, 3], [3, 3]]),
        "experts": np.array([[12, 12], [12, 12]]),
        "windows": np.array([[2, 2], [2, 2]]),
    }
    row = spac_windows.rates(sums, np.array([[0, 0], [1, 1]]))
    assert (row["precision"], row["share"]) == (0.5, 0.25)
    assert row["hot_per_layer"] == 10 / 8
    assert row["last_layer_precision"] == 0.5 and row["last_layer_accuracy"] == 7 / 24
    assert row["last_layer_used"] == 0.25
    # prompt 0 alone has 4 of 6, prompt 1 alone 1 of 4
    apart = 4 / 6 - 1 / 4
    assert row["precision_interval"] == pytest.approx(
        (1 / 4 + 0.025 * apart, 4 / 6 - 0.025 * apart)
    )
    none = spac_windows.rates({name: 0 * part for name, part in sums.items()}, np.array([[0]]))
    assert none["precision"] is None and none["precision_interval"] is None


def test_prompts_are_drawn_within_their_domains():
    domain = np.array([0, 0, 0, 1, 1])
    sample = spac_windows.drawn(domain, 0, 200)
    assert sample.shape == (200, 5) and (domain[sample] == domain).all()
    assert len(np.unique(sample[:, :3])) == 3 and len(np.unique(sample[:, 3:])) == 2


def test_the_best_are_taken_with_ties_to_the_lower_expert():
    values = np.array([[1, 3, 3, 2], [0, 0, 0, 0]])
    found = spac_windows.best(values, np.array([2, 3]))
    assert found.tolist() == [[False, True, True, False], [True, True, True, False]]
    assert not spac_windows.best(values, np.array([0, 0])).any()


def test_slots_are_for_the_greatest_keys_of_all_layers():
    keys = np.array([[[[2 * STAMPS + 1, 5], [STAMPS + 9, 0]]]])  # one prompt, one cycle
    stay, hot = spac_windows.fitting(keys, 1)
    assert stay[0, 0].tolist() == hot[0, 0].tolist() == [[True, False], [False, False]]
    stay, hot = spac_windows.fitting(keys, 4)
    assert stay[0, 0].tolist() == [[True, True], [True, False]]  # never used: not there
    assert hot[0, 0].tolist() == [[True, False], [True, False]]


def test_the_balancer_is_told_what_the_layer_before_has_queued():
    given, cap, slots = recorded(7), 3, 9
    costs = {"device": 2.0, "device_token": 1.0, "host": 4.0}
    costs |= {"host_token": 0.5, "hidden": 1.0, "load": 3.0}
    uses = given.uses(given.fed)
    times = {k: [] for k in range(cap + 2)}
    best, allowed = [], {k: [] for k in range(cap + 2)}
    for p, c in np.ndindex(P, C - 1):
        if not given.count[p, c + 1]:
            continue
        for layer in range(L):
            own = []
            queue = given.level[p, c, L - 1] if layer == 0 else given.level[p, c + 1, layer - 1]
            absent = ~given.resident[p, c, (layer - 1) % L]
            for k in range(cap + 2):
                device, host, link = 2.0, 1.0, 0.0
                for e in range(E):
                    n = uses[p, c, layer, e]
                    if not n:
                        continue
                    if given.level[p, c, layer, e] >= k and given.resident[p, c, layer, e]:
                        device += n
                    else:
                        host += 4.0 + 0.5 * n
                if k <= cap:
                    link = 3.0 * sum((queue >= k) & absent)
                times[k].append(max(device, host, link))
                fits = (given.level[p, c] >= k).sum() <= slots or k > cap
                allowed[k].append(fits)
                own.append(times[k][-1] if fits else math.inf)
            best.append(min(own))
    rows = spac_windows.balance_rows(given, costs, cap, slots)
    for k, row in zip(times, rows, strict=False):
        assert row["threshold"] == k
        assert row["slowest_us"] == pytest.approx(np.mean(times[k]))
        assert row["allowed"] == pytest.approx(np.mean(allowed[k]))
    assert rows[-1]["threshold"] == "balanced"
    assert rows[-1]["slowest_us"] == pytest.approx(np.mean(best))
    assert sum(row["chosen"] for row in rows[:-1]) == pytest.approx(1)


def test_a_routing_trace_becomes_windows_of_tokens_that_all_stay(tmp_path):
    path = tmp_path / spac_windows.TRACE
    path.parent.mkdir(parents=True)
    lines = ["# a comment", "phase,step,layer,slot,expert", "0,500,0,0,99"]
    lines += [
        f"1,{step},{layer},{slot},{(step + 7 * layer + slot) % 128}"
        for step in range(20)
        for layer in range(2)
        for slot in (1, 0)
    ]
    with lzma.open(path, "wt") as file:
        file.write("\n".join(lines) + "\n")
    found = spac_windows.real_trace(tmp_path)
    assert found.picks.shape == (1, 2, 2, 9, 2)  # 20 tokens are two windows
    assert found.picks[0, 1, 1, 3].tolist() == [(12 + 7) % 128, (12 + 8) % 128]
    assert (found.count == 9).all() and found.fed.all()
    assert spac_windows.real_trace(tmp_path / "none") is None
    steps = spac_windows.last(found)
    assert np.array_equal(steps.picks, found.picks)  # the control is fed the same


def test_drift_is_set_against_the_first_input():
    inputs = np.array([[1.0, 2.0, 4.0], [2.0, 2.0, 4.0], [2.0, 8.0, 4.0]])
    scores = np.array([[0.1, 0.2, 0.4], [0.1, 0.1, 0.1], [0.4, 0.8, 0.4]])
    rows = spac_runs.drift(inputs, scores)
    assert [rows[0][name] for name in ("ratio_mean", "ratio_max")] == pytest.approx([0.1, 0.1])
    assert rows[0]["factor"] == pytest.approx(0.1)
    assert rows[0]["bound_over_drift"] == pytest.approx(1.0)
    assert rows[0]["correlation_with_input"] == pytest.approx(1.0)
    # layer 2: inputs grow at most 2 and 4 times, the gate takes at most 0.2 of its input
    assert rows[2]["factor"] == pytest.approx(2 * 4 * 0.2)
    assert rows[2]["bound_over_drift"] == pytest.approx(np.median([4.0, 4.0, 16.0]))
    assert rows[2]["ratio_max"] == pytest.approx(0.4)


def options(**changes):
    return types.SimpleNamespace(**(spac_utility.FULL | changes))


def test_timed_cases_are_each_a_policy_and_come_once():
    cases = spac_runs.cases(options(), 37)
    assert len(set(cases)) == len(cases)
    assert {case.name for case in cases} == {"moe-spac", *spac_utility.RIVALS}
    for case in cases:
        policy(case.text)
    assert {c.slots for c in cases if c.name == "moe-spac"} == set(spac_utility.SLOTS)
    assert {c.slots for c in cases if c.name == "lru"} == {*spac_utility.SLOTS, 48 + 37}
    assert {c.slots for c in cases if c.name == "sp-moe"} == set(spac_utility.SLOTS)
    assert {c.threshold for c in cases} == {1, 2, 3}
    assert {c.cap for c in cases} == set(spac_utility.CAPS)


def estimator(name, precision, **about):
    main = {"gamma": 8, "temperature": 1.0, "target": "made"}
    return {**main, "estimator": name, "precision": precision, "last_layer_accuracy": 0.8} | about


def timed(name, tpot, **about):
    case = dataclasses.asdict(spac_runs.Case(name))
    return {**case, "policy": spac_runs.Case(name).text, "tpot_ms": tpot} | about


def test_summary_and_verdicts_come_from_the_main_rows():
    rows = [estimator(spac_utility.OURS, 0.9, temperature=0.0)]
    rows += [estimator(spac_utility.OURS, 0.6), estimator(spac_utility.CONTROL, 0.55)]
    assert spac_utility.summarise(rows) == {"hot_precision": 0.6, "control_precision": 0.55}
    times = [timed("moe-spac", 2.0), timed("lru", 4.0), timed("host", 1.6)]
    times.append(timed("lru", 1.0, slots=96))
    targets = spac_utility.judge(rows, times)
    assert [target["met"] for target in targets.values()] == [True, False, False]
    assert targets["tpot over the best of the others"]["value"] == pytest.approx(1.25)


# resident routing


def numpy_softmax(x):
    grown = np.exp(x - x.max())
    return grown / grown.sum()


def test_a_draft_is_compared_with_the_truth_layer_by_layer():
    rng, (depth, layers, width, vocabulary) = np.random.default_rng(0), (2, 3, 5, 7)

    def output():
        scores = rng.dirichlet(np.ones(E), (depth, layers, 1)).astype(np.float32)
        picks = np.argsort(-scores, axis=-1)[..., :K].copy()
        picks[rng.random(picks.shape) < 0.4] = -1
        return types.SimpleNamespace(
            trace=types.SimpleNamespace(scores=jnp.asarray(scores), picks=jnp.asarray(picks)),
            hidden=jnp.asarray(rng.normal(size=(depth, layers, 1, width)).astype(np.float32)),
            logits=jnp.asarray(rng.normal(size=(depth, 1, vocabulary)).astype(np.float32)),
        )

    truth, draft = output(), output()
    found = resident_routing.compared(truth, draft, K)
    for d in range(depth):
        left = 0
        for layer in range(layers):
            mine, right = (
                np.argsort(-np.asarray(x.trace.scores[d, layer, 0]))[:K].tolist()
                for x in (draft, truth)
            )
            assert found.overlap[d, layer] == pytest.approx(len({*mine} & {*right}) / K)
            assert bool(found.top1[d, layer]) == (mine[0] == right[0])
            a, b = (np.asarray(x.hidden[d, layer, 0]) for x in (draft, truth))
            cosine = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
            assert found.cosine[d, layer] == pytest.approx(cosine, rel=1e-4)
            left += len({*mine} - {*np.asarray(draft.trace.picks[d, layer, 0]).tolist()})
        p, q = (numpy_softmax(np.asarray(x.logits[d, 0])) for x in (draft, truth))
        assert found.acceptance[d] == pytest.approx(1 - abs(p - q).sum() / 2, rel=1e-4)
        assert bool(found.greedy[d]) == (p.argmax() == q.argmax())
        assert found.left[d] == pytest.approx(left / (layers * K))


def found_drafts(windows=4, drafts=3):
    rng = np.random.default_rng(0)
    lead, deep = (windows, drafts, resident_routing.DEPTH), {"overlap", "top1", "cosine"}
    values = {
        name: rng.random((*lead, L)) if name in deep else rng.random(lead)
        for name in array_fields(resident_routing.Compared)
    }
    return resident_routing.Compared(**values)


def test_rows_of_drafts_are_means_by_position():
    found, domain = found_drafts(), np.arange(4)
    about = {"router": "SkipMissing", "residency": 0.5, "evictor": "lru"}
    rows = resident_routing.rows_of(about, found, domain, 0)
    assert [row["position"] for row in rows] == [1, 2, 3, 4, 5, 6, "mean"]
    assert rows[2]["overlap"] == pytest.approx(found.overlap[:, :, 2].mean())
    assert rows[2]["overlap_by_layer"] == pytest.approx(found.overlap[:, :, 2].mean((0, 1)))
    assert rows[2]["by_domain"]["code"]["greedy"] == pytest.approx(found.greedy[2, :, 2].mean())
    assert rows[-1]["acceptance"] == pytest.approx(found.acceptance.mean())
    low, high = rows[-1]["acceptance_interval"]  # one window a domain: nothing to draw
    assert low == pytest.approx(high) == pytest.approx(rows[-1]["acceptance"])


def test_the_summary_of_drafts_is_by_residency_and_position():
    rows = []
    for router in ("SkipMissing", "GatedBias"):
        for share in resident_routing.RESIDENCIES:
            for position in (*range(1, 7), "mean"):
                about = {"router": router, "residency": share, "position": position}
                values = {"overlap": share, "acceptance": share + (router == "GatedBias")}
                rows.append({**about, "evictor": resident_routing.OWN, **values})
    summary = resident_routing.summarise(rows)
    assert set(summary) == {"overlap_by_residency", "acceptance_by_residency"}
    keys = {"0.125", "0.25", "0.4", "0.5", "0.75"}
    assert all(set(part) == keys for part in summary.values())
    assert summary["acceptance_by_residency"]["0.4"] == {str(i): 0.4 for i in range(1, 7)}
    targets = resident_routing.judge(rows)
    assert [target["at_least"] for target in targets.values()] == [0.97, 0.9, 0.64, 0.73]
    assert [target["met"] for target in targets.values()] == [False, False, False, True]


def test_small_runs_record_what_the_engine_does():
    """With everything resident a draft is the model itself; recorded cycles hold its routing."""
    runtime = moejax.load("tiny", virtual=True)
    rng = np.random.default_rng(0)
    tokens = rng.integers(300, 4000, (1, 81))
    drafting = resident_routing.drafting("lru", resident_routing.SkipMissing())
    found = resident_routing.run(runtime, drafting, 192, tokens)
    assert found.overlap.shape == (1, 2, 6, 6)
    assert found.overlap.min() == 1 and found.acceptance.min() > 1 - 1e-5 and found.greedy.all()
    assert found.left.max() == 0
    assert resident_routing.run(runtime, drafting, 24, tokens).left.min() > 0.2

    draft = moejax.load("tiny-draft", context=256)
    parts = {"policy": policy("moe-spac"), "slots": 48, "draft": draft}
    spac = dataclasses.replace(runtime, **parts)
    given = spac_windows.record(spac, tokens[:, :64], 20, 8, 0.0, 0)
    assert given.picks.shape[2:] == (6, 9, 4) and given.count.sum() >= 20
    assert (given.picks[0, given.count[0] > 0] >= 0).all()
    assert given.resident.sum(axis=(2, 3)).max() <= 48
    made = [t for row, n in zip(given.token[0], given.count[0], strict=True) for t in row[:n]]
    # the engine's own levels begin with the prompt; without it the tokens' routing is the same
    lru = dataclasses.replace(runtime, policy=policy("lru"), slots=192)
    state, out = lru.decode_step(lru.init_state(1, context=128), np.int32(tokens[:, :64]))
    pending = int(out.logits[0].argmax())
    fed = [pending, *made[:-1]]
    each = spac_windows.single(given)
    state, out = lru.decode_step(state, np.int32(fed)[None], prefill=False)
    picks = np.asarray(jax.device_get(out.trace.picks)).swapaxes(0, 1)
    assert np.array_equal(each.picks[0, :, :, 0], picks)
