"""Scores of texts under a policy: log-likelihoods, rolling ones, and what is generated.

Requests mean what they mean to EleutherAI's lm-evaluation-harness, for which `MoejaxLM` is a model.
An exact policy scores a text in one pass. A lossy one is fed token by token, as it decodes: in one
pass all would be prompt, of which most lossy routers change nothing. Every sequence has residency
and history of its own, as in a run of batch 1.
"""

import dataclasses
import datetime
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from moejax import low_bits
from moejax.errors import InputError
from moejax.evaluation import cache as eval_cache
from moejax.evaluation.forcing import Forced, score
from moejax.policies.policy import Policy, policy
from moejax.runtime import Runtime

BATCH = 8
MAX_NEW_TOKENS = 256  # as lm-eval's own backends
DATE = datetime.date(2024, 7, 26)  # the one that Llama 3's templates state where they know none


@dataclasses.dataclass(frozen=True)
class Score:
    """Of a continuation; nats, and sums over its tokens, but for those over all tokens fed."""

    logprob: float
    greedy: bool  # every token of it is the likeliest
    tokens: int
    exact_logprob: float  # under the model's own routing
    flipped: int  # tokens in whose place another one is the likeliest under it
    divergence: float  # KL of the run from that of the model's own routing
    steps: int  # tokens fed one by one; 0 = in one pass
    replaced: float  # over all steps: picks of the model's own router that were not made
    replaced_mass: float  # router weight that they lost, summed over layers
    needed: float  # expert uses
    hits: float  # of those, resident


@dataclasses.dataclass(frozen=True)
class Generated:
    """Text after a prompt, without the stop string; counts over decode steps, see `Score`."""

    text: str
    tokens: int
    steps: int
    replaced: float
    replaced_mass: float
    needed: float
    hits: float


def with_policy(runtime: Runtime, name: str | Policy) -> Runtime:
    """The same weights and budget under another policy, cold and with nothing moved."""
    chosen = None if runtime.policy is None else policy(name)
    changes: dict[str, Any] = {"policy": chosen, "residency_file": None}
    if chosen is not None:
        low_bits.check(chosen, runtime.max_batch is not None)
        changes["store"] = low_bits.for_policy(chosen, runtime.store)
    return dataclasses.replace(runtime, **changes)


class Scorer:
    """Answers requests with one runtime; equal requests once, and from the cache if there is one.

    Args:
        runtime: for lossy policies loaded with `virtual=True`.
        batch: sequences at once where that changes nothing, or of the shared cache.
        shared_cache: lossy sequences in batches on one cache, to study what that changes. Counts
            are then each sequence's share of its batch's, and nothing is kept on the disk.
        steps: exact policies too are fed token by token, which gives their hit rate.
        chat: prompts are text of a chat template, which holds its special tokens.
        date: of conversations, for templates that state one; a fixed one, so that prompts do not
            change from day to day.
        cache: results of earlier runs.
        report: called with (done, total) requests of a call.

    Raises:
        InputError: a lossy policy whose weights are not in place, or a batch below 1.
    """

    def __init__(
        self,
        runtime: Runtime,
        *,
        batch: int = BATCH,
        shared_cache: bool = False,
        steps: bool = False,
        chat: bool = False,
        date: datetime.date = DATE,
        cache: eval_cache.Cache | None = None,
        report: Callable[[int, int], None] | None = None,
    ):
        if batch < 1:
            raise InputError(f"a batch has at least one sequence, not {batch}")
        self.exact = runtime.policy is None or runtime.policy.exact
        if not self.exact and not runtime.virtual:
            raise InputError("lossy policies are scored with weights in place: set virtual=True")
        self.runtime = runtime
        self.in_steps = runtime.policy is not None and (steps or not self.exact)
        self.shared = shared_cache and self.in_steps
        self._chat = chat
        self._now = datetime.datetime.combine(date, datetime.time(12))
        self.batch = batch if self.shared or not self.in_steps else 1
        self._generates = batch if self.shared or not self.in_steps else 1
        self._cache = None if self.shared else cache
        self._report = report or (lambda done, total: None)
        self._about = None if self._cache is None else eval_cache.about(runtime)

    @property
    def max_length(self) -> int:
        """Tokens per sequence that are fed at most."""
        return self.runtime.context

    @property
    def prefix_id(self) -> int:
        """The token that stands before a text without context: the beginning, else the end.

        Raises:
            InputError: the tokenizer has neither.
        """
        tokenizer = self.runtime.tokenizer
        ids = [tokenizer.bos_id, *tokenizer.eos_ids]
        found = next((token for token in ids if token is not None), None)
        if found is None:
            raise InputError("the tokenizer names no token for the beginning or end of a text")
        return found

    def render(self, messages: Sequence[Any], add_generation_prompt: bool = True) -> str:
        """The prompt of a conversation by the model's chat template, on the scorer's date.

        Raises:
            TokenizerError: the model has no chat template, or it refuses the conversation.
        """
        render = self.runtime.tokenizer.apply_chat_template
        return render(messages, add_generation_prompt, now=self._now)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, a beginning that it spells out itself not doubled."""
        tokenizer = self.runtime.tokenizer
        begins = tokenizer.special_tokens.get("bos_token")
        begun = self._chat or (begins and text.startswith(begins))
        return tokenizer.encode(text, add_special_tokens=not begun)

    def encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Token ids of both, split as in lm-eval: spaces at the context's end go over.

        Raises:
            InputError: the continuation adds no token.
        """
        if not context:
            ids = self.runtime.tokenizer.encode(continuation, add_special_tokens=False)
            begun = ids[:1] == [self.prefix_id]
            first, rest = (ids[:1], ids[1:]) if begun else ([self.prefix_id], ids)
        else:
            spaces = len(context) - len(context.rstrip())
            whole, kept = context + continuation, context[: len(context) - spaces]
            first = self.encode(kept) or [self.prefix_id]
            rest = self.encode(whole)[len(self.encode(kept)) :]
        if not rest:
            raise InputError(f"nothing to score: {continuation!r:.80} adds no token")
        return first, rest

    def loglikelihood(self, pairs: Sequence[tuple[str, str]]) -> list[Score]:
        """Scores of continuations after contexts, both texts."""
        return self.score_tokens([self.encode_pair(*pair) for pair in pairs])

    def rolling(self, texts: Sequence[str]) -> list[Score]:
        """Scores of whole texts, each token once, in windows that do not overlap but by one."""
        windows = [
            [*rolling_windows(self.encode(t), self.prefix_id, self.max_length)] for t in texts
        ]
        flat = self.score_tokens([window for text in windows for window in text])
        ends = np.cumsum([0, *map(len, windows)])
        return [total(flat[a:b]) for a, b in zip(ends, ends[1:], strict=False)]

    def windows(self, texts: Sequence[tuple[str, tuple[int, int]]]) -> list[Score]:
        """Scores of windows of texts, tokens [a, b) of each without special ones, after the first.

        Raises:
            InputError: a text is shorter.
        """
        tokenizer, ids = self.runtime.tokenizer, {}
        for text in {text for text, _ in texts}:
            ids[text] = tokenizer.encode(text, add_special_tokens=False)
        for text, (_, end) in texts:
            if len(ids[text]) < end:
                raise InputError(f"a window ends at token {end} of {len(ids[text])}: lower --limit")
        return self.score_tokens([(ids[t][a : a + 1], ids[t][a + 1 : b]) for t, (a, b) in texts])

    def score_tokens(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[Score]:
        """Scores of continuations after contexts, both token ids; contexts are cut on the left.

        Raises:
            InputError: a continuation longer than the context that the runtime was loaded with.
            NonFiniteError: NaN or infinity in the logits.
        """
        wanted = [self._request(*pair) for pair in pairs]
        keys = [self._key("score", fed, rest) for fed, rest in wanted]
        found = {k: Score(**had) for k in set(keys) if (had := self._cached(k))}
        missing: dict[tuple[int, ...], list[int]] = {}
        for i, (fed, _) in enumerate(wanted):
            if keys[i] not in found:
                missing.setdefault(fed, []).append(i)
        done, todo = 0, len(missing)
        for group in self._groups(list(missing)):
            rows = group if self.shared else _filled(group, self.batch)
            forced = score(self.runtime, [np.array(f) for f in rows], in_steps=self.in_steps)
            for fed, one in zip(group, forced, strict=False):
                for i in missing[fed]:
                    found[keys[i]] = self._score(one, wanted[i][1])
                    self._store(keys[i], found[keys[i]])
            done += len(group)
            self._report(done, todo)
        return [found[k] for k in keys]

    def generate(
        self,
        prompts: Sequence[str],
        until: Sequence[str] = (),
        max_new_tokens: int = MAX_NEW_TOKENS,
        **sampling: Any,
    ) -> list[Generated]:
        """What follows the prompts, greedily unless `sampling` says otherwise, up to a stop string.

        Prompts are cut on the left, so that there is room for the answer.

        Raises:
            InputError: more new tokens than the context has room for, or bad sampling.
        """
        room = self.max_length - max_new_tokens
        if room < 1 or max_new_tokens < 1:
            raise InputError(
                f"{max_new_tokens} new tokens leave no room for a prompt in {self.max_length}"
            )
        how = {"temperature": 0.0, **sampling}
        stops = [stop for stop in until if stop]
        fed = [tuple((self.encode(p) or [self.prefix_id])[-room:]) for p in prompts]
        keys = [self._key("generate", ids, [stops, max_new_tokens, how]) for ids in fed]
        found = {k: Generated(**had) for k in set(keys) if (had := self._cached(k))}
        missing = {k: ids for k, ids in zip(keys, fed, strict=True) if k not in found}
        for group in _chunked(list(missing), self._generates):
            ids = [list(missing[k]) for k in group]
            for k, made in zip(group, self._generate(ids, stops, max_new_tokens, how), strict=True):
                found[k] = made
                self._store(k, made)
            self._report(len(found), len(set(keys)))
        return [found[k] for k in keys]

    def _generate(
        self, ids: list[list[int]], stops: list[str], most: int, how: dict[str, Any]
    ) -> list[Generated]:
        batch = len(ids) if self.shared or len(ids) == 1 else self._generates
        made = self.runtime.generate(_filled(ids, batch), most, how, stop=stops)[: len(ids)]
        # Of an exact policy, the batch is for speed alone: its hits are those of no run of batch 1.
        stats, each = self.runtime.stats, self.in_steps / len(ids)
        counts = ("replaced", "replaced_mass", "needed", "hits")
        return [
            Generated(
                text=one.text,
                tokens=len(one.tokens),
                steps=(len(one.tokens) - 1) * self.in_steps,
                **{name: float(getattr(stats, name)) * each for name in counts},
            )
            for one in made
        ]

    def _request(self, context: list[int], rest: list[int]) -> tuple[tuple[int, ...], list[int]]:
        """Tokens to feed, and those of the continuation."""
        if not rest or not context or len(rest) > self.max_length:
            raise InputError(
                f"a continuation has 1 to {self.max_length} tokens after a context of at least "
                f"one, not {len(rest)} after {len(context)}: raise --context (context)"
            )
        fed = [*context, *rest][-(self.max_length + 1) :][:-1]
        return tuple(map(int, fed)), [int(token) for token in rest]

    def _groups(self, fed: list[tuple[int, ...]]) -> Iterator[list[tuple[int, ...]]]:
        """Batches of sequences of like lengths, the longest first; shared caches in their order."""
        return _chunked(fed if self.shared else sorted(fed, key=lambda s: (-len(s), s)), self.batch)

    def _score(self, forced: Forced, rest: list[int]) -> Score:
        inner = slice(len(forced.logprob) - len(rest), len(forced.logprob) - 1)
        scored = slice(inner.start, None)
        end, last = rest[-1], forced.last

        def summed(values: np.ndarray, more: float = 0.0) -> float:
            return float(values.sum(dtype=np.float64)) + float(more)

        return Score(
            logprob=summed(forced.logprob[inner], last[end]),
            greedy=bool(forced.greedy[inner].all() and last.argmax() == end),
            tokens=len(rest),
            exact_logprob=summed(forced.exact_logprob[inner], forced.exact_last[end]),
            flipped=int(forced.flipped[scored].sum()),
            divergence=summed(forced.divergence[scored]),
            steps=len(forced.logprob) if self.in_steps else 0,
            replaced=summed(forced.replaced),
            replaced_mass=summed(forced.replaced_mass),
            needed=summed(forced.needed),
            hits=summed(forced.hits),
        )

    def _key(self, kind: str, fed: tuple[int, ...], more: list[Any]) -> str:
        return eval_cache.key(self._about, kind, self.in_steps, fed, more)

    def _cached(self, key: str) -> dict[str, Any] | None:
        return None if self._cache is None else self._cache.get(key)

    def _store(self, key: str, value: Score | Generated) -> None:
        if self._cache is not None:
            self._cache.put(key, dataclasses.asdict(value))


def total(scores: Sequence[Score]) -> Score:
    """The sums of several scores, greedy if all are."""
    sums = {f.name: sum(getattr(s, f.name) for s in scores) for f in dataclasses.fields(Score)}
    return Score(**sums | {"greedy": all(s.greedy for s in scores)})


def rolling_windows(
    ids: list[int], prefix: int, most: int
) -> Iterator[tuple[list[int], list[int]]]:
    """(context, continuation) of windows that together hold each token once as continuation.

    The first follows the prefix, the others the token before; the last is filled up with more
    context, as lm-eval does.
    """
    for start in range(0, len(ids), most):
        rest = ids[start : start + most]
        first = max(0, start + len(rest) - most - 1)
        yield (ids[first:start] if start else [prefix]), rest


def _filled(group: list, size: int) -> list:
    """The group, made up to a size by its last: another size would be another program."""
    return group + group[-1:] * (size - len(group))


def _chunked(values: list, size: int) -> Iterator[list]:
    return (values[i : i + size] for i in range(0, len(values), size))


def __getattr__(name: str) -> Any:
    if name != "MoejaxLM":
        raise AttributeError(f"module 'moejax.evaluation.evaluate' has no attribute {name!r}")
    from moejax.evaluation.lm import MoejaxLM  # needs lm_eval, which is optional

    return MoejaxLM
