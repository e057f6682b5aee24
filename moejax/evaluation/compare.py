"""Policies compared item by item: answers that flip, log-likelihoods, intervals over items.

A share has Wilson's interval, the change of one Bonett and Price's, everything else a bootstrap
that is stretched for few items: of items that are all alike a bootstrap knows nothing but them, and
would say [0, 0] of no flip in ten.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.special import ndtri, stdtrit

from moejax.errors import InputError
from moejax.evaluation import sandbox
from moejax.evaluation.evaluate import Generated, Score, Scorer, total
from moejax.evaluation.tasks import Item, Task, is_share

DRAWS = 10_000
TAIL = 0.025  # beyond either end of an interval of 95 %
Z = -float(ndtri(TAIL))


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
    task = windowed(scorer, task)
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


def windowed(scorer: Scorer, task: Task) -> Task:
    """The task with an item for each window of its text, if it has a text to be cut into some.

    Raises:
        InputError: the text does not fill one.
    """
    if not task.window:
        return task
    [whole], size = task.items, task.window
    tokens = len(scorer.runtime.tokenizer.encode(whole.text, add_special_tokens=False))
    full, rest = divmod(tokens, size)
    if not full:
        raise InputError(f"{task.name}: the text has {tokens} tokens, too few for one of {size}")
    taken = min(full, task.limit or full)
    items = [
        dataclasses.replace(whole, id=str(i), window=(i * size, (i + 1) * size))
        for i in range(taken)
    ]
    counted = f"{taken} of the {full} full windows of {size} tokens, {rest} tokens left at the end"
    note = "; ".join(part for part in (task.note, counted) if part)
    return Task(task.name, tuple(items), note)


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
    values: np.ndarray,
    weights: np.ndarray,
    seed: int = 0,
    draws: int = DRAWS,
    tails: tuple[float, float] = (TAIL, TAIL),
) -> tuple[float, float] | None:
    """Interval of sum(values) / sum(weights), items [N] drawn again; None of a single item.

    Draws of n items vary by (n - 1) / n too little, and their quantiles are those of a known
    spread: the ends are stretched away from the ratio by sqrt(n / (n - 1)) times Student's quantile
    of n - 1 degrees over the normal one. Of normal and of heavier symmetric items it then holds the
    truth in about 94 to 95 % from 3 items on, where the quantiles alone do in 72 % (3 items), 83 %
    (5) and 90 % (10). What remains: of few skewed items it holds it less often (exponential ones:
    87 % of 3, 89 % of 5, 90 % of 10), and of items that are all alike it has no width.

    Args:
        tails: the share of draws below the interval, and above it.

    Source: Hesterberg, What teachers should know about the bootstrap, The American Statistician 69
    (2015), whose expanded percentiles cannot leave the items' range and fail for very few.
    """
    rng, found = np.random.default_rng(seed), []
    n = len(values)
    if n < 2:
        return None
    for start in range(0, draws, 500):
        drawn = rng.integers(0, n, (min(500, draws - start), n))
        found.append(values[drawn].sum(axis=1) / np.maximum(weights[drawn].sum(axis=1), 1e-12))
    edges, middle = np.array(tails), values.sum() / max(weights.sum(), 1e-12)
    stretch = math.sqrt(n / (n - 1)) * stdtrit(n - 1, edges) / ndtri(edges)
    ends = np.quantile(np.concatenate(found), (tails[0], 1 - tails[1]))
    low, high = middle + stretch * (ends - middle)
    return float(low), float(high)


def wilson(
    share: float, n: float, tails: tuple[float, float] = (TAIL, TAIL)
) -> tuple[float, float]:
    """Wilson's score interval of a share of `n` independent observations.

    Args:
        tails: how likely the truth is to lie below the interval, and above it.

    Source: Wilson, Probable inference, JASA 22 (1927).
    """

    def end(z: float) -> float:
        middle = (share + z**2 / (2 * n)) / (1 + z**2 / n)
        return middle + z / (1 + z**2 / n) * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))

    low, high = end(float(ndtri(tails[0]))), end(-float(ndtri(tails[1])))
    return max(min(low, share), 0.0), min(max(high, share), 1.0)


def change_of_share(gained: float, lost: float, n: int) -> tuple[float, float]:
    """Interval of (gained - lost) / n, of n pairs.

    Source: Bonett and Price, Adjusted Wald confidence interval for a difference of binomial
    proportions based on paired data, Journal of Educational and Behavioral Statistics 37 (2012).
    """
    more, less = (gained + 1) / (n + 2), (lost + 1) / (n + 2)
    reach = Z * math.sqrt((more + less - (more - less) ** 2) / (n + 2))
    return max(more - less - reach, -1.0), min(more - less + reach, 1.0)


def worst_tails(tasks: int) -> tuple[float, float]:
    """The tails of intervals of several tasks, of which the greatest ends hold the worst task's.

    The greatest of their upper ends fails only if that of the truly worst task does; the greatest
    of their lower ends if any does, each of which is so much rarer. Of tasks that share no item.

    The greatest of each bootstrap draw would not do: draws add their noise to what was already
    chosen for being the greatest. Of seven equal tasks of 3 to 57 items its quantiles hold the
    worst in 9 % of simulations, these ends in 97 %.
    """
    return 1 - (1 - TAIL) ** (1 / tasks), TAIL


def _figure(value: float, interval: tuple[float, float] | None, n: int) -> dict[str, Any]:
    ends = None if interval is None else [float(end) for end in interval]
    return {"value": float(value), "interval": ends, "n": n}


def _ratio(
    values: Sequence[float],
    weights: Sequence[float],
    seed: int,
    least: float = -math.inf,
    most: float = math.inf,
) -> dict[str, Any]:
    """A ratio with its interval, cut off at the least and most that it can be."""
    values, weights = np.asarray(values, float), np.asarray(weights, float)
    interval = bootstrap(values, weights, seed)
    if interval is not None:
        interval = max(interval[0], least), min(interval[1], most)
    return _figure(values.sum() / weights.sum(), interval, len(values))


def _share(name: str, values: Sequence[float], weights: Sequence[float]) -> dict[str, Any]:
    """A share of items, or of what they hold (weights), which is not independent within an item.

    Its observations are then worth as many as have the spread that is seen between items: all of
    them at most, and at least what is left if each item were of one kind, which is also what is
    taken where nothing or everything is of the kind that is counted, and of a single item.
    """
    values, weights = np.asarray(values, float), np.asarray(weights, float)
    n, whole = len(values), weights.sum()
    within = np.clip(values, 0, weights)
    if not np.allclose(values, within, rtol=0, atol=1e-9):  # a sum of shares may round beyond 1
        raise InputError(f"{name} is a share of items, but some are below 0 or above 1")
    values = within
    share = values.sum() / whole
    least = whole**2 / (weights**2).sum()
    spread = ((values - share * weights) ** 2).sum() * n / max(n - 1, 1) / whole**2
    varies = share * (1 - share) if n > 1 else 0.0
    worth = np.clip(varies / spread if spread else whole, least, whole) if varies else least
    return _figure(share, wilson(share, worth), n)


def _change(own: Sequence[float], first: Sequence[float]) -> dict[str, Any]:
    """The difference of two shares of the same items."""
    change = np.subtract(own, first)
    gained, lost = change.clip(min=0).sum(), -change.clip(max=0).sum()
    return _figure(change.mean(), change_of_share(gained, lost, len(change)), len(change))


def compared(
    task: Task, results: Sequence[Result], reference: Sequence[Result], *, seed: int = 0
) -> dict[str, Any]:
    """A row of the table: what a policy does on a task, and how that differs from the first.

    Everything that differs is paired by item; every figure has its interval and its n, the items
    that it is about; where a single item tells of no spread, the interval is None. Differences of
    log-likelihood are nats per token, positive where this policy is better.

    Raises:
        InputError: what is a share of items is below 0 or above 1 of one.
    """
    row: dict[str, Any] = {"task": task.name, "items": len(results)}
    ones = [1.0] * len(results)
    for name in results[0].grades:
        own = [result.grades[name] for result in results]
        first = [result.grades[name] for result in reference]
        share = is_share(name)
        found = _share(name, own, ones) if share else _ratio(own, ones, seed)
        change = _change(own, first) if share else _ratio(np.subtract(own, first), ones, seed)
        row |= {name: found | {"share": share}, f"{name}_change": change}
    if results[0].answer is not None:
        flips = [a.answer != b.answer for a, b in zip(results, reference, strict=True)]
        row["flips"] = _share("flips", flips, ones)
        row |= _directions(results, reference)
    pairs = zip(results, reference, strict=True)
    scores = [(a.score, b.score) for a, b in pairs if a.score and b.score]
    if scores:
        tokens = [own.tokens for own, _ in scores]
        row["logprob"] = _ratio([own.logprob for own, _ in scores], tokens, seed, most=0.0)
        change = [own.logprob - first.logprob for own, first in scores]
        row["logprob_change"] = _ratio(change, tokens, seed)
        row["divergence"] = _ratio([s.divergence for s, _ in scores], tokens, seed, least=0.0)
        row["tokens_flipped"] = _share("tokens_flipped", [s.flipped for s, _ in scores], tokens)
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
