"""What policies would have done on a recorded trace: hit rates, bytes, and bounds on them."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from moejax.config import RouterRule
from moejax.errors import BudgetError, InputError, PolicyError
from moejax.policies.policy import Policy, policy, policy_names
from moejax.simulator import accesses, labels, needs, replay
from moejax.simulator.tape import replayed, tapes_of
from moejax.traces.trace import Phase, Trace

SEMANTICS = ("access", "engine")
WARM = ("prefill", "none")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asked:
    """How to replay."""

    semantics: str = "access"
    per_layer: bool = False  # slots are divided evenly among the layers
    warm: str = "prefill"
    prefetch: str = "own"  # see `needs.PREFETCHES`
    # Tokens of a prompt run one by one; by default where a trace does not say what ran together.
    alone: bool | None = None
    check: bool = False  # look for broken tables after every layer

    def __post_init__(self) -> None:
        known = {"semantics": SEMANTICS, "warm": WARM, "prefetch": needs.PREFETCHES}
        for name, values in known.items():
            if getattr(self, name) not in values:
                raise InputError(
                    f"{name} {getattr(self, name)!r:.40} is unknown; known: {', '.join(values)}"
                )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Simulated:
    """What one policy did under one budget; P passes, L layers. Counts are experts."""

    policy: str
    slots: int
    semantics: str
    label: str  # "exact", "bound", "closed-loop" or "open-loop", and what it holds for
    counts: dict[str, np.ndarray]  # [P, L]
    decode: np.ndarray  # [P] bool, what the rates are over
    steps: int  # decode passes
    tokens: int  # made in them, drafts that were rejected not counted
    sequences: float  # that a decode pass runs, on average
    record_bytes: int | None
    lossy: bool = False  # its router made picks of its own
    resident: np.ndarray | None = None  # [P, L, E] when each layer began, if kept

    def total(self, name: str) -> float:
        """A count over the decode passes; 0 of one that these semantics do not have."""
        found = self.counts.get(name)
        return 0 if found is None else found[self.decode].sum().item()

    @property
    def hit_rate(self) -> float:
        """Share of decode's uses that found their expert resident."""
        return self.total("hits") / self.total("needed")

    @property
    def moved_per_token(self) -> float:
        """Records moved per token that a decode pass made."""
        return (self.total("fetched") + self.total("prefetched")) / self.tokens

    @property
    def bytes_per_token(self) -> float | None:
        """The same in bytes; None without a size of a record."""
        return None if self.record_bytes is None else self.moved_per_token * self.record_bytes

    def tpot(self, seconds: np.ndarray) -> float:
        """Time per token of one sequence, from times [P] of all passes."""
        return float(seconds[self.decode].sum()) * self.sequences / self.tokens

    def as_dict(self) -> dict[str, Any]:
        """Figures over the decode passes, for JSON."""
        names = ("policy", "slots", "semantics", "label", "hit_rate", "bytes_per_token")
        found = {name: getattr(self, name) for name in names}
        found["moved_per_token"] = self.moved_per_token
        return found | {name: self.total(name) for name in self.counts}


def simulate(
    trace: Trace,
    policies: Sequence[str | Policy],
    slots: Sequence[int],
    asked: Asked | None = None,
    *,
    keep: bool = False,
    start: np.ndarray | None = None,
) -> list[Simulated]:
    """Every policy under every budget, policies in turn.

    Args:
        policies: presets by name, with numbers or without, "belady", "optimal", or policies.
        slots: budgets over all layers; with slots per layer, multiples of the layers.
        keep: what was resident when each layer began, with engine semantics.
        start: [S] i32 owners of the slots when it begins, -1 = empty; default all.

    Raises:
        InputError: the trace has no decode passes, or options are wrong.
        BudgetError: slots that cannot hold what one layer needs at once.
        PolicyError: unknown policies, or such that the trace cannot replay.
    """
    asked = asked or Asked()
    trace = prepared(trace, asked)
    named = [(_name(p), p if isinstance(p, Policy) else _known(p)) for p in policies]
    check_slots(trace, slots, asked)
    if start is not None:
        needs.check_start(start, trace, min(max(slots), trace.layers * trace.experts))
    for name, made in named:
        if made is not None:
            needs.check_parts(made, name, trace.layers, trace.experts, trace.top_k)
    kept = trace.of_passes(replayed(trace))
    if trace.exact is not None:  # caches run what the model's own router chose
        kept = dataclasses.replace(kept, picks=kept.exact)
    found = []
    for name, made in named:
        if made is None:
            found += [_foreseen(kept, name, number, asked) for number in slots]
        elif asked.semantics == "access":
            found += _accessed(kept, name, made, slots, asked)
        else:
            found += _replayed(trace, name, made, slots, asked, keep, start)
    return found


def prepared(trace: Trace, asked: Asked) -> Trace:
    """The passes that are replayed."""
    if not np.isin(trace.pass_phases(), (Phase.DECODE, Phase.VERIFY)).any():
        raise InputError("the trace has no decode passes to count: record some generated tokens")
    counted = np.isin(trace.phase, (Phase.DECODE, Phase.VERIFY))
    for name in ("picks", "exact"):
        column = getattr(trace, name)
        if column is not None and not (column[counted] >= 0).any():
            raise InputError(f"the decode passes of the trace have no {name} to count")
    if not trace.accepted[counted].any():
        raise InputError("the decode passes of the trace made no token: all drafts were rejected")
    if asked.warm == "none":
        trace = trace.of_phase(*(phase for phase in Phase if phase != Phase.PREFILL))
    alone = asked.alone
    if alone is None:
        alone = trace.about.get("source") != "moejax"
    if alone and (trace.pass_phases() == Phase.PREFILL).any():
        trace = _prompts_alone(trace)
    return trace


def _prompts_alone(trace: Trace) -> Trace:
    """The trace with every token of a prompt in a pass of its own."""
    new = (trace.phase == Phase.PREFILL) | np.append(True, np.diff(trace.run) != 0)
    run = (np.cumsum(new) - 1).astype(np.int32)
    dropped = {"resident": None, "began": None, "seconds": None, "counts": {}, "reads": {}}
    return dataclasses.replace(trace, run=run, **dropped)


def check_slots(trace: Trace, slots: Sequence[int], asked: Asked) -> None:
    """Raise BudgetError for budgets that no run could have."""
    each = trace.top_k if asked.semantics == "engine" else 1
    least = each * (trace.layers if asked.per_layer else 1)
    if not len(slots):
        raise InputError("no budget to replay under: give at least one number of slots")
    for number in slots:
        if not isinstance(number, int | np.integer) or isinstance(number, bool):
            raise InputError(f"{number!r:.40} is no number of slots")
        if number < least:
            raise BudgetError(
                f"{number} slots cannot hold the {least} experts needed at once"
                f"{' when every layer has slots of its own' * asked.per_layer}; give at least "
                f"{least}"
            )
        if asked.per_layer and number % trace.layers:
            raise BudgetError(f"{number} slots cannot be divided evenly among {trace.layers}")


def _name(given: str | Policy) -> str:
    if not isinstance(given, str | Policy):
        raise PolicyError(f"{given!r:.40} is no policy: give a name or a `Policy`")
    return given if isinstance(given, str) else type(given.evictor).__name__


def _known(name: str) -> Policy | None:
    """The policy of a name; None for those that know the future."""
    if name in labels.FUTURE:
        return None
    try:
        return policy(name)
    except PolicyError as error:
        if "unknown policy" in str(error):
            known = ", ".join([*labels.FUTURE, *policy_names()])
            raise PolicyError(f"unknown policy {name!r}; known: {known}") from None
        raise


def _result(trace: Trace, name: str, slots: int, asked: Asked, **given: Any) -> Simulated:
    decode = trace.pass_phases() != Phase.PREFILL
    rows = decode[trace.run]
    pairs = np.stack([trace.run[rows], trace.sequence[rows]])
    steps = int(decode.sum())
    return Simulated(
        policy=name,
        slots=slots,
        semantics=asked.semantics,
        decode=decode,
        steps=steps,
        tokens=int((rows & trace.accepted).sum()),
        sequences=np.unique(pairs, axis=1).shape[1] / steps,
        record_bytes=trace.about.get("record_bytes"),
        **given,
    )


def _capacity(trace: Trace, slots: int, asked: Asked) -> int:
    return slots // trace.layers if asked.per_layer else slots


def _foreseen(trace: Trace, name: str, slots: int, asked: Asked) -> Simulated:
    engine, capacity = asked.semantics == "engine", _capacity(trace, slots, asked)
    uses = accesses.distinct(trace) if engine else trace.picks
    shielded = name != "optimal"
    hits = accesses.belady(uses, trace.experts, capacity, asked.per_layer, shielded=shielded)
    counts = _counted((uses >= 0).sum(axis=2), hits.sum(axis=2))
    counts = counts if engine else access_counts(trace, hits.sum(axis=2))
    label = labels.foreseen(trace, name)
    return _result(trace, name, slots, asked, label=label, counts=counts)


def _counted(needed: np.ndarray, hits: np.ndarray) -> dict[str, np.ndarray]:
    return {"needed": needed, "hits": hits, "fetched": needed - hits}


def access_counts(trace: Trace, hits: np.ndarray) -> dict[str, np.ndarray]:
    """[P, L] accesses, hits and misses of each pass, from the hits [N, L] of each token."""
    starts = trace.offsets()[:-1]
    used = (trace.picks >= 0).sum(axis=2)
    return _counted(*(np.add.reduceat(each, starts) for each in (used, hits)))


def own_picks(trace: Trace) -> Trace:
    """The trace with the picks of the model's own router, which exact policies replay."""
    if trace.exact is None:
        return trace
    return dataclasses.replace(trace, picks=trace.exact, exact=None)


def per_step(trace: Trace) -> tuple[float, float]:
    """Distinct experts of a layer, and tokens of a sequence, in a prepared trace's decode step."""
    kept = own_picks(trace.of_passes(replayed(trace)))
    step = kept.pass_phases() != Phase.PREFILL
    number = accesses.needed(kept)[step].mean()
    rows = step[kept.run]
    pairs = np.unique(np.stack([kept.run[rows], kept.sequence[rows]]), axis=1)
    return float(number), float((rows & kept.accepted).sum() / pairs.shape[1])


def unavoidable(trace: Trace, *, lossy: bool = False) -> np.ndarray:
    """[P, L] experts that a prepared trace uses for the first time.

    Args:
        lossy: of the picks that were made; else of the model's own router's, if they are others.
    """
    kept = trace.of_passes(replayed(trace))
    return accesses.first_uses(kept if lossy else own_picks(kept))


def _accessed(
    trace: Trace, name: str, made: Policy, slots: Sequence[int], asked: Asked
) -> list[Simulated]:
    layers = 1 if not asked.per_layer else trace.layers
    plain = made.exact and not made.placement.uses_host and not made.looks_ahead
    if not plain or made.speculation.max_length:
        raise PolicyError(
            f"policy {name!r} does more than evict, which one access after another cannot show: "
            "use --semantics engine"
        )
    if name == "lru":
        capacities = [_capacity(trace, number, asked) for number in slots]
        found = accesses.lru(trace, capacities, asked.per_layer)
    else:
        single = accesses.Singles(trace, asked.per_layer)
        size = single.experts
        if needs.reads_scores(made, layers, size):
            raise PolicyError(f"policy {name!r} reads router scores: use --semantics engine")
        room = [min(number, trace.layers * trace.experts) for number in slots]
        own = [dataclasses.replace(made, capacity=jnp.int32(number)) for number in room]
        setting = replay.Setting(experts=size, check=asked.check)
        how = {"per_layer": asked.per_layer, "only": ("hits", *["broken"] * asked.check)}
        counts = replay.run(single, own, max(room), setting, **how)
        _check_tables(counts, name)
        found = [single.by_token(hits) for hits in counts["hits"]]
    label = labels.accessed(trace)
    return [
        _result(trace, name, number, asked, label=label, counts=access_counts(trace, hits))
        for number, hits in zip(slots, found, strict=True)
    ]


def _replayed(
    trace: Trace,
    name: str,
    made: Policy,
    slots: Sequence[int],
    asked: Asked,
    keep: bool,
    start: np.ndarray | None,
) -> list[Simulated]:
    made = needs.with_prefetch(made, asked.prefetch)
    lossy = trace.replaced
    how = {"per_layer": asked.per_layer, "oracle": asked.prefetch == "oracle"}
    if made.exact:
        trace = own_picks(trace)
    wide = made.looks_ahead or needs.reads_scores(made, trace.layers, trace.experts)
    told = {"scores": bool(wide), "learned": needs.recorded(trace, made)}
    tapes, phases = tapes_of(trace, **told), trace.pass_phases()
    needs.check(
        made,
        name,
        trace.layers,
        trace.experts,
        scores=tapes.scores,
        windows=bool((phases == Phase.VERIFY).any()),
        prefetch=asked.prefetch,
    )
    rule = RouterRule(**trace.about.get("router", {"normalize": True}))
    setting = replay.Setting(experts=trace.experts, rule=rule, keep=keep, check=asked.check)
    # No more slots than experts, whatever was asked for: tables take memory.
    room = [min(number, trace.layers * trace.experts) for number in slots]
    own = [dataclasses.replace(made, capacity=jnp.int32(number)) for number in room]
    whole = {"per_layer": asked.per_layer, "start": start}
    counts = replay.run(tapes, own, max(room), setting, **whole)
    _check_tables(counts, name)
    kept = trace.of_passes(replayed(trace))
    found = []
    for i, number in enumerate(slots):
        mine = {key: values[i] for key, values in counts.items()}
        label = labels.LOSSY_RUN
        if not (lossy and made.exact):
            label = labels.replayed(kept, own[i], mine, **how)
        if label is None:  # its own run, but for rounding: the recorded picks set it right
            again = dataclasses.replace(setting, recorded=True)
            other = replay.run(tapes, own[i : i + 1], max(room), again, **whole)
            mine, label = {key: values[0] for key, values in other.items()}, "closed-loop, recorded"
        resident = mine.pop("resident", None)
        given = {"label": label, "counts": mine, "resident": resident, "lossy": not made.exact}
        found.append(_result(kept, name, number, asked, **given))
    return found


def _check_tables(counts: dict[str, np.ndarray], name: str) -> None:
    if "broken" not in counts or not counts["broken"].any():
        return
    _, number, layer = np.argwhere(counts["broken"])[0]
    raise PolicyError(
        f"policy {name!r} broke the tables in pass {number}, layer {layer}: an expert that is "
        "needed was evicted, or a slot has two owners"
    )
