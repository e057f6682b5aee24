"""Which policy a plan proposes, and why: by the plan's own arithmetic and by what was recorded."""

import dataclasses
import json
import pathlib
from typing import Any

from moejax import tiers
from moejax.errors import PolicyError
from moejax.planner.layout import Layout
from moejax.planner.machines import Machine
from moejax.planner.predict import Work, miss_us, token
from moejax.policies.policy import policy as named_policy

RECORD = pathlib.Path(__file__).with_name("break_even.json")
OFFLOADED, RESIDENT, IN_PLACE = "decayed-lfu", "lru", "host"
NOISE = 0.05  # of a time, from one recorded run to the next
SOURCE = "experiments/results/speculation_frontier.json"
FETCHES = (
    "exact; missed less than lru on a trace of Qwen3-30B-A3B from 6% of the experts in slots on, "
    "and on the embedded model from 25% on; `--verify`, on that machine, compares them"
)
KEPT = "all experts are in fast memory: nothing is ever evicted"


@dataclasses.dataclass(frozen=True)
class Proposal:
    """A policy and a reason that a reader can check."""

    policy: str
    reason: str
    hosted: bool = False  # misses are computed on the host where that is sooner
    against: tuple[str, ...] = ()  # why something else is not proposed


def recommended(
    layout: Layout,
    work: Work,
    machine: Machine,
    hit_rate: float,
    position: float,
    refused: dict[str, str] | None = None,
) -> Proposal:
    """The policy of the least predicted time, and drafts only where they were recorded to pay.

    Args:
        machine: with its link as the plan has it.
        hit_rate: to expect under least recently used.
        position: tokens whose keys and values are read.
        refused: why policies that it would be are not to be had.
    """
    refused = refused or {}
    if layout.tier == "resident":
        return Proposal(OFFLOADED if RESIDENT in refused else RESIDENT, KEPT)
    load, host = miss_us(work, machine, layout.tier)
    costs = f"a miss takes {_said(load)} to move and {_said(host)} to compute where its weights lie"
    if layout.tier == "disk":
        no_split = "no split of misses: the disk has no copy of an expert to compute from"
        return Proposal(
            OFFLOADED, FETCHES, against=(no_split, "no drafts: none were recorded over a disk")
        )
    if machine.kind == "gpu":
        no_split = (
            f"no split of misses: {costs}, but computing beside a GPU is not confirmed on one yet"
        )
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
        if IN_PLACE in refused:
            return Proposal(OFFLOADED, FETCHES, against=(f"no {IN_PLACE}: {refused[IN_PLACE]}",))
        fast = "no drafts: they were recorded over a slow link only"
        return Proposal(IN_PLACE, f"exact; {saved}; slots stay empty", True, (fast,))
    if unlike := outside(load, host):
        no_split = f"no split of misses: {saved}, but {unlike}"
        return Proposal(OFFLOADED, FETCHES, against=(no_split, "no drafts: likewise"))
    missed = work.top_k * (1 - hit_rate)
    if moved.limit(machine, layout.tier) != f"link ({machine.link})":
        no_drafts = "no drafts: they were recorded where the link takes most of the time"
        return _split(load, host, missed, saved, no_drafts, refused)
    if layout.model.config.latent:
        no_drafts = "no drafts: with latent attention a pass over several tokens rounds anew"
        return _split(load, host, missed, saved, no_drafts, refused)
    said, pays = drafts(layout.slots / layout.total)
    drafting = f"auto:{_numbers(load, host)}"
    if pays and drafting in refused:
        said, pays = f"no drafts: {refused[drafting]}", False
    if not pays:
        return _split(load, host, missed, saved, said, refused)
    return Proposal(drafting, f"exact; {saved}; {said}", True)


def _split(
    load: float, host: float, missed: float, saved: str, no_drafts: str, refused: dict[str, str]
) -> Proposal:
    """A split of misses between link and host without drafts, where it was recorded to pay."""
    splitting = f"auto:gamma=0,{_numbers(load, host)}"
    known, pays = splits(missed * load)
    if pays and splitting in refused:
        known, pays = refused[splitting], False
    if not pays:
        return Proposal(OFFLOADED, FETCHES, against=(f"no split of misses: {known}", no_drafts))
    return Proposal(splitting, f"exact; {saved}; {known}", True, (no_drafts,))


def _numbers(load: float, host: float) -> str:
    return f"load={load / 1e3:.4g},host={host / 1e3:.4g}"


def _said(us: float) -> str:
    return f"{us:.1f} us" if us < 1000 else f"{us / 1e3:.1f} ms"


def record() -> dict[str, Any]:
    """What was recorded of `auto` with and without drafts (`experiments.plan_break_even`)."""
    return json.loads(RECORD.read_text())


def recorded_us() -> tuple[float, float]:
    """Microseconds of a miss in the record: moved over its link, and computed on its host."""
    known = record()
    link = tiers.parse_link(known["link"])
    return known["record_bytes"] / link.gigabytes_per_second / 1e3 + link.latency_us, link.host_us


def outside(load: float, host: float) -> str:
    """Why the record says nothing about misses that take so long; empty where it does.

    From slower loads and a host that is faster beside them a split gains more than was recorded.

    Args:
        load: microseconds of a miss that is moved.
        host: of one that is computed on the host.
    """
    loads, hosts = recorded_us()
    there = f"`auto` was recorded where that took {_said(loads)} and {_said(hosts)} ({SOURCE})"
    if load < (1 - NOISE) * loads:
        return f"{there}: loads so short may save less than its bookkeeping, which is not predicted"
    if host / load > (1 + NOISE) * hosts / loads:
        return f"{there}: a host so slow beside its link may save less than `auto`'s bookkeeping"
    return ""


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
        f" ms per token with drafts and {row['plain_ms']:.2f} without, over a link ({SOURCE})"
    ), pays


def splits(waited: float) -> tuple[str, bool]:
    """What the record says of `auto` without drafts at the next shorter loads, and if it pays.

    Its bookkeeping, in every layer, is not part of the predicted times, so short loads are not
    worth splitting; shorter ones than any in the record are not split.

    Args:
        waited: microseconds of a layer's loads per token, under least recently used.
    """
    found = record()
    known, each = sorted(found["rows"], key=_missed), recorded_us()[0] / found["layers"]
    shorter = [row for row in known if _missed(row) * each <= waited]
    row = shorter[-1] if shorter else known[0]
    return (
        f"with loads of {_said(_missed(row) * each)} in a layer ({_said(waited)} are expected "
        f"here) the embedded model took {row['plain_ms']:.2f} ms per token with a split "
        f"and {row['lru_ms']:.2f} under lru, over a link ({SOURCE})"
    ), bool(shorter) and row["plain_ms"] < (1 - NOISE) * row["lru_ms"]


def _missed(row: dict[str, Any]) -> float:
    return row["lru_missed"]


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
