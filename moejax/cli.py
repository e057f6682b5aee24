"""The command line: options and exit codes. JAX is imported only when a command runs."""

import contextlib
import functools
import os
import pathlib
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Annotated, Any

import typer

from moejax import errors
from moejax import options as opt

EXIT_CODES: dict[type[errors.MoejaxError], int] = {
    errors.InputError: 2,
    errors.PolicyError: 2,
    errors.ConfigError: 3,
    errors.UnsupportedModelError: 3,
    errors.CheckpointError: 3,
    errors.TokenizerError: 3,
    errors.BudgetError: 4,
    errors.HubError: 5,
    errors.LinkError: 3,
    errors.NonFiniteError: 6,
}
INTERNAL, INTERRUPTED, BROKEN_PIPE = 70, 130, 141
EPILOG = (
    "Exit codes: 0 done; 1 `doctor` found a failure; 2 options, prompt or policy; 3 model files; "
    "4 memory budget; 5 download; 6 NaN or infinity; 70 a bug in moejax; 130 Ctrl-C."
)

app = typer.Typer(
    epilog=EPILOG,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def exit_code(error: errors.MoejaxError) -> int:
    """The documented exit code of an error: that of its nearest listed class."""
    return next((EXIT_CODES[c] for c in type(error).__mro__ if c in EXIT_CODES), INTERNAL)


def one_line(error: BaseException) -> str:
    """An error's message with its lines joined."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    joined = "".join(f"{line} " if line.endswith(":") else f"{line}; " for line in lines)
    return joined.strip().removesuffix(";") or type(error).__name__


def command(function: Callable) -> Callable:
    """Register a command whose errors become one line on stderr and an exit code."""

    @functools.wraps(function)
    def guarded(**options: Any) -> None:
        try:
            with _leaving_on_interrupt():
                function(**options)
                sys.stdout.flush()
        except BrokenPipeError:
            # Nobody reads stdout any more; without this Python would complain when it flushes it.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise SystemExit(BROKEN_PIPE) from None
        except KeyboardInterrupt:
            raise SystemExit(INTERRUPTED) from None
        except errors.MoejaxError as error:
            _fail(one_line(error), exit_code(error))
        except (typer.Exit, typer.Abort):
            raise
        except Exception as error:
            if "MOEJAX_DEBUG" in os.environ:
                raise
            if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
                reason = one_line(error)
                _fail(f"out of memory, give a smaller --device-memory or --context: {reason}", 4)
            name = type(error).__name__
            hint = "a bug: please report it with the traceback that MOEJAX_DEBUG=1 shows"
            _fail(f"{name}: {one_line(error)} ({hint})", INTERNAL)

    app.command(epilog=EPILOG)(guarded)
    return guarded


@contextlib.contextmanager
def _leaving_on_interrupt() -> Iterator[None]:
    """Ctrl-C ends the process: KeyboardInterrupt raised inside an import can be swallowed there."""
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, _leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _leave(number: int, frame: Any) -> None:
    if sys.stderr.isatty():
        os.write(sys.stderr.fileno(), b"\x1b[?25h\n")  # a progress bar hides the cursor
    os._exit(INTERRUPTED)


def _fail(message: str, code: int) -> None:
    print(f"moejax: {message}", file=sys.stderr)
    raise SystemExit(code)


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


def _sampling(
    temperature: float | None,
    top_k: int | None,
    top_p: float | None,
    min_p: float | None,
    repetition_penalty: float | None,
) -> dict[str, Any]:
    given = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
    }
    return {name: value for name, value in given.items() if value is not None}


@command
def generate(
    prompt: Annotated[
        list[str] | None, typer.Argument(help="Texts to continue; several are one batch.")
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
    residency_file: opt.ResidencyFile = None,
    check_records: opt.CheckRecords = False,
    logprobs: Annotated[int, typer.Option(min=0, help="Likeliest tokens beside each, --json.")] = 0,
    virtual: opt.Virtual = False,
    warm_up: opt.WarmUp = True,
    json: opt.AsJson = False,
    quiet: opt.Quiet = False,
) -> None:
    """Continue a prompt, from the arguments, --file or stdin.

    Text goes to stdout; progress and a table of what it cost go to stderr.
    """
    load = opt.for_load(locals())
    from moejax import commands
    from moejax.terminal import Terminal

    terminal = Terminal(quiet)
    prompts = commands.read_prompts(prompt or [], file or [])
    runtime = commands.load_model(terminal, model, batch=len(prompts), **load)
    sampling = _sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    if warm_up:
        options = {"sampling": sampling, "logprobs": logprobs}
        commands.warm_up(terminal, runtime, batch=len(prompts), **options)
    commands.generate(
        terminal,
        runtime,
        prompts,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        stop=stop,
        seed=seed,
        logprobs=logprobs,
        as_json=json,
    )


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
    residency_file: opt.ResidencyFile = None,
    check_records: opt.CheckRecords = False,
    virtual: opt.Virtual = False,
    warm_up: opt.WarmUp = True,
    json: opt.AsJson = False,
    quiet: opt.Quiet = False,
) -> None:
    """Talk with a model that has a chat template; /help lists the commands inside.

    Without a terminal, each line of stdin is a turn and the answers go to stdout.
    """
    load = opt.for_load(locals())
    from moejax import commands
    from moejax.terminal import Terminal

    terminal = Terminal(quiet)
    runtime = commands.load_model(terminal, model, **load)
    sampling = _sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    if warm_up:
        commands.warm_up(terminal, runtime, sampling=sampling)
    from moejax import conversation

    conversation.chat(
        terminal,
        runtime,
        system=system,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        stop=stop,
        seed=seed,
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
    from moejax import commands
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
    from moejax import commands
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
    from moejax import commands
    from moejax.terminal import Terminal

    chosen = [n for n, given in {"json": json, "csv": csv, "markdown": markdown}.items() if given]
    times = {"reps": reps, "batch": batch, "seed": seed, "bandwidth": bandwidth}
    load["batch"] = batch
    commands.bench(Terminal(quiet), what, model, pp, tg, load=load, times=times, formats=chosen)


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
    from moejax import commands

    if not commands.doctor(json):
        raise typer.Exit(1)


def main() -> None:
    """Run the command line."""
    app()
