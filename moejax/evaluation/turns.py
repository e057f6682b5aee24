"""Conversations of tasks whose items have turns, by the model's own chat template."""

import dataclasses
from typing import Any

from moejax.evaluation.compare import generated
from moejax.evaluation.evaluate import Scorer
from moejax.evaluation.tasks import Item, Task

NOTE = "later turns follow the replies of the first policy, so that all answer the same prompts"


def conversations(scorer: Scorer, task: Task, most: int | None = None) -> Task:
    """The task with an item for every turn, its prompt by the model's chat template.

    Args:
        scorer: made with `chat=True`; its replies stand before later turns, for every policy.
        most: new tokens per reply at most, whatever the task says.

    Raises:
        TokenizerError: the model has no chat template, or it refuses the conversation.
    """
    said: list[list[dict[str, Any]]] = [[] for _ in task.items]
    made: list[list[Item]] = [[] for _ in task.items]
    for turn in range(max(len(item.turns) for item in task.items)):
        going = [i for i, item in enumerate(task.items) if turn < len(item.turns)]
        if turn:
            replies = generated(scorer, [made[i][-1] for i in going], most)
            for i, reply in zip(going, replies, strict=True):
                said[i].append({"role": "assistant", "content": reply.text})
        for i in going:
            item = task.items[i]
            said[i].append({"role": "user", "content": item.turns[turn]})
            own = {"id": f"{item.id}/{turn + 1}", "prompt": scorer.render(said[i])}
            made[i].append(dataclasses.replace(item, **own))
    items = tuple(item for own in made for item in own)
    note = "; ".join(part for part in (task.note, NOTE) if part)
    return dataclasses.replace(task, items=items, note=note)
