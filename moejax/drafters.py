"""What policies that draft need beside the model: a draft model, the distances between experts."""

import dataclasses
import os
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from moejax.errors import PolicyError
from moejax.policies.policy import Policy
from moejax.runtime import Runtime

EMBEDDED = {"tiny": "tiny-draft"}  # models that come with one that drafts for them


def equipped(
    runtime: Runtime,
    name: str | os.PathLike,
    draft: str | os.PathLike | None,
    budgeted: bool,
    kernels: str | None,
    load: Callable[..., Runtime],
) -> Runtime:
    """The runtime, with what its policy drafts with.

    Args:
        name: what was loaded.
        draft: the model asked for, None = by default.
        budgeted: memory is budgeted, and a draft model would not be counted.
        load: `moejax.load`.

    Raises:
        PolicyError: a draft model that is missing, that nobody asks for, or that does not fit.
    """
    if runtime.policy is None:
        return runtime
    runtime = dataclasses.replace(runtime, policy=completed(runtime.policy, runtime))
    wanted = getattr(runtime.policy.speculation.draft, "kind", None) == "model"
    draft = draft or (EMBEDDED.get(str(name)) if wanted else None)
    if draft is None and wanted:
        raise PolicyError("this policy drafts with another model: name one as `draft`")
    if draft is None:
        return runtime
    if not wanted:
        raise PolicyError(f"no model drafts under this policy: leave out the draft {str(draft)!r}")
    if budgeted:
        raise PolicyError("a memory budget does not count a draft model: give slots instead")
    model = runtime.model
    other = load(draft, dtype=model.dtype, context=runtime.context, kernels=kernels)
    other.as_helper().check(model, runtime.policy)
    return dataclasses.replace(runtime, draft=other)


def completed(policy: Policy, runtime: Any) -> Policy:
    """The policy, with the distances between the model's experts if its drafts go by them."""
    speculation = policy.speculation
    router = getattr(speculation.draft, "router", None)
    if router is None or not hasattr(router, "distance") or router.distance is not None:
        return policy
    from moejax.distances import distances_of

    router = dataclasses.replace(router, distance=jnp.asarray(distances_of(runtime)))
    draft = dataclasses.replace(speculation.draft, router=router)
    speculation = dataclasses.replace(speculation, draft=draft)
    return dataclasses.replace(policy, speculation=speculation)
