"""Tasks whose answers are programs: HumanEval and MBPP. Nothing here runs one."""

import pathlib

from moejax.errors import InputError
from moejax.evaluation.tasks import Item, Task, checked_shots, readers

HUMANEVAL_UNTIL = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
MBPP_TEST = range(11, 511)  # task ids of the test split
MBPP_EXAMPLES = (2, 3, 4)
MBPP_HEAD = "You are an expert Python programmer, and here is your task:"


def humaneval(folder: pathlib.Path, limit: int | None, shots: int | None) -> Task:
    """HumanEval, all of it.

    Source: lm-eval's tasks/humaneval/humaneval.yaml.
    """
    checked_shots(shots, 0, 0, "humaneval")
    path = readers.find(folder, "HumanEval.jsonl")
    names = ("task_id", "prompt", "test", "entry_point", "canonical_solution")
    items = [
        Item(
            id=row["task_id"],
            prompt=row["prompt"],
            gold=row["canonical_solution"],
            until=HUMANEVAL_UNTIL,
            max_new_tokens=1024,
            program=_Program(row["prompt"], f"{row['test']}\ncheck({row['entry_point']})"),
            answer=str.strip,
        )
        for row in readers.json_lines(path, **dict.fromkeys(names, str))[:limit]
    ]
    return Task("humaneval", tuple(items))


def mbpp(folder: pathlib.Path, limit: int | None, shots: int | None) -> Task:
    """MBPP, test split; the three worked examples are those of the paper.

    Source: lm-eval's tasks/mbpp/mbpp.yaml.
    """
    shots = checked_shots(shots, 3, 3, "mbpp")
    path = readers.find(folder, "mbpp.jsonl")
    fields = {"task_id": int, "text": str, "code": str, "test_list": list[str]}
    rows = {row["task_id"]: row for row in readers.json_lines(path, **fields)}
    missing = [n for n in (*MBPP_EXAMPLES[:shots],) if n not in rows]
    if missing or any(len(row["test_list"]) < 3 for row in rows.values()):
        raise InputError(f"{path} lacks worked examples or tests: copy it again")
    head = "".join(f"{_task(rows[n])}{rows[n]['code']}\n[DONE]\n\n" for n in MBPP_EXAMPLES[:shots])
    items = [
        Item(
            id=str(n),
            prompt=head + _task(rows[n]),
            gold=f"{rows[n]['code']}\n[DONE]",
            until=("[DONE]",),
            max_new_tokens=256,
            program=_Program("", "\n".join(rows[n]["test_list"][:3])),
            answer=str.strip,
        )
        for n in [n for n in MBPP_TEST if n in rows][:limit]
    ]
    return Task("mbpp", tuple(items))


def _task(row: dict) -> str:
    tests = "\n".join(row["test_list"][:3])
    return f"{MBPP_HEAD} {row['text']} Your code should pass these tests:\n\n{tests}\n[BEGIN]\n"


class _Program:
    """Makes of generated text a program whose end without an error is a pass."""

    def __init__(self, before: str, test: str):
        self.before, self.test = before, test

    def __call__(self, text: str) -> str:
        return f"{self.before}{text}\n{self.test}"
