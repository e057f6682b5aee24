"""What a run learns between steps: the drift that steers alpha, and the costs that place misses."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_cli import ok, run

import moejax
from moejax import decode, live
from moejax.cli import actions as commands
from moejax.cycles import Cycles
from moejax.decode import decode_step
from moejax.errors import InputError, PolicyError
from moejax.generate import generate_step
from moejax.kernels import build as native
from moejax.live import Costs, Drift, DriftBudget
from moejax.policies.alternatives import LowBitFallback
from moejax.policies.placement import TwoPointer
from moejax.policies.policy import policy, with_alpha
from moejax.policies.prediction import NoPrediction
from moejax.sampling import Sampling, divergence
from moejax.speculate import Target
from moejax.stats import Stats
from moejax.terminal import Terminal

PROMPT = "The old house stood at the end of the village, and the boy who lived there"
NEW, EVERY = 100, 4

links = pytest.mark.skipif(native.library() is None, reason="links need the native library")


def steered(nats, found, alpha=0.5, steps=60):
    """The alphas of a run whose drift is a function of alpha."""
    chosen = with_alpha(policy("smoe-fetch"), alpha)
    drift = Drift(DriftBudget(nats), chosen)
    for _ in range(steps):
        chosen = drift.learn(chosen, jnp.full(3, found(float(chosen.router.alpha))))
        assert float(chosen.router.alpha) == pytest.approx(drift.stats.alphas[-1])
        assert float(chosen.predictor.alpha) == float(chosen.router.alpha)
    return drift.stats


def test_alpha_falls_above_the_budget_and_grows_below_it():
    above, below = steered(0.01, lambda _: 0.02), steered(0.01, lambda _: 0.005)
    assert np.all(np.diff([0.5, *above.alphas][:10]) < 0)
    assert np.all(np.diff([0.5, *below.alphas][:5]) > 0)
    for stats in (above, below):
        assert all(0 <= alpha <= 1 for alpha in stats.alphas)
    assert above.alphas[-1] < 0.01 and below.alphas[-1] == 1


def test_alpha_settles_where_the_drift_meets_the_budget():
    stats = steered(0.01, lambda alpha: 0.04 * alpha**2, alpha=0.9)
    assert stats.alphas[-1] == pytest.approx(0.5, abs=0.02)
    assert stats.probes == len(stats.alphas) == 60
    again = steered(0.01, lambda alpha: 0.04 * alpha**2, alpha=0.9)
    assert again == stats


@pytest.mark.parametrize("found", [0.0, 1e-30, 1e9])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_alpha_stays_in_its_range_and_can_come_back(found, alpha):
    stats = steered(0.01, lambda _: found, alpha)
    assert all(0 < a <= 1 for a in stats.alphas)
    assert stats.alphas[-1] == (1.0 if found < 0.01 else live.LEAST_ALPHA * live.SLOWEST)
    assert stats.nats == pytest.approx(found)


def test_the_mean_is_over_probes_and_sequences():
    chosen = policy("smoe-fetch")
    drift = Drift(DriftBudget(0.01), chosen)
    for nats in ([0.1, 0.3], [0.4, 0.8]):
        drift.learn(chosen, jnp.array(nats))
    assert drift.stats.nats == pytest.approx(0.4)


@pytest.mark.parametrize(("every", "due"), [(1, [0, 1, 2, 3, 4, 5, 6, 7]), (3, [0, 3, 6])])
def test_the_first_step_is_looked_at_and_then_every_so_many(every, due):
    drift = Drift(DriftBudget(0.01, every), policy("smoe"))
    assert [i for i in range(8) if drift.due()] == due


@pytest.mark.parametrize(
    ("nats", "every"), [(0, 1), (-1, 1), (float("nan"), 1), (float("inf"), 1), (0.1, 0)]
)
def test_a_budget_that_is_none_is_refused(nats, every):
    with pytest.raises(InputError, match=f"drift budget.* not {nats:g} nats every {every} steps"):
        DriftBudget(nats, every)


@pytest.mark.parametrize("name", ["lru", "cache-boost"])
def test_a_policy_without_alpha_cannot_be_steered(name):
    with pytest.raises(PolicyError, match="has not") as refused:
        Drift(DriftBudget(0.1), policy(name))
    assert type(policy(name).router).__name__ not in str(refused.value)


def test_an_alpha_at_which_0_is_not_exact_cannot_be_steered():
    low = LowBitFallback(alpha=jnp.float32(0.5), variant="share")
    with pytest.raises(PolicyError, match="share"):
        Drift(DriftBudget(0.1), dataclasses.replace(policy("low-bit"), router=low))
    Drift(DriftBudget(0.1), policy("low-bit"))


def tiny(name="smoe-fetch:alpha=0.35", **options):
    options = {"slots": 76, "context": 256, "virtual": "link" not in options} | options
    return moejax.load("tiny", policy=name, **options)


@pytest.fixture(scope="module")
def lossy():
    return tiny()


def tokens(runtime, temperature=0.7, **options):
    """(id, logprob) of the tokens of a run."""
    done = runtime.generate(PROMPT, NEW, {"temperature": temperature}, seed=3, **options)[0]
    assert runtime.stats.steps > NEW // 4
    return [(token.id, token.logprob) for token in done.tokens]


def frozen(monkeypatch):
    """Let no probe change alpha; the list of what they found."""
    found = []

    def noted(self, chosen, nats):
        found.append(np.asarray(nats))
        return chosen

    monkeypatch.setattr(Drift, "learn", noted)
    return found


def test_two_runs_under_a_drift_budget_are_equal_and_count_their_probes(lossy):
    budget = DriftBudget(0.002, EVERY)
    first = tokens(lossy, drift=budget)
    stats = lossy.stats
    assert tokens(lossy, drift=budget) == first
    again = lossy.stats
    assert again.drift.alphas == stats.drift.alphas and again.drift.nats == stats.drift.nats
    assert stats.drift.probes == len(stats.drift.alphas) == -(-stats.steps // EVERY)
    assert 0 < again.drift.seconds < again.decode_seconds
    assert stats.drift.alpha == stats.drift.alphas[-1]
    assert stats.new_tokens == len(first) == stats.steps + 1


def test_the_mean_drift_comes_near_its_budget(lossy):
    budgets = (0.001, 0.004)
    found = []
    for nats in budgets:
        tokens(lossy, drift=DriftBudget(nats, 2))
        found.append(lossy.stats.drift)
        assert nats / 4 < found[-1].nats < 4 * nats
    assert found[0].nats < found[1].nats
    assert np.mean(found[0].alphas) < np.mean(found[1].alphas)


def test_the_least_budget_makes_a_run_almost_exact(lossy):
    tokens(lossy)
    loose = lossy.stats
    drifting = tokens(lossy, drift=DriftBudget(1e-12, 1))
    stats = lossy.stats
    floor = live.LEAST_ALPHA * live.SLOWEST
    assert stats.drift.alphas[-1] == pytest.approx(floor)
    assert stats.replaced_mass / stats.steps < 0.1 * loose.replaced_mass / loose.steps
    exact = tokens(dataclasses.replace(lossy, policy=with_alpha(lossy.policy, 0.0)))
    assert [a[0] for a in drifting] == [a[0] for a in exact]


def test_a_probe_leaves_nothing_behind_but_resident_experts(lossy, monkeypatch):
    found = frozen(monkeypatch)
    exact = dataclasses.replace(lossy, policy=with_alpha(lossy.policy, 0.0))
    plain = tokens(exact)
    without = exact.stats
    assert tokens(exact, drift=DriftBudget(0.1, EVERY)) == plain  # every bit of every logprob
    assert exact.stats.steps == without.steps
    assert len(found) == -(-without.steps // EVERY) and not np.any(found)
    assert exact.stats.drift.fetched > 0


def without_prefetch():
    """SMoE's router at alpha 0 and nothing that moves records ahead of need."""
    return dataclasses.replace(policy("smoe-fetch:alpha=0"), predictor=NoPrediction())


def test_the_records_of_probes_are_counted(monkeypatch):
    frozen(monkeypatch)
    runtime = tiny(without_prefetch())
    tokens(runtime, drift=DriftBudget(0.1, 1))
    stats = runtime.stats
    moved = stats.fetched - stats.prefill_moved
    assert stats.drift.fetched > 0
    assert moved == stats.needed - stats.hits + stats.drift.fetched
    assert stats.bytes_per_step == pytest.approx(moved * stats.record_bytes / stats.steps)


@links
def test_a_link_counts_the_bytes_of_probes(monkeypatch):
    frozen(monkeypatch)
    runtime = tiny(without_prefetch(), link="paced:5,10")
    tokens(runtime, drift=DriftBudget(0.1, 1))
    assert runtime.stats.link_bytes == runtime.stats.fetched * runtime.stats.record_bytes


def test_prefetches_of_probes_are_no_uses_of_records_that_never_came(lossy):
    tokens(lossy, drift=DriftBudget(0.002, 1))
    assert 0 < lossy.stats.prefetch_use <= 1


def test_a_probe_sees_the_experts_that_the_run_has(lossy, monkeypatch):
    found = frozen(monkeypatch)
    ids = lossy.tokenizer.encode(PROMPT)
    wide = dataclasses.replace(lossy, policy=with_alpha(lossy.policy, 1.0))
    seen = []
    for length in range(4, len(ids)):
        first = wide.generate(ids[:length], 2, {"temperature": 0}, drift=DriftBudget(0.1))[0]
        logits = []
        for alpha in (1.0, 0.0):
            state = wide.init_state()
            padded = np.full((1, 64), -1, np.int32)
            padded[0, :length] = ids[:length]
            state, _ = wide.decode_step(state, padded)
            once = dataclasses.replace(wide, policy=with_alpha(wide.policy, alpha))
            token = np.array([[first.tokens[0].id]], np.int32)
            logits.append(once.decode_step(state, token)[1].logits)
        seen.append(float(divergence(logits[1], logits[0])[0]))
    assert len(found) == len(seen) and max(seen) > 1e-4
    assert np.allclose(np.ravel(found), seen, rtol=1e-3, atol=1e-7)


def test_a_batch_is_steered_by_the_sequences_that_go_on(lossy, monkeypatch):
    found = frozen(monkeypatch)
    prompts, greedy = [PROMPT, "The sea"], {"temperature": 0}
    texts = [c.text for c in lossy.generate(prompts, 20, greedy)]
    begun, later = texts[1][:15], texts[1][15:].split()[1:]
    stop = next(word for word in later if word not in texts[0] + begun)
    lossy.generate(prompts, 20, greedy, stop=stop, drift=DriftBudget(0.01, 1))
    sizes = [len(nats) for nats in found]
    assert sizes == sorted(sizes, reverse=True) and (sizes[0], sizes[-1]) == (2, 1)
    assert np.isfinite(np.concatenate(found)).all()


def test_nothing_is_compiled_after_the_warm_up_for_a_drift_budget():
    runtime = tiny(context=64, slots=70)
    budget, sampling = DriftBudget(0.01, 5), {"temperature": 0.5}
    commands.warm_up(Terminal(quiet=True), runtime, sampling=sampling, logprobs=0, drift=budget)
    compiled = generate_step._cache_size(), decode_step._cache_size()
    runtime.generate(PROMPT, 12, sampling, drift=budget)
    assert (generate_step._cache_size(), decode_step._cache_size()) == compiled


def test_steering_compiles_nothing_after_its_first_steps(lossy):
    tokens(lossy, drift=DriftBudget(0.002, EVERY))
    compiled = generate_step._cache_size()
    tokens(lossy, drift=DriftBudget(0.001, EVERY))
    tokens(lossy, drift=DriftBudget(0.001, 1))
    assert generate_step._cache_size() == compiled


def test_generate_takes_a_drift_budget_and_tells_what_came_of_it():
    options = ("-m", "tiny", "--slots", 76, "--context", 128, "--policy", "smoe-fetch", "-n", 12)
    drift = ("--drift-budget", 0.01, "--drift-every", 3)
    result = ok("generate", PROMPT, *options, *drift, "--json", "--temperature", 0)
    document = json.loads(result.stdout)
    found = document["stats"]["drift"]
    assert found["probes"] == 4 == len(found["alphas"])
    assert document["settings"]["drift"] == {"nats": 0.01, "every": 3}
    router = document["settings"]["policy"]["router"]
    assert router == {"type": "Substitute", "alpha": 0.25, "variant": "paper", "prefill": False}
    for said in ("nats per token; alpha", "4 probes", "of the model's own picks", "prefetch"):
        assert said in result.stderr
    assert "lossy: the model's own picks lost" in result.stderr
    plain = ok("generate", PROMPT, *options, "--json", "-q", "--policy", "lru", "--temperature", 0)
    assert json.loads(plain.stdout)["stats"]["drift"] is None


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--drift-budget", 0), "drift budget"),
        (("--drift-budget", "nan"), "drift budget"),
        (("--drift-every", 4), "--drift-budget too"),
        (("--drift-budget", 0.1, "--policy", "lru"), "which this policy has not"),
    ],
)
def test_a_drift_budget_that_cannot_be_is_one_line(arguments, said):
    result = run("generate", "The", "--context", 64, "-n", 4, "--slots", 76, "-q", *arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.count("\n") == 1 and said in result.stderr


class Link:
    """A link that says what it is told to."""

    def __init__(self):
        self.said = {"busy_us": 0, "landed": 0, "host_us": 0, "host_experts": 0}

    def stats(self):
        return type("Said", (), dict(self.said))

    def add(self, **more):
        self.said = {name: value + more.get(name, 0) for name, value in self.said.items()}


def test_costs_are_those_of_the_latest_steps():
    link, chosen = Link(), policy("balanced:load=4,host=2")
    link.add(busy_us=9000, landed=1, host_us=9000, host_experts=1)  # before this run
    costs = Costs(chosen, link)
    assert costs.active
    assert costs.learn(chosen) is chosen and costs.load_us is costs.host_us is None
    link.add(busy_us=600, landed=2)
    chosen = costs.learn(chosen)
    assert (costs.load_us, costs.host_us) == (300, None)
    assert (float(chosen.placement.load), float(chosen.placement.host)) == (300, 150)
    link.add(busy_us=100, landed=1, host_us=140, host_experts=2)
    chosen = costs.learn(chosen)
    assert (costs.load_us, costs.host_us) == (200, 70)
    assert (float(chosen.placement.load), float(chosen.placement.host)) == (200, 70)
    assert isinstance(chosen.placement, TwoPointer) and chosen.placement.load.dtype == jnp.float32


def test_costs_are_renewed_at_first_often_then_seldom():
    link, chosen = Link(), policy("auto:gamma=0")
    costs, renewed = Costs(chosen, link), []
    for step in range(1, 33):
        link.add(busy_us=100 * step, landed=1)
        before, chosen = chosen, costs.learn(chosen, 1e-3)
        renewed += [step] if chosen is not before else []
    assert renewed == [1, 2, 4, 8, 16, 24, 32]
    each = costs.load_us  # of the last records: 1 ms of a step over it
    assert float(chosen.foresight.rate) == pytest.approx(1000 / each)


@pytest.mark.parametrize("name", ["smoe", "lru", "host", "bandwidth", "smoe-released"])
def test_costs_stay_where_they_could_change_results_or_nobody_asks(name):
    assert not Costs(policy(name), Link()).active


def test_costs_need_a_link():
    assert not Costs(policy("balanced"), None).active and not Costs(None, None).active


def test_a_free_link_has_a_ratio_too():
    costs = Costs(policy("balanced:load=0,host=1"), link := Link())
    link.add(busy_us=10, landed=1)
    assert float(costs.learn(policy("balanced:load=0,host=1")).placement.host) == np.inf


@links
def test_live_costs_of_a_paced_link_are_what_it_says_and_change_no_bit():
    rate, latency, host = 0.5, 100, 300
    link = f"paced:{rate},{latency},{host}"
    plain = tokens(tiny("lru"))
    runtime = tiny("balanced:load=1,host=1000", link=link)
    assert tokens(runtime) == plain
    stats = runtime.stats
    record = latency + stats.record_bytes / (rate * 1e3)
    assert stats.host > 0 and stats.label == "bit-exact"
    assert record - 1 <= stats.load_us < 1.5 * record
    assert stats.host_us >= host


@links
def test_a_lossy_run_keeps_its_costs_so_that_time_cannot_change_it():
    runs = []
    for link in ("paced:5,10,20", "paced:0.2,300,900"):
        runtime = tiny("smoe:alpha=0.5", link=link)
        runs.append(tokens(runtime))
        assert runtime.stats.load_us is None and runtime.stats.host > 0
    assert runs[0] == runs[1]


@links
def test_the_table_tells_host_experts_and_live_costs():
    options = ("-m", "tiny", "--slots", 76, "--context", 128, "-n", 12, "--temperature", 0)
    link = ("--link", "paced:0.5,50,100")
    shown = ok("generate", PROMPT, *options, *link, "--policy", "balanced:load=1,host=1").stderr
    for said in ("experts on the host", "live costs", "record over the link", "bit-exact"):
        assert said in shown
    shown = ok("generate", PROMPT, *options, *link).stderr
    for unsaid in ("on the host", "live costs", "drift", "own picks", "prefetch", "replaced"):
        assert unsaid not in shown


@pytest.fixture(scope="module")
def drafting():
    """A lossy policy that drafts with residents."""
    return tiny("auto-lossy:alpha=0.8,gamma=3", slots=60)


def test_alpha_is_steered_while_drafting(drafting):
    budget = DriftBudget(0.001, 3)
    first = tokens(drafting, drift=budget)
    stats = drafting.stats
    assert tokens(drafting, drift=budget) == first
    assert drafting.stats.drift.alphas == stats.drift.alphas
    assert stats.drift.probes == len(stats.drift.alphas) == -(-stats.steps // 3)
    assert stats.drafted > 0 and stats.steps < stats.new_tokens - 1
    assert 0 < stats.drift.seconds < stats.decode_seconds and stats.drift.fetched > 0


def test_probes_of_cycles_leave_nothing_behind_but_resident_experts(drafting, monkeypatch):
    found = frozen(monkeypatch)
    exact = dataclasses.replace(drafting, policy=with_alpha(drafting.policy, 0.0))
    plain = tokens(exact, 0.0)  # sampled tokens change with the drafts, their distribution not
    assert tokens(exact, 0.0, drift=DriftBudget(0.1, 2)) == plain  # every bit of every logprob
    assert len(found) == -(-exact.stats.steps // 2) and not np.any(found)


def test_a_probe_of_a_cycle_finds_the_drift_of_its_tokens(drafting, monkeypatch):
    """Against passes over the same tokens, on copies of the state before the cycle."""
    found = frozen(monkeypatch)
    fixed = (drafting.model, drafting.policy, drafting.params, drafting.store)
    target = Target(**dict(zip(("model", "policy", "params", "store"), fixed, strict=True)))
    sampling = Sampling(temperature=0.0).validate()
    loop = Cycles(target, None, Stats(record_bytes=0), sampling, jax.random.key(0))
    loop.begin(drafting.init_state(), [np.array([77], np.int32)], None)
    own = with_alpha(drafting.policy, 0.0)
    several = 0
    for _ in range(12):
        before = jax.tree.map(jnp.copy, loop.run.state)
        pending, gamma = np.asarray(loop.run.pending), loop.gamma
        made = loop.step(np.ones(1, bool), np.full(1, 50), looked=True)
        count = int(made.count[0])
        drafts = made.proposed[:, :gamma]
        nats, totals = loop.probe()
        assert int(loop.run.state.length[0]) == int(before.length[0]) + count
        fed = np.concatenate([pending, drafts], axis=1).astype(np.int32)
        _, lossy = decode.decode_step(*fixed, jax.tree.map(jnp.copy, before), fed, all_logits=True)
        fixed_own = (drafting.model, own, *fixed[2:])
        _, exact = decode.decode_step(*fixed_own, before, fed[:, :count], all_logits=True)
        want = divergence(exact.logits, lossy.logits[:, :count]).mean(axis=1)
        assert np.allclose(nats, want, rtol=1e-3, atol=1e-6)
        several += count > 1
        assert int(totals.needed) > 0
    assert several > 3 and not found
