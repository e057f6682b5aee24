"""Which policy a plan proposes, and why: by the plan's own arithmetic and by what was recorded."""

import dataclasses
import json
import pathlib
from typing import Any

from moejax.errors import PolicyError
from moejax.planner.layout import Layout
from moejax.planner.machines import Machine
from moejax.planner.predict import Work, miss_us, token
from moejax.policies.policy import policy as named_policy

RECORD = pathlib.Path(__file__).with_name("break_even.json")
OFFLOADED, RESIDENT, IN_PLACE = "score-window:window=32", "lru", "host"
NOISE = 0.05  # of a time, from one recorded run to the next
FETCHES = "exact, misses less than lru on the embedded model; `--verify` compares them here"
KEPT = "all experts are in fast memory: nothing is ever evicted"


@dataclasses.dataclass(frozen=True)
class Proposal:
    """A policy and a reason that a reader can check."""

    policy: str
    reason: str
    hosted: bool = False  # misses are computed on the host where that is sooner
    against: tuple[str, ...] = ()  # why something else is not proposed


def recommended(
    layout: Layout, work: Work, machine: Machine, hit_rate: float, position: float
) -> Proposal:
    """The policy of the least predicted time, and drafts only where they were recorded to pay.

    Args:
        machine: with its link as the plan has it.
        hit_rate: to expect under least recently used.
        position: tokens whose keys and values are read.
    """
    if layout.tier == "resident":
        return Proposal(RESIDENT, KEPT)
    load, host = miss_us(work, machine, layout.tier)
    costs = f"a miss takes {load:.1f} us to move and {host:.1f} us to compute where its weights lie"
    if layout.tier == "disk":
        no_split = "no split of misses: the disk has no copy of an expert to compute from"
        return Proposal(
            OFFLOADED, FETCHES, against=(no_split, "no drafts: none were recorded over a disk")
        )
    if machine.kind == "gpu":
        no_split = f"no split of misses: {costs}, but nothing is computed on the host of a GPU yet"
        return Proposal(
            OFFLOADED, FETCHES, against=(no_split, "no drafts: they do not run on a GPU yet")
        )
    kept = 0.0 if layout.tier == "memory" else hit_rate  # where all is computed in place
    at = (work, machine, layout.tier)
    moved = token(*at, hit_rate, position)
    shared = token(*at, kept, position, hosted=True)
    saved = f"{costs}: {shared.total_ms:.2f} ms per token, {moved.total_ms:.2f} with all moved"
    if shared.total_ms >= moved.total_ms:
        return Proposal(OFFLOADED, FETCHES, against=(f"no split of misses: {saved}",))
    if layout.tier == "memory":
        fast = "no drafts: they were recorded over a slow link only"
        return Proposal(IN_PLACE, f"exact; {saved}; slots stay as they begin", True, (fast,))
    numbers, share = f"load={load / 1e3:.4g},host={host / 1e3:.4g}", layout.slots / layout.total
    said, pays = drafts(share)
    if moved.limit(machine, layout.tier) != f"link ({machine.link})":
        said, pays = "no drafts: they were recorded where the link takes most of the time", False
    if layout.model.config.latent:
        said, pays = (
            "no drafts: with latent attention a pass over several tokens rounds anew",
            False,
        )
    if pays:
        return Proposal(f"auto:{numbers}", f"exact; {saved}; {said}", True)
    known, pays = splits(share)
    if not pays:
        return Proposal(OFFLOADED, FETCHES, against=(f"no split of misses: {known}", said))
    return Proposal(f"auto:gamma=0,{numbers}", f"exact; {saved}; {known}", True, (said,))


def record() -> dict[str, Any]:
    """What was recorded of `auto` with and without drafts (`experiments.plan_break_even`)."""
    return json.loads(RECORD.read_text())


def drafts(share: float) -> tuple[str, bool]:
    """What the record says of drafts with this share of the experts in slots, and whether they pay.

    They do from the least recorded share on from which `auto` was faster with them at every one, by
    more than runs differ.
    """
    known = sorted(record()["rows"], key=lambda row: row["residency"])
    lost = [row["residency"] for row in known if row["auto_ms"] > (1 - NOISE) * row["plain_ms"]]
    paying = [row for row in known if row["residency"] > max(lost, default=0.0)]
    if not paying or share < paying[0]["residency"]:
        row = max((r for r in known if r["residency"] <= share), default=known[0], key=_share)
        pays, word = (
            False,
            f"no drafts, whose gain has to exceed the {NOISE:.0%} that runs differ by",
        )
    else:
        row = max((r for r in paying if r["residency"] <= share), key=_share)
        pays, word = True, "drafts as long as they pay (it measures that)"
    return (
        f"{word}: with {row['residency']:.1%} resident the embedded model took {row['auto_ms']:.2f}"
        f" ms per token with drafts and {row['plain_ms']:.2f} without over such a link "
        "(experiments/results/speculation_frontier.json)"
    ), pays


def splits(share: float) -> tuple[str, bool]:
    """What the record says of `auto` without drafts at the next lower share, and whether it pays.

    Its bookkeeping is not part of the predicted times, so few misses are not worth splitting.
    """
    known = sorted(record()["rows"], key=_share)
    row = max((r for r in known if r["residency"] <= share), default=known[0], key=_share)
    return (
        f"with {row['residency']:.1%} resident the embedded model took {row['plain_ms']:.2f} ms a "
        f"token with a split and {row['lru_ms']:.2f} under lru over such a link "
        "(experiments/results/speculation_frontier.json)"
    ), row["plain_ms"] < row["lru_ms"]


def _share(row: dict[str, Any]) -> float:
    return row["residency"]


def forced(name: str, layout: Layout, machine: Machine) -> Proposal:
    """The policy that was asked for; PolicyError for host compute beside a disk, as in loading."""
    hosted = named_policy(name).placement.uses_host and layout.tier != "resident"
    if hosted and layout.tier == "disk":
        raise PolicyError(
            f"{name} computes misses on the host, which has no copy of experts on the disk: choose "
            "one that fetches them, such as lru or score-window"
        )
    return Proposal(name, "asked for", hosted and machine.kind != "gpu")
