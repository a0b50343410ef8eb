"""Products of activations and weights, whose gradients on one device are products of two matrices.

The layouts that XLA chooses for the plain gradient of an einsum cost a tenth of a small model's step on a CPU.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from gptjax.sharding import on_one_device


def product(spec: str, x: jax.Array, weight: jax.Array) -> jax.Array:
    """Compute einsum of x [B, T, ...] and a weight, named "dot" for remat's policies, which go by names."""
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
def add_bias(y: jax.Array, bias: jax.Array) -> jax.Array:
    """Add a bias shaped like y's last axes. The gradient's sum is a product, which is faster on a CPU."""
    return y + bias


def _add_bias_backward(bias, y_grad):
    if not on_one_device():
        return y_grad, y_grad.sum(tuple(range(y_grad.ndim - bias.ndim)))
    slopes = y_grad.reshape(-1, bias.size)
    return y_grad, (jnp.ones((1, len(slopes)), slopes.dtype) @ slopes).reshape(bias.shape)


add_bias.defvjp(lambda y, bias: (y + bias, bias), _add_bias_backward)
