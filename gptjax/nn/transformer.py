"""The model: token ids in, logits out. Also its abstract form, and what it costs.

Build with `Transformer(cfg, rngs)`, run with `apply`: a module's structure (static) and its weights (a nested
dict of arrays) are kept apart, so that weights can be sharded, saved and differentiated as plain values.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from gptjax.config import ModelConfig
from gptjax.nn.attention import make_cached
from gptjax.nn.backends import ATTENTIONS, is_apart, make_convolution, scans_layers
from gptjax.nn.layers import (
    STREAM,
    Block,
    Cache,
    Context,
    Norm,
    dropout,
    init_std,
    param,
    rotary_angles,
    stack_layers,
)
from gptjax.nn.products import plus
from gptjax.parametrization import MULTIPLIERS, factor, size_factors
from gptjax.sharding import constrain

Params = dict[str, Any]  # nested; the leaves are arrays, or ShapeDtypeStructs in the abstract form

# The names -> what the backward pass finds saved.
REMAT_POLICIES: dict[str, Callable[[tuple[str, ...]], Any]] = {
    "dots": lambda names: jax.checkpoint_policies.save_only_these_names("dot"),
    "full": lambda names: jax.checkpoint_policies.nothing_saveable,
    "named": lambda names: jax.checkpoint_policies.save_only_these_names(*names),
    "offload": lambda names: jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=list(names),
        offload_src="device",
        offload_dst="pinned_host",
    ),
}


class Transformer(nnx.Module):
    """A decoder-only transformer with pre-normalisation (Radford et al. 2019)."""

    def __init__(self, cfg: ModelConfig, rngs: nnx.Rngs):
        V, D = cfg.padded_vocab, cfg.d_model
        self.cfg = cfg
        self.embed = param(rngs, (V, D), ("vocab", "embed"), "embed", init_std(cfg, "embed"))
        learned, T = cfg.positions == "learned", cfg.context_length
        std = init_std(cfg, "position")
        self.positions = param(rngs, (T, D), ("position", "embed"), "position", std) if learned else None
        self.blocks = stack_layers(lambda rngs: Block(cfg, rngs), cfg.n_layers, rngs)
        self.final_norm = Norm(cfg, D, rngs)
        untied = not cfg.tie_embeddings
        self.head = param(rngs, (D, V), ("embed", "vocab"), "head", init_std(cfg, "head", D)) if untied else None

    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array | None = None,
        segments: jax.Array | None = None,
        dropout_key: jax.Array | None = None,
        cache: Cache | list[Cache] | None = None,
        cache_positions: jax.Array | None = None,
        slot: jax.Array | None = None,
    ) -> tuple[jax.Array, Cache | list[Cache]]:
        """The residual stream after the last norm; `head_matrix` and `loss.py` make logits and losses of it.

        Args:
            tokens: [B, T] int32.
            positions: [B or 1, T] int32; None counts from 0. Negative: padding, which nothing attends to.
            segments: [B, T] int32; attention stays inside a segment. None: one segment a sequence.
            cache: of earlier positions, a `Cache` with a leading axis L; with `unstack`ed weights, a list of L.
            cache_positions: [B or 1, S], with these positions in it; an unwritten slot's is later than every query's.
            slot: int32 scalar, where in the cache these positions begin.

        Returns:
            [B, T, D] in the compute dtype, and the cache of these positions, or the given one with them in it.
        """
        cfg, T = self.cfg, tokens.shape[1]
        positions = jnp.arange(T, dtype=jnp.int32)[None] if positions is None else positions
        rotation = None
        if cfg.positions == "rope":
            rotation = rotary_angles(positions, cfg.d_head, cfg.rope_theta, cfg.rope_scaling)
        if cache is None:
            kernel = ATTENTIONS[cfg.attention](positions, segments)
        else:
            kernel = make_cached(positions, cache_positions, slot)

        convolve = make_convolution(cfg.attention, positions)

        # Whole rows, FSDP's parts brought together; each part of the vocabulary is asked for all of the tokens.
        table = constrain(self.embed[...].astype(cfg.dtype), "vocab", "residual")
        x = constrain(table[tokens], "batch", "length", "residual")
        if self.positions is not None:
            rows = self.positions[...].astype(cfg.dtype)[jnp.maximum(positions, 0)]
            x = x + rows if len(rows) > 1 else plus(x, rows[0])
        if dropout_key is not None:
            x = dropout(x, cfg.dropout, jax.random.fold_in(dropout_key, cfg.n_layers))
        x = constrain(x, *STREAM)

        structure, state = nnx.split(self.blocks)
        blocks = nnx.to_pure_dict(state)

        def attend(*qkv):
            return kernel(*checkpoint_name(qkv, "qkv"))

        def layer(x, inputs):
            weights, index, known = inputs
            key = None if dropout_key is None else jax.random.fold_in(dropout_key, index)
            return nnx.merge(structure, nnx.State(weights))(x, Context(attend, convolve, rotation, key), known)

        if cfg.remat != "none":
            # Without a loop between them, the compiler would merge the second computation into the first.
            policy = REMAT_POLICIES[cfg.remat](cfg.remat_names)
            layer = jax.checkpoint(layer, policy=policy, prevent_cse=not scans_layers(cfg))
        if is_apart(jax.tree.leaves(blocks, is_leaf=is_apart)[0]):
            cache = list(cache or [None] * cfg.n_layers)
            for i in range(cfg.n_layers):
                weights = jax.tree.map(lambda w, i=i: w[i], blocks, is_leaf=is_apart)
                x, cache[i] = layer(x, (weights, i, cache[i]))
        else:
            unroll = 1 if scans_layers(cfg) else cfg.n_layers
            x, cache = jax.lax.scan(layer, x, (blocks, jnp.arange(cfg.n_layers), cache), unroll=unroll)
        x = self.final_norm(x) * factor(cfg, MULTIPLIERS["output"])
        return constrain(x, "batch", "length", "residual"), cache

    def head_matrix(self) -> jax.Array:
        """[D, V] float32: the head, or the transposed embedding where they are tied."""
        return self.embed[...].T if self.head is None else self.head[...]


def abstract_model(cfg: ModelConfig) -> tuple[nnx.GraphDef, Params, dict[tuple[str, ...], dict[str, Any]]]:
    """The model without its values: structure, shapes, and each weight's metadata.

    Returns:
        graphdef: static, hashable.
        params: nested dict of ShapeDtypeStruct; blocks carry a leading axis L.
        metadata: by path; `axes`, `role`, `n_in` and `n_stacked` as `param` was given them (the axis "layers" is
            the first in blocks); `factors` are what the model's size makes of rate, decay and eps.
    """
    graphdef, state = nnx.split(nnx.eval_shape(lambda: Transformer(cfg, nnx.Rngs(0))), nnx.Param)
    metadata = {}
    for path, variable in nnx.to_flat_state(state):
        weight = {name: variable.get_metadata()[name] for name in ("axes", "role", "n_in", "n_stacked")}
        metadata[path] = {**weight, "factors": size_factors(cfg, weight)}
    return graphdef, nnx.to_pure_dict(state), metadata


def init_params(cfg: ModelConfig, key: jax.Array) -> Params:
    """First values of the weights; the same bits on any mesh (jit it with out_shardings)."""
    return nnx.to_pure_dict(nnx.split(Transformer(cfg, nnx.Rngs(params=key)), nnx.Param)[1])


def bind(graphdef: nnx.GraphDef, params: Params) -> Transformer:
    """The module with these weights; works under jit, grad and scan."""
    return nnx.merge(graphdef, nnx.State(params))


def logits(model: Transformer, hidden: jax.Array) -> jax.Array:
    """hidden [B, T, D] -> float32 logits over the true vocabulary, [B, T, vocab_size]."""
    cfg = model.cfg
    raw = jnp.einsum(
        "BTD,DV->BTV", hidden, model.head_matrix().astype(hidden.dtype), preferred_element_type=jnp.float32
    )
    return softcap(raw, cfg.logit_softcap)[..., : cfg.vocab_size]


def softcap(x: jax.Array, cap: float | None) -> jax.Array:
    """cap * tanh(x / cap) (Gemma 2, arXiv 2408.00118, section 2); x itself without a cap."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def count_params(cfg: ModelConfig) -> dict[str, int]:
    """Number of weights by group (embed, positions, blocks, final_norm, head, total), without vocabulary padding."""
    _, params, metadata = abstract_model(cfg)
    counts: dict[str, int] = {}
    for path, meta in metadata.items():
        leaf = params
        for name in path:
            leaf = leaf[name]
        size = math.prod(leaf.shape)
        if "vocab" in meta["axes"]:
            size = size // cfg.padded_vocab * cfg.vocab_size
        counts[path[0]] = counts.get(path[0], 0) + size
    return {**counts, "total": sum(counts.values())}


def flops_per_token(cfg: ModelConfig) -> float:
    """Floating-point operations of forward and backward for one token: 6 N + 12 L H K T.

    N counts the weights that multiply (no embeddings of tokens or positions, but the head, tied or not); the
    second term is attention, counted in full, causal or not (Chowdhery et al. 2022, arXiv 2204.02311,
    appendix B).
    """
    counts = count_params(cfg)
    matmul = counts["blocks"] + cfg.d_model * cfg.vocab_size
    return 6 * matmul + 12 * cfg.n_layers * cfg.n_heads * cfg.d_head * cfg.context_length
