"""Small tokenizers built on the spot, real ones from the shared data, and the stream checks."""

import gzip
import lzma
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from moejax.text import StreamDecoder

SHARED = Path(__file__).parents[2] / "shared" / "data" / "tokenizers"
REAL = ["qwen3_tokenizer.json.xz", "deepseek_r1_tokenizer.json.gz", "smollm2_tokenizer.json.xz"]
CORPUS = [
    "the cat sat on the mat, the cat ate the rat, that is that",
    "naïve café über straße 東京 日本語 🙂🙃 👩‍👩‍👧",
] * 20


def byte_level_backend():
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<bos>", "<eos>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    # The letters of the second one stand for bytes that are not UTF-8; the third cannot be mapped.
    backend.add_tokens(["<think>", "éÿ", "｜東｜"])
    return backend


def llama_vocabulary():
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    return pieces + ["▁", "a", "b", "▁a", "▁▁b", "é", "東", "▁ab", "c▁", " ", "\ufffd"]


def llama_backend(decoder):
    pieces = llama_vocabulary()
    backend = Backend(
        models.BPE(
            vocab={piece: i for i, piece in enumerate(pieces)},
            merges=[],
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    backend.decoder = decoder
    return backend


LLAMA = decoders.Sequence(
    [
        decoders.Replace("▁", " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ]
)
DECODERS = {
    "llama": LLAMA,
    "gemma": decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    ),
    "strips two": decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 2, 0)]
    ),
    "strips tokens": decoders.Sequence([decoders.Replace("▁", " "), decoders.Strip(" ", 1, 0)]),
    "replaces letters": decoders.Sequence([decoders.Fuse(), decoders.Replace("▁", " ")]),
    "metaspace": decoders.Metaspace(),
    "metaspace, none in front": decoders.Metaspace(prepend_scheme="never"),
    "bytes and metaspace": decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()]),
    "byte level in a sequence": decoders.Sequence([decoders.ByteLevel()]),
    "unknown": decoders.Sequence([decoders.Fuse(), decoders.Replace("a▁", " ")]),
    "word piece": decoders.WordPiece(),
}


def real_text(name):
    if not (SHARED / name).is_file():
        pytest.skip(f"{SHARED / name} is not here; the tiny tokenizers of this file still run")
    opener = lzma if name.endswith(".xz") else gzip
    return opener.decompress((SHARED / name).read_bytes()).decode()


def streamed(tokenizer, ids, skip=True):
    stream = StreamDecoder(tokenizer, skip_special_tokens=skip)
    pieces = [stream.push(token) for token in ids]
    return pieces, stream.flush()


def assert_stream_is_decode(tokenizer, ids, skip=True):
    pieces, rest = streamed(tokenizer, ids, skip)
    whole = tokenizer.backend.decode(ids, skip_special_tokens=skip)
    assert "".join(pieces) + rest == whole
    return pieces, rest
