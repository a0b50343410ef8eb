"""Hashes of arrays, computed where the arrays lie: equal on every mesh, and different after any flipped bit."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

# Odd, so that a multiplication by one of them loses no bit; from the finaliser of MurmurHash3 (A. Appleby, 2011).
FIRST, SECOND, POSITION = 0x85EBCA6B, 0xC2B2AE35, 0x9E3779B1


def hash_array(x: jax.Array) -> jax.Array:
    """Return a hash of an array's bits and their positions, uint32 scalar.

    It is a sum modulo 2^32, so the order of addition, and with it the sharding, changes nothing. One element that
    changes always changes it.
    """
    unsigned = jnp.dtype(f"uint{8 * x.dtype.itemsize}")
    bits = jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)
    position, stride = jnp.zeros((), jnp.uint32), 1
    for axis in reversed(range(x.ndim)):
        position = position + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * jnp.uint32(stride % 2**32)
        stride *= x.shape[axis]
    mixed = (bits ^ (position * jnp.uint32(POSITION))) * jnp.uint32(FIRST)
    mixed = (mixed ^ (mixed >> 15)) * jnp.uint32(SECOND)
    return (mixed ^ (mixed >> 13)).sum(dtype=jnp.uint32)


@jax.jit
def hash_tree(tree: Any) -> jax.Array:
    """Return one hash of all arrays of a tree, uint32 scalar."""
    total = jnp.zeros((), jnp.uint32)
    for leaf in jax.tree.leaves(tree):
        total = total * jnp.uint32(POSITION) + hash_array(leaf)
    return total


def make_hash_by_device(mesh: Mesh, shardings: Any) -> Callable[[Any], jax.Array]:
    """Return tree -> hashes [devices, leaves] uint32 of the part of each leaf that each device of the mesh holds.

    Devices that should hold the same part have the same hash, unless a bit of one of them has changed.

    Args:
        shardings: a tree of the arrays' shardings on the mesh.
    """
    specs = jax.tree.map(lambda one: one.spec, shardings)
    axes = tuple(mesh.axis_names)

    def local(tree: Any) -> jax.Array:
        return jnp.stack([hash_array(leaf) for leaf in jax.tree.leaves(tree)])[None]

    mapped = jax.shard_map(local, mesh=mesh, in_specs=(specs,), out_specs=PartitionSpec(axes), check_vma=False)
    whole = jax.sharding.NamedSharding(mesh, PartitionSpec())
    return jax.jit(mapped, in_shardings=(shardings,), out_shardings=whole)
