"""Ring attention (Liu et al. 2023, arXiv 2310.01889): queries stay at home, keys and values go round the devices.

The sequence is cut into 2 n chunks of c positions, and device i holds chunks i and 2 n - 1 - i (`zigzag`; Dubey et
al. 2024, arXiv 2407.21783, section 3.3.2). Whatever chunks come by, a device then has two blocks of c x c scores to
compute, none of them in vain: its late chunk sees the visitor's early one, and either its early chunk sees the
visitor's early one too, or its late chunk the visitor's late one. At home come two halves of a block on the diagonal.

Letters: 2 chunks, B sequences, T = S = c positions, G key/value heads, R query heads for each of them, K head width.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from gptjax.nn.attention import AttentionInput, KeysValues, as_cache, cap_scores, float32_product
from gptjax.nn.convolution import causal_convolution
from gptjax.sharding import by_shard

AXIS = "context"  # the mesh axis, as sharding.AXIS_RULES has it for "length"


def zigzag(length: int, n: int) -> np.ndarray:
    """The order of the positions in which n equal parts are the chunks of n devices, [length] int."""
    chunks = np.arange(length).reshape(2 * n, -1)
    return np.concatenate([chunks[i] for device in range(n) for i in (device, 2 * n - 1 - device)])


def ring_attention(q: jax.Array, k: jax.Array, v: jax.Array, inputs: AttentionInput) -> tuple[jax.Array, KeysValues]:
    """Compute causal attention within segments, over rows whose positions `zigzag` has ordered (a `Kernel`).

    Blocks that lie outside a window are computed nevertheless. It has no sinks.
    """
    assert inputs.cache is None and inputs.sinks is None
    queries, keys = ("batch", "length", "heads", None), ("batch", "length", "kv_heads", None)
    local = partial(_local, inputs.window, inputs.cap)
    on_each_shard = by_shard(local, (queries, keys, keys, ("batch", "length")), queries)
    return on_each_shard(q, k, v, inputs.segments), as_cache(k, v)


def ring_convolution(positions, x, taps, recent=None):
    """Compute `causal_convolution` of rows in `zigzag` order: each chunk receives the end of its predecessor."""
    rows = ("batch", "length", "residual")
    convolve = by_shard(_convolve_chunks, (rows[:2], rows, (None, None)), rows)
    return convolve(jnp.broadcast_to(positions, x.shape[:2]), x, taps), None


def _convolve_chunks(positions, x, taps):
    n, here = jax.lax.axis_size(AXIS), jax.lax.axis_index(AXIS)
    chunks = jnp.split(x, 2, axis=1)
    early_end, late_end = (chunk[:, chunk.shape[1] - len(taps) + 1 :] for chunk in chunks)
    before_early = jax.lax.ppermute(early_end, AXIS, [(i, i + 1) for i in range(n - 1)])  # the first is sent zeros
    before_late = jax.lax.ppermute(late_end, AXIS, [(i + 1, i) for i in range(n - 1)])
    before_late = jnp.where(here == n - 1, early_end, before_late)  # the last device has both middle chunks
    convolved = map(
        causal_convolution, jnp.split(positions, 2, axis=1), chunks, (taps, taps), (before_early, before_late)
    )
    return jnp.concatenate([y for y, _ in convolved], axis=1)


def _local(window, cap, q, k, v, segments):
    B, T, H, K = q.shape
    G = k.shape[2]
    segments = jnp.zeros((B, T), jnp.int32) if segments is None else segments
    parts = (
        q.reshape(B, 2, T // 2, G, H // G, K),
        *(x.reshape(B, 2, T // 2, *x.shape[2:]) for x in (k, v, segments)),
    )
    y = _ring(window, cap, *(jnp.moveaxis(x, 1, 0) for x in parts))
    return jnp.moveaxis(y, 0, 1).reshape(q.shape)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _ring(window, cap, q, k, v, segments):
    return _forward(window, cap, q, k, v, segments)[0]


def _forward(window, cap, q, k, v, segments):
    def visit(sums, guest, a, b, apart):
        (y, log_sum), (k, v, ids) = sums, guest
        scores = _scores(q[a], k[b], segments[a], ids[b], apart, window, cap)
        block_sum = jax.nn.logsumexp(scores, axis=-1)
        block = float32_product("BGRTS,BSGK->BGRTK", jnp.exp(scores - block_sum[..., None]).astype(v.dtype), v[b])
        total = jnp.logaddexp(log_sum[a], block_sum)
        merged = [x * jnp.exp(part - total)[..., None] for x, part in ((y[a], log_sum[a]), (block, block_sum))]
        return (y.at[a].set(sum(merged)), log_sum.at[a].set(total)), guest

    y = jnp.zeros(jnp.moveaxis(q, 2, 4).shape, jnp.float32)
    (y, log_sum), _ = _round(visit, (y, jnp.full(y.shape[:-1], _MASKED)), (k, v, segments))
    y = checkpoint_name(jnp.moveaxis(y, 4, 2).astype(q.dtype), "attention")
    log_sum = checkpoint_name(log_sum, "attention")
    return y, (q, k, v, segments, y, log_sum)


def _backward(window, cap, kept, y_grad):
    q, k, v, segments, y, log_sum = kept
    inner = float32_product("NBTGRK,NBTGRK->NBGRT", y_grad, y)  # sum of each row of weights x their gradients

    def visit(q_grad, guest, a, b, apart):
        k, v, ids, k_grad, v_grad = guest
        scores = _scores(q[a], k[b], segments[a], ids[b], apart, window, cap)
        weights = jnp.exp(scores - log_sum[a][..., None])
        slopes = float32_product("BTGRK,BSGK->BGRTS", y_grad[a], v[b]) - inner[a][..., None]
        if cap is not None:
            slopes *= 1 - jnp.square(jnp.clip(scores / cap, -1, 1))  # a masked score has no weight
        slopes = (weights * slopes * q.shape[-1] ** -0.5).astype(q.dtype)
        q_grad = q_grad.at[a].add(float32_product("BGRTS,BSGK->BTGRK", slopes, k[b]))
        k_grad = k_grad.at[b].add(float32_product("BGRTS,BTGRK->BSGK", slopes, q[a]))
        v_grad = v_grad.at[b].add(float32_product("BGRTS,BTGRK->BSGK", weights.astype(q.dtype), y_grad[a]))
        return q_grad, (k, v, ids, k_grad, v_grad)

    zeros = [jnp.zeros(x.shape, jnp.float32) for x in (q, k, v)]
    q_grad, (*_, k_grad, v_grad) = _round(visit, zeros[0], (k, v, segments, *zeros[1:]))
    return q_grad.astype(q.dtype), k_grad.astype(k.dtype), v_grad.astype(v.dtype), None


_ring.defvjp(_forward, _backward)
_MASKED = -1e30  # a score of no weight; finite, so that differences of two such are


def _round(visit, home, guest):
    """Fold `visit(home, guest, a, b, apart)` over pairs of chunks, own a and visiting b, while guests go round.

    `apart` is by how many chunks b lies before a in the sequence.
    """
    n, here = jax.lax.axis_size(AXIS), jax.lax.axis_index(AXIS)

    def onwards(x):
        return jax.lax.ppermute(x, AXIS, [(i, (i + 1) % n) for i in range(n)])

    for a, b, apart in ((0, 0, 0), (1, 1, 0), (1, 0, 2 * n - 1 - 2 * here)):
        home, guest = visit(home, guest, a, b, apart)

    def step(carry, away):
        origin = (here - away) % n
        home, guest = visit(*carry, 1, 0, 2 * n - 1 - here - origin)
        same = jnp.where(here >= away, 0, 1)  # guests of device here - away, which has the earlier early chunk or not
        home, guest = visit(home, guest, same, same, jnp.abs(here - origin))
        return (home, onwards(guest)), None

    return jax.lax.scan(step, (home, onwards(guest)), jnp.arange(1, n))[0]


def _scores(q, k, q_segments, k_segments, apart, window, cap):
    """[B, G, R, T, S] float32."""
    T = q.shape[1]
    scores = cap_scores(float32_product("BTGRK,BSGK->BGRTS", q, k) * q.shape[-1] ** -0.5, cap)
    allowed = q_segments[:, :, None] == k_segments[:, None, :]
    if isinstance(apart, int):  # on the diagonal
        allowed &= np.tri(T, dtype=bool)
    if window is not None:
        allowed &= apart * T + jnp.arange(T)[:, None] - jnp.arange(T) < window
    return jnp.where(allowed[:, None, None], scores, _MASKED)
