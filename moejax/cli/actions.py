"""What each command does; `main` declares its options."""

import dataclasses
import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from moejax.cli.options import slots_of
from moejax.errors import CheckpointError, InputError, unreadable
from moejax.report import show_stats, stats_document
from moejax.terminal import Terminal, table
from moejax.units import format_bytes, parse_bytes, parse_slots

BUDGET_POLICY = "lru"  # of `inspect`: the default of `generate`


def load_model(terminal: Terminal, model: str, **options: Any) -> Any:
    """`moejax.load` with a progress bar."""
    # A typing error should not cost an import of JAX.
    if options.get("device_memory") is not None:
        parse_bytes(options["device_memory"])
    if (asked := options.get("slots")) is not None:
        parse_slots(asked, 0)
    from moejax.allocator import gpu_memory
    from moejax.kernels import build
    from moejax.loading import load

    if gpu_memory() is None and options.get("kernels") != "reference":
        with terminal.status("preparing the native kernels (compiled once)"):
            if build.library() is None and not options.get("kernels"):
                terminal.note(build.status())
                options["kernels"] = "reference"
    with terminal.progress(f"loading {model}") as report:
        slots = options["slots"] = slots_of(model, asked)
        runtime = load(model, progress=report, **options)
    if runtime.policy is None:
        return runtime
    if (slots or 0) > runtime.slots:
        terminal.note(f"--slots {slots}: there are {runtime.slots} experts, and all fit")
    file = runtime.residency_file
    if file is not None and not file.exists():
        terminal.note(f"{file} does not exist yet: a cold start; the file is written at the end")
    return runtime


def warm_up(
    terminal: Terminal, runtime: Any, *, batch: int = 1, drift: Any = None, **options: Any
) -> None:
    """Compile before the clock starts."""
    count = programs(runtime) + (2 if drift is not None else 0)
    with terminal.status(f"compiling {count} programs, or loading them (not counted below)"):
        runtime.warm_up(batch, **options)
        if drift is not None:  # one step that is looked at, and one that is not
            often = dataclasses.replace(drift, every=2)
            alone = dataclasses.replace(runtime, residency_file=None)  # which it would write
            alone.generate([[0]] * batch, 3, drift=often, **options)


def programs(runtime: Any) -> int:
    """Programs that `Runtime.warm_up` compiles: of prompts and steps, or cycles of each width."""
    from moejax.cycles import widths

    longest = 0 if runtime.policy is None else runtime.policy.speculation.max_length
    if not longest:
        return 2
    return 1 + len(widths(longest)) + (runtime.draft is not None)


def drift_budget(nats: float | None, every: int | None) -> Any:
    """The budget that --drift-budget and --drift-every ask for, None for none.

    Raises:
        InputError: a number out of range, or steps without a budget.
    """
    if nats is None:
        if every is not None:
            raise InputError("--drift-every says how often: give --drift-budget too")
        return None
    from moejax.live import DriftBudget

    return DriftBudget(nats) if every is None else DriftBudget(nats, every)


def read_prompts(given: Sequence[str], files: Sequence[pathlib.Path]) -> list[str]:
    """Prompts of the command line, else of files, else of stdin (one, without its last newline).

    Raises:
        InputError: no prompt, an empty one, or a file that cannot be read.
    """
    prompts = [*given, *(_text_of(file) for file in files)]
    if not prompts and not sys.stdin.isatty():
        try:
            prompts = [text] if (text := sys.stdin.read().removesuffix("\n")) else []
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(unreadable("standard input", error)) from error
    if not prompts:
        raise InputError("no prompt: give one as argument, with --file, or pipe it to stdin")
    if not all(prompts):
        raise InputError("a prompt is empty: give at least one character")
    try:
        "".join(prompts).encode()
    except UnicodeEncodeError as error:  # of bytes that Python could not decode
        raise InputError("a prompt is not UTF-8 text") from error
    return prompts


def _text_of(path: pathlib.Path) -> str:
    try:
        return path.read_text(encoding="utf-8").removesuffix("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(unreadable(path, error)) from error


def generate(
    terminal: Terminal,
    runtime: Any,
    prompts: list[str],
    max_new_tokens: int,
    sampling: dict[str, Any],
    options: dict[str, Any],
    as_json: bool,
) -> None:
    """Complete prompts: a single one is streamed to stdout, several are printed in order.

    Args:
        options: as `Runtime.stream` takes them.
    """
    if as_json or len(prompts) > 1:
        with terminal.status("generating"):
            completions = runtime.generate(prompts, max_new_tokens, sampling, **options)
        if as_json:
            drift = options["drift"] and dataclasses.asdict(options["drift"])
            settings = {"max_new_tokens": max_new_tokens, "sampling": sampling, **options}
            settings["drift"] = drift
            print_json(_as_document(runtime, prompts, completions, settings))
        else:
            for i, completion in enumerate(completions):
                print(f"[{i + 1}] {completion.text}")
    else:
        if sys.stdout.isatty():
            terminal.console.print(prompts[0], style="dim", markup=False, soft_wrap=True, end="")
        for piece in runtime.stream(prompts, max_new_tokens, sampling, **options):
            print(piece.text, end="", flush=True)
        print()
    terminal.console.print()
    show_stats(terminal, runtime)


def _as_document(
    runtime: Any, prompts: list[str], completions: list, settings: dict[str, Any]
) -> dict[str, Any]:
    from moejax.doctor import environment

    results = [
        {
            "prompt": prompt,
            "text": completion.text,
            "finish_reason": completion.finish_reason,
            "tokens": [
                {"id": t.id, "logprob": t.logprob, "top_logprobs": t.top_logprobs}
                for t in completion.tokens
            ],
        }
        for prompt, completion in zip(prompts, completions, strict=True)
    ]
    return {
        "model": str(runtime.directory),
        "settings": settings | {"policy": _policy_document(runtime.policy)},
        "completions": results,
        "stats": stats_document(runtime),
        "environment": environment(),
    }


def _policy_document(policy: Any) -> dict[str, Any] | None:
    if policy is None:
        return None
    names = ("router", "evictor", "placement", "predictor", "cutoff", "speculation")
    parts = {name: _part_document(getattr(policy, name)) for name in names}
    return parts | {"capacity": int(policy.capacity)}


def _part_document(part: Any) -> dict[str, Any]:
    """The type of a part and its numbers, as far as they are single ones."""
    import numpy as np

    values = {f.name: getattr(part, f.name) for f in dataclasses.fields(part)}
    values.pop("node_type", None)
    return {"type": type(part).__name__} | {
        name: value if isinstance(value, str) else np.asarray(value).item()
        for name, value in values.items()
        if np.ndim(value) == 0
    }


def inspect(terminal: Terminal, model: str, context: int | None, verify: bool, as_json: bool):
    """Describe a model directory; with `verify`, read it all."""
    from moejax import describe as facts
    from moejax.devices import use_compilation_cache
    from moejax.hub import resolve

    directory = resolve(model, download=False)
    use_compilation_cache()
    with terminal.status("measuring the workspace (compiles the prefill step)"):
        described = facts.describe(directory, context, BUDGET_POLICY)
    verified = None
    if verify:
        with terminal.progress(f"verifying {model}") as report:
            verified = facts.verify(directory, report)
    if as_json:
        print_json(described.as_dict() | {"verified": verified})
        return
    from rich.console import Console

    from moejax.terminal import facts_table

    console = Console(highlight=False)
    console.print(facts_table(_inspect_rows(described, verified, facts.KINDS)))
    if described.fits:
        rows = [(format_bytes(f.budget), f.slots, f"{f.share:.0%}") for f in described.fits]
        console.print()
        console.print(table(("--device-memory", "slots", "experts resident"), rows))
        workspace = format_bytes(described.workspace_bytes)
        note = f"context {described.context}, batch 1, {BUDGET_POLICY}; XLA's workspace {workspace}"
        console.print(note, style="dim")


def _inspect_rows(
    described: Any, verified: str | None, kinds: dict[str, str]
) -> list[tuple[str, str]]:
    config = described.config
    rows = [
        ("model", described.directory),
        ("family", f"{config['model_type']}, {kinds[described.kind]}"),
        ("layers", f"{config['layers']}, {config['layers_with_experts']} with experts"),
    ]
    if described.experts:
        each = f"{config['experts_per_layer']} per layer, top-{config['experts_per_token']}"
        shared = config["shared_expert_width"]
        each += f", shared expert of width {shared}" if shared else ""
        rows.append(("experts", f"{each}, width {config['expert_width']}"))
    heads = f"{config['heads']} heads, {config['kv_heads']} for keys and values"
    rows += [
        ("width", f"{config['width']}, {heads}, {config['head_dim']} channels each"),
        ("context", f"{config['max_positions']} tokens, rope {config['rope']}"),
        ("vocabulary", str(config["vocabulary"])),
        ("parameters", _count(described.parameters)),
        ("active per token", _count(described.active_parameters)),
        ("dense weights", format_bytes(described.dense_bytes)),
    ]
    if described.experts:
        one, everything = described.expert_bytes, described.all_experts_bytes
        rows.append(("one expert", format_bytes(one)))
        rows.append((f"all {described.experts} experts", format_bytes(everything)))
    stored = ", ".join(f"{name} {format_bytes(size)}" for name, size in described.stored.items())
    rows += [
        ("KV cache", f"{format_bytes(described.kv_bytes_per_1k_tokens)} per 1024 tokens"),
        ("stored", f"{described.tensors} tensors, {stored}"),
    ]
    return [*rows, ("verified", verified)] if verified else rows


def _count(parameters: int) -> str:
    for size, unit in ((10**9, "billion"), (10**6, "million")):
        if parameters >= size:
            return f"{parameters / size:.2f} {unit}"
    return str(parameters)


def convert(
    terminal: Terminal,
    source: str,
    target: pathlib.Path,
    form: dict[str, Any],
    force: bool,
    orbax: bool,
    as_json: bool,
) -> None:
    """Convert a model into a directory that loads without conversion, quantised if so asked."""
    from moejax import loading, orbax_directory
    from moejax.checkpoints import convert as converted
    from moejax.formats import quant_format
    from moejax.layout import DTYPES
    from moejax.models import config_from_hf, family
    from moejax.models.family import weight_map
    from moejax.models.transformer import Decoder

    dtype, errors = form["dtype"], {}
    if dtype not in DTYPES:
        raise InputError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    if quant_format(form["quant"], form["group"]) and orbax:
        raise InputError("Orbax directories hold floats only: leave out --orbax or --quant")
    path = loading.source_path(source)
    config = config_from_hf(loading.read_config(path))
    if converted.is_converted(path) or orbax_directory.is_orbax(path):
        raise CheckpointError(f"{path} is already converted: give the original")
    weights = weight_map(config, family(config.model_type).rules, dtype)
    with terminal.progress(f"converting {source}") as report:
        options = {"force": force, "progress": report}
        if orbax:
            orbax_directory.save_directory(path, target, Decoder(config, dtype), weights, **options)
        else:
            how = {"quant": form["quant"], "group": form["group"]}
            errors = converted.convert_directory(path, target, weights, **how, **options)
    size = sum(f.stat().st_size for f in target.rglob("*") if f.is_file())
    if as_json:
        about = {"source": str(path), "target": str(target), "bytes": size, "errors": errors}
        print_json(about | form)
        return
    if errors:
        rows = [(n, f"{e['mean']:.2%} mean, {e['max']:.2%} at most") for n, e in errors.items()]
        terminal.facts([("relative RMS error", ""), *rows])
    terminal.note(f"{target}: {format_bytes(size)}, run it with --model {target}")


def doctor(as_json: bool) -> bool:
    """Print every check; whether none failed."""
    from moejax import doctor as doctoring

    if as_json:
        found = list(doctoring.checks())
        rows = [{"name": c.name, "status": c.status, "detail": c.detail} for c in found]
        print_json({"checks": rows, "versions": doctoring.versions()})
    else:
        from rich.console import Console
        from rich.text import Text

        console, found = Console(highlight=False), []
        colours = {"ok": "green", "warn": "yellow", "fail": "bold red"}
        for check in doctoring.checks():
            line = Text.assemble((f"{check.status:4}", colours[check.status]), f"  {check.name}: ")
            console.print(line.append(check.detail), soft_wrap=True)
            found.append(check)
    return all(check.status != "fail" for check in found)


def bench(
    terminal: Terminal,
    what: str | None,
    model: str,
    pp: Sequence[int],
    tg: Sequence[int],
    *,
    load: dict[str, Any],
    times: dict[str, Any],
    formats: Sequence[str],
) -> None:
    """Time a model with `load`'s options, or measure the machine for its experts (`hw`)."""
    if len(formats) > 1:
        raise InputError(f"one document on stdout: give one of --{', --'.join(formats)}")
    if what not in (None, "hw"):
        raise InputError(f"bench {what!r} is unknown: give nothing to time a model, or 'hw'")
    if what == "hw":
        if set(formats) - {"json"}:
            raise InputError("bench hw writes JSON only")
        with terminal.status("measuring the machine"):
            print(_hardware(model, load).to_json())
        return
    from moejax import bench as benching
    from moejax.doctor import environment

    chosen = benching.tests(pp, tg)
    context = load["context"] or benching.context_for(chosen)
    runtime = load_model(terminal, model, **load | {"context": context})
    with terminal.status(f"{len(chosen)} tests, {times['reps']} times after a warm-up"):
        rows = benching.bench(runtime, chosen, **times)
    rows = [row | {"policy": load["policy"], "environment": environment()} for row in rows]
    if formats == ["json"]:
        print_json(rows)
    else:
        print(benching.as_csv(rows) if formats == ["csv"] else benching.as_markdown(rows))


def _hardware(model: str, load: dict[str, Any]) -> Any:
    from moejax.devices import kernels
    from moejax.formats import quant_format
    from moejax.layout import DTYPES
    from moejax.loading import read_config, source_path
    from moejax.measure import hardware
    from moejax.models import config_from_hf

    form = quant_format(load["quant"], load["group"]) or load["dtype"]
    if load["dtype"] not in DTYPES:
        raise InputError(f"dtype {form!r} is not one of {', '.join(DTYPES)}")
    config = config_from_hf(read_config(source_path(model)))
    if not config.moe_layers:
        raise InputError(f"{model} has no experts to measure the machine for")
    return hardware(config, form, how=kernels(load["kernels"]))


def print_json(document: Any) -> None:
    """Exactly one JSON document on stdout."""
    print(json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False))
