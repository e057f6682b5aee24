"""The embedded model: its shape, what its results say, and agreement with transformers."""

import json
import lzma
import pathlib
import re

import numpy as np
import pytest

import moejax

ROOT = pathlib.Path(__file__).parents[1]
DATA = ROOT.parent / "shared" / "data"
TEXT = (
    "It was a cold night in November, and the old man had not yet come home.\n\n"
    "Question: Anna has 12 apples and gives 5 to her brother. How many are left?\nAnswer: "
    "import os\n\n\ndef main(argv):\n    return os.path.join(argv[0])\n"
)


@pytest.fixture(scope="module", params=["tiny", "tiny-draft"])
def name(request):
    return request.param


def test_transformers_agrees(name):
    torch = pytest.importorskip("torch", reason="the oracle is transformers on torch")
    from transformers import AutoModelForCausalLM

    ours = moejax.load(name, dtype="float32", slots=40, context=256)
    tokens = np.array([ours.tokenizer.encode(TEXT)])
    theirs = AutoModelForCausalLM.from_pretrained(ours.directory, dtype=torch.float32)
    with torch.no_grad():
        want = theirs(torch.tensor(tokens)).logits.numpy()
    got = ours.logits(tokens)
    assert np.abs(got - want).max() < 1e-4 * np.abs(want).max()
    assert (got.argmax(-1) == want.argmax(-1)).all()


def test_the_tokenizer_is_the_one_that_transformers_reads(name):
    transformers = pytest.importorskip("transformers", reason="the oracle is transformers")
    ours = moejax.load(name).tokenizer
    directory = moejax.load(name).directory
    theirs = transformers.AutoTokenizer.from_pretrained(directory)
    ids = ours.encode(TEXT)
    assert ids == theirs.encode(TEXT)
    assert ours.decode(ids) == TEXT == theirs.decode(ids)
    turns = [
        {"role": "user", "content": "How many?"},
        {"role": "assistant", "content": " Two."},
        {"role": "user", "content": "Why?"},
    ]
    rendered = ours.apply_chat_template(turns)
    assert rendered == theirs.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert "Answer: Two.<" in rendered


def test_an_answer_is_not_prefilled_again():
    from moejax.session import Session

    session = Session(moejax.load("tiny", slots=40, context=256))
    list(session.send("How many apples?", 12, {"temperature": 0.0}))
    answered = len(session._history)
    list(session.send("Why?", 4, {"temperature": 0.0}))
    assert session.reused_tokens >= answered - 1


def test_shape_and_size():
    config = moejax.load("tiny").config
    assert config.num_experts >= 32 and config.top_k >= 4 and config.num_moe_layers >= 6
    assert config.record_layout("bfloat16").weight_bytes >= 96 * 1024
    files = [*ROOT.glob("checkpoints/tiny/*"), *ROOT.glob("checkpoints/tiny_draft/*")]
    assert sum(file.stat().st_size for file in files) <= 30_000_000


@pytest.mark.parametrize("domain", ["novels", "maths"])
def test_held_out_text_is_likelier_than_under_a_3_gram(domain):
    if not DATA.is_dir():
        pytest.skip(f"the held-out text is not at {DATA}")
    runtime = moejax.load("tiny", context=512)
    ids = runtime.tokenizer.encode(held_out(domain))[: 16 * 512]
    windows = np.array(ids).reshape(16, 512)
    losses = []
    for window in windows:
        logits = runtime.logits(window[None])[0, :-1].astype(np.float64)
        logits -= logits.max(axis=-1, keepdims=True)
        chosen = logits[np.arange(511), window[1:]]
        losses.append(np.log(np.exp(logits).sum(axis=-1)) - chosen)
    results = json.loads((ROOT / "experiments/results/train_tiny.json").read_text())
    assert np.exp(np.mean(losses)) < 0.85 * results["ngram"][domain]["seen"]


def held_out(domain: str) -> str:
    """Text of a domain that the model was not trained on."""
    if domain == "novels":
        with lzma.open(DATA / "corpus/gutenberg_val.jsonl.xz", "rt") as lines:
            return json.loads(next(lines))["text"][20_000:80_000]
    with lzma.open(DATA / "eval/gsm8k_test.jsonl.xz", "rt") as lines:
        items = [json.loads(line) for line in lines][:120]
    return "<|endoftext|>".join(
        f"Question: {i['question']}\nAnswer: {re.sub('<<.*?>>', '', i['answer'])}" for i in items
    )
