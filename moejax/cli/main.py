"""The command line: options and exit codes. JAX is imported only when a command runs."""

import pathlib
from collections.abc import Callable
from typing import Annotated

import typer

from moejax.cli import evaluation as eval_commands
from moejax.cli import exits
from moejax.cli import options as opt
from moejax.cli import plan as plan_commands
from moejax.cli import reports as report_commands
from moejax.cli import simulate as simulate_commands
from moejax.cli import synthetic as synthetic_commands
from moejax.cli import traces as trace_commands

EPILOG = (
    "Exit codes: 0 done; 1 `doctor` found a failure, `tune` no alpha or `report --check` an old "
    "table; 2 options, prompt or policy; 3 model files; 4 memory budget; 5 download; 6 NaN or "
    "infinity; 70 a bug in moejax; 130 Ctrl-C."
)

app = typer.Typer(
    epilog=EPILOG,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def command(function: Callable) -> Callable:
    """Register a command whose errors become one line on stderr and an exit code."""
    made = exits.guarded(function)
    app.command(epilog=EPILOG)(made)
    return made


def _print_version(asked: bool) -> None:
    if asked:
        import importlib.metadata

        print(f"moejax {importlib.metadata.version('moejax')}")
        raise typer.Exit()


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """Run Mixture-of-Experts language models whose experts do not fit the device."""


@command
def generate(
    prompt: Annotated[
        list[str] | None,
        typer.Argument(help="Texts to continue; several are one batch. Default: --file or stdin."),
    ] = None,
    file: Annotated[
        list[pathlib.Path] | None, typer.Option("--file", "-f", help="Read a prompt from a file.")
    ] = None,
    model: opt.Model = "tiny",
    slots: opt.Slots = None,
    device_memory: opt.DeviceMemory = None,
    policy: opt.PolicyName = "lru",
    max_new_tokens: opt.MaxNewTokens = 128,
    temperature: opt.Temperature = None,
    top_k: opt.TopK = None,
    top_p: opt.TopP = None,
    min_p: opt.MinP = None,
    repetition_penalty: opt.Penalty = None,
    seed: opt.Seed = 0,
    stop: opt.Stop = [],  # noqa: B006 - typer copies it
    context: opt.Context = None,
    dtype: opt.Dtype = "bfloat16",
    quant: opt.Quant = None,
    group: opt.Group = 32,
    host_memory: opt.HostMemory = None,
    link: opt.Link = None,
    kernels: opt.Kernels = None,
    draft: opt.DraftModel = None,
    residency_file: opt.ResidencyFile = None,
    check_records: opt.CheckRecords = False,
    logprobs: Annotated[int, typer.Option(min=0, help="Likeliest tokens beside each, --json.")] = 0,
    drift_budget: opt.DriftBudget = None,
    drift_every: opt.DriftEvery = None,
    virtual: opt.Virtual = False,
    warm_up: opt.WarmUp = True,
    json: opt.AsJson = False,
    quiet: opt.Quiet = False,
) -> None:
    """Continue a prompt: the arguments and --file; without either, what is piped to stdin.

    Text goes to stdout; progress and a table of what it cost go to stderr.
    """
    load, sampling = opt.for_load(locals()), opt.for_sampling(locals())
    from moejax.cli import actions as commands
    from moejax.terminal import Terminal

    terminal = Terminal(quiet)
    prompts = commands.read_prompts(prompt or [], file or [])
    options = {"logprobs": logprobs, "drift": commands.drift_budget(drift_budget, drift_every)}
    runtime = commands.load_model(terminal, model, batch=len(prompts), **load)
    if warm_up:
        commands.warm_up(terminal, runtime, batch=len(prompts), sampling=sampling, **options)
    options |= {"stop": stop, "seed": seed}
    commands.generate(terminal, runtime, prompts, max_new_tokens, sampling, options, json)


@command
def chat(
    model: opt.Model = "tiny",
    system: Annotated[str | None, typer.Option(help="The system message.")] = None,
    slots: opt.Slots = None,
    device_memory: opt.DeviceMemory = None,
    policy: opt.PolicyName = "lru",
    max_new_tokens: opt.MaxNewTokens = 256,
    temperature: opt.Temperature = None,
    top_k: opt.TopK = None,
    top_p: opt.TopP = None,
    min_p: opt.MinP = None,
    repetition_penalty: opt.Penalty = None,
    seed: opt.Seed = 0,
    stop: opt.Stop = [],  # noqa: B006 - typer copies it
    context: opt.Context = None,
    dtype: opt.Dtype = "bfloat16",
    quant: opt.Quant = None,
    group: opt.Group = 32,
    host_memory: opt.HostMemory = None,
    link: opt.Link = None,
    kernels: opt.Kernels = None,
    draft: opt.DraftModel = None,
    residency_file: opt.ResidencyFile = None,
    check_records: opt.CheckRecords = False,
    drift_budget: opt.DriftBudget = None,
    drift_every: opt.DriftEvery = None,
    virtual: opt.Virtual = False,
    warm_up: opt.WarmUp = True,
    json: opt.AsJson = False,
    quiet: opt.Quiet = False,
) -> None:
    """Talk with a model that has a chat template; /help lists the commands inside.

    Without a terminal, each line of stdin is a turn and the answers go to stdout.
    """
    load, sampling = opt.for_load(locals()), opt.for_sampling(locals())
    from moejax.cli import actions as commands
    from moejax.terminal import Terminal

    terminal, drift = Terminal(quiet), commands.drift_budget(drift_budget, drift_every)
    runtime = commands.load_model(terminal, model, **load)
    if warm_up:
        commands.warm_up(terminal, runtime, sampling=sampling, drift=drift)
    from moejax.cli import conversation

    conversation.chat(
        terminal,
        runtime,
        system=system,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        stop=stop,
        seed=seed,
        drift=drift,
        as_json=json,
    )


@command
def inspect(
    model: Annotated[str, typer.Argument(help="A directory, 'tiny', or a hub id in the cache.")],
    context: opt.Context = None,
    verify: Annotated[bool, typer.Option("--verify", help="Read and check every weight.")] = False,
    json: opt.AsJson = False,
    quiet: opt.Quiet = False,
) -> None:
    """Show what a model holds and which budgets it fits, from headers alone."""
    from moejax.cli import actions as commands
    from moejax.terminal import Terminal

    commands.inspect(Terminal(quiet), model, context, verify, json)


@command
def convert(
    source: Annotated[str, typer.Argument(help="A model directory, .gguf file or hub id.")],
    target: Annotated[pathlib.Path, typer.Argument(help="The new directory.")],
    dtype: opt.Dtype = "bfloat16",
    quant: Annotated[str | None, typer.Option(help="Quantise to int8 or int4.")] = None,
    group: opt.Group = 32,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier conversion.")] = False,
    orbax: Annotated[bool, typer.Option("--orbax", help="Save with Orbax, not as a bank.")] = False,
    json: opt.AsJson = False,
    quiet: opt.Quiet = False,
) -> None:
    """Convert a model into a directory that is mapped instead of read; continues if interrupted."""
    from moejax.cli import actions as commands
    from moejax.terminal import Terminal

    form = {"dtype": dtype, "quant": quant, "group": group}
    commands.convert(Terminal(quiet), source, target, form, force, orbax, json)


@command
def bench(
    what: Annotated[
        str | None, typer.Argument(help="'hw' measures the machine and writes its record instead.")
    ] = None,
    model: opt.Model = "tiny",
    slots: opt.Slots = None,
    device_memory: opt.DeviceMemory = None,
    policy: opt.PolicyName = "lru",
    pp: Annotated[list[int], typer.Option(help="Prompt tokens; several times; 0 = none.")] = [32],  # noqa: B006
    tg: Annotated[list[int], typer.Option(help="New tokens; several times; 0 = none.")] = [40],  # noqa: B006
    reps: Annotated[int, typer.Option(min=1, help="Times that every test counts.")] = 5,
    batch: Annotated[int, typer.Option(min=1, help="Sequences at once.")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="Same seed, same token ids.")] = 0,
    context: opt.Context = None,
    dtype: opt.Dtype = "bfloat16",
    quant: opt.Quant = None,
    group: opt.Group = 32,
    host_memory: opt.HostMemory = None,
    link: opt.Link = None,
    kernels: opt.Kernels = None,
    draft: opt.DraftModel = None,
    virtual: opt.Virtual = False,
    bandwidth: Annotated[
        bool, typer.Option(help="Time stream reads in between; takes 1 GiB of memory.")
    ] = True,
    json: opt.AsJson = False,
    csv: Annotated[bool, typer.Option("--csv", help="Comma-separated values on stdout.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="A table; the default.")] = False,
    quiet: opt.Quiet = False,
) -> None:
    """Time prompts (pp) and generation (tg) of random tokens, in turn; medians and spread."""
    load = opt.for_load(locals())
    from moejax.cli import actions as commands
    from moejax.terminal import Terminal

    chosen = [n for n, given in {"json": json, "csv": csv, "markdown": markdown}.items() if given]
    times = {"reps": reps, "batch": batch, "seed": seed, "bandwidth": bandwidth}
    load["batch"] = batch
    commands.bench(Terminal(quiet), what, model, pp, tg, load=load, times=times, formats=chosen)


@command
def tune(
    what: Annotated[str, typer.Argument(help="'alpha', the loss that a lossy policy may make.")],
    tpot_budget: Annotated[float, typer.Option(help="Milliseconds per decode step.", metavar="MS")],
    prompt: Annotated[str | None, typer.Option(help="Text to continue; else a built-in.")] = None,
    file: Annotated[
        pathlib.Path | None, typer.Option("--file", "-f", help="Read that text from a file.")
    ] = None,
    model: opt.Model = "tiny",
    slots: opt.Slots = None,
    device_memory: opt.DeviceMemory = None,
    policy: opt.PolicyName = "smoe-fetch",
    alphas: Annotated[str, typer.Option(help="What to measure.")] = "0,0.15,0.3,0.45,0.6",
    degree: Annotated[int, typer.Option(min=1, help="Of the polynomial that is fitted.")] = 2,
    tokens: Annotated[int, typer.Option(min=1, help="Decode steps of each run.")] = 64,
    rounds: Annotated[int, typer.Option(min=1, help="Runs of each alpha, in turn; median.")] = 3,
    seed: opt.Seed = 0,
    context: opt.Context = None,
    dtype: opt.Dtype = "bfloat16",
    quant: opt.Quant = None,
    group: opt.Group = 32,
    host_memory: opt.HostMemory = None,
    link: opt.Link = None,
    kernels: opt.Kernels = None,
    draft: opt.DraftModel = None,
    virtual: opt.Virtual = False,
    json: opt.AsJson = False,
    quiet: opt.Quiet = False,
) -> None:
    """Measure a lossy policy at a few alphas and choose the least that meets a time per token.

    A fit through the measurements chooses, and its choice is measured too. Exit code 1 if no
    alpha will do.
    """
    load = opt.for_load(locals())
    from moejax.cli import policies as policy_commands
    from moejax.terminal import Terminal

    fit = {"budget_ms": tpot_budget, "alphas": alphas, "degree": degree}
    text = {"prompt": prompt, "file": file}
    runs = {"tokens": tokens, "rounds": rounds, "seed": seed}
    if not policy_commands.tune(Terminal(quiet), what, model, load, fit, text, runs, json):
        raise typer.Exit(1)


@command
def policies(json: opt.AsJson = False) -> None:
    """List the policies that --policy names, with their numbers."""
    from moejax.cli import policies as policy_commands

    policy_commands.policies(json)


@command
def build_native(
    force: Annotated[bool, typer.Option("--force", help="Compile even if it has been.")] = False,
) -> None:
    """Compile the native CPU kernels now; otherwise that happens when they are first needed."""
    from moejax.kernels import build

    print(build.build(force))


@command
def doctor(json: opt.AsJson = False) -> None:
    """Check this machine and installation; exit code 1 if something fails."""
    from moejax.cli import actions as commands

    if not commands.doctor(json):
        raise typer.Exit(1)


app.add_typer(trace_commands.app, name="trace")
trace_commands.command("synthesize")(synthetic_commands.synthesize)
for made_elsewhere in (
    plan_commands.plan,
    simulate_commands.simulate,
    eval_commands.eval,
    report_commands.report,
):
    command(made_elsewhere)


def main() -> None:
    """Run the command line."""
    app()
