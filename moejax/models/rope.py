"""Rotary position embeddings."""

import jax
import jax.numpy as jnp
import numpy as np

from moejax.config import Rope


def inverse_frequencies(rope: Rope, length: jax.Array) -> tuple[jax.Array, float]:
    """Inverse frequencies [dim / 2] f32 and the factor on cos and sin.

    Args:
        length: [] i32, positions seen so far; only the dynamic kinds look at it.
    """
    del length
    powers = np.arange(0, rope.dim, 2, dtype=np.float32) / rope.dim
    return jnp.asarray(1.0 / rope.theta**powers, jnp.float32), 1.0


def cos_sin(rope: Rope, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines [B, T, dim / 2] f32 of positions [B, T]."""
    frequencies, factor = inverse_frequencies(rope, positions.max() + 1)
    angles = positions[..., None].astype(jnp.float32) * frequencies
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def rotate(rope: Rope, x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotate the leading `dim` channels of x [B, T, heads, channels]."""
    cos, sin = cos[:, :, None], sin[:, :, None]
    turned, rest = x[..., : rope.dim], x[..., rope.dim :]
    if rope.interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
        pairs = jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=-1)
        turned = pairs.reshape(turned.shape)
    else:
        a, b = jnp.split(turned, 2, axis=-1)
        turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
    return jnp.concatenate([turned, rest], axis=-1)
