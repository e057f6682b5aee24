"""What `spac_utility` is made of: recorded verification windows, estimators fed by them, intervals.

P prompts, C cycles (padded), L layers with experts, W positions of a verification window, E experts
and K picks. Position 0 holds the pending token, the others drafts; the first `count` stay.
"""

import csv
import dataclasses
import functools
import lzma
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import moejax
from experiments import smoe_common as common
from moejax import experts
from moejax.cycles import Cycles
from moejax.policies.routing import Routing
from moejax.policies.speculation import FixedLength
from moejax.policies.utility import STAMPS, Costs, Work, at_least, balance
from moejax.sampling import Sampling
from moejax.speculate import Target

WINDOW = 9  # tokens of a window: what gamma 8 verifies, and what the control is fed
TRACE = pathlib.Path("traces/bigmoeonedge/qwen.route.csv.xz")


@dataclasses.dataclass(frozen=True)
class Recorded:
    """Cycles of all prompts; padding has a count of 0."""

    picks: np.ndarray  # [P, C, L, W, K] i32
    scores: np.ndarray  # [P, C, L, W, E] f32
    token: np.ndarray  # [P, C, W] i32, the tokens made
    count: np.ndarray  # [P, C] i32
    level: np.ndarray  # [P, C, L, E] i32, of the run's evictor as a cycle begins
    resident: np.ndarray  # [P, C, L, E] bool, likewise
    warm: int = 2 * WINDOW  # tokens of a prompt that do not count yet

    @property
    def cycles(self) -> np.ndarray:
        """[P, C] bool, those that are no padding."""
        return self.count > 0

    @property
    def made(self) -> np.ndarray:
        """[P, C, W] bool, positions of the tokens that stayed."""
        return np.arange(self.picks.shape[3]) < self.count[:, :, None]

    @property
    def fed(self) -> np.ndarray:
        """[P, C, W] bool, all positions that were verified."""
        return np.broadcast_to(self.cycles[:, :, None], self.made.shape)

    def until(self, tokens: int) -> "Recorded":
        """The cycles that made the first so many tokens of each prompt."""
        kept = np.cumsum(self.count, axis=1) <= tokens
        return dataclasses.replace(self, count=np.where(kept, self.count, 0))

    def uses(self, positions: np.ndarray) -> np.ndarray:
        """[P, C, L, E] i32, how many tokens at `positions` [P, C, W] use each expert."""
        found = np.zeros(self.scores.shape[:3] + self.scores.shape[4:], np.int32)
        shape = self.picks.shape
        chosen = np.broadcast_to(positions[:, :, None, :, None], shape)
        p, c, layer, _, _ = np.nonzero(chosen)
        np.add.at(found, (p, c, layer, self.picks[chosen]), 1)
        return found


def record(
    runtime: moejax.Runtime,
    prompts: Sequence[np.ndarray],
    tokens: int,
    gamma: int,
    temperature: float,
    seed: int,
) -> Recorded:
    """Cycles with `gamma` drafts that continue each prompt by at least `tokens` tokens."""
    policy = runtime.policy
    speculation = dataclasses.replace(
        policy.speculation, lengths=FixedLength(gamma=jnp.int32(gamma))
    )
    runtime = dataclasses.replace(
        runtime, policy=dataclasses.replace(policy, speculation=speculation)
    )
    return _padded(
        [_one(runtime, prompt, tokens, temperature, seed + i) for i, prompt in enumerate(prompts)]
    )


def _one(
    runtime: moejax.Runtime, prompt: np.ndarray, tokens: int, temperature: float, seed: int
) -> list[dict]:
    fixed = {"model": runtime.model, "params": runtime.params, "store": runtime.store}
    most = runtime.policy.speculation.max_length + 1
    state = runtime.init_state(1, context=len(prompt) + tokens + 2 * most)
    state, out = runtime.decode_step(state, np.asarray(prompt, np.int32)[None])
    sampling = Sampling(temperature=temperature).validate()
    target = Target(policy=runtime.policy, **fixed)
    options = {"sampling": sampling, "key": jax.random.key(seed), "record": True}
    loop = Cycles(target, runtime.engine.helper, runtime._fresh_stats(), **options)
    loop.begin(state, [[*prompt, int(out.logits[0].argmax())]], None)
    rows, done = [], 0
    while done < tokens:
        before = jax.device_get(loop.run.state)
        # as if there were room for ever: the last windows are as wide as the first
        made = loop.step(np.ones(1, bool), np.array([most]))
        trace, level = jax.device_get(loop.trace), before.policy.evictor.level
        rows.append(
            {
                "picks": trace.picks,
                "scores": trace.scores,
                "token": made.token[0],
                "count": np.int32(made.count[0]),
                "level": level,
                "resident": before.experts.residency.slot_of.reshape(level.shape) >= 0,
            }
        )
        done += int(made.count[0])
    return rows


def _padded(prompts: list[list[dict]]) -> Recorded:
    most = max(len(rows) for rows in prompts)

    def stacked(name: str) -> np.ndarray:
        parts = [np.stack([row[name] for row in rows]) for rows in prompts]
        return np.stack([np.pad(p, [(0, most - len(p))] + [(0, 0)] * (p.ndim - 1)) for p in parts])

    return Recorded(**{name: stacked(name) for name in prompts[0][0]})


@dataclasses.dataclass(frozen=True)
class Steps:
    """What an estimator is fed: S steps of at most N tokens, and which of them ends each cycle."""

    picks: np.ndarray  # [P, S, L, N, K]
    scores: np.ndarray  # [P, S, L, N, E]
    valid: np.ndarray  # [P, S, N] bool
    end: np.ndarray  # [P, C] i32


def whole(recorded: Recorded, positions: np.ndarray) -> Steps:
    """One step per cycle, of the chosen positions [P, C, W]."""
    end = np.broadcast_to(np.arange(positions.shape[1]), positions.shape[:2])
    return Steps(recorded.picks, recorded.scores, positions, end)


def single(recorded: Recorded) -> Steps:
    """One step per token that was really made, as plain decoding makes them."""
    made = recorded.made
    tokens = made.sum(axis=(1, 2))
    shape = (len(made), int(tokens.max()))

    def flat(values: np.ndarray) -> np.ndarray:
        own = values.swapaxes(2, 3)  # [P, C, W, L, ...]
        found = np.zeros((*shape, *own.shape[3:]), values.dtype)
        for p in range(shape[0]):
            found[p, : tokens[p]] = own[p][made[p]]
        return found[:, :, :, None]

    valid = (np.arange(shape[1]) < tokens[:, None])[:, :, None]
    end = np.cumsum(recorded.count, axis=1) - 1
    return Steps(flat(recorded.picks), flat(recorded.scores), valid, end)


def last(recorded: Recorded, tokens: int = WINDOW) -> Steps:
    """One step per cycle: the last so many tokens that were really made."""
    each = single(recorded)
    place = each.end[:, :, None] - np.arange(tokens - 1, -1, -1)
    valid = (place >= 0) & recorded.cycles[:, :, None]
    rows = np.arange(len(place))[:, None, None]
    picks, scores = (x[rows, np.maximum(place, 0), :, 0] for x in (each.picks, each.scores))
    end = np.broadcast_to(np.arange(place.shape[1]), place.shape[:2])
    return Steps(picks.swapaxes(2, 3), scores.swapaxes(2, 3), valid, end)


@functools.partial(jax.jit, static_argnames="what")
def _replayed(evictor: Any, picks: Any, scores: Any, valid: Any, what: str) -> jax.Array:
    def layer_step(memory: Any, given: tuple) -> tuple:
        index, picks, scores, valid = given
        routing = Routing(expert=picks, weight=None, exact=None, replaced_mass=None)
        layer = experts.Layer(
            index=index,
            hidden=None,
            x=None,
            shared=None,
            scores=scores,
            routing=routing,
            valid=valid,
        )
        return evictor.observe(memory, experts.access(layer)), None

    def step(memory: Any, given: tuple) -> tuple:
        picks, scores, valid = given
        index = jnp.arange(layers, dtype=jnp.int32)
        spread = jnp.broadcast_to(valid, (layers, len(valid)))
        memory, _ = jax.lax.scan(layer_step, memory, (index, picks, scores, spread))
        seen = evictor.levels(memory) if what == "levels" else evictor.keys(memory, jnp.int32(0))
        return memory, seen.reshape(layers, -1)

    layers, size = scores.shape[2], scores.shape[4]

    def prompt(*given: Any) -> jax.Array:
        return jax.lax.scan(step, evictor.init(layers, size), given)[1]

    return jax.vmap(prompt)(picks, scores, valid)


def replayed(evictor: Any, steps: Steps, what: str = "levels") -> np.ndarray:
    """[P, C, L, E] levels or keys of a fresh evictor after each cycle."""
    seen = np.asarray(_replayed(evictor, steps.picks, steps.scores, steps.valid, what))
    return seen[np.arange(len(seen))[:, None], np.maximum(steps.end, 0)]


def best(values: np.ndarray, number: np.ndarray) -> np.ndarray:
    """[..., E] bool, the greatest `number` [...] of each row, ties to the lower expert."""
    rank = np.argsort(np.argsort(-values, axis=-1, kind="stable"), axis=-1, kind="stable")
    return rank < np.asarray(number)[..., None]


def fitting(keys: np.ndarray, slots: int) -> tuple[np.ndarray, np.ndarray]:
    """Of keys [P, C, L, E] of a Utility, who stays in `slots` slots, and which of them are hot."""
    flat = keys.reshape(*keys.shape[:2], -1)
    stay = (best(flat, np.full(flat.shape[:2], slots)) & (flat > 0)).reshape(keys.shape)
    return stay, stay & (keys >= STAMPS)


def tally(hot: np.ndarray, uses: np.ndarray, recorded: Recorded) -> dict[str, np.ndarray]:
    """Sums by prompt and layer [P, L] of hot [P, C, L, E] against the uses of the cycle after.

    From the cycle on after which `recorded.warm` tokens were made: a history has to be one.
    """
    made = np.cumsum(recorded.count, axis=1)[:, :-1] >= recorded.warm
    known = (made & recorded.cycles[:, 1:])[:, :, None, None]
    hot, later = hot[:, :-1] & known, np.where(known, uses[:, 1:], 0)
    used, every = later > 0, np.broadcast_to(known, hot.shape)
    parts = {
        "hot": hot,
        "right": hot & used,
        "carried": np.where(hot, later, 0),
        "picks": later,
        "agreed": (hot == used) & every,
        "used": used,
        "experts": every,
    }
    sums = {name: part.sum(axis=(1, 3)) for name, part in parts.items()}
    return sums | {"windows": sums["experts"] / hot.shape[3]}


def drawn(domain: np.ndarray, seed: int, draws: int = common.DRAWS) -> np.ndarray:
    """[draws, P] prompts, drawn within their domains."""
    rng, found = np.random.default_rng(seed), np.zeros((draws, len(domain)), int)
    for one in np.unique(domain):
        own = np.flatnonzero(domain == one)
        found[:, own] = own[rng.integers(0, len(own), (draws, len(own)))]
    return found


def quotient(part: np.ndarray, of: np.ndarray, sample: np.ndarray) -> np.ndarray:
    """Ratios of sums over the drawn prompts [draws]; NaN of nothing."""
    with np.errstate(invalid="ignore"):
        return part[sample].sum(axis=1) / of[sample].sum(axis=1)


def bounds(values: np.ndarray) -> tuple[float, float] | None:
    """95 % interval of drawn values, None where some are of nothing."""
    if np.isnan(values).any():
        return None
    return tuple(float(x) for x in np.quantile(values, [0.025, 0.975]))


def rates(sums: dict[str, np.ndarray], sample: np.ndarray) -> dict[str, Any]:
    """Precision, share and number of hot experts with intervals, and the last layer's figures."""
    total = {name: part.sum(axis=1) for name, part in sums.items()}
    end = {name: float(part[:, -1].sum()) for name, part in sums.items()}
    row = {}
    for name, part, of in (
        ("precision", "right", "hot"),
        ("share", "carried", "picks"),
        ("hot_per_layer", "hot", "windows"),
    ):
        row[name] = common.ratio(float(total[part].sum()), float(total[of].sum()))
        row[f"{name}_interval"] = bounds(quotient(total[part], total[of], sample))
    return row | {
        "last_layer_precision": common.ratio(end["right"], end["hot"]),
        "last_layer_accuracy": common.ratio(end["agreed"], end["experts"]),
        "last_layer_used": common.ratio(end["used"], end["experts"]),
    }


def real_trace(data: pathlib.Path) -> Recorded | None:
    """Qwen3-30B-A3B at decode as windows of 9 tokens that all stay; None without the file."""
    if not (data / TRACE).exists():
        return None
    found: dict[tuple[int, int], dict[int, int]] = {}
    with lzma.open(data / TRACE, "rt") as file:
        for row in csv.DictReader(line for line in file if not line.startswith("#")):
            if row["phase"] == "1":
                at = (int(row["step"]), int(row["layer"]))
                found.setdefault(at, {})[int(row["slot"])] = int(row["expert"])
    steps, layers = sorted({step for step, _ in found}), max(layer for _, layer in found) + 1
    tokens = np.array(
        [[[*dict(sorted(found[s, i].items())).values()] for i in range(layers)] for s in steps],
        np.int32,
    )
    number = len(tokens) // WINDOW
    windows = tokens[: number * WINDOW].reshape(1, number, WINDOW, *tokens.shape[1:]).swapaxes(2, 3)
    experts_of = 128
    none = np.zeros((1, number, layers, experts_of), np.int32)
    return Recorded(
        picks=windows,
        scores=np.zeros((*windows.shape[:4], experts_of), np.float32),
        token=np.zeros((1, number, WINDOW), np.int32),
        count=np.full((1, number), WINDOW, np.int32),
        level=none,
        resident=none > 0,
        warm=0,
    )


@functools.partial(jax.jit, static_argnames="slots")
def _balanced(work: Work, costs: Costs, cap: jax.Array, slots: int) -> Any:
    return jax.vmap(lambda one: balance(one, costs, cap, slots))(work)


def balance_rows(
    recorded: Recorded, costs: dict[str, float], cap: int, slots: int
) -> list[dict[str, Any]]:
    """Predicted time of a layer under each fixed threshold, and under the balanced one.

    Levels and residents are those of the beginning of a cycle. While a layer runs, the link brings
    what the window of the layer before it has put in the queue.
    """
    uses, known = recorded.uses(recorded.fed), recorded.cycles[:, :-1] & recorded.cycles[:, 1:]
    level, resident = recorded.level[:, :-1][known], recorded.resident[:, :-1][known]
    after, tokens = recorded.level[:, 1:][known], uses[:, :-1][known]  # [M, L, E]
    # the layer before, wrapping round: layer 0 follows the last one of the window before
    before = np.concatenate([level[:, -1:], after[:, :-1]], axis=1)
    absent = ~np.roll(resident, 1, axis=1)
    count = jax.vmap(at_least)
    windows, layers, size = level.shape
    hot = count(level.reshape(windows, -1), np.ones((windows, layers * size), bool))
    coming = count(before.reshape(-1, size), absent.reshape(-1, size))
    flat = [jnp.asarray(x.reshape(-1, size)) for x in (level, tokens, resident)]
    work = Work(
        level=flat[0],
        tokens=flat[1],
        needed=flat[1] > 0,
        resident=flat[2],
        hot=jnp.repeat(hot, layers, axis=0),
        coming=coming,
    )
    prices = Costs(**{name: jnp.float32(cost) for name, cost in costs.items()})
    found = jax.device_get(_balanced(work, prices, jnp.int32(cap), slots))
    return threshold_rows(found, np.asarray(work.hot) <= slots, cap)


def threshold_rows(found: Any, allowed: np.ndarray, cap: int) -> list[dict[str, Any]]:
    """Means over layers of windows of a stacked `Balance`; "balanced" is the last row."""
    times = np.stack([found.device, found.host, found.link])  # [3, M, thresholds]
    slowest = times.max(axis=0)
    rows = [
        {
            "threshold": k,
            "slowest_us": float(slowest[:, k].mean()),
            **{
                f"{n}_us": float(t[:, k].mean())
                for n, t in zip(("device", "host", "link"), times, strict=True)
            },
            "allowed": float(allowed[:, k].mean()),
            "chosen": float((found.threshold == k).mean()),
        }
        for k in range(cap + 2)
    ]
    own = np.take_along_axis(slowest, found.threshold[:, None], axis=1)
    return [*rows, {"threshold": "balanced", "slowest_us": float(own.mean())}]
