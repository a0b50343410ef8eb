"""A pipeline: the layers are cut into stages along the mesh axis "pipeline", and microbatches pass through them.

In every turn all stages compute, each for another microbatch, and hand their results on (Huang et al. 2019, arXiv
1811.06965). M microbatches through S stages take M + S - 1 turns, of which each stage is idle for S - 1.

All stages are one computation with a leading axis of stages, which the mesh cuts; what a stage computes while it is
idle is thrown away. Outside the blocks, each device along the axis has its share of the batch.

Letters: S stages, M microbatches, b sequences of one, T positions, D residual.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from gptjax.checks import divisors
from gptjax.nn.layers import Aux
from gptjax.sharding import constrain, mesh_size, parts_of, without_axis

AXIS = "pipeline"
MOST_PER_STAGE = 4  # microbatches for each stage, where none are asked for: a fifth of the turns is then idle at most

# (a stage's layers [L / S, ...], x [b, T, D], arrays by row [b, T], number of the microbatch) -> x, auxiliary values
Stage = Callable[[Any, jax.Array, dict[str, jax.Array], jax.Array], tuple[jax.Array, Aux]]


def count_microbatches(rows: int, asked: int | None, stages: int, parts: int) -> int:
    """Return into how many microbatches the pipeline cuts so many sequences.

    Args:
        asked: run.pipeline_microbatches; None: the most, up to MOST_PER_STAGE a stage, that the mesh can divide.
        parts: into how many the mesh cuts a microbatch.
    """
    most = MOST_PER_STAGE * stages
    return asked or max((n for n in divisors(rows) if n <= most and rows // n % parts == 0), default=1)


def pass_stages(
    stage: Stage, layers: Any, x: jax.Array, by_row: dict[str, jax.Array], n_microbatches: int | None
) -> tuple[jax.Array, Aux]:
    """Apply all layers to x [B, T, D], in stages.

    Args:
        layers: arrays [L, ...].
        by_row: arrays [B, T] that belong to the rows of x.
        n_microbatches: as `count_microbatches` is asked for.

    Returns:
        x; and the auxiliary values, summed over stages and microbatches.
    """
    S, parts = mesh_size(AXIS), parts_of(jax.sharding.get_abstract_mesh(), "microbatch")
    M = count_microbatches(len(x), n_microbatches, S, parts)
    layers = jax.tree.map(lambda array: array.reshape(S, -1, *array.shape[1:]), layers)
    given = {"x": x, **by_row}
    incoming = {name: split(array, M) for name, array in given.items()}
    stages = jnp.arange(S)

    def turn(held: dict[str, jax.Array], number: jax.Array) -> tuple[dict[str, jax.Array], Any]:
        new = {name: array[jnp.minimum(number, M - 1)] for name, array in incoming.items()}
        held = {name: place_first(held[name], new[name], stages) for name in held}
        rows = {name: array for name, array in held.items() if name != "x"}
        microbatches = number - stages
        with without_axis(AXIS):
            made, aux = jax.vmap(stage, spmd_axis_name=AXIS)(layers, held["x"], rows, microbatches)
        counted = (microbatches >= 0) & (microbatches < M)
        aux = jax.tree.map(lambda values: jnp.where(counted, values, 0).sum(), aux)
        # The last stage's result, given out along the pipeline as the batch is.
        is_last = (stages == S - 1).reshape(S, 1, 1, 1)
        result = constrain(jnp.where(is_last, made, 0).sum(0), "batch", "stream_length", "residual")
        handed_on = {name: jnp.roll(array, 1, axis=0) for name, array in {**rows, "x": made}.items()}
        return {name: on_stages(array) for name, array in handed_on.items()}, (result, aux)

    start = {name: on_stages(jnp.zeros((S, *array.shape[1:]), array.dtype)) for name, array in incoming.items()}
    _, (results, aux) = jax.lax.scan(turn, start, jnp.arange(M + S - 1))
    aux = jax.tree.map(lambda values: values.sum(0), aux)
    return join(results[S - 1 :]), aux


def split(array: jax.Array, n: int) -> jax.Array:
    """[B, ...] -> [n, B / n, ...]; microbatch i has the rows i, i + n, ... so that no row changes its device."""
    parts = jnp.moveaxis(array.reshape(-1, n, *array.shape[1:]), 1, 0)
    return constrain(parts, None, "batch", *[None] * (array.ndim - 1))


def join(parts: jax.Array) -> jax.Array:
    """Undo `split` for x: [n, B / n, T, D] -> [B, T, D]."""
    whole = jnp.moveaxis(parts, 0, 1).reshape(-1, *parts.shape[2:])
    return constrain(whole, "batch", "stream_length", "residual")


def place_first(held: jax.Array, new: jax.Array, stages: jax.Array) -> jax.Array:
    """Put a microbatch [b, ...] in the place of the first stage's in `held` [S, b, ...]."""
    is_first = (stages == 0).reshape(-1, *[1] * new.ndim)
    return on_stages(jnp.where(is_first, new[None], held))


def on_stages(held: jax.Array) -> jax.Array:
    """Constrain an array [S, b, T, ...] to the stages' devices."""
    return constrain(held, "stage", "microbatch", "stream_length", *[None] * (held.ndim - 3))
