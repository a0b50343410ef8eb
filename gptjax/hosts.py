"""The part of each host (process) in a run: the rows of the batch that it reads, the arrays that it gives to JAX,
which one writes the run's files, and how all of them reach one decision.

The rows of a host need not be contiguous, and several hosts have the same rows where they hold other parts of the
sequence or of the weights. So rows are always listed one by one.
"""

import itertools
from collections.abc import Callable, Mapping
from typing import TypeVar

import jax
import numpy as np
from jax._src import distributed  # the coordination service, which has no public name
from jax.sharding import Sharding

from gptjax.errors import UserError

Index = tuple[slice, ...]
Result = TypeVar("Result")

WRITER = 0  # the process that writes a run's files, except the other processes' parts of checkpoints
LONGEST_WAIT_S = 7 * 24 * 3600  # for other processes; the watchdog ends a wait much earlier
_exchanges = itertools.count()


def rows_of_hosts(sharding: Sharding, shape: tuple[int, ...]) -> dict[int, np.ndarray]:
    """Return the rows of a global batch that the devices of each process hold.

    Args:
        sharding: the batch's; a row is one index of its first dimension.
        shape: the shape of one of the batch's arrays.

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
    """Return `rows_of_hosts` of this process."""
    return rows_of_hosts(sharding, shape)[jax.process_index()]


def part_of(local: np.ndarray, rows: np.ndarray, index: Index) -> np.ndarray:
    """Return the part of the global array at `index`, cut from the rows that a host has read.

    Args:
        local: [len(rows), ...], the host's rows.
        rows: their indices in the global array, ascending.
        index: a device's shard; its first slice has consecutive rows, all of them among `rows`.
    """
    first, *rest = index
    start = 0 if first.start is None else first.start
    at = int(np.searchsorted(rows, start))
    count = len(rows) if first.stop is None else first.stop - start
    return local[(slice(at, at + count), *rest)]


def global_batch(
    local: Mapping[str, np.ndarray], rows: np.ndarray, sharding: Sharding, batch_sequences: int
) -> dict[str, jax.Array]:
    """Return the global batch, with the rows that this host has read placed on its devices.

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


def is_writer() -> bool:
    """Return whether this process writes the run's files: config, environment, metrics, pictures."""
    return jax.process_index() == WRITER


def exchange(text: str | None) -> dict[int, str]:
    """Return what each process gave (process index -> text, without those that gave None); all of them must call.

    It uses JAX's coordination service: no device is involved, and a slow process keeps the others waiting.
    """
    if jax.process_count() == 1:
        return {} if text is None else {0: text}
    client, folder = distributed.global_state.client, f"gptjax/exchange/{next(_exchanges)}"
    if text is not None:
        client.key_value_set(f"{folder}/{jax.process_index()}", text)
    client.wait_at_barrier(folder, LONGEST_WAIT_S * 1000)
    return {int(key.rpartition("/")[2]): value for key, value in client.key_value_dir_get(f"{folder}/")}


def from_writer(make: Callable[[], str]) -> str:
    """Return, on every process, what the writer's process makes; all of them must call."""
    return exchange(make() if is_writer() else None)[WRITER]


def together(work: Callable[[], Result]) -> Result:
    """Return work(), unless it raises a UserError on some process; all processes must call.

    Args:
        work: must not call a collective function of this module itself, or the exchanges would be mixed up.

    Raises:
        UserError: that of the first process that raised one, on every process. (Any other error ends its own
            process, and thereby the others.)
    """
    result, problem = None, None
    try:
        result = work()
    except UserError as error:
        problem = str(error)
    if problems := exchange(problem):
        process = min(problems)
        raise UserError(problems[process] + (f" (process {process})" if jax.process_count() > 1 else ""))
    return result  # type: ignore[return-value]


def writer_first(work: Callable[[], Result]) -> Result:
    """Return work(), run by the writer's process before the others, which find its files on a shared disk.

    Raises:
        UserError: as `together`.
    """
    first = together(work) if is_writer() else together(lambda: None)
    return together(lambda: first) if is_writer() else together(work)  # type: ignore[return-value]


def check_same(name: str, text: str) -> None:
    """Raise UserError, on every process, unless all processes give the same text; all of them must call."""
    found = exchange(text)
    other = next((process for process in sorted(found) if found[process] != found[WRITER]), None)
    if other is not None:
        raise UserError(f"{name} on process {other} differs from that on process {WRITER}; give all hosts the same")
