"""Speculation changes how many tokens a step makes, and never which."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import build, small_config
from test_exactness import prompts_of

import moejax
from moejax import decode, speculate
from moejax.cycles import Cycles, Helper, Live, tokens_of, width_for, widths
from moejax.errors import InputError, LinkError, PolicyError
from moejax.kernels import build as build_native
from moejax.kernels.store import Store
from moejax.live import DriftBudget
from moejax.policies.drafting import GatedBias, RandomResident, SkipMissing
from moejax.policies.foresight import DraftRouting, Promote, UtilityQueue
from moejax.policies.lengths import CycleCosts, FixedLength, LiveLength
from moejax.policies.pinning import DraftSet
from moejax.policies.placement import HostAll
from moejax.policies.policy import policy
from moejax.policies.speculation import LookupDraft, ModelDraft, SelfDraft, Speculate
from moejax.policies.utility import Utility
from moejax.sampling import Sampling
from moejax.session import Session
from moejax.stats import Stats

needs_native = pytest.mark.skipif(build_native.library() is None, reason=build_native.status())
GREEDY = {"temperature": 0.0}
LAYERS, EXPERTS, LONGEST = 4, 16, 10


def drafting(draft, gamma, *, longest=LONGEST, base="lru", **parts):
    """A policy that drafts tokens of a fixed number."""
    lengths = FixedLength(gamma=jnp.int32(gamma))
    speculation = Speculate(draft=draft, lengths=lengths, max_length=longest)
    return dataclasses.replace(policy(base), speculation=speculation, **parts)


def with_gamma(made, gamma):
    """The same policy with another draft length: no other program."""
    lengths = dataclasses.replace(made.speculation.lengths, gamma=jnp.int32(gamma))
    speculation = dataclasses.replace(made.speculation, lengths=lengths)
    return dataclasses.replace(made, speculation=speculation)


SELF = SelfDraft(router=SkipMissing())
KINDS = {
    "self": lambda: drafting(SELF, 4, base="score-window"),
    "self, led prefetch, host": lambda: drafting(
        SelfDraft(router=GatedBias()),
        4,
        foresight=DraftRouting(limit=jnp.int32(3)),
        placement=HostAll(),
    ),
    "pinned": lambda: drafting(
        SelfDraft(router=RandomResident(seed=1)),
        4,
        evictor=DraftSet(size=jnp.int32(3)),
        foresight=Promote(rate=jnp.float32(2.0)),
    ),
    "lookup": lambda: drafting(LookupDraft(least=jnp.int32(1)), 4),
    "model": lambda: drafting(ModelDraft(), 4, foresight=DraftRouting()),
    "utility": lambda: drafting(
        ModelDraft(), 4, evictor=Utility(), foresight=UtilityQueue(), placement=HostAll()
    ),
}


@functools.cache
def tiny(slots, link=None):
    return moejax.load("tiny", slots=slots, context=256, link=link)


@functools.cache
def twin():
    return moejax.load("tiny-draft", context=256)


def texts(count, seed=0):
    """Prompts of the embedded model's own making: other tokens, like texts."""
    rng = np.random.default_rng(seed)
    first = rng.integers(0, 4000, (count, 2)).astype(np.int32)
    return [row.tolist() for row in first]


def generated(runtime, prompts, new=24, **options):
    return [[t.id for t in c.tokens] for c in runtime.generate(prompts, new, GREEDY | options)]


BUDGETS = (40, 52, 76, 96, 144)


def compared(kind, gamma, capacity, prompts):
    """Accepted tokens of a run that has to make the tokens of plain decoding."""
    made = dataclasses.replace(with_gamma(KINDS[kind](), gamma), capacity=jnp.int32(capacity))
    some = dataclasses.replace(tiny(144), policy=made, draft=twin())
    assert generated(some, prompts) == generated(tiny(192), prompts), (kind, gamma, capacity)
    assert max(some.stats.draft_lengths) <= gamma
    return some.stats.accepted


@needs_native
def test_greedy_tokens_are_those_of_plain_decoding_whatever_the_draft_length():
    accepted = [
        compared("self", gamma, BUDGETS[gamma % 5], texts(12, seed=gamma))
        for gamma in range(LONGEST + 1)
    ]
    assert accepted[0] == 0 and min(accepted[1:]) > 20  # 132 prompts


@needs_native
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "self"])
def test_greedy_tokens_are_those_of_plain_decoding_whoever_drafts(kind):
    accepted = 0
    for turn, gamma in enumerate((3, 4)):  # one program for both
        prompts = texts(12, seed=20 + 2 * list(KINDS).index(kind) + turn)
        accepted += compared(kind, gamma, BUDGETS[list(KINDS).index(kind) % 5], prompts)
    assert accepted > 3  # 120 prompts of all kinds


@needs_native
@pytest.mark.parametrize("kind", ["self", "lookup", "model"])
def test_sequences_accept_each_for_itself(kind):
    runtime = dataclasses.replace(tiny(144), policy=KINDS[kind](), draft=twin())
    prompts = [*texts(3), [5, 6, 7, 5, 6, 7, 5, 6]]
    together = generated(runtime, prompts, 30)
    assert together == [generated(runtime, [prompt], 30)[0] for prompt in prompts]


@functools.cache
def deep():
    """4 layers of 16 experts with random bf16 weights, on native kernels."""
    config = small_config(num_layers=LAYERS, moe_layers=tuple(range(LAYERS)), num_experts=EXPERTS)
    built = build(config, "bfloat16")
    return dataclasses.replace(built, model=built.model.clone(kernels="native"))


def begun(
    built,
    made,
    prompts,
    *,
    slots=24,
    helper=None,
    sampling=None,
    store=None,
    context=128,
    live=None,
):
    """A cycle loop after the prompts, whose first token is the likeliest."""
    store = store or built.store
    state = decode.init_state(
        built.model, made, store, slots=slots, batch=len(prompts), context=context
    )
    state, logits, _ = decode.prefill(built.model, made, built.params, store, state, prompts)
    fixed = {"model": built.model, "params": built.params, "store": store}
    target = speculate.Target(policy=made, **fixed)
    sampling = (sampling or Sampling(temperature=0.0)).validate()
    stats = Stats(record_bytes=1)
    loop = Cycles(target, helper, stats, sampling, jax.random.key(0), 0, live=live)
    first = np.asarray(logits.argmax(-1), np.int32)
    loop.begin(state, [np.append(p, t) for p, t in zip(prompts, first, strict=True)], None)
    return loop


@needs_native
def test_a_cycle_leaves_the_caches_of_plain_decoding():
    built, prompts = deep(), prompts_of(3, 3)
    loop = begun(built, drafting(SELF, 3), prompts)
    for _ in range(4):
        loop.step(np.ones(3, bool), np.full(3, 50))
    kept = np.asarray(loop.run.state.length)
    state = decode.init_state(
        built.model, built.policy, built.store, slots=64, batch=3, context=128
    )
    rows = [np.asarray(loop.run.text)[b, : kept[b]] for b in range(3)]
    state, _, _ = decode.prefill(
        built.model, built.policy, built.params, built.store, state, rows, chunk=1
    )
    for own, plain in zip(
        jax.tree.leaves(loop.run.state.kv), jax.tree.leaves(state.kv), strict=True
    ):
        for b in range(3):
            assert np.array_equal(own[:, b, : kept[b]], plain[:, b, : kept[b]])
    assert kept.sum() > sum(map(len, prompts)) + 3 * 4 - 3


@needs_native
def test_a_draft_moves_nothing_and_teaches_the_evictor_nothing():
    built, made = deep(), drafting(SELF, 3)
    loop = begun(built, made, prompts_of(1, 2))
    run, key = loop.run, jax.random.key(0)
    before = jax.tree.map(np.asarray, (run.state.experts, run.state.policy))
    propose = jax.jit(speculate.propose, static_argnames=("width", "greedy"))
    after, drafted = propose(
        loop.target, None, run, 3, jnp.full(2, 9), loop.sampling, key, width=4, greedy=True
    )
    now = jax.tree.map(np.asarray, (after.state.experts, after.state.policy))
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(now), strict=True):
        assert np.array_equal(old, new)
    assert np.array_equal(after.state.length, run.state.length)
    assert drafted.count.tolist() == [3, 3] and int(drafted.cost.prefetched) == 0


@needs_native
def test_what_drafts_want_is_there_when_they_are_verified():
    prompts = prompts_of(5, 1)
    hits, brought = {}, 0
    for name, foresight in (("none", None), ("drafts", DraftRouting())):
        parts = {} if foresight is None else {"foresight": foresight}
        loop = begun(deep(), drafting(SELF, 2, **parts), prompts, slots=32)
        needed = missed = 0
        for _ in range(8):
            made = loop.step(np.ones(1, bool), np.full(1, 50))
            needed += int(made.totals.needed)
            missed += int(made.totals.needed) - int(made.totals.hits)
            brought += int(made.prefetched)
        hits[name] = 1 - missed / needed
    assert hits["drafts"] > hits["none"] + 0.05
    assert brought > 8


@needs_native
def test_all_widths_are_one_program_each_whatever_the_numbers():
    loop = begun(deep(), drafting(SELF, 3), prompts_of(2, 1))
    speculate.cycle.clear_cache()
    for gamma, capacity in ((0, 24), (3, 24), (4, 20), (3, 17), (0, 22)):
        loop.gamma = gamma
        chosen = dataclasses.replace(loop.target.policy, capacity=jnp.int32(capacity))
        loop.target = dataclasses.replace(loop.target, policy=chosen)
        loop.step(np.ones(1, bool), np.full(1, 90))
    assert speculate.cycle._cache_size() == 2  # widths 1 and 5


@pytest.mark.parametrize("longest", [1, 2, 3, 8, 9])
def test_widths_have_room_for_every_length(longest):
    for gamma in range(longest + 1):
        width = width_for(gamma, longest)
        assert gamma < width <= longest + 1 and width in widths(longest)
        assert width <= 2 * max(gamma, 1)  # at most twice the tokens that it has room for
    assert width_for(0, longest) == 1


@needs_native
def test_a_stop_token_ends_its_sequence_within_a_cycle():
    runtime = dataclasses.replace(tiny(144), policy=KINDS["self"]())
    prompts = texts(3)
    plain = generated(tiny(192), prompts, 30)
    stop = plain[0][11]
    stats, finished = runtime._fresh_stats(), np.zeros(3, bool)
    found = [[], [], []]
    for _, tokens in runtime.engine.tokens(
        runtime.init_state(3),
        [np.asarray(p, np.int32) for p in prompts],
        sampling=Sampling(temperature=0.0).validate(),
        seed=0,
        max_new_tokens=30,
        stop_ids=frozenset({stop}),
        stats=stats,
        finished=finished,
    ):
        for token in tokens:
            found[token.sequence].append(token.id)
    for own, whole in zip(found, plain, strict=True):
        assert own == whole[: whole.index(stop) + 1 if stop in whole else None]


@needs_native
def test_a_stop_string_ends_the_text_within_a_cycle():
    runtime = dataclasses.replace(tiny(144), policy=KINDS["self"]())
    whole = tiny(192).generate("The old man", 40, GREEDY)[0].text
    stop = whole[25:29]
    plain, some = (r.generate("The old man", 40, GREEDY, stop=stop) for r in (tiny(192), runtime))
    assert some[0].text == plain[0].text
    assert some[0].finish_reason == plain[0].finish_reason == "stop"
    assert [t.id for t in some[0].tokens] == [t.id for t in plain[0].tokens]


@needs_native
@pytest.mark.parametrize("kind", ["self", "model"])
def test_a_conversation_is_that_of_plain_decoding(kind):
    runtime = dataclasses.replace(tiny(144), policy=KINDS[kind](), draft=twin())
    answers = []
    for one in (tiny(192), runtime):
        session = Session(one)
        said = [
            "".join(p.text for p in session.send(text, 12, GREEDY)) for text in ("Hello", "And?")
        ]
        answers.append((said, session.reused_tokens))
    assert answers[0] == answers[1]
    assert answers[0][1] > 0


@needs_native
def test_log_probabilities_and_penalties_are_those_of_plain_decoding():
    runtime = dataclasses.replace(tiny(144), policy=KINDS["self"]())
    options = {"sampling": GREEDY | {"repetition_penalty": 1.3}, "logprobs": 3}
    plain, some = (r.generate(texts(2), 30, **options) for r in (tiny(192), runtime))
    assert runtime.stats.accepted > 3
    for own, other in zip(some, plain, strict=True):
        assert [t.id for t in own.tokens] == [t.id for t in other.tokens]
        for a, b in zip(own.tokens, other.tokens, strict=True):
            assert a.logprob == pytest.approx(b.logprob, abs=1e-5)
            assert [i for i, _ in a.top_logprobs] == [i for i, _ in b.top_logprobs]


def opened(built, **link):
    """The store behind a paced link."""
    link = Store.open_paced(np.asarray(built.store.records), **link)
    handle = jax.device_put(np.int32(link.handle))
    return link, dataclasses.replace(built.store, link=handle)


@needs_native
def test_over_a_link_with_delays_cycles_are_those_in_memory():
    built, prompts = deep(), prompts_of(4, 2)
    for parts in ({}, {"foresight": DraftRouting()}, {"foresight": Promote(rate=3.0)}):
        made = drafting(SELF, 3, placement=HostAll(), **parts)
        link, store = opened(built, gigabytes_per_second=0.05, jitter_us=300.0, seed=5)
        with link:
            loops = [begun(built, made, prompts, slots=28, store=s) for s in (None, store)]
            for turn in range(12):
                rows = [loop.step(np.ones(2, bool), np.full(2, 90)) for loop in loops]
                for name in ("token", "count", "drafted", "prefetched"):
                    own, other = (getattr(row, name) for row in rows)
                    assert np.array_equal(own, other), (turn, name)
                for name in ("needed", "hits", "host", "fetched"):
                    own, other = (int(getattr(row.totals, name)) for row in rows)
                    assert own == other, (turn, name)
            owners = [np.asarray(loop.run.state.experts.residency.owner) for loop in loops]
            assert np.array_equal(*owners)


@needs_native
def test_a_failing_link_is_an_error_and_keeps_the_state(tmp_path):
    built = deep()
    records = np.asarray(built.store.records)
    path = tmp_path / "bank"
    path.write_bytes(records.tobytes())
    bad = np.zeros(len(records), np.uint32)  # no checksum is right
    with Store.open_disk(
        path,
        data_offset=0,
        record_bytes=records.nbytes // len(records),
        records=len(records),
        direct=False,
        checksums=bad,
    ) as link:
        handle = jax.device_put(np.int32(link.handle))
        store = dataclasses.replace(built.store, link=handle, records=None)
        made = drafting(SELF, 3)
        state = decode.init_state(built.model, made, store, slots=24, batch=1, context=128)
        fixed = {"model": built.model, "params": built.params, "store": store}
        loop = Cycles(
            speculate.Target(policy=made, **fixed),
            None,
            Stats(record_bytes=1),
            Sampling(temperature=0.0).validate(),
            jax.random.key(0),
            0,
        )
        loop.begin(state, [np.array([3], np.int32)], None)
        before = np.asarray(loop.run.state.length).copy()
        with pytest.raises(LinkError):
            loop.step(np.ones(1, bool), np.full(1, 9))
        assert np.array_equal(loop.run.state.length, before)


@needs_native
def test_plain_steps_follow_where_speculation_never_pays():
    """Drafts that cost more than they bring: the controller goes back to plain steps."""
    costs = {"plain_ms": 1.0, "fixed_ms": 50.0, "draft_ms": 50.0, "token_ms": 50.0, "miss_ms": 1.0}
    lengths = LiveLength(costs=CycleCosts(**{n: jnp.float32(v) for n, v in costs.items()}))
    speculation = Speculate(draft=SELF, lengths=lengths, max_length=4)
    made = dataclasses.replace(policy("lru"), speculation=speculation)
    loop = begun(deep(), made, prompts_of(1, 1), context=256)
    loop.live = None  # these costs, not those of a busy machine
    lengths = []
    for _ in range(40):
        loop.step(np.ones(1, bool), np.full(1, 200))
        lengths.append(loop.drafted)
    assert lengths.count(0) >= 36


@needs_native
def test_cycles_of_one_batch_size_tell_nothing_of_another():
    names = ("plain_ms", "fixed_ms", "draft_ms", "token_ms", "miss_ms")
    lengths = LiveLength(costs=CycleCosts(**dict.fromkeys(names, jnp.float32(1.0))))
    speculation = Speculate(draft=LookupDraft(least=jnp.int32(1)), lengths=lengths, max_length=2)
    made, live = dataclasses.replace(policy("lru"), speculation=speculation), Live()
    started = []
    for batch, ms in ((1, 2.0), (3, 9.0), (1, 2.0), (3, 9.0)):
        loop = begun(deep(), made, prompts_of(1, batch), live=live)
        started.append(float(loop.target.policy.speculation.lengths.costs.plain_ms))
        for _ in range(4):
            loop.gamma = 0
            loop.learn(loop.step(np.ones(batch, bool), np.full(batch, 50)), ms / 1e3)
        assert live.latest.plain_ms == pytest.approx(ms)
    assert started[:2] == [1.0, 1.0]
    assert started[2:] == pytest.approx([2.0, 9.0])
    assert {batch: known.plain_ms for batch, known in live.by_batch.items()} == pytest.approx(
        {1: 2.0, 3: 9.0}
    )
    assert Live().latest.plain_ms is None


def test_tokens_of_a_cycle_end_at_stops_and_limits():
    made = type("Made", (), {})()
    made.count = np.array([3, 2, 0, 3])
    made.token = np.array([[1, 2, 3], [4, 5, 0], [0, 0, 0], [7, 9, 7]])
    finished = np.array([False, False, True, False])
    places = [*tokens_of(made, finished, np.array([2, 5, 5, 5]), frozenset({9}))]
    assert places == [(0, 0), (0, 1), (1, 0), (1, 1), (3, 0), (3, 1)]


def test_a_draft_that_does_not_fit_is_refused():
    other = build(small_config(vocab_size=60))
    helper = Helper(other.model, other.policy, other.params, other.store, None)
    small = build(small_config())
    with pytest.raises(PolicyError, match="60 tokens and the model 61"):
        helper.check(small.model, small.policy)
    longer = build(small_config(num_layers=4, moe_layers=tuple(range(4))))
    helper = Helper(longer.model, longer.policy, longer.params, longer.store, None)
    helper.check(small.model, drafting(ModelDraft(), 2))
    with pytest.raises(PolicyError, match="4 layers of width 32 and the model 2"):
        helper.check(small.model, drafting(ModelDraft(), 2, foresight=DraftRouting()))


def test_what_cannot_be_combined_is_refused():
    with pytest.raises(PolicyError, match="but no model drafts"):
        policy(dataclasses.replace(policy("lru"), foresight=DraftRouting()))
    with pytest.raises(PolicyError, match="but no model drafts"):
        policy(drafting(LookupDraft(), 2, foresight=DraftRouting()))
    with pytest.raises(PolicyError, match="has no queue"):
        policy(drafting(SELF, 2, foresight=UtilityQueue()))
    with pytest.raises(PolicyError, match="leave out the draft"):
        moejax.load("tiny", slots=76, draft="tiny-draft")
    assert policy("auto:gamma=20").speculation.lengths.size == 20
    with pytest.raises(PolicyError, match="drafts of at most 0"):
        Speculate(draft=SELF, max_length=0)
    runtime = moejax.load("tiny", slots=76, context=64, policy="sp-moe")
    assert runtime.draft.config.width == runtime.config.width
    with pytest.raises(PolicyError, match="name one as"):
        moejax.load(runtime.directory, slots=76, policy="sp-moe")
    with pytest.raises(PolicyError, match="has not: choose"):
        runtime.generate("a", 2, GREEDY, drift=DriftBudget(0.1))


@needs_native
def test_a_draft_model_must_have_the_whole_text():
    loop = begun(deep(), drafting(SELF, 2), prompts_of(1, 1))
    helper = Helper(None, None, None, None, None)
    loop.helper = helper
    with pytest.raises(InputError, match="history"):
        loop.begin(loop.run.state, [np.array([5], np.int32)], None)
    with pytest.raises(InputError, match="99 tokens of text"):
        loop.begin(loop.run.state, [np.zeros(99, np.int32)], None)


@needs_native
@pytest.mark.parametrize("kind", ["self", "lookup"])
def test_a_state_goes_on_without_its_history(kind):
    found = []
    for runtime in (tiny(192), dataclasses.replace(tiny(144), policy=KINDS[kind]())):
        state, tokens = runtime.init_state(1), []
        for prompt in texts(2):
            pieces = runtime.pieces(state, [np.asarray(prompt, np.int32)], 12, GREEDY)
            for newest, piece in pieces:
                state = newest
                tokens.append(piece.token.id)
            state = decode.rewind(state, np.array([len(tokens) + len(prompt) - 1]))
        found.append(tokens)
    assert found[0] == found[1]


@needs_native
@pytest.mark.parametrize("penalty", [1.0, 1.2])
def test_warming_up_compiles_every_draft_length(penalty):
    sampling = GREEDY | {"repetition_penalty": penalty}
    runtime = dataclasses.replace(tiny(144), policy=drafting(SELF, 2, longest=4))
    speculate.cycle.clear_cache()
    runtime.warm_up(sampling=sampling)
    compiled = speculate.cycle._cache_size()
    assert compiled == len(widths(4))
    runtime.generate(texts(1), 30, sampling)
    assert speculate.cycle._cache_size() == compiled


@needs_native
def test_what_follows_a_stop_was_not_accepted():
    runtime = dataclasses.replace(tiny(144), policy=KINDS["self"]())
    stats = runtime._fresh_stats()
    made = type("Made", (), {})()
    made.totals = None
    made.drafted, made.prefetched, made.draft_stall = np.array([4, 4]), 0, 0
    stats.add_cycle(made, np.array([True, True]), 4, kept=3)
    assert (stats.drafted, stats.accepted, stats.steps, stats.row_steps) == (8, 1, 1, 2)
    assert stats.tokens_per_step == 1.5
