"""Run train.py as one host of a TPU cluster that is not here, on virtual devices of a CPU:

    python tests/pod/host.py PLACE [train.py's arguments]

PLACE is one of places.PLACES. The mesh is laid as the coordinates there ask; nothing else of the run is changed.
Where POD_BATCHES names a folder, this host's part of every global batch is written there; where POD_NO_MEMORY names
this process, it has no memory for a restore. With POD_CLOCKS, the clock of host n is n times so many seconds ahead.
"""

import os
import sys
import time
from pathlib import Path

import numpy as np
from places import devices_of

from gptjax import checkpoint, cli, hosts, sharding
from gptjax.configfile import load_config

place, *arguments = sys.argv[1:]
lay_out = sharding.create_device_mesh
place_batch = hosts.global_batch


def lay_out_as_there(shape, devices, **options):
    """Return the mesh's devices in the order that JAX gives those of the place, host by host."""
    by_process = sorted(devices, key=lambda device: (device.process_index, device.id))
    real = dict(zip(devices_of(place), by_process, strict=True))
    laid = lay_out(shape, list(real), **options)
    return np.vectorize(real.get, otypes=[object])(laid)


def place_and_note(local, rows, of, batch_sequences):
    """Place a batch as ever, and write this host's shards of it to a file."""
    import jax

    batch = place_batch(local, rows, of, batch_sequences)
    own = Path(os.environ["POD_BATCHES"]) / f"process-{jax.process_index()}"
    own.mkdir(exist_ok=True, parents=True)
    arrays = {
        "/".join([name, *(f"{part.start or 0}" for part in shard.index)]): np.asarray(shard.data)
        for name, array in batch.items()
        for shard in array.addressable_shards
    }
    np.savez(own / f"{len(list(own.iterdir()))}.npz", **arrays)
    return batch


def lack_memory(*_):
    raise MemoryError("no memory for a restore")


own_number = next((word.partition("process_id=")[2] for word in arguments if "process_id" in word), "0")
if os.environ.get("POD_NO_MEMORY") == own_number:
    checkpoint.Checkpoints.restore = lack_memory
if "POD_CLOCKS" in os.environ:
    ahead_s, clock = int(own_number) * int(os.environ["POD_CLOCKS"]), time.time
    time.time = lambda: clock() + ahead_s
sharding.create_device_mesh = lay_out_as_there
if "POD_BATCHES" in os.environ:
    hosts.global_batch = place_and_note
assert load_config(arguments).mesh.slices == 1, "the hosts of a place with slices are not laid out here"
sys.exit(cli.train(arguments))
