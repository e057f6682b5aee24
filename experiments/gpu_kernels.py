"""Parts of the GPU suite: the expert kernels, right and fast?"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import environment as recorded
from experiments.gpu_common import (
    SHAPES,
    TINY,
    Shape,
    guarded,
    kernel_mode,
    median,
    memory_rate,
    on_gpu,
    random_records,
    timed,
)
from moejax.kernels import pallas, pallas_experts, reference
from moejax.kernels.weight import decode
from moejax.layout import FORMATS, RecordLayout

LIMITS = {"bfloat16": 2e-2}  # 1e-5 for the others
ODD = Shape("odd", 257, 129, 5, 3)


def environment(sizes: Any) -> Iterator[dict]:
    """Where this runs."""
    device = jax.devices()[0]
    rate = memory_rate(sizes.quick)
    yield {
        **recorded.environment("random weights"),
        "interpret": not on_gpu(),
        "compute_capability": str(getattr(device, "compute_capability", None)),
        "kernels": pallas.choose(jnp.zeros((1, 1), jnp.uint16)),
        "memory_gbps": rate / 1e9,
        "device_memory": (device.memory_stats() or {}).get("bytes_limit"),
    }


def _case(shape: Shape, format: str, tokens: int, rows: int, rng: np.random.Generator) -> tuple:
    layout = RecordLayout(width=shape.width, expert_width=shape.expert_width, dtype=format)
    source = random_records(rows, layout)
    picks = [rng.permutation(shape.experts)[: shape.top_k] for _ in range(tokens)]
    x = rng.standard_normal((tokens, shape.width), np.float32)
    return layout, source, np.array(picks, np.int32), x


def _run(kernels: Any, layout: RecordLayout, experts: int, source, index, picks, x, **options):
    """Mixture of one layer with equal weights."""
    plan = kernels.plan(picks, experts)
    rows = kernels.empty_rows(plan, layout.width)
    if options:
        made = pallas_experts.experts(layout, source, index, plan, x, rows, **options)
    else:
        _, made = kernels.experts(layout, source, index, plan, x, rows)
    return kernels.combine(plan, made, jnp.ones(picks.shape, jnp.float32))


def _float64(layout: RecordLayout, source: jax.Array, at: int, x: np.ndarray) -> np.ndarray:
    weights = {}
    for name, matrix in layout.matrices.items():
        start, shape = layout.parts[name]
        data = np.asarray(source[at])[start : start + int(np.prod(shape))]
        weights[name] = np.asarray(decode(matrix, jnp.asarray(data))).astype(np.float64)

    def rounded(a: np.ndarray) -> np.ndarray:
        if layout.dtype != "bfloat16":
            return a
        return np.asarray(a, np.float32).astype(jnp.bfloat16).astype(np.float64)

    gate, up = np.split(weights["gate_up"] @ rounded(x.astype(np.float64)), 2)
    with np.errstate(over="ignore"):
        return weights["down"] @ rounded(gate / (1 + np.exp(-gate)) * up)


def correctness(sizes: Any) -> Iterator[dict]:
    """Kernels and reference against NumPy float64, on published and odd shapes."""
    rng = np.random.default_rng(0)
    shapes = sizes.pick((SHAPES[0], SHAPES[2], ODD), (TINY,))
    for shape in shapes:
        for format in sizes.pick(FORMATS, ("bfloat16",)):
            for tokens in sizes.pick((1, 16, 64, 512), (2,)):
                row = {"shape": shape.name, "format": format, "tokens": tokens}
                yield guarded(row, functools.partial(_compare, shape, format, tokens, rng))


def _compare(shape: Shape, format: str, tokens: int, rng: np.random.Generator) -> dict:
    layout, source, picks, x = _case(shape, format, tokens, shape.experts + 3, rng)
    index = rng.permutation(shape.experts + 3)[: shape.experts].astype(np.int32)
    with kernel_mode():
        got, want = (
            np.asarray(
                jax.jit(functools.partial(_run, kernels, layout, shape.experts))(
                    source, index, picks, x
                )
            )
            for kernels in (pallas, reference)
        )
    token = tokens - 1
    exact = sum(_float64(layout, source, index[e], x[token]) for e in picks[token])
    scale = np.abs(exact).max()
    errors = {
        "pallas_error": float(np.abs(got[token] - exact).max() / scale),
        "reference_error": float(np.abs(want[token] - exact).max() / scale),
        "difference": float(np.abs(got - want).max() / np.abs(want).max()),
    }
    limit = LIMITS.get(format, 1e-5)
    return errors | {"ok": bool(errors["pallas_error"] < limit and errors["difference"] < limit)}


def bandwidth(sizes: Any) -> Iterator[dict]:
    """Time of the kernels over reading each needed weight once, beside the XLA reference."""
    rate = memory_rate(sizes.quick)
    yield {"shape": "stream read", "gbps": rate / 1e9}
    for format in sizes.pick(("bfloat16", "int8", "int4g32"), ("bfloat16",)):
        for shape in sizes.pick(SHAPES, (TINY,)):
            for tokens in sizes.pick((1, 4, 16, 64), (1,)):
                for name in ("pallas", "reference"):
                    if name == "reference" and tokens in (4, 16):
                        continue
                    row = {"shape": shape.name, "format": format, "tokens": tokens, "kernels": name}
                    case = functools.partial(_bandwidth, shape, format, tokens, name, rate, sizes)
                    yield guarded(row, case)


def _bandwidth(
    shape: Shape, format: str, tokens: int, name: str, rate: float, sizes: Any, **options: Any
) -> dict:
    rng = np.random.default_rng(1)
    layout = RecordLayout(width=shape.width, expert_width=shape.expert_width, dtype=format)
    # More experts than a cache holds, and others in every call.
    rows = max(shape.experts, sizes.pick((3 << 30) // layout.stride, 0))
    layout, source, _, x = _case(shape, format, tokens, rows, rng)
    calls = sizes.pick(10, 2)
    picks = np.array(
        [
            [rng.permutation(shape.experts)[: shape.top_k] for _ in range(tokens)]
            for _ in range(calls)
        ],
        np.int32,
    )
    index = np.array([rng.permutation(rows)[: shape.experts] for _ in range(calls)], np.int32)
    kernels = {"pallas": pallas, "reference": reference}[name]

    @jax.jit
    def chain(source, index, picks, x):
        for i in range(calls):
            y = _run(kernels, layout, shape.experts, source, index[i], picks[i], x, **options)
            x = x + 1e-30 * y  # the next call waits for this one
        return x

    with kernel_mode():
        samples = timed(chain, source, index, picks, x, repeats=sizes.pick(5, 1))
    needed = np.mean([len(np.unique(p)) for p in picks])
    seconds = median(samples) / calls
    bytes_read = needed * layout.weight_bytes
    return {
        "us": seconds * 1e6,
        "gbps": bytes_read / seconds / 1e9,
        "of_bound": bytes_read / rate / seconds,
        "experts": float(needed),
        "samples": samples,
    }


def tile_sweep(sizes: Any) -> Iterator[dict]:
    """Other tiles than the default ones, for one token of the first shape."""
    rate, shape = memory_rate(sizes.quick), sizes.pick(SHAPES[0], TINY)
    for format in sizes.pick(("bfloat16", "int8", "int4g32"), ("bfloat16",)):
        layout = RecordLayout(width=shape.width, expert_width=shape.expert_width, dtype=format)
        default = pallas_experts.default_tile(
            layout.matrices["down"], pallas_experts.Lanes.of(layout.matrices["down"], 1)
        )
        for tile in _tiles(default, format)[: sizes.pick(None, 1)]:
            tiles = pallas_experts.Tiles(gate_up=tile, down=tile)
            row = {"shape": shape.name, "format": format, **dataclasses.asdict(tile)}
            case = functools.partial(_bandwidth, shape, format, 1, "pallas", rate, sizes)
            yield guarded(row, functools.partial(case, tiles_of=tiles, interpret=not on_gpu()))


def _tiles(default: pallas_experts.Tile, format: str) -> list[pallas_experts.Tile]:
    change = functools.partial(dataclasses.replace, default)
    found = [default, change(rows=16, warps=1), change(rows=64, warps=4), change(warps=4)]
    found += [change(stages=2), change(stages=default.stages + 2), change(rows=16, warps=2)]
    if not format.startswith("int4"):
        found += [change(step=default.step // 2), change(step=default.step * 2, stages=3)]
    return found
