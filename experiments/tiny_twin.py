"""The dense twin: the mixture's frozen trunk with a small FFN distilled in each layer."""

import json
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tiny_ops as ops
from tiny_data import Batches
from tiny_model import MOE, TWIN, Shape, dense, forward, init_params
from tiny_optim import optimizer, rate
from tiny_train import load_checkpoint, newest_checkpoint, save_checkpoint

FFN = ("gate", "up", "down")
CHUNK = 2048


def twin_params(moe: dict, ffn: list[dict]) -> dict:
    """The mixture's parameters with each layer's experts and router replaced by an FFN."""
    keep = ("norm1", "norm2", "q_norm", "k_norm", "q", "k", "v", "o")
    layers = [
        {**{key: layer[key] for key in keep}, **small}
        for layer, small in zip(moe["layers"], ffn, strict=True)
    ]
    return {"embed": moe["embed"], "norm": moe["norm"], "layers": layers}


def initial_ffn(shape: Shape, seed: int) -> list[dict]:
    """Random FFN weights of the twin, one set a layer, f32."""
    layers = init_params(shape, seed)["layers"]
    return [{key: layer[key] for key in FFN} for layer in layers]


def output_gap(ffn: list[dict], records: list[dict]) -> jax.Array:
    """Mean over layers of the squared error relative to the mixture's output power."""
    total = 0.0
    for small, record in zip(ffn, records, strict=True):
        want = record["output"].astype(jnp.float32)
        error = dense(small, record["input"]).astype(jnp.float32) - want
        total += jnp.mean(error**2) / (jnp.mean(want**2) + 1e-9)
    return total / len(ffn)


def divergence(x: jax.Array, teacher: jax.Array, table: jax.Array) -> jax.Array:
    """Mean KL divergence in nats of the student's next-token distribution to the teacher's.

    x and teacher [n, hidden] are final normed states, table [vocab, hidden].
    """
    turned = ops.turn(table)

    @jax.checkpoint
    def part(mine, theirs):
        want = jax.nn.log_softmax(ops.product(theirs, turned, jnp.float32))
        have = jax.nn.log_softmax(ops.matmul(mine, turned).astype(jnp.float32))
        return jnp.sum(jnp.exp(want) * (want - have))

    total = 0.0
    for start in range(0, x.shape[0], CHUNK):
        total += part(x[start : start + CHUNK], teacher[start : start + CHUNK])
    return total / x.shape[0]


@partial(jax.jit, static_argnums=(4, 5), donate_argnums=0)
def distill_step(state, moe, batch, lr, phase: str, dtype):
    """One FFN update towards the mixture's layer outputs ("match") or distribution ("kl")."""
    tokens = batch[:, :-1]
    teacher, records = forward(moe, tokens, MOE, dtype)

    def objective(ffn):
        if phase == "match":
            return output_gap(ffn, records)
        x, _ = forward(twin_params(moe, ffn), tokens, TWIN, dtype)
        return divergence(x, teacher, moe["embed"].astype(dtype))

    loss, grads = jax.value_and_grad(objective)(state["ffn"])
    updates, opt = optimizer(weight_decay=0.01).update(grads, state["opt"], state["ffn"])
    ffn = jax.tree.map(lambda p, u: p - lr * u, state["ffn"], updates)
    return {"ffn": ffn, "opt": opt}, loss, optax.tree.norm(grads)


def distill(moe: dict, tokens: dict, folder: Path, match: int, kl: int, seed: int = 29) -> dict:
    """Train the twin's FFNs for `match` steps, then `kl` steps; returns the log.

    The newest checkpoint in `folder` is resumed; steps use 8,192 tokens.
    """
    ffn = initial_ffn(TWIN, seed)
    state = {"ffn": ffn, "opt": optimizer(weight_decay=0.01).init(ffn)}
    log = {"curve": [], "seconds": 0.0, "tokens": 0, "step": 0, "match": match, "kl": kl}
    start = newest_checkpoint(folder)
    if start:
        state, log = load_checkpoint(start, state)
    begun, spent, saved = time.time(), log["seconds"], time.time()
    batches, steps = Batches(tokens, 512, seed), match + kl
    for step in range(log["step"], steps):
        batch = jnp.asarray(batches.batch(step, 16))
        phase = "match" if step < match else "kl"
        lr = rate(step, steps, 8e-3, warmup=20, tail=0.6)
        state, loss, norm = distill_step(state, moe, batch, jnp.float32(lr), phase, jnp.bfloat16)
        log |= {"step": step + 1, "tokens": log["tokens"] + 8192}
        log["seconds"] = spent + time.time() - begun
        if (step + 1) % 20 == 0 or step + 1 == steps:
            log["curve"].append({"step": step + 1, "phase": phase, "loss": float(loss)})
            print(json.dumps(log["curve"][-1]), f"{log['seconds']:.0f}s {norm:.2f}", flush=True)
        if step + 1 == steps or time.time() - saved > 180:
            save_checkpoint(folder, step + 1, state, log)
            saved = time.time()
    return log


def load_twin(moe: dict, folder: Path) -> tuple[dict, dict]:
    """Parameters of the twin from its newest checkpoint, and the distillation log."""
    ffn = initial_ffn(TWIN, 0)
    like = {"ffn": ffn, "opt": optimizer(weight_decay=0.01).init(ffn)}
    path = newest_checkpoint(folder)
    if path is None:
        return twin_params(moe, ffn), {}
    state, log = load_checkpoint(path, like)
    return twin_params(moe, jax.tree.map(np.asarray, state["ffn"])), log
