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
from moejax.policies.policy import Policy
from moejax.policies.routing import TopK
from moejax.policies.value import fit_kappa, replaced_terms
from moejax.sampling import divergence
from moejax.state import DecodeState, ExpertStore, StepTrace, pytree


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
    terms: jax.Array | None  # [W, T, L] f32, see `value.replaced_terms`; with `local`

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
        }


def exact_logits(runtime: Any, windows: np.ndarray) -> np.ndarray:
    """Logits [W, T, V] f32 of the model's own routing for windows [W, T + 1] of token ids."""
    fixed = dataclasses.replace(runtime, policy=_exact(runtime.policy))
    return np.concatenate([fixed.logits(window[None, :-1]) for window in windows])


def measure(runtime: Any, windows: np.ndarray, exact: np.ndarray, *, local: bool = True) -> Loss:
    """Feed windows [W, T + 1] i32 through the runtime's policy, one token at a time.

    The KV cache begins anew with every window; residency and the policy's memory go on.

    Args:
        exact: [W, T, V], see `exact_logits`.
        local: also make every step with the model's own routing, on the same KV cache.

    Raises:
        InputError: weights are not read in place (load with `virtual=True`), or wrong shapes.
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
    for window, logits in zip(windows, exact, strict=True):
        state, loss = _window(*fixed, state, jnp.asarray(window, jnp.int32), logits, local=local)
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
        trace, logits = out.trace, out.logits
        sums = {
            name: getattr(trace, name).sum()
            for name in (
                *("replaced", "replaced_mass", "needed", "hits"),
                *("exact_needed", "exact_hits", "low"),
            )
        }
        return state, Loss(
            nll=-jax.nn.log_softmax(logits[0])[wanted],
            exact_nll=-jax.nn.log_softmax(reference)[wanted],
            local=divergence(same_cache, logits)[0],
            trajectory=divergence(reference, logits[0]),
            flipped=logits[0].argmax() != reference.argmax(),
            moved=(trace.fetched + trace.prefetched).sum(),
            terms=_terms(model, trace) if local else None,
            **sums,
        )

    return jax.lax.scan(one, state, (tokens[:-1], tokens[1:], exact))


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
