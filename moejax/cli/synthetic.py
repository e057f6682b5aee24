"""What `moejax trace synthesize` does."""

import pathlib
from typing import Annotated, Any

import typer

from moejax.cli import options as opt


def synthesize(
    out: Annotated[pathlib.Path, typer.Argument(help="The trace to write.")],
    preset: Annotated[
        str | None, typer.Option(help="A process with a name, such as qwen3-30b-a3b; the default.")
    ] = None,
    like: Annotated[
        pathlib.Path | None, typer.Option(help="Fit the process to this trace instead.")
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens in all.")] = 4096,
    sequence: Annotated[
        int | None, typer.Option(min=1, help="Tokens of a sequence; default: of a document.")
    ] = None,
    prompt: Annotated[
        int, typer.Option(min=0, help="Of these, first ones that are a prompt, in one pass.")
    ] = 0,
    layers: Annotated[int | None, typer.Option(min=1, help="Layers with experts.")] = None,
    experts: Annotated[int | None, typer.Option(min=1, help="Experts of a layer.")] = None,
    top_k: Annotated[int | None, typer.Option(min=1, help="Picks of a token.")] = None,
    sigma: Annotated[float | None, typer.Option(help="Standard deviation of the logits.")] = None,
    document: Annotated[
        float | None, typer.Option(help="Share of their variance that lasts for a document.")
    ] = None,
    bias: Annotated[float | None, typer.Option(help="Share that lasts for ever.")] = None,
    correlation: Annotated[
        float | None, typer.Option(help="Of the rest, from one token to the next.")
    ] = None,
    document_tokens: Annotated[int | None, typer.Option(min=1, help="Of a document.")] = None,
    top: Annotated[
        int | None, typer.Option(min=1, help="Store only so many of the best scores.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Same seed, same trace.")] = 0,
    force: opt.Force = False,
    json: opt.AsJson = False,
) -> None:
    """Make a trace with scores of no model at all, from a process that resembles real routing."""
    from moejax.cli.trace_actions import check_place

    check_place(out, force)
    changes = {
        "layers": layers,
        "experts": experts,
        "top_k": top_k,
        "sigma": sigma,
        "document": document,
        "bias": bias,
        "correlation": correlation,
        "document_tokens": document_tokens,
    }
    changes = {name: value for name, value in changes.items() if value is not None}
    shape = {"sequence_tokens": sequence, "prompt_tokens": prompt, "top": top, "seed": seed}
    _synthesize(out, preset, like, tokens, changes, shape, json)


def _synthesize(
    out: pathlib.Path,
    preset: str | None,
    like: pathlib.Path | None,
    tokens: int,
    changes: dict[str, Any],
    shape: dict[str, Any],
    as_json: bool,
) -> None:
    import dataclasses

    from moejax.cli import actions as commands
    from moejax.errors import InputError
    from moejax.traces import synthetic

    if None not in (preset, like):
        raise InputError("a process has a name or resembles a trace: give --preset or --like")
    found = None
    if like is not None:
        from moejax.traces.fit import fit
        from moejax.traces.trace import Trace

        real = Trace.load(like)
        given = {n: changes[n] for n in ("sigma", "document_tokens") if n in changes}
        found = fit(real, **given)
        process, model = found.process, real.model
        shape["sequence_tokens"] = shape["sequence_tokens"] or found.sequence_tokens
    else:
        name = preset or next(iter(synthetic.PRESETS))
        process, model = synthetic.preset(name), name
    if changes:
        said = ", ".join(f"{name}={value:g}" for name, value in changes.items())
        process, model = dataclasses.replace(process, **changes), f"{model} with {said}"
    trace = synthetic.generate(process, tokens, model=model, **shape)
    trace.save(out)
    document = {"file": str(out), "model": trace.model, "rows": trace.rows, **trace.about}
    if found is not None:
        document["fit"] = found.as_dict()
    if as_json:
        commands.print_json(document)
    else:
        _print(document, found)


def _print(document: dict[str, Any], found: Any) -> None:
    from rich.console import Console

    from moejax.terminal import facts_table, table

    console = Console(highlight=False)
    rows = [(name, f"{value:g}") for name, value in document["process"].items()]
    console.print(facts_table([("model", document["model"]), *rows]))
    if found is not None:
        console.print()
        console.print(
            table(
                ("statistic", "trace", "synthetic", "+-"),
                [
                    (name, *map(_number, (value, found.reproduced[name], found.spread[name])))
                    for name, value in found.measured.items()
                ],
            )
        )
    console.print(f"\n{document['file']}: {document['rows']} tokens, synthetic", soft_wrap=True)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
