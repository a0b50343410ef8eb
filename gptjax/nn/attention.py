"""Scaled dot-product attention (Vaswani et al. 2017, section 3.2.1), behind one signature.

Letters: B sequences, T query positions, S key positions, G key/value heads, R query heads for each of them,
K head width.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

KVCache = tuple[jax.Array, jax.Array]  # keys and values, [B G, S, K] each
Attend = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]  # q [B, T, H, K], k and v [B, S, G, K] -> q's shape


def float32_product(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """einsum of two arrays, summed and kept in float32."""
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)


def causal_mask(
    q_positions: jax.Array,
    k_positions: jax.Array,
    q_segments: jax.Array | None = None,
    k_segments: jax.Array | None = None,
) -> jax.Array:
    """Who may look at whom: keys at no later position, in the same segment. A negative position is padding.

    Args:
        q_positions, k_positions: [B or 1, T] and [B or 1, S] int32.
        q_segments, k_segments: the same shapes; None where sequences hold one document each.

    Returns:
        [B or 1, T, S] bool.
    """
    k = k_positions[:, None, :]
    mask = (k <= q_positions[:, :, None]) & (k >= 0)
    if q_segments is not None and k_segments is not None:
        mask &= q_segments[:, :, None] == k_segments[:, None, :]
    return mask


def attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """softmax(q k^T / sqrt(K)) v, over the positions that the mask allows; the softmax in float32.

    Args:
        q: [B, T, H, K]; query heads g R ... (g + 1) R - 1 share the key/value head g.
        k, v: [B, S, G, K].
        mask: [B or 1, T, S] bool.

    Returns:
        [B, T, H, K], in q's dtype.
    """
    B, T, H, K = q.shape
    G = k.shape[2]
    q = q.reshape(B, T, G, H // G, K)
    scores = float32_product("BTGRK,BSGK->BGRTS", q, k) * K**-0.5
    scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("BGRTS,BSGK->BTGRK", weights, v).reshape(B, T, H, K)


def make_reference(positions: jax.Array, segments: jax.Array | None) -> Attend:
    """`attention` under the causal mask of these positions: any shape, any device."""
    mask = causal_mask(positions, positions, segments, segments)
    return lambda q, k, v: checkpoint_name(attention(q, k, v, mask), "attention")


def by_head(x: jax.Array) -> jax.Array:
    """[B, T, G, K] -> [B G, T, K]: the cache's layout. One axis for all heads lets a CPU read it where it lies."""
    return jnp.swapaxes(x, 1, 2).reshape(-1, x.shape[1], x.shape[3])


def make_cached(positions: jax.Array, cache_positions: jax.Array, slot: jax.Array) -> Callable[..., jax.Array]:
    """Attention to a cache, keys and values [B G, S, K] each, into which those of the queries' tokens go first.

    Written before it is read, the cache is changed in place; the other way round it is copied at every token.
    """
    mask = causal_mask(positions, cache_positions)[:, None]

    def attend(q, k, v, cache):
        B, T, H, K = q.shape
        k, v = jax.tree.map(lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new, slot, 1), cache, (k, v))
        N, S = k.shape[:2]
        scores = float32_product("NQK,NSK->NQS", jnp.swapaxes(q, 1, 2).reshape(N, -1, K), k) * K**-0.5
        scores = jnp.where(mask, scores.reshape(B, H, T, S), jnp.finfo(jnp.float32).min)
        weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
        y = jnp.einsum("NQS,NSK->NQK", weights.reshape(N, -1, S), v)
        return jnp.swapaxes(y.reshape(B, H, T, K), 1, 2), (k, v)

    return attend
