"""What the commands about policies do: `tune` and `policies`."""

import dataclasses
import importlib.metadata
import inspect
import pathlib
from typing import Any

from moejax.cli import actions as commands
from moejax.errors import InputError, PolicyError
from moejax.terminal import Terminal, table

PROMPT = "The old house stood at the end of the village, and"


def tune(
    terminal: Terminal,
    what: str,
    model: str,
    load: dict[str, Any],
    fit: dict[str, Any],
    text: dict[str, Any],
    runs: dict[str, int],
    as_json: bool,
) -> bool:
    """Print the least alpha that meets a budget of time; whether there is one.

    Args:
        load: options of `moejax.load`.
        fit: `budget_ms`, `alphas` as text, `degree`.
        text: `prompt` or `file`; the built-in prompt without.
        runs: `tokens`, `rounds`, `seed`.
    """
    if what != "alpha":
        raise InputError(f"tune {what!r} is unknown: only alpha can be tuned")
    from moejax import tuning

    fit["alphas"] = _numbers(fit["alphas"])
    tuning.checked(fit["budget_ms"], fit["alphas"], fit["degree"])
    _with_alpha(load["policy"], 0.0)
    prompt = _prompt(**text)
    runtime = commands.load_model(terminal, model, **load)
    if runtime.policy is None:
        raise InputError(f"{model} has no experts: there is no alpha to tune")
    ids = runtime.tokenizer.encode(prompt)
    times = f"{len(fit['alphas'])} alphas, {runs['rounds']} times after a warm-up, and a check"
    with terminal.status(times):
        found = tuning.tune(lambda alphas: tuning.measured(runtime, ids, alphas, **runs), **fit)
    chosen = None if found.alpha is None else _with_alpha(load["policy"], found.alpha)
    if as_json:
        commands.print_json(_document(runtime, load["policy"], found, chosen, fit | runs))
    else:
        _print_tuned(found, chosen)
    return found.alpha is not None


def _prompt(prompt: str | None, file: pathlib.Path | None) -> str:
    if prompt is None and file is None:
        return PROMPT
    if None not in (prompt, file):
        raise InputError("one text to continue: give --prompt or --file")
    given = [] if prompt is None else [prompt]
    return commands.read_prompts(given, [file] if file else [])[0]


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"alphas are numbers with commas between, not {text!r:.80}") from None


def _with_alpha(name: str, alpha: float) -> str:
    """A policy's name with its numbers, alpha among them; PolicyError if it takes none."""
    from moejax.policies.policy import policy

    policy(name)
    kind, _, numbers = name.partition(":")
    others = [n for n in numbers.split(",") if n and n.partition("=")[0] != "alpha"]
    made = f"{kind}:{','.join([f'alpha={alpha:g}', *others])}"
    try:
        if hasattr(policy(made).router, "alpha"):
            return made
    except PolicyError:
        pass
    raise PolicyError(f"policy {kind!r} has no alpha: choose a lossy one such as smoe-fetch")


def _document(
    runtime: Any, policy: str, found: Any, chosen: str | None, settings: dict[str, Any]
) -> dict[str, Any]:
    from moejax.doctor import environment

    about = {"slots": runtime.slots, "link": runtime.tier, "kernels": runtime.model.kernels}
    return {
        "model": str(runtime.directory),
        "settings": settings | about | {"policy": policy},
        **dataclasses.asdict(found),
        "fastest_alpha": found.fastest.alpha,
        "confirmed": found.confirmed,
        "policy": chosen,
        "environment": environment(),
    }


def _print_tuned(found: Any, chosen: str | None) -> None:
    from rich.console import Console

    names = ("alpha", "TPOT, ms", "hits", "of own picks", "replaced weight/token")
    points = [*found.points, *([found.check] if found.check else [])]
    rows = [
        (
            f"{point.alpha:g}{' (check)' if point is found.check else ''}",
            f"{point.tpot_ms:.2f}",
            *("" if rate is None else f"{rate:.1%}" for rate in _rates(point)),
            f"{point.replaced_mass:.3g}",
        )
        for point in points
    ]
    console = Console(highlight=False)
    console.print(table(names, rows))
    console.print()
    for line in _conclusion(found, chosen):
        console.print(line, markup=False, soft_wrap=True)


def _rates(point: Any) -> tuple[float | None, float | None]:
    return point.hit_rate, point.exact_hit_rate


def _conclusion(found: Any, chosen: str | None) -> list[str]:
    budget = f"{found.budget_ms:g} ms"
    if chosen is None:
        first, last, best = found.points[0], found.points[-1], found.fastest
        measured = f"from {first.alpha:g} to {last.alpha:g}"
        fastest = f"alpha {best.alpha:g} is the fastest measured, {best.tpot_ms:.2f} ms"
        return [f"No alpha {measured} meets {budget} per token: {fastest}."]
    said = f"Alpha {found.alpha:g} is the least that meets {budget} per token by the fit"
    lines = [f"{said} ({found.predicted_ms:.2f} ms): --policy {chosen}"]
    if not found.confirmed:
        over = found.check.tpot_ms / found.budget_ms - 1
        lines.append(
            f"The check missed the budget by {over:.0%}: measure more --rounds or --tokens, or "
            "ask for less."
        )
    return lines


def policies(as_json: bool) -> None:
    """Print the policies that have names."""
    rows = described_policies()
    if as_json:
        commands.print_json(rows)
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from moejax.policies.draft_presets import ALL

    shown = Table(box=None, header_style="dim")
    for name in ("policy", "result"):
        shown.add_column(name, no_wrap=True)
    shown.add_column("what it does, and its numbers", overflow="fold")
    for row in rows:
        shown_as = {n: "all" if v == ALL else v for n, v in row["numbers"].items()}
        numbers = ", ".join(f"{name}={value}" for name, value in shown_as.items())
        about = escape(row["description"]) + (f"\n[dim]{escape(numbers)}[/]" if numbers else "")
        shown.add_row(row["name"], {True: "exact", False: "lossy", None: "-"}[row["exact"]], about)
    console = Console(highlight=False)
    console.print(shown)
    console.print("\nnumbers are given after the name: --policy smoe-fetch:alpha=0.3,window=32")


def described_policies() -> list[dict[str, Any]]:
    """Every policy that has a name, third-party ones (entry points) included.

    One that cannot be made is listed with the reason, and `exact` None.
    """
    from moejax.policies.policy import policy_names
    from moejax.policies.presets import PRESETS

    others = {e.name: e for e in importlib.metadata.entry_points(group="moejax.policies")}
    return [_described(name, PRESETS.get(name), others.get(name)) for name in policy_names()]


def _described(name: str, make: Any, entry: Any) -> dict[str, Any]:
    source = None if make else entry.value
    try:
        make = make or entry.load()
        numbers = {n: p.default for n, p in inspect.signature(make).parameters.items()}
        text = (inspect.getdoc(make) or "").partition("\n")[0]
        exact = make().exact
    except Exception as error:  # of another package: it must not hide the others
        numbers, text, exact = {}, f"cannot be made: {type(error).__name__}: {error}", None
    text = text or f"of {source}"
    about = {"name": name, "description": text, "numbers": numbers, "exact": exact}
    return about | {"source": source}
