"""Rotary positions: angles, their scaling for contexts longer than the pre-training's, and the rotation."""

import math

import jax
import jax.numpy as jnp

from gptjax.config import RopeScaling

Rotation = tuple[jax.Array, jax.Array]  # cosine and sine


def rotary_angles(
    positions: jax.Array, width: int, theta: float, scaling: RopeScaling | None, long: bool = False
) -> Rotation:
    """Cosine and sine of position / wavelength (Su et al. 2021, arXiv 2104.09864, equation 15).

    Args:
        positions: [B, T] int32.
        width: of what is rotated of a head.
        scaling: of the frequencies, and by YaRN (section 3.4) and LongRoPE of the cosine and sine.
        long: whether the context is longer than that of the pre-training, for LongRoPE.

    Returns:
        two arrays [B, T, 1, width / 2], float32.
    """
    frequency = theta ** (-jnp.arange(0, width, 2, dtype=jnp.float32) / width)
    if scaling is None:
        return _angles(positions, frequency, 1.0)
    growth = math.log(scaling.factor) if scaling.factor > 1 else 0.0
    factor = scaling.attention_factor
    if scaling.kind == "yarn" and factor is None:
        factor = 0.1 * growth + 1
    elif scaling.kind == "longrope" and factor is None:
        factor = (1 + growth / math.log(scaling.original_context)) ** 0.5
    return _angles(positions, scaled_frequencies(frequency, theta, scaling, long), 1.0 if factor is None else factor)


def _angles(positions: jax.Array, frequency: jax.Array, factor: float) -> Rotation:
    angle = positions[..., None, None].astype(jnp.float32) * frequency
    return jnp.cos(angle) * factor, jnp.sin(angle) * factor


def scaled_frequencies(frequency: jax.Array, theta: float, scaling: RopeScaling, long: bool) -> jax.Array:
    """Return the rotary frequencies [width / 2] of a context longer than the pre-training's.

    linear divides all by a factor (Chen et al. 2023, arXiv 2306.15595); llama3 and yarn (Peng et al. 2023, arXiv
    2309.00071, section 3.2) divide the low ones, keep the high ones, and blend between them: by the turns that one
    makes in the context of the pre-training, or by its place among the pairs; longrope (Ding et al. 2024, arXiv
    2402.13753) divides each by its own factor.
    """
    if scaling.kind == "linear":
        return frequency / scaling.factor
    if scaling.kind == "longrope":
        return frequency / jnp.array(scaling.long_factors if long else scaling.short_factors, jnp.float32)
    if scaling.kind == "llama3":
        turns = scaling.original_context * frequency / (2 * jnp.pi)
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        keep = jnp.clip((turns - low) / (high - low), 0, 1)
    else:
        pairs = len(frequency)
        first, last = (
            pairs * math.log(scaling.original_context / (turns * 2 * math.pi)) / math.log(theta)
            for turns in (scaling.beta_fast, scaling.beta_slow)
        )  # the pairs that turn so often
        if scaling.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, 2 * pairs - 1)
        last += 0.001 if first == last else 0  # as its authors avoid a division by 0
        keep = 1 - jnp.clip((jnp.arange(pairs) - first) / (last - first), 0, 1)
    return keep * frequency + (1 - keep) * frequency / scaling.factor


@jax.custom_vjp
def rotate(x: jax.Array, rotation: Rotation) -> jax.Array:
    """Turn pairs of x [B, T, H, K] by their angles, in float32: i and i + W / 2 of its first W dimensions.

    Args:
        rotation: of W / 2 pairs.
    """
    cos, sin = rotation
    n = cos.shape[-1]
    a, b, rest = jnp.split(x.astype(jnp.float32), [n, 2 * n], axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=-1).astype(x.dtype)


def _rotate_backward(rotation: Rotation, y_grad: jax.Array) -> tuple[jax.Array, None]:
    """Turn the gradient back: one pass over it, where the derivative of each operation would store it in float32."""
    cos, sin = rotation
    return rotate(y_grad, (cos, -sin)), None


rotate.defvjp(lambda x, rotation: (rotate(x, rotation), rotation), _rotate_backward)
