import errno
import json
import os
import struct
import subprocess
import zlib

import numpy as np
import pytest
from ckpt_models import Model
from hypothesis import given, settings
from hypothesis import strategies as st

from moejax.checkpoints import bank, hf, resumable
from moejax.checkpoints.bank import open_bank, write_bank, write_records
from moejax.checkpoints.hf import plan_directory
from moejax.errors import CheckpointError, NonFiniteError
from moejax.layout import RECORD_ALIGNMENT, RecordLayout

CONFIG = {"model_type": "test", "name": "käse"}


def small_bank(path, layers=2, experts=2):
    layout = RecordLayout(width=8, expert_width=5, dtype="bfloat16")
    rng = np.random.default_rng(0)
    records = rng.integers(0, 2**16, (layers * experts, layout.elements), np.uint16)
    write_records(path, records, layout, layers, CONFIG)
    return layout, records


@pytest.fixture
def source(tmp_path):
    model = Model()
    placements = plan_directory(model.write(tmp_path / "source", shards=2), model.weights)
    return model, placements


@settings(max_examples=20, deadline=None)
@given(
    layers=st.integers(1, 3),
    experts=st.integers(1, 40),
    width=st.integers(1, 50),
    expert_width=st.integers(1, 50),
    dtype=st.sampled_from(["bfloat16", "float32"]),
)
def test_round_trip(layers, experts, width, expert_width, dtype, tmp_path_factory):
    path = tmp_path_factory.mktemp("bank") / "experts.bank"
    layout = RecordLayout(width=width, expert_width=expert_width, dtype=dtype)
    shape = (layers * experts, layout.elements)
    records = np.random.default_rng(experts).integers(0, 2**16, shape).astype(layout.bits)
    write_records(path, records, layout, layers, CONFIG)
    opened = open_bank(path)
    opened.verify()
    assert (opened.layout, opened.layers, opened.experts) == (layout, layers, experts)
    assert opened.config == CONFIG
    np.testing.assert_array_equal(opened.records, records, strict=True)
    assert opened.records.ctypes.data % RECORD_ALIGNMENT == 0
    assert opened.data_start % RECORD_ALIGNMENT == 0
    assert not opened.records.flags.writeable
    assert opened.data_start + records.nbytes == path.stat().st_size
    assert os.listdir(path.parent) == [path.name]


def test_a_checkpoint_becomes_a_bank(source, tmp_path):
    model, placements = source
    write_bank(tmp_path / "b", placements, model.weights, CONFIG)
    opened = open_bank(tmp_path / "b")
    opened.verify()
    np.testing.assert_array_equal(opened.records, model.expected()[1], strict=True)


def test_records_of_another_layout_are_refused(tmp_path):
    layout, records = small_bank(tmp_path / "a")
    for wrong, layers in ((records[:, :-1], 2), (records.view(np.int16), 2), (records, 3)):
        with pytest.raises(ValueError):
            write_records(tmp_path / "b", wrong, layout, layers, CONFIG)
    assert os.listdir(tmp_path) == ["a"]


@settings(max_examples=100, deadline=None)
@given(at=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_every_flipped_bit_is_found(at, bit, tmp_path_factory):
    path = tmp_path_factory.mktemp("flip") / "b"
    small_bank(path, layers=1)
    content = bytearray(path.read_bytes())
    content[int(at * len(content))] ^= 1 << bit
    path.write_bytes(content)
    with pytest.raises(CheckpointError):
        open_bank(path).verify()


def test_verify_names_all_damaged_records_and_only_them(tmp_path):
    small_bank(tmp_path / "b")
    opened = open_bank(tmp_path / "b")
    with open(tmp_path / "b", "r+b") as file:
        for record in (1, 2):
            file.seek(opened.data_start + (record + 1) * opened.layout.stride - 1)
            file.write(b"?")
    seen = []
    with pytest.raises(CheckpointError, match="damaged in layer 0 expert 1, layer 1 expert 0:"):
        opened.verify(lambda *progress: seen.append(progress))
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_every_truncation_and_every_extension_is_refused(tmp_path):
    small_bank(tmp_path / "b")
    content = (tmp_path / "b").read_bytes()
    size, start = len(content), open_bank(tmp_path / "b").data_start
    cuts = [*range(0, 80), start - 1, start, start + 1, start + 4096, size - 4096, size - 1]
    for cut in cuts:
        (tmp_path / "cut").write_bytes(content[:cut])
        with pytest.raises(CheckpointError, match="truncated" if cut < start else "describes"):
            open_bank(tmp_path / "cut")
    (tmp_path / "cut").write_bytes(content + bytes(4096))
    with pytest.raises(CheckpointError, match="its header describes"):
        open_bank(tmp_path / "cut")


def forge(path, text: bytes, **prefix):
    """Put another header, with a correct checksum, in front of the same records."""
    content = path.read_bytes()
    start = open_bank(path).data_start
    fields = {"magic": b"MOEJAXBK", "version": 1, "crc": zlib.crc32(text), "length": len(text)}
    header = struct.pack("<8sIIQ", *(fields | prefix).values()) + text
    path.write_bytes(header.ljust(start, b"\0") + content[start:])


HOSTILE = [
    ({"width": -8}, "width is -8"),
    ({"width": 0}, "width is 0"),
    ({"width": 8.0}, "width is 8.0"),
    ({"width": True}, "width is True"),
    ({"width": "8"}, "width is '8'"),
    ({"width": 2**31}, "not a count"),
    ({"width": 800}, "its stride is 4096 bytes"),
    ({"expert_width": 2**31 - 1}, "its stride is 4096 bytes"),
    ({"stride": 8192}, "its stride is 8192 bytes"),
    ({"stride": 4095}, "its stride is 4095 bytes"),
    ({"layers": 3}, "its header describes"),
    ({"layers": 2**31 - 1, "experts": 2**31 - 1}, "its header describes"),
    ({"layers": None}, "layers is None"),
    ({"dtype": "float64"}, "dtype 'float64'"),
    ({"dtype": ["bfloat16"]}, "dtype"),
    ({"config": []}, "config is not a JSON object"),
    ({"checksums": "0" * 31}, "checksums"),
    ({"checksums": "0" * 24}, "checksums"),
    ({"checksums": " " * 32}, "checksums"),
    ({"checksums": "0" * 24 + " " * 8}, "checksums"),
    ({"checksums": [0, 0, 0, 0]}, "checksums"),
    ({"more": 1}, "does not have the fields"),
    ({"layers": ...}, "does not have the fields"),
]


@pytest.mark.parametrize(("changes", "why"), HOSTILE)
def test_hostile_metadata_is_refused(changes, why, tmp_path):
    layout, records = small_bank(tmp_path / "b")
    checksums = [zlib.crc32(record) for record in records]
    metadata = json.loads(bank._metadata(CONFIG, layout, 2, 2, checksums)) | changes
    metadata = {key: value for key, value in metadata.items() if value is not ...}
    forge(tmp_path / "b", json.dumps(metadata).encode())
    with pytest.raises(CheckpointError, match=why):
        open_bank(tmp_path / "b")


@pytest.mark.parametrize(
    ("text", "prefix", "why"),
    [
        (b"{}", {"magic": b"MOEJAXBL"}, "not a bank file"),
        (b"{}", {"version": 2}, "version 2"),
        (b"{}", {"crc": 0}, "damaged header"),
        (b"{}", {"length": 2**64 - 1}, "truncated"),
        (b"{}", {"length": 2**40}, "truncated"),
        (b"{}", {}, "does not have the fields"),
        (b"[]", {}, "not a JSON object"),
        (b"\xff", {}, "not valid JSON"),
        (b"", {}, "not valid JSON"),
        (b'{"a": 1, "a": 2}', {}, "'a' appears twice"),
    ],
)
def test_hostile_prefixes_are_refused(text, prefix, why, tmp_path):
    small_bank(tmp_path / "b")
    forge(tmp_path / "b", text, **prefix)
    with pytest.raises(CheckpointError, match=why):
        open_bank(tmp_path / "b")


def test_a_huge_header_in_a_huge_sparse_file_is_refused_unread(tmp_path):
    (tmp_path / "b").write_bytes(struct.pack("<8sIIQ", b"MOEJAXBK", 1, 0, 10**11))
    os.truncate(tmp_path / "b", 2 * 10**11)
    with pytest.raises(CheckpointError, match="header claims 100000000000 bytes"):
        open_bank(tmp_path / "b")


class Disk:
    """os.pwrite that fails, once `room` bytes are written, as `error` says."""

    def __init__(self, room, error=errno.ENOSPC):
        self.room, self.error, self.pwrite = room, error, os.pwrite

    def __call__(self, descriptor, data, position):
        if not self.room:
            raise OSError(self.error, os.strerror(self.error))
        written = self.pwrite(descriptor, data[: self.room], position)
        self.room -= written
        return written


@pytest.mark.parametrize("room", [0, 1, 500, 1000])
def test_a_full_disk_leaves_the_old_bank_and_what_was_written(room, source, tmp_path, monkeypatch):
    model, placements = source
    monkeypatch.setattr(resumable, "JOURNAL_BYTES", 100)
    for before in (None, b"old"):
        path = tmp_path / f"bank {before}"
        if before:
            path.write_bytes(before)
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", Disk(room))
            with pytest.raises(CheckpointError, match="no space left for .* needs 28672 bytes"):
                write_bank(path, placements, model.weights, CONFIG)
        assert (path.read_bytes() if path.exists() else None) == before
        assert resumable.journal_path(path).exists() == (room >= 500)
        write_bank(path, placements, model.weights, CONFIG)
        open_bank(path).verify()
        np.testing.assert_array_equal(open_bank(path).records, model.expected()[1])


def test_other_write_errors_are_checkpoint_errors(source, tmp_path, monkeypatch):
    model, placements = source
    monkeypatch.setattr(os, "pwrite", Disk(300, errno.EIO))
    with pytest.raises(CheckpointError, match="cannot write .*Input/output error"):
        write_bank(tmp_path / "b", placements, model.weights, CONFIG)
    with pytest.raises(CheckpointError, match="cannot write"):
        write_bank(tmp_path / "absent" / "b", placements, model.weights, CONFIG)


def test_free_space_is_checked_before_anything_is_written(source, tmp_path, monkeypatch):
    model, placements = source
    monkeypatch.setattr(resumable.shutil, "disk_usage", lambda path: Free(28671))
    monkeypatch.setattr(os, "pwrite", lambda *_: pytest.fail("written"))
    with pytest.raises(CheckpointError, match="needs 28672 more bytes and 28671 are free"):
        write_bank(tmp_path / "b", placements, model.weights, CONFIG)


class Free:
    def __init__(self, free):
        self.free = free


@pytest.fixture
def tiny_disk(tmp_path):
    """A file system of 16 KiB, where the user may mount one."""
    where = tmp_path / "disk"
    where.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16k", "moejax-test", where]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield where
    subprocess.run(["umount", where], check=True)


def test_a_disk_that_is_really_full(source, tiny_disk, monkeypatch):
    model, placements = source
    (tiny_disk / "b").write_bytes(b"old")
    with pytest.raises(CheckpointError, match="needs 28672 more bytes and 12288 are free"):
        write_bank(tiny_disk / "b", placements, model.weights, CONFIG)
    monkeypatch.setattr(resumable.shutil, "disk_usage", lambda _: Free(10**12))
    with pytest.raises(CheckpointError, match="no space left for"):
        write_bank(tiny_disk / "b", placements, model.weights, CONFIG)
    assert (tiny_disk / "b").read_bytes() == b"old"


class Interrupt(Exception):
    pass


def interrupt_after(pieces: int):
    """A progress callback that stops a conversion after so many pieces."""
    seen = []

    def progress(done, total):
        seen.append(done)
        if len(seen) == pieces:
            raise Interrupt

    return progress


def test_a_second_run_reads_only_what_is_left(source, tmp_path, monkeypatch):
    model, placements = source
    monkeypatch.setattr(resumable, "JOURNAL_BYTES", 160)

    def write(progress):
        write_bank(tmp_path / "b", placements, model.weights, CONFIG, progress=progress)

    with pytest.raises(Interrupt):
        write(interrupt_after(15))
    seen = []
    write(lambda done, total: seen.append(done))
    one = model.width * model.expert_width * 2
    # 18 tensors of 80 bytes: 14 are in the journal after the 15th was written.
    assert seen == [15 * one, 16 * one, 17 * one, 18 * one]
    open_bank(tmp_path / "b").verify()


@pytest.mark.parametrize("pieces", [1, 2, 3, 4, 5])
def test_an_interruption_within_a_tensor_loses_none_of_it(pieces, source, tmp_path, monkeypatch):
    model, placements = source
    monkeypatch.setattr(resumable, "JOURNAL_BYTES", 1)
    monkeypatch.setattr(hf, "CHUNK", 16)  # three chunks for a tensor of 40 elements
    path = tmp_path / "b"
    with pytest.raises(Interrupt):
        write_bank(path, placements, model.weights, CONFIG, progress=interrupt_after(pieces))
    write_bank(path, placements, model.weights, CONFIG)
    np.testing.assert_array_equal(open_bank(path).records, model.expected()[1])


@pytest.mark.parametrize("change", ["source", "config", "journal", "size", "check"])
def test_a_run_with_anything_changed_starts_again(change, source, tmp_path, monkeypatch):
    model, placements = source
    monkeypatch.setattr(resumable, "JOURNAL_BYTES", 160)
    path, config, check = tmp_path / "b", CONFIG, True
    with pytest.raises(Interrupt):
        write_bank(path, placements, model.weights, config, progress=interrupt_after(15))
    if change == "source":
        os.utime(placements[-1].tensor.file)
    elif change == "config":
        config = {"other": 1}
    elif change == "journal":
        resumable.journal_path(path).write_bytes(b"{")
    elif change == "size":
        os.truncate(resumable.partial_path(path), 5)
    elif change == "check":
        check = False
    seen = []
    write_bank(
        path,
        placements,
        model.weights,
        config,
        check_finite=check,
        progress=lambda done, total: seen.append(done),
    )
    assert len(seen) == 18
    np.testing.assert_array_equal(open_bank(path).records, model.expected()[1])


def test_an_old_journal_never_vouches_for_other_contents(source, tmp_path, monkeypatch):
    model, placements = source
    monkeypatch.setattr(resumable, "JOURNAL_BYTES", 160)
    path = tmp_path / "b"
    with pytest.raises(Interrupt):
        write_bank(path, placements, model.weights, {"a": 1}, progress=interrupt_after(15))
    with pytest.raises(Interrupt):
        write_bank(path, placements, model.weights, {"b": 1}, progress=interrupt_after(1))
    write_bank(path, placements, model.weights, {"a": 1})
    open_bank(path).verify()
    np.testing.assert_array_equal(open_bank(path).records, model.expected()[1])


def test_nothing_of_an_older_unfinished_file_stays(source, tmp_path):
    model, placements = source
    resumable.partial_path(tmp_path / "b").write_bytes(b"?" * 28672)
    write_bank(tmp_path / "b", placements, model.weights, CONFIG)
    np.testing.assert_array_equal(open_bank(tmp_path / "b").records, model.expected()[1])


def test_a_tensor_that_is_not_finite_is_found_again_after_an_interruption(tmp_path, monkeypatch):
    model = Model()
    directory = model.write(tmp_path / "source")
    placements = plan_directory(directory, model.weights)
    bad = [placement for placement in placements if placement.target == "experts"][3].tensor
    with open(bad.file, "r+b") as file:
        file.seek(bad.start)
        file.write(b"\xc0\x7f")
    monkeypatch.setattr(resumable, "JOURNAL_BYTES", 160)
    path = tmp_path / "b"
    with pytest.raises(Interrupt):
        write_bank(path, placements, model.weights, CONFIG, progress=interrupt_after(15))
    with pytest.raises(NonFiniteError, match=bad.name):
        write_bank(path, placements, model.weights, CONFIG)
    assert not path.exists()


def test_two_processes_do_not_write_the_same_bank(source, tmp_path):
    model, placements = source
    path = tmp_path / "b"
    errors = []

    def meanwhile(done, total):
        try:
            write_bank(path, placements, model.weights, CONFIG)
        except CheckpointError as error:
            errors.append(str(error))

    write_bank(path, placements, model.weights, CONFIG, progress=meanwhile)
    assert len(errors) == 18 and all("another process is writing" in error for error in errors)
    open_bank(path).verify()
