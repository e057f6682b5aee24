"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1)."""

import jax

from moejax.config import ModelConfig
from moejax.models.layers import Span, Weights
from moejax.state import LatentKVCache


def latent_attention(
    config: ModelConfig,
    weights: Weights,
    layer: jax.Array,
    x: jax.Array,
    kv: LatentKVCache,
    span: Span,
) -> tuple[jax.Array, LatentKVCache]:
    """Attention output [B, T, D] f32 of normed x [B, T, D], and the cache with this step's rows."""
    raise NotImplementedError
