"""Products of activations and weights, with gradients as matrices where no device has but a part of them.

The layouts that XLA chooses for the plain gradient of an einsum cost a tenth of a small model's step on a CPU.
"""

from functools import partial
from itertools import accumulate

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from gptjax.sharding import on_one_device


def product(spec: str, x: jax.Array, weight: jax.Array) -> jax.Array:
    """einsum of x [B, T, ...] and a weight, named "dot": remat's policies do not see through a custom gradient."""
    return checkpoint_name(_product(spec, x, weight), "dot")


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(spec: str, x: jax.Array, weight: jax.Array) -> jax.Array:
    return jnp.einsum(spec, x, weight)


def _product_backward(spec, saved, y_grad):
    x, weight = saved
    if on_one_device():
        B, T = x.shape[:2]
        rows, slopes = x.reshape(B * T, -1), y_grad.reshape(B * T, -1)
        matrix = weight.reshape(rows.shape[1], slopes.shape[1])
        return (slopes @ matrix.T).reshape(x.shape), (rows.T @ slopes).reshape(weight.shape)
    a, b, c = spec.replace("->", ",").split(",")
    return jnp.einsum(f"{c},{b}->{a}", y_grad, weight), jnp.einsum(f"{a},{c}->{b}", x, y_grad)


_product.defvjp(lambda spec, x, weight: (_product(spec, x, weight), (x, weight)), _product_backward)


@jax.custom_vjp
def plus(y: jax.Array, bias: jax.Array) -> jax.Array:
    """y and a bias shaped like its last axes. The gradient's sum is a product, which is faster on a CPU."""
    return y + bias


def _plus_backward(bias, y_grad):
    if not on_one_device():
        return y_grad, y_grad.sum(tuple(range(y_grad.ndim - bias.ndim)))
    slopes = y_grad.reshape(-1, bias.size)
    return y_grad, (jnp.ones((1, len(slopes)), slopes.dtype) @ slopes).reshape(bias.shape)


plus.defvjp(lambda y, bias: (y + bias, bias), _plus_backward)


def heads_of(x: jax.Array, weights: list[jax.Array], joined: bool) -> list[jax.Array]:
    """x [B, T, D] times each of the weights [D, H, K]: arrays [B, T, H, K].

    Args:
        joined: as one product, where the devices allow: x and its gradient then pass through memory once. It copies
            the weights, which is too much for the few tokens of decoding.
    """
    if not (joined and on_one_device()):
        return [product("BTD,DHK->BTHK", x, weight) for weight in weights]
    widths = [weight[0].size for weight in weights]
    matrix = jnp.concatenate([weight.reshape(-1, n) for weight, n in zip(weights, widths, strict=True)], axis=1)
    parts = jnp.split(product("BTD,DF->BTF", x, matrix), list(accumulate(widths))[:-1], axis=-1)
    return [part.reshape(*x.shape[:2], *weight.shape[1:]) for part, weight in zip(parts, weights, strict=True)]
