"""Attention for CPUs: blocks of queries, each against the keys up to its last, with a gradient written by hand.

Half of the scores of causal attention are never computed, and with a window those before it; of the rest the fewest
passes over memory are made: the softmax divides its output and not its weights (Dao et al. 2022, arXiv 2205.14135,
section 3.1), and the gradient needs no sum over a row of them (appendix B.2). Scores have their keys before their
queries, so that sums and maxima over keys run over whole vectors.

Letters: B sequences, S keys, T queries of a block, G key/value heads, R query heads for each of them, K head width.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from gptjax.nn.attention import AttentionInput, KeysValues, as_cache, cap_scores, float32_product

SMALLEST_BLOCK = 64  # queries; shorter ones make matmuls too small
MOST_BLOCKS = 8  # of one row, since each is compiled by itself


def blocked_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, inputs: AttentionInput
) -> tuple[jax.Array, KeysValues]:
    """Compute causal attention within segments, in the order of the rows (a `Kernel`; see `kernels`)."""
    assert inputs.cache is None
    return _blocked(inputs.window, inputs.cap, q, k, v, inputs.sinks, inputs.segments), as_cache(k, v)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _blocked(window, cap, q, k, v, sinks, segments):
    return _forward(window, cap, q, k, v, sinks, segments)[0]


def _forward(window, cap, q, k, v, sinks, segments):
    queries = _split_heads(q * q.shape[-1] ** -0.5, k.shape[2])
    keys, values = jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)
    outputs, kept = [], []
    for rows, past in _blocks(q.shape[1], window):
        scores = cap_scores(_scores(keys, queries, rows, past), cap)
        scores = jnp.where(_allowed(rows, past, window, segments), scores, jnp.finfo(jnp.float32).min)
        largest, sunk = scores.max(2, keepdims=True), None
        if sinks is not None:
            logits = sinks.reshape(1, keys.shape[1], 1, -1, 1)
            largest = jnp.maximum(largest, logits)
            sunk = jnp.exp(logits - largest)[:, :, 0]
        weights = jnp.exp(scores - largest)
        total = (weights.sum(2) + (0 if sunk is None else sunk))[..., None]
        weights = weights.astype(v.dtype)
        outputs.append(float32_product("BGSRT,BGSK->BGRTK", weights, values[:, :, past]) / total)
        kept.append((weights, total, sunk))
    y = _join_heads(jnp.concatenate(outputs, axis=3)).astype(q.dtype)
    y = checkpoint_name(y, "attention")
    return y, (queries, keys, values, y, kept)


def _backward(window, cap, saved, y_grad):
    queries, keys, values, y, kept = saved
    slopes, outputs = (_split_heads(x, keys.shape[1]) for x in (y_grad, y))
    q_grads, sink_grads = [], []
    k_grad, v_grad = jnp.zeros(keys.shape, jnp.float32), jnp.zeros(values.shape, jnp.float32)
    for (rows, past), (weights, total, sunk) in zip(_blocks(y.shape[1], window), kept, strict=True):
        g = slopes[:, :, :, rows] / total
        inner = (g * outputs[:, :, :, rows]).sum(-1)[:, :, None]
        if sunk is not None:
            sink_grads.append(-(sunk * inner[:, :, 0]).sum((0, 3)).reshape(-1))
        g = g.astype(values.dtype)
        s = weights * (float32_product("BGSK,BGRTK->BGSRT", values[:, :, past], g) - inner)
        if cap is not None:
            s *= 1 - jnp.square(jnp.tanh(_scores(keys, queries, rows, past) / cap))
        s = s.astype(keys.dtype)
        q_grads.append(float32_product("BGSRT,BGSK->BGRTK", s, keys[:, :, past]))
        k_grad = k_grad.at[:, :, past].add(float32_product("BGSRT,BGRTK->BGSK", s, queries[:, :, :, rows]))
        v_grad = v_grad.at[:, :, past].add(float32_product("BGSRT,BGRTK->BGSK", weights, g))
    q_grad = _join_heads(jnp.concatenate(q_grads, axis=3)) * y.shape[-1] ** -0.5
    k_grad, v_grad = jnp.swapaxes(k_grad, 1, 2), jnp.swapaxes(v_grad, 1, 2)
    sink_grad = sum(sink_grads) if sink_grads else None
    return q_grad.astype(y.dtype), k_grad.astype(keys.dtype), v_grad.astype(values.dtype), sink_grad, None


_blocked.defvjp(_forward, _backward)


def _scores(keys, queries, rows, past):
    return float32_product("BGSK,BGRTK->BGSRT", keys[:, :, past], queries[:, :, :, rows])


def _blocks(length: int, window: int | None) -> list[tuple[slice, slice]]:
    """Of each block, its queries and the keys up to its last, from the first in the window of its first query."""
    size = max(SMALLEST_BLOCK, -(-length // MOST_BLOCKS))
    ends = [min(start + size, length) for start in range(0, length, size)]
    reach = length if window is None else window
    return [
        (slice(start, end), slice(max(0, start - reach + 1), end))
        for start, end in zip(range(0, length, size), ends, strict=True)
    ]


def _allowed(rows: slice, past: slice, window: int | None, segments: jax.Array | None) -> jax.Array:
    """[B or 1, 1, S, 1, T] bool."""
    keys, queries = jnp.arange(past.start, past.stop)[:, None], jnp.arange(rows.start, rows.stop)
    allowed = (keys <= queries)[None]
    if window is not None:
        allowed &= keys > queries - window
    if segments is not None:
        allowed &= segments[:, past, None] == segments[:, None, rows]
    return allowed[:, None, :, None]


def _split_heads(x: jax.Array, groups: int) -> jax.Array:
    """[B, T, H, K] -> [B, G, R, T, K]."""
    B, T, H, K = x.shape
    return jnp.moveaxis(x.reshape(B, T, groups, H // groups, K), 1, 3)


def _join_heads(x):
    """[B, G, R, T, K] -> [B, T, H, K]."""
    B, G, R, T, K = x.shape
    return jnp.moveaxis(x, 3, 1).reshape(B, T, G * R, K)
