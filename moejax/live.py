"""What a run learns between steps: the costs that a placement weighs, and how far it may drift."""

import dataclasses
import functools
import math
from typing import Any

import jax.numpy as jnp

from moejax.errors import InputError, PolicyError
from moejax.kernels.transport import Store, StoreStats
from moejax.policies.placement import LiveCosts
from moejax.policies.policy import Policy, with_alpha
from moejax.state import array_fields

LEARNED = 8  # steps from one renewal of costs to the next
SLOWEST, FASTEST = 0.5, 1.1  # factors of alpha from one probe to the next
LEAST_ALPHA = 0.01  # from which alpha can still grow
# Fields of a placement that learns its costs, or of the `price.Costs` that it has, by their names.
PLAIN = {"load_us": "load", "host_us": "host"}
PRICED = {
    "load_us": "load",
    "host_fixed_us": "host0",
    "host_token_us": "host1",
    "device_us": "device",
}


class Costs:
    """Measures what a record costs over a link and an expert on the host beside it.

    Only where that cannot change results: under a lossy router, what is resident decides what is
    computed, so that the costs stay those of the policy.
    """

    def __init__(self, policy: Policy | None, link: Store | None):
        placement = policy and policy.placement
        self._link = link
        self.active = bool(link and policy.exact and _learns(placement))
        if self.active:
            load, host = float(placement.load), float(placement.host)
            self._costs, self._ratio = LiveCosts(), host / load if load else math.inf
            self._before, self._measured = link.stats(), set()
            self._seconds, self._steps, self._learned = 0.0, 0, 0

    def learn(self, policy: Policy, seconds: float | None = None) -> Policy:
        """The policy with the average costs of the latest steps, the last of which took `seconds`.

        It takes 0.1 ms, and is left out but for the first steps and every `LEARNED` of the later
        ones, unless the time is not given.
        """
        if seconds is not None:
            self._seconds += seconds
            self._steps += 1
            if self._steps < min(self._learned, LEARNED):
                return policy
        each, now = self._seconds / max(self._steps, 1), self._link.stats()
        self._learned += self._steps
        self._seconds, self._steps = 0.0, 0
        found = {"load": _each(self._before, now, "busy_us", "landed")}
        found["host"] = _each(self._before, now, "host_us", "host_experts")
        self._before = now
        self._costs.add(found["load"], found["host"])
        self._measured |= {name for name, cost in found.items() if cost is not None}
        if "load" not in self._measured:
            return policy
        # until an expert ran on the host, its cost is what the policy's ratio makes of the link's
        host = self._ratio * self._costs.load if self.host_us is None else self.host_us
        parts = {"placement": policy.placement.with_costs(self._costs.load, host)}
        if each and hasattr(policy.foresight, "with_rate"):
            rate = each * 1e6 / max(self._costs.load, 1.0)
            parts["foresight"] = policy.foresight.with_rate(rate)
        return dataclasses.replace(policy, **parts)

    @property
    def load_us(self) -> float | None:
        """Microseconds of one record over the link; None until one has come."""
        return self._costs.load if "load" in self._measured else None

    @property
    def host_us(self) -> float | None:
        """Microseconds of one expert on the host; None until one has run there."""
        return self._costs.host if "host" in self._measured else None


def learned(policy: Policy) -> dict[str, float]:
    """By name, the numbers of a policy that `Costs` renews; {} where one is not finite.

    Costs are in the policy's own unit, microseconds from the first renewal on. With `host_us`, the
    cost of one token, also where a placement has that in two parts.
    """
    found = {name: float(_at(policy, path)) for name, path in _renewed(policy).items()}
    if "host_fixed_us" in found:
        found["host_us"] = found["host_fixed_us"] + found["host_token_us"]
    return found if all(map(math.isfinite, found.values())) else {}


def with_learned(policy: Policy, numbers: dict[str, Any]) -> Policy:
    """The policy with those of the `numbers` that it has, as `learned` names them; may be traced.

    Numbers are floats or [] f32.
    """
    for name, path in _renewed(policy).items():
        if name in numbers:
            policy = _with(policy, path, numbers[name])
    return policy


def names_of(policy: Policy) -> set[str] | None:
    """What `with_learned` takes over; None where a part learns what has no name here."""
    if not _learns(policy.placement):
        return set()
    renewed = _renewed(policy)
    parts = {"placement"} | ({"foresight"} if hasattr(policy.foresight, "with_rate") else set())
    return set(renewed) if parts == {path[0] for path in renewed.values()} else None


def _learns(placement: Any) -> bool:
    return placement.uses_host and hasattr(placement, "with_costs")


def _renewed(policy: Policy) -> dict[str, tuple[str, ...]]:
    """Where a policy holds the numbers that `Costs` renews, by name."""
    placement, found = policy.placement, {}
    if not _learns(placement):
        return found
    for whole, names in ((placement, PLAIN), (getattr(placement, "costs", None), PRICED)):
        if set(names.values()) <= _fields(whole):
            within = ("placement",) if whole is placement else ("placement", "costs")
            found |= {name: (*within, own) for name, own in names.items()}
    if hasattr(policy.foresight, "with_rate") and "rate" in _fields(policy.foresight):
        found["rate"] = ("foresight", "rate")
    return found


def _fields(part: Any) -> set[str]:
    return set(array_fields(type(part))) if dataclasses.is_dataclass(part) else set()


def _at(part: Any, path: tuple[str, ...]) -> Any:
    return functools.reduce(getattr, path, part)


def _with(part: Any, path: tuple[str, ...], value: Any) -> Any:
    name, *rest = path
    own = _with(getattr(part, name), tuple(rest), value) if rest else value
    return dataclasses.replace(part, **{name: own})


def _each(before: StoreStats, now: StoreStats, time: str, count: str) -> float | None:
    events = getattr(now, count) - getattr(before, count)
    return (getattr(now, time) - getattr(before, time)) / events if events else None


@dataclasses.dataclass(frozen=True)
class DriftBudget:
    """How far a lossy run may drift from the model's own routing, and how often that is looked at.

    Every `every` decode steps, the first among them, the step is also made with alpha 0; the
    divergence of the lossy step from that one, on the same KV cache, steers alpha.
    """

    nats: float  # mean KL divergence per token
    every: int = 16

    def __post_init__(self) -> None:
        if not 0 < self.nats < math.inf or self.every < 1:
            raise InputError(
                "a drift budget is a positive number of nats, looked at every n >= 1 steps; not "
                f"{self.nats:g} nats every {self.every} steps"
            )


@dataclasses.dataclass
class DriftStats:
    """What watching the drift found and cost; its time and records are part of the run's own."""

    probes: int = 0
    seconds: float = 0.0
    fetched: int = 0  # records moved by them
    nats: float = 0.0  # mean over the probes
    alpha: float = 0.0  # at the end
    alphas: list[float] = dataclasses.field(default_factory=list)  # after each probe


class Drift:
    """Keeps alpha where the divergence meets its budget; the same seed gives the same alphas."""

    def __init__(self, budget: DriftBudget, policy: Policy):
        """Raises PolicyError for a router without an alpha, or with one that is lossy at 0."""
        if getattr(policy.router, "variant", None) == "share":
            raise PolicyError(
                "a drift budget cannot steer variant 'share', where 0 is the most loss"
            )
        if not hasattr(policy.router, "alpha"):
            raise PolicyError(
                "a drift budget steers the alpha of a lossy policy, which this policy has not: "
                "choose one such as smoe-fetch"
            )
        self.budget = budget
        self.stats = DriftStats(alpha=float(policy.router.alpha))
        self._average: float | None = None
        self._steps = 0

    def due(self) -> bool:
        """Whether this decode step is one to probe; asked once per step."""
        self._steps += 1
        return self._steps % self.budget.every == 1 or self.budget.every == 1

    def learn(self, policy: Policy, nats: Any) -> Policy:
        """The policy with alpha moved towards the budget, given the drift of each sequence."""
        found = float(jnp.mean(jnp.asarray(nats)))
        self._average = found if self._average is None else 0.5 * (self._average + found)
        ratio = self.budget.nats / max(self._average, 1e-9)
        alpha = max(self.stats.alpha, LEAST_ALPHA) * min(max(ratio**0.5, SLOWEST), FASTEST)
        self.stats.alpha = min(alpha, 1.0)
        self.stats.alphas.append(self.stats.alpha)
        self.stats.nats += (found - self.stats.nats) / (self.stats.probes + 1)
        self.stats.probes += 1
        return with_alpha(policy, self.stats.alpha)
