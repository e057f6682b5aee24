"""The commands of `moejax trace`: their options. What they do is in `trace_actions`."""

import pathlib
from collections.abc import Callable
from typing import Annotated

import typer

from moejax.cli import exits
from moejax.cli import options as opt

app = typer.Typer(
    help="Record which experts a model routes to, and look at it.", no_args_is_help=True
)

File = Annotated[pathlib.Path, typer.Argument(help="A trace.")]
Start = Annotated[int, typer.Option(min=0, help="The first pass.")]
Stop = Annotated[int | None, typer.Option(min=1, help="The pass to stop before.")]
Name = Annotated[str | None, typer.Option("--name", help="The model's name in the trace.")]


def command(name: str) -> Callable[[Callable], Callable]:
    """Register a command whose errors become one line on stderr and an exit code."""

    def register(function: Callable) -> Callable:
        made = exits.guarded(function)
        app.command(name)(made)
        return made

    return register


# Of `record`: where texts are from, what is fed, and what is kept.
Texts = Annotated[
    list[str] | None, typer.Argument(help="Texts, one after the other; --batch runs several.")
]
Files = Annotated[
    list[pathlib.Path] | None, typer.Option("--file", "-f", help="Read a text from a file.")
]
Dataset = Annotated[
    pathlib.Path | None,
    typer.Option(help="Texts of a set: .txt, one a line, or .jsonl; also as .gz or .xz."),
]
Field = Annotated[str, typer.Option(help="Where a .jsonl has them.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Only so many of the set.")]
Tokens = Annotated[
    int | None,
    typer.Option(
        min=0, help="Write nothing: feed this many tokens of each text one by one instead."
    ),
]
PromptTokens = Annotated[
    int | None, typer.Option(min=0, help="With --tokens: those before them, fed at once; 64.")
]
Top = Annotated[
    int | None, typer.Option(min=1, help="Keep this many scores of each layer, not all.")
]
Scores = Annotated[bool, typer.Option(help="Keep router scores.")]
Weights = Annotated[bool, typer.Option(help="Keep the weights of the picks.")]
Full = Annotated[
    bool, typer.Option("--full-scores", help="Keep scores in f32, not f16: for exact replays.")
]
Drafts = Annotated[
    bool, typer.Option("--drafts", help="Keep what self-drafts routed to, token by token, too.")
]
Kept = Annotated[bool, typer.Option("--residency", help="Keep what was resident in every pass.")]
Batch = Annotated[int, typer.Option(min=1, help="Texts that run together.")]
Copy = Annotated[
    bool, typer.Option("--copy", help="Move experts as usual instead of counting only.")
]


@command("record")
def record(
    out: Annotated[pathlib.Path, typer.Argument(help="The new trace, such as trace.npz.")],
    prompt: Texts = None,
    file: Files = None,
    dataset: Dataset = None,
    field: Field = "text",
    limit: Limit = None,
    tokens: Tokens = None,
    prompt_tokens: PromptTokens = None,
    top: Top = None,
    scores: Scores = True,
    weights: Weights = True,
    full_scores: Full = False,
    residency: Kept = False,
    drafts: Drafts = False,
    batch: Batch = 1,
    copy: Copy = False,
    name: Name = None,
    force: opt.Force = False,
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
    json: opt.AsJson = False,
    quiet: opt.Quiet = False,
) -> None:
    """Run texts through a model and write down what its routers chose.

    Without --link, --host-memory and --copy nothing is moved: transfers are only counted.
    """
    load, sampling = opt.for_load(locals()), opt.for_sampling(locals())
    load["virtual"] = link is None and host_memory is None and not copy
    from moejax.cli import trace_actions
    from moejax.terminal import Terminal

    trace_actions.check_place(out, force)
    texts = trace_actions.texts(prompt or [], file or [], dataset, field, limit)
    how = {"batch": batch, "name": name, "dataset": dataset}
    given = {"tokens": tokens, "prompt_tokens": prompt_tokens}
    written = {"max_new_tokens": max_new_tokens, "sampling": sampling, "seed": seed}
    keep = {"scores": top if scores else 0, "weights": weights, "residency": residency}
    keep |= {"full": full_scores, "drafts": drafts}
    trace_actions.record(Terminal(quiet), out, model, texts, load, how, given, written, keep, json)


@command("import")
def import_(
    file: Annotated[
        pathlib.Path,
        typer.Argument(
            help="BigMoeOnEdge's CSV, or a table (.csv, .jsonl) with columns token, layer, experts "
            "and perhaps weights, phase, sequence, id; also as .gz or .xz."
        ),
    ],
    out: Annotated[pathlib.Path, typer.Argument(help="The new trace.")],
    experts: Annotated[
        int | None, typer.Option(min=1, help="Experts per layer, where the file does not say.")
    ] = None,
    name: Name = None,
    force: opt.Force = False,
    json: opt.AsJson = False,
    quiet: opt.Quiet = False,
) -> None:
    """Make a trace of what another program recorded."""
    from moejax.cli import trace_actions
    from moejax.terminal import Terminal

    trace_actions.check_place(out, force)
    trace_actions.import_(Terminal(quiet), file, out, experts, name, json)


@command("info")
def info(file: File, json: opt.AsJson = False) -> None:
    """Show what a trace holds, and how it was recorded, from its header alone."""
    from moejax.cli import trace_actions

    trace_actions.info(file, json)


@command("stats")
def stats(
    file: File,
    phase: Annotated[
        str, typer.Option(help="'decode' (with verified drafts), 'prefill', 'draft' or 'all'.")
    ] = "decode",
    json: opt.AsJson = False,
) -> None:
    """Show skew, entropy, overlap, reuse, unions and the tail of the scores."""
    from moejax.cli import trace_actions

    trace_actions.stats(file, phase, json)


@command("view")
def view(
    file: File,
    out: Annotated[pathlib.Path, typer.Argument(help="The new .html page.")],
    start: Start = 0,
    stop: Stop = None,
    text_of: Annotated[
        str | None, typer.Option(help="A model whose tokenizer turns token ids into text.")
    ] = None,
    quiet: opt.Quiet = False,
) -> None:
    """Write a page to look at a trace with, layers by steps, in any browser."""
    from moejax.cli import trace_actions
    from moejax.terminal import Terminal

    trace_actions.view(Terminal(quiet), file, out, start, stop, text_of)


@command("perfetto")
def perfetto(
    file: File,
    out: Annotated[pathlib.Path, typer.Argument(help="The new .json file.")],
    start: Start = 0,
    stop: Stop = None,
    quiet: opt.Quiet = False,
) -> None:
    """Write the timeline of link, host and device, for ui.perfetto.dev."""
    from moejax.cli import trace_actions
    from moejax.terminal import Terminal
    from moejax.traces import perfetto

    perfetto.write(trace_actions.part(file, start, stop), out)
    trace_actions.note_written(Terminal(quiet), out, "open it at ui.perfetto.dev")
