"""What Muon's orthogonal updates cost a device in a step."""

import math
from collections import defaultdict
from functools import lru_cache
from typing import NamedTuple

from jax.sharding import AbstractMesh

from gptjax.config import ModelConfig, OptimConfig
from gptjax.muon import STEPS, Reading
from gptjax.nn.transformer import abstract_model, leaf_at
from gptjax.optim import is_frozen, treat
from gptjax.sharding import parts_of

F32 = 4


class OrthogonalCosts(NamedTuple):
    """The costs of one device.

    Attributes:
        flops: of the device that receives most matrices.
        sent_bytes: bytes that it sends, to deal the matrices out and to return them.
    """

    flops: float = 0.0
    sent_bytes: float = 0.0


@lru_cache(maxsize=64)
def orthogonal_costs(
    model: ModelConfig, optimizer: str, freeze: tuple[str, ...], axes: tuple[tuple[str, int], ...]
) -> OrthogonalCosts:
    """Return what `muon.scale_by_muon` costs on a mesh of these axes; nothing where no weight is Muon's.

    Args:
        optimizer, freeze: `optim.name` and `optim.freeze`.
        axes: of the mesh, by name.

    An iteration multiplies [n, m] by [m, n], [n, n] by itself and the sum by [n, m]: 4 n^2 m + 2 n^3 FLOPs.
    """
    optim = OptimConfig(name=optimizer, freeze=freeze)
    names, sizes = zip(*axes, strict=True)
    mesh, (_, params, metadata) = AbstractMesh(sizes, names), abstract_model(model)
    n_matrices: defaultdict[tuple[int, int, int], float] = defaultdict(float)
    sent = 0.0
    for path, weight in metadata.items():
        if treat(optim, path, weight).group.rule != "muon" or is_frozen(optim, weight):
            continue
        shape, stack, logical = leaf_at(params, path).shape, weight["n_stacked"], weight["axes"]
        (rows, row_axes), (columns, column_axes) = Reading(shape, weight, turns=True).sides
        parts = [math.prod(parts_of(mesh, axis) for axis in side) for side in (row_axes, column_axes)]
        n_held = math.prod(shape[:stack]) / math.prod(parts_of(mesh, axis) for axis in logical[:stack])
        held = n_held * rows * columns * F32 / math.prod(parts)
        sent += 2 * held * sum((part - 1) / part for part in parts)
        n_matrices[rows, columns, math.prod(parts)] += n_held
    flops = sum(
        math.ceil(n_held / parts) * STEPS * (4 * min(n, m) ** 2 * max(n, m) + 2 * min(n, m) ** 3)
        for (n, m, parts), n_held in n_matrices.items()
    )
    return OrthogonalCosts(flops, sent)
