"""Saving and restoring pytrees with Orbax, whose checkpoints are directories."""

from pathlib import Path
from typing import Any

import jax

from moejax.errors import CheckpointError


def save(path: Path, tree: Any) -> None:
    """Save a pytree of JAX and NumPy arrays and scalars as a new checkpoint directory.

    Raises CheckpointError when the path exists or cannot be written.
    """
    from orbax.checkpoint import v1 as ocp  # importing it costs about a second

    path = Path(path).absolute()
    if path.exists():
        raise CheckpointError(f"{path} exists: remove it or give another name")
    try:
        ocp.save(path, tree)
    except Exception as error:
        raise CheckpointError(f"cannot save {path}: {error}") from error


def _by_name(tree: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _check_leaves(path: Path, stored: Any, abstract: Any) -> None:
    """Compare shapes and dtypes, which Orbax would cast, and for NumPy leaves ignore."""
    stored, wanted = _by_name(stored), _by_name(abstract)
    wrong = [f"{name} is missing" for name in wanted.keys() - stored.keys()]
    wrong += [f"{name} is not asked for" for name in stored.keys() - wanted.keys()]
    for name in wanted.keys() & stored.keys():
        has, needs = stored[name], wanted[name]
        if not hasattr(needs, "shape") or not hasattr(has, "shape"):
            continue
        if tuple(has.shape) != tuple(needs.shape) or has.dtype != needs.dtype:
            wrong.append(
                f"{name} is {has.dtype}{list(has.shape)}, not {needs.dtype}{list(needs.shape)}"
            )
    if wrong:
        raise CheckpointError("\n  ".join([f"{path} holds another tree:", *sorted(wrong)]))


def restore(path: Path, abstract: Any) -> Any:
    """Restore a checkpoint as the pytree that `abstract` describes.

    Leaves of `abstract`: jax.ShapeDtypeStruct, restored straight to its sharding and memory kind
    (to the default device without one), NumPy arrays, restored as such, or scalars. Raises
    CheckpointError when the checkpoint is missing or damaged or holds other names, shapes, dtypes.
    """
    from orbax.checkpoint import v1 as ocp

    path = Path(path).absolute()
    if not path.is_dir():
        raise CheckpointError(f"there is no checkpoint at {path}")
    default = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def placed(leaf):
        if isinstance(leaf, jax.ShapeDtypeStruct) and leaf.sharding is None:
            return leaf.update(sharding=default)
        return leaf

    try:
        stored = ocp.metadata(path).metadata
        if stored is None:
            raise CheckpointError(f"cannot restore {path}: it is damaged")
        _check_leaves(path, stored, abstract)
        return ocp.load(path, jax.tree.map(placed, abstract))
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(f"cannot restore {path}: {error}") from error
