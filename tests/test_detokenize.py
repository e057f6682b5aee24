"""Streamed text and stop strings against the text of all tokens at once."""

import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from text_models import (
    DECODERS,
    LLAMA,
    REAL,
    assert_stream_is_decode,
    byte_level_backend,
    llama_backend,
    real_text,
    streamed,
)
from tokenizers import Tokenizer as Backend
from tokenizers import pre_tokenizers

from moejax.errors import InputError
from moejax.text import StopStrings, StreamDecoder, Tokenizer


@pytest.fixture(scope="module")
def byte_level():
    return Tokenizer(byte_level_backend())


@pytest.fixture(scope="module", params=REAL)
def real(request):
    return Tokenizer(Backend.from_str(real_text(request.param)))


def random_ids(vocabulary):
    return st.lists(st.integers(0, vocabulary + 3), max_size=24)


@settings(max_examples=200, deadline=None)
@given(data=st.data(), skip=st.booleans())
def test_a_byte_level_stream_is_the_decoded_whole(byte_level, data, skip):
    ids = data.draw(random_ids(byte_level.vocab_size))
    assert_stream_is_decode(byte_level, ids, skip)


def letters_of_bytes():
    """The letter of each byte, asked of the encoder: every byte occurs in some character."""
    encoder = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    points = [*range(0x800), *range(0x800, 0xD800, 64), *range(0xE000, 0x110000, 0x1000)]
    letters = {}
    for character in map(chr, points):
        word = encoder.pre_tokenize_str(character)[0][0]
        letters.update(zip(character.encode(), word, strict=True))
    unused = sorted(set(pre_tokenizers.ByteLevel.alphabet()) - set(letters.values()))
    return letters | dict(zip(sorted(set(range(256)) - letters.keys()), unused, strict=True))


LETTER_OF = letters_of_bytes()
BROKEN_UTF8 = b"a\x80\xbf\xc2\xe2\x82\xac\xed\xa0\xf0\x9f\x99\x82\xf4\xff"


def token_id(tokenizer):
    return tokenizer.backend.token_to_id


@settings(max_examples=150, deadline=None)
@given(raw=st.lists(st.one_of(st.sampled_from(BROKEN_UTF8), st.integers(0, 255)), max_size=24))
def test_invalid_utf8_is_replaced_as_in_the_whole(byte_level, raw):
    ids = [token_id(byte_level)(LETTER_OF[byte]) for byte in raw]
    pieces, rest = assert_stream_is_decode(byte_level, ids)
    assert "".join(pieces) + rest == bytes(raw).decode(errors="replace")


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=30))
def test_any_text_streams_back_without_partial_characters(byte_level, text):
    pieces, rest = assert_stream_is_decode(byte_level, byte_level.encode(text))
    assert "".join(pieces) + rest == text
    assert rest == ""
    if "\ufffd" not in text:
        assert all("\ufffd" not in piece for piece in pieces)


def test_text_comes_out_as_soon_as_it_is_certain(byte_level):
    ids = [byte_level.backend.token_to_id(LETTER_OF[byte]) for byte in "a🙂b".encode()]
    assert streamed(byte_level, ids) == (["a", "", "", "", "🙂", "b"], "")
    assert streamed(byte_level, ids[:3]) == (["a", "", ""], "\ufffd")
    llama = Tokenizer(llama_backend(LLAMA))
    by_name = llama.backend.token_to_id
    ids = [by_name(f"<0x{byte:02X}>") for byte in "🙂".encode()] + [by_name("a")]
    assert streamed(llama, ids) == (["", "", "", "", "🙂a"], "")
    broken = [by_name("<0xC3>"), by_name("<0x28>"), by_name("<0x41>"), by_name("a")]
    assert streamed(llama, broken) == (["", "\ufffd\ufffd", "\ufffd", "a"], "")


@pytest.mark.parametrize("name", DECODERS)
@settings(max_examples=80, deadline=None)
@given(data=st.data(), skip=st.booleans())
def test_a_stream_of_any_decoder_is_the_decoded_whole(name, data, skip):
    tokenizer = LLAMA_LIKE[name]
    pieces = st.integers(259, tokenizer.vocab_size + 1)
    byte = st.sampled_from([3 + b for b in b"a\x80\xbf\xc3\xa9\xe2\x82\xac\xf0\x9f\x99\x82\xff"])
    ids = data.draw(st.lists(st.one_of(pieces, byte, st.integers(0, 2)), max_size=14))
    assert_stream_is_decode(tokenizer, ids, skip)


LLAMA_LIKE = {name: Tokenizer(llama_backend(decoder)) for name, decoder in DECODERS.items()}


def test_a_tokenizer_without_decoder_joins_tokens_with_spaces():
    backend = llama_backend(LLAMA)
    backend.decoder = None
    tokenizer = Tokenizer(backend)
    assert_stream_is_decode(tokenizer, [260, 1, 261, 262])
    assert streamed(tokenizer, [1, 260, 261])[0] == ["", "a", " b"]


def test_a_flushed_stream_begins_another_sequence():
    tokenizer = LLAMA_LIKE["llama"]
    stream = StreamDecoder(tokenizer)
    for _ in range(2):
        assert stream.push(token_id(tokenizer)("▁a")) == "a"
        assert stream.push(token_id(tokenizer)("▁a")) == " a"
        assert stream.push(token_id(tokenizer)("<0xE2>")) == ""
        assert stream.flush() == "\ufffd"
    buffered = StreamDecoder(LLAMA_LIKE["word piece"])
    assert [buffered.push(260), buffered.flush(), buffered.flush()] == ["", "a", ""]


def test_a_negative_id_is_refused(byte_level):
    with pytest.raises(InputError, match="-1"):
        StreamDecoder(byte_level).push(-1)
    with pytest.raises(InputError, match="-1"):
        byte_level.decode([3, -1])


def test_the_time_of_a_token_does_not_grow_with_the_text(byte_level):
    ids = byte_level.encode("the cat 🙂 sat ") * 400
    stream = StreamDecoder(byte_level)
    calls = []

    def profile(frame, event, argument):
        calls.append(event)

    sizes = []
    for token in ids:
        before = len(calls)
        sys.setprofile(profile)
        stream.push(token)
        sys.setprofile(None)
        sizes.append(len(calls) - before)
    assert len(ids) > 2000
    assert max(sizes[-500:]) <= max(sizes[:500])
    held = [stage.__dict__ for stage in stream._stages]
    assert len(str(held)) < 1000 and not stream._waiting


@settings(max_examples=30, deadline=None)
@given(data=st.data(), text=st.text(max_size=20))
def test_real_tokenizers_stream_as_they_decode(real, data, text):
    ids = data.draw(random_ids(real.vocab_size)) + real.encode(text)
    for skip in (True, False):
        assert_stream_is_decode(real, ids, skip)


def stop_oracle(text, stops):
    """Whole text: the stop that ends first, the longest of those that end there."""
    for end in range(len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            stop = max(ending, key=len)
            return text[: end - len(stop)], stop
    return text, None


@settings(max_examples=400, deadline=None)
@given(
    st.lists(st.text("abc", max_size=4), max_size=12),
    st.lists(st.text("abc", min_size=1, max_size=5), max_size=4),
)
def test_stop_strings_cut_as_on_the_whole_text(pieces, stops):
    stream = StopStrings(stops)
    emitted = ""
    stopped = False
    so_far = ""
    for piece in pieces:
        text, stopped = stream.push(piece)
        emitted += text
        so_far += piece
        expected, matched = stop_oracle(so_far, stops)
        assert stopped == (matched is not None)
        assert expected.startswith(emitted)
        if not stopped:
            held = so_far[len(emitted) :]
            assert not held or any(stop.startswith(held) for stop in stops)
    emitted += stream.flush()
    assert (emitted, stream.matched) == stop_oracle("".join(pieces), stops)


def test_stop_strings_across_token_borders():
    stream = StopStrings(["\n\nUser:", "</s>"])
    assert [stream.push(text) for text in ("Hi", " <", "b>\n", "\nUs", "er", ": x")] == [
        ("Hi", False),
        (" ", False),
        ("<b>", False),
        ("", False),
        ("", False),
        ("", True),
    ]
    assert (stream.matched, stream.flush(), stream.push("more")) == ("\n\nUser:", "", ("", True))


def test_overlapping_stop_strings():
    # "bc" is complete before "abcd": what ends first counts, in pieces or whole.
    for pieces in (["xabcd"], list("xabcd"), ["xab", "cd"]):
        stream = StopStrings(["abcd", "bc"])
        assert "".join(stream.push(piece)[0] for piece in pieces) == "xa"
        assert stream.matched == "bc"
    stream = StopStrings(["b", "ab"])
    assert stream.push("xab") == ("x", True)
    assert stream.matched == "ab"


def test_stop_strings_must_not_be_empty():
    with pytest.raises(InputError, match="non-empty"):
        StopStrings(["a", ""])
    assert StopStrings([]).push("text") == ("text", False)
    assert StopStrings("ab").push("cab") == ("c", True)
