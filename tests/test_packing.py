"""Many small results in one array: what comes out is what went in."""

import jax
import jax.numpy as jnp
import numpy as np

from moejax.packing import pack


def test_what_is_packed_comes_out_again():
    rng = np.random.default_rng(0)
    values = {
        "count": jnp.int32(-3),
        "flag": jnp.array(True),
        "flags": jnp.asarray(rng.random((2, 3)) < 0.5),
        "none": jnp.zeros((2, 0), jnp.float32),
        "odd": jnp.float32([np.nan, np.inf, -0.0, 1e-45]),
        "words": jnp.asarray(rng.integers(0, 2**32, (3, 2), np.uint32)),
    }
    found = jax.jit(pack)(values).unpacked()
    assert jax.tree.structure(found) == jax.tree.structure(values)
    for name, value in values.items():
        own = np.asarray(found[name])
        assert (own.shape, own.dtype) == (value.shape, value.dtype), name
        assert own.tobytes() == np.asarray(value).tobytes(), name
