"""lm-eval's own tasks, from its hub or its files, compared like those with local data."""

from collections.abc import Sequence
from typing import Any

from moejax.errors import InputError
from moejax.eval_compare import Result
from moejax.eval_tasks import TASKS, Item, Task
from moejax.evaluate import Score, Scorer, total

NEEDED = "which takes lm-eval: pip install 'moejax[eval]'"


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

    from moejax.eval_lm import MoejaxLM

    lm = MoejaxLM(scorer)
    options = {"limit": limit, "num_fewshot": shots, "log_samples": True, "bootstrap_iters": 0}
    try:
        found = lm_eval.simple_evaluate(model=lm, tasks=list(tasks), **options)
    except (OSError, ValueError) as error:  # of the data sets' library, offline among others
        raise InputError(f"lm-eval cannot run {tasks}: {str(error)[:300]}") from error
    made = {}
    for name, samples in found["samples"].items():
        samples = sorted(samples, key=lambda sample: sample["doc_id"])
        results = [_result(sample, lm.scores) for sample in samples]
        items = tuple(Item(id=result.id) for result in results)
        made[name] = (Task(name, items), results)
    return made


def _result(sample: dict[str, Any], scores: dict[tuple[str, ...], Score]) -> Result:
    texts = [
        tuple(part for part in given if isinstance(part, str)) for given in sample["arguments"]
    ]
    own = [scores[text] for text in texts if text in scores]
    numbers = {name: sample[name] for name in sample["metrics"]}
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
