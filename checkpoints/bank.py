"""The bank file: every expert's record, aligned and checksummed, behind one header.

bytes 0..7    magic "MOEJAXBK"
8..11         version, u32 little-endian like everything here
12..15        CRC-32 of the JSON
16..23        length of the JSON in bytes, u64
24..          JSON: config, dtype (a weight format), width D, expert_width F, layers L, experts E,
              stride, checksums (one CRC-32 per whole record as 8 hexadecimal digits, joined)
then          zeros up to a multiple of 4096, then L * E records of `stride` bytes
"""

import dataclasses
import hashlib
import json
import math
import os
import re
import struct
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from moejax.checkpoints.error_table import ErrorTable
from moejax.checkpoints.headers import MAX_HEADER, open_regular, parse_json, read_exact
from moejax.checkpoints.hf import Progress, pieces
from moejax.checkpoints.resumable import Pieces, write_all, write_resumable
from moejax.checkpoints.rules import EXPERTS, Placement, WeightMap
from moejax.errors import CheckpointError
from moejax.layout import FORMATS, RECORD_ALIGNMENT, RecordLayout

MAGIC = b"MOEJAXBK"
VERSION = 1
PREFIX = struct.Struct("<8sIIQ")
COUNTS = ("width", "expert_width", "layers", "experts", "stride")
FIELDS = {"config", "dtype", "checksums", *COUNTS}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bank:
    """An opened bank file; `records` is read-only, mapped, and starts at a multiple of 4096."""

    path: Path
    config: dict  # the model's config.json
    layout: RecordLayout
    layers: int  # L
    experts: int  # E
    checksums: np.ndarray  # [L * E] u32
    records: np.memmap  # [L * E, R] of layout.bits

    @property
    def data_start(self) -> int:
        """Byte of the file at which the first record begins."""
        return self.records.offset

    def verify(self, progress: Progress | None = None) -> None:
        """Recompute every checksum; CheckpointError naming the records that differ.

        progress(records done, records in all) is called after each record.
        """
        bad = []
        # Read, not mapped: a bad sector is then an error instead of a SIGBUS.
        file, record = open_regular(self.path)[0], memoryview(bytearray(self.layout.stride))
        with file:
            for i, checksum in enumerate(self.checksums):
                read_exact(file, self.data_start + i * self.layout.stride, record)
                if zlib.crc32(record) != checksum:
                    bad.append("layer {} expert {}".format(*divmod(i, self.experts)))
                if progress is not None:
                    progress(i + 1, len(self.checksums))
        if bad:
            shown = ", ".join(bad[:20]) + (f" and {len(bad) - 20} more" if bad[20:] else "")
            raise CheckpointError(f"{self.path} is damaged in {shown}: convert the model again")


def _data_start(length: int) -> int:
    return math.ceil((PREFIX.size + length) / RECORD_ALIGNMENT) * RECORD_ALIGNMENT


def _metadata(config: dict, layout: RecordLayout, layers: int, experts: int, checksums) -> bytes:
    metadata = {
        "config": config,
        "dtype": layout.dtype,
        "width": layout.width,
        "expert_width": layout.expert_width,
        "layers": layers,
        "experts": experts,
        "stride": layout.stride,
        "checksums": "".join(f"{checksum:08x}" for checksum in checksums),
    }
    return json.dumps(metadata).encode()


def bank_size(config: dict, layout: RecordLayout, layers: int, experts: int) -> tuple[int, int]:
    """First byte of the records, and size of the file."""
    count = layers * experts
    start = _data_start(len(_metadata(config, layout, layers, experts, [0] * count)))
    return start, start + count * layout.stride


def _write_bank(
    path: Path,
    records: Callable[[int, int], Pieces],
    layout: RecordLayout,
    layers: int,
    experts: int,
    config: dict,
    fingerprint: str,
    errors: ErrorTable | None = None,
    finished: Callable[[], None] = lambda: None,
) -> None:
    """Write a bank; records(data start, done) yields its records' bytes."""
    start, size = bank_size(config, layout, layers, experts)

    def finish(descriptor):
        checksums = []
        with open(descriptor, "rb", buffering=0, closefd=False) as file:
            record = memoryview(bytearray(layout.stride))
            for position in range(start, size, layout.stride):
                read_exact(file, position, record)
                checksums.append(zlib.crc32(record))
        text = _metadata(config, layout, layers, experts, checksums)
        prefix = PREFIX.pack(MAGIC, VERSION, zlib.crc32(text), len(text))
        write_all(descriptor, memoryview(prefix + text), 0)
        finished()

    write_resumable(path, size, lambda done: records(start, done), finish, fingerprint, errors)


def fingerprint_of(*parts) -> str:
    """A digest of anything whose repr is its value, naming what an unfinished file is made from."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def source_stats(placements: Sequence[Placement]) -> list[tuple[str, int, int]]:
    """Path, size and time of change (ns) of every file that placements read."""
    files = sorted({placement.tensor.file for placement in placements})
    return [(str(file), os.stat(file).st_size, os.stat(file).st_mtime_ns) for file in files]


def write_placements(
    placements: Sequence[Placement],
    starts: dict[str, int],
    done: int,
    check_finite: bool,
    errors: ErrorTable | None,
    progress: Progress | None,
) -> Pieces:
    """The pieces of a file in which each target begins at byte starts[target]."""
    read = pieces(placements, done, check_finite, errors, progress)
    for finished, target, position, data in read:
        yield finished, starts[target] + position, memoryview(data)


def write_bank(
    path: Path,
    placements: Sequence[Placement],
    weights: WeightMap,
    config: dict,
    *,
    check_finite: bool = True,
    errors: ErrorTable | None = None,
    finished: Callable[[], None] = lambda: None,
    progress: Progress | None = None,
) -> None:
    """Stream the experts of a planned checkpoint into a bank file, atomically and resumably.

    An unfinished bank lies in PATH.partial with PATH.journal; the same call continues it unless
    the source files have changed. `errors` takes what quantisation cost; finished() is called when
    it is complete, before `path` appears. progress(bytes read, bytes in all). Raises
    CheckpointError when a file cannot be read or written or the disk is full, NonFiniteError as
    `load` does.
    """
    path = Path(path)
    ours = [placement for placement in placements if placement.target == EXPERTS]

    def records(start, done):
        return write_placements(ours, {EXPERTS: start}, done, check_finite, errors, progress)

    layout, layers, experts = weights.layout, weights.expert_layers, weights.experts
    fingerprint = fingerprint_of(ours, source_stats(ours), config, layout, check_finite)
    _write_bank(path, records, layout, layers, experts, config, fingerprint, errors, finished)


def write_records(
    path: Path, records: np.ndarray, layout: RecordLayout, layers: int, config: dict
) -> None:
    """Write records [L * E, R] that are in memory as a bank file, atomically."""
    if records.dtype != layout.bits or records.shape[1:] != (layout.elements,):
        raise ValueError(f"records {records.dtype} {records.shape} do not have layout {layout}")

    def whole(start, done):
        for i, record in enumerate(np.ascontiguousarray(records)):
            yield i + 1, start + i * layout.stride, memoryview(record).cast("B")

    experts, rest = divmod(len(records), layers)
    if rest or not experts:
        raise ValueError(f"{len(records)} records are not {layers} layers of experts")
    _write_bank(Path(path), whole, layout, layers, experts, config, os.urandom(16).hex())


def _parse_metadata(path: Path, text: bytes) -> tuple[dict, RecordLayout]:
    metadata = parse_json(text, f"the header of {path}")
    if set(metadata) != FIELDS:
        raise CheckpointError(f"the header of {path} does not have the fields {sorted(FIELDS)}")
    for field in COUNTS:
        if type(metadata[field]) is not int or not 0 < metadata[field] < 2**31:
            raise CheckpointError(f"{path}: {field} is {metadata[field]!r}, not a count")
    if not isinstance(metadata["dtype"], str) or metadata["dtype"] not in FORMATS:
        raise CheckpointError(f"{path}: dtype {metadata['dtype']!r} is not one of {FORMATS}")
    if not isinstance(metadata["config"], dict):
        raise CheckpointError(f"{path}: its config is not a JSON object")
    layout = RecordLayout(
        width=metadata["width"], expert_width=metadata["expert_width"], dtype=metadata["dtype"]
    )
    if metadata["stride"] != layout.stride:
        raise CheckpointError(
            f"{path}: its stride is {metadata['stride']} bytes, {layout} needs {layout.stride}"
        )
    return metadata, layout


def _parse_checksums(path: Path, text, count: int) -> np.ndarray:
    well_formed = isinstance(text, str) and re.fullmatch("([0-9a-f]{8})*", text)
    if not well_formed or len(text) != 8 * count:
        raise CheckpointError(f"{path}: its checksums are not {count} times 8 hexadecimal digits")
    return np.frombuffer(bytes.fromhex(text), ">u4").astype(np.uint32)


def open_bank(path: Path) -> Bank:
    """Open a bank file; its records are mapped, not read.

    Raises CheckpointError unless magic, version, header and exact file size are right. Records
    are not checked: that is `Bank.verify`, which reads the whole file.
    """
    path = Path(path)
    file, size = open_regular(path)
    with file:
        if size < PREFIX.size:
            raise CheckpointError(f"{path} is truncated: {size} bytes hold no bank header")
        prefix = bytearray(PREFIX.size)
        read_exact(file, 0, memoryview(prefix))
        magic, version, checksum, length = PREFIX.unpack(prefix)
        if magic != MAGIC:
            raise CheckpointError(f"{path} is not a bank file")
        if version != VERSION:
            raise CheckpointError(
                f"{path} has version {version}, this moejax reads {VERSION}: convert it again"
            )
        if length > MAX_HEADER or _data_start(length) > size:
            raise CheckpointError(
                f"{path} is truncated: its header claims {length} bytes, the file has {size}"
            )
        header = bytearray(_data_start(length) - PREFIX.size)
        read_exact(file, PREFIX.size, memoryview(header))
        text = bytes(header[:length])
        if zlib.crc32(text) != checksum or any(header[length:]):
            raise CheckpointError(f"{path} has a damaged header: convert the model again")
        metadata, layout = _parse_metadata(path, text)
        count = metadata["layers"] * metadata["experts"]
        expected = _data_start(length) + count * layout.stride
        if size != expected:
            raise CheckpointError(f"{path} has {size} bytes, its header describes {expected}")
        checksums = _parse_checksums(path, metadata["checksums"], count)
        shape = (count, layout.elements)
        records = np.memmap(file, layout.bits, "r", offset=_data_start(length), shape=shape)
    return Bank(
        path=path,
        config=metadata["config"],
        layout=layout,
        layers=metadata["layers"],
        experts=metadata["experts"],
        checksums=checksums,
        records=records,
    )
