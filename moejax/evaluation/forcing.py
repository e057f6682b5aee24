"""Text that is given, scored through the engine: in one pass, or token by token as if decoded."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moejax import decode
from moejax.drawn import NONFINITE
from moejax.errors import InputError, NonFiniteError, PolicyError
from moejax.models.transformer import Decoder
from moejax.policies.policy import Policy, policy
from moejax.sampling import divergence
from moejax.state import DecodeState, ExpertStore, StepOutput, StepTrace, pytree

SEGMENT = 64  # tokens per sequence of one program
LEAST_CONTEXT = 256  # KV caches are made in powers of two of this, so that few programs are made
COUNTED = ("replaced", "replaced_mass", "needed", "hits")


@pytree
class Forced:
    """Per position of B sequences of T tokens: of the token that comes next, and of the step."""

    logprob: jax.Array  # [B, T] f32, nats
    greedy: jax.Array  # [B, T] bool, it is the likeliest
    exact_logprob: jax.Array  # [B, T] f32, under the model's own routing
    flipped: jax.Array  # [B, T] bool, another token is the likeliest under it
    divergence: jax.Array  # [B, T] f32, KL in nats of the run from that of the model's own routing
    replaced: jax.Array  # [B, T] f32, picks of the model's own router that were not made
    replaced_mass: jax.Array  # [B, T] f32, router weight that they lost, summed over layers
    needed: jax.Array  # [B, T] f32, expert uses
    hits: jax.Array  # [B, T] f32, of those, resident
    last: jax.Array  # [B, V] f32, log-probabilities after each sequence's last token
    exact_last: jax.Array  # [B, V] f32


def score(runtime: Any, sequences: list[np.ndarray], *, in_steps: bool) -> list[Forced]:
    """Feed B sequences of token ids at once; a `Forced` of each, on the host, without B.

    Position t is about token t + 1; that of the last token is not in the sequence, and its
    `logprob`, `greedy` and `exact_logprob` mean nothing.

    Args:
        in_steps: one token per step, by the runtime's policy, and all sequences on one cache, so
            that B is the batch of the run that is simulated; beside it the model's own routing,
            on a KV cache of its own. Otherwise in passes, by a policy that is exact.

    Raises:
        InputError: a sequence that is empty, too long or has ids out of range; steps of a model
            without experts, or of a runtime that is not virtual.
        NonFiniteError: NaN or infinity in the logits.
        PolicyError: steps of a lossy policy that drafts: its passes are others.
    """
    vocabulary = runtime.config.vocab_size
    rows = [decode.token_ids(row, vocabulary) for row in sequences]
    if in_steps and (runtime.policy is None or not runtime.virtual):
        raise InputError("steps are scored with the weights of experts in place: set virtual=True")
    if in_steps and runtime.policy.speculation.max_length and not runtime.policy.exact:
        raise PolicyError(
            "a lossy policy that drafts cannot be scored: text is fed token by token, and its "
            "passes are longer; give it gamma=0, or measure it with moejax.loss.measure"
        )
    if not rows or not all(0 < len(row) <= runtime.context for row in rows):
        raise InputError(
            f"sequences must have 1 to {runtime.context} tokens: raise --context (context)"
        )
    longest = max(map(len, rows))
    doublings = ((longest - 1) // LEAST_CONTEXT).bit_length()
    context = min(LEAST_CONTEXT << doublings, runtime.context)
    runtime = dataclasses.replace(runtime, residency_file=None)
    own = _own(runtime)
    exact = own.init_state(len(rows), context=context)
    fixed = (runtime.model, own.policy, runtime.params, runtime.store)
    steps = runtime.init_state(len(rows), context=context) if in_steps else None
    parts, lasts = [], []
    for tokens, wanted in _segments(rows):
        if in_steps:
            exact, steps, found = _stepped(
                *fixed[:2], runtime.policy, *fixed[2:], exact, steps, tokens, wanted
            )
        else:
            exact, found, out = _passed(*fixed, exact, tokens, wanted)
            decode.check_arrived(runtime.store, out)
        found = jax.device_get(found)
        lasts.append((found.last, found.exact_last))
        parts.append(dataclasses.replace(found, last=None, exact_last=None))
    return [_joined(parts, lasts, b, len(row)) for b, row in enumerate(rows)]


def _own(runtime: Any) -> Any:
    """The runtime under the model's own routing; with weights in place, everything is resident."""
    if not runtime.virtual or runtime.policy is None:
        return runtime
    total = runtime.config.num_moe_layers * runtime.config.num_experts
    return dataclasses.replace(runtime, policy=policy("lru"), slots=total)


def _segments(rows: list[np.ndarray]) -> Any:
    """(tokens, wanted) [B, SEGMENT] each, -1 = none."""
    wanted = [np.append(row[1:], np.int32(-1)) for row in rows]
    pairs = (decode.chunks(rows, SEGMENT), decode.chunks(wanted, SEGMENT))
    return zip(*pairs, strict=True)


def _joined(parts: list[Forced], lasts: list[tuple], b: int, length: int) -> Forced:
    where = (length - 1) // SEGMENT
    joined = jax.tree.map(lambda *xs: np.concatenate([x[b] for x in xs])[:length], *parts)
    last, exact_last = (row[b] for row in lasts[where])
    if not (np.isfinite(last).all() and np.isfinite(joined.logprob[:-1]).all()):
        raise NonFiniteError(NONFINITE)
    return dataclasses.replace(joined, last=last, exact_last=exact_last)


@functools.partial(jax.jit, static_argnames=("model",), donate_argnames=("state",))
def _passed(
    model: Decoder,
    own: Policy | None,
    params: dict,
    store: ExpertStore | None,
    state: DecodeState,
    tokens: jax.Array,
    wanted: jax.Array,
) -> tuple[DecodeState, Forced, StepOutput]:
    """A segment [B, T] in one pass; also the step's output, without its logits."""
    state, out = decode.step(model, own, params, store, state, tokens, all_logits=True)
    logprob, greedy = _of_next(out.logits, wanted)
    none = jnp.zeros(tokens.shape, jnp.float32)
    last = _last(out.logits, tokens)
    counts = dict.fromkeys(COUNTED, none)
    found = Forced(
        logprob=logprob,
        greedy=greedy,
        exact_logprob=logprob,
        flipped=none > 0,
        divergence=none,
        last=last,
        exact_last=last,
        **counts,
    )
    return state, found, dataclasses.replace(out, logits=None)


@functools.partial(jax.jit, static_argnames=("model",), donate_argnames=("exact", "state"))
def _stepped(
    model: Decoder,
    own: Policy,
    policy: Policy,
    params: dict,
    store: ExpertStore,
    exact: DecodeState,
    state: DecodeState,
    tokens: jax.Array,
    wanted: jax.Array,
) -> tuple[DecodeState, DecodeState, Forced]:
    """A segment [B, T], one token per step, beside a pass with the model's own routing."""
    exact, out = decode.step(model, own, params, store, exact, tokens, all_logits=True)
    references = out.logits

    def one(state: DecodeState, given: tuple) -> tuple[DecodeState, tuple]:
        token, following, reference = given
        state, out = decode.step(model, policy, params, store, state, token[:, None])
        logprob, greedy = _of_next(out.logits, following)
        flipped = out.logits.argmax(-1) != reference.argmax(-1)
        kl = divergence(reference, out.logits)
        return state, (out.logits, logprob, greedy, flipped, kl, _counts(out.trace, token))

    by_step = (tokens.T, wanted.T, references.swapaxes(0, 1))
    state, (logits, *found) = jax.lax.scan(one, state, by_step)
    logprob, greedy, flipped, kl, counts = jax.tree.map(lambda x: x.T, found)
    found = Forced(
        logprob=logprob,
        greedy=greedy,
        exact_logprob=_of_next(references, wanted)[0],
        flipped=flipped,
        divergence=kl,
        last=_last(logits.swapaxes(0, 1), tokens),
        exact_last=_last(references, tokens),
        **counts,
    )
    return exact, state, found


def _counts(trace: StepTrace, token: jax.Array) -> dict[str, jax.Array]:
    """Sums over layers, shared evenly among the sequences [B] that had a token."""
    share = (token >= 0) / jnp.maximum((token >= 0).sum(), 1)
    return {name: getattr(trace, name).sum() * share for name in COUNTED}


def _of_next(logits: jax.Array, wanted: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Log-probability of tokens [...] under logits [..., V], and whether they are the likeliest."""
    at = jnp.maximum(wanted, 0)[..., None]
    chosen = jnp.take_along_axis(logits, at, axis=-1)[..., 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1), logits.argmax(-1) == wanted


def _last(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """Log-probabilities [B, V] at each row's last token."""
    at = jnp.maximum((tokens >= 0).sum(axis=1) - 1, 0)
    row = jnp.take_along_axis(logits, at[:, None, None], axis=1)[:, 0]
    return jax.nn.log_softmax(row)
