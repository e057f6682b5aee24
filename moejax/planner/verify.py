"""A plan put to the test on this machine: its policy against plain LRU in the same budget."""

import dataclasses
import statistics
from typing import Any

import numpy as np

from moejax import bench, loading
from moejax.errors import InputError, TokenizerError
from moejax.planner.plan import RESIDENT, Plan
from moejax.policies.policy import policy
from moejax.runtime import Runtime

TOKENS, ROUNDS = 64, 3
TEXTS = (
    "The old house stood at the end of the village, and nobody had lived there for years.",
    "import os\nimport sys\n\n\ndef read_lines(path):\n    with open(path) as file:\n",
    "Question: Anna has 12 apples and gives 5 to her brother. How many are left?\nAnswer:",
)


@dataclasses.dataclass(frozen=True)
class Verified:
    """Measured milliseconds per token of each policy, and which one to take."""

    tpot_ms: dict[str, float]  # medians
    samples_ms: dict[str, list[float]]
    slots: int
    policy: str
    fell_back: bool
    said: str


def verify(
    plan: Plan, plain: Plan, *, progress: Any = None, **options: Any
) -> tuple[Plan, Verified]:
    """Run a plan's policy and `lru` in turn, and return the plan of the one that is faster.

    Args:
        plain: the plan of `lru` in the same budget, which may have more slots.
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
    runtimes = {plan.policy: runtime}
    if plan.policy != RESIDENT:
        other = {"policy": policy(RESIDENT), "slots": plain.slots}
        runtimes[RESIDENT] = dataclasses.replace(runtime, **other)
    chosen, verified = judged(plan.policy, measured(runtimes), runtime.slots)
    if not verified.fell_back:
        return plan, verified
    verified = dataclasses.replace(verified, slots=plain.slots)
    reason = f"{chosen} was faster than {plan.policy} when both ran here"
    return dataclasses.replace(plain, reason=reason), verified


def measured(runtimes: dict[str, Runtime]) -> dict[str, list[float]]:
    """Milliseconds per token of each, run in turn after a warm-up, all from the same prompts."""
    for runtime in runtimes.values():  # drafts of all lengths would be compiled in between
        runtime.warm_up(sampling={"temperature": 0.0})
    samples: dict[str, list[float]] = {name: [] for name in runtimes}
    context = min(runtime.context for runtime in runtimes.values())
    new = max(min(TOKENS, context // 2), 2)
    for turn in range(-1, ROUNDS):
        for name, runtime in runtimes.items():
            ids = prompt_of(runtime, turn + 1)[:, : max(context - new, 1)]
            sample = bench.run_once(runtime, bench.Test("verify", ids.shape[1], new), ids)
            if turn >= 0:
                samples[name].append(sample.seconds / (new - 1) * 1e3)
    return samples


def prompt_of(runtime: Runtime, number: int) -> np.ndarray:
    """Token ids [1, T] of one of the TEXTS; random ones where the model has no tokenizer.

    Routing and drafts of random tokens are unlike those of text.
    """
    try:
        ids = runtime.tokenizer.encode(TEXTS[number % len(TEXTS)])
    except TokenizerError:
        fixed = (runtime.config.vocab_size, 1, TOKENS // 2)
        return bench.random_ids(*fixed, seed=0, repetition=number)
    return np.array([ids], np.int32)


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
