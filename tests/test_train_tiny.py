"""Training script of the embedded models: data, gradients, resuming, export, baseline."""

import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

for name in ("optax", "tokenizers", "safetensors"):
    pytest.importorskip(name)
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "experiments"))

import ngram  # noqa: E402
import tiny_data as td  # noqa: E402
import tiny_export as te  # noqa: E402
import tiny_model as tm  # noqa: E402
import tiny_ops as ops  # noqa: E402
import tiny_train as tt  # noqa: E402

TOY = tm.Shape(
    vocab=64,
    hidden=32,
    layers=2,
    heads=2,
    kv_heads=1,
    head_dim=16,
    experts=4,
    picks=2,
    inner=16,
    positions=64,
)
PLAN = tt.Plan(
    steps=3, tokens_per_step=64, short_length=16, length=32, eval_every=99, save_seconds=0.0
)


def toy_tokens() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        f"{split}/{d}": rng.integers(0, TOY.vocab, 1100).astype(np.uint16)
        for split in ("train", "val")
        for d in td.DOMAINS
    }


def flat(tree) -> np.ndarray:
    return np.concatenate([np.asarray(x).ravel() for x in jax.tree.leaves(tree)])


def test_tokenizer_returns_the_text_it_was_given():
    tokenizer = td.train_tokenizer(iter(["def f(x):\n    return 12\n" * 30, "The sea. " * 50]), 300)
    text = "def g(y):\n\treturn [3.14, 'é–∞']  # The sea\n\n  end "
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert tokenizer.token_to_id("<|endoftext|>") == td.EOT


def test_maths_text_drops_calculator_annotations():
    row = {"question": "How many?", "answer": "It is 2+2 = <<2+2=4>>4.\n#### 4"}
    assert td.maths_text(row) == "Question: How many?\nAnswer: It is 2+2 = 4.\n#### 4"


def test_token_file_returns_the_streams(tmp_path):
    tokens = toy_tokens()
    td.save_tokens(tmp_path / "tokens.xz", tokens)
    back = td.load_tokens(tmp_path / "tokens.xz")
    assert list(back) == list(tokens)
    assert all(np.array_equal(back[name], tokens[name]) for name in tokens)


def test_batches_follow_the_mix_and_visit_windows_once_per_pass():
    batches = td.Batches(toy_tokens(), 32, seed=1)
    assert {d: batches.pattern.count(d) for d in td.DOMAINS} == td.MIX
    offset, order = batches.order("novels", 0)
    assert sorted(order) == list(range(batches.windows("novels")))
    assert offset + (len(order)) * 32 < 1100
    assert np.array_equal(batches.batch(5, 4), td.Batches(toy_tokens(), 32, 1).batch(5, 4))


def test_kneser_ney_distributions_sum_to_one():
    rng = np.random.default_rng(2)
    stream = np.minimum(rng.geometric(0.08, 20_000), 49)
    model = ngram.KneserNey(stream, 50)
    for a, b in rng.integers(0, 50, (40, 2)):
        row = model.distribution(a, b)
        assert row.sum() == pytest.approx(1.0, abs=1e-9)
        assert row.min() > 0


def test_kneser_ney_learns_a_repeated_pattern():
    model = ngram.KneserNey(np.tile(np.arange(7), 300), 7)
    assert model.losses(np.tile(np.arange(7), 3)).mean() < 0.1


def naive_experts(x, weights, gate_up, down, picks):
    hidden = jnp.einsum("nd,edf->nef", x, gate_up)
    outs = jnp.einsum("nef,efd->ned", ops.swiglu(hidden), down)
    chosen = jnp.take_along_axis(outs, picks[..., None], axis=1)
    return jnp.sum(chosen * weights[..., None], axis=1)


def test_expert_gradients_match_a_dense_mixture():
    rng = np.random.default_rng(3)
    sizes = ((300, 8), (300, 2), (4, 8, 12), (4, 6, 8))
    args = [jnp.asarray(rng.normal(size=s), jnp.float32) for s in sizes]
    picks = jnp.asarray(np.stack([rng.permutation(4)[:2] for _ in range(300)]))
    plan = ops.plan_blocks(picks, 4)
    target = jnp.asarray(rng.normal(size=(300, 8)), jnp.float32)
    every = (0, 1, 2, 3)
    ours = jax.grad(lambda *a: jnp.sum(ops.experts(*a, plan) * target), every)(*args)
    want = jax.grad(lambda *a: jnp.sum(naive_experts(*a, picks) * target), every)(*args)
    for a, b in zip(ours, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4)


def naive_attend(q, k, v):
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    logits = jnp.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
    logits = jnp.where(jnp.tril(jnp.ones(logits.shape[-2:], bool)), logits, -1e30)
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(logits), v)


def test_attention_gradients_match_plain_attention():
    rng = np.random.default_rng(4)
    args = [jnp.asarray(rng.normal(size=(2, 200, h, 8)), jnp.float32) for h in (4, 2, 2)]
    ours = jax.grad(lambda *a: jnp.sum(jnp.sin(ops.attend(*a))), (0, 1, 2))(*args)
    want = jax.grad(lambda *a: jnp.sum(jnp.sin(naive_attend(*a))), (0, 1, 2))(*args)
    for a, b in zip(ours, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


def test_token_loss_gradients_match_plain_cross_entropy():
    rng = np.random.default_rng(5)
    x, table = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((50, 8), (30, 8)))
    want = jnp.asarray(rng.integers(0, 30, 50))

    def naive(x, table):
        return -jnp.mean(jax.nn.log_softmax(x @ table.T)[jnp.arange(50), want])

    ours = jax.value_and_grad(lambda *a: ops.token_loss(*a, want), (0, 1))(x, table)
    plain = jax.value_and_grad(naive, (0, 1))(x, table)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_resumed_training_ends_with_the_same_parameters(tmp_path):
    tokens = toy_tokens()
    whole = tt.train(PLAN, TOY, tokens, tmp_path, jnp.float32)
    tt.newest_checkpoint(tmp_path).unlink()
    assert tt.newest_checkpoint(tmp_path).name == "step_000002.npz"
    again = tt.train(PLAN, TOY, tokens, tmp_path, jnp.float32)
    np.testing.assert_array_equal(flat(whole), flat(again))


@pytest.mark.parametrize("shape", [TOY, replace(TOY, experts=0, picks=0)])
def test_exported_directory_reads_back_as_the_same_model(tmp_path, shape):
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_text("{}")
    params = tm.init_params(shape, 1)
    te.write_model(tmp_path / "model", params, shape, tokenizer)
    back, found = te.read_model(tmp_path / "model")
    assert found == shape
    rounded = jax.tree.map(lambda p: p.astype(jnp.bfloat16).astype(jnp.float32), params)
    assert jax.tree.structure(back) == jax.tree.structure(rounded)
    np.testing.assert_array_equal(flat(back), flat(rounded))
