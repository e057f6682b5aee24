"""Kernels of the decode hot path; knows JAX and record layouts, never models or policies."""

from moejax.kernels.reference import (
    combine,
    empty_rows,
    experts,
    fetch,
    linear,
    plan,
    swiglu,
)

__all__ = ["combine", "empty_rows", "experts", "fetch", "linear", "plan", "swiglu"]
