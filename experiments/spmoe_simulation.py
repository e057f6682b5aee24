"""A simulated link under a routing trace: what prefetching while drafting costs, layer by layer.

Verification windows are consecutive tokens of the trace, so every draft counts as accepted (the
paper's acceptance is 97 %). The draft says of each token but the last, as it passes a layer, which
k experts the layer will want; each is right with a given chance, independently of the others, else
an expert that the token does not pick, drawn by how often the layer picks it. Records queue in the
order in which they are asked for; what verification misses goes first, but never interrupts a
request. A record takes the slot of the least recently used expert when its request begins; experts
of the running layer and those on their way keep theirs. A layer computes when all of its experts
have arrived. Times are milliseconds.
"""

import collections
import csv
import dataclasses
import itertools
import lzma
import math
import pathlib
from typing import Any

import jax.numpy as jnp
import numpy as np

from moejax.policies import cutoffs

TRACE = pathlib.Path("traces/bigmoeonedge/qwen.route.csv.xz")  # Qwen3-30B-A3B
EXPERTS = 128
RESIDENCY, GAMMA = 0.25, 5
DRAFT_MS, LAYER_MS = 20.0, 0.5  # assumed: one draft step; one layer of a verification
SIZES = {"small": 0.7, "large": 14.0}  # ms of a load: DeepSeek-V2-Lite's and Mixtral's experts
QUALITIES = (0.6, 0.75, 0.9)
LATENCIES = (0.03, 0.3)  # ms
TOGETHER = 4  # records of a batched request


@dataclasses.dataclass(frozen=True)
class Costs:
    """What the link and the cycle cost."""

    record: float  # one expert over the link
    draft: float = DRAFT_MS  # one drafted token
    layer: float = LAYER_MS
    latency: float = 0.0  # one request
    batch: int = 1  # the most records of a request


@dataclasses.dataclass
class Profile:
    """Sums over cycles, by layer [L] where nothing else is said; what the model is given."""

    cycles: int
    missed: np.ndarray  # needed and without a slot when the layer begins
    absent: np.ndarray  # needed and without a slot when the draft begins
    asked: np.ndarray  # predicted and without a slot when the draft begins
    right: np.ndarray  # both
    prefetched: int = 0
    used: int = 0  # of those, needed before they left
    empty: int = 0  # slots, when the draft begins

    def reuse_after(self, none: "Profile") -> float:
        """Chance that a prefetched record displaces one that is needed again.

        Misses that came on top of those without prefetch less what the prefetch served, per record.
        """
        if not self.prefetched:
            return 0.0
        missed, before = (p.missed.sum() / p.cycles for p in (self, none))
        more = missed - (before - self.used / self.cycles)
        return float(np.clip(more / (self.prefetched / self.cycles), 0.0, 1.0))


def modelled(none: Profile, every: Profile, costs: Costs, drafts: float) -> dict[str, Any]:
    """The latency model's time of a cycle by cutoff, none first, its best cutoff, and its inputs.

    Args:
        none: measured without prefetch.
        every: measured with all layers prefetched.
        drafts: tokens drafted in a cycle.
    """
    quotient = {"out": np.zeros(len(none.missed)), "where": none.asked > 0}
    precision = np.divide(none.right, none.asked, **quotient)
    quotient = {"out": np.zeros(len(none.missed)), "where": none.absent > 0}
    recall = np.divide(none.right, none.absent, **quotient)
    missing, reuse = none.missed / none.cycles, every.reuse_after(none)
    free = none.empty / none.cycles
    by_layer = {"missing": missing, "precision": precision, "recall": recall}
    foresight = cutoffs.Foresight(**{n: jnp.asarray(x, jnp.float32) for n, x in by_layer.items()})
    link = cutoffs.LinkCosts(
        record=costs.record,
        latency=costs.latency,
        batch=costs.batch,
        draft=costs.draft * drafts,
        layer=costs.layer,
        free=free,
        reuse=reuse,
    )
    times = cutoffs.predicted_times(foresight, link)
    queued = float(none.asked.sum() / none.cycles / len(missing))
    simple = cutoffs.briskmoe_cutoff(queued, costs.record, link.draft, jnp.inf, len(missing))
    return {
        "cycle_ms": np.asarray(times, float).tolist(),
        "best_cutoff": int(cutoffs.latency_cutoff(foresight, link).last),
        "best_cutoff_briskmoe": int(simple) - 1,
        "missing": missing.tolist(),
        "precision": precision.tolist(),
        "recall": recall.tolist(),
        "reuse": reuse,
        "free": free,
        "record_ms": costs.record,
        "draft_ms": costs.draft * drafts,
        "layer_ms": costs.layer,
    }


class Link:
    """A link, what waits for it, and the slots that it fills."""

    def __init__(self, costs: Costs, slots: int):
        self.costs, self.slots = costs, slots
        self.there: collections.OrderedDict[int, float] = collections.OrderedDict()  # -> landing
        self.queue: dict[int, float] = {}  # prefetches in order -> when they were asked for
        self.pinned: set[int] = set()
        self.fresh: set[int] = set()  # prefetched and not used yet
        self.free = 0.0
        self.prefetched = self.used = 0

    def use(self, expert: int) -> None:
        """Now the most recently used one."""
        self.there.move_to_end(expert)
        if expert in self.fresh:
            self.fresh.remove(expert)
            self.used += 1

    def _seat(self, expert: int, begin: float) -> bool:
        """Give a slot; False if none may be taken."""
        if len(self.there) >= self.slots:
            victims = (e for e, t in self.there.items() if t <= begin and e not in self.pinned)
            victim = next(victims, None)
            if victim is None:
                return False
            del self.there[victim]
            self.fresh.discard(victim)
        self.there[expert] = math.inf
        return True

    def _carry(self, experts: list[int], begin: float) -> None:
        """One request, whose records land one after another."""
        self.free = begin + self.costs.latency
        for expert in experts:
            self.free += self.costs.record
            self.there[expert] = self.free

    def advance(self, until: float) -> None:
        """Begin the requests of prefetches that begin before `until`."""
        while self.queue:
            begin = max(self.free, next(iter(self.queue.values())))
            if begin >= until:
                return
            taken, looked = [], 0
            for expert, asked in self.queue.items():
                if asked > begin or len(taken) == self.costs.batch:
                    break
                looked += 1
                if expert not in self.there and self._seat(expert, begin):
                    taken.append(expert)
            for expert in [*itertools.islice(self.queue, looked)]:
                del self.queue[expert]
            if taken:
                self.prefetched += len(taken)
                self.fresh.update(taken)
                self._carry(taken, begin)

    def serve(self, needed: list[int], now: float) -> tuple[float, int]:
        """When all experts of a layer are there, and how many had to be asked for now."""
        self.advance(now)
        self.pinned = set(needed)
        missing = []
        for expert in needed:
            self.queue.pop(expert, None)
            if expert in self.there:
                self.use(expert)
            else:
                missing.append(expert)
        for i in range(0, len(missing), self.costs.batch):
            begin, part = max(self.free, now), missing[i : i + self.costs.batch]
            for expert in part:
                if not self._seat(expert, begin):
                    raise ValueError(f"{self.slots} slots are too few for a layer of a window")
            self._carry(part, begin)
        return max([now, *(self.there[e] for e in needed)]), len(missing)


@dataclasses.dataclass
class Outcome:
    """A simulated run."""

    cycle_ms: float
    stall_ms: float  # of a cycle, that layers waited for the link
    profile: Profile


def simulate(
    windows: np.ndarray,
    predicted: np.ndarray,
    cutoff: int,
    slots: int,
    costs: Costs,
    *,
    warm: list[int] = (),
    cancels: bool = True,
) -> Outcome:
    """Run all windows one after another.

    Args:
        windows: [C, W, L, K] ids of the experts that the tokens pick, every layer's its own.
        predicted: [C, G, L, K] ids that the draft names for the first G of them.
        cutoff: the last layer prefetched, -1 = none.
        warm: ids used before, in their order.
        cancels: drop what is left of a layer's prefetch when the layer begins.
    """
    link, now, stall, empty = Link(costs, slots), 0.0, 0.0, 0
    for expert in [*dict.fromkeys(warm[::-1])][:slots][::-1]:  # the last uses count
        link.there[expert] = 0.0
    count, _, layers, _ = windows.shape
    sums = {name: np.zeros(layers) for name in ("missed", "absent", "asked", "right")}
    for picks, guess in zip(windows, predicted, strict=True):
        needs = [[*dict.fromkeys(picks[:, layer].ravel().tolist())] for layer in range(layers)]
        link.advance(now)
        link.pinned = set()
        _look(sums, needs, guess, link.there)
        empty += slots - len(link.there)
        for token, by_layer in enumerate(guess[:, : cutoff + 1].tolist()):
            for layer, experts in enumerate(by_layer):
                asked = now + costs.draft * (token + (layer + 1) / layers)
                for expert in experts:
                    link.queue.setdefault(expert, asked)
        now += costs.draft * len(guess)
        for layer, needed in enumerate(needs):
            ready, missed = link.serve(needed, now)
            if cancels:
                for expert in guess[:, layer].ravel().tolist():
                    link.queue.pop(expert, None)
            sums["missed"][layer] += missed
            stall += ready - now
            now = ready + costs.layer
    profile = Profile(cycles=count, prefetched=link.prefetched, used=link.used, empty=empty, **sums)
    return Outcome(now / count, stall / count, profile)


def _look(sums: dict, needs: list[list[int]], guess: np.ndarray, there: Any) -> None:
    """Count what a draft predicts and what it ought to."""
    for layer, needed in enumerate(needs):
        absent = {e for e in needed if e not in there}
        asked = {e for e in guess[:, layer].ravel().tolist() if e not in there}
        sums["absent"][layer] += len(absent)
        sums["asked"][layer] += len(asked)
        sums["right"][layer] += len(absent & asked)


def read_trace(path: pathlib.Path) -> tuple[np.ndarray, np.ndarray]:
    """Ids of the experts picked in prefill and in decode, each [T, L, K]; -1 = not recorded."""
    with lzma.open(path, "rt") as file:
        rows = [*csv.DictReader(line for line in file if not line.startswith("#"))]
    names = ("phase", "step", "layer", "slot", "expert")
    phase, step, layer, slot, expert = (np.array([int(r[n]) for r in rows]) for n in names)
    parts = []
    for which in (0, 1):
        own = phase == which
        at = step[own] - step[own].min()
        picks = np.full((at.max() + 1, layer.max() + 1, slot.max() + 1), -1)
        picks[at, layer[own], slot[own]] = layer[own] * EXPERTS + expert[own]
        parts.append(picks)
    return parts[0], parts[1]


def windows_of(picks: np.ndarray, width: int) -> np.ndarray:
    """[C, W, L, K] whole windows of the tokens [T, L, K]."""
    count = len(picks) // width
    return picks[: count * width].reshape(count, width, *picks.shape[1:])


def guesses(windows: np.ndarray, quality: np.ndarray, experts: int, seed: int) -> np.ndarray:
    """What a draft says of every token but each window's last [C, W - 1, L, K], see above.

    Args:
        windows: [C, W, L, K] ids.
        quality: [L] chance that a guess is right.
        experts: E, of a layer.
    """
    rng = np.random.default_rng(seed)
    drafted = windows[:, :-1]
    found = drafted.copy()
    for layer in range(windows.shape[2]):
        own = windows[:, :, layer].ravel() - layer * experts
        popular = np.bincount(own, minlength=experts) + 1.0
        for cycle, token in np.ndindex(drafted.shape[:2]):
            picks = drafted[cycle, token, layer] - layer * experts
            wrong = rng.random(len(picks)) >= quality[layer]
            weight = popular.copy()
            weight[picks] = 0.0
            other = rng.choice(experts, len(picks), replace=False, p=weight / weight.sum())
            found[cycle, token, layer] = np.where(wrong, other, picks) + layer * experts
    return found


def cases(measured: np.ndarray, layers: int) -> list[dict[str, Any]]:
    """Configurations of the sweep: load times, qualities, requests, and a link that drops nothing.

    Args:
        measured: [A] quality by layer of a smaller model, stretched over this one's depth.
    """
    at = np.linspace(0, len(measured) - 1, layers)
    qualities = {str(q): np.full(layers, q) for q in QUALITIES}
    qualities["measured"] = np.interp(at, np.arange(len(measured)), measured)
    found = []
    for size in SIZES:
        start = {"size": size, "latency_ms": 0.0, "batch": 1, "cancels": True}
        found += [start | {"quality": name, "by_layer": q} for name, q in qualities.items()]
        start |= {"quality": "0.75", "by_layer": qualities["0.75"]}
        found.append(start | {"cancels": False})
        found += [start | {"latency_ms": t, "batch": n} for t in LATENCIES for n in (1, TOGETHER)]
    return found


def sweep(
    data: pathlib.Path, measured: np.ndarray, step: int, seed: int
) -> tuple[list[dict[str, Any]], str]:
    """A row for each of the `cases`; or none, and why.

    Args:
        step: distance of the cutoffs; the first few layers and the last are among them.
    """
    if not (data / TRACE).is_file():
        return [], f"no routing trace at {data / TRACE}"
    prompt, decode = read_trace(data / TRACE)
    windows = windows_of(decode, GAMMA + 1)
    layers = windows.shape[2]
    slots = int(RESIDENCY * layers * EXPERTS)
    warm = prompt[prompt >= 0].tolist()
    tried = sorted({*range(-1, 4), *range(-1, layers, step), layers - 1})
    found = cases(measured, layers)
    quality = {case["quality"]: case["by_layer"] for case in found}
    named = {name: guesses(windows, q, EXPERTS, seed) for name, q in quality.items()}
    rows = [case_row(case, windows, named[case["quality"]], warm, slots, tried) for case in found]
    return rows, ""


def case_row(
    case: dict[str, Any],
    windows: np.ndarray,
    predicted: np.ndarray,
    warm: list[int],
    slots: int,
    tried: list[int],
) -> dict[str, Any]:
    """Simulated and modelled TPOT of a case by cutoff; the model chooses among all layers."""
    costs = Costs(SIZES[case["size"]], latency=case["latency_ms"], batch=case["batch"])
    fixed = {"warm": warm, "cancels": case["cancels"]}
    runs = {c: simulate(windows, predicted, c, slots, costs, **fixed) for c in tried}
    model = modelled(runs[-1].profile, runs[tried[-1]].profile, costs, GAMMA)
    width, chosen = windows.shape[1], model["best_cutoff"]
    own = runs.get(chosen) or simulate(windows, predicted, chosen, slots, costs, **fixed)
    times = {c: run.cycle_ms / width for c, run in runs.items()}
    count = len(windows)
    return {
        "part": "trace",
        **{name: value for name, value in case.items() if name != "by_layer"},
        "quality_mean": float(case["by_layer"].mean()),
        "slots": slots,
        "windows": count,
        **curve(times, own.cycle_ms / width, model, width),
        "stall_ms": [run.stall_ms / width for run in runs.values()],
        "prefetched_per_cycle": [run.profile.prefetched / count for run in runs.values()],
        "missed_per_cycle": [float(run.profile.missed.sum()) / count for run in runs.values()],
    }


def curve(
    times: dict[int, float], at_model: float, model: dict[str, Any], tokens: float
) -> dict[str, Any]:
    """TPOT in ms by cutoff, beside the model's, whose cycle makes `tokens` tokens.

    Args:
        at_model: TPOT at the model's cutoff.
    """
    best = min(times, key=times.get)
    modelled_times = [model["cycle_ms"][c + 1] / tokens for c in times]
    return {
        "cutoffs": [*times],
        "tpot_ms": [*times.values()],
        "best_cutoff": best,
        "best_tpot_ms": times[best],
        "model_tpot_ms": modelled_times,
        "best_cutoff_model": model["best_cutoff"],
        "tpot_ms_at_model": at_model,
        "best_cutoff_briskmoe": model["best_cutoff_briskmoe"],
        "model": {name: value for name, value in model.items() if name != "cycle_ms"},
    }
