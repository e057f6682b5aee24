"""Kernels of the decode hot path; knows JAX and record layouts, never models or policies."""

from moejax.kernels.reference import expert_rows, fetch, linear, swiglu

__all__ = ["expert_rows", "fetch", "linear", "swiglu"]
