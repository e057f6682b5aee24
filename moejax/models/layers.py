"""Layer mathematics as pure functions of stacked weights [layers, ...] and a layer index."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from moejax import kernels
from moejax.config import ModelConfig
from moejax.kernels import Weight, cpu, rms_norm
from moejax.layout import BITS
from moejax.models.rope import cos_sin, rotate
from moejax.state import KVCache, pytree

KV_BLOCK = 128  # positions attended at a time; the KV capacity is a multiple of it

Weights = dict[str, Weight]
# (start) -> f32 keys [B, P, G, H] and values [B, P, G, V] of P = KV_BLOCK positions from start
Blocks = Callable[[jax.Array], tuple[jax.Array, jax.Array]]


@pytree
class Span:
    """Where this step's tokens stand in their sequences."""

    positions: jax.Array  # [B, T] i32
    valid: jax.Array  # [B, T] bool
    length: jax.Array  # [B] i32, tokens per sequence after this step
    cos: jax.Array  # [B, T, rotary / 2] f32
    sin: jax.Array  # [B, T, rotary / 2] f32
    window: jax.Array  # [A] i32, attended positions per layer, 0 = all


def span_of(config: ModelConfig, length: jax.Array, tokens: jax.Array, prefill: bool) -> Span:
    """Where tokens [B, T] (-1 = padding) stand that follow `length` [B] others."""
    valid = tokens >= 0
    positions = length[:, None] + jnp.arange(tokens.shape[1], dtype=jnp.int32)
    length = length + valid.sum(axis=1, dtype=jnp.int32)
    # Tokens that are to come out as if decoded one by one have a length of their own.
    lengths = length[:, None] if prefill else positions + 1
    cos, sin = cos_sin(config.rope, jnp.where(valid, positions, 0), lengths)
    return Span(
        positions=positions,
        valid=valid,
        length=length,
        cos=cos,
        sin=sin,
        window=jnp.asarray(config.windows or (0,) * config.num_layers, jnp.int32),
    )


# f32 throughout: GPUs would otherwise round the inputs to TF32.
einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


def at(weights: Weights, layer: jax.Array) -> Weights:
    """The weights of one layer, from stacks."""
    return {name: weight.at(layer) for name, weight in weights.items()}


def affine(x: jax.Array, weights: Weights, name: str) -> jax.Array:
    """Linear map `name` of one layer's weights, with its bias if it has one."""
    y = kernels.linear(x, weights[name])
    bias = weights.get(f"{name}_bias")
    return y if bias is None else y + bias.array().astype(jnp.float32)


def to_bits(x: jax.Array, bits: jax.Array, dtype: str) -> jax.Array:
    """x rounded to `dtype`, as the unsigned integers of the cache `bits`."""
    return jax.lax.bitcast_convert_type(x.astype(dtype), bits.dtype)


def from_bits(bits: jax.Array, dtype: str) -> jax.Array:
    """f32 values of cached bits."""
    return jax.lax.bitcast_convert_type(bits, jnp.dtype(dtype)).astype(jnp.float32)


def write_rows(cache: jax.Array, layer: jax.Array, rows: jax.Array, span: Span) -> jax.Array:
    """Write rows [B, T, ...] of bits where they stand in cache [A, B, C, ...], but no padding."""
    batch = jnp.arange(rows.shape[0])[:, None]
    positions = jnp.where(span.valid, span.positions, cache.shape[2])
    return cache.at[layer, batch, positions].set(rows, mode="drop", unique_indices=True)


def bits_dtype(bits: jax.Array) -> str:
    """Name of the float type behind bits."""
    return next(name for name, unsigned in BITS.items() if unsigned == bits.dtype)


def attend(
    query: jax.Array,  # [B, T, G, Q, H] f32, Q query heads per key-value head
    blocks: Blocks,
    value_dim: int,
    span: Span,
    layer: jax.Array,
    scale: float,
) -> jax.Array:
    """Causal attention [B, T, G, Q, V] over the blocks that hold positions, by online softmax."""
    b, t, g, q, _ = query.shape
    window = span.window[layer]
    window = jnp.where(window > 0, window, jnp.iinfo(jnp.int32).max)
    oldest = jnp.where(span.valid, span.positions - window + 1, jnp.iinfo(jnp.int32).max)
    first = jnp.clip(oldest.min() // KV_BLOCK, 0)
    active = jnp.where(span.valid.any(axis=1), span.length, 0)  # finished sequences attend to none
    last = -(-active.max() // KV_BLOCK)

    def block(i: jax.Array, carry: tuple) -> tuple:
        best, mass, out = carry
        keys, values = blocks(i * KV_BLOCK)
        scores = einsum("btgqh,bpgh->bgqtp", query, keys) * scale
        where = i * KV_BLOCK + jnp.arange(KV_BLOCK)
        age = span.positions[:, :, None] - where  # [B, T, P]
        seen = ((age >= 0) & (age < window))[:, None, None]
        scores = jnp.where(seen, scores, -jnp.inf)
        top = jnp.maximum(best, scores.max(axis=-1))
        safe = jnp.where(jnp.isfinite(top), top, 0.0)
        kept = jnp.exp(best - safe)
        weights = jnp.exp(scores - safe[..., None])
        mass = mass * kept + weights.sum(axis=-1)
        out = out * kept[..., None] + einsum("bgqtp,bpgv->bgqtv", weights, values)
        return top, mass, out

    shape = (b, g, q, t)
    start = (
        jnp.full(shape, -jnp.inf, jnp.float32),
        jnp.zeros(shape, jnp.float32),
        jnp.zeros((*shape, value_dim), jnp.float32),
    )
    _, mass, out = jax.lax.fori_loop(first, last, block, start)
    out = out / jnp.where(mass > 0, mass, 1.0)[..., None]
    return out.transpose(0, 3, 1, 2, 4)


def grouped_query_attention(
    config: ModelConfig, weights: Weights, layer: jax.Array, x: jax.Array, kv: KVCache, span: Span
) -> tuple[jax.Array, KVCache]:
    """Attention output [B, T, D] f32 of normed x [B, T, D], and the cache with this step's rows."""
    w = at(weights, layer)
    b, t, _ = x.shape
    g, h = config.num_kv_heads, config.head_dim
    dtype = bits_dtype(kv.keys)

    def project(name: str, heads: int) -> jax.Array:
        y = affine(x, w, name)
        if f"{name}_norm" in w and config.qk_norm == "whole":
            y = rms_norm(y, w[f"{name}_norm"], config.norm_eps)
        if config.clip_qkv is not None:
            y = jnp.clip(y, -config.clip_qkv, config.clip_qkv)
        y = y.reshape(b, t, heads, h)
        if f"{name}_norm" in w and config.qk_norm == "head":
            y = rms_norm(y, w[f"{name}_norm"], config.norm_eps)
        return y

    query = rotate(config.rope, project("q", config.num_heads), span.cos, span.sin)
    key = rotate(config.rope, project("k", g), span.cos, span.sin)
    kv = KVCache(
        keys=write_rows(kv.keys, layer, to_bits(key, kv.keys, dtype), span),
        values=write_rows(kv.values, layer, to_bits(project("v", g), kv.values, dtype), span),
    )

    out = _attend_cache(config, query, kv, layer, span)
    return affine(out.reshape(b, t, -1), w, "o"), kv


def _attend_cache(
    config: ModelConfig, query: jax.Array, kv: KVCache, layer: jax.Array, span: Span
) -> jax.Array:
    """Attention of query [B, T, heads, H] to the cache, by head."""
    if kernels.chosen() == "native":
        window = span.window[layer]
        return cpu.attend(
            query,
            kv.keys,
            kv.values,
            layer,
            span.positions,
            # What lies beyond the cache was not written and is given no numbers in the end.
            span.valid & (span.positions < kv.keys.shape[2]),
            window,
            scale=config.attention_scale,
        )
    b, t, _, h = query.shape
    g = config.num_kv_heads

    def blocks(start: jax.Array) -> tuple[jax.Array, jax.Array]:
        def read(cache: jax.Array) -> jax.Array:
            part = jax.lax.dynamic_slice(
                cache, (layer, 0, start, 0, 0), (1, b, KV_BLOCK, g, cache.shape[-1])
            )
            return from_bits(part[0], bits_dtype(cache))

        return read(kv.keys), read(kv.values)

    query = query.reshape(b, t, g, config.num_heads // g, h)
    return attend(query, blocks, h, span, layer, config.attention_scale)
