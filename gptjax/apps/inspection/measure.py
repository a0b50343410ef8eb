"""Measure what a model computes for one prompt.

The forward pass runs block by block, by the model's own parts, with an attention kernel that returns its weights in
place of keys and values.
"""

from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.config import RunConfig
from gptjax.errors import UserError
from gptjax.generate import LanguageModel
from gptjax.nn.attention import AttentionInput, KeysValues, causal_mask, float32_product
from gptjax.nn.backends import ATTENTIONS
from gptjax.nn.transformer import Inputs, Transformer, abstract_model, bind_split, logits

KERNEL = "inspected"


class Trace(NamedTuple):
    """One forward pass over T tokens.

    Attributes:
        hidden: [L + 1, T, D], the residual stream before the first block and after each.
        attention: [L, H, T, T] float32, how much each query (third axis) attends to each key.
        lens: [L + 1, T, V] float32, the logits that the readout makes of each state of the residual stream (the logit
            lens: nostalgebraist 2020); the last are the model's.
    """

    hidden: jax.Array
    attention: jax.Array
    lens: jax.Array


class Patching(NamedTuple):
    """The effect of a clean prompt's activations in the run of another (Meng et al. 2022, arXiv 2202.05262).

    A difference is the answer's logit less the foil's, at the last position.

    Attributes:
        answer, foil: ids.
        clean, other: the two prompts' differences.
        effect: [L + 1, T] float32, by how much the difference rises where one state of the residual stream, at one
            position, is the clean one.
        full: the same where all positions of the first state are the clean ones: clean - other.
    """

    answer: int
    foil: int
    clean: float
    other: float
    effect: np.ndarray
    full: float


def returning_weights(
    q: jax.Array, k: jax.Array, v: jax.Array, inputs: AttentionInput
) -> tuple[jax.Array, KeysValues]:
    """Compute attention by its definition, and return its weights [B, H, T, T] float32 as keys and values."""
    (B, T, H, K), G = q.shape, k.shape[2]
    mask = causal_mask(inputs.positions, inputs.positions, inputs.segments, inputs.segments, inputs.window)
    scores = float32_product("BTGRK,BSGK->BGRTS", q.reshape(B, T, G, H // G, K), k) * K**-0.5
    weights = jax.nn.softmax(jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min), axis=-1)
    y = jnp.einsum("BGRTS,BSGK->BTGRK", weights.astype(v.dtype), v).reshape(B, T, H, K)
    weights = weights.reshape(B, H, T, T)
    return y, (weights, weights)


ATTENTIONS[KERNEL] = returning_weights


class Inspector:
    """Measures a model, which must be on one device."""

    def __init__(self, lm: LanguageModel):
        self.lm, self.params = lm, lm.engine.params
        cfg = replace(lm.config, dropout=0.0)
        self.graphdef = abstract_model(cfg, RunConfig(attention=KERNEL))[0]
        self._traced = jax.jit(self._trace)
        self._attribute = jax.jit(self._gradient_times_input)
        self._patched = jax.jit(self._differences_with_patch, static_argnames="layer")

    def trace(self, ids: np.ndarray) -> Trace:
        """Run one prompt of ids [T]."""
        return self._traced(self.params, ids)

    def _model(self, params) -> Transformer:
        rest, layers = params
        return bind_split(self.graphdef, rest, layers)

    def _trace(self, params, ids: jax.Array) -> Trace:
        model, inputs = self._model(params), Inputs(ids[None])
        x = model.embed_inputs(inputs)
        hidden, attention = [x[0]], []
        for layer in params[1]:
            x, cache, _ = model.apply_blocks(x, inputs, None, [layer])
            hidden.append(x[0])
            attention.append(cache[0].kv[0][0])
        states = jnp.stack(hidden)
        return Trace(states, jnp.stack(attention), logits(model, model.readout(states)))

    def attribute(self, ids: np.ndarray, token: int) -> np.ndarray:
        """Return each token's gradient times input for one next token's logit: [T] float32 (Shrikumar et al. 2016).

        The input is the token's vector as the first block reads it.
        """
        return np.asarray(self._attribute(self.params, ids, token))

    def _gradient_times_input(self, params, ids: jax.Array, token: jax.Array) -> jax.Array:
        model, inputs = self._model(params), Inputs(ids[None])

        def logit(x: jax.Array) -> jax.Array:
            x = model.apply_blocks(x, inputs, None, params[1])[0]
            return logits(model, model.readout(x[:, -1:]))[0, 0, token]

        x = model.embed_inputs(inputs)
        return (jax.grad(logit)(x) * x).astype(jnp.float32).sum(axis=-1)[0]

    def patch(self, clean: np.ndarray, other: np.ndarray, answer: int, foil: int) -> Patching:
        """Copy each state of the clean run into the other's run, one at a time.

        Args:
            clean, other: ids of two prompts of one length, [T].
            answer, foil: the ids whose logits are compared.

        Raises:
            UserError: prompts of two lengths.
        """
        if len(clean) != len(other):
            raise UserError(
                f"--prompt has {len(clean)} tokens and --against {len(other)}; patching needs prompts of one length, "
                "token by token"
            )
        runs = [self.trace(ids) for ids in (clean, other)]
        values = [float(run.lens[-1, -1, answer] - run.lens[-1, -1, foil]) for run in runs]
        effect, T = [], len(clean)
        at_one = np.eye(T, dtype=bool)
        for layer in range(len(runs[0].hidden)):
            states = [run.hidden[layer] for run in runs]
            effect.append(
                np.asarray(self._patched(self.params, other, *states, at_one, answer, foil, layer=layer)) - values[1]
            )
        states = [run.hidden[0] for run in runs]
        everywhere = np.ones((1, T), bool)
        full = float(self._patched(self.params, other, *states, everywhere, answer, foil, layer=0)[0]) - values[1]
        return Patching(answer, foil, *values, np.stack(effect), full)

    def _differences_with_patch(self, params, ids, clean, other, where, answer, foil, layer: int) -> jax.Array:
        """Return the differences [N] of logits; the state before block `layer` is the clean one at where [N, T]."""
        model, N = self._model(params), len(where)
        inputs = Inputs(jnp.broadcast_to(ids, (N, len(ids))))
        x = jnp.where(where[:, :, None], clean, other)
        if layer < len(params[1]):
            x = model.apply_blocks(x, inputs, None, params[1][layer:])[0]
        raw = logits(model, model.readout(x[:, -1:]))[:, 0]
        return raw[:, answer] - raw[:, foil]
