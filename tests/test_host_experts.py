"""Experts that the host computes for a GPU: through Python, and in a stream of a fake driver."""

import concurrent.futures
import ctypes
import dataclasses
import functools

import fake_cuda
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import build as built_model
from conftest import small_config
from fake_cuda import FAKE, PATH, held_back
from native_setup import restore  # noqa: F401
from test_exactness import prompts_of, run
from test_native import FORMATS, experts_case, run_experts
from test_native_model import on

import moejax
from moejax import decode, devices, doctor
from moejax.errors import LinkError, MoejaxError, PolicyError
from moejax.kernels import build, host, reference
from moejax.kernels.transport import Status
from moejax.layout import RecordLayout
from moejax.policies.placement import HostAll, TwoPointer
from moejax.state import HostRecords

STREAM, CALLBACK, NUMPY = "stream", "callback", "numpy"


@pytest.fixture(autouse=True)
def clean():
    """Every test begins and ends with an idle stream 0 that fails nothing."""
    FAKE.fake_use_stream(0)
    yield
    FAKE.fake_use_stream(0)
    FAKE.fake_wait()
    FAKE.fake_defer(0)
    FAKE.fake_fail(b"", 0)
    assert FAKE.fake_forbidden() == 0, "a host function called the driver"


@pytest.fixture
def without_library(monkeypatch):
    """As on a machine without a compiler."""
    monkeypatch.setattr(host, "_native", lambda: None)


def case(seed, n, width, expert_width, format, **sizes):
    """Opened records, and what experts work on: index, picks and x."""
    source, index, picks, x, _, options = experts_case(
        seed, n, width, expert_width, format, **sizes
    )
    layout = RecordLayout(width=width, expert_width=expert_width, dtype=format)
    assert options["down_offset"] == layout.offsets["down"]
    network = functools.partial(devices.network, layout)
    records = host.Records(source, layout, network)
    return records, index, picks, x, (source, options)


@functools.partial(jax.jit, static_argnames=("layout", "way"))
def called(layout, way, handle, index, plan, x, rows):
    return host.experts(layout, HostRecords(handle=handle, way=way), index, plan, x, rows)


def hosted(records, way, index, picks, x, fill=0.5):
    """Rows [N, K, D] and the status, on picks as native kernels plan them."""
    rows = jnp.full((*picks.shape, x.shape[1]), fill, jnp.float32)
    handle = jnp.int32(records.handle)
    arrays = map(jnp.asarray, (index, picks, x))
    y, status = called(records.layout, way, handle, *arrays, rows)
    return np.asarray(y), int(status)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("n", [1, 5, 70])
def test_both_ways_have_the_bits_of_the_cpu(format, n):
    records, index, picks, x, (source, options) = case(n, n, 150, 90, format)
    want = run_experts(source, index, picks, x, options)
    for way in host.WAYS:
        got, status = hosted(records, way, index, picks, x)
        assert status == Status.OK and got.tobytes() == want.tobytes(), way


@pytest.mark.parametrize("format", FORMATS)
def test_numpy_does_without_a_library(format, without_library):
    records, index, picks, x, (source, options) = case(2, 5, 150, 90, format)
    got, status = hosted(records, CALLBACK, index, picks, x)
    want = run_experts(source, index, picks, x, options)
    # One bf16 rounding of a hidden value may fall the other way, but seldom does.
    limit, scale = 4e-3 if format == "bfloat16" else 2e-5, max(1.0, np.abs(want).max())
    assert status == Status.OK
    np.testing.assert_allclose(got, want, rtol=0, atol=limit * scale)
    assert np.quantile(np.abs(got - want), 0.75) < 2e-6 * scale
    assert (got[(picks < 0) | (index[picks] < 0)] == 0.5).all()


@pytest.mark.parametrize("n", [1, 33])
def test_rows_of_the_reference_are_filled_where_they_lie(n):
    records, index, picks, x, (source, options) = case(3, n, 64, 48, "float32")
    want = run_experts(source, index, picks, x, options)
    plan = reference.plan(jnp.asarray(picks), len(index))
    before = jnp.full((*plan.tokens.shape, x.shape[1]), 0.5, jnp.float32)
    arrays = (jnp.asarray(index), plan, jnp.asarray(x), before)
    own = np.asarray(reference.experts(records.layout, source, *arrays)[1])
    for way in host.WAYS:
        after, status = called(records.layout, way, jnp.int32(records.handle), *arrays)
        got = np.asarray(after[plan.block_of, plan.row_of])
        assert status == Status.OK
        here = (picks >= 0) & (index[picks] >= 0)
        assert got[here].tobytes() == want[here].tobytes()
        rest = np.ones(after.shape[:2], bool)
        rest[np.asarray(plan.block_of)[here], np.asarray(plan.row_of)[here]] = False
        assert (np.asarray(after)[rest] == 0.5).all()
        np.testing.assert_allclose(np.asarray(after)[~rest], own[~rest], rtol=0, atol=1e-4)


def deferred(number, picks, width):
    """Rows and status of a call that was held back."""
    y = np.empty((*picks.shape, width), np.float32)
    status = np.empty(1, np.int32)
    FAKE.fake_result(number, 0, y.ctypes.data, y.nbytes)
    FAKE.fake_result(number, 1, status.ctypes.data, status.nbytes)
    return y, int(status[0])


def test_many_calls_wait_in_one_stream():
    """Larger ones come while smaller ones wait, whose memory must stay till they are done."""
    cases = [case(n, n, 256, 64, "bfloat16") for n in (1, 3, 70, 2, 300, 5, 900)]
    launched, ran, pinned = FAKE.fake_launched(), FAKE.fake_ran(), FAKE.fake_pinned()
    with held_back():
        for records, index, picks, x, _ in cases:
            jax.block_until_ready(hosted(records, STREAM, index, picks, x))
        assert FAKE.fake_launched() == launched + len(cases) and FAKE.fake_ran() == ran
        assert FAKE.fake_pinned() > pinned + 1
    for number, (_, index, picks, x, (source, options)) in enumerate(cases):
        got, status = deferred(number, picks, x.shape[1])
        here = (picks >= 0) & (index[picks] >= 0)
        want = run_experts(source, index, picks, x, options)
        assert status == Status.OK and got[here].tobytes() == want[here].tobytes(), number
    FAKE.fake_defer(0)
    for _ in range(2):  # the first one shows that the stream is past the others
        records, index, picks, x, _ = cases[0]
        hosted(records, STREAM, index, picks, x)
    assert FAKE.fake_pinned() == 1


def test_streams_do_not_share_their_memory():
    cases = [case(seed, 9, 64, 48, "float32") for seed in range(2)]
    FAKE.fake_defer(1)
    for stream in (1, 2):
        FAKE.fake_use_stream(stream)
        FAKE.fake_hold(1)
        records, index, picks, x, _ = cases[stream - 1]
        hosted(records, STREAM, index, picks, x)
    FAKE.fake_use_stream(1)
    FAKE.fake_let(4)  # the copies to the host
    for stream in (2, 1):
        FAKE.fake_use_stream(stream)
        FAKE.fake_hold(0)
        FAKE.fake_wait()
    for number, (_, index, picks, x, (source, options)) in enumerate(cases):
        got, _ = deferred(number, picks, x.shape[1])
        here = (picks >= 0) & (index[picks] >= 0)
        want = run_experts(source, index, picks, x, options)
        assert got[here].tobytes() == want[here].tobytes()


CALLS = {
    "cuStreamGetCtx": 1,
    "cuStreamGetId": 1,
    "cuCtxPushCurrent_v2": 1,
    "cuMemcpyDtoHAsync_v2": 4,
    "cuLaunchHostFunc": 1,
    "cuMemcpyHtoDAsync_v2": 2,
}


@pytest.mark.parametrize(
    ("name", "nth"), [(name, i + 1) for name, times in CALLS.items() for i in range(times)]
)
def test_a_call_that_fails_gives_no_result(name, nth):
    records, index, picks, x, (source, options) = case(4, 5, 64, 48, "float32")
    FAKE.fake_fail(name.encode(), nth)
    with pytest.raises(jax.errors.JaxRuntimeError, match=f"{name}: made to fail"):
        hosted(records, STREAM, index, picks, x)
    assert not FAKE.fake_failures_left()
    got, status = hosted(records, STREAM, index, picks, x)
    want = run_experts(source, index, picks, x, options)
    assert status == Status.OK and got.tobytes() == want.tobytes()


def test_no_pinned_memory():
    records, index, picks, x, _ = case(4, 5, 64, 48, "float32")
    FAKE.fake_use_stream(3)  # which has none yet
    FAKE.fake_fail(b"cuMemHostAlloc", 1)
    with pytest.raises(jax.errors.JaxRuntimeError, match="cuMemHostAlloc: made to fail"):
        hosted(records, STREAM, index, picks, x)
    assert hosted(records, STREAM, index, picks, x)[1] == Status.OK


def failing(records, way, index, picks, x):
    """The status of a call whose rows must all be NaN."""
    y, status = hosted(records, way, index, picks, x)
    here = (picks >= 0) & (index[picks] >= 0)
    assert np.isnan(y[here]).all() and here.any()
    return status


@pytest.mark.parametrize("way", [STREAM, CALLBACK, NUMPY])
def test_what_the_host_cannot_do_is_a_status(way, monkeypatch):
    if way == NUMPY:
        monkeypatch.setattr(host, "_native", lambda: None)
        way = CALLBACK
    records, index, picks, x, _ = case(5, 5, 64, 48, "float32")
    beyond = np.where(index >= 0, index + 6, -1).astype(np.int32)
    assert failing(records, way, beyond, picks, x) == Status.BAD_REQUEST
    wrong = np.where(picks == picks.max(), 99, picks)
    y, status = hosted(records, way, np.zeros(6, np.int32), wrong, x)
    assert status == Status.BAD_REQUEST
    assert hosted(records, way, index, picks, x)[1] == Status.OK
    records.close()
    assert failing(records, way, index, picks, x) == Status.NO_STORE


def test_the_reason_can_be_read():
    records, index, picks, x, _ = case(5, 5, 64, 48, "float32")
    hosted(records, STREAM, np.where(index >= 0, 77, -1).astype(np.int32), picks, x)
    assert host.last_error() == "record 77 is out of range"
    records.close()
    hosted(records, STREAM, index, picks, x)
    assert host.last_error() == f"the records of handle {records.handle} are closed"


def test_records_closed_while_a_call_waits():
    records, index, picks, x, _ = case(6, 5, 64, 48, "float32")
    with held_back():
        hosted(records, STREAM, index, picks, x)
        records.close()
    y, status = deferred(0, picks, x.shape[1])
    assert status == Status.NO_STORE and np.isnan(y).all()


def test_nobody_has_to_close_records():
    records, index, picks, x, _ = case(7, 5, 64, 48, "float32")
    handle = jnp.int32(records.handle)
    rows = jnp.zeros((*picks.shape, x.shape[1]), jnp.float32)
    arrays = (*map(jnp.asarray, (index, picks, x)), rows)
    layout = records.layout
    del records
    for way in host.WAYS:
        assert called(layout, way, handle, *arrays)[1] == Status.NO_STORE


def test_records_of_another_layout_are_refused():
    source, *_ = experts_case(0, 4, 16, 8, "float32")
    layout = RecordLayout(width=64, expert_width=48, dtype="float32")
    with pytest.raises(ValueError, match="records must be uint32"):
        host.Records(source, layout, functools.partial(devices.network, layout))


def test_what_each_machine_has(without_library, monkeypatch):
    kind, meaning = host.way("one driver")
    assert kind == CALLBACK and meaning.startswith("NumPy")
    assert doctor.judge_host(True, (kind, meaning))[0] == "warn"
    monkeypatch.undo()
    assert "already in use" in host.way("another driver")[1]
    assert host.way(str(PATH)) == (STREAM, "native kernels in the GPU's own stream")
    status, detail = doctor.judge_host(True, host.way(str(PATH)))
    assert status == "ok" and "not confirmed on a GPU" in detail
    assert doctor.judge_host(False, ("", ""))[0] == "ok"


def test_the_driver_says_whose_memory_it_is():
    native = build.library()
    native.moejax_cuda_check_host.argtypes = [fake_cuda.ctypes.c_uint64]
    native.moejax_cuda_check_host.restype = fake_cuda.ctypes.c_char_p
    assert native.moejax_cuda_check_host(np.zeros(4).ctypes.data) is None
    device = FAKE.fake_device_memory(64)
    assert native.moejax_cuda_check_host(device) == b"the memory is not the host's (type 2)"
    for name in (b"cuDeviceGet", b"cuDevicePrimaryCtxRetain", b"cuPointerGetAttribute"):
        FAKE.fake_fail(name, 1)
        assert native.moejax_cuda_check_host(device) == name + b": made to fail"


def test_a_reason_outlives_those_of_other_threads():
    text, address, number = ctypes.c_char_p, ctypes.c_void_p, ctypes.c_uint64
    opened = ctypes.CFUNCTYPE(address, text)(("moejax_cuda_open", build.library()))
    checked = ctypes.CFUNCTYPE(address, number)(("moejax_cuda_check_host", build.library()))
    first = opened(b"another driver")
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        second = thread.submit(checked, FAKE.fake_device_memory(64)).result()
        assert ctypes.string_at(first).endswith(b"is already in use")
        assert ctypes.string_at(second) == b"the memory is not the host's (type 2)"


def with_host(built, way):
    """The model with its records open to the host, and these."""
    layout = built.store.layout
    network = functools.partial(devices.network, layout)
    records = host.Records(built.store.records, layout, network)
    handle = jax.device_put(np.int32(records.handle), jax.devices()[0])
    store = dataclasses.replace(built.store, host=HostRecords(handle=handle, way=way))
    return dataclasses.replace(built, store=store), records


PLACEMENTS = [HostAll(), TwoPointer(load=2.0, host=1.0)]


@pytest.mark.parametrize("placement", PLACEMENTS, ids=lambda placement: type(placement).__name__)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_has_the_same_bits(placement, dtype):
    built = on(built_model(small_config(), dtype), "native")
    policy = dataclasses.replace(built.policy, placement=placement)
    prompts = prompts_of(3, 2)
    want, traces = run(built, prompts, 4, policy=policy, slots=4)
    assert sum(int(trace.host.sum()) for trace in traces) > 0
    for way in host.WAYS:
        other, records = with_host(built, way)
        launched = FAKE.fake_launched()
        got, _ = run(other, prompts, 4, policy=policy, slots=4)
        assert got.tobytes() == want.tobytes(), way
        steps = FAKE.fake_launched() - launched
        assert steps == (0 if way == CALLBACK else 2 * len(traces))
        records.close()


def test_a_model_on_the_reference_is_close(without_library):
    built = built_model(small_config())
    policy = dataclasses.replace(built.policy, placement=HostAll())
    prompts = prompts_of(3, 2)
    want, _ = run(built, prompts, 3, slots=16)
    other, records = with_host(built, CALLBACK)
    got, traces = run(other, prompts, 3, policy=policy, slots=3)
    assert int(traces[-1].host.sum()) > 0
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-5 * np.abs(want).max())
    records.close()


@pytest.mark.parametrize("way", host.WAYS)
def test_a_failed_step_was_not_made(way):
    built, records = with_host(on(built_model(small_config()), "native"), way)
    policy = dataclasses.replace(built.policy, placement=HostAll())
    fixed = (built.model, policy, built.params, built.store)
    state = decode.init_state(built.model, policy, built.store, slots=4, context=64)
    state, out = decode.decode_step(*fixed, state, jnp.array([[3]], jnp.int32))
    decode.check_arrived(built.store, out)
    records.close()
    state, out = decode.decode_step(*fixed, state, jnp.array([[4]], jnp.int32))
    assert np.isnan(out.logits).all() and state.length.tolist() == [1]
    with pytest.raises(LinkError, match="could not be computed from .NO_STORE."):
        decode.check_arrived(built.store, out)
    again, records = with_host(built, way)
    _, out = decode.decode_step(*fixed[:3], again.store, state, jnp.array([[4]], jnp.int32))
    assert np.isfinite(out.logits).all()


def test_loading_opens_the_records(monkeypatch, tmp_path):
    pinned = jax.sharding.SingleDeviceSharding(jax.devices()[0], memory_kind="pinned_host")
    options = {"slots": 24, "context": 64, "kernels": "reference"}
    tokens = np.array([[5, 9, 11, 2]])
    want = moejax.load("tiny", **options).logits(tokens)
    monkeypatch.setattr(devices, "store_sharding", lambda on_device: pinned)
    assert moejax.load("tiny", **options).hosted is None
    run = moejax.load("tiny", policy="host", **options)
    assert run.store.host.way == CALLBACK and int(run.store.host.handle) == run.hosted.handle
    got = run.logits(tokens)
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-2 * np.abs(want).max())
    run.hosted.close()
    with pytest.raises(LinkError, match="NO_STORE"):
        run.logits(tokens)


def test_pinned_records_must_be_open(monkeypatch):
    built = built_model(small_config())
    pinned = jax.sharding.SingleDeviceSharding(jax.devices()[0], memory_kind="pinned_host")
    store = dataclasses.replace(built.store, records=jax.device_put(built.store.records, pinned))
    policy = dataclasses.replace(built.policy, placement=HostAll())
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with pytest.raises(PolicyError, match="give the policy to `load`"):
        decode.init_state(built.model, policy, store, slots=4)


def test_memory_of_a_gpu_is_refused(monkeypatch):
    class Elsewhere:
        def __init__(self, array):
            self.array, self.ndim, self.size = array, array.ndim, array.size
            self.shape, self.dtype = array.shape, array.dtype

        def __len__(self):
            return len(self.array)

        def unsafe_buffer_pointer(self):
            return FAKE.fake_device_memory(self.array.nbytes)

        def devices(self):
            return {self}

        platform = "gpu"

    monkeypatch.setattr(host, "DRIVER", str(PATH))
    source, _, _, _, _, _ = experts_case(0, 4, 64, 48, "float32")
    layout = RecordLayout(width=64, expert_width=48, dtype="float32")
    with pytest.raises(MoejaxError, match="cannot compute from the records: the memory is not"):
        host.Records(Elsewhere(source), layout, functools.partial(devices.network, layout))
