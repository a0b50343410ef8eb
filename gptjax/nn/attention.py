"""Scaled dot-product attention (Vaswani et al. 2017, section 3.2.1), and the protocol that every kernel follows.

A kernel is a function `(q, k, v, AttentionInput) -> (y, (keys, values))`; `backends.ATTENTIONS` names them all.
Arguments, layouts and results are the same with a cache and without.

Letters: B sequences, T query positions, S key positions, H query heads, G key/value heads, R = H / G query heads for
each of them, K head width.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from gptjax.sharding import constrain, on_one_device

KeysValues = tuple[jax.Array, jax.Array]  # [B, G, S, K] each
CACHE_AXES = ("batch", "kv_heads", None, None)


class CacheSlots(NamedTuple):
    """The slots of a key/value cache; all layers share them.

    Attributes:
        positions: [B, S] int32, the position of the token that each slot holds. An unused slot has one later than
            every query's, so that no query attends to it.
        next: int32 scalar, the slot of the queries' first token; its keys and values are written there.
    """

    positions: jax.Array
    next: jax.Array


class AttentionCache(NamedTuple):
    """What one layer keeps of earlier positions.

    Attributes:
        kv: keys and values, [B, G, S, K] each.
        slots: which positions these are.
    """

    kv: KeysValues
    slots: CacheSlots


class AttentionInput(NamedTuple):
    """What attention depends on besides queries, keys and values.

    Attributes:
        positions: [B or 1, T] int32 of the queries; negative ones are padding, which nothing attends to.
        segments: [B, T] int32; a query attends within its segment only. None: a row is one segment.
        window: a query attends to this many positions at most, its own included. None: to all.
        cache: of earlier positions. None: the keys are those of the queries' own tokens.
        cap: of the scores, which become cap * tanh(scores / cap) (Gemma 2, arXiv 2408.00118, section 2). None: none.
        sinks: [H] float32, a logit of each head that is in the denominator of its softmax and has no value (gpt-oss,
            arXiv 2508.10925, section 2.2). None: none.
    """

    positions: jax.Array
    segments: jax.Array | None = None
    window: int | None = None
    cache: AttentionCache | None = None
    cap: float | None = None
    sinks: jax.Array | None = None


# q [B, T, H, K], k and v [B, T, G, K] -> y of q's shape; keys and values [B, G, S, K] of these positions, or the
# cache's with them written into it.
Kernel = Callable[[jax.Array, jax.Array, jax.Array, AttentionInput], tuple[jax.Array, KeysValues]]


def float32_product(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """Compute einsum of two arrays, summed and kept in float32."""
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)


def causal_mask(
    q_positions: jax.Array,
    k_positions: jax.Array,
    q_segments: jax.Array | None = None,
    k_segments: jax.Array | None = None,
    window: int | None = None,
) -> jax.Array:
    """Return which query attends to which key: one at no later position, in the same segment, within the window.

    Args:
        q_positions, k_positions: [B or 1, T] and [B or 1, S] int32. A negative position is padding.
        q_segments, k_segments: the same shapes; None where sequences hold one document each.
        window: number of positions that a query attends to at most; None for no limit.

    Returns:
        [B or 1, T, S] bool.
    """
    q, k = q_positions[:, :, None], k_positions[:, None, :]
    mask = (k <= q) & (k >= 0)
    if window is not None:
        mask &= k > q - window
    if q_segments is not None and k_segments is not None:
        mask &= q_segments[:, :, None] == k_segments[:, None, :]
    return mask


def cap_scores(scores: jax.Array, cap: float | None) -> jax.Array:
    """Compute cap * tanh(scores / cap); the scores themselves without a cap."""
    return scores if cap is None else cap * jnp.tanh(scores / cap)


def attention_weights(scores: jax.Array, mask: jax.Array, inputs: AttentionInput) -> jax.Array:
    """Compute the softmax of scores [B, G, R, T, S] over the positions that the mask [B or 1, T, S] allows, float32.

    Args:
        inputs: whose cap and sinks apply.
    """
    scores = cap_scores(scores, inputs.cap)
    scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    if inputs.sinks is None:
        return jax.nn.softmax(scores, axis=-1)
    sinks = inputs.sinks.reshape(1, *scores.shape[1:3], 1, 1)
    largest = jax.lax.stop_gradient(jnp.maximum(scores.max(-1, keepdims=True), sinks))
    weights = jnp.exp(scores - largest)
    return weights / (weights.sum(-1, keepdims=True) + jnp.exp(sinks - largest))


def attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, inputs: AttentionInput) -> jax.Array:
    """Compute softmax(q k^T / sqrt(K)) v over the positions that the mask allows; the softmax in float32.

    Args:
        q: [B, T, H, K]; query heads g R ... (g + 1) R - 1 share the key/value head g.
        k, v: [B, S, G, K].
        mask: [B or 1, T, S] bool.
        inputs: whose cap and sinks apply.

    Returns:
        [B, T, H, K], in q's dtype.
    """
    B, T, H, K = q.shape
    G = k.shape[2]
    q = q.reshape(B, T, G, H // G, K)
    scores = float32_product("BTGRK,BSGK->BGRTS", q, k) * K**-0.5
    weights = attention_weights(scores, mask, inputs).astype(v.dtype)
    return jnp.einsum("BGRTS,BSGK->BTGRK", weights, v).reshape(B, T, H, K)


def as_cache(k: jax.Array, v: jax.Array) -> KeysValues:
    """Transpose keys and values from [B, T, G, K] to the cache's layout, [B, G, T, K]."""
    return jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)


def reference_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, inputs: AttentionInput
) -> tuple[jax.Array, KeysValues]:
    """Compute `attention` of rows to themselves by its definition: any shape, any device (a `Kernel`)."""
    assert inputs.cache is None
    positions, segments = inputs.positions, inputs.segments
    mask = causal_mask(positions, positions, segments, segments, inputs.window)
    return checkpoint_name(attention(q, k, v, mask, inputs), "attention"), as_cache(k, v)


def cached_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, inputs: AttentionInput
) -> tuple[jax.Array, KeysValues]:
    """Write keys and values into the cache, then attend to all that it holds (a `Kernel`).

    The cache is written before it is read, so that it changes in place: otherwise every token would copy it.
    """
    assert inputs.cache is not None
    (B, T, H, K), G = q.shape, k.shape[2]
    slots = inputs.cache.slots

    def write(old: jax.Array, new: jax.Array) -> jax.Array:
        old, new = merge_heads(old), merge_heads(new)
        return jax.lax.dynamic_update_slice_in_dim(old, new, slots.next, axis=old.ndim - 2)

    keys, values = map(write, inputs.cache.kv, as_cache(k, v))
    *heads, S, _ = keys.shape
    queries = jnp.swapaxes(q, 1, 2).reshape(*heads, H // G * T, K)
    scores = float32_product("...QK,...SK->...QS", queries, keys) * K**-0.5
    mask = causal_mask(inputs.positions, slots.positions, window=inputs.window)
    weights = attention_weights(scores.reshape(B, G, H // G, T, S), mask, inputs)
    weights = weights.astype(v.dtype).reshape(*heads, H // G * T, S)
    y = jnp.einsum("...QS,...SK->...QK", weights, values)
    return jnp.swapaxes(y.reshape(B, H, T, K), 1, 2), (split_heads(keys, B), split_heads(values, B))


def merge_heads(x: jax.Array) -> jax.Array:
    """Reshape keys or values from [B, G, S, K] to [B G, S, K] on one device; on several, B and G may be sharded.

    A CPU's product over one axis of heads reads the cache where it lies. A loop over tokens carries the cache in this
    form: in the other, the compiler writes every token twice, into a copy.
    """
    return x.reshape(-1, *x.shape[2:]) if on_one_device() else x


def split_heads(x: jax.Array, rows: int) -> jax.Array:
    """Undo `merge_heads` for a number of rows B, and pin the cache's layout."""
    return constrain(x.reshape(rows, -1, *x.shape[-2:]), *CACHE_AXES)
