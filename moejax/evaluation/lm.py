"""moejax as a model of EleutherAI's lm-evaluation-harness, in the same process."""

import json
from collections.abc import Sequence
from typing import Any

from lm_eval.api.model import LM

from moejax.errors import InputError
from moejax.evaluation.evaluate import MAX_NEW_TOKENS, Score, Scorer

LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


class MoejaxLM(LM):
    """Answers lm-eval's requests with a Scorer: `lm_eval.simple_evaluate(model=MoejaxLM(scorer))`.

    `scores` holds the Score of every log-likelihood request by its texts, for what lm-eval's own
    results have no room for: loss against the model's own routing, replaced weight, hits.
    """

    def __init__(self, scorer: Scorer):
        super().__init__()
        self.scorer = scorer
        self.scores: dict[tuple[str, ...], Score] = {}

    def loglikelihood(
        self, requests: list[Any], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """(log-probability, greedy) of continuations after contexts."""
        pairs = [request.args for request in requests]
        found = self.scorer.loglikelihood(pairs)
        self.scores |= dict(zip(pairs, found, strict=True))
        return [(score.logprob, score.greedy) for score in found]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-probabilities of whole texts."""
        texts = [request.args for request in requests]
        found = self.scorer.rolling([text for (text,) in texts])
        self.scores |= dict(zip(texts, found, strict=True))
        return [score.logprob for score in found]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Texts after prompts, without their stop strings.

        Raises:
            InputError: a setting of the generation that there is none for.
        """
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(i)
        texts = [""] * len(requests)
        for settings, chosen in groups.items():
            prompts = [requests[i].args[0] for i in chosen]
            until, most, sampling = _settings(json.loads(settings))
            for i, made in zip(
                chosen, self.scorer.generate(prompts, until, most, **sampling), strict=True
            ):
                texts[i] = made.text
        return texts

    def apply_chat_template(
        self, chat_history: Sequence[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The prompt of a conversation."""
        return self.scorer.render(chat_history, add_generation_prompt)

    @property
    def tokenizer_name(self) -> str:
        """The model's directory."""
        return str(self.scorer.runtime.directory)


def _settings(given: dict[str, Any]) -> tuple[list[str], int, dict[str, Any]]:
    """Stop strings, new tokens at most, and how tokens are chosen, of lm-eval's settings."""
    until = given.pop("until", None) or []
    until = [until] if isinstance(until, str) else until
    lengths = [given.pop(name) for name in LENGTHS if name in given]
    if not given.pop("do_sample", False):
        given = {name: number for name, number in given.items() if name not in SAMPLING}
    if unknown := given.keys() - set(SAMPLING):
        raise InputError(f"a generation has no setting {sorted(unknown)[0]!r} here")
    return until, lengths[0] if lengths else MAX_NEW_TOKENS, given
