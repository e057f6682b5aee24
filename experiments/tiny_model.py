"""Functional forms of the tiny Qwen3-MoE model and of its dense twin."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import tiny_ops as ops


@dataclass(frozen=True)
class Shape:
    """Sizes of a model; `experts` is 0 for the dense twin, whose `inner` is the FFN width."""

    vocab: int = 4096
    hidden: int = 192
    layers: int = 6
    heads: int = 6
    kv_heads: int = 2
    head_dim: int = 32
    experts: int = 32
    picks: int = 4
    inner: int = 96
    theta: float = 1e4
    eps: float = 1e-6
    positions: int = 2048


MOE = Shape()
TWIN = Shape(experts=0, picks=0, inner=192)


def init_params(shape: Shape, seed: int) -> dict:
    """Random f32 parameters; weights multiply from the right, [in, out]."""
    rng = np.random.default_rng(seed)
    back = 0.02 / (2 * shape.layers) ** 0.5

    def normal(std, *size):
        return jnp.asarray(rng.normal(0, std, size), jnp.float32)

    d, q, kv = shape.hidden, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    lead = (shape.experts,) if shape.experts else ()
    layers = []
    for _ in range(shape.layers):
        layer = {
            "norm1": jnp.ones(d),
            "norm2": jnp.ones(d),
            "q_norm": jnp.ones(shape.head_dim),
            "k_norm": jnp.ones(shape.head_dim),
            "q": normal(0.02, d, q),
            "k": normal(0.02, d, kv),
            "v": normal(0.02, d, kv),
            "o": normal(back, q, d),
            "gate": normal(0.02, *lead, d, shape.inner),
            "up": normal(0.02, *lead, d, shape.inner),
            "down": normal(back, *lead, shape.inner, d),
        }
        if shape.experts:
            layer["router"] = normal(0.02, d, shape.experts)
        layers.append(layer)
    return {"embed": normal(0.02, shape.vocab, d), "norm": jnp.ones(d), "layers": layers}


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """Root-mean-square norm over the last axis, computed and returned in f32."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps) * scale


def rotate(x: jax.Array, theta: float) -> jax.Array:
    """Rotary position embedding, half-split layout, x [batch, length, heads, d]."""
    length, dim = x.shape[1], x.shape[3]
    freq = theta ** -(jnp.arange(0, dim, 2) / dim)
    angle = jnp.arange(length)[:, None] * freq
    cos, sin = jnp.cos(angle)[:, None, :], jnp.sin(angle)[:, None, :]
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def attention(layer: dict, x: jax.Array, shape: Shape) -> jax.Array:
    """Self-attention output of normed inputs x [batch, length, hidden]."""
    batch, length, d = x.shape
    flat = x.reshape(-1, d)

    def project(name, norm):
        y = ops.matmul(flat, layer[name].astype(x.dtype))
        y = y.reshape(batch, length, -1, shape.head_dim)
        if norm is None:
            return y
        return rotate(rms_norm(y, layer[norm], shape.eps), shape.theta).astype(x.dtype)

    out = ops.attend(project("q", "q_norm"), project("k", "k_norm"), project("v", None))
    out = ops.matmul(out.reshape(batch * length, -1), layer["o"].astype(x.dtype))
    return out.reshape(x.shape)


def route(layer: dict, x: jax.Array, shape: Shape) -> dict[str, jax.Array]:
    """Router outputs of x [n, hidden]: picks, weights, probabilities and logits."""
    logits = x.astype(jnp.float32) @ layer["router"]
    probs = jax.nn.softmax(logits, axis=-1)
    top, picks = jax.lax.top_k(probs, shape.picks)
    weights = top / jnp.sum(top, axis=-1, keepdims=True)
    return {"picks": picks, "weights": weights, "probs": probs, "logits": logits}


def moe(layer: dict, x: jax.Array, shape: Shape) -> tuple[jax.Array, dict]:
    """Mixture output of x [n, hidden] and the routing that produced it."""
    routing = route(layer, x, shape)
    plan = ops.plan_blocks(routing["picks"], shape.experts)
    gate_up = jnp.concatenate([layer["gate"], layer["up"]], axis=-1).astype(x.dtype)
    out = ops.experts(x, routing["weights"], gate_up, layer["down"].astype(x.dtype), plan)
    return out, routing


def dense(layer: dict, x: jax.Array) -> jax.Array:
    """SwiGLU output of x [n, hidden]."""
    gate = ops.matmul(x, layer["gate"].astype(x.dtype)).astype(jnp.float32)
    up = ops.matmul(x, layer["up"].astype(x.dtype)).astype(jnp.float32)
    return ops.matmul((jax.nn.silu(gate) * up).astype(x.dtype), layer["down"].astype(x.dtype))


def forward(params: dict, tokens: jax.Array, shape: Shape, dtype) -> tuple[jax.Array, list]:
    """Final normed states [n, hidden] of tokens [batch, length], and per-layer records.

    Each record holds the MLP input and output and, for a mixture, the routing.
    """
    x = params["embed"][tokens]
    records = []
    for layer in params["layers"]:
        y = rms_norm(x, layer["norm1"], shape.eps).astype(dtype)
        x = x + attention(layer, y, shape)
        y = rms_norm(x, layer["norm2"], shape.eps).astype(dtype).reshape(-1, shape.hidden)
        out, routing = moe(layer, y, shape) if shape.experts else (dense(layer, y), {})
        records.append({"input": y, "output": out, **routing})
        x = x + out.reshape(x.shape)
    x = rms_norm(x, params["norm"], shape.eps).astype(dtype)
    return x.reshape(-1, shape.hidden), records


def logits_of(params: dict, tokens: jax.Array, shape: Shape, dtype) -> jax.Array:
    """Next-token logits, f32 [batch, length, vocab]."""
    x, _ = forward(params, tokens, shape, dtype)
    table = ops.turn(params["embed"].astype(dtype))
    return ops.product(x, table, jnp.float32).reshape(*tokens.shape, -1)


def mean_loss(params: dict, batch: jax.Array, shape: Shape, dtype) -> tuple[jax.Array, list]:
    """Mean cross-entropy in nats over batch [size, length + 1], and the layer records."""
    x, records = forward(params, batch[:, :-1], shape, dtype)
    table = params["embed"].astype(dtype)
    return ops.token_loss(x, table, batch[:, 1:].reshape(-1)), records


def router_losses(records: list, shape: Shape) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Load-balance loss, router z-loss (both summed over layers) and expert shares [L, E].

    The balance loss spans the whole batch, so that domains may use different experts.
    """
    balance, z, shares = 0.0, 0.0, []
    for record in records:
        hits = record["picks"].reshape(-1)[:, None] == jnp.arange(shape.experts)
        share = jnp.mean(hits.astype(jnp.float32), axis=0)
        balance += shape.experts * jnp.sum(share * jnp.mean(record["probs"], axis=0))
        z += jnp.mean(jax.nn.logsumexp(record["logits"], axis=-1) ** 2)
        shares.append(share)
    return balance, z, jnp.stack(shares)
