"""The sliced model in plain JAX: every slice's true contribution is known here, as no router's is.

The engine runs the fitted router; this forward pass calibrates, and runs the routers that the
engine cannot have: an oracle that knows the norm of what each slice would add, and a random one.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.held_out import losses
from experiments.moefy_slices import Dense, Slices, cluster, cut, fit_router
from moejax.models.rope import cos_sin, rotate

ROUTERS = ("fitted", "oracle", "random")
BATCH = 4  # windows at once


class Sliced:
    """A dense model and the slices that it was cut into; with none, calibration comes first."""

    def __init__(self, dense: Dense):
        self.dense = dense
        config = dense.config
        w = {name: jnp.asarray(array) for name, array in dense.weights.items()}
        self.embed, self.final_norm = w["embed/weight"], w["final_norm/weight"]
        self.head = self.embed if config.tied_embeddings else w["head/weight"]
        names = ("norms/input", "norms/post", *(f"attention/{n}" for n in "qkvo"))
        self.layers = [{n: w[n][i] for n in names} for i in range(config.num_layers)]

    def attended(self, layer: int, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The residual stream [B, T, D] after a layer's attention, and its norm."""
        return _attended(self.dense.config, self.layers[layer], x)

    def losses(
        self, windows: np.ndarray, slices: Slices, router: str, picks: int, seed: int = 0
    ) -> np.ndarray:
        """[W, T] nats of the next token of windows [W, T + 1] under a router of ROUTERS."""
        orders = enumerate(slices.order)
        parts = [_on_device(cut(self.dense, i, order, slices.experts)) for i, order in orders]
        found, key = [], jax.random.key(seed)
        for rows in _batches(windows):
            x = self.embed[rows[:, :-1]]
            for layer, ffn in enumerate(parts):
                x, h = self.attended(layer, x)
                own = jax.random.fold_in(jax.random.fold_in(key, layer), len(found))
                x = x + _sliced_ffn(*ffn, slices.router[layer], h, own, router=router, picks=picks)
            x = _normed(x, self.final_norm, self.dense.config.norm_eps)
            for hidden, row in zip(x, rows, strict=True):
                found.append(losses(np.asarray(hidden @ self.head.T), row[1:]))
        return np.stack(found)


def _batches(windows: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(windows), BATCH):
        yield windows[start : start + BATCH]


def _on_device(arrays: Sequence[np.ndarray]) -> tuple[jax.Array, ...]:
    return tuple(jnp.asarray(a) for a in arrays)


def _normed(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.square(x).mean(axis=-1, keepdims=True) + eps) * weight


@functools.partial(jax.jit, static_argnums=0)
def _attended(config: Any, w: dict, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    batch, tokens, _ = x.shape
    groups, head = config.num_kv_heads, config.head_dim
    h = _normed(x, w["norms/input"], config.norm_eps)
    place = jnp.broadcast_to(jnp.arange(tokens), (batch, tokens))
    cos, sin = cos_sin(config.rope, place, jnp.full((batch, 1), tokens))

    def project(name: str) -> jax.Array:
        return (h @ w[f"attention/{name}"].T).reshape(batch, tokens, -1, head)

    query = rotate(config.rope, project("q"), cos, sin).reshape(batch, tokens, groups, -1, head)
    key, value = rotate(config.rope, project("k"), cos, sin), project("v")
    scores = jnp.einsum("btgqh,bsgh->bgqts", query, key) * config.attention_scale
    seen = jnp.tril(jnp.ones((tokens, tokens), bool))
    mixed = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf))
    out = jnp.einsum("bgqts,bsgh->btgqh", mixed, value).reshape(batch, tokens, -1)
    x = x + out @ w["attention/o"].T
    return x, _normed(x, w["norms/post"], config.norm_eps)


def _neurons(gate: jax.Array, up: jax.Array, h: jax.Array) -> jax.Array:
    """Activations [N, E, w] of slices of gate and up [E, w, D]."""
    experts, width, _ = gate.shape
    flat = [h @ part.reshape(experts * width, -1).T for part in (gate, up)]
    return (jax.nn.silu(flat[0]) * flat[1]).reshape(len(h), experts, width)


def slice_norms(active: jax.Array, down: jax.Array) -> jax.Array:
    """[N, E] norms of what slices add: activations [N, E, w], down [E, D, w]."""
    gram = jnp.einsum("edv,edw->evw", down, down)
    square = jnp.einsum("new,new->ne", jnp.einsum("nev,evw->new", active, gram), active)
    return jnp.sqrt(jnp.maximum(square, 0))


@functools.partial(jax.jit, static_argnames=("router", "picks"))
def _sliced_ffn(
    gate: jax.Array,
    up: jax.Array,
    down: jax.Array,
    weights: jax.Array,
    h: jax.Array,
    key: jax.Array,
    *,
    router: str,
    picks: int,
) -> jax.Array:
    shape, h = h.shape, h.reshape(-1, h.shape[-1])
    active = _neurons(gate, up, h)
    experts = gate.shape[0]
    if router == "oracle":
        worth = slice_norms(active, down)
    elif router == "random":
        worth = jax.random.uniform(key, (len(h), experts))
    else:
        worth = h @ weights.T
    chosen = jax.lax.top_k(worth, picks)[1]
    on = jnp.zeros((len(h), experts), bool).at[jnp.arange(len(h))[:, None], chosen].set(True)
    active = jnp.where(on[:, :, None], active, 0).reshape(len(h), -1)
    return (active @ down.transpose(0, 2, 1).reshape(active.shape[1], -1)).reshape(shape)


@jax.jit
def _norms(gate: jax.Array, up: jax.Array, down: jax.Array, h: jax.Array) -> jax.Array:
    return slice_norms(_neurons(gate, up, h), down)


@jax.jit
def _contributions(gate: jax.Array, up: jax.Array, down: jax.Array, h: jax.Array) -> tuple:
    """Size of each neuron's output [N, F], and the FFN's output."""
    active = _neurons(gate[None], up[None], h)[:, 0]
    return jnp.abs(active) * jnp.linalg.norm(down, axis=0), active @ down.T


def calibrated(
    model: Sliced, windows: np.ndarray, experts: int, methods: Sequence[str], seed: int
) -> dict[str, Slices]:
    """Slices by method, "clustered" or "contiguous", each with a router fitted on windows [W, T].

    The dense model runs layer by layer over all windows; one layer's activations are held at once.
    """
    config, streams = model.dense.config, [model.embed[rows] for rows in _batches(windows)]
    found: dict[str, list] = {method: [] for method in methods}
    for layer in range(config.num_layers):
        after = [model.attended(layer, x) for x in streams]
        inputs = [h.reshape(-1, config.width) for _, h in after]
        ffn = _on_device(model.dense.ffn(layer))
        parts = [_contributions(*ffn, h) for h in inputs]
        streams = [x + y.reshape(x.shape) for (x, _), (_, y) in zip(after, parts, strict=True)]
        sizes = np.concatenate([np.asarray(size) for size, _ in parts])
        for method, own in found.items():
            order = np.arange(config.dense_width, dtype=np.int32)
            if method == "clustered":
                order = cluster(sizes, experts, seed + layer)
            gate, up, down = _on_device(cut(model.dense, layer, order, experts))
            norms = np.concatenate([np.asarray(_norms(gate, up, down, h)) for h in inputs])
            own.append((order, *fit_router(np.concatenate(inputs), norms)))
    return {
        method: Slices(np.stack(orders), np.stack(routers), fits)
        for method, own in found.items()
        for orders, routers, fits in [zip(*own, strict=True)]
    }
