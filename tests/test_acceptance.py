"""What is accepted of drafts: against loops, and against exact distributions."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from conftest import build, small_config
from hypothesis import given
from hypothesis import strategies as st

import moejax
from moejax import decode, speculate
from moejax.cycles import Cycles
from moejax.kernels import build as build_native
from moejax.policies.acceptance import accept_greedy, accept_sampled, final_logits, lookup
from moejax.policies.drafting import SkipMissing
from moejax.policies.lengths import FixedLength
from moejax.policies.policy import policy
from moejax.policies.speculation import LookupDraft, SelfDraft, Speculate
from moejax.sampling import Sampling, processed_logits
from moejax.stats import Stats

ROWS, ROOM = 24, 13  # texts at once, and tokens of each
SEED = st.integers(0, 2**32 - 1)
LOOKUP = jax.jit(lookup, static_argnames="most")
PROCESS = jax.jit(processed_logits)


def plain_lookup(text, length, least, most):
    """The tokens that followed, from the description: longest ending first, latest place first."""
    for size in (3, 2, 1):
        if size < least or size > length + 1:
            continue
        ending = text[length - size + 1 : length + 1]
        for last in range(length - 1, size - 2, -1):
            if text[last - size + 1 : last + 1] == ending:
                return text[last + 1 : length + 1][:most]
    return []


@given(
    seed=SEED,
    alphabet=st.integers(1, 4),
    least=st.integers(1, 3),
    most=st.sampled_from([1, 3, 20]),
    before=st.booleans(),
)
def test_a_lookup_finds_what_followed(seed, alphabet, least, most, before):
    rng = np.random.default_rng(seed)
    texts = rng.integers(0, alphabet, (ROWS, ROOM))
    length = rng.integers(0, ROOM, ROWS)
    length[:2] = ROOM - 1, 0
    for row, last in zip(texts, length, strict=True):
        row[last + 1 :] = -1
        if before:
            row[: rng.integers(0, last + 1)] = -1
    tokens, count = LOOKUP(
        jnp.asarray(texts, jnp.int32), jnp.asarray(length, jnp.int32), jnp.int32(least), most=most
    )
    assert tokens.shape == (ROWS, most) and tokens.dtype == count.dtype == jnp.int32
    for row, last, found, number in zip(texts, length, tokens, count, strict=True):
        assert found[: int(number)].tolist() == plain_lookup(row.tolist(), last, least, most)


@pytest.mark.parametrize(
    ("text", "least", "follow"),
    [
        ([1, 2, 3, 9, 2, 3, 8, 1, 2, 3], 1, [9, 2, 3, 8]),  # three before two, though older
        ([2, 3, 7, 2, 3, 8, 2, 3], 1, [8, 2, 3]),  # the latest of equals, cut at the end
        ([3, 7, 2, 3, 8, 9, 3], 2, []),
        ([7, 7, 7, 7], 1, [7]),  # an ending that overlaps its own occurrence
        ([5], 1, []),
        ([5, 5], 1, [5]),
        ([5, 5], 2, []),
    ],
)
def test_lookups_by_hand(text, least, follow):
    padded = np.full((1, ROOM), -1, np.int32)
    padded[0, : len(text)] = text
    tokens, count = LOOKUP(padded, np.array([len(text) - 1], np.int32), np.int32(least), most=4)
    assert tokens[0, : int(count[0])].tolist() == follow
    assert plain_lookup(padded[0].tolist(), len(text) - 1, least, 4) == follow


SETTINGS = [
    {"temperature": 0.0, "repetition_penalty": 3.0},
    {"temperature": 0.7, "top_k": 4, "repetition_penalty": 1.7},
    {"temperature": 1.3, "top_p": 0.6, "repetition_penalty": 0.4},
    {"temperature": 1.0, "min_p": 0.2},
]


@pytest.mark.parametrize("penalised", [True, False])
def test_final_logits_are_those_of_one_place_after_another(penalised):
    rng = np.random.default_rng(0)
    batch, width, vocabulary = len(SETTINGS), 4, 11
    rows = [Sampling(**options).validate() for options in SETTINGS]
    sampling = jax.tree.map(lambda *leaves: jnp.stack(leaves), *rows)
    logits = rng.normal(size=(batch, width, vocabulary)).astype(np.float32) * 3
    fed = rng.integers(0, vocabulary, (batch, width)).astype(np.int32)
    fed[1, 2:] = -1
    fed[3, :] = -1
    seen = rng.random((batch, vocabulary)) < 0.2
    given_seen = jnp.asarray(seen) if penalised else None
    got = jax.jit(final_logits)(jnp.asarray(logits), jnp.asarray(fed), sampling, given_seen)
    changed = 0
    for b, w in itertools.product(range(batch), range(width)):
        if fed[b, w] >= 0:
            seen[b, fed[b, w]] = True
        mask = jnp.asarray(seen[b : b + 1]) if penalised else None
        want = PROCESS(logits[b, w][None], rows[b], mask)[0]
        np.testing.assert_array_equal(got[b, w], want)
        changed += not np.array_equal(want, PROCESS(logits[b, w][None], rows[b])[0])
    assert (changed > 6) == penalised


def plain_greedy(final, draft, count):
    accepted = 0
    while accepted < count and draft[accepted] == np.argmax(final[accepted]):
        accepted += 1
    return accepted, int(np.argmax(final[accepted]))


@given(seed=SEED, drafts=st.sampled_from([0, 1, 4]), agree=st.sampled_from([0.0, 0.7, 1.0]))
def test_greedy_acceptance_is_a_loop(seed, drafts, agree):
    rng = np.random.default_rng(seed)
    final = rng.integers(0, 3, (ROWS, drafts + 1, 5)).astype(np.float32)  # with ties
    own = final.argmax(-1)[:, :-1]
    draft = np.where(rng.random(own.shape) < agree, own, rng.integers(0, 5, own.shape))
    count = rng.integers(0, drafts + 1, ROWS)
    accepted, token = jax.jit(accept_greedy)(
        final, jnp.asarray(draft, jnp.int32), jnp.asarray(count, jnp.int32)
    )
    for b in range(ROWS):
        want = plain_greedy(final[b], draft[b], count[b])
        assert (int(accepted[b]), int(token[b])) == want


@dataclasses.dataclass(frozen=True)
class Chains:
    """A target and a drafter that look at one token: logits [V, V] by the token before."""

    target: np.ndarray
    drafter: np.ndarray
    drafts: int

    @classmethod
    def drawn(cls, vocabulary, drafts, seed, likeness=0.5, holes=0.0):
        """Random ones; `holes` is the share of tokens that either never draws."""
        rng = np.random.default_rng(seed)
        target = rng.normal(size=(vocabulary, vocabulary)) * 1.5
        drafter = likeness * target + (1 - likeness) * 1.5 * rng.normal(size=target.shape)
        for table in (target, drafter):
            table[
                (rng.random(table.shape) < holes) & (table < table.max(1, keepdims=True))
            ] = -np.inf
        return cls(target.astype(np.float32), drafter.astype(np.float32), drafts)

    def probabilities(self):
        """Of every text of drafts + 1 tokens after token 0, in float64."""
        table = np.exp(self.target.astype(np.float64))
        table /= table.sum(1, keepdims=True)
        texts = table[0]
        for _ in range(self.drafts):
            texts = texts[..., None] * table
        return texts.reshape(-1)


def drawn_from(table, key, before):
    return jax.random.categorical(key, jnp.asarray(table)[before], axis=-1).astype(jnp.int32)


def made_texts(chains, rule, rows, seed, certain=None, counts=None):
    """Texts [rows, drafts + 1] as a cycle makes them, continued by the target where it ended."""
    keys = jax.random.split(jax.random.key(seed), 2 * chains.drafts + 3)
    before = [jnp.zeros(rows, jnp.int32)]
    for i in range(chains.drafts):
        if certain is None:
            before.append(drawn_from(chains.drafter, keys[i], before[-1]))
        else:
            before.append(jnp.asarray(certain, jnp.int32)[before[-1]])
    before = jnp.stack(before, axis=1)
    draft, final = before[:, 1:], jnp.asarray(chains.target)[before]
    drafter = None if certain is not None else jnp.asarray(chains.drafter)[before[:, :-1]]
    count = jnp.full(rows, chains.drafts, jnp.int32) if counts is None else jnp.asarray(counts)
    accepted, token = rule(final, draft, count, drafter, keys[-1])
    texts, last = [], jnp.zeros(rows, jnp.int32)
    for i in range(chains.drafts + 1):
        more = drawn_from(chains.target, keys[chains.drafts + i], last)
        made = jnp.where(i == accepted, token, more)
        if i < chains.drafts:
            made = jnp.where(i < accepted, draft[:, i], made)
        texts.append(made)
        last = made
    return np.asarray(jnp.stack(texts, axis=1)), np.asarray(accepted)


def fit(texts, probabilities, vocabulary):
    """p-value of the chi-square test; cells too rare for it are one."""
    number = np.zeros(len(texts), np.int64)
    for place in range(texts.shape[1]):
        number = number * vocabulary + texts[:, place]
    return fitted(np.bincount(number, minlength=len(probabilities)), probabilities)


def fitted(counts, probabilities):
    assert counts[probabilities == 0].sum() == 0
    expected = probabilities * counts.sum()
    common = expected >= 8
    observed, wanted = counts[common], expected[common]
    if expected[~common].sum() >= 8:
        observed = np.append(observed, counts[~common].sum())
        wanted = np.append(wanted, expected[~common].sum())
    else:
        wanted = wanted * observed.sum() / wanted.sum()
    return scipy.stats.chisquare(observed, wanted * observed.sum() / wanted.sum()).pvalue


@jax.jit
def sampled(final, draft, count, drafter, key):
    return accept_sampled(final, draft, count, drafter, key, jnp.full(draft.shape[0], 7))


CHAINS = {
    "one draft": Chains.drawn(5, 1, 0),
    "two drafts": Chains.drawn(7, 2, 1),
    "three drafts": Chains.drawn(5, 3, 2),
    "alike": Chains.drawn(6, 2, 3, likeness=1.0),
    "unlike": Chains.drawn(6, 2, 4, likeness=-1.0),
    "tokens that one never draws": Chains.drawn(6, 2, 5, holes=0.4),
}
DRAWS = 40_000


@pytest.mark.parametrize("name", CHAINS)
def test_made_tokens_have_the_targets_distribution(name):
    chains = CHAINS[name]
    texts, accepted = made_texts(chains, sampled, DRAWS, seed=1)
    assert fit(texts, chains.probabilities(), len(chains.target)) > 1e-4
    assert np.bincount(accepted, minlength=chains.drafts + 1)[-1] > 100
    if name == "alike":
        assert (accepted == chains.drafts).all()


def test_the_share_accepted_is_the_overlap_of_the_distributions():
    chains = CHAINS["one draft"]
    _, accepted = made_texts(chains, sampled, DRAWS, seed=2)
    p, q = (scipy.special.softmax(t[0].astype(float)) for t in (chains.target, chains.drafter))
    overlap = np.minimum(p, q).sum()
    assert scipy.stats.binomtest(int(accepted.sum()), DRAWS, overlap).pvalue > 1e-4


def test_keys_of_many_runs_are_as_good_as_many_sequences():
    chains = CHAINS["two drafts"]

    def one(final, draft, count, drafter, key):
        rows = (final[None], draft[None], count[None], drafter[None])
        accepted, token = accept_sampled(*rows, key, jnp.full(1, 3))
        return accepted[0], token[0]

    @jax.jit
    def rule(final, draft, count, drafter, key):
        return jax.vmap(one)(final, draft, count, drafter, jax.random.split(key, len(draft)))

    texts, _ = made_texts(chains, rule, DRAWS, seed=3)
    assert fit(texts, chains.probabilities(), len(chains.target)) > 1e-4


def test_places_of_one_sequence_are_drawn_apart():
    chains = CHAINS["two drafts"]

    @jax.jit
    def rule(final, draft, count, drafter, key):
        def one(final, draft, count, drafter, length):
            rows = (final[None], draft[None], count[None], drafter[None])
            accepted, token = accept_sampled(*rows, key, length[None])
            return accepted[0], token[0]

        places = jnp.arange(len(draft), dtype=jnp.int32)
        return jax.vmap(one)(final, draft, count, drafter, places)

    texts, _ = made_texts(chains, rule, DRAWS, seed=4)
    assert fit(texts, chains.probabilities(), len(chains.target)) > 1e-4


@pytest.mark.parametrize("name", ["two drafts", "tokens that one never draws"])
def test_sequences_may_have_fewer_drafts(name):
    chains = CHAINS[name]
    counts = np.random.default_rng(0).integers(0, chains.drafts + 1, DRAWS).astype(np.int32)
    texts, accepted = made_texts(chains, sampled, DRAWS, seed=5, counts=counts)
    assert (accepted <= counts).all() and (accepted[counts == 0] == 0).all()
    for count in range(chains.drafts + 1):
        some = texts[counts == count]
        assert fit(some, chains.probabilities(), len(chains.target)) > 1e-4


@pytest.mark.parametrize("name", ["two drafts", "three drafts", "tokens that one never draws"])
def test_certain_drafts_keep_the_distribution(name):
    chains = CHAINS[name]
    certain = chains.drafter.argmax(1)
    texts, accepted = made_texts(chains, sampled, DRAWS, seed=6, certain=certain)
    assert fit(texts, chains.probabilities(), len(chains.target)) > 1e-4
    p = np.exp(chains.target[0].astype(float))
    share = p[certain[0]] / p.sum()
    assert scipy.stats.binomtest(int((accepted > 0).sum()), DRAWS, share).pvalue > 1e-4


def biased(final, draft, count, drafter, key, *, eager=1.0, residual=True):
    """The rule again, in short, with its errors to order."""
    p, q = jax.nn.softmax(final), jax.nn.softmax(drafter)
    one, two = jax.random.split(key)
    mine = jnp.take_along_axis(p[:, :-1], draft[..., None], -1)[..., 0]
    theirs = jnp.take_along_axis(q, draft[..., None], -1)[..., 0]
    kept = jax.random.uniform(one, draft.shape) * theirs < eager * mine
    accepted = jnp.cumprod(kept, axis=1).sum(axis=1)
    rows = jnp.arange(len(draft))
    q = jnp.pad(q, ((0, 0), (0, 1), (0, 0)))[rows, accepted]
    own = p[rows, accepted]
    left = jnp.maximum(own - q, 0) if residual else own
    left = jnp.where(left.sum(-1, keepdims=True) > 0, left, own)
    return accepted, jax.random.categorical(two, jnp.log(left)).astype(jnp.int32)


@pytest.mark.parametrize("name", ["one draft", "two drafts", "three drafts"])
def test_a_biased_rule_is_caught(name):
    chains = CHAINS[name]
    vocabulary, exact = len(chains.target), chains.probabilities()
    right, _ = made_texts(chains, biased, DRAWS, seed=7)
    assert fit(right, exact, vocabulary) > 1e-4
    for error in ({"eager": 1.2}, {"eager": 0.8}, {"residual": False}):
        wrong, _ = made_texts(chains, functools.partial(biased, **error), DRAWS, seed=7)
        assert fit(wrong, exact, vocabulary) < 1e-6, error


@given(seed=SEED, certain=st.booleans())
def test_greedy_rows_come_out_as_by_greedy_acceptance(seed, certain):
    rng = np.random.default_rng(seed)
    drafts, vocabulary = 3, 6
    best = rng.integers(0, vocabulary, (ROWS, drafts + 1))
    draft = np.where(rng.random((ROWS, drafts)) < 0.7, best[:, :-1], 2).astype(np.int32)
    count = rng.integers(0, drafts + 1, ROWS).astype(np.int32)

    def one_hot(tokens):
        there = np.arange(vocabulary) == tokens[..., None]
        return np.where(there, rng.normal(size=there.shape) * 5, -np.inf).astype(np.float32)

    final, drafter = one_hot(best), None if certain else one_hot(draft)
    accepted, token = sampled(final, draft, count, drafter, jax.random.key(seed))
    want = accept_greedy(jnp.asarray(final), jnp.asarray(draft), jnp.asarray(count))
    np.testing.assert_array_equal(accepted, want[0])
    np.testing.assert_array_equal(token, want[1])


def test_greedy_rows_stay_greedy_beside_sampled_ones():
    sampling = Sampling(temperature=np.array([0.0, 1.0]), top_k=np.array([0, 3])).validate()
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(2, 4, 9)).astype(np.float32)
    fed = jnp.zeros((2, 4), jnp.int32)
    final = final_logits(jnp.asarray(logits), fed, sampling, None)
    q = jnp.asarray(rng.normal(size=(2, 3, 9)), jnp.float32)
    draft = jnp.asarray(logits.argmax(-1)[:, :3], jnp.int32).at[0, 2].set(8)
    q = q.at[0].set(jnp.where(jnp.arange(9) == draft[0, :, None], 0.0, -jnp.inf))
    q = q.at[1].set(jnp.where(jnp.arange(9) == draft[1, :, None], 3.0, 0.0))
    count = jnp.full(2, 3)
    tokens = set()
    for seed in range(20):
        accepted, token = sampled(final, draft, count, q, jax.random.key(seed))
        want = plain_greedy(logits[0], np.asarray(draft[0]), 3)
        assert (int(accepted[0]), int(token[0])) == want
        tokens.add((int(accepted[1]), int(token[1])))
    assert len(tokens) > 3


def test_after_the_last_draft_comes_the_bonus_row():
    vocabulary = 5
    rng = np.random.default_rng(2)
    row = rng.normal(size=(1, 3, vocabulary)).astype(np.float32)
    final = np.broadcast_to(row, (DRAWS, 3, vocabulary))
    q = np.broadcast_to(row[:, :2], (DRAWS, 2, vocabulary))
    draft = np.full((DRAWS, 2), 1, np.int32)
    accepted, token = sampled(final, draft, np.full(DRAWS, 2, np.int32), q, jax.random.key(0))
    assert (accepted == 2).all()
    exact = scipy.special.softmax(row[0, 2].astype(np.float64))
    assert fitted(np.bincount(token, minlength=vocabulary), exact) > 1e-4
    # no drafts at all: the first row, whatever the padding says
    accepted, token = sampled(final, draft, np.zeros(DRAWS, np.int32), q, jax.random.key(1))
    assert (accepted == 0).all()
    exact = scipy.special.softmax(row[0, 0].astype(np.float64))
    assert fitted(np.bincount(token, minlength=vocabulary), exact) > 1e-4


BATCH, RUNS, NEW = 256, 16, 2
PROMPT = [3, 14, 15, 9, 26, 3, 14]


@functools.cache
def model():
    return build(small_config(), "bfloat16")


def plain_logits(texts):
    """[B, T, V] after each token of the texts [B, T], in one pass with everything resident."""
    built = model()
    state = decode.init_state(
        built.model, built.policy, built.store, slots=16, batch=len(texts), context=128
    )
    arguments = (built.model, built.policy, built.params, built.store, state)
    texts = np.asarray(texts, np.int32)
    return np.asarray(
        decode.decode_step(*arguments, texts, all_logits=True, prefill=False)[1].logits, np.float64
    )


def suggestive(temperature):
    """A prompt whose last two tokens occurred before, followed by what is likely to follow now."""
    texts = np.tile(PROMPT, (61, 1))
    texts[:, 2] = np.arange(61)
    padded = np.pad(texts, ((0, 0), (0, 1)), constant_values=-1)  # as long as those of pairs
    likely = scipy.special.softmax(plain_logits(padded)[:, -2] / temperature, axis=-1)
    return texts[np.diagonal(likely).argmax()].tolist()


def exact_pairs(prompt, temperature):
    """Probabilities [V, V] of the two tokens after the prompt."""
    texts = np.concatenate([np.tile(prompt, (61, 1)), np.arange(61)[:, None]], axis=1)
    likely = scipy.special.softmax(plain_logits(texts) / temperature, axis=-1)
    return likely[0, -2][:, None] * likely[:, -1]


def drawn_pairs(draft, prompt, temperature, runs=RUNS):
    """The first two tokens [., 2] of many sequences after one prompt, and the share accepted."""
    built = model()
    speculation = Speculate(draft=draft, lengths=FixedLength(gamma=jnp.int32(2)), max_length=2)
    made = dataclasses.replace(policy("lru"), speculation=speculation)
    parts = (built.model, made, built.params, built.store)
    target = speculate.Target(model=parts[0], policy=made, params=parts[2], store=parts[3])
    sampling = Sampling(temperature=temperature).validate()
    found, accepted, drafted = [], 0, 0
    for seed in range(runs):
        state = decode.init_state(built.model, made, built.store, slots=7, batch=BATCH, context=128)
        rows = [np.asarray(prompt[:-1])] * BATCH
        state, _, _ = decode.prefill(*parts, state, rows, chunk=8)
        loop = Cycles(target, None, Stats(record_bytes=1), sampling, jax.random.key(100 + seed))
        loop.begin(state, [np.asarray(prompt)] * BATCH, None)
        texts = [[] for _ in range(BATCH)]
        for _ in range(NEW):
            step = loop.step(np.ones(BATCH, bool), np.full(BATCH, 20))
            accepted += int((step.count - 1).sum())
            drafted += int(step.drafted.sum())
            for text, tokens, count in zip(texts, step.token, step.count, strict=True):
                text += tokens[:count].tolist()
        found += [text[:NEW] for text in texts]
    return np.array(found), accepted / drafted


def fits_of_pairs(pairs, exact):
    """p-values of the first token, the second, and the likeliest pairs."""
    counts = np.zeros_like(exact)
    np.add.at(counts, (pairs[:, 0], pairs[:, 1]), 1)
    marginals = [fitted(counts.sum(axis), exact.sum(axis)) for axis in (1, 0)]
    return [*marginals, fitted(counts.reshape(-1), exact.reshape(-1))]


ITSELF, BY_LOOKUP = SelfDraft(router=SkipMissing()), LookupDraft(least=jnp.int32(1))


@pytest.mark.parametrize(("draft", "temperature"), [(ITSELF, 1.0), (BY_LOOKUP, 0.5)])
def test_a_model_that_drafts_for_itself_keeps_its_distribution(draft, temperature):
    prompt = suggestive(temperature)
    pairs, accepted = drawn_pairs(draft, prompt, temperature)
    assert min(fits_of_pairs(pairs, exact_pairs(prompt, temperature))) > 1e-4
    assert 0.1 < accepted < 0.9


def test_a_model_that_accepts_every_draft_does_not_keep_it(monkeypatch):
    def credulous(final, draft, count, drafter, key, length):
        _, token = accept_sampled(final, draft, 0 * count, drafter, key, length)
        return count, token

    prompt = suggestive(1.0)
    with monkeypatch.context() as patched:
        patched.setattr(speculate, "accept_sampled", credulous)
        speculate.cycle.clear_cache()
        pairs, _ = drawn_pairs(ITSELF, prompt, 1.0, runs=4)
    speculate.cycle.clear_cache()
    assert min(fits_of_pairs(pairs, exact_pairs(prompt, 1.0))) < 1e-6


@pytest.mark.skipif(build_native.library() is None, reason=build_native.status())
@pytest.mark.parametrize("draft", [ITSELF, BY_LOOKUP])
def test_what_was_fed_before_need_not_be_told(draft):
    """Without `history` there is less to look up, but the tokens are those of plain decoding."""

    def said(runtime):
        state, answers = runtime.init_state(1), []
        for ids in ([900, 2511], [1300, 77]):
            pieces = runtime.pieces(state, [np.array(ids, np.int32)], 6, {"temperature": 0.0})
            made = [(state, piece.token.id) for state, piece in pieces]
            state = made[-1][0]
            answers.append([token for _, token in made])
        return answers, int(state.length[0])

    speculation = Speculate(draft=draft, lengths=FixedLength(gamma=jnp.int32(2)), max_length=2)
    made = dataclasses.replace(policy("lru"), speculation=speculation)
    plain = moejax.load("tiny", slots=144, context=64)
    answers, length = said(dataclasses.replace(plain, policy=made))
    want, least = said(plain)
    assert answers == want and length >= least
