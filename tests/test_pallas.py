"""The Pallas kernels in the interpreter, against NumPy float64; and that they lower for a GPU."""

import contextlib
import json
import os
import pathlib
import re
import subprocess
import sys
import warnings

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from conftest import build, small_config
from hypothesis import example, given, settings
from hypothesis import strategies as st

from moejax import decode, kernels
from moejax.kernels import pallas, pallas_experts, pallas_weights, reference
from moejax.layout import FORMATS, RecordLayout

ROOT = pathlib.Path(__file__).parent.parent
TOLERANCE = {"bfloat16": 2e-2}  # of the largest result; 1e-5 for the others
WIDTHS = st.sampled_from([(130, 70), (32, 24), (128, 64), (33, 17), (257, 129), (64, 200)])
TOKENS = st.sampled_from([(1, 2, 8), (3, 2, 8), (9, 4, 4), (17, 3, 5), (20, 2, 2)])


def floats(matrix, data):
    """A matrix [rows, cols] in float64 from its bytes, by the text of the format."""
    if matrix.format in ("float32", "bfloat16"):
        dtype = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}[matrix.format]
        size = matrix.rows * matrix.cols * np.dtype(dtype).itemsize
        return data[:size].view(dtype).astype(np.float64).reshape(matrix.rows, matrix.cols)
    if matrix.format == "int8":
        size = matrix.rows * matrix.cols
        q = data[:size].view(np.int8).reshape(matrix.rows, matrix.cols)
        at = -(-size // 64) * 64
        return q * data[at : at + 4 * matrix.rows].view(np.float32).astype(np.float64)[:, None]
    group, padded = int(matrix.format[5:]), -(-matrix.cols // 128) * 128
    size = matrix.rows * padded // 2
    words = data[:size].view("<u4").reshape(matrix.rows, padded // 128, 16)
    q = np.zeros((matrix.rows, padded // 128, 128))
    for k in range(8):
        q[:, :, 16 * k : 16 * k + 16] = ((words >> (4 * k)) & 15).astype(np.int64) - 8
    at = -(-size // 64) * 64
    scales = data[at : at + 2 * matrix.rows * padded // group].view(np.float16)
    scales = np.repeat(scales.reshape(matrix.rows, -1).astype(np.float64), group, axis=1)
    return (q.reshape(matrix.rows, padded) * scales)[:, : matrix.cols]


def random_records(layout, count, rng):
    """Records of random bytes that mean weights of unit gain, padding of int4 included."""
    records = np.zeros((count, layout.stride), np.uint8)
    for name, m in layout.matrices.items():
        at = layout.offsets[name]
        if not m.quantised:
            dtype = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}[m.format]
            values = (rng.normal(size=(count, m.rows * m.cols)) * m.cols**-0.5).astype(dtype)
            part = values.view(np.uint8).reshape(count, -1)
            records[:, at : at + part.shape[1]] = part
            continue
        q = rng.integers(0, 256, (count, m.rows * m.row_bytes), np.uint8)
        if m.format != "int8":
            wide = np.full((count, m.rows, m.columns), 8)
            wide[:, :, : m.cols] = rng.integers(0, 16, (count, m.rows, m.cols))
            nibbles = wide.reshape(count, m.rows, -1, 8, 16).astype(np.uint32)
            words = np.bitwise_or.reduce(nibbles << (4 * np.arange(8))[:, None].astype("u4"), 3)
            q = words.astype("<u4").view(np.uint8).reshape(count, -1)
        records[:, at : at + q.shape[1]] = q
        gain = m.cols**-0.5 / (74 if m.format == "int8" else 4.6)
        scales = rng.uniform(0.3, 1.7, (count, m.rows * m.scales_per_row)) * gain
        part = scales.astype(m.scale_dtype).view(np.uint8).reshape(count, -1)
        records[:, at + m.scales_at : at + m.scales_at + part.shape[1]] = part
    return records


def oracle(layout, record, x):
    """SwiGLU of one record in float64; bfloat16 weights take rounded activations."""

    def rounded(a):
        if layout.dtype != "bfloat16":
            return a
        return a.astype(ml_dtypes.bfloat16).astype(np.float64)

    parts = {n: floats(m, record[layout.offsets[n] :]) for n, m in layout.matrices.items()}
    gate, up = np.split(parts["gate_up"] @ rounded(x.astype(np.float64)), 2)
    return parts["down"] @ rounded(gate / (1 + np.exp(-gate)) * up)


def check_experts(name, dtype, widths, tokens, seed):
    (n, k, experts), rng = tokens, np.random.default_rng(seed)
    layout = RecordLayout(width=widths[0], expert_width=widths[1], dtype=dtype)
    held = random_records(layout, experts + 1, rng)
    index = rng.permutation(experts + 1)[:experts].astype(np.int32)
    index[rng.random(experts) < 0.3] = -1
    picks = np.array([rng.permutation(experts)[:k] for _ in range(n)], np.int32)
    picks[rng.random((n, k)) < 0.1] = -1
    x = rng.normal(size=(n, widths[0])).astype(np.float32)
    module = {"reference": reference, "pallas": pallas}[name]

    @jax.jit
    def run(source, index, picks, x):
        plan = module.plan(picks, experts)
        before = jnp.full_like(module.empty_rows(plan, widths[0]), 7.0)
        _, rows = module.experts(layout, source, index, plan, x, before)
        ranks = jnp.broadcast_to(jnp.eye(k)[:, None], (k, n, k))
        return [module.combine(plan, rows, one) for one in ranks]

    source = jnp.asarray(held.view(layout.bits))
    with pallas.interpreted():
        assert pallas.choose(source) == ("interpret", "")
        results = np.asarray(run(source, index, picks, x))
    for rank, got in enumerate(results):
        for token, expert in enumerate(picks[:, rank]):
            if expert < 0:
                continue
            if index[expert] < 0:
                np.testing.assert_array_equal(got[token], 7.0)
                continue
            want = oracle(layout, held[index[expert]], x[token])
            error = np.abs(got[token] - want).max() / np.abs(want).max()
            assert error < TOLERANCE.get(dtype, 1e-5)


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("name", ["reference", "pallas"])
@settings(max_examples=max(settings.default.max_examples // 10, 1))
@example(widths=(257, 129), tokens=(17, 3, 5), seed=1)
@given(widths=WIDTHS, tokens=TOKENS, seed=st.integers(0, 2**16))
def test_experts_equal_float64(name, dtype, widths, tokens, seed):
    check_experts(name, dtype, widths, tokens, seed)


@pytest.mark.parametrize("dtype", ["int4g32", "int4g64"])
def test_int4_blocks_of_two_tokens(dtype):
    check_experts("pallas", dtype, (33, 140), (8, 2, 8), 0)


def test_parts_of_an_activation_sum_to_it_exactly():
    values = [0.0, -0.0, 1.0, np.pi, -1e-30, 3.4e38, 1 + 2**-23, np.inf, -np.inf]
    x = np.array(values, np.float32)
    parts = pallas_weights.split(jnp.asarray(x), "int8")
    assert [p.dtype for p in parts] == [jnp.bfloat16] * 3
    np.testing.assert_array_equal(sum(np.asarray(p, np.float64) for p in parts), x)
    assert np.isnan(np.asarray(pallas_weights.split(jnp.float32(np.nan), "int8")[0], np.float32))


def run_ptx(code, words):
    """The few PTX instructions that unpacking uses, on u32 words: registers by name."""
    registers = {"$2": words.astype(np.uint64)}

    def value(name):
        return registers[name] if name in registers else np.uint64(int(name, 0))

    def halves(name):
        wide = np.broadcast_to(value(name).astype(np.uint32), words.shape).copy()
        return wide.view(np.uint16).view(ml_dtypes.bfloat16).astype(np.float32)

    for line in re.findall(r"^\s+(?!\.reg)([a-z].*?);", code, re.MULTILINE):
        name, *arguments = re.split(r"[ ,]+", line)
        target, *arguments = arguments
        if name == "mov.b32":
            out = value(arguments[0])
        elif name == "shr.b32":
            out = value(arguments[0]) >> value(arguments[1])
        elif name == "prmt.b32":
            low, high, selector = (value(a) for a in arguments)
            both, out = low | (high << np.uint64(32)), np.uint64(0)
            for byte in range(4):
                which = (int(selector) >> (4 * byte)) & 15
                assert which < 8
                out = out | (
                    ((both >> np.uint64(8 * which)) & np.uint64(255)) << np.uint64(8 * byte)
                )
        elif name == "lop3.b32":
            a, b, c, table = (value(a) for a in arguments)
            out = {0xEA: (a & b) | c, 0x6A: (a & b) ^ c}[int(table)]
        else:
            assert name == "fma.rn.bf16x2"
            a, b, c = (halves(a) for a in arguments)
            exact = (a * b + c).astype(ml_dtypes.bfloat16)
            out = exact.view(np.uint16).view(np.uint32).astype(np.uint64)
        registers[target] = out
    pairs = [registers[r].astype(np.uint32).view(np.uint16).reshape(-1, 2) for r in ("$0", "$1")]
    return np.concatenate(pairs, axis=1).view(ml_dtypes.bfloat16).astype(np.float32)


def test_unpacking_instructions_give_every_integer():
    rng = np.random.default_rng(0)
    data = np.stack([rng.permutation(256) for _ in range(4)], axis=1).astype(np.uint8)
    words = data.view("<u4").ravel()
    as_signed = data.view(np.int8).astype(np.float32)
    np.testing.assert_array_equal(run_ptx(pallas_weights.INT8, words), as_signed)
    low, high = (data & 15).astype(np.float32) - 8, (data >> 4).astype(np.float32) - 8
    np.testing.assert_array_equal(run_ptx(pallas_weights.LOW_NIBBLE, words), low)
    np.testing.assert_array_equal(run_ptx(pallas_weights.HIGH_NIBBLE, words), high)


def hopper():
    """A context in which programs are lowered for an H100 that is not there."""
    if jax.__version_info__ < (0, 11):
        return contextlib.nullcontext()
    from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

    device = AbstractDevice(device_kind="NVIDIA H100", num_cores=None, platform="gpu")
    return use_abstract_mesh(AbstractMesh((), (), (), abstract_device=device))


@pytest.mark.parametrize("tokens", [1, 64])
@pytest.mark.parametrize("dtype", FORMATS)
def test_lowers_for_a_gpu(dtype, tokens):
    layout = RecordLayout(width=256, expert_width=130, dtype=dtype)

    def run(source, index, picks, x):
        blocks = reference.plan(picks, 16)
        rows = reference.empty_rows(blocks, 256)
        return pallas_experts.experts(layout, source, index, blocks, x, rows, interpret=False)

    shapes = (
        jax.ShapeDtypeStruct((32, layout.elements), layout.bits),
        jax.ShapeDtypeStruct((16,), jnp.int32),
        jax.ShapeDtypeStruct((tokens, 4), jnp.int32),
        jax.ShapeDtypeStruct((tokens, 256), jnp.float32),
    )
    with hopper(), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of Pallas' Triton, from 0.11 on
        text = jax.jit(run).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("__gpu$xla.gpu.triton") == 2


def test_without_a_gpu_experts_run_in_the_reference():
    how, why = pallas.choose(jnp.zeros((2, 64), jnp.uint16))
    assert (how, why) == ("reference", "the backend is cpu")


def test_fetch_copies_records():
    store = jnp.arange(40, dtype=jnp.uint16).reshape(10, 4)
    pool = jnp.zeros((3, 4), jnp.uint16)
    slot, expert = jnp.array([2, 0, 1], jnp.int32), jnp.array([7, 4, 9], jnp.int32)
    after = jnp.full((2, 2), -1.5)  # an odd last bit must not matter either
    pool = pallas.fetch(pool, store, slot, expert, jnp.int32(2), after)
    np.testing.assert_array_equal(pool, np.stack([store[4], np.zeros(4), store[7]]))


def test_decoding_equals_the_reference(monkeypatch):
    built = build(small_config(), "bfloat16")
    results = []
    for module in (reference, pallas):
        monkeypatch.setattr(kernels, "_kernels", lambda module=module: module)

        @jax.jit
        def step(state, tokens):
            return decode.step(built.model, built.policy, built.params, built.store, state, tokens)

        state = decode.init_state(built.model, built.policy, built.store, slots=3, context=32)
        logits = []
        with pallas.interpreted():
            for token in (3, 1, 4, 1, 5, 9):
                state, out = step(state, jnp.array([[token]], jnp.int32))
                logits.append(np.asarray(out.logits))
        results.append(np.concatenate(logits))
    want, got = results
    np.testing.assert_allclose(got, want, atol=2e-2 * np.abs(want).max(), rtol=0)


def test_gpu_suite_runs_without_a_gpu(tmp_path):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "experiments.gpu_suite", "--quick", "--out", str(tmp_path)]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=110
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "gpu_suite.json").read_text())
    assert report["environment"]["backend"] == "cpu" and report["interpret"]
    problems = {p["part"]: p["error"] for p in report["parts"] if p["error"]}
    assert set(problems) <= {"peer"}, problems  # accelerate may be missing
    assert all(p["rows"] for p in report["parts"] if not p["error"])
    assert "| part |" in (tmp_path / "gpu_suite.md").read_text()
