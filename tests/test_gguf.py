# ruff: noqa: E402
import builtins
import json
import os
import struct

import cli_models
import numpy as np
import pytest
from ckpt_models import assert_equal
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

gguf = pytest.importorskip("gguf")

from gguf import GGMLQuantizationType as Type
from gguf_models import gguf_tensors, permuted, write_gguf
from test_quantise import oracle, unpacked

import moejax
from moejax.checkpoints import convert, gguf_model, hf
from moejax.checkpoints.gguf_file import read_file
from moejax.errors import (
    CheckpointError,
    InputError,
    NonFiniteError,
    TokenizerError,
    UnsupportedModelError,
)
from moejax.layout import MatrixLayout, RecordLayout
from moejax.models import config_from_hf, family
from moejax.models.family import weight_map
from moejax.quantise import error, quantise

FAMILIES = ("qwen3_moe", "qwen2_moe", "olmoe", "mixtral", "llama", "qwen3")
WRITTEN = (Type.F16, Type.BF16, Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1, Type.Q8_0)
SIZES = {"WIDTH": 256, "EXPERT_WIDTH": 256, "HEAD_DIM": 64, "EXPERTS": 2, "LAYERS": 1}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A Qwen3-MoE whose rows are whole blocks of every type."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SIZES.items():
            patch.setattr(cli_models, name, value)
        return cli_models.write_model(
            tmp_path_factory.mktemp("gguf") / "model", dtype=np.dtype(np.float32)
        )


@pytest.fixture
def path(directory, tmp_path):
    write_gguf(directory, tmp_path / "model.gguf")
    return tmp_path / "model.gguf"


def weights_of(path, dtype="float32"):
    config = config_from_hf(gguf_model.read_config(path))
    return weight_map(config, family(config.model_type).rules, dtype)


def k_blocks(tensor, kind):
    """Random blocks of a k-quant with small finite scales: the package cannot quantise to them."""
    size = gguf.GGML_QUANT_SIZES[kind][1]
    rng = np.random.default_rng(tensor.size)
    blocks = rng.integers(0, 256, (tensor.size // 256, size), np.uint8)
    scales = (rng.uniform(-1, 1, (len(blocks), 2)) / 500).astype(np.float16).view(np.uint8)
    if kind in (Type.Q3_K, Type.Q6_K):
        blocks[:, -2:] = scales[:, :2]
    else:
        blocks[:, :4] = scales
    return blocks.reshape(*tensor.shape[:-1], -1)


def dense_and_records(stored, dtype="float32"):
    """What a correct reader makes of a Qwen3-MoE's tensors, one layer of two experts."""
    gates = [stored[f"blk.0.ffn_{part}_exps.weight"] for part in ("gate", "up", "down")]
    layout = RecordLayout(width=256, expert_width=256, dtype=dtype)
    records = np.zeros((2, layout.elements), layout.bits)
    layout.view(records, "gate_up")[:] = np.concatenate(gates[:2], axis=1)
    layout.view(records, "down")[:] = gates[2]
    dense = {
        "attention/q": stored["blk.0.attn_q.weight"][None],
        "attention/o": stored["blk.0.attn_output.weight"][None],
        "embed/weight": stored["token_embd.weight"],
        "moe/router": stored["blk.0.ffn_gate_inp.weight"][None],
    }
    return dense, records


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_loads_as_from_its_directory(name, tmp_path):
    hf_models = pytest.importorskip("hf_models")
    changes = {"norm_topk_prob": True} if name == "qwen3_moe" else {}
    hf_models.build(name, **changes).save_pretrained(tmp_path / "model")
    write_gguf(tmp_path / "model", tmp_path / "model.gguf")
    written = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config_from_hf(gguf_model.read_config(tmp_path / "model.gguf")) == config_from_hf(
        written
    )
    weights = weights_of(tmp_path / "model.gguf")
    expected = hf.load(tmp_path / "model", weights)
    assert_equal(hf.load(tmp_path / "model.gguf", weights), expected)
    for chunk in (1, 70):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(hf, "CHUNK", chunk)
            assert_equal(hf.load(tmp_path / "model.gguf", weights), expected)
    assert_equal(
        hf.load(tmp_path / "model.gguf", weights.quantised("int4g32")),
        hf.load(tmp_path / "model", weights.quantised("int4g32")),
    )


@pytest.mark.parametrize("kind", [*WRITTEN, Type.Q4_K, Type.Q5_K, Type.Q6_K])
def test_every_type_is_decoded(kind, directory, tmp_path):
    encode = k_blocks if kind.name.endswith("_K") else gguf.quantize
    stored = write_gguf(directory, tmp_path / "m.gguf", kind, encode)
    params, records = hf.load(tmp_path / "m.gguf", weights_of(tmp_path / "m.gguf"))
    dense, wanted = dense_and_records(stored)
    for path, array in dense.items():
        np.testing.assert_array_equal(params[path], array, err_msg=path)
    np.testing.assert_array_equal(records, wanted)
    halves, _ = hf.load(tmp_path / "m.gguf", weights_of(tmp_path / "m.gguf", "bfloat16"))
    rounded = dense["attention/q"].astype(halves["attention/q"].dtype)
    assert halves["attention/q"].tobytes() == rounded.tobytes()


@pytest.mark.parametrize("kind", [Type.Q8_0, Type.Q6_K, Type.Q4_1])
@pytest.mark.parametrize("quant", ["int8", "int4g64"])
def test_other_types_are_quantised_again(kind, quant, directory, tmp_path):
    encode = k_blocks if kind.name.endswith("_K") else gguf.quantize
    stored = write_gguf(directory, tmp_path / "m.gguf", kind, encode)
    weights = weights_of(tmp_path / "m.gguf").quantised(quant)
    params, records = hf.load(tmp_path / "m.gguf", weights)
    q = stored["blk.0.attn_q.weight"]
    np.testing.assert_array_equal(
        params["attention/q"][0], quantise(q, MatrixLayout(*q.shape, quant))
    )
    down = stored["blk.0.ffn_down_exps.weight"][1]
    np.testing.assert_array_equal(
        weights.layout.view(records, "down")[1], quantise(down, MatrixLayout(*down.shape, quant))
    )


@pytest.mark.parametrize("sizes", [{}, {"WIDTH": 96, "EXPERT_WIDTH": 32, "HEAD_DIM": 8}])
def test_q4_0_becomes_int4_with_the_same_integers_and_scales(sizes, tmp_path, monkeypatch):
    for name, value in (SIZES | sizes).items():
        monkeypatch.setattr(cli_models, name, value)
    directory = cli_models.write_model(tmp_path / "model", dtype=np.dtype(np.float32))
    path = tmp_path / "m.gguf"
    stored = write_gguf(directory, path, Type.Q4_0)
    weights = weights_of(path).quantised("int4g32")
    params, records = hf.load(path, weights)
    up = stored["blk.0.ffn_up_exps.weight"]
    part = weights.layout.view(records, "gate_up")[1]
    found = oracle(part, 2 * up.shape[1], up.shape[2], "int4g32")[up.shape[1] :]
    np.testing.assert_array_equal(found.astype(np.float32), up[1])
    o = stored["blk.0.attn_output.weight"]
    found = oracle(params["attention/o"][0], *o.shape, "int4g32")
    np.testing.assert_array_equal(found.astype(np.float32), o)
    raw = gguf.quantize(gguf_tensors(directory)["blk.0.attn_output.weight"], Type.Q4_0)
    blocks = raw.reshape(-1, 18)
    q, scales, _ = unpacked(params["attention/o"][0].tobytes(), *o.shape, "int4g32")
    kept = o.shape[1] // 32
    np.testing.assert_array_equal(
        np.ascontiguousarray(scales[:, :kept]).view(np.uint8).reshape(-1, 2), blocks[:, :2]
    )
    low = (blocks[:, 2:] & 15).astype(int) - 8
    np.testing.assert_array_equal(q[:, : o.shape[1]].reshape(-1, 32)[:, :16], low)
    table = convert.convert_directory(path, tmp_path / "out", weights_of(path), quant="int4")
    assert table["experts/down"] == {"tensors": 2, "mean": 0.0, "max": 0.0}


def test_queries_and_keys_of_llama_keep_their_integers(tmp_path):
    """Rows move back to Hugging Face's order with their blocks, for Q4_0 too."""
    hf_models = pytest.importorskip("hf_models")
    hf_models.build("llama", hidden_size=64, intermediate_size=32).save_pretrained(tmp_path / "m")
    stored = write_gguf(tmp_path / "m", tmp_path / "m.gguf", Type.Q4_0)
    weights = weights_of(tmp_path / "m.gguf").quantised("int4g32")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hf, "CHUNK", 1)
        params, _ = hf.load(tmp_path / "m.gguf", weights)
    for name, heads in (("q", 4), ("k", 2)):
        found = oracle(params[f"attention/{name}"][1], heads * 16, 64, "int4g32")
        wanted = stored[f"blk.1.attn_{name}.weight"]
        np.testing.assert_array_equal(permuted(found, heads).astype(np.float32), wanted)


def test_logits_are_those_of_the_directory(directory, path):
    ids = np.arange(3, 20)[None]
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (path.parent / name).write_bytes((directory / name).read_bytes())
    found = moejax.load(path, dtype="float32", context=64)
    wanted = moejax.load(directory, dtype="float32", context=64)
    np.testing.assert_array_equal(found.logits(ids), wanted.logits(ids))
    text = [r.generate("The", 4, {"temperature": 0.0})[0].tokens for r in (found, wanted)]
    assert text[0] == text[1]


def test_text_needs_a_tokenizer_beside_the_file(path):
    runtime = moejax.load(path, context=64)
    with pytest.raises(TokenizerError, match="tokenizer.json"):
        runtime.generate("The", 2)


def test_a_file_converts_into_a_directory(directory, path, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes((directory / "tokenizer.json").read_bytes())
    convert.convert_directory(path, tmp_path / "out", weights_of(path))
    found = {p.name for p in (tmp_path / "out").iterdir()}
    assert {"config.json", "tokenizer.json", "dense.safetensors", "experts.bank"} <= found
    written = config_from_hf(json.loads((tmp_path / "out" / "config.json").read_text()))
    assert written == config_from_hf(json.loads((directory / "config.json").read_text()))
    loaded = convert.load_converted(tmp_path / "out", weights_of(path))
    assert_equal(loaded, hf.load(directory, weights_of(path)))


def test_a_missing_package_is_named(directory, path, tmp_path, monkeypatch):
    write_gguf(directory, tmp_path / "q.gguf", Type.Q8_0)
    imported = builtins.__import__

    def without(name, *args, **kwargs):
        if name.split(".")[0] == "gguf":
            raise ImportError(name)
        return imported(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    hf.load(path, weights_of(path))  # floats need no package
    with pytest.raises(InputError, match=r"pip install gguf"):
        gguf_model.list_tensors(tmp_path / "q.gguf")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda w: w.add_sliding_window(8), "unknown metadata attention.sliding_window"),
        (lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE), "rope scaling"),
        (lambda w: w.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID), "gating_func = 2"),
        (lambda w: w.add_expert_weights_scale(2.5), "expert_weights_scale = 2.5"),
        (lambda w: w.add_rope_dimension_count(4), "rope.dimension_count = 4"),
    ],
)
def test_what_is_not_computed_is_refused_by_name(change, why, directory, tmp_path):
    write_gguf(directory, tmp_path / "m.gguf", change=change)
    with pytest.raises(UnsupportedModelError, match=why):
        gguf_model.read_config(tmp_path / "m.gguf")


def test_yarn_and_normalisation_are_read(directory, tmp_path):
    def change(writer):
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(4.0)
        writer.add_rope_scaling_orig_ctx_len(64)
        writer.add_expert_weights_norm(False)

    write_gguf(directory, tmp_path / "m.gguf", change=change)
    config = config_from_hf(gguf_model.read_config(tmp_path / "m.gguf"))
    rope = config.rope
    assert (rope.kind, rope.factor, rope.original_max_positions) == ("yarn", 4.0, 64)
    assert not config.router.normalize


def test_other_architectures_parts_and_types_are_refused(directory, path, tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "gemma3")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(UnsupportedModelError, match="'gemma3' is not one of qwen3moe"):
        gguf_model.read_config(tmp_path / "a.gguf")
    write_gguf(directory, tmp_path / "b.gguf", change=lambda w: w.add_uint16("split.count", 3))
    with pytest.raises(CheckpointError, match="one of 3 parts"):
        read_file(tmp_path / "b.gguf")
    write_gguf(directory, tmp_path / "c.gguf", Type.Q3_K, k_blocks)
    with pytest.raises(CheckpointError, match="has type 11; known are F32"):
        read_file(tmp_path / "c.gguf")


def test_missing_and_foreign_tensors_are_listed(directory, tmp_path):
    tensors = load_file(directory / "model.safetensors")
    del tensors["model.layers.0.self_attn.v_proj.weight"]
    other = tmp_path / "model"
    other.mkdir()
    (other / "config.json").write_bytes((directory / "config.json").read_bytes())
    save_file(tensors, other / "model.safetensors")

    def change(writer):
        writer.add_tensor("rope_freqs.weight", np.ones(4, np.float32))

    write_gguf(other, tmp_path / "m.gguf", change=change)
    with pytest.raises(CheckpointError) as raised:
        hf.load(tmp_path / "m.gguf", weights_of(tmp_path / "m.gguf"))
    assert "missing: model.layers.0.self_attn.v_proj.weight" in str(raised.value)
    assert "extra: rope_freqs.weight" in str(raised.value)


def test_scales_that_are_not_finite_are_named(directory, tmp_path):
    def damaged(tensor, kind):
        data = gguf.quantize(tensor, kind)
        if tensor.ndim == 3:
            data[1, 0, :2] = np.frombuffer(np.float16(np.nan).tobytes(), np.uint8)
        return data

    write_gguf(directory, tmp_path / "m.gguf", Type.Q4_0, damaged)
    weights = weights_of(tmp_path / "m.gguf")
    for quant in (None, "int4g32", "int8"):
        with pytest.raises(NonFiniteError, match=r"experts\.1\.up_proj"):
            hf.load(tmp_path / "m.gguf", weights.quantised(quant))


def test_truncated_files_are_refused_before_anything_is_allocated(path, tmp_path, monkeypatch):
    monkeypatch.setattr(hf, "aligned_empty", lambda *_: pytest.fail("allocated"))
    weights, data = weights_of(path), path.read_bytes()
    tensors = read_file(path).tensors
    header, end = tensors[0].start, tensors[-1].start + tensors[-1].nbytes
    for size in (0, 3, 23, 24, 100, header // 2, header - 1, header, (header + end) // 2, end - 1):
        (tmp_path / "cut.gguf").write_bytes(data[:size])
        with pytest.raises(CheckpointError, match="cut.gguf"):
            hf.load(tmp_path / "cut.gguf", weights)
    for absent in (tmp_path / "absent.gguf", tmp_path / "fifo.gguf"):
        if "fifo" in absent.name:
            os.mkfifo(absent)
        with pytest.raises(CheckpointError):
            moejax.load(absent)


def small_file(version=3, tensors=(("t", (32,), 0, 0),), metadata=b"", count=0, data=128):
    """The bytes of a GGUF file with any header."""
    out = b"GGUF" + struct.pack("<IQQ", version, len(tensors), count) + metadata
    for name, dims, kind, offset in tensors:
        out += struct.pack("<Q", len(name)) + name.encode() + struct.pack("<I", len(dims))
        out += struct.pack(f"<{len(dims)}Q", *dims) + struct.pack("<IQ", kind, offset)
    return out.ljust(-(-len(out) // 32) * 32, b"\0") + bytes(data)


def entry(key, kind, payload):
    return struct.pack("<Q", len(key)) + key.encode() + struct.pack("<I", kind) + payload


HOSTILE = {
    "not a GGUF": b"GGML" + small_file()[4:],
    "version 1": small_file(version=1),
    "version 50331648": small_file(version=3 << 24),
    "ends at byte": small_file(tensors=[("t", (64,), 0, 0)]),
    "shape": small_file(tensors=[("t", (2**62, 2**62), 0, 0)]),
    "has the shape": small_file(tensors=[("t", (0,), 0, 0)]),
    "5 dimensions": small_file(tensors=[("t", (1,) * 5, 0, 0)]),
    "0 dimensions": small_file(tensors=[("t", (), 0, 0)]),
    "type 99": small_file(tensors=[("t", (32,), 99, 0)]),
    "whole blocks of 32": small_file(tensors=[("t", (16, 2), 2, 0)]),
    "not aligned to 32": small_file(tensors=[("t", (8,), 0, 4)]),
    "overlapping": small_file(tensors=[("t", (16,), 0, 0), ("u", (16,), 0, 32)]),
    "'t' twice": small_file(tensors=[("t", (8,), 0, 0), ("t", (8,), 0, 32)]),
    "beyond its end": small_file(tensors=(), count=2**60, data=0),
    "name of": small_file(metadata=struct.pack("<Q", 2**50), count=1),
    "unknown type 77": small_file(metadata=entry("k", 77, b""), count=1),
    "nested arrays": small_file(metadata=entry("k", 9, struct.pack("<IQ", 9, 1)), count=1),
    "its header goes": small_file(metadata=entry("k", 9, struct.pack("<IQ", 4, 2**61)), count=1),
    "truncated: its header": small_file(
        tensors=(), metadata=entry("k", 9, struct.pack("<IQ", 8, 2**61)), count=1, data=0
    ),
    "'k' twice": small_file(metadata=entry("k", 0, b"1") * 2, count=2),
    "alignment 33": small_file(
        metadata=entry("general.alignment", 4, struct.pack("<I", 33)), count=1
    ),
}


@pytest.mark.parametrize("why", HOSTILE)
def test_hostile_headers_are_refused(why, tmp_path):
    path = tmp_path / "bad.gguf"
    path.write_bytes(HOSTILE[why])
    with pytest.raises(CheckpointError, match=why):
        read_file(path)


def test_the_small_file_itself_is_read(tmp_path):
    (tmp_path / "good.gguf").write_bytes(small_file())
    (tensor,) = read_file(tmp_path / "good.gguf").tensors
    assert (tensor.name, tensor.shape, tensor.dtype, tensor.nbytes) == ("t", (32,), "F32", 128)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_damaged_headers_raise_nothing_else(data, directory, tmp_path_factory):
    base = tmp_path_factory.getbasetemp() / "damaged"
    base.mkdir(exist_ok=True)
    path = base / "m.gguf"
    if not path.exists():
        write_gguf(directory, path)
    good = path.read_bytes()
    header = read_file(path).tensors[0].start
    # Behind the vocabulary, or the few keys before it: nothing else is looked at.
    at = data.draw(st.one_of(st.integers(0, 900), st.integers(header - 1600, header - 1)))
    bad = bytearray(good)
    bad[at] = data.draw(st.integers(0, 255))
    other = base / "bad.gguf"
    other.write_bytes(bad)
    try:
        hf.load(other, weights_of(other))
    except moejax.errors.MoejaxError:
        pass


def test_errors_are_measured_against_the_decoded_weights(directory, tmp_path):
    stored = write_gguf(directory, tmp_path / "m.gguf", Type.Q8_0)
    weights = weights_of(tmp_path / "m.gguf")
    table = convert.convert_directory(
        tmp_path / "m.gguf", tmp_path / "out", weights, quant="int4", group=64
    )
    v = stored["blk.0.attn_v.weight"]
    assert table["attention/v"]["mean"] == pytest.approx(
        error(v, MatrixLayout(*v.shape, "int4g64")), rel=1e-6
    )
