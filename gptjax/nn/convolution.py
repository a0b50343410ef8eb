"""A short causal convolution along the sequence, one filter for each channel.

Attention need not spend a head on the last few tokens, and an MLP sees more than one. Depthwise convolutions in a
transformer: So et al. 2021 (Primer, arXiv 2109.08668); ahead of attention and of the MLP, added to what passes by:
Allen-Zhu 2025 (Canon layers A and C, arXiv 2512.17351).
"""

import jax
import jax.numpy as jnp


@jax.checkpoint  # otherwise the backward pass keeps W - 1 copies of x, each shifted by one position more
def causal_convolution(
    positions: jax.Array, x: jax.Array, taps: jax.Array, recent: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Compute x_t + the sum over i < W of taps_i x_(t-i), where nothing precedes a text's first position.

    Args:
        positions: [B or 1, T] int32; a token at position p has p predecessors (so packed documents stay apart).
            Negative positions, at the end of a row, are padding.
        x: [B, T, D], in the order of the text.
        taps: [W, D]; 0 leaves x as it is.
        recent: [B, R, D] with R >= W - 1, what came before x; a single token is then no padding. None: nothing.

    Returns:
        x's shape, and [B, R, D] (W - 1 without `recent`), what the next call takes as `recent`.
    """
    W, (B, T) = len(taps), x.shape[:2]
    R = W - 1 if recent is None else recent.shape[1]
    known = jnp.pad(x, ((0, 0), (R, 0), (0, 0))) if recent is None else jnp.concatenate([recent, x], axis=1)
    y = x + x * taps[0]
    for i in range(1, W):
        y += jnp.where(positions[..., None] >= i, known[:, R - i :][:, :T], 0) * taps[i]
    if recent is not None and T == 1:
        return y, known[:, T:]
    lengths = jnp.broadcast_to((positions >= 0).sum(axis=1), (B,))
    return y, jax.vmap(lambda row, end: jax.lax.dynamic_slice_in_dim(row, end, R))(known, lengths)
