"""How often an expert is still in its slot: from a trace, or from curves of recorded ones.

The curves (`reuse.json`, made by `python -m experiments.plan_reuse`) give the hit rate of one pool
under least recently used by its slots per layer in units of the experts that a token uses. That
unit carries over from model to model better than the share of all experts does; docs/planner.md
has both errors.
"""

import collections
import dataclasses
import json
import math
import pathlib
from collections.abc import Sequence

import numpy as np

from moejax.errors import InputError
from moejax.traces.trace import Phase, Trace

CURVES = pathlib.Path(__file__).with_name("reuse.json")


def uniform(slots: int, layers: int, experts: int, top_k: int) -> float:
    """The hit rate if every token chose at random: in steps, and at most the share of experts.

    A layer's experts of t tokens ago are still there if all that was used since fits the slots.
    """
    if slots >= layers * experts:
        return 1.0
    left = 1 - top_k / experts  # share of a layer's experts that one token does not use
    if left <= 0:
        return 0.0
    tokens = math.log(1 - slots / (layers * experts)) / math.log(left)
    return 1 - left ** math.floor(tokens + 1e-9)


@dataclasses.dataclass(frozen=True)
class Curve:
    """Hit rates of one model's routing by slots per layer over experts per token."""

    model: str
    source: str
    multiples: tuple[float, ...]  # slots per layer over top-k, ascending
    hit_rates: tuple[float, ...]

    def at(self, slots: int, layers: int, experts: int, top_k: int) -> float:
        """The hit rate of a pool in a model of other sizes; 1 where all experts have a slot.

        Between no slot and all where the curve does not reach; never below uniform routing's.
        """
        share = min(slots / (layers * experts), 1.0)
        if share == 1.0:
            return 1.0
        multiples = np.array([0.0, *self.multiples])
        rates = np.array([0.0, *self.hit_rates])
        multiple, full = slots / layers / top_k, experts / top_k
        if multiples[-1] < full:
            multiples, rates = np.append(multiples, full), np.append(rates, 1.0)
        return max(
            float(np.interp(multiple, multiples, rates)), uniform(slots, layers, experts, top_k)
        )


@dataclasses.dataclass(frozen=True)
class Hits:
    """A hit rate and how far it can be trusted."""

    low: float
    middle: float
    high: float
    source: str


def curves() -> list[Curve]:
    """The recorded curves that ship with moejax."""
    rows = json.loads(CURVES.read_text())["curves"]
    fields = ("multiples", "hit_rates")
    return [
        Curve(r["model"], r["source"], *(tuple(map(float, r[name])) for name in fields))
        for r in rows
    ]


def expected(
    slots: int, layers: int, experts: int, top_k: int, known: list[Curve] | None = None
) -> Hits:
    """The hit rate to expect of a model whose routing nobody recorded.

    Args:
        known: curves to go by; default all that ship.
    """
    known = curves() if known is None else known
    if not known:
        raise InputError("no routing curves to go by: give a trace")
    rates = [curve.at(slots, layers, experts, top_k) for curve in known]
    names = ", ".join(curve.model for curve in known)
    return Hits(
        low=uniform(slots, layers, experts, top_k),
        middle=float(np.mean(rates)),
        high=max(rates),
        source=f"by the reuse curves of recorded routing ({names}); the least is uniform routing's",
    )


Uses = Sequence[tuple[bool, int, Sequence[int]]]  # (counted?, layer, experts), in order
MULTIPLES = (1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32)


def pool_hit_rate(uses: Uses, slots: int) -> float:
    """Share of the counted uses whose expert is in one pool for all layers, as the engine has it.

    The least recently used leaves first; those of the running layer stay until it is done, and
    count as hits if they were there when it began.
    """
    pool: collections.OrderedDict[tuple[int, int], None] = collections.OrderedDict()
    needed = hits = 0
    for counted, layer, experts in uses:
        keys = [(layer, expert) for expert in experts]
        if counted:
            needed, hits = needed + len(keys), hits + sum(key in pool for key in keys)
        for key in keys:
            pool.pop(key, None)
            pool[key] = None
        while len(pool) > slots:
            pool.popitem(last=False)
    return hits / needed


def of_trace(trace: Trace) -> Curve:
    """The curve of a trace's decode steps, each pass's experts at once, after its prompts.

    Of a lossy run, the picks that the model's own router would have made count. Drafts do not, and
    a window that verified some counts as a step.

    Raises:
        InputError: the trace has no decode step, or is lossy and lacks the model's own picks.
    """
    if trace.exact is None and trace.replaced:
        raise InputError(
            "the trace is of a lossy run and lacks the picks of the model's own router, which "
            "plans go by: record one under an exact policy such as lru"
        )
    uses, own = [], trace.picks if trace.exact is None else trace.exact
    for number, phase in enumerate(trace.pass_phases()):
        if phase == Phase.DRAFT:
            continue
        picks = own[trace.rows_of(number)]
        for layer in range(trace.layers):
            chosen = np.unique(picks[:, layer])
            uses.append((phase != Phase.PREFILL, layer, chosen[chosen >= 0].tolist()))
    if not any(counted and experts for counted, _, experts in uses):
        raise InputError("the trace has no decode step: record one that generates tokens")
    full = trace.experts / trace.top_k
    multiples = [m for m in MULTIPLES if m < full]
    slots = [round(m * trace.layers * trace.top_k) for m in multiples]
    rates = [pool_hit_rate(uses, s) for s in slots]
    about = f"{trace.rows} tokens, replayed under lru in one pool"
    return Curve(trace.model, about, tuple(map(float, multiples)), tuple(rates))
