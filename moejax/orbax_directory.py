"""Model directories whose weights are one Orbax checkpoint, {params, store}, beside the config."""

import os
import pathlib
import shutil
from typing import Any

import jax
import numpy as np

from moejax import devices
from moejax.checkpoints import convert, hf, orbax
from moejax.checkpoints.headers import read_small
from moejax.checkpoints.rules import WeightMap
from moejax.errors import CheckpointError
from moejax.models.transformer import Decoder
from moejax.state import ExpertStore

TREE = "orbax"


def is_orbax(directory: pathlib.Path) -> bool:
    """Whether a directory was made by `save_directory`."""
    return (pathlib.Path(directory) / TREE).is_dir()


def save_directory(
    source: pathlib.Path,
    target: pathlib.Path,
    model: Decoder,
    weights: WeightMap,
    *,
    force: bool = False,
    progress: hf.Progress | None = None,
) -> None:
    """Load a Hugging Face directory and save {params, store} with Orbax; TARGET appears when whole.

    Raises CheckpointError when `target` exists without force or was not made by this function, and
    what `hf.load` raises.
    """
    source, target = pathlib.Path(source), pathlib.Path(target)
    _check_target(source, target, force)
    partial = target.with_name(target.name + ".partial")
    if partial.exists():
        _remove(partial)
    flat, records = hf.load(source, weights, progress=progress)
    tree: dict[str, Any] = {"params": devices.dense_params(flat)}
    if records is not None:
        store = devices.store(model.config, records, model.dtype, on_device=False)
        tree["store"] = _saved(store)
    partial.mkdir()
    for name in convert.COPIED:
        if (source / name).is_file():
            (partial / name).write_bytes(read_small(source / name))
    orbax.save(partial / TREE, tree)
    if target.exists():
        _remove(target)
    os.rename(partial, target)


def load_directory(
    directory: pathlib.Path, model: Decoder, *, on_device: bool
) -> tuple[dict[str, jax.Array], jax.Array | None]:
    """Restore dense parameters by path and records [L * E, R], each straight into its memory.

    Parameters come as they are held.
    Raises CheckpointError when the checkpoint is damaged or does not fit the config or the dtype.
    """
    abstract: dict[str, Any] = {"params": devices.abstract_params(model)}
    if model.config.moe_layers:
        sharding = devices.store_sharding(on_device)
        store = _saved(devices.abstract_store(model))
        abstract["store"] = jax.tree.map(lambda leaf: leaf.update(sharding=sharding), store)
    tree = orbax.restore(pathlib.Path(directory) / TREE, abstract)
    flat = {f"{group}/{name}": a for group, d in tree["params"].items() for name, a in d.items()}
    return flat, tree["store"]["records"] if "store" in tree else None


def _saved(store: ExpertStore) -> dict[str, Any]:
    """What a directory holds of a store: Orbax refuses one with other fields, even empty ones."""
    return {"records": store.records, "link": None, "low": None}


def tree_leaves(directory: pathlib.Path) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Shape and dtype of every saved array by path, read from the checkpoint's metadata."""
    from orbax.checkpoint import v1 as ocp

    path = (pathlib.Path(directory) / TREE).absolute()
    try:
        metadata = ocp.metadata(path).metadata
    except Exception as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
    leaves = jax.tree_util.tree_leaves_with_path(metadata)
    return {
        jax.tree_util.keystr(at, simple=True, separator="/"): (tuple(leaf.shape), leaf.dtype)
        for at, leaf in leaves
    }


def _check_target(source: pathlib.Path, target: pathlib.Path, force: bool) -> None:
    if not target.parent.is_dir():
        raise CheckpointError(f"{target.parent} is not a directory")
    if target.resolve() == source.resolve() or target.resolve() in source.resolve().parents:
        raise CheckpointError(f"{target} holds the source: convert into another directory")
    if os.path.lexists(target) and not force:
        raise CheckpointError(f"{target} exists: give another name, or replace it with --force")
    if os.path.lexists(target):
        _check_ours(target)


def _check_ours(directory: pathlib.Path) -> None:
    ours = directory.is_dir() and not directory.is_symlink()
    if not ours or not set(os.listdir(directory)) <= {*convert.COPIED, TREE}:
        raise CheckpointError(f"{directory} was not saved by moejax, so it is not replaced")


def _remove(directory: pathlib.Path) -> None:
    _check_ours(directory)
    shutil.rmtree(directory)
