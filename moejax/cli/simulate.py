"""What `moejax simulate` does: policies and budgets on a recorded trace, in one table."""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from moejax.cli import options as opt
from moejax.errors import InputError

File = Annotated[pathlib.Path, typer.Argument(help="A trace, see `moejax trace`.")]
Policies = Annotated[
    list[str],
    typer.Option(
        "--policy",
        help="lru, lfu, belady (knows the future), optimal (the bound), or what `moejax policies` "
        "lists, with numbers if they are to differ; several times.",
    ),
]
Slots = Annotated[
    list[str],
    typer.Option(
        help="Experts in slots, over all layers: how many or a share such as 40%; several times.",
        metavar="N|P%",
    ),
]
SlotsPerLayer = Annotated[
    list[int], typer.Option(help="Experts in each layer's own slots; several times.", min=1)
]
Semantics = Annotated[
    str,
    typer.Option(
        help="'access': one pick after the other, nothing shielded. 'engine': as the engine does "
        "it, layer by layer, whatever a layer needs staying until it has run."
    ),
]
Warm = Annotated[
    str, typer.Option(help="'prefill' fills the slots before decoding; 'none' leaves it out.")
]
Prefetch = Annotated[
    str,
    typer.Option(
        help="With engine semantics: the policy's 'own', 'none', or 'oracle', which is always "
        "right."
    ),
]
PromptAlone = Annotated[
    bool | None,
    typer.Option(
        "--prompt-alone/--prompt-together",
        help="Whether tokens of a prompt run one by one; default as recorded by moejax, one by one "
        "in other traces.",
    ),
]
Hardware = Annotated[
    str | None,
    typer.Option(
        help="Predict times on this machine: a preset of `moejax plan`, its JSON file, or that of "
        "`moejax bench hw`."
    ),
]
Disk = Annotated[bool, typer.Option("--disk", help="Experts come from its disk.")]
Link = Annotated[
    str | None,
    typer.Option(help="Experts come over 'paced:GB_PER_S,LATENCY_US[,HOST_US]' instead."),
]
RecordBytes = Annotated[
    str | None, typer.Option(help="Size of an expert, such as 3MB; default the trace's.")
]
ResidentTpot = Annotated[
    float | None,
    typer.Option(
        metavar="MS", help="Time per token with all experts in slots; else experts alone count."
    ),
]
Check = Annotated[
    bool, typer.Option("--check", help="Look for broken tables after every layer; slow.")
]


def simulate(
    file: File,
    policy: Policies = ["lru"],  # noqa: B006 - typer copies it
    slots: Slots = [],  # noqa: B006
    slots_per_layer: SlotsPerLayer = [],  # noqa: B006
    semantics: Semantics = "access",
    warm: Warm = "prefill",
    prefetch: Prefetch = "own",
    prompt_alone: PromptAlone = None,
    hardware: Hardware = None,
    disk: Disk = False,
    link: Link = None,
    record_bytes: RecordBytes = None,
    resident_tpot: ResidentTpot = None,
    check: Check = False,
    json: opt.AsJson = False,
    quiet: opt.Quiet = False,
) -> None:
    """Replay a recorded trace under other policies and budgets, without the model.

    Rates are over decode. Without --slots or --slots-per-layer: an eighth and a quarter of all
    experts. With --hardware, the predicted time per token, its bound, and what most of it goes to.
    """
    from moejax.terminal import Terminal

    asked = {"semantics": semantics, "warm": warm, "prefetch": prefetch}
    asked |= {"alone": prompt_alone, "check": check}
    machine = {"hardware": hardware, "disk": disk, "link": link, "resident_tpot": resident_tpot}
    budgets = (slots, slots_per_layer)
    report = compare(Terminal(quiet), file, policy, budgets, asked, record_bytes, machine)
    if json:
        from moejax.cli import actions as commands

        commands.print_json(report)
    else:
        _print(report)


def compare(
    terminal: Any,
    file: pathlib.Path,
    policies: Sequence[str],
    budgets: tuple[Sequence[str], Sequence[int]],
    asked: dict[str, Any],
    record_bytes: str | None,
    machine: dict[str, Any],
) -> dict[str, Any]:
    """The report of `simulate`, for JSON.

    Args:
        budgets: slots over all layers, as --slots has them, or slots per layer; at most one of
            them is not empty.
        asked: fields of `simulate.Asked`.
        machine: `hardware`, `disk`, `link` and `resident_tpot` as the command has them.

    Raises:
        MoejaxError: bad options, a bad trace, or policies that it cannot replay.
    """
    from moejax.simulator.simulate import Asked
    from moejax.simulator.simulate import simulate as run
    from moejax.traces.trace import Trace
    from moejax.units import parse_bytes, parse_slots

    overall, each = budgets
    if overall and each:
        raise InputError("slots over all layers or slots per layer: give one of them")
    settings = Asked(per_layer=bool(each), **asked)
    trace = Trace.load(file)
    if record_bytes is not None:
        about = trace.about | {"record_bytes": parse_bytes(record_bytes)}
        trace = dataclasses.replace(trace, about=about)
    rates = _rates(trace, settings, **machine)
    experts = trace.layers * trace.experts
    if each:
        slots = [number * trace.layers for number in each]
    else:
        slots = [parse_slots(one, experts) for one in overall] or [experts // 8, experts // 4]
    with terminal.status(f"{len(policies) * len(slots)} replays of {trace.rows} tokens"):
        found = run(trace, policies, slots, settings)
    rows = [one.as_dict() for one in found]
    if rates is not None:
        _add_times(rows, found, trace, settings, rates)
    for row in rows:
        row["slots_per_layer"] = row["slots"] // trace.layers if each else None
    return {
        "trace": {
            "file": str(file),
            "model": trace.model,
            "layers": trace.layers,
            "experts": trace.experts,
            "top_k": trace.top_k,
            "tokens": trace.rows,
            "record_bytes": trace.about.get("record_bytes"),
        },
        "settings": dataclasses.asdict(settings),
        "rates": None if rates is None else dataclasses.asdict(rates),
        "rows": rows,
    } | (rows[0] if len(rows) == 1 else {})  # of one replay, its figures directly, too


def _rates(
    trace: Any,
    asked: Any,
    hardware: str | None,
    disk: bool,
    link: str | None,
    resident_tpot: float | None,
) -> Any:
    """The rates to predict with; None where no machine was named."""
    if hardware is None:
        if disk or link or resident_tpot is not None:
            raise InputError("times need a machine: give --hardware, such as laptop")
        return None
    from moejax.planner.machines import machine
    from moejax.simulator import timeline
    from moejax.tiers import parse_link

    record = trace.about.get("record_bytes")
    if not record:
        raise InputError("the trace does not say how large an expert is: give --record-bytes")
    rates = timeline.rates_of(machine(hardware), record, disk=disk)
    if link is not None:
        if disk:
            raise InputError("experts come from the disk or over a link: give one of them")
        paced = parse_link(link)
        if paced.kind == "disk":
            raise InputError("write --disk for the disk of the machine")
        load = record / paced.gigabytes_per_second / 1e3 + paced.latency_us
        host = max(rates.host_us, paced.host_us)
        rates = dataclasses.replace(rates, load_us=load, latency_us=0.0, host_us=host)
    if resident_tpot is not None:
        from moejax.simulator.simulate import per_step, prepared

        experts, tokens = per_step(prepared(trace, asked))
        rates = rates.with_resident(resident_tpot * 1e3 * tokens, trace.layers, experts)
    return rates


def _add_times(
    rows: list[dict[str, Any]], found: Sequence[Any], trace: Any, asked: Any, rates: Any
) -> None:
    from moejax.simulator import timeline
    from moejax.simulator.simulate import prepared, unavoidable

    made = prepared(trace, asked)
    first = {lossy: unavoidable(made, lossy=lossy) for lossy in {one.lossy for one in found}}
    for row, one in zip(rows, found, strict=True):
        times = timeline.times(one.counts, rates)
        row["tpot_ms"] = one.tpot(times.total) / 1e3
        row["limit"] = times.limit(one.decode)
        row["link_busy_ms"] = one.tpot(times.busy) / 1e3
        bounds = timeline.bounds(one.counts, first[one.lossy], rates)
        row["bounds_ms"] = {name: one.tpot(bound) / 1e3 for name, bound in bounds.items()}


def _print(report: dict[str, Any]) -> None:
    from rich.console import Console

    from moejax.terminal import table
    from moejax.units import format_bytes

    about, rows = report["trace"], report["rows"]
    each, timed = rows[0]["slots_per_layer"] is not None, report["rates"] is not None
    names = ["policy", "slots/layer" if each else "slots"] + ["share"] * (not timed)
    names += ["hits", "moved/token"]
    names += ["TPOT, ms", "at least", "limit"] * timed + ["holds"]
    lines = []
    for row in rows:
        moved = row["bytes_per_token"]
        line = [row["policy"], row["slots_per_layer"] if each else row["slots"]]
        if not timed:
            line.append(f"{row['slots'] / about['layers'] / about['experts']:.1%}")
        line.append(f"{row['hit_rate']:.1%}")
        line.append(
            f"{row['moved_per_token']:.1f} experts" if moved is None else format_bytes(moved)
        )
        if timed:
            bound = row["bounds_ms"]["oracle_prefetch"]
            line += [f"{row['tpot_ms']:.2f}", f"{bound:.2f}", row["limit"]]
        lines.append([*line, row["label"]])
    console = Console(highlight=False)
    sizes = f"{about['layers']} layers of {about['experts']} experts, top-{about['top_k']}"
    console.print(f"{about['model']}: {sizes}, {about['tokens']} tokens", markup=False)
    console.print(table(names, lines))
