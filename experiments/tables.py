"""Write the result tables of README.md from experiments/results/*.json.

Command:   python -m experiments.tables            (--check: fail if a table is out of date)
"""

import argparse
import json
import pathlib
import re

ROOT = pathlib.Path(__file__).parent.parent
RESULTS = ROOT / "experiments" / "results"
BLOCK = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def residency(report: dict) -> list[str]:
    """Rows of `experiments.residency`."""
    lines = [
        "| experts resident | slots | hit rate | MB copied per token | TPOT, ms | same bits |",
        "|---:|---:|---:|---:|---:|---|",
    ]
    for row in report["rows"]:
        lines.append(
            f"| {row['residency']:.1%} | {row['slots']} | {row['hit_rate']:.1%} "
            f"| {row['bytes_per_token'] / 1e6:.2f} | {row['tpot_ms']:.2f} "
            f"| {'yes' if row['same_bits'] else 'NO'} |"
        )
    return [*lines, "", _source(report)]


def quantisation(report: dict) -> list[str]:
    """Rows of `experiments.quantisation`."""
    domains = list(report["windows"])
    lines = [
        f"| weights | KB per expert | MB in all | {' | '.join(domains)} | change (95 %) | greedy |",
        "|---|---:|---:|" + "---:|" * len(domains) + "---:|---:|",
    ]
    for row in report["rows"]:
        table = row["held_out"]
        low, high = table["all"]["interval"]
        change = f"{table['all']['change']:+.2%} ({low:+.2%} to {high:+.2%})"
        lines.append(
            f"| {row['format']} | {row['record_bytes'] / 1e3:.1f} | {row['total_bytes'] / 1e6:.1f} "
            f"| {' | '.join(format(table[d]['perplexity'], '.2f') for d in domains)} "
            f"| {change if high > low else '–'} | {table['all']['greedy_agreement']:.1%} |"
        )
    return [*lines, "", _source(report)]


PEERS = {
    "bf16": ("moejax bf16", "llama.cpp BF16", "transformers bf16"),
    "8 bits": ("moejax int8", "llama.cpp Q8_0", None),
    "4 bits": ("moejax int4", "llama.cpp Q4_0", None),
}


def peers_cpu(report: dict) -> list[str]:
    """Milliseconds per token of `experiments.peers_cpu`, by test and bits."""
    rows = {(row["test"], row["peer"]): row for row in report["rows"]}
    lines = [
        "| ms per token | bits | moejax | llama.cpp | transformers | moejax over llama.cpp "
        "| share of the bandwidth bound |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for test in sorted({test for test, _ in rows}, key=lambda t: (t[:2] != "tg", int(t[2:]))):
        for bits, names in PEERS.items():
            found = [rows.get((test, name)) for name in names]
            times = [f"{row['ms_per_token']:.2f}" if row else "" for row in found]
            bound = found[0]["bound_fraction"]
            ratio = found[0]["ratios"].get(names[1])
            lines.append(
                f"| {test} | {bits} | {' | '.join(times)} | {ratio:.2f}x "
                f"| {'' if bound is None else format(bound, '.0%')} |"
            )
    reads = [s["stream_read_gb_per_s"] for s in report["samples"] if s["stream_read_gb_per_s"]]
    environment = report["environment"]
    return [
        *lines,
        "",
        f"{environment['cpu']}, {environment['cpus']} cores, in turn, medians; stream reads in "
        f"between: {min(reads):.0f} to {max(reads):.0f} GB/s; `python -m experiments.peers_cpu`.",
    ]


def peers_cpu_limited(report: dict) -> list[str]:
    """Decode times of `experiments.peers_cpu --limit`."""
    lines = [
        "| under a memory limit | ms per token | limit, GB | peak, GB | model file, GB |",
        "|---|---:|---:|---:|---:|",
    ]
    for row in report["limited"]:
        memory = row["memory"]
        lines.append(
            f"| {row['peer']} | {row['ms_per_token']:.0f} | {memory['limit'] / 1e9:.2f} "
            f"| {memory['peak'] / 1e9:.2f} | {row['file_bytes'] / 1e9:.2f} |"
        )
    environment = report["environment"]
    return [
        *lines,
        "",
        f"{environment['cpu']}, {environment['cpus']} cores, control group with page cache; "
        "`python -m experiments.peers_cpu --limit 1.5GB`.",
    ]


def smoe_ablation(report: dict) -> list[str]:
    """Times and bytes of `experiments.smoe_ablation` at 40 % residency, batch 1, alpha 0.25."""
    rows = [row for row in report["rows"] if row["batch"] == 1 and row["residency"] in (0.4, 1.0)]
    rows = [row for row in rows if row["alpha"] in (None, 0.25)]
    lru = next(row for row in rows if row["name"] == "lru")
    lines = [
        "| 40 % resident, batch 1 | TPOT, ms | over LRU | missed KB per token | moved KB per token "
        "| experts on the host | perplexity over exact |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        ratio = row.get("perplexity_over_exact")
        lines.append(
            f"| {row['name']} | {row['tpot_ms']:.2f} | {row['tpot_ms'] / lru['tpot_ms']:.2f}x "
            f"| {row['missed_bytes_per_token'] / 1e3:.0f} "
            f"| {row['moved_bytes_per_token'] / 1e3:.0f} | {row['host_per_token']:.1f} "
            f"| {'' if ratio is None else format(ratio, '.4f')} |"
        )
    return [*lines, "", _source(report)]


def smoe_alpha(report: dict) -> list[str]:
    """Loss of `experiments.smoe_alpha` at 40 % residency over all domains."""
    lines = [
        "| router | alpha | perplexity over exact (95 %) | KL of a step | KL of the run "
        "| likeliest token changed | picks replaced per layer | hits |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in report["rows"]:
        if row.get("domain") != "all" or row["residency"] != 0.4:
            continue
        low, high = row["interval"]
        alpha = "" if row["alpha"] is None else f"{row['alpha']:.2f}"
        lines.append(
            f"| {row['router']} | {alpha} | {row['perplexity_over_exact']:.4f} "
            f"({low:.4f} to {high:.4f}) | {row['local_kl']:.4f} | {row['trajectory_kl']:.4f} "
            f"| {row['flips']:.1%} | {row['replaced']:.2f} | {row['hit_rate']:.1%} |"
        )
    return [*lines, "", _source(report)]


def speculation_frontier(report: dict) -> list[str]:
    """Times of exact systems by residency, and what their cycles make at 50 %."""
    rows = [row for row in report["rows"] if row["gamma"] == ""]
    shares = sorted({row["residency"] for row in rows if row["name"] == "lru"})
    lines = [
        "| TPOT, ms, exact | " + " | ".join(f"{share:.1%}" for share in shares) + " | tokens per "
        "cycle at 50 % | missed KB per token | moved KB per token | experts on the host |",
        "|---|" + "---:|" * (len(shares) + 4),
    ]
    record = report["record_bytes"] / 1e3
    for name in dict.fromkeys(row["name"] for row in rows):
        own = {row["residency"]: row for row in rows if row["name"] == name}
        times = [f"{own[s]['tpot_ms']:.2f}" if s in own else "" for s in shares]
        at = own.get(0.5) or own.get(1.0)
        if 1.0 in own:
            times = [f"{at['tpot_ms']:.2f}"] * len(shares)
        lines.append(
            f"| {name} | {' | '.join(times)} | {at['tokens_per_cycle']:.2f} "
            f"| {at['missed'] * record:.0f} | {at['moved_bytes'] / 1e3:.0f} | {at['host']:.1f} |"
        )
    return [*lines, "", _source(report)]


def _source(report: dict) -> str:
    """Hardware, versions and command of a result."""
    environment = report["environment"]
    versions = environment["versions"]
    return (
        f"{environment['cpu']}, {environment['cpus']} cores, Python {versions['python']}, JAX "
        f"{versions['jax']}; `{report['command']}`."
    )


TABLES = {
    "residency": residency,
    "quantisation": quantisation,
    "peers_cpu": peers_cpu,
    "peers_cpu_limited": peers_cpu_limited,
    "smoe_ablation": smoe_ablation,
    "smoe_alpha": smoe_alpha,
    "speculation_frontier": speculation_frontier,
}


def filled(text: str) -> str:
    """The text with every marked table rewritten."""

    def replace(found: re.Match) -> str:
        report = json.loads((RESULTS / f"{found[2]}.json").read_text())
        return found[1] + "\n".join(TABLES[found[2]](report)) + "\n" + found[3]

    return BLOCK.sub(replace, text)


def main() -> None:
    """Rewrite README.md, or check it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    readme = ROOT / "README.md"
    old = readme.read_text()
    new = filled(old)
    if parser.parse_args().check and new != old:
        raise SystemExit("README.md is out of date: run python -m experiments.tables")
    readme.write_text(new)


if __name__ == "__main__":
    main()
