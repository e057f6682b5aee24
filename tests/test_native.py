"""The native products against float64 NumPy, on every instruction set of the machine."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from native_setup import DEFAULT, ISAS, LIBRARY, bf16, each_isa, restore  # noqa: F401

from moejax.kernels import build, cpu, reference

FORMATS = list(cpu.FORMATS)
SHAPES = st.tuples(
    st.sampled_from([1, 2, 3, 4, 5, 8, 31, 33, 70]), st.integers(1, 150), st.integers(1, 300)
)


def align(n, step=64):
    return -(-n // step) * step


def stored(w, format):
    """Bytes of a matrix in a format, and the float64 matrix that they mean."""
    rows, cols = w.shape
    if format == "float32":
        return w.astype(np.float32).reshape(-1).view(np.uint8), w.astype(np.float32).astype(float)
    if format == "bfloat16":
        return bf16(w).reshape(-1).view(np.uint8), bf16(w).astype(float)
    if format == "int8":
        scale = np.maximum(np.abs(w).max(axis=1) / 127, 1e-30).astype(np.float32)
        q = np.clip(np.round(w / scale[:, None]), -127, 127).astype(np.int8)
        out = np.zeros(align(rows * cols) + 4 * rows, np.uint8)
        out[: rows * cols] = q.reshape(-1).view(np.uint8)
        out[align(rows * cols) :] = scale.view(np.uint8)
        return out, q * scale.astype(float)[:, None]
    group, padded = int(format[5:]), align(cols, 128)
    wide = np.zeros((rows, padded))
    wide[:, :cols] = w
    grouped = wide.reshape(rows, -1, group)
    scale = (np.abs(grouped).max(axis=2) / 7 + 1e-3).astype(np.float16)
    q = np.clip(np.round(grouped / scale[:, :, None].astype(float)), -8, 7)
    means = (q * scale[:, :, None].astype(float)).reshape(rows, padded)[:, :cols]
    nibbles = (q.reshape(rows, -1, 8, 16) + 8).astype(np.uint32)  # [row, chunk, k, i]
    words = (nibbles << (4 * np.arange(8, dtype=np.uint32)[:, None])).sum(axis=2, dtype=np.uint32)
    body = words.astype("<u4").reshape(-1).view(np.uint8)
    out = np.zeros(align(body.size) + 2 * scale.size, np.uint8)
    out[: body.size] = body
    out[align(body.size) :] = scale.reshape(-1).view(np.uint8)
    return out, means


def held(raw, format):
    """Bytes as the unsigned type that holds the format."""
    return raw.view({"float32": np.uint32, "bfloat16": np.uint16}.get(format, np.uint8))


def padded(parts, size):
    """Byte strings of one stack, each `size` long."""
    out = np.zeros((len(parts), size), np.uint8)
    for row, part in zip(out, parts, strict=True):
        row[: part.size] = part
    return out


def linear_case(seed, n, rows, cols, format):
    rng = np.random.default_rng(seed)
    stack = [stored(rng.normal(size=(rows, cols)), format) for _ in range(3)]
    size = align(max(part.size for part, _ in stack), 64)
    bits = jnp.asarray(held(padded([part for part, _ in stack], size), format))
    x = rng.normal(size=(n, cols)).astype(np.float32)
    return x, bits, [means for _, means in stack]


def run_linear(x, bits, layer, means, format, **options):
    rows, cols = means.shape
    y = cpu.linear(
        jnp.asarray(x), bits, jnp.int32(layer), rows=rows, cols=cols, format=format, **options
    )
    return np.asarray(y)


def seen(x, format, round_input=True):
    """The activation as a format's arithmetic takes it, in float64."""
    return (bf16(x) if format == "bfloat16" and round_input else x).astype(float)


def close(got, want, size):
    """Within f32 rounding of sums whose terms have the absolute sums `size`."""
    np.testing.assert_array_less(np.abs(got - want), 4e-6 * size + 1e-30)


@pytest.mark.parametrize("format", FORMATS)
@given(shape=SHAPES, seed=st.integers(0, 100), wide=st.booleans())
def test_linear(format, shape, seed, wide):
    n, rows, cols = shape
    x, bits, stack = linear_case(seed, n, rows, cols, format)
    for layer, means in enumerate(stack[:2]):
        inputs = seen(x, format, not wide)
        want, size = inputs @ means.T, np.abs(inputs) @ np.abs(means.T)
        for got in each_isa(
            lambda m=means, i=layer: run_linear(x, bits, i, m, format, round_input=not wide)
        ):
            close(got, want, size)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("cols", [96, 1000, 2311])
def test_linear_rows_do_not_depend_on_the_batch_or_the_threads(format, cols):
    x, bits, stack = linear_case(7, 70, 333, cols, format)

    def bits_of():
        whole = run_linear(x, bits, 1, stack[1], format)
        LIBRARY.moejax_set_workers(1)
        alone = run_linear(x, bits, 1, stack[1], format)
        LIBRARY.moejax_set_workers(0)
        assert whole.tobytes() == alone.tobytes()
        for n in (1, 2, 3, 4, 5, 33):
            some = run_linear(x[:n], bits, 1, stack[1], format)
            assert some.tobytes() == whole[:n].tobytes()
        some = run_linear(x[69:], bits, 1, stack[1], format)
        assert some.tobytes() == whole[69:].tobytes()

    for _ in each_isa(bits_of):
        pass


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("n", [1, 6])
def test_linear_passes_on_infinities_nans_and_denormals(format, n):
    x, bits, stack = linear_case(3, n, 37, 50, format)
    means = np.abs(stack[0]) + 1
    raw, means = stored(means, format)
    bits = jnp.asarray(held(padded([raw], align(raw.size)), format))
    for value in (np.inf, -np.inf, np.nan):
        odd = np.abs(x)
        odd[n // 2, 49] = value
        for got in each_isa(lambda x=odd, m=means: run_linear(x, bits, 0, m, format)):
            want = np.full(37, value)
            if format not in ("float32", "bfloat16"):  # a weight of zero makes NaN of infinity
                want = np.where(means[:, 49] == 0, np.nan, want)
            np.testing.assert_array_equal(got[n // 2], want)
            assert np.isfinite(np.delete(got, n // 2, axis=0)).all()
    tiny = np.full((n, 50), 1e-40, np.float32)
    for got in each_isa(lambda: run_linear(tiny, bits, 0, means, format)):
        assert (np.abs(got - tiny.astype(float) @ means.T) < 1e-36).all()
    zero = np.full((n, 50), -0.0, np.float32)
    for got in each_isa(lambda: run_linear(zero, bits, 0, means, format)):
        np.testing.assert_array_equal(got, np.zeros((n, 37)))


FIXED = [name for name in ISAS if name in (b"avx512bf16", b"amx", b"amxbf16")]
needs_fixed = pytest.mark.skipif(not FIXED, reason="no instruction set here multiplies bytes")


def exact_int8(x, weights, scale):
    """What fixed point means: integers added, then one rounding."""
    whole, shift = map(np.asarray, reference.fixed_point(jnp.asarray(x)))
    sums = (whole.astype(np.int64) @ weights.astype(np.int64).T).astype(float)
    return (np.ldexp(sums, -shift) * scale.astype(float)).astype(np.float32)


@needs_fixed
@given(
    shape=SHAPES, seed=st.integers(0, 100), spread=st.integers(0, 30), size=st.integers(-100, 100)
)
def test_int8_sums_are_exact_in_fixed_point(shape, seed, spread, size):
    n, rows, cols = shape
    rng = np.random.default_rng(seed)
    raw, _ = stored(rng.normal(size=(rows, cols)), "int8")
    weights = raw[: rows * cols].view(np.int8).reshape(rows, cols)
    scale = raw[align(rows * cols) :].view(np.float32)
    x = (rng.normal(size=(n, cols)) * 2.0 ** (size + rng.integers(-spread, 1, (n, cols)))).astype(
        "f4"
    )
    want = exact_int8(x, weights, scale)
    bits = jnp.asarray(padded([raw], align(raw.size)))
    for name in FIXED:
        LIBRARY.moejax_set_isa(name)
        got = run_linear(x, bits, 0, np.empty((rows, cols)), "int8")
        np.testing.assert_array_equal(got, want)


# Rows of weights and of activations whose sums are the largest, and whose digits carry.
DIGITS = [1.0, 0x7FFFFF / 2**23, 0x3F7F7F / 2**22, 0x3F8080 / 2**22, 2.0**-126, 3e38]


@needs_fixed
@pytest.mark.parametrize("cols", [1, 127, 129, 65535, 65536])
def test_int8_sums_fit_at_the_extremes(cols):
    weights = np.random.default_rng(2).choice([-128, 127], (17, cols)).astype(np.int8)
    weights[0], weights[-1] = 127, -128
    scale = np.linspace(0.5, 2, 17, dtype=np.float32)
    raw = np.zeros(align(weights.size) + scale.nbytes, np.uint8)
    raw[: weights.size] = weights.reshape(-1).view(np.uint8)
    raw[align(weights.size) :] = scale.view(np.uint8)
    x = np.array([[sign * size] * cols for size in DIGITS for sign in (1, -1)], np.float32)
    x[:, ::7] *= -1
    with np.errstate(over="ignore"):  # of 3e38 times 127 and more: infinite
        want = exact_int8(x, weights, scale)
    bits = jnp.asarray(padded([raw], align(raw.size)))
    for name in FIXED:
        LIBRARY.moejax_set_isa(name)
        for count in (1, len(x)):
            got = run_linear(x[:count], bits, 0, np.empty((17, cols)), "int8")
            np.testing.assert_array_equal(got, want[:count])


@needs_fixed
def test_int8_beyond_the_columns_of_fixed_point_takes_floats():
    cols = 70_000  # whose sums of digits would not fit
    raw, means = stored(np.ones((5, cols)), "int8")
    bits = jnp.asarray(padded([raw], align(raw.size)))
    x = np.full((3, cols), DIGITS[3], np.float32)
    for name in FIXED:
        LIBRARY.moejax_set_isa(name)
        got = run_linear(x, bits, 0, means, "int8")
        np.testing.assert_allclose(got, x.astype(float) @ means.T, rtol=1e-3)


@needs_fixed
@pytest.mark.parametrize("format", ["int8", "int4g32", "int4g64"])
@given(shape=SHAPES, seed=st.integers(0, 100))
def test_fixed_point_has_the_same_bits_on_every_instruction_set(format, shape, seed):
    n, rows, cols = shape
    x, bits, stack = linear_case(seed, n, rows, cols, format)
    x[:, 0] *= 1000  # the others lose digits
    whole, shift = map(np.asarray, reference.fixed_point(jnp.asarray(x)))
    taken = np.ldexp(whole.astype(float), -shift)
    want, size = taken @ stack[0].T, np.abs(taken) @ np.abs(stack[0].T)
    seen_bits = set()
    for name in FIXED:
        LIBRARY.moejax_set_isa(name)
        got = run_linear(x, bits, 0, stack[0], format)
        close(got, want, size)
        seen_bits.add(got.tobytes())
    assert len(seen_bits) == 1


@needs_fixed
@pytest.mark.parametrize("format", ["int8", "int4g32", "int4g64"])
def test_a_row_that_is_not_finite_leaves_the_others_alone(format):
    x, bits, stack = linear_case(11, 33, 40, 200, format)
    odd = x.copy()
    odd[[0, 7, 8, 32], 3] = np.inf, np.nan, -np.inf, np.nan
    spared = np.isfinite(odd).all(axis=1)
    for name in FIXED:
        LIBRARY.moejax_set_isa(name)
        want = run_linear(x, bits, 0, stack[0], format)
        got = run_linear(odd, bits, 0, stack[0], format)
        assert got[spared].tobytes() == want[spared].tobytes()
        assert not np.isfinite(got[~spared]).any()


def test_linear_refuses_a_layer_out_of_range():
    x, bits, stack = linear_case(0, 1, 4, 16, "float32")
    for layer in (-1, 3):
        with pytest.raises(Exception, match=f"layer {layer} of a stack of 3"):
            run_linear(x, bits, layer, stack[0], "float32")
    with pytest.raises(Exception, match="too short"):
        run_linear(x, bits, 0, np.zeros((9, 16)), "float32")


def experts_case(seed, n, width, expert_width, format, count=6, top_k=3):
    rng = np.random.default_rng(seed)
    records, means = [], []
    for _ in range(count):
        up, up_means = stored(
            rng.normal(size=(2 * expert_width, width)) * 2 / np.sqrt(width), format
        )
        down, down_means = stored(
            rng.normal(size=(width, expert_width)) / np.sqrt(expert_width), format
        )
        offset = align(up.size)
        record = np.zeros(align(offset + down.size, 4096), np.uint8)
        record[: up.size] = up
        record[offset : offset + down.size] = down
        records.append(record)
        means.append((up_means, down_means))
    source = jnp.asarray(held(np.stack(records), format))
    picks = rng.integers(-1, count, (n, top_k)).astype(np.int32)
    index = rng.permutation(count).astype(np.int32)
    index[rng.integers(count)] = -1
    x = rng.normal(size=(n, width)).astype(np.float32)
    options = dict(expert_width=expert_width, format=format, gate_up_offset=0, down_offset=offset)
    return source, index, picks, x, means, options


def run_experts(source, index, picks, x, options, fill=0.5):
    y = jnp.full((*picks.shape, x.shape[1]), fill, jnp.float32)
    arrays = map(jnp.asarray, (index, picks, x))
    return np.asarray(cpu.experts(source, *arrays, y, **options))


@pytest.mark.parametrize("format", FORMATS)
@given(
    n=st.sampled_from([1, 2, 5, 17, 70]),
    width=st.integers(1, 150),
    expert_width=st.integers(1, 90),
    seed=st.integers(0, 100),
)
def test_experts(format, n, width, expert_width, seed):
    source, index, picks, x, means, options = experts_case(seed, n, width, expert_width, format)
    want = np.full((*picks.shape, width), 0.5)
    for (i, k), pick in np.ndenumerate(picks):
        if pick < 0 or index[pick] < 0:
            continue
        up, down = means[index[pick]]
        gate, raised = np.split(up @ seen(x[i], format), 2)
        h = gate / (1 + np.exp(-gate)) * raised
        want[i, k] = down @ seen(h.astype(np.float32), format)
    # One bf16 rounding of h may fall the other way.
    limit = 4e-3 if format == "bfloat16" else 2e-5
    for got in each_isa(lambda: run_experts(source, index, picks, x, options)):
        np.testing.assert_allclose(got, want, rtol=0, atol=limit * max(1.0, np.abs(want).max()))
        untouched = (picks < 0) | (index[picks] < 0)
        assert (got[untouched] == 0.5).all()


@pytest.mark.parametrize("format", FORMATS)
def test_experts_rows_do_not_depend_on_the_batch_or_the_threads(format):
    source, index, picks, x, _, options = experts_case(5, 70, 260, 200, format)

    def bits_of():
        whole = run_experts(source, index, picks, x, options)
        LIBRARY.moejax_set_workers(1)
        alone = run_experts(source, index, picks, x, options)
        LIBRARY.moejax_set_workers(0)
        assert whole.tobytes() == alone.tobytes()
        for rows in (slice(0, 1), slice(3, 8), slice(20, 53), slice(69, 70)):
            some = run_experts(source, index, picks[rows], x[rows], options)
            assert some.tobytes() == whole[rows].tobytes()

    for _ in each_isa(bits_of):
        pass


def test_experts_refuses_picks_out_of_range():
    source, index, picks, x, _, options = experts_case(0, 4, 16, 8, "float32")
    with pytest.raises(Exception, match="pick of expert 6"):
        run_experts(source, index, np.full_like(picks, 6), x, options)
    with pytest.raises(Exception, match="record 6"):
        run_experts(source, np.full_like(index, 6), np.abs(picks), x, options)


def test_wrappers_refuse_what_the_kernels_cannot_read():
    x = jnp.zeros((2, 16))
    bits = jnp.zeros((1, 64), jnp.uint32)
    with pytest.raises(ValueError, match="unknown format"):
        cpu.linear(x, bits, jnp.int32(0), rows=4, cols=16, format="int3")
    with pytest.raises(ValueError, match="bits must be uint16 or bfloat16"):
        cpu.linear(x, bits, jnp.int32(0), rows=4, cols=16, format="bfloat16")
    with pytest.raises(ValueError, match="x must be"):
        cpu.linear(x, bits, jnp.int32(0), rows=4, cols=15, format="float32")
    with pytest.raises(ValueError, match="layer must be an integer"):
        cpu.linear(x, bits, 0.5, rows=4, cols=16, format="float32")
    with pytest.raises(ValueError, match="must be"):
        cpu.rms_norm(x, jnp.zeros((1, 8)), jnp.int32(0), eps=1e-5)
    with pytest.raises(ValueError, match="shapes do not fit"):
        keys = jnp.zeros((1, 1, 8, 2, 4))
        cpu.attend(
            jnp.zeros((1, 1, 3, 4)),
            keys,
            keys,
            jnp.int32(0),
            jnp.zeros((1, 1), jnp.int32),
            jnp.ones((1, 1), bool),
            jnp.int32(0),
            scale=1.0,
        )


def test_an_unknown_instruction_set_changes_nothing():
    assert LIBRARY.moejax_set_isa(b"none") == 0
    assert LIBRARY.moejax_isa() == DEFAULT
    assert build.status().startswith(f"native kernels: {DEFAULT.decode()}")
