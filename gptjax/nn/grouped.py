"""Products of rows that are sorted by group, each group with a matrix of its own, as experts have.

On a TPU they are `jax.lax.ragged_dot`. Elsewhere XLA makes of that one product of all rows with every matrix, so a
loop over blocks of rows takes its place. Both compute as much as one product of all rows does, however unequal the
groups are.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

BLOCK_ROWS = 128  # of the loop: enough for a product at full speed
# Of x [R, D] and y [R, F], contracted over the rows of each group: [E, D, F].
CONTRACT_ROWS = jax.lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), [0], [])


def grouped_product(x: jax.Array, matrices: jax.Array, sizes: jax.Array) -> jax.Array:
    """Multiply each row by the matrix of its group; named "dot" for remat's policies.

    Args:
        x: [R, D], the rows of group 0 first, then those of group 1, and so on.
        matrices: [E, D, F], in x's dtype.
        sizes: rows of each group, [E] int32. Rows beyond their sum belong to no group.

    Returns:
        [R, F]; rows that belong to no group are 0.
    """
    return checkpoint_name(_grouped_product(x, matrices, sizes), "dot")


@jax.custom_vjp
def _grouped_product(x: jax.Array, matrices: jax.Array, sizes: jax.Array) -> jax.Array:
    return jax.lax.platform_dependent(x, matrices, sizes, tpu=_multiply_ragged, default=_multiply_blocks)


def _grouped_product_backward(saved, y_grad):
    x, matrices, sizes = saved
    x_grad = _grouped_product(y_grad, matrices.mT, sizes)
    matrices_grad = jax.lax.platform_dependent(x, y_grad, sizes, tpu=_contract_ragged, default=_contract_blocks)
    return x_grad, matrices_grad, None


_grouped_product.defvjp(
    lambda x, matrices, sizes: (_grouped_product(x, matrices, sizes), (x, matrices, sizes)),
    _grouped_product_backward,
)


def _multiply_ragged(x: jax.Array, matrices: jax.Array, sizes: jax.Array) -> jax.Array:
    in_a_group = jnp.arange(len(x)) < sizes.sum()  # what a kernel leaves in other rows is not defined
    return jnp.where(in_a_group[:, None], jax.lax.ragged_dot(x, matrices, sizes), 0)


def _contract_ragged(x: jax.Array, y: jax.Array, sizes: jax.Array) -> jax.Array:
    return jax.lax.ragged_dot_general(x, y, sizes, CONTRACT_ROWS)


def _multiply_blocks(x: jax.Array, matrices: jax.Array, sizes: jax.Array) -> jax.Array:
    def write(visit: Visit, y: jax.Array) -> jax.Array:
        made = visit.rows_of(x) @ matrices[visit.group]
        made = jnp.where(visit.belongs[:, None], made, visit.rows_of(y))
        return jax.lax.dynamic_update_slice_in_dim(y, made, visit.start, 0)

    return _visit_blocks(sizes, len(x), write, jnp.zeros((len(x), matrices.shape[-1]), x.dtype))


def _contract_blocks(x: jax.Array, y: jax.Array, sizes: jax.Array) -> jax.Array:
    def add(visit: Visit, sums: jax.Array) -> jax.Array:
        own = jnp.where(visit.belongs[:, None], visit.rows_of(x), 0)
        return sums.at[visit.group].add(jnp.matmul(own.T, visit.rows_of(y), preferred_element_type=jnp.float32))

    sums = jnp.zeros((len(sizes), x.shape[1], y.shape[1]), jnp.float32)
    return _visit_blocks(sizes, len(x), add, sums).astype(x.dtype)


class Visit(NamedTuple):
    """A block of rows and a group that has some of them.

    Attributes:
        group: the group's number.
        start: the block's first row.
        belongs: which of the block's rows are the group's, [b] bool.
    """

    group: jax.Array
    start: jax.Array
    belongs: jax.Array

    def rows_of(self, array: jax.Array) -> jax.Array:
        """Return the block's rows of an array [R, ...]."""
        return jax.lax.dynamic_slice_in_dim(array, self.start, len(self.belongs))


def _visit_blocks(
    sizes: jax.Array, n_rows: int, step: Callable[[Visit, jax.Array], jax.Array], first: jax.Array
) -> jax.Array:
    """Fold `step` over every pair of a block and a group that has rows of it, at most blocks + groups of them."""
    b = min(BLOCK_ROWS, n_rows)
    ends = jnp.cumsum(sizes)
    starts = ends - sizes
    blocks = jnp.where(sizes > 0, (ends - 1) // b - starts // b + 1, 0)
    visited = jnp.cumsum(blocks)  # visits of each group and of those before it

    def take(number: jax.Array, carry: jax.Array) -> jax.Array:
        group = (visited <= number).sum()
        block = starts[group] // b + number - (visited[group] - blocks[group])
        start = jnp.minimum(block * b, n_rows - b)
        rows = start + jnp.arange(b)
        belongs = (rows >= jnp.maximum(starts[group], block * b)) & (rows < ends[group])
        return step(Visit(group, start, belongs), carry)

    return jax.lax.fori_loop(0, visited[-1], take, first)
