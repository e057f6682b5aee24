"""The tables of documents, from the JSON records of experiments.

A record is drawn by the function of its file's name here, or by its own `table`:
{"columns": [{"title": .., "value": "path.in.row", "form": "{:.2f}"}], "rows": "rows",
"where": {"batch": 1}}; `rows` names a list of the record, `where` what its rows must have.
"""

from collections.abc import Callable
from typing import Any

from moejax.errors import InputError
from moejax.reports.paths import value_at

Record = dict[str, Any]


def residency(report: Record) -> list[str]:
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


def quantisation(report: Record) -> list[str]:
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
    "bf16, `amxbf16`": ("moejax bf16 on tiles", "llama.cpp BF16", "transformers bf16"),
    "8 bits": ("moejax int8", "llama.cpp Q8_0", None),
    "4 bits": ("moejax int4", "llama.cpp Q4_0", None),
}


def peers_cpu(report: Record) -> list[str]:
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
            if found[0] is None:
                continue
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
        f"{environment['cpu']}, {environment['cpus']} cores{commit_of(report)}, in turn, medians; "
        f"stream reads in between: {min(reads):.0f} to {max(reads):.0f} GB/s; "
        "`python -m experiments.peers_cpu`.",
    ]


def peers_cpu_limited(report: Record) -> list[str]:
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
        f"{environment['cpu']}, {environment['cpus']} cores{commit_of(report)}, control group with "
        "page cache; "
        "`python -m experiments.peers_cpu --limit 1.5GB`.",
    ]


def smoe_ablation(report: Record) -> list[str]:
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


def smoe_alpha(report: Record) -> list[str]:
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


def speculation_frontier(report: Record) -> list[str]:
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


def plan_check(report: Record) -> list[str]:
    """Predicted and measured times of `experiments.plan_check`."""
    lines = [
        "| what was measured | measured, ms | predicted, ms | error | at the measured hit rate, "
        "ms | error | hit rate, measured | expected | limit |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    for row in report["rows"]:
        hits = [row["hit_rate"], row["expected_hit_rate"]]
        known = row["with_hit_rate_ms"]
        lines.append(
            f"| {row['what']} | {row['measured_ms']:.2f} | {row['predicted_ms']:.2f} "
            f"| {row['error']:+.0%} | {'' if known is None else format(known, '.2f')} "
            f"| {'' if known is None else format(row['error_with_hit_rate'], '+.0%')} "
            f"| {' | '.join('' if h is None else format(h, '.0%') for h in hits)} "
            f"| {row['limit']} |"
        )
    lines += [
        "",
        "| errors of | rows | median size | median | largest size |",
        "|---|---:|---:|---:|---:|",
    ]
    for row in report["summary"]["by_group"]:
        lines.append(
            f"| {row['group']} | {row['rows']} | {row['median_error']:.0%} "
            f"| {row['median_bias']:+.0%} | {row['largest_error']:.0%} |"
        )
    lines += [
        "",
        "| beyond all resident in the same record | measured, ms | predicted at its hit rate, ms "
        "| prefetched records waited for, per token | predicted with a load for each, ms |",
        "|---|---:|---:|---:|---:|",
    ]
    for row in report["beyond_resident"]:
        lines.append(
            f"| {row['what']} | {row['measured_ms']:.2f} | {row['predicted_ms']:.2f} "
            f"| {row['late_per_token']:.2f} | {row['with_late_ms']:.2f} |"
        )
    return [*lines, "", _source(report)]


def plan_reuse(report: Record) -> list[str]:
    """Errors of one model's hit rates by another's, from `experiments.plan_reuse`."""
    lines = [
        "| hit rates of | by the curve of | mean error, slots per layer over top-k "
        "| mean error, share of experts |",
        "|---|---|---:|---:|",
    ]
    for row in report["rows"]:
        lines.append(
            f"| {row['model']} | {row['by']} | {row['error_by_multiple']:.3f} "
            f"| {row['error_by_share']:.3f} |"
        )
    return [*lines, "", _source(report)]


def by_spec(report: Record) -> list[str]:
    """The table that a record describes itself.

    Raises:
        InputError: the description does not fit the record.
    """
    spec = report["table"]
    try:
        columns = [(c["title"], c["value"], c.get("form", "{}")) for c in spec["columns"]]
        rows = value_at(report, spec.get("rows", "rows"))
        wanted = spec.get("where", {}).items()
        rows = [row for row in rows if all(row.get(k) == v for k, v in wanted)]
        cells = [[_cell(value_at(row, path), form) for _, path, form in columns] for row in rows]
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise InputError(f"the record's own table does not fit it: {error!r}") from None
    right = [
        "---:" if all(_numeric(row[i]) for row in cells) else "---" for i in range(len(columns))
    ]
    lines = ["| " + " | ".join(title for title, *_ in columns) + " |", f"|{'|'.join(right)}|"]
    return [*lines, *("| " + " | ".join(row) + " |" for row in cells), "", _source(report)]


def _cell(value: Any, form: str) -> str:
    return "" if value is None else form.format(value).replace("|", "\\|").replace("\n", " ")


def _numeric(text: str) -> bool:
    return not text or text.lstrip("+-(")[:1].isdigit()


def _source(report: Record) -> str:
    """Hardware, versions, commit and command of a result."""
    environment = report["environment"]
    versions = environment["versions"]
    return (
        f"{environment['cpu']}, {environment['cpus']} cores, Python {versions['python']}, JAX "
        f"{versions['jax']}{commit_of(report)}; `{report['command']}`."
    )


def commit_of(report: Record) -> str:
    """The commit of a record as ", commit 0123abc", and whether its code differed from it.

    Empty where the record does not say whether it did.
    """
    environment = report.get("environment", {})
    commit, dirty = environment.get("commit"), environment.get("dirty")
    if commit is None or dirty is None:
        return ""
    return f", commit {commit[:7]}{' (changed files)' if dirty else ''}"


TABLES: dict[str, Callable[[Record], list[str]]] = {
    "residency": residency,
    "quantisation": quantisation,
    "peers_cpu": peers_cpu,
    "peers_cpu_limited": peers_cpu_limited,
    "smoe_ablation": smoe_ablation,
    "smoe_alpha": smoe_alpha,
    "speculation_frontier": speculation_frontier,
    "plan_check": plan_check,
    "plan_reuse": plan_reuse,
}


def has_table(name: str, report: Record) -> bool:
    """Whether a record can be shown as a table."""
    return name in TABLES or "table" in report


def lines_of(name: str, report: Record) -> list[str]:
    """The Markdown lines of a record's table, its source last.

    Raises:
        InputError: nothing says how to draw it, or it lacks what its table shows.
    """
    if name not in TABLES:
        if "table" not in report:
            known = ", ".join(TABLES)
            raise InputError(f"no table is known for {name}.json (known: {known}), nor has it one")
        return by_spec(report)
    try:
        return TABLES[name](report)
    except (KeyError, TypeError, ValueError, IndexError, StopIteration, AttributeError) as error:
        raise InputError(f"{name}.json lacks what its table shows: {error!r}") from None
