"""Which tier experts come from on a machine without a GPU: memory, the disk, or a paced link."""

import dataclasses
import hashlib
import os
import pathlib
from typing import Any

import jax
import numpy as np

from moejax import devices, orbax_directory, quantise
from moejax.checkpoints import convert
from moejax.checkpoints.bank import VERSION, open_bank
from moejax.checkpoints.rules import WeightMap
from moejax.errors import InputError, PolicyError
from moejax.kernels import build
from moejax.kernels.transport import Store
from moejax.models.transformer import Decoder
from moejax.policies.policy import Policy

BUFFERS = 16  # records that may have been read ahead of their commit
THREADS = 4  # reads at the same time
# At most what a process holds beside a budget: the interpreter, JAX, programs, compiling them.
PROCESS_BYTES = 640 * 2**20
NO_GPU = "links and host_memory are for machines without a GPU: use device_memory"
FORMS = 'link must be "disk" or "paced:GB_PER_S,LATENCY_US[,HOST_US]", such as "paced:2,100"'


@dataclasses.dataclass(frozen=True)
class Link:
    """What experts are moved over into slots."""

    kind: str  # "disk" or "paced"
    gigabytes_per_second: float = 0.0  # of a paced link
    latency_us: float = 0.0
    host_us: float = 0.0  # the least time of one expert computed on the host beside it

    def __str__(self) -> str:
        if self.kind == "disk":
            return "disk"
        numbers = [self.gigabytes_per_second, self.latency_us]
        if self.host_us:
            numbers.append(self.host_us)
        return "paced:" + ",".join(repr(float(x)).removesuffix(".0") for x in numbers)


def parse_link(text: str | None) -> Link | None:
    """The link that "disk" or "paced:GB_PER_S,LATENCY_US[,HOST_US]" names, or InputError."""
    if text is None:
        return None
    kind, _, numbers = text.partition(":")
    if text == "disk":
        return Link("disk")
    try:
        rate, latency, *more = (float(number) for number in numbers.split(","))
        [host] = more or [0.0]
    except ValueError:
        raise InputError(f"{FORMS}; not {text!r:.80}") from None
    known = kind == "paced" and 0 < rate < float("inf")
    if not known or not 0 <= latency < 1e9 or not 0 <= host < 1e9:
        raise InputError(f"{FORMS}; not {text!r:.80}")
    return Link("paced", rate, latency, host)


def check(link: Link | None, model: Decoder, policy: Policy | None, virtual: bool) -> None:
    """Raise InputError for a link that cannot be had here, PolicyError if it cannot serve one."""
    if link is None:
        return
    if not model.config.moe_layers:
        raise InputError("a dense model has no experts to move over a link")
    if jax.default_backend() != "cpu":
        raise InputError(NO_GPU)
    if virtual:
        raise InputError("virtual residency reads weights in place: leave the link out")
    if build.library() is None:
        raise InputError(f"a link needs the native library ({build.status()})")
    if link.kind == "disk" and policy.placement.uses_host:
        raise PolicyError(
            "this policy computes misses on the host, which has no copy of experts on the disk: "
            "choose one that fetches them, such as lru or smoe-fetch"
        )


def open_link(
    link: Link | None, source: pathlib.Path, records: np.ndarray | None, checked: bool
) -> tuple[Store | None, np.ndarray | None]:
    """The store behind a link, and the records [L * E, R] that memory holds beside it.

    A paced link moves those records; a disk reads the bank of the converted `source`, and memory
    holds none.

    Raises:
        MoejaxError: the file cannot be opened.
    """
    if link is None:
        return None, records
    if link.kind == "paced":
        records = np.asarray(records)
        store = Store.open_paced(
            records,
            gigabytes_per_second=link.gigabytes_per_second,
            latency_us=link.latency_us,
            host_us=link.host_us,
        )
        return store, records
    bank = open_bank(source / convert.BANK)
    store = Store.open_disk(
        bank.path,
        data_offset=bank.data_start,
        record_bytes=bank.layout.stride,
        records=len(bank.records),
        threads=THREADS,
        buffers=BUFFERS,
        checksums=bank.checksums if checked else None,
    )
    return store, None


def on_host(
    model: Decoder,
    policy: Policy | None,
    memory: int,
    context: int,
    batch: int,
    link: Link | None,
    draft: Decoder | None = None,
) -> tuple[Link | None, int]:
    """The link and the slots of a budget of `memory` bytes of host memory.

    Args:
        draft: the model that drafts, if one does.

    Raises:
        BudgetError: not even one layer's top-k fits.
    """
    config = model.config
    if jax.default_backend() != "cpu":
        raise InputError(NO_GPU)
    if link and link.kind == "paced":
        raise InputError("a paced link keeps all experts in memory: give slots, not host_memory")
    ahead = BUFFERS * config.record_layout(model.quant or model.dtype).stride
    slots = devices.slots_for(model, policy, memory, context, batch, ahead=ahead, draft=draft)
    if slots + BUFFERS >= config.num_moe_layers * config.num_experts and link is None:
        return None, slots + BUFFERS
    return Link("disk"), slots


def bank_directory(
    source: pathlib.Path, weights: WeightMap, quant: str | None, progress: Any
) -> pathlib.Path:
    """The converted form of a model: the source itself, or one made once in the cache directory.

    Raises:
        CheckpointError: the disk has no room for it, or the source is damaged.
    """
    if convert.is_converted(source):
        return source
    if orbax_directory.is_orbax(source):
        raise InputError(f"{source} is saved by Orbax, which no link reads: give the original")
    home = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
    files = sorted(source.iterdir()) if source.is_dir() else [source]
    about = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    versions = (VERSION, quantise.VERSION)
    name = repr((str(source.resolve()), about, quant, weights.layout, versions))
    key = hashlib.sha256(name.encode()).hexdigest()[:12]
    target = home / "moejax" / "banks" / f"{source.stem}-{key}"
    if not convert.is_converted(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        convert.convert_directory(source, target, weights, quant=quant, progress=progress)
    return target
