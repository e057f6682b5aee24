"""Tasks whose data lies in a folder; prompts as in lm-eval's tasks of the same names."""

import dataclasses
import importlib
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from moejax.errors import InputError

# Where each task is defined, and what is said of it.
TASKS = {
    "mmlu": ("choices", "57 subjects, four answers each"),
    "gaokao": ("choices", "GAOKAO-Bench, objective questions, mostly in Chinese"),
    "gsm8k": ("texts", "word problems"),
    "humaneval": ("code", "Python functions by their docstrings"),
    "mbpp": ("code", "Python functions by their tests"),
    "wikitext": ("texts", "perplexity of WikiText-2, whole articles"),
    "wikitext_windows": ("texts", "perplexity of WikiText-2, all windows of 512 tokens"),
    "spec_bench": ("texts", "Spec-Bench, no right answers"),
}

# Scores that are a share of items, each having from none to all of it: of the tasks here, and
# lm-eval's metrics of the same names. Others have a unit of their own.
SHARES = frozenset(
    "acc acc_bytes acc_mutual_info acc_norm exact_match em flexible pass@1 strict".split()
)


@dataclasses.dataclass(frozen=True)
class Item:
    """One item of a task, of one of three kinds, told apart by what is not empty.

    A choice: the likeliest of `choices` after the prompt is the answer. A text to be generated:
    `gold` is the right one, scored too. A text whose log-likelihood is all there is: `text`.
    """

    id: str
    prompt: str = ""
    choices: tuple[str, ...] = ()
    target: int = 0  # the right one of `choices`
    gold: str = ""  # "" = there is none
    until: tuple[str, ...] = ()
    max_new_tokens: int = 0  # above 0: to be generated
    text: str = ""
    words: int = 0  # of `text`, as lm-eval counts; 0 = not known
    bytes: int = 0
    window: tuple[int, int] | None = None  # tokens of `text` to score alone, the first given
    turns: tuple[str, ...] = ()  # of the user, where a prompt begins a conversation
    # Scores of generated text by name, the first being the task's own; see `Task.graded`.
    grade: Callable[[str], dict[str, float]] | None = None
    # What to answer to (generated text) -> (program) whose end without an error is a pass.
    program: Callable[[str], str] | None = None
    # The answer within the generated text; two runs that give the same have not flipped.
    answer: Callable[[str], str] | None = None


@dataclasses.dataclass(frozen=True)
class Task:
    """A task's items, in lm-eval's order, of several subjects in turn."""

    name: str
    items: tuple[Item, ...]
    note: str = ""  # what a reader of the scores has to know
    # Above 0: the one item's text is to be cut into windows of so many tokens of the model, so many
    # of them at most; see `compare.windowed`.
    window: int = 0
    limit: int | None = None


def load(
    name: str, folder: pathlib.Path, *, limit: int | None = None, shots: int | None = None
) -> Task:
    """A task of a local copy of its data.

    Args:
        folder: the copies as published, compressed with xz or gzip or not; docs/evaluation.md
            names them.
        limit: items at most.
        shots: worked examples before each question; None = as many as lm-eval's task has.

    Raises:
        InputError: no such task, no or damaged data, or a number out of range.
    """
    if name not in TASKS:
        raise InputError(f"unknown task {name!r:.40}; known: {', '.join(TASKS)}")
    if limit is not None and limit < 1:
        raise InputError(f"a task has at least one item, not {limit}")
    if not folder.is_dir():
        raise InputError(f"there is no folder {folder} with data: give --data")
    module: Any = importlib.import_module(f"moejax.evaluation.tasks.{TASKS[name][0]}")
    task = getattr(module, name)(folder, limit, shots)
    if not task.items:
        raise InputError(f"the data of {name} in {folder} has no items")
    return task


def is_share(name: str) -> bool:
    """Whether a score is a share of items; its name may end with ",FILTER", as in lm-eval."""
    return name.partition(",")[0] in SHARES


def in_turn(groups: Sequence[Sequence[Any]], limit: int | None) -> list[Any]:
    """The first of each group, then the second of each, and so on, `limit` at most."""
    longest = max(map(len, groups), default=0)
    mixed = [group[i] for i in range(longest) for group in groups if i < len(group)]
    return mixed[:limit]


def checked_shots(shots: int | None, usual: int, most: int, name: str) -> int:
    """How many worked examples to show; InputError if there are not so many."""
    shots = usual if shots is None else shots
    if not 0 <= shots <= most:
        raise InputError(f"{name} has 0 to {most} worked examples, not {shots}")
    return shots
