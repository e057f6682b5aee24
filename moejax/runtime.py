"""Runtime: a loaded model with its budget and policy, for people and scripts."""

import dataclasses
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moejax import decode, devices, warm
from moejax.config import ModelConfig
from moejax.cycles import Helper, Live
from moejax.drawn import Token
from moejax.errors import BudgetError, InputError, TokenizerError
from moejax.generate import Engine
from moejax.kernels.host import Records
from moejax.kernels.transport import Store
from moejax.live import DriftBudget
from moejax.models.transformer import Decoder
from moejax.policies.policy import Policy
from moejax.sampling import Sampling, mark_seen, sampling_from
from moejax.state import DecodeState, ExpertStore
from moejax.stats import Stats
from moejax.text import StopStrings, StreamDecoder, Tokenizer, eos_ids_from


@dataclasses.dataclass(frozen=True)
class Piece:
    """Some newly certain text of one sequence."""

    sequence: int
    text: str
    token: Token
    finish_reason: str | None  # "eos", "stop" or "length" with a sequence's last piece


@dataclasses.dataclass(frozen=True)
class Completion:
    """What was generated after one prompt."""

    text: str
    tokens: tuple[Token, ...]
    finish_reason: str


@dataclasses.dataclass
class Runtime:
    """A loaded model with its budget and policy."""

    config: ModelConfig
    model: Decoder
    params: dict
    store: ExpertStore | None
    policy: Policy | None
    slots: int  # S: experts that fit the device at once
    context: int
    generation_config: dict[str, Any]
    directory: pathlib.Path
    virtual: bool = False
    per_layer: bool = False  # divide the slots evenly among the layers instead of pooling them
    max_batch: int | None = None  # sequences that the memory budget counted, None = no limit
    link: Store | None = None  # what experts are moved over; open as long as the runtime lives
    hosted: Records | None = None  # what the host computes from beside a GPU; likewise
    tier: str | None = None  # the link's name
    residency_file: pathlib.Path | None = None  # for warm starts: read if it exists, then written
    draft: "Runtime | None" = None  # the model that drafts, for policies that want one
    policy_name: str | None = None  # as `load` was given it, if not as a `Policy`
    stats: Stats = dataclasses.field(init=False)
    _live: Live = dataclasses.field(default_factory=Live, init=False, repr=False)
    _tokenizer: Tokenizer | None = dataclasses.field(default=None, init=False, repr=False)

    def __post_init__(self):
        self.stats = self._fresh_stats()

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer; TokenizerError if it has none."""
        if self._tokenizer is None:
            self._tokenizer = Tokenizer.load(self.directory)
        return self._tokenizer

    @property
    def engine(self) -> Engine:
        """The fixed arguments of the step, with the loops over it."""
        fixed = (self.model, self.policy, self.params, self.store)
        helper = self.draft and self.draft.as_helper()
        live = {"helper": helper, "live": self._live}
        return Engine(*fixed, context=self.context, link=self.link, **live)

    def as_helper(self) -> Helper:
        """This model as the one that drafts for another."""

        def init_state(batch: int, context: int) -> DecodeState:
            return self.init_state(batch, context=context)

        return Helper(self.model, self.policy, self.params, self.store, init_state)

    @property
    def slots_in_use(self) -> int:
        """Slots that the policy's capacity leaves in use."""
        if self.policy is None:
            return 0
        return min(self.slots, max(int(self.policy.capacity), 1))

    def plain_step_ms(self, stats: Stats | None = None) -> float | None:
        """A plain step's milliseconds, as a run that chooses its draft lengths timed it.

        None under other policies, and where hardly any was timed.

        Args:
            stats: of the run; None = the latest of this runtime.
        """
        enough = (stats or self.stats).draft_lengths.get(0, 0) > 1  # the first may be compiling
        return self._live.latest.plain_ms if enough else None

    @property
    def stop_ids(self) -> frozenset[int]:
        """Tokens that end a sequence, from generation_config.json, else config.json."""
        return frozenset(eos_ids_from(self.generation_config) or self.config.eos_ids)

    def init_state(self, batch: int = 1, *, context: int | None = None) -> DecodeState:
        """A fresh state for `decode_step`: nothing in the KV cache, no expert fetched yet.

        Raises:
            BudgetError: more sequences than `load` counted in its memory budget.
        """
        if self.max_batch is not None and batch > self.max_batch:
            raise BudgetError(
                f"a batch of {batch} exceeds the memory budget, which counted {self.max_batch}: "
                f"load with batch={batch}"
            )
        state = decode.init_state(
            self.model,
            self.policy,
            self.store,
            slots=self.slots,
            batch=batch,
            context=self.context if context is None else context,
            virtual=self.virtual,
            per_layer=self.per_layer,
        )
        if self.residency_file is not None and self.residency_file.exists():
            state = warm.restore(self.residency_file, self, state)
        return state

    def decode_step(
        self, state: DecodeState, tokens: jax.Array, **options: Any
    ) -> tuple[DecodeState, Any]:
        """`moejax.decode_step` with this model's fixed arguments; donates `state`."""
        return decode.decode_step(
            self.model, self.policy, self.params, self.store, state, tokens, **options
        )

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        """Logits [B, T, V] f32 of token ids [B, T], through the same layers and policy.

        Rows may be padded at the end with -1; logits there mean nothing.

        Raises:
            InputError: ids out of range, or more tokens than the context.
            LinkError: expert records did not arrive.
        """
        tokens = np.asarray(tokens)
        if tokens.ndim != 2 or not np.issubdtype(tokens.dtype, np.integer):
            raise InputError(f"tokens must be integers [B, T], not {tokens.dtype} {tokens.shape}")
        rows = [_trimmed(row, self.config.vocab_size) for row in tokens]
        state = self.init_state(max(len(rows), 1))
        decode.check_room(state, [len(r) for r in rows], context=self.context)
        parts = []
        for chunk in decode.chunks(rows):
            state, out = self.decode_step(state, chunk, all_logits=True)
            decode.check_arrived(self.store, out)
            parts.append(np.asarray(out.logits))
        logits = np.concatenate(parts, axis=1)
        short = tokens.shape[1] - logits.shape[1]
        if short > 0:
            logits = np.pad(logits, ((0, 0), (0, short), (0, 0)))
        return logits[:, : tokens.shape[1]]

    def generate(
        self,
        prompts: str | Sequence[int] | Sequence[str | Sequence[int]],
        max_new_tokens: int = 128,
        sampling: Sampling | dict[str, Any] | None = None,
        **options: Any,
    ) -> list[Completion]:
        """Complete prompts (texts or token ids) as one batch; options as in `stream`."""
        prompts = _as_list(prompts)
        texts, tokens = [""] * len(prompts), [[] for _ in prompts]
        reasons = ["length"] * len(prompts)
        for piece in self.stream(prompts, max_new_tokens, sampling, **options):
            texts[piece.sequence] += piece.text
            tokens[piece.sequence].append(piece.token)
            reasons[piece.sequence] = piece.finish_reason or reasons[piece.sequence]
        return [Completion(t, tuple(k), r) for t, k, r in zip(texts, tokens, reasons, strict=True)]

    def stream(
        self,
        prompts: str | Sequence[int] | Sequence[str | Sequence[int]],
        max_new_tokens: int = 128,
        sampling: Sampling | dict[str, Any] | None = None,
        *,
        stop: str | Sequence[str] = (),
        seed: int = 0,
        logprobs: int = 0,
        drift: DriftBudget | None = None,
    ) -> Iterator[Piece]:
        """Yield text as it becomes certain, never half a character; `stats` is filled on the way.

        Args:
            prompts: one text or list of token ids, or a list of them (a batch).
            sampling: a Sampling, or overrides of the model's generation_config.json.
            stop: strings that end a sequence and are not part of the text.
            logprobs: how many likeliest tokens to report beside each chosen one.
            drift: how far a lossy policy may drift from the model's own routing; steers its alpha.

        Raises:
            InputError: bad prompts or options.
            PolicyError: `drift` for a policy without an alpha.
            NonFiniteError: NaN or infinity in the logits.
        """
        ids = [self._ids(p) for p in _as_list(prompts)]
        state = self.init_state(len(ids))
        options = {"stop": stop, "seed": seed, "logprobs": logprobs, "drift": drift}
        for _, piece in self.pieces(state, ids, max_new_tokens, sampling, **options):
            yield piece

    def pieces(
        self,
        state: DecodeState,
        ids: list[np.ndarray],
        max_new_tokens: int,
        sampling: Sampling | dict[str, Any] | None,
        *,
        stop: str | Sequence[str] = (),
        seed: int = 0,
        logprobs: int = 0,
        drift: DriftBudget | None = None,
        history: list[np.ndarray] | None = None,
    ) -> Iterator[tuple[DecodeState, Piece]]:
        """`stream` on a state of the caller's: yields the state with each piece; donates it.

        Starts `stats` anew.

        Args:
            history: tokens already in the KV cache, for the repetition penalty.
        """
        sampling = self._sampling(sampling)
        self.stats = self._fresh_stats()
        stops = [StopStrings(stop) for _ in ids]
        decoders = [StreamDecoder(self.tokenizer) for _ in ids] if self._has_text(stop) else None
        finished, emitted = np.zeros(len(ids), bool), np.zeros(len(ids), int)
        steps = dataclasses.replace(self.engine, drift=drift).tokens(
            state,
            ids,
            sampling=sampling,
            seed=seed,
            max_new_tokens=max_new_tokens,
            stop_ids=self.stop_ids,
            stats=self.stats,
            finished=finished,
            seen=self._seen(sampling, len(ids), history),
            top=logprobs,
            history=history,
        )
        for state, tokens in steps:
            for token in tokens:
                b = token.sequence
                if finished[b]:  # by a token before it, of the same step
                    continue
                emitted[b] += 1
                reason = "eos" if token.id in self.stop_ids else None
                text = ""
                if decoders is not None:
                    text = "" if reason else decoders[b].push(token.id)
                    ended = reason or emitted[b] == max_new_tokens
                    text, stopped = stops[b].push(text + (decoders[b].flush() if ended else ""))
                    if ended and not stopped:
                        text += stops[b].flush()
                    reason = "stop" if stopped else reason
                finished[b] |= reason is not None
                reason = reason or ("length" if emitted[b] == max_new_tokens else None)
                yield state, Piece(b, text, token, reason)
        if self.residency_file is not None and state.experts is not None:
            warm.save(self.residency_file, self, state)

    def warm_up(
        self, batch: int = 1, *, sampling: Any = None, tokens: int = 2, logprobs: int = 0
    ) -> None:
        """Compile (or load from the compilation cache) what generation needs."""
        sampling = self._sampling(sampling)
        steps = self.engine.tokens(
            self.init_state(batch),
            [np.zeros(1, np.int32)] * batch,
            sampling=sampling,
            seed=0,
            max_new_tokens=tokens,
            stop_ids=frozenset(),  # a stop token would end it before the decode step is compiled
            stats=self._fresh_stats(),
            finished=np.zeros(batch, bool),
            seen=self._seen(sampling, batch, None),
            top=logprobs,
        )
        for _ in steps:
            pass
        if self.policy is not None and self.policy.speculation.max_length:
            seen = self._seen(sampling, batch, None)
            self.engine.compile_cycles(self.init_state(batch), sampling, seen, logprobs)

    @property
    def _rows_alike(self) -> bool:
        """Whether a pass over several tokens has the bits of single steps."""
        return self.model.kernels == "native" and not self.config.latent

    def _fresh_stats(self) -> Stats:
        if self.store is None:
            return Stats(record_bytes=0, label=devices.exactness())
        total = self.config.num_moe_layers * self.config.num_experts
        everything = self.slots == total and self.link is None
        label = devices.exactness()
        if self.policy.speculation.max_length and not self._rows_alike:
            label = "faithful"
        return Stats(
            record_bytes=self.store.layout.stride,
            label=label if self.policy.exact else "lossy",
            virtual=self.virtual or everything,
        )

    def _sampling(self, sampling: Sampling | dict[str, Any] | None) -> Sampling:
        if isinstance(sampling, Sampling):
            return sampling.validate()
        return sampling_from(self.generation_config, sampling)

    def _seen(
        self, sampling: Sampling, batch: int, history: list[np.ndarray] | None
    ) -> jax.Array | None:
        if not sampling.needs_seen():
            return None
        seen = jnp.zeros((batch, self.config.vocab_size), bool)
        for b, tokens in enumerate(history or []):
            seen = seen.at[b].set(mark_seen(seen[b : b + 1], jnp.asarray(tokens)[None])[0])
        return jax.device_put(seen, jax.devices()[0])

    def _has_text(self, stop: str | Sequence[str]) -> bool:
        try:
            return self.tokenizer is not None
        except TokenizerError:
            if stop:
                raise
            return False

    def _ids(self, prompt: str | Sequence[int]) -> np.ndarray:
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        ids = decode.token_ids(ids, self.config.vocab_size)
        if not ids.size:
            raise InputError("the prompt is empty: give at least one token")
        return np.asarray(ids, np.int32)


def _as_list(prompts: Any) -> list:
    if isinstance(prompts, str):
        return [prompts]
    if isinstance(prompts, bytes) or not isinstance(prompts, Iterable):
        raise InputError(f"prompts must be texts or lists of token ids, not {type(prompts)}")
    prompts = list(prompts)
    if prompts and isinstance(prompts[0], int | np.integer):
        return [prompts]
    if not prompts:
        raise InputError("no prompt was given")
    return prompts


def _trimmed(row: np.ndarray, vocab_size: int) -> np.ndarray:
    length = int((row >= 0).sum())
    if (row[length:] != -1).any():
        raise InputError("rows may be padded with -1 at their end only")
    return decode.token_ids(row[:length], vocab_size)
