"""Muon with AdamW for the small tensors, and the learning-rate schedule."""

import jax
import jax.numpy as jnp
import optax
import tiny_ops as ops

HIDDEN = ("q", "k", "v", "o", "gate", "up", "down")
SIZE_FACTOR = 0.2


def orthogonal(x: jax.Array, rounds: int = 5) -> jax.Array:
    """Newton-Schulz approximation of the nearest semi-orthogonal matrices, batched, bf16."""
    tall = x.shape[-2] > x.shape[-1]
    y = x / (jnp.linalg.norm(x, axis=(-2, -1), keepdims=True) + 1e-12)
    y = (jnp.swapaxes(y, -1, -2) if tall else y).astype(jnp.bfloat16)
    for _ in range(rounds):
        gram = ops.settle(ops.product(y, ops.turn(y)))
        poly = ops.settle(-4.775 * gram + 2.0315 * ops.product(gram, gram))
        y = ops.settle(3.4445 * y + ops.product(poly, y))
    return (jnp.swapaxes(y, -1, -2) if tall else y).astype(jnp.float32)


def muon(momentum: float = 0.95) -> optax.GradientTransformation:
    """Nesterov momentum made semi-orthogonal, scaled to the step size that AdamW takes."""

    def init(params):
        return jax.tree.map(jnp.zeros_like, params)

    def update(grads, state, params=None):
        state = jax.tree.map(lambda m, g: momentum * m + g, state, grads)

        def step(m, g):
            return orthogonal(momentum * m + g) * SIZE_FACTOR * max(g.shape[-2:]) ** 0.5

        return jax.tree.map(step, state, grads), state

    return optax.GradientTransformation(init, update)


def labels(params: dict) -> dict:
    """Which rule each parameter uses: "muon" for inner matrices, else "adam"."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: "muon" if getattr(path[-1], "key", "") in HIDDEN else "adam", params
    )


def optimizer(weight_decay: float = 0.1, clip: float = 1.0) -> optax.GradientTransformation:
    """Updates to be multiplied by minus the learning rate."""
    decay = optax.add_decayed_weights(
        weight_decay, mask=lambda params: jax.tree.map(lambda p: p.ndim > 1, params)
    )
    adam = optax.scale_by_adam(b1=0.9, b2=0.95)
    rules = optax.partition({"muon": muon(), "adam": adam}, labels)
    return optax.chain(optax.clip_by_global_norm(clip), rules, decay)


def rate(step: int, steps: int, peak: float, warmup: int = 100, tail: float = 0.25) -> float:
    """Learning rate: linear warm-up, constant, then linear decay to 0 over the last share."""
    left = (steps - step) / max(tail * steps, 1)
    return peak * min((step + 1) / warmup, 1.0, left)
