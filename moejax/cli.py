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

EXIT_CODES: dict[type[errors.MoejaxError], int] = {
    errors.InputError: 2,
    errors.PolicyError: 2,
    errors.ConfigError: 3,
    errors.UnsupportedModelError: 3,
    errors.CheckpointError: 3,
    errors.TokenizerError: 3,
    errors.BudgetError: 4,
    errors.HubError: 5,
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


Model = Annotated[
    str,
    typer.Option("--model", "-m", help="'tiny' (embedded), a directory, or a Hugging Face hub id."),
]
Slots = Annotated[
    int | None, typer.Option(help="Experts on the device at once, over all layers; default all.")
]
DeviceMemory = Annotated[
    str | None,
    typer.Option(help="Budget such as 6GiB for weights, KV cache and workspace, not with --slots."),
]
PolicyName = Annotated[str, typer.Option("--policy", help="How experts are kept and fetched.")]
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
Seed = Annotated[int, typer.Option(help="Same seed, same text.")]
Stop = Annotated[list[str], typer.Option(help="End at this text; may be given several times.")]
Context = Annotated[int | None, typer.Option(help="Tokens per sequence that the KV cache holds.")]
Dtype = Annotated[str, typer.Option(help="bfloat16 or float32.")]
Virtual = Annotated[bool, typer.Option("--virtual", help="Count transfers, but copy nothing.")]
WarmUp = Annotated[bool, typer.Option(help="Compile before the first token is timed.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Nothing on stderr but errors.")]


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
    model: Model = "tiny",
    slots: Slots = None,
    device_memory: DeviceMemory = None,
    policy: PolicyName = "lru",
    max_new_tokens: MaxNewTokens = 128,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    repetition_penalty: Penalty = None,
    seed: Seed = 0,
    stop: Stop = [],  # noqa: B006 - typer copies it
    context: Context = None,
    dtype: Dtype = "bfloat16",
    logprobs: Annotated[int, typer.Option(min=0, help="Likeliest tokens beside each, --json.")] = 0,
    virtual: Virtual = False,
    warm_up: WarmUp = True,
    json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Continue a prompt, from the arguments, --file or stdin.

    Text goes to stdout; progress and a table of what it cost go to stderr.
    """
    from moejax import commands
    from moejax.terminal import Terminal

    terminal = Terminal(quiet)
    prompts = commands.read_prompts(prompt or [], file or [])
    runtime = commands.load_model(
        terminal,
        model,
        slots=slots,
        device_memory=device_memory,
        policy=policy,
        context=context,
        dtype=dtype,
        virtual=virtual,
        batch=len(prompts),
    )
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
    model: Model = "tiny",
    system: Annotated[str | None, typer.Option(help="The system message.")] = None,
    slots: Slots = None,
    device_memory: DeviceMemory = None,
    policy: PolicyName = "lru",
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    repetition_penalty: Penalty = None,
    seed: Seed = 0,
    stop: Stop = [],  # noqa: B006 - typer copies it
    context: Context = None,
    dtype: Dtype = "bfloat16",
    virtual: Virtual = False,
    warm_up: WarmUp = True,
    json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Talk with a model that has a chat template; /help lists the commands inside.

    Without a terminal, each line of stdin is a turn and the answers go to stdout.
    """
    from moejax import commands
    from moejax.terminal import Terminal

    terminal = Terminal(quiet)
    runtime = commands.load_model(
        terminal,
        model,
        slots=slots,
        device_memory=device_memory,
        policy=policy,
        context=context,
        dtype=dtype,
        virtual=virtual,
    )
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
    context: Context = None,
    verify: Annotated[bool, typer.Option("--verify", help="Read and check every weight.")] = False,
    json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Show what a model holds and which budgets it fits, from headers alone."""
    from moejax import commands
    from moejax.terminal import Terminal

    commands.inspect(Terminal(quiet), model, context, verify, json)


@command
def convert(
    source: Annotated[str, typer.Argument(help="A Hugging Face directory or hub id.")],
    target: Annotated[pathlib.Path, typer.Argument(help="The new directory.")],
    dtype: Dtype = "bfloat16",
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier conversion.")] = False,
    orbax: Annotated[bool, typer.Option("--orbax", help="Save with Orbax, not as a bank.")] = False,
    json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Convert a model into a directory that is mapped instead of read; continues if interrupted."""
    from moejax import commands
    from moejax.terminal import Terminal

    commands.convert(Terminal(quiet), source, target, dtype, force, orbax, json)


@command
def doctor(json: AsJson = False) -> None:
    """Check this machine and installation; exit code 1 if something fails."""
    from moejax import commands

    if not commands.doctor(json):
        raise typer.Exit(1)


def main() -> None:
    """Run the command line."""
    app()
