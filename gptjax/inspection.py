"""Measure what a model computes for one prompt, and describe it as plain values.

The forward pass runs block by block, by the model's own parts, with an attention kernel that returns its weights in
place of keys and values.
"""

from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.config import RunConfig
from gptjax.engine import power_of_two
from gptjax.errors import UserError
from gptjax.generate import LanguageModel
from gptjax.nn.attention import AttentionInput, KeysValues, attention_weights, causal_mask, float32_product
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


class Look(NamedTuple):
    """What one forward pass over T tokens comes to, of one head alone, in little memory.

    Attributes:
        likeliest: [L + 1, T] int32, the next token that each state of the residual stream makes likeliest.
        shares: [L + 1, T] float32, its probability.
        attention: [T, T] float32, how much each query attends to each key.
        log_p: [T, V] float32, of the token after each.
    """

    likeliest: np.ndarray
    shares: np.ndarray
    attention: np.ndarray
    log_p: np.ndarray


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
    weights = attention_weights(scores, mask, inputs)
    y = jnp.einsum("BGRTS,BSGK->BTGRK", weights.astype(v.dtype), v).reshape(B, T, H, K)
    weights = weights.reshape(B, H, T, T)
    return y, (weights, weights)


ATTENTIONS[KERNEL] = returning_weights


class Inspector:
    """Measures a model, which must be on one device.

    Args:
        params: its weights, as `split_layers` returns them; None for the engine's.
    """

    def __init__(self, lm: LanguageModel, params: Any = None):
        self.lm, self.params = lm, lm.engine.params if params is None else params
        cfg = replace(lm.config, dropout=0.0)
        self.graphdef = abstract_model(cfg, RunConfig(attention=KERNEL))[0]
        self._traced = jax.jit(self._trace)
        self._looked = jax.jit(self._look)
        self._attribute = jax.jit(self._gradient_times_input)
        self._patched = jax.jit(self._differences_with_patch, static_argnames="layer")

    def trace(self, ids: np.ndarray) -> Trace:
        """Run one prompt of ids [T]."""
        return self._traced(self.params, ids)

    def look(self, ids: np.ndarray, layer: int, head: int) -> Look:
        """Run one prompt of ids [T], and return the attention of one head of one layer, both from 0.

        Prompts are padded to a power of two, so that few programs serve all.
        """
        T = len(ids)
        width = max(T, min(power_of_two(T), self.lm.config.context_length))
        found = self._looked(self.params, np.pad(ids, (0, width - T)), np.int32(layer), np.int32(head))
        likeliest, shares, attention, log_p = map(np.asarray, found)
        return Look(likeliest[:, :T], shares[:, :T], attention[:T, :T], log_p[:T])

    def _look(self, params, ids: jax.Array, layer: jax.Array, head: jax.Array) -> Look:
        """One state of the residual stream is read out at a time, and one head's weights are kept."""
        model, inputs = self._model(params), Inputs(ids[None])

        def log_p(x: jax.Array) -> jax.Array:
            return jax.nn.log_softmax(logits(model, model.readout(x))[0])

        x = model.embed_inputs(inputs)
        attention, state = jnp.zeros((len(ids), len(ids)), jnp.float32), log_p(x)
        likeliest, shares = [state.argmax(-1)], [jnp.exp(state.max(-1))]
        for number, weights in enumerate(params[1]):
            x, cache, _ = model.apply_blocks(x, inputs, None, [weights], number)
            attention = jnp.where(number == layer, cache[0].kv[0][0, head], attention)
            state = log_p(x)
            likeliest.append(state.argmax(-1))
            shares.append(jnp.exp(state.max(-1)))
        return Look(jnp.stack(likeliest), jnp.stack(shares), attention, state)

    def _model(self, params) -> Transformer:
        rest, layers = params
        return bind_split(self.graphdef, rest, layers)

    def _trace(self, params, ids: jax.Array) -> Trace:
        model, inputs = self._model(params), Inputs(ids[None])
        x = model.embed_inputs(inputs)
        hidden, attention = [x[0]], []
        for number, weights in enumerate(params[1]):
            x, cache, _ = model.apply_blocks(x, inputs, None, [weights], number)
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
            x = model.apply_blocks(x, inputs, None, params[1][layer:], layer)[0]
        raw = logits(model, model.readout(x[:, -1:]))[:, 0]
        return raw[:, answer] - raw[:, foil]


def inspect_prompt(lm: LanguageModel, prompt: str, against: str | None, top: int) -> dict[str, Any]:
    """Return what a model computes for a prompt, as plain values.

    Args:
        against: a prompt of the same length to patch from the first; None for none.
        top: alternatives of each token.
    """
    inspector = Inspector(lm)
    ids = np.array(lm.prompt_ids(prompt), np.int32)
    trace = inspector.trace(ids)
    best = int(np.asarray(trace.lens[-1, -1]).argmax())
    found = {
        "prompt": prompt,
        "tokens": _tokens(lm, ids, np.asarray(jax.nn.log_softmax(trace.lens[-1])), top),
        "next": _alternatives(lm, jax.nn.log_softmax(trace.lens[-1, -1]), top),
        "lens": _lens(lm, *_likeliest(np.asarray(jax.nn.softmax(trace.lens)))),
        "attribution": {"token": _text(lm, best), "values": _floats(inspector.attribute(ids, best))},
        "attention": np.round(np.asarray(trace.attention, float), 6).tolist(),
    }
    if against is not None:
        other = np.array(lm.prompt_ids(against), np.int32)
        foil = int(np.asarray(inspector.trace(other).lens[-1, -1]).argmax())
        if foil == best:  # the two prompts continue alike: compare with the second choice
            foil = int(np.asarray(trace.lens[-1, -1]).argsort()[-2])
        found["patching"] = _patching(lm, inspector.patch(ids, other, best, foil), against, other)
    return found


def look_inside(inspector: Inspector, ids: np.ndarray, layer: int, head: int, top: int) -> dict[str, Any]:
    """Return what a model computes for ids [T], as plain values, with the attention of one head.

    Args:
        layer, head: from 0.
        top: alternatives of each token.

    Returns:
        `tokens`, `next` and `lens` as `inspect_prompt` returns them; `attention`, row i of which has the weights of
        the tokens 0 ... i; and the numbers `layers` and `heads`.
    """
    found, lm = inspector.look(ids, layer, head), inspector.lm
    return {
        "tokens": _tokens(lm, ids, found.log_p, top),
        "next": _alternatives(lm, found.log_p[-1], top),
        "lens": _lens(lm, found.likeliest, found.shares),
        "attention": [np.round(row[: i + 1].astype(float), 3).tolist() for i, row in enumerate(found.attention)],
        "layers": lm.config.n_layers,
        "heads": lm.config.n_heads,
    }


def _text(lm: LanguageModel, id: int) -> str:
    names = {id: name for name, id in lm.tokenizer.special_tokens.items()}
    return names.get(id) or lm.tokenizer.decode([id])


def _floats(values: np.ndarray) -> list[float]:
    return [float(value) for value in values]


def _tokens(lm: LanguageModel, ids: np.ndarray, log_p: np.ndarray, top: int) -> list[dict[str, Any]]:
    """Return each token with its probability, its rank from 1, and what was likelier; the first token has none."""
    rows: list[dict[str, Any]] = [{"id": int(ids[0]), "text": _text(lm, int(ids[0]))}]
    for before, id in zip(log_p[:-1], ids[1:].tolist(), strict=True):
        rank = int((before > before[id]).sum()) + 1
        row = {"id": id, "text": _text(lm, id), "probability": float(np.exp(before[id])), "rank": rank}
        rows.append({**row, "alternatives": _alternatives(lm, before, top)})
    return rows


def _alternatives(lm: LanguageModel, log_p: np.ndarray, top: int) -> list[dict[str, Any]]:
    log_p = np.asarray(log_p)
    best = log_p.argsort()[::-1][:top].tolist()
    return [{"id": id, "text": _text(lm, id), "probability": float(np.exp(log_p[id]))} for id in best]


def _likeliest(shares: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    best = shares.argmax(-1)
    return best, np.take_along_axis(shares, best[..., None], axis=-1)[..., 0]


def _lens(lm: LanguageModel, likeliest: np.ndarray, shares: np.ndarray) -> list[list[dict[str, Any]]]:
    """Return the likeliest next token after every position, by each state of the residual stream, [L + 1, T]."""
    names = {id: _text(lm, id) for id in set(likeliest.ravel().tolist())}
    return [
        [{"text": names[id], "probability": float(share)} for id, share in zip(row, values, strict=True)]
        for row, values in zip(likeliest.tolist(), shares, strict=True)
    ]


def _patching(lm: LanguageModel, found: Patching, against: str, ids: np.ndarray) -> dict[str, Any]:
    return {
        "against": against,
        "tokens": [_text(lm, int(id)) for id in ids],
        "answer": _text(lm, found.answer),
        "foil": _text(lm, found.foil),
        "clean_difference": found.clean,
        "other_difference": found.other,
        "full_effect": found.full,
        "effect": [_floats(row) for row in found.effect],
    }
