"""A mixture of experts (Shazeer et al. 2017, arXiv 1701.06538): each token passes the experts that a router chooses.

`route` chooses, `run_experts` sorts the tokens by expert and multiplies each group by its expert's matrices, so that
no token is dropped and no array has an axis of tokens and one of experts and one of widths.

Letters as in the model; N tokens of a device, k experts of a token.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from gptjax.config import ModelConfig, MoeConfig
from gptjax.nn.grouped import grouped_product
from gptjax.nn.layers import ACTIVATIONS, GATED, MLP, Aux, Context, init_std, param, param_if
from gptjax.nn.weights import Adapted, Int8, Weight
from gptjax.sharding import by_shard, divides_into, mesh_size

AXIS = "expert"  # the mesh axis, as sharding.AXIS_RULES has it for "expert"
# A factor that keeps the biases' gradient, of which only the sign counts, out of the norm of all gradients.
SIGN_ONLY = 2.0**-60


class Routing(NamedTuple):
    """Where the tokens go.

    Attributes:
        experts: [B, T, k] int32.
        gates: factors on the experts' outputs, [B, T, k] float32.
    """

    experts: jax.Array
    gates: jax.Array


class MoE(nnx.Module):
    """Experts in place of an MLP, and shared experts that every token passes besides."""

    def __init__(self, cfg: ModelConfig, rngs: nnx.Rngs):
        moe: MoeConfig = cfg.mlp.moe
        D, E, F = cfg.d_model, moe.experts, cfg.expert_width
        std, gated = init_std(cfg, "matrix", D), moe.activation in GATED
        self.moe, self.dtype = moe, cfg.dtype
        self.router = param(rngs, (D, E), ("embed", "choice"), "router", init_std(cfg, "router", D))
        self.router_bias = param_if(moe.router_bias, rngs, (E,), ("choice",), "bias")
        self.balance = param_if(moe.balance_rate is not None, rngs, (E,), ("choice",), "balance")
        into, out_of = ("expert", "embed", "mlp"), ("expert", "mlp", "embed")
        self.up = param(rngs, (E, D, F), into, "matrix", std, n_stacked=1)
        self.gate = param(rngs, (E, D, F), into, "matrix", std, n_stacked=1) if gated else None
        self.down = param(rngs, (E, F, D), out_of, "matrix", init_std(cfg, "residual", F), n_stacked=1)
        self.up_bias = param_if(cfg.bias, rngs, (E, F), ("expert", "mlp"), "bias")
        self.gate_bias = param_if(cfg.bias and gated, rngs, (E, F), ("expert", "mlp"), "bias")
        self.down_bias = param_if(cfg.bias, rngs, (E, D), ("expert", "norm"), "bias")
        self.shared = MLP(cfg.with_dense_mlp(moe.shared_experts * F), rngs) if moe.shared_experts else None

    def __call__(self, x: jax.Array, ctx: Context) -> tuple[jax.Array, Aux]:
        """Map [B, T, D] to the same shape, and return the router's losses and statistics (`summarize_load`)."""
        counted = jnp.broadcast_to(ctx.positions >= 0, x.shape[:2])  # padding is sent somewhere, but not counted
        routing, aux = self.route(x, counted)
        weights = (self.up, self.gate, self.down, self.up_bias, self.gate_bias, self.down_bias)
        held = [None if weight is None else in_dtype(weight.get_value(), self.dtype) for weight in weights]
        y = run_experts(x.astype(self.dtype), routing, Experts(*held), self.moe.activation)
        return y if self.shared is None else y + self.shared(x, ctx)[0], aux

    def route(self, x: jax.Array, counted: jax.Array) -> tuple[Routing, Aux]:
        """Choose the experts of each token of x [B, T, D] by the highest scores, in float32.

        Args:
            counted: which tokens count in the losses and statistics, [B, T] bool.
        """
        moe, k = self.moe, self.moe.top_k
        highest = jax.lax.Precision.HIGHEST
        logits = jnp.einsum("BTD,DE->BTE", x.astype(jnp.float32), self.router[...], precision=highest)
        if self.router_bias is not None:
            logits += self.router_bias[...]
        scores = jax.nn.sigmoid(logits) if moe.scores == "sigmoid" else jax.nn.softmax(logits)
        ranked = jax.lax.stop_gradient(scores if self.balance is None else scores + self.balance[...])
        experts = jax.lax.top_k(ranked, k)[1]
        gates = jnp.take_along_axis(scores, experts, axis=-1)
        if moe.normalize:
            gates = gates / (gates.sum(-1, keepdims=True) + 1e-20)
        chosen = jax.nn.one_hot(experts, moe.experts).sum(-2) * counted[..., None]
        loads = chosen.sum((0, 1))
        if self.balance is not None:
            gates = with_gradient(gates, self.balance[...], SIGN_ONLY * (loads - loads.mean()))
        return Routing(experts, gates * moe.scale), summarize_load(logits, scores, loads, counted)


def summarize_load(logits: jax.Array, scores: jax.Array, loads: jax.Array, counted: jax.Array) -> Aux:
    """Return what a router's losses and statistics are, each a mean over tokens, layers and microbatches.

    - load_balance: E sum_e f_e P_e, with f_e the share of the choices that fell on expert e and P_e its mean share
      of the scores (Fedus et al. 2021, arXiv 2101.03961, equation 4): 1 where the load is even. Both are of the
      layer's tokens in one microbatch, over all devices.
    - router_z: the mean square of the log of the softmax's denominator (Zoph et al. 2022, arXiv 2202.08906, equation
      5).
    - load_max, load_cv: the largest load over the mean one, and the loads' deviation over their mean; of the same
      tokens.

    Args:
        logits, scores: [B, T, E] float32.
        loads: tokens that each expert was chosen by, [E] float32.
        counted: [B, T] bool.
    """
    weight = counted.sum().astype(jnp.float32)
    tokens, counted = jnp.maximum(weight, 1), counted[..., None]
    shares = (scores / scores.sum(-1, keepdims=True) * counted).sum((0, 1)) / tokens
    even = loads / jnp.maximum(loads.mean(), 1)  # 1 for each expert where the load is even
    squares = jnp.square(jax.nn.logsumexp(logits, axis=-1, keepdims=True)) * counted
    values = {"load_balance": (even * shares).sum(), "load_max": even.max(), "load_cv": even.std()}
    return {**{name: (value * weight, weight) for name, value in values.items()}, "router_z": (squares.sum(), weight)}


@jax.custom_vjp
def with_gradient(x: jax.Array, weight: jax.Array, gradient: jax.Array) -> jax.Array:
    """Return x. The gradient of `weight` is `gradient`, whatever x's is.

    Wang et al. 2024 (arXiv 2408.15664, algorithm 1) move each expert's bias against the sign of its excess load. As
    a gradient, the excess is summed over microbatches and devices as all gradients are.
    """
    return x


with_gradient.defvjp(lambda x, weight, gradient: (x, gradient), lambda gradient, y_grad: (y_grad, gradient, None))


class Experts(NamedTuple):
    """The weights of a layer's experts, in any form of `nn/weights.py`; None where there is none.

    Attributes:
        up, gate: [E, D, F].
        down: [E, F, D].
        up_bias, gate_bias: [E, F].
        down_bias: [E, D].
    """

    up: Weight
    gate: Weight | None
    down: Weight
    up_bias: jax.Array | None
    gate_bias: jax.Array | None
    down_bias: jax.Array | None


EXPERT_AXES = Experts(
    up=("expert", None, "mlp"),
    gate=("expert", None, "mlp"),
    down=("expert", "mlp", None),
    up_bias=("expert", "mlp"),
    gate_bias=("expert", "mlp"),
    down_bias=("expert", None),
)


def run_experts(x: jax.Array, routing: Routing, experts: Experts, activation: str) -> jax.Array:
    """Return each token's sum of its experts' outputs times their gates: [B, T, D] to the same shape.

    On a mesh, each device sorts its own tokens. Along the axis "expert", devices hold other experts: each gathers the
    tokens of all of them, computes its experts' part, and the parts are summed where the tokens came from.
    """
    rows = ("batch", "length", None)

    def compute(x: jax.Array, chosen: jax.Array, gates: jax.Array, *leaves: jax.Array) -> jax.Array:
        weights = jax.tree.unflatten(structure, leaves)
        return _exchange_tokens(x, Routing(chosen, gates), weights, activation, gathers)

    gathers = divides_into(len(x), "batch")
    leaves, structure = jax.tree.flatten(experts)
    axes = Experts(*(axes_of(weight, axes) for weight, axes in zip(experts, EXPERT_AXES, strict=True)))
    leaf_axes = jax.tree.leaves(axes, is_leaf=lambda node: type(node) is tuple)
    return by_shard(compute, (rows, rows, rows, *leaf_axes), rows)(x, *routing, *leaves)


def in_dtype(weight: Weight, dtype: str) -> Weight:
    """Return the weight with its floats in a dtype, so that devices gather them so."""
    return jax.tree.map(lambda leaf: leaf if leaf.dtype == jnp.int8 else leaf.astype(dtype), weight)


def axes_of(weight: Weight | None, axes: tuple[str | None, ...]) -> Any:
    """Return the logical axes of an expert stack's arrays, in the form of the weight; `axes` are its matrix's."""
    if isinstance(weight, Adapted):
        a, b = (axes[0], axes[1], None), (axes[0], None, axes[2])
        return Adapted(axes_of(weight.base, axes), a, b, weight.scale)
    if isinstance(weight, Int8):
        return Int8(axes, (axes[0], None, axes[2]))
    return None if weight is None else axes


def _exchange_tokens(x: jax.Array, routing: Routing, experts: Experts, activation: str, gathers: bool) -> jax.Array:
    """Compute `run_experts` for one device's tokens.

    Args:
        gathers: whether the devices along "expert" have other tokens; else they have the same.
    """
    parts = mesh_size(AXIS)
    if parts == 1:
        y = _sort_and_multiply(x, routing, experts, activation, 0)
    else:
        if gathers:
            x, *routing = (jax.lax.all_gather(array, AXIS, tiled=True) for array in (x, *routing))
        first = jax.lax.axis_index(AXIS) * _n_experts(experts)
        y = _sort_and_multiply(x, Routing(*routing), experts, activation, first)
        y = jax.lax.psum_scatter(y, AXIS, tiled=True) if gathers else jax.lax.psum(y, AXIS)
    return jax.lax.psum(y, "tensor") if mesh_size("tensor") > 1 else y


def _sort_and_multiply(
    x: jax.Array, routing: Routing, experts: Experts, activation: str, first: jax.Array | int
) -> jax.Array:
    """Return the part of the sum that is of these experts, which are those numbered `first` and on."""
    (B, T, D), k, E = x.shape, routing.experts.shape[-1], _n_experts(experts)
    numbers = routing.experts.reshape(-1) - first
    numbers = jnp.where((numbers >= 0) & (numbers < E), numbers, E)  # E: another device's
    order = jnp.argsort(numbers)  # choices by expert
    places = jnp.argsort(order)  # of each choice among the sorted ones
    sizes = jnp.bincount(numbers, length=E + 1)[:E].astype(jnp.int32)
    sorted_numbers = numbers[order]

    choices = jnp.broadcast_to(x[:, :, None], (B, T, k, D)).reshape(-1, D)
    rows = permute(choices, order, places)
    inputs = [checkpoint_name(_multiply(rows, experts.up, experts.up_bias, sizes, sorted_numbers), "mlp")]
    if experts.gate is not None:
        inputs.append(_multiply(rows, experts.gate, experts.gate_bias, sizes, sorted_numbers))
    h = jax.checkpoint(ACTIVATIONS[activation])(*inputs)
    down_bias = None if experts.down_bias is None else experts.down_bias / mesh_size("tensor")  # summed over it
    y = _multiply(h, experts.down, down_bias, sizes, sorted_numbers)
    y = permute(y, places, order).reshape(B, T, k, D)
    return jnp.einsum("BTkD,BTk->BTD", y, routing.gates.astype(y.dtype))


def _n_experts(experts: Experts) -> int:
    return len(jax.tree.leaves(experts.up)[0])


def _multiply(
    rows: jax.Array, weight: Weight, bias: jax.Array | None, sizes: jax.Array, numbers: jax.Array
) -> jax.Array:
    y = _multiply_weight(rows, weight, sizes, numbers)
    return y if bias is None else y + bias.at[numbers].get(mode="fill", fill_value=0)


def _multiply_weight(rows: jax.Array, weight: Weight, sizes: jax.Array, numbers: jax.Array) -> jax.Array:
    """Multiply rows by the matrices of their experts, in whatever form these are held; as `weights.multiply`."""
    if isinstance(weight, Adapted):
        inner = grouped_product(rows, weight.a, sizes) * weight.scale
        return _multiply_weight(rows, weight.base, sizes, numbers) + grouped_product(inner, weight.b, sizes)
    if isinstance(weight, Int8):
        scales = weight.scales[:, 0].at[numbers].get(mode="fill", fill_value=0)
        return grouped_product(rows, weight.values.astype(rows.dtype), sizes) * scales
    return grouped_product(rows, weight, sizes)


@jax.custom_vjp
def permute(rows: jax.Array, order: jax.Array, inverse: jax.Array) -> jax.Array:
    """Return rows[order], whose gradient is a permutation too, and not a scatter.

    Args:
        inverse: the permutation that undoes `order`.
    """
    return rows[order]


permute.defvjp(
    lambda rows, order, inverse: (rows[order], inverse), lambda inverse, y_grad: (y_grad[inverse], None, None)
)
