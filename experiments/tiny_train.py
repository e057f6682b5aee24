"""Training loops of the tiny mixture and its twin, with resumable checkpoints."""

import json
import os
import platform
import time
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tiny_data import DOMAINS, Batches, val_windows
from tiny_model import Shape, init_params, mean_loss, router_losses
from tiny_optim import optimizer, rate


@dataclass(frozen=True)
class Plan:
    """Length and settings of a training run.

    Sequences have `short_length` tokens until the decay starts, `length` during the decay and
    `long_length` in the last `long_steps`.
    """

    steps: int
    tokens_per_step: int = 16384
    short_length: int = 256
    length: int = 512
    long_steps: int = 0
    long_length: int = 2048
    peak: float = 5e-3
    tail: float = 0.25
    balance: float = 0.003
    z: float = 1e-4
    seed: int = 17
    eval_every: int = 200
    save_seconds: float = 240.0

    def length_at(self, step: int) -> int:
        """Sequence length of a step."""
        if step < self.steps * (1 - self.tail):
            return self.short_length
        return self.long_length if step >= self.steps - self.long_steps else self.length


def hardware() -> str:
    """The devices that JAX computes on, in words."""
    device = jax.devices()[0]
    if device.platform == "cpu":
        return f"{os.cpu_count()} CPU cores"
    return f"{jax.device_count()} x {device.device_kind}"


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that decide the numbers."""
    found = {name: metadata.version(name) for name in ("jax", "jaxlib", "numpy", "optax")}
    return {"python": platform.python_version(), **found}


def save_checkpoint(folder: Path, step: int, state: dict, log: dict) -> Path:
    """Write parameters, optimiser state and log of a step; keep the newest two."""
    folder.mkdir(parents=True, exist_ok=True)
    leaves = jax.tree.leaves(state)
    part, path = folder / "part.npz", folder / f"step_{step:06d}.npz"
    arrays = {f"a{i:04d}": np.asarray(leaf) for i, leaf in enumerate(leaves)}
    np.savez(part, log=json.dumps(log), **arrays)
    os.replace(part, path)
    for old in sorted(folder.glob("step_*.npz"))[:-2]:
        old.unlink()
    return path


def newest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint with the highest step, if there is any."""
    found = sorted(folder.glob("step_*.npz"))
    return found[-1] if found else None


def load_checkpoint(path: Path, like: dict) -> tuple[dict, dict]:
    """State with the structure of `like`, and the log, of a checkpoint."""
    with np.load(path) as file:
        log = json.loads(str(file["log"]))
        leaves, tree = jax.tree.flatten(like)
        arrays = [jnp.asarray(file[f"a{i:04d}"]) for i in range(len(leaves))]
    return jax.tree.unflatten(tree, arrays), log


def initial_state(shape: Shape, seed: int) -> dict:
    """Fresh parameters and optimiser state."""
    params = init_params(shape, seed)
    return {"params": params, "opt": optimizer().init(params)}


def cast_inner(params: dict, dtype) -> dict:
    """Matrices of the layers, except routers, in the compute type."""

    def cast(path, p):
        small = p.ndim < 2 or path[-1].key in ("router", "embed")
        return p if small else p.astype(dtype)

    return jax.tree_util.tree_map_with_path(cast, params)


@partial(jax.jit, static_argnums=(3, 4, 5, 6), donate_argnums=0)
def train_step(state, batch, lr, shape: Shape, balance: float, z: float, dtype):
    """One update; returns the state, the loss in nats and the expert shares [L, E]."""

    def objective(params):
        loss, records = mean_loss(cast_inner(params, dtype), batch, shape, dtype)
        even, zed, shares = router_losses(records, shape)
        return loss + balance * even + z * zed, (loss, shares)

    grads, (loss, shares) = jax.grad(objective, has_aux=True)(state["params"])
    updates, opt = optimizer().update(grads, state["opt"], state["params"])
    params = jax.tree.map(lambda p, u: p - lr * u, state["params"], updates)
    return {"params": params, "opt": opt}, loss, shares, optax.tree.norm(grads)


@partial(jax.jit, static_argnums=(2, 3))
def loss_of(params, batch, shape: Shape, dtype):
    """Mean cross-entropy in nats of a batch."""
    return mean_loss(params, batch, shape, dtype)[0]


def held_out_losses(params, tokens, shape, dtype, length=512, limit=16) -> dict[str, float]:
    """Mean held-out cross-entropy per domain in nats, on evenly spread windows."""
    losses = {}
    for domain in DOMAINS:
        windows = val_windows(tokens[f"val/{domain}"], length, limit)
        losses[domain] = float(loss_of(params, jnp.asarray(windows), shape, dtype))
    return losses


def train(plan: Plan, shape: Shape, tokens: dict, folder: Path, dtype=jnp.bfloat16) -> dict:
    """Run or resume training until `plan.steps`; returns the final state."""
    state = initial_state(shape, plan.seed)
    log = {"curve": [], "held_out": [], "phases": [], "seconds": 0.0, "tokens": 0, "step": 0}
    start = newest_checkpoint(folder)
    if start:
        state, log = load_checkpoint(start, state)
    log |= {"hardware": hardware(), "versions": versions()}
    begun, saved, spent = time.time(), time.time(), log["seconds"]
    lengths = (plan.short_length, plan.length, plan.long_length)
    batches = {n: Batches(tokens, n, plan.seed) for n in lengths}
    recent = []
    for step in range(log["step"], plan.steps):
        length = plan.length_at(step)
        if not log["phases"] or log["phases"][-1]["length"] != length:
            log["phases"].append({"from_step": step, "length": length})
        batch = batches[length].batch(step, plan.tokens_per_step // length)
        lr = rate(step, plan.steps, plan.peak, tail=plan.tail)
        state, loss, shares, norm = train_step(
            state, jnp.asarray(batch), jnp.float32(lr), shape, plan.balance, plan.z, dtype
        )
        recent.append(float(loss))
        log["step"], log["tokens"] = step + 1, log["tokens"] + batch.size - len(batch)
        log["seconds"] = spent + time.time() - begun
        if (step + 1) % 20 == 0 or step + 1 == plan.steps:
            report(log, recent, np.asarray(shares), lr, float(norm))
            recent = []
        if (step + 1) % plan.eval_every == 0 or step + 1 == plan.steps:
            losses = held_out_losses(state["params"], tokens, shape, dtype)
            log["held_out"].append({"step": step + 1, **losses})
            print(json.dumps(log["held_out"][-1]), flush=True)
        if time.time() - saved > plan.save_seconds or step + 1 == plan.steps:
            save_checkpoint(folder, step + 1, state, log)
            saved = time.time()
    return state


def seen_tokens(record: dict, tokens: dict) -> dict[str, np.ndarray]:
    """Which tokens of each training stream a run drew, from its plan and log, boolean."""
    masks = {d: np.zeros(len(tokens[f"train/{d}"]), bool) for d in DOMAINS}
    ends = [phase["from_step"] for phase in record["phases"][1:]] + [record["step"]]
    for phase, end in zip(record["phases"], ends, strict=True):
        length = phase["length"]
        batches, size = Batches(tokens, length, record["seed"]), record["tokens_per_step"] // length
        for number in range(phase["from_step"] * size, end * size):
            domain, start = batches.place(number)
            masks[domain][start : start + length + 1] = True
    return masks


def report(log: dict, recent: list, shares: np.ndarray, lr: float, norm: float) -> None:
    """Append the recent mean loss to the log and print it with the expert use."""
    uses = shares * shares.shape[1]
    row = {"step": log["step"], "loss": float(np.mean(recent)), "lr": lr}
    log["curve"].append(row)
    print(
        f"{log['step']:6d} {log['seconds']:7.0f}s {log['tokens'] / 1e6:6.2f}M "
        f"loss {row['loss']:.4f} lr {lr:.2e} norm {norm:.2f} "
        f"use {uses.min():.2f}..{uses.max():.2f}",
        flush=True,
    )
