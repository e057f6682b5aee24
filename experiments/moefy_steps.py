"""What `moefy` runs token by token: eviction, substitution and drafts on the sliced model."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

import moejax
from experiments import resident_routing
from experiments import smoe_common as common
from moejax import loss
from moejax.policies.drafting import GatedBias, SkipMissing
from moejax.policies.policy import Policy, policy
from moejax.policies.substitution import SkipLow, Substitute

RESIDENCIES = (0.25, 0.5, 0.75)
EVICTORS = {"lru": "lru", "lfu": "lfu", "score-window": "score-window:window=16"}
ALPHAS = (0.0, 0.1, 0.25, 0.5)
HALF = 0.5  # residency at which substitution and drafts are measured


class Stepwise:
    """Policies on the same windows, token by token, at one number of picks."""

    def __init__(self, runtime: moejax.Runtime, windows: np.ndarray, source: np.ndarray, seed: int):
        """Windows [W, T + 1]; intervals draw them anew within groups [W]."""
        self.runtime, self.windows, self.source, self.seed = runtime, windows, source, seed
        self.experts = common.experts_of(runtime)
        self.exact = loss.exact_logits(runtime, windows)

    def of(self, chosen: Policy, share: float) -> dict[str, Any]:
        """Hits and losses of a policy at a residency."""
        slots = common.slots_of(share, self.experts)
        runtime = common.with_policy(self.runtime, chosen, slots)
        found = loss.measure(runtime, self.windows, self.exact, local=False)
        own, exact = (x.mean(axis=1, dtype=np.float64) for x in (found.nll, found.exact_nll))
        return {
            "residency": share,
            "slots": slots,
            "hit_rate": float(found.hits.sum() / found.needed.sum()),
            "moved": float(found.moved.mean(dtype=np.float64)),
            "perplexity": float(np.exp(own.mean())),
            "over_exact": float(np.exp((own - exact).mean())),
            "interval": common.bootstrap(own - exact, self.source, self.seed),
            "kl": float(found.trajectory.mean(dtype=np.float64)),
            "flips": float(found.flipped.mean(dtype=np.float64)),
            "replaced": float(found.replaced.mean() / self.runtime.config.num_moe_layers),
        }

    def eviction(self) -> list[dict]:
        """Hit rates of evictors, nothing replaced."""
        return [
            {"part": "eviction", "policy": name, **self.of(policy(text), share)}
            for name, text in EVICTORS.items()
            for share in RESIDENCIES
        ]

    def substitution(self) -> list[dict]:
        """What SMoE's band costs here by alpha, and leaving out what it would replace."""
        rows = []
        for router, alphas in ((Substitute, ALPHAS), (SkipLow, ALPHAS[2:3])):
            for alpha in alphas:
                made = policy(EVICTORS["score-window"])
                lossy = router(alpha=jnp.float32(alpha))
                chosen = dataclasses.replace(made, router=lossy, must_be_exact=False)
                about = {"part": "substitution", "router": router.__name__, "alpha": alpha}
                rows.append({**about, **self.of(chosen, HALF)})
        return rows

    def drafts(self) -> list[dict]:
        """How many tokens of drafts by residents alone the model would accept."""
        rows, runtime = [], self.runtime
        slots = common.slots_of(HALF, self.experts)
        for router in (SkipMissing, GatedBias):
            chosen = resident_routing.drafting("score-window", router())
            found = resident_routing.run(
                dataclasses.replace(runtime, slots=slots), chosen, slots, self.windows
            )
            by_position = found.acceptance.mean(axis=(0, 1), dtype=np.float64)
            rows.append(
                {
                    "part": "drafts",
                    "router": router.__name__,
                    "residency": HALF,
                    "acceptance": float(by_position.mean()),
                    "acceptance_by_position": by_position.tolist(),
                    "interval": resident_routing.interval(
                        found.acceptance.mean(axis=(1, 2), dtype=np.float64),
                        self.source,
                        self.seed,
                    ),
                    "greedy": float(found.greedy.mean(dtype=np.float64)),
                    "left_out": float(found.left.mean(dtype=np.float64)),
                }
            )
        return rows
