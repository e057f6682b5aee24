"""Tasks whose answer is the likeliest of several: MMLU and the objective part of GAOKAO-Bench."""

import itertools
import pathlib
import re
from collections.abc import Sequence

from moejax.errors import InputError
from moejax.evaluation.tasks import Item, Task, checked_shots, in_turn, readers

LETTERS = "ABCD"
AT_CHANCE = "small models answer at chance: read the flips and log-likelihoods"
SEVERAL = "2010-2022_Physics_MCQs"  # the one subject with questions that have several answers
SEVEN = "2012-2022_English_Cloze_Test"  # five gaps, seven sentences


def mmlu(folder: pathlib.Path, limit: int | None, shots: int | None) -> Task:
    """MMLU, test split; worked examples are the first of the subject's `dev` split.

    Source: lm-eval's tasks/mmlu/default.
    """
    shots = checked_shots(shots, 0, 5, "mmlu")
    rows: dict[tuple[str, str], list[list[str]]] = {}
    path = readers.find(folder, "mmlu_dev_val_test.tar")
    for name, content in readers.members(path):
        found = re.fullmatch(r"(?:.*/)?(dev|val|test)/(\w+)_\1\.csv", name)
        if found is None:
            raise InputError(f"{path} has the member {name!r:.80}: it is not MMLU")
        rows[found[1], found[2]] = _questions(content, f"{name} of {path}")
    subjects = sorted(subject for split, subject in rows if split == "test")
    groups = [_subject(subject, rows, shots, path) for subject in subjects]
    return Task("mmlu", tuple(in_turn(groups, limit)), AT_CHANCE)


def _questions(content: bytes, where: str) -> list[list[str]]:
    rows = readers.csv_rows(content, where, 6)
    if not all(len(row[5]) == 1 and row[5] in LETTERS for row in rows):
        raise InputError(f"{where} is damaged: an answer is none of {LETTERS}; copy it again")
    return rows


def _subject(
    subject: str, rows: dict[tuple[str, str], list[list[str]]], shots: int, path: pathlib.Path
) -> list[Item]:
    examples = rows.get(("dev", subject), [])[:shots]
    if len(examples) < shots:
        raise InputError(f"{path} has {len(examples)} worked examples of {subject}, not {shots}")
    about = f"(with answers) about {subject.replace('_', ' ')}.\n\n"
    head = f"The following are multiple choice questions {about}"
    head += "".join(f"{_asked(row)} {row[5]}\n\n" for row in examples)
    choices = tuple(f" {letter}" for letter in LETTERS)
    return [
        Item(
            id=f"{subject}/{i}",
            prompt=head + _asked(row),
            choices=choices,
            target=LETTERS.index(row[5]),
        )
        for i, row in enumerate(rows["test", subject])
    ]


def _asked(row: Sequence[str]) -> str:
    options = "".join(f"{letter}. {row[i + 1]}\n" for i, letter in enumerate(LETTERS))
    return f"{row[0].strip()}\n{options}Answer:"


def gaokao(folder: pathlib.Path, limit: int | None, shots: int | None) -> Task:
    """GAOKAO-Bench, all objective questions; each question of a common text is an item.

    The benchmark has models write a solution and looks for the answer in it; here the likeliest
    letter after the question is the answer. In physics, where several letters may be right, every
    set of letters is a choice. lm-eval has no such task.
    """
    checked_shots(shots, 0, 0, "gaokao")
    path = readers.find(folder, "gaokao_bench_Data.tar")
    groups = []
    for name, content in sorted(readers.members(path)):
        if "/Objective_Questions/" in name and name.endswith(".json"):
            where = f"{name} of {path}"
            document = readers.json_document(content, where, example=list[dict])
            subject = pathlib.PurePosixPath(name).stem
            groups.append([i for row in document["example"] for i in _gaps(subject, row, where)])
    return Task("gaokao", tuple(in_turn(groups, limit)), AT_CHANCE)


def _gaps(subject: str, row: dict, where: str) -> list[Item]:
    readers.check_fields(row, where, question=str, answer=list[str], index=int)
    letters = "ABCDEFG" if subject == SEVEN else LETTERS
    choices = [*letters]
    if subject == SEVERAL:
        sets = (itertools.combinations(LETTERS, n) for n in range(1, 5))
        choices = ["".join(chosen) for size in sets for chosen in size]
    items = []
    for i, answer in enumerate(row["answer"]):
        if answer not in choices:
            raise InputError(f"{where} has the answer {answer!r:.20}: copy it again")
        number = f"第{i + 1}小题" if len(row["answer"]) > 1 else ""
        items.append(
            Item(
                id=f"{subject}/{row['index']}/{i}",
                prompt=f"{row['question'].strip()}\n{number}答案：",
                choices=tuple(choices),
                target=choices.index(answer),
            )
        )
    return items
