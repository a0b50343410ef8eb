"""The model in three parts, `embed_inputs`, `apply_blocks` and `readout` (the last norm); and its size.

A call runs all three and returns hidden states; `logits`, or the loss, multiplies them by `head_matrix`.

A module's structure (static, hashable) and its weights (a nested dict of arrays) are kept apart, so that weights can
be sharded, saved and differentiated as plain values. `abstract_model` returns the structure and the weights' shapes,
`init_params` the initial weights, and `bind` puts structure and weights together.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from gptjax.config import ModelConfig, RunConfig
from gptjax.nn.attention import CacheSlots
from gptjax.nn.backends import ATTENTIONS, make_convolution, scans_layers
from gptjax.nn.layers import (
    MLP,
    STREAM,
    WHOLE_STREAM,
    Aux,
    Block,
    Cache,
    Context,
    Norm,
    dropout,
    init_std,
    param,
    stack_layers,
)
from gptjax.nn.moe import MoE
from gptjax.nn.pipeline import pass_stages
from gptjax.nn.products import add_bias
from gptjax.nn.rotary import rotary_angles
from gptjax.nn.weights import Weight, dense, look_up, multiply_head, transpose
from gptjax.parametrization import MULTIPLIERS, Metadata, Path, factor, size_factors
from gptjax.sharding import constrain, mesh_size

Params = dict[str, Any]  # nested; the leaves are arrays, or ShapeDtypeStructs in the abstract form

# model.mlp.kind -> what makes a block's MLP.
MLPS: dict[str, Callable[[ModelConfig, nnx.Rngs], nnx.Module]] = {
    "gelu": MLP,
    "swiglu": MLP,
    "geglu": MLP,
    "clamped_swiglu": MLP,
    "relu2": MLP,
    "moe": MoE,
}

STACKS = ("dense_blocks", "blocks")  # the modules that hold blocks, in the order of the layers

# run.remat -> (run.remat_names -> what of a block is kept for the backward pass).
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


class Inputs(NamedTuple):
    """What one forward pass reads.

    Attributes:
        tokens: [B, T] int32.
        positions: [B or 1, T] int32; None counts from 0. Negative ones, at the end of a row, are padding.
        segments: [B, T] int32; attention stays inside a segment. None: a row is one segment.
        dropout_key: None when nothing is dropped.
        slots: of the key/value cache that the pass reads and writes, these positions included; None without one.
    """

    tokens: jax.Array
    positions: jax.Array | None = None
    segments: jax.Array | None = None
    dropout_key: jax.Array | None = None
    slots: CacheSlots | None = None

    @property
    def row_positions(self) -> jax.Array:
        """The positions, [B or 1, T] int32."""
        counted = jnp.arange(self.tokens.shape[1], dtype=jnp.int32)[None]
        return counted if self.positions is None else self.positions


class Transformer(nnx.Module):
    """A decoder-only transformer with pre-normalisation (Radford et al. 2019)."""

    def __init__(self, cfg: ModelConfig, rngs: nnx.Rngs, run: RunConfig | None = None):
        V, D = cfg.padded_vocab, cfg.d_model
        self.cfg, self.run = cfg, run or RunConfig()
        self.embed = param(rngs, (V, D), ("vocab", "embed"), "embed", init_std(cfg, "embed"))
        learned, T = cfg.positions.kind == "learned", cfg.context_length
        std = init_std(cfg, "position")
        self.positions = param(rngs, (T, D), ("position", "embed"), "position", std) if learned else None
        n_dense, dense = cfg.n_dense_layers, cfg.with_dense_mlp(cfg.mlp_width)
        self.dense_blocks = stack_layers(lambda rngs: Block(dense, rngs, MLP), n_dense, rngs) if n_dense else None
        make_mlp = MLPS[cfg.mlp.kind]
        self.blocks = stack_layers(lambda rngs: Block(cfg, rngs, make_mlp), cfg.n_layers - n_dense, rngs)
        self.final_norm = Norm(cfg, (D,), rngs)
        untied = not cfg.tie_embeddings
        self.head = param(rngs, (D, V), ("embed", "vocab"), "head", init_std(cfg, "head", D)) if untied else None

    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array | None = None,
        segments: jax.Array | None = None,
        dropout_key: jax.Array | None = None,
    ) -> tuple[jax.Array, Aux]:
        """Run the model over whole rows.

        Args:
            tokens: [B, T] int32.
            positions, segments, dropout_key: as in `Inputs`.

        Returns:
            the hidden states, [B, T, D] in the compute dtype, and the blocks' auxiliary values.
        """
        inputs = Inputs(tokens, positions, segments, dropout_key)
        x, _, aux = self.apply_blocks(self.embed_inputs(inputs), inputs)
        return self.readout(x), aux

    def embed_inputs(self, inputs: Inputs) -> jax.Array:
        """Look up the tokens' vectors and add those of their positions: [B, T, D] in the compute dtype."""
        cfg, key = self.cfg, inputs.dropout_key
        x = constrain(look_up(self.embed.get_value(), inputs.tokens, cfg.dtype), *WHOLE_STREAM)
        if cfg.embed_multiplier != 1:
            x *= cfg.embed_multiplier
        if self.positions is not None:
            rows = self.positions[...].astype(cfg.dtype)[jnp.maximum(inputs.row_positions, 0)]
            x = add_bias(x, rows[0]) if len(rows) == 1 else x + rows
        if key is not None:
            x = dropout(x, cfg.dropout, jax.random.fold_in(key, cfg.n_layers))
        return x

    def apply_blocks(
        self,
        x: jax.Array,
        inputs: Inputs,
        cache: Cache | list[Cache] | None = None,
        layers: list[Params] | None = None,
        first: int = 0,
    ) -> tuple[jax.Array, Cache | list[Cache], Aux]:
        """Apply blocks to x [B, T, D], all of them or those given.

        Args:
            inputs: those that x was embedded from.
            cache: of earlier positions: a `Cache` whose arrays have a leading axis L, or with `layers` a list of L.
            layers: the weights of each block (`split_layers`), in place of the stacked ones that the model holds.
            first: the number of the first of these layers.

        Returns:
            x; the cache of these positions, or the given one with them in it; and the blocks' auxiliary values,
            summed over the layers.
        """
        ctx = self._context(inputs, cached=cache is not None)
        x = constrain(x, *STREAM)
        if layers is not None:
            return self._apply_layers(x, ctx, layers, cache, first)
        if cache is None and mesh_size("pipeline") > 1:
            return self._apply_in_stages(x, inputs)
        caches, aux_of_stacks = [], []
        for stack in self._stacks():
            structure, state = nnx.split(stack)
            weights = nnx.to_pure_dict(state)
            n_layers = len(jax.tree.leaves(weights)[0])
            of_stack = cache if n_layers == self.cfg.n_layers else _layers_of(cache, first, n_layers)
            stacked = (weights, jnp.arange(first, first + n_layers), of_stack)
            x, of_parts, aux = self._apply_stack(structure, ctx, x, stacked, first)
            caches += of_parts
            aux_of_stacks.append(aux)
            first += n_layers
        joined = caches[0] if len(caches) == 1 else jax.tree.map(lambda *parts: jnp.concatenate(parts), *caches)
        return x, joined, _sum_aux(aux_of_stacks)

    def _apply_in_stages(self, x: jax.Array, inputs: Inputs) -> tuple[jax.Array, None, Aux]:
        """Apply the blocks in the stages of a pipeline; as `apply_blocks` without a cache."""
        structure, state = nnx.split(self.blocks)
        by_row = {"positions": inputs.positions, "segments": inputs.segments}
        by_row = {name: array for name, array in by_row.items() if array is not None}

        def stage(layers, x, rows, number):
            key = None if inputs.dropout_key is None else jax.random.fold_in(inputs.dropout_key, number)
            ctx = self._context(inputs._replace(**rows, dropout_key=key), cached=False)
            # The layers of every stage have the pattern of the first stage's.
            x, _, aux = self._apply_stack(structure, ctx, x, (*layers, None), first=0)
            return x, aux

        stacked = (nnx.to_pure_dict(state), jnp.arange(self.cfg.n_layers))
        x, aux = pass_stages(stage, stacked, x, by_row, self.run.pipeline_microbatches)
        return x, None, aux

    def _apply_stack(
        self, structure: nnx.GraphDef, ctx: Context, x: jax.Array, stacked: Any, first: int
    ) -> tuple[jax.Array, list[Cache], Aux]:
        """Apply layers of one form, in loops over the repetitions of their pattern of windows.

        Args:
            stacked: weights, numbers and cache of the layers, each with a leading axis of layers.
            first: the number of the first of them.

        Returns:
            x, the caches of the loops, and the auxiliary values, summed over the layers.
        """
        caches, aux_of_parts = [], []
        n_layers = len(jax.tree.leaves(stacked)[0])
        for part, local in _repeated(self.cfg.local_layers[first : first + n_layers]):
            applied = [self._make_apply(structure, ctx, is_local) for is_local in local]
            x, (of_part, aux) = self._scan(applied, x, jax.tree.map(lambda a, part=part: a[part], stacked))
            caches.append(of_part)
            aux_of_parts.append(jax.tree.map(lambda values: values.sum(axis=0), aux))
        return x, caches, _sum_aux(aux_of_parts)

    def _scan(self, applied: list[Callable[..., tuple[jax.Array, Any]]], x: jax.Array, stacked: Any) -> tuple:
        """Apply layers one after the other, the first by the first of `applied`, and so on in a circle."""
        n_layers, period = len(jax.tree.leaves(stacked)[0]), len(applied)
        unroll = 1 if scans_layers(self.run) else n_layers
        if period == 1:
            return jax.lax.scan(applied[0], x, stacked, unroll=unroll)

        def apply_group(x, group):
            made = []
            for i, apply_block in enumerate(applied):
                x, of_layer = apply_block(x, jax.tree.map(lambda a, i=i: a[i], group))
                made.append(of_layer)
            return x, jax.tree.map(lambda *of_layers: jnp.stack(of_layers), *made)

        groups = jax.tree.map(lambda a: a.reshape(-1, period, *a.shape[1:]), stacked)
        x, made = jax.lax.scan(apply_group, x, groups, unroll=-(-unroll // period))
        return x, jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), made)

    def _apply_layers(
        self, x: jax.Array, ctx: Context, layers: list[Params], cache: list[Cache] | None, first: int
    ) -> tuple:
        """Apply blocks whose weights are apart; as `apply_blocks`."""
        structures = [nnx.split(stack)[0] for stack in self._stacks()]
        caches, aux_of_layers = [], []
        for i, weights in enumerate(layers):
            structure = structures[0 if _is_dense(weights) else -1]
            apply_block = self._make_apply(structure, ctx, self.cfg.local_layers[first + i])
            x, (layer_cache, aux) = apply_block(x, (weights, first + i, None if cache is None else cache[i]))
            caches.append(layer_cache)
            aux_of_layers.append(aux)
        return x, caches, _sum_aux(aux_of_layers)

    def _stacks(self) -> list[nnx.Module]:
        """Return the stacks of blocks of one form, in the order of the layers."""
        return [self.blocks] if self.dense_blocks is None else [self.dense_blocks, self.blocks]

    def _make_apply(self, structure: nnx.GraphDef, ctx: Context, local: bool) -> Callable[..., tuple[jax.Array, Any]]:
        """Return (x, (a block's weights, its number, its cache)) -> (x, (cache, auxiliary values)).

        Args:
            local: whether the block's attention has a window.
        """
        if local:
            ctx = ctx._replace(window=self.cfg.attention.window, rotation=ctx.local_rotation)

        def apply_block(x, layer):
            weights, index, cache = layer
            key = None if ctx.dropout_key is None else jax.random.fold_in(ctx.dropout_key, index)
            block = nnx.merge(structure, nnx.State(weights))
            x, cache, aux = block(x, ctx._replace(dropout_key=key), cache)
            return x, (cache, aux)

        if self.run.remat == "none":
            return apply_block
        # Without a loop between them, the compiler would merge the second computation into the first.
        policy = REMAT_POLICIES[self.run.remat](self.run.remat_names)
        return jax.checkpoint(apply_block, policy=policy, prevent_cse=not scans_layers(self.run))

    def readout(self, x: jax.Array) -> jax.Array:
        """Apply the last norm, and the parametrization's multiplier: [B, T, D] to the same shape."""
        x = self.final_norm(x) * factor(self.cfg, MULTIPLIERS["output"])
        return constrain(x, *WHOLE_STREAM)

    def _context(self, inputs: Inputs, cached: bool) -> Context:
        cfg, positions, rope = self.cfg, inputs.row_positions, self.cfg.positions
        rotation = local_rotation = None
        if rope.kind == "rope":
            long = rope.scaling is not None and cfg.context_length > rope.scaling.original_context
            rotation = rotary_angles(positions, cfg.rotated_width, rope.theta, rope.scaling, long)
            local_rotation = rotation
            if rope.local_theta is not None:
                local_rotation = rotary_angles(positions, cfg.rotated_width, rope.local_theta, None)
        kernel = ATTENTIONS["cached" if cached else self.run.attention]
        convolve = make_convolution(self.run.attention, positions)
        given = positions, inputs.segments, inputs.slots, inputs.dropout_key
        return Context(kernel, convolve, rotation, *given, local_rotation=local_rotation)

    def head_weight(self) -> Weight:
        """Return the head, or the transposed embedding where they are tied, in the form in which it is held."""
        return transpose(self.embed.get_value()) if self.head is None else self.head.get_value()

    def head_matrix(self) -> jax.Array:
        """Return `head_weight` as one array: [D, V] float32, or bfloat16 where it is held so."""
        return dense(self.head_weight())


def abstract_model(cfg: ModelConfig, run: RunConfig | None = None) -> tuple[nnx.GraphDef, Params, Metadata]:
    """Return the model without its values: structure, shapes, and each weight's metadata.

    Args:
        run: how the model is computed; None for the defaults.

    Returns:
        graphdef: static, hashable.
        params: nested dict of ShapeDtypeStruct; blocks carry a leading axis L.
        metadata: by path; `axes`, `role`, `n_in` and `n_stacked` as `param` was given them (the axis "layers" is
            the first in blocks); `factors` are what the model's size makes of rate, decay and eps.
    """
    graphdef, state = nnx.split(nnx.eval_shape(lambda: Transformer(cfg, nnx.Rngs(0), run)), nnx.Param)
    metadata = {}
    for path, variable in nnx.to_flat_state(state):
        weight = {name: variable.get_metadata()[name] for name in ("axes", "role", "n_in", "n_stacked")}
        metadata[path] = {**weight, "factors": size_factors(cfg, weight)}
    return graphdef, nnx.to_pure_dict(state), metadata


def leaf_at(tree: Any, path: Path) -> Any:
    """Return the leaf of a nested dict under these keys."""
    for key in path:
        tree = tree[key]
    return tree


def init_params(cfg: ModelConfig, key: jax.Array) -> Params:
    """Return the initial weights, bitwise identical on any mesh (jit it with out_shardings)."""
    return nnx.to_pure_dict(nnx.split(Transformer(cfg, nnx.Rngs(params=key)), nnx.Param)[1])


def bind(graphdef: nnx.GraphDef, params: Params) -> Transformer:
    """Return the module with these weights; works under jit, grad and scan."""
    return nnx.merge(graphdef, nnx.State(params))


def bind_split(graphdef: nnx.GraphDef, rest: Params, layers: list[Params]) -> Transformer:
    """Return the module with the weights that `split_layers` split; `apply_blocks` is given the layers."""
    first = {"dense_blocks": layers[0]} if _is_dense(layers[0]) != _is_dense(layers[-1]) else {}
    return bind(graphdef, {**rest, **first, "blocks": layers[-1]})


def _is_dense(layer: Params) -> bool:
    """Return whether a block has no experts."""
    return "router" not in layer["mlp"]


def _repeated(local: tuple[bool, ...]) -> list[tuple[slice, tuple[bool, ...]]]:
    """Cut layers into parts of which each repeats a pattern: the shortest one as often as it fits, and the rest.

    Args:
        local: of each layer, whether its attention has a window.

    Returns:
        the layers of each part, and its pattern.
    """
    n = len(local)
    period = next(p for p in range(1, n + 1) if all(local[i] == local[i % p] for i in range(n)))
    whole = n - n % period
    parts = [(slice(0, whole), local[:period]), (slice(whole, n), local[whole:])]
    return parts if whole < n else parts[:1]


def _layers_of(cache: Cache | None, first: int, n_layers: int) -> Cache | None:
    """Return a stacked cache's part for so many layers."""
    return jax.tree.map(lambda array: array[first : first + n_layers], cache)


def _sum_aux(parts: list[Aux]) -> Aux:
    """Return the sums of auxiliary values, of which a block may lack some."""
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: jax.tree.map(lambda *values: sum(values), *(p[name] for p in parts if name in p)) for name in names}


def split_layers(params: Params, delete: bool = False) -> tuple[Params, list[Params]]:
    """Split the stacked weights of the blocks into those of each layer.

    Decoding needs them apart: a loop over tokens would otherwise cut the layers out of the stack at every token, a
    copy of all weights and of the cache.

    Args:
        params: as `init_params` returns them.
        delete: delete each stacked array once it is split, so that memory never holds all weights twice; `params` is
            then of no more use.

    Returns:
        the weights outside the blocks, and L nested dicts, the blocks' weights.
    """
    rest = {name: weight for name, weight in params.items() if name not in STACKS}
    layers = []
    for stack in (params[name] for name in STACKS if name in params):
        leaves, structure = jax.tree.flatten(stack)
        split = []
        for leaf in leaves:
            split.append(_split(leaf))
            if delete:
                jax.block_until_ready(split[-1])
                leaf.delete()
        layers += [jax.tree.unflatten(structure, layer) for layer in zip(*split, strict=True)]
    return rest, layers


@jax.jit
def _split(stacked: jax.Array) -> list[jax.Array]:
    """Split the first axis; a sharded array's parts keep the sharding of the other axes."""
    return [stacked[i] for i in range(len(stacked))]


def logits(model: Transformer, hidden: jax.Array) -> jax.Array:
    """Compute float32 logits over the vocabulary without its padding, [B, T, vocab_size], from hidden [B, T, D]."""
    cfg = model.cfg
    raw = multiply_head(hidden, model.head_weight())
    return softcap(raw, cfg.logit_softcap)[..., : cfg.vocab_size]


def softcap(x: jax.Array, cap: float | None) -> jax.Array:
    """Compute cap * tanh(x / cap) (Gemma 2, arXiv 2408.00118, section 2); x itself without a cap."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def active_share(cfg: ModelConfig, weight: dict[str, Any]) -> float:
    """Return the share of a weight that one token passes: k / E of experts, all of another.

    Args:
        weight: its metadata (`abstract_model`).
    """
    return cfg.mlp.moe.top_k / cfg.mlp.moe.experts if "expert" in weight["axes"] else 1.0


def count_params(cfg: ModelConfig, active: bool = False) -> dict[str, int]:
    """Count the weights by group (embed, positions, blocks, final_norm, head, total), without vocabulary padding.

    Args:
        active: count the experts that one token passes, and not all of them.
    """
    _, params, metadata = abstract_model(cfg)
    counts: dict[str, int] = {}
    for path, meta in metadata.items():
        size = math.prod(leaf_at(params, path).shape)
        if "vocab" in meta["axes"]:
            size = size // cfg.padded_vocab * cfg.vocab_size
        size = round(size * active_share(cfg, meta)) if active else size
        group = "blocks" if path[0] in STACKS else path[0]
        counts[group] = counts.get(group, 0) + size
    return {**counts, "total": sum(counts.values())}


def flops_per_token(cfg: ModelConfig) -> float:
    """Return the floating-point operations of forward and backward for one token: 6 N + 12 L H K T.

    In a layer with a window, T is at most the window.

    N counts the weights that multiply one token: no embeddings of tokens or positions, but the head, tied or not, and
    of experts those that the token passes. The second term is attention, counted in full, causal or not (Chowdhery et
    al. 2022, arXiv 2204.02311, appendix B).
    """
    counts = count_params(cfg, active=True)
    matmul = counts["blocks"] + cfg.d_model * cfg.vocab_size
    return 6 * matmul + 12 * cfg.n_heads * cfg.d_head * cfg.attended_positions
