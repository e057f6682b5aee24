"""Held-out results of the tiny models: perplexity, agreement, routing and samples."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import tiny_ops as ops
from ngram import KneserNey
from tiny_data import DOMAINS, EOT, val_starts, windows_at
from tiny_model import Shape, forward

RANKS = 8


@partial(jax.jit, static_argnums=(2, 3))
def score(params, windows, shape: Shape, dtype):
    """Losses in nats and greedy tokens [batch, length] of windows, and routing by layer."""
    tokens, want = windows[:, :-1], windows[:, 1:]
    x, records = forward(params, tokens, shape, dtype)
    table = ops.turn(params["embed"].astype(dtype))
    logits = ops.product(x, table, jnp.float32).reshape(*tokens.shape, -1)
    norm = jax.nn.logsumexp(logits, axis=-1)
    loss = norm - jnp.take_along_axis(logits, want[..., None], axis=-1)[..., 0]
    routing = {}
    if shape.experts:
        probs = jnp.stack([r["probs"] for r in records])
        routing = {
            "picks": jnp.stack([r["picks"] for r in records]),
            "ranked": jax.lax.top_k(probs, RANKS)[0].mean(axis=1),
            "entropy": -jnp.sum(probs * jnp.log2(probs + 1e-20), axis=-1).mean(axis=1),
        }
    return loss, jnp.argmax(logits, axis=-1), routing


def run_windows(params, shape: Shape, windows: np.ndarray, dtype, size: int) -> dict:
    """Losses, greedy tokens and routing over all windows [n, length + 1]."""
    parts = []
    for start in range(0, len(windows) // size * size, size):
        batch = jnp.asarray(windows[start : start + size])
        parts.append(jax.tree.map(np.asarray, score(params, batch, shape, dtype)))
    losses, greedy, routing = zip(*parts, strict=True)
    result = {"losses": np.concatenate(losses), "greedy": np.concatenate(greedy)}
    if shape.experts:
        result["picks"] = np.concatenate([r["picks"] for r in routing], axis=1)
        result["ranked"] = np.mean([r["ranked"] for r in routing], axis=0)
        result["entropy"] = np.mean([r["entropy"] for r in routing], axis=0)
    return result


def perplexity(losses: np.ndarray) -> float:
    """Exponential of the mean loss in nats."""
    return float(np.exp(np.mean(losses)))


def compare(models: dict, tokens: dict, length: int, limit: int, dtype) -> tuple[dict, dict]:
    """Per-domain perplexity of {"moe", "twin"} and greedy agreement, and the mixture's runs."""
    size = max(1, 8192 // length)
    table, runs = {}, {}
    for domain in DOMAINS:
        stream = tokens[f"val/{domain}"]
        starts = val_starts(stream, length, limit)
        starts = starts[: len(starts) // size * size]
        windows = windows_at(stream, starts, length)
        done = {n: run_windows(p, s, windows, dtype, size) for n, (p, s) in models.items()}
        row = {name: perplexity(run["losses"]) for name, run in done.items()}
        row["greedy_agreement"] = float(np.mean(done["moe"]["greedy"] == done["twin"]["greedy"]))
        for name, run in done.items():
            row[f"{name}_top1"] = float(np.mean(run["greedy"] == windows[:, 1:]))
        row["tokens"] = int(done["moe"]["losses"].size)
        table[domain] = row
        runs[domain] = done["moe"] | {"starts": starts, "length": length}
    return table, runs


def ngram_table(tokens: dict, seen: dict, runs: dict, vocab: int) -> dict:
    """Per-domain 3-gram perplexity on the mixture's held-out tokens.

    "seen" is fitted to the tokens that training drew (boolean arrays by domain, `seen`),
    "all" to all training tokens, "all_own_domain" to all those of the domain.
    """
    streams = {d: tokens[f"train/{d}"] for d in DOMAINS}
    joined = np.concatenate(list(streams.values()))
    drawn = np.concatenate([seen[d] for d in DOMAINS])
    table: dict = {d: {} for d in DOMAINS}
    for name, mask in (("seen", drawn), ("all", None)):
        model = KneserNey(joined, vocab, mask)
        for d in DOMAINS:
            table[d][name] = ngram_perplexity(model, tokens[f"val/{d}"], runs[d])
    rng = np.random.default_rng(5)
    sums = [model.distribution(*rng.integers(0, vocab, 2)).sum() for _ in range(20)]
    for d in DOMAINS:
        own = KneserNey(streams[d], vocab)
        table[d]["all_own_domain"] = ngram_perplexity(own, tokens[f"val/{d}"], runs[d])
    table["seen_tokens"] = int(drawn.sum())
    table["largest_sum_error"] = float(np.max(np.abs(np.array(sums) - 1)))
    return table


def ngram_perplexity(model: KneserNey, stream: np.ndarray, run: dict) -> float:
    """Perplexity on the tokens that a run over windows of the stream predicted."""
    wanted = (run["starts"][:, None] + np.arange(run["length"])).reshape(-1) - 1
    return perplexity(model.losses(stream)[wanted[wanted >= 0]])


def jensen_shannon(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Jensen-Shannon distance (square root of the divergence in bits) over the last axis."""
    m = (p + q) / 2

    def kl(a):
        return np.sum(np.where(a > 0, a * np.log2(np.maximum(a, 1e-20) / m), 0.0), axis=-1)

    return np.sqrt(np.maximum((kl(p) + kl(q)) / 2, 0.0))


def layer_routing(run: dict, experts: int) -> dict:
    """Routing of one domain, each entry a list over layers; shares are [layers, experts]."""
    picks, length = run["picks"], run["length"]
    layers, _, k = picks.shape
    counts = np.stack([np.bincount(layer.reshape(-1), minlength=experts) for layer in picks])
    share = counts / counts.sum(axis=1, keepdims=True)
    hot = np.zeros((layers, picks.shape[1], experts), bool)
    np.put_along_axis(hot, picks.astype(np.int64), True, axis=2)
    hot = hot.reshape(layers, -1, length, experts)
    common = np.sum(hot[:, :, 1:] & hot[:, :, :-1], axis=-1) / k
    with np.errstate(divide="ignore", invalid="ignore"):
        spread = -np.sum(np.where(share > 0, share * np.log2(share), 0.0), axis=1)
    return {
        "share": share.round(6).tolist(),
        "min_share": share.min(axis=1).tolist(),
        "max_share": share.max(axis=1).tolist(),
        "never_used": (counts == 0).sum(axis=1).tolist(),
        "use_entropy_bits": spread.tolist(),
        "router_entropy_bits": run["entropy"].tolist(),
        "adjacent_overlap": common.mean(axis=(1, 2)).tolist(),
        "overlap_if_independent": (k * np.sum(share**2, axis=1)).tolist(),
        "score_by_rank": run["ranked"].tolist(),
    }


def routing_facts(runs: dict, experts: int) -> dict:
    """Routing by domain, expert use over all domains, and distances between domains."""
    facts: dict = {"by_domain": {d: layer_routing(run, experts) for d, run in runs.items()}}
    shares = {d: np.array(row["share"]) for d, row in facts["by_domain"].items()}
    every = np.mean(list(shares.values()), axis=0)
    facts["all"] = {
        "min_share": every.min(axis=1).tolist(),
        "max_share": every.max(axis=1).tolist(),
        "never_used": int((every == 0).sum()),
        "score_by_rank": np.mean(
            [row["score_by_rank"] for row in facts["by_domain"].values()], axis=(0, 1)
        ).tolist(),
    }
    names = list(shares)
    facts["js_distance"] = {
        f"{a}-{b}": jensen_shannon(shares[a], shares[b]).tolist()
        for i, a in enumerate(names)
        for b in names[i + 1 :]
    }
    return facts


def continuation(params, shape, prompt: list[int], count: int, seed: int, dtype) -> list[int]:
    """Sampled tokens after a prompt at temperature 0.7, ending early at the end of text."""
    rng = np.random.default_rng(seed)
    width = -(-(len(prompt) + count) // 128) * 128 + 1
    tokens = list(prompt)
    for _ in range(count):
        padded = np.zeros((1, width), np.int32)
        padded[0, : len(tokens)] = tokens
        logits = np.asarray(next_logits(params, padded, len(tokens) - 1, shape, dtype))
        noise = rng.gumbel(size=logits.shape)
        tokens.append(int(np.argmax(logits / 0.7 + noise)))
        if tokens[-1] == EOT:
            break
    return tokens[len(prompt) :]


@partial(jax.jit, static_argnums=(3, 4))
def next_logits(params, padded, last, shape: Shape, dtype):
    """Logits [vocab] after position `last` of one padded row [1, width]."""
    x, _ = forward(params, padded[:, :-1], shape, dtype)
    return ops.product(x[last][None], params["embed"].astype(dtype).T, jnp.float32)[0]
