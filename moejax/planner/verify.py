"""A plan put to the test on this machine: its policy against plain LRU in the same budget."""

import dataclasses
import statistics
from typing import Any

import numpy as np

from moejax import bench, loading
from moejax.errors import InputError
from moejax.planner.plan import RESIDENT, Plan
from moejax.policies.policy import policy
from moejax.runtime import Runtime

TOKENS, ROUNDS = 32, 3


@dataclasses.dataclass(frozen=True)
class Verified:
    """Measured milliseconds per token of each policy, and which one to take."""

    tpot_ms: dict[str, float]  # medians
    samples_ms: dict[str, list[float]]
    slots: int
    policy: str
    fell_back: bool
    said: str


def verify(plan: Plan, *, progress: Any = None, **options: Any) -> tuple[Plan, Verified]:
    """Run a plan's policy and `lru` in turn, and return the plan with the one that is faster.

    Args:
        options: of `moejax.load`, beside those that the plan has.

    Raises:
        InputError: the plan and loading disagree about the slots.
    """
    runtime = loading.load(
        plan.model,
        policy=plan.policy,
        context=plan.context,
        quant=plan.quant,
        progress=progress,
        **options,
    )
    if runtime.slots != plan.slots:
        raise InputError(
            f"{plan.slots} slots are planned, but this machine has room for {runtime.slots}: plan "
            "for this machine (leave --hardware out), or give the budget"
        )
    names = list(dict.fromkeys((plan.policy, RESIDENT)))
    runtimes = {name: dataclasses.replace(runtime, policy=policy(name)) for name in names}
    samples = measured(runtimes)
    chosen, verified = judged(plan.policy, samples, runtime.slots)
    if not verified.fell_back:
        return plan, verified
    command = plan.command.replace(f"--policy {plan.policy}", f"--policy {chosen}")
    reason = f"{chosen} was faster than {plan.policy} when both ran here"
    return dataclasses.replace(plan, policy=chosen, command=command, reason=reason), verified


def measured(runtimes: dict[str, Runtime]) -> dict[str, list[float]]:
    """Milliseconds per token of each, run in turn after a warm-up, all from the same prompts."""
    samples: dict[str, list[float]] = {name: [] for name in runtimes}
    context = min(runtime.context for runtime in runtimes.values())
    new = min(TOKENS, context // 2)
    test = bench.Test("verify", max(context - new, 1) if context < 2 * TOKENS else TOKENS, new)
    for turn in range(-1, ROUNDS):
        for name, runtime in runtimes.items():
            vocabulary = runtime.config.vocab_size
            ids = bench.random_ids(vocabulary, 1, test.prompt, seed=0, repetition=turn + 1)
            sample = bench.run_once(runtime, test, ids)
            if turn >= 0:
                samples[name].append(sample.seconds / max(sample.stats.steps, 1) * 1e3)
    return {name: list(map(float, np.asarray(times))) for name, times in samples.items()}


def judged(planned: str, samples: dict[str, list[float]], slots: int) -> tuple[str, Verified]:
    """The policy to take, and what was found: the planned one unless `lru` is faster."""
    medians = {name: statistics.median(times) for name, times in samples.items()}
    fell_back = medians[RESIDENT] < medians[planned]
    chosen = RESIDENT if fell_back else planned
    if planned == RESIDENT:
        said = f"{planned} took {medians[planned]:.2f} ms per token"
    else:
        verdict = "so the plan falls back to lru" if fell_back else "so it stays"
        said = (
            f"{planned} took {medians[planned]:.2f} ms per token and lru {medians[RESIDENT]:.2f}, "
            f"{verdict}"
        )
    return chosen, Verified(medians, samples, slots, chosen, fell_back, said)
