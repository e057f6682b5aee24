"""Parts of the GPU suite: control flow, the host's share of a step, whole decode steps."""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.gpu_common import each, guarded, kernel_mode, median, on_gpu, random_records, timed
from moejax import decode, devices
from moejax.config import ModelConfig, Rope, RouterRule
from moejax.models.transformer import Decoder
from moejax.policies.placement import FetchAll, HostAll
from moejax.policies.policy import Policy, policy
from moejax.policies.routing import Routing, Scored
from moejax.state import ExpertStore, pytree

OVERLAPS = (0.35, 0.47)  # published shares of a token's experts that the next token uses again


def qwen3_config(layers: int = 48, **changes: Any) -> ModelConfig:
    """Qwen3-30B-A3B, with fewer layers or other sizes."""
    return dataclasses.replace(
        ModelConfig(
            model_type="qwen3_moe",
            vocab_size=151936,
            width=2048,
            num_layers=layers,
            num_heads=32,
            num_kv_heads=4,
            head_dim=128,
            max_positions=40960,
            norm_eps=1e-6,
            tied_embeddings=False,
            rope=Rope(dim=128, theta=1e6),
            attention_scale=128**-0.5,
            qk_norm="head",
            moe_layers=tuple(range(layers)),
            num_experts=128,
            top_k=8,
            expert_width=768,
            router=RouterRule(normalize=True),
        ),
        **changes,
    )


def thin_config(layers: int) -> ModelConfig:
    """The same structure with next to no arithmetic."""
    small = {"vocab_size": 256, "width": 64, "num_heads": 2, "num_kv_heads": 1, "head_dim": 32}
    small |= {"rope": Rope(dim=32, theta=1e6), "expert_width": 64}
    return qwen3_config(layers, **small)


@pytree
class Scripted:
    """A router that chooses given experts with equal weights, the same ones in every layer."""

    picks: jax.Array  # [K] i32
    low_bit = False

    @property
    def exact(self) -> bool:
        """False: scores are ignored."""
        return False

    def init(self, num_layers: int, num_experts: int) -> None:
        """Nothing to remember."""
        del num_layers, num_experts

    def route(self, memory: None, seen: Scored) -> tuple[Routing, None]:
        """The given experts for every token."""
        del memory
        tokens, top_k = seen.scores.shape[0], seen.top_k
        picks = jnp.broadcast_to(self.picks, (tokens, top_k))
        return Routing(
            expert=picks,
            weight=jnp.full((tokens, top_k), 1 / top_k, jnp.float32),
            exact=picks,
            replaced_mass=jnp.zeros(tokens, jnp.float32),
        ), None


def script(steps: int, config: ModelConfig, overlap: float, seed: int = 0) -> np.ndarray:
    """Picks [steps, K] of which a share `overlap` is kept from each step to the next."""
    rng, experts, k = np.random.default_rng(seed), config.num_experts, config.top_k
    picks = [rng.permutation(experts)[:k]]
    for _ in range(steps - 1):
        kept = rng.permutation(picks[-1])[: rng.binomial(k, overlap)]
        others = rng.permutation(np.setdiff1d(np.arange(experts), picks[-1]))
        picks.append(rng.permutation(np.concatenate([kept, others[: k - len(kept)]])))
    return np.array(picks, np.int32)


def random_params(model: Decoder) -> dict:
    """Parameters of small random bits, made on the device."""

    def fill(path: Any, shape: jax.ShapeDtypeStruct) -> jax.Array:
        if any("norm" in str(key) for key in path):
            return jnp.full(shape.shape, 0x3F80, shape.dtype)  # 1.0
        mixed = jax.lax.iota(jnp.uint32, int(np.prod(shape.shape))) * jnp.uint32(2654435761)
        mixed = (mixed ^ (mixed >> 15)) * jnp.uint32(2246822519)
        return ((mixed & 0x80FF) | 0x3C00).astype(shape.dtype).reshape(shape.shape)

    make = jax.jit(lambda: jax.tree_util.tree_map_with_path(fill, devices.abstract_params(model)))
    return make()


def make_store(config: ModelConfig, on_device: bool) -> ExpertStore:
    """Random records on the device, or made there and moved to pinned host memory."""
    layout = config.record_layout("bfloat16")
    records = random_records(config.num_moe_layers * config.num_experts, layout)
    if on_gpu() and not on_device:
        pinned = jax.device_put(records, devices.store_sharding(False))
        jax.block_until_ready(pinned)
        records.delete()
        records = pinned
    return ExpertStore(records=records, layout=layout)


@dataclasses.dataclass
class Bench:
    """A model with scripted routing whose steps are timed."""

    model: Decoder
    params: dict
    store: ExpertStore

    def run(self, how: Policy, slots: int, picks: np.ndarray, warm: int) -> dict:
        """Time per token after `warm` tokens, with the mean misses per layer."""
        store, opened = devices.open_to_host(self.store, how)
        scripted = [dataclasses.replace(how, router=Scripted(picks=jnp.asarray(p))) for p in picks]
        with kernel_mode():
            state = decode.init_state(self.model, how, store, slots=slots, context=256)
            token = jnp.zeros((1, 1), jnp.int32)
            samples, dispatch, traces = [], [], []
            for one in scripted:
                start = time.perf_counter()
                state, out = decode.decode_step(self.model, one, self.params, store, state, token)
                dispatch.append(time.perf_counter() - start)
                jax.block_until_ready(out.logits)
                samples.append(time.perf_counter() - start)
                traces.append(out.trace)
        if opened is not None:
            decode.check_arrived(store, out)
            opened.close()
        fetched = np.mean([np.asarray(t.fetched).sum() for t in traces[warm:]])
        hits = np.mean([np.asarray(t.hits).sum() for t in traces[warm:]])
        needed = np.mean([np.asarray(t.needed).sum() for t in traces[warm:]])
        return {
            "ms": median(samples[warm:]) * 1e3,
            "dispatch_ms": median(dispatch[warm:]) * 1e3,
            "hit_rate": float(hits / needed),
            "link_bytes": float(fetched) * self.store.layout.stride,
            "samples": samples[warm:],
        }


def lru(placement: Any) -> Policy:
    """The preset with another placement, and free to be given a script for a router."""
    return dataclasses.replace(policy("lru"), placement=placement, must_be_exact=False)


def control(sizes: Any) -> Iterator[dict]:
    """Cost per layer of data-dependent control flow, against straight-line layers."""
    layers, width = sizes.pick(48, 3), sizes.pick(1024, 16)
    weights = jnp.ones((layers, width), jnp.float32)
    x = jnp.ones(width)

    def straight(x, w):
        return jnp.tanh(x * w), x[0]

    def conditional(x, w):
        return jax.lax.cond(x[0] > 0, lambda x: jnp.tanh(x * w), lambda x: x - w, x), x[0]

    def looped(x, w):
        def body(carry):
            return jnp.tanh(carry[0] * w), carry[1] + 1

        limit = (x[0] > -2).astype(jnp.int32)  # one turn, known on the device only
        return jax.lax.while_loop(lambda c: c[1] < limit, body, (x, jnp.int32(0)))[0], x[0]

    base = None
    for name, body in (("straight", straight), ("cond", conditional), ("while", looped)):
        run = jax.jit(lambda x, w, body=body: jax.lax.scan(body, x, w))
        for _ in range(2):
            dispatch = _dispatch(lambda run=run: run(x, weights))
        seconds = median(timed(run, x, weights, repeats=20))
        base = base or seconds
        extra = (seconds - base) / layers * 1e6
        yield {
            "body": name,
            "us": seconds * 1e6,
            "us_per_layer_more": extra,
            "dispatch_us": dispatch * 1e6,
        }


def _dispatch(call: Callable) -> float:
    start = time.perf_counter()
    out = call()
    seconds = time.perf_counter() - start
    jax.block_until_ready(out)
    return seconds


def overhead(sizes: Any) -> Iterator[dict]:
    """A step with next to no arithmetic: what is left is launches, tables and the host."""
    config = thin_config(sizes.pick(48, 2))
    if sizes.quick:
        config = dataclasses.replace(config, num_experts=8, top_k=2)
    cases = (("pallas", 1.0), ("pallas", 0.25), ("reference", 1.0))
    for kernels, share in each(sizes.pick(cases, cases[1:2])):
        row = {"kernels": kernels, "residency": share}
        yield guarded(row, functools.partial(_measure, config, kernels, share, FetchAll(), sizes))


def _measure(
    config: ModelConfig, kernels: str, share: float, placement: Any, sizes: Any, overlap=0.4
) -> dict:
    model = Decoder(config, "bfloat16", None, kernels)
    bench = Bench(model, random_params(model), make_store(config, share == 1))
    ids = config.num_moe_layers * config.num_experts
    picks = script(sizes.pick(40, 4), config, overlap)
    slots = max(int(ids * share), config.top_k)
    return bench.run(lru(placement), slots, picks, warm=sizes.pick(12, 2))


def tpot(sizes: Any) -> Iterator[dict]:
    """Time per token of the whole model by residency, placement and overlap of adjacent tokens."""
    config = qwen3_config(48)
    if sizes.quick:
        config = dataclasses.replace(thin_config(2), num_experts=8, top_k=2)
    model = Decoder(config, "bfloat16", None, "pallas")
    params = random_params(model)
    ids = config.num_moe_layers * config.num_experts
    steps, warm = sizes.pick((72, 32), (4, 2))
    for on_device in sizes.pick((False, True), (False,)):
        bench = Bench(model, params, make_store(config, on_device))
        shares = (1.0,) if on_device else sizes.pick((0.125, 0.25, 0.5), (0.25,))
        for share in shares:
            cases = [(FetchAll(), overlap) for overlap in sizes.pick(OVERLAPS, OVERLAPS[:1])]
            if share == 0.25 and not sizes.quick:
                cases.append((HostAll(), OVERLAPS[0]))
            for placement, overlap in cases[: 1 if on_device else None]:
                row = {"residency": share, "overlap": overlap}
                row["placement"] = type(placement).__name__
                picks = script(steps, config, overlap)
                slots = max(int(ids * share), config.top_k)
                case = functools.partial(bench.run, lru(placement), slots, picks, warm)
                yield guarded(row, case)
        bench.store.records.delete()


def memory(sizes: Any) -> Iterator[dict]:
    """Scratch memory of a decode step by slots: it grows if XLA copies the pool."""
    config = dataclasses.replace(thin_config(4), width=256, expert_width=256)
    if sizes.quick:
        config = dataclasses.replace(thin_config(1), num_experts=4, top_k=2)
    model = Decoder(config, "bfloat16", None, "pallas")
    store = make_store(config, False)
    how, params = policy("lru"), random_params(model)
    for slots in sizes.pick((32, 256), (8,)):
        yield guarded(
            {"slots": slots}, functools.partial(_scratch, model, how, params, store, slots)
        )


def _scratch(model: Decoder, how: Policy, params: dict, store: ExpertStore, slots: int) -> dict:
    with kernel_mode():
        state = decode.init_state(model, how, store, slots=slots, context=64)
        tokens = jnp.zeros((1, 1), jnp.int32)
        lowered = decode.decode_step.lower(model, how, params, store, state, tokens)
        plan = lowered.compile().memory_analysis()
    pool = state.experts.pool.nbytes
    return {"pool_bytes": pool, "temp_bytes": plan.temp_size_in_bytes}
