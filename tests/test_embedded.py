"""The embedded model: its shape, what its results say, and agreement with transformers."""

import json
import pathlib
import sys

import numpy as np
import pytest

import moejax

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from experiments import held_out  # noqa: E402
from experiments.tiny_data import DOMAINS  # noqa: E402

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


@pytest.mark.parametrize("domain", DOMAINS)
def test_held_out_text_is_likelier_than_under_a_3_gram(domain):
    if not held_out.DATA.is_dir():
        pytest.skip(f"the held-out text is not at {held_out.DATA}")
    runtime = moejax.load("tiny", context=512)
    windows = held_out.windows(runtime.directory, domain, 16)
    assert windows.shape == (16, 513)
    losses = []
    for window in windows:
        logits = runtime.logits(window[None, :-1])[0].astype(np.float64)
        logits -= logits.max(axis=-1, keepdims=True)
        chosen = logits[np.arange(512), window[1:]]
        losses.append(np.log(np.exp(logits).sum(axis=-1)) - chosen)
    results = json.loads((ROOT / "experiments/results/train_tiny.json").read_text())
    assert np.exp(np.mean(losses)) < 0.85 * results["ngram"][domain]["seen"]
