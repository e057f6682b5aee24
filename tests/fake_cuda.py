"""The driver library of fake_cuda.cc, built and taken into use; needs native kernels."""

import contextlib
import ctypes
import os
import pathlib
import shlex
import subprocess
import tempfile

import jax
from native_setup import LIBRARY

from moejax.kernels import build, host

SOURCE = pathlib.Path(__file__).with_suffix(".cc")
# As long as the process: it runs code of the library.
DIRECTORY = tempfile.TemporaryDirectory(prefix="moejax-fake-cuda-")
PATH = pathlib.Path(DIRECTORY.name) / "libfakecuda.so"
HANDLER = "moejax_cuda_host_experts"


def _built() -> ctypes.CDLL:
    flags = ["-std=c++17", "-O1", "-g", "-fPIC", "-pthread", "-shared", "-Wall", "-Werror"]
    flags += shlex.split(os.environ.get("MOEJAX_NATIVE_FLAGS", ""))
    include = f"-I{jax.ffi.include_dir()}"
    command = [*build.compiler(), *flags, include, str(SOURCE), "-o", str(PATH)]
    subprocess.run(command, check=True)
    fake = ctypes.CDLL(str(PATH))
    fake.fake_set_handler.argtypes = [ctypes.c_void_p]
    fake.fake_device_memory.restype = ctypes.c_void_p
    fake.fake_device_memory.argtypes = [ctypes.c_int64]
    fake.fake_result.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.c_int64]
    fake.fake_fail.argtypes = [ctypes.c_char_p, ctypes.c_int]
    fake.fake_set_handler(ctypes.cast(getattr(LIBRARY, HANDLER), ctypes.c_void_p))
    fake.fake_use_stream(0)
    capsule = jax.ffi.pycapsule(fake.fake_on_cpu)
    jax.ffi.register_ffi_target(HANDLER, capsule, platform="cpu")
    return fake


FAKE = _built()
assert host.way(str(PATH))[0] == "stream", host.way(str(PATH))


@contextlib.contextmanager
def held_back():
    """Calls return at once; the stream does nothing before the end of this."""
    FAKE.fake_defer(1)
    FAKE.fake_hold(1)
    try:
        yield
    finally:
        FAKE.fake_hold(0)
        FAKE.fake_wait()
