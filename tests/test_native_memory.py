"""Where the native kernels end their reads, whatever indices and sizes they are given."""

import threading

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from native_setup import each_isa, restore  # noqa: F401
from test_native import FORMATS, close, experts_case, held, run_experts, run_linear, seen, stored
from test_native_rows import attend_case, run_attend

from moejax.errors import MoejaxError
from moejax.kernels import cpu, transport
from moejax.kernels.transport import Kind, Status, Store

LEAST, MOST = np.iinfo(np.int32).min, np.iinfo(np.int32).max
NOW = jnp.zeros(1, jnp.float32)
# What an index may be by mistake: in range, just outside, or the ends of its type.
INDICES = st.one_of(st.integers(-2, 12), st.sampled_from([LEAST, LEAST + 1, MOST - 1, MOST]))


def vectors(size):
    return st.lists(INDICES, min_size=size, max_size=size).map(lambda x: jnp.array(x, jnp.int32))


@pytest.mark.parametrize("format", FORMATS)
@given(
    n=st.sampled_from([1, 3, 6, 33]),
    rows=st.integers(1, 40),
    cols=st.sampled_from([1, 15, 16, 17, 31, 32, 127, 128, 129, 200]),
)
def test_a_matrix_at_the_end_of_its_memory(format, n, rows, cols):
    rng = np.random.default_rng(rows)
    raw, means = stored(rng.normal(size=(rows, cols)), format)
    x = rng.normal(size=(n, cols)).astype(np.float32)
    bits = jnp.asarray(held(raw, format)[None])
    inputs = seen(x, format)
    for got in each_isa(lambda: run_linear(x, bits, 0, means, format)):
        close(got, inputs @ means.T, np.abs(inputs) @ np.abs(means.T))


def test_products_of_nothing():
    bits = jnp.zeros((1, 16), jnp.uint32)
    assert run_linear(np.zeros((0, 4)).astype("f4"), bits, 0, np.zeros((4, 4)), "float32").size == 0
    got = run_linear(np.zeros((2, 0)).astype("f4"), bits, 0, np.zeros((4, 0)), "float32")
    np.testing.assert_array_equal(got, np.zeros((2, 4)))
    source, index, picks, x, _, options = experts_case(0, 4, 16, 8, "float32")
    assert run_experts(source, index, picks[:0], x[:0], options).shape == (0, 3, 16)


@given(index=vectors(6), picks=vectors(12))
def test_experts_of_any_index(index, picks):
    source, _, _, x, _, options = experts_case(0, 4, 16, 8, "float32")
    index, picks = np.asarray(index), np.asarray(picks).reshape(4, 3)
    known = picks[picks >= 0]
    good = ((picks >= -1) & (picks < 6)).all() and (index[known] < 6).all()
    if good:
        untouched = (picks < 0) | (index[picks] < 0)
        assert (run_experts(source, index, picks, x, options)[untouched] == 0.5).all()
    else:
        with pytest.raises(Exception, match="out of range"):
            run_experts(source, index, picks, x, options)


def test_experts_outside_their_record():
    source, index, picks, x, _, options = experts_case(0, 4, 16, 8, "float32")
    for offset in (-64, -(2**63), 4096, 2**63 - 64):
        with pytest.raises(Exception, match="does not hold its matrices"):
            run_experts(source, index, picks, x, options | {"gate_up_offset": offset})


@given(position=INDICES, window=INDICES)
def test_attention_to_any_position(position, window):
    query, keys, values, positions, valid = attend_case(0, 1, 2, 1, 1, 8, 8, 9, np.float32)
    positions[:], valid[:] = position, True
    if 0 <= position < 9:
        assert np.isfinite(run_attend(query, keys, values, positions, valid, window)).all()
    else:
        with pytest.raises(Exception, match=f"position {position} of a cache of 9"):
            run_attend(query, keys, values, positions, valid, window)


@given(
    tables=st.tuples(vectors(12), vectors(7), vectors(7), vectors(12)),
    pending=st.lists(st.booleans(), min_size=4, max_size=4),
    order=vectors(4),
    layer=INDICES,
    capacity=INDICES,
)
@example(
    tables=[jnp.full(12, -1), jnp.full(7, LEAST), jnp.full(7, -1), jnp.zeros(12, jnp.int32)],
    pending=[True] * 4,
    order=jnp.arange(4),
    layer=1,
    capacity=7,
)
def test_plans_of_any_tables(tables, pending, order, layer, capacity):
    *_, slots, experts, count = transport.plan_fetch(
        *tables, jnp.array(pending), order, jnp.int32(layer), jnp.int32(capacity)
    )
    count, slots, experts = int(count), np.asarray(slots), np.asarray(experts)
    assert 0 <= count <= 4
    assert ((slots[:count] >= 0) & (slots[:count] < max(0, min(capacity, 7)))).all()
    assert (experts[:count] // 4 == layer).all()
    assert (slots[count:] == -1).all() and (experts[count:] == -1).all()


@given(slots=vectors(6), experts=vectors(6), count=INDICES)
def test_moves_of_any_index(slots, experts, count):
    records = np.arange(1, 10, dtype=np.uint8)[:, None] * np.ones(64, np.uint8)
    pool = jnp.zeros((5, 64), jnp.uint8)
    expected, lost = np.zeros(5), False
    for slot, expert in list(zip(slots.tolist(), experts.tolist(), strict=True))[: max(0, count)]:
        fits, exists = 0 <= slot < 5, 0 <= expert < 9
        lost |= expert != -1 and not (fits and exists)
        if fits and expert != -1:
            expected[slot] = expert + 1 if exists else 0
    with Store.open_paced(records, gigabytes_per_second=1e3, buffers=2) as store:
        for kind in Kind:
            transport.request(store.handle, experts, count, kind, NOW)
        got, status = transport.commit(store.handle, pool, slots, experts, count, NOW)
        np.testing.assert_array_equal(got, expected[:, None] * np.ones(64))
        assert status[0] == (Status.BAD_REQUEST if lost else Status.OK)
    got = transport.copy_records(pool, jnp.asarray(records), slots, experts, count, NOW)
    assert set(np.unique(got)) <= set(range(10))


def test_links_and_files_of_any_size(tmp_path):
    records = np.ones((2, 64), np.uint8)
    for link in (
        {"gigabytes_per_second": 1e-300},
        {"gigabytes_per_second": 1, "latency_us": 1e300},
    ):
        with Store.open_paced(records, **link) as store:
            transport.request(store.handle, jnp.array([0, 1]), 2, Kind.PREFETCH, NOW)
            assert store.stats().requested == 2
    (tmp_path / "bank").write_bytes(b"x")
    with pytest.raises(MoejaxError, match="beyond any file"):
        Store.open_disk(tmp_path / "bank", data_offset=2**63 - 1, record_bytes=64, records=2)


def test_closing_waits_for_a_commit():
    """What a store reads may be freed, here overwritten, once it is closed."""
    records = np.full((1, 64 << 20), 5, np.uint8)
    pool = jnp.zeros(records.shape, jnp.uint8)
    zero = jnp.zeros(1, jnp.int32)
    got = []
    store = Store.open_paced(records, gigabytes_per_second=1e3)
    run = threading.Thread(
        target=lambda: got.extend(transport.commit(store.handle, pool, zero, zero, 1, NOW))
    )
    run.start()
    while store.stats().requested == 0:
        pass
    store.close()
    records[:] = 6
    run.join()
    assert (np.asarray(got[0]) == 5).all()


def test_norms_at_the_end_of_their_memory():
    for cols in (1, 15, 17, 33):
        bits = jnp.ones((3, cols), jnp.bfloat16)
        for got in each_isa(
            lambda bits=bits, cols=cols: cpu.rms_norm(jnp.ones((2, cols)), bits, 2, eps=0.0)
        ):
            np.testing.assert_array_equal(got, np.ones((2, cols)))
