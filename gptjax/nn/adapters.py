"""Low-rank adapters (LoRA: Hu et al. 2021, arXiv 2106.09685): which weights have one, its shapes, its first values.

The adapters of a model are a nested dict beside its weights, under the key ADAPTER and the same names, with `a` and
`b` for each target. `join_adapter` puts both into the form that the layers multiply by.
"""

import math
import re
import zlib

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from gptjax.config import LoraConfig
from gptjax.errors import UserError, nearest
from gptjax.nn.layers import standard_normal
from gptjax.nn.transformer import Params
from gptjax.nn.weights import Adapted, Weight, dense, merge
from gptjax.parametrization import ROLES, Metadata, Path, role_named

ADAPTER = "adapter"  # the key of the adapters among a model's weights, and their role


def choose_targets(lora: LoraConfig, metadata: Metadata) -> list[Path]:
    """Return the paths of the weights that get an adapter.

    Raises:
        UserError: a target that is no role and matches no matrix of the blocks; the message names the nearest.
    """
    matrices = {path: weight for path, weight in metadata.items() if role_named(weight["role"]).hidden}
    chosen = set()
    for target in lora.targets:
        found = {
            path
            for path, weight in matrices.items()
            if (weight["role"] == target if target in ROLES else re.search(target, "/".join(path)))
        }
        if not found:
            names = {path[-1] for path in matrices} | {weight["role"] for weight in matrices.values()}
            raise UserError(
                f"lora.targets {target!r} matches no matrix of the blocks{nearest(target, sorted(names))}; give a "
                f"role (matrix) or a pattern of paths, such as {'/'.join(min(matrices))}"
            )
        chosen |= found
    return sorted(chosen)


def abstract_adapter(lora: LoraConfig, params: Params, metadata: Metadata) -> tuple[Params, Metadata]:
    """Return the adapters' shapes and metadata.

    Args:
        params, metadata: of the model, as `transformer.abstract_model` returns them.

    Returns:
        `{ADAPTER: nested dict of ShapeDtypeStruct}`, and the metadata of these arrays, by path.
    """
    shapes, declared = {}, {}
    leaves = flatten_dict(params)
    for path in choose_targets(lora, metadata):
        shape, weight = leaves[path].shape, metadata[path]
        axes, stack = weight["axes"], weight["n_stacked"]
        split = stack + weight["n_in"]
        common = {"role": ADAPTER, "n_stacked": stack, "factors": dict.fromkeys(("lr", "decay", "eps"), 1.0)}
        for name, size, names, n_in in (
            ("a", (*shape[:split], lora.rank), (*axes[:split], "rank"), weight["n_in"]),
            ("b", (*shape[:stack], lora.rank, *shape[split:]), (*axes[:stack], "rank", *axes[split:]), 1),
        ):
            shapes[ADAPTER, *path, name] = jax.ShapeDtypeStruct(size, jnp.float32)
            declared[ADAPTER, *path, name] = {"axes": names, "n_in": n_in, **common}
    return unflatten_dict(shapes), declared


def init_adapter(abstract: Params, metadata: Metadata, key: jax.Array) -> Params:
    """Return the first values: A normal with deviation 1 / sqrt(inputs), B zero, so that the model starts unchanged.

    Args:
        abstract, metadata: as `abstract_adapter` returns them.
    """

    def first(path: Path, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        if path[-1] == "b":
            return jnp.zeros(leaf.shape, leaf.dtype)
        weight = metadata[path]
        inputs = leaf.shape[weight["n_stacked"] : -1]
        own_key = jax.random.fold_in(key, zlib.crc32("/".join(path).encode()))
        return standard_normal(own_key, leaf.shape) * math.prod(inputs) ** -0.5

    return unflatten_dict({path: first(path, leaf) for path, leaf in flatten_dict(abstract).items()})


def join_adapter(params: Params, lora: LoraConfig) -> Params:
    """Return the weights of the model, those with an adapter as `Adapted`; without adapters, the same weights."""
    if ADAPTER not in params:
        return params
    leaves, adapters = flatten_dict(without_adapter(params)), flatten_dict(params[ADAPTER])
    for path in {path[:-1] for path in adapters}:
        leaves[path] = Adapted(leaves[path], adapters[*path, "a"], adapters[*path, "b"], lora.scale)
    return unflatten_dict(leaves)


def merge_adapter(params: Params, lora: LoraConfig, metadata: Metadata) -> Params:
    """Return the float32 weights of the model that computes the same without adapters: W + alpha / rank * A B.

    Args:
        metadata: of the model, by path.
    """
    leaves = flatten_dict(join_adapter(params, lora))

    def whole(path: Path, weight: Weight) -> jax.Array:
        made = merge(weight, metadata[path]["n_stacked"]) if isinstance(weight, Adapted) else dense(weight)
        return made.astype(jnp.float32)

    return unflatten_dict({path: whole(path, weight) for path, weight in leaves.items()})


def without_adapter(params: Params) -> Params:
    """Return the weights of the model that is adapted."""
    return {name: part for name, part in params.items() if name != ADAPTER}
