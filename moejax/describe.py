"""What a model directory holds and which budgets it fits, from config and headers alone."""

import dataclasses
import math
import pathlib
from collections import Counter
from typing import Any

import numpy as np

from moejax import devices, orbax_directory
from moejax.checkpoints import bank, convert, headers, hf
from moejax.config import ModelConfig, read_config_json
from moejax.decode import checked_context
from moejax.errors import CheckpointError, NonFiniteError
from moejax.layout import DTYPES
from moejax.models import config_from_hf, family
from moejax.models.family import weight_map
from moejax.models.shapes import parameter_shapes
from moejax.models.transformer import Decoder
from moejax.policies.policy import policy as named_policy

KINDS = {"converted": "converted by moejax", "orbax": "Orbax", "hf": "Hugging Face safetensors"}
MOST_BUDGETS = 10
KV_TOKENS = 1024


@dataclasses.dataclass(frozen=True)
class Fit:
    """What one device budget holds."""

    budget: int  # bytes
    slots: int  # experts resident at once
    share: float  # of all experts


@dataclasses.dataclass(frozen=True)
class Description:
    """The facts of a model directory; sizes in bytes, for weights in `dtype`."""

    directory: str
    kind: str  # a key of KINDS
    dtype: str
    quant: str | None  # format of the quantised weights
    context: int
    config: dict[str, Any]
    parameters: int
    active_parameters: int  # used for one token
    dense_bytes: int
    expert_bytes: int  # one expert's record
    experts: int  # in all layers
    kv_bytes_per_1k_tokens: int
    tensors: int
    stored: dict[str, int]  # bytes by dtype as they lie in the files
    workspace_bytes: int | None  # XLA's, under the policy of the budgets
    fits: tuple[Fit, ...]

    @property
    def all_experts_bytes(self) -> int:
        """Bytes of every expert's record."""
        return self.experts * self.expert_bytes

    def as_dict(self) -> dict[str, Any]:
        """All fields and derived figures, for JSON."""
        return dataclasses.asdict(self) | {"all_experts_bytes": self.all_experts_bytes}


def describe(
    directory: pathlib.Path, context: int | None = None, policy: str | None = None
) -> Description:
    """Describe a model directory without reading a weight.

    Args:
        context: tokens whose KV cache each budget must hold; default the model's, at most 4096.
        policy: whose steps are compiled for the workspace that budgets must hold, as loading does;
            None gives no budgets.

    Raises:
        MoejaxError: the config or a header is malformed, or they do not fit each other.
    """
    config = config_from_hf(read_config_json(directory))
    about = convert.quantisation(directory) if convert.is_converted(directory) else None
    quant = about and about["quant"]
    kind, stored, count = _stored(directory, config, quant)
    dtype = _dtype(kind, stored)
    if kind == "hf":
        hf.plan_directory(directory, weight_map(config, family(config.model_type).rules, dtype))
    context = checked_context(config, context)
    model = Decoder(config, dtype, quant)
    dense_bytes = devices.dense_bytes(config, dtype, quant)
    dense = sum(math.prod(shape) for shape in parameter_shapes(config).values())
    expert = 3 * config.width * config.expert_width
    experts = config.num_moe_layers * config.num_experts
    record = config.record_layout(quant or dtype).stride if experts else 0
    workspace, fitting = None, ()
    if policy is not None and experts:
        run = dataclasses.replace(model, kernels=devices.kernels(None))
        workspace = devices.workspace_bytes(run, named_policy(policy), 1, context)
        fixed = dense_bytes + devices.kv_bytes(run, 1, context) + workspace
        fitting = fits(fixed, record, config.top_k, experts)
    return Description(
        directory=str(directory),
        kind=kind,
        dtype=dtype,
        quant=quant,
        context=context,
        config=_facts(config),
        parameters=dense + experts * expert,
        active_parameters=dense + config.num_moe_layers * config.top_k * expert,
        dense_bytes=dense_bytes,
        expert_bytes=record,
        experts=experts,
        kv_bytes_per_1k_tokens=devices.kv_bytes(model, 1, KV_TOKENS),
        tensors=count,
        stored=dict(stored),
        workspace_bytes=workspace,
        fits=fitting,
    )


def fits(fixed: int, record: int, least: int, experts: int) -> tuple[Fit, ...]:
    """Round budgets from the smallest that runs to the first that holds every expert.

    Args:
        fixed: bytes that every budget must hold.
        record: bytes of one expert.
        least: experts that one layer needs at once.
        experts: all experts.
    """
    if not experts:
        return ()
    first, last = fixed + least * record, fixed + experts * record
    budgets = [step << power for power in range(20, 50) for step in (2, 3)]
    fitting = [b for b in budgets if b >= first]
    wanted = fitting[: 1 + sum(b < last for b in fitting)]
    stride = math.ceil(len(wanted) / MOST_BUDGETS)
    # Counted from the end: the budget that holds everything is always shown.
    shown = wanted[::-1][::stride][::-1]
    slots = [min((b - fixed) // record, experts) for b in shown]
    return tuple(Fit(b, s, s / experts) for b, s in zip(shown, slots, strict=True))


def verify(directory: pathlib.Path, progress: hf.Progress | None = None) -> str:
    """Read every weight and return what was checked.

    Raises:
        CheckpointError: a record does not have its checksum, or files do not fit the config.
        NonFiniteError: NaN or infinity in a weight.
    """
    config = config_from_hf(read_config_json(directory))
    kind, stored, _ = _stored(directory, config)
    weights = weight_map(config, family(config.model_type).rules, _dtype(kind, stored))
    if kind == "hf":
        _scan(hf.plan_directory(directory, weights), progress)
        return "no NaN or infinity in any tensor"
    if kind == "converted":
        params, _ = convert.load_converted(directory, weights)
        _check_finite(params)
        if weights.layout is None:
            return "no NaN or infinity in any tensor"
        bank.open_bank(directory / convert.BANK).verify(progress)
        return "every expert has its checksum, no NaN or infinity in the dense weights"
    model = Decoder(config, _dtype(kind, stored))
    flat, records = orbax_directory.load_directory(directory, model, on_device=False)
    flat = {name: np.asarray(a).view(weights.specs[name].dtype) for name, a in flat.items()}
    if records is not None:
        layout, host = weights.layout, np.asarray(records)
        flat |= {f"experts/{part}": layout.view(host, part) for part in layout.parts}
    _check_finite(flat)
    return "no NaN or infinity in any array"


def _scan(placements: list, progress: hf.Progress | None) -> None:
    total, read = sum(p.source_bytes for p in placements), 0
    for _, placement, _, bits in hf.stream(placements):
        read += len(bits) * placement.source_bytes // placement.count
        if progress is not None:
            progress(read, total)


def _check_finite(arrays: dict[str, np.ndarray]) -> None:
    bad = [name for name, array in arrays.items() if not _finite(array)]
    if bad:
        raise NonFiniteError(f"NaN or infinity in {', '.join(bad)}: convert the model again")


def _finite(array: np.ndarray) -> bool:
    return all(np.isfinite(part.astype(np.float32)).all() for part in array)


def _facts(config: ModelConfig) -> dict[str, Any]:
    return {
        "model_type": config.model_type,
        "layers": config.num_layers,
        "layers_with_experts": config.num_moe_layers,
        "experts_per_layer": config.num_experts,
        "experts_per_token": config.top_k,
        "width": config.width,
        "expert_width": config.expert_width,
        "shared_expert_width": config.shared_width,
        "heads": config.num_heads,
        "kv_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "vocabulary": config.vocab_size,
        "max_positions": config.max_positions,
        "rope": config.rope.kind,
        "latent_attention": config.latent is not None,
        "tied_embeddings": config.tied_embeddings,
    }


def _stored(
    directory: pathlib.Path, config: ModelConfig, quant: str | None = None
) -> tuple[str, Counter[str], int]:
    """Kind of directory, bytes by stored dtype, and number of tensors."""
    stored: Counter[str] = Counter()
    if orbax_directory.is_orbax(directory):
        leaves = orbax_directory.tree_leaves(directory)
        for shape, dtype in leaves.values():
            stored[np.dtype(dtype).name] += math.prod(shape) * np.dtype(dtype).itemsize
        return "orbax", stored, len(leaves)
    converted = convert.is_converted(directory)
    dense = headers.read_header(directory / convert.DENSE) if converted else []
    tensors = dense or headers.list_tensors(directory)
    names = {source: dtype.name for source, dtype in hf.SOURCES.items()}
    names |= {"U8": quant} if quant else {}
    for tensor in tensors:
        stored[names.get(tensor.dtype, tensor.dtype)] += tensor.nbytes
    if not converted:
        return "hf", stored, len(tensors)
    count = len(tensors)
    if config.moe_layers:
        opened = bank.open_bank(directory / convert.BANK)
        stored[opened.layout.dtype] += opened.layout.stride * len(opened.records)
        count += len(opened.records)
    return "converted", stored, count


def _dtype(kind: str, stored: Counter[str]) -> str:
    """The dtype that most bytes have; a Hugging Face directory is loaded as bfloat16 by default."""
    known = [name for name, _ in stored.most_common() if name in DTYPES]
    if kind == "orbax":
        bits = {"uint16": "bfloat16", "uint32": "float32"}
        known = [bits.get(name, name) for name, _ in stored.most_common()]
    if not known and kind != "hf":
        raise CheckpointError(f"the weights are {', '.join(stored)}: convert the model again")
    return "bfloat16" if kind == "hf" else known[0]
