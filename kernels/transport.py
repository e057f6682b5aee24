"""Where experts go and how they get there, in native code: slot tables, copies, stores on a link.

A store is a bank file that threads read, or records in memory behind a link of a stated rate. A
step asks for records ahead with `request` and moves them into slots with `commit`; what the host
computes meanwhile lies between `host_begin` and `host_end`. The order of these calls is that of
their data: every one takes `after`, any array that must exist before.

None is marked as having a side effect, though native state changes: that state changes time and
never values, results order the calls, and JAX would start programs with effects from Python (0.9 ms
a step). So what a call takes has to differ from that of any other call, or XLA may make one of two.
"""

import enum

import jax
import jax.numpy as jnp

from moejax.kernels.store import Store, StoreStats, native_library

__all__ = [
    "Kind",
    "Status",
    "Store",
    "StoreStats",
    "cancel",
    "commit",
    "copy_records",
    "drop",
    "host_begin",
    "host_end",
    "landed",
    "plan_fetch",
    "request",
]


class Kind(enum.IntEnum):
    """How urgent a request is: every demand is read before any prefetch."""

    DEMAND = 0
    PREFETCH = 1


class Status(enum.IntEnum):
    """What a commit answers; after all but OK, the slots concerned hold zeros."""

    OK = 0
    READ_FAILED = 1
    SHORT_READ = 2
    BAD_CHECKSUM = 3
    BAD_REQUEST = 4  # an expert, slot or record size that the store does not have
    NO_STORE = 5
    HOST_FAILED = 6  # of experts computed for a GPU: no memory, say


def plan_fetch(
    slot_of: jax.Array,
    owner: jax.Array,
    home: jax.Array,
    keys: jax.Array,
    pending: jax.Array,
    order: jax.Array,
    layer: jax.Array,
    capacity: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]:
    """Give slots to as many absent experts of a layer as can be had, as `residency.bring` does.

    Args:
        slot_of, owner, home: the tables of a Residency.
        keys: [L * E] i32 or f32, the smallest among the evictable slots leaves first.
        pending: [E] bool, experts that are needed; those resident stay.
        order: [E] i32, a permutation: who comes first if slots are few.
        layer: [] i32.
        capacity: [] i32 slots in use.

    Returns:
        slot_of, owner, slots [E] i32, experts [E] i32 (ids, -1 beyond count), count [] i32.
    """
    for name, array in (("slot_of", slot_of), ("owner", owner), ("home", home), ("order", order)):
        _vector(name, array, jnp.int32)
    _vector("pending", pending, jnp.bool_)
    if keys.dtype not in (jnp.int32, jnp.float32) or keys.shape != slot_of.shape:
        raise ValueError(f"keys must be i32 or f32 {slot_of.shape}, got {keys.dtype} {keys.shape}")
    if home.shape != owner.shape or order.shape != pending.shape:
        raise ValueError(
            f"owner {owner.shape} and home {home.shape} must have one shape, and so must "
            f"pending {pending.shape} and order {order.shape}"
        )
    ints = jax.ShapeDtypeStruct(pending.shape, jnp.int32)
    scalar = jax.ShapeDtypeStruct((), jnp.int32)
    call = _call("moejax_plan_fetch", (slot_of, owner, ints, ints, scalar), {0: 0, 1: 1})
    return call(
        slot_of,
        owner,
        home,
        keys,
        pending,
        order,
        _scalar("layer", layer),
        _scalar("capacity", capacity),
    )


def copy_records(
    pool: jax.Array,
    store: jax.Array,
    slots: jax.Array,
    experts: jax.Array,
    count: jax.Array,
    after: jax.Array,
) -> jax.Array:
    """pool [S, R] with records of store [L * E, R] in slots, in place if the pool is donated.

    slots, experts [M] i32, the first `count` [] i32 of them; pairs that do not exist are skipped.
    """
    _pool(pool)
    if store.ndim != 2 or store.dtype != pool.dtype or store.shape[1] != pool.shape[1]:
        raise ValueError(
            f"store must be {pool.dtype} [L * E, {pool.shape[1]}], got {store.dtype} {store.shape}"
        )
    _pairs(slots, experts)
    call = _call("moejax_copy_records", pool, {0: 0})
    return call(pool, store, slots, experts, _scalar("count", count), after)


def request(
    handle: jax.Array,
    experts: jax.Array,
    count: jax.Array,
    kind: jax.Array | Kind,
    after: jax.Array,
) -> jax.Array:
    """Ask for records ahead; returns at once with a token [1] i32, a Status, to be passed on.

    experts [M] i32 (-1 = none), the first `count` [] i32 of them. One that has landed or is under
    way is not read again. Without a free buffer, stale records go first; then a prefetch is
    dropped and a demand displaces prefetches, queued ones before landed ones.
    """
    _vector("experts", experts, jnp.int32)
    call = _call("moejax_request", jax.ShapeDtypeStruct((1,), jnp.int32))
    return call(
        _scalar("handle", handle),
        experts,
        _scalar("count", count),
        _scalar("kind", kind),
        after,
    )


def cancel(handle: jax.Array, keep: jax.Array, after: jax.Array) -> jax.Array:
    """Forget what is not worth keeping [L * E] bool; returns a token [1] i32, a Status.

    Queued prefetches are dropped. What is under way or has landed stays until its buffer is
    needed for anything newer, and serves a commit until then.
    """
    _vector("keep", keep, jnp.bool_)
    call = _call("moejax_cancel", jax.ShapeDtypeStruct((1,), jnp.int32))
    return call(_scalar("handle", handle), keep, after)


def drop(handle: jax.Array, slot_of: jax.Array, after: jax.Array) -> jax.Array:
    """Forget the records, landed or queued, of experts without a slot; returns a token [1] i32.

    slot_of [L * E] i32, -1 = none. Without it a landing buffer is a slot that no policy counts.
    """
    _vector("slot_of", slot_of, jnp.int32)
    call = _call("moejax_drop", jax.ShapeDtypeStruct((1,), jnp.int32))
    return call(_scalar("handle", handle), slot_of, after)


def landed(handle: jax.Array, experts: jax.Array, after: jax.Array) -> jax.Array:
    """[M] bool, which records of the experts [M] i32 (-1 = none) a commit would not wait for.

    Depends on when it is asked: it may decide who computes, never what.
    """
    _vector("experts", experts, jnp.int32)
    call = _call("moejax_landed", jax.ShapeDtypeStruct(experts.shape, jnp.bool_))
    return call(_scalar("handle", handle), experts, after)


def commit(
    handle: jax.Array,
    pool: jax.Array,
    slots: jax.Array,
    experts: jax.Array,
    count: jax.Array,
    after: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Fill slots with records, those requested before and others alike; waits for them.

    What has not begun to be read by now is read straight into its slot, unless the file is read
    directly and the slot does not lie at a multiple of 512 bytes or what its disk asks for.
    pool [S, R] bits, changed in place if it is donated; slots, experts [M] i32, the first `count`
    [] i32 of them.

    Returns:
        pool, and status [4] i32: a Status, records delivered, microseconds of waiting, and how
        many of the records had been begun as a prefetch. A slot whose record cannot be delivered
        holds zeros; `Store.last_error` says why.
    """
    _pool(pool)
    _pairs(slots, experts)
    status = jax.ShapeDtypeStruct((4,), jnp.int32)
    call = _call("moejax_commit", (pool, status), {1: 0})
    return call(_scalar("handle", handle), pool, slots, experts, _scalar("count", count), after)


def host_begin(handle: jax.Array, after: jax.Array) -> jax.Array:
    """The host begins to compute experts; returns a token [1] i32, a Status, to be passed on.

    A beginning that never ends delays nothing: the next one takes its place.
    """
    call = _call("moejax_host_begin", jax.ShapeDtypeStruct((1,), jnp.int32))
    return call(_scalar("handle", handle), after)


def host_end(
    handle: jax.Array,
    count: jax.Array,
    after: jax.Array,
    experts: jax.Array | None = None,
) -> jax.Array:
    """The host has computed `count` [] i32 experts; returns a token [1] i32, a Status.

    Waits until `host_us` of the store has passed for each of them since the last `host_begin`.
    Without such a beginning, or without experts, there is nothing to wait for or to count.
    experts [M] i32 (-1 = none) says which they were, for the log of the store only.
    """
    experts = jnp.full(1, -1, jnp.int32) if experts is None else experts
    _vector("experts", experts, jnp.int32)
    call = _call("moejax_host_end", jax.ShapeDtypeStruct((1,), jnp.int32))
    return call(_scalar("handle", handle), _scalar("count", count), experts, after)


def _call(name: str, out: object, aliases: dict[int, int] | None = None):
    native_library()
    out = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), out)
    return jax.ffi.ffi_call(name, out, input_output_aliases=aliases)


def _scalar(name: str, value: jax.Array) -> jax.Array:
    if jnp.shape(value) != () or not jnp.issubdtype(jnp.result_type(value), jnp.integer):
        raise ValueError(f"{name} must be an integer scalar, got {value!r}")
    return jnp.asarray(value, jnp.int32)


def _vector(name: str, array: jax.Array, dtype: object) -> None:
    if array.ndim != 1 or array.dtype != dtype:
        expected = jnp.dtype(dtype).name
        raise ValueError(f"{name} must be a vector of {expected}, got {array.dtype} {array.shape}")


def _pairs(slots: jax.Array, experts: jax.Array) -> None:
    _vector("slots", slots, jnp.int32)
    _vector("experts", experts, jnp.int32)
    if slots.shape != experts.shape:
        raise ValueError(f"slots {slots.shape} and experts {experts.shape} differ in shape")


def _pool(pool: jax.Array) -> None:
    if pool.ndim != 2 or not pool.size:
        raise ValueError(f"the pool must be [S, R] with elements, got {pool.shape}")
