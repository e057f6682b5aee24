"""Shared fixtures: tiny random models made without torch."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import dataclasses
import pathlib

import hypothesis
import jax
import numpy as np
import pytest

from moejax import devices
from moejax.config import ModelConfig, Rope, RouterRule
from moejax.layout import DTYPES, aligned_empty
from moejax.models.shapes import parameter_shapes
from moejax.models.transformer import Decoder
from moejax.policies.policy import policy
from moejax.state import ExpertStore

hypothesis.settings.register_profile("quick", max_examples=15, deadline=None, derandomize=True)
hypothesis.settings.register_profile("thorough", max_examples=300, deadline=None)
hypothesis.settings.load_profile(os.environ.get("MOEJAX_HYPOTHESIS", "quick"))


def small_config(**changes) -> ModelConfig:
    """A Qwen3-MoE of 2 layers, 8 experts, top-2."""
    config = ModelConfig(
        model_type="qwen3_moe",
        vocab_size=61,
        width=32,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        max_positions=512,
        norm_eps=1e-6,
        tied_embeddings=False,
        rope=Rope(dim=8, theta=10000.0),
        attention_scale=8**-0.5,
        qk_norm="head",
        moe_layers=(0, 1),
        num_experts=8,
        top_k=2,
        expert_width=24,
        router=RouterRule(normalize=True),
    )
    return dataclasses.replace(config, **changes)


@dataclasses.dataclass(frozen=True)
class Built:
    """A model with random weights."""

    model: Decoder
    policy: object
    params: dict
    store: ExpertStore

    @property
    def config(self) -> ModelConfig:
        return self.model.config


def build(config: ModelConfig, dtype: str = "float32", seed: int = 0) -> Built:
    """Random weights of unit gain for a config."""
    rng = np.random.default_rng(seed)
    flat = {}
    for path, shape in parameter_shapes(config).items():
        group, name = path.split("/")
        scale = 1.0 if len(shape) == 1 or group == "norms" else shape[-1] ** -0.5
        values = rng.normal(size=shape) * scale + (group == "norms" or "norm" in name)
        flat[path] = values.astype(DTYPES[dtype])
    layout = config.record_layout(dtype)
    ids = config.num_moe_layers * config.num_experts
    records = aligned_empty((ids, layout.elements), layout.bits)
    records[:] = 0
    for part in layout.parts:
        view = layout.view(records, part)
        view[:] = (rng.normal(size=view.shape) * view.shape[-1] ** -0.5 * 2).astype(DTYPES[dtype])
    store = ExpertStore(records=jax.device_put(records), layout=layout)
    return Built(Decoder(config, dtype), policy("lru"), devices.dense_params(flat), store)


@pytest.fixture(scope="session")
def small() -> Built:
    """The small model in f32."""
    return build(small_config())


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """A cache directory of its own, with the native library of the real one."""
    home = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
    (tmp_path / "moejax").mkdir()
    (tmp_path / "moejax" / "native").symlink_to(home / "moejax" / "native")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def third_party():
    """A policy as another package would provide it."""
    return dataclasses.replace(policy("lru"), capacity=3)


@pytest.fixture(autouse=True, scope="module")
def forget_programs():
    """Free a module's compiled programs: each holds memory maps, and Linux allows 65530 of them."""
    yield
    jax.clear_caches()
