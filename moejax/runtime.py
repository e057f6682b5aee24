"""Load a model under a budget and use it: the surface for people and scripts."""

import dataclasses
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moejax import allocator, decode, devices, orbax_directory
from moejax.checkpoints import convert, headers, hf
from moejax.config import ModelConfig, read_config_json
from moejax.errors import BudgetError, InputError, TokenizerError
from moejax.generate import Engine, Stats, Token
from moejax.hub import resolve
from moejax.layout import DTYPES
from moejax.models import config_from_hf, family
from moejax.models.family import weight_map
from moejax.models.transformer import Decoder
from moejax.policy import Policy
from moejax.policy import policy as named_policy
from moejax.sampling import Sampling, mark_seen, sampling_from
from moejax.state import DecodeState, ExpertStore
from moejax.text import StopStrings, StreamDecoder, Tokenizer, eos_ids_from
from moejax.units import parse_bytes

DEFAULT_CONTEXT = 4096


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
    stats: Stats = dataclasses.field(init=False)
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
        return Engine(self.model, self.policy, self.params, self.store)

    @property
    def stop_ids(self) -> frozenset[int]:
        """Tokens that end a sequence, from generation_config.json, else config.json."""
        return frozenset(eos_ids_from(self.generation_config) or self.config.eos_ids)

    def init_state(self, batch: int = 1, *, context: int | None = None) -> DecodeState:
        """A fresh state for `decode_step`: nothing in the KV cache, no expert fetched yet."""
        return decode.init_state(
            self.model,
            self.policy,
            self.store,
            slots=self.slots,
            batch=batch,
            context=context or self.context,
            virtual=self.virtual,
        )

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
        """
        tokens = np.asarray(tokens)
        if tokens.ndim != 2 or not np.issubdtype(tokens.dtype, np.integer):
            raise InputError(f"tokens must be integers [B, T], not {tokens.dtype} {tokens.shape}")
        rows = [_trimmed(row, self.config.vocab_size) for row in tokens.astype(np.int32)]
        state = self.init_state(len(rows))
        decode.check_room(state, [len(r) for r in rows])
        parts = []
        for chunk in decode.chunks(rows):
            state, out = self.decode_step(state, chunk, all_logits=True)
            parts.append(np.asarray(out.logits))
        logits = np.concatenate(parts, axis=1)
        short = tokens.shape[1] - logits.shape[1]
        return np.pad(logits, ((0, 0), (0, max(short, 0)), (0, 0)))[:, : tokens.shape[1]]

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
    ) -> Iterator[Piece]:
        """Yield text as it becomes certain, never half a character; `stats` is filled on the way.

        Args:
            prompts: one text or list of token ids, or a list of them (a batch).
            sampling: a Sampling, or overrides of the model's generation_config.json.
            stop: strings that end a sequence and are not part of the text.
            logprobs: how many likeliest tokens to report beside each chosen one.

        Raises:
            InputError: bad prompts or options.
            NonFiniteError: NaN or infinity in the logits.
        """
        ids = [self._ids(p) for p in _as_list(prompts)]
        state = self.init_state(len(ids))
        self.stats = self._fresh_stats()
        for _, piece in self.pieces(
            state, ids, max_new_tokens, sampling, stop=stop, seed=seed, logprobs=logprobs
        ):
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
        history: list[np.ndarray] | None = None,
    ) -> Iterator[tuple[DecodeState, Piece]]:
        """`stream` on a state of the caller's: yields the state with each piece; donates it.

        Args:
            history: tokens already in the KV cache, for the repetition penalty.
        """
        sampling = self._sampling(sampling)
        stops = [StopStrings(stop) for _ in ids]
        decoders = [StreamDecoder(self.tokenizer) for _ in ids] if self._has_text(stop) else None
        finished, emitted = np.zeros(len(ids), bool), np.zeros(len(ids), int)
        steps = self.engine.tokens(
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
        )
        for state, tokens in steps:
            for token in tokens:
                b = token.sequence
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

    def _fresh_stats(self) -> Stats:
        stride = self.store.layout.stride if self.store else 0
        return Stats(record_bytes=stride, exact=self.policy is None or self.policy.exact)

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
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        if not ids:
            raise InputError("the prompt is empty: give at least one token")
        return np.asarray(ids, np.int32)


def load(
    path_or_name: str | os.PathLike = "tiny",
    *,
    dtype: str = "bfloat16",
    device_memory: int | str | None = None,
    slots: int | None = None,
    policy: str | Policy = "lru",
    context: int | None = None,
    virtual: bool = False,
    check_finite: bool = True,
    progress: Any = None,
) -> Runtime:
    """Load a model so that it runs under a budget.

    Args:
        path_or_name: "tiny" (the embedded model), a Hugging Face or converted directory, or a hub
            id such as "Qwen/Qwen3-30B-A3B".
        dtype: "bfloat16" or "float32"; weights are converted, sums are always f32.
        device_memory: bytes, or text such as "6GiB": dense weights, KV cache and workspace are
            counted, the rest becomes expert slots.
        slots: experts on the device at once, instead of `device_memory`; None = all.
        policy: a preset's name or a Policy.
        context: tokens per sequence that the KV cache holds; default the model's, at most 4096.
        virtual: the tables say what is resident, weights are read in place and nothing is copied.
        progress: called with (bytes read, bytes in all).

    Raises:
        MoejaxError: a subclass that says what to do.
    """
    if dtype not in DTYPES:
        raise InputError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    if slots is not None and device_memory is not None:
        raise BudgetError("give device_memory or slots, not both")
    devices.use_compilation_cache()
    directory = resolve(path_or_name)
    config = config_from_hf(read_config_json(directory))
    memory = None if device_memory is None else parse_bytes(device_memory)
    _bound_allocator(config, dtype, memory)  # before anything starts JAX
    chosen = named_policy(policy) if config.moe_layers else None
    context = context or min(config.max_positions, DEFAULT_CONTEXT)
    if not 0 < context <= config.max_positions:
        raise InputError(f"context must be in [1, {config.max_positions}], not {context}")
    model = Decoder(config, dtype)
    total = config.num_moe_layers * config.num_experts
    if memory is not None:
        slots = devices.slots_for(model, chosen, memory, context)
    slots = total if slots is None else min(slots, total)
    if config.moe_layers and slots < config.top_k:
        raise BudgetError(f"{slots} slots cannot hold the top-{config.top_k} of one layer")
    everything = slots == total
    flat, records = _read(directory, model, everything, check_finite, progress)
    return Runtime(
        config=config,
        model=model,
        params=devices.dense_params(flat),
        store=devices.store(config, records, dtype, on_device=everything),
        policy=chosen,
        slots=slots,
        context=context,
        generation_config=_generation_config(directory),
        directory=directory,
        virtual=virtual,
    )


def _bound_allocator(config: ModelConfig, dtype: str, memory: int | None) -> None:
    experts = config.num_moe_layers * config.num_experts
    host = experts * config.record_layout(dtype).stride if experts else 0
    allocator.apply(allocator.environment_for(memory, allocator.gpu_memory(), host))


def _read(
    directory: pathlib.Path, model: Decoder, on_device: bool, check_finite: bool, progress: Any
) -> tuple[dict[str, Any], Any]:
    if orbax_directory.is_orbax(directory):
        return orbax_directory.load_directory(directory, model, on_device=on_device)
    weights = weight_map(model.config, family(model.config.model_type).rules, model.dtype)
    if convert.is_converted(directory):
        return convert.load_converted(directory, weights)
    return hf.load(directory, weights, check_finite=check_finite, progress=progress)


def _generation_config(directory: pathlib.Path) -> dict[str, Any]:
    path = directory / "generation_config.json"
    if not path.is_file():
        return {}
    return headers.parse_json(headers.read_small(path), str(path))


def _as_list(prompts: Any) -> list:
    if isinstance(prompts, str):
        return [prompts]
    prompts = list(prompts)
    if prompts and isinstance(prompts[0], int | np.integer):
        return [prompts]
    if not prompts:
        raise InputError("no prompt was given")
    return prompts


def _trimmed(row: np.ndarray, vocab_size: int) -> np.ndarray:
    real = row >= 0
    length = int(real.sum())
    if not real[:length].all() or (row[:length] >= vocab_size).any() or (row < -1).any():
        raise InputError(
            f"token ids must be in [0, {vocab_size}), padded with -1 at the end of a row only"
        )
    return row[:length]
