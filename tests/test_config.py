"""config.json of every family: published files load, and nothing in one is ignored silently."""

import json
import pathlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moejax import config as config_module
from moejax.checkpoints.rules import MAX_LAYERS
from moejax.config import read_config_json
from moejax.errors import ConfigError, UnsupportedModelError
from moejax.models import FAMILIES, config_from_hf
from moejax.models.shapes import stack_index

CONFIGS = pathlib.Path(__file__).parent / "configs"
BY_FAMILY = {
    "qwen3_moe": "Qwen3-30B-A3B",
    "olmoe": "OLMoE-1B-7B-0924",
    "qwen2_moe": "Qwen1.5-MoE-A2.7B",
    "mixtral": "Mixtral-8x7B",
    "deepseek_v2": "DeepSeek-V2-Lite",
    "qwen3": "Qwen3-0.6B",
    "llama": "Llama-3.2-1B",
    "mistral": "Mistral-7B",
}


def published(name: str, **changes) -> dict:
    """A published config.json; None removes a key."""
    config = json.loads((CONFIGS / f"{name}.json").read_text()) | changes
    return {key: value for key, value in config.items() if key not in changes or value is not None}


def of_family(family: str, **changes) -> dict:
    return published(BY_FAMILY[family], **changes)


@pytest.mark.parametrize(
    ("name", "layers", "dense", "experts", "top_k", "normalize", "shared", "megabytes"),
    [
        ("OLMoE-1B-7B-0924", 16, 0, 64, 8, False, 0, 12.6),
        ("Qwen1.5-MoE-A2.7B", 24, 0, 60, 4, False, 5632, 17.3),
        ("Qwen2-57B-A14B", 28, 0, 64, 8, False, 20480, 55.1),
        ("Qwen3-30B-A3B", 48, 0, 128, 8, True, 0, 9.4),
        ("DeepSeek-V2-Lite", 27, 1, 64, 6, False, 2 * 1408, 17.3),
        ("Mixtral-8x7B", 32, 0, 8, 2, True, 0, 352.3),
    ],
)
def test_published_moe(name, layers, dense, experts, top_k, normalize, shared, megabytes):
    config = config_from_hf(published(name))
    assert (config.num_layers, config.dense_layers) == (layers, tuple(range(dense)))
    assert (config.num_experts, config.top_k) == (experts, top_k)
    assert (config.router.normalize, config.router.scale) == (normalize, 1.0)
    assert config.shared_width == shared
    assert config.shared_gate == (config.model_type == "qwen2_moe")
    assert config.qkv_bias == (config.model_type == "qwen2_moe")
    assert not config.o_bias
    assert config.record_layout("bfloat16").weight_bytes / 1e6 == pytest.approx(megabytes, abs=0.05)


@pytest.mark.parametrize(
    ("name", "heads", "head_dim", "theta", "qk_norm", "tied", "eps"),
    [
        ("OLMoE-1B-7B-0924", (16, 16), 128, 1e4, "whole", False, 1e-5),
        ("Qwen1.5-MoE-A2.7B", (16, 16), 128, 1e6, "none", False, 1e-6),
        ("Qwen2-57B-A14B", (28, 4), 128, 1e6, "none", False, 1e-6),
        ("Qwen3-30B-A3B", (32, 4), 128, 1e6, "head", False, 1e-6),
        ("DeepSeek-V2-Lite", (16, 16), 192, 1e4, "none", False, 1e-6),
        ("Mixtral-8x7B", (32, 8), 128, 1e6, "none", False, 1e-5),
        ("Qwen3-0.6B", (16, 8), 128, 1e6, "head", True, 1e-6),
        ("Llama-3.2-1B", (32, 8), 64, 5e5, "none", True, 1e-5),
        ("Mistral-7B", (32, 8), 128, 1e4, "none", False, 1e-5),
    ],
)
def test_published_attention(name, heads, head_dim, theta, qk_norm, tied, eps):
    config = config_from_hf(published(name))
    assert (config.num_heads, config.num_kv_heads) == heads
    assert (config.head_dim, config.rope.theta) == (head_dim, theta)
    assert (config.qk_norm, config.tied_embeddings, config.norm_eps) == (qk_norm, tied, eps)
    assert config.windows == ((4096,) * 32 if name == "Mistral-7B" else ())
    assert bool(config.moe_layers) == (name not in ("Qwen3-0.6B", "Llama-3.2-1B", "Mistral-7B"))


def test_published_rope_scaling():
    rope = config_from_hf(published("Llama-3.2-1B")).rope
    assert (rope.kind, rope.factor, rope.original_max_positions) == ("llama3", 32.0, 8192)
    config = config_from_hf(published("DeepSeek-V2-Lite"))
    assert (config.rope.kind, config.rope.factor, config.rope.dim) == ("yarn", 40.0, 64)
    assert config.rope.interleaved
    assert config.attention_scale == pytest.approx(192**-0.5 * 1.26079**2, rel=1e-4)
    assert config.latent.q_rank is None


def test_token_ids():
    config = config_from_hf(of_family("llama", eos_token_id=[128001, 128008], pad_token_id=-1))
    assert (config.bos_id, config.eos_ids, config.pad_id) == (128000, (128001, 128008), None)
    for wrong in ("</s>", -1, [1, "x"], [True], 2**40):
        with pytest.raises(ConfigError, match="token"):
            config_from_hf(of_family("llama", eos_token_id=wrong))


@pytest.mark.parametrize("family", FAMILIES)
def test_both_spellings_of_the_rope(family):
    numbers = {"factor": 4.0, "original_max_position_embeddings": 4096}
    plain = {"rope_scaling": None, "rope_theta": None}
    older = of_family(
        family, **plain | {"rope_theta": 5e4, "rope_scaling": {"type": "yarn", **numbers}}
    )
    modern = {"rope_type": "yarn", "rope_theta": 5e4, **numbers}
    newer = of_family(family, **plain | {"rope_parameters": modern})
    both = older | {"rope_parameters": modern}
    config = config_from_hf(older)
    assert (config.rope.theta, config.rope.kind, config.rope.factor) == (5e4, "yarn", 4.0)
    assert config == config_from_hf(newer) == config_from_hf(both)
    with pytest.raises(ConfigError, match="rope_theta is both"):
        config_from_hf(newer | {"rope_theta": 1e4})


def test_both_spellings_of_the_experts():
    older = of_family("mixtral", num_local_experts=None, num_experts=8)
    assert config_from_hf(older) == config_from_hf(of_family("mixtral"))
    with pytest.raises(ConfigError, match="num_experts is 4 but num_local_experts is 8"):
        config_from_hf(of_family("mixtral", num_experts=4))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"is_encoder_decoder": True}, "is_encoder_decoder"),
        ({"layer_types": ["chunked_attention"]}, "chunked_attention"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [1, 2]}}, "mrope"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "extra": 1}}, "extra"),
        ({"rope_scaling": None, "partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"quantization_config": {"quant_method": "fp8"}}, "fp8"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "gptq"),
        ({"quantization_config": {"quant_method": "awq"}}, "awq"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "bitsandbytes"),
        ({"compression_config": {"quant_method": "compressed-tensors"}}, "compressed-tensors"),
    ],
)
def test_options_that_nobody_computes_are_refused_by_name(family, changes, named):
    with pytest.raises(UnsupportedModelError, match=named):
        config_from_hf(of_family(family, **changes))


@pytest.mark.parametrize(
    ("family", "changes", "named"),
    [
        ("deepseek_v2", {"topk_method": "noaux_tc"}, "topk_method"),
        ("deepseek_v2", {"scoring_func": "sigmoid"}, "scoring_func"),
        ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob"),
        ("deepseek_v2", {"moe_layer_freq": 2}, "moe_layer_freq"),
        ("deepseek_v2", {"num_key_value_heads": 4}, "num_key_value_heads"),
        ("deepseek_v2", {"mlp_bias": True}, "mlp_bias"),
        ("llama", {"mlp_bias": True}, "mlp_bias"),
        ("mistral", {"attention_bias": True}, "attention_bias"),
        ("llama", {"layer_types": ["sliding_attention"] * 16}, "layer_types"),
        ("mistral", {"layer_types": ["full_attention"] * 32}, "layer_types"),
        (
            "qwen3_moe",
            {"use_sliding_window": True, "sliding_window": 64},
            "max_window_layers",
        ),
    ],
)
def test_family_options_that_are_refused(family, changes, named):
    with pytest.raises(UnsupportedModelError, match=named):
        config_from_hf(of_family(family, **changes))


@pytest.mark.parametrize(
    ("family", "changes", "named"),
    [
        ("olmoe", {"hidden_size": None}, "hidden_size is missing"),
        ("olmoe", {"hidden_size": -2048}, "hidden_size"),
        ("olmoe", {"hidden_size": 2**31}, "hidden_size"),
        ("olmoe", {"hidden_size": 2048.0}, "hidden_size"),
        ("olmoe", {"hidden_size": True}, "hidden_size"),
        ("olmoe", {"hidden_size": "2048"}, "hidden_size"),
        ("olmoe", {"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ("olmoe", {"num_experts": 10**9}, "num_experts"),
        ("olmoe", {"num_experts_per_tok": 65}, "top-65 of 64"),
        ("olmoe", {"num_key_value_heads": 3}, "16 heads over 3"),
        ("olmoe", {"rms_norm_eps": 0.0}, "rms_norm_eps"),
        ("olmoe", {"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ("olmoe", {"rms_norm_eps": 10**400}, "rms_norm_eps"),
        ("olmoe", {"rope_theta": -1.0}, "rope_theta"),
        ("olmoe", {"rope_scaling": "yarn"}, "rope_scaling"),
        ("olmoe", {"rope_scaling": {"type": "linear"}}, "factor is missing"),
        ("olmoe", {"rope_scaling": {"type": "linear", "factor": -2}}, "factor"),
        ("olmoe", {"rope_scaling": {"type": "llama3", "factor": 2.0}}, "low_freq_factor"),
        (
            "olmoe",
            {"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}},
            "1 of short_factor for 64",
        ),
        (
            "olmoe",
            {
                "rope_scaling": {
                    "type": "longrope",
                    "short_factor": [1.0] * 64,
                    "long_factor": [1.0] * 63 + ["2"],
                }
            },
            "long_factor: 63",
        ),
        ("olmoe", {"head_dim": 127}, "127 channels"),
        ("olmoe", {"hidden_size": 8}, "0 channels"),
        ("qwen2_moe", {"mlp_only_layers": [-1]}, "mlp_only_layers"),
        ("qwen2_moe", {"mlp_only_layers": ["0"]}, "mlp_only_layers"),
        ("qwen2_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step"),
        ("qwen2_moe", {"layer_types": ["full_attention"]}, "1 layer_types for 24"),
        ("qwen3", {"layer_types": ["sliding_attention"] * 28}, "no sliding_window"),
        ("mistral", {"sliding_window": -4}, "sliding_window"),
        ("deepseek_v2", {"first_k_dense_replace": -1}, "first_k_dense_replace"),
        ("deepseek_v2", {"n_group": 5, "topk_method": "group_limited_greedy"}, "groups"),
        ("deepseek_v2", {"n_group": 32, "topk_method": "group_limited_greedy"}, "top-6 of"),
        ("deepseek_v2", {"kv_lora_rank": 0}, "kv_lora_rank"),
    ],
)
def test_contradictions_and_wrong_numbers(family, changes, named):
    with pytest.raises(ConfigError, match=named):
        config_from_hf(of_family(family, **changes))


NAN, INF = float("nan"), float("inf")
HALF = [1.0] * 64  # as many as OLMoE has frequencies
LONG = {"type": "longrope", "short_factor": HALF, "long_factor": HALF}


@pytest.mark.parametrize(
    ("scaling", "named"),
    [
        *(({"type": "yarn", "factor": 2.0, "beta_fast": v}, "beta_fast") for v in (0, -1, NAN)),
        *(
            ({"type": "yarn", "factor": 2.0, "beta_slow": v}, "beta_slow")
            for v in (0.0, -1, 1e-310)
        ),
        *(({"type": "yarn", "factor": 2.0, "rope_theta": v}, "rope_theta") for v in (1, 0.5, 0)),
        *(({"type": "yarn", "factor": 2.0, "mscale": v}, "mscale is") for v in (-1, INF)),
        *(({"type": "yarn", "factor": 2.0, "mscale_all_dim": v}, "mscale_all") for v in (-1, NAN)),
        *(
            ({"type": "yarn", "factor": 2.0, "attention_factor": v}, "attention_factor")
            for v in (0, -1.0, NAN)
        ),
        *(
            ({"type": kind, "factor": v}, "factor is")
            for kind in ("linear", "dynamic", "yarn", "llama3")
            for v in (0, -1, NAN, INF)
        ),
        *(({"type": "default", "rope_theta": v}, "rope_theta") for v in (0, -1, NAN, INF, -INF)),
        ({"type": "yarn", "original_max_position_embeddings": NAN}, "original_max_position"),
        (LONG | {"original_max_position_embeddings": 1}, "1 original positions"),
        (LONG | {"factor": INF}, "factor is"),
        (LONG | {"attention_factor": 0.0}, "attention_factor"),
        *(
            (LONG | {name: numbers}, name)
            for name in ("short_factor", "long_factor")
            for numbers in ([], HALF[:63], [*HALF, 1.0], [*HALF[:63], NAN], [*HALF[:63], None])
        ),
    ],
)
def test_rope_numbers_that_no_rope_can_have(scaling, named):
    changes = {"rope_theta": None} if "rope_theta" in scaling else {}
    with pytest.raises(ConfigError, match=named):
        config_from_hf(of_family("olmoe", rope_scaling=scaling, **changes))


@pytest.mark.parametrize(
    ("family", "name"),
    [
        *((family, name) for family in FAMILIES for name in ("rms_norm_eps", "rope_theta")),
        ("olmoe", "clip_qkv"),
        ("deepseek_v2", "routed_scaling_factor"),
    ],
)
@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "-1e-6", "0", "1e-400"])
def test_numbers_of_a_file_are_positive_and_finite(family, name, number, tmp_path):
    text = json.dumps(of_family(family, rope_scaling=None) | {name: "?"})
    (tmp_path / "config.json").write_text(text.replace('"?"', number))
    with pytest.raises(ConfigError, match=f"{name} is [^b]"):
        config_from_hf(read_config_json(tmp_path))


def test_unknown_family_and_missing_type():
    with pytest.raises(UnsupportedModelError, match="'gpt2'.*deepseek_v2, llama"):
        config_from_hf({"model_type": "gpt2"})
    with pytest.raises(ConfigError, match="model_type"):
        config_from_hf({})


def test_defaults_of_the_family():
    assert config_from_hf(of_family("qwen3", head_dim=None, hidden_size=512)).head_dim == 128
    assert config_from_hf(of_family("mixtral", rope_theta=None)).rope.theta == 1e6
    assert config_from_hf(of_family("llama", rope_theta=None)).rope.theta == 1e4
    assert config_from_hf(of_family("mistral", sliding_window=None)).windows == (4096,) * 32
    full = of_family("mistral") | {"sliding_window": None}
    assert config_from_hf(full).windows == ()


def test_windows_follow_the_family():
    sliding = {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 4}
    windows = config_from_hf(of_family("qwen2_moe", **sliding)).windows
    assert windows == (64, 0, 64, 0) + (0,) * 20
    windows = config_from_hf(of_family("qwen3", **sliding)).windows
    assert windows == (0,) * 4 + (64,) * 24
    windows = config_from_hf(of_family("qwen3_moe", **sliding | {"max_window_layers": 0})).windows
    assert windows == (64,) * 48
    types = ["full_attention", "sliding_attention"] * 14
    windows = config_from_hf(of_family("qwen3", **sliding, layer_types=types)).windows
    assert windows == (0, 64) * 14


def test_layers_with_experts():
    sparse = {"decoder_sparse_step": 2, "mlp_only_layers": [3]}
    config = config_from_hf(of_family("qwen2_moe", num_hidden_layers=6, **sparse))
    assert (config.moe_layers, config.dense_layers) == ((1, 5), (0, 2, 3, 4))


def test_stack_indices_count_the_layers_of_their_kind():
    sparse = {"decoder_sparse_step": 2, "mlp_only_layers": [3]}
    index = stack_index(config_from_hf(of_family("qwen2_moe", num_hidden_layers=6, **sparse)))
    found = {g: [index(f"{g}/x", i) for i in range(7)] for g in ("norms", "mlp", "experts")}
    assert found == {
        "norms": [0, 1, 2, 3, 4, 5, None],
        "mlp": [0, None, 1, 2, 3, None, None],
        "experts": [None, 0, None, None, None, 1, None],
    }
    assert index("moe/router", 5) == index("shared/down", 5) == 1


def test_the_most_layers_are_those_that_a_checkpoint_is_probed_for():
    assert not hasattr(config_module, "MAX_LAYERS")
    assert config_from_hf(of_family("olmoe", num_hidden_layers=MAX_LAYERS)).moe_layers[-1] == 1023
    with pytest.raises(ConfigError, match=f"num_hidden_layers.*1 to {MAX_LAYERS}"):
        config_from_hf(of_family("olmoe", num_hidden_layers=MAX_LAYERS + 1))


def test_context_of_scaled_ropes():
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    assert config_from_hf(of_family("qwen3_moe", rope_scaling=yarn)).max_positions == 131072
    dynamic = {"type": "dynamic", "factor": 2.0}
    assert config_from_hf(of_family("mistral", rope_scaling=dynamic)).max_positions == 65536
    assert config_from_hf(of_family("llama")).max_positions == 131072


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("{", "JSON"),
        ("[1]", "object"),
        ('{"a": ' + "9" * 5000 + "}", "JSON"),
        ("[" * 10**5, "JSON"),
    ],
)
def test_malformed_json(text, named, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=named):
        read_config_json(tmp_path)


def test_missing_and_binary_json(tmp_path):
    with pytest.raises(ConfigError, match="is missing: give"):
        read_config_json(tmp_path)
    (tmp_path / "config.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="JSON"):
        read_config_json(tmp_path)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=5,
)


@pytest.mark.parametrize("family", FAMILIES)
@given(data=st.data())
def test_a_mangled_config_is_read_or_refused_with_a_reason(family, data):
    config = of_family(family)
    rope = config.get("rope_scaling") or {"type": "yarn", "factor": 2.0}
    keys = st.sampled_from(sorted({*config, "rope_parameters", "layer_types", "head_dim"}))
    for key in data.draw(st.lists(keys, max_size=2)):
        config[key] = data.draw(VALUES)
    if data.draw(st.booleans()):
        config["rope_scaling"] = {
            **rope,
            data.draw(st.sampled_from(sorted(rope))): data.draw(VALUES),
        }
    try:
        hash(config_from_hf(config))
    except (ConfigError, UnsupportedModelError) as error:
        assert len(str(error)) > 20
