"""Memory budgets count what drafting needs: a draft model, and logits of every verified token."""

import json
import pathlib

import jax
import pytest

import moejax
from moejax import cycles, devices, generate, loading
from moejax.errors import BudgetError, PolicyError
from moejax.models import config_from_hf
from moejax.models.transformer import Decoder
from moejax.planner.machines import machine
from moejax.planner.plan import Asked, make
from moejax.policies.policy import policy

CONTEXT = 128


def decoder(name):
    config = config_from_hf(loading.read_config(loading.source_path(name)))
    return Decoder(config, "bfloat16", None, devices.kernels(None))


TINY, TWIN = decoder("tiny"), decoder("tiny-draft")


@pytest.fixture(scope="module")
def plain():
    """Bytes that plain decoding needs beside slots."""
    return devices.workspace_bytes(TINY, policy("lru"), 1, CONTEXT)


def test_what_just_fits_plain_decoding_has_fewer_slots_for_drafts(plain):
    drafting = "specmoe:gamma=24"
    stride = TINY.config.record_layout("bfloat16").stride
    parts = (devices.dense_bytes(TINY.config, "bfloat16"), devices.kv_bytes(TINY, 1, CONTEXT))
    budget = sum(parts) + plain + 40 * stride
    assert devices.slots_for(TINY, policy("lru"), budget, CONTEXT) == 40
    fewer = devices.slots_for(TINY, policy(drafting), budget, CONTEXT)
    # At least the logits of 25 verified tokens and the 24 drafts' of a sampled run, all at once.
    logits = (25 + 24) * TINY.config.vocab_size * 4
    assert TINY.config.top_k <= fewer <= 40 - (logits - plain) / stride < 40
    with pytest.raises(BudgetError, match="workspace"):
        least = budget - (40 - TINY.config.top_k) * stride
        devices.slots_for(TINY, policy(drafting), least, CONTEXT)


def test_scratch_of_a_cycle_grows_by_the_logits_of_its_rows(plain):
    row = TINY.config.vocab_size * 4
    sizes = [
        devices.workspace_bytes(TINY, policy(f"lookup:gamma={gamma}"), batch, CONTEXT)
        for gamma, batch in ((24, 1), (32, 2))
    ]
    assert plain < sizes[0]
    # One array of logits for each more verified token at the very least, and not many.
    assert (2 * 33 - 25) * row <= sizes[1] - sizes[0] <= 6 * (2 * 33 - 25) * row


def scratch_of_a_run(monkeypatch, runtime, sampling):
    """The most scratch memory of the programs that a run calls, by XLA's plan of each.

    They are lowered anew for the arguments that the run itself gives them.
    """
    taken = []

    def watched(module, name):
        real = getattr(module, name)

        def call(*args, **options):
            plan = real.lower(*args, **options).compile().memory_analysis()
            kept = plan.output_size_in_bytes - plan.alias_size_in_bytes
            taken.append((plan.temp_size_in_bytes + kept, name))
            return real(*args, **options)

        monkeypatch.setattr(module, name, call)

    watched(cycles, "cycle")
    watched(generate, "generate_step")
    runtime.warm_up(sampling=sampling)  # prompts, and cycles of all lengths
    assert {name for _, name in taken} == {"cycle", "generate_step"}
    return max(taken)[0]


def test_a_draft_model_takes_its_memory_from_the_slots(tmp_path, monkeypatch):
    budget = 14 << 20
    runtime = moejax.load("tiny", device_memory=budget, context=CONTEXT, policy="sp-moe:gamma=2")
    alone = moejax.load("tiny", device_memory=budget, context=CONTEXT)
    stride = runtime.store.layout.stride

    def held(one):
        leaves = jax.tree.leaves((one.params, one.init_state().kv))
        return sum(leaf.nbytes for leaf in leaves)

    assert held(runtime.draft) == devices.draft_bytes(TWIN, 1, CONTEXT)
    assert alone.slots - runtime.slots >= held(runtime.draft) // stride
    used = held(runtime) + held(runtime.draft) + runtime.slots * stride
    used += scratch_of_a_run(monkeypatch, runtime, {"temperature": 1.0})
    # The text that cycles keep is counted, too: a token more than the context.
    assert used <= budget < used + stride + 4 * (CONTEXT + 1)
    with pytest.raises(BudgetError, match="draft model"):
        moejax.load("tiny", device_memory=6 << 20, context=CONTEXT, policy="sp-moe")
    with pytest.raises(PolicyError, match="tokens and the model"):
        other = pathlib.Path(tmp_path, "config.json")
        config = json.loads((loading.source_path("tiny-draft") / "config.json").read_text())
        other.write_text(json.dumps(config | {"vocab_size": 99}))
        moejax.load("tiny", device_memory=budget, policy="sp-moe", draft=tmp_path)
    with pytest.raises(PolicyError, match="no model drafts"):
        moejax.load("tiny", device_memory=budget, policy="lru", draft="tiny-draft")


def test_plans_count_it_as_loading_does():
    asked = Asked(model="tiny", device_memory=18 << 20, context=CONTEXT, link="paced:0.7,0,53")
    plan = make(asked, machine("server-2core"))
    assert policy(plan.policy).speculation.max_length
    how = {"device_memory": "18MiB", "link": asked.link, "context": CONTEXT}
    runtime = moejax.load("tiny", policy=plan.policy, **how)
    assert runtime.slots == plan.slots
