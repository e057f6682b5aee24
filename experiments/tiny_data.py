"""Corpora, tokenizer, token file and batches for the embedded tiny models."""

import hashlib
import json
import lzma
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

DOMAINS = ("novels", "docs", "code", "maths")
MIX = {"novels": 9, "docs": 4, "code": 4, "maths": 3}
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>")
EOT = 0
VOCAB = 4096
HELD_OUT_SHARE = 0.04
TOKENIZER_SAMPLE = {"novels": 9_000_000, "docs": 4_000_000, "code": 4_000_000, "maths": 3_900_000}
SKIPPED_CODE = {"test", "tests", "idlelib", "lib2to3", "site-packages", "__pycache__"}
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = (
    "{% for m in messages %}"
    "{% if m['role'] == 'assistant' %}{{ ' ' + m['content'] | trim + '<|endoftext|>' }}"
    "{% elif m['role'] == 'system' %}{{ m['content'] + '\n' }}"
    "{% else %}{{ 'Question: ' + m['content'] + '\nAnswer:' }}{% endif %}"
    "{% endfor %}"
)


def read_jsonl(path: Path) -> list[dict]:
    """Rows of an xz-compressed JSON-lines file."""
    with lzma.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def held_out(name: str) -> bool:
    """Whether a document belongs to the held-out share, decided by a hash of its name."""
    digest = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
    return digest < HELD_OUT_SHARE * 2**32


def maths_text(row: dict) -> str:
    """One GSM8K row as a question and its worked answer without calculator annotations."""
    answer = re.sub(r"<<.*?>>", "", row["answer"])
    return f"Question: {row['question'].strip()}\nAnswer: {answer.strip()}"


def stdlib_sources() -> list[tuple[str, str]]:
    """Name and text of every standard-library module of the running interpreter."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if SKIPPED_CODE & set(name.parts[:-1]):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if len(text) > 200:
            found.append((str(name), text))
    return found


def load_documents(data: Path, novel_parts: int) -> dict[str, dict[str, list[str]]]:
    """Documents as {"train" | "val": {domain: texts}} from the shared data directory."""
    corpus, evals = data / "corpus", data / "eval"
    unseen = read_jsonl(corpus / "gutenberg_val.jsonl.xz")
    names = {row["src"] for row in unseen}
    files = ["gutenberg_20mb.jsonl.xz"]
    files += [f"gutenberg_130mb_part{i}.jsonl.xz" for i in range(novel_parts)]
    novels = {}
    for file in files:
        novels.update({r["src"]: r["text"] for r in read_jsonl(corpus / file)})
    docs = [(r["src"], r["text"]) for r in read_jsonl(corpus / "python311_docs.jsonl.xz")]
    code = stdlib_sources()
    train = {
        "novels": [text for src, text in novels.items() if src not in names],
        "docs": [text for src, text in docs if not held_out(src)],
        "code": [text for src, text in code if not held_out(src)],
        "maths": [maths_text(r) for r in read_jsonl(evals / "gsm8k_train.jsonl.xz")],
    }
    val = {
        "novels": [row["text"] for row in unseen],
        "docs": [text for src, text in docs if held_out(src)],
        "code": [text for src, text in code if held_out(src)],
        "maths": [maths_text(r) for r in read_jsonl(evals / "gsm8k_test.jsonl.xz")],
    }
    return {"train": train, "val": val}


def tokenizer_sample(train: dict[str, list[str]]) -> Iterator[str]:
    """Text for the tokenizer: the first characters of the documents of each domain."""
    for domain, limit in TOKENIZER_SAMPLE.items():
        share = max(limit // len(train[domain]), 2000)
        for text in train[domain]:
            yield text[:share]


def train_tokenizer(texts: Iterator[str], vocab: int = VOCAB) -> Tokenizer:
    """Byte-level BPE with single digits and the special tokens first."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=list(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode_documents(tokenizer: Tokenizer, texts: list[str], seed: int) -> np.ndarray:
    """Tokens of the shuffled documents, each followed by the end-of-text token, uint16."""
    order = np.random.default_rng(seed).permutation(len(texts))
    pieces = []
    for encoding in tokenizer.encode_batch_fast([texts[i] for i in order]):
        pieces.append(np.array([*encoding.ids, EOT], np.uint16))
    return np.concatenate(pieces)


def save_tokens(path: Path, tokens: dict[str, np.ndarray]) -> None:
    """Write token streams as one xz file: a JSON header line, then uint16 values."""
    header = json.dumps({name: len(stream) for name, stream in tokens.items()})
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 1}]
    with lzma.open(path, "wb", filters=filters) as file:
        file.write(header.encode() + b"\n")
        for stream in tokens.values():
            file.write(stream.astype("<u2").tobytes())


def load_tokens(path: Path) -> dict[str, np.ndarray]:
    """Token streams named "split/domain" from a file that save_tokens wrote, uint16."""
    with lzma.open(path, "rb") as file:
        sizes = json.loads(file.readline())
        return {n: np.frombuffer(file.read(2 * size), "<u2") for n, size in sizes.items()}


def domain_pattern() -> list[str]:
    """The repeating order in which sequences draw from the domains."""
    slots = []
    for domain, count in MIX.items():
        slots += [((i + 0.5) / count, domain) for i in range(count)]
    return [domain for _, domain in sorted(slots)]


class Batches:
    """Sequences of a fixed length, a pure function of the seed and the sequence number."""

    def __init__(self, tokens: dict[str, np.ndarray], length: int, seed: int):
        self.streams = {d: tokens[f"train/{d}"] for d in DOMAINS}
        self.length = length
        self.seed = seed
        self.pattern = domain_pattern()
        self.orders: dict[tuple[str, int], tuple[int, np.ndarray]] = {}

    def order(self, domain: str, epoch: int) -> tuple[int, np.ndarray]:
        """Offset of the first window and the window order of one pass over a domain."""
        if (domain, epoch) not in self.orders:
            rng = np.random.default_rng([self.seed, DOMAINS.index(domain), epoch, self.length])
            count = self.windows(domain)
            slack = len(self.streams[domain]) - 1 - count * self.length
            self.orders[domain, epoch] = int(rng.integers(slack + 1)), rng.permutation(count)
        return self.orders[domain, epoch]

    def windows(self, domain: str) -> int:
        """How many windows one pass over a domain holds."""
        return (len(self.streams[domain]) - 1 - self.length // 2) // self.length

    def place(self, number: int) -> tuple[str, int]:
        """Domain and first position of one sequence."""
        slot = number % len(self.pattern)
        domain = self.pattern[slot]
        drawn = number // len(self.pattern) * MIX[domain] + self.pattern[:slot].count(domain)
        epoch, index = divmod(drawn, self.windows(domain))
        offset, order = self.order(domain, epoch)
        return domain, offset + int(order[index]) * self.length

    def sequence(self, number: int) -> np.ndarray:
        """Tokens [length + 1] of one sequence."""
        domain, start = self.place(number)
        return self.streams[domain][start : start + self.length + 1]

    def batch(self, step: int, size: int) -> np.ndarray:
        """Tokens [size, length + 1] of one step, int32."""
        rows = [self.sequence(step * size + i) for i in range(size)]
        return np.stack(rows).astype(np.int32)


def val_starts(stream: np.ndarray, length: int, limit: int) -> np.ndarray:
    """First positions of up to `limit` windows spread evenly over a held-out stream."""
    count = (len(stream) - 1) // length
    return np.unique(np.linspace(0, count - 1, min(limit, count)).astype(int)) * length


def windows_at(stream: np.ndarray, starts: np.ndarray, length: int) -> np.ndarray:
    """Windows [n, length + 1] of a stream, int32."""
    return stream[starts[:, None] + np.arange(length + 1)].astype(np.int32)


def val_windows(stream: np.ndarray, length: int, limit: int) -> np.ndarray:
    """Up to `limit` windows [n, length + 1] spread evenly over a held-out stream, int32."""
    return windows_at(stream, val_starts(stream, length, limit), length)
