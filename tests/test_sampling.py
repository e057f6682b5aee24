"""Sampling against transformers' own logits processors, and against the chi-square distribution."""

import functools
from types import SimpleNamespace
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GenerationConfig
from transformers.generation.utils import GenerationMixin

from moejax.errors import InputError
from moejax.sampling import (
    Sampling,
    mark_seen,
    nonfinite_rows,
    processed_logits,
    sample,
    sampling_from,
    sequence_keys,
    token_logprobs,
    top_logprobs,
)
from moejax.state import array_fields

VOCABULARY = 24
# Where a threshold falls on a cumulative sum, float rounding decides in both implementations.
NUDGES = [(a, b) for a in (0.0, 2e-6, -2e-6) for b in (0.0, 2e-6, -2e-6)]

process = jax.jit(processed_logits)
draw = jax.jit(sample)


def keys_for(batch, seed=0):
    return sequence_keys(
        jax.random.key(seed), jnp.arange(batch, dtype=jnp.int32), jnp.zeros(batch, jnp.int32)
    )


def reference(logits, prompt, *, temperature, top_k, top_p, min_p, repetition_penalty):
    """Logits after the processors that transformers' generate builds for these settings.

    Its top-p sorts with torch.sort, which breaks ties in no defined order from 17 values on; here
    the sort is stable, as it is for fewer values.
    """
    config = GenerationConfig(
        do_sample=temperature > 0,
        temperature=temperature or 1.0,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        num_beams=1,
    )
    owner = GenerationMixin()
    owner.config = SimpleNamespace(is_encoder_decoder=False)
    processors = owner._get_logits_processor(config, input_ids_seq_length=prompt.shape[1])
    stable = functools.partial(torch.sort, stable=True)
    with mock.patch.object(torch, "sort", stable):
        scores = processors(torch.tensor(prompt, dtype=torch.long), torch.tensor(np.array(logits)))
    return scores.numpy()


def probabilities(logits):
    return np.asarray(jax.nn.softmax(jnp.asarray(logits, jnp.float32), axis=-1))


def same_distribution(ours, logits, prompt, options):
    for dp, dm in NUDGES:
        nudged = dict(options)
        nudged["top_p"] = float(np.clip(options["top_p"] + dp, 0, 1)) if options["top_p"] < 1 else 1
        nudged["min_p"] = float(np.clip(options["min_p"] * (1 + dm), 0, 1))
        theirs = probabilities(reference(logits, prompt, **nudged))
        if np.allclose(probabilities(ours), theirs, rtol=0, atol=1e-6):
            return True
    return False


logit_values = st.one_of(
    st.integers(-24, 24).map(lambda i: i / 4),
    st.sampled_from([0.0, -0.0, 1.0]),
    st.floats(-30, 30, width=32),
)
options_strategy = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([1.0, 0.05, 0.7, 1.3, 3.0]),
        "top_k": st.sampled_from([0, 1, 2, 5, VOCABULARY, 500]),
        "top_p": st.one_of(st.just(1.0), st.floats(0, 1)),
        "min_p": st.one_of(st.just(0.0), st.just(1.0), st.floats(0, 1)),
        "repetition_penalty": st.sampled_from([1.0, 0.5, 1.1, 2.0]),
    }
)


@settings(max_examples=80, deadline=None)
@given(
    st.lists(logit_values, min_size=2 * VOCABULARY, max_size=2 * VOCABULARY),
    st.lists(st.integers(0, VOCABULARY - 1), min_size=6, max_size=6),
    options_strategy,
)
def test_the_filtered_distribution_is_that_of_transformers(values, prompt, options):
    logits = np.array(values, np.float32).reshape(2, VOCABULARY)
    prompt = np.array(prompt).reshape(2, 3)
    seen = mark_seen(jnp.zeros((2, VOCABULARY), bool), jnp.asarray(prompt))
    ours = process(logits, Sampling(**options).validate(), seen)
    assert same_distribution(ours, logits, prompt, options)


@pytest.mark.parametrize(
    ("row", "options"),
    [
        ([1.0, 1.0, 1.0, 0.0], {"top_k": 2}),  # three share the second place
        ([0.0, -0.0, 0.0, -1.0], {"top_k": 1}),
        ([0.0, 0.0, 0.0, 0.0], {"top_p": 0.5}),  # a cumulative sum equal to 1 - p is removed
        ([0.0, 0.0, 0.0, 0.0], {"top_p": 0.25}),
        ([0.0, 0.0, 0.0, 0.0], {"top_p": 0.0}),  # one stays: the last of equals
        ([0.0, 0.0, 0.0, 0.0], {"min_p": 1.0}),
        ([0.0, 3.0, 2.0, 1.0], {"top_p": 0.0}),
        ([0.0, 3.0, 2.0, 1.0], {"top_k": 3, "top_p": 0.7, "min_p": 0.3, "temperature": 2.0}),
        ([1.0, 0.0] * 12, {"top_p": 0.4}),
        ([-200.0, 100.0, -300.0, 99.0], {"top_p": 0.9999, "temperature": 0.5}),
    ],
)
def test_ties_and_edges_are_those_of_transformers(row, options):
    plain = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
    logits = np.array([row], np.float32)
    ours = process(logits, Sampling(**options).validate())
    theirs = reference(logits, np.zeros((1, 1), int), **{**plain, **options})
    np.testing.assert_array_equal(np.isinf(ours), np.isinf(theirs))
    np.testing.assert_allclose(probabilities(ours), probabilities(theirs), atol=1e-6)


def test_a_vocabulary_of_real_size_is_filtered_as_by_transformers():
    logits = np.random.default_rng(0).normal(size=(1, 151_936)).astype(np.float32) * 3
    options = {"temperature": 0.6, "top_k": 40, "top_p": 0.95, "min_p": 0.001}
    ours = process(logits, Sampling(**options).validate())
    theirs = reference(logits, np.zeros((1, 1), int), **options, repetition_penalty=1.0)
    kept = np.flatnonzero(np.isfinite(ours))
    assert 1 < kept.size <= 40
    np.testing.assert_array_equal(kept, np.flatnonzero(np.isfinite(theirs)))
    options = {"temperature": 1.0, "top_k": 0, "top_p": 0.9, "min_p": 0.0}
    ours = np.isfinite(process(logits, Sampling(**options).validate()))
    theirs = np.isfinite(reference(logits, np.zeros((1, 1), int), **options, repetition_penalty=1))
    # Thousands of tokens stay; at the border, summation order moves a few of 1e-7 each.
    assert ours.sum() > 1000
    assert (ours != theirs).sum() <= 20


def test_greedy_applies_the_penalty_only_and_ignores_the_key():
    rng = np.random.default_rng(1)
    greedy = Sampling(temperature=0, top_k=3, top_p=0.2, repetition_penalty=5.0).validate()
    options = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 5.0}
    penalised = 0
    for _ in range(20):
        logits = rng.normal(size=(2, VOCABULARY)).astype(np.float32)
        prompt = rng.integers(0, VOCABULARY, (2, 9))
        seen = mark_seen(jnp.zeros((2, VOCABULARY), bool), jnp.asarray(prompt))
        tokens = [np.asarray(draw(logits, greedy, keys_for(2, seed), seen)) for seed in (0, 1)]
        np.testing.assert_array_equal(*tokens)
        theirs = reference(logits, prompt, temperature=0, **options)
        np.testing.assert_array_equal(tokens[0], theirs.argmax(-1))
        np.testing.assert_array_equal(probabilities(process(logits, greedy, seen)).max(-1), 1)
        penalised += (tokens[0] != logits.argmax(-1)).sum()
    assert penalised > 5


def test_greedy_takes_the_first_of_equals():
    logits = np.array([[0.0, 2.0, 2.0, 1.0]], np.float32)
    assert draw(logits, Sampling(temperature=0).validate(), keys_for(1)).tolist() == [1]


def frequencies(draw_tokens, logits, draws):
    rows = np.broadcast_to(logits, (draws, logits.size))
    tokens = draw_tokens(jnp.asarray(rows), keys_for(draws, seed=3))
    return np.bincount(np.asarray(tokens), minlength=logits.size)


def biased(logits, keys):
    noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:]))(keys)
    return jnp.argmax(logits + 1.05 * noise, axis=-1)


@pytest.mark.parametrize("options", [{}, {"temperature": 0.7, "top_k": 9, "top_p": 0.95}])
def test_sampled_frequencies_fit_the_distribution_and_a_biased_sampler_does_not(options):
    draws = 40_000
    logits = np.linspace(-2, 2, 12).astype(np.float32)
    sampling = Sampling(**options).validate()
    final = np.asarray(process(logits[None], sampling))[0]
    kept = np.isfinite(final)
    expected = probabilities(final)[kept].astype(np.float64)

    def fit(counts):
        assert counts.sum() == counts[kept].sum() == draws
        return scipy.stats.chisquare(counts[kept], expected / expected.sum() * draws).pvalue

    assert fit(frequencies(lambda rows, keys: draw(rows, sampling, keys), logits, draws)) > 1e-3
    assert fit(frequencies(lambda rows, keys: biased(rows * 0 + final, keys), logits, draws)) < 1e-6


def test_a_sequence_is_drawn_alike_at_any_place_in_any_batch():
    rng = np.random.default_rng(2)
    logits = rng.normal(size=(6, 5000)).astype(np.float32) * 2
    keys = keys_for(6)
    sampling = Sampling(temperature=0.9, top_k=900, top_p=0.8, min_p=1e-4).validate()
    tokens, final = draw(logits, sampling, keys), process(logits, sampling)
    order = np.array([3, 0, 5, 1, 4, 2])
    np.testing.assert_array_equal(draw(logits[order], sampling, keys[order]), tokens[order])
    np.testing.assert_array_equal(process(logits[order], sampling), final[order])
    for b in range(6):
        one = slice(b, b + 1)
        np.testing.assert_array_equal(draw(logits[one], sampling, keys[one]), tokens[one])
        np.testing.assert_array_equal(process(logits[one], sampling), final[one])


def test_each_sequence_may_have_its_own_settings():
    logits = np.random.default_rng(3).normal(size=(3, VOCABULARY)).astype(np.float32)
    settings_of = [
        {"temperature": 0.0, "top_k": 0, "top_p": 1.0},
        {"temperature": 0.5, "top_k": 4, "top_p": 1.0},
        {"temperature": 2.0, "top_k": 0, "top_p": 0.5},
    ]
    together = Sampling(**{k: [s[k] for s in settings_of] for k in settings_of[0]}).validate()
    final = process(logits, together)
    for b, own in enumerate(settings_of):
        alone = process(logits[b : b + 1], Sampling(**own).validate())
        np.testing.assert_array_equal(final[b : b + 1], alone)
    assert len({np.isfinite(row).sum() for row in np.asarray(final)}) == 3


def test_changing_a_number_or_the_values_never_recompiles():
    traces = []

    @jax.jit
    def step(logits, sampling, keys, seen):
        traces.append(1)
        return sample(logits, sampling, keys, seen)

    rng = np.random.default_rng(4)
    for i, options in enumerate(
        [
            {},
            {"temperature": 0},
            {"temperature": 1},
            {"top_k": 5},
            {"top_k": 7.0},
            {"top_p": 0.5},
            {"min_p": 0.1},
            {"repetition_penalty": 2},
            {"temperature": np.float64(0.3), "top_k": np.int64(3)},
        ]
    ):
        seen = jnp.asarray(rng.integers(0, 2, (2, VOCABULARY)), bool)
        logits = rng.normal(size=(2, VOCABULARY)).astype(np.float32)
        step(logits, Sampling(**options).validate(), keys_for(2, i), seen)
    assert len(traces) == 1


def test_sequence_keys_depend_on_seed_sequence_and_position_only():
    def data(seed, sequence, position):
        keys = sequence_keys(jax.random.key(seed), jnp.array(sequence), jnp.array(position))
        return jax.random.key_data(keys).tolist()

    assert data(0, [0, 1], [5, 5])[1] == data(0, [1], [5])[0]
    others = [data(0, [1], [5]), data(0, [1], [6]), data(0, [5], [1]), data(1, [1], [5])]
    assert len({str(keys) for keys in others}) == 4


def test_seen_marks_valid_tokens_of_the_vocabulary_only():
    tokens = jnp.array([[0, 2, 2], [1, 2, -1], [9, 1, 0]])
    valid = jnp.array([[True, True, True], [False, True, True], [True, True, False]])
    seen = mark_seen(jnp.zeros((3, 4), bool), tokens, valid)
    assert seen.astype(int).tolist() == [[1, 0, 1, 0], [0, 0, 1, 0], [0, 1, 0, 0]]
    assert mark_seen(seen, jnp.array([[3], [0], [1]])).sum() == 6


def test_logprobs_are_those_of_the_model_before_processing():
    logits = np.random.default_rng(5).normal(size=(3, VOCABULARY)).astype(np.float32) * 4
    theirs = torch.log_softmax(torch.tensor(logits), -1)
    tokens = np.array([4, 0, 23], np.int32)
    ours = jax.jit(token_logprobs)(logits, tokens)
    np.testing.assert_allclose(ours, theirs[range(3), tokens], atol=1e-5)
    values, ids = jax.jit(top_logprobs, static_argnums=1)(logits, 5)
    expected = theirs.topk(5)
    np.testing.assert_allclose(values, expected.values, atol=1e-5)
    np.testing.assert_array_equal(ids, expected.indices)


def test_rows_that_are_not_finite_are_flagged_and_do_not_disturb_the_others():
    logits = np.random.default_rng(6).normal(size=(4, VOCABULARY)).astype(np.float32)
    sampling = Sampling(top_k=5, top_p=0.9).validate()
    clean = draw(logits, sampling, keys_for(4))
    logits[1, 3], logits[2, 0], logits[3, 1] = np.nan, np.inf, -np.inf
    assert nonfinite_rows(logits).tolist() == [False, True, True, True]
    assert draw(logits, sampling, keys_for(4))[0] == clean[0]


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"temperature": -1}, "temperature"),
        ({"temperature": 1e-9}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": [[1.0]]}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_k": 2.5}, "top_k"),
        ({"top_k": True}, "top_k"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_p": [0.5, -0.1]}, "top_p"),
        ({"min_p": -0.1}, "min_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty"),
    ],
)
def test_numbers_out_of_range_are_refused_by_name(options, word):
    with pytest.raises(InputError, match=word):
        Sampling(**options).validate()


def fields(sampling):
    return {name: getattr(sampling, name).item() for name in array_fields(Sampling)}


def test_generation_config_gives_the_defaults():
    qwen3 = {
        "bos_token_id": 151643,
        "do_sample": True,
        "eos_token_id": [151645, 151643],
        "temperature": 0.5,
        "top_k": 20,
        "top_p": 0.75,
        "transformers_version": "4.51.0",
    }
    expected = {
        "temperature": 0.5,
        "top_k": 20,
        "top_p": 0.75,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
    }
    assert fields(sampling_from(qwen3)) == expected
    assert fields(sampling_from({**qwen3, "do_sample": False}))["temperature"] == 0
    assert fields(sampling_from({}))["temperature"] == 0
    assert fields(sampling_from({"do_sample": True}))["top_k"] == 50
    assert fields(sampling_from(qwen3, {"top_k": 3, "min_p": None})) == {**expected, "top_k": 3}
    cold = sampling_from({"do_sample": False, "top_p": 0.75}, {"temperature": 0.5, "top_k": 20})
    assert fields(cold) == expected
    assert fields(sampling_from({"repetition_penalty": 1.5}))["repetition_penalty"] == 1.5
    assert sampling_from({"repetition_penalty": 1.5}).needs_seen()
    assert not sampling_from(qwen3).needs_seen()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_beams", 4),
        ("typical_p", 0.9),
        ("penalty_alpha", 0.6),
        ("no_repeat_ngram_size", 3),
        ("suppress_tokens", [1]),
        ("guidance_scale", 1.5),
        ("min_new_tokens", 3),
    ],
)
def test_options_that_are_not_supported_are_refused_unless_overridden(name, value):
    with pytest.raises(InputError, match=f"{name}.*override"):
        sampling_from({name: value})
    with pytest.raises(InputError, match=name):
        sampling_from({}, {name: value})
    assert fields(sampling_from({name: value}, {name: None}))["temperature"] == 0


def test_overrides_that_mean_nothing_are_refused():
    with pytest.raises(InputError, match="tempratur"):
        sampling_from({}, {"tempratur": 1.0})
    with pytest.raises(InputError, match="top_p.*temperature"):
        sampling_from({}, {"top_p": 0.5})
    with pytest.raises(InputError, match="top_p"):
        sampling_from({}, {"top_p": 2.0, "temperature": 1.0})
