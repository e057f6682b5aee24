"""A cycle's tokens once more with the model's own routing: how far a lossy policy has drifted."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from moejax.decode import step
from moejax.sampling import divergence
from moejax.speculate import Speculating, Target
from moejax.stats import Totals, totals_of


@functools.partial(jax.jit, donate_argnames="run")
def probe(
    target: Target, run: Speculating, before: jax.Array, logits: jax.Array
) -> tuple[Speculating, jax.Array, Totals]:
    """Feed what a cycle took in again, with alpha 0; donates `run`.

    The keys and values of this pass stay, what policies remember is as before it. After the cycle,
    not before: its experts would be resident by then, and the drift less.

    Args:
        before: [B] i32, tokens in the KV cache before the cycle, of at most W each.
        logits: [B, W, V] of the cycle.

    Returns:
        The run, the mean divergence [B] in nats over the tokens taken, and what the pass did.
    """
    place = jnp.arange(logits.shape[1])
    length, memory = run.state.length, run.state.policy
    taken = place < (length - before)[:, None]
    at = jnp.minimum(before[:, None] + place, run.text.shape[1] - 1)
    tokens = jnp.where(taken, jnp.take_along_axis(run.text, at, axis=1), -1)
    router = dataclasses.replace(target.policy.router, alpha=jnp.float32(0))
    own = dataclasses.replace(target.policy, router=router)
    state = dataclasses.replace(run.state, length=before)
    fixed = (target.model, own, target.params, target.store)
    state, out = step(*fixed, state, tokens, all_logits=True, prefill=False)
    nats = jnp.where(taken, divergence(out.logits, logits), 0.0)
    nats = nats.sum(axis=1) / jnp.maximum(taken.sum(axis=1), 1)
    failure = out.trace.failure.max()
    state = dataclasses.replace(state, length=length, policy=memory)
    totals = dataclasses.replace(totals_of(out.trace), failure=failure)
    return dataclasses.replace(run, state=state), nats, totals
