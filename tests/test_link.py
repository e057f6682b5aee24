"""Experts behind a link: bits, hits and fetches of experts in memory; failures are no numbers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import build, small_config
from test_exactness import CONTEXT, prompts_of, run
from test_prediction import with_predictor

from moejax import decode
from moejax.errors import BudgetError, LinkError, PolicyError
from moejax.kernels import build as native
from moejax.kernels.transport import Status, Store
from moejax.models.transformer import Decoder
from moejax.policies.placement import HostAll
from moejax.policies.prediction import NextGate, PreviousToken
from moejax.state import ExpertStore

if native.library() is None:
    pytest.skip(native.status(), allow_module_level=True)

KERNELS = ("reference", "native")


@pytest.fixture(scope="module")
def model():
    return build(small_config(num_layers=3, moe_layers=(0, 1, 2)), "bfloat16")


@pytest.fixture(params=["disk", "paced"])
def linked(request, model, tmp_path):
    """The model with its experts behind a link."""
    records = np.asarray(model.store.records)
    if request.param == "disk":
        path = tmp_path / "bank"
        path.write_bytes(records.tobytes())
        link = Store.open_disk(
            path, data_offset=0, record_bytes=records[0].nbytes, records=len(records)
        )
    else:
        link = Store.open_paced(records, gigabytes_per_second=1.0, latency_us=50)
    with link:
        yield behind(model, link, None if request.param == "disk" else model.store.records)


def behind(model, link, records=None):
    store = ExpertStore(records=records, link=jnp.int32(link.handle), layout=model.store.layout)
    return dataclasses.replace(model, store=store)


def with_kernels(built, kernels):
    return dataclasses.replace(built, model=Decoder(built.config, built.model.dtype, None, kernels))


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize(
    "predictor", [None, NextGate(limit=jnp.int32(3)), PreviousToken(limit=jnp.int32(2), horizon=2)]
)
def test_a_link_changes_nothing_but_time(model, linked, predictor, kernels):
    model, linked = with_kernels(model, kernels), with_kernels(linked, kernels)
    prompts = prompts_of(4, 2)
    whole, _ = run(model, prompts, 4, slots=24)
    policy = model.policy if predictor is None else with_predictor(model, predictor)
    for budget in ({"slots": 7}, {"slots": 15, "per_layer": True}, {"slots": 24}):
        some, over_link = run(linked, prompts, 4, policy=policy, **budget)
        assert np.array_equal(whole, some)
        if budget["slots"] < 24:
            _, in_memory = run(model, prompts, 4, policy=policy, **budget)
            for a, b in zip(over_link, in_memory, strict=True):
                for name in ("hits", "fetched", "prefetched", "passes"):
                    assert (np.asarray(getattr(a, name)) == np.asarray(getattr(b, name))).all()
        assert not any(np.asarray(t.failure).any() for t in over_link)


def test_a_paced_link_has_a_host_beside_it(model):
    records = np.asarray(model.store.records)
    host = dataclasses.replace(model.policy, placement=HostAll())
    whole, _ = run(model, prompts_of(4, 1), 3, slots=24)
    with Store.open_paced(records, gigabytes_per_second=1.0, latency_us=50) as link:
        linked = behind(model, link, model.store.records)
        some, traces = run(linked, prompts_of(4, 1), 3, policy=host, slots=7)
    assert np.array_equal(whole, some)
    assert sum(int(t.host.sum()) for t in traces) > 0


def test_a_failed_read_makes_no_numbers_and_loses_nothing(model, tmp_path):
    records = np.asarray(model.store.records)
    path, size = tmp_path / "bank", records[0].nbytes
    path.write_bytes(records.tobytes())
    options = {"data_offset": 0, "record_bytes": size, "records": len(records)}
    prompt = prompts_of(4, 1)
    want, _ = run(model, prompt, 2, slots=24)
    fixed = (model.model, model.policy, model.params)
    with Store.open_disk(path, **options) as link, Store.open_disk(path, **options) as other:
        good, bad = behind(model, link).store, behind(model, other).store
        state = decode.init_state(*fixed[:2], good, slots=4, context=CONTEXT)
        state, logits, _ = decode.prefill(*fixed, good, state, prompt, chunk=8)
        length = np.asarray(state.length).copy()
        with open(path, "r+b") as file:
            file.truncate(size)
        tokens = jnp.argmax(logits, -1).astype(jnp.int32)[:, None]
        state, out = decode.decode_step(*fixed, bad, state, tokens)
        assert np.isnan(np.asarray(out.logits)).all()
        assert (np.asarray(out.trace.failure) == Status.SHORT_READ).any()
        assert np.array_equal(state.length, length)
        assert str(path) in other.last_error()
        path.write_bytes(records.tobytes())
        for step in (1, 2):
            state, out = decode.decode_step(*fixed, good, state, tokens)
            assert np.array_equal(np.asarray(out.logits), want[step])
            tokens = jnp.argmax(out.logits, -1).astype(jnp.int32)[:, None]


def test_a_prompt_that_failed_half_way_is_no_prompt(model, tmp_path):
    """A later chunk would do without what the failed one should have taken in."""
    records = np.asarray(model.store.records)
    path = tmp_path / "bank"
    options = {"data_offset": 0, "record_bytes": records[0].nbytes, "records": len(records)}
    path.write_bytes(records.tobytes())
    with Store.open_disk(path, **options) as link:
        linked = behind(model, link)
        fixed = (linked.model, linked.policy, linked.params, linked.store)
        state = decode.init_state(*fixed[:2], linked.store, slots=4, context=CONTEXT)
        with open(path, "r+b") as file:
            file.truncate(records[0].nbytes)
        with pytest.raises(LinkError, match="SHORT_READ"):
            decode.prefill(*fixed, state, [np.arange(20, dtype=np.int32)], chunk=8)


def test_what_a_disk_cannot_do_is_refused(model, tmp_path):
    records = np.asarray(model.store.records)
    (tmp_path / "bank").write_bytes(records.tobytes())
    size = records[0].nbytes
    with Store.open_disk(
        tmp_path / "bank", data_offset=0, record_bytes=size, records=len(records)
    ) as link:
        store = behind(model, link).store
        with pytest.raises(BudgetError, match="read in place"):
            decode.init_cache(model.config, store, 8, virtual=True)
        host = dataclasses.replace(model.policy, placement=HostAll())
        with pytest.raises(PolicyError, match="disk has no copy"):
            decode.init_state(model.model, host, store, slots=8)


def test_the_pool_is_not_copied(model):
    """Scratch does not grow with the slots."""
    records = np.asarray(model.store.records)
    with Store.open_paced(records, gigabytes_per_second=1.0, latency_us=0) as link:
        linked = with_kernels(behind(model, link), "native")
        few, many = (cost(linked, slots) for slots in (8, 20))
    assert many == few


def cost(built, slots):
    fixed = (built.model, built.policy)
    state = jax.eval_shape(
        lambda: decode.init_state(*fixed, built.store, slots=slots, context=CONTEXT)
    )
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    compiled = decode.decode_step.lower(*fixed, built.params, built.store, state, tokens).compile()
    return compiled.memory_analysis().temp_size_in_bytes // 4096
