"""Safetensors headers, validated before a single weight is read or a single array allocated."""

import dataclasses
import json
import math
import os
import re
import stat
import struct
from collections import Counter, defaultdict
from pathlib import Path

from moejax.errors import CheckpointError, reason

# Bits of one element.
DTYPE_BITS = (
    dict.fromkeys(("F64", "I64", "U64", "C64"), 64)
    | dict.fromkeys(("F32", "I32", "U32"), 32)
    | dict.fromkeys(("F16", "BF16", "I16", "U16"), 16)
    | dict.fromkeys(("I8", "U8", "BOOL"), 8)
    | dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8)
    | {"F6_E2M3": 6, "F6_E3M2": 6, "F4": 4}
)
# Tensors of GGUF files that are made of blocks along a row: weights and bytes of one block.
GGUF_BLOCKS = {
    "Q4_0": (32, 18),
    "Q4_1": (32, 20),
    "Q5_0": (32, 22),
    "Q5_1": (32, 24),
    "Q8_0": (32, 34),
    "Q4_K": (256, 144),
    "Q5_K": (256, 176),
    "Q6_K": (256, 210),
}
MAX_HEADER = 100_000_000  # bytes, the safetensors library's own limit
MAX_RANK = 32
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLED = (".bin", ".pt", ".pth", ".ckpt")


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """One tensor of a safetensors or GGUF file: where its bytes lie and how to read them."""

    name: str
    dtype: str  # as safetensors spells it, BF16, F32, F8_E4M3, or a key of GGUF_BLOCKS
    shape: tuple[int, ...]
    file: Path
    start: int  # first byte, counted from the beginning of the file
    nbytes: int
    head_rows: int = 0  # > 0: the rows of each such head lie as llama.cpp's rotation wants them


class Problems:
    """Everything wrong with a checkpoint, collected so that one error can list all of it."""

    def __init__(self):
        self._groups = defaultdict(list)

    def add(self, kind: str, name: str, detail: str = "", group: str | None = None) -> None:
        """Note one problem of one tensor; `group` defaults to its name with numbers blanked."""
        group = group or re.sub(r"(?<![^.])\d+(?![^.])", "*", name)
        self._groups[kind, group].append(f"{name} {detail}".rstrip())

    def raise_if_any(self, what: str) -> None:
        """Raise one CheckpointError naming every group; above 3, by its count and its first."""
        if not self._groups:
            return
        lines = []
        for (kind, group), items in self._groups.items():
            if len(items) > 3:
                items = [f"{group} ({len(items)} tensors, first: {items[0]})"]
            lines += [f"  {kind}: {item}" for item in items]
        raise CheckpointError("\n".join([f"{what}:", *lines]))


def parse_json(data: bytes, what: str) -> dict:
    """Parse a JSON object from an untrusted file.

    Raises CheckpointError for anything else, for a key given twice, and for NaN or infinity.
    """

    def unique(pairs):
        counts = Counter(key for key, _ in pairs)
        if twice := [key for key, count in counts.items() if count > 1]:
            raise ValueError(f"key {twice[0]!r} appears twice")
        return dict(pairs)

    def refuse(constant):
        raise ValueError(f"{constant} is not JSON")

    try:
        value = json.loads(data.decode(), object_pairs_hook=unique, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{what} is not valid JSON: {reason(error)}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{what} is not a JSON object")
    return value


def open_regular(path: Path):
    """Open a regular file for unbuffered reading and return it with its size in bytes.

    Raises CheckpointError when it is absent, unreadable or not a regular file (a FIFO would hang).
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise CheckpointError(f"{path} is not a regular file")
        file = open(path, "rb", buffering=0)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
    return file, os.fstat(file.fileno()).st_size


def read_exact(file, start: int, buffer: memoryview) -> None:
    """Fill `buffer` with a file's bytes from `start`; CheckpointError when they cannot be had."""
    try:
        while buffer:
            count = os.preadv(file.fileno(), [buffer], start)
            if not count:
                raise CheckpointError(f"{file.name} ended early: was it changed while being read?")
            buffer, start = buffer[count:], start + count
    except OSError as error:
        raise CheckpointError(f"cannot read {file.name}: {error}") from error


def read_small(path: Path) -> bytes:
    """The bytes of a small file such as a JSON; CheckpointError above MAX_HEADER bytes."""
    file, size = open_regular(path)
    with file:
        if size > MAX_HEADER:
            raise CheckpointError(f"{path} has {size} bytes, more than the {MAX_HEADER} allowed")
        data = bytearray(size)
        read_exact(file, 0, memoryview(data))
    return bytes(data)


def _is_count(value) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _parse_entry(path: Path, name: str, entry, data_start: int) -> TensorInfo:
    def refuse(why):
        raise CheckpointError(f"{path}: tensor {name!r} {why}")

    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        refuse("must have exactly the fields dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        refuse(f"has the unknown dtype {dtype!r}")
    if not isinstance(shape, list) or len(shape) > MAX_RANK or not all(map(_is_count, shape)):
        refuse(f"has a shape that is not a list of at most {MAX_RANK} non-negative sizes")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_count, offsets)):
        refuse("has data_offsets that are not two non-negative numbers")
    begin, end = offsets
    if (end - begin) * 8 != math.prod(shape) * DTYPE_BITS[dtype]:
        refuse(f"has {end - begin} bytes of data, which is not {dtype} of shape {shape}")
    return TensorInfo(name, dtype, tuple(shape), path, data_start + begin, end - begin)


def read_header(path: Path) -> list[TensorInfo]:
    """The tensors of one safetensors file, in file order, from its header alone.

    Raises CheckpointError unless the header is well formed and its tensors fill the file exactly:
    no gap, no overlap, nothing truncated, nothing appended.
    """
    path = Path(path)
    file, size = open_regular(path)
    with file:
        if size < 8:
            raise CheckpointError(f"{path} is truncated: {size} bytes hold no safetensors header")
        prefix = bytearray(8)
        read_exact(file, 0, memoryview(prefix))
        (length,) = struct.unpack("<Q", prefix)
        if length > MAX_HEADER or length > size - 8:
            raise CheckpointError(
                f"{path} is truncated or not safetensors: its header claims {length} bytes, "
                f"the file has {size}"
            )
        text = bytearray(length)
        read_exact(file, 8, memoryview(text))
    header = parse_json(bytes(text), f"the header of {path}")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CheckpointError(f"{path}: __metadata__ is not a table of strings")
    tensors = [_parse_entry(path, *item, 8 + length) for item in header.items()]
    tensors.sort(key=lambda tensor: (tensor.start, tensor.nbytes))
    position = 8 + length
    for tensor in tensors:
        if tensor.start != position:
            kind = "a gap before" if tensor.start > position else "data overlapping"
            raise CheckpointError(f"{path} has {kind} tensor {tensor.name!r}")
        position += tensor.nbytes
    if position != size:
        kind = "truncated" if position > size else "followed by foreign bytes"
        raise CheckpointError(
            f"{path} is {kind}: its header describes {position} bytes, the file has {size}"
        )
    return tensors


def _read_index(path: Path) -> dict[str, str]:
    weight_map = parse_json(read_small(path), str(path)).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path} has no weight_map")
    for file in weight_map.values():
        # A shard is a plain name beside its index, so that no index can reach other files.
        plain = isinstance(file, str) and re.fullmatch(r"[^/\\\0]+\.safetensors", file)
        if not plain or file.startswith("."):
            raise CheckpointError(
                f"{path} names the shard {file!r}, which is not a plain file name"
            )
    return weight_map


def _refuse_without_safetensors(directory: Path) -> None:
    if not directory.is_dir():
        raise CheckpointError(
            f"{directory} is not a directory: give a Hugging Face model directory"
        )
    pickled = sorted(p.name for p in directory.iterdir() if p.suffix in PICKLED)
    if pickled:
        raise CheckpointError(
            f"{directory} holds only pickled weights ({pickled[0]}), which can run code when "
            "opened: moejax never does. Use the model's safetensors files, or save it again "
            "with transformers' save_pretrained."
        )
    raise CheckpointError(f"{directory} holds neither {SINGLE} nor {INDEX}")


def list_tensors(directory: Path) -> list[TensorInfo]:
    """All tensors of a Hugging Face safetensors directory, in file order, from headers alone.

    Raises CheckpointError when a file is absent or malformed, when there are only pickled weights,
    or when the index and the shards disagree (all disagreements in one error).
    """
    directory = Path(directory)
    if os.path.lexists(directory / SINGLE):
        return read_header(directory / SINGLE)
    if not os.path.lexists(directory / INDEX):
        _refuse_without_safetensors(directory)
    weight_map = _read_index(directory / INDEX)
    problems = Problems()
    tensors = []
    for file in sorted(set(weight_map.values())):
        if os.path.exists(directory / file):
            tensors += read_header(directory / file)
        else:
            problems.add("missing file", file, group=file)
    listed = {(tensor.name, tensor.file.name) for tensor in tensors}
    for name, file in weight_map.items():
        if (name, file) not in listed:
            problems.add("missing", name, f"(index: in {file})")
    for tensor in tensors:
        owner = weight_map.get(tensor.name)
        if owner is None:
            problems.add("not in the index", tensor.name, f"(in {tensor.file.name})")
        elif owner != tensor.file.name:
            problems.add("duplicate", tensor.name, f"(in {tensor.file.name} and {owner})")
    problems.raise_if_any(f"{directory / INDEX} and its shards disagree")
    return tensors
