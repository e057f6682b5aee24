"""Train, distil, export and evaluate the tiny mixture and its dense twin.

Run the subcommands in the order prepare, train, distill, export, evaluate, card; each reads
what the earlier ones left in the --work and --out directories.
"""

import argparse
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
ALLOCATOR = {
    "GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=8589934592"
    ":glibc.malloc.trim_threshold=17179869184:glibc.malloc.top_pad=268435456"
    ":glibc.malloc.hugetlb=1",
    "MALLOC_ARENA_MAX": "1",
}


def keep_memory_mapped() -> None:
    """Start this process again with allocator settings that halve the step time on CPUs."""
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **ALLOCATOR})


def prepare(args: argparse.Namespace) -> None:
    """Train the tokenizer and write the token file."""
    import tiny_data as td

    args.work.mkdir(parents=True, exist_ok=True)
    documents = td.load_documents(args.data, args.novel_parts)
    tokenizer = td.train_tokenizer(td.tokenizer_sample(documents["train"]))
    tokenizer.save(str(args.work / "tokenizer.json"))
    tokens = {
        f"{split}/{domain}": td.encode_documents(tokenizer, documents[split][domain], args.seed)
        for split in documents
        for domain in td.DOMAINS
    }
    td.save_tokens(args.work / "tokens.xz", tokens)
    print({name: len(stream) for name, stream in tokens.items()})


def plan_of(args: argparse.Namespace):
    """The training plan that the options describe."""
    from tiny_train import Plan

    return Plan(
        steps=args.steps,
        tokens_per_step=args.tokens_per_step,
        long_steps=args.long_steps,
        tail=args.tail,
        seed=args.seed,
    )


def train(args: argparse.Namespace) -> None:
    """Train the mixture, resuming from the newest checkpoint."""
    import tiny_data as td
    from tiny_model import MOE
    from tiny_train import train as run

    plan = plan_of(args)
    tokens = td.load_tokens(args.work / "tokens.xz")
    (args.work / "plan.json").write_text(json.dumps(asdict(plan)), encoding="utf-8")
    run(plan, MOE, tokens, args.work / "ckpt")


def trained(work: Path) -> tuple[dict, dict]:
    """Parameters and log of the newest checkpoint of the mixture."""
    from tiny_model import MOE
    from tiny_train import initial_state, load_checkpoint, newest_checkpoint

    path = newest_checkpoint(work / "ckpt")
    if path is None:
        sys.exit(f"no checkpoint in {work / 'ckpt'}: run `train` first")
    state, log = load_checkpoint(path, initial_state(MOE, 0))
    return state["params"], log


def distill(args: argparse.Namespace) -> None:
    """Distil the twin's FFNs from the newest checkpoint of the mixture."""
    import tiny_data as td
    import tiny_twin

    moe, _ = trained(args.work)
    tokens = td.load_tokens(args.work / "tokens.xz")
    tiny_twin.distill(moe, tokens, args.work / "twin", args.match, args.kl)


def export(args: argparse.Namespace) -> None:
    """Write both models as Hugging Face directories."""
    import tiny_export as te
    from tiny_model import MOE, TWIN
    from tiny_twin import load_twin

    moe, log = trained(args.work)
    twin, _ = load_twin(moe, args.work / "twin")
    te.write_model(args.out / "tiny", moe, MOE, args.work / "tokenizer.json")
    te.write_model(args.out / "tiny_draft", twin, TWIN, args.work / "tokenizer.json")
    print(f"exported step {log['step']}")


def parity(args: argparse.Namespace) -> None:
    """Compare both directories with transformers on torch."""
    import numpy as np
    from tiny_export import torch_difference

    tokens = np.random.default_rng(0).integers(4, 4096, (2, 300))
    for name in ("tiny", "tiny_draft"):
        print(name, torch_difference(args.out / name, tokens))


def training_record(work: Path, log: dict) -> dict:
    """Plan, log and surroundings of the training run."""
    plan = json.loads((work / "plan.json").read_text(encoding="utf-8"))
    start = int(plan["steps"] * (1 - plan["tail"]))
    return {**plan, **log, "decay_from_step": start}


def data_record(tokens: dict, seen: int) -> dict:
    """Share, distinct tokens and passes of each domain."""
    import tiny_data as td

    total, record = sum(td.MIX.values()), {}
    for d in td.DOMAINS:
        share, size = td.MIX[d] / total, len(tokens[f"train/{d}"])
        record[d] = {
            "share": share,
            "train_tokens": size,
            "held_out_tokens": len(tokens[f"val/{d}"]),
            "passes": seen * share / size,
        }
    return record


def samples_of(params: dict, shape, tokens: dict, tokenizer_path: Path, dtype) -> dict:
    """One sampled continuation of a held-out prompt per domain."""
    import tiny_data as td
    from tiny_eval import continuation
    from tokenizers import Tokenizer

    tokenizer, out = Tokenizer.from_file(str(tokenizer_path)), {}
    for d in td.DOMAINS:
        stream = tokens[f"val/{d}"].tolist()
        begin = stream.index(td.EOT, 2000) + 1 if d == "maths" else 6000
        prompt = stream[begin : begin + 64]
        if d == "maths":
            text = tokenizer.decode(stream[begin : stream.index(td.EOT, begin)])
            prompt = tokenizer.encode(text.split("Answer:")[0] + "Answer:").ids
        more = continuation(params, shape, prompt, 96, 3, dtype)
        out[d] = {"prompt": tokenizer.decode(prompt), "text": tokenizer.decode(more)}
    return out


def evaluate(args: argparse.Namespace) -> None:
    """Measure the exported models on held-out text and write the results file."""
    import jax
    import jax.numpy as jnp
    import tiny_data as td
    import tiny_eval as ev
    from tiny_export import read_model
    from tiny_train import seen_tokens
    from tiny_twin import load_twin

    tokens = td.load_tokens(args.work / "tokens.xz")
    moe, log = trained(args.work)
    _, twin_log = load_twin(moe, args.work / "twin")
    models = {"moe": read_model(args.out / "tiny"), "twin": read_model(args.out / "tiny_draft")}
    params, shape = models["moe"]
    table, runs = ev.compare(models, tokens, 512, args.windows, jnp.bfloat16)
    long, _ = ev.compare(models, tokens, shape.positions, args.windows // 4, jnp.bfloat16)
    folders = [args.out / "tiny", args.out / "tiny_draft"]
    files = [f for folder in folders for f in folder.iterdir() if f.name != "README.md"]
    count = {n: sum(x.size for x in jax.tree.leaves(p)) for n, (p, _) in models.items()}
    record = training_record(args.work, log)
    seen = seen_tokens(record, tokens)
    results = {
        "training": record,
        "distillation": twin_log,
        "data": data_record(tokens, log["tokens"]),
        "held_out": table,
        "held_out_2048": long,
        "ngram": ev.ngram_table(tokens, seen, runs, shape.vocab),
        "routing": ev.routing_facts(runs, shape.experts),
        "samples": samples_of(params, shape, tokens, args.work / "tokenizer.json", jnp.bfloat16),
        "sizes": {
            "total_bytes": sum(f.stat().st_size for f in files),
            "moe_parameters": count["moe"],
            "twin_parameters": count["twin"],
        },
    }
    args.results.parent.mkdir(parents=True, exist_ok=True)
    args.results.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({"held_out": table, "ngram": results["ngram"]}, indent=1))


def card(args: argparse.Namespace) -> None:
    """Draw the figures and write the model card from the results file."""
    import tiny_report as tr

    results = json.loads(args.results.read_text(encoding="utf-8"))
    args.images.mkdir(parents=True, exist_ok=True)
    tr.plot_losses(results, args.images / "tiny_loss.png")
    tr.plot_routing(results, args.images / "tiny_routing.png")
    (args.out / "tiny" / "README.md").write_text(tr.card(results), encoding="utf-8")


def parser() -> argparse.ArgumentParser:
    """Command-line options."""
    top = argparse.ArgumentParser(description=__doc__)
    add = top.add_subparsers(dest="command", required=True).add_parser
    for function in (prepare, train, distill, export, parity, evaluate, card):
        sub = add(function.__name__, help=function.__doc__)
        sub.set_defaults(run=function)
        sub.add_argument("--work", type=Path, default=ROOT / "build" / "tiny")
        sub.add_argument("--out", type=Path, default=ROOT / "checkpoints")
        sub.add_argument("--results", type=Path, default=HERE / "results" / "train_tiny.json")
        sub.add_argument("--images", type=Path, default=ROOT / "docs" / "images")
        sub.add_argument("--seed", type=int, default=17)
        if function is prepare:
            sub.add_argument("--data", type=Path, required=True, help="shared data directory")
            sub.add_argument("--novel-parts", type=int, default=2)
        if function is train:
            sub.add_argument("--steps", type=int, required=True)
            sub.add_argument("--long-steps", type=int, default=40, help="last steps, at 2,048")
            sub.add_argument("--tokens-per-step", type=int, default=8192)
            sub.add_argument("--tail", type=float, default=0.25, help="decaying share of steps")
        if function is distill:
            sub.add_argument("--match", type=int, default=500, help="steps on layer outputs")
            sub.add_argument("--kl", type=int, default=450, help="steps on the distribution")
        if function is evaluate:
            sub.add_argument("--windows", type=int, default=128, help="windows of a domain")
    return top


if __name__ == "__main__":
    keep_memory_mapped()
    options = parser().parse_args()
    options.run(options)
