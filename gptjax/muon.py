"""Muon: the momentum of each hidden matrix, made nearly orthogonal (Jordan et al. 2024).

A mesh cuts weights within their matrices, and every matmul of the iteration would gather those parts again. Therefore
matrices are dealt out. Those of one shape, of all weights and layers, are stacked. An all-to-all gives each device
whole matrices, which it orthogonalizes without the others; a second one returns the parts to where the weights lie. A
step sends each entry to one device and back. Gathering it for a matmul of the model sends it to every device.

Letters: N matrices, n rows, m columns.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AbstractMesh

from gptjax.parametrization import Metadata
from gptjax.sharding import on_one_device, spec

STEPS = 5  # of the iteration


class MuonState(NamedTuple):
    """The running sum of gradients, shaped like the weights."""

    momentum: optax.Updates


def scale_by_muon(decay: float, metadata: Metadata) -> optax.GradientTransformation:
    """Return Muon's transformation (Jordan et al. 2024, kellerjordan.github.io/posts/muon).

    Args:
        decay: of the momentum, used the Nesterov way.
        metadata: for reading a weight as a stack of matrices.
    """

    def init(params):
        return MuonState(optax.tree.zeros_like(params))

    def update(updates, state, params=None):
        del params
        momentum = jax.tree.map(lambda m, g: decay * m + (1 - decay) * g, state.momentum, updates)
        nesterov = jax.tree.map(lambda m, g: decay * m + (1 - decay) * g, momentum, updates)
        leaves, tree = jax.tree.flatten_with_path(nesterov)
        weights = [metadata[tuple(key.key for key in keys)] for keys, _ in leaves]
        orthogonal = _each_alone if on_one_device() else _dealt_out
        return tree.unflatten(orthogonal([x for _, x in leaves], weights)), MuonState(momentum)

    return optax.GradientTransformation(init, update)


def _each_alone(leaves: list[jax.Array], weights: list[dict[str, Any]]) -> list[jax.Array]:
    readings = [Reading(x.shape, weight) for x, weight in zip(leaves, weights, strict=True)]
    return [reading.undo(orthogonalize(reading.apply(x)), x) for x, reading in zip(leaves, readings, strict=True)]


def _dealt_out(leaves: list[jax.Array], weights: list[dict[str, Any]]) -> list[jax.Array]:
    mesh = jax.sharding.get_abstract_mesh()
    specs = tuple(spec(mesh, weight["axes"]) for weight in weights)
    readings = [Reading(x.shape, weight, turns=True) for x, weight in zip(leaves, weights, strict=True)]
    cuts = [tuple(_cutting_axes(mesh, axes) for _, axes in reading.sides) for reading in readings]
    kinds = [(cut, *(size for size, _ in reading.sides)) for cut, reading in zip(cuts, readings, strict=True)]

    def on_each_device(*parts: jax.Array) -> tuple[jax.Array, ...]:
        directions: dict[int, jax.Array] = {}
        for kind in dict.fromkeys(kinds):
            members = [i for i, other in enumerate(kinds) if other == kind]
            stacks = [readings[i].apply(parts[i]) for i in members]
            orthogonal = _deal(jnp.concatenate(stacks), cuts[members[0]])
            ends = np.cumsum([len(stack) for stack in stacks])
            for i, part in zip(members, jnp.split(orthogonal, ends[:-1]), strict=True):
                directions[i] = readings[i].undo(part, parts[i])
        return tuple(directions[i] for i in range(len(parts)))

    return jax.shard_map(on_each_device, in_specs=specs, out_specs=specs, check_vma=False)(*leaves)


def _cutting_axes(mesh: AbstractMesh, axes: tuple[str, ...]) -> tuple[str, ...]:
    """Return the mesh axes that cut dimensions of these logical axes."""
    return tuple(name for name in spec(mesh, axes) if name is not None and mesh.shape[name] > 1)


def _deal(matrices: jax.Array, cuts: tuple[tuple[str, ...], tuple[str, ...]]) -> jax.Array:
    """Orthogonalize matrices, of which each device has a part [N, n, m], and return that part of the result.

    Args:
        cuts: the mesh axes that cut the rows, and those that cut the columns.
    """
    N, hops = len(matrices), [(name, side) for side, names in enumerate(cuts, 1) for name in names]
    devices = math.prod(jax.lax.axis_size(name) for name, _ in hops)
    # XLA's CPU compiler would merge the padding into the exchange, and then refuse its own parts' layouts.
    matrices = jax.lax.optimization_barrier(jnp.pad(matrices, ((0, -N % devices), (0, 0), (0, 0))))
    for name, side in hops:
        matrices = jax.lax.all_to_all(matrices, name, split_axis=0, concat_axis=side, tiled=True)
    matrices = orthogonalize(matrices)
    for name, side in reversed(hops):
        matrices = jax.lax.all_to_all(matrices, name, split_axis=side, concat_axis=0, tiled=True)
    return matrices[:N]


class Reading:
    """How a weight, or a device's part of it, is read as a stack of matrices [N, n, m].

    Args:
        shape, weight: of the whole weight, and what its declaration says.
        turns: whether to transpose matrices that are tall, and square ones whose rows are not those that the blocks
            share ("embed"): the mesh then cuts the matrices of most weights alike.

    Attributes:
        sides: of the rows and of the columns, their number in the whole matrix, and their logical axes.
    """

    def __init__(self, shape: tuple[int, ...], weight: dict[str, Any], turns: bool = False):
        self._stacked, axes = weight["n_stacked"], weight["axes"]
        self._split = split = self._stacked + weight["n_in"]
        inputs = math.prod(shape[self._stacked : split]), axes[self._stacked : split]
        outputs = math.prod(shape[split:]), axes[split:]
        self._factor = max(1.0, outputs[0] / inputs[0]) ** 0.5
        self._turned = turns and (inputs[0] > outputs[0] or (inputs[0] == outputs[0] and "embed" not in inputs[1]))
        self.sides = (outputs, inputs) if self._turned else (inputs, outputs)

    def apply(self, x: jax.Array) -> jax.Array:
        """Return the matrices of the weight's array, or of a part of it."""
        matrices = x.reshape(-1, math.prod(x.shape[self._stacked : self._split]), math.prod(x.shape[self._split :]))
        return matrices.mT if self._turned else matrices

    def undo(self, matrices: jax.Array, x: jax.Array) -> jax.Array:
        """Return the direction of x: its orthogonal matrices times sqrt(max(1, outputs / inputs))."""
        return ((matrices.mT if self._turned else matrices) * self._factor).reshape(x.shape)


def orthogonalize(x: jax.Array) -> jax.Array:
    """Bring the singular values of [..., n, m] near 1, keeping the singular vectors.

    A quintic Newton-Schulz iteration, x <- a x + (b A + c A^2) x with A = x x^T. The coefficients maximise the
    slope at 0 and leave singular values within about [0.7, 1.2] (Jordan et al. 2024).
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    wide = x.shape[-1] >= x.shape[-2]
    x = x if wide else x.mT  # A is the smaller of the two products
    x = x / (jnp.linalg.norm(x, axis=(-2, -1), keepdims=True) + 1e-7)
    for _ in range(STEPS):
        A = x @ x.mT
        x = a * x + (b * A + c * A @ A) @ x
    return x if wide else x.mT
