"""Compile, load and register the native CPU kernels; without a compiler there are none."""

import concurrent.futures
import ctypes
import functools
import hashlib
import os
import pathlib
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import warnings

import jax
import jaxlib

from moejax.errors import InputError, MoejaxError

SOURCES = pathlib.Path(__file__).parent / "native"
MATH = "math.cc"  # compiled once per instruction set
FLAGS = [
    "-O3",
    "-std=c++17",
    "-fPIC",
    "-pthread",
    "-fvisibility=hidden",
    "-ffp-contract=off",  # fused multiply-adds only where the source says so: one result per row
    "-fno-math-errno",
]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
BF16 = ["-mavx512bf16", "-mavx512vnni"]  # the first processor with bf16 had both
AMX = ["-mavx512vbmi", "-mamx-tile", "-mamx-int8"]
ISAS = {
    "x86_64": {
        "baseline": [],
        "avx2": AVX2,
        "avx512": AVX512,
        "avx512bf16": [*AVX512, *BF16],
        "amx": [*AVX512, *BF16, *AMX],
        "amxbf16": [*AVX512, *BF16, *AMX, "-mamx-bf16"],
    },
    "aarch64": {"neon": []},
}
MACHINES = {"amd64": "x86_64", "arm64": "aarch64"}


def compiler() -> list[str] | None:
    """Command of the C++ compiler: $CXX, or the first of g++, clang++ and c++ on the path."""
    if os.environ.get("CXX"):
        return shlex.split(os.environ["CXX"])
    found = next(filter(None, map(shutil.which, ("g++", "clang++", "c++"))), None)
    return found and [found]


def build(force: bool = False) -> pathlib.Path:
    """Path of the compiled library, compiled now unless the cache has it or with `force`.

    $MOEJAX_NATIVE_FLAGS is added to every command of the compiler and has its own library.
    Raises MoejaxError without a compiler, with the compiler's output when it fails, and when the
    cache directory cannot be written.
    """
    command = compiler()
    if command is None:
        raise MoejaxError("no C++ compiler found (install g++ or clang, then moejax build-native)")
    isas = _isas(command)
    path = _cache() / _key(command, isas) / ("moejax" + _suffix())
    if path.exists() and not force:
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix="build-") as directory:
            # A rename is atomic: processes that build at the same time see one library or none.
            os.replace(_compile(command, isas, pathlib.Path(directory)), path)
    except OSError as error:
        raise MoejaxError(
            f"cannot write the native kernels to {path.parent}: {error} (set XDG_CACHE_HOME)"
        ) from error
    return path


def library() -> ctypes.CDLL | None:
    """The loaded library with its handlers registered, or None; `status` says why.

    Raises InputError if $MOEJAX_ISA names an instruction set that the machine does not have.
    """
    return _load()[0]


def in_use() -> str | None:
    """The instruction set of the library; None if this process has not loaded it."""
    if not _load.cache_info().currsize or (loaded := library()) is None:
        return None
    return loaded.moejax_isa().decode()


def status() -> str:
    """One line: which native kernels are in use, or why none are."""
    loaded, text = _load()
    if loaded is None:
        return f"reference path: {text}"
    return f"native kernels: {loaded.moejax_isa().decode()} ({text}){_refused(loaded)}"


def _choose(loaded: ctypes.CDLL) -> None:
    """Use the instruction set of $MOEJAX_ISA, or else the best.

    Raises InputError if $MOEJAX_ISA names one that the machine does not have.
    """
    name = os.environ.get("MOEJAX_ISA")
    if not name or loaded.moejax_set_isa(name.encode()):
        return
    here = [isa for isas in ISAS.values() for isa in isas if loaded.moejax_set_isa(isa.encode())]
    raise InputError(
        f"MOEJAX_ISA={name}: this machine has kernels for {', '.join(here)}{_refused(loaded)}"
    )


def _refused(loaded: ctypes.CDLL) -> str:
    why = loaded.moejax_tiles_refused()
    return f"; no tiles of AMX: {why.decode()}" if why else ""


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    if os.environ.get("MOEJAX_NATIVE") == "0":
        return None, "native kernels are switched off (MOEJAX_NATIVE=0)"
    try:
        path = build()
        loaded = ctypes.CDLL(str(path))
        loaded.moejax_handlers.restype = ctypes.c_char_p
        loaded.moejax_cuda_handlers.restype = ctypes.c_char_p
        loaded.moejax_isa.restype = ctypes.c_char_p
        loaded.moejax_tiles_refused.restype = ctypes.c_char_p
        loaded.moejax_set_isa.argtypes = [ctypes.c_char_p]
        loaded.moejax_set_workers.argtypes = [ctypes.c_int]
        listed = {"cpu": loaded.moejax_handlers(), "CUDA": loaded.moejax_cuda_handlers()}
        for platform_name, names in listed.items():
            for name in names.decode().split(","):
                capsule = jax.ffi.pycapsule(getattr(loaded, name))
                jax.ffi.register_ffi_target(name, capsule, platform=platform_name)
    except MoejaxError as error:
        return None, str(error)
    except (OSError, AttributeError, RuntimeError) as error:
        return None, f"the native kernels do not load: {error} (try moejax build-native --force)"
    _choose(loaded)
    return loaded, str(path)


def _cache() -> pathlib.Path:
    root = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(root) / "moejax" / "native"


def _suffix() -> str:
    return ".dylib" if sys.platform == "darwin" else ".so"


def _isas(command: list[str]) -> dict[str, list[str]]:
    """Flags per instruction set of this machine's architecture that the compiler knows."""
    machine = platform.machine().lower()
    known = ISAS.get(MACHINES.get(machine, machine))
    if known is None:
        raise MoejaxError(f"there are no native kernels for {machine} processors")

    def accepted(flags: list[str]) -> bool:
        return _run([*command, *flags, "-E", "-x", "c++", "-"]).returncode == 0

    return {name: flags for name, flags in known.items() if not flags or accepted(flags)}


def _flags() -> list[str]:
    return [*FLAGS, *shlex.split(os.environ.get("MOEJAX_NATIVE_FLAGS", ""))]


def _key(command: list[str], isas: dict[str, list[str]]) -> str:
    digest = hashlib.sha256()
    for path in sorted(SOURCES.glob("*.*")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    version = _run([*command, "--version"]).stdout
    digest.update(repr((jaxlib.__version__, command, version, _flags(), isas)).encode())
    return digest.hexdigest()[:24]


def _compile(
    command: list[str], isas: dict[str, list[str]], directory: pathlib.Path
) -> pathlib.Path:
    """Compile every object in parallel, then link them; the library's path in `directory`.

    An instruction set whose mathematics does not compile is left out, with a warning.
    """
    flags = _flags()
    include = f"-I{jax.ffi.include_dir()}"

    def compiled(source: str, stem: str, more: list[str]) -> str:
        target = str(directory / f"{stem}.o")
        path = str(SOURCES / source)
        _check([*command, *flags, include, *more, "-c", path, "-o", target])
        return target

    def mathematics(name: str) -> str | None:
        try:
            return compiled(MATH, f"math_{name}", [*isas[name], f"-DMOEJAX_ISA={name}"])
        except MoejaxError as error:
            if not isas[name]:  # every processor of this architecture has it: something else fails
                raise
            warnings.warn(f"no native kernels for {name}: {error}", stacklevel=2)
            return None

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = dict(zip(isas, pool.map(mathematics, isas), strict=True))
        has = [f"-DMOEJAX_HAS_{name}" for name in isas if objects[name]]
        sources = [path for path in sorted(SOURCES.glob("*.cc")) if path.name != MATH]
        others = list(pool.map(lambda path: compiled(path.name, path.stem, has), sources))
    target = directory / ("moejax" + _suffix())
    linked = [*filter(None, objects.values()), *others]
    loading = ["-ldl"] if sys.platform == "linux" else []  # a library of its own before glibc 2.34
    _check([*command, *flags, "-shared", *linked, *loading, "-o", str(target)])
    return target


def _run(command: list[str]) -> subprocess.CompletedProcess:
    try:
        return subprocess.run(command, input="", capture_output=True, text=True, check=False)
    except OSError as error:
        raise MoejaxError(f"cannot run the C++ compiler {command[0]}: {error}") from error


def _check(command: list[str]) -> None:
    done = _run(command)
    if done.returncode:
        raise MoejaxError(
            f"the native kernels do not compile:\n{shlex.join(command)}\n{done.stderr}"
        )
