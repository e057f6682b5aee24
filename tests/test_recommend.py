"""What plans propose: splits of misses and drafts where arithmetic and record say so, and why."""

import dataclasses
import json
import pathlib
import re
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moejax.errors import BudgetError, InputError
from moejax.models import config_from_hf
from moejax.models.transformer import Decoder
from moejax.planner import catalogue, predict, recommend
from moejax.planner import plan as planning
from moejax.planner.layout import Layout, behind
from moejax.planner.machines import machine
from moejax.planner.plan import OFFLOADED, RESIDENT, Asked, make
from moejax.planner.predict import Work
from moejax.policies.policy import policy
from moejax.tiers import parse_link

ROOT = pathlib.Path(__file__).parents[1]
SERVER = machine("server-2core")
LINK = "paced:0.7,0,53"  # as the frontier was recorded
WORK = Work(
    layers=2,
    moe_layers=2,
    experts=32,
    top_k=4,
    record_bytes=10**6,
    expert_bytes=10**6,
    expert_weights=10**6 // 2,
    dense_bytes=10**6,
    dense_weights=10**6 // 2,
    kv_bytes_per_token=0.0,
    attention_width=1,
)
PLAIN = dataclasses.replace(SERVER, kernels={}, draw_us=0.0, step_us=0.0, layer_us=0.0)


def tiny(**asked):
    return Asked(model="tiny", context=128, **asked)


# Splits


@given(st.floats(0.01, 50), st.floats(0.01, 50), st.floats(0.1, 100), st.integers(1, 12), st.data())
def test_a_split_is_the_best_of_all(link, host, device, misses, data):
    rates = {"link_gb_per_s": link, "host_gb_per_s": host, "device_gb_per_s": device}
    chosen = dataclasses.replace(PLAIN, **rates, link_latency_us=data.draw(st.floats(0, 50)))
    load, alone = predict.miss_us(WORK, chosen, "link")
    assert load == pytest.approx(1e3 / link + chosen.link_latency_us)
    assert alone == pytest.approx(1e3 / host)
    ends = []
    for moved in range(misses + 1):
        link_ends = sum(load for _ in range(moved))
        host_ends = sum(alone for _ in range(misses - moved))
        ends.append(max(link_ends, host_ends) + moved * 1e3 / device)
    found = predict.split(WORK, chosen, "link", misses)
    took = misses * found.each_us + misses * found.moved * 1e3 / device
    assert took == pytest.approx(min(ends))
    within = predict.split(WORK, chosen, "memory", misses)
    one = within.each_us + within.moved * 1e3 / device
    assert one == pytest.approx(min(alone, load + 1e3 / device))


def test_a_token_with_a_split_is_the_sum_of_its_layers():
    slow = dataclasses.replace(PLAIN, link_gb_per_s=1.0, link_latency_us=0.0, host_gb_per_s=2.0)
    fast = dataclasses.replace(slow, device_gb_per_s=10.0, device_gflops=1e9)
    # Three misses of four in each layer: one is moved (1000 us) while two are computed (1000 us).
    found = predict.token(WORK, fast, "link", 0.25, 0, hosted=True)
    read = (WORK.dense_bytes + 2 * (1 + 1) * WORK.expert_bytes) / 10e9 * 1e3
    assert found.total_ms == pytest.approx(read + 2 * 1.0)
    assert (found.moving_ms, found.host_ms) == (pytest.approx(2.0), pytest.approx(0.0))
    moved = predict.token(WORK, fast, "link", 0.25, 0)
    assert moved.total_ms == pytest.approx(
        (WORK.dense_bytes + 8 * WORK.expert_bytes) / 10e9 * 1e3 + 6 * 1.0
    )
    none = predict.token(WORK, fast, "resident", 0.25, 0, hosted=True)
    assert none.host_ms == none.moving_ms == 0


def test_measured_kernels_take_the_place_of_the_roofline():
    by = {"1": 40.0, "4": 70.0, "16": 160.0}
    known = dataclasses.replace(PLAIN, kernels={"bfloat16": by})
    found = [known.kernel_us("bfloat16", n) for n in (1, 2.5, 4, 16, 64)]
    assert found == pytest.approx([40, 55, 70, 160, 640])
    assert known.kernel_us("int8", 1) is None
    token = predict.token(WORK, known, "resident", 1.0, 0)
    weights = WORK.dense_weights + 8 * WORK.expert_weights
    assert token.total_ms == pytest.approx(weights / 1e6 * 40 / 1e3)
    other = dataclasses.replace(WORK, format="int8")
    assert predict.token(other, known, "resident", 1.0, 0).kernels_ms == 0
    # 48 tokens in chunks of 16: dense weights for 16 rows thrice, experts by their mean of tokens.
    prompt = predict.prompt(WORK, known, "resident", 64, 48, 16)
    each = 16 * 4 / WORK.distinct(16)
    experts = 3 * 2 * WORK.distinct(16) * WORK.expert_weights * np.interp(each, (1, 4), (40, 70))
    products = 2 * 2 * 1 * 48**2 / known.flops * 1e3
    dense = 3 * WORK.dense_weights * 160
    assert prompt.total_ms == pytest.approx((experts + dense) / 1e9 + products)
    # Half a chunk is padded: the dense weights are for 16 rows all the same.
    short = predict.prompt(WORK, known, "resident", 64, 8, 16)
    experts = 2 * WORK.distinct(8) * WORK.expert_weights
    experts *= np.interp(8 * 4 / WORK.distinct(8), (1, 4), (40, 70))
    products = 2 * 2 * 1 * 8**2 / known.flops * 1e3
    assert short.total_ms == pytest.approx((experts + dense / 3) / 1e9 + products)


def test_choosing_a_token_costs_by_the_vocabulary():
    slow = dataclasses.replace(PLAIN, draw_us=7.0)
    wide = dataclasses.replace(WORK, vocabulary=32_000)
    found = predict.token(wide, slow, "resident", 1.0, 0)
    given_one = predict.token(wide, slow, "resident", 1.0, 0, drawn=False)
    assert found.total_ms - given_one.total_ms == pytest.approx(32 * 7 / 1e3)
    two = predict.prompt(wide, slow, "resident", 64, 100, 64)
    assert two.drawing_ms == pytest.approx(2 * 32 * 7 / 1e3)


# Proposals


def test_within_one_memory_misses_stay_where_they_are_unless_that_is_slower():
    plan = make(tiny(device_memory=6 << 20), SERVER)
    assert (plan.policy, plan.tier, plan.hosted) == ("host", "memory", True)
    assert plan.hits.middle == 0 and "begin empty" in plan.hits.source
    assert plan.tpot.moving_ms == 0 < plan.tpot.host_ms
    assert plan.tpot.total_ms < plan.bounds_ms["all misses moved"]
    for number in (plan.tpot.total_ms, plan.bounds_ms["all misses moved"]):
        assert f"{number:.2f}" in plan.reason
    assert any("no drafts" in note for note in plan.notes)
    assert "--policy host " in plan.command
    slow = dataclasses.replace(SERVER, host_gb_per_s=0.1)
    left = make(tiny(device_memory=6 << 20), slow)
    assert (left.policy, left.hosted) == (OFFLOADED, False)
    assert any("no split of misses: a miss takes" in note for note in left.notes)
    assert "all misses moved" not in left.bounds_ms


@pytest.mark.parametrize(("memory", "drafts"), [(6 << 20, False), (18 << 20, True)])
def test_over_a_link_misses_are_split_and_drafts_made_as_recorded(memory, drafts):
    plan = make(tiny(device_memory=memory, link=LINK), SERVER)
    share = plan.slots / plan.experts
    assert (plan.tier, plan.hosted, share >= 0.5) == ("link", True, drafts)
    name, _, numbers = plan.policy.partition(":")
    given_numbers = dict(part.split("=") for part in numbers.split(","))
    assert name == "auto" and given_numbers.get("gamma") == (None if drafts else "0")
    # 110592 bytes at 0.7 GB/s, and the link's 53 us on the host
    assert float(given_numbers["load"]) == pytest.approx(110592 / 0.7e9 * 1e3, rel=1e-3)
    assert float(given_numbers["host"]) == pytest.approx(0.053, rel=1e-3)
    assert bool(policy(plan.policy).speculation.max_length) == drafts
    assert f": {plan.tpot.total_ms:.2f} ms per token, " in plan.reason
    said = " ".join([plan.reason, *plan.notes])
    assert "speculation_frontier.json" in said and ("no drafts" in said) != drafts
    assert f"--link {LINK}" in plan.command and plan.store == {"in memory": 192 * 110592}
    # With most experts in slots splits were recorded to lose to lru.
    most = make(tiny(device_memory=22 << 20, link=LINK), SERVER)
    assert 0.75 <= most.slots / most.experts < 1 and (most.policy, most.hosted) == (
        OFFLOADED,
        False,
    )
    assert any(
        "no split of misses: with loads of 29.5 us in a layer" in note for note in most.notes
    )
    fast = make(tiny(device_memory=18 << 20, link="paced:1000,0"), SERVER)
    assert not policy(fast.policy).speculation.max_length


def layouts(monkeypatch, change):
    """Layouts of policies other than the plain one, as `change` makes them of the true ones."""
    real = planning.layout_of

    def changed(*fixed):
        found = real(*fixed)
        return found if fixed[-1] == OFFLOADED else change(found, policy(fixed[-1]))

    monkeypatch.setattr(planning, "layout_of", changed)


def test_what_a_policy_needs_itself_is_weighed_before_it_is_proposed(monkeypatch):
    def change(found, chosen):
        return dataclasses.replace(found, slots=90) if chosen.speculation.max_length else found

    layouts(monkeypatch, change)
    plan = make(tiny(device_memory=14 << 20, link=LINK), SERVER)
    # Drafts pay from half of the experts on, but with their memory there are fewer.
    assert plan.policy.startswith("auto:gamma=0,") and plan.slots > 96
    assert f": {plan.tpot.total_ms:.2f} ms per token, " in plan.reason
    [why] = [note for note in plan.notes if note.startswith("no drafts")]
    assert "leaves 90 of 192 slots; with those: no drafts, whose gain" in why
    assert "with 25.0% resident" in why


def test_a_policy_that_does_not_fit_leaves_the_weights_as_they_are(monkeypatch):
    def drafts_do_not_fit(found, chosen):
        if chosen.speculation.max_length:
            raise BudgetError("no room")
        return found

    def nothing_fits(found, chosen):
        raise BudgetError("no room")

    over = tiny(device_memory=14 << 20, link=LINK)
    with monkeypatch.context() as patch:
        layouts(patch, drafts_do_not_fit)
        plan = make(over, SERVER)
    assert plan.policy.startswith("auto:gamma=0,")
    assert any(re.match("no drafts: what they need.*no room", note) for note in plan.notes)
    layouts(monkeypatch, nothing_fits)
    left, within = (make(one, SERVER) for one in (over, tiny(device_memory=6 << 20)))
    whole = make(tiny(device_memory=40 << 20), SERVER)
    assert whole.tier == "resident"
    for one in (left, within, whole):
        assert (one.policy, one.quant, one.format, one.hosted) == (
            *(OFFLOADED, None, "bfloat16"),
            False,
        )
        assert not any("it does not fit with" in note for note in one.notes)
    assert sum("no room" in note for note in left.notes) == 2
    assert any(note.startswith("no host: ") and "no room" in note for note in within.notes)


def test_drafts_that_would_change_bits_are_not_proposed():
    config = catalogue.CONFIGS["deepseek-ai/DeepSeek-V2-Lite"]
    model = Decoder(config_from_hf(config), "bfloat16", None, "native")
    plan = Layout(model, 128, "link", 26 * 64 // 2, 1 << 40, (), dense=1, kv=1)
    assert recommend.drafts(plan.slots / plan.total)[1] and plan.tier == "link"
    slow = dataclasses.replace(PLAIN, link_gb_per_s=0.1)
    found = recommend.recommended(plan, WORK, slow, 0.5, 64)
    assert not policy(found.policy).speculation.max_length and "latent" in found.against[0]


def test_what_cannot_run_is_not_proposed_and_said_so():
    gpu = make(tiny(device_memory=9 << 20), machine("rtx-4090"))
    disk = make(tiny(host_memory=12 << 20), SERVER)
    assert (gpu.tier, disk.tier) == ("link", "disk")
    for plan, why in ((gpu, "beside a GPU"), (disk, "the disk has no copy")):
        assert (plan.policy, plan.hosted) == (OFFLOADED, False)
        assert any(why in note for note in plan.notes)
        assert any("no drafts" in note for note in plan.notes)
    whole = make(tiny(), SERVER)
    assert (whole.policy, whole.notes) == (RESIDENT, [])


def test_links_that_a_plan_cannot_have_are_refused():
    for asked, planned_for, why in (
        ({"link": LINK}, SERVER, "give device_memory"),
        ({"link": "disk", "device_memory": 6 << 20}, SERVER, "host_memory does not hold"),
        ({"link": LINK, "device_memory": 9 << 20}, machine("rtx-4090"), "without a GPU"),
        ({"link": "slow", "device_memory": 6 << 20}, SERVER, "link must be"),
        ({"policy": "sp-moe", "device_memory": 6 << 20}, SERVER, "plans do not know the model"),
    ):
        with pytest.raises(InputError, match=why):
            make(tiny(**asked), planned_for)


def test_a_policy_that_is_asked_for_is_planned():
    plan = make(tiny(device_memory=6 << 20, policy="lru"), SERVER)
    assert (plan.policy, plan.reason, plan.hosted) == ("lru", "asked for", False)
    assert plan.tpot.moving_ms > 0 == plan.tpot.host_ms


def test_a_paced_link_slows_the_host_only_as_far_as_it_says():
    for text, host in (("paced:2,10", 25.0), ("paced:2,10,80", 12.5), ("paced:2,10,1", 25.0)):
        one = dataclasses.replace(PLAIN, host_gb_per_s=25.0)
        found = behind(one, parse_link(text), WORK)
        assert found.rate("host") / 1e9 == pytest.approx(host)
        assert (found.rate("link"), found.link_latency_us) == (2e9, 10)
    assert behind(PLAIN, None, WORK) is PLAIN


# The record


shares = st.floats(0.01, 0.99)
rows = st.lists(st.tuples(shares, st.booleans()), min_size=1, max_size=5, unique_by=lambda r: r[0])


@given(rows, shares)
def test_drafts_pay_from_where_they_always_did(known, share):
    made = [{"residency": r, "auto_ms": 1.0, "plain_ms": 2.0 if won else 0.5} for r, won in known]
    # A share counts as the recorded one below it; below all of them nothing is known to pay.
    below = [r for r, _ in known if r <= share]
    expected = bool(below) and all(won for r, won in known if r >= max(below))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recommend, "record", lambda: {"rows": made})
        said, pays = recommend.drafts(share)
    assert pays == expected
    assert said.startswith("drafts" if pays else "no drafts")


def test_splits_pay_as_they_did_with_the_next_shorter_loads():
    made = [
        {"residency": r, "plain_ms": plain, "lru_ms": 2.0, "lru_missed": 4 * missed}
        for r, plain, missed in ((0.25, 1.0, 2.0), (0.5, 1.95, 1.0), (0.75, 1.5, 0.5))
    ]
    link = {"link": "paced:1,0,0.5", "record_bytes": 1000}  # a load takes 1 us
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recommend, "record", lambda: {"rows": made, "layers": 4, **link})
        found = [recommend.splits(m)[1] for m in (0.4, 0.5, 0.9, 1.0, 1.9, 2.0, 6.0)]
    # 1.95 ms is not less than 2.0 by what runs differ; shorter loads are not known to pay.
    assert found == [False, True, True, False, False, True, True]


def test_the_record_is_not_taken_for_links_where_a_split_saves_less():
    load, host = recommend.recorded_us()
    rate, latency, host_us = map(
        float, recommend.record()["link"].removeprefix("paced:").split(",")
    )
    assert (load, host) == (pytest.approx(110592 / rate / 1e3 + latency), host_us)
    for faster, slower, known in (
        (1.0, 1.0, True),
        (0.97, 0.97, True),
        (100.0, 100.0, True),  # larger experts on a slower machine
        (100.0, 1.0, True),
        (0.9, 0.9, False),
        (1.0, 1.2, False),
        (10.0, 20.0, False),
    ):
        assert (recommend.outside(load * faster, host * slower) == "") == known
    for link, why in (("paced:1000,0", "loads so short"), ("paced:0.5,0,120", "a host so slow")):
        plan = make(tiny(device_memory=9 << 20, link=link), SERVER)
        assert (plan.policy, plan.hosted) == (OFFLOADED, False)
        refused = [n for n in plan.notes if n.startswith("no split of misses: a miss takes")]
        assert len(refused) == 1 and why in refused[0] and "53.0 us" in refused[0]
        assert "no drafts: likewise" in plan.notes


def test_what_is_said_of_the_plain_policy_is_what_was_recorded():
    frontier, sweep = (
        json.loads((ROOT / "experiments" / "results" / f"{name}.json").read_text())
        for name in ("speculation_frontier", "simulate_sweep")
    )
    assert policy(OFFLOADED).evictor.decay == pytest.approx(0.95)
    missed = {
        name: {row["residency"]: row["missed"] for row in frontier["rows"] if row["name"] == name}
        for name in (OFFLOADED, RESIDENT)
    }
    assert all(missed[OFFLOADED][r] < m for r, m in missed[RESIDENT].items() if r >= 0.25)
    hits = sweep["global"]["rows"]
    lru = {row["slots"]: row["hit_rate"] for row in hits if row["policy"] == RESIDENT}
    near = [
        row["hit_rate"] > lru[row["slots"]]
        for row in hits
        if row["policy"].startswith(f"{OFFLOADED}:decay=0.9")
        and abs(float(row["policy"].partition("=")[2]) - 0.95) < 0.01
        and row["slots"] >= 0.06 * 48 * 128
    ]
    assert len(near) > 20 and all(near)


def test_the_record_is_that_of_the_frontier():
    sys.path.insert(0, str(ROOT))
    from experiments import plan_break_even

    report = json.loads(plan_break_even.RECORD.read_text())
    assert recommend.record() == plan_break_even.digest(report)
    assert [recommend.drafts(share)[1] for share in (0.1, 0.25, 0.49, 0.5, 0.9)] == [
        *(False, False, False),
        *(True, True),
    ]
