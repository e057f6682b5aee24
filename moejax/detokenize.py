"""Decoders of the `tokenizers` library as streams: text comes out as soon as it is certain.

A stage takes the next pieces of text and whether they are the last, and returns the pieces that
are certain. Put end to end, what it returns is what the library returns for all tokens at once.
"""

import codecs
import re
from collections.abc import Mapping
from typing import Any


def _byte_letters() -> dict[str, int]:
    """The letters of byte-level BPE: printable bytes are themselves, others follow U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + i): byte for i, byte in enumerate(others)
    }


BYTE_OF_LETTER = _byte_letters()
BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
REPLACEMENT = "\ufffd"


def decoder_stages(spec: Mapping[str, Any] | None) -> list[Any] | None:
    """The stages of a decoder, each taking pieces of text and `last`; None where one is unknown."""
    if spec is None:
        return [_Spaces()]
    stages: list[Any] = []
    fused = False
    for part in spec["decoders"] if spec["type"] == "Sequence" else [spec]:
        match part:
            case {"type": "Fuse"}:
                fused = True
            case {"type": "ByteLevel"} if not fused:
                stages.append(_ByteLevel())
                fused = True
            case {"type": "ByteFallback"} if not fused:
                stages.append(_ByteFallback())
            case {"type": "Metaspace"} if not fused:
                stages.append(_Metaspace(part["replacement"], part["prepend_scheme"] != "never"))
            case {"type": "Replace", "pattern": {"String": old}} if len(old) == 1 or not fused:
                stages.append(_Replace(old, part["content"]))
            case {"type": "Strip", "stop": 0}:
                stages.append(_Strip(part["content"], part["start"], fused))
            case _:
                return None
    return stages


class _Spaces:
    """No decoder: tokens with spaces between them."""

    def __init__(self) -> None:
        self._first = True

    def __call__(self, pieces: list[str], last: bool) -> list[str]:
        out = pieces if self._first else [f" {piece}" for piece in pieces]
        self._first = self._first and not pieces
        return out


class _ByteLevel:
    """Letters that stand for bytes; a token with any other letter stands for itself."""

    def __init__(self) -> None:
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def __call__(self, pieces: list[str], last: bool) -> list[str]:
        return [self._utf8.decode(b"".join(map(self._bytes, pieces)), last)]

    def _bytes(self, piece: str) -> bytes:
        try:
            return bytes(BYTE_OF_LETTER[letter] for letter in piece)
        except KeyError:
            return piece.encode()


class _ByteFallback:
    """Runs of <0xNN> tokens are UTF-8 as a whole, or else one U+FFFD for each byte of the run."""

    def __init__(self) -> None:
        self._begin()

    def _begin(self) -> None:
        self._utf8 = codecs.getincrementaldecoder("utf-8")("strict")
        self._text: str | None = ""  # of the run so far; None once it cannot become valid
        self._length = 0

    def __call__(self, pieces: list[str], last: bool) -> list[str]:
        out = []
        for piece in pieces:
            if byte := BYTE_TOKEN.fullmatch(piece):
                out.append(self._add(bytes([int(byte[1], 16)])))
            else:
                out += [self._end(), piece]
        if last:
            out.append(self._end())
        return [piece for piece in out if piece]  # later stages count pieces

    def _add(self, byte: bytes) -> str:
        if self._text is None:
            return REPLACEMENT
        self._length += 1
        try:
            self._text += self._utf8.decode(byte)
        except UnicodeDecodeError:
            self._text = None
            return REPLACEMENT * self._length
        return ""

    def _end(self) -> str:
        text = self._text
        if text is None:
            text = ""
        elif self._utf8.getstate()[0]:
            text = REPLACEMENT * self._length
        self._begin()
        return text


class _Metaspace:
    """A mark stands for a space, except in the first token where one was put in front."""

    def __init__(self, mark: str, prepended: bool) -> None:
        self._mark = mark
        self._drop = prepended

    def __call__(self, pieces: list[str], last: bool) -> list[str]:
        out = []
        for piece in pieces:
            out.append(piece.replace(self._mark, "" if self._drop else " "))
            self._drop = False
        return out


class _Replace:
    def __init__(self, old: str, new: str) -> None:
        self._old, self._new = old, new

    def __call__(self, pieces: list[str], last: bool) -> list[str]:
        return [piece.replace(self._old, self._new) for piece in pieces]


class _Strip:
    """Cut up to `count` letters from the front of each token, or of the text once it is fused."""

    def __init__(self, letter: str, count: int, fused: bool) -> None:
        self._letter, self._count, self._fused = letter, count, fused

    def __call__(self, pieces: list[str], last: bool) -> list[str]:
        out = []
        for piece in pieces:
            cut = 0
            while cut < min(self._count, len(piece)) and piece[cut] == self._letter:
                cut += 1
            if self._fused and piece:
                self._count = self._count - cut if cut == len(piece) else 0
            out.append(piece[cut:])
        return out
