"""What each host (process) of a run does: the rows of the batch that it reads, and what it hands to JAX.

A mesh gives a host rows that need not be contiguous, and several hosts the same rows where they hold other parts of
the sequence or of the weights. So rows are always named one by one.
"""

from collections.abc import Mapping

import jax
import numpy as np
from jax.sharding import Sharding

Index = tuple[slice, ...]


def rows_of_hosts(sharding: Sharding, shape: tuple[int, ...]) -> dict[int, np.ndarray]:
    """Return the rows of a global batch that the devices of each process hold.

    Args:
        sharding: of the batch; a row is one index of its first dimension.
        shape: of one of the batch's arrays.

    Returns:
        process index -> row indices, int64, ascending, each once.
    """
    spans: dict[int, set[tuple[int, int]]] = {}
    for device, index in sharding.devices_indices_map(shape).items():
        start, stop, _ = index[0].indices(shape[0])
        spans.setdefault(device.process_index, set()).add((start, stop))
    return {
        process: np.unique(np.concatenate([np.arange(*span) for span in held]))
        for process, held in sorted(spans.items())
    }


def rows_of_this_host(sharding: Sharding, shape: tuple[int, ...]) -> np.ndarray:
    """Return `rows_of_hosts` of the process that asks."""
    return rows_of_hosts(sharding, shape)[jax.process_index()]


def part_of(local: np.ndarray, rows: np.ndarray, index: Index) -> np.ndarray:
    """Return the part of the global array at `index`, out of the rows that a host has read.

    Args:
        local: [len(rows), ...], the host's rows.
        rows: their indices in the global array, ascending.
        index: of a device's shard; its first slice holds consecutive rows, all of them among `rows`.
    """
    first, *rest = index
    start = 0 if first.start is None else first.start
    at = int(np.searchsorted(rows, start))
    count = len(rows) if first.stop is None else first.stop - start
    return local[(slice(at, at + count), *rest)]


def global_batch(
    local: Mapping[str, np.ndarray], rows: np.ndarray, sharding: Sharding, batch_sequences: int
) -> dict[str, jax.Array]:
    """Place the rows that this host has read on its devices, as its part of the global batch.

    Args:
        local: arrays [len(rows), ...].
        rows: their indices, ascending, as `rows_of_this_host` gives them.
        sharding: of the global arrays [batch_sequences, ...].
    """
    if jax.process_count() == 1:
        return jax.device_put(dict(local), sharding)

    def whole(array: np.ndarray) -> jax.Array:
        shape = (batch_sequences, *array.shape[1:])
        return jax.make_array_from_callback(shape, sharding, lambda index: part_of(array, rows, index))

    return {name: whole(array) for name, array in local.items()}
