"""Find devices that compute or store wrong values: compare bitwise what should be equal on several of them."""

import itertools
from collections import Counter
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.errors import CorruptDevice
from gptjax.fingerprint import hash_tree, make_hash_by_device
from gptjax.nn.transformer import Params
from gptjax.objectives import Batch
from gptjax.sharding import parts_of, sharding
from gptjax.step import Trainable, TrainState, make_gradient, on_mesh, shardings_of, split_frozen


def make_verify(t: Trainable) -> Callable[[TrainState, Batch], None]:
    """Return (state, batch) -> nothing, a check of all devices. It costs about two steps' gradients.

    The part of a weight that several devices hold is compared between them. The gradient of the rows of one data
    replica is computed twice by that replica, and once by the next one; each call takes the next pair of replicas.
    Raises CorruptDevice, which names the devices, on every process.
    """
    weights = shardings_of(t.state.params)
    hash_by_device = on_mesh(t.mesh, make_hash_by_device(t.mesh, weights))
    hash_gradient = make_hash_of_gradient(t)
    replicas = devices_by_rows(t)
    names = ["/".join(str(key.key) for key in path) for path, _ in jax.tree_util.tree_leaves_with_path(weights)]
    calls = itertools.count()

    def verify(state: TrainState, batch: Batch) -> None:
        hashes = np.asarray(hash_by_device(state.params))
        compare_replicas(t, hashes, names)
        n = len(replicas)
        first = next(calls) % n
        found = [int(hash_gradient(state.params, batch, jnp.int32(by))) for by in (first, first, (first + 1) % n)]
        if found[0] != found[1]:
            raise CorruptDevice(replicas[first], "computed the same gradient twice with different results")
        if found[2] != found[0]:
            third = int(hash_gradient(state.params, batch, jnp.int32((first + 2) % n)))
            wrong = {found[0]: [(first + 1) % n], found[2]: [first]}.get(third, [first, (first + 1) % n])
            devices = [device for replica in wrong for device in replicas[replica]]
            raise CorruptDevice(devices, "computed another gradient of the same rows than other replicas")

    return verify


def compare_replicas(t: Trainable, hashes: np.ndarray, names: list[str]) -> None:
    """Raise CorruptDevice where devices that hold the same part of a weight have different hashes.

    Args:
        hashes: [devices, leaves], in the order of the mesh's devices.
        names: of the leaves.
    """
    devices = list(t.mesh.devices.flat)
    for number, (name, leaf) in enumerate(zip(names, jax.tree.leaves(t.state.params), strict=True)):
        parts: dict[str, list[int]] = {}
        for device, index in leaf.sharding.devices_indices_map(leaf.shape).items():
            parts.setdefault(str(index), []).append(devices.index(device))
        for holders in parts.values():
            counts = Counter(int(hashes[holder, number]) for holder in holders).most_common()
            if len(counts) > 1:
                usual = counts[0][0] if counts[0][1] > counts[1][1] else None  # a tie accuses all
                wrong = [devices[holder] for holder in holders if int(hashes[holder, number]) != usual]
                raise CorruptDevice(wrong, f"of the replicas of {name} hold other bits than the rest")


def devices_by_rows(t: Trainable) -> list[list[jax.Device]]:
    """Return the devices that compute each block of the batch's rows, in the order of the rows."""
    shape = t.cfg.train.batch_sequences, t.cfg.model.context_length
    blocks: dict[int, list[jax.Device]] = {}
    for device, index in t.batch_sharding.devices_indices_map(shape).items():
        blocks.setdefault(index[0].start or 0, []).append(device)
    return [blocks[start] for start in sorted(blocks)]


def make_hash_of_gradient(t: Trainable) -> Callable[[Params, Batch, jax.Array], jax.Array]:
    """Return (weights, batch, replica) -> a hash of the gradient of the first replica's rows, computed by `replica`.

    Every replica gets these rows, and the others give theirs no weight: they add exact zeros.
    """
    gradient, n = make_gradient(t), parts_of(t.mesh, "batch")

    def compute(params: Params, batch: Batch, replica: jax.Array) -> jax.Array:
        trained, frozen = split_frozen(params, t.frozen)
        size = t.cfg.train.batch_sequences // n
        same = {name: jnp.tile(x[:size], (n, *[1] * (x.ndim - 1))) for name, x in batch.items()}
        by_replica = jnp.arange(n * size) // size == replica
        same["weights"] = jnp.where(by_replica[:, None], same["weights"], 0)
        same = {name: jax.lax.with_sharding_constraint(x, t.batch_sharding) for name, x in same.items()}
        _, grads = gradient(trained, frozen, same, None)
        return hash_tree(jax.tree.map(lambda g: jnp.where(g == 0, 0, g), grads))  # -0 is 0

    shardings = shardings_of(t.state.params), t.batch_sharding, sharding(t.mesh, ())
    return on_mesh(t.mesh, jax.jit(compute, in_shardings=shardings))
