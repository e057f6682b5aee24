"""What `speculation_frontier` runs: the systems by name, at a share of the memory for experts."""

import dataclasses

import jax
import jax.numpy as jnp

import moejax
from experiments import smoe_common as common
from experiments import speculation_common as runs
from experiments.smoe_common import Text, with_policy
from experiments.speculation_common import Generation
from moejax.drafters import completed
from moejax.policies.foresight import Lookahead, NoForesight
from moejax.policies.lengths import FixedLength
from moejax.policies.policy import Policy, policy
from moejax.policies.prediction import NoPrediction

FRONTIER = 0.5  # residency of the frontier of time and loss, beside the claim's own
POOL = 0.75  # of the pool that all residencies are parts of
# `auto` without one of its parts, or with one that it does not have.
ABLATIONS = ("auto without promotion", "auto without live length", "auto with lookahead")
GAMMA = 2  # instead of the live length
NO_PREFETCH = "smoe without prefetch"


def needs_model(made: Policy) -> bool:
    """Whether it drafts with another model."""
    return getattr(made.speculation.draft, "kind", None) == "model"


def capacity(share: float, experts: int, taken: int) -> int:
    """Slots of a residency, less those whose memory a draft model takes."""
    return common.slots_of(share, experts) - taken


def slots_taken(draft: moejax.Runtime, record: int) -> int:
    """Slots that the weights of a draft model would fill."""
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(draft.params))
    return -(-size // record)


def budgeted(made: Policy, slots: int) -> Policy:
    """The policy with so many slots in use."""
    return dataclasses.replace(made, capacity=jnp.int32(slots))


class Bench:
    """The runtime behind the link, and the prompts."""

    def __init__(self, text: Text, new: int):
        plain = moejax.load("tiny")
        self.experts = common.experts_of(plain)
        self.record = plain.store.layout.stride
        self.link = runs.link(self.record)
        self.pool = common.slots_of(POOL, self.experts)
        self.runtime = runs.base_runtime(self.pool, self.link)
        self.taken = slots_taken(self.runtime.draft, self.record)
        self.resident = moejax.load("tiny", slots=self.experts)
        self.groups, self.new = runs.prompts_of(text, 1), new

    def generation(self, made: Policy, share: float) -> Generation | None:
        """A policy at a residency; None if nothing is left of the memory."""
        slots = capacity(share, self.experts, self.taken if needs_model(made) else 0)
        if slots < self.runtime.config.top_k:
            return None
        made = completed(budgeted(made, slots), self.runtime)
        chosen = with_policy(self.runtime, made, self.pool)
        return Generation(chosen, self.groups, self.new)

    def whole(self) -> Generation:
        """Everything resident, in memory."""
        return Generation(self.resident, self.groups, self.new)


def named(name: str) -> Policy:
    """The preset with the costs of the link, where it has such numbers, or a variant of one."""
    if name in ABLATIONS:
        return ablated(name)
    if name == NO_PREFETCH:
        return dataclasses.replace(named("smoe"), predictor=NoPrediction())
    load, host = runs.LOAD_US / 1e3, runs.HOST_US / 1e3
    costs = f"load={load},host={host}"
    extra = {
        "balanced": f":{costs}",
        "hybrimoe": f":{costs},device={load / 30}",
        "smoe": f":{costs},window=32",
        "smoe-fetch": ":window=32",
        "smoe-timelines": f":{costs},device={load / 30},window=32",
        "smoe-released": f":{costs}",
        "auto": f":{costs}",
        "auto:gamma=0": f",{costs}",
        "auto-lossy": f":{costs}",
        "auto-lossy:gamma=3": f",{costs}",
    }
    return policy(name + extra.get(name, ""))


def ablated(name: str) -> Policy:
    """One of the ABLATIONS."""
    made = named("auto")
    if name.endswith("live length"):
        lengths = FixedLength(gamma=jnp.int32(GAMMA))
        speculation = dataclasses.replace(made.speculation, lengths=lengths)
        return dataclasses.replace(made, speculation=speculation)
    ahead = name.endswith("lookahead")
    instead = Lookahead(rate=made.foresight.rate) if ahead else NoForesight()
    return dataclasses.replace(made, foresight=instead)


def in_ms(row: dict[str, float]) -> dict[str, float]:
    milliseconds = {f"{name}_ms": row.pop(name) * 1e3 for name in ("tpot", "tpot_spread", "ttft")}
    return milliseconds | row
