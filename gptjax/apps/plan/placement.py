"""Find which rows each chip of a topology reads and which weights it holds, as `sharding.make_mesh` places them."""

import itertools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from gptjax.apps.plan.chips import Topology
from gptjax.config import Config
from gptjax.figures.plan import Chip
from gptjax.sharding import make_mesh

TPU_HOST = (2, 2, 1)  # chips of a TPU host along each dimension of a slice


@dataclass(frozen=True, eq=False)
class Device:
    """A stand-in for a JAX device, with the attributes that `make_mesh` reads."""

    id: int
    process_index: int
    slice_index: int
    platform: str
    device_kind: str
    coords: tuple[int, int, int] = (0, 0, 0)
    core_on_chip: int = 0


def devices_of(topology: Topology) -> list[Device]:
    """Return the chips of a topology, with the hosts that they lie in: 2 x 2 chips of a TPU, or a node of GPUs."""
    kind, shape = topology.chip.device_kind, topology.shape
    if topology.chip.kind == "gpu":
        per_host = shape[-1]
        return [Device(i, i // per_host, i // per_host, "gpu", kind) for i in range(topology.n_chips)]
    x, y, z = (*shape, 1, 1)[:3]
    hosts = [math.ceil(size / beside) for size, beside in zip((x, y, z), TPU_HOST, strict=True)]
    made = []
    for part in range(topology.num_slices):
        for k, j, i in itertools.product(range(z), range(y), range(x)):
            host = (k * hosts[1] + j // TPU_HOST[1]) * hosts[0] + i // TPU_HOST[0]
            process = part * math.prod(hosts) + host
            made.append(Device(len(made), process, part, "tpu", kind, (i, j, k)))
    return made


def place_chips(cfg: Config, topology: Topology) -> list[Chip]:
    """Return every chip with its place on the page, its host, and its parts of the batch and of the weights."""
    devices = devices_of(topology)
    mesh = make_mesh(cfg.mesh.axes, devices, slices=cfg.mesh.slices)
    axes = list(mesh.axis_names)
    sizes = dict(zip(axes, mesh.devices.shape, strict=True))
    placed = []
    for index, device in np.ndenumerate(mesh.devices):
        at = dict(zip(axes, index, strict=True))
        x, y = _place(device, topology)
        rows, weights = _part(at, sizes, ("data", "fsdp")), _part(at, sizes, ("pipeline", "fsdp", "expert", "tensor"))
        placed.append(Chip(x, y, device.process_index, rows, weights))
    return placed


def _part(at: dict[str, int], sizes: dict[str, int], axes: tuple[str, ...]) -> int:
    """Return the number of a chip's part, where these axes cut a whole into equal parts."""
    part = 0
    for axis in axes:
        part = part * sizes.get(axis, 1) + at.get(axis, 0)
    return part


def _place(device: Any, topology: Topology) -> tuple[int, int]:
    """Return where a chip is drawn: the planes of a slice beside one another, the slices below."""
    if topology.chip.kind == "gpu":
        return device.id % topology.shape[-1], device.id // topology.shape[-1]
    i, j, k = device.coords
    x, y, z = (*topology.shape, 1, 1)[:3]
    side = math.ceil(math.sqrt(z))  # planes beside one another
    down = device.slice_index * math.ceil(z / side) + k // side
    return (k % side) * x + i, down * y + j
