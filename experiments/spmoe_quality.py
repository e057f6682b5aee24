"""Part (c) of `spmoe_cutoff`: how well hidden states and gates of a draft foretell the target's."""

import functools
from typing import Any

import jax
import numpy as np

import moejax
from experiments.speculation_common import PROMPT
from moejax import decode
from moejax.models.layers import from_bits

NORMS = {"target": "raw", "draft": "normed"}


def normed(params: dict, hidden: np.ndarray, eps: float) -> np.ndarray:
    """Hidden states [L, N, D] after the norm before the gate."""
    scale = np.asarray(from_bits(params["norms"]["post"], "bfloat16"), np.float64)[:, None]
    return hidden / np.sqrt((hidden**2).mean(axis=-1, keepdims=True) + eps) * scale


def gate_scores(params: dict, x: np.ndarray) -> np.ndarray:
    """Router scores [L, N, E] of normed hidden states [L, N, D]."""
    router = np.asarray(from_bits(params["moe"]["router"], "bfloat16"), np.float64)
    odds = np.einsum("lnd,led->lne", x, router)
    odds = np.exp(odds - odds.max(axis=-1, keepdims=True))
    return odds / odds.sum(axis=-1, keepdims=True)


def compared(
    own: np.ndarray, exact: np.ndarray, scores: np.ndarray, wanted: np.ndarray, k: int
) -> np.ndarray:
    """[3, L, N] cosine, whether the best expert is the same, and share of the k best in common.

    Args:
        own, exact: hidden states [L, N, D].
        scores, wanted: router scores [L, N, E].
    """
    length = np.linalg.norm(own, axis=-1) * np.linalg.norm(exact, axis=-1)
    cosine = (own * exact).sum(axis=-1) / np.maximum(length, 1e-30)
    best, right = (np.argsort(-x, axis=-1, kind="stable")[..., :k] for x in (scores, wanted))
    common_share = (best[..., :, None] == right[..., None, :]).any(axis=-1).mean(axis=-1)
    return np.stack([cosine, best[..., 0] == right[..., 0], common_share])


def quality_rows(source: str, norm: str, parts: list[np.ndarray], depth: Any) -> list[dict]:
    """Means of `compared` for all layers and for each."""
    found = np.concatenate(parts, axis=2).mean(axis=2)
    layers = [("all", found.mean(axis=1)), *enumerate(found.T)]
    about = {"part": "predictor", "source": source, "norm": norm, "depth": depth}
    names = ("cosine", "top1", "coverage")
    return [
        {**about, "layer": layer, **dict(zip(names, map(float, values), strict=True))}
        for layer, values in layers
    ]


def external_quality(target: moejax.Runtime, windows: np.ndarray) -> list[dict[str, Any]]:
    """What the draft model's hidden states say, teacher-forced on windows [W, T]."""
    found: dict[str, list] = {norm: [] for norm in NORMS}
    eps, layers = target.config.norm_eps, list(target.config.moe_layers)
    for window in windows:
        options = {"hidden": "raw", "scores": True}
        state = target.init_state(1, context=len(window))
        out = jax.device_get(target.decode_step(state, window[None], **options)[1])
        raw = out.hidden[layers].astype(np.float64)
        exact = {"target": raw, "draft": normed(target.params, raw, eps)}
        for norm, how in NORMS.items():
            state = target.draft.init_state(1, context=len(window))
            other = target.draft.decode_step(state, window[None], hidden=how)[1]
            own = np.asarray(other.hidden, np.float64)[layers]
            x = normed(target.params, own, eps) if norm == "target" else own
            scores = gate_scores(target.params, x)
            found[norm].append(
                compared(own, exact[norm], scores, out.trace.scores, target.config.top_k)
            )
    return [row for n, parts in found.items() for row in quality_rows("draft model", n, parts, "")]


def self_quality(target: moejax.Runtime, windows: np.ndarray, depth: int) -> list[dict[str, Any]]:
    """What drafts by residents say of the next `depth` tokens, whose text is given."""
    options = {"hidden": "raw", "scores": True, "prefill": False}
    step = jax.jit(functools.partial(decode.step, target.model, **options))
    fixed = (target.policy, target.params, target.store)
    found: list[list] = [[] for _ in range(depth)]
    state = target.init_state(1, context=windows.shape[1])
    for window in windows:
        state = decode.rewind(state, np.zeros(1))
        state, _ = target.decode_step(state, window[None, :PROMPT])
        for start in range(PROMPT, len(window) - depth + 1, depth):
            tokens, drafting, drafts = window[None, start : start + depth], state, []
            for i in range(depth):
                token, chance = tokens[:, [i]], np.ones(1, np.float32)
                drafting, out = step(*fixed, drafting, token, chance=chance)
                drafts.append(jax.device_get((out.hidden, out.trace.scores)))
            state, out = target.decode_step(state, tokens, **options)
            exact, scores = jax.device_get((out.hidden, out.trace.scores))
            for i, (own, guess) in enumerate(drafts):
                at = (slice(None), [i])
                found[i].append(compared(own, exact[at], guess, scores[at], target.config.top_k))
    rows = quality_rows("self-draft", "target", sum(found, []), "all")
    return rows + [
        r for i, f in enumerate(found) for r in quality_rows("self-draft", "target", f, i)
    ]
