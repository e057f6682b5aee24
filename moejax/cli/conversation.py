"""`moejax chat`: a conversation at a terminal, or over lines of stdin."""

import contextlib
import select
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

from moejax.cli import actions as commands
from moejax.errors import InputError, unreadable
from moejax.session import Session
from moejax.terminal import Terminal

LEAVE = ("/exit", "/quit")
HELP = (
    f"{' or '.join(LEAVE)} leaves, /reset starts anew, /stats shows what the last answer cost, "
    "/help shows this"
)
FENCE = '"""'
PASTE_WAIT = 0.02  # seconds in which the next line of a paste arrives


class Stopper:
    """Whether Ctrl-C was pressed: an answer stops between two tokens, with its state whole."""

    def __init__(self):
        self.asked = False

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Turn the first Ctrl-C into `asked`; a second one interrupts at once."""
        self.asked = False
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGINT, self._ask)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def _ask(self, number: int, frame: Any) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True


def chat(
    terminal: Terminal,
    runtime: Any,
    *,
    system: str | None,
    max_new_tokens: int,
    sampling: dict[str, Any],
    stop: list[str],
    seed: int,
    drift: Any = None,
    as_json: bool,
) -> None:
    """Answer until the input ends; one line is one turn, unless it is fenced, continued or pasted.

    Raises:
        TokenizerError: the model has no chat template.
        InputError: a turn does not fit the context or is no text, and stdin is not a terminal.
    """
    session, stopper = Session(runtime, system=system), Stopper()
    interactive = sys.stdin.isatty()
    if interactive:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        terminal.note(f"{HELP}; {FENCE} or a final \\ for several lines; Ctrl-C stops an answer")
    for turn in _turns(terminal, interactive):
        command = turn.strip()
        if command in LEAVE:
            break
        elif command == "/reset":
            session = Session(runtime, system=system)
            terminal.note("the conversation is empty again")
        elif command == "/stats":
            commands.show_stats(terminal, runtime)
        elif command == "/help":
            terminal.note(HELP)
        elif command.startswith("/") and len(command.split()) == 1:
            terminal.note(f"there is no {command}: {HELP}")
        elif command:
            try:
                how = {"stop": stop, "seed": seed, "drift": drift}
                pieces = session.send(turn, max_new_tokens, sampling, **how)
                with stopper.watching() if interactive else contextlib.nullcontext():
                    _answer(session, turn, pieces, stopper, silent=as_json)
            except InputError as error:
                if not interactive:
                    raise
                terminal.note(str(error))
    if as_json:
        document = {"messages": session.messages, "stats": commands.stats_document(runtime)}
        commands.print_json(document)


def _answer(
    session: Session, turn: str, pieces: Iterator[Any], stopper: Stopper, *, silent: bool
) -> None:
    text = ""
    for piece in pieces:
        text += piece.text
        if not silent:
            print(piece.text, end="", flush=True)
        if stopper.asked and piece.finish_reason is None:
            pieces.close()
            said = [{"role": "user", "content": turn}, {"role": "assistant", "content": text}]
            session.messages = [*session.messages, *said]
            break
    if not silent:
        print(flush=True)


def _turns(terminal: Terminal, interactive: bool) -> Iterator[str]:
    if not interactive:
        try:
            for line in sys.stdin:
                yield line.removesuffix("\n")
        except UnicodeDecodeError as error:
            raise InputError(unreadable("standard input", error)) from error
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - gives input() its line editing and history
    while True:
        try:
            yield _read_turn()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()
            terminal.note(f"Ctrl-D, {' or '.join(LEAVE)} leaves")
        except UnicodeDecodeError:
            terminal.note("that was not UTF-8 text: it is not sent")


def _read_turn() -> str:
    line = input("> ")
    if line.strip() == FENCE:
        lines = []
        while (line := input("… ")).strip() != FENCE:
            lines.append(line)
        return "\n".join(lines)
    lines = [line]
    while lines[-1].endswith("\\") or _more_is_waiting():
        lines[-1] = lines[-1].removesuffix("\\")
        lines.append(input("… "))
    return "\n".join(lines)


def _more_is_waiting() -> bool:
    return bool(select.select([sys.stdin], [], [], PASTE_WAIT)[0])
