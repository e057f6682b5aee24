"""What the experiments on SMoE share: text, runs over given tokens, the paced link, intervals."""

import argparse
import dataclasses
import importlib.util
import json
import math
import pathlib
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import moejax
from experiments import held_out, intervals
from experiments.environment import environment
from experiments.tiny_data import DOMAINS
from moejax import decode, warm
from moejax.loss import Loss, exact_logits, measure
from moejax.policies.policy import Policy, policy

MODEL = "tiny"  # what is held out is held out from its training
RESIDENCIES = (0.25, 0.4, 0.6)
PROMPT = 64  # tokens of a prompt: one chunk of prefill
EXPERTS_SHARE = 0.7  # of LRU's TPOT at 40 % residency and batch 1, as the paper measured
DRAWS = 10_000
TIMED = 4  # windows of a domain that are timed
COUNTED = (
    *("needed", "hits", "late", "fetched", "prefetched", "host", "stall"),
    *("exact_needed", "exact_hits", "replaced", "replaced_mass"),
    *("predicted", "predicted_right", "prefetch_used"),
)


def arguments(doc: str) -> argparse.ArgumentParser:
    """The options that all three scripts have; None = what --quick or a full run takes."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="under 3 minutes on 2 cores")
    parser.add_argument("--out", type=pathlib.Path)
    parser.add_argument("--plot", type=pathlib.Path, help="a picture; default: beside --out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", type=pathlib.Path, default=held_out.DATA)
    parser.add_argument("--windows", type=int, help="windows of held-out text of each domain")
    parser.add_argument("--tokens", type=int, help="tokens of a window")
    return parser


def resolved(options: argparse.Namespace, quick: dict, full: dict) -> argparse.Namespace:
    """The options with those that were not given filled in; ends without the held-out text."""
    if not options.data.is_dir():
        raise SystemExit(f"the held-out text is not at {options.data}: give its folder as --data")
    for name, value in (quick if options.quick else full).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    return options


def finish(report: dict, options: argparse.Namespace, plot: Callable) -> None:
    """Write the JSON and draw `plot(report, path)`, print the summary."""
    report = {"environment": environment(MODEL), **report}
    chosen = {name: value for name, value in vars(options).items() if name not in ("out", "plot")}
    report["options"] = {n: str(v) if n == "data" else v for n, v in chosen.items()}
    report["command"] += re.sub(r" --(out|plot|data) \S+", "", " ".join(["", *sys.argv[1:]]))
    path = options.plot or (options.out and options.out.with_suffix(".png"))
    if options.out:
        options.out.write_text(json.dumps(report, indent=1) + "\n")
    if path and importlib.util.find_spec("matplotlib"):
        plot(report, path)
    elif path:
        print("no picture: matplotlib is not installed", file=sys.stderr)
    shown = ("summary", "targets", "verdict") if options.out else report
    print(json.dumps({name: report[name] for name in shown}, indent=1))


@dataclasses.dataclass(frozen=True)
class Text:
    """Held-out windows by domain: those that are measured, and others to choose numbers on."""

    measured: dict[str, np.ndarray]  # [W, T + 1] i32
    profile: dict[str, np.ndarray]

    @classmethod
    def read(cls, measured: int, profile: int, tokens: int, data: pathlib.Path) -> "Text":
        """Windows of `tokens` + 1 tokens; the first ones of each domain are the profile."""
        directory = moejax.load(MODEL).directory
        found = {d: held_out.windows(directory, d, measured + profile, data) for d in DOMAINS}
        return cls(
            measured={d: rows[profile:, : tokens + 1] for d, rows in found.items()},
            profile={d: rows[:profile, : tokens + 1] for d, rows in found.items()},
        )

    def stacked(self, which: str = "measured") -> tuple[np.ndarray, np.ndarray]:
        """All windows [W, T + 1], and the index of the domain of each [W]."""
        parts = getattr(self, which)
        domain = np.repeat(np.arange(len(parts)), [len(rows) for rows in parts.values()])
        return np.concatenate([*parts.values()]), domain


def slots_of(share: float, experts: int) -> int:
    """Slots that a share of all experts takes, rounded down."""
    return int(share * experts + 1e-9)


def slots_at_equal_bytes(slots: int, record: int, other: int, fixed: int = 0) -> int:
    """Slots of `other` bytes in the memory of `slots` records, less `fixed` bytes beside them."""
    return max((slots * record - fixed) // other, 0)


def experts_of(runtime: moejax.Runtime) -> int:
    """L * E."""
    return runtime.config.num_moe_layers * runtime.config.num_experts


def with_policy(runtime: moejax.Runtime, policy: Policy, slots: int) -> moejax.Runtime:
    """The same weights and link under another policy and budget."""
    return dataclasses.replace(runtime, policy=policy, slots=slots)


def seated(runtime: moejax.Runtime, ids: Sequence[int], path: pathlib.Path) -> moejax.Runtime:
    """A runtime whose states begin with these experts in slots."""
    state = runtime.init_state(1)
    owner = np.full(runtime.slots, -1, np.int32)
    owner[: len(ids)] = ids
    tables = dataclasses.replace(state.experts.residency, owner=jnp.asarray(owner))
    cache = dataclasses.replace(state.experts, residency=tables)
    warm.save(path, runtime, dataclasses.replace(state, experts=cache))
    return dataclasses.replace(runtime, residency_file=path)


def popular(runtime: moejax.Runtime, text: Text) -> np.ndarray:
    """Ids of experts, those most often picked on the profile's text first."""
    counts = np.zeros((runtime.config.num_moe_layers, runtime.config.num_experts), int)
    chosen = dataclasses.replace(runtime, policy=policy("lru"), slots=experts_of(runtime))
    for row in text.stacked("profile")[0]:
        state = chosen.init_state(1, context=len(row))
        for start in range(0, len(row) - PROMPT + 1, PROMPT):
            state, out = chosen.decode_step(state, row[None, start : start + PROMPT])
            picks = np.asarray(out.trace.picks)
            for layer, own in enumerate(picks):
                counts[layer] += np.bincount(own.ravel(), minlength=counts.shape[1])
    return np.argsort(-counts.reshape(-1), kind="stable")


def groups_of(text: Text, batch: int, tokens: int) -> np.ndarray:
    """Sequences [G, B, PROMPT + tokens]: groups of one domain, domains in turn."""
    groups = []
    for rows in text.measured.values():
        rows = rows[:TIMED, : PROMPT + tokens]
        groups += [rows[i : i + batch] for i in range(0, len(rows) - batch + 1, batch)]
    return np.stack(groups)


class Replay:
    """One configuration that decodes given tokens again and again, its experts staying in slots.

    So all configurations make the same steps, whatever their logits say.
    """

    def __init__(self, runtime: moejax.Runtime, groups: np.ndarray):
        """Groups of sequences [G, B, PROMPT + T] i32."""
        self.runtime, self.groups = runtime, np.asarray(groups, np.int32)
        self.state = runtime.init_state(groups.shape[1], context=groups.shape[2])
        self.times: list[list[float]] = []  # of every run, by group: seconds per step

    def run(self) -> dict[str, float]:
        """All groups once: seconds per step and to the first token, and counts per step."""
        prompts, steps, traces, moved, times = [], [], [], 0, []
        for group in self.groups:
            self.state = decode.rewind(self.state, np.zeros(len(group)))
            prompts.append(self._step(group[:, :PROMPT], []))
            before = self._moved()
            own = [self._step(group[:, [t]], traces) for t in range(PROMPT, group.shape[1])]
            moved += self._moved() - before
            steps += own
            times.append(statistics.fmean(own))
        self.times.append(times)
        traces = jax.device_get(traces)
        if any(trace.failure.any() for trace in traces):
            raise RuntimeError("expert records did not arrive over the link")
        sums = {n: sum(float(getattr(t, n).sum()) for t in traces) for n in COUNTED}
        return {
            "tpot": math.fsum(steps) / len(steps),
            "slowest": max(steps),
            "ttft": statistics.median(prompts),
            "moved_bytes": moved / len(steps),
            **{name: value / len(steps) for name, value in sums.items()},
        }

    def _step(self, tokens: np.ndarray, traces: list) -> float:
        begun = time.perf_counter()
        self.state, out = self.runtime.decode_step(self.state, tokens)
        out.logits.block_until_ready()
        seconds = time.perf_counter() - begun
        traces.append(out.trace)  # read later: a link goes on while the host is busy
        return seconds

    def _moved(self) -> int:
        return self.runtime.link.stats().bytes if self.runtime.link else 0


def in_rounds(replays: dict[Any, Replay], rounds: int, seed: int) -> dict[Any, list[dict]]:
    """Runs by configuration: after one that is not counted, `rounds`, each in an order of its own.

    Noise of the machine so hits all configurations alike.
    """
    rng, names = np.random.default_rng(seed), [*replays]
    found: dict[Any, list[dict]] = {name: [] for name in names}
    for turn in range(rounds + 1):
        for i in rng.permutation(len(names)):
            run = replays[names[i]].run()
            if turn:
                found[names[i]].append(run)
    return found


def merged(runs: list[dict]) -> dict[str, float]:
    """Medians and spreads of the times over the rounds, means of the counts."""
    row = {name: statistics.fmean(run[name] for run in runs) for name in runs[0]}
    for name in ("tpot", "ttft"):
        row[name] = statistics.median(run[name] for run in runs)
        row[f"{name}_spread"] = float(np.ptp([run[name] for run in runs]))
    return row


def link_text(load_us: float, host_us: float, record_bytes: int) -> str:
    """A paced link on which a record takes `load_us`, beside a host of `host_us` per expert."""
    return f"paced:{record_bytes / (load_us * 1e3)!r},0,{host_us!r}"


def load_microseconds(resident: float, misses: float, share: float = EXPERTS_SHARE) -> float:
    """Cost of a load with which `misses` of them take `share` of a step.

    Args:
        resident: seconds of a step that misses nothing.
    """
    return share / (1 - share) * resident / misses * 1e6


def corrected(
    load_us: float, lru: float, resident: float, misses: float, share: float = EXPERTS_SHARE
) -> float:
    """The cost after one measurement of LRU's step: what is missing to the share goes to the loads.

    At least a tenth of the cost before.
    """
    wanted = share / (1 - share) * resident
    return max(load_us + (wanted - (lru - resident)) / misses * 1e6, load_us / 10)


def calibrated(measured: Callable[[str], tuple], record_bytes: int) -> dict[str, Any]:
    """The link on which LRU spends EXPERTS_SHARE of its steps on loads, after one correction.

    Args:
        measured: of a link's text, LRU's seconds per step, those with everything resident, and
            LRU's misses per step.
    """
    load = 100.0
    for change in (None, corrected, lambda load, *numbers: load):
        link = link_text(load, load / 3, record_bytes)
        lru, resident, misses = measured(link)
        numbers = (lru, resident, misses)
        load = change(load, *numbers) if change else load_microseconds(resident, misses)
    return {
        "link": link,
        "load_us": load,
        "host_us": load / 3,
        "record_bytes": record_bytes,
        "resident_ms": resident * 1e3,
        "lru_ms": lru * 1e3,
        "lru_misses_per_token": misses,
        "experts_share": 1 - resident / lru,
        "wanted_share": EXPERTS_SHARE,
    }


def gap_closed(lru: float, own: float, resident: float) -> float | None:
    """(T_LRU - T) / (T_LRU - T_resident), None where LRU loses nothing."""
    found = float(intervals.gap_closed(lru, own, resident))
    return found if math.isfinite(found) else None


def bootstrap(
    differences: np.ndarray, groups: np.ndarray | None = None, seed: int = 0, draws: int = DRAWS
) -> tuple[float, float]:
    """95 % interval of exp(mean) of differences of losses [W], windows drawn within groups [W]."""
    rng, sums = np.random.default_rng(seed), np.zeros(draws)
    groups = np.zeros(len(differences), int) if groups is None else groups
    for group in np.unique(groups):
        own = differences[groups == group]
        sums += own[rng.integers(0, len(own), (draws, len(own)))].sum(axis=1)
    low, high = np.exp(np.quantile(sums / len(differences), [0.025, 0.975]))
    return float(low), float(high)


def ratio(part: float, whole: float) -> float | None:
    """Their ratio, None of nothing."""
    return part / whole if whole else None


def flat(summary: dict[str, Any]) -> dict[str, Any]:
    """The summary with its nested numbers named "key alpha"."""
    found = dict(summary)
    for key, value in summary.items():
        if isinstance(value, dict):
            found |= {f"{key} {alpha}": number for alpha, number in value.items()}
    return found


def judged(
    values: dict[str, float | None],
    limits: dict[str, float],
    intervals: dict[str, Sequence[float] | None] | None = None,
) -> dict[str, dict]:
    """For each limit, the value, the most that it may be, and whether it is at most that.

    Where the value has an interval, that too, and whether the limit lies within it ("undecided").
    """
    found = {}
    for name, most in limits.items():
        value, ends = values.get(name), (intervals or {}).get(name)
        met = value is not None and bool(value <= most)
        found[name] = {"value": value, "at_most": most, "met": met}
        if ends is not None and value is not None:
            undecided = bool(ends[1] > most if met else ends[0] <= most)
            found[name] |= {"interval": [*ends], "undecided": undecided}
    return found


def verdict(targets: dict[str, dict]) -> str:
    """ "holds" if all targets are met, else which are not, and which their intervals leave open."""
    unsure = [name for name, target in targets.items() if target.get("undecided")]
    failed = [name for name, t in targets.items() if not t["met"] and name not in unsure]
    said = [f"fails: {', '.join(failed)}"] if failed else []
    said += [f"undecided: {', '.join(unsure)}"] if unsure else []
    return "; ".join(said) or "holds"


def accuracy(
    loss: Loss, domain: np.ndarray, layers: int, names: Iterable[str] = DOMAINS, seed: int = 0
) -> dict[str, dict]:
    """Figures of a run over windows, for all of them and by domain.

    Args:
        loss: on the host, [W, T].
        domain: [W] index of each window's domain among `names`.
        layers: layers with experts, over which `Loss` sums.
    """
    table = {"all": _figures(loss, domain, layers, seed)}
    for i, name in enumerate(names):
        chosen = domain == i
        if chosen.any():
            part = jax.tree.map(lambda x, chosen=chosen: x[chosen], loss)
            table[name] = _figures(part, domain[chosen], layers, seed)
    return table


def _figures(loss: Loss, domain: np.ndarray, layers: int, seed: int) -> dict[str, Any]:
    own, exact = (x.mean(axis=1, dtype=np.float64) for x in (loss.nll, loss.exact_nll))
    return {
        "nll": float(own.mean()),
        "perplexity": float(np.exp(own.mean())),
        "exact_perplexity": float(np.exp(exact.mean())),
        "perplexity_over_exact": float(np.exp((own - exact).mean())),
        "interval": bootstrap(own - exact, domain, seed),
        "local_kl": float(loss.local.mean(dtype=np.float64)),
        "trajectory_kl": float(loss.trajectory.mean(dtype=np.float64)),
        "flips": float(loss.flipped.mean(dtype=np.float64)),
        "replaced": float(loss.replaced.mean(dtype=np.float64) / layers),
        "replaced_mass": float(loss.replaced_mass.mean(dtype=np.float64) / layers),
        "hit_rate": float(loss.hits.sum() / loss.needed.sum()),
        "exact_hit_rate": float(loss.exact_hits.sum() / loss.exact_needed.sum()),
        "missed": float((loss.needed - loss.hits).mean(dtype=np.float64)),
        "moved": float(loss.moved.mean(dtype=np.float64)),
        "windows": len(own),
    }


class Accuracy:
    """What policies cost on the same windows, with the exact logits made once."""

    def __init__(self, runtime: moejax.Runtime, windows: np.ndarray, domain: np.ndarray):
        """A runtime with `virtual` residency, windows [W, T + 1] and their domains [W]."""
        self.runtime, self.windows, self.domain = runtime, windows, domain
        self.exact = exact_logits(runtime, windows)

    def of(
        self, policy: Policy, slots: int, *, local: bool = True, runtime: Any = None, seed: int = 0
    ) -> dict[str, dict]:
        """Figures by domain, see `accuracy`; of another runtime's weights if it is given."""
        loss = self.loss(policy, slots, local=local, runtime=runtime)
        return accuracy(loss, self.domain, self.runtime.config.num_moe_layers, seed=seed)

    def loss(self, policy: Policy, slots: int, *, local: bool = True, runtime: Any = None) -> Loss:
        """What `of` makes figures of, [W, T]."""
        chosen = with_policy(runtime or self.runtime, policy, slots)
        return measure(chosen, self.windows, self.exact, local=local)


def figure(rows: int, columns: int, size: tuple[float, float]) -> tuple[Any, Any]:
    """A matplotlib figure without a screen, and its axes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt.subplots(rows, columns, figsize=size, layout="constrained")


def save(figure: Any, path: pathlib.Path) -> None:
    """Write the picture."""
    import matplotlib.pyplot as plt

    figure.savefig(path, dpi=130)
    plt.close(figure)
