"""What each host of a cluster that is not here does in a run: which rows and bytes it reads, and what it writes."""

import itertools
import math
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from gptjax.apps.plan.analytic import resolve_mesh
from gptjax.apps.plan.chips import Topology
from gptjax.config import Config
from gptjax.convert import teacher_config
from gptjax.hosts import WRITER, rows_of_hosts
from gptjax.sharding import make_mesh
from gptjax.shell.display import plural, size, table
from gptjax.step import make_trainable

HOST_CHIPS = 2  # along x and along y, of a TPU host; it has one layer of z
BATCH_BYTES = {"tokens": 4, "targets": 4, "weights": 4}  # of an element
WRITER_FILES = ("config.yaml", "env.json", "metrics.jsonl", "outcome.json", "loss.png", "checkpoints/STEP/meta")


@dataclass(frozen=True, eq=False)
class PlannedDevice:
    """What the mesh and the shardings ask of a device, for one that is not here."""

    id: int
    process_index: int
    slice_index: int
    platform: str
    device_kind: str
    coords: tuple[int, ...]
    core_on_chip: int = 0


def planned_devices(topology: Topology) -> list[PlannedDevice]:
    """Return the chips of a topology, host by host, where libtpu puts them; of GPUs, a process a node."""
    if topology.chip.kind == "gpu":
        nodes, gpus = topology.shape[0] * topology.num_slices, topology.shape[1]
        return [
            PlannedDevice(i, i // gpus, i // gpus, "gpu", topology.chip.device_kind, (i % gpus, 0, 0))
            for i in range(nodes * gpus)
        ]
    across, down, *deep = topology.shape
    wide, high = min(HOST_CHIPS, across), min(HOST_CHIPS, down)
    # Hosts are counted along x, then y, then z; chips of a host likewise.
    corners = itertools.product(
        range(topology.num_slices), range(math.prod(deep)), range(0, down, high), range(0, across, wide)
    )
    chips = [
        (host, part, (x + dx, y + dy, z))
        for host, (part, z, y, x) in enumerate(corners)
        for dy, dx in itertools.product(range(high), range(wide))
    ]
    kind = topology.chip.device_kind
    return [PlannedDevice(i, host, part, "tpu", kind, coords) for i, (host, part, coords) in enumerate(chips)]


def describe_hosts(cfg: Config, topology: Topology) -> dict[str, Any]:
    """Return what each host of a run does, as plain values.

    Raises:
        UserError: the mesh does not fit the chips, or cannot cut the model or the batch.
    """
    axes, devices = resolve_mesh(cfg, topology), planned_devices(topology)
    slices = topology.num_slices if topology.chip.kind == "tpu" else cfg.mesh.slices
    t = make_trainable(cfg, make_mesh(axes, list(devices), slices), teacher_config(cfg))
    shape = (cfg.train.batch_sequences, cfg.model.context_length)
    rows = rows_of_hosts(t.batch_sharding, shape)
    readers = np.zeros(shape[0], int)
    for held in rows.values():
        readers[held] += 1
    token_bytes = 2 if (cfg.model.vocab_size or 0) <= 2**16 else 4
    placed = math.prod(t.batch_sharding.shard_shape(shape)) * sum(BATCH_BYTES.values())
    chips: dict[int, list[tuple[int, ...]]] = {}
    for device in devices:
        chips.setdefault(device.process_index, []).append(device.coords)
    hosts = [
        {
            "process": process,
            "chips": len(chips[process]),
            "first_chip": list(chips[process][0]),
            "rows": ranges(held),
            "row_count": len(held),
            "hosts_of_a_row": int(readers[held].max()),
            "read_bytes": len(held) * (shape[1] + 1) * token_bytes,
            "placed_bytes": placed * len(chips[process]),
            "writes": [*(WRITER_FILES if process == WRITER else ()), part_of_checkpoint(process)],
        }
        for process, held in rows.items()
    ]
    checkpoint = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(t.state))
    return {
        "topology": topology.name,
        "num_slices": topology.num_slices,
        "mesh": axes,
        "batch_sequences": shape[0],
        "checkpoint_bytes": checkpoint,
        "hosts": hosts,
    }


def part_of_checkpoint(process: int | str) -> str:
    """Return where a process writes its arrays, which Orbax joins when all have written."""
    return f"checkpoints/STEP/{{params,rest}}/ocdbt.process_{process}"


def ranges(rows: np.ndarray) -> list[list[int]]:
    """Return ascending indices as ranges, the last index of each included: [0, 1, 2, 6] is [[0, 2], [6, 6]]."""
    cuts = np.flatnonzero(np.diff(rows) > 1) + 1
    return [[int(part[0]), int(part[-1])] for part in np.split(rows, cuts)]


def report_hosts(described: dict[str, Any]) -> list[str]:
    """Return the lines that `gptjax plan --hosts` prints."""
    hosts, mesh = described["hosts"], " x ".join(f"{name}={n}" for name, n in described["mesh"].items() if n > 1)
    slices = f" x {described['num_slices']} slices" if described["num_slices"] > 1 else ""
    number = plural(len(hosts), "host")
    lines = [
        f"{described['config']} on {described['topology']}{slices}: {number}, mesh {mesh or 'one chip'}",
        f"of a step's {described['batch_sequences']:,} rows each host reads those of its chips and places its part:",
        "",
    ]
    rows = [
        (
            str(host["process"]),
            ",".join(map(str, host["first_chip"])),
            f"{host['chips']:,}",
            f"{host['row_count']:,}",
            size(host["read_bytes"]),
            size(host["placed_bytes"]),
            f"{host['hosts_of_a_row']:,}",
            " ".join(f"{first}-{last}" if last > first else f"{first}" for first, last in host["rows"]),
        )
        for host in hosts
    ]
    header = ("host", "first chip", "chips", "rows", "read", "placed", "hosts a row", "which rows")
    return [
        *lines,
        *table(rows, header, left=(1, -1)),
        "",
        f"host {WRITER} writes {', '.join(WRITER_FILES)}, and joins every checkpoint",
        f"host N writes {part_of_checkpoint('N')}, its part of {size(described['checkpoint_bytes'])}",
        "every host reads the token cache or the prepared data, and checks a share of a checkpoint before a restore",
    ]
