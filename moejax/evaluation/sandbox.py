"""Programs that a model wrote, run without being trusted.

Each runs in a process of its own whose system calls the kernel filters (seccomp): it can compute
and write to its output, and nothing else. No file can be opened, read or changed, no socket made,
no process or thread begun, no other process signalled. Time, memory and output are bounded, it has
no environment, and it is killed when it is done. Modules are those of the standard library that are
imported before; others cannot be. Where the kernel has no such filter, nothing is run.
"""

import dataclasses
import json
import os
import pathlib
import secrets
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from typing import IO

from moejax.errors import InputError

CHILD = pathlib.Path(__file__).with_name("sandbox_child.py")
STARTING = 30.0  # seconds in which a program's process has to start
VERDICT = 16 << 10  # bytes, more than the child says


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a program ended."""

    status: str  # "passed", "failed", "timeout" or "output"
    detail: str = ""  # the error
    output: str = ""  # the beginning of what it wrote

    @property
    def passed(self) -> bool:
        """Whether it ran to its end without an error."""
        return self.status == "passed"


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a program may take."""

    seconds: int = 3  # of the processor, and of time once it runs
    memory: int = 512 << 20  # bytes of address space
    output: int = 64 << 10  # bytes

    def __post_init__(self) -> None:
        if min(self.seconds, self.memory, self.output) < 1:
            raise InputError(f"limits of a program are positive: {self}")


def check() -> None:
    """Raise InputError where programs cannot be confined."""
    if not run("assert True").passed:
        raise InputError("programs cannot be confined here: leave out --allow-code-execution")


def run(program: str, limits: Limits = Limits()) -> Outcome:  # noqa: B008 - frozen
    """Run a program to its end or to a limit.

    A program passes by reaching its end: leaving early, by `sys.exit(0)` too, is a failure. This
    confines what it can do to the machine, not to the grade: it runs in the process that reports
    its end, as in other harnesses, and one that sets out to could report it itself.

    Raises:
        InputError: this machine has no filter of system calls.
    """
    if sys.platform != "linux":
        raise InputError("programs are confined on Linux only: leave out --allow-code-execution")
    token = secrets.token_hex(16)
    order = {"program": program, "token": token, "seconds": limits.seconds, "memory": limits.memory}
    reader, writer = os.pipe()
    with tempfile.TemporaryDirectory(prefix="moejax-") as folder, open(reader, "rb", 0) as verdict:
        try:
            child = subprocess.Popen(
                [sys.executable, "-I", "-S", "-B", str(CHILD), str(writer)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                pass_fds=(writer,),
                env={},
                cwd=folder,
                start_new_session=True,
            )
        finally:
            os.close(writer)
        try:
            sent = json.dumps(order).encode()
            status, output, said = _watch(child, sent, verdict, limits)
        finally:
            _kill(child)
    shown = output[: limits.output].decode(errors="replace")
    if status is not None:
        return Outcome(status, output=shown)
    return _judged(said.decode(errors="replace"), token, child.returncode, shown)


def _watch(
    child: subprocess.Popen, sent: bytes, verdict: IO[bytes], limits: Limits
) -> tuple[str | None, bytes, bytes]:
    """Feed the process and read until it ends; what was too much, its output, and the verdict."""
    output, said = bytearray(), bytearray()
    end, started = time.monotonic() + STARTING, False
    os.set_blocking(child.stdin.fileno(), False)
    with selectors.DefaultSelector() as selector:
        selector.register(child.stdin, selectors.EVENT_WRITE)
        selector.register(child.stdout, selectors.EVENT_READ, output)
        selector.register(verdict, selectors.EVENT_READ, said)
        while selector.get_map():
            ready = selector.select(max(end - time.monotonic(), 0))
            if not ready and time.monotonic() >= end:
                return "timeout", bytes(output), bytes(said)
            for key, _ in ready:
                if key.data is None:
                    sent = _fed(selector, child, sent)
                elif part := os.read(key.fd, 1 << 16):
                    key.data.extend(part)
                else:
                    selector.unregister(key.fileobj)
            if said and not started:
                end, started = time.monotonic() + limits.seconds, True
            if len(output) > limits.output or len(said) > VERDICT:
                return "output", bytes(output), bytes(said)
            if started and time.monotonic() >= end:
                return "timeout", bytes(output), bytes(said)
    return None, bytes(output), bytes(said)


def _fed(selector: selectors.BaseSelector, child: subprocess.Popen, left: bytes) -> bytes:
    """What is still to be sent, after some was."""
    try:
        left = left[os.write(child.stdin.fileno(), left) :]
    except BlockingIOError:
        return left
    except BrokenPipeError:
        left = b""
    if not left:
        selector.unregister(child.stdin)
        child.stdin.close()
    return left


def _judged(said: str, token: str, code: int, output: str) -> Outcome:
    lines = said.split("\n", 1)
    kind, _, detail = lines[-1].removeprefix(f"{token} ").partition(" ")
    known = lines[-1].startswith(f"{token} ")
    if known and kind == "unavailable":
        raise InputError(f"programs cannot be confined here: {detail}")
    if known and kind in ("passed", "failed"):
        return Outcome(kind, detail, output)
    if code == -signal.SIGKILL:  # by its limit of processor time
        return Outcome("timeout", output=output)
    why = "it left before its end" if code >= 0 else f"signal {-code}"
    return Outcome("failed", why, output)


def _kill(child: subprocess.Popen) -> None:
    try:
        os.killpg(child.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    for pipe in (child.stdin, child.stdout):
        pipe.close()
    child.wait()
