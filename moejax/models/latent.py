"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1)."""

import jax
import jax.numpy as jnp

from moejax.config import ModelConfig
from moejax.kernels import rms_norm
from moejax.models.layers import (
    KV_BLOCK,
    Span,
    Weights,
    affine,
    at,
    attend,
    bits_dtype,
    einsum,
    from_bits,
    to_bits,
    write_rows,
)
from moejax.models.rope import rotate
from moejax.state import LatentKVCache

LATENT_EPS = 1e-6  # of the norms of the latents, whatever the config says of the others


def latent_attention(
    config: ModelConfig,
    weights: Weights,
    layer: jax.Array,
    x: jax.Array,
    kv: LatentKVCache,
    span: Span,
) -> tuple[jax.Array, LatentKVCache]:
    """Attention output [B, T, D] f32 of normed x [B, T, D], and the cache with this step's rows.

    Absorbed form: queries are mapped into the latent space and attend the cached latents, which
    serve as keys and as values, so that no key or value is ever expanded per head.
    """
    w = at(weights, layer)
    b, t, _ = x.shape
    heads, latent, rank = config.num_heads, config.latent, config.latent.kv_rank
    dtype = bits_dtype(kv.latent)
    kv = _write(config, w, layer, x, kv, span)
    query = _query(config, w, x).reshape(b, t, heads, -1)
    rope_query = rotate(config.rope, query[..., latent.nope_dim :], span.cos, span.sin)
    up = w["kv_b"].array().reshape(heads, latent.nope_dim + latent.v_dim, rank)
    to_key, to_value = up[:, : latent.nope_dim], up[:, latent.nope_dim :]
    absorbed = _per_head("bthn,hnr->bthr", query[..., : latent.nope_dim], to_key)

    def blocks(start: jax.Array) -> tuple[jax.Array, jax.Array]:
        def read(cache: jax.Array) -> jax.Array:
            part = jax.lax.dynamic_slice(
                cache, (layer, 0, start, 0), (1, b, KV_BLOCK, cache.shape[-1])
            )
            return from_bits(part[0], dtype)[:, :, None]

        values = read(kv.latent)
        return jnp.concatenate([values, read(kv.rope_key)], axis=-1), values

    query = jnp.concatenate([absorbed, rope_query], axis=-1)[:, :, None]
    mixed = attend(query, blocks, rank, span, layer, config.attention_scale)[:, :, 0]
    out = _per_head("bthr,hvr->bthv", mixed, to_value)
    return affine(out.reshape(b, t, -1), w, "o"), kv


def _write(
    config: ModelConfig,
    w: Weights,
    layer: jax.Array,
    x: jax.Array,
    kv: LatentKVCache,
    span: Span,
) -> LatentKVCache:
    """The cache with the latents and the rotated shared keys of x."""
    rank, dtype = config.latent.kv_rank, bits_dtype(kv.latent)
    compressed = affine(x, w, "kv_a")
    latent = rms_norm(compressed[..., :rank], w["kv_a_norm"], LATENT_EPS)
    key = rotate(config.rope, compressed[..., None, rank:], span.cos, span.sin)[:, :, 0]
    return LatentKVCache(
        latent=write_rows(kv.latent, layer, to_bits(latent, kv.latent, dtype), span),
        rope_key=write_rows(kv.rope_key, layer, to_bits(key, kv.rope_key, dtype), span),
    )


def _query(config: ModelConfig, w: Weights, x: jax.Array) -> jax.Array:
    """Queries [B, T, heads * (nope + rope)], directly or through their own latent."""
    if config.latent.q_rank is None:
        return affine(x, w, "q")
    return affine(rms_norm(affine(x, w, "q_a"), w["q_a_norm"], LATENT_EPS), w, "q_b")


def _per_head(equation: str, x: jax.Array, weight: jax.Array) -> jax.Array:
    """One matrix per head: inputs in the weight's dtype, sums in f32, as `kernels.linear`."""
    # XLA's CPU backend has no batched bf16 product with f32 sums; widening changes no value.
    x = x.astype(weight.dtype).astype(jnp.float32)
    return einsum(equation, x, weight.astype(jnp.float32))
