import json
import os
import struct

import numpy as np
import pytest
from ckpt_models import Model, write_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open

from moejax.checkpoints.headers import list_tensors, read_header
from moejax.errors import CheckpointError

A = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}
B = {"dtype": "BF16", "shape": [3], "data_offsets": [16, 22]}


def file_of(header, size=22, length=None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + bytes(size)


def refused(path, content: bytes, match=None):
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=match) as error:
        read_header(path)
    assert str(path) in str(error.value)


def test_a_good_file_is_listed_in_file_order(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(file_of({"b": B, "__metadata__": {"k": "v"}, "a": A}))
    a, b = read_header(path)
    assert (a.name, a.dtype, a.shape, a.nbytes, a.file) == ("a", "F32", (2, 2), 16, path)
    assert b.start == a.start + 16 == path.stat().st_size - 6


def test_agrees_with_the_library_about_a_real_file(tmp_path):
    Model().write(tmp_path)
    path = tmp_path / "model.safetensors"
    with safe_open(path, "numpy") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    assert {t.name: t.shape for t in read_header(path)} == shapes


HOSTILE = {
    "overlap": ({"a": A, "b": {**B, "data_offsets": [10, 16]}}, "overlapping"),
    "same bytes": ({"a": A, "c": A, "b": B}, "overlapping"),
    "gap": ({"a": {**A, "shape": [3], "data_offsets": [0, 12]}, "b": B}, "a gap before tensor 'b'"),
    "gap at the start": (
        {"a": {**A, "shape": [3], "data_offsets": [4, 16]}, "b": B},
        "a gap before tensor 'a'",
    ),
    "bytes left over": ({"a": A}, "foreign bytes"),
    "beyond the end": ({"a": A, "b": {**B, "shape": [9], "data_offsets": [16, 34]}}, "truncated"),
    "wrong product": ({"a": {**A, "shape": [2, 3]}, "b": B}, "not F32 of shape"),
    "overflowing product": ({"a": {**A, "shape": [2**33, 2**33]}, "b": B}, "not F32 of shape"),
    "negative size": ({"a": {**A, "shape": [-2, -2]}, "b": B}, "non-negative sizes"),
    "fractional size": ({"a": {**A, "shape": [2.0, 2]}, "b": B}, "non-negative sizes"),
    "boolean size": ({"a": {**A, "shape": [True, 4]}, "b": B}, "non-negative sizes"),
    "shape is a number": ({"a": {**A, "shape": 4}, "b": B}, "non-negative sizes"),
    "shape is an object": ({"a": {**A, "shape": {"2": 2}}, "b": B}, "non-negative sizes"),
    "huge size": (
        {"a": {**A, "shape": [10**400, 0], "data_offsets": [0, 0]}, "b": B},
        "non-negative sizes",
    ),
    "huge rank": ({"a": {**A, "shape": [1] * 100_000 + [4]}, "b": B}, "at most 32"),
    "swapped offsets": ({"a": {**A, "data_offsets": [16, 0]}, "b": B}, "has -16 bytes"),
    "negative offsets": ({"a": {**A, "data_offsets": [-16, 0]}, "b": B}, "two non-negative"),
    "one offset": ({"a": {**A, "data_offsets": [16]}, "b": B}, "two non-negative"),
    "textual offsets": ({"a": {**A, "data_offsets": ["0", "16"]}, "b": B}, "two non-negative"),
    "unknown dtype": ({"a": {**A, "dtype": "F31"}, "b": B}, "unknown dtype 'F31'"),
    "dtype is a list": ({"a": {**A, "dtype": ["F32"]}, "b": B}, "unknown dtype"),
    "missing field": ({"a": {"dtype": "F32", "shape": [2, 2]}, "b": B}, "exactly the fields"),
    "foreign field": ({"a": {**A, "file": "/etc/passwd"}, "b": B}, "exactly the fields"),
    "entry is a list": ({"a": [], "b": B}, "exactly the fields"),
    "metadata is a list": ({"__metadata__": [], "a": A, "b": B}, "__metadata__"),
    "metadata holds a number": ({"__metadata__": {"k": 1}, "a": A, "b": B}, "__metadata__"),
    "header is a list": ([A, B], "not a JSON object"),
    "not JSON": (b"pickle?", "not valid JSON"),
    "not UTF-8": (b'{"\xff": 1}', "UTF-8"),
    "empty": (b"", "not valid JSON"),
    "NaN": (b'{"a": NaN}', "NaN is not JSON"),
    "deep": (b"[" * 100_000, "recursion"),
    "long number": (b'{"a": ' + b"9" * 10_000 + b"}", "not valid JSON"),
    "a key twice": (
        json.dumps({"a": A, "b": B}).replace('"b"', '"a"').encode(),
        "'a' appears twice",
    ),
    "a field twice": (
        json.dumps({"a": A}).replace('"dtype"', '"shape": [1], "dtype"').encode(),
        "'shape' appears twice",
    ),
}


@pytest.mark.parametrize(("header", "why"), HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_headers_are_refused(header, why, tmp_path):
    refused(tmp_path / "x", file_of(header), why)


@pytest.mark.parametrize("length", [2**64 - 1, 2**63, 10**9, 100_000_001, 700])
def test_a_header_longer_than_the_file_is_refused(length, tmp_path):
    refused(tmp_path / "x", file_of({"a": A, "b": B}, length=length), "truncated")


def test_a_huge_header_in_a_huge_sparse_file_is_refused_unread(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(struct.pack("<Q", 10**11))
    os.truncate(path, 2 * 10**11)
    with pytest.raises(CheckpointError, match="header claims 100000000000 bytes"):
        read_header(path)


def test_every_truncation_and_every_extension_is_refused(tmp_path):
    whole = file_of({"a": A, "b": B})
    for size in range(len(whole)):
        refused(tmp_path / "x", whole[:size], "truncated")
    refused(tmp_path / "x", whole + b"\0", "foreign bytes")


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 170), st.integers(0, 255), st.integers(0, 3))
def test_no_mutation_gets_past_us_that_stops_the_library(tmp_path_factory, at, byte, kind):
    """Any other outcome than a list of tensors inside the file is a CheckpointError."""
    content = bytearray(file_of({"a": A, "b": B}))
    at %= len(content)
    edits = [bytes([byte]), bytes([content[at], byte]), b"", bytes([content[at] ^ 1 << byte % 8])]
    content[at : at + 1] = edits[kind]
    path = tmp_path_factory.getbasetemp() / "mutated"
    path.write_bytes(content)
    try:
        tensors = read_header(path)
    except CheckpointError:
        return
    assert sum(t.nbytes for t in tensors) + tensors[0].start == len(content)
    try:
        with safe_open(path, "numpy") as file:
            assert {t.name for t in tensors} == set(file.keys())
    except SafetensorError as error:
        raise AssertionError(f"we accept what the library refuses: {error}") from error


def test_other_things_than_files_are_refused(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    os.symlink(tmp_path / "nowhere", tmp_path / "link")
    for name in ("fifo", "link", "absent", ".", "a\0b"):
        with pytest.raises(CheckpointError):
            read_header(tmp_path / name)


def test_shards_may_be_symlinks_as_in_the_hub_cache(tmp_path):
    blobs = Model().write(tmp_path / "blobs", shards=2)
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(os.path.relpath(file, snapshot))
    assert len(list_tensors(snapshot)) == len(Model().tensors())


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth"])
def test_pickled_weights_are_never_opened(name, tmp_path):
    os.mkfifo(tmp_path / name)  # opening it would hang
    with pytest.raises(CheckpointError, match=f"only pickled weights .{name}"):
        list_tensors(tmp_path)


def test_directories_without_weights_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="holds neither"):
        list_tensors(tmp_path)
    with pytest.raises(CheckpointError, match="not a directory"):
        list_tensors(tmp_path / "absent")


@pytest.mark.parametrize(
    "shard",
    ["../x.safetensors", "/etc/x.safetensors", "a/../x.safetensors", "a\\x.safetensors", ".."]
    + [
        "a/x.safetensors",
        "",
        3,
        None,
        "x.bin",
        ".safetensors",
        "x.safetensors\0",
        ".h.safetensors",
    ],
)
def test_an_index_reaches_no_other_directory(shard, tmp_path):
    write_checkpoint(tmp_path / "x.safetensors", {"t": np.zeros(1, "f4")})
    inside = tmp_path / "model"
    inside.mkdir()
    index = {"weight_map": {"t": shard}}
    (inside / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="not a plain file name"):
        list_tensors(inside)


@pytest.mark.parametrize("text", ["[]", "{}", '{"weight_map": {}}', '{"weight_map": []}', "{", ""])
def test_malformed_indexes_are_refused(text, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError):
        list_tensors(tmp_path)


def test_an_index_that_disagrees_with_its_shards_lists_every_disagreement(tmp_path):
    tensors = {name: np.zeros(1, "f4") for name in "abcd"}
    write_checkpoint(tmp_path, tensors, shards=2)
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    first, second = index["weight_map"]["a"], index["weight_map"]["b"]
    index["weight_map"] |= {"a": second, "e": "absent.safetensors"}
    del index["weight_map"]["d"]
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError) as error:
        list_tensors(tmp_path)
    assert [line.strip() for line in str(error.value).split("\n")[1:]] == [
        "missing file: absent.safetensors",
        f"missing: a (index: in {second})",
        "missing: e (index: in absent.safetensors)",
        f"duplicate: a (in {first} and {second})",
        f"not in the index: d (in {second})",
    ]
