"""What `moejax eval` compares, and how that is shown: a document or a table."""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

from moejax.errors import InputError
from moejax.evaluation import compare as eval_compare
from moejax.evaluation import hub as eval_hub
from moejax.evaluation import sandbox
from moejax.evaluation import tasks as eval_tasks
from moejax.evaluation.compare import Result
from moejax.evaluation.evaluate import Scorer
from moejax.evaluation.tasks import Task
from moejax.policies.policy import policy as named_policy
from moejax.runtime import Runtime
from moejax.terminal import table

# Of one policy: by task, the task and its results.
Found = dict[str, tuple[Task, list[Result]]]
COLUMNS = (
    *("task", "policy", "items", "score", "change (95 %)", "flips (95 %)", "tokens"),
    *("log-lik. change/token (95 %)", "KL/token", "weight lost/step", "hits"),
)
LINES = (
    "Changes are paired by item with the first policy. Flips: answers that differ, right or wrong; "
    "log-likelihoods in nats per token, higher is better; KL is from the model's own routing.",
    "Intervals are over the items: of shares Wilson's, of their changes Bonett and Price's, of all "
    "else a bootstrap, stretched for few items.",
    "Policies without a KL are exact: they were scored in one pass.",
)
UNGRADED = "its programs were not run: --allow-code-execution grades them"


def chosen(
    names: str, data: pathlib.Path | None, limit: int | None, shots: int | None
) -> tuple[list[Task], list[str]]:
    """Local tasks of names with commas between, and the names of those that lm-eval is to know.

    Raises:
        InputError: no name, one twice, an unknown task, or one without data.
    """
    parts = [name.strip() for name in names.split(",")]
    if not all(parts) or len(set(parts)) != len(parts):
        raise InputError(f"tasks are different names with commas between, not {names!r:.80}")
    local = [name for name in parts if name in eval_tasks.TASKS]
    others = [name for name in parts if name not in eval_tasks.TASKS]
    if others:
        eval_hub.check(others)
    if local and data is None:
        raise InputError(f"{local[0]} reads a local copy of its data: give its folder as --data")
    options = {"limit": limit, "shots": shots}
    return [eval_tasks.load(name, data, **options) for name in local], others


def check(
    policies: Sequence[str],
    local: Sequence[Task],
    others: Sequence[str],
    execute: bool,
    chat: bool = False,
) -> None:
    """Raise before anything is loaded if a policy, a sandbox or a conversation cannot be had."""
    plain = [task.name for task in local if not all(item.turns for item in task.items)]
    if chat and (plain or others):
        raise InputError(f"--chat is for spec_bench: {[*plain, *others][0]} has no conversations")
    if len(set(policies)) != len(policies):
        raise InputError(f"a policy is named twice: {', '.join(policies)}")
    for name in policies:
        named_policy(name)
    if execute and any(item.program for task in local for item in task.items):
        sandbox.check()


def results(
    scorer: Scorer,
    local: Sequence[Task],
    others: Sequence[str],
    reference: Found | None,
    wanted: dict[str, Any],
    how: dict[str, Any],
) -> Found:
    """One policy's results on all tasks."""
    found: Found = {}
    for task in local:
        first = reference and reference[task.name][1]
        task = eval_compare.windowed(scorer, task)
        found[task.name] = (task, eval_compare.answers(scorer, task, reference=first, **how))
    if others:
        found |= eval_hub.answers(scorer, others, wanted["limit"], wanted["shots"])
    return found


def document(first: Runtime, found: dict[str, Found], settings: dict[str, Any]) -> dict[str, Any]:
    """Everything, per item too, as a JSON document."""
    from moejax.doctor import environment

    reference = next(iter(found))
    tasks: dict[str, Any] = {}
    for name, (task, own) in found[reference].items():
        notes = [task.note] if task.note else []
        if any(item.program for item in task.items) and not own[0].grades:
            notes.append(UNGRADED)
        tasks[name] = {"notes": notes, "policies": {}}
        for policy, made in found.items():
            row = eval_compare.compared(task, made[name][1], own)
            items = [dataclasses.asdict(result) for result in made[name][1]]
            tasks[name]["policies"][policy] = {"summary": row, "items": items}
    return {
        "model": str(first.directory),
        "settings": settings,
        "reference": reference,
        "tasks": tasks,
        "environment": environment(),
    }


def show(report: dict[str, Any]) -> None:
    """The table of a document."""
    from rich.console import Console

    rows, notes = [], []
    for name, task in report["tasks"].items():
        for policy, found in task["policies"].items():
            first = policy == report["reference"]
            rows.append((name if first else "", policy, *_cells(found["summary"], first)))
        notes += [f"{name}: {note}" for note in task["notes"]]
    console, made = Console(highlight=False), table(COLUMNS, rows)
    # As wide as it is: cut off, the numbers would be lost where there is no terminal.
    wide = console.measure(made, options=console.options.update(max_width=1000)).maximum
    Console(highlight=False, width=max(console.width, wide)).print(made)
    console.print()
    for line in (*LINES, *notes):
        console.print(line, style="dim", markup=False, soft_wrap=True)


def _cells(row: dict[str, Any], first: bool) -> tuple[str, ...]:
    grade = next(
        (key[:-7] for key in row if key.endswith("_change") and key != "logprob_change"), ""
    )
    form = ".1%" if grade and row[grade]["share"] else ".4g"
    score = f"{grade} {row[grade]['value']:{form}}" if grade else ""
    for kind in ("token", "word"):
        if f"{kind}_perplexity" in row:
            score = f"ppl/{kind} {row[f'{kind}_perplexity']:.4g}"
    return (
        str(row["items"]),
        score,
        "" if first or not grade else _interval(row[f"{grade}_change"], f"+{form}"),
        "" if first or "flips" not in row else _interval(row["flips"], ".1%"),
        _tokens(row),
        "" if first or "logprob_change" not in row else _interval(row["logprob_change"], "+.4f"),
        "" if not row["steps"] or "divergence" not in row else f"{row['divergence']['value']:.4f}",
        "" if row["replaced_mass"] is None else f"{row['replaced_mass']:.3g}",
        "" if row["hit_rate"] is None else f"{row['hit_rate']:.1%}",
    )


def _tokens(row: dict[str, Any]) -> str:
    """Of the log-likelihood, and of how many items where not all have one."""
    if "scored_tokens" not in row:
        return ""
    items = row["logprob"]["n"]
    return f"{row['scored_tokens']:,}" + ("" if items == row["items"] else f" of {items} items")


def _interval(found: dict[str, Any], form: str) -> str:
    if found["interval"] is None:
        return f"{found['value']:{form}} (one item)"
    low, high = found["interval"]
    return f"{found['value']:{form}} ({low:{form}} to {high:{form}})"
