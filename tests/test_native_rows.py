"""The native norm, softmax and attention against float64 NumPy, on every instruction set."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from native_setup import LIBRARY, bf16, each_isa, restore  # noqa: F401

from moejax.kernels import cpu


def softmax64(x):
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


@given(n=st.integers(1, 40), cols=st.integers(1, 150), seed=st.integers(0, 100))
def test_norm_and_softmax(n, cols, seed):
    rng = np.random.default_rng(seed)
    x = (rng.normal(size=(n, cols)) * 10 ** rng.uniform(-3, 2)).astype(np.float32)
    for weight in (rng.normal(size=(2, cols)).astype(np.float32), bf16(rng.normal(size=(2, cols)))):
        wide = x.astype(float)
        scale = 1 / np.sqrt((wide**2).mean(axis=-1, keepdims=True) + 1e-5)
        want = wide * scale * weight[1].astype(float)
        arguments = jnp.asarray(weight), jnp.int32(1)
        for got in each_isa(lambda a=arguments: cpu.rms_norm(jnp.asarray(x), *a, eps=1e-5)):
            np.testing.assert_allclose(got, want, rtol=3e-6, atol=1e-30)
    rounding = 3e-6 + 1e-7 * np.ptp(x)  # of differences, which the exponential magnifies
    for got in each_isa(lambda: np.asarray(cpu.softmax(jnp.asarray(x)))):
        np.testing.assert_allclose(got, softmax64(x.astype(float)), rtol=rounding, atol=1e-37)
        some = np.asarray(cpu.softmax(jnp.asarray(x[n - 1 :])))
        assert some.tobytes() == got[n - 1 :].tobytes()


def test_softmax_of_extremes():
    x = np.array([[-np.inf, 0, 100, -1e30, 100], [1, np.nan, 2, 3, 4]], np.float32)
    for got in each_isa(lambda: np.asarray(cpu.softmax(jnp.asarray(x)))):
        np.testing.assert_allclose(got[0], [0, 0, 0.5, 0, 0.5], atol=1e-37)
        assert np.isnan(got[1]).all()


def attend64(query, keys, values, positions, valid, window, scale):
    """Attention by definition in float64; keys and values of one layer [B, C, G, *]."""
    b, t, heads, _ = query.shape
    out = np.zeros((b, t, heads, values.shape[-1]))
    for i, j, h in np.ndindex(b, t, heads):
        if not valid[i, j]:
            continue
        p, g = positions[i, j], h * keys.shape[2] // heads
        first = max(0, p - window + 1) if window else 0
        scores = keys[i, first : p + 1, g] @ query[i, j, h] * scale
        out[i, j, h] = softmax64(scores) @ values[i, first : p + 1, g]
    return out


def attend_case(seed, b, t, groups, per_group, key_dim, value_dim, context, dtype):
    rng = np.random.default_rng(seed)
    cache = [
        rng.normal(size=(2, b, context, groups, dim)).astype(dtype) for dim in (key_dim, value_dim)
    ]
    query = rng.normal(size=(b, t, groups * per_group, key_dim)).astype(np.float32)
    positions = rng.integers(0, context, (b, t)).astype(np.int32)
    valid = rng.random((b, t)) < 0.8
    return query, *cache, positions, valid


def run_attend(query, keys, values, positions, valid, window):
    query, keys, values, positions, valid = map(
        jnp.asarray, (query, keys, values, positions, valid)
    )
    return np.asarray(
        cpu.attend(
            query, keys, values, jnp.int32(1), positions, valid, jnp.int32(window), scale=0.3
        )
    )


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@given(
    seed=st.integers(0, 100),
    batch=st.integers(1, 3),
    tokens=st.integers(1, 5),
    groups=st.integers(1, 3),
    per_group=st.sampled_from([1, 2, 4, 7, 17]),
    dims=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    context=st.sampled_from([1, 50, 300]),
    window=st.sampled_from([0, 1, 40, 1000]),
)
def test_attend(dtype, seed, batch, tokens, groups, per_group, dims, context, window):
    case = attend_case(seed, batch, tokens, groups, per_group, *dims, context, dtype)
    query, keys, values, positions, valid = case
    want = attend64(
        query.astype(float),
        keys[1].astype(float),
        values[1].astype(float),
        positions,
        valid,
        window,
        0.3,
    )
    for got in each_isa(lambda: run_attend(*case, window)):
        np.testing.assert_allclose(got, want, atol=2e-5)
        assert (got[~valid] == 0).all()


@pytest.mark.parametrize("window", [0, 100])
def test_attention_of_a_token_depends_on_its_position_only(window):
    query, keys, values, positions, _ = attend_case(1, 2, 40, 2, 9, 64, 48, 384, ml_dtypes.bfloat16)
    valid = np.ones(positions.shape, bool)

    def bits_of():
        whole = run_attend(query, keys, values, positions, valid, window)
        LIBRARY.moejax_set_workers(1)
        alone = run_attend(query, keys, values, positions, valid, window)
        LIBRARY.moejax_set_workers(0)
        assert whole.tobytes() == alone.tobytes()
        for t in (0, 17, 39):
            reach = int(positions[:, t].max()) + 1
            some = run_attend(
                query[:, t : t + 1],
                keys[:, :, :reach],
                values[:, :, :reach],
                positions[:, t : t + 1],
                valid[:, t : t + 1],
                window,
            )
            assert some.tobytes() == whole[:, t : t + 1].tobytes()

    for _ in each_isa(bits_of):
        pass


def test_attend_refuses_positions_out_of_range():
    query, keys, values, positions, valid = attend_case(0, 1, 2, 1, 1, 8, 8, 16, np.float32)
    with pytest.raises(Exception, match="position 16 of a cache of 16"):
        run_attend(query, keys, values, np.full_like(positions, 16), np.ones_like(valid), 0)
