"""Loss under drafts is that of a run which makes the very text."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import moejax
from moejax import loss
from moejax.cycles import Cycles
from moejax.errors import InputError
from moejax.kernels import build as build_native
from moejax.policies.lengths import FixedLength
from moejax.policies.policy import policy
from moejax.sampling import Sampling
from moejax.speculate import Target
from moejax.stats import Stats

needs_native = pytest.mark.skipif(build_native.library() is None, reason=build_native.status())


def drafting(alpha, gamma=3):
    """`auto-lossy` that always drafts so many tokens."""
    made = policy(f"auto-lossy:alpha={alpha},gamma={gamma}")
    speculation = dataclasses.replace(made.speculation, lengths=FixedLength(gamma=jnp.int32(gamma)))
    return dataclasses.replace(made, speculation=speculation)


def cycled(runtime, first, count):
    """The text [count + 1] that greedy cycles make of one token, and a list of what each did."""
    target = Target(
        model=runtime.model, policy=runtime.policy, params=runtime.params, store=runtime.store
    )
    sampling, key = Sampling(temperature=0.0).validate(), jax.random.key(0)
    loop = Cycles(target, None, Stats(record_bytes=0), sampling, key)
    loop.begin(runtime.init_state(1, context=count + 1), [np.array([first], np.int32)], None)
    text, done = [first], []
    while len(text) <= count:
        made = loop.step(np.ones(1, bool), np.full(1, count + 1 - len(text)))
        tokens = made.token[0, : made.count[0]].tolist()
        totals = made.totals
        done.append((len(tokens), int(totals.needed), int(totals.hits), int(totals.replaced)))
        text += tokens
    return np.array(text, np.int32), done


@needs_native
@pytest.mark.parametrize("local", [False, True])
def test_a_text_is_measured_in_the_passes_that_made_it(local):
    runtime = moejax.load("tiny", slots=40, policy=drafting(0.8), virtual=True, context=128)
    text, done = cycled(runtime, 3000, 60)
    windows = text[None]
    found = loss.measure(runtime, windows, loss.exact_logits(runtime, windows), local=local)
    starts = np.cumsum([0, *(count for count, *_ in done)])[:-1]
    assert np.array_equal(np.flatnonzero(found.passes[0]), starts) and len(starts) < 50
    for name, place in (("needed", 1), ("hits", 2), ("replaced", 3)):
        assert getattr(found, name)[0, starts].tolist() == [row[place] for row in done], name
        assert getattr(found, name).sum() == sum(row[place] for row in done)
    assert found.replaced.sum() > 0 and found.trajectory.max() > 1e-4
    if local:
        assert 0 < found.local.max() and (found.local != found.trajectory).any()
    summary = found.summary()
    assert summary["tokens_per_pass"] == pytest.approx(60 / len(done))


@needs_native
def test_an_exact_policy_loses_nothing_by_drafts():
    runtime = moejax.load("tiny", slots=64, policy="self-draft", virtual=True, context=128)
    text, _ = cycled(runtime, 5, 40)
    wrong = np.random.default_rng(0).integers(5, 4000, text.shape).astype(np.int32)
    windows = np.stack([text, wrong])
    found = loss.measure(runtime, windows, loss.exact_logits(runtime, windows))
    assert np.array_equal(found.nll, found.exact_nll) and not found.flipped.any()
    assert not found.local.any() and np.abs(found.trajectory).max() < 1e-6
    assert found.passes[0].sum() < 30 and found.passes[1].sum() == 40
    with pytest.raises(InputError, match="local"):
        loss.layer_prices(found)


@needs_native
def test_drafts_change_what_a_lossy_run_loses():
    """Rejected drafts are routed with the text and share what is kept for anyone."""
    windows = np.random.default_rng(3).integers(5, 4000, (2, 33)).astype(np.int32)
    losses = []
    for gamma in (0, 3):
        made = drafting(0.5, gamma) if gamma else policy("auto-lossy:alpha=0.5")
        runtime = moejax.load("tiny", slots=64, policy=made, virtual=True, context=64)
        exact = loss.exact_logits(runtime, windows)
        losses.append(loss.measure(runtime, windows, exact, local=False))
    plain, drafted = losses
    assert drafted.needed.sum() > 1.5 * plain.needed.sum()
    assert not np.array_equal(plain.nll, drafted.nll)


def test_drafts_of_another_model_are_refused():
    runtime = moejax.load("tiny", slots=64, policy="sp-moe", virtual=True, context=64)
    windows = np.full((1, 9), 7, np.int32)
    with pytest.raises(InputError, match="another model"):
        loss.measure(runtime, windows, np.zeros((1, 8, 4096), np.float32))
