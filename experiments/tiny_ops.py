"""Matrix products, attention, experts and loss with hand-written gradients.

XLA on CPUs multiplies bfloat16 matrices with tile instructions only when both operands are
plain row-major; a transposed operand silently falls back to float32. Every product here is
therefore written as [m, k] @ [k, n], with transposes forced into memory first.
"""

from functools import partial

import jax
import jax.numpy as jnp

BLOCK = 256


def settle(x: jax.Array) -> jax.Array:
    """The same values, written to memory row-major: a gather that XLA does not see through."""
    return x.at[jnp.arange(x.shape[0])].get(mode="promise_in_bounds")


def turn(x: jax.Array) -> jax.Array:
    """The last two axes swapped and written out row-major."""
    return settle(jnp.swapaxes(x, -1, -2))


def product(a: jax.Array, b: jax.Array, out=None) -> jax.Array:
    """Matrix product [..., m, k] @ [..., k, n] without a gradient rule."""
    lead = tuple(range(a.ndim - 2))
    dims = (((a.ndim - 1,), (b.ndim - 2,)), (lead, lead))
    return jax.lax.dot_general(a, b, dims, preferred_element_type=out or a.dtype)


@jax.custom_vjp
def matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    """Matrix product [..., m, k] @ [..., k, n]."""
    return product(a, b)


def matmul_fwd(a, b):
    return product(a, b), (a, b)


def matmul_bwd(saved, grad):
    a, b = saved
    return product(grad, turn(b)), product(turn(a), grad)


matmul.defvjp(matmul_fwd, matmul_bwd)


def causal_blocks(length: int) -> list[tuple[int, int]]:
    """Query ranges that attention handles one at a time."""
    size = max(128, length // 8)
    return [(start, min(start + size, length)) for start in range(0, length, size)]


def scores(q, k, start, group):
    """Causal attention probabilities of one query range, f32 [n, rows, keys]."""
    logits = product(q, turn(k), jnp.float32) * q.shape[-1] ** -0.5
    place = start + jnp.tile(jnp.arange(q.shape[1] // group), group)
    seen = jnp.arange(k.shape[1])[None, :] <= place[:, None]
    return jax.nn.softmax(jnp.where(seen, logits, -1e30), axis=-1)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def attend_block(q, k, v, start, group):
    """Causal attention of one query range, whose first position is `start`.

    q [n, group * queries, d], k and v [n, keys, d] -> [n, group * queries, d].
    """
    return product(scores(q, k, start, group).astype(q.dtype), v)


def attend_block_fwd(q, k, v, start, group):
    probs = scores(q, k, start, group).astype(q.dtype)
    out = product(probs, v)
    return out, (q, k, v, probs, out)


def attend_block_bwd(start, group, saved, grad):
    q, k, v, probs, out = saved
    delta = jnp.sum(grad.astype(jnp.float32) * out.astype(jnp.float32), -1, keepdims=True)
    dprobs = product(grad, turn(v), jnp.float32)
    dlogits = probs.astype(jnp.float32) * (dprobs - delta) * q.shape[-1] ** -0.5
    dlogits = dlogits.astype(q.dtype)
    dk = jnp.swapaxes(settle(product(turn(q), dlogits)), -1, -2)
    dv = jnp.swapaxes(settle(product(turn(grad), probs)), -1, -2)
    return product(dlogits, k), dk, dv


attend_block.defvjp(attend_block_fwd, attend_block_bwd)


def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Causal grouped-query attention.

    q [batch, length, heads, d], k and v [batch, length, kv_heads, d] -> like q.
    """
    batch, length, heads, dim = q.shape
    kv = k.shape[2]
    group = heads // kv
    k, v = (x.transpose(0, 2, 1, 3).reshape(batch * kv, length, dim) for x in (k, v))
    q = q.reshape(batch, length, kv, group, dim).transpose(0, 2, 3, 1, 4)
    q = q.reshape(batch * kv, group, length, dim)
    outs = []
    for start, stop in causal_blocks(length):
        rows = q[:, :, start:stop].reshape(batch * kv, -1, dim)
        out = attend_block(rows, k[:, :stop], v[:, :stop], start, group)
        outs.append(out.reshape(batch, kv, group, stop - start, dim))
    out = jnp.concatenate(outs, axis=3)
    return out.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, dim)


def plan_blocks(picks: jax.Array, experts: int) -> dict[str, jax.Array]:
    """Lay out picks [n, k] so that each block of BLOCK rows belongs to one expert.

    `slot` [n, k] is the row of each pick, `source` [rows] the pick of each row (n * k where
    the row is padding), `owner` [blocks] the expert of each block.
    """
    flat = picks.reshape(-1)
    hits = (flat[:, None] == jnp.arange(experts)).astype(jnp.int32)
    before = jnp.cumsum(hits, axis=0) - hits
    counts = before[-1] + hits[-1]
    blocks = -(-counts // BLOCK)
    ends = jnp.cumsum(blocks)
    rank = jnp.sum(before * hits, axis=1)
    slot = (ends - blocks)[flat] * BLOCK + rank
    total = -(-flat.size // BLOCK) + experts
    source = jnp.full(total * BLOCK, flat.size, jnp.int32)
    source = source.at[slot].set(jnp.arange(flat.size), unique_indices=True)
    owner = jnp.searchsorted(ends, jnp.arange(total), side="right")
    owner = jnp.minimum(owner, experts - 1)
    return {"slot": slot.reshape(picks.shape), "source": source, "owner": owner}


def rows_of(x, index):
    return x.at[index].get(mode="promise_in_bounds")


def expert_hidden(x, plan, gate_up, picks_per_token):
    """Expert inputs [blocks, BLOCK, d] and their gate and up projections."""
    token = jnp.minimum(plan["source"] // picks_per_token, x.shape[0] - 1)
    inputs = rows_of(x, token).reshape(-1, BLOCK, x.shape[1])
    return inputs, product(inputs, rows_of(gate_up, plan["owner"]))


def swiglu(h):
    gate, up = jnp.split(h.astype(jnp.float32), 2, axis=-1)
    return (jax.nn.silu(gate) * up).astype(h.dtype)


def swiglu_pull(h, grad):
    """Gradient of swiglu by its input."""
    gate, up = jnp.split(h.astype(jnp.float32), 2, axis=-1)
    grad, sig = grad.astype(jnp.float32), jax.nn.sigmoid(gate)
    dgate = settle((grad * up * sig * (1 + gate * (1 - sig))).astype(h.dtype))
    dup = settle((grad * gate * sig).astype(h.dtype))
    return jnp.concatenate([dgate, dup], axis=-1)


@jax.custom_vjp
def experts(x, weights, gate_up, down, plan):
    """Weighted sum of the picked experts' SwiGLU outputs.

    x [n, d], weights [n, k] f32, gate_up [e, d, 2f], down [e, f, d] -> [n, d].
    """
    return experts_fwd(x, weights, gate_up, down, plan)[0]


def experts_fwd(x, weights, gate_up, down, plan):
    _, hidden = expert_hidden(x, plan, gate_up, weights.shape[1])
    act = swiglu(hidden)
    outs = product(act, rows_of(down, plan["owner"])).reshape(-1, x.shape[1])
    total = jnp.zeros(x.shape, jnp.float32)
    for j in range(weights.shape[1]):
        total += rows_of(outs, plan["slot"][:, j]).astype(jnp.float32) * weights[:, j, None]
    return total.astype(x.dtype), (x, weights, gate_up, down, plan, hidden, outs)


def experts_bwd(saved, grad):
    x, weights, gate_up, down, plan, hidden, outs = saved
    n, d = x.shape
    k, count = weights.shape[1], gate_up.shape[0]
    grad32 = grad.astype(jnp.float32)
    dweights = jnp.stack(
        [jnp.sum(rows_of(outs, plan["slot"][:, j]) * grad32, -1) for j in range(k)], axis=1
    )
    padded = jnp.append(weights.reshape(-1), 0.0)
    scale = rows_of(padded, plan["source"])[:, None]
    token = jnp.minimum(plan["source"] // k, n - 1)
    douts = (rows_of(grad, token) * scale).astype(x.dtype).reshape(-1, BLOCK, d)
    dact = product(douts, rows_of(turn(down), plan["owner"]))
    dhidden = swiglu_pull(hidden, dact)
    dinputs = product(dhidden, rows_of(turn(gate_up), plan["owner"])).reshape(-1, d)
    dx = sum(rows_of(dinputs, plan["slot"][:, j]).astype(jnp.float32) for j in range(k))
    inputs = rows_of(x, token).reshape(-1, BLOCK, d)
    owned = (jnp.arange(count)[:, None] == plan["owner"]).astype(x.dtype)

    def gather_blocks(blocks):
        flat = product(owned, blocks.reshape(blocks.shape[0], -1), jnp.float32)
        return flat.reshape(count, *blocks.shape[1:]).astype(x.dtype)

    dgate_up = gather_blocks(product(turn(inputs), dhidden))
    ddown = gather_blocks(product(turn(swiglu(hidden)), douts))
    return dx.astype(x.dtype), dweights, dgate_up, ddown, None


experts.defvjp(experts_fwd, experts_bwd)


def token_loss_parts(x, table, labels):
    """Mean cross-entropy in nats and its gradients by x and by the transposed table.

    x [n, d], table [vocab, d], labels [n]; works through 2,048 rows at a time.
    """
    n = x.shape[0]
    turned = turn(table)
    total, dx, dtable = 0.0, [], jnp.zeros(turned.shape, jnp.float32)
    for start in range(0, n, 2048):
        part, want = x[start : start + 2048], labels[start : start + 2048]
        logits = product(part, turned, jnp.float32)
        hit = jnp.arange(logits.shape[1])[None, :] == want[:, None]
        shifted = logits - jnp.max(logits, axis=-1, keepdims=True)
        raised = settle(jnp.exp(shifted))
        mass = jnp.sum(raised, axis=-1, keepdims=True)
        total += jnp.sum(jnp.log(mass)) - jnp.sum(jnp.where(hit, shifted, 0.0))
        error = ((raised / mass - hit) / n).astype(x.dtype)
        dx.append(product(error, table))
        dtable += product(turn(part), error, jnp.float32)
    return total / n, jnp.concatenate(dx), dtable


@jax.custom_vjp
def token_loss(x: jax.Array, table: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean cross-entropy in nats of hidden states x [n, d] against labels [n]."""
    return token_loss_parts(x, table, labels)[0]


def token_loss_fwd(x, table, labels):
    loss, dx, dtable = token_loss_parts(x, table, labels)
    return loss, (dx, dtable)


def token_loss_bwd(saved, grad):
    dx, dtable = saved
    return (dx * grad).astype(dx.dtype), (dtable.T * grad).astype(dx.dtype), None


token_loss.defvjp(token_loss_fwd, token_loss_bwd)
