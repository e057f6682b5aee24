"""Rotary position embeddings: default, linear, dynamic (NTK), yarn, llama3 and longrope."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from moejax.config import Rope


def inverse_frequencies(rope: Rope, length: jax.Array) -> jax.Array:
    """Inverse frequencies f32, [dim / 2] or per token [B, T or 1, dim / 2].

    Two kinds depend on how many positions a sequence has. As in transformers, the tokens of a step
    are rotated by the frequencies of the length after that step, and keys that are already cached
    keep their rotation, so results depend on how a long prompt is cut into steps. Unlike there,
    each sequence of a batch counts its own positions, and what ran earlier has no influence.

    Args:
        length: [B, T or 1] i32, positions of the sequence after this step or, where tokens are to
            come out as if decoded one by one, after each of them.
    """
    options = dict(rope.options)
    powers = np.arange(0, rope.dim, 2, dtype=np.float32) / np.float32(rope.dim)
    plain = (1.0 / rope.theta**powers).astype(np.float32)
    if rope.kind == "dynamic":
        seen = jnp.maximum(length, rope.original_max_positions).astype(jnp.float32)
        stretch = rope.factor * seen / rope.original_max_positions - (rope.factor - 1.0)
        theta = rope.theta * stretch ** (rope.dim / (rope.dim - 2))
        return 1.0 / theta[..., None] ** powers
    if rope.kind == "longrope":
        short, long = (
            plain / np.asarray(options[name], np.float32)
            for name in ("short_factor", "long_factor")
        )
        return jnp.where(length[..., None] > rope.original_max_positions, long, short)
    if rope.kind == "linear":
        plain = plain / rope.factor
    elif rope.kind == "yarn":
        kept = _yarn_kept(rope, options)
        plain = plain / rope.factor * (1.0 - kept) + plain * kept
    elif rope.kind == "llama3":
        plain = _llama3(rope, options, plain)
    return jnp.asarray(plain, jnp.float32)


def _yarn_kept(rope: Rope, options: dict) -> np.ndarray:
    """[dim / 2] share of the unscaled frequency: 1 for those that turn often, 0 for slow ones."""

    def channel(turns: float) -> float:
        wavelengths = rope.original_max_positions / (turns * 2 * math.pi)
        return rope.dim * math.log(wavelengths) / (2 * math.log(rope.theta))

    low, high = channel(options.get("beta_fast", 32.0)), channel(options.get("beta_slow", 1.0))
    if options.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dim - 1)
    high = high + 0.001 if low == high else high
    ramp = (np.arange(rope.dim // 2, dtype=np.float32) - low) / (high - low)
    return 1.0 - np.clip(ramp, 0.0, 1.0)


def _llama3(rope: Rope, options: dict, plain: np.ndarray) -> np.ndarray:
    """Short wavelengths kept, long ones divided by the factor, a blend in between."""
    low, high = options["low_freq_factor"], options["high_freq_factor"]
    turns = rope.original_max_positions * plain / (2 * math.pi)
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return (1.0 - kept) * plain / rope.factor + kept * plain


def magnitude(rope: Rope) -> float:
    """Factor on cosines and sines."""
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.kind == "yarn":
        options = dict(rope.options)
        mscale, all_dim = options.get("mscale"), options.get("mscale_all_dim")
        if mscale and all_dim:
            return yarn_mscale(rope.factor, mscale) / yarn_mscale(rope.factor, all_dim)
        return yarn_mscale(rope.factor, 1.0)
    if rope.kind == "longrope" and rope.factor > 1:
        return math.sqrt(1 + math.log(rope.factor) / math.log(rope.original_max_positions))
    return 1.0


def yarn_mscale(factor: float, weight: float) -> float:
    """YaRN's growth of attention logits with the context (arXiv 2309.00071, section 3.4)."""
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def cos_sin(rope: Rope, positions: jax.Array, length: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines [B, T, dim / 2] f32 of positions [B, T]; see `inverse_frequencies`."""
    angles = positions[..., None].astype(jnp.float32) * inverse_frequencies(rope, length)
    factor = magnitude(rope)
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
