"""Options that several commands share."""

import pathlib
from typing import Annotated, Any

import typer

from moejax.units import parse_slots

Model = Annotated[
    str,
    typer.Option(
        "--model", "-m", help="'tiny' (embedded), a directory, a .gguf file, or a hub id."
    ),
]
Slots = Annotated[
    str | None,
    typer.Option(
        help="Experts on the device at once, over all layers: how many, such as 76, or a share "
        "such as 40%; default all.",
        metavar="N|P%",
    ),
]
Force = Annotated[bool, typer.Option("--force", help="Replace an earlier file.")]
DeviceMemory = Annotated[
    str | None,
    typer.Option(help="Budget such as 6GiB for weights, KV cache and workspace, not with --slots."),
]
HostMemory = Annotated[
    str | None,
    typer.Option(
        help="Budget for the model in memory, without a GPU: what does not fit stays on the disk. "
        "The process itself takes up to 640 MiB beside it. Not with --slots."
    ),
]
Link = Annotated[
    str | None,
    typer.Option(
        help="Move experts from 'disk', or from memory at 'paced:GB_PER_S,LATENCY_US[,HOST_US]'; "
        "HOST_US: least microseconds of an expert computed on the host (no GPU)."
    ),
]
Quant = Annotated[str | None, typer.Option(help="Quantise while loading: int8 or int4.")]
Group = Annotated[int, typer.Option(help="Columns that share a scale with int4: 32 or 64.")]
Kernels = Annotated[
    str | None,
    typer.Option(help="'native' (default on CPUs), 'reference' (default on GPUs), 'pallas'."),
]
ResidencyFile = Annotated[
    pathlib.Path | None,
    typer.Option(help="Start with the experts that this file names; it is written at the end."),
]
CheckRecords = Annotated[
    bool, typer.Option("--check-records", help="Compare the checksum of every record read.")
]
DraftModel = Annotated[
    str | None,
    typer.Option(
        "--draft",
        help="A smaller model with the same tokens, for policies that draft with one; 'tiny' "
        "brings its own.",
    ),
]
PolicyName = Annotated[
    str,
    typer.Option(
        "--policy",
        help="How experts are chosen, kept and fetched, with numbers if they are to differ: "
        "'smoe-fetch:alpha=0.3,window=32'. `moejax policies` lists them.",
    ),
]
MaxNewTokens = Annotated[
    int, typer.Option("--max-new-tokens", "-n", min=1, help="At most this many tokens.")
]
Temperature = Annotated[
    float | None, typer.Option(help="0 takes the likeliest token; default the model's.")
]
TopK = Annotated[int | None, typer.Option(help="Draw from this many likeliest; 0 = all.")]
TopP = Annotated[float | None, typer.Option(help="Draw from the likeliest of this total share.")]
MinP = Annotated[float | None, typer.Option(help="Drop tokens below this share of the likeliest.")]
Penalty = Annotated[
    float | None, typer.Option("--repetition-penalty", help="Above 1 avoids tokens already seen.")
]
Seed = Annotated[int, typer.Option(help="Same seed, same text, but with drafts.")]
Stop = Annotated[list[str], typer.Option(help="End at this text; may be given several times.")]
Context = Annotated[int | None, typer.Option(help="Tokens per sequence that the KV cache holds.")]
Dtype = Annotated[str, typer.Option(help="bfloat16 or float32.")]
Virtual = Annotated[bool, typer.Option("--virtual", help="Count transfers, but copy nothing.")]
WarmUp = Annotated[bool, typer.Option(help="Compile before the first token is timed.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Nothing on stderr but errors.")]
DriftBudget = Annotated[
    float | None,
    typer.Option(
        help="Steer a lossy policy's alpha so that it drifts this many nats per token (KL) from "
        "the model's own routing.",
        metavar="NATS",
    ),
]
DriftEvery = Annotated[
    int | None, typer.Option(min=1, help="Decode steps from one look at the drift to the next; 16.")
]

# Options of the commands that run a model, named as `moejax.load` names them.
LOADING = (
    "slots",
    "device_memory",
    "host_memory",
    "policy",
    "context",
    "dtype",
    "quant",
    "group",
    "link",
    "kernels",
    "residency_file",
    "check_records",
    "virtual",
    "draft",
)


def for_load(given: dict[str, Any]) -> dict[str, Any]:
    """Those of a command's options that `moejax.load` takes."""
    return {name: given[name] for name in LOADING if name in given}


def slots_of(model: str, slots: int | str | None) -> int | None:
    """The slots that `moejax.load` takes, of --slots.

    Raises:
        MoejaxError: not a number or a share, or a share of a model that cannot be found.
    """
    if slots is None:
        return None
    experts = 0
    if "%" in str(slots):
        from moejax.loading import read_config, source_path
        from moejax.models import config_from_hf

        config = config_from_hf(read_config(source_path(model)))
        experts = config.num_moe_layers * config.num_experts
    return parse_slots(slots, experts)


SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


def for_sampling(given: dict[str, Any]) -> dict[str, Any]:
    """Those of a command's options that override the model's way to choose tokens."""
    return {name: given[name] for name in SAMPLING if given[name] is not None}
