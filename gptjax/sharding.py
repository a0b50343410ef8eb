"""The device mesh, and the one table that says which logical axis lies on which mesh axis."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from gptjax.errors import UserError

# Logical axis -> mesh axis or axes. Weights and activations name their axes; nothing else knows the mesh.
# `pipeline` and `expert` will be two more mesh axes, for "layers" and for an axis "experts".
RULES: dict[str, str | tuple[str, ...] | None] = {
    # weights
    "layers": None,
    "vocab": "tensor",
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "mlp": "tensor",
    "position": None,
    "norm": None,
    # activations
    "batch": ("data", "fsdp"),
    "length": "context",
    "residual": None,
}


def make_mesh(axes: Mapping[str, int], devices: list[Any] | None = None) -> Mesh:
    """The mesh with these axis sizes, in this order; one size may be -1, for what is left.

    Raises:
        UserError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    fixed = int(np.prod([size for size in axes.values() if size != -1]))
    sizes = [len(devices) // fixed if size == -1 else size for size in axes.values()]
    if int(np.prod(sizes)) != len(devices):
        asked = ", ".join(f"{name}={size}" for name, size in axes.items() if size != 1)
        raise UserError(
            f"mesh {asked} needs a multiple of {fixed} devices and there are {len(devices)}; change mesh.* "
            "(-1 takes what is left), or on a CPU set mesh.cpu_devices"
        )
    # Auto: the compiler places what the constraints leave open. (The default, Explicit, types every array.)
    return jax.make_mesh(sizes, tuple(axes), axis_types=(AxisType.Auto,) * len(sizes), devices=devices)


def spec(axes: tuple[str | None, ...]) -> PartitionSpec:
    """The partition of an array with these logical axes (None: not named, so not cut)."""
    return PartitionSpec(*(None if axis is None else RULES[axis] for axis in axes))


def sharding(mesh: Mesh, axes: tuple[str | None, ...]) -> NamedSharding:
    """`spec`, on a mesh."""
    return NamedSharding(mesh, spec(axes))


def check_divides(mesh: Mesh, what: str, size: int, axis: str) -> None:
    """Raise UserError where the mesh cannot cut a dimension of this logical axis into equal parts."""
    names = RULES[axis] or ()
    names = (names,) if isinstance(names, str) else names
    parts = int(np.prod([mesh.shape[name] for name in names]))
    if size % parts:
        raise UserError(
            f"{what} {size} cannot be cut into {parts} equal parts by the mesh's {' x '.join(names)}; "
            f"make it a multiple of {parts}, or change mesh.*"
        )


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Pin an activation's layout, where a mesh is set (`jax.set_mesh`); elsewhere do nothing."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec(axes))
