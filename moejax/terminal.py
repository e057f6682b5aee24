"""What people see: status lines, progress bars and tables, on stderr only."""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table

PATIENCE = 1.0  # seconds before a progress bar appears

# progress(done, total) as the checkpoint readers call it
Report = Callable[[int, int], None]


class Terminal:
    """stderr for people; silent when `quiet`."""

    def __init__(self, quiet: bool = False):
        self.quiet = quiet
        self.console = Console(stderr=True, quiet=quiet, highlight=False)

    @contextlib.contextmanager
    def progress(self, label: str) -> Iterator[Report]:
        """A bar for what takes longer than a second; on no terminal, one line when it is done."""
        bar = Progress(
            TextColumn(label),
            BarColumn(),
            TaskProgressColumn(),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
        )
        begun = time.perf_counter()
        task = None

        def report(done: int, total: int) -> None:
            nonlocal task
            if task is None and time.perf_counter() - begun > PATIENCE:
                task = bar.add_task(label, total=total)
                bar.start()
            if task is not None:
                bar.update(task, completed=done, total=total)

        try:
            yield report
        finally:
            if task is not None:
                bar.stop()
        elapsed = time.perf_counter() - begun
        if elapsed > PATIENCE:
            self.note(f"{label}: {elapsed:.1f} s")

    @contextlib.contextmanager
    def status(self, label: str) -> Iterator[None]:
        """A spinner while the body runs, then a line with its time if that was over a second."""
        begun = time.perf_counter()
        with self.console.status(label):
            yield
        elapsed = time.perf_counter() - begun
        if elapsed > PATIENCE:
            self.note(f"{label}: {elapsed:.1f} s")

    def note(self, text: str) -> None:
        """One dim line."""
        self.console.print(text, style="dim", markup=False, soft_wrap=True)

    def facts(self, rows: Sequence[tuple[str, str]]) -> None:
        """Names and values in two columns."""
        self.console.print(facts_table(rows))


def facts_table(rows: Sequence[tuple[str, str]]) -> Table:
    """A table of names and values without lines."""
    table = Table(box=None, show_header=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, value)
    return table


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> Table:
    """A table with a header; every column but the first is right-aligned."""
    made = Table(box=None, header_style="dim")
    for i, name in enumerate(columns):
        made.add_column(name, justify="left" if i == 0 else "right", no_wrap=True)
    for row in rows:
        made.add_row(*map(str, row))
    return made
