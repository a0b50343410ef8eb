"""A short causal convolution along the sequence, one filter for each channel.

Attention need not spend a head on the last few tokens, and an MLP sees more than one. Depthwise convolutions in a
transformer: So et al. 2021 (Primer, arXiv 2109.08668); ahead of attention and of the MLP, added to what passes by:
Allen-Zhu 2025 (Canon layers A and C, arXiv 2512.17351).
"""

import jax
import jax.numpy as jnp


@jax.checkpoint  # or the backward pass finds W - 1 copies of x kept, each shifted by one more
def causal_convolution(
    positions: jax.Array, x: jax.Array, taps: jax.Array, recent: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """x_t + the sum over i < W of taps_i x_(t-i), with nothing from before a text's first position.

    Args:
        positions: [B or 1, T] int32; a token at position p has p predecessors (so packed documents stay apart).
        x: [B, T, D], in the order of the text.
        taps: [W, D]; 0 leaves x as it is.
        recent: [B, W - 1, D], what came before x; None: nothing.

    Returns:
        x's shape, and what the next call is to be given as `recent`.
    """
    W, T = len(taps), x.shape[1]
    known = jnp.pad(x, ((0, 0), (W - 1, 0), (0, 0))) if recent is None else jnp.concatenate([recent, x], axis=1)
    y = x + x * taps[0]
    for i in range(1, W):
        y += jnp.where(positions[..., None] >= i, known[:, W - 1 - i :][:, :T], 0) * taps[i]
    return y, known[:, T:]
