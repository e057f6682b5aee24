"""Cutoffs: up to which layer a prefetch made while drafting still pays (SP-MoE).

The latency model. One cycle drafts for `draft` time, then verifies layer by layer; cutoff c means
that layers 0 to c - 1 are prefetched. Layer l misses U_l distinct experts of its window, of which a
share `recall` was predicted; a share `precision` of what was predicted is needed. So its prefetch
is of P_l = U_l * recall / precision records.

1. The link works on one request at a time, of at most `batch` records: `latency`, and `record` for
   each. The prefetches of all layers are known when the draft begins, and queue in the order of the
   layers; requests run across layers.
2. What a layer needs and has not got when it begins is loaded on demand, ahead of the queue, but
   behind the request under way. What is left of the layer's own prefetch is dropped then. The layer
   then computes for `layer` time, while the link goes on with the queue: the deadline of layer l is
   at the earliest at draft + l * layer.
3. Every record that a prefetch lands beyond the `free` slots displaces a resident, which has to be
   loaded again with chance `reuse`.

Hence the U: each further layer hides loads behind the draft and the layers before it; but it also
lengthens the queue behind which demand waits for a request, of wrong records too, and evicts.
Expectations are carried through as if they were counts. Where a request is longer than the time
since the link was last free for the queue, demand waits for the rest of it; else, on average, for
half. That a layer's loads are any at all has the chance 1 - (1 - D / U)^U of U independent ones.
"""

import jax
import jax.numpy as jnp

from moejax.policies.prediction import LastLayer
from moejax.state import pytree


@pytree
class Foresight:
    """What is known of the window that is being drafted, by layer with experts."""

    missing: jax.Array  # [L] f32 U, distinct experts needed and not resident
    precision: jax.Array  # [L] f32, share of the predicted ones that is needed, more than 0
    recall: jax.Array  # [L] f32, share of the missing ones that is predicted


@pytree
class LinkCosts:
    """What the link and the cycle cost, all times in one unit."""

    record: jax.Array | float  # one expert over the link
    latency: jax.Array | float  # one request
    batch: jax.Array | int  # records per request, at least 1
    draft: jax.Array | float  # the whole draft
    layer: jax.Array | float  # computing one layer in verification
    free: jax.Array | float  # slots that nothing useful is in
    reuse: jax.Array | float  # chance that a displaced resident would have been used


def predicted_times(foresight: Foresight, costs: LinkCosts) -> jax.Array:
    """[L + 1] f32 expected time of one cycle with the first 0 to L layers prefetched.

    In the unit of the costs. A layer without precision counts as not predicted. NaN where a cost
    or the foresight is NaN.
    """
    missing = jnp.asarray(foresight.missing, jnp.float32)
    precision = jnp.asarray(foresight.precision, jnp.float32)
    recall = jnp.where(precision == 0, 0.0, foresight.recall)
    queued = missing * recall / jnp.where(precision == 0, 1.0, precision)
    layers = missing.shape[0]
    cutoff = jnp.arange(layers + 1)
    each = costs.record + costs.latency / costs.batch  # of a record in a full request
    request = costs.latency + costs.batch * costs.record
    total = jnp.append(0.0, jnp.cumsum(queued)) * each  # [L + 1] link time of the whole queue

    def verify(carry, layer):
        time, done, window, landed = carry
        number, missing, recall, queued, before = layer
        prefetched = (number < cutoff) & (queued > 0)

        def arrived(done):
            share = (done - before) / jnp.where(prefetched, queued * each, 1.0)
            # a link that takes no time is done whenever it had any
            share = jnp.where(each > 0, share, jnp.where(time > 0, 1.0, 0.0))
            return jnp.where(prefetched, jnp.clip(share, 0.0, 1.0), 0.0)

        def demand(done):
            left = missing * (1.0 - recall * arrived(done))
            chance = 1.0 - jnp.maximum(1.0 - left / jnp.maximum(missing, left + 1e-9), 0.0) ** (
                jnp.maximum(missing, 1.0)
            )
            return left, jnp.where(left > 0, jnp.minimum(chance, left), 0.0)

        _, chance = demand(done)
        rest = jnp.maximum(request - window, request / 2)
        wait = jnp.where(window > 0, jnp.minimum(rest, total - done), 0.0)
        done = done + chance * wait
        left, _ = demand(done)
        half = (1.0 - 1.0 / costs.batch) / 2
        requests = jnp.maximum(chance, left / costs.batch + chance * half)
        landed = landed + arrived(done) * queued
        time = time + chance * wait + left * costs.record + requests * costs.latency + costs.layer
        done = jnp.maximum(done, jnp.where(number < cutoff, before + queued * each, 0.0))
        done = jnp.minimum(done + costs.layer, total)
        window = (1.0 - chance) * window + costs.layer
        return (time, done, window, landed), None

    draft = jnp.full(layers + 1, costs.draft, jnp.float32)
    start = (draft, jnp.minimum(draft, total), draft, jnp.zeros(layers + 1, jnp.float32))
    steps = (jnp.arange(layers), missing, recall, queued, total[:-1])
    (time, _, _, landed), _ = jax.lax.scan(verify, start, steps)
    return time + jnp.maximum(landed - costs.free, 0.0) * costs.reuse * each


def best_cutoff(times: jax.Array) -> jax.Array:
    """[] i32 layers to prefetch for the least of the times [L + 1], the fewer when level.

    Times within a millionth of the least are level; where any is NaN, none is prefetched.
    """
    return jnp.argmax(~(times > times.min() * (1 + 1e-6))).astype(jnp.int32)


def latency_cutoff(foresight: Foresight, costs: LinkCosts) -> LastLayer:
    """SP-MoE's cutoff by the latency model: to be found once in a while, not in every layer."""
    return LastLayer(last=best_cutoff(predicted_times(foresight, costs)) - 1)


def briskmoe_cutoff(
    records: jax.Array | float,
    record: jax.Array | float,
    draft: jax.Array | float,
    free: jax.Array | float,
    num_layers: int,
) -> jax.Array:
    """[] i32 layers to prefetch as the BriskMoE re-implementation of SP-MoE has it.

    The most of 1 to `num_layers` whose `records` each, `record` time apiece, arrive within the
    draft and fit the `free` slots; 1 if not even one does.
    """
    number = jnp.arange(1, num_layers + 1) * records
    fits = (number * record <= draft) & (number <= free)
    return jnp.clip(fits.sum(dtype=jnp.int32), 1, num_layers)
