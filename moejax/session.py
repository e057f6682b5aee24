"""A conversation: KV cache and residency stay across turns, a shared prefix is prefilled once."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from moejax.decode import rewind
from moejax.errors import InputError
from moejax.live import DriftBudget
from moejax.runtime import Piece, Runtime
from moejax.sampling import Sampling


class Session:
    """One conversation with a model."""

    def __init__(self, runtime: Runtime, *, system: str | None = None):
        self.runtime = runtime
        self.messages: list[dict[str, str]] = []
        if system:
            self.messages.append({"role": "system", "content": system})
        self.reused_tokens = 0  # of the last prompt, already in the KV cache
        self._state: Any = None
        self._history: list[int] = []  # tokens whose keys and values the state holds

    def send(
        self,
        text: str,
        max_new_tokens: int = 256,
        sampling: Sampling | Mapping[str, Any] | None = None,
        *,
        stop: str | Sequence[str] = (),
        seed: int = 0,
        drift: DriftBudget | None = None,
        template: Mapping[str, Any] | None = None,
    ) -> Iterator[Piece]:
        """Add a user's turn and yield the answer; a failed turn leaves the conversation as it was.

        Args:
            drift: as `Runtime.stream` takes it; alpha begins anew with every answer.
            template: further variables of the chat template, such as {"enable_thinking": False}.

        Raises:
            TokenizerError: the model has no chat template.
            InputError: the conversation no longer fits the context.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        tokenizer = self.runtime.tokenizer
        prompt = tokenizer.apply_chat_template(messages, **(template or {}))
        ids = tokenizer.encode(prompt, add_special_tokens=False)
        if len(ids) >= self.runtime.context:
            raise InputError(
                f"the conversation of {len(ids)} tokens fills the context of "
                f"{self.runtime.context}: start anew or load with a larger context"
            )
        state = self._rewound(ids)
        kept, answer = self.reused_tokens, ""
        history, new = self._history[:kept], []
        pieces = self.runtime.pieces(
            state,
            [np.asarray(ids[kept:], np.int32)],
            min(max_new_tokens, self.runtime.context - len(ids) + 1),
            dict(sampling) if isinstance(sampling, Mapping) else sampling,
            stop=stop,
            seed=seed,
            drift=drift,
            history=[np.asarray(history, np.int32)],
        )
        try:
            for newest, piece in pieces:
                state = newest
                answer += piece.text
                new.append(piece.token.id)
                # The newest token is known but not yet in the KV cache.
                history = [*ids, *new[:-1]]
                yield piece
            self.messages = [*messages, {"role": "assistant", "content": answer}]
        finally:
            # A step that failed half-way has consumed the state that it was given.
            lost = any(leaf.is_deleted() for leaf in jax.tree.leaves(state))
            self._state, self._history = (None, []) if lost else (state, history)

    def _rewound(self, ids: list[int]) -> Any:
        """The state with as much of `ids` as it already holds, but for the last token."""
        if self._state is None:
            self.reused_tokens = 0
            return self.runtime.init_state()
        limit = min(len(self._history), len(ids) - 1)
        same = np.equal(self._history[:limit], ids[:limit])
        self.reused_tokens = int(limit if same.all() else np.argmin(same))
        return rewind(self._state, np.array([self.reused_tokens]))
