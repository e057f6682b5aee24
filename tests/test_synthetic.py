"""Synthetic traces: what they hold, and processes found again in the traces that they made."""

import dataclasses
import json
import math
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from moejax.cli import exits
from moejax.cli import synthetic as synthetic_commands
from moejax.errors import InputError
from moejax.traces import fit as synthetic_fit
from moejax.traces import importers as trace_import
from moejax.traces import synthetic
from moejax.traces.fit import expected_overlap, fit, summary
from moejax.traces.synthetic import PRESETS, ScoreProcess, generate, score_blocks
from moejax.traces.trace import Phase, Trace

BIG_MOE = pathlib.Path(__file__).parents[2] / "shared" / "data" / "traces" / "bigmoeonedge"
TINY = pathlib.Path(__file__).parents[1] / "experiments" / "traces" / "tiny_held_out.npz"


def process(**changes):
    numbers = {"layers": 2, "experts": 8, "top_k": 3, "sigma": 1.0, "document": 0.4}
    numbers |= {"correlation": 0.5, "document_tokens": 16}
    return ScoreProcess(**numbers | changes)


@given(
    tokens=st.integers(1, 90),
    sequence=st.integers(1, 40),
    document=st.integers(1, 40),
    experts=st.integers(1, 9),
    data=st.data(),
)
def test_rows_hold_together(tokens, sequence, document, experts, data):
    top_k = data.draw(st.integers(1, experts))
    prompt = data.draw(st.integers(0, sequence))
    top = data.draw(st.none() | st.integers(top_k, experts))
    made = process(experts=experts, top_k=top_k, document_tokens=document, bias=0.2)
    options = {"sequence_tokens": sequence, "prompt_tokens": prompt, "seed": 3}
    trace = generate(made, tokens, top=top, **options)
    whole = generate(made, tokens, **options)
    assert trace.model.startswith("synthetic: ") and trace.about["synthetic"] is True
    scores = whole.scores.astype(np.float64)
    for row in range(tokens):
        assert (trace.sequence[row], trace.position[row]) == divmod(row, sequence)
        begins = row % sequence == 0 or row % sequence >= prompt
        assert trace.run[row] == (trace.run[row - 1] if row else -1) + begins
        assert trace.phase[row] == (Phase.PREFILL if row % sequence < prompt else Phase.DECODE)
        for layer in range(2):
            own = scores[row, layer]
            best = sorted(range(experts), key=lambda e: (-own[e], e))
            assert trace.picks[row, layer].tolist() == best[:top_k]
            wanted = own[best[:top_k]] / own[best[:top_k]].sum()
            np.testing.assert_allclose(trace.weights[row, layer], wanted, rtol=1e-5)
            if top is not None:
                assert trace.top_ids[row, layer].tolist() == best[:top]
                assert trace.top_scores[row, layer].tolist() == own[best[:top]].tolist()
    np.testing.assert_allclose(scores.sum(axis=-1), 1, atol=experts * 1e-3)
    shorter = generate(made, max(tokens // 2, 1), top=top, **options)
    np.testing.assert_array_equal(shorter.picks, trace.picks[: len(shorter.picks)])


@given(block=st.integers(1, 400), sequence=st.integers(1, 40), document=st.integers(1, 40))
def test_blocks_do_not_change_the_scores(block, sequence, document):
    made = process(document_tokens=document)

    def joined(block):
        parts = [*score_blocks(made, 75, seed=5, sequence_tokens=sequence, block=block)]
        assert [start for start, _ in parts] == [0, *np.cumsum([len(p) for _, p in parts])[:-1]]
        return np.concatenate([part for _, part in parts])

    np.testing.assert_array_equal(joined(block), joined(1 << 20))


def test_logits_have_the_shares_and_the_correlation_they_are_said_to():
    """From the definition: variances between and within documents, and of neighbours."""
    made = process(
        layers=8, experts=64, top_k=1, sigma=1.5, document=0.5, bias=0.3, correlation=0.6
    )
    trace = generate(made, 16 * 300, seed=1)
    logits = np.log(trace.scores.astype(np.float64)).reshape(300, 16, 8, 64)
    logits -= logits.mean(axis=-1, keepdims=True)
    bias = logits.mean(axis=(0, 1))
    assert bias.var() == pytest.approx(0.3 * 1.5**2, rel=0.15)
    own = logits - bias
    ahead = [(own[:, : 16 - lag] * own[:, lag:]).mean() / 1.5**2 for lag in (0, 1, 2, 8)]
    wanted = [0.5 + 0.2 * 0.6**lag for lag in (0, 1, 2, 8)]
    np.testing.assert_allclose(ahead, wanted, atol=0.03)


@given(
    sequence=st.integers(2, 60),
    lag=st.integers(1, 59),
    document=st.integers(1, 60),
    bias=st.floats(0, 0.5),
)
def test_correlation_at_counts_the_pairs_of_one_document(sequence, lag, document, bias):
    lag = min(lag, sequence - 1)
    made = process(bias=bias, document=0.4, correlation=0.5, document_tokens=document)
    same = [i // document == (i + lag) // document for i in range(sequence - lag)]
    wanted = bias + 0.4 * np.mean(same) + (0.6 - bias) * 0.5**lag
    assert made.correlation_at(lag, sequence) == pytest.approx(wanted)


def test_expected_overlap_is_that_of_drawn_vectors():
    rng = np.random.default_rng(7)
    for rho in (0.0, 0.35, 0.9):
        a, b = rng.standard_normal((2, 4000, 24))
        b = rho * a + math.sqrt(1 - rho * rho) * b
        pairs = zip(np.argsort(-a)[:, :5], np.argsort(-b)[:, :5], strict=True)
        drawn = np.mean([len({*one} & {*other}) / 5 for one, other in pairs])
        assert expected_overlap(rho, 24, 5) == pytest.approx(drawn, abs=0.015)
    assert expected_overlap(1.0, 24, 5) == 1


def test_a_fit_finds_the_process_again():
    made = process(
        layers=8, experts=32, top_k=4, sigma=1.3, document=0.35, bias=0.2, document_tokens=128
    )
    trace = generate(made, 30 * 256, sequence_tokens=256, seed=2)
    found = fit(trace, seeds=(9,))
    assert found.process.document_tokens == 128 and found.sequence_tokens == 256
    for name, near in (("sigma", 0.03), ("document", 0.05), ("bias", 0.06), ("correlation", 0.06)):
        assert getattr(found.process, name) == pytest.approx(getattr(made, name), abs=near)
    assert max(map(abs, found.errors.values())) < 0.06
    weights = fit(dataclasses.replace(trace, scores=None), seeds=(9,), document_tokens=64)
    assert weights.process.sigma == pytest.approx(1.3, abs=0.05)
    assert weights.process.document_tokens == 64
    picks = dataclasses.replace(trace, scores=None, weights=None)
    with pytest.raises(InputError, match="neither scores nor weights.*give sigma"):
        fit(picks)
    assert fit(picks, sigma=2.0, seeds=(9,)).process.sigma == 2.0


def test_statistics_of_a_small_trace_by_hand():
    made = process(experts=3, top_k=1)
    trace = generate(made, 8, sequence_tokens=4)
    picks = np.array([0, 0, 1, 0, 0, 2, 2, 2], np.int16)[:, None, None].repeat(2, axis=1)
    scores = np.full((8, 2, 3), 0.25, np.float16)
    np.put_along_axis(scores, picks, 0.5, axis=2)
    small = dataclasses.replace(trace, picks=picks, scores=scores, weights=None)
    found, length = summary(small)
    assert length == 4
    assert found["overlap_1"] == pytest.approx(3 / 6)  # (1, 0, 0) and (0, 1, 1)
    assert found["overlap_2"] == pytest.approx(2 / 4)  # (0, 1) and (0, 1)
    assert found["overlap_between"] == pytest.approx(3 / 4 * 1 / 4)
    assert found["score_entropy"] == pytest.approx(1.5 * math.log(2) / math.log(3))
    assert "overlap_4" not in found and "score_gap" not in found


def test_published_figures_of_qwen3():
    """Overlaps at lag 1, 2, 4, 8, 32 of .37, .27, .26, .23, .23; normalised entropy .82."""
    made = dataclasses.replace(synthetic.preset("qwen3-30b-a3b"), layers=6)
    found, _ = summary(generate(made, 2048))
    overlaps = [found[f"overlap_{lag}"] for lag in (1, 2, 4, 8, 32)]
    np.testing.assert_allclose(overlaps, [0.37, 0.27, 0.26, 0.23, 0.23], atol=0.03)
    assert found["score_entropy"] == pytest.approx(0.82, abs=0.015)


@pytest.mark.skipif(not BIG_MOE.is_dir(), reason=f"no traces at {BIG_MOE}")
@pytest.mark.parametrize(("name", "file"), [("qwen3-30b-a3b-k6", "qwen"), ("gemma-4-26b", "gemma")])
def test_presets_are_what_the_fits_give(name, file):
    trace = trace_import.read(BIG_MOE / f"{file}.route.csv.xz")
    found = fit(trace, seeds=(0,))
    same_as_preset(found, name)
    off = [abs(found.errors[f"overlap_{lag}"]) for lag in (1, 2, 4, 8, 32)]
    assert max(off) < 0.06


@pytest.mark.skipif(not TINY.is_file(), reason=f"no trace at {TINY}")
def test_the_preset_of_the_embedded_model_is_what_the_fit_gives():
    same_as_preset(fit(Trace.load(TINY), seeds=(0,)), "tiny")


def same_as_preset(found, name):
    for field in dataclasses.fields(ScoreProcess):
        wanted = getattr(PRESETS[name], field.name)
        assert getattr(found.process, field.name) == pytest.approx(wanted, abs=6e-4), field.name


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"experts": 0}, "experts .* at least 1"),
        ({"top_k": 9}, "top-9 of 8"),
        ({"experts": 10**6, "top_k": 1}, "at most 32767"),
        ({"sigma": 0.0}, "sigma"),
        ({"sigma": math.nan}, "finite"),
        ({"document": -0.1}, "shares"),
        ({"document": 0.7, "bias": 0.4}, "together at most 1"),
        ({"correlation": 1.0}, "correlation"),
        ({"document_tokens": 0}, "document_tokens"),
    ],
)
def test_processes_that_cannot_be(changes, named):
    with pytest.raises(InputError, match=named):
        process(**changes)


@pytest.mark.parametrize(
    "options",
    [
        {"tokens": 0},
        {"sequence_tokens": 0},
        {"prompt_tokens": 17},
        {"top": 2},
        {"top": 9},
    ],
)
def test_traces_that_cannot_be(options):
    with pytest.raises(InputError, match=next(iter(options))):
        generate(process(), **{"tokens": 20} | options)


def test_a_fit_needs_neighbours_and_scores_of_some_entropy():
    trace = generate(process(), 20, sequence_tokens=1)
    with pytest.raises(InputError, match="three tokens in a row"):
        fit(trace)
    with pytest.raises(InputError, match="at least one seed"):
        fit(generate(process(), 64), seeds=())
    flat = generate(process(), 64)
    flat = dataclasses.replace(flat, scores=np.full_like(flat.scores, 1 / 8))
    with pytest.raises(InputError, match="entropy"):
        fit(flat)


def run(*arguments):
    app = typer.Typer()
    app.command()(exits.guarded(synthetic_commands.synthesize))
    return CliRunner().invoke(app, list(map(str, arguments)))


def test_the_command_writes_what_it_says(tmp_path):
    changed = "layers=2, experts=8, top_k=2"
    small = ("--layers", 2, "--experts", 8, "--top-k", 2, "--seed", 4)
    done = run(tmp_path / "a.npz", "--tokens", 600, "--sequence", 300, "--json", *small)
    assert done.exit_code == 0, done.stderr
    document = json.loads(done.stdout)
    made = Trace.load(tmp_path / "a.npz")
    assert made.about["process"] == document["process"] and made.rows == document["rows"] == 600
    assert made.model == document["model"] == f"synthetic: qwen3-30b-a3b with {changed}"
    wanted = dataclasses.replace(PRESETS["qwen3-30b-a3b"], layers=2, experts=8, top_k=2)
    picks = generate(wanted, 600, sequence_tokens=300, seed=4).picks
    np.testing.assert_array_equal(made.picks, picks)
    kept = run(tmp_path / "a.npz", "--tokens", 30, *small)
    assert kept.exit_code == 2 and "--force" in kept.stderr
    assert Trace.load(tmp_path / "a.npz").rows == 600
    like = run(tmp_path / "b.npz", "--like", tmp_path / "a.npz", "--tokens", 30, "--json")
    assert like.exit_code == 0, like.stderr
    found = json.loads(like.stdout)
    assert found["fit"]["process"] == found["process"] and found["sequence_tokens"] == 300
    assert abs(found["fit"]["errors"]["overlap_1"]) < 0.1
    table = run(tmp_path / "c.npz", "--like", tmp_path / "a.npz", "--tokens", 30)
    assert "overlap_1" in table.stdout and "synthetic: " in table.stdout


def test_a_statistic_that_short_traces_do_not_have_is_left_out(tmp_path):
    """Tokens 8 apart, but fewer of them than that: what is made of as many has none."""
    trace = generate(process(layers=1), 6)
    position = np.array([0, 1, 2, 3, 8, 9], np.int32)
    dataclasses.replace(trace, position=position).save(tmp_path / "a.npz")
    done = run(tmp_path / "b.npz", "--like", tmp_path / "a.npz", "--tokens", 30, "--json")
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)["fit"]
    assert "overlap_8" in found["measured"] and found["measured"].keys() == found["errors"].keys()
    for name in ("reproduced", "spread", "errors"):
        assert found[name]["overlap_8"] is None and found[name]["overlap_1"] is not None
    table = run(tmp_path / "c.npz", "--like", tmp_path / "a.npz", "--tokens", 30)
    [line] = [line for line in table.stdout.splitlines() if "overlap_8" in line]
    assert line.split()[2:] == ["-", "-"]


def test_the_command_refuses_and_leaves_nothing(tmp_path):
    out = tmp_path / "a.npz"
    for arguments, named in (
        (("--preset", "gpt5"), "no preset 'gpt5'; known: qwen3"),
        (("--preset", "tiny", "--like", out), "--preset or --like"),
        (("--like", out), "a.npz"),
        (("--sigma", -1), "sigma"),
        (("--prompt", 999), "prompt"),
    ):
        done = run(out, *arguments)
        assert done.exit_code == 2 and named in done.stderr, done.stderr
    assert not [*tmp_path.iterdir()]


def test_options_are_read_without_numpy():
    program = "import sys, moejax.cli.synthetic\nassert not {'numpy', 'jax'} & {*sys.modules}"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_the_lags_that_are_fitted_are_those_of_the_statistics():
    assert synthetic_fit.LONG_LAGS == (64, 256)
