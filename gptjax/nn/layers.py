"""The parts of a block: norms, attention, the MLP.

`param` declares a weight, once; its shape, its sharding and its initial value follow from the declaration.
"""

import math
from collections.abc import Callable
from functools import lru_cache
from statistics import NormalDist
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from gptjax.config import ModelConfig
from gptjax.nn.attention import AttentionCache, AttentionInput, CacheSlots, Kernel, KeysValues
from gptjax.nn.products import add_bias
from gptjax.nn.rotary import Rotation, rotate
from gptjax.nn.weights import multiply, project_heads
from gptjax.parametrization import INIT_STDS, MULTIPLIERS, attention_multiplier, factor, growth, role_named
from gptjax.sharding import constrain

STREAM = ("batch", "stream_length", "residual")  # the residual stream's axes between matmuls
WHOLE_STREAM = ("batch", "length", "residual")  # its axes at a matmul
HIDDEN = (
    "batch",
    "length",
    "mlp",
)  # an MLP's inner axes; pinned, or the stream's split of the length spreads to them

Aux = dict[str, tuple[jax.Array, jax.Array]]  # name -> summed value and summed weight, float32 scalars


class Context(NamedTuple):
    """What every block of one forward pass shares.

    Attributes:
        kernel: computes attention.
        convolve: a causal convolution, (x [B, T, D], taps [W, D], recent [B, W - 1, D]) -> (x's shape, recent).
        rotation: cosine and sine of the rotary angles, [B or 1, T, 1, K / 2] float32; None without RoPE.
        positions: [B or 1, T] int32.
        segments: [B, T] int32; None where a row is one segment.
        slots: of the key/value cache; None without one.
        dropout_key: None when nothing is dropped.
        local_rotation: the rotation of layers with a window.
        window: of the layer; None for all positions.
    """

    kernel: Kernel
    convolve: Callable[..., tuple[jax.Array, jax.Array | None]]
    rotation: Rotation | None
    positions: jax.Array
    segments: jax.Array | None = None
    slots: CacheSlots | None = None
    dropout_key: jax.Array | None = None
    local_rotation: Rotation | None = None
    window: int | None = None

    def attention_input(
        self, kv: KeysValues | None, cap: float | None = None, sinks: jax.Array | None = None
    ) -> AttentionInput:
        """Return what a layer's attention depends on, given the layer's cached keys and values, cap and sinks."""
        cache = None if kv is None or self.slots is None else AttentionCache(kv, self.slots)
        return AttentionInput(self.positions, self.segments, self.window, cache, cap, sinks)


class Cache(NamedTuple):
    """What a block keeps of earlier positions.

    Attributes:
        kv: keys and values, [B, G, S, K] each.
        recent: the last inputs of the two convolutions, [B, W - 1, D] each; None without them.
    """

    kv: KeysValues
    recent: tuple[jax.Array | None, jax.Array | None]


def param(
    rngs: nnx.Rngs,
    shape: tuple[int, ...],
    axes: tuple[str, ...],
    role: str,
    std: float = 0.0,
    *,
    fill: float = 0.0,
    n_in: int = 1,
    n_stacked: int = 0,
) -> nnx.Param:
    """Declare a float32 weight.

    Args:
        axes: a logical axis (`sharding.AXIS_RULES`) for each dimension.
        role: one of `parametrization.ROLES`; optimizer, decay and freezing follow from it.
        std: standard deviation of its first value, which is normal.
        fill: its first value where `std` is 0.
        n_in: how many dimensions are the input, when the weight is read as a matrix (Muon does).
        n_stacked: how many dimensions before those count separate matrices, as an axis of experts does.

    Raises:
        ValueError: the role is unknown.
    """
    assert len(shape) == len(axes)
    role_named(role)
    value = std * standard_normal(rngs.params(), shape) if std else jnp.full(shape, fill, jnp.float32)
    return nnx.Param(value, axes=axes, role=role, n_in=n_in, n_stacked=n_stacked)


def param_if(
    wanted: bool, rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str, ...], role: str
) -> nnx.Param | None:
    """Declare a weight whose first value is 0; return None where it is not wanted."""
    return param(rngs, shape, axes, role) if wanted else None


def stack_layers(make: Callable[[nnx.Rngs], nnx.Module], n_layers: int, rngs: nnx.Rngs) -> nnx.Module:
    """Make n modules as one, whose weights have a leading axis "layers", which counts separate matrices."""
    keys = jax.random.split(rngs.params(), n_layers)
    stacked = nnx.vmap(lambda key: make(nnx.Rngs(params=key)))(keys)
    for _, weight in nnx.iter_graph(stacked):
        if isinstance(weight, nnx.Param):
            declared = weight.get_metadata()
            weight.set_metadata(axes=("layers", *declared["axes"]), n_stacked=declared["n_stacked"] + 1)
    return stacked


def standard_normal(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Normal(0, 1) float32, in 65,536 steps of equal probability.

    Looked up and not computed: the last bit of an inverse error function depends on how the compiler cuts the array
    into vectors, and so on the mesh. Random bits do not.
    """
    return jnp.asarray(_normal_quantiles())[jax.random.bits(key, shape, jnp.uint16)]


@lru_cache(maxsize=1)
def _normal_quantiles() -> np.ndarray:
    quantiles = np.array([NormalDist().inv_cdf((i + 0.5) / 2**16) for i in range(2**16)])
    return (quantiles / quantiles.std()).astype(np.float32)


def init_std(cfg: ModelConfig, kind: str, fan_in: int = 1) -> float:
    """Standard deviation of a weight's first value, by its kind: embed, position, matrix, residual, router or head.

    `gpt2`: Radford et al. 2019, section 2.3 (residual projections scaled by one over the root of their number).
    `zero`: residual branches and the head start at zero (Fixup and its kin: Zhang et al. 2019, arXiv 1901.09321).
    Both are those of the base model, which the parametrization then scales.
    """
    m, l = growth(cfg)
    gpt2 = {"embed": 0.02, "position": 0.02, "matrix": 0.02, "residual": 0.02 * (2 * cfg.n_layers / l) ** -0.5}
    zero = {"embed": 1.0, "position": 0.02, "matrix": (fan_in / m) ** -0.5, "residual": 0.0}
    gpt2 |= {"router": 0.02, "head": 0.02}
    zero |= {"router": (fan_in / m) ** -0.5, "head": 0.02 if cfg.tie_embeddings else 0.0}
    stds = {"gpt2": gpt2, "zero": zero}
    return stds[cfg.init][kind] * factor(cfg, INIT_STDS[kind])


def linear(spec: str, x: jax.Array, weight: nnx.Param, bias: nnx.Param | None, dtype: str) -> jax.Array:
    """Compute einsum(x, weight) + bias, with operands in `dtype`."""
    y = multiply(spec, x.astype(dtype), weight.get_value())
    return y if bias is None else add_bias(y, bias[...].astype(dtype))


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Zero each element with probability `rate` and scale the rest to keep the mean; without a key, x itself."""
    if key is None or rate == 0:
        return x
    return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0).astype(x.dtype)


class Norm(nnx.Module):
    """LayerNorm (Ba et al. 2016) or RMSNorm (Zhang and Sennrich 2019) over the last axes, in float32.

    Args:
        shape: of the last axes, which are normalised together.
        axes: logical axes of a weight of this shape.
    """

    def __init__(
        self,
        cfg: ModelConfig,
        shape: tuple[int, ...],
        rngs: nnx.Rngs,
        kind: str | None = None,
        axes: tuple[str, ...] = ("norm",),
    ):
        self.kind, self.eps, self.dtype = kind or cfg.norm.kind, cfg.norm.eps, cfg.dtype
        self.axes, self.offset = tuple(range(-len(shape), 0)), 1.0 if cfg.norm.from_one else 0.0
        self.scale = param(rngs, shape, axes, "norm", fill=1 - self.offset) if cfg.norm.weights else None
        shifted = cfg.norm.weights and cfg.bias and self.kind == "layernorm"
        self.bias = param_if(shifted, rngs, shape, axes, "bias")

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x.astype(jnp.float32)
        if self.kind == "layernorm":
            x = x - x.mean(self.axes, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.square(x).mean(self.axes, keepdims=True) + self.eps)
        if self.scale is not None:
            x = x * (self.scale[...] + self.offset if self.offset else self.scale[...])
        x = x if self.bias is None else x + self.bias[...]
        return x.astype(self.dtype)


def normalise(norm: Norm | None, x: jax.Array) -> jax.Array:
    """Apply a norm, where there is one."""
    return x if norm is None else norm(x)


class Attention(nnx.Module):
    """Causal self-attention with grouped queries (Ainslie et al. 2023, arXiv 2305.13245)."""

    def __init__(self, cfg: ModelConfig, rngs: nnx.Rngs):
        D, H, G, K = cfg.d_model, cfg.n_heads, cfg.kv_heads, cfg.d_head
        std = init_std(cfg, "matrix", D)
        self.dtype, self.cap = cfg.dtype, cfg.attention.softcap
        # Kernels divide scores by the root of K.
        self.query_multiplier = attention_multiplier(cfg) * (K / (cfg.attention.scale_width or K)) ** 0.5
        self.query = param(rngs, (D, H, K), ("embed", "heads", "head_dim"), "matrix", std)
        self.key = param(rngs, (D, G, K), ("embed", "kv_heads", "head_dim"), "matrix", std)
        self.value = param(rngs, (D, G, K), ("embed", "kv_heads", "head_dim"), "matrix", std)
        self.out = param(
            rngs, (H, K, D), ("heads", "head_dim", "embed"), "matrix", init_std(cfg, "residual", H * K), n_in=2
        )
        qkv_bias = cfg.bias if cfg.attention.qkv_bias is None else cfg.attention.qkv_bias
        self.query_bias = param_if(qkv_bias, rngs, (H, K), ("heads", "head_dim"), "bias")
        self.key_bias = param_if(qkv_bias, rngs, (G, K), ("kv_heads", "head_dim"), "bias")
        self.value_bias = param_if(qkv_bias, rngs, (G, K), ("kv_heads", "head_dim"), "bias")
        self.out_bias = param_if(cfg.bias, rngs, (D,), ("norm",), "bias")
        self.query_norm = self._head_norm(cfg, H, "heads", rngs)
        self.key_norm = self._head_norm(cfg, G, "kv_heads", rngs)
        self.sinks = param_if(cfg.attention.sinks, rngs, (H,), ("heads",), "bias")

    def _head_norm(self, cfg: ModelConfig, n_heads: int, axis: str, rngs: nnx.Rngs) -> Norm | None:
        """Return the norm of queries or keys, over each head or over all of them; None without one."""
        if not cfg.attention.qk_norm:
            return None
        if cfg.attention.qk_norm_over == "head":
            return Norm(cfg, (cfg.d_head,), rngs, kind="rmsnorm")
        return Norm(cfg, (n_heads, cfg.d_head), rngs, kind="rmsnorm", axes=(axis, "head_dim"))

    def __call__(self, x: jax.Array, ctx: Context, kv: KeysValues | None) -> tuple[jax.Array, KeysValues]:
        """Map x [B, T, D] to the same shape.

        Args:
            kv: this layer's cached keys and values; None without a cache.

        Returns:
            the output, and keys and values: of these positions, or the cache's with them in it.
        """
        weights = [weight.get_value() for weight in (self.query, self.key, self.value)]
        q, k, v = project_heads(x.astype(self.dtype), weights, joined=kv is None)
        if self.query_bias is not None:
            q = add_bias(q, self.query_bias[...].astype(self.dtype))
            k = add_bias(k, self.key_bias[...].astype(self.dtype))
            v = add_bias(v, self.value_bias[...].astype(self.dtype))
        if self.query_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        if ctx.rotation is not None:
            q, k = rotate(q, ctx.rotation), rotate(k, ctx.rotation)
        q, k, v = checkpoint_name((q * self.query_multiplier, k, v), "qkv")
        sinks = None if self.sinks is None else self.sinks[...]
        y, kv = ctx.kernel(q, k, v, ctx.attention_input(kv, self.cap, sinks))
        return linear("BTHK,HKD->BTD", y, self.out, self.out_bias, self.dtype), kv


def gelu(x: jax.Array) -> jax.Array:
    """x Phi(x) in the tanh form (Hendrycks and Gimpel 2016, arXiv 1606.08415, section 2)."""
    # In few operations: XLA wakes a second thread of a CPU by their number for each byte, and for the few tokens of
    # decoding that takes longer than the work.
    c, half = math.sqrt(2 / math.pi), 0.5 * x
    return half + half * jnp.tanh(x * (c + 0.044715 * c * (x * x)))


def clamped_swiglu(h: jax.Array, gate: jax.Array) -> jax.Array:
    """Compute (h + 1) gate sigmoid(1.702 gate), h cut to [-7, 7], gate to at most 7 (gpt-oss, arXiv 2508.10925)."""
    h, gate = jnp.clip(h, -7.0, 7.0), jnp.minimum(gate, 7.0)
    return (h + 1) * gate * jax.nn.sigmoid(1.702 * gate)


ACTIVATIONS: dict[str, Callable[..., jax.Array]] = {
    "gelu": gelu,
    "relu2": lambda h: jnp.square(jax.nn.relu(h)),
    "swiglu": lambda h, gate: jax.nn.silu(gate) * h,
    "geglu": lambda h, gate: gelu(gate) * h,
    "clamped_swiglu": clamped_swiglu,
}
GATED = ("swiglu", "geglu", "clamped_swiglu")  # activations that multiply by a gate, a third matrix


class MLP(nnx.Module):
    """Two matrices around a tanh-GELU or ReLU squared (So et al. 2021), or three, with a gate (Shazeer 2020)."""

    def __init__(self, cfg: ModelConfig, rngs: nnx.Rngs):
        D, F = cfg.d_model, cfg.mlp_width
        std, gated = init_std(cfg, "matrix", D), cfg.mlp.kind in GATED
        self.kind, self.dtype = cfg.mlp.kind, cfg.dtype
        self.up = param(rngs, (D, F), ("embed", "mlp"), "matrix", std)
        self.gate = param(rngs, (D, F), ("embed", "mlp"), "matrix", std) if gated else None
        self.down = param(rngs, (F, D), ("mlp", "embed"), "matrix", init_std(cfg, "residual", F))
        self.up_bias = param_if(cfg.bias, rngs, (F,), ("mlp",), "bias")
        self.gate_bias = param_if(cfg.bias and gated, rngs, (F,), ("mlp",), "bias")
        self.down_bias = param_if(cfg.bias, rngs, (D,), ("norm",), "bias")

    def __call__(self, x: jax.Array, ctx: Context) -> tuple[jax.Array, Aux]:
        """Map [B, T, D] to the same shape, and return auxiliary values: none."""
        del ctx  # each position alone
        h = linear("BTD,DF->BTF", x, self.up, self.up_bias, self.dtype)
        inputs = [checkpoint_name(constrain(h, *HIDDEN), "mlp")]
        if self.gate is not None:
            inputs.append(linear("BTD,DF->BTF", x, self.gate, self.gate_bias, self.dtype))
        activate = jax.checkpoint(ACTIVATIONS[self.kind])  # cheap to compute again, large to keep
        h = constrain(activate(*inputs), *HIDDEN)
        return linear("BTF,FD->BTD", h, self.down, self.down_bias, self.dtype), {}


class Block(nnx.Module):
    """Computes x + attention(norm(x)), then x + mlp(norm(x)).

    `norm.place` says whether what is read is normalised, or what is added, or both. The parametrization may scale
    what is added. With a `conv_width`, what is read passes through a causal convolution.

    Args:
        make_mlp: makes the MLP, of `transformer.MLPS`.
    """

    def __init__(self, cfg: ModelConfig, rngs: nnx.Rngs, make_mlp: Callable[[ModelConfig, nnx.Rngs], nnx.Module]):
        self.rate, self.multiplier = cfg.dropout, factor(cfg, MULTIPLIERS["residual"])
        before, after = cfg.norm.place != "post", cfg.norm.place != "pre"
        width = (cfg.d_model,)
        self.attention_norm = Norm(cfg, width, rngs) if before else None
        self.attention = Attention(cfg, rngs)
        self.attention_post_norm = Norm(cfg, width, rngs) if after else None
        self.mlp_norm = Norm(cfg, width, rngs) if before else None
        self.mlp = make_mlp(cfg, rngs)
        self.mlp_post_norm = Norm(cfg, width, rngs) if after else None
        W = cfg.conv_width or 0
        self.attention_conv = param_if(W > 0, rngs, (W, cfg.d_model), ("position", "norm"), "conv")
        self.mlp_conv = param_if(W > 0, rngs, (W, cfg.d_model), ("position", "norm"), "conv")

    def __call__(self, x: jax.Array, ctx: Context, cache: Cache | None) -> tuple[jax.Array, Cache, Aux]:
        """Map x [B, T, D] to the same shape.

        Args:
            cache: of earlier positions; None without one.

        Returns:
            x, the cache of these positions or the given one with them in it, and auxiliary values.
        """
        kv, recent = (None, (None, None)) if cache is None else cache
        keys = (None, None) if ctx.dropout_key is None else jax.random.split(ctx.dropout_key)
        x = checkpoint_name(constrain(x, *STREAM), "block_input")
        h, attention_recent = self.convolve(normalise(self.attention_norm, x), self.attention_conv, ctx, recent[0])
        y, kv = self.attention(h, ctx, kv)
        y = normalise(self.attention_post_norm, y)
        x = constrain(x + self.multiplier * dropout(y, self.rate, keys[0]), *STREAM)
        h, mlp_recent = self.convolve(normalise(self.mlp_norm, x), self.mlp_conv, ctx, recent[1])
        y, aux = self.mlp(h, ctx)
        y = normalise(self.mlp_post_norm, y)
        x = x + self.multiplier * dropout(y, self.rate, keys[1])
        return x, Cache(kv, (attention_recent, mlp_recent)), aux

    def convolve(self, x, taps, ctx, recent):
        """Convolve a norm's output with its taps, after the last inputs of earlier positions; None: no taps."""
        x = constrain(x, *WHOLE_STREAM)
        return (x, None) if taps is None else ctx.convolve(x, taps[...].astype(x.dtype), recent)
