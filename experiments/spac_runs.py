"""What `spac_utility` runs: timed configurations, the device's costs, and the drift of gates."""

import argparse
import dataclasses
import pathlib
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np

import moejax
from experiments import smoe_common as common
from experiments import speculation_common as speculation
from experiments.smoe_common import Text
from experiments.spac_windows import WINDOW
from moejax.decode import rewind
from moejax.policies.policy import policy

CAP, GAMMA, TEMPERATURE = 5, 8, 1.0
THRESHOLDS = (1, 2, 3)
MAIN = 48  # slots of 192, where only one budget is measured


def host_costs(runtime: moejax.Runtime, prompt: np.ndarray) -> dict[str, float]:
    """Microseconds for the balancer: the device timed with all resident, host and link as paced."""
    everything = dataclasses.replace(
        runtime, policy=policy("lru"), slots=common.experts_of(runtime)
    )
    seconds, state = {}, everything.init_state(1, context=128)
    for tokens in (1, WINDOW):
        feed, best = np.asarray(prompt[:tokens], np.int32)[None], []
        for _ in range(40):
            state, begun = rewind(state, np.zeros(1)), time.perf_counter()
            state, out = everything.decode_step(state, feed, prefill=False)
            out.logits.block_until_ready()
            best.append(time.perf_counter() - begun)
        seconds[tokens] = float(np.median(best[5:])) * 1e6 / runtime.config.num_moe_layers
    grown = (seconds[WINDOW] - seconds[1]) / (WINDOW - 1)
    each = max(grown / runtime.config.top_k, 0.0)
    fixed = max(seconds[1] - each * runtime.config.top_k, 0.0)
    paced = {"host": speculation.HOST_US, "load": speculation.LOAD_US}
    return {"device": fixed, "device_token": each, "host_token": 0.0, "hidden": 0.0, **paced}


@dataclasses.dataclass(frozen=True)
class Case:
    """One timed configuration."""

    name: str
    slots: int = MAIN
    cap: int = CAP
    threshold: int = 1
    temperature: float = TEMPERATURE

    @property
    def text(self) -> str:
        """As `moejax.policies.policy` takes it."""
        load, host = speculation.LOAD_US, speculation.HOST_US
        numbers = {
            "moe-spac": f":gamma={GAMMA},cap={self.cap},threshold={self.threshold}",
            "hybrimoe": f":load={load:g},host={host:g},device={load / 30:g}",
        }
        return self.name + numbers.get(self.name, "")


def cases(options: argparse.Namespace, beside: int) -> list[Case]:
    """All timed configurations, each once.

    Args:
        beside: slots that the draft model's memory would hold: others may have them instead.
    """
    names = ("moe-spac", *options.rivals)
    found = [Case(name, slots) for slots in options.slots for name in names]
    found += [Case("moe-spac", cap=cap) for cap in options.caps]
    found += [Case("moe-spac", threshold=k) for k in THRESHOLDS]
    found += [Case(n, temperature=t) for t in options.temperatures for n in names]
    found += [Case(n, MAIN + beside) for n in options.rivals if n != "sp-moe"]
    return [*dict.fromkeys(found)]


def draft_slots(runtime: moejax.Runtime) -> int:
    """How many experts the draft model's weights take the place of."""
    weights = sum(x.nbytes for x in jax.tree.leaves(runtime.draft.params))
    return weights // runtime.store.layout.stride


def timed_rows(virtual: moejax.Runtime, text: Text, options: argparse.Namespace) -> list[dict]:
    """Time per token over the paced link, interleaved."""
    record = virtual.store.layout.stride
    chosen = cases(options, draft_slots(virtual))
    over, context = speculation.link(record), 64 + options.timed
    base = speculation.base_runtime(max(case.slots for case in chosen), over, context=context)
    groups = speculation.prompts_of(_first(text, 1), 1)
    seats = [int(i) for i in common.popular(virtual, text)]
    with tempfile.TemporaryDirectory() as folder:
        runs = {}
        for case in chosen:
            made = dataclasses.replace(policy(case.text), capacity=jnp.int32(case.slots))
            runtime = common.with_policy(base, made, base.slots)
            if case.name == "host":  # nothing is moved: the most popular ones are there
                path = pathlib.Path(folder) / f"{case.slots}.json"
                runtime = common.seated(runtime, seats[: case.slots], path)
            numbers = {"temperature": case.temperature, "seed": options.seed}
            runs[case] = speculation.Generation(runtime, groups, options.timed, **numbers)
        found = common.in_rounds(runs, options.rounds, options.seed)
    rows = []
    for case in chosen:
        run = common.merged(found[case])
        times = {"tpot_ms": run.pop("tpot") * 1e3, "tpot_ms_spread": run.pop("tpot_spread") * 1e3}
        rows.append({**dataclasses.asdict(case), "policy": case.text, **times, **run})
    return rows


def _first(text: Text, number: int) -> Text:
    return Text({name: rows[:number] for name, rows in text.measured.items()}, text.profile)


def drift_rows(target: moejax.Runtime, feeds: np.ndarray) -> list[dict]:
    """Theorem 1 by layer: gate scores against inputs of consecutive tokens of [N, T]."""
    bits = jnp.asarray(target.params["moe"]["router"])
    gate = np.asarray(jax.lax.bitcast_convert_type(bits, jnp.bfloat16).astype(jnp.float32))
    rows = []
    whole = dataclasses.replace(target, slots=common.experts_of(target))
    for name, runtime in (("target", whole), ("draft", target.draft)):
        inputs, scores = [], []
        for feed in feeds:
            state = runtime.init_state(1, context=feeds.shape[1])
            options = {"hidden": "normed", "prefill": False, "scores": name == "target"}
            _, out = runtime.decode_step(state, np.asarray(feed, np.int32)[None], **options)
            hidden = np.asarray(out.hidden)
            own = np.asarray(jax.nn.softmax(np.einsum("ltd,led->lte", hidden, gate)))
            if name == "target" and not np.allclose(own, out.trace.scores, atol=1e-3):
                raise RuntimeError("these are not the target's gates")
            inputs.append(np.linalg.norm(np.diff(hidden, axis=1), axis=2))
            scores.append(np.linalg.norm(np.diff(own, axis=1), axis=2))
        found = drift(*(np.concatenate(parts, axis=1) for parts in (inputs, scores)))
        rows += [{"model": name, "layer": i, **row} for i, row in enumerate(found)]
    return rows


def drift(inputs: np.ndarray, scores: np.ndarray) -> list[dict[str, float]]:
    """By layer, of norms of differences [L, T] of its inputs and of its gate scores.

    The bound is the first input's drift times a factor per layer times one of the gate, each the
    least with which the form holds here: the greatest seen.
    """
    grown = (inputs[1:] / inputs[:-1]).max(axis=1)
    rows = []
    for layer, own in enumerate(scores):
        ratio = own / inputs[0]
        factor = float(np.prod(grown[:layer]) * (own / inputs[layer]).max())
        rows.append(
            {
                "ratio_mean": float(ratio.mean()),
                "ratio_max": float(ratio.max()),
                "factor": factor,
                "bound_over_drift": float(np.median(factor * inputs[0] / own)),
                "correlation_with_input": float(np.corrcoef(inputs[0], own)[0, 1]),
                "correlation_with_own_layer": float(np.corrcoef(inputs[layer], own)[0, 1]),
            }
        )
    return rows
