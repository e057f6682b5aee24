"""What a verification pass accepts of a draft, and drafts that need no model; pure rules."""

import jax
import jax.numpy as jnp

from moejax.sampling import Sampling, mark_seen, processed_logits, sequence_keys

LONGEST_MATCH = 3  # tokens that a lookup compares


def lookup(
    text: jax.Array, length: jax.Array, least: jax.Array | int, most: int
) -> tuple[jax.Array, jax.Array]:
    """What followed the latest occurrence of the longest ending that has occurred before.

    Args:
        text: [B, C + 1] i32.
        length: [B] i32, where the last token of each text stands.
        least: tokens that must match, 1 to 3; an ending of three counts before one of two.
        most: tokens to propose.

    Returns:
        tokens [B, most] i32, and how many of them there are [B] i32.
    """
    place = jnp.arange(text.shape[1], dtype=jnp.int32)
    before = place < length[:, None]
    match = jnp.zeros(text.shape, jnp.int32)
    still = before
    for back in range(LONGEST_MATCH):
        ending = jnp.take_along_axis(text, jnp.maximum(length - back, 0)[:, None], axis=1)
        shifted = jnp.roll(text, back, axis=1)
        still &= (shifted == ending) & (place >= back) & (length >= back)[:, None]
        match += still
    best = jnp.argmax(jnp.where(before, match * text.shape[1] + place, -1), axis=1)
    matched = jnp.take_along_axis(match, best[:, None], axis=1)[:, 0]
    count = jnp.minimum(length - best, most)
    count = jnp.where((matched >= least) & (matched > 0), count, 0)
    follow = jnp.minimum(best[:, None] + 1 + jnp.arange(most), text.shape[1] - 1)
    return jnp.take_along_axis(text, follow, axis=1), count.astype(jnp.int32)


def final_logits(
    logits: jax.Array, fed: jax.Array, sampling: Sampling, seen: jax.Array | None
) -> jax.Array:
    """Logits [B, W, V] of the distributions that tokens are drawn from after each token `fed`.

    Args:
        fed: [B, W] i32, -1 = none; each counts as seen from its place on.
        seen: [B, V] bool before them, or None without a repetition penalty.
    """
    batch, width = fed.shape
    rows = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (batch,)), sampling)

    def one(seen: jax.Array | None, at: tuple) -> tuple:
        row, token = at
        if seen is not None:
            seen = mark_seen(seen, jnp.maximum(token, 0)[:, None], (token >= 0)[:, None])
        return seen, processed_logits(row, rows, seen)

    _, final = jax.lax.scan(one, seen, (logits.swapaxes(0, 1), fed.T))
    return final.swapaxes(0, 1)


def accept_greedy(final: jax.Array, draft: jax.Array, count: jax.Array) -> tuple:
    """Accepted drafts [B] i32, and the model's own token after them [B] i32.

    Args:
        final: [B, W, V] f32 logits.
        draft: [B, W - 1] i32.
        count: [B] i32, how many of them are drafts.
    """
    own = jnp.argmax(final, axis=-1).astype(jnp.int32)
    agreed = (draft == own[:, :-1]) & (jnp.arange(draft.shape[1]) < count[:, None])
    accepted = jnp.cumprod(agreed, axis=1).sum(axis=1, dtype=jnp.int32)
    return accepted, jnp.take_along_axis(own, accepted[:, None], axis=1)[:, 0]


def accept_sampled(
    final: jax.Array,
    draft: jax.Array,
    count: jax.Array,
    drafter: jax.Array | None,
    key: jax.Array,
    length: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Accepted drafts [B], and the token after them [B], so that all have the distribution `final`.

    A draft is accepted with probability min(1, p / q); the first that is not is replaced by a draw
    from the positive part of p - q (Leviathan et al., arXiv 2211.17192). A greedy sequence, whose p
    is certain, comes out as by `accept_greedy`.

    Args:
        final: [B, W, V] f32 logits of p.
        draft: [B, W - 1] i32.
        count: [B] i32, how many of them are drafts.
        drafter: [B, W - 1, V] f32 logits of q; None = drafts were certain.
        key: one typed key.
        length: [B] i32, tokens in the KV cache before: draws at other places differ.
    """
    batch, drafts = draft.shape
    p = jax.nn.softmax(final)
    if drafter is None:
        q = jax.nn.one_hot(draft, p.shape[-1], dtype=p.dtype)
    else:
        q = jax.nn.softmax(drafter)
    numbers = jnp.arange(batch, dtype=jnp.int32)
    uniform = jax.vmap(lambda k: jax.random.uniform(k, (drafts,)))(
        sequence_keys(jax.random.fold_in(key, 2), numbers, length)
    )
    mine = jnp.take_along_axis(p[:, :-1], draft[..., None], axis=-1)[..., 0]
    theirs = jnp.take_along_axis(q, draft[..., None], axis=-1)[..., 0]
    agreed = (uniform * theirs < mine) & (jnp.arange(drafts) < count[:, None])
    accepted = jnp.cumprod(agreed, axis=1).sum(axis=1, dtype=jnp.int32)
    there = accepted[:, None, None]
    own = jnp.take_along_axis(p, there, axis=1)[:, 0]
    other = jnp.take_along_axis(jnp.pad(q, ((0, 0), (0, 1), (0, 0))), there, axis=1)[:, 0]
    refused = (accepted < count)[:, None]
    left = jnp.where(refused, jnp.maximum(own - other, 0.0), own)
    left = jnp.where(left.sum(axis=-1, keepdims=True) > 0, left, own)
    keys = sequence_keys(jax.random.fold_in(key, 3), numbers, length)
    token = jax.vmap(jax.random.categorical)(keys, jnp.log(left)).astype(jnp.int32)
    return accepted, token
