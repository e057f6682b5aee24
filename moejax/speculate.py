"""Speculative decoding: draft tokens, verify them in one pass, keep what the model agrees with.

`cycle` is one program: draft, verification, acceptance and the rollback of the KV cache. Each is a
pure function of its own; fused they cost one dispatch instead of three.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from moejax.decode import step
from moejax.models.transformer import Decoder
from moejax.packing import Packed, pack
from moejax.policies.acceptance import accept_greedy, accept_sampled, final_logits, lookup
from moejax.policies.lengths import Cycle
from moejax.policies.policy import Policy
from moejax.sampling import (
    Sampling,
    mark_seen,
    nonfinite_rows,
    processed_logits,
    sample,
    sequence_keys,
    token_logprobs,
    top_logprobs,
)
from moejax.state import DecodeState, ExpertStore, PolicyMemory, StepTrace, pytree, static
from moejax.stats import DraftCost, Totals, totals_of


@pytree
class Target:
    """The model that is decoded, and what it runs with."""

    model: Decoder = static()
    policy: Policy
    params: dict
    store: ExpertStore


@pytree
class DraftModel:
    """A smaller model that drafts."""

    model: Decoder = static()
    policy: Policy | None
    params: dict
    store: ExpertStore | None


@pytree
class Speculating:
    """Everything that a cycle reads and replaces; donated to it."""

    state: DecodeState
    draft: DecodeState | None  # of a draft model: at most one token behind
    text: jax.Array  # [B, C + 1] i32, the tokens in the KV cache, then the pending one
    seen: jax.Array | None  # [B, V] bool, for the repetition penalty

    @property
    def pending(self) -> jax.Array:
        """[B, 1] i32, the token of each sequence that was made last, and not fed yet."""
        return jnp.take_along_axis(self.text, self.state.length[:, None], axis=1)


@pytree
class Drafted:
    """Proposed tokens."""

    token: jax.Array  # [B, G] i32
    count: jax.Array  # [B] i32, how many of them
    logits: jax.Array | None  # [B, G, V] f32 they were drawn from; None = they were certain
    cost: DraftCost


@pytree
class Made:
    """The tokens of a cycle, and what it took; W = G + 1."""

    token: jax.Array  # [B, W] i32
    count: jax.Array  # [B] i32, tokens made: the accepted ones and one more; 0 = finished
    logprob: jax.Array  # [B, W] f32, in the model's own distribution
    top_logprob: jax.Array  # [B, W, n] f32
    top_token: jax.Array  # [B, W, n] i32
    bad: jax.Array  # [B] bool, NaN or infinity in the logits used
    drafted: jax.Array  # [B] i32
    next_length: jax.Array  # [] i32, gamma of the next cycle
    prefetched: jax.Array  # [] i32, while drafting
    draft_stall: jax.Array  # [] i32, microseconds
    totals: Totals  # of the verification
    proposed: jax.Array  # [B, W - 1] i32, the drafts


def propose(
    target: Target,
    helper: DraftModel | None,
    run: Speculating,
    gamma: jax.Array,
    limit: jax.Array,
    sampling: Sampling,
    key: jax.Array,
    *,
    width: int,
    greedy: bool,
    record: bool = False,
) -> tuple[Speculating, Drafted]:
    """Draft up to `gamma` tokens for each sequence, and at most its `limit` [B].

    The KV caches hold more than before; lengths are as before. `width` - 1 is the most that can be
    drafted, and `greedy` says that no sequence samples; `record` keeps a self-draft's own traces.
    """
    draft = target.policy.speculation.draft
    before, batch = run.state.length, run.state.length.shape[0]
    count = jnp.clip(jnp.minimum(gamma, limit), 0, width - 1)
    empty = Drafted(
        token=jnp.zeros((batch, width - 1), jnp.int32),
        count=jnp.zeros(batch, jnp.int32),
        logits=None,
        cost=DraftCost.none(),
    )
    if width == 1:
        return run, empty
    if draft.kind == "lookup":
        token, found = lookup(run.text, before, draft.least, width - 1)
        return run, dataclasses.replace(empty, token=token, count=jnp.minimum(found, count))
    loop = _DraftLoop(target, helper, sampling, key, count, before, greedy, width, record)
    run, drafted = loop.run(run, gamma)
    state = dataclasses.replace(run.state, length=before)
    return dataclasses.replace(run, state=state), drafted


@dataclasses.dataclass(frozen=True)
class _DraftLoop:
    """Drafts token after token."""

    target: Target
    helper: DraftModel | None
    sampling: Sampling
    key: jax.Array
    count: jax.Array  # [B] i32
    before: jax.Array  # [B] i32
    greedy: bool
    width: int
    record: bool

    def run(self, run: Speculating, gamma: jax.Array) -> tuple[Speculating, Drafted]:
        """The state with drafts in its caches, and the drafts."""
        batch, vocabulary = self.before.shape[0], self.target.model.config.vocab_size
        shape = (batch, self.width - 1)
        logits = None if self.greedy else jnp.zeros((*shape, vocabulary), jnp.float32)
        pending = run.pending
        carry = (
            *(run.state, run.draft, run.seen, pending[:, 0]),
            *(jnp.zeros(shape, jnp.int32), logits, jnp.ones(batch, jnp.float32)),
            self._nothing(run),
        )
        if self.helper is None:
            carry = jax.lax.fori_loop(0, gamma, functools.partial(self._one, None), carry)
        else:
            last = jnp.take_along_axis(run.text, jnp.maximum(self.before - 1, 0)[:, None], axis=1)
            behind = (run.draft.length < self.before)[:, None]
            rows = [last, pending], [pending, jnp.full_like(pending, -1)]
            first = jnp.where(behind, *(jnp.concatenate(row, axis=1) for row in rows))
            carry = self._one(first, jnp.int32(0), carry)
            carry = jax.lax.fori_loop(1, gamma, functools.partial(self._one, None), carry)
        state, draft, _, _, token, logits, _, cost = carry
        drafted = Drafted(token=token, count=self.count, logits=logits, cost=cost)
        return dataclasses.replace(run, state=state, draft=draft), drafted

    def _nothing(self, run: Speculating) -> DraftCost:
        """No cost yet, with room for what a self-draft does if that is recorded."""
        if self.helper is not None or not self.record:
            return DraftCost.none()
        like = jax.eval_shape(lambda: self._own(run.state, run.pending, jnp.ones(len(self.count))))
        each = jax.tree.map(lambda x: jnp.zeros((self.width - 1, *x.shape), x.dtype), like[1].trace)
        return DraftCost.none(each)

    def _own(self, state: DecodeState, feed: jax.Array, chance: jax.Array) -> tuple:
        """State and output of a step of the model itself as its own drafter."""
        fixed = (self.target.model, self.target.policy, self.target.params, self.target.store)
        return step(*fixed, state, feed, prefill=False, chance=chance, scores=self.record)

    def _one(self, first: jax.Array | None, i: jax.Array, carry: tuple) -> tuple:
        state, draft, seen, token, tokens, logits, chance, cost = carry
        active = i < self.count
        feed = token[:, None] if first is None else first
        feed = jnp.where(active[:, None], feed, -1)
        if seen is not None:
            seen = mark_seen(seen, jnp.maximum(token, 0)[:, None], active[:, None])
        state, draft, found, cost = self._step(i, state, draft, feed, chance, cost)
        numbers = jnp.arange(token.shape[0], dtype=jnp.int32)
        # By cycle, not by position: a draft that follows a rejected one is drawn anew.
        key = jax.random.fold_in(jax.random.fold_in(self.key, 1), i)
        keys = sequence_keys(key, numbers, self.before)
        drawn = sample(found, self.sampling, keys, seen)
        if logits is not None:
            final = processed_logits(found, self.sampling, seen)
            logits = jax.lax.dynamic_update_slice(logits, final[:, None], (0, i, 0))
        tokens = jax.lax.dynamic_update_slice(tokens, drawn[:, None], (0, i))
        if self.target.policy.foresight.drafts:
            chance = chance * jnp.exp(token_logprobs(found, drawn))
        return state, draft, seen, drawn, tokens, logits, chance, cost

    def _step(
        self,
        i: jax.Array,
        state: DecodeState,
        draft: DecodeState | None,
        feed: jax.Array,
        chance: jax.Array,
        cost: DraftCost,
    ) -> tuple:
        """Logits [B, V] of the drafter after the tokens `feed` [B, T], and what it cost."""
        if self.helper is None:
            state, out = self._own(state, feed, chance)
            return state, draft, out.logits, cost.add(out.trace, i)
        target, helper, foresight = self.target, self.helper, self.target.policy.foresight
        how = None
        if foresight.drafts:
            how = "raw" if foresight.norm == "target" else "normed"
        fixed = (helper.model, helper.policy, helper.params, helper.store)
        draft, out = step(*fixed, draft, feed, prefill=False, hidden=how)
        if foresight.drafts:
            batch, length = feed.shape
            last = (feed >= 0).sum(axis=1) - 1
            valid = (jnp.arange(length) == last[:, None]).reshape(-1)
            spread = jnp.broadcast_to(chance[:, None], feed.shape).reshape(-1)
            state, count = target.model.apply(
                {"params": target.params},
                *(target.policy, target.store, state, out.hidden, valid, spread),
                method="foresee",
            )
            cost = dataclasses.replace(cost, prefetched=cost.prefetched + count)
        return state, draft, out.logits, cost


def verify(
    target: Target,
    run: Speculating,
    drafted: Drafted,
    active: jax.Array,
    *,
    scores: bool = False,
) -> tuple[Speculating, jax.Array, Any]:
    """Feed the pending token and the drafts of `active` [B] sequences through the model.

    Returns:
        The state, whose lengths count all of them, logits [B, W, V] after each, and the trace.
    """
    places = jnp.arange(drafted.token.shape[1])
    tokens = jnp.where(places < drafted.count[:, None], drafted.token, -1)
    tokens = jnp.where(active[:, None], jnp.concatenate([run.pending, tokens], axis=1), -1)
    fixed = (target.model, target.policy, target.params, target.store)
    state, out = step(*fixed, run.state, tokens, all_logits=True, prefill=False, scores=scores)
    return dataclasses.replace(run, state=state), out.logits, out.trace


@functools.partial(
    jax.jit, static_argnames=("width", "greedy", "top", "record", "keep"), donate_argnames="run"
)
def cycle(
    target: Target,
    helper: DraftModel | None,
    run: Speculating,
    gamma: jax.Array,
    limit: jax.Array,
    active: jax.Array,
    sampling: Sampling,
    key: jax.Array,
    *,
    width: int,
    greedy: bool,
    top: int = 0,
    record: bool = False,
    keep: bool = False,
) -> tuple[Speculating, Packed, tuple[StepTrace, StepTrace | None] | None, jax.Array | None]:
    """Draft `gamma` tokens, verify them, and take at least one for each of the `active` [B].

    Greedy tokens are those of plain decoding, bit for bit where a pass over several tokens equals
    single steps; sampled ones have its distribution. Donates `run`.

    Args:
        gamma: [] i32, at most `width` - 1.
        limit: [B] i32, drafts that a sequence has room for.
        width: tokens of a sequence that are verified at once, padding included.
        greedy: no sequence samples.
        top: log-probabilities to report beside each token's.
        record: return the traces of the verification and of a self-draft, with router scores.
        keep: return the logits.

    Returns:
        The run, a packed `Made`, traces (the second [G, ...] or None), logits [B, W, V] or None.
    """
    before, pending = run.state.length, run.pending
    limit = jnp.where(active, limit, 0)
    options = {"width": width, "greedy": greedy, "record": record}
    run, drafted = propose(target, helper, run, gamma, limit, sampling, key, **options)
    run, logits, trace = verify(target, run, drafted, active, scores=record)
    fed = jnp.concatenate([pending, drafted.token], axis=1)
    accepted, token = _accepted(
        logits, fed, drafted, run.seen, sampling, key, before, greedy=greedy
    )
    failure = jnp.maximum(trace.failure.max(), drafted.cost.failure)
    count = jnp.where(active & (failure == 0), accepted + 1, 0)
    memory, speculation = run.state.policy, target.policy.speculation
    about = Cycle(
        gamma=gamma,
        drafted=drafted.count,
        accepted=accepted,
        active=active,
        missed=(trace.needed - trace.hits).sum(),
        shadow=_shadow(target, run.text, before, token, width),
    )
    remembered = speculation.observe(memory.speculation, about)
    memory = dataclasses.replace(memory, speculation=remembered)
    run = settled(run, memory, before, fed, token, count, drafted.count)
    totals = dataclasses.replace(totals_of(trace), failure=failure)
    values, ids = top_logprobs(logits, top)
    used = jnp.arange(width) < count[:, None]
    made = Made(
        token=token,
        count=count,
        logprob=jax.vmap(token_logprobs)(logits, token),
        top_logprob=values,
        top_token=ids,
        bad=(jax.vmap(nonfinite_rows)(logits) & used).any(axis=1),
        drafted=drafted.count,
        next_length=speculation.length(remembered),
        prefetched=drafted.cost.prefetched,
        draft_stall=drafted.cost.stall,
        totals=totals,
        proposed=drafted.token,
    )
    traces = (trace, drafted.cost.steps) if record else None
    return run, pack(made), traces, logits if keep else None


def settled(
    run: Speculating,
    memory: PolicyMemory,
    before: jax.Array,
    fed: jax.Array,
    token: jax.Array,
    count: jax.Array,
    drafted: jax.Array,
) -> Speculating:
    """The run with `count` [B] of the tokens [B, W] taken: caches rolled back, text and mask on."""
    place = jnp.arange(token.shape[1])
    taken = place < count[:, None]
    state = dataclasses.replace(run.state, length=before + count, policy=memory)
    draft, seen = run.draft, run.seen
    if draft is not None:
        held = jnp.minimum(draft.length, before + jnp.minimum(count, drafted))
        draft = dataclasses.replace(draft, length=held)
    if seen is not None:
        seen = mark_seen(seen, fed, taken)
    rows = jnp.arange(token.shape[0])[:, None]
    place = jnp.where(taken, before[:, None] + 1 + place, run.text.shape[1])
    text = run.text.at[rows, place].set(token, mode="drop")
    return Speculating(state=state, draft=draft, text=text, seen=seen)


def _accepted(
    logits: jax.Array,
    fed: jax.Array,
    drafted: Drafted,
    seen: jax.Array | None,
    sampling: Sampling,
    key: jax.Array,
    before: jax.Array,
    *,
    greedy: bool,
) -> tuple[jax.Array, jax.Array]:
    """Accepted drafts [B], and the tokens made [B, W]: those, and one more."""
    places, draft, count = jnp.arange(fed.shape[1]), drafted.token, drafted.count
    known = jnp.where(places <= count[:, None], fed, -1)
    plain = greedy and seen is None
    final = logits if plain else final_logits(logits, known, sampling, seen)
    if greedy:
        accepted, own = accept_greedy(final, draft, count)
    else:
        accepted, own = accept_sampled(final, draft, count, drafted.logits, key, before)
    shifted = jnp.concatenate([draft, own[:, None]], axis=1)
    return accepted, jnp.where(places == accepted[:, None], own[:, None], shifted)


def _shadow(
    target: Target, text: jax.Array, before: jax.Array, token: jax.Array, width: int
) -> jax.Array:
    """[B] i32 whether a free draft would have been right in a plain step: 1, 0, or -1 = unknown."""
    draft = target.policy.speculation.draft
    if width > 1 or draft.kind != "lookup":
        return jnp.full(before.shape, -1, jnp.int32)
    proposed, count = lookup(text, before, draft.least, 1)
    right = proposed[:, 0] == token[:, 0]
    return jnp.where(count > 0, right, -1).astype(jnp.int32)
