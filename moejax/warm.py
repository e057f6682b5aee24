"""Warm starts: which experts were resident, written to a file and brought back from it."""

import dataclasses
import functools
import json
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moejax import kernels
from moejax.checkpoints.headers import parse_json, read_small
from moejax.checkpoints.resumable import write_small
from moejax.errors import CheckpointError
from moejax.state import DecodeState, ExpertStore, Residency

FORMAT = "moejax residency 1"


def _about(runtime: Any) -> dict[str, Any]:
    config = runtime.config
    return {
        "format": FORMAT,
        "model_type": config.model_type,
        "layers": config.num_moe_layers,
        "experts": config.num_experts,
    }


def save(path: str | os.PathLike, runtime: Any, state: DecodeState) -> None:
    """Write which experts a state has resident; the file is whole or not there.

    Raises:
        CheckpointError: the file cannot be written, or the model has no experts.
    """
    path = pathlib.Path(path)
    if state.experts is None:
        raise CheckpointError("a dense model has no experts to remember")
    owner = np.asarray(state.experts.residency.owner)
    document = _about(runtime) | {"resident": owner[owner >= 0].tolist()}
    try:
        write_small(path, json.dumps(document).encode())
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error}") from error


def checked_path(path: str | os.PathLike | None) -> pathlib.Path | None:
    """The path of a file that `save` will be able to write; CheckpointError otherwise."""
    if path is None:
        return None
    path = pathlib.Path(path)
    if not os.access(path.parent, os.W_OK) or path.is_dir():
        raise CheckpointError(f"{path} cannot be written: give a file in a folder that can")
    return path


def restore(path: str | os.PathLike, runtime: Any, state: DecodeState) -> DecodeState:
    """A fresh state with the experts of the file resident, as many as there are slots.

    Over a link they are moved when they are first needed. Donates `state`.

    Raises:
        CheckpointError: no such file, a malformed one, or one of another model.
    """
    path = pathlib.Path(path)
    document = parse_json(read_small(path), str(path))
    resident = document.pop("resident", None)
    if document != _about(runtime):
        raise CheckpointError(f"{path} was written for another model: {document}")
    total = runtime.config.num_moe_layers * runtime.config.num_experts
    whole = isinstance(resident, list) and all(type(i) is int and 0 <= i < total for i in resident)
    if not whole or len(set(resident)) != len(resident):
        raise CheckpointError(f"{path} is damaged: experts must be different ids below {total}")
    cache = state.experts
    if cache is None or cache.residency.owner.shape[0] == total and cache.pool.shape[0] == 0:
        return state  # everything is resident anyway
    tables, slots = _seated(cache.residency, resident, runtime.config.num_experts)
    arriving = cache.arriving
    if arriving is not None:
        arriving = arriving.at[slots].set(True)
    pool = cache.pool
    if arriving is None and pool.shape[0]:
        pool = _filled(pool, runtime.store, jnp.asarray(slots), tables.owner[slots])
    cache = dataclasses.replace(cache, pool=pool, residency=tables, arriving=arriving)
    return jax.device_put(dataclasses.replace(state, experts=cache), jax.devices()[0])


def _seated(tables: Residency, ids: list[int], experts: int) -> tuple[Residency, np.ndarray]:
    """Tables with each id in the lowest free slot that may hold it, and the slots used."""
    home, slot_of = np.asarray(tables.home), np.full(tables.slot_of.shape, -1, np.int32)
    owner = np.full(home.shape, -1, np.int32)
    for expert in ids:
        free = np.flatnonzero((owner < 0) & ((home < 0) | (home == expert // experts)))
        if free.size:
            owner[free[0]], slot_of[expert] = expert, free[0]
    made = Residency(slot_of=jnp.asarray(slot_of), owner=jnp.asarray(owner), home=tables.home)
    return made, np.flatnonzero(owner >= 0).astype(np.int32)


@functools.partial(jax.jit, donate_argnums=0)
def _filled(pool: jax.Array, store: ExpertStore, slots: jax.Array, ids: jax.Array) -> jax.Array:
    return kernels.fetch(pool, store.records, slots, ids, jnp.int32(slots.shape[0]), slots)
