"""Errors become one line on stderr and an exit code. Imports nothing that takes time."""

import contextlib
import functools
import os
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any

import typer

from moejax import errors

EXIT_CODES: dict[type[errors.MoejaxError], int] = {
    errors.InputError: 2,
    errors.PolicyError: 2,
    errors.ConfigError: 3,
    errors.UnsupportedModelError: 3,
    errors.CheckpointError: 3,
    errors.TokenizerError: 3,
    errors.BudgetError: 4,
    errors.HubError: 5,
    errors.LinkError: 3,
    errors.NonFiniteError: 6,
}
INTERNAL, INTERRUPTED, BROKEN_PIPE = 70, 130, 141


def exit_code(error: errors.MoejaxError) -> int:
    """The documented exit code of an error: that of its nearest listed class."""
    return next((EXIT_CODES[c] for c in type(error).__mro__ if c in EXIT_CODES), INTERNAL)


def one_line(error: BaseException) -> str:
    """An error's message with its lines joined."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    joined = "".join(f"{line} " if line.endswith(":") else f"{line}; " for line in lines)
    return joined.strip().removesuffix(";") or type(error).__name__


def guarded(function: Callable) -> Callable:
    """The command, its errors as one line on stderr and an exit code."""

    @functools.wraps(function)
    def command(**options: Any) -> None:
        try:
            with _leaving_on_interrupt():
                function(**options)
                sys.stdout.flush()
        except BrokenPipeError:
            # Nobody reads stdout any more; without this Python would complain when it flushes it.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise SystemExit(BROKEN_PIPE) from None
        except KeyboardInterrupt:
            raise SystemExit(INTERRUPTED) from None
        except errors.MoejaxError as error:
            _fail(one_line(error), exit_code(error))
        except (typer.Exit, typer.Abort):
            raise
        except Exception as error:
            if "MOEJAX_DEBUG" in os.environ:
                raise
            if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
                reason = one_line(error)
                _fail(f"out of memory, give a smaller --device-memory or --context: {reason}", 4)
            name = type(error).__name__
            hint = "a bug: please report it with the traceback that MOEJAX_DEBUG=1 shows"
            _fail(f"{name}: {one_line(error)} ({hint})", INTERNAL)

    return command


@contextlib.contextmanager
def _leaving_on_interrupt() -> Iterator[None]:
    """Ctrl-C ends the process: KeyboardInterrupt raised inside an import can be swallowed there."""
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, _leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _leave(number: int, frame: Any) -> None:
    if sys.stderr.isatty():
        os.write(sys.stderr.fileno(), b"\x1b[?25h\n")  # a progress bar hides the cursor
    os._exit(INTERRUPTED)


def _fail(message: str, code: int) -> None:
    print(f"moejax: {message}", file=sys.stderr)
    raise SystemExit(code)
