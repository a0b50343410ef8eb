"""Several adapters of one model in one program, so that each row of a batch draws by its own.

The adapters lie side by side along their rank: A is [*inputs, N R] and B [N R, *outputs] for N adapters of rank R. A
row takes its own part of x A and zeros of the others, so that what the others hold changes nothing in its result.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from gptjax.config import LoraConfig
from gptjax.nn.adapters import ADAPTER
from gptjax.nn.transformer import Params
from gptjax.nn.weights import Adapted
from gptjax.parametrization import Path

SplitParams = tuple[Params, list[Params]]  # as `transformer.split_layers` returns them


@partial(jax.tree_util.register_dataclass, data_fields=["base", "a", "b", "scale"], meta_fields=[])
@dataclass(frozen=True)
class RowAdapted(Adapted):
    """A weight with several adapters, of which each row of a batch takes one.

    Attributes:
        base: as in `Adapted`.
        a: [*inputs, N R].
        b: [N R, *outputs], times each adapter's scale.
        scale: [B, 1, N R], 1 in the part of the row's adapter and 0 elsewhere.
    """

    scale: Any


@partial(jax.tree_util.register_dataclass, data_fields=["base", "pairs"], meta_fields=["rank"])
@dataclass(frozen=True)
class AdapterStack:
    """A model's weights and the adapters of several models beside them. Number 0 is the model without adapters.

    Attributes:
        base: the model's weights.
        pairs: of each layer, A and B of every adapter by the path of their weight, as in `RowAdapted`.
        rank: of one adapter, R.
    """

    base: SplitParams
    pairs: list[dict[Path, tuple[jax.Array, jax.Array]]]
    rank: int

    def of_rows(self, numbers: jax.Array, dtype: str) -> SplitParams:
        """Return weights by which row i of a batch is multiplied with adapter numbers[i] (to be called inside jit).

        Args:
            numbers: [B] int32.
            dtype: of the activations.
        """
        a, _ = next(iter(self.pairs[0].values()))
        owner = 1 + jnp.arange(a.shape[-1], dtype=jnp.int32) // self.rank
        scale = (owner == numbers[:, None]).astype(dtype)[:, None]
        return self._joined(lambda base, a, b: RowAdapted(base, a, b, scale))

    def of_one(self, number: jax.Array | int) -> SplitParams:
        """Return weights of which all rows are multiplied with one adapter."""
        start = jnp.maximum(number - 1, 0) * self.rank

        def take(base: Any, a: jax.Array, b: jax.Array) -> Adapted:
            own_a = jax.lax.dynamic_slice_in_dim(a, start, self.rank, axis=a.ndim - 1)
            own_b = jax.lax.dynamic_slice_in_dim(b, start, self.rank, axis=0)
            return Adapted(base, own_a, own_b * (number > 0), 1.0)

        return self._joined(take)

    def _joined(self, join) -> SplitParams:
        rest, layers = self.base
        joined = []
        for layer, pairs in zip(layers, self.pairs, strict=True):
            leaves = flatten_dict(layer)
            for path, pair in pairs.items():
                leaves[path] = join(leaves[path], *pair)
            joined.append(unflatten_dict(leaves))
        return rest, joined


def stack_adapters(base: SplitParams, adapters: Sequence[tuple[LoraConfig, Params]]) -> AdapterStack:
    """Return a model with adapters beside it, numbered from 1.

    Args:
        base: weights of a model without experts.
        adapters: the config of each, and its values as `adapters.abstract_adapter` lays them out. A smaller rank than
            the largest is filled with zeros, as is a weight that only other adapters have.
    """
    rank = max(lora.rank for lora, _ in adapters)
    given = [(lora, flatten_dict(values[ADAPTER])) for lora, values in adapters]
    paths = sorted({path[:-1] for _, leaves in given for path in leaves})
    pairs: list[dict[Path, tuple[jax.Array, jax.Array]]] = [{} for _ in base[1]]
    for path in paths:
        a, b = (_side_by_side(given, path, name, rank) for name in "ab")
        for layer, own in enumerate(pairs):
            own[path[1:]] = jnp.asarray(a[layer]), jnp.asarray(b[layer])
    return AdapterStack(base, pairs, rank)


def _side_by_side(given: Sequence[tuple[LoraConfig, dict]], path: Path, name: str, rank: int) -> np.ndarray:
    """Return A or B of one weight for all layers: [L, *inputs, N R] or [L, N R, *outputs]."""
    axis = -1 if name == "a" else 1
    shape = next(list(leaves[*path, name].shape) for _, leaves in given if (*path, name) in leaves)
    shape[axis] = rank
    parts = []
    for lora, leaves in given:
        part = np.zeros(shape, np.float32)
        if (*path, name) in leaves:
            values = np.asarray(leaves[*path, name]) * (lora.scale if name == "b" else 1)
            np.moveaxis(part, axis, 0)[: lora.rank] = np.moveaxis(values, axis, 0)
        parts.append(part)
    return np.concatenate(parts, axis=axis)


def for_rows(weights: SplitParams | AdapterStack, numbers: jax.Array, dtype: str) -> SplitParams:
    """Return `AdapterStack.of_rows`, or plain weights as they are."""
    return weights.of_rows(numbers, dtype) if isinstance(weights, AdapterStack) else weights


def for_one(weights: SplitParams | AdapterStack, number: jax.Array | int) -> SplitParams:
    """Return `AdapterStack.of_one`, or plain weights as they are."""
    return weights.of_one(number) if isinstance(weights, AdapterStack) else weights
