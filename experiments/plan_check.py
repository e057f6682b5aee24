"""What `moejax plan` predicts against what was measured before, on this kind of machine.

Claim:     from configs and headers alone the time of a token and of a prompt is predicted with a
           median error of at most 25 %.
Command:   python -m experiments.plan_check --out experiments/results/plan_check.json
Hardware:  any CPU; 2 cores take a minute (--quick: the same). It reads the records in `results/`
           and measures nothing; rates come from moejax/planner/server_2core.json (`plan_machine`).
Expected:  the median error in the summary. Tokens of the embedded model take mostly constants,
           those of the 1.72 B model mostly bytes.

Hit rates are those to expect by the routing of other models (the embedded model's own curve is left
out), of the random model those of uniform routing. "At the measured hit rate" leaves only the error
of the arithmetic. Runs were under other load and at other times than the machine's measurement,
whose stream reads alone varied by 40 % within the peers' record. Runs of `residency` also asked for
the log-probabilities of five tokens beside each, which a plan does not count.
"""

import argparse
import dataclasses
import json
import pathlib
import statistics
from typing import Any

from experiments import random_model
from experiments.environment import environment
from moejax import devices, tiers
from moejax.formats import quant_format
from moejax.models import config_from_hf
from moejax.models.transformer import Decoder
from moejax.planner import machines, predict, reuse
from moejax.planner.machines import Machine
from moejax.planner.plan import chunk_of, read, work_of
from moejax.planner.predict import Work
from moejax.policies.policy import policy
from moejax.units import parse_bytes

RESULTS = pathlib.Path(__file__).parent / "results"
PEERS = {"moejax bf16": None, "moejax int8": "int8", "moejax int4": "int4"}
EMBEDDED = "embedded model"
LIMIT = 0.25


def record(name: str) -> dict[str, Any]:
    """A record in `results/`."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def work(config: Any, quant: str | None, context: int) -> Work:
    """What a token of a model reads, quantised or not."""
    form = quant_format(quant, 32)
    kv = devices.kv_bytes(Decoder(config, "bfloat16", form), 1, context) / context
    return work_of(config, "bfloat16", form, kv)


def row(
    kind: str,
    what: str,
    measured_ms: float,
    times: predict.Times,
    machine: Machine,
    tier: str,
    hit_rate: float | None = None,
    expected: float | None = None,
    known: predict.Times | None = None,
) -> dict[str, Any]:
    """One comparison; `known` is the prediction at the measured hit rate."""
    total = times.total_ms
    return {
        "kind": kind,
        "what": what,
        "measured_ms": measured_ms,
        "predicted_ms": total,
        "error": total / measured_ms - 1,
        "with_hit_rate_ms": known and known.total_ms,
        "error_with_hit_rate": known and known.total_ms / measured_ms - 1,
        "hit_rate": hit_rate,
        "expected_hit_rate": expected,
        "limit": times.limit(machine, tier),
        "times": times.as_dict(),
    }


def embedded(machine: Machine) -> list[dict[str, Any]]:
    """The embedded model under budgets: copies within memory, a paced link, the disk."""
    config = read("tiny").config
    sizes = (config.num_moe_layers, config.num_experts, config.top_k)
    curves = [curve for curve in reuse.curves() if curve.model != EMBEDDED]
    of_model = work(config, None, 512)
    rows = []

    def compare(
        what: str, on: Machine, tier: str, found: dict, at: float, kind: str = EMBEDDED
    ) -> None:
        slots = found["slots"]
        hits = reuse.expected(slots, *sizes, known=curves).middle
        times, known = (
            predict.token(of_model, on, tier, rate, at) for rate in (hits, found["hit_rate"])
        )
        text = f"embedded model, {what}"
        rates = (found["hit_rate"], hits) if tier != "resident" else (1.0, 1.0)
        rows.append(row(kind, text, found["tpot_ms"], times, on, tier, *rates, known))

    for found in record("residency")["rows"]:
        tier = "resident" if found["residency"] == 1 else "memory"
        what = f"{found['residency']:.1%} resident, copies, log-probabilities"
        compare(what, machine, tier, found, 80, f"{EMBEDDED}, log-probabilities")
    ablation, disk = record("smoe_ablation"), record("smoe_disk")
    link = tiers.parse_link(ablation["link"]["link"])
    rate = {"link_gb_per_s": link.gigabytes_per_second, "link_latency_us": link.latency_us}
    paced = dataclasses.replace(machine, link="paced link", **rate)
    for share in (0.25, 0.4, 0.6):
        [found] = [
            r
            for r in ablation["rows"]
            if (r["name"], r["residency"], r["batch"]) == ("lru", share, 1)
        ]
        compare(f"{share:.0%} resident, paced link", paced, "link", found, 96)
    [found] = [r for r in ablation["rows"] if (r["name"], r["batch"]) == ("all resident", 1)]
    compare("all resident", machine, "resident", found, 96)
    [found] = [r for r in disk["rows"] if r["name"] == "lru"]
    compare("40% resident, disk", machine, "disk", found, 96)
    return rows


def random(machine: Machine) -> list[dict[str, Any]]:
    """The random model of 1.72 B parameters: tokens, prompts, and a memory limit."""
    config = config_from_hf(random_model.make_config())
    total = config.num_moe_layers * config.num_experts
    rows = []
    for found in record("peers_cpu")["rows"]:
        if found["peer"] not in PEERS:
            continue
        count = int(found["test"][2:])
        of_model = work(config, PEERS[found["peer"]], 1024)
        what = f"1.72 B, {found['peer'].split()[1]}, {found['test']}"
        if found["test"].startswith("tg"):
            times = predict.token(of_model, machine, "resident", 1.0, count / 2)
            kind = "1.72 B, tokens"
        else:
            whole = predict.prompt(of_model, machine, "resident", total, count, chunk_of(count))
            each = {f.name: getattr(whole, f.name) / count for f in dataclasses.fields(whole)}
            times, kind = predict.Times(**each), "1.72 B, prompts, per token"
        rows.append(row(kind, what, found["ms_per_token"], times, machine, "resident"))
    return sorted(rows, key=lambda r: (r["kind"], r["what"])) + [limited(machine, config)]


def limited(machine: Machine, config: Any) -> dict[str, Any]:
    """The same model with most experts on the disk."""
    report = record("peers_cpu_limited")
    [found] = [r for r in report["limited"] if r["peer"] == "moejax bf16"]
    options = json.loads(report["command"].split("--moejax-options ")[1].split(" --out")[0])
    model = Decoder(config, "bfloat16", None, devices.kernels(None))
    memory = parse_bytes(options["host_memory"])
    _, slots = tiers.on_host(model, policy("lru"), memory, options["context"], 1, None)
    sizes = (slots, config.num_moe_layers, config.num_experts, config.top_k)
    share, hits = slots / (sizes[1] * sizes[2]), reuse.uniform(*sizes)
    times = predict.token(work(config, None, 512), machine, "disk", hits, 8)
    what = f"1.72 B, bf16, {share:.0%} resident, disk"
    return row("1.72 B, disk", what, found["ms_per_token"], times, machine, "disk", None, hits)


def main() -> None:
    """Predict, compare and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="no different")
    parser.add_argument("--hardware", default="server-2core", help="a preset or a JSON file")
    parser.add_argument("--out", type=pathlib.Path)
    options = parser.parse_args()
    machine = machines.machine(options.hardware)
    rows = embedded(machine) + random(machine)
    errors = [abs(r["error"]) for r in rows]
    known = [abs(r["error_with_hit_rate"]) for r in rows if r["error_with_hit_rate"] is not None]
    kinds = dict.fromkeys(r["kind"] for r in rows)
    summary = {
        "median_error": statistics.median(errors),
        "largest_error": max(errors),
        "median_error_at_measured_hit_rates": statistics.median(known),
        "median_error_by_kind": {
            kind: statistics.median(abs(r["error"]) for r in rows if r["kind"] == kind)
            for kind in kinds
        },
    }
    report = {
        "claim": "times are predicted from configs and headers with a median error within 25 %",
        "command": f"python -m experiments.plan_check --hardware {options.hardware}",
        "environment": environment("tiny and the random model of 1.72 B parameters"),
        "machine": dataclasses.asdict(machine),
        "rows": rows,
        "summary": summary,
        "verdict": "holds" if summary["median_error"] <= LIMIT else "fails",
    }
    if options.out:
        options.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps({"summary": summary, "verdict": report["verdict"]}, indent=1))


if __name__ == "__main__":
    main()
