"""Policies compared item by item: answers that flip, log-likelihoods, intervals over items."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from moejax.evaluation import sandbox
from moejax.evaluation.evaluate import Generated, Score, Scorer, total
from moejax.evaluation.tasks import Item, Task

DRAWS = 10_000
LEVEL = 0.95


@dataclasses.dataclass(frozen=True)
class Result:
    """What a policy made of one item."""

    id: str
    answer: str | None  # the choice, or what was found in the generated text
    grades: dict[str, float]  # by name, 0 or 1, the task's own first; empty = nothing to grade
    choices: tuple[float, ...]  # log-likelihoods
    score: Score | None  # of the right answer, of the text, or of the first policy's own
    fed: Score | None  # what was scored in all: sums over the choices
    generated: Generated | None


def answers(
    scorer: Scorer,
    task: Task,
    *,
    reference: Sequence[Result] | None = None,
    most: int | None = None,
    execute: bool = False,
) -> list[Result]:
    """A policy's results on a task, item by item.

    Args:
        reference: those of the first policy, whose text is scored where there is no right one.
        most: new tokens per item at most, whatever the task says.
        execute: run generated programs, see `moejax.evaluation.sandbox`; else they are not graded.
    """
    made: list[Generated | None] = [None] * len(task.items)
    if any(item.max_new_tokens for item in task.items):
        made = generated(scorer, task.items, most)
    first = made if reference is None else [result.generated for result in reference]
    parts = [_pairs(item, text) for item, text in zip(task.items, first, strict=True)]
    scores = iter(scorer.loglikelihood([pair for pairs in parts for pair in pairs]))
    rolled = iter(_texts(scorer, [item for item in task.items if item.text]))
    results = []
    for item, pairs, text in zip(task.items, parts, made, strict=True):
        own = [next(rolled)] if item.text else [next(scores) for _ in pairs]
        results.append(_result(item, own, text, execute))
    return results


def _pairs(item: Item, first: Generated | None) -> list[tuple[str, str]]:
    if item.choices:
        return [(item.prompt, choice) for choice in item.choices]
    right = item.gold or (first.text if first else "")
    return [(item.prompt, right)] if right else []


def _texts(scorer: Scorer, items: Sequence[Item]) -> list[Score]:
    """Scores of a task's texts: all whole, or all one window of theirs."""
    if all(item.window for item in items):
        return scorer.windows([(item.text, item.window) for item in items])
    return scorer.rolling([item.text for item in items])


def generated(scorer: Scorer, items: Sequence[Item], most: int | None) -> list[Generated | None]:
    """Generated text of the items that want some, those with the same settings together.

    It takes half of the context at most, so that something is left of the prompt.
    """
    groups: dict[tuple, list[int]] = {}
    for i, item in enumerate(items):
        if item.max_new_tokens:
            room = min(most or item.max_new_tokens, item.max_new_tokens, scorer.max_length // 2)
            groups.setdefault((item.until, room), []).append(i)
    made: list[Generated | None] = [None] * len(items)
    for (until, room), chosen in groups.items():
        texts = scorer.generate([items[i].prompt for i in chosen], until, room)
        for i, text in zip(chosen, texts, strict=True):
            made[i] = text
    return made


def _result(item: Item, scores: list[Score], made: Generated | None, execute: bool) -> Result:
    likely = tuple(score.logprob for score in scores) if item.choices else ()
    grades: dict[str, float] = {}
    answer = None
    if item.choices:
        best = int(np.argmax(likely))
        answer, grades = item.choices[best].strip(), {"acc": float(best == item.target)}
    elif made is not None:
        answer = item.answer(made.text) if item.answer else made.text
        if item.grade:
            grades = item.grade(made.text)
        elif item.program and execute:
            grades = {"pass@1": float(sandbox.run(item.program(made.text)).passed)}
    right = (scores[item.target] if item.choices else scores[0]) if scores else None
    # Choices of one token are read off one pass, whose steps count once.
    passes = scores[:1] if all(score.tokens == 1 for score in scores) else scores
    return Result(item.id, answer, grades, likely, right, total(passes) if scores else None, made)


def bootstrap(
    values: np.ndarray, weights: np.ndarray, seed: int = 0, draws: int = DRAWS
) -> tuple[float, float]:
    """Interval of sum(values) / sum(weights), items [N] drawn again with replacement."""
    rng, found = np.random.default_rng(seed), []
    n = len(values)
    for start in range(0, draws, 500):
        drawn = rng.integers(0, n, (min(500, draws - start), n))
        found.append(values[drawn].sum(axis=1) / np.maximum(weights[drawn].sum(axis=1), 1e-12))
    edges = ((1 - LEVEL) / 2, (1 + LEVEL) / 2)
    low, high = np.quantile(np.concatenate(found), edges)
    return float(low), float(high)


def _ratio(values: Sequence[float], weights: Sequence[float], seed: int) -> dict[str, Any]:
    values, weights = np.asarray(values, float), np.asarray(weights, float)
    interval = bootstrap(values, weights, seed)
    return {"value": float(values.sum() / weights.sum()), "interval": list(interval)}


def compared(
    task: Task, results: Sequence[Result], reference: Sequence[Result], *, seed: int = 0
) -> dict[str, Any]:
    """A row of the table: what a policy does on a task, and how that differs from the first.

    Everything that differs is paired by item, its interval a bootstrap over items. Differences of
    log-likelihood are nats per token, positive where this policy is better.
    """
    row: dict[str, Any] = {"task": task.name, "items": len(results)}
    ones = [1.0] * len(results)
    for name in results[0].grades:
        own = [result.grades[name] for result in results]
        first = [result.grades[name] for result in reference]
        # The mean of what is 0 or 1 is a share of items; others have a unit of their own.
        share = {0.0, 1.0}.issuperset([*own, *first])
        row[name] = _ratio(own, ones, seed) | {"share": share}
        row[f"{name}_change"] = _ratio(np.subtract(own, first), ones, seed)
    if results[0].answer is not None:
        flips = [a.answer != b.answer for a, b in zip(results, reference, strict=True)]
        row["flips"] = _ratio(flips, ones, seed)
        row |= _directions(results, reference)
    pairs = zip(results, reference, strict=True)
    scores = [(a.score, b.score) for a, b in pairs if a.score and b.score]
    if scores:
        tokens = [own.tokens for own, _ in scores]
        row["logprob"] = _ratio([own.logprob for own, _ in scores], tokens, seed)
        change = [own.logprob - first.logprob for own, first in scores]
        row["logprob_change"] = _ratio(change, tokens, seed)
        row["divergence"] = _ratio([own.divergence for own, _ in scores], tokens, seed)
        row["tokens_flipped"] = _ratio([own.flipped for own, _ in scores], tokens, seed)
        row["scored_tokens"] = sum(tokens)
    row |= _costs(results)
    if task.items[0].text:
        row |= _perplexities(task, results)
    return row


def _directions(results: Sequence[Result], reference: Sequence[Result]) -> dict[str, int]:
    """Items whose first grade got worse or better."""
    names = list(results[0].grades)[:1]
    pairs = [
        (a.grades[n], b.grades[n]) for n in names for a, b in zip(results, reference, strict=True)
    ]
    if not pairs:
        return {}
    return {"worse": sum(a < b for a, b in pairs), "better": sum(a > b for a, b in pairs)}


def _costs(results: Sequence[Result]) -> dict[str, Any]:
    """What routing lost per step, and hits, over everything that ran in steps."""
    runs = [run for r in results for run in (r.fed, r.generated) if run is not None and run.steps]
    steps, needed = sum(run.steps for run in runs), sum(run.needed for run in runs)
    return {
        "steps": steps,
        "replaced": sum(run.replaced for run in runs) / steps if steps else None,
        "replaced_mass": sum(run.replaced_mass for run in runs) / steps if steps else None,
        "hit_rate": sum(run.hits for run in runs) / needed if needed else None,
    }


def _perplexities(task: Task, results: Sequence[Result]) -> dict[str, float]:
    """As lm-eval has them, of texts whose words and bytes are known, and by the model's tokens."""
    loss = -sum(result.score.logprob for result in results)
    made = {"token_perplexity": math.exp(loss / sum(result.score.tokens for result in results))}
    if words := sum(item.words for item in task.items):
        made["word_perplexity"] = math.exp(loss / words)
    if size := sum(item.bytes for item in task.items):
        made["byte_perplexity"] = math.exp(loss / size)
        made["bits_per_byte"] = loss / size / math.log(2)
    return made
