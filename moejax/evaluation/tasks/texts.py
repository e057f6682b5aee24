"""Tasks of plain text: GSM8K, WikiText-2 and the prompts of Spec-Bench."""

import pathlib
import random
import re

from moejax.evaluation.tasks import Item, Task, checked_shots, in_turn, readers

SEED = 1234  # with which lm-eval draws worked examples
GSM8K_UNTIL = ("Question:", "</s>", "<|im_end|>")
STRICT = re.compile(r"#### (\-?[0-9\.\,]+)")
FLEXIBLE = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")
IGNORED = (",", r"\$", r"(?s).*#### ", r"\.$")
ARTICLE = re.compile(r"^ = [^=\n]+ = $", re.MULTILINE)
SPEC_BENCH_TOKENS = 1024
WINDOW = 512  # tokens of `wikitext_windows`


def gsm8k(folder: pathlib.Path, limit: int | None, shots: int | None) -> Task:
    """GSM8K, test split; worked examples are drawn from the training split, anew for each item.

    Source: lm-eval's tasks/gsm8k/gsm8k.yaml and its default sampler.
    """
    path = readers.find(folder, "gsm8k_test.jsonl")
    rows = readers.json_lines(path, question=str, answer=str)[:limit]
    train, drawn = [], random.Random(SEED)
    if shots != 0:
        path = readers.find(folder, "gsm8k_train.jsonl")
        train = readers.json_lines(path, question=str, answer=str)
    shots = checked_shots(shots, 5, len(train), "gsm8k")
    items = []
    for i, row in enumerate(rows):
        examples = drawn.sample(train, shots) if shots else []
        head = "".join(f"Question: {e['question']}\nAnswer: {e['answer']}\n\n" for e in examples)
        items.append(
            Item(
                id=str(i),
                prompt=f"{head}Question: {row['question']}\nAnswer:",
                gold=f" {row['answer']}",
                until=GSM8K_UNTIL,
                max_new_tokens=256,
                grade=_Number(row["answer"]),
                answer=flexible,
            )
        )
    return Task("gsm8k", tuple(items))


class _Number:
    """Compares the number of an answer, found in two ways, with the right one."""

    def __init__(self, answer: str):
        self.wanted = _plain(answer)

    def __call__(self, text: str) -> dict[str, float]:
        found = {"strict": strict(text), "flexible": flexible(text)}
        return {name: float(_plain(answer) == self.wanted) for name, answer in found.items()}


def strict(text: str) -> str:
    """The number after "####", as lm-eval's filter `strict-match`."""
    found = STRICT.findall(text)
    return found[0].strip() if found else "[invalid]"


def flexible(text: str) -> str:
    """The last number, as lm-eval's filter `flexible-extract`."""
    found = FLEXIBLE.findall(text)
    return next(part for part in found[-1] if part).strip() if found else "[invalid]"


def _plain(answer: str) -> str:
    for pattern in IGNORED:
        answer = re.sub(pattern, "", answer)
    return answer.lower()


def wikitext(folder: pathlib.Path, limit: int | None, shots: int | None) -> Task:
    """WikiText-2, test split, an item per article, cleaned as lm-eval cleans it.

    Source: lm-eval's tasks/wikitext.
    """
    checked_shots(shots, 0, 0, "wikitext")
    whole = _wikitext(folder)
    starts = [found.start() for found in ARTICLE.finditer(whole)]
    ends = [*starts[1:], len(whole)]
    pages = [whole[a:b] for a, b in zip(starts, ends, strict=True)][:limit]
    items = [
        Item(
            id=str(i),
            text=detokenized(page),
            words=len(re.split(r"\s+", page)),
            bytes=len(page.encode()),
        )
        for i, page in enumerate(pages)
    ]
    return Task("wikitext", tuple(items), _unknown_words(whole))


def _wikitext(folder: pathlib.Path) -> str:
    return readers.text(readers.find(folder, "wikitext2_test.txt"))


def _unknown_words(whole: str) -> str:
    note = "this copy says <unk> for rare words: not comparable with lm-eval's, which is raw"
    return note if "<unk>" in whole else ""


def wikitext_windows(folder: pathlib.Path, limit: int | None, shots: int | None) -> Task:
    """WikiText-2, test split, as it is, cut into windows of 512 tokens of the model.

    The first token of each is given. Perplexity per token so is the custom of papers on weights
    in fewer bits; it depends on the tokenizer, and so do the windows and how many there are:
    `compare.windowed` cuts them, all that are full unless there is a limit.
    """
    checked_shots(shots, 0, 0, "wikitext_windows")
    whole = _wikitext(folder)
    items = (Item(id="whole", text=whole),)
    return Task("wikitext_windows", items, _unknown_words(whole), WINDOW, limit)


REPLACED = (("s '", "s'"), (" @-@ ", "-"), (" @,@ ", ","), (" @.@ ", "."))
PUNCTUATION = (": ", "; ", ". ", "! ", "? ", ", ")
BRACKETS = (
    (r"\(\s*([^\)]*?)\s*\)", r"(\1)"),
    (r"\[\s*([^\]]*?)\s*\]", r"[\1]"),
    (r"{\s*([^}]*?)\s*}", r"{\1}"),
    (r"\"\s*([^\"]*?)\s*\"", r'"\1"'),
    (r"'\s*([^']*?)\s*'", r"'\1'"),
)
REST = (
    *(("= = = =", "===="), ("= = =", "==="), ("= =", "==")),
    *((" \N{DEGREE SIGN} ", "\N{DEGREE SIGN}"), (" \n", "\n"), ("\n ", "\n")),
    *((" N ", " 1 "), (" 's", "'s")),
)


def detokenized(page: str) -> str:
    """WikiText with the spaces around punctuation gone, step by step as lm-eval does it."""
    page = page.replace(*REPLACED[0])
    page = re.sub(r"/' [0-9]/", r"/'[0-9]/", page)  # as it is there, and never found
    for old, new in (*REPLACED[1:], *((f" {mark}", mark) for mark in PUNCTUATION)):
        page = page.replace(old, new)
    for pattern, kept in BRACKETS:
        page = re.sub(pattern, kept, page)
    for old, new in REST:
        page = page.replace(old, new)
    return page


def spec_bench(folder: pathlib.Path, limit: int | None, shots: int | None) -> Task:
    """Spec-Bench's prompts, the first turn of each, categories in turn; there are no answers.

    `moejax.evaluation.turns` makes conversations of them.
    """
    checked_shots(shots, 0, 0, "spec_bench")
    path = readers.find(folder, "spec_bench_question.jsonl")
    groups: dict[str, list[Item]] = {}
    for row in readers.json_lines(path, question_id=int, category=str, turns=list[str]):
        item = Item(
            id=f"{row['category']}/{row['question_id']}",
            prompt=row["turns"][0],
            turns=tuple(row["turns"]),
            max_new_tokens=SPEC_BENCH_TOKENS,
        )
        groups.setdefault(row["category"], []).append(item)
    note = "no right answers: the log-likelihood is that of the first policy's own text"
    return Task("spec_bench", tuple(in_turn([*groups.values()], limit)), note)
