"""The command `plan`. Imports nothing that takes time until it runs."""

import dataclasses
import pathlib
from typing import Annotated, Any

import typer

from moejax.cli import options as opt
from moejax.errors import InputError
from moejax.units import format_bytes, parse_bytes

REFERENCE = "server-2core"  # the preset whose rates stand for those of any CPU
ASSUMED = (
    "times are for the rates of a measured 2-core server: measure yours with `moejax bench hw > "
    "hw.json` and add --hardware hw.json"
)


def plan(
    model: Annotated[
        str,
        typer.Argument(
            help="A directory, a config.json, a .gguf file, 'tiny', or a well-known hub id such as "
            "Qwen/Qwen3-30B-A3B."
        ),
    ],
    device_memory: opt.DeviceMemory = None,
    host_memory: Annotated[
        str | None,
        typer.Option(
            help="Without a GPU, the budget of the model in memory; with one, the host's memory."
        ),
    ] = None,
    hardware: Annotated[
        str | None,
        typer.Option(
            help="A preset such as rtx-4090 (a wrong name lists them) or a JSON file of "
            "`moejax bench hw`; default this machine's memory, at the rates of its GPU's preset, "
            f"without a GPU of {REFERENCE}."
        ),
    ] = None,
    link: Annotated[
        str | None,
        typer.Option(
            help="Without a GPU and with --device-memory: a link in place of one's own memory, as "
            "'paced:GB_PER_S,LATENCY_US[,HOST_US]'."
        ),
    ] = None,
    context: opt.Context = None,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of a prompt, for its time.")] = 512,
    trace: Annotated[
        pathlib.Path | None, typer.Option(help="Take hit rates from this recorded trace.")
    ] = None,
    dtype: opt.Dtype = "bfloat16",
    quant: opt.Quant = None,
    group: opt.Group = 32,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify", help="Load it, run the policy and lru in turn, and take the faster."
        ),
    ] = False,
    json: opt.AsJson = False,
    quiet: opt.Quiet = False,
) -> None:
    """Say what of a model fits where, how fast it will be, what limits it and how to run it.

    From config and file headers only, so before a download too.
    """
    budgets = {"device_memory": device_memory, "host_memory": host_memory}
    sizes = {name: None if text is None else parse_bytes(text) for name, text in budgets.items()}
    form = {"context": context, "prompt": prompt, "dtype": dtype, "quant": quant, "group": group}
    form["link"] = link
    show(model, hardware, sizes, form, trace, verify, json, quiet)


def show(
    model: str,
    hardware: str | None,
    sizes: dict[str, int | None],
    form: dict[str, Any],
    trace: pathlib.Path | None,
    verify: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Make and print a plan.

    Args:
        sizes: `device_memory` and `host_memory` in bytes.
        form: `context`, `prompt`, `dtype`, `quant`, `group`, `link`.
    """
    from moejax.planner import plan as planning
    from moejax.planner.machines import PRESETS, machine
    from moejax.terminal import Terminal

    if verify and hardware in PRESETS:
        raise InputError("--verify runs on this machine: leave --hardware out or give its file")
    terminal = Terminal(quiet)
    known, note = (machine(hardware), None) if hardware else this_machine()
    asked = planning.Asked(model=model, **sizes, **form)
    if trace is not None:
        asked = dataclasses.replace(asked, curve=curve_of(trace))
    with terminal.status("planning (compiles the prefill step for its workspace)"):
        made = planning.make(asked, known)
    checked = None
    if verify:
        with terminal.status("planning lru in the same budget"):
            plain = planning.make(dataclasses.replace(asked, policy=planning.RESIDENT), known)
        made, checked = _verified(terminal, made, plain, asked)
    made = dataclasses.replace(made, notes=[*made.notes, *([note] if note else [])])
    if as_json:
        from moejax.cli.actions import print_json

        found = None if checked is None else dataclasses.asdict(checked)
        print_json(made.as_dict() | {"verified": found})
        return
    _print(made, checked)


def _verified(terminal: Any, made: Any, plain: Any, asked: Any) -> tuple[Any, Any]:
    from moejax.planner.verify import verify

    given = {"device_memory": asked.device_memory, "host_memory": asked.host_memory}
    if made.budget is not None and not any(given.values()):
        name = "device_memory" if made.machine.kind == "gpu" else "host_memory"
        given = {name: made.budget}
    options = {"dtype": asked.dtype, "group": asked.group, "link": asked.link}
    with terminal.progress(f"loading {made.model}") as report:
        return verify(made, plain, progress=report, **options, **given)


def this_machine() -> tuple[Any, str | None]:
    """The machine that this runs on, and what is not known about it.

    Raises:
        InputError: a GPU of which there is no preset.
    """
    import os

    from moejax import allocator
    from moejax.planner.machines import PRESETS

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    total = allocator.gpu_memory()
    if total is None:
        server = PRESETS[REFERENCE]()
        sizes = {"host_memory": memory, "device_memory": memory}
        name = f"this machine at the rates of {REFERENCE}"
        return dataclasses.replace(server, name=name, **sizes), ASSUMED
    name = gpu_name()
    found = preset_of(name)
    if found is None:
        raise InputError(
            f"no rates are known of {name!r}: give --hardware NAME or FILE.json; known: "
            f"{', '.join(PRESETS)}"
        )
    sizes = {"host_memory": memory, "device_memory": total}
    return dataclasses.replace(PRESETS[found](), name=name, **sizes), None


def gpu_name() -> str:
    """The first GPU's name, as nvidia-smi has it; empty if it does not answer."""
    import subprocess

    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        asked = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return asked.stdout.partition("\n")[0].strip() if asked.returncode == 0 else ""


def preset_of(name: str) -> str | None:
    """The preset of a GPU by the name that its driver gives it, None if there is none.

    "NVIDIA A100-SXM4-80GB" is a100-80-sxm; an H100 without "PCIe" in its name sits on SXM.
    """
    from moejax.planner.machines import PRESETS

    words = name.lower().replace("h100 80gb hbm3", "h100 sxm")
    fitting = [
        preset
        for preset in PRESETS
        if not preset.endswith("-pcie3") and all(part in words for part in preset.split("-"))
    ]
    return max(fitting, key=len, default=None)


def curve_of(path: pathlib.Path) -> Any:
    """The hit rates of a trace's own routing under least recently used.

    Raises:
        MoejaxError: not a trace, or one that is damaged.
    """
    from moejax.planner.reuse import of_trace
    from moejax.traces.trace import Trace

    return of_trace(Trace.load(path))


def _print(made: Any, checked: Any) -> None:
    from rich.console import Console

    from moejax.terminal import facts_table, table

    console = Console(highlight=False)
    console.print(facts_table(_rows(made)))
    if made.alternatives:
        rows = [
            (a["format"], a["slots"], f"{a['share']:.0%}", f"{a['tpot_ms']:.2f}", a["limit"])
            for a in made.alternatives
        ]
        console.print("\nin the same budget, by --quant:", style="dim")
        names = ("weights", "slots, about", "resident", "TPOT, ms", "limit")
        console.print(table(names, rows))
    console.print()
    for note in made.notes:
        console.print(f"- {note}", style="dim", markup=False, soft_wrap=True)
    if checked is not None:
        console.print(checked.said, markup=False, soft_wrap=True)
    console.print(made.command, markup=False, soft_wrap=True)


def _rows(made: Any) -> list[tuple[str, str]]:
    from moejax.planner.predict import TIERS

    share = made.slots / made.experts
    low, high = (_ms(ms) for ms in made.tpot_range_ms)
    spread = f" ({low} to {high} by routing)" if high != low else ""
    tpot, ttft = _ms(made.tpot.total_ms), _ms(made.ttft.total_ms)
    bounds = (f"{name} {_ms(value)}" for name, value in made.bounds_ms.items())
    slots = f"{made.slots} of {made.experts} ({share:.0%}), {made.slots_per_layer:.1f} per layer"
    tokens = f"{made.prompt} token{'s' * (made.prompt != 1)}"
    return [
        ("machine", _machine(made.machine)),
        ("experts", TIERS[made.tier]),
        ("slots", slots),
        *((name, format_bytes(size)) for name, size in made.memory.items()),
        *((f"all experts {place}", format_bytes(size)) for place, size in made.store.items()),
        *(("loading sets", f"{name}={value}") for name, value in made.environment.items()),
        *_hits(made),
        (
            "time per output token",
            f"{tpot}{spread} after {made.context // 2} tokens; limited by {made.limit}",
        ),
        ("time to first token", f"{ttft} for {tokens}; limited by {made.ttft_limit}"),
        ("bounds", ", ".join(bounds)),
        ("policy", f"{made.policy}: {made.reason}"),
    ]


def _ms(ms: float) -> str:
    return f"{ms:.2f} ms" if ms < 1000 else f"{ms / 1e3:.2f} s"


def _machine(planned_for: Any) -> str:
    on_host = format_bytes(planned_for.host_memory)
    if planned_for.kind == "cpu":
        link = f", {planned_for.link}" if planned_for.link != "memory copy" else ""
        return f"{planned_for.name}{link}, {on_host} of memory"
    own = format_bytes(planned_for.device_memory)
    return f"{planned_for.name}, {planned_for.link}, {own} and {on_host} on the host"


def _hits(made: Any) -> list[tuple[str, str]]:
    if made.tier == "resident":
        return [("hit rate", "100%")]
    found = made.hits
    low, middle, high = (f"{rate:.0%}" for rate in (found.low, found.middle, found.high))
    spread = f" ({low} to {high})" if high != low else ""
    return [("hit rate", f"{middle}{spread}: {found.source}")]
