"""The forms in which a weight is held: an array, 8 bits with scales, or either of them with a low-rank adapter.

Each is a leaf of the nested dict of weights for modules, and a tree of arrays for JAX. A layer multiplies by a weight
with `multiply`, whatever its form.
"""

from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

import jax
import jax.numpy as jnp

from gptjax.nn.products import product
from gptjax.sharding import constrain, on_one_device

HELD_ROLES = ("matrix", "embed", "head")  # what bfloat16 and int8 apply to; the rest are small and stay float32
WEIGHT_DTYPES = ("float32", "bfloat16", "int8")


@partial(jax.tree_util.register_dataclass, data_fields=["values", "scales"], meta_fields=[])
@dataclass(frozen=True)
class Int8:
    """A weight in 8 bits, symmetric, with a scale for each output channel.

    Attributes:
        values: int8, of the weight's shape, within [-127, 127].
        scales: float32, of the same shape with 1 for each input dimension; the weight is values * scales.
    """

    values: jax.Array
    scales: jax.Array


@partial(jax.tree_util.register_dataclass, data_fields=["base", "a", "b"], meta_fields=["scale"])
@dataclass(frozen=True)
class Adapted:
    """A weight W with a low-rank adapter (Hu et al. 2021, arXiv 2106.09685): W + scale * A B.

    Attributes:
        base: W, an array or `Int8`, of shape [*inputs, *outputs].
        a: [*inputs, rank].
        b: [rank, *outputs].
        scale: alpha / rank.
    """

    base: Any
    a: jax.Array
    b: jax.Array
    scale: float


Weight = jax.Array | Int8 | Adapted


def multiply(spec: str, x: jax.Array, weight: Weight) -> jax.Array:
    """Compute einsum(spec, x, weight) in x's dtype.

    A weight in 8 bits is multiplied as integers and its result scaled. An adapter is multiplied beside its base, so
    that neither the sum of both nor a gradient of its size exists.
    """
    if isinstance(weight, Adapted):
        return multiply(spec, x, weight.base) + _adapter_product(spec, x, weight)
    if isinstance(weight, Int8):
        return product(spec, x, weight.values.astype(x.dtype)) * weight.scales.astype(x.dtype)
    return product(spec, x, weight.astype(x.dtype))


def _adapter_product(spec: str, x: jax.Array, weight: Adapted) -> jax.Array:
    inputs, names = spec.split("->")[0].split(",")
    contracted = "".join(name for name in names if name in inputs)
    outputs = names.removeprefix(contracted)
    inner = product(f"{inputs},{contracted}r->BTr", x, weight.a.astype(x.dtype))
    return product(f"BTr,r{outputs}->BT{outputs}", inner * weight.scale, weight.b.astype(x.dtype))


def project_heads(x: jax.Array, weights: list[Weight], joined: bool) -> list[jax.Array]:
    """Multiply x [B, T, D] by each of the weights [D, H, K], and return arrays [B, T, H, K].

    Args:
        joined: compute one product where the devices allow, so that x and its gradient pass through memory once. It
            copies the weights, which costs too much for the few tokens of decoding.
    """
    spec = "BTD,DHK->BTHK"
    if not (joined and on_one_device()):
        return [multiply(spec, x, weight) for weight in weights]
    bases = [weight.base if isinstance(weight, Adapted) else weight for weight in weights]
    bases = [base if isinstance(base, Int8) else base.astype(x.dtype) for base in bases]
    heads = [jax.tree.leaves(base)[0].shape[1:] for base in bases]
    widths = [n_heads * width for n_heads, width in heads]
    # Arrays, or values and scales.
    matrix = jax.tree.map(lambda *parts: jnp.concatenate([p.reshape(len(p), -1) for p in parts], axis=1), *bases)
    parts = jnp.split(multiply("BTD,DF->BTF", x, matrix), list(accumulate(widths))[:-1], axis=-1)
    made = [part.reshape(*x.shape[:2], *shape) for part, shape in zip(parts, heads, strict=True)]
    return [
        y + _adapter_product(spec, x, weight) if isinstance(weight, Adapted) else y
        for y, weight in zip(made, weights, strict=True)
    ]


def look_up(table: Weight, ids: jax.Array, dtype: str) -> jax.Array:
    """Return the rows of an embedding [V, D] for ids [B, T]: [B, T, D].

    Each row is gathered from all of FSDP's parts; each part of the vocabulary looks up all ids.
    """
    if isinstance(table, Int8):
        rows = constrain(table.values, "vocab", "residual")[ids].astype(dtype)
        return rows * table.scales[ids].astype(dtype)
    return constrain(table.astype(dtype), "vocab", "residual")[ids]


def multiply_head(hidden: jax.Array, head: Weight) -> jax.Array:
    """Compute hidden [B, T, D] times the head [D, V], with operands in hidden's dtype: [B, T, V] float32."""
    values = head.values if isinstance(head, Int8) else head
    raw = jnp.einsum("BTD,DV->BTV", hidden, values.astype(hidden.dtype), preferred_element_type=jnp.float32)
    return raw * head.scales if isinstance(head, Int8) else raw


def transpose(weight: Weight) -> Weight:
    """Return a matrix's transpose, in the same form."""
    return jax.tree.map(lambda x: x.T, weight)


def dense(weight: Weight) -> jax.Array:
    """Return the weight as one array: float32, or as it is where it is one already."""
    if isinstance(weight, Int8):
        return weight.values.astype(jnp.float32) * weight.scales
    return weight


def merge(weight: Adapted, n_stacked: int) -> jax.Array:
    """Return W + scale * A B, float32, with the product computed in float32.

    Args:
        n_stacked: leading dimensions that count separate matrices.
    """
    base = dense(weight.base).astype(jnp.float32)
    stack, rank = base.shape[:n_stacked], weight.a.shape[-1]
    flat = weight.a.reshape(*stack, -1, rank) @ weight.b.reshape(*stack, rank, -1)
    return base + weight.scale * flat.reshape(base.shape)


def channel_axes(declared: dict[str, Any]) -> tuple[int, ...]:
    """Return the dimensions that share a scale: a matrix's inputs, and the width of an embedding.

    An embedding is read by rows, and its transpose is the head where they are tied.

    Args:
        declared: the weight's metadata (`transformer.abstract_model`).
    """
    if declared["role"] == "embed":
        return (len(declared["axes"]) - 1,)
    start = declared["n_stacked"]
    return tuple(range(start, start + declared["n_in"]))


def hold(weight: jax.Array, declared: dict[str, Any], dtype: str) -> jax.Array | Int8:
    """Return a float32 weight in the form of a dtype of WEIGHT_DTYPES; one of another role stays as it is."""
    if declared["role"] not in HELD_ROLES or dtype == "float32":
        return weight
    if dtype == "bfloat16":
        return weight.astype(jnp.bfloat16)
    largest = jnp.abs(weight).max(axis=channel_axes(declared), keepdims=True)
    scales = jnp.where(largest > 0, largest, 1.0) / 127
    return Int8(jnp.round(weight / scales).astype(jnp.int8), scales)


def held_axes(declared: dict[str, Any], dtype: str) -> Any:
    """Return the logical axes of what `hold` returns: a tuple, or an `Int8` of two tuples."""
    axes = declared["axes"]
    if declared["role"] not in HELD_ROLES or dtype != "int8":
        return axes
    shared = channel_axes(declared)
    return Int8(axes, tuple(None if i in shared else axis for i, axis in enumerate(axes)))
