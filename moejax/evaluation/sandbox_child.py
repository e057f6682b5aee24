"""Runs one untrusted program in this process, confined; started by `sandbox`, see there.

Reads {"program", "token", "seconds", "memory"} from stdin and writes the verdict to the descriptor
that the last argument names. Standard library only: this runs without moejax on its path.
"""

import ctypes
import importlib
import io
import json
import os
import platform
import resource
import struct
import sys

# What pure computation in Python asks of Linux, by the number that it has on each architecture.
# Opening files, sockets, new processes and threads, signals to others are not among it.
CALLS = {
    "x86_64": (
        *(0, 1, 3, 5, 7, 8, 9, 10, 11, 12, 13, 14, 15, 19, 20, 23, 24, 25, 28, 35, 39, 60, 63),
        *(79, 96, 97, 98, 100, 102, 104, 107, 108, 110, 131, 186, 201, 202, 204, 218, 219, 228),
        *(229, 230, 231, 270, 271, 273, 318, 334),
    ),
    "aarch64": (
        *(17, 57, 62, 63, 64, 65, 66, 72, 73, 80, 93, 94, 96, 98, 99, 101, 113, 114, 115, 123),
        *(124, 128, 132, 134, 135, 139, 153, 160, 163, 165, 169, 172, 173, 174, 175, 176, 177),
        *(178, 214, 215, 216, 222, 226, 233, 278, 293),
    ),
}
AUDIT = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
X32 = 0x40000000  # calls of another table than that of x86-64 begin here
LOAD, EQUAL, AT_LEAST, RETURN = 0x20, 0x15, 0x35, 0x06
ALLOW, REFUSE, KILL = 0x7FFF0000, 0x00050000 | 1, 0x80000000  # REFUSE gives EPERM
NO_NEW_PRIVILEGES, SECCOMP, FILTER = 38, 22, 2
# Imported before, as no file can be opened after.
MODULES = (
    "_strptime abc array ast base64 binascii bisect calendar cmath collections contextlib copy "
    "dataclasses datetime decimal difflib encodings.ascii encodings.cp1252 encodings.latin_1 "
    "encodings.utf_16 encodings.utf_32 enum fractions functools hashlib heapq html ipaddress "
    "itertools keyword linecache locale math numbers operator pprint queue random re secrets "
    "statistics string struct textwrap threading time timeit traceback types typing unicodedata "
    "uuid warnings zlib"
).split()


def main() -> None:
    """Run the program and say how it went."""
    verdict = int(sys.argv[-1])
    order = json.loads(sys.stdin.buffer.read())
    sys.stdin.close()
    sys.stdin = io.StringIO()
    for name in MODULES:
        importlib.import_module(name)
    space = {"__name__": "__main__", "__builtins__": __builtins__}
    try:
        confine(order["seconds"], order["memory"])
    except OSError as error:
        _say(verdict, order["token"], f"unavailable {error}")
    try:
        code = compile(order["program"], "<program>", "exec")
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        _say(verdict, order["token"], f"failed {type(error).__name__}: {error}")
    os.write(verdict, f"{order['token']} begun\n".encode())
    try:
        exec(code, space)
    except BaseException as error:
        _say(verdict, order["token"], f"failed {_text(error)}")
    _say(verdict, order["token"], "passed")


def confine(seconds: int, memory: int) -> None:
    """Bound this process and take from it all but computing; OSError if that cannot be done."""
    machine = platform.machine()
    if sys.platform != "linux" or machine not in CALLS:
        raise OSError(f"no filter of system calls for {sys.platform} on {machine}")
    used = resource.getrusage(resource.RUSAGE_SELF)
    limits = {
        resource.RLIMIT_CPU: seconds + int(used.ru_utime + used.ru_stime) + 1,
        resource.RLIMIT_AS: memory,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_NPROC: 0,
        resource.RLIMIT_CORE: 0,
    }
    for which, most in limits.items():
        resource.setrlimit(which, (most, most))
    code = [(LOAD, 0, 0, 4), (EQUAL, 1, 0, AUDIT[machine]), (RETURN, 0, 0, KILL), (LOAD, 0, 0, 0)]
    if machine == "x86_64":
        code += [(AT_LEAST, 0, 1, X32), (RETURN, 0, 0, KILL)]
    calls = CALLS[machine]
    code += [(EQUAL, len(calls) - i, 0, number) for i, number in enumerate(calls)]
    code += [(RETURN, 0, 0, REFUSE), (RETURN, 0, 0, ALLOW)]
    packed = b"".join(struct.pack("HBBI", *line) for line in code)
    buffer = ctypes.create_string_buffer(packed, len(packed))
    program = struct.pack("HxxxxxxP", len(code), ctypes.addressof(buffer))
    libc = ctypes.CDLL(None, use_errno=True)
    for call in ((NO_NEW_PRIVILEGES, 1, 0, 0, 0), (SECCOMP, FILTER, program, 0, 0)):
        if libc.prctl(*call):
            raise OSError(ctypes.get_errno(), "the kernel takes no filter of system calls")


def _text(error: BaseException) -> str:
    try:
        return f"{type(error).__name__}: {error}"
    except BaseException:
        return "an error that cannot be shown"


def _say(verdict: int, token: str, text: str) -> None:
    try:
        sys.stdout.flush()
    except BaseException:  # a program may have closed it, or put anything in its place
        pass
    os.write(verdict, f"{token} {text}".encode(errors="replace")[:4000])
    os._exit(0)


if __name__ == "__main__":
    main()
