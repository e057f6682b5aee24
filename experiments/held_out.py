"""Text that the embedded model was not trained on, in the windows of its own evaluation.

Novels are whole books and maths is the test split of GSM8K. Of the docs and the code they are the
files that a hash of the name kept from training. The code is the standard library of the running
interpreter; training and its evaluation read that of Python 3.12.
"""

import pathlib
from collections.abc import Iterator

import numpy as np
from tokenizers import Tokenizer

from experiments import tiny_data

DATA = pathlib.Path(__file__).parents[2] / "shared" / "data"
LENGTH = 512  # tokens predicted in a window
ORDER = 17  # seed of the documents' order, train_tiny.py's default


def documents(domain: str, data: pathlib.Path = DATA) -> list[str]:
    """Held-out documents of one of `tiny_data.DOMAINS`."""
    if domain == "novels":
        return [r["text"] for r in tiny_data.read_jsonl(data / "corpus/gutenberg_val.jsonl.xz")]
    if domain == "maths":
        rows = tiny_data.read_jsonl(data / "eval/gsm8k_test.jsonl.xz")
        return [tiny_data.maths_text(row) for row in rows]
    return [text for name, text in _named(domain, data) if tiny_data.held_out(name)]


def _named(domain: str, data: pathlib.Path) -> Iterator[tuple[str, str]]:
    if domain == "code":
        yield from tiny_data.stdlib_sources()
        return
    for row in tiny_data.read_jsonl(data / "corpus/python311_docs.jsonl.xz"):
        yield row["src"], row["text"]


def windows(model: pathlib.Path, domain: str, limit: int, data: pathlib.Path = DATA) -> np.ndarray:
    """Up to `limit` windows i32 [n, LENGTH + 1], spread evenly over a domain's held-out text.

    Tokens [:, 1:] are those to predict from [:, :-1]; `model` is a directory with tokenizer.json.
    """
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    stream = tiny_data.encode_documents(tokenizer, documents(domain, data), ORDER)
    return tiny_data.val_windows(stream, LENGTH, limit)


def losses(logits: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Losses in nats f64 [T] of tokens [T] under logits [T, V]."""
    logits = logits.astype(np.float64)
    logits -= logits.max(axis=-1, keepdims=True)
    return np.log(np.exp(logits).sum(axis=-1)) - logits[np.arange(len(wanted)), wanted]
