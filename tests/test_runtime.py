"""The Python surface: load, generate, stream, logits, sessions, and what they refuse."""

import dataclasses
import json
import pathlib
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cli_models import damage, write_model
from conftest import small_config

import moejax
from moejax import decode, devices, generate, units
from moejax.checkpoints import convert
from moejax.errors import (
    BudgetError,
    CheckpointError,
    ConfigError,
    HubError,
    InputError,
    NonFiniteError,
    PolicyError,
    TokenizerError,
    UnsupportedModelError,
)
from moejax.generate import generate_step
from moejax.layout import aligned_empty
from moejax.models.family import weight_map
from moejax.models.qwen3_moe import FAMILY
from moejax.policies.placement import HostAll
from moejax.session import Session


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> pathlib.Path:
    return write_model(tmp_path_factory.mktemp("models") / "model")


@pytest.fixture(scope="module")
def runtime(directory):
    return moejax.load(directory, slots=5, context=128)


def test_stream_generate_and_a_loop_of_ones_own_agree(runtime):
    prompt = [3, 1, 4, 1, 5]
    pieces = list(runtime.stream(prompt, 12, {"temperature": 0.0}))
    whole = runtime.generate([prompt], 12, {"temperature": 0.0})[0]
    assert whole.text == "".join(p.text for p in pieces)
    assert whole.tokens == tuple(p.token for p in pieces)
    fixed = (runtime.model, runtime.policy, runtime.params, runtime.store)
    state = runtime.init_state()
    state, logits, _ = moejax.prefill(*fixed, state, [np.array(prompt, np.int32)])
    own = []
    for _ in whole.tokens:
        token = jnp.argmax(logits, -1).astype(jnp.int32)[:, None]
        own.append(int(token[0, 0]))
        state, out = moejax.decode_step(*fixed, state, token)
        logits = out.logits
    assert own == [t.id for t in whole.tokens]


def test_logits_agree_with_generation(runtime):
    result = runtime.generate([[1, 2, 3]], 4, {"temperature": 0.0}, logprobs=2)[0]
    ids = [1, 2, 3] + [t.id for t in result.tokens]
    logits = runtime.logits(np.array([ids, [5, -1] + [-1] * (len(ids) - 2)]))
    assert logits.shape == (2, len(ids), runtime.config.vocab_size)
    assert logits.dtype == np.float32
    for i, token in enumerate(result.tokens):
        row = logits[0, 2 + i].astype(np.float64)
        row = row - np.log(np.exp(row - row.max()).sum()) - row.max()
        assert abs(row[token.id] - token.logprob) < 0.03
        assert token.top_logprobs[0] == (token.id, pytest.approx(token.logprob, abs=1e-6))


def test_stats_add_up(runtime):
    runtime.generate([[1, 2, 3], [4]], 6, {"temperature": 0.0})
    stats = runtime.stats
    assert (stats.prompt_tokens, stats.new_tokens, stats.steps) == (4, 12, 5)
    assert 0 <= stats.hits <= stats.needed <= 5 * 2 * 2 * runtime.config.num_moe_layers
    missed = stats.needed - stats.hits + stats.prefill_needed - stats.prefill_hits
    assert stats.fetched == missed
    assert stats.bytes_moved == missed * runtime.store.layout.stride
    assert stats.label == "bit-exact" and stats.replaced_mass == 0
    assert stats.ttft > 0 and stats.tpot > 0
    json.dumps(stats.as_dict())


def test_seeds_and_batch_positions(runtime):
    settings = {"temperature": 1.0, "top_k": 0}
    one = runtime.generate([[7, 8]], 8, settings, seed=3)
    again = runtime.generate([[7, 8]], 8, settings, seed=3)
    other = runtime.generate([[7, 8]], 8, settings, seed=4)
    assert one == again
    assert one != other


def test_fetches_that_are_only_counted_say_so(directory):
    plain = moejax.load(directory, slots=5, context=128)
    virtual = moejax.load(directory, slots=5, context=128, virtual=True)
    for runtime in (plain, virtual):
        runtime.generate([[1, 2, 3]], 5, {"temperature": 0.0})
    assert virtual.stats.fetched == plain.stats.fetched > 0
    assert (plain.stats.virtual, virtual.stats.virtual) == (False, True)


def test_host_experts_are_counted(directory):
    policy = dataclasses.replace(moejax.load(directory).policy, placement=HostAll())
    runtime = moejax.load(directory, slots=5, context=128, policy=policy)
    runtime.generate([[1, 2, 3]], 5, {"temperature": 0.0})
    stats = runtime.stats
    assert stats.host == stats.needed + stats.prefill_needed > 0
    assert stats.fetched == 0


def test_stop_tokens_and_strings_end_a_sequence(runtime):
    free = runtime.generate([[9, 2], [3]], 10, {"temperature": 0.0})
    text = free[0].text
    cut = text[len(text) // 2 : len(text) // 2 + 2]
    stopped = runtime.generate([[9, 2], [3]], 10, {"temperature": 0.0}, stop=cut)
    assert stopped[0].finish_reason == "stop"
    assert stopped[0].text == text[: text.index(cut)]
    if cut not in free[1].text:
        assert stopped[1] == free[1]
    eos = free[1].tokens[4].id
    runtime.generation_config["eos_token_id"] = [eos]
    try:
        ended = runtime.generate([[3]], 10, {"temperature": 0.0})[0]
    finally:
        del runtime.generation_config["eos_token_id"]
    first = [t.id for t in free[1].tokens].index(eos)
    assert ended.finish_reason == "eos"
    assert [t.id for t in ended.tokens] == [t.id for t in free[1].tokens][: first + 1]


def test_repetition_penalty_counts_the_prompt(runtime):
    plain = runtime.generate([[1, 2]], 1, {"temperature": 0.0})[0].tokens[0].id
    strong = {"temperature": 0.0, "repetition_penalty": 50.0}
    penalised = runtime.generate([[1, plain]], 6, strong)[0]
    ids = [t.id for t in penalised.tokens]
    assert len(set(ids)) == 6 and plain not in ids and 1 not in ids


def test_a_session_prefills_a_shared_prefix_once(runtime):
    session = Session(runtime)
    first = "".join(p.text for p in session.send("one", 8, {"temperature": 0.0}))
    assert session.reused_tokens == 0
    assert session.messages[-1] == {"role": "assistant", "content": first}
    list(session.send("two", 8, {"temperature": 0.0}))
    assert session.reused_tokens > 10
    fresh = Session(runtime)
    fresh.messages = session.messages[:2]
    answer = "".join(p.text for p in fresh.send("two", 8, {"temperature": 0.0}))
    assert answer == session.messages[-1]["content"]


def test_a_session_survives_failures(runtime, monkeypatch):
    session = Session(runtime)
    list(session.send("one", 6, {"temperature": 0.0}))
    before = list(session.messages)
    with pytest.raises(InputError, match="temperature"):
        list(session.send("two", 6, {"temperature": -1.0}))
    list(session.send("two", 6, {"temperature": 0.0}))
    assert session.reused_tokens > 10
    want = session.messages[-1]
    for after in (0, 2):
        session.messages = list(before)
        with monkeypatch.context() as patched:
            steps = iter([generate.generate_step] * after)
            patched.setattr(generate, "generate_step", lambda *a, s=steps, **k: broken(s, a, k))
            with pytest.raises(KeyboardInterrupt):
                list(session.send("two", 6, {"temperature": 0.0}))
        assert session.messages == before
        list(session.send("two", 6, {"temperature": 0.0}))
        assert session.messages[-1] == want


def broken(steps, arguments, options):
    """A step that is interrupted after it has consumed its state."""
    step = next(steps, None)
    if step is not None:
        return step(*arguments, **options)
    generate_step(*arguments, **options)
    raise KeyboardInterrupt


def test_an_answer_may_be_left_half_way(runtime):
    session = Session(runtime)
    answer = session.send("one", 8, {"temperature": 0.0})
    next(answer)
    answer.close()
    assert session.messages == []
    assert runtime.stats.new_tokens == 1 and runtime.stats.prompt_tokens > 0
    list(session.send("one", 8, {"temperature": 0.0}))
    assert session.reused_tokens > 0


def test_a_conversation_that_fills_the_context_is_refused_whole(runtime):
    session = Session(runtime)
    list(session.send("hello", 4))
    before = list(session.messages)
    with pytest.raises(InputError, match="context"):
        list(session.send("word " * 200, 4))
    assert session.messages == before
    list(session.send("again", 4))


@pytest.mark.parametrize(("batch", "slots"), [(1, 9), (2, 3)])
def test_budget_in_bytes(directory, batch, slots):
    whole = moejax.load(directory, context=128)
    stride, tables = whole.store.layout.stride, 2048
    fixed = devices.workspace_bytes(whole.model, whole.policy, batch, 128)
    kept = (whole.params, whole.init_state(batch).kv)
    fixed += sum(leaf.nbytes for leaf in jax.tree.leaves(kept))
    memory = fixed + slots * stride + stride // 2
    small = moejax.load(directory, device_memory=memory, context=128, batch=batch)
    assert small.slots == slots
    kept = (small.params, small.init_state(batch))
    used = sum(leaf.nbytes for leaf in jax.tree.leaves(kept))
    used += devices.workspace_bytes(small.model, small.policy, batch, 128)
    assert memory - stride < used < memory + tables
    with pytest.raises(BudgetError, match=f"load with batch={batch + 1}"):
        small.generate([[1]] * (batch + 1), 2)


def test_budgets_that_are_too_small(directory):
    with pytest.raises(BudgetError, match="dense weights.*KV cache.*workspace") as refused:
        moejax.load(directory, device_memory="20kB", context=128)
    enough = re.search(r"give at least ([\d.]+ \w+)", str(refused.value))[1]
    assert moejax.load(directory, device_memory=enough, context=128).slots == 2
    with pytest.raises(InputError, match=r"only one of --slots \(slots\)"):
        moejax.load(directory, device_memory="3MB", slots=4)
    with pytest.raises(BudgetError, match="top-2"):
        moejax.load(directory, slots=1)


@pytest.mark.parametrize(
    ("text", "size"), [("6GiB", 6 * 2**30), ("1.5 kb", 1500), ("512M", 512 * 10**6), (77, 77)]
)
def test_sizes(text, size):
    assert units.parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "six", "-1", "1e9", "3 GiBs", 0, -4, True, "0"])
def test_bad_sizes_are_refused(text):
    with pytest.raises(InputError):
        units.parse_bytes(text)


def test_bad_input_is_refused(runtime):
    for prompt in ("", [], [[]], [[1], []]):
        with pytest.raises(InputError):
            runtime.generate(prompt)
    with pytest.raises(InputError, match="token ids must be in"):
        runtime.generate([[0, runtime.config.vocab_size]])
    with pytest.raises(InputError, match="token ids must be in"):
        runtime.generate([[0, -1]])
    with pytest.raises(InputError, match="context of 128"):
        runtime.generate([[1] * 100], 40)
    with pytest.raises(InputError, match="max_new_tokens"):
        runtime.generate([[1]], 0)
    for prompt in (None, 5, b"ab", [1.7, 2.2], [True], [["a"]], [2**40], [2**70], [[1], None]):
        with pytest.raises(InputError):
            runtime.generate(prompt, 2)
    for seed in (-1, 2**32, 2**63):
        with pytest.raises(InputError, match="seed"):
            runtime.generate([[1]], 2, seed=seed)
    for tokens in ([1, 2], [[0.5]], [[-1, 2]], [[10**6]], [[-2]], [[2**32 + 5]], np.zeros((0, 3))):
        with pytest.raises(InputError):
            runtime.logits(np.array(tokens))
    with pytest.raises(InputError, match="temperature"):
        runtime.generate([[1]], 2, {"temperature": -1})


def test_bad_loads_are_refused(directory, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="dtype"):
        moejax.load(directory, dtype="float16")
    with pytest.raises(PolicyError, match="known: .*lru"):
        moejax.load(directory, policy="clairvoyant")
    for context in (10**6, 0, -1, 100.5):
        with pytest.raises(InputError, match="context"):
            moejax.load(directory, context=context)
    for slots in (2.5, "5"):
        with pytest.raises(InputError, match="whole numbers"):
            moejax.load(directory, slots=slots)
    limited = moejax.load(directory, slots=5, context=100)
    with pytest.raises(InputError, match="context of 100"):
        limited.generate([[1] * 98], 4)
    with pytest.raises(CheckpointError, match="no directory"):
        moejax.load("nowhere at all")
    with pytest.raises(CheckpointError, match="is a file"):
        moejax.load(directory / "config.json")
    with pytest.raises(ConfigError, match="config.json is missing"):
        moejax.load(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="no directory here and no model in the local.*go online"):
        moejax.load("nobody/no-such-model")


def altered(directory, tmp_path, **changes) -> pathlib.Path:
    """A copy of the model with another config.json."""
    copy = tmp_path / "copy"
    shutil.copytree(directory, copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | changes))
    return copy


def test_unknown_families_and_quantised_models_are_refused(directory, tmp_path):
    with pytest.raises(UnsupportedModelError, match="'rwkv' is not supported; known: .*qwen3_moe"):
        moejax.load(altered(directory, tmp_path / "a", model_type="rwkv"))
    with pytest.raises(UnsupportedModelError, match="quantised.*awq"):
        moejax.load(altered(directory, tmp_path / "b", quantization_config={"quant_method": "awq"}))
    with pytest.raises(CheckpointError, match="missing"):
        moejax.load(altered(directory, tmp_path / "c", num_experts=9))


def test_damaged_weights_are_refused(directory, tmp_path):
    for name in ("model.embed_tokens.weight", "model.layers.1.mlp.experts.3.up_proj.weight"):
        copy = tmp_path / name
        shutil.copytree(directory, copy)
        damage(copy, name)
        with pytest.raises(NonFiniteError, match=name):
            moejax.load(copy)
    damage(copy, "model.norm.weight")
    poisoned = moejax.load(copy, check_finite=False, slots=5, context=128)
    with pytest.raises(NonFiniteError, match="logits"):
        poisoned.generate([[1, 2]], 3)
    with open(copy / "model.safetensors", "r+b") as file:
        file.truncate(10_000)
    with pytest.raises(CheckpointError, match="truncated|size"):
        moejax.load(copy)


def test_without_a_tokenizer_token_ids_still_work(directory, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(directory, copy)
    (copy / "tokenizer.json").unlink()
    runtime = moejax.load(copy, slots=4, context=128)
    assert len(runtime.generate([[1, 2]], 3)[0].tokens) == 3
    with pytest.raises(TokenizerError, match="tokenizer"):
        runtime.generate("text")


def test_a_converted_directory_gives_the_same_bits(directory, tmp_path, runtime):
    target = tmp_path / "converted"
    weights = weight_map(runtime.config, FAMILY.rules, "bfloat16")
    convert.convert_directory(directory, target, weights)
    converted = moejax.load(target, slots=5, context=128)
    tokens = np.arange(40, dtype=np.int32)[None] % runtime.config.vocab_size
    assert np.array_equal(runtime.logits(tokens), converted.logits(tokens))
    with open("/proc/self/maps") as maps:
        spans = [line.split()[0].split("-") for line in maps if "experts.bank" in line]
    address = converted.store.records.unsafe_buffer_pointer()
    assert any(int(start, 16) <= address < int(end, 16) for start, end in spans)


def test_loading_makes_no_second_copy():
    flat = {"embed/weight": aligned_empty((64, 32), np.float32)}
    flat["embed/weight"][:] = 1
    params = devices.dense_params(flat)
    assert params["embed"]["weight"].unsafe_buffer_pointer() == flat["embed/weight"].ctypes.data
    records = aligned_empty((8, 2048), np.uint16)
    records[:] = 0
    config = small_config(expert_width=8)
    store = devices.store(config, records, "bfloat16", on_device=True)
    assert store.records.unsafe_buffer_pointer() == records.ctypes.data


def test_float32_computes_in_float32(directory):
    runtime = moejax.load(directory, dtype="float32", context=128)
    assert runtime.store.records.dtype == jnp.uint32
    held = {p.dtype.name for g in runtime.params.values() for p in g.values()}
    assert held == {"uint32"}
    assert decode.capacity(runtime.init_state()) == 128
