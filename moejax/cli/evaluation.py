"""The command `eval`: policies compared on tasks, item by item."""

import datetime
import pathlib
from typing import Annotated, Any

import typer

from moejax.cli import options as opt

Tasks = Annotated[
    str,
    typer.Option(
        help="With commas: mmlu, gsm8k, humaneval, mbpp, gaokao, wikitext, wikitext_windows, "
        "spec_bench, which read --data, or any task of lm-eval, if that is installed."
    ),
]
Policies = Annotated[
    list[str],
    typer.Option("--policy", help="Several times; the first is what the others are compared with."),
]
Data = Annotated[
    pathlib.Path | None, typer.Option(help="Folder with local copies of the data sets.")
]
Limit = Annotated[int | None, typer.Option(min=1, help="Items of each task, of subjects in turn.")]
Shots = Annotated[
    int | None, typer.Option(min=0, help="Worked examples; default as many as in lm-eval's task.")
]
Most = Annotated[
    int | None, typer.Option("--max-new-tokens", "-n", min=1, help="Less than a task would have.")
]
Execute = Annotated[
    bool,
    typer.Option(
        "--allow-code-execution", help="Run what the model writes for humaneval and mbpp, confined."
    ),
]
Shared = Annotated[
    bool,
    typer.Option(
        "--shared-cache", help="Lossy sequences in batches on one cache, to study what that does."
    ),
]
Steps = Annotated[
    bool, typer.Option("--steps", help="Feed exact policies token by token too, for their hits.")
]
Chat = Annotated[
    bool,
    typer.Option(
        "--chat", help="Conversations by the model's chat template, every turn; for spec_bench."
    ),
]
Date = Annotated[
    datetime.datetime | None,
    typer.Option(
        formats=["%Y-%m-%d"],
        help="Of conversations, for templates that state one; default 2024-07-26, on any day.",
    ),
]
CacheFile = Annotated[
    pathlib.Path | None, typer.Option("--cache", help="File of earlier results; has a default.")
]


def eval(
    tasks: Tasks,
    policy: Policies = ["lru"],  # noqa: B006 - typer copies it
    data: Data = None,
    model: opt.Model = "tiny",
    slots: opt.Slots = None,
    limit: Limit = None,
    shots: Shots = None,
    max_new_tokens: Most = None,
    allow_code_execution: Execute = False,
    batch: Annotated[int, typer.Option(min=1, help="Sequences at once.")] = 8,
    shared_cache: Shared = False,
    steps: Steps = False,
    chat: Chat = False,
    date: Date = None,
    cache: CacheFile = None,
    no_cache: Annotated[bool, typer.Option("--no-cache", help="Keep and use no results.")] = False,
    context: opt.Context = None,
    dtype: opt.Dtype = "bfloat16",
    quant: opt.Quant = None,
    group: opt.Group = 32,
    kernels: opt.Kernels = None,
    draft: opt.DraftModel = None,
    json: opt.AsJson = False,
    quiet: opt.Quiet = False,
) -> None:
    """Compare policies on tasks: answers that flip, log-likelihoods, what routing lost.

    Every sequence decodes on a cache of its own, whose residency is counted but not moved.
    """
    load = opt.for_load({k: v for k, v in locals().items() if k != "policy"})
    from moejax.terminal import Terminal

    how = {"most": max_new_tokens, "execute": allow_code_execution}
    score = {"batch": batch, "shared_cache": shared_cache, "steps": steps, "chat": chat}
    score |= {} if date is None else {"date": date.date()}
    wanted = {"names": tasks, "data": data, "limit": limit, "shots": shots}
    kept = {"path": cache, "none": no_cache}
    run(Terminal(quiet), model, policy, load, wanted, how, score, kept, json)


def run(
    terminal: Any,
    model: str,
    policies: list[str],
    load: dict[str, Any],
    wanted: dict[str, Any],
    how: dict[str, Any],
    score: dict[str, Any],
    kept: dict[str, Any],
    as_json: bool,
) -> None:
    """Load the data and the model, evaluate every policy and print the comparison.

    Args:
        load: options of `moejax.load`.
        wanted: `names` of tasks with commas between, `data`, `limit`, `shots`.
        how: `most` new tokens, whether to `execute` programs.
        score: options of `Scorer`.
        kept: `path` of the cache, or `none`.

    Raises:
        InputError: a task without data, or one that is unknown; before the model is loaded.
        PolicyError: an unknown policy.
    """
    from moejax.cli import actions as commands
    from moejax.evaluation import cache as eval_cache
    from moejax.evaluation import report as eval_report
    from moejax.evaluation.evaluate import DATE, Scorer, with_policy
    from moejax.evaluation.turns import conversations

    local, others = eval_report.chosen(**wanted)
    eval_report.check(policies, local, others, how["execute"], score["chat"])
    first = commands.load_model(terminal, model, policy=policies[0], virtual=True, **load)
    cache = None
    if not kept["none"]:
        cache = eval_cache.Cache(kept["path"] or eval_cache.default_path())
    found: dict[str, Any] = {}
    for name in policies:
        with terminal.progress(f"evaluating {name}") as report:
            scorer = Scorer(with_policy(first, name), cache=cache, report=report, **score)
            if score["chat"] and not found:
                local = [conversations(scorer, task, how["most"]) for task in local]
            made = eval_report.results(scorer, local, others, found.get(policies[0]), wanted, how)
            found[name] = made
    settings = {**{k: v for k, v in wanted.items() if k != "data"}, **how, **score}
    settings |= {"date": score.get("date", DATE).isoformat(), "slots": first.slots}
    report = eval_report.document(first, found, settings)
    if as_json:
        commands.print_json(report)
    else:
        eval_report.show(report)
