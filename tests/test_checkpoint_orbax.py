import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import orbax_directory
from moejax.checkpoints.orbax import restore, save
from moejax.errors import CheckpointError


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Cache:
    pool: jax.Array
    stats: dict
    capacity: int = dataclasses.field(metadata={"static": True})


def tree():
    return Cache(
        pool=jnp.arange(12, dtype=jnp.uint16).reshape(3, 4),
        stats={
            "scores": jax.random.normal(jax.random.key(0), (5,), jnp.bfloat16),
            "layers": [jnp.float32(1.5), jnp.arange(3, dtype=jnp.int32)],
            "host": np.arange(4, dtype=np.uint16),
        },
        capacity=7,
    )


def abstract(sharding=None):
    def leaf(x):
        if isinstance(x, np.ndarray):
            return np.zeros_like(x)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.tree.map(leaf, tree())


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("orbax") / "checkpoint"
    save(path, tree())
    return path


def equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert type(x) is type(y) and x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y), strict=True)


def test_round_trip(saved):
    equal(restore(saved, abstract()), tree())


def test_a_relative_path_will_do(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save("x", tree())
    equal(restore("x", abstract()), tree())
    equal(restore(tmp_path / "x", abstract()), tree())


def test_a_tree_is_restored_straight_into_pinned_host_memory(saved):
    device = jax.devices()[0]
    sharding = jax.sharding.SingleDeviceSharding(device, memory_kind="pinned_host")
    restored = restore(saved, abstract(sharding))
    arrays = [x for x in jax.tree.leaves(restored) if isinstance(x, jax.Array)]
    assert len(arrays) == 4
    assert {array.sharding.memory_kind for array in arrays} == {"pinned_host"}
    equal(restored, tree())


def test_an_existing_checkpoint_is_not_overwritten(saved):
    with pytest.raises(CheckpointError, match="exists"):
        save(saved, {"a": jnp.zeros(1)})
    equal(restore(saved, abstract()), tree())


def test_what_cannot_be_saved_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="cannot save"):
        save(tmp_path / "x", {"a": object()})


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"scores": jax.ShapeDtypeStruct((6,), jnp.bfloat16)}, r"scores is bfloat16\[5\], not .*6"),
        ({"scores": jax.ShapeDtypeStruct((5,), jnp.float32)}, r"scores is .*, not float32\[5\]"),
        ({"host": np.zeros(3, np.uint16)}, r"stats/host is uint16\[4\], not uint16\[3\]"),
        ({"host": np.zeros(4, np.int16)}, r"stats/host is uint16\[4\], not int16\[4\]"),
        ({"more": jax.ShapeDtypeStruct((5,), jnp.float32)}, "stats/more is missing"),
        ({"scores": None}, "stats/scores is not asked for"),
        ({"layers": [jax.ShapeDtypeStruct((), jnp.float32)]}, "stats/layers/1 is not asked for"),
    ],
)
def test_every_difference_from_the_abstract_tree_is_named(change, why, saved):
    wanted = abstract()
    wanted = dataclasses.replace(wanted, stats=wanted.stats | change)
    with pytest.raises(CheckpointError, match=why):
        restore(saved, wanted)


def test_a_missing_checkpoint_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    for name in ("absent", "file"):
        with pytest.raises(CheckpointError, match=f"no checkpoint at .*{name}"):
            restore(tmp_path / name, abstract())
    with pytest.raises(CheckpointError, match="cannot restore .*empty"):
        restore(tmp_path / "empty", abstract())


@pytest.mark.parametrize("damage", ["deleted", "truncated"])
@pytest.mark.parametrize("values_only", [True, False])
def test_a_damaged_checkpoint_is_refused(damage, values_only, tmp_path):
    # One leaf: when one of several reads fails, Orbax abandons the others with a noisy warning.
    save(tmp_path / "x", {"a": jax.random.normal(jax.random.key(0), (300, 40))})
    wanted = {"a": jax.ShapeDtypeStruct((300, 40), jnp.float32)}
    equal(restore(tmp_path / "x", wanted), {"a": jax.random.normal(jax.random.key(0), (300, 40))})
    data = [file for file in tmp_path.rglob("*") if file.is_file() and file.parent.name == "d"]
    if values_only:
        data = [max(data, key=lambda file: file.stat().st_size)]
    for file in data:
        if damage == "deleted":
            file.unlink()
        else:
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(CheckpointError, match="cannot restore .*x: "):
        restore(tmp_path / "x", wanted)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Earlier:
    """The expert store when directories were first saved."""

    records: jax.Array
    link: None = None
    low: None = None


def test_directories_of_earlier_versions_load(tmp_path, small):
    tree = {"params": small.params, "store": Earlier(small.store.records)}
    save(tmp_path / orbax_directory.TREE, tree)
    _, records = orbax_directory.load_directory(tmp_path, small.model, on_device=True)
    np.testing.assert_array_equal(records, small.store.records)
