"""Every family computes what transformers computes, in f32, however it is fed and stored."""

import copy
import functools
import pathlib
import tempfile

import hf_models
import hypothesis
import jax
import numpy as np
import pytest
from hypothesis import strategies as st

import moejax
from moejax import runtime
from moejax.checkpoints import hf
from moejax.config import read_config_json
from moejax.models import config_from_hf
from moejax.models import family as family_of
from moejax.models.family import weight_map

TOLERANCE = 1e-4  # of the largest logit
MARGIN = (
    2e-5  # of the largest logit: ten times the differences seen; closer calls may go either way
)
LENGTHS = (23, 9, 16)
CONTEXT = 36  # what a dynamic rope of 12 positions and factor 3 allows
DRAWN = max(2, hypothesis.settings().max_examples // 8)
FAMILIES = tuple(hf_models.FAMILIES)
MOE_FAMILIES = hf_models.MOE_FAMILIES
STEPWISE_ROPES = ("dynamic", "longrope")  # a token's rotation depends on when it was fed


def rope(kind: str, dim: int, **changes) -> dict:
    """Rope parameters of a kind, scaled so strongly that a short sequence shows it."""
    numbers = {
        "default": {},
        "linear": {"factor": 2.5},
        "dynamic": {"factor": 3.0},
        "yarn": {"factor": 4.0, "original_max_position_embeddings": 16},
        "llama3": {
            "factor": 8.0,
            "original_max_position_embeddings": 16,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
        },
        "longrope": {
            "factor": 4.0,
            "original_max_position_embeddings": 16,
            "short_factor": [1.0 + 0.1 * i for i in range(dim // 2)],
            "long_factor": [1.5 + 0.7 * i for i in range(dim // 2)],
        },
    }[kind]
    positions = {"max_position_embeddings": 12} if kind == "dynamic" else {}
    parameters = {"rope_type": kind, "rope_theta": 1000.0, **numbers, **changes}
    return {"rope_parameters": parameters, **positions}


# By hand, so that every option of every family is met by every run of the tests.
PINNED = {
    "qwen3_moe": [
        {"mlp_only_layers": [1], "norm_topk_prob": True, "attention_bias": True, "head_dim": 12},
        {
            "num_hidden_layers": 2,
            "decoder_sparse_step": 2,
            "use_sliding_window": True,
            "sliding_window": 5,
            "tie_word_embeddings": True,
            **rope("llama3", 8),
        },
    ],
    "olmoe": [{"clip_qkv": 0.7, "norm_topk_prob": True, "attention_bias": True, **rope("yarn", 8)}],
    "qwen2_moe": [
        {
            "use_sliding_window": True,
            "sliding_window": 5,
            "max_window_layers": 2,
            "mlp_only_layers": [0],
            "rms_norm_eps": 1e-2,
            **rope("longrope", 8),
        },
        {
            "use_sliding_window": True,
            "sliding_window": 4,
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
            "qkv_bias": False,
            "norm_topk_prob": True,
            "tie_word_embeddings": True,
        },
    ],
    "mixtral": [{"sliding_window": 5, "head_dim": 12, "num_experts_per_tok": 3}],
    "deepseek_v2": [
        {
            "q_lora_rank": 10,
            "attention_bias": True,
            "topk_method": "group_limited_greedy",
            "n_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 2.5,
            "rms_norm_eps": 1e-2,
            **rope("yarn", 4, mscale=0.7, mscale_all_dim=0.9),
        },
        {"first_k_dense_replace": 2, "n_shared_experts": 1, "tie_word_embeddings": True},
    ],
    "qwen3": [
        {
            "use_sliding_window": True,
            "sliding_window": 5,
            "max_window_layers": 1,
            "attention_bias": True,
            **rope("dynamic", 8),
        },
    ],
    "llama": [{"attention_bias": True, "head_dim": 12, **rope("llama3", 12)}],
    "mistral": [{"sliding_window": 5, "tie_word_embeddings": True, **rope("linear", 8)}],
}


@pytest.fixture(autouse=True, scope="module")
def quick_compilation():
    """Nearly all the time goes into compiling some fifty small programs that run for a moment."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@st.composite
def variants(draw, family: str) -> dict:
    """Changes to a family's tiny config that keep it valid."""
    heads = 4
    changes = {
        "num_hidden_layers": draw(st.integers(1, 3)),
        "tie_word_embeddings": draw(st.booleans()),
        "rms_norm_eps": draw(st.sampled_from([1e-6, 1e-2])),
    }
    layers, head_dim = changes["num_hidden_layers"], 8
    if family == "deepseek_v2":
        grouped = draw(st.booleans())
        changes |= {
            "q_lora_rank": draw(st.sampled_from([None, 10])),
            "first_k_dense_replace": draw(st.integers(0, layers)),
            "n_shared_experts": draw(st.integers(1, 3)),
            "routed_scaling_factor": draw(st.sampled_from([1.0, 2.5])),
            "topk_method": "group_limited_greedy" if grouped else "greedy",
            "n_group": draw(st.sampled_from([2, 4])),
            "topk_group": 2,
        }
        head_dim = hf_models.FAMILIES[family]["qk_rope_head_dim"]
    else:
        changes["num_key_value_heads"] = draw(st.sampled_from([1, 2, heads]))
    if family in ("qwen3_moe", "mixtral", "qwen3", "llama", "mistral"):
        changes["head_dim"] = head_dim = draw(st.sampled_from([8, 12]))
    if family not in ("qwen2_moe", "mixtral", "mistral"):
        changes["attention_bias"] = draw(st.booleans())
    if family in ("qwen3_moe", "olmoe", "qwen2_moe"):
        changes["norm_topk_prob"] = draw(st.booleans())
    if family in ("qwen3_moe", "qwen2_moe"):
        changes["decoder_sparse_step"] = draw(st.sampled_from([1, 2]))
        changes["mlp_only_layers"] = draw(st.lists(st.integers(0, layers - 1), max_size=2))
    if family not in ("olmoe", "deepseek_v2", "llama") and draw(st.booleans()):
        changes["sliding_window"] = draw(st.integers(1, 20))
        if family not in ("mixtral", "mistral"):
            changes["use_sliding_window"] = True
        if family in ("qwen2_moe", "qwen3"):
            changes["max_window_layers"] = draw(st.integers(0, layers))
    kinds = ["default", "linear", "dynamic", "yarn", "llama3", "longrope"]
    return changes | rope(draw(st.sampled_from(kinds)), head_dim)


def prompts(lengths=LENGTHS, vocab: int = 61) -> list[np.ndarray]:
    rng = np.random.default_rng(1)
    return [rng.integers(0, vocab, n).astype(np.int32) for n in lengths]


def padded(rows: list[np.ndarray]) -> np.ndarray:
    tokens = np.full((len(rows), max(map(len, rows))), -1, np.int32)
    for row, ids in zip(tokens, rows, strict=True):
        row[: len(ids)] = ids
    return tokens


def fed_stepwise(loaded: runtime.Runtime, tokens: np.ndarray) -> np.ndarray:
    """Logits [B, T, V] of tokens [B, T], one token at a time."""
    state, rows = loaded.init_state(len(tokens)), []
    for t in range(tokens.shape[1]):
        state, out = loaded.decode_step(state, tokens[:, t : t + 1])
        rows.append(np.asarray(out.logits))
    return np.stack(rows, axis=1)


def error(found: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference relative to the largest logit."""
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def load(directory: pathlib.Path, context: int = CONTEXT, **options) -> runtime.Runtime:
    return moejax.load(directory, context=context, **{"dtype": "float32", **options})


def check_logits(
    family: str, changes: dict, directory: pathlib.Path, *, single_tokens: bool
) -> float:
    """Whole prompts, and then single tokens, against transformers; returns the largest error."""
    model = hf_models.build(family, **changes)
    model.save_pretrained(directory)
    top_k = hf_models.FAMILIES[family].get("num_experts_per_tok")
    loaded = load(directory, slots=top_k and top_k + 2)
    ids = prompts()
    whole = loaded.logits(padded(ids))
    steps = fed_stepwise(loaded, padded(ids)) if single_tokens else None
    kind = changes.get("rope_parameters", {}).get("rope_type")
    worst = 0.0
    for b, row in enumerate(ids):
        expected = hf_models.reference(model, row).logits
        errors = [error(whole[b, : len(row)], expected)]
        if single_tokens:
            if kind in STEPWISE_ROPES:
                expected = hf_models.stepwise(model, row)
            errors.append(error(steps[b, : len(row)], expected))
        assert max(errors) < TOLERANCE, (errors, changes)
        worst = max(worst, *errors)
    return worst


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """(family) -> its tiny model as transformers and as a saved directory, shared by the tests."""

    @functools.cache
    def made(family: str):
        model, directory = hf_models.build(family), tmp_path_factory.mktemp(family)
        model.save_pretrained(directory)
        return model, directory

    return made


@pytest.mark.parametrize(
    ("family", "number"), [(f, i) for f, changes in PINNED.items() for i in range(len(changes))]
)
def test_logits(family, number, tmp_path):
    worst = check_logits(family, PINNED[family][number], tmp_path, single_tokens=True)
    print(f"{family} {number}: {worst:.1e}")


@pytest.mark.parametrize("family", FAMILIES)
@hypothesis.settings(
    max_examples=DRAWN, suppress_health_check=[hypothesis.HealthCheck.too_slow], deadline=None
)
@hypothesis.given(data=st.data())
def test_drawn_logits(family, data):
    with tempfile.TemporaryDirectory() as directory:
        worst = check_logits(
            family, data.draw(variants(family)), pathlib.Path(directory), single_tokens=False
        )
    print(f"{family}: {worst:.1e}")


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("mistral", {"sliding_window": 150}),
        ("qwen2_moe", {"use_sliding_window": True, "sliding_window": 40}),
        ("deepseek_v2", {}),
    ],
)
def test_logits_over_several_blocks_of_the_cache(family, changes, tmp_path):
    model = hf_models.build(family, **changes)
    model.save_pretrained(tmp_path)
    ids = prompts((330, 70))
    found = load(tmp_path, context=384).logits(padded(ids))
    for b, row in enumerate(ids):
        expected = hf_models.reference(model, row).logits
        assert error(found[b, : len(row)], expected) < TOLERANCE


def smallest_margin(logits: np.ndarray, top_k: int) -> np.ndarray:
    """[T] distance between the last chosen and the first refused, relative to the largest."""
    ranked = -np.sort(-logits, axis=-1)
    return (ranked[:, top_k - 1] - ranked[:, top_k]) / np.abs(logits).max()


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_continuation(family, base):
    model, directory = base(family)
    loaded = load(directory, context=72)
    prompt, new = prompts((8,))[0], 64
    state, tokens = loaded.init_state(), list(prompt)
    for t in range(len(prompt) + new - 1):
        state, out = loaded.decode_step(state, np.array([[tokens[t]]], np.int32))
        if t + 1 == len(tokens):
            tokens.append(int(np.argmax(np.asarray(out.logits)[0])))
    routed = family in MOE_FAMILIES
    expected = hf_models.reference(model, np.array(tokens[:-1]), router=routed)
    margins = smallest_margin(expected.logits, 1)
    margins[: len(prompt) - 1] = np.inf
    for layer in expected.router:
        margins = np.minimum(margins, smallest_margin(layer, loaded.config.top_k))
    close = np.flatnonzero(margins < MARGIN)
    certain = int(close[0]) if len(close) else len(margins)
    print(f"{family}: compared {max(certain - len(prompt) + 1, 0)} of {new} tokens")
    followed = expected.logits.argmax(axis=-1)[len(prompt) - 1 : certain]
    assert list(followed) == tokens[len(prompt) : certain + 1]
    assert certain > len(prompt) + new // 4, "too few tokens were compared: choose another seed"


def read(directory: pathlib.Path) -> dict[str, np.ndarray]:
    """All weights as the loader lays them out."""
    config = config_from_hf(read_config_json(directory))
    rules = family_of(config.model_type).rules
    params, records = hf.load(directory, weight_map(config, rules, "float32"))
    return params | ({} if records is None else {"records": records})


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(a[k].tobytes() == b[k].tobytes() for k in a)


@pytest.mark.parametrize("family", FAMILIES)
def test_shards_and_fused_experts_hold_the_same_weights(family, base, tmp_path):
    model, directory = base(family)
    expected = read(directory)
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    assert same(read(tmp_path / "shards"), expected)
    hf_models.save_in_memory_names(model, tmp_path / "fused")
    names = hf_models.tensors(tmp_path / "fused")
    fused = any(name.endswith("experts.gate_up_proj") for name in names)
    assert fused == (family in MOE_FAMILIES)
    assert same(read(tmp_path / "fused"), expected)


@pytest.mark.parametrize("family", ["qwen3_moe", "llama"])
def test_transformers_4_spelling_of_the_config(family, tmp_path):
    model = hf_models.build(family, **rope("yarn", 8))
    model.save_pretrained(tmp_path)
    modern = load(tmp_path).config
    hf_models.rewrite_config(tmp_path, hf_models.to_transformers_4)
    assert load(tmp_path).config == modern


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_files_widen_exactly(dtype, tmp_path):
    model, half = hf_models.build("qwen2_moe"), getattr(hf_models.torch, dtype)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(half).float()
    copy.deepcopy(model).to(half).save_pretrained(tmp_path)
    assert hf_models.tensors(tmp_path)["model.norm.weight"].dtype == half
    ids = prompts()
    found = load(tmp_path).logits(padded(ids))
    for b, row in enumerate(ids):
        expected = hf_models.reference(model, row).logits
        assert error(found[b, : len(row)], expected) < TOLERANCE


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v2"])
def test_bfloat16_stays_close(family, base):
    model, directory = base(family)
    ids = prompts()
    found = load(directory, dtype="bfloat16").logits(padded(ids))
    for b, row in enumerate(ids):
        expected = hf_models.reference(model, row).logits
        # A few tokens are routed differently, so the typical difference says more than the largest.
        typical = np.median(np.abs(found[b, : len(row)] - expected)) / np.abs(expected).max()
        assert 1e-4 < typical < 1e-2


def test_a_head_beside_tied_embeddings_is_not_read(tmp_path):
    model = hf_models.build("llama", tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "without")
    hf_models.save_in_memory_names(model, tmp_path / "with")
    assert "lm_head.weight" in hf_models.tensors(tmp_path / "with")
    assert "lm_head.weight" not in hf_models.tensors(tmp_path / "without")
    assert same(read(tmp_path / "with"), read(tmp_path / "without"))
