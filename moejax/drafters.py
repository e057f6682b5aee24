"""What policies that draft need beside the model: a draft model, the distances between experts."""

import dataclasses
import os
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from moejax.cycles import Helper
from moejax.errors import PolicyError
from moejax.models.transformer import Decoder
from moejax.policies.policy import Policy
from moejax.runtime import Runtime

EMBEDDED = {"tiny": "tiny-draft"}  # models that come with one that drafts for them


def equipped(
    runtime: Runtime,
    name: str | os.PathLike,
    draft: str | os.PathLike | None,
    kernels: str | None,
    load: Callable[..., Runtime],
) -> Runtime:
    """The runtime, with what its policy drafts with.

    Args:
        name: what was loaded.
        draft: the model asked for, None = by default.
        load: `moejax.load`.

    Raises:
        PolicyError: a draft model that is missing, that nobody asks for, or that does not fit.
    """
    if runtime.policy is None:
        return runtime
    runtime = dataclasses.replace(runtime, policy=completed(runtime.policy, runtime))
    draft = wanted(runtime.policy, name, draft)
    if draft is None:
        return runtime
    model = runtime.model
    other = load(draft, dtype=model.dtype, context=runtime.context, kernels=kernels)
    check(other.model, model, runtime.policy)
    return dataclasses.replace(runtime, draft=other)


def wanted(
    policy: Policy, name: str | os.PathLike, draft: str | os.PathLike | None
) -> str | os.PathLike | None:
    """The model that drafts under a policy: the one asked for, or the one that `name` comes with.

    Raises:
        PolicyError: none is named where one must be, or one where none drafts.
    """
    asked = getattr(policy.speculation.draft, "kind", None) == "model"
    draft = draft or (EMBEDDED.get(str(name)) if asked else None)
    if draft is None and asked:
        raise PolicyError("this policy drafts with another model: name one as `draft`")
    if draft is not None and not asked:
        raise PolicyError(f"no model drafts under this policy: leave out the draft {str(draft)!r}")
    return draft


def check(other: Decoder, target: Decoder, policy: Policy) -> None:
    """Raise PolicyError unless a model can draft for the target under the policy."""
    Helper(other, None, {}, None, None).check(target, policy)


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
