"""The decoder stack: one Flax module for every family, pure in its caches."""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from moejax import experts as expert_layer
from moejax import kernels, window
from moejax.config import ModelConfig
from moejax.kernels import Weight, linear, rms_norm, swiglu
from moejax.layout import DTYPES, QUANTISED
from moejax.models.latent import latent_attention
from moejax.models.layers import (
    Span,
    Weights,
    at,
    from_bits,
    grouped_query_attention,
    span_of,
)
from moejax.models.shapes import Held, held_parameters
from moejax.policies.policy import Policy
from moejax.policies.prediction import Ahead
from moejax.policies.routing import Scored, eligible_scores
from moejax.state import (
    DecodeState,
    ExpertCache,
    ExpertStore,
    PolicyMemory,
    StepOutput,
    StepTrace,
    array_fields,
)
from moejax.supply import Supply

_normal = nn.initializers.normal(0.02)


class Stack(nn.Module):
    """The parameters of one kind of sublayer, as they are held."""

    held: tuple[tuple[str, Held], ...]

    @nn.compact
    def __call__(self) -> Weights:
        """The weights by name; those of stacks still want a layer."""
        return {
            name: Weight(
                data=self.param(name, _initial, held), layout=held.layout, vector=held.vector
            )
            for name, held in self.held
        }


def _initial(key: jax.Array, held: Held) -> jax.Array:
    if held.format in QUANTISED:  # quantised weights are made from loaded ones, never drawn
        return jnp.zeros(held.shape, held.dtype)
    floats = _normal(key, held.weight, DTYPES[held.format])
    return jax.lax.bitcast_convert_type(floats, held.dtype)


class Decoder(nn.Module):
    """A decoder-only transformer; its experts come in as a store and a cache, not as parameters."""

    config: ModelConfig
    dtype: str = "bfloat16"  # of the KV cache and of the weights that are not quantised
    quant: str | None = None  # format of the dense linear maps, a quantised one or None
    kernels: str = "reference"  # or "native"

    def _weights(self) -> dict[str, Weights]:
        held = sorted(held_parameters(self.config, self.dtype, self.quant).items())
        groups = itertools.groupby(held, key=lambda item: item[0].split("/")[0])
        return {
            group: Stack(tuple((path.split("/")[1], how) for path, how in items), name=group)()
            for group, items in groups
        }

    @nn.compact
    def __call__(
        self,
        policy: Policy | None,
        store: ExpertStore | None,
        state: DecodeState,
        tokens: jax.Array,
        *,
        all_logits: bool = False,
        scores: bool = False,
        prefill: bool | None = None,
        hidden: str | None = None,
        chance: jax.Array | None = None,
    ) -> tuple[DecodeState, StepOutput]:
        """Process tokens [B, T] (-1 = padding, at the end of a row) after what the state holds.

        Args:
            all_logits: logits of every position [B, T, V] instead of each sequence's last [B, V].
            scores: keep the full router scores in the trace.
            prefill: whether the tokens are a prompt's, as routers see it; by default if T > 1.
            hidden: give what follows each layer's attention, too: the residual stream ("raw"), or
                its norm, which the layer's experts or FFN work on ("normed").
            chance: [B] f32, makes this a step of the policy's self-draft: how likely each
                sequence's drafted tokens so far will all be accepted.
        """
        prefill = tokens.shape[1] > 1 if prefill is None else prefill
        if chance is not None:
            chance = jnp.broadcast_to(chance[:, None], tokens.shape).reshape(-1)
        how = _How(scores, prefill, hidden, chance)
        with kernels.using(self.kernels):
            return self._run(policy, store, state, tokens, all_logits, how)

    @nn.compact
    def foresee(
        self,
        policy: Policy,
        store: ExpertStore,
        state: DecodeState,
        hidden: jax.Array,
        valid: jax.Array,
        chance: jax.Array,
    ) -> tuple[DecodeState, jax.Array]:
        """Bring in what the policy's foresight wants, given the hidden states of a draft model.

        Args:
            hidden: [A, N, D] f32, for the gate of each layer, normed already if the foresight says
                that the draft's norm counts.
            valid: [N] bool.
            chance: [N] f32, see `foresight.Glimpse`.

        Returns:
            The state, and how many records were given slots, [] i32.
        """
        config, weights = self.config, self._weights()
        virtual = state.experts.pool.shape[0] == 0
        own_norm = policy.foresight.norm == "target"

        def one(carry: tuple, at: tuple) -> tuple:
            (cache, memory), (layer, index) = carry, at
            x = hidden[layer]
            if own_norm:
                x = rms_norm(x, weights["norms"]["post"].at(layer), config.norm_eps)
            scores = eligible_scores(config.router, _router(weights, x, index))
            supply = Supply(policy, store, index, config.num_experts, virtual)
            shelf = supply.open(cache)
            seen = window.glimpse(supply, shelf, memory, scores, valid, config.top_k, chance=chance)
            shelf, memory, count = window.bring(supply, shelf, memory, seen, x)
            return (supply.close(cache, shelf), memory), count

        layers = jnp.asarray(config.moe_layers, jnp.int32)
        places = (layers, jnp.arange(len(layers), dtype=jnp.int32))
        with kernels.using(self.kernels):
            (cache, memory), counts = jax.lax.scan(one, (state.experts, state.policy), places)
        return dataclasses.replace(state, experts=cache, policy=memory), counts.sum()

    def _run(
        self,
        policy: Policy | None,
        store: ExpertStore | None,
        state: DecodeState,
        tokens: jax.Array,
        all_logits: bool,
        how: "_How",
    ) -> tuple[DecodeState, StepOutput]:
        config, weights = self.config, self._weights()
        span = span_of(config, state.length, tokens, how.prefill)
        x = from_bits(weights["embed"]["weight"].data[jnp.maximum(tokens, 0)], self.dtype)
        carry = (x, state.kv, state.experts, state.policy)
        traces, hidden = [], []
        left_out = policy.speculation.draft.skip if how.drafts else ()
        for moe, layers in _segments(config, left_out):

            def body(carry: tuple, layer: tuple, moe=moe) -> tuple:
                return _layer(config, weights, policy, store, span, carry, *layer, moe, how)

            carry, (trace, after) = jax.lax.scan(body, carry, layers)
            traces += [trace] if moe else []
            hidden += [after] if how.hidden else []
        x, kv, cache, memory = carry
        hidden = jnp.concatenate(hidden) if hidden else None
        trace = jax.tree.map(lambda *parts: jnp.concatenate(parts), *traces) if traces else None
        logits = _logits(config, weights, x, span, all_logits)
        # Positions beyond the KV cache were not written: better no numbers than wrong ones.
        wrong, length = span.length > jax.tree.leaves(kv)[0].shape[2], span.length
        if store is not None and store.can_fail:
            # Records did not arrive: as if the step had not been, but for slots filled by then.
            failed = trace.failure.any()
            wrong, length = wrong | failed, jnp.where(failed, state.length, length)
        logits = jnp.where(wrong.reshape(-1, *[1] * (logits.ndim - 1)), jnp.nan, logits)
        state = DecodeState(kv=kv, experts=cache, policy=memory, length=length)
        return state, StepOutput(logits=logits, trace=trace, hidden=hidden)


@dataclasses.dataclass(frozen=True)
class _How:
    """What a step is for."""

    scores: bool  # to be kept in the trace
    prefill: bool
    hidden: str | None
    chance: jax.Array | None  # [N] f32, of drafts

    @property
    def drafts(self) -> bool:
        """Whether it is a step of the self-draft."""
        return self.chance is not None


def _segments(
    config: ModelConfig, left_out: tuple[int, ...] = ()
) -> list[tuple[bool, tuple[jax.Array, jax.Array]]]:
    """Runs of like layers: (have experts, (numbers of the layers, their indices in the stack))."""
    segments, seen = [], {True: 0, False: 0}
    moe_layers = set(config.moe_layers)
    for moe, run in itertools.groupby(range(config.num_layers), key=lambda i: i in moe_layers):
        layers = np.array([*run], np.int32)
        index = seen[moe] + np.arange(len(layers), dtype=np.int32)
        kept = ~np.isin(layers, left_out)
        seen[moe] += len(layers)
        if kept.any():
            segments.append((moe, (jnp.asarray(layers[kept]), jnp.asarray(index[kept]))))
    return segments


def _layer(
    config: ModelConfig,
    weights: dict[str, Weights],
    policy: Policy | None,
    store: ExpertStore | None,
    span: Span,
    carry: tuple,
    layer: jax.Array,
    index: jax.Array,
    moe: bool,
    how: _How,
) -> tuple[tuple, tuple[StepTrace | None, jax.Array | None]]:
    """One layer; `index` counts within the layers of its kind."""
    x, kv, cache, memory = carry
    x, kv = _attention(config, weights, span, x, kv, layer)
    normed = rms_norm(x, weights["norms"]["post"].at(layer), config.norm_eps)
    after = None
    if how.hidden:
        after = (normed if how.hidden == "normed" else x).reshape(-1, config.width)
    if not moe:
        w = at(weights["mlp"], index)
        return (x + swiglu(normed, w["gate_up"], w["down"]), kv, cache, memory), (None, after)
    experts, memory = _routed(config, weights, policy, cache, memory, index, x, normed, span, how)
    if how.drafts:
        out, cache, memory, counts = expert_layer.draft(policy, store, cache, memory, experts)
    else:
        ahead = _ahead(config, weights, span)
        out, cache, memory, kv, counts = expert_layer.apply(
            policy, store, cache, memory, experts, ahead, kv
        )
    if experts.shared is not None:
        out = out + experts.shared
    trace = _trace(experts, counts, how)
    return (x + out.reshape(x.shape), kv, cache, memory), (trace, after)


def _attention(
    config: ModelConfig,
    weights: dict[str, Weights],
    span: Span,
    x: jax.Array,
    kv: Any,
    layer: jax.Array,
) -> tuple[jax.Array, Any]:
    """Residual stream [B, T, D] after a layer's attention, and the KV cache with its rows."""
    attention: Callable = latent_attention if config.latent else grouped_query_attention
    normed = rms_norm(x, weights["norms"]["input"].at(layer), config.norm_eps)
    mixed, kv = attention(config, weights["attention"], layer, normed, kv, span)
    return x + mixed, kv


def _ahead(config: ModelConfig, weights: dict[str, Weights], span: Span) -> Ahead:
    layers, eps = jnp.asarray(config.moe_layers), config.norm_eps

    def gate(hidden: jax.Array, target: jax.Array) -> jax.Array:
        norm = weights["norms"]["post"].at(layers[target])
        scores = _router(weights, rms_norm(hidden, norm, eps), target)
        return eligible_scores(config.router, scores)

    def input_norm(hidden: jax.Array, target: jax.Array) -> jax.Array:
        return rms_norm(hidden, weights["norms"]["input"].at(layers[target]), eps)

    def attend(
        hidden: jax.Array, kv: Any, layer: jax.Array, target: jax.Array
    ) -> tuple[jax.Array, Any]:
        def one(i: jax.Array, carry: tuple) -> tuple:
            return _attention(config, weights, span, *carry, i)

        start = (hidden.reshape(*span.valid.shape, -1), kv)
        ahead, kv = jax.lax.fori_loop(layers[layer] + 1, layers[target] + 1, one, start)
        return ahead.reshape(hidden.shape), kv

    return Ahead(gate=gate, input_norm=input_norm, attend=attend)


def _routed(
    config: ModelConfig,
    weights: dict[str, Weights],
    policy: Policy,
    cache: ExpertCache,
    memory: PolicyMemory,
    index: jax.Array,
    hidden: jax.Array,  # [B, T, D] f32
    normed: jax.Array,  # [B, T, D] f32
    span: Span,
    how: _How,
) -> tuple[expert_layer.Layer, PolicyMemory]:
    """Router and shared expert of a layer: what its experts work on."""
    x, valid = normed.reshape(-1, config.width), span.valid.reshape(-1)
    scores = _router(weights, x, index)
    router = policy.speculation.draft.router if how.drafts else policy.router
    if how.drafts:
        resident = window.draftable(policy, cache, memory, index, config.num_experts)
    else:
        resident = expert_layer.resident(policy, cache, index, config.num_experts)
    seen = Scored(
        layer=index,
        scores=scores,
        resident=resident,
        valid=valid,
        rule=config.router,
        top_k=config.top_k,
        prefill=how.prefill,
    )
    if how.drafts:  # its router remembers nothing
        routing, remembered = router.route(None, seen)[0], memory.router
    else:
        routing, remembered = router.route(memory.router, seen)
    shared = None
    if config.shared_width:
        w = at(weights["shared"], index)
        shared = swiglu(x, w["gate_up"], w["down"])
        if config.shared_gate:
            shared = jax.nn.sigmoid(linear(x, w["gate"])) * shared
    layer = expert_layer.Layer(
        index=index,
        hidden=hidden.reshape(x.shape),
        x=x,
        shared=shared,
        scores=scores,
        routing=routing,
        valid=valid,
        chance=how.chance,
        prefill=how.prefill,
        rule=config.router,
    )
    return layer, dataclasses.replace(memory, router=remembered)


def _trace(layer: expert_layer.Layer, counts: Any, how: _How) -> StepTrace:
    routing, valid = layer.routing, layer.valid
    fields = {name: getattr(counts, name) for name in array_fields(expert_layer.LayerTrace)}
    if not how.scores:
        fields |= dict.fromkeys(("forecast", "resident", "fresh", "hosted", "lowered"))
    return StepTrace(
        picks=layer.picks,
        weights=jnp.where(valid[:, None], routing.weight, 0.0),
        replaced_mass=jnp.where(valid, routing.replaced_mass, 0.0).sum(),
        scores=layer.scores if how.scores else None,
        exact=jnp.where(valid[:, None], routing.exact, -1) if how.scores else None,
        **fields,
    )


def _router(weights: dict[str, Weights], x: jax.Array, layer: jax.Array) -> jax.Array:
    """Scores [N, E] f32 over all experts for normed x [N, D]."""
    router = weights["moe"]["router"].at(layer)
    return kernels.softmax(kernels.linear(x, router, round_input=False))


def _logits(
    config: ModelConfig, weights: dict[str, Weights], x: jax.Array, span: Span, all_logits: bool
) -> jax.Array:
    if not all_logits:
        last = jnp.maximum(span.valid.sum(axis=1) - 1, 0)
        x = jnp.take_along_axis(x, last[:, None, None], axis=1)[:, 0]
    x = rms_norm(x, weights["final_norm"]["weight"], config.norm_eps)
    head = weights["embed"] if config.tied_embeddings else weights["head"]
    return linear(x, head["weight"])
