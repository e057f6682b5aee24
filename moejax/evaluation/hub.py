"""lm-eval's own tasks, from its hub or its files, compared like those with local data."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from moejax.errors import InputError
from moejax.evaluation.compare import Result
from moejax.evaluation.evaluate import Score, Scorer, total
from moejax.evaluation.tasks import TASKS, Item, Task

# By which metrics of a text lm-eval says how long it is.
UNITS = (("words", "word_perplexity"), ("bytes", "byte_perplexity"), ("bytes", "bits_per_byte"))
NEEDED = "which takes lm-eval: pip install lm-eval"


def check(names: Sequence[str]) -> None:
    """Raise InputError for tasks that lm-eval does not know, or if it is not installed."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError:
        known = ", ".join(TASKS)
        raise InputError(
            f"unknown task {names[0]!r:.40}; known: {known}, or any of lm-eval's, {NEEDED}"
        ) from None
    manager = TaskManager()
    for name in names:
        if name not in manager.all_tasks:
            raise InputError(f"unknown task {name!r:.40}: neither local nor one of lm-eval's")


def answers(
    scorer: Scorer, tasks: Sequence[Any], limit: int | None, shots: int | None
) -> dict[str, tuple[Task, list[Result]]]:
    """A policy's results on lm-eval's tasks, by their names or as configurations.

    Raises:
        InputError: a task's data cannot be had.
    """
    import lm_eval

    from moejax.evaluation.lm import MoejaxLM

    lm = MoejaxLM(scorer)
    options = {"limit": limit, "num_fewshot": shots, "log_samples": True, "bootstrap_iters": 0}
    try:
        found = lm_eval.simple_evaluate(model=lm, tasks=list(tasks), **options)
    except (OSError, ValueError) as error:  # of the data sets' library, offline among others
        raise InputError(f"lm-eval cannot run {tasks}: {str(error)[:300]}") from error
    made = {}
    for name, samples in found["samples"].items():
        results = [_result(own, lm.scores) for own in by_document(samples)]
        items = tuple(map(_item, by_document(samples)))
        made[name] = (Task(name, items), results)
    return made


def by_document(samples: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One sample per document: lm-eval makes one for every filter of a task's answers.

    Where there are several filters, each metric is named with its own.
    """
    filters = dict.fromkeys(sample.get("filter") for sample in samples)
    found: dict[Any, dict[str, Any]] = {}
    for sample in sorted(samples, key=lambda sample: sample["doc_id"]):
        kind = f",{sample['filter']}" if len(filters) > 1 else ""
        metrics = {f"{name}{kind}": sample[name] for name in sample["metrics"]}
        kept = found.setdefault(sample["doc_id"], {**sample, "metrics": []})
        kept |= metrics
        kept["metrics"] = [*kept["metrics"], *metrics]
    return [*found.values()]


def _item(sample: dict[str, Any]) -> Item:
    """What is known of a document beside its results: the size of one that is all text."""
    found = Item(id=str(sample["doc_id"]))
    sizes = {}
    for unit, metric in UNITS:
        given = sample.get(metric)
        if metric in sample["metrics"] and isinstance(given, tuple | list):
            sizes[unit] = int(given[1])  # (log-likelihood, what it is divided by)
    if not sizes:
        return found
    [text] = sample["arguments"][0]
    return dataclasses.replace(found, text=text, **sizes)


def _result(sample: dict[str, Any], scores: dict[tuple[str, ...], Score]) -> Result:
    texts = [
        tuple(part for part in given if isinstance(part, str)) for given in sample["arguments"]
    ]
    own = [scores[text] for text in texts if text in scores]
    numbers = {name: sample[name] for name in sample["metrics"]}
    # Of a document lm-eval's "perplexity" is the log-likelihood that it makes one of in the end.
    numbers = {n.replace("perplexity", "loglikelihood"): v for n, v in numbers.items()}
    grades = {n: float(v) for n, v in numbers.items() if isinstance(v, int | float)}
    target, answer, right = sample["target"], None, own[0] if own else None
    likely: tuple[float, ...] = ()
    if len(own) > 1:
        likely = tuple(score.logprob for score in own)
        answer = str(max(range(len(own)), key=likely.__getitem__))
        right = own[int(target)] if str(target).isdigit() and int(target) < len(own) else None
    elif not own:
        answer = str(sample["filtered_resps"][0])
    return Result(
        id=str(sample["doc_id"]),
        answer=answer,
        grades=grades,
        choices=likely,
        score=right,
        fed=total(own) if own else None,
        generated=None,
    )
