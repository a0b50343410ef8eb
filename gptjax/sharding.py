"""The device mesh, and the one table that maps each logical axis to a mesh axis."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import jax
import numpy as np
from jax.experimental.mesh_utils import create_device_mesh
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from gptjax.checks import filled_axes
from gptjax.errors import UserError

# Logical axis -> mesh axis or axes. Weights and activations name their axes; nothing else knows the mesh.
AXIS_RULES: dict[str, str | tuple[str, ...] | None] = {
    # weights
    "layers": "pipeline",
    "vocab": "tensor",
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "mlp": "tensor",
    "position": None,
    "norm": None,
    "rank": None,  # of adapters
    "expert": "expert",
    "choice": None,  # of an expert, by a router
    # activations
    "batch": ("data", "fsdp", "expert", "pipeline"),
    "microbatch": ("data", "fsdp", "expert"),  # the sequences of one stage of a pipeline
    "stage": "pipeline",
    "length": "context",
    "part": (
        "data",
        "fsdp",
        "expert",
        "pipeline",
        "context",
    ),  # of the positions of all sequences, one for each device
    "stream_length": ("context", "tensor"),  # between a block's matmuls, where each position is independent
    "residual": None,
}


_used_outside: ContextVar[frozenset[str]] = ContextVar("used_outside", default=frozenset())


def make_mesh(axes: Mapping[str, int], devices: list[Any] | None = None, slices: int = 1) -> Mesh:
    """Return the mesh with these axis sizes, in this order; one size may be -1, for the remaining devices.

    Args:
        slices: number of groups of devices that the first axis spans; the other axes stay inside a group.

    Raises:
        UserError: the sizes do not multiply to the number of devices, or do not fit the slices.
    """
    devices = jax.devices() if devices is None else devices
    filled = filled_axes(axes, len(devices))
    if filled is None:
        fixed = int(np.prod([size for size in axes.values() if size != -1]))
        asked = ", ".join(f"{name}={size}" for name, size in axes.items() if size != 1)
        raise UserError(
            f"mesh {asked} needs a multiple of {fixed} devices and there are {len(devices)}; change mesh.* "
            "(-1 takes the remaining devices), or on a CPU set mesh.cpu_devices"
        )
    sizes = list(filled.values())
    found = len({getattr(d, "slice_index", 0) for d in devices})
    anywhere = (
        slices == 1 and devices[0].platform == "gpu"
    )  # JAX counts each GPU node as a slice, and NCCL connects them
    if sizes[0] % slices or not (found in (1, slices) or anywhere):
        raise UserError(
            f"mesh.slices {slices} must divide mesh.{next(iter(axes))} {sizes[0]}, and the devices are in {found}; "
            f"set mesh.slices {found} and make mesh.{next(iter(axes))} a multiple of it"
        )
    devices = sorted(devices, key=lambda d: (getattr(d, "slice_index", 0), d.process_index))
    per_slice, names = len(devices) // slices, tuple(axes)
    shape = (sizes[0] // slices, *sizes[1:])
    parts = [
        create_device_mesh(shape, devices[i : i + per_slice], allow_split_physical_axes=True)
        for i in range(0, len(devices), per_slice)
    ]
    # Auto: the compiler shards what the constraints leave open. (The default, Explicit, types every array.)
    return Mesh(np.concatenate(parts), names, axis_types=(AxisType.Auto,) * len(sizes))


def spec(mesh: Mesh | AbstractMesh, axes: tuple[str | None, ...]) -> PartitionSpec:
    """Return the PartitionSpec of an array with these logical axes (None: not named, so not sharded).

    A mesh axis that the mesh lacks shards nothing.
    """
    return PartitionSpec(*(_entry(mesh, axis) for axis in axes))


def _entry(mesh: Mesh | AbstractMesh, axis: str | None) -> str | tuple[str, ...] | None:
    names = () if axis is None else tuple(name for name in _mesh_axes(axis) if name in mesh.shape)
    return names[0] if len(names) == 1 else names or None


def sharding(mesh: Mesh, axes: tuple[str | None, ...]) -> NamedSharding:
    """Return `spec` on a mesh."""
    return NamedSharding(mesh, spec(mesh, axes))


def _mesh_axes(axis: str) -> tuple[str, ...]:
    names = AXIS_RULES[axis] or ()
    names = (names,) if isinstance(names, str) else names
    return tuple(name for name in names if name not in _used_outside.get())


@contextmanager
def without_axis(name: str) -> Iterator[None]:
    """Leave a mesh axis out of all rules: what is traced inside is one part of what the axis has cut."""
    token = _used_outside.set(_used_outside.get() | {name})
    try:
        yield
    finally:
        _used_outside.reset(token)


def parts_of(mesh: Mesh | AbstractMesh, axis: str) -> int:
    """Return how many parts the mesh cuts a dimension of this logical axis into."""
    return int(np.prod([mesh.shape.get(name, 1) for name in _mesh_axes(axis)]))


def mesh_size(name: str) -> int:
    """Return the size of an axis of the mesh that is set; 1 without a mesh, or without the axis."""
    return dict(jax.sharding.get_abstract_mesh().shape).get(name, 1)


def divides_into(size: int, axis: str) -> bool:
    """Return whether the mesh that is set cuts a dimension of this size and logical axis into equal parts."""
    return size % parts_of(jax.sharding.get_abstract_mesh(), axis) == 0


def check_divides(mesh: Mesh, what: str, size: int, axis: str) -> None:
    """Raise UserError where the mesh cannot cut a dimension of this logical axis into equal parts."""
    parts, names = parts_of(mesh, axis), _mesh_axes(axis)
    if size % parts:
        raise UserError(
            f"{what} {size} cannot be cut into {parts} equal parts by the mesh's {' x '.join(names)}; "
            f"make it a multiple of {parts}, or change mesh.*"
        )


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Constrain an activation's sharding, where a mesh is set (`jax.set_mesh`); elsewhere do nothing.

    A dimension that the mesh does not divide stays whole, such as the one token of a step of decoding.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    divided = (axis if _divides(mesh, size, axis) else None for size, axis in zip(x.shape, axes, strict=True))
    return jax.lax.with_sharding_constraint(x, spec(mesh, tuple(divided)))


def _divides(mesh: Mesh | AbstractMesh, size: int, axis: str | None) -> bool:
    return axis is None or size % parts_of(mesh, axis) == 0


def on_one_device() -> bool:
    """Return whether no mesh is set, or one of a single device."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.empty or mesh.size == 1


def by_shard(f: Callable[..., Any], inputs: tuple[tuple[str | None, ...], ...], output: tuple[str | None, ...]):
    """Return `f` on each device's part of arrays with these logical axes; without a mesh, `f` itself.

    An axis that the mesh does not divide in every array stays whole.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return f

    def run(*arrays: jax.Array | None) -> jax.Array:
        whole = {
            axis
            for array, axes in zip(arrays, inputs, strict=True)
            for size, axis in zip(() if array is None else array.shape, axes, strict=array is not None)
            if not _divides(mesh, size, axis)
        }
        specs = [spec(mesh, tuple(None if axis in whole else axis for axis in axes)) for axes in (*inputs, output)]
        return jax.shard_map(f, in_specs=tuple(specs[:-1]), out_specs=specs[-1], check_vma=False)(*arrays)

    return run
