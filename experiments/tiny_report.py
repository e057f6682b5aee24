"""Figures and the model card of the tiny models, made from the results file."""

from pathlib import Path

import numpy as np
from tiny_data import DOMAINS

COLOURS = {"novels": "#0072B2", "docs": "#E69F00", "code": "#009E73", "maths": "#CC79A7"}
STYLES = {"novels": "-", "docs": "--", "code": "-.", "maths": ":"}
LABELS = {
    "novels": "Novels",
    "docs": "Python docs",
    "code": "Python code",
    "maths": "Maths problems",
}


def plot_losses(results: dict, path: Path) -> None:
    """Training and held-out loss in nats per token against tokens seen."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    per_step = results["training"]["tokens_per_step"] / 1e6
    fig, ax = plt.subplots(figsize=(7.5, 4.5))
    curve = results["training"]["curve"]
    x = [row["step"] * per_step for row in curve]
    ax.plot(x, [row["loss"] for row in curve], color="#888888", lw=0.8, label="Training (mix)")
    held = results["training"]["held_out"]
    for d in DOMAINS:
        ax.plot(
            [row["step"] * per_step for row in held],
            [row[d] for row in held],
            color=COLOURS[d],
            ls=STYLES[d],
            lw=1.8,
            label=f"Held out: {LABELS[d]}",
        )
    decay = results["training"]["decay_from_step"] * per_step
    ax.axvline(decay, color="black", lw=0.8, alpha=0.5)
    ax.text(decay, 0.02, " decay starts", fontsize=9, transform=ax.get_xaxis_transform())
    ax.set(xlabel="Training tokens (millions)", ylabel="Loss (nats per token)", ylim=(None, 6))
    ax.set_xlim(left=0)
    ax.grid(alpha=0.25)
    ax.legend(frameon=False, fontsize=9, loc="upper center", ncols=2)
    fig.tight_layout()
    fig.savefig(path, dpi=130)
    plt.close(fig)


def plot_routing(results: dict, path: Path) -> None:
    """Heat map of expert use by layer and domain, relative to uniform use."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    by_domain = results["routing"]["by_domain"]
    shares = np.array([by_domain[d]["share"] for d in DOMAINS])
    layers, experts = shares.shape[1:]
    fig, axes = plt.subplots(layers, 1, figsize=(8.5, 7.5), sharex=True, layout="constrained")
    for layer, ax in enumerate(axes):
        order = np.argsort(-shares[0, layer])
        image = ax.imshow(
            shares[:, layer, order] * experts, aspect="auto", cmap="cividis", vmin=0, vmax=4
        )
        ax.set_yticks(range(len(DOMAINS)), [LABELS[d] for d in DOMAINS], fontsize=8)
        ax.set_title(f"Layer {layer}", fontsize=9, loc="left", pad=2)
        ax.set_xticks([])
    axes[-1].set_xlabel("Experts of the layer, from most to least used on novels")
    bar = fig.colorbar(image, ax=axes, extend="max", shrink=0.7)
    bar.set_label("Share of picks relative to uniform (1 = 1/32)")
    fig.savefig(path, dpi=130)
    plt.close(fig)


def held_out_table(results: dict) -> str:
    """Markdown table of held-out perplexities and agreement by domain."""
    rows = [
        "| domain | tokens | MoE | twin | 3-gram, same tokens | 3-gram, all "
        "| 3-gram, all of the domain | twin picks the MoE's top token |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for d in DOMAINS:
        row, grams = results["held_out"][d], results["ngram"][d]
        rows.append(
            f"| {LABELS[d]} | {row['tokens']:,} | {row['moe']:.1f} | {row['twin']:.1f} "
            f"| {grams['seen']:.1f} | {grams['all']:.1f} | {grams['all_own_domain']:.1f} "
            f"| {100 * row['greedy_agreement']:.0f} % |"
        )
    return "\n".join(rows)


def routing_table(results: dict) -> str:
    """Markdown table of routing facts by domain, averaged over layers."""
    rows = [
        "| domain | use entropy (of 5 bits) | busiest expert | least used expert "
        "| same picks for adjacent tokens (if independent) |",
        "| --- | --- | --- | --- | --- |",
    ]
    for d in DOMAINS:
        row = results["routing"]["by_domain"][d]
        rows.append(
            f"| {LABELS[d]} | {np.mean(row['use_entropy_bits']):.2f} "
            f"| {100 * np.max(row['max_share']):.1f} % | {100 * np.min(row['min_share']):.3f} % "
            f"| {100 * np.mean(row['adjacent_overlap']):.0f} % "
            f"({100 * np.mean(row['overlap_if_independent']):.0f} %) |"
        )
    return "\n".join(rows)


def data_table(results: dict) -> str:
    """Markdown table of the training data."""
    licences = {
        "novels": ("Project Gutenberg books", "public domain in the USA"),
        "docs": ("Python 3.11 documentation", "PSF-2.0"),
        "code": ("CPython standard library", "PSF-2.0"),
        "maths": ("GSM8K training set", "MIT"),
    }
    rows = [
        "| domain | source | licence | share | distinct tokens | held-out tokens | passes |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for d in DOMAINS:
        row = results["data"][d]
        rows.append(
            f"| {LABELS[d]} | {licences[d][0]} | {licences[d][1]} | {row['share']:.0%} "
            f"| {row['train_tokens']:,} | {row['held_out_tokens']:,} | {row['passes']:.1f} |"
        )
    return "\n".join(rows)


def card(results: dict) -> str:
    """The model card as Markdown."""
    t, twin, sizes = results["training"], results["distillation"], results["sizes"]
    rank = ", ".join(f"{value:.3f}" for value in results["routing"]["all"]["score_by_rank"])
    far = results["routing"]["js_distance"]
    distances = ", ".join(f"{pair} {np.mean(value):.2f}" for pair, value in far.items())
    long = ", ".join(f"{LABELS[d]} {results['held_out_2048'][d]['moe']:.1f}" for d in DOMAINS)
    samples = "\n\n".join(
        f"**{LABELS[d]}**\n\n```text\n{s['prompt']}⟦continues⟧{s['text']}\n```"
        for d, s in results["samples"].items()
    )
    return TEMPLATE.format(
        **t,
        twin=twin,
        sizes=sizes,
        total_mb=sizes["total_bytes"] / 1e6,
        lengths=", ".join(f"{p['from_step']:,}: {p['length']:,}" for p in t["phases"]),
        sharing=" that other jobs used at the same time" if "CPU" in t["hardware"] else "",
        mtokens=t["tokens"] / 1e6,
        minutes=t["seconds"] / 60,
        twin_minutes=twin["seconds"] / 60,
        twin_mtokens=twin["tokens"] / 1e6,
        never=results["routing"]["all"]["never_used"],
        seen=results["ngram"]["seen_tokens"],
        file_tokens=sum(row["train_tokens"] for row in results["data"].values()),
        data=data_table(results),
        held=held_out_table(results),
        routing=routing_table(results),
        rank=rank,
        distances=distances,
        long=long,
        samples=samples,
    )


TEMPLATE = """# moejax tiny: a small trained Mixture-of-Experts language model

A Qwen3-MoE model (`Qwen3MoeForCausalLM`) with {sizes[moe_parameters]:,} parameters, trained
from scratch so that the program, its tests and its demonstrations have a real routed model
to run without a download. Beside it, `../tiny_draft/` holds its dense twin
(`Qwen3ForCausalLM`, {sizes[twin_parameters]:,} parameters), an external draft model for
speculative decoding. Both directories together take {total_mb:.1f} MB.

Hidden size 192, 6 layers, 32 experts with 4 active per token, expert width 96 (one expert is
110,592 bytes in bfloat16), 6 query and 2 key/value heads of 32, context 2,048, vocabulary
4,096 (byte-level BPE, single digits), tied embeddings. The numbers below are generated from
`experiments/results/train_tiny.json`.

## Data

{data}

The novels are the English books in `corpus/gutenberg_20mb` and two parts of
`corpus/gutenberg_130mb`; 7 other books are held out. Of the documentation and library files
4 % are held out by a hash of their names, so held-out files share authors and idioms with the
training files; the maths domain is held out on the GSM8K test set.
Maths documents read `Question: ...` then `Answer: ...` with the final line `#### N`, which is
also what the chat template produces.

## Training

{steps:,} steps of {tokens_per_step:,} tokens ({mtokens:.1f} million tokens) in {minutes:.0f}
minutes on {hardware}{sharing}.

- Sequence length by first step: {lengths}.
- Muon for the inner matrices, AdamW for embeddings, norms and routers. Peak rate {peak},
  constant, then a linear decay to zero from step {decay_from_step:,}.
- bfloat16 compute with float32 parameters; seed {seed}.
- Load-balance loss {balance} over the whole batch of mixed domains, router z-loss {z}. Expert
  dispatch drops no tokens.

The twin keeps the mixture's embeddings, attention and norms; only its FFNs (width 192) were
trained: {twin[match]} steps to reproduce each layer's expert output, then {twin[kl]} steps on
the KL divergence to the mixture's next-token distribution (together {twin_mtokens:.1f} million
tokens, {twin_minutes:.0f} minutes).

![Loss](../../docs/images/tiny_loss.png)

## Held-out results

Perplexity per token in windows of {length} tokens. The 3-grams are interpolated modified
Kneser-Ney models with the same tokenizer, fitted to the {seen:,} distinct tokens that this
training drew, to the whole training file of {file_tokens:,} tokens, or to all of the file's
tokens of the domain.

{held}

In windows of 2,048 tokens the mixture's perplexities are: {long}.

## Routing

{routing}

- Experts never used on held-out text: {never}.
- Jensen-Shannon distance between the domains' expert use (0 the same, 1 disjoint; mean over
  layers): {distances}.
- Mean router probability by rank, 1 to 8: {rank}.

![Routing](../../docs/images/tiny_routing.png)

## Samples

Continuations of held-out text at temperature 0.7; the prompt ends at ⟦continues⟧.

{samples}

## Limits

It is a test model. It writes in the manner of its four domains and knows next to nothing:
its arithmetic is usually wrong, its code does not run, and it knows no language but English.
Contexts beyond 512 tokens were trained in the last {long_steps} steps only. It was not tuned to
follow instructions or to be safe. Do not use it for anything but testing and studying routed
models.

## Training it again

```sh
python experiments/train_tiny.py prepare --data DATA --work build/tiny
python experiments/train_tiny.py train --work build/tiny --steps {steps} --long-steps {long_steps}
python experiments/train_tiny.py distill --work build/tiny --match {twin[match]} --kl {twin[kl]}
python experiments/train_tiny.py export --work build/tiny --out checkpoints
python experiments/train_tiny.py evaluate --work build/tiny --out checkpoints
python experiments/train_tiny.py card --out checkpoints
```

`train` needs only the repository, `build/tiny/tokens.xz` and `build/tiny/tokenizer.json`, and
resumes from `build/tiny/ckpt`. The same commands use a GPU when JAX has one; a longer run is
then sensible, for example `--steps 40000 --tokens-per-step 32768`.
"""
