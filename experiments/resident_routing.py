"""How far a forward pass through resident experts alone foretells the model's own routing.

Claim:     a draft that runs resident experts only and leaves out the others has a mean acceptance
           over its positions of at least 0.97, 0.90 and 0.64 at 75, 50 and 25 % residency, as
           nano-vLLM-moe's draft rerouting study reports of Qwen3-30B-A3B, and a gated bias towards
           residents at least 0.73 at 25 %.
Command:   python -m experiments.resident_routing --out experiments/results/resident_routing.json
Hardware:  any CPU; 2 quiet cores take about 10 minutes (--quick: 1); and the held-out text.
Expected:  acceptance .971 / .902 / .636 of leaving out, .970 / .904 / .731 of the bias (that study:
           static residents, 8 positions, WikiText-2). Nobody reports the routing accuracy by layer.

The model decodes held-out text token by token with its own routing, under an evictor and a budget
of slots. Every STRIDE tokens a draft begins: the same state, whose residents stay as they are, is
fed the same tokens through a router that may use residents alone, on a KV cache of its own, so its
errors add up over DEPTH positions. Position 1 is the token that follows what was decoded exactly.

"Overlap" is the share of the model's top-k that is in the top-k of its gate on the draft's hidden
state, whether resident or not; "top-1" says that the best expert is the same; "cosine" compares
what follows a layer's attention and norm. "Acceptance" is 1 less the total variation between the
distributions of the next token, "greedy" the share of equal argmax. Intervals draw windows anew
within their domains. The first tokens of each window are left out of all figures.
"""

import argparse
import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import moejax
from experiments import smoe_common as common
from experiments.smoe_common import Text
from experiments.tiny_data import DOMAINS
from moejax import decode
from moejax.distances import distances_of
from moejax.policies.drafting import (
    BandThenSkip,
    GatedBias,
    NearestResident,
    RandomResident,
    SkipMissing,
)
from moejax.policies.policy import Policy, policy
from moejax.policies.routing import Router
from moejax.policies.speculation import FixedLength, SelfDraft, Speculate
from moejax.reports.plots import LOOKS
from moejax.state import DecodeState, StepOutput, pytree

STRIDE, DEPTH = 8, 6  # tokens from one draft to the next, and of a draft
RESIDENCIES = (0.125, 0.25, 0.4, 0.5, 0.75)
EVICTORS = {"lru": "lru", "score-window": "score-window:window=32"}
OWN = "score-window"  # of the summary: what the preset self-draft keeps residents by
ROUTERS = ("SkipMissing", "GatedBias", "BandThenSkip", "NearestResident", "RandomResident")
ALPHA = 0.25  # of the band
QUICK = {"windows": 2, "tokens": 192, "routers": ROUTERS[:2], "evictors": (OWN,)}
FULL = {"windows": 4, "tokens": 320, "routers": ROUTERS, "evictors": (*EVICTORS,)}
WARM = 64  # tokens of a window that do not count
PAPER = {  # mean acceptance over 8 positions of Qwen3-30B-A3B-Base
    "SkipMissing": {0.75: 0.971, 0.5: 0.902, 0.25: 0.636},
    "GatedBias": {0.75: 0.970, 0.5: 0.904, 0.25: 0.731},
}


@pytree
class Compared:
    """A draft beside the truth, by position; D drafted tokens, of one sequence."""

    overlap: jax.Array  # [D, L] f32
    top1: jax.Array  # [D, L] bool
    cosine: jax.Array  # [D, A] f32
    greedy: jax.Array  # [D] bool
    acceptance: jax.Array  # [D] f32
    left: jax.Array  # [D] f32, share of its own gate's top-k that the draft did not run


def compared(truth: StepOutput, draft: StepOutput, top_k: int) -> Compared:
    """Outputs of the same tokens, each stacked over positions [D, ...]."""
    mine, other = draft.trace.scores[:, :, 0], truth.trace.scores[:, :, 0]
    picks, right = jax.lax.top_k(mine, top_k)[1], jax.lax.top_k(other, top_k)[1]
    made = draft.trace.picks[:, :, 0]
    a, b = draft.hidden[:, :, 0], truth.hidden[:, :, 0]
    length = jnp.linalg.norm(a, axis=-1) * jnp.linalg.norm(b, axis=-1)
    p, q = jax.nn.softmax(draft.logits[:, 0]), jax.nn.softmax(truth.logits[:, 0])
    return Compared(
        overlap=(picks[..., None] == right[..., None, :]).any(-1).mean(-1),
        top1=picks[..., 0] == right[..., 0],
        cosine=(a * b).sum(-1) / length,
        greedy=p.argmax(-1) == q.argmax(-1),
        acceptance=jnp.minimum(p, q).sum(-1),
        left=(picks[..., None] != made[..., None, :]).all(-1).mean((-2, -1)),
    )


@functools.partial(jax.jit, static_argnames="model", donate_argnames="state")
def drafted(
    model: Any, policy: Policy, params: dict, store: Any, state: DecodeState, tokens: jax.Array
) -> tuple[DecodeState, Compared]:
    """Decode tokens [S, STRIDE] with the model's own routing, and draft the first of each row."""
    fixed = (model, policy, params, store)
    options = {"scores": True, "hidden": "normed", "prefill": False}

    def row(state: DecodeState, own: jax.Array) -> tuple[DecodeState, Compared]:
        def guessed(state: DecodeState, token: jax.Array) -> tuple[DecodeState, StepOutput]:
            return decode.step(*fixed, state, token[None, None], chance=jnp.ones(1), **options)

        def exact(state: DecodeState, token: jax.Array) -> tuple[DecodeState, StepOutput]:
            return decode.step(*fixed, state, token[None, None], **options)

        _, draft = jax.lax.scan(guessed, state, own[:DEPTH])
        state, truth = jax.lax.scan(exact, state, own)
        truth = jax.tree.map(lambda x: x[:DEPTH], truth)
        return state, compared(truth, draft, model.config.top_k)

    return jax.lax.scan(row, state, tokens)


def routers(runtime: moejax.Runtime) -> dict[str, Callable[[], Router]]:
    """How each draft router is made, by name."""
    return {
        "SkipMissing": SkipMissing,
        "GatedBias": GatedBias,
        "BandThenSkip": lambda: BandThenSkip(alpha=jnp.float32(ALPHA)),
        "NearestResident": lambda: NearestResident(distance=jnp.asarray(distances_of(runtime))),
        "RandomResident": lambda: RandomResident(seed=jnp.int32(0)),
    }


def drafting(evictor: str, router: Router) -> Policy:
    """Exact decoding that keeps residents by `evictor`, and drafts with `router`."""
    speculation = Speculate(
        draft=SelfDraft(router=router), lengths=FixedLength(gamma=jnp.int32(DEPTH))
    )
    return dataclasses.replace(policy(EVICTORS[evictor]), speculation=speculation)


def run(runtime: moejax.Runtime, chosen: Policy, slots: int, windows: np.ndarray) -> Compared:
    """Of windows [W, T + 1], on the host: [W, S, D, ...]. Residents stay between windows."""
    chosen = dataclasses.replace(chosen, capacity=jnp.int32(slots))
    chosen_runtime = common.with_policy(runtime, chosen, runtime.slots)
    state, found = chosen_runtime.init_state(1, context=windows.shape[1]), []
    rows = windows[:, : (windows.shape[1] - 1) // STRIDE * STRIDE].reshape(len(windows), -1, STRIDE)
    for own in rows:
        state = decode.rewind(state, np.zeros(1))
        fixed = (runtime.model, chosen, runtime.params, runtime.store)
        state, one = drafted(*fixed, state, jnp.asarray(own, jnp.int32))
        found.append(jax.tree.map(lambda x: x[WARM // STRIDE :], jax.device_get(one)))
    return jax.tree.map(lambda *parts: np.stack(parts), *found)


def interval(values: np.ndarray, domain: np.ndarray, seed: int) -> tuple[float, float]:
    """95 % interval of the mean of windows' values [W], windows drawn within their domains."""
    low, high = common.bootstrap(values, domain, seed)  # of exp(mean)
    return float(np.log(low)), float(np.log(high))


def rows_of(about: dict, found: Compared, domain: np.ndarray, seed: int) -> list[dict]:
    """A row for each position, and one for all: "mean"."""
    rows = []
    for position in (*range(1, DEPTH + 1), "mean"):
        at = slice(None) if position == "mean" else slice(position - 1, position)
        part = jax.tree.map(lambda x, at=at: x[:, :, at], found)
        # by window, then the mean over windows: all are of one length
        means = {
            field.name: getattr(part, field.name).mean(axis=(1, 2), dtype=np.float64)
            for field in dataclasses.fields(Compared)
            if field.name != "node_type"
        }
        row = {**about, "position": position}
        for name in ("overlap", "top1", "cosine"):
            row[name] = float(means[name].mean())
            row[f"{name}_by_layer"] = means[name].mean(axis=0).tolist()
        for name in ("greedy", "acceptance", "left"):
            row[name] = float(means[name].mean())
        row["overlap_interval"] = interval(means["overlap"].mean(axis=1), domain, seed)
        row["acceptance_interval"] = interval(means["acceptance"], domain, seed)
        row["by_domain"] = {
            name: {
                key: float(means[key][domain == i].mean())
                for key in ("overlap", "greedy", "acceptance")
            }
            for i, name in enumerate(DOMAINS)
        }
        rows.append(row)
    return rows


def find(rows: list[dict], router: str, residency: float, position: Any, evictor: str = OWN):
    """The row of a configuration."""
    wanted = (router, residency, position, evictor)
    for row in rows:
        if (row["router"], row["residency"], row["position"], row["evictor"]) == wanted:
            return row
    raise KeyError(wanted)


def summarise(rows: list[dict]) -> dict[str, Any]:
    """Overlap and acceptance of leaving missing experts out, by residency and position."""
    return {
        f"{key}_by_residency": {
            str(share): {
                str(position): find(rows, "SkipMissing", share, position)[key]
                for position in range(1, DEPTH + 1)
            }
            for share in RESIDENCIES
        }
        for key in ("overlap", "acceptance")
    }


def judge(rows: list[dict]) -> dict[str, dict]:
    """The claim's parts: mean acceptance beside the study's."""
    limits = {("SkipMissing", share): least for share, least in PAPER["SkipMissing"].items()}
    limits["GatedBias", 0.25] = PAPER["GatedBias"][0.25]
    targets = {}
    for (router, share), least in limits.items():
        value = find(rows, router, share, "mean")["acceptance"]
        least = round(least, 2)
        targets[f"acceptance of {router} at {share}"] = {
            "value": value,
            "at_least": least,
            "met": value >= least,
        }
    return targets


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """The report, without what `common.finish` adds."""
    text = Text.read(options.windows, 0, options.tokens, options.data)
    windows, domain = text.stacked()
    runtime = moejax.load(common.MODEL, virtual=True)
    experts = common.experts_of(runtime)
    budgets = {share: common.slots_of(share, experts) for share in RESIDENCIES}
    runtime = dataclasses.replace(runtime, slots=max(budgets.values()))
    made, rows = routers(runtime), []
    for evictor in options.evictors:
        for router in options.routers:
            chosen = drafting(evictor, made[router]())
            for share, slots in budgets.items():
                about = {"evictor": evictor, "router": router, "residency": share, "slots": slots}
                found = run(runtime, chosen, slots, windows)
                rows += rows_of(about, found, domain, options.seed)
    targets = judge(rows)
    return {
        "paper": PAPER,
        "paper_positions": 8,
        "positions": DEPTH,
        "drafts": int(found.greedy.shape[0] * found.greedy.shape[1]),
        "windows": {name: len(part) for name, part in text.measured.items()},
        "chance_overlap": runtime.config.top_k / runtime.config.num_experts,
        "rows": rows,
        "summary": summarise(rows),
        "targets": targets,
        "verdict": common.verdict(targets),
    }


def plot(report: dict[str, Any], path: pathlib.Path) -> None:
    """Overlap by layer and residency; acceptance by position; acceptance by residency."""
    rows = report["rows"]
    figure, (by_layer, by_position, by_share) = common.figure(1, 3, (14, 4.4))
    shades = dict(
        zip(RESIDENCIES, ("#c6dbef", "#9ecae1", "#6baed6", "#3182bd", "#08306b"), strict=True)
    )
    for share, colour in shades.items():
        label = f"{100 * share:g} % resident"
        for position, style in ((1, "o-"), (DEPTH, "o:")):
            row = find(rows, "SkipMissing", share, position)
            overlap = 100 * np.array(row["overlap_by_layer"])
            shown = {"label": label} if position == 1 else {}
            by_layer.plot(range(len(overlap)), overlap, style, color=colour, **shown)
        found = [find(rows, "SkipMissing", share, i) for i in range(1, DEPTH + 1)]
        values = [100 * row["acceptance"] for row in found]
        by_position.plot(range(1, DEPTH + 1), values, "o-", color=colour, label=label)
    _by_share(by_share, rows)
    chance = 100 * report["chance_overlap"]
    by_layer.axhline(chance, color="grey", lw=0.8, ls="--")
    by_layer.text(0, chance + 1, "chance", color="grey", fontsize=8)
    by_layer.set(title=f"Routing, missing left out (dotted: position {DEPTH})", xlabel="Layer")
    by_layer.set(ylabel="Overlap with the true top-k (%)", ylim=(0, 119))
    by_position.set(title="Acceptance, missing left out", xlabel="Position in the draft")
    by_share.set(title=f"Mean over {DEPTH} positions", xlabel="Resident experts (%)")
    for axis in (by_position, by_share):
        axis.set(ylabel="1 - total variation (%)", ylim=(0, 119))
    for axis in (by_layer, by_position, by_share):
        axis.set_yticks(range(0, 101, 20))
        axis.grid(alpha=0.25)
        place = "lower right" if axis is by_share else "upper center"
        axis.legend(frameon=False, fontsize=8, loc=place, ncols=1 if axis is by_share else 3)
        axis.spines[["top", "right"]].set_visible(False)
    common.save(figure, path)


def _by_share(axis: Any, rows: list[dict]) -> None:
    measured = [name for name in ROUTERS if any(row["router"] == name for row in rows)]
    shares = [100 * share for share in RESIDENCIES]
    for name, (colour, marker) in zip(ROUTERS, LOOKS, strict=False):
        if name not in measured:
            continue
        values = [100 * find(rows, name, share, "mean")["acceptance"] for share in RESIDENCIES]
        axis.plot(shares, values, marker=marker, color=colour, label=name)
        if name in PAPER:
            theirs = [100 * value for value in PAPER[name].values()]
            where = [100 * share for share in PAPER[name]]
            label = f"{name}, Qwen3-30B (nano-vLLM-moe)"
            axis.plot(where, theirs, marker, mfc="none", ms=9, color=colour, label=label)


def main() -> None:
    """Measure, write the JSON and draw."""
    parser = common.arguments(__doc__)
    parser.add_argument(
        "--routers", nargs="+", choices=ROUTERS, help="SkipMissing and GatedBias among them"
    )
    parser.add_argument("--evictors", nargs="+", choices=[*EVICTORS], help=f"{OWN} among them")
    options = common.resolved(parser.parse_args(), QUICK, FULL)
    report = {
        "claim": "leaving out missing experts, drafts are accepted at .97, .90 and .64 at 75, 50 "
        "and 25 % residency; a gated bias reaches .73 at 25 %",
        "command": "python -m experiments.resident_routing",
        **measure(options),
    }
    common.finish(report, options, plot)


if __name__ == "__main__":
    main()
