"""What `moejax plan` predicts against what was measured before, on this kind of machine.

Claim:     from configs and headers alone the time of a token is predicted with a median error of at
           most 25 %.
Command:   python -m experiments.plan_check --out experiments/results/plan_check.json
Hardware:  any CPU; 2 cores take a minute (--quick: the same). It reads the records in `results/`
           and measures nothing; rates come from moejax/planner/server_2core.json (`plan_machine`).
Expected:  the median errors in the summary, of tokens, prompts and each group of rows. Tokens of
           the embedded model take mostly constants, those of the 1.72 B model mostly bytes.

Hit rates are those to expect by the routing of other models (the embedded model's own curve is left
out), of the random model those of uniform routing. "At the measured hit rate" leaves only the error
of the arithmetic. Runs were under other load and at other times than the machine's measurement,
whose stream reads alone varied by 40 % within the peers' record. Rows "given tokens" chose no token
(`smoe_ablation`, `smoe_disk`), so choosing one is left out of their predictions.
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
from moejax.planner.layout import behind, chunk_of, read, work_of
from moejax.planner.machines import Machine
from moejax.planner.predict import Work
from moejax.policies.policy import policy
from moejax.units import parse_bytes

RESULTS = pathlib.Path(__file__).parent / "results"
PEERS = {"moejax bf16": None, "moejax int8": "int8", "moejax int4": "int4"}
EMBEDDED = "embedded model"
LIMIT = 0.25
GROUPS = {
    "resident": "all resident",
    "memory": "copies in memory",
    "link": "paced link",
    "disk": "disk",
}
SPLIT = "paced link, split with the host"


def record(name: str, folder: pathlib.Path) -> dict[str, Any]:
    """A record in a folder."""
    return json.loads((folder / f"{name}.json").read_text())


def work(config: Any, quant: str | None, context: int) -> Work:
    """What a token of a model reads, quantised or not."""
    form = quant_format(quant, 32)
    kv = devices.kv_bytes(Decoder(config, "bfloat16", form), 1, context) / context
    return work_of(config, "bfloat16", form, kv)


def row(
    kind: str,
    group: str,
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
        "group": group,
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


class Embedded:
    """The embedded model's measured times beside their predictions."""

    def __init__(self, machine: Machine, folder: pathlib.Path):
        config = read("tiny").config
        self.machine, self.folder = machine, folder
        self.sizes = (config.num_moe_layers, config.num_experts, config.top_k)
        self.curves = [curve for curve in reuse.curves() if curve.model != EMBEDDED]
        self.work = work(config, None, 512)

    def compare(
        self, what: str, found: dict, at: float, tier: str, on: Machine | None = None, **how: Any
    ) -> dict[str, Any]:
        """One row, grouped by where experts are.

        Args:
            found: slots, hit rate and milliseconds, as measured.
            at: tokens in the KV cache, in the mean.
            how: of `predict.token`.
        """
        on = on or self.machine
        hits = reuse.expected(found["slots"], *self.sizes, known=self.curves).middle
        times, known = (
            predict.token(self.work, on, tier, rate, at, **how)
            for rate in (hits, found["hit_rate"])
        )
        rates = (found["hit_rate"], hits) if tier != "resident" else (1.0, 1.0)
        kind = EMBEDDED if how.get("drawn", True) else f"{EMBEDDED}, given tokens"
        group = f"tokens, {SPLIT if how.get('hosted') else GROUPS[tier]}"
        return row(kind, group, f"{kind}, {what}", found["tpot_ms"], times, on, tier, *rates, known)

    def residency(self) -> list[dict[str, Any]]:
        """Copies within memory, with five log-probabilities beside each token."""
        return [
            self.compare(
                f"{found['residency']:.1%} resident, copies",
                *(found, 80, "resident" if found["residency"] == 1 else "memory"),
            )
            for found in record("residency", self.folder)["rows"]
        ]

    def given(self) -> list[dict[str, Any]]:
        """Given tokens over a paced link and from the disk."""
        ablation = record("smoe_ablation", self.folder)
        paced = behind(self.machine, tiers.parse_link(ablation["link"]["link"]), self.work)
        alone = [r for r in ablation["rows"] if r["batch"] == 1]
        rows = [
            self.compare(
                f"{found['residency']:.0%} resident, paced link",
                found,
                96,
                "link",
                paced,
                drawn=False,
            )
            for found in alone
            if found["name"] == "lru"
        ]
        [found] = [r for r in alone if r["name"] == "all resident"]
        rows.append(self.compare("all resident", found, 96, "resident", drawn=False))
        disk = record("smoe_disk", self.folder)["rows"]
        [found] = [r for r in disk if r["name"] == "lru"]
        return [*rows, self.compare("40% resident, disk", found, 96, "disk", drawn=False)]

    def frontier(self) -> list[dict[str, Any]]:
        """Generated tokens over a paced link, with all misses moved and with a split."""
        report = record("speculation_frontier", self.folder)
        paced = behind(self.machine, tiers.parse_link(report["link"]), self.work)
        layers, experts, _ = self.sizes
        rows = []
        for name, hosted in (("lru", False), ("auto:gamma=0", True), ("all resident", False)):
            for found in report["rows"]:
                if found["name"] != name or found["gamma"] != "":
                    continue
                share = found["residency"]
                about = found | {
                    "slots": int(share * layers * experts + 1e-9),
                    "hit_rate": found["hits"] / found["needed"],
                }
                where = ("resident", None) if share == 1 else ("link", paced)
                what = f"{share:.1%} resident, paced link, {name}"
                waited = found["late"] * predict.moving_ms(self.work, paced, "link", 1)
                late = {"late_per_token": found["late"], "late_ms": waited}
                rows.append(self.compare(what, about, 96, *where, hosted=hosted) | late)
        return rows


def random(machine: Machine, folder: pathlib.Path) -> list[dict[str, Any]]:
    """The random model of 1.72 B parameters: tokens, prompts, and a memory limit."""
    config = config_from_hf(random_model.make_config())
    total = config.num_moe_layers * config.num_experts
    rows = []
    for found in record("peers_cpu", folder)["rows"]:
        if found["peer"] not in PEERS:
            continue
        count = int(found["test"][2:])
        of_model = work(config, PEERS[found["peer"]], 1024)
        what = f"1.72 B, {found['peer'].split()[1]}, {found['test']}"
        if found["test"].startswith("tg"):
            times = predict.token(of_model, machine, "resident", 1.0, count / 2)
            kind, group = "1.72 B, tokens", "tokens, 1.72 B"
        else:
            whole = predict.prompt(of_model, machine, "resident", total, count, chunk_of(count))
            each = {f.name: getattr(whole, f.name) / count for f in dataclasses.fields(whole)}
            times, kind = predict.Times(**each), "1.72 B, prompts, per token"
            group = "prompts, 1.72 B"
        rows.append(row(kind, group, what, found["ms_per_token"], times, machine, "resident"))
    return sorted(rows, key=lambda r: (r["kind"], r["what"])) + [limited(machine, config, folder)]


def limited(machine: Machine, config: Any, folder: pathlib.Path) -> dict[str, Any]:
    """The same model with most experts on the disk."""
    report = record("peers_cpu_limited", folder)
    [found] = [r for r in report["limited"] if r["peer"] == "moejax bf16"]
    options = json.loads(report["command"].split("--moejax-options ")[1].split(" --out")[0])
    model = Decoder(config, "bfloat16", None, devices.kernels(None))
    memory = parse_bytes(options["host_memory"])
    _, slots = tiers.on_host(model, policy("lru"), memory, options["context"], 1, None)
    sizes = (slots, config.num_moe_layers, config.num_experts, config.top_k)
    share, hits = slots / (sizes[1] * sizes[2]), reuse.uniform(*sizes)
    times = predict.token(work(config, None, 512), machine, "disk", hits, 8)
    what = f"1.72 B, bf16, {share:.0%} resident, disk"
    group = "tokens, disk"
    return row(
        "1.72 B, disk", group, what, found["ms_per_token"], times, machine, "disk", None, hits
    )


def summarise(rows: list[dict]) -> dict[str, Any]:
    """Medians and largest of the errors' sizes: of all rows, of tokens, prompts and each group."""
    known = [r["error_with_hit_rate"] for r in rows if r["error_with_hit_rate"] is not None]
    names = sorted({row["group"] for row in rows})
    groups = {name: [row for row in rows if row["group"] == name] for name in names}
    return {
        "median_error": _median(rows),
        "median_error_of_tokens": _median([r for r in rows if r["group"].startswith("tokens")]),
        "median_error_of_prompts": _median([r for r in rows if r["group"].startswith("prompts")]),
        "largest_error": max(abs(r["error"]) for r in rows),
        "median_error_at_measured_hit_rates": statistics.median(map(abs, known)),
        "by_group": [
            {
                "group": group,
                "rows": len(own),
                "median_error": _median(own),
                "median_bias": statistics.median(r["error"] for r in own),
                "largest_error": max(abs(r["error"]) for r in own),
            }
            for group, own in groups.items()
        ],
    }


def beyond_resident(rows: list[dict]) -> list[dict[str, Any]]:
    """What tokens of one record take beyond those with everything resident in it, in milliseconds.

    Predicted at the measured hit rate, so that neither the state of the machine when the record was
    made nor the hit rate is in the difference. Prefetched records that are needed before they are
    there are no misses, and no part of the prediction: with them, each takes a whole load.
    """
    [base] = [row for row in rows if row["group"] == f"tokens, {GROUPS['resident']}"]
    return [
        {
            "what": row["what"],
            "measured_ms": row["measured_ms"] - base["measured_ms"],
            "predicted_ms": row["with_hit_rate_ms"] - base["predicted_ms"],
            "late_per_token": row["late_per_token"],
            "with_late_ms": row["with_hit_rate_ms"] - base["predicted_ms"] + row["late_ms"],
        }
        for row in rows
        if row is not base
    ]


def _median(rows: list[dict]) -> float:
    return statistics.median(abs(r["error"]) for r in rows)


def main() -> None:
    """Predict, compare and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="no different")
    parser.add_argument("--hardware", default="server-2core", help="a preset or a JSON file")
    parser.add_argument("--results", type=pathlib.Path, default=RESULTS, help="folder of records")
    parser.add_argument("--out", type=pathlib.Path)
    options = parser.parse_args()
    machine = machines.machine(options.hardware)
    found = Embedded(machine, options.results)
    frontier = found.frontier()
    rows = found.residency() + found.given() + frontier + random(machine, options.results)
    summary = summarise(rows)
    report = {
        "claim": "the time of a token is predicted from configs and headers with a median error "
        "within 25 %",
        "command": f"python -m experiments.plan_check --hardware {options.hardware}",
        "environment": environment("tiny and the random model of 1.72 B parameters"),
        "machine": dataclasses.asdict(machine),
        "rows": rows,
        "beyond_resident": beyond_resident(frontier),
        "summary": summary,
        "verdict": "holds" if summary["median_error_of_tokens"] <= LIMIT else "fails",
    }
    if options.out:
        options.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps({"summary": summary, "verdict": report["verdict"]}, indent=1))


if __name__ == "__main__":
    main()
