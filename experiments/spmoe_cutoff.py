"""SP-MoE's cutoff layer: how many layers to prefetch while drafting, and whom that serves.

Claim:     TPOT over the last layer L that is prefetched is U-shaped (SP-MoE, arXiv 2510.10302), and
           a latency model fed by measurements finds an L that costs at most 5 % more than the best.
Command:   python -m experiments.spmoe_cutoff --out experiments/results/spmoe_cutoff.json
Hardware:  2 quiet CPU cores: about 25 minutes (--quick: 3); and the held-out text. Part (b) needs
           the routing trace of Qwen3-30B-A3B beside it, and is left out where that is not.
Expected:  the paper's best L is near 20 in one figure and about 5 in others; TPOT falls by 1.07 to
           3.5 times against offloading without speculation; the cosine of draft's and target's
           hidden states is 0.60, 0.57 and 0.95 for its three pairs, and top-1 is right in 88 %.

(a) The embedded model over a paced link with its dense twin as the draft model (`sp-moe`), or with
    drafts by residents (`sp-moe-self`), at 40 % residency: TPOT by L, -1 = nothing is prefetched.
    "standard" is the link of `speculation_common`, a large expert; on "4x" a load takes a quarter
    of its time. The model's inputs: of the link, its busy time per record; of the cycle, what a
    verification alone takes without stalls, and what the whole cycle takes; and what a foresight
    that only watches counts in cycles without prefetch.
(b) The same by simulation under a trace of 48 layers, see `spmoe_simulation`.
(c) What a draft knows about the experts of its target, layer by layer, teacher-forced on held-out
    text: by the draft model's hidden state, normed by the target or by the draft, through the
    target's gate; or by the self-draft's own routing, `depth` tokens after the last exact one.
(d) What became of prefetched records: needed by a token that was kept, only by rejected ones, or
    by none of the window; "recalled" = of the window's absent experts, those that were asked for;
    "use" = of the slots given ahead, those whose record was needed before it left. One that left
    and was asked for again has been given two.
"""

import argparse
import dataclasses
import functools
import math
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import moejax
from experiments import smoe_common as common
from experiments import speculation_common as speculation
from experiments import spmoe_quality as quality
from experiments import spmoe_simulation as simulation
from experiments.smoe_common import Text, with_policy
from experiments.speculation_common import PROMPT, Generation
from experiments.spmoe_simulation import Costs, Profile
from moejax import decode
from moejax.cycles import Cycles
from moejax.policies.foresight import DraftRouting, Glimpse
from moejax.policies.policy import Policy, policy
from moejax.policies.prediction import LastLayer
from moejax.reports.plots import LOOKS
from moejax.sampling import Sampling
from moejax.speculate import Target
from moejax.state import pytree

QUICK = {"windows": 1, "tokens": 96, "rounds": 3, "new": 32, "step": 6}
FULL = {"windows": 4, "tokens": 256, "rounds": 5, "new": 128, "step": 1}
RESIDENCY = 0.4
LINKS = {"standard": speculation.LOAD_US, "4x": speculation.LOAD_US / 4}
PRESETS = {"sp-moe": 4, "sp-moe-self": 2}  # tokens drafted
PAPER = {"cosine": (0.5982, 0.5659, 0.9459), "top1": (0.88, 0.88, 0.8894), "least_speedup": 1.07}
LEVEL = 1.05  # of the best TPOT: what the model's choice may cost


@dataclasses.dataclass(frozen=True)
class Case:
    """One timed configuration; "lru" has no cutoff."""

    preset: str
    link: str
    cutoff: int = -1


@pytree
class Watching(DraftRouting):
    """`DraftRouting` that remembers what it wanted, whether the cutoff let it have it or not."""

    def init(self, num_layers: int, num_experts: int) -> jax.Array:
        """[L, E] bool, nothing wanted."""
        return jnp.zeros((num_layers, num_experts), bool)

    def wanted(self, memory: jax.Array, glimpse: Glimpse) -> tuple[jax.Array, jax.Array]:
        """As without watching."""
        priority, _ = DraftRouting.wanted(self, None, glimpse)
        return priority, memory.at[glimpse.layer].max(priority > 0)

    def spent(self, memory: jax.Array, count: jax.Array) -> jax.Array:
        """No concern of this."""
        return memory


def cut(chosen: Policy, last: int) -> Policy:
    """The policy with layers up to `last` prefetched."""
    return dataclasses.replace(chosen, cutoff=LastLayer(last=jnp.int32(last)))


def made(case: Case) -> Policy:
    """The policy of a case."""
    if case.preset == "lru":
        return policy("lru")
    return cut(policy(f"{case.preset}:gamma={PRESETS[case.preset]}"), case.cutoff)


@dataclasses.dataclass(frozen=True)
class Window:
    """One cycle, on the host."""

    resident: np.ndarray  # [L, E] bool, when the draft began
    predicted: np.ndarray  # [L, E] bool
    picks: np.ndarray  # [L, W, K], -1 = no token
    kept: int  # tokens of the window that came after nothing rejected
    missed: np.ndarray  # [L] experts without a slot when their layer began
    empty: int  # slots, when the draft began
    prefetched: int
    used: int  # prefetched records, the first time, of earlier cycles too

    @functools.cached_property
    def needed(self) -> np.ndarray:
        """[2, L, E] bool, by tokens that were kept, and by rejected ones."""
        layers, width, _ = self.picks.shape
        found = np.zeros((2, layers, self.resident.shape[1] + 1), bool)  # the last: no token
        place, layer = np.arange(width)[:, None], np.arange(layers)[:, None, None]
        found[(place >= self.kept).astype(int), layer, self.picks] = True
        return found[:, :, :-1]


def watched(runtime: moejax.Runtime, groups: list, new: int, cutoff: int) -> list[Window]:
    """All cycles of a runtime's continuations of prompts, at a cutoff."""
    shape = (runtime.config.num_moe_layers, runtime.config.num_experts)
    limit = runtime.policy.foresight.limit
    chosen = dataclasses.replace(runtime.policy, foresight=Watching(limit=limit))
    runtime = with_policy(runtime, cut(chosen, cutoff), runtime.slots)
    engine, found = runtime.engine, []
    sampling, state = Sampling(temperature=0.0).validate(), runtime.init_state(1)
    fixed = {"model": engine.model, "params": engine.params, "store": engine.store}
    for [prompt] in groups:
        state = decode.rewind(state, np.zeros(1))
        state, out = runtime.decode_step(state, prompt[None])
        texts = [[*prompt, int(out.logits[0].argmax())]]
        target = Target(policy=engine.policy, **fixed)
        options = {"stats": runtime._fresh_stats(), "sampling": sampling, "record": True}
        loop = Cycles(target, engine.helper, key=jax.random.key(0), **options)
        loop.begin(state, texts, None)
        room = new - 1
        while room > 0:
            found.append(_cycle(loop, room, shape))
            room -= found[-1].kept
        state = loop.run.state
    return found


def _cycle(loop: Cycles, room: int, shape: tuple[int, int]) -> Window:
    state = loop.run.state
    clear = jax.device_put(np.zeros(shape, bool), state.length.sharding)
    memory = dataclasses.replace(state.policy, foresight=clear)
    loop.run = dataclasses.replace(loop.run, state=dataclasses.replace(state, policy=memory))
    tables = loop.run.state.experts.residency
    resident = np.asarray(tables.slot_of).reshape(shape) >= 0
    empty = int((np.asarray(tables.owner) < 0).sum())
    result = loop.step(np.ones(1, bool), np.array([room]))
    trace = jax.device_get(loop.trace)
    return Window(
        resident=resident,
        predicted=np.asarray(loop.run.state.policy.foresight),
        picks=trace.picks,
        kept=int(result.count[0]),
        missed=trace.needed - trace.hits,
        empty=empty,
        prefetched=int(result.prefetched),
        used=int(trace.prefetch_used.sum()),
    )


def profiled(windows: list[Window]) -> Profile:
    """What the latency model is given."""
    needs = [w.needed.any(axis=0) for w in windows]
    pairs = [*zip(windows, needs, strict=True)]
    return Profile(
        cycles=len(windows),
        missed=sum(w.missed for w in windows),
        absent=sum((need & ~w.resident).sum(axis=1) for w, need in pairs),
        asked=sum((w.predicted & ~w.resident).sum(axis=1) for w in windows),
        right=sum((w.predicted & ~w.resident & need).sum(axis=1) for w, need in pairs),
        prefetched=sum(w.prefetched for w in windows),
        used=sum(w.used for w in windows),
        empty=sum(w.empty for w in windows),
    )


def wasted(windows: list[Window]) -> list[dict[str, Any]]:
    """What became of the records asked for while drafting, by layer and in all."""
    counts = {name: 0 for name in ("asked", "kept", "rejected", "unused", "absent", "recalled")}
    for window in windows:
        kept, rejected = window.needed
        absent, asked = (x & ~window.resident for x in (kept | rejected, window.predicted))
        parts = {
            "asked": asked,
            "kept": asked & kept,
            "rejected": asked & rejected & ~kept,
            "unused": asked & ~kept & ~rejected,
            "absent": absent,
            "recalled": absent & asked,
        }
        for name, part in parts.items():
            counts[name] = counts[name] + part.sum(axis=1)
    given, used = (sum(getattr(w, name) for w in windows) for name in ("prefetched", "used"))
    sums = [("all", {n: int(c.sum()) for n, c in counts.items()})]
    sums += [(i, {n: int(c[i]) for n, c in counts.items()}) for i in range(len(counts["asked"]))]
    rows = [
        {
            "layer": layer,
            "asked_per_cycle": own["asked"] / len(windows),
            "kept_share": common.ratio(own["kept"], own["asked"]),
            "rejected_share": common.ratio(own["rejected"], own["asked"]),
            "unused_share": common.ratio(own["unused"], own["asked"]),
            "rejected_share_of_used": common.ratio(own["rejected"], own["asked"] - own["unused"]),
            "recalled": common.ratio(own["recalled"], own["absent"]),
        }
        for layer, own in sums
    ]
    rows[0] |= {"prefetched_per_cycle": given / len(windows), "use": common.ratio(used, given)}
    return rows


def verification_ms(runtime: moejax.Runtime, groups: list, width: int) -> float:
    """Median time of feeding `width` tokens at once, less what it waited for the link."""
    state, found = runtime.init_state(1), []
    for [prompt] in groups:
        state = decode.rewind(state, np.zeros(1))
        for start in range(0, len(prompt) - width + 1, width):
            begun = time.perf_counter()
            part = prompt[None, start : start + width]
            state, out = runtime.decode_step(state, part, all_logits=True, prefill=False)
            stall = float(out.trace.stall.sum()) / 1e3
            found.append((time.perf_counter() - begun) * 1e3 - stall)
    return statistics.median(found)


def row_of(case: Case, runs: list[dict]) -> dict[str, Any]:
    """The figures of a timed case, per token where nothing else is said."""
    run = common.merged(runs)
    times = {"tpot_ms": "tpot", "tpot_ms_spread": "tpot_spread", "stall_ms": "stall_seconds"}
    names = ("tokens_per_cycle", "draft_length", "acceptance", "missed", "moved_bytes")
    names += ("prefetched", "prefetch_used", "late")
    about = {"part": "engine", **dataclasses.asdict(case)}
    return about | {n: run[m] * 1e3 for n, m in times.items()} | {n: run[n] for n in names}


def curve_of(
    rows: list[dict], lru: dict, seen: tuple[Profile, Profile], verify: float, record: float
) -> dict[str, Any]:
    """TPOT over the cutoff, measured and modelled, of the rows of one preset and link.

    Args:
        lru: the row of decoding without speculation.
        seen: profiles without prefetch and with all of it.
        verify, record: ms of a verification without stalls, and of a record on the link.
    """
    none = rows[0]
    made, drafts = none["tokens_per_cycle"], none["draft_length"]
    draft = max((none["tpot_ms"] - none["stall_ms"]) * made - verify, 0.0) / drafts
    costs = Costs(record, draft=draft, layer=verify / len(seen[0].missed))
    model = simulation.modelled(*seen, costs, drafts)
    times = {row["cutoff"]: row["tpot_ms"] for row in rows}
    curve = simulation.curve(times, times[model["best_cutoff"]], model, made)
    spread = {row["cutoff"]: row["tpot_ms_spread"] for row in rows}
    best = curve["best_cutoff"]
    level = [c for c in times if times[c] - times[best] <= max(spread[c], spread[best])]
    about = {"part": "cutoff", "preset": none["preset"], "link": none["link"]}
    return {**about, **curve, "level_with_best": level, "lru_tpot_ms": lru["tpot_ms"]}


def engine_rows(text: Text, slots: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Timed cases of both presets and links, curves over the cutoff, and waste."""
    virtual = moejax.load(common.MODEL, virtual=True)
    record, layers = virtual.store.layout.stride, virtual.config.num_moe_layers
    groups, context = speculation.prompts_of(text, 1), PROMPT + options.new
    over = {
        name: speculation.base_runtime(slots, speculation.link(record, load), context=context)
        for name, load in LINKS.items()
    }
    chosen = [Case(p, n, c) for p in PRESETS for n in LINKS for c in range(-1, layers)]
    chosen += [Case("lru", name) for name in LINKS]
    runtimes = {case: with_policy(over[case.link], made(case), slots) for case in chosen}
    runs = {case: Generation(runtime, groups, options.new) for case, runtime in runtimes.items()}
    found = common.in_rounds(runs, options.rounds, options.seed)
    rows = {case: row_of(case, found[case]) for case in chosen}
    curves, waste = [], []
    for preset, drafts in PRESETS.items():
        none = runtimes[Case(preset, "standard")]
        seen = [watched(none, groups, options.new, last) for last in (-1, layers - 1)]
        waste += [{"part": "waste", "preset": preset, **row} for row in wasted(seen[1])]
        verify = verification_ms(none, groups, drafts + 1)
        for name, runtime in over.items():
            own = [rows[Case(preset, name, c)] for c in range(-1, layers)]
            stats, lru = runtime.link.stats(), rows[Case("lru", name)]
            profiles = tuple(map(profiled, seen))
            each = stats.busy_us / stats.landed / 1e3
            curves.append(curve_of(own, lru, profiles, verify, each))
    return [*rows.values(), *curves, *waste]


def find(rows: list[dict], part: str, **wanted: Any) -> dict[str, Any]:
    """The first row of a part with these values."""
    same = (r for r in rows if r["part"] == part and wanted.items() <= r.items())
    return next(same)


def judge(rows: list[dict]) -> dict[str, dict]:
    """The claim's parts: a U, a model that finds its bottom, and the paper's least speedup."""
    curves = {"engine": find(rows, "cutoff", preset="sp-moe", link="standard")}
    if any(row["part"] == "trace" for row in rows):
        curves |= {
            f"trace, {s}": find(rows, "trace", size=s, quality="measured") for s in simulation.SIZES
        }
    values, limits = {}, {}
    for name, row in curves.items():
        best = row["best_tpot_ms"]
        values[f"best over none, {name}"] = best / row["tpot_ms"][0]
        values[f"best over all layers, {name}"] = best / row["tpot_ms"][-1]
        limits |= dict.fromkeys(list(values)[-2:], 0.99)
        values[f"model's over best, {name}"] = row["tpot_ms_at_model"] / best
        limits[f"model's over best, {name}"] = LEVEL
    start = curves["engine"]
    values["best over LRU, engine"] = start["best_tpot_ms"] / start["lru_tpot_ms"]
    limits["best over LRU, engine"] = 1 / PAPER["least_speedup"]
    return common.judged(values, limits)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """The report, without what `common.finish` adds."""
    text = Text.read(options.windows, 0, max(options.tokens, PROMPT), options.data)
    virtual = moejax.load(common.MODEL, virtual=True)
    virtual = dataclasses.replace(virtual, draft=moejax.load("tiny-draft"))
    slots = common.slots_of(RESIDENCY, common.experts_of(virtual))
    windows = text.stacked()[0][:, : options.tokens]
    resident = with_policy(virtual, policy("self-draft"), slots)
    rows = quality.external_quality(with_policy(virtual, policy("lru"), slots), windows)
    rows += quality.self_quality(resident, windows, PRESETS["sp-moe"])
    by_layer = [r["coverage"] for r in rows if r["norm"] == "target" and r["depth"] == ""][1:]
    rows += engine_rows(text, slots, options)
    traced, why = simulation.sweep(options.data, np.array(by_layer), options.step, options.seed)
    if why:
        print(f"part (b) is left out: {why}")
    rows += traced
    targets, engine = judge(rows), find(rows, "cutoff", preset="sp-moe", link="standard")
    return {
        "residency": RESIDENCY,
        "slots": slots,
        "paper": PAPER,
        "trace": why or str(simulation.TRACE),
        "rows": rows,
        "summary": {
            "best_cutoff_measured": engine["best_cutoff"],
            "best_cutoff_model": engine["best_cutoff_model"],
        },
        "targets": targets,
        "verdict": common.verdict(targets),
    }


def plot(report: dict[str, Any], path: Any) -> None:
    """TPOT over the cutoff, relative to none, on the engine and under the trace."""
    rows = report["rows"]
    traced = [r for r in rows if r["part"] == "trace" and not r["latency_ms"] and r["cancels"]]
    panels = {
        f"Engine, {preset}": [r for r in rows if r["part"] == "cutoff" and r["preset"] == preset]
        for preset in PRESETS
    }
    for size, load in simulation.SIZES.items():
        panels[f"48 layers, {load:g} ms per expert"] = [r for r in traced if r["size"] == size]
    panels = {title: curves for title, curves in panels.items() if curves}
    tall = math.ceil(len(panels) / 2)
    figure, axes = common.figure(tall, 2, (11, 3.9 * tall))
    for axis in np.ravel(axes)[len(panels) :]:
        axis.set_visible(False)
    for axis, (title, curves) in zip(np.ravel(axes), panels.items(), strict=False):
        for row, look in zip(curves, LOOKS, strict=False):
            draw(axis, row, *look)
        for style, label in (
            *(("k-", "measured (engine) or simulated"), ("k--", "latency model")),
            *(("k*", "best L"), ("ko", "L* of the model")),
        ):
            axis.plot([], [], style, ms=11, mfc="none", label=label)
        axis.set(title=title, xlabel="Last layer prefetched, L (-1 = none)")
        axis.set(ylabel="TPOT relative to no prefetch")
        low, high = axis.get_ylim()
        axis.set_ylim(low, high + 0.55 * (high - low))  # room for the legend
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize=7.5, ncols=2, loc="upper left")
    common.save(figure, path)


def draw(axis: Any, row: dict[str, Any], colour: str, marker: str) -> None:
    """A curve, its model, and where both have their least."""
    own, start = np.array(row["tpot_ms"]) / row["tpot_ms"][0], row["tpot_ms"][0]
    model = np.array(row["model_tpot_ms"])
    name = row["link"] + " link" if "link" in row else f"right: {row['quality']}"
    look = {"color": colour, "marker": marker, "ms": 5, "markevery": max(1, len(own) // 8)}
    axis.plot(row["cutoffs"], own, label=f"{name} ({start:.3g} ms at -1)", **look)
    axis.plot(row["cutoffs"], model / model[0], "--", color=colour)
    axis.plot(row["best_cutoff"], own.min(), "*", ms=15, color=colour, mec="white")
    chosen = row["tpot_ms_at_model"] / start
    axis.plot(row["best_cutoff_model"], chosen, "o", ms=17, mew=1.8, mfc="none", color=colour)


def main() -> None:
    """Measure, write the JSON and draw."""
    parser = common.arguments(__doc__)
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--new", type=int, help="tokens generated after a prompt")
    parser.add_argument("--step", type=int, help="distance of the cutoffs of part (b)")
    options = common.resolved(parser.parse_args(), QUICK, FULL)
    report = {
        "claim": "TPOT over the last layer prefetched is U-shaped, and a latency model fed by "
        "measurements finds a layer that costs at most 5 % more than the best",
        "command": "python -m experiments.spmoe_cutoff",
        **measure(options),
    }
    common.finish(report, options, plot)


if __name__ == "__main__":
    main()
