"""Low-bit copies of a model's experts, for routers that fall back on them (HOBBIT)."""

import dataclasses

import jax
import numpy as np

from moejax.errors import InputError, PolicyError
from moejax.layout import aligned_empty
from moejax.policies.policy import Policy
from moejax.quantise import quantise
from moejax.state import ExpertStore, LowBits

FORMAT = "int4g32"


def check(policy: Policy, budgeted: bool) -> None:
    """Raise PolicyError if the router wants copies and memory is budgeted: they are not counted."""
    if policy.low_bit and budgeted:
        raise PolicyError(
            "this policy keeps low-bit copies of all experts in fast memory, which a budget does "
            "not count: give --slots (slots) instead"
        )


def for_policy(policy: Policy | None, store: ExpertStore | None) -> ExpertStore | None:
    """The store, with low-bit copies of all experts if the policy's router asks for them.

    Raises:
        PolicyError: copies that cannot be made here.
        InputError: see `copies`.
    """
    if policy is None or not policy.low_bit:
        return store
    if store.records is None:
        raise PolicyError(
            "this policy makes low-bit copies from memory, and the disk has all experts"
        )
    if jax.default_backend() != "cpu":
        raise PolicyError("low-bit copies have not been made to run on a GPU yet: run on a CPU")
    return dataclasses.replace(store, low=copies(store))


def copies(store: ExpertStore, format: str = FORMAT) -> LowBits:
    """All records of a store of floats in a quantised format.

    Raises:
        InputError: the store is quantised already.
    """
    if store.layout.quantised:
        raise InputError(f"experts in {store.layout.dtype} have no low-bit copies: load floats")
    layout = dataclasses.replace(store.layout, dtype=format)
    records = np.asarray(store.records)
    low = aligned_empty((len(records), layout.elements), layout.bits)
    low[:] = 0
    for part, matrix in layout.matrices.items():
        layout.view(low, part)[:] = quantise(store.layout.view(records, part), matrix)
    return LowBits(records=jax.device_put(low), layout=layout)
