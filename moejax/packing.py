"""Many small results of a program as one array: each array that goes to the host costs 10 us."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moejax.state import pytree, static


@pytree
class Packed:
    """The leaves of a pytree of 32-bit numbers and booleans, one after the other."""

    bits: jax.Array  # [n] u32
    tree: Any = static()
    leaves: tuple[tuple[tuple[int, ...], str], ...] = static()  # shape and dtype of each

    def unpacked(self) -> Any:
        """The pytree, of NumPy arrays on the host."""
        record = np.asarray(self.bits).view(_record(self.leaves))[0]
        found = [
            record[i].astype(bool) if dtype == "bool" else record[i]
            for i, (_, dtype) in enumerate(self.leaves)
        ]
        return jax.tree.unflatten(self.tree, found)


@functools.cache
def _record(leaves: tuple[tuple[tuple[int, ...], str], ...]) -> np.dtype:
    """All leaves as one type: 20 views of parts take longer than a plain step's bookkeeping."""
    kinds = [("u4" if dtype == "bool" else dtype, shape) for shape, dtype in leaves]
    return np.dtype([(str(i), *kind) for i, kind in enumerate(kinds)])


def pack(values: Any) -> Packed:
    """All leaves of a pytree in one array, inside a program."""
    leaves, tree = jax.tree.flatten(values)

    def raw(leaf: jax.Array) -> jax.Array:
        if leaf.dtype == bool:
            return leaf.astype(jnp.uint32).reshape(-1)
        return jax.lax.bitcast_convert_type(leaf, jnp.uint32).reshape(-1)

    return Packed(
        bits=jnp.concatenate([raw(leaf) for leaf in leaves]),
        tree=tree,
        leaves=tuple((leaf.shape, str(leaf.dtype)) for leaf in leaves),
    )
