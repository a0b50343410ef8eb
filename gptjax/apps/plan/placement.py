"""Find which rows each chip of a topology reads and which weights it holds, as `sharding.make_mesh` places them."""

import math

import numpy as np

from gptjax.apps.plan.chips import Topology
from gptjax.apps.plan.hosts import PlannedDevice, planned_devices
from gptjax.config import Config
from gptjax.figures.plan import Chip
from gptjax.sharding import make_mesh


def place_chips(cfg: Config, topology: Topology) -> list[Chip]:
    """Return every chip with its place on the page, its host, and its parts of the batch and of the weights."""
    mesh = make_mesh(cfg.mesh.axes, list(planned_devices(topology)), slices=cfg.mesh.slices)
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


def _place(device: PlannedDevice, topology: Topology) -> tuple[int, int]:
    """Return where a chip is drawn: the planes of a slice beside one another, the slices below."""
    if topology.chip.kind == "gpu":
        return device.id % topology.shape[-1], device.id // topology.shape[-1]
    i, j, k = device.coords
    x, y, z = (*topology.shape, 1, 1)[:3]
    side = math.ceil(math.sqrt(z))  # planes beside one another
    down = device.slice_index * math.ceil(z / side) + k // side
    return (k % side) * x + i, down * y + j
