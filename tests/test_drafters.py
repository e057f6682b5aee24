"""What drafts need beside the model."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_speculate import drafting

import moejax
from moejax import drafters
from moejax.errors import PolicyError
from moejax.policies.drafting import NearestResident, RandomResident, SkipMissing
from moejax.policies.policy import policy
from moejax.policies.speculation import LookupDraft, ModelDraft, SelfDraft

SELF = SelfDraft(router=SkipMissing())


@functools.cache
def tiny(name="tiny"):
    return moejax.load(name, slots=76, context=64)


def loaded_with(draft):
    return moejax.load("tiny", slots=76, context=64, policy=with_draft(draft))


def with_draft(draft):
    return drafting(draft, 2)


def test_distances_are_filled_in_where_drafts_go_by_them(monkeypatch):
    table = np.arange(18, dtype=np.float32).reshape(2, 3, 3)
    asked = []

    def distances_of(runtime):
        asked.append(runtime)
        return table

    monkeypatch.setattr("moejax.distances.distances_of", distances_of)
    router = NearestResident(distance=None, picks=jnp.int32(3), weights="own")
    made = with_draft(SelfDraft(router=router, skip=(1,)))
    runtime = object()
    filled = drafters.completed(made, runtime)
    assert asked == [runtime]
    draft = filled.speculation.draft
    assert isinstance(draft.router.distance, jax.Array)
    assert np.array_equal(draft.router.distance, table)
    assert (draft.router.picks, draft.router.weights, draft.skip) == (3, "own", (1,))
    empty = dataclasses.replace(draft, router=dataclasses.replace(draft.router, distance=None))
    speculation = dataclasses.replace(filled.speculation, draft=empty)
    again = dataclasses.replace(filled, speculation=speculation)
    assert jax.tree.structure(again) == jax.tree.structure(made)  # all else as it was
    assert jax.tree.leaves(again) == jax.tree.leaves(made)
    assert drafters.completed(filled, runtime) is filled and len(asked) == 1
    assert made.speculation.draft.router.distance is None


@pytest.mark.parametrize(
    "draft", [SELF, SelfDraft(router=RandomResident()), LookupDraft(), ModelDraft()]
)
def test_other_drafts_need_no_distances(draft, monkeypatch):
    monkeypatch.delattr("moejax.distances.distances_of")
    made = with_draft(draft)
    assert drafters.completed(made, object()) is made
    plain = policy("lru")
    assert drafters.completed(plain, object()) is plain


def test_a_loaded_model_has_the_distances_of_its_experts():
    made = loaded_with(SelfDraft(router=NearestResident())).policy
    distance = np.asarray(made.speculation.draft.router.distance)
    config = tiny().config
    assert distance.shape == (config.num_moe_layers, config.num_experts, config.num_experts)
    assert (np.diagonal(distance, axis1=1, axis2=2) == 0).all()
    layer, one, other = 1, 3, 5
    ids = layer * config.num_experts + np.array([one, other])
    layout, records = tiny().store.layout, np.asarray(tiny().store.records)
    parts = [[layout.view(records[i], p).astype(np.float64) for p in layout.matrices] for i in ids]
    want = np.sqrt(sum(((a - b) ** 2).sum() for a, b in zip(*parts, strict=True)))
    assert distance[layer, one, other] == pytest.approx(want, rel=1e-3)


def test_the_embedded_model_brings_its_twin():
    twin = loaded_with(ModelDraft()).draft
    assert (twin.context, twin.model.dtype, twin.model.kernels) == (
        64,
        tiny().model.dtype,
        tiny().model.kernels,
    )
    assert twin.config.vocab_size == tiny().config.vocab_size
    assert twin.params is not tiny().params
    assert tiny().draft is None
    assert loaded_with(SELF).draft is None


def equipped(made, name="tiny", draft=None, **changes):
    """`drafters.equipped` of the embedded model; also what it loaded."""
    loaded = []

    def load(name, **options):
        loaded.append((name, options))
        return changes.get("other") or tiny("tiny-draft")

    runtime = dataclasses.replace(tiny(), policy=made, context=48)
    return drafters.equipped(runtime, name, draft, "reference", load), loaded


def test_a_draft_model_is_loaded_like_the_model():
    _, loaded = equipped(with_draft(ModelDraft()))
    options = {"dtype": "bfloat16", "context": 48, "kernels": "reference"}
    assert loaded == [("tiny-draft", options)]
    runtime, loaded = equipped(with_draft(ModelDraft()), name="/some/where", draft="other")
    assert loaded == [("other", options)] and runtime.draft is tiny("tiny-draft")
    assert equipped(with_draft(SELF))[1] == []


def test_draft_models_that_cannot_be_had_are_refused():
    with pytest.raises(PolicyError, match="name one as"):
        equipped(with_draft(ModelDraft()), name="/some/where")
    config = dataclasses.replace(tiny().config, vocab_size=99)
    other = tiny("tiny-draft")
    model = other.model.clone(config=config)
    with pytest.raises(PolicyError, match="99 tokens"):
        equipped(with_draft(ModelDraft()), other=dataclasses.replace(other, model=model))


def test_a_draft_model_that_nobody_asks_for_is_refused():
    with pytest.raises(PolicyError):
        equipped(with_draft(SELF), draft="tiny-draft")
