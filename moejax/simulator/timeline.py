"""What a replay's counts take in time: link, host and device side by side, layer by layer.

The link moves one record after another, demands before prefetches, and goes on while the device
computes. A layer runs its residents while its missing records come, and those in groups as they
come, as the engine does; each group costs the device a fixed time beside. On a machine without a
GPU host and device are the same cores.
"""

import dataclasses

import numpy as np

from moejax.errors import InputError
from moejax.planner.machines import Machine
from moejax.supply import TOGETHER


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rates:
    """Microseconds that the parts of a step take."""

    step_us: float  # a step beside its layers
    layer_us: float  # a layer with experts beside them: attention, router, shared expert
    expert_us: float  # one expert in its slot
    load_us: float  # one record over the link, while it moves others before and after
    latency_us: float = 0.0  # until an idle link has begun
    miss_us: float = 0.0  # of the device, for records that come together, beside their experts
    host_us: float = 0.0  # one expert on the host
    one_processor: bool = True  # host and device are the same cores

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if not 0 <= value < np.inf:
                raise InputError(f"{name} is {value}: times must be at least 0 and finite")

    def with_resident(self, step_us: float, layers: int, experts: float) -> "Rates":
        """With the time per layer that makes a step with nothing missing take `step_us`.

        Args:
            experts: that a layer runs in a step, on average.
        """
        left = step_us - self.step_us - layers * experts * self.expert_us
        if left < 0:
            raise InputError(
                f"{step_us / 1e3:g} ms per step is less than its experts take "
                f"({(step_us - left) / 1e3:g} ms): give the time of a step with all resident"
            )
        return dataclasses.replace(self, layer_us=left / layers)


def rates_of(machine: Machine, record_bytes: int, *, disk: bool = False) -> Rates:
    """Rates of a machine for experts of one size; dense weights count as nothing.

    Args:
        disk: records come from the disk instead of the host's memory.
    """
    what, latency = ("disk", machine.disk_latency_us) if disk else ("link", machine.link_latency_us)
    one = machine.kind == "cpu"
    return Rates(
        step_us=machine.step_us,
        layer_us=machine.layer_us,
        expert_us=record_bytes / machine.rate("device") * 1e6,
        load_us=record_bytes / machine.rate(what) * 1e6 + (0.0 if disk else latency),
        latency_us=latency if disk else 0.0,
        miss_us=machine.miss_us,
        host_us=record_bytes / machine.rate("host") * 1e6,
        one_processor=one,
    )


@dataclasses.dataclass(frozen=True)
class Times:
    """Microseconds of passes [..., P], by what they went to; the first three make the whole."""

    device: np.ndarray  # computing, the host too where it is the same processor
    link: np.ndarray  # waited for records
    host: np.ndarray  # waited for the host
    busy: np.ndarray  # of the link, whether anything waited or not

    @property
    def total(self) -> np.ndarray:
        """[..., P] all of it."""
        return self.device + self.link + self.host

    def limit(self, chosen: np.ndarray) -> str:
        """What most of the time of the passes `chosen` [P] went to."""
        names = ("device", "link", "host")
        return max(names, key=lambda name: float(getattr(self, name)[..., chosen].sum()))


def times(counts: dict[str, np.ndarray], rates: Rates) -> Times:
    """Times of passes by their counts [..., P, L] of `replay.COUNTS`."""
    needed = counts["needed"]
    zero = np.zeros_like(needed)
    names = ("hits", "fetched", "host", "prefetched", "prefetch_used")
    hits, fetched, host, ahead, used = (counts.get(name, zero) for name in names)
    shape = needed.shape[:-1]
    found = Times(*(np.zeros(shape) for _ in range(4)))
    free, now = np.zeros(shape[:-1]), np.zeros(shape[:-1])
    for number in range(shape[-1]):
        for layer in range(needed.shape[-1]):
            at = (..., number, layer)
            work = (hits[at], fetched[at], host[at], ahead[at], used[at])
            free, now, spent = _layer(rates, free, now, *work)
            for part, value in zip((found.device, found.link, found.host), spent, strict=True):
                part[..., number] += value
            found.busy[..., number] += (fetched[at] + ahead[at]) * rates.load_us
        found.device[..., number] += rates.step_us
        now = now + rates.step_us
    return found


def _layer(
    rates: Rates,
    free: np.ndarray,
    now: np.ndarray,
    hits: np.ndarray,
    fetched: np.ndarray,
    host: np.ndarray,
    ahead: np.ndarray,
    used: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """When the link is free and the layer done; what it spent on device, link and host."""
    asked = now + rates.layer_us
    used = np.minimum(used, hits)
    # Of what was prefetched and is still to come, only what is used here is waited for; what is
    # not is dropped, but for the record that is on its way.
    behind = np.clip(free - asked, 0.0, np.maximum(used, 1) * rates.load_us)
    idle = (behind == 0) * rates.latency_us
    begin = asked + behind + idle
    work = rates.layer_us + (hits - used) * rates.expert_us
    if rates.one_processor:
        work = work + host * rates.host_us
    done = now + work
    waits = np.where(used > 0, np.maximum(asked + behind - done, 0.0), 0.0)
    own = (used > 0) * rates.miss_us + used * rates.expert_us
    done, work = done + waits + own, work + own
    for first in range(0, int(fetched.max(initial=0)), TOGETHER):
        size = np.clip(fetched - first, 0, TOGETHER)
        there = begin + np.minimum(first + TOGETHER, fetched) * rates.load_us
        wait = np.where(size > 0, np.maximum(there - done, 0.0), 0.0)
        own = (size > 0) * rates.miss_us + size * rates.expert_us
        waits, work, done = waits + wait, work + own, done + wait + own
    on_host = 0.0 if rates.one_processor else asked + host * rates.host_us
    late = np.maximum(on_host - done, 0.0) * (host > 0)
    moved = fetched + ahead
    free = np.where(moved > 0, begin + moved * rates.load_us, np.minimum(free, asked + behind))
    return free, done + late, (work, waits, late)


def bounds(
    counts: dict[str, np.ndarray], unavoidable: np.ndarray, rates: Rates
) -> dict[str, np.ndarray]:
    """Times [..., P] of the same uses with less in their way, in microseconds.

    `resident`: all experts in slots. `infinite_cache`: each expert is fetched once, at its first
    use, and nothing ahead: prefetches may get below it. `link`: the link does nothing but what was
    moved. `oracle_prefetch`: that, and the device beside it, with nothing ever waited for; the
    policy could get below it by moving less, or by giving the host more.

    Args:
        counts: of a replay.
        unavoidable: [P, L] experts used for the first time, of the routing that was replayed.
    """
    needed = counts["needed"]
    whole = times({"needed": needed, "hits": needed}, rates)
    # A router that chooses by what is resident may need less than the recorded picks.
    first = np.minimum(unavoidable, needed)
    cold = times({"needed": needed, "hits": needed - first, "fetched": first}, rates)
    moved = counts["fetched"] + counts.get("prefetched", 0)
    link = moved.sum(axis=-1) * rates.load_us
    return {
        "resident": whole.total,
        "infinite_cache": cold.total,
        "link": link,
        "oracle_prefetch": np.maximum(whole.total, link),
    }
