"""Synthetic traces with scores, of models that cannot be run here, and processes fitted to traces.

The router's logits of a layer are z = sigma (sqrt(b) bias + sqrt(d) topic + sqrt(1 - b - d) AR):
one number per expert that never changes, one that is drawn anew with every document, and a
first-order autoregression over tokens, all standard normal. Layers are independent. Nothing here
knows a model: `about` of every trace says that it is synthetic.
"""

import dataclasses
import math
from collections.abc import Iterator

import numpy as np
from scipy.signal import lfilter

from moejax.errors import InputError
from moejax.traces.form import MOST_EXPERTS
from moejax.traces.trace import Phase, Trace

BLOCK = 1 << 22  # logits that are drawn at once
MOST_TOKENS = 1 << 26
FLAGS = {"label": "synthetic", "synthetic": True}  # in `about` of every trace that is made here


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoreProcess:
    """How router logits come about; `bias` and `document` are shares of their variance."""

    layers: int  # L
    experts: int  # E
    top_k: int  # K
    sigma: float  # standard deviation of the logits
    document: float  # share that lasts for a document
    correlation: float  # of the rest, from one token to the next
    bias: float = 0.0  # share that lasts for ever, and makes experts popular
    document_tokens: int = 256

    def __post_init__(self) -> None:
        sizes = {"layers": self.layers, "experts": self.experts, "top_k": self.top_k}
        sizes["document_tokens"] = self.document_tokens
        for name, size in sizes.items():
            if type(size) is not int or not 0 < size <= MOST_TOKENS:
                raise InputError(f"{name} of a score process must be at least 1, not {size!r:.40}")
        if not self.top_k <= self.experts <= MOST_EXPERTS:
            raise InputError(
                f"top-{self.top_k} of {self.experts} experts cannot be: at most {MOST_EXPERTS} "
                "experts, and no more picks than these"
            )
        numbers = (self.sigma, self.document, self.correlation, self.bias)
        if not all(isinstance(x, int | float) and math.isfinite(x) for x in numbers):
            raise InputError("sigma, document, correlation and bias are finite numbers")
        if not 0 < self.sigma <= 100:
            raise InputError(f"sigma of a score process must be in (0, 100], not {self.sigma}")
        shares = (self.document, self.bias)
        if min(shares) < 0 or sum(shares) > 1:
            raise InputError(
                f"document {self.document} and bias {self.bias} are shares of one variance: at "
                "least 0, together at most 1"
            )
        if not -1 < self.correlation < 1:
            raise InputError(f"correlation must be between -1 and 1, not {self.correlation}")

    def correlation_at(self, lag: int, sequence_tokens: int) -> float:
        """Mean correlation of an expert's logits `lag` tokens apart in a sequence."""
        starts = range(0, sequence_tokens, self.document_tokens)
        lengths = (min(self.document_tokens, sequence_tokens - start) for start in starts)
        same = sum(max(length - lag, 0) for length in lengths) / max(sequence_tokens - lag, 1)
        rest = 1 - self.bias - self.document
        return self.bias + self.document * same + rest * self.correlation**lag


# The first has the published figures of its model, the others what `fit.fit` gives for a
# trace, as tests check; docs/synthetic-traces.md has sources and errors.
PRESETS: dict[str, ScoreProcess] = {
    "qwen3-30b-a3b": ScoreProcess(
        layers=48, experts=128, top_k=8, sigma=1.33, document=0.48, correlation=0.37
    ),
    "qwen3-30b-a3b-k6": ScoreProcess(
        layers=48, experts=128, top_k=6, sigma=1.0435, document=0.5358, correlation=0.3735
    ),
    "gemma-4-26b": ScoreProcess(
        layers=30, experts=128, top_k=6, sigma=1.3218, document=0.5598, correlation=0.2857
    ),
    "tiny": ScoreProcess(
        layers=6,
        experts=32,
        top_k=4,
        sigma=2.1231,
        document=0.2588,
        correlation=0.1689,
        bias=0.0323,
        document_tokens=1728,
    ),
}


def preset(name: str) -> ScoreProcess:
    """The process of that name; InputError lists those that exist."""
    if name not in PRESETS:
        raise InputError(f"no preset {name!r:.40}; known: {', '.join(PRESETS)}")
    return PRESETS[name]


def generate(
    process: ScoreProcess,
    tokens: int,
    *,
    seed: int = 0,
    sequence_tokens: int | None = None,
    prompt_tokens: int = 0,
    top: int | None = None,
    model: str = "a score process",
) -> Trace:
    """A trace of `tokens` rows, each a decode step of its own but for the prompts.

    The picks are the best K of the scores as stored, ties to the lower expert, the weights these
    scores made to sum to 1. The same seed gives the same trace, and its first rows are those of any
    longer one. Beside the columns themselves it takes the memory of a few million logits.

    Args:
        sequence_tokens: of every sequence; by default a document's. The rest is the last one.
        prompt_tokens: of the beginning of each sequence, which are one prefill pass.
        top: store only so many of the greatest scores of each token and layer; None = all.
        model: what the trace is to resemble; its name will begin with "synthetic: ".

    Raises:
        InputError: numbers out of range.
    """
    length = process.document_tokens if sequence_tokens is None else sequence_tokens
    _check_sizes(process, tokens, length, prompt_tokens, top)
    kept = (tokens, process.layers, process.experts if top is None else top)
    lead = (tokens, process.layers)
    picks = np.empty((*lead, process.top_k), np.int16)
    weights = np.empty(picks.shape, np.float32)
    scores = np.empty(kept, np.float16)
    ids = None if top is None else np.empty(kept, np.int16)
    for start, own in score_blocks(process, tokens, seed=seed, sequence_tokens=length):
        rows = slice(start, start + len(own))
        best = np.argsort(-own, axis=-1, kind="stable")[..., : max(process.top_k, top or 0)]
        picks[rows] = best[..., : process.top_k]
        chosen = np.take_along_axis(own, best, axis=-1)
        used = chosen[..., : process.top_k].astype(np.float32)
        weights[rows] = used / used.sum(axis=-1, keepdims=True)
        scores[rows] = own if ids is None else chosen[..., :top]
        if ids is not None:
            ids[rows] = best[..., :top]
    about = {
        **FLAGS,
        "process": dataclasses.asdict(process),
        "seed": seed,
        "sequence_tokens": length,
        "prompt_tokens": prompt_tokens,
    }
    return Trace(
        model=f"synthetic: {model}",
        experts=process.experts,
        **_rows(tokens, length, prompt_tokens),
        picks=picks,
        weights=weights,
        scores=scores if ids is None else None,
        top_ids=ids,
        top_scores=None if ids is None else scores,
        about=about,
    ).check()


def _check_sizes(
    process: ScoreProcess, tokens: int, length: int, prompt: int, top: int | None
) -> None:
    for name, size in (("tokens", tokens), ("sequence_tokens", length)):
        if type(size) is not int or not 0 < size <= MOST_TOKENS:
            raise InputError(f"{name} must be from 1 to {MOST_TOKENS}, not {size!r:.40}")
    if type(prompt) is not int or not 0 <= prompt <= length:
        raise InputError(f"prompt_tokens must be from 0 to a sequence's {length}, not {prompt!r}")
    if top is not None and (type(top) is not int or not process.top_k <= top <= process.experts):
        raise InputError(
            f"top must be from the {process.top_k} picks to the {process.experts} experts, "
            f"not {top!r:.40}"
        )


def _rows(tokens: int, length: int, prompt: int) -> dict[str, np.ndarray]:
    """The columns that say where rows stand."""
    position = np.arange(tokens) % length
    new = (position == 0) | (position >= max(prompt, 1))  # a pass of its own
    return {
        "sequence": (np.arange(tokens) // length).astype(np.int32),
        "position": position.astype(np.int32),
        "run": (np.cumsum(new) - 1).astype(np.int32),
        "phase": np.where(position < prompt, Phase.PREFILL, Phase.DECODE).astype(np.uint8),
        "token": np.full(tokens, -1, np.int32),
        "accepted": np.ones(tokens, bool),
    }


def score_blocks(
    process: ScoreProcess, tokens: int, *, seed: int = 0, sequence_tokens: int, block: int = BLOCK
) -> Iterator[tuple[int, np.ndarray]]:
    """Router scores f16 [n, L, E] block by block, each with the number of its first row.

    A document ends with its sequence. How rows are cut into blocks does not change them.

    Args:
        block: about how many scores there are in a block.
    """
    shape = (process.layers, process.experts)
    bias_rng, topic_rng, noise_rng = (
        np.random.default_rng(s) for s in np.random.SeedSequence(seed).spawn(3)
    )
    shares = (process.bias, process.document, 1 - process.bias - process.document)
    scales = [process.sigma * math.sqrt(max(share, 0.0)) for share in shares]
    bias = scales[0] * bias_rng.standard_normal(shape, np.float32)
    most = max(block // math.prod(shape), 1)
    phi = process.correlation
    start, topic, last = 0, None, None
    while start < tokens:
        position = start % sequence_tokens
        if position % process.document_tokens == 0:
            topic = scales[1] * topic_rng.standard_normal(shape, np.float32)
        left = process.document_tokens - position % process.document_tokens
        count = min(most, left, sequence_tokens - position, tokens - start)
        drawn = noise_rng.standard_normal((count, *shape), np.float32)
        drawn[1 if position == 0 else 0 :] *= np.float32(math.sqrt(1 - phi * phi))
        before = np.zeros_like(drawn[:1]) if position == 0 else np.float32(phi) * last
        coefficients = np.array([1], np.float32), np.array([1, -phi], np.float32)
        noise = lfilter(*coefficients, drawn, axis=0, zi=before)[0]
        last = noise[-1:]
        yield start, _softmax(bias + topic + np.float32(scales[2]) * noise).astype(np.float16)
        start += count


def _softmax(logits: np.ndarray) -> np.ndarray:
    shifted = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return shifted / shifted.sum(axis=-1, keepdims=True)
