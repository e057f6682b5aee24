"""Experts that the host computes in a program that runs on a GPU, from records in host memory.

Two ways lead there, which differ in time and in nothing else. "stream": an FFI handler puts copies
and a host function into XLA's own stream, so that neither Python nor anybody's wait is on the path.
"callback": Python is called for every layer, which takes milliseconds and keeps XLA's programs out
of the compilation cache; it needs no CUDA and no compiler, runs on every backend, and defines the
other.

The records are no operand of the program: it knows their handle, as it does of a link's store.
XLA's GPU backend has taken operations on operands in host memory for compute on the host
(openxla/xla#25767).
"""

import ctypes
import functools
import itertools
import weakref
from collections.abc import Callable
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from moejax.errors import MoejaxError
from moejax.kernels import build, reference
from moejax.kernels.cpu import FORMATS
from moejax.kernels.transport import Status
from moejax.layout import RecordLayout

DRIVER = "libcuda.so.1"
MESSAGE_BYTES = 4096
WAYS = ("stream", "callback")
TARGET = "moejax_cuda_host_experts"

# One expert's record [R] bits and x [M, D] f32 to its results [M, D] f32.
Network = Callable[[np.ndarray, np.ndarray], np.ndarray]

_open: "weakref.WeakValueDictionary[int, Records]" = weakref.WeakValueDictionary()
_handles = itertools.count(1)  # where there is no native library to give them


@functools.cache
def way(driver: str = DRIVER) -> tuple[str, str]:
    """One of WAYS, the best that this machine has, and what it means in words.

    Args:
        driver: NVIDIA's driver library.
    """
    native = _native()
    if native is None:
        return "callback", f"NumPy, called through Python ({build.status()})"
    why = native.moejax_cuda_open(driver.encode())
    if why is not None:
        return "callback", f"native kernels, called through Python ({why.decode()})"
    return "stream", "native kernels in the GPU's own stream"


class Records:
    """Records [L * E, R] in host memory, open to the experts that the host computes."""

    def __init__(self, records: jax.Array | np.ndarray, layout: RecordLayout, network: Network):
        """Opens them, until `close` or until nobody refers to this.

        Args:
            records: bits; a JAX array must be in pinned host memory, or on the CPU.
            network: computes one expert where there are no native kernels.

        Raises:
            ValueError: they do not have the layout.
            MoejaxError: the GPU's driver says that they are not in host memory.
        """
        if records.ndim != 2 or records.shape[1] != layout.elements or records.dtype != layout.bits:
            raise ValueError(
                f"records must be {layout.bits} [L * E, {layout.elements}], got {records.dtype} "
                f"{records.shape}"
            )
        self.layout, self.network = layout, network
        address = _address(records)
        memory = (ctypes.c_char * (len(records) * layout.stride)).from_address(address)
        self.view = np.frombuffer(memory, layout.bits).reshape(records.shape)
        self._records = records  # which the view does not keep
        native = _native()
        if native is None:
            self.handle = next(_handles)
        else:
            self.handle = native.moejax_host_open(address, len(records), layout.stride)
        _open[self.handle] = self
        # Given the records, too: they outlast what is being computed from them.
        self._finalizer = weakref.finalize(self, _close, native, self.handle, records)

    def close(self) -> None:
        """Programs that use the records fail from now on; what is being computed comes first."""
        _open.pop(self.handle, None)
        self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def compute(self, index: np.ndarray, picks: np.ndarray, x: np.ndarray) -> np.ndarray:
        """[N, K, D] f32, in NumPy: the rows of picks whose expert has a record, else zeros.

        Raises:
            IndexError: a pick or a record that is not there.
        """
        y = np.zeros((*picks.shape, x.shape[1]), np.float32)
        if (picks < -1).any():
            raise IndexError("a pick below -1")
        wanted = np.where(picks >= 0, index[np.maximum(picks, 0)], -1)
        for record in np.unique(wanted[wanted >= 0]):
            here = wanted == record
            y[here] = self.network(self.view[record], x[here.nonzero()[0]])
        return y


def last_error() -> str:
    """Why native kernels could last not compute experts on the host, or ''."""
    native = _native()
    if native is None:
        return ""
    text = ctypes.create_string_buffer(MESSAGE_BYTES)
    native.moejax_host_last_error(text, MESSAGE_BYTES)
    return text.value.decode(errors="replace")


def experts(
    layout: RecordLayout,
    hosted: Any,
    index: jax.Array,
    plan: Any,
    x: jax.Array,
    rows: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """`kernels.experts` on the host: its rows, and a Status [] i32.

    Args:
        hosted: the handle [] i32 of `Records`, and the way, one of WAYS: a `state.HostRecords`.
        index: [E] i32, the record that holds each expert of the layer, -1 = not now.
        plan: as the kernels in use make it.

    Without success the rows mean nothing.
    """
    picks = plan.picks if isinstance(plan, reference.Blocks) else plan
    call = _through_stream if hosted.way == "stream" else _through_python
    y, status = call(layout, hosted.handle, index, picks, x)
    here = (picks >= 0) & (index[picks] >= 0)
    if isinstance(plan, reference.Blocks):
        block = jnp.where(here, plan.block_of, rows.shape[0])
        return rows.at[block, plan.row_of].set(y, mode="drop"), status[0]
    return jnp.where(here[:, :, None], y, rows), status[0]


def _results(picks: jax.Array, x: jax.Array) -> tuple[jax.ShapeDtypeStruct, ...]:
    y = jax.ShapeDtypeStruct((*picks.shape, x.shape[1]), jnp.float32)
    return y, jax.ShapeDtypeStruct((1,), jnp.int32)


def _through_stream(layout: RecordLayout, *operands: jax.Array) -> tuple[jax.Array, jax.Array]:
    if _native() is None:
        raise MoejaxError(build.status())
    _, _, picks, x = operands
    return jax.ffi.ffi_call(TARGET, _results(picks, x))(
        *operands,
        expert_width=np.int64(layout.expert_width),
        format=np.int64(FORMATS[layout.dtype]),
        gate_up_offset=np.int64(layout.offsets["gate_up"]),
        down_offset=np.int64(layout.offsets["down"]),
    )


def _through_python(layout: RecordLayout, *operands: jax.Array) -> tuple[jax.Array, jax.Array]:
    _, _, picks, x = operands
    called = functools.partial(_called, layout)
    return jax.pure_callback(called, _results(picks, x), *operands)


def _called(layout: RecordLayout, *operands: jax.Array) -> tuple[np.ndarray, np.ndarray]:
    """The callback. It must call nothing of JAX, which may wait for this one, and not raise."""
    handle, index, picks, x = (np.asarray(operand, order="C") for operand in operands)
    x = x.astype(np.float32, copy=False)  # whose address is given away
    y = np.full((*picks.shape, x.shape[1]), np.nan, np.float32)
    native = _native()
    if native is not None:
        sizes = (layout.width, layout.expert_width, FORMATS[layout.dtype])
        offsets = (layout.offsets["gate_up"], layout.offsets["down"])
        inputs = (index.ctypes.data, index.size, picks.ctypes.data, *picks.shape, x.ctypes.data)
        status = native.moejax_host_experts(int(handle), *inputs, y.ctypes.data, *sizes, *offsets)
        return y, np.array([status], np.int32)
    records = _open.get(int(handle))
    if records is None:
        return y, np.array([Status.NO_STORE], np.int32)
    try:
        return records.compute(index, picks, x), np.array([Status.OK], np.int32)
    except IndexError:
        return y, np.array([Status.BAD_REQUEST], np.int32)
    except MemoryError:
        return y, np.array([Status.HOST_FAILED], np.int32)


def _address(records: jax.Array | np.ndarray) -> int:
    """Where records begin in the host's memory."""
    if isinstance(records, np.ndarray):
        if not records.flags.c_contiguous:
            raise ValueError("records must be contiguous")
        return records.ctypes.data
    # Programs that only know the handle do not wait for what fills them.
    address = jax.block_until_ready(records).unsafe_buffer_pointer()
    native = _native()
    if next(iter(records.devices())).platform == "cpu" or native is None:
        return address
    if native.moejax_cuda_open(DRIVER.encode()) is None:
        wrong = native.moejax_cuda_check_host(address)
        if wrong is not None:
            raise MoejaxError(f"the host cannot compute from the records: {wrong.decode()}")
    return address


def _close(native: ctypes.CDLL | None, handle: int, records: Any) -> None:
    del records
    if native is not None:
        native.moejax_host_close(handle)


@functools.cache
def _native() -> ctypes.CDLL | None:
    """The native library, or None."""
    native = build.library()
    if native is None:
        return None
    i32, i64, text, address = ctypes.c_int32, ctypes.c_int64, ctypes.c_char_p, ctypes.c_void_p
    native.moejax_cuda_open.argtypes = [text]
    native.moejax_cuda_open.restype = text
    native.moejax_cuda_check_host.argtypes = [ctypes.c_uint64]
    native.moejax_cuda_check_host.restype = text
    native.moejax_host_open.argtypes = [address, i64, i64]
    native.moejax_host_close.argtypes = [i32]
    native.moejax_host_close.restype = None
    arrays = [address, i64, address, i64, i64, address, address]
    native.moejax_host_experts.argtypes = [i32, *arrays, i64, i64, i64, i64, i64]
    native.moejax_host_last_error.argtypes = [text, i64]
    native.moejax_host_last_error.restype = None
    return native
