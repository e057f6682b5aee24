"""Tokenizer files of a model directory, against transformers where it can read them."""

import json
import subprocess
import sys

import pytest
from text_models import (
    LLAMA,
    REAL,
    SHARED,
    assert_stream_is_decode,
    byte_level_backend,
    llama_backend,
    real_text,
)
from tokenizers import Tokenizer as Backend

from moejax.errors import InputError, TokenizerError
from moejax.text import Tokenizer, eos_ids_from


@pytest.fixture(scope="module")
def byte_level():
    return Tokenizer(byte_level_backend())


@pytest.fixture(scope="module", params=REAL)
def real(request):
    return Tokenizer(Backend.from_str(real_text(request.param)))


CONFIG = {
    "tokenizer_class": "TokenizersBackend",
    "bos_token": "<bos>",
    "eos_token": {"__type": "AddedToken", "content": "<|im_end|>", "lstrip": False},
    "pad_token": None,
}


def write(directory, **files):
    for name, content in files.items():
        name = {"jinja": "chat_template.jinja"}.get(name, f"{name}.json")
        text = content if isinstance(content, str) else json.dumps(content)
        (directory / name).write_text(text, encoding="utf-8")
    return directory


@pytest.fixture
def directory(tmp_path):
    return write(tmp_path, tokenizer=byte_level_backend().to_str(), tokenizer_config=CONFIG)


def test_a_directory_gives_ids_and_text(directory):
    tokenizer = Tokenizer.load(directory)
    by_name = tokenizer.backend.token_to_id
    assert (tokenizer.bos_id, tokenizer.pad_id) == (by_name("<bos>"), None)
    assert tokenizer.eos_ids == (by_name("<|im_end|>"),)
    assert tokenizer.vocab_size == tokenizer.backend.get_vocab_size() > 256
    ids = tokenizer.encode("the cat<|im_end|>")
    assert ids[-1] == by_name("<|im_end|>")
    assert tokenizer.decode(ids) == "the cat"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "the cat<|im_end|>"


def test_generation_config_decides_the_end_then_config_then_the_tokenizer(directory):
    write(directory, config={"eos_token_id": 7, "pad_token_id": 9, "model_type": "x"})
    tokenizer = Tokenizer.load(directory)
    assert (tokenizer.eos_ids, tokenizer.pad_id) == ((7,), 9)
    write(directory, generation_config={"eos_token_id": [1, 3], "pad_token_id": 8})
    tokenizer = Tokenizer.load(directory)
    assert (tokenizer.eos_ids, tokenizer.pad_id) == ((1, 3), 8)


def test_end_of_sequence_ids_are_an_int_or_a_list():
    assert eos_ids_from({"eos_token_id": 2}) == (2,)
    assert eos_ids_from({"eos_token_id": [5, 2]}) == (5, 2)
    assert eos_ids_from({"eos_token_id": None}) == eos_ids_from({}) == ()
    for bad in ("</s>", [1, "2"], -1, True, 2**40):
        with pytest.raises(InputError, match="eos_token_id"):
            eos_ids_from({"eos_token_id": bad})


def test_special_tokens_come_from_the_old_file_too(directory):
    write(directory, tokenizer_config={}, special_tokens_map={"bos_token": {"content": "<bos>"}})
    assert Tokenizer.load(directory).special_tokens == {"bos_token": "<bos>"}


def test_a_first_token_is_put_in_front_once(directory):
    assert Tokenizer.load(directory).encode("a")[0] != 0
    write(directory, tokenizer_config={**CONFIG, "add_bos_token": True})
    tokenizer = Tokenizer.load(directory)
    plain = tokenizer.encode("a", add_special_tokens=False)
    assert tokenizer.encode("a") == [tokenizer.bos_id, *plain]
    llama = Tokenizer(llama_backend(LLAMA), config={"bos_token": "<s>", "add_bos_token": True})
    assert llama.encode("a") == [1, llama.backend.token_to_id("▁"), llama.backend.token_to_id("a")]


def test_truncation_and_padding_of_the_file_do_not_apply(directory):
    backend = byte_level_backend()
    backend.enable_truncation(4)
    backend.enable_padding(length=64)
    write(directory, tokenizer=backend.to_str())
    assert len(Tokenizer.load(directory).encode("z" * 10)) == 10


def test_added_tokens_of_the_config_are_known_as_to_transformers(directory):
    from transformers import AutoTokenizer

    think = byte_level_backend().token_to_id("<think>")
    declared = {
        think: {"content": "<think>", "special": True, "normalized": False},
        think + 3: {"content": "<extra>", "special": False, "normalized": False},
    }
    declared = {
        str(i): {"lstrip": False, "rstrip": False, "single_word": False, **token}
        for i, token in declared.items()
    }
    write(directory, tokenizer_config={**CONFIG, "added_tokens_decoder": declared})
    ours = Tokenizer.load(directory)
    theirs = AutoTokenizer.from_pretrained(directory)
    text = "<bos>the <think>東京 <extra> 🙂<|im_end|>"
    ids = ours.encode(text)
    assert think in ids and think + 3 in ids
    assert ids == theirs.encode(text)
    for skip in (True, False):
        assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip)
        assert_stream_is_decode(ours, ids, skip)
    assert "<think>" not in ours.decode(ids)
    declared["399"] = {**declared[str(think)], "content": "<think2>"}
    write(directory, tokenizer_config={**CONFIG, "added_tokens_decoder": declared})
    with pytest.raises(TokenizerError, match="<think2>.*399"):
        Tokenizer.load(directory)


def test_unusable_directories_say_what_to_do(tmp_path):
    with pytest.raises(TokenizerError, match="neither tokenizer.json nor tokenizer.model; copy"):
        Tokenizer.load(tmp_path)
    write(tmp_path, tokenizer="{broken")
    with pytest.raises(TokenizerError, match="tokenizer.json cannot be read.*copy it again"):
        Tokenizer.load(tmp_path)
    write(tmp_path, tokenizer=byte_level_backend().to_str(), tokenizer_config="{broken")
    with pytest.raises(TokenizerError, match="tokenizer_config.json is not valid JSON"):
        Tokenizer.load(tmp_path)
    write(tmp_path, tokenizer_config="[]")
    with pytest.raises(TokenizerError, match="tokenizer_config.json does not hold"):
        Tokenizer.load(tmp_path)


TOKEN = {"content": "<think>", "special": True}


@pytest.mark.parametrize(
    ("file", "content", "named"),
    [
        ("tokenizer_config", {"added_tokens_decoder": {"x": TOKEN}}, "added_tokens_decoder"),
        ("tokenizer_config", {"added_tokens_decoder": [TOKEN]}, "added_tokens_decoder"),
        ("tokenizer_config", {"added_tokens_decoder": {"1": "<think>"}}, "added_tokens_decoder"),
        ("tokenizer_config", {"added_tokens_decoder": {"1": {"odd": 1}}}, "the id 1"),
        ("tokenizer_config", {"added_tokens_decoder": {"1": {"content": 5}}}, "added_tokens_dec"),
        ("tokenizer_config", {"bos_token": 5}, "bos_token"),
        ("tokenizer_config", {"unk_token": ["<unk>"]}, "unk_token"),
        ("tokenizer_config", {"eos_token": "\ud800"}, "eos_token"),
        ("special_tokens_map", {"bos_token": 5}, "bos_token"),
        ("special_tokens_map", {"pad_token": {"content": 5}}, "pad_token"),
        ("tokenizer_config", {"chat_template": 5}, "chat_template"),
        ("tokenizer_config", {"chat_template": {"default": "x"}}, "chat_template"),
        ("tokenizer_config", {"chat_template": ["x"]}, "chat_template"),
        ("tokenizer_config", {"chat_template": [{"name": "default"}]}, "chat_template"),
        ("tokenizer_config", {"chat_template": [{"template": "x"}]}, "chat_template"),
        ("tokenizer_config", {"chat_template": [{"name": [], "template": "x"}]}, "chat_template"),
        ("tokenizer_config", "[" * 10**5, "tokenizer_config.json is not valid JSON"),
        ("generation_config", {"bos_token_id": "x"}, "bos_token_id"),
        ("generation_config", {"pad_token_id": -2}, "pad_token_id"),
        ("generation_config", {"pad_token_id": 2**40}, "pad_token_id"),
        ("config", {"bos_token_id": [1]}, "bos_token_id"),
    ],
)
def test_odd_values_in_the_files_say_what_to_do(file, content, named, directory):
    write(directory, **{"tokenizer_config": {}, file: content})
    with pytest.raises(TokenizerError, match=f"{named}.*copy .* again"):
        Tokenizer.load(directory)


def test_an_id_of_minus_one_is_none(directory):
    write(directory, tokenizer_config={}, generation_config={"pad_token_id": -1})
    assert Tokenizer.load(directory).pad_id is None


def test_a_template_that_is_not_text_is_refused(directory):
    (directory / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(TokenizerError, match="not UTF-8.*copy it again"):
        Tokenizer.load(directory)


def test_a_sentencepiece_model_is_converted_or_the_way_out_is_named(tmp_path):
    source = SHARED / "mixtral_8x7b_tokenizer.model.v1"
    if not source.is_file():
        pytest.skip(f"{source} is not here")
    (tmp_path / "tokenizer.model").write_bytes(source.read_bytes())
    write(tmp_path, tokenizer_config={"tokenizer_class": "LlamaTokenizer"})
    try:
        import sentencepiece
    except ImportError:
        with pytest.raises(TokenizerError, match="pip install sentencepiece"):
            Tokenizer.load(tmp_path)
        return
    tokenizer = Tokenizer.load(tmp_path)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.vocab_size) == (1, (2,), 32000)
    for text in ("Hello wörld  東京 🙂\n", " lead", "  lead", " ", "e\u0301\u200d", "a    b\t c\n"):
        assert tokenizer.encode(text) == [1, *pieces.encode(text)]
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert_stream_is_decode(tokenizer, tokenizer.encode(text))
    assert tokenizer.encode("a</s>")[-1] == 2
    (tmp_path / "tokenizer.model").write_bytes(b"broken")
    with pytest.raises(TokenizerError, match="tokenizer.model cannot be read"):
        Tokenizer.load(tmp_path)


def test_text_that_is_not_unicode_is_refused(byte_level):
    for bad in ("\ud800", 3, None):
        with pytest.raises(InputError, match="unicode"):
            byte_level.encode(bad)


def test_real_tokenizers_encode_and_decode(real):
    for text in ("def f(x):\n    return x + 1\n", "naïve 東京 🙂👩‍👩‍👧 ", "  two  spaces"):
        assert real.decode(real.encode(text)) == text


def test_transformers_is_not_imported():
    code = (
        "import sys, moejax.text as t; from tokenizers import Tokenizer as B, models\n"
        "k = t.Tokenizer(B(models.BPE()), chat_templates={'default': '{{ messages[0].role }}'})\n"
        "assert k.apply_chat_template([{'role': 'user'}]) == 'user'\n"
        "assert 'transformers' not in sys.modules, 'transformers'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
