"""What a lossy policy costs in accuracy: token by token, against the model's own routing."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moejax.decode import rewind, step
from moejax.errors import InputError
from moejax.models.transformer import Decoder
from moejax.policies.lengths import Cycle
from moejax.policies.policy import Policy
from moejax.policies.routing import TopK
from moejax.policies.value import fit_kappa, replaced_terms
from moejax.sampling import Sampling, divergence
from moejax.speculate import Speculating, Target, propose, settled, verify
from moejax.state import DecodeState, ExpertStore, StepTrace, array_fields, pytree

COUNTED = (
    *("replaced", "replaced_mass", "needed", "hits"),
    *("exact_needed", "exact_hits", "low"),
)
KINDS = dict.fromkeys(("nll", "exact_nll", "local", "trajectory", "replaced_mass"), jnp.float32)
KINDS |= {"flipped": bool}  # the others are counts


@pytree
class Loss:
    """Per token of text that was given, not drawn; W windows of T tokens. Divergences in nats."""

    nll: jax.Array  # [W, T] f32, of the next token under the lossy run
    exact_nll: jax.Array  # [W, T] f32, of the same under the model's own routing
    local: jax.Array  # [W, T] f32, KL of one lossy step, given the KV cache of the lossy run
    trajectory: jax.Array  # [W, T] f32, KL of the lossy run from the exact one, each with its own
    flipped: jax.Array  # [W, T] bool, another token is the likeliest
    replaced: jax.Array  # [W, T] i32, picks of the model's own router that were not made
    replaced_mass: jax.Array  # [W, T] f32, router weight that they lost, summed over layers
    needed: jax.Array  # [W, T] i32
    hits: jax.Array  # [W, T] i32
    exact_needed: jax.Array  # [W, T] i32
    exact_hits: jax.Array  # [W, T] i32
    moved: jax.Array  # [W, T] i32, records fetched or prefetched
    low: jax.Array  # [W, T] i32, experts run from low-bit copies
    passes: jax.Array  # [W, T] i32, 1 at the first token of each pass through the model
    terms: jax.Array | None  # [W, T, L] f32, see `value.replaced_terms`; with `local`, not drafting

    def summary(self) -> dict[str, float]:
        """Means per token, perplexities, and rates over all uses."""
        host = jax.device_get(self)
        mean = {
            name: float(getattr(host, name).mean(dtype=np.float64))
            for name in ("local", "trajectory", "flipped", "replaced", "replaced_mass", "moved")
        }
        perplexity = float(np.exp(host.nll.mean(dtype=np.float64)))
        exact = float(np.exp(host.exact_nll.mean(dtype=np.float64)))
        return mean | {
            "perplexity": perplexity,
            "exact_perplexity": exact,
            "perplexity_over_exact": perplexity / exact,
            "hit_rate": float(host.hits.sum() / host.needed.sum()),
            "exact_hit_rate": float(host.exact_hits.sum() / host.exact_needed.sum()),
            "missed": float((host.needed - host.hits - host.low).mean(dtype=np.float64)),
            "tokens_per_pass": float(host.passes.size / host.passes.sum()),
        }


def exact_logits(runtime: Any, windows: np.ndarray) -> np.ndarray:
    """Logits [W, T, V] f32 of the model's own routing for windows [W, T + 1] of token ids."""
    fixed = dataclasses.replace(runtime, policy=_exact(runtime.policy))
    return np.concatenate([fixed.logits(window[None, :-1]) for window in windows])


def measure(runtime: Any, windows: np.ndarray, exact: np.ndarray, *, local: bool = True) -> Loss:
    """Feed windows [W, T + 1] i32 through the runtime's policy, one token at a time.

    The KV cache begins anew with every window; residency and the policy's memory go on. Under a
    policy that drafts, each pass has the next token and drafts, as in a run that makes this text:
    drafts that are the text's own tokens are accepted, the others are routed with them and rolled
    back. What a pass counts is noted at its first token.

    Args:
        exact: [W, T, V], see `exact_logits`.
        local: also make every step with the model's own routing, on the same KV cache.

    Raises:
        InputError: weights are not read in place (load with `virtual=True`), wrong shapes, or
            drafts by another model.
    """
    if runtime.policy is None:
        raise InputError("a dense model routes nothing")
    windows = np.asarray(windows)
    if windows.ndim != 2 or exact.shape[:2] != (len(windows), windows.shape[1] - 1):
        raise InputError(
            f"windows must be [W, T + 1] and exact logits [W, T, V], not {windows.shape} and "
            f"{exact.shape}"
        )
    state, found = runtime.init_state(1, context=windows.shape[1]), []
    if state.experts.pool.shape[0]:
        raise InputError("loss is measured with weights read in place: load with virtual=True")
    fixed = (runtime.model, runtime.policy, runtime.params, runtime.store)
    drafts = runtime.policy.speculation.max_length > 0
    if drafts and runtime.policy.speculation.draft.kind == "model":
        raise InputError("loss under the drafts of another model is not measured")
    feed = _drafted if drafts else _window
    for window, logits in zip(windows, exact, strict=True):
        state, loss = feed(*fixed, state, jnp.asarray(window, jnp.int32), logits, local=local)
        state = rewind(state, np.zeros(1))
        found.append(jax.device_get(loss))
    return jax.tree.map(lambda *parts: np.stack(parts), *found)


@functools.partial(jax.jit, static_argnames=("model", "local"), donate_argnames="state")
def _window(
    model: Decoder,
    policy: Policy,
    params: dict,
    store: ExpertStore,
    state: DecodeState,
    tokens: jax.Array,
    exact: jax.Array,
    *,
    local: bool,
) -> tuple[DecodeState, Loss]:
    own = _exact(policy)

    def one(state: DecodeState, given: tuple) -> tuple[DecodeState, Loss]:
        token, wanted, reference = given
        token = token[None, None]
        same_cache = reference[None]
        if local:
            _, out = step(model, own, params, store, state, token)
            same_cache = out.logits
        state, out = step(model, policy, params, store, state, token, scores=local)
        rows = (out.logits, same_cache, reference[None], wanted[None])
        return state, Loss(
            **jax.tree.map(lambda row: row[0], _divergences(*rows)),
            **_counts(out.trace),
            passes=jnp.int32(1),
            terms=_terms(model, out.trace) if local else None,
        )

    return jax.lax.scan(one, state, (tokens[:-1], tokens[1:], exact))


@functools.partial(jax.jit, static_argnames=("model", "local"), donate_argnames="state")
def _drafted(
    model: Decoder,
    policy: Policy,
    params: dict,
    store: ExpertStore,
    state: DecodeState,
    tokens: jax.Array,
    exact: jax.Array,
    *,
    local: bool,
) -> tuple[DecodeState, Loss]:
    target = Target(model=model, policy=policy, params=params, store=store)
    count, width = exact.shape[0], policy.speculation.max_length + 1
    room = jax.tree.leaves(state.kv)[0].shape[2] + 1
    text = jnp.full((1, room), -1, jnp.int32).at[0, 0].set(tokens[0])
    padded = jnp.append(tokens, jnp.full(width, -1, jnp.int32))
    references = jnp.concatenate([exact, jnp.zeros((width, exact.shape[1]), exact.dtype)])

    def one(carry: tuple) -> tuple:
        run, at, found = carry
        wanted = jax.lax.dynamic_slice(padded, (at + 1,), (width,))
        reference = jax.lax.dynamic_slice_in_dim(references, at, width)
        run, accepted, counts, logits, same_cache = _cycle(target, run, wanted, count - at, local)
        same_cache = reference if same_cache is None else same_cache
        each = _divergences(logits, same_cache, reference, jnp.maximum(wanted, 0))
        place = jnp.arange(width)
        index = jnp.where(place <= accepted, at + place, count)
        noted = {name: found[name].at[index].set(row, mode="drop") for name, row in each.items()}
        sums = {name: found[name].at[at].set(value) for name, value in counts.items()}
        return run, at + accepted + 1, found | noted | sums

    run = Speculating(state=state, draft=None, text=text, seen=None)
    found = {
        name: jnp.zeros(count, KINDS.get(name, jnp.int32))
        for name in array_fields(Loss)
        if name != "terms"
    }
    start = (run, jnp.int32(0), found)
    run, _, found = jax.lax.while_loop(lambda carry: carry[1] < count, one, start)
    return run.state, Loss(**found, terms=None)


def _cycle(
    target: Target, run: Speculating, wanted: jax.Array, left: jax.Array, local: bool
) -> tuple[Speculating, jax.Array, dict[str, jax.Array], jax.Array, jax.Array | None]:
    """One cycle that makes tokens of the `wanted` [W], `left` [] of which there are.

    Returns:
        The run, how many drafts [] were right, counts, logits [W, V], and those of the model's own
        routing on the same cache, or None.
    """
    speculation, before, pending = target.policy.speculation, run.state.length, run.pending
    gamma = speculation.length(run.state.policy.speculation)
    fixed = {"width": wanted.shape[0], "greedy": True}
    greedy, key = Sampling(temperature=0.0).validate(), jax.random.key(0)  # nothing is drawn
    run, drafted = propose(target, None, run, gamma, (left - 1)[None], greedy, key, **fixed)
    active, same_cache = jnp.ones(1, bool), None
    if local:
        own = dataclasses.replace(target, policy=_exact(target.policy))
        same_cache = verify(own, run, drafted, active)[1][0]
    run, logits, trace = verify(target, run, drafted, active)
    reached = jnp.arange(wanted.shape[0] - 1) < drafted.count[0]
    right = jnp.cumprod(reached & (drafted.token[0] == wanted[:-1])).sum(dtype=jnp.int32)
    cycle = Cycle(
        gamma=gamma,
        drafted=drafted.count,
        accepted=right[None],
        active=active,
        missed=(trace.needed - trace.hits).sum(),
        shadow=jnp.full(1, -1, jnp.int32),
    )
    memory = run.state.policy
    remembered = speculation.observe(memory.speculation, cycle)
    memory = dataclasses.replace(memory, speculation=remembered)
    fed = jnp.concatenate([pending, drafted.token], axis=1)
    run = settled(run, memory, before, fed, wanted[None], right[None] + 1, drafted.count)
    counts = _counts(trace) | {"passes": jnp.int32(1)}
    counts["moved"] += drafted.cost.prefetched
    return run, right, counts, logits[0], same_cache


def _divergences(
    logits: jax.Array, same_cache: jax.Array, reference: jax.Array, wanted: jax.Array
) -> dict[str, jax.Array]:
    """Fields of `Loss` from logits [N, V] of the run, the same cache and the exact run."""
    each = jnp.arange(wanted.shape[0])
    return {
        "nll": -jax.nn.log_softmax(logits)[each, wanted],
        "exact_nll": -jax.nn.log_softmax(reference)[each, wanted],
        "local": divergence(same_cache, logits),
        "trajectory": divergence(reference, logits),
        "flipped": logits.argmax(-1) != reference.argmax(-1),
    }


def _counts(trace: StepTrace) -> dict[str, jax.Array]:
    """Fields of `Loss` that are sums over the layers."""
    sums = {name: getattr(trace, name).sum() for name in COUNTED}
    return sums | {"moved": (trace.fetched + trace.prefetched).sum()}


def _terms(model: Decoder, trace: StepTrace) -> jax.Array:
    config = model.config
    return replaced_terms(config.router, trace.scores, trace.picks, config.top_k)


def layer_prices(loss: Loss, shrink: float = 1.0) -> np.ndarray:
    """[L] f32 what replacing costs in each layer over the mean of the layers: a `Priced.kappa`.

    Args:
        loss: of a lossy policy, measured with `local`, on steps that replaced something.
        shrink: see `value.fit_kappa`.

    Raises:
        InputError: the loss is without local divergences, or nothing was replaced.
    """
    if loss.terms is None or not np.any(loss.terms):
        raise InputError("prices of layers need a loss measured with local=True, of a lossy policy")
    terms = np.asarray(loss.terms)
    kappa = fit_kappa(
        np.asarray(loss.local).reshape(-1), terms.reshape(-1, terms.shape[-1]), shrink
    )
    return kappa / kappa.mean()


def _exact(policy: Policy) -> Policy:
    return dataclasses.replace(policy, router=TopK())
