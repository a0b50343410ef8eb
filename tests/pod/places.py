"""The devices of clusters that are not here: coordinates, hosts and slices as recorded, for `make_mesh`."""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

RECORDED = json.loads(Path(__file__).with_name("topologies.json").read_text())
# Nodes of 8 GPUs, joined by a network: under one process a node, and under one process a GPU, as Slurm starts them.
GPU_NODES = {"h100:4x8": (4, 1), "h100:4x8, a process each": (4, 8), "h100:64x8": (64, 1), "h100:512x8": (512, 1)}
PLACES = [*RECORDED, *GPU_NODES]
TWO_A_HOST = ", two processes a host"  # may follow a recorded name


@dataclass(frozen=True, eq=False)
class Device:
    """What `make_mesh` and shardings ask of a device."""

    id: int
    process_index: int
    slice_index: int
    platform: str
    device_kind: str
    coords: tuple[int, int, int] = (0, 0, 0)
    core_on_chip: int = 0


@cache
def devices_of(place: str) -> tuple[Device, ...]:
    """Return the devices of one of PLACES, process by process."""
    if place in GPU_NODES:
        nodes, processes = GPU_NODES[place]
        per_process = 8 // processes
        return tuple(Device(i, i // per_process, i // 8, "gpu", "NVIDIA H100") for i in range(8 * nodes))
    found, per_host = RECORDED[place.removesuffix(TWO_A_HOST)], 2 if place.endswith(TWO_A_HOST) else 1
    beside = found["chips_of_a_host"]
    chips = [
        (host * per_host + chip * per_host // len(beside), part, (x + dx, y + dy, z + dz))
        for host, (part, x, y, z) in enumerate(found["hosts"])
        for chip, (dx, dy, dz) in enumerate(beside)
    ]
    where = (found["platform"], found["kind"])
    return tuple(Device(i, process, part, *where, coords) for i, (process, part, coords) in enumerate(chips))


def slices_of(place: str) -> int:
    """Return how many slices a place has; GPU nodes count as one, since a mesh may cross their network anywhere."""
    return 1 if place in GPU_NODES else RECORDED[place]["slices"]
