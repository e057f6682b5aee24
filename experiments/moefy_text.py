"""What `moefy` reads: the tokenizer, text to calibrate on, and windows that are held out."""

import dataclasses
import json
import lzma
import pathlib
from collections.abc import Iterator

import numpy as np
from tokenizers import Tokenizer

from experiments import held_out, tiny_data
from experiments.moefy_slices import copy_tokenizer
from experiments.tiny_data import DOMAINS
from moejax.checkpoints import gguf_file

LENGTH = 512  # tokens of a window of WikiText-2, the first of which is not predicted
CHARACTERS = 2_000_000  # of a domain's text that calibration reads


def tokenizer_of(model: pathlib.Path, data: pathlib.Path, directory: pathlib.Path) -> Tokenizer:
    """The model's tokenizer; its files, and the chat template, are put into a directory."""
    beside = model if model.is_dir() else model.parent
    copy_tokenizer(beside, directory)
    path = directory / "tokenizer.json"
    packed = data / "tokenizers/smollm2_tokenizer.json.xz"
    if not path.is_file() and packed.is_file():
        path.write_bytes(lzma.open(packed).read())
    if not path.is_file():
        raise SystemExit(f"the tokenizer is neither in {beside} nor at {packed}")
    if gguf_file.is_gguf(model) and not (directory / "tokenizer_config.json").exists():
        template = gguf_file.read_file(model).metadata.get("tokenizer.chat_template")
        (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    return Tokenizer.from_file(str(path))


def wikitext(tokenizer: Tokenizer, split: str, count: int, data: pathlib.Path) -> np.ndarray:
    """The first windows [W, LENGTH] of a split of WikiText-2."""
    path = data / f"eval/wikitext2_{split}.txt.xz"
    text = lzma.open(path, "rt", encoding="utf-8").read()[: 8 * LENGTH * (count + 1)]
    ids = np.array(tokenizer.encode(text).ids, np.int32)
    return ids[: count * LENGTH].reshape(count, LENGTH)


def calibration_text(domain: str, data: pathlib.Path) -> Iterator[str]:
    """Documents of a domain that are not held out."""
    if domain == "novels":
        held = {r["src"] for r in tiny_data.read_jsonl(data / "corpus/gutenberg_val.jsonl.xz")}
        rows = tiny_data.read_jsonl(data / "corpus/gutenberg_20mb.jsonl.xz")
        yield from (row["text"] for row in rows if row["src"] not in held)
    elif domain == "maths":
        for row in tiny_data.read_jsonl(data / "eval/gsm8k_train.jsonl.xz"):
            yield tiny_data.maths_text(row)
    else:
        named = held_out._named(domain, data)
        yield from (text for name, text in named if not tiny_data.held_out(name))


def calibration(tokenizer: Tokenizer, count: int, data: pathlib.Path, seed: int) -> np.ndarray:
    """Windows [W, LENGTH]: half of WikiText-2's validation split, half of the domains."""
    each = max(count // 2 // len(DOMAINS), 1)
    parts = [wikitext(tokenizer, "valid", max(count - each * len(DOMAINS), 1), data)]
    for domain in DOMAINS:
        kept, size = [], 0
        for text in calibration_text(domain, data):
            if size > CHARACTERS:
                break
            kept.append(text[: CHARACTERS // 8])
            size += len(kept[-1])
        stream = tiny_data.encode_documents(tokenizer, kept, seed)
        parts.append(tiny_data.val_windows(stream, LENGTH, each)[:, :LENGTH])
    return np.concatenate(parts)


@dataclasses.dataclass(frozen=True)
class Texts:
    """Windows by where they come from, WikiText-2 first; the engine runs all of them."""

    windows: dict[str, np.ndarray]

    def some(self, count: int) -> "Texts":
        """The first `count` windows of the first source alone."""
        name, rows = next(iter(self.windows.items()))
        return Texts({name: rows[:count]})

    def stacked(self) -> tuple[list[np.ndarray], np.ndarray]:
        """All windows, and the place of each one's source among them [W]."""
        rows = [row for part in self.windows.values() for row in part]
        sizes = [len(part) for part in self.windows.values()]
        return rows, np.repeat(np.arange(len(sizes)), sizes)


def texts_of(
    tokenizer: Tokenizer, directory: pathlib.Path, counts: dict[str, int], data: pathlib.Path
) -> Texts:
    """So many windows of each source, "wikitext" or a domain, that perplexity is measured on."""
    return Texts(
        {
            name: wikitext(tokenizer, "test", count, data)
            if name == "wikitext"
            else held_out.windows(directory, name, count, data)
            for name, count in counts.items()
        }
    )
