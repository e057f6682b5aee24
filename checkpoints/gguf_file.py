"""GGUF files: header and tensors, validated before a single weight is read, and their decoding.

Little-endian versions 2 and 3: magic "GGUF", version u32, tensor count u64, metadata count u64, the
metadata, one entry per tensor (name, dimensions from the innermost, type, offset), then aligned
data. The header is read here, in bounds; blocks are decoded by the `gguf` package.
"""

import dataclasses
import io
import math
import struct
from pathlib import Path
from typing import Any

import numpy as np

from moejax.checkpoints.headers import (
    GGUF_BLOCKS,
    MAX_HEADER,
    TensorInfo,
    open_regular,
)
from moejax.errors import CheckpointError, InputError
from moejax.layout import MatrixLayout
from moejax.quantise import pack_nibbles

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_RANK = 4
MAX_NAME = 1024  # bytes
MAX_ITEMS = 1024  # longer arrays, such as vocabularies, are skipped
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q"}
SCALARS |= {12: "d"}
STRING, ARRAY = 8, 9
# Names of the types that are known, as llama.cpp numbers them.
TYPES = {0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0"}
TYPES |= {12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 30: "BF16"}
PLAIN = {"F32": (1, 4), "F16": (1, 2), "BF16": (1, 2)}


@dataclasses.dataclass(frozen=True)
class GgufFile:
    """Metadata by key (long arrays as None) and the tensors, in file order."""

    metadata: dict[str, Any]
    tensors: list[TensorInfo]


def is_gguf(path: Path) -> bool:
    """Whether a path names a GGUF file."""
    return Path(path).suffix.lower() == ".gguf" and not Path(path).is_dir()


class _Header:
    """Reads a header front to back; never more than the file or MAX_HEADER holds."""

    def __init__(self, path: Path, file: io.BufferedReader, size: int):
        self.path, self.file = path, file
        self.left = min(size, MAX_HEADER)
        self.position = 0

    def take(self, size: int) -> bytes:
        if size > self.left:
            raise CheckpointError(f"{self.path} is truncated: its header goes beyond its end")
        try:
            data = self.file.read(size)
        except OSError as error:
            raise CheckpointError(f"cannot read {self.path}: {error}") from error
        if len(data) != size:
            raise CheckpointError(f"{self.path} ended early: was it changed while being read?")
        self.left, self.position = self.left - size, self.position + size
        return data

    def number(self, code: str) -> Any:
        value = struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]
        # The shortest spelling of an f32: 1e-06, not 9.99999997e-07.
        return float(str(np.float32(value))) if code == "f" else value

    def text(self, most: int = MAX_HEADER) -> str:
        length = self.number("Q")
        if length > most:
            raise CheckpointError(f"{self.path} holds a name of {length} bytes")
        # Token texts need not be UTF-8, and nothing here depends on them.
        return self.take(length).decode(errors="replace")

    def value(self) -> Any:
        kind = self.number("I")
        if kind != ARRAY:
            return self.item(kind)
        kind, count = self.number("I"), self.number("Q")
        if kind == ARRAY:
            raise CheckpointError(f"{self.path} has nested arrays in its metadata")
        if kind in SCALARS and count > MAX_ITEMS:
            self.take(count * struct.calcsize("<" + SCALARS[kind]))
            return None
        items = []
        for _ in range(count):
            item = self.item(kind)
            if count <= MAX_ITEMS:
                items.append(item)
        return items if count <= MAX_ITEMS else None

    def item(self, kind: int) -> Any:
        if kind == STRING:
            return self.text()
        if kind not in SCALARS:
            raise CheckpointError(f"{self.path} has metadata of the unknown type {kind}")
        return self.number(SCALARS[kind])


def read_file(path: Path) -> GgufFile:
    """Metadata and tensors of a GGUF file, from its header alone.

    Raises CheckpointError unless the header is well formed, every tensor has a known type and lies
    within the file, and none overlaps another; InputError when a type needs the `gguf` package.
    """
    path = Path(path)
    file, size = open_regular(path)
    with file, io.BufferedReader(file, 1 << 20) as buffered:
        header = _Header(path, buffered, size)
        if size < 24 or header.take(4) != MAGIC:
            raise CheckpointError(f"{path} is not a GGUF file")
        version, count, entries = (header.number(code) for code in "IQQ")
        if version not in VERSIONS:
            raise CheckpointError(f"{path} has GGUF version {version}, known are {VERSIONS}")
        metadata = {}
        for _ in range(entries):
            key = header.text(MAX_NAME)
            if key in metadata:
                raise CheckpointError(f"{path} gives {key!r:.80} twice")
            metadata[key] = header.value()
        if metadata.get("split.count", 1) not in (0, 1):
            raise CheckpointError(
                f"{path} is one of {metadata['split.count']} parts: join them with "
                "`llama-gguf-split --merge` first"
            )
        raw = [_entry(header) for _ in range(count)]
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or not 8 <= alignment <= 1 << 20 or alignment & (alignment - 1):
        raise CheckpointError(f"{path} has the alignment {alignment!r:.80}")
    start = math.ceil(header.position / alignment) * alignment
    tensors = [_tensor(path, entry, start, alignment, size) for entry in raw]
    return GgufFile(metadata, _ordered(path, tensors))


def _entry(header: _Header) -> tuple[str, tuple[int, ...], int, int]:
    """Name, shape (outermost first), type and offset of one tensor."""
    name, rank = header.text(MAX_NAME), header.number("I")
    if not 0 < rank <= MAX_RANK:
        raise CheckpointError(f"{header.path}: tensor {name!r:.80} has {rank} dimensions")
    shape = tuple(header.number("Q") for _ in range(rank))[::-1]
    return name, shape, header.number("I"), header.number("Q")


def _tensor(path: Path, entry: tuple, start: int, alignment: int, size: int) -> TensorInfo:
    name, shape, kind, offset = entry

    def refuse(why):
        raise CheckpointError(f"{path}: tensor {name!r:.80} {why}")

    if kind not in TYPES:
        refuse(f"has type {kind}; known are {', '.join(TYPES.values())}")
    dtype = TYPES[kind]
    block, item = GGUF_BLOCKS.get(dtype) or PLAIN[dtype]
    # Of a file's size at most, so that no product is more than a large number.
    if not all(0 < extent <= size * block for extent in shape):
        refuse(f"has the shape {list(shape)} in a file of {size} bytes: it is truncated or damaged")
    if shape[-1] % block or (block > 1 and len(shape) < 2):
        refuse(f"is {dtype} with rows of {shape[-1]} weights, not of whole blocks of {block}")
    nbytes = math.prod(shape) // block * item
    if offset % alignment:
        refuse(f"begins at {offset}, which is not aligned to {alignment}")
    if start + offset + nbytes > size:
        refuse(f"ends at byte {start + offset + nbytes} of {size}: the file is truncated")
    return TensorInfo(name, dtype, shape, path, start + offset, nbytes)


def _ordered(path: Path, tensors: list[TensorInfo]) -> list[TensorInfo]:
    """Tensors in file order, if none overlaps another and no name is there twice."""
    ordered = sorted(tensors, key=lambda tensor: tensor.start)
    position, names = 0, set()
    for tensor in ordered:
        if tensor.start < position:
            raise CheckpointError(f"{path} has data overlapping tensor {tensor.name!r:.80}")
        if tensor.name in names:
            raise CheckpointError(f"{path} has the tensor {tensor.name!r:.80} twice")
        position = tensor.start + tensor.nbytes
        names.add(tensor.name)
    return ordered


def require_package(path: Path) -> None:
    """Raise InputError, saying what to install, unless the `gguf` package is there."""
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise InputError(
            f"{path} holds quantised tensors, which need another package to be read: "
            "`pip install gguf`"
        ) from error


def dequantise(raw: np.ndarray, dtype: str) -> np.ndarray:
    """Weights f32 [n] of whole blocks u8."""
    import gguf

    blocks = raw.reshape(-1, GGUF_BLOCKS[dtype][1])
    with np.errstate(all="ignore"):
        weights = gguf.dequantize(blocks, gguf.GGMLQuantizationType[dtype])
    return weights.reshape(-1).astype(np.float32, copy=False)


def q4_0_scales(raw: np.ndarray) -> np.ndarray:
    """Scales f16 [n / 32] of Q4_0 blocks u8."""
    blocks = raw.reshape(-1, GGUF_BLOCKS["Q4_0"][1])
    return np.ascontiguousarray(blocks[:, :2]).view("<f2")[:, 0]


def repack_q4_0(raw: np.ndarray, layout: MatrixLayout) -> tuple[np.ndarray, np.ndarray]:
    """Weights and scales of int4g32 rows, as `quantise_rows` has them, from rows of Q4_0 blocks.

    The same integers and scales: Q4_0 holds q + 8 of weights i and i + 16 in byte i of a block.
    """
    blocks = raw.reshape(-1, layout.cols // 32, GGUF_BLOCKS["Q4_0"][1])
    nibbles = blocks[:, :, 2:]
    codes = np.full((len(blocks), layout.columns), 8, np.uint8)
    joined = np.concatenate([nibbles & 15, nibbles >> 4], axis=2)
    codes[:, : layout.cols] = joined.reshape(len(blocks), layout.cols)
    scales = np.zeros((len(blocks), layout.scales_per_row), np.float16)
    scales[:, : layout.cols // 32] = q4_0_scales(raw).reshape(len(blocks), -1)
    return pack_nibbles(codes), scales


def unrotate(raw: np.ndarray, tensor: TensorInfo, count: int) -> np.ndarray:
    """The bytes of `count` weights of whole heads, their rows in Hugging Face's order.

    llama.cpp's converter interleaves the two halves of each head's rows for its rotation.
    """
    columns = tensor.shape[-1] if len(tensor.shape) > 1 else 1
    pairs = raw.reshape(count // columns // tensor.head_rows, tensor.head_rows // 2, 2, -1)
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(-1)
