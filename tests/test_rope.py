"""Rotary embeddings against transformers' own functions, and their defining properties."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moejax.config import Fields, Rope
from moejax.models.fields import rope_from
from moejax.models.rope import cos_sin, inverse_frequencies, magnitude, rotate

MAX_POSITIONS = 128
HEAD = 16
factors = st.floats(1.0, 64.0)
originals = st.sampled_from([16, 64, 100])
scales = st.lists(st.floats(0.5, 40.0), min_size=HEAD // 2, max_size=HEAD // 2)
PARAMETERS = st.one_of(
    st.fixed_dictionaries({"rope_type": st.just("linear"), "factor": factors}),
    st.fixed_dictionaries({"rope_type": st.just("dynamic"), "factor": factors}),
    st.fixed_dictionaries(
        {
            "rope_type": st.just("yarn"),
            "factor": factors,
            "original_max_position_embeddings": originals,
        },
        optional={
            "beta_fast": st.floats(8.0, 64.0),
            "beta_slow": st.floats(0.5, 4.0),
            "attention_factor": st.floats(0.5, 2.0),
            "mscale": st.floats(0.0, 2.0),
            "mscale_all_dim": st.floats(0.0, 2.0),
            "truncate": st.booleans(),
        },
    ),
    st.fixed_dictionaries(
        {
            "rope_type": st.just("llama3"),
            "factor": factors,
            "original_max_position_embeddings": originals,
            "low_freq_factor": st.floats(0.5, 2.0),
            "high_freq_factor": st.floats(2.5, 8.0),
        }
    ),
    st.fixed_dictionaries(
        {
            "rope_type": st.just("longrope"),
            "original_max_position_embeddings": originals,
            "short_factor": scales,
            "long_factor": scales,
        },
        optional={"factor": factors, "attention_factor": st.floats(0.5, 2.0)},
    ),
)


EDGES = [
    {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1.0 + 1e-9, "beta_slow": 1e-29},
    {"rope_type": "yarn", "factor": 1e-30, "mscale": 0.0, "mscale_all_dim": 1e30},
    {"rope_type": "yarn", "factor": 1e30, "beta_fast": 1e30, "truncate": False},
    {
        "rope_type": "longrope",
        "original_max_position_embeddings": 2,
        "short_factor": [1e-30] * (HEAD // 2),
        "long_factor": [1e30] * (HEAD // 2),
    },
    {"rope_type": "linear", "factor": 1e-30},
    {"rope_type": "llama3", "factor": 1e30, "low_freq_factor": 1e-30, "high_freq_factor": 1e30},
    {"rope_type": "default", "rope_theta": 1e-30},
    {"rope_type": "default", "rope_theta": 1e30},
]


@pytest.mark.parametrize("parameters", EDGES)
def test_what_is_accepted_can_be_computed(parameters):
    rope = rope_of(parameters)
    cos, sin = cos_sin(rope, jnp.zeros((1, 1), jnp.int32), lengths(200))
    assert jnp.isfinite(inverse_frequencies(rope, lengths(200))).all()
    assert jnp.isfinite(cos).all() and jnp.isfinite(sin).all()


def rope_of(parameters: dict, dim: int = HEAD) -> Rope:
    return rope_from(Fields({"rope_parameters": parameters}), dim, MAX_POSITIONS, 10000.0)


def lengths(*values: int) -> jnp.ndarray:
    return jnp.asarray(values, jnp.int32)[:, None]


@given(
    parameters=PARAMETERS,
    theta=st.sampled_from([100.0, 10000.0, 1e6]),
    length=st.integers(1, 4 * MAX_POSITIONS),
    partial=st.sampled_from([1.0, 0.5]),
)
def test_frequencies_are_those_of_transformers(parameters, theta, length, partial):
    pytest.importorskip("torch", reason="transformers computes them with torch")
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    dim = int(HEAD * partial)
    parameters = {"rope_theta": theta, **parameters}
    for name in ("short_factor", "long_factor"):
        if name in parameters:
            parameters[name] = parameters[name][: dim // 2]
    config = LlamaConfig(
        hidden_size=64,
        num_attention_heads=4,
        head_dim=HEAD,
        max_position_embeddings=MAX_POSITIONS,
        rope_parameters={**parameters, "partial_rotary_factor": partial},
    )
    expected, factor = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, seq_len=length)
    rope = rope_of(parameters, dim)
    found = np.broadcast_to(inverse_frequencies(rope, lengths(length)), (1, 1, dim // 2))[0, 0]
    np.testing.assert_allclose(found, expected.numpy(), rtol=2e-5)
    assert magnitude(rope) == pytest.approx(factor, rel=1e-6)


def test_rotation_is_that_of_transformers():
    torch = pytest.importorskip("torch", reason="transformers rotates with torch")
    from transformers.models.deepseek_v2.modeling_deepseek_v2 import apply_rotary_emb
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    x = np.random.default_rng(0).normal(size=(2, 5, 3, HEAD)).astype(np.float32)
    rope = rope_of({"rope_type": "default"})
    positions = jnp.asarray([[0, 1, 2, 3, 4], [7, 8, 9, 10, 11]])
    cos, sin = cos_sin(rope, positions, lengths(5, 12))
    there = torch.tensor(x).transpose(1, 2)
    pair = [torch.tensor(np.tile(part, 2)) for part in (cos, sin)]
    expected = apply_rotary_pos_emb(there, there, *pair)[0].transpose(1, 2)
    np.testing.assert_allclose(rotate(rope, x, cos, sin), expected, atol=1e-6)

    turns = torch.complex(torch.tensor(np.array(cos)), torch.tensor(np.array(sin)))
    expected = apply_rotary_emb(there, there, turns)[0].transpose(1, 2)
    interleaved = dataclasses.replace(rope, interleaved=True)
    np.testing.assert_allclose(rotate(interleaved, x, cos, sin), expected, atol=1e-6)


@pytest.mark.parametrize("interleaved", [False, True])
@given(shift=st.integers(0, 1000))
def test_scores_depend_on_distance_only(interleaved, shift):
    rope = dataclasses.replace(rope_of({"rope_type": "default"}), interleaved=interleaved)
    query, key = np.random.default_rng(0).normal(size=(2, 1, 1, 1, HEAD)).astype(np.float32)

    def score(at: int) -> float:
        turned = []
        for x, position in ((query, at + 9), (key, at)):
            cos, sin = cos_sin(rope, jnp.asarray([[position]]), lengths(position + 1))
            turned.append(rotate(rope, x, cos, sin))
        return float((turned[0] * turned[1]).sum())

    assert score(shift) == pytest.approx(score(0), abs=2e-3)
    assert abs(score(0) - float((query * key).sum())) > 0.1


def test_partial_rotation_leaves_the_rest_alone():
    rope = rope_of({"rope_type": "default"}, dim=HEAD // 2)
    x = np.random.default_rng(0).normal(size=(1, 3, 2, HEAD)).astype(np.float32)
    cos, sin = cos_sin(rope, jnp.asarray([[1, 2, 3]]), lengths(4))
    turned = np.asarray(rotate(rope, x, cos, sin))
    np.testing.assert_array_equal(turned[..., HEAD // 2 :], x[..., HEAD // 2 :])
    assert np.abs(turned[..., : HEAD // 2] - x[..., : HEAD // 2]).max() > 0.1


def test_linear_scaling_divides_positions():
    plain, linear = rope_of({}), rope_of({"rope_type": "linear", "factor": 4.0})
    expected = cos_sin(plain, jnp.asarray([[3]]), lengths(4))
    found = cos_sin(linear, jnp.asarray([[12]]), lengths(13))
    np.testing.assert_allclose(np.stack(found), np.stack(expected), atol=1e-6)


@pytest.mark.parametrize(
    ("parameters", "threshold"),
    [
        ({"rope_type": "dynamic", "factor": 4.0}, MAX_POSITIONS),
        (
            {
                "rope_type": "longrope",
                "original_max_position_embeddings": 32,
                "short_factor": [1.0] * (HEAD // 2),
                "long_factor": [3.0] * (HEAD // 2),
            },
            32,
        ),
    ],
)
def test_long_sequences_change_their_own_frequencies_only(parameters, threshold):
    rope = rope_of(parameters)
    plain = inverse_frequencies(rope_of({}), lengths(1))
    found = inverse_frequencies(rope, lengths(threshold, threshold + 1, 3))
    np.testing.assert_allclose(found[0, 0], plain, rtol=1e-5)
    np.testing.assert_allclose(found[2, 0], plain, rtol=1e-5)
    assert float(jnp.abs(found[1, 0] / plain - 1).max()) > 1e-3


def test_yarn_keeps_fast_channels_and_stretches_slow_ones():
    parameters = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64}
    rope = rope_of({**parameters, "rope_theta": 1e6})
    plain = inverse_frequencies(rope_of({"rope_theta": 1e6}), lengths(1))
    ratio = np.asarray(inverse_frequencies(rope, lengths(1)) / plain)
    assert ratio[0] == pytest.approx(1.0)
    assert ratio[-1] == pytest.approx(1 / 8)
    assert magnitude(rope) == pytest.approx(0.1 * math.log(8) + 1)


def test_longrope_grows_with_the_context():
    scale = {"short_factor": [1.0] * (HEAD // 2), "long_factor": [2.0] * (HEAD // 2)}
    parameters = {"rope_type": "longrope", "original_max_position_embeddings": 32, **scale}
    assert magnitude(rope_of(parameters)) == pytest.approx(math.sqrt(1 + math.log(4, 32)))
    assert magnitude(rope_of({**parameters, "factor": 1.0})) == 1.0
    assert magnitude(rope_of({**parameters, "attention_factor": 1.5})) == 1.5
