"""The loop over speculative cycles: how wide, how long, and what becomes of the tokens."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from moejax.decode import chunks, decode_step
from moejax.errors import InputError, LinkError, PolicyError
from moejax.models.transformer import Decoder
from moejax.policies.cycle_costs import LiveCycles
from moejax.policies.policy import Policy
from moejax.probe import probe
from moejax.speculate import DraftModel, Made, Speculating, Target, cycle
from moejax.state import DecodeState, ExpertStore, StepTrace
from moejax.stats import Stats, Totals

RENEWED = {True: 16, False: 32}  # drafting or plain cycles from one renewal of costs to the next


@dataclasses.dataclass(frozen=True)
class Helper:
    """A draft model with what it runs with, and how its states begin."""

    model: Decoder
    policy: Policy | None
    params: dict
    store: ExpertStore | None
    init_state: Any  # (batch, context) -> DecodeState

    @property
    def fixed(self) -> DraftModel:
        """What a cycle takes."""
        return DraftModel(
            model=self.model, policy=self.policy, params=self.params, store=self.store
        )

    def check(self, target: Decoder, policy: Policy) -> None:
        """Raise PolicyError unless it can draft for the target under the policy."""
        own, other = self.model.config, target.config
        if own.vocab_size != other.vocab_size:
            raise PolicyError(
                f"the draft model has {own.vocab_size} tokens and the model {other.vocab_size}: "
                "they must share one vocabulary"
            )
        same = (own.num_layers, own.width) == (other.num_layers, other.width)
        if policy.foresight.drafts and not same:
            raise PolicyError(
                f"the draft model has {own.num_layers} layers of width {own.width} and the model "
                f"{other.num_layers} of {other.width}: to predict its experts they must be alike"
            )


@dataclasses.dataclass
class BatchCosts:
    """What cycles of one batch size were found to cost."""

    costs: LiveCycles = dataclasses.field(default_factory=LiveCycles)
    timed: list[tuple] = dataclasses.field(default_factory=list)  # cycles of no costs yet
    renewed: int = 0  # cycles that the costs are of

    @property
    def plain_ms(self) -> float | None:
        """Milliseconds of a plain step; None until there are costs."""
        return self.costs.plain_ms if self.renewed else None


@dataclasses.dataclass
class Live:
    """What cycles were found to cost; goes on from one run of a runtime to the next."""

    by_batch: dict[int, BatchCosts] = dataclasses.field(default_factory=dict)
    latest: BatchCosts = dataclasses.field(default_factory=BatchCosts)  # of the run that began last
    compiled: set[tuple] = dataclasses.field(default_factory=set)  # programs that have run

    def begin(self, batch: int) -> BatchCosts:
        """What a run of so many sequences knows and learns."""
        self.latest = self.by_batch.setdefault(batch, BatchCosts())
        return self.latest


def widths(max_length: int) -> list[int]:
    """Tokens verified at once, for which programs are made: drafts of 0, 1, 2, 4, ... tokens."""
    found, drafts = [1], 1
    while drafts < max_length:
        found.append(drafts + 1)
        drafts *= 2
    return [*found, max_length + 1]


def width_for(gamma: int, max_length: int) -> int:
    """The least of the `widths` that has room for gamma drafts and the pending token."""
    return next(width for width in widths(max_length) if width > gamma)


class Cycles:
    """One speculative run: what changes from cycle to cycle."""

    def __init__(
        self,
        target: Target,
        helper: Helper | None,
        stats: Stats,
        sampling: Any,
        key: jax.Array,
        top: int = 0,
        record: bool = False,
        live: Live | None = None,
    ):
        """What a run needs; with `record`, `trace` and `drafts` are those of the latest cycle."""
        speculation = target.policy.speculation
        if speculation.draft.kind == "model":
            if helper is None:
                raise PolicyError("this policy drafts with another model: give one as `draft`")
            helper.check(target.model, target.policy)
        self.target, self.stats, self.key = target, stats, key
        self.sampling = jax.device_put(sampling)
        self.helper = helper if speculation.draft.kind == "model" else None
        self.options = {"top": top, "record": record}
        self.greedy = bool(np.all(np.asarray(sampling.temperature) == 0))
        self.live: Live | None = None
        self._learned: BatchCosts | None = None  # what that has of this run's batch size
        # Under a lossy router the length of a draft decides what becomes resident: no clocks there.
        lengths = getattr(speculation, "lengths", None)
        if hasattr(lengths, "with_costs") and target.policy.exact:
            self.live = live or Live()
        self.run: Speculating | None = None
        self.trace: StepTrace | None = None
        self.drafts: StepTrace | None = None  # [G, ...] of a self-draft's steps
        self.gamma = self.drafted = 0  # of the next cycle, and of the latest
        self._program: tuple | None = None  # what the latest one was compiled for
        self._looked: tuple | None = None  # lengths before the latest cycle, and its logits

    def begin(
        self, state: DecodeState, texts: Sequence[np.ndarray], seen: jax.Array | None
    ) -> None:
        """Take over after the prompts: the texts end with what the KV caches hold, and one more.

        Raises:
            InputError: a draft model was not given what the KV cache holds.
        """
        if self.live is not None:
            self._learned = self.live.begin(len(texts))
            if self._learned.renewed:
                self._renew_costs()
        room = jax.tree.leaves(state.kv)[0].shape[2] + 1
        text = np.full((len(texts), room), -1, np.int32)
        for row, tokens, length in zip(text, texts, np.asarray(state.length), strict=True):
            start = length + 1 - len(tokens)
            if start < 0 or not len(tokens):
                raise InputError(f"{len(tokens)} tokens of text for {length} in the KV cache")
            row[start : length + 1] = tokens
        draft = None
        if self.helper is not None:
            if (text[:, 0] < 0).any():
                raise InputError("a draft model needs the whole text: give `history`, too")
            draft = self.helper.init_state(len(texts), room - 1)
            # Never an empty one: there is at least one token to feed later.
            draft = self._fed(draft, [tokens[:-1] for tokens in texts])
        policy = self.target.policy.speculation
        self.gamma = int(_next_length(policy, state.policy.speculation))
        self.run = Speculating(
            state=state,
            draft=draft,
            text=jax.device_put(text, state.length.sharding),
            seen=seen,
        )

    def _fed(self, draft: DecodeState, rows: Sequence[np.ndarray]) -> DecodeState:
        helper = self.helper
        for tokens in chunks([np.asarray(row, np.int32) for row in rows]):
            fixed = (helper.model, helper.policy, helper.params, helper.store)
            draft, _ = decode_step(*fixed, draft, tokens, prefill=True)
        return draft

    def _caught_up(self) -> None:
        """Feed the draft model what plain steps made since it last drafted."""
        lengths = np.asarray(self.run.state.length)
        held = np.asarray(self.run.draft.length)
        if (lengths - held <= 1).all():
            return
        text = np.asarray(self.run.text)
        rows = [text[b, held[b] : lengths[b]] for b in range(len(lengths))]
        self.run = dataclasses.replace(self.run, draft=self._fed(self.run.draft, rows))

    def step(self, active: np.ndarray, room: np.ndarray, *, looked: bool = False) -> Made:
        """One cycle; `room` [B] is how many tokens each sequence may still make. On the host.

        Args:
            looked: `probe` follows; such cycles are all of the greatest width, in one program.

        Raises:
            LinkError: expert records did not arrive; no token was made.
        """
        policy = self.target.policy.speculation
        gamma = max(min(self.gamma, policy.max_length, int((active * room).max()) - 1), 0)
        width = policy.max_length + 1 if looked else width_for(gamma, policy.max_length)
        before = np.array(self.run.state.length) if looked else None
        if gamma and self.helper is not None:
            self._caught_up()
        self.run, packed, recorded, logits = cycle(
            self.target,
            self.helper and self.helper.fixed,
            self.run,
            np.int32(gamma),
            (room - 1).astype(np.int32, copy=False),
            active,
            self.sampling,
            self.key,
            width=width,
            greedy=self.greedy,
            keep=looked,
            **self.options,
        )
        self.trace, self.drafts = recorded or (None, None)
        self._looked = (before, logits)
        made = packed.unpacked()
        if made.totals.failure:
            raise LinkError(f"status {int(made.totals.failure)}")
        self.gamma, self.drafted = int(made.next_length), gamma
        self._program = (len(active), width, self.greedy, *self.options.values())
        return made

    def probe(self) -> tuple[np.ndarray, Totals]:
        """How far [B] the latest cycle, which was `looked` at, drifted, and what finding out took.

        Raises:
            LinkError: expert records did not arrive.
        """
        before, logits = self._looked
        self._looked = None
        self.run, nats, totals = probe(self.target, self.run, before, logits)
        nats, totals = jax.device_get((nats, totals))
        if totals.failure:
            raise LinkError(f"status {int(totals.failure)}")
        return nats, totals

    def compile(self, batch: int) -> None:
        """Run the program of every width once, on sequences of one token."""
        for width in widths(self.target.policy.speculation.max_length):
            self.gamma = width - 1
            self.step(np.ones(batch, bool), np.full(batch, width))
            if self.live is not None:
                self.live.compiled.add(self._program)

    def learn(self, made: Made, seconds: float) -> None:
        """Note how long the latest cycle took, with all that its tokens took on the host."""
        if self.live is None:
            return
        if self._program not in self.live.compiled:  # it may have been compiled just now
            self.live.compiled.add(self._program)
            return
        # What follows takes 0.3 ms, and far more than its share in each cycle: at first always,
        # later seldom.
        known, timed = self._learned, self._learned.timed
        timed.append((self.drafted, seconds, made.totals))
        if len(timed) < min(known.renewed, RENEWED[self.drafted > 0]):
            return
        for drafted, took, totals in timed:
            missed = int(totals.needed) - int(totals.hits)
            known.costs.add(drafted, took, drafted, drafted + 1, missed)
        known.renewed += len(timed)
        timed.clear()
        self._renew_costs()

    def _renew_costs(self) -> None:
        """The policy with the costs of the latest cycles."""
        speculation = self.target.policy.speculation
        costs = jax.device_put(self._learned.costs.costs())  # once, not in every cycle
        lengths = speculation.lengths.with_costs(costs)
        speculation = dataclasses.replace(speculation, lengths=lengths)
        policy = dataclasses.replace(self.target.policy, speculation=speculation)
        self.target = dataclasses.replace(self.target, policy=policy)


@jax.jit
def _next_length(policy: Any, memory: Any) -> jax.Array:
    return policy.length(memory)


def tokens_of(
    made: Made, finished: np.ndarray, room: np.ndarray, stop_ids: frozenset[int]
) -> Iterator[tuple[int, int]]:
    """(sequence, place in `made`) of the tokens that count, up to a stop token of each sequence."""
    for b in np.flatnonzero(~finished):
        for i in range(min(int(made.count[b]), int(room[b]))):
            yield int(b), i
            if int(made.token[b, i]) in stop_ids:
                break
