"""SpecMoE at batch 1 to 256 against on-demand offloading, caching and perfect overlap.

Claim:     on the embedded model, at batch 64 and 40 % residency, over a link on which on-demand LRU
           spends 90 % of its time, SpecMoE (arXiv 2604.10152) makes at least 1.4 times as many
           tokens per second as scan-resistant on-demand offloading; a cycle moves at most 1.1 of
           the bytes of a step of it (bytes per token times tokens per cycle).
Command:   python -m experiments.specmoe_batch --out experiments/results/specmoe_batch.json
Hardware:  2 quiet CPU cores: about 40 minutes (--quick: 3); and the held-out text.
Expected:  the paper has up to 4.30 times on-demand's throughput (NLLB-MoE, batch 256), 7.3 tokens
           per cycle with 10 drafts, and at batch 1 a loss against caching; see also PAPER.

Every batch stays full: a sequence that has made its tokens begins them again, as the next one would
in a server, so no batch ends with a few unlucky sequences. All make the same greedy tokens from the
same prompts, whose KV caches are made once. Bytes are those that the link began, "missed" is needed
and not resident when the layer begins. "caching" never evicts the most popular tenth of each
layer's experts (by an evictor whose keys put them last), LRU the others. "scan-resistant" is who
misses least on the profile's text: two-queue with the best of WINDOWS, or least-stale. A uniform
scan has one distance for all experts, so that no window of two-queue keeps some of them. "perfect
overlap" is computed from LRU's steps: of each the longer of the link's busy time and the time
without stall. The draft set leaves last, but does leave: N of each layer stay only while 6 N and a
layer's other experts fit the slots, at 40 % up to N = 8; hence also N with 60 % resident. In sweeps
the row `specmoe` itself is N 8, gamma 5, rule temporal and router nearest. "specmoe, tuned", whom
the claim is about, is the fastest of NUMBERS with two sets of parts on the profile's text, at
batch 64, as its rival's window is the best there.
"""

import argparse
import dataclasses
import pathlib
from typing import Any

import jax.numpy as jnp
import numpy as np

import moejax
from experiments import smoe_common as common
from experiments.smoe_common import Text
from experiments.specmoe_runs import Bench, Pinned, Prompted, groups, most_popular
from moejax.policies.drafting import GatedBias, RandomResident, SkipMissing
from moejax.policies.pinning import RULES
from moejax.policies.policy import Policy, policy
from moejax.policies.speculation import SelfDraft
from moejax.reports.plots import LOOKS

QUICK = {"windows": 2, "tokens": 512, "profile": 2, "new": 8, "rounds": 1, "batches": [1, 16]}
FULL = {"windows": 32, "tokens": 512, "profile": 8, "new": 24, "rounds": 2}
FULL["batches"] = [1, 4, 16, 64, 256]
MAIN, RESIDENCY, SHARE = 64, 0.4, 0.9  # batch of the claim; of LRU's time there on the link
PINNED = 0.1  # of a layer's experts, by "caching"
WINDOWS = (48, 96, 128, 160, 176)
SIZES, GAMMAS = (2, 4, 8, 16), (2, 10)
TUNING = 12  # steps that a calibration or a choice is made on
TUNED = "specmoe, tuned"
NUMBERS = ((6, 2), (8, 2), (8, 3), (10, 2), (10, 3))  # N and gamma
SYSTEMS = ("lru", "two-queue", "least-stale", "caching", "specmoe", TUNED, "all resident")
OVERLAP = "perfect overlap (computed)"
PAPER = {
    "speedup": "up to 4.30 over on-demand",
    "rules": {"random": [6.812, 1.0], "global": [7.220, 1.084], "temporal": [7.265, 1.143]},
    "sizes": {2: [6.929, 116.40], 4: [7.265, 122.97], 8: [7.620, 121.31], 16: [7.819, 117.16]},
    "nearest_over_random_tokens": 1.0723,
    "growth": {"on-demand": 45.28, "caching": 50.97, "specmoe": 10.96},
}
NLLB = {"experts": 128, "gamma": 10, "size": 4}  # of the simulation; top-2


def sweeps(quick: bool) -> dict[str, Policy]:
    """SpecMoE with other numbers, rules and draft routers, and our own self-draft.

    If `quick`, only with other numbers of draft experts, which need no other program.
    """
    whole = policy("specmoe")
    found = {f"N {n}": policy(f"specmoe:size={n}") for n in SIZES if n != whole.evictor.size}
    if quick:
        return found
    found |= {f"N {n}, 60 % resident": policy(f"specmoe:size={n}") for n in SIZES}
    found |= {f"gamma {n}": policy(f"specmoe:gamma={n}") for n in GAMMAS}
    for rule in RULES:
        if rule != whole.evictor.rule:
            evictor = dataclasses.replace(whole.evictor, rule=rule)
            found[f"rule {rule}"] = dataclasses.replace(whole, evictor=evictor)
    routers = {"random stand-in": RandomResident(), "skip": SkipMissing(), "bias": GatedBias()}
    for name, router in routers.items():
        drafting = dataclasses.replace(whole.speculation, draft=SelfDraft(router=router))
        found[f"router {name}"] = dataclasses.replace(whole, speculation=drafting)
    return found | {"router skip, all residents": policy("self-draft:gamma=5")}


def calibrated(read: Prompted, rounds: int, seed: int) -> dict[str, Any]:
    """The link on which LRU spends SHARE of its steps, after two corrections."""
    record, load = moejax.load(common.MODEL).store.layout.stride, 100.0
    policies = {"lru": policy("lru"), "all resident": policy("lru")}
    for turn in range(4):
        bench = Bench.over(common.link_text(load, 0.0, record), RESIDENCY, seed)
        lru, whole = bench.rows(policies, {"": read}, rounds)
        times = (lru["step_ms"] / 1e3, whole["step_ms"] / 1e3)
        misses, used = lru["needed_per_step"] - lru["hits_per_step"], load
        if turn == 0:
            load = common.load_microseconds(times[1], misses, SHARE)
        elif turn < 3:
            load = common.corrected(load, *times, misses, SHARE)
    return {
        **{"link": common.link_text(used, 0.0, record), "load_us": used, "record_bytes": record},
        **{"batch": lru["batch"], "lru_ms": lru["step_ms"], "resident_ms": whole["step_ms"]},
        **{"share": 1 - times[1] / times[0], "wanted_share": SHARE},
    }


def inclusion(skew: float, experts: int = NLLB["experts"]) -> tuple[np.ndarray, np.ndarray]:
    """Zipf weights q [E] of rank^-skew, and how likely a token's two draws hold each expert [E]."""
    q = np.arange(1, experts + 1, dtype=float) ** -skew
    q /= q.sum()
    rest = q / (1 - q)
    return q, q * (1 + rest.sum() - rest)


def union(chance: np.ndarray, tokens: int) -> float:
    """Expected distinct experts U(n) of independent tokens."""
    return float((1 - (1 - chance) ** tokens).sum())


def skew_for(growth: float, tokens: int = 256) -> float:
    """The Zipf exponent with which U(tokens) / U(1) is this."""
    low, high = 0.0, 4.0
    for _ in range(60):
        skew = (low + high) / 2
        chance = inclusion(skew)[1]
        above = union(chance, tokens) / union(chance, 1) > growth
        low, high = (skew, high) if above else (low, skew)
    return low


def uses(q: np.ndarray, tokens: int, rng: np.random.Generator) -> np.ndarray:
    """[E] how many of the tokens use each expert; each draws two different ones by q."""
    keys = np.log(q) + rng.gumbel(size=(tokens, len(q)))
    return np.bincount(np.argpartition(-keys, 1, axis=1)[:, :2].ravel(), minlength=len(q))


def simulated(q: np.ndarray, batch: int, trials: int, seed: int) -> dict[str, float]:
    """Experts moved per layer and step, or cycle; the model is told in `growth`."""
    rng, tenth = np.random.default_rng(seed), len(q) // 10
    draft, moved = np.zeros(len(q), bool), {"on-demand": 0.0, "caching": 0.0, "specmoe": 0.0}
    for turn in range(trials + 1):
        plain, window = (uses(q, batch * n, rng) for n in (1, NLLB["gamma"] + 1))
        if turn:  # the first one has no draft set
            moved["on-demand"] += (plain > 0).sum() / trials
            moved["caching"] += (plain[tenth:] > 0).sum() / trials
            moved["specmoe"] += ((window > 0) & ~draft).sum() / trials
        draft[:] = False
        draft[np.argsort(-window, kind="stable")[: NLLB["size"]]] = True
    return {name: float(value) for name, value in moved.items()}


def growth(trials: int, seed: int) -> dict[str, Any]:
    """Experts moved by batch, and the growth from batch 1 to 256, beside the paper's."""
    skew = skew_for(PAPER["growth"]["on-demand"])
    q, chance = inclusion(skew)
    order, ranks = np.sort(chance), np.arange(1, len(chance) + 1)
    table = {b: simulated(q, b, trials if b > 1 else 20 * trials, seed) for b in FULL["batches"]}
    return {
        "model": "every token draws 2 of 128 experts without replacement from rank^-skew, tokens "
        "independent; on-demand moves every expert of a step, caching those not among the 12 most "
        "popular, specmoe those of the 11 tokens of each sequence's window that are not among the "
        "4 most used of the cycle before; skew fitted to the paper's growth of on-demand",
        "skew": skew,
        "gini": float((2 * ranks - len(order) - 1) @ order / len(order) / order.sum()),
        "formula_on_demand": {b: union(chance, b) for b in FULL["batches"]},
        "moved_per_layer": table,
        "growth": {name: table[256][name] / table[1][name] for name in table[1]},
        "paper": PAPER["growth"],
    }


def find(rows: list[dict], name: str, batch: int = MAIN, prompts: str = "one domain") -> dict:
    """The row of a configuration, {} if it was not run."""
    same = (r for r in rows if (r["name"], r["batch"], r["prompts"]) == (name, batch, prompts))
    return next(same, {})


def against(
    rows: list[dict], batch: int, prompts: str, name: str = TUNED
) -> dict[str, dict[str, float]]:
    """SpecMoE's throughput over each other system's, and its bytes per cycle over their step's."""
    own, found = find(rows, name, batch, prompts), {}
    for other in SYSTEMS:
        if own and other not in ("specmoe", TUNED) and (row := find(rows, other, batch, prompts)):
            ratio = common.ratio(own["bytes_per_token"], row["bytes_per_token"])
            found[other] = {
                "speedup": own["tokens_per_second"] / row["tokens_per_second"],
                "bytes_times_accepted": ratio and ratio * own["tokens_per_cycle"],
            }
    return found


def tables(rows: list[dict], batch: int) -> dict[str, dict]:
    """Tokens per cycle and throughput relative to `specmoe` of everything swept at this batch."""
    own, found = find(rows, "specmoe", batch), {}
    for row in rows:
        if row["batch"] == batch and row["prompts"] == "one domain" and row["tokens_per_cycle"] > 1:
            relative = row["tokens_per_second"] / own["tokens_per_second"]
            found[row["name"]] = {
                **{"tokens_per_cycle": row["tokens_per_cycle"], "acceptance": row["acceptance"]},
                **{"relative_speed": relative, "bytes_per_token": row["bytes_per_token"]},
            }
    return found


def grown(rows: list[dict]) -> dict[str, float | None]:
    """Bytes per step or cycle at the largest batch of one domain over those at batch 1."""
    largest, found = max(row["batch"] for row in rows), {}
    for name in ("lru", "caching", "specmoe"):
        first, last = (find(rows, name, batch) for batch in (1, largest))
        found[name] = (
            first and common.ratio(last["bytes_per_step"], first["bytes_per_step"]) or None
        )
    return found | {"largest_batch": largest}


def summarise(rows: list[dict], resisting: str) -> dict[str, float | None]:
    """The numbers of the claim, of batches of one domain; None without a batch of 64."""
    found, names = {}, ("speedup", "bytes_times_accepted")
    for ending, system in (("", TUNED), ("_paper_numbers", "specmoe")):
        row = against(rows, MAIN, "one domain", system).get(resisting, {})
        found |= {f"{name}_b{MAIN}{ending}": row.get(name) for name in names}
    return found


def judge(summary: dict[str, float | None]) -> dict[str, dict]:
    """The claim's two limits."""
    value = summary["speedup_b64"]
    met = value is not None and value >= 1.4
    targets = {"speedup_b64": {"value": value, "at_least": 1.4, "met": met}}
    return targets | common.judged(summary, {"bytes_times_accepted_b64": 1.1})


def with_overlap(rows: list[dict]) -> list[dict]:
    """The rows, and the oracle's: LRU with the time of each step that overlap cannot hide."""
    found = []
    for row in rows:
        found.append(row)
        if row["name"] == "lru":
            faster = row["step_ms"] / row["overlapped_ms"]
            times = {"step_ms": row["overlapped_ms"], "stall_ms": None}
            rate = {"tokens_per_second": row["tokens_per_second"] * faster}
            found.append({**row, **times, **rate, "name": OVERLAP, "computed": True})
    return found


def candidates() -> dict[str, Policy]:
    """SpecMoE with its own parts and with those that drafted best, and NUMBERS."""
    most = max(gamma for _, gamma in NUMBERS)
    whole, found = policy(f"specmoe:gamma={most}"), {}
    ema = dataclasses.replace(whole.evictor, rule="ema")
    for about, evictor, router in (
        ("temporal, nearest", whole.evictor, whole.speculation.draft.router),
        ("ema, bias", ema, GatedBias()),
    ):
        for size, gamma in NUMBERS:
            lengths = dataclasses.replace(whole.speculation.lengths, gamma=jnp.int32(gamma))
            speculation = dataclasses.replace(
                whole.speculation, lengths=lengths, draft=SelfDraft(router=router)
            )
            found[f"N {size}, gamma {gamma}, {about}"] = dataclasses.replace(
                whole,
                evictor=dataclasses.replace(evictor, size=jnp.int32(size)),
                speculation=speculation,
            )
    return found


def fastest(bench: Bench, read: Prompted) -> tuple[str, Policy, dict[str, float]]:
    """The name of the best of the candidates, the policy, and tokens per second of all."""
    policies = candidates()
    rows = bench.rows({"lru": policy("lru")} | policies, {"": read}, 1)
    speed = {row["name"]: row["tokens_per_second"] for row in rows if row["name"] in policies}
    best = max(speed, key=lambda name: speed[name])
    return best, policies[best], speed


def on_disk(policies: dict[str, Policy], read: Prompted, options: argparse.Namespace) -> dict:
    """Some systems with the experts on this machine's disk."""
    bench = Bench.over("disk", RESIDENCY, options.seed)
    chosen = {name: policies[name] for name in ("lru", "least-stale", "caching", "specmoe")}
    rows = with_overlap(bench.rows(chosen, {"one domain": read}, options.rounds))
    stats = bench.runtime.link.stats()
    direct = bool(stats.direct)
    note = "reads go around the page cache; a cache below the file system is not seen from here"
    if not direct:
        note = "reads may come from the page cache: these are not the disk's own times"
    return {
        "direct": direct,
        "note": note,
        "rows": rows,
        "us_per_read": stats.busy_us / stats.landed,
    }


def systems(window: int, pinned: np.ndarray) -> dict[str, Policy]:
    """The policies of SYSTEMS."""
    evictor = Pinned(pinned=jnp.asarray(pinned))
    found = {name: policy("lru") for name in SYSTEMS}
    found |= {name: policy(name) for name in ("least-stale", "specmoe")}
    found["two-queue"] = policy(f"two-queue:window={window}")
    found["caching"] = dataclasses.replace(policy("lru"), evictor=evictor)
    return found


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """The report, without what `common.finish` adds."""
    text = Text.read(options.windows, options.profile, options.tokens, options.data)
    whole = moejax.load(common.MODEL, virtual=True)
    shape = (whole.config.num_moe_layers, whole.config.num_experts)
    pinned = most_popular(common.popular(whole, text), *shape, PINNED)
    few, seed = min(options.new, TUNING), options.seed
    link = calibrated(
        Prompted.read(groups(text.measured, MAIN, True), few), min(options.rounds, 2), seed
    )
    fast = common.link_text(1.0, 0.0, link["record_bytes"])
    fast, bench = (Bench.over(one, RESIDENCY, seed) for one in (fast, link["link"]))
    rows, tuning, disk = [], {}, None
    swept = MAIN if MAIN in options.batches else max(options.batches)
    sample = Prompted.read(groups(text.profile, swept, swept > 1), few)
    numbers, tuned, speeds = fastest(bench, sample)
    for batch in options.batches:
        sample = Prompted.read(groups(text.profile, batch, batch > 1), few)
        tuning[batch] = fast.tuned(WINDOWS, sample)
        chosen = systems(tuning[batch]["window"], pinned) | {TUNED: tuned}
        if batch >= len(text.measured):
            read = Prompted.read(groups(text.measured, batch, True), options.new)
            rows += bench.rows(chosen, {"mixed": read}, options.rounds)
        read = Prompted.read(groups(text.measured, batch, False), options.new)
        others = sweeps(options.quick) if batch == swept else {}
        rows += bench.rows(chosen | others, {"one domain": read}, options.rounds)
        if batch == swept and options.disk:
            disk = on_disk(chosen, read, options)
    summary = summarise(rows, tuning[swept]["scan_resistant"])
    targets = judge(summary)
    return {
        "link": link,
        "residency": RESIDENCY,
        "slots": bench.runtime.slots,
        "swept_batch": swept,
        "scan_resistant": tuning,
        "tuned": {"chosen": numbers, "tokens_per_second": speeds},
        "rows": with_overlap(rows),
        "against": {
            f"{kind}, batch {b}": against(rows, b, kind)
            for kind, b in sorted({(row["prompts"], row["batch"]) for row in rows})
        },
        "sweeps": tables(rows, swept),
        "growth_measured": grown(rows),
        "disk": disk,
        "growth": growth(options.trials, options.seed),
        "paper": PAPER,
        "summary": summary,
        "targets": targets,
        "verdict": common.verdict(targets),
    }


def plot(report: dict[str, Any], path: pathlib.Path) -> None:
    """Tokens per second and bytes per token over batch, and the simulated growth."""
    figure, axes = common.figure(2, 3, (14, 8.4))
    kinds = {"one domain": "one domain in a batch", "mixed": "all domains in a batch"}
    for (kind, title), (rates, moved) in zip(kinds.items(), axes.T[:2], strict=True):
        _plot_systems(rates, moved, [row for row in report["rows"] if row["prompts"] == kind])
        rates.set(title=f"Throughput, {title}", ylabel="Tokens per second", yscale="log")
        moved.set(title=f"Expert bytes, {title}", ylabel="Moved per token (MB)", ylim=(0, None))
    for shared in axes[:, :2]:
        most = max(axis.get_ylim()[1] for axis in shared)
        least = min(axis.get_ylim()[0] for axis in shared)
        for axis in shared:
            axis.set_ylim(least, most)
    table = report["growth"]["moved_per_layer"]  # its keys are text where it was read from JSON
    _plot_growth(axes[0, 2], {int(batch): row for batch, row in table.items()})
    for axis in axes.flat[:5]:
        axis.set(xscale="log", xlabel="Batch")
        axis.set_xticks(FULL["batches"], FULL["batches"])
        axis.minorticks_off()
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[1, 2].axis("off")
    axes[1, 2].legend(*axes[0, 0].get_legend_handles_labels(), loc="center left", frameon=False)
    common.save(figure, path)


def _plot_systems(rates: Any, moved: Any, rows: list[dict]) -> None:
    """Tokens per second and megabytes per token over the batch; a broad line lies below others."""
    for name, (colour, marker) in zip((*SYSTEMS, OVERLAP), LOOKS, strict=True):
        own = [row for row in rows if row["name"] == name]
        batches = [row["batch"] for row in own]
        broad, measured = name == "lru", name != OVERLAP
        look = {"color": colour, "marker": marker, "ms": 9 if broad else 5, "label": name}
        look |= {"lw": 5 if broad else 1.5, "ls": "-" if measured else "--"}
        rates.plot(batches, [row["tokens_per_second"] for row in own], **look)
        if measured and name != "all resident":
            moved.plot(batches, [row["bytes_per_token"] / 1e6 for row in own], **look)


def _plot_growth(axis: Any, table: dict[int, dict[str, float]]) -> None:
    """The simulated growth with the batch, in the looks of the same systems, and the paper's."""
    looks = dict(zip(SYSTEMS, LOOKS, strict=False)) | {"on-demand": LOOKS[0]}
    for name in PAPER["growth"]:
        found = [row[name] / table[1][name] for row in table.values()]
        colour, marker = looks[name]
        axis.plot([*table], found, color=colour, marker=marker, ms=6, label=name)
        axis.plot(256, PAPER["growth"][name], marker, color=colour, mfc="none", ms=12)
    axis.plot([], [], "ko", mfc="none", ms=12, label="paper (NLLB-MoE)")
    axis.set(title="Growth of bytes, simulated, 128 experts, top-2", yscale="log")
    axis.set(ylabel="Bytes per step over those of batch 1")
    axis.legend(frameon=False, loc="upper left")


def main() -> None:
    """Measure, write the JSON and draw."""
    parser = common.arguments(__doc__)
    parser.add_argument("--batches", type=int, nargs="+")
    parser.add_argument("--new", type=int, help="tokens that a sequence makes")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--profile", type=int, help="windows of each domain to choose numbers on")
    parser.add_argument("--trials", type=int, default=100, help="of the simulation")
    parser.add_argument("--no-disk", dest="disk", action="store_false")
    options = common.resolved(parser.parse_args(), QUICK, FULL)
    prompts = options.tokens // common.PROMPT  # of a window
    options.windows = max(options.windows, -(-max(options.batches) // prompts))
    report = {
        "claim": "at batch 64, LRU being 90 % migration, SpecMoE makes at least 1.4 times as many "
        "tokens per second as scan-resistant on-demand; a cycle moves at most 1.1 of its step",
        "command": "python -m experiments.specmoe_batch",
        **measure(options),
    }
    common.finish(report, options, plot)


if __name__ == "__main__":
    main()
