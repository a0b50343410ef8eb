"""Recognise steps that must not be taken, or should not have been: a loss, a gradient or an update that is not
finite, or far above its recent mean.
"""

import jax
import jax.numpy as jnp
import numpy as np

WINDOW_STEPS = 100  # over which means and deviations are taken; before so many steps nothing is a spike
# A deviation counts at least as so much: of the mean; and of the loss, in its own unit.
LEAST_OF_MEAN = 0.3
LEAST_OF_LOSS = 0.05
# Of one state: steps counted; running means of the loss, its square, the gradient's norm, its square, the norm of the
# update without the learning rate, its square; steps skipped in a row; rollbacks in a row, and the step of the last.
STATISTICS = 10
UPDATES, SKIPS, ROLLBACKS, LAST_ROLLBACK = 5, 7, 8, 9


def first_statistics() -> jax.Array:
    """Return the statistics before the first step, float32 [STATISTICS]."""
    return jnp.zeros(STATISTICS, jnp.float32)


def judge_step(
    statistics: jax.Array, loss: jax.Array, grad_norm: jax.Array, deviations: float | None, most_skips: int
) -> tuple[jax.Array, jax.Array]:
    """Return whether to take a step, and the statistics after it.

    A step is not taken where its loss or its gradient's norm is not finite, or lies more than `deviations` standard
    deviations above the running mean (weights 1 - 1 / WINDOW_STEPS). A spike counts in the statistics as if it lay
    just at the limit, so that a level that stays is soon accepted. After `most_skips` skips in a row no step is
    taken until the run has rolled back (lifecycle/rollback.py).

    Args:
        statistics: float32 [STATISTICS].
        loss, grad_norm: of the step, float32 scalars.
        deviations: None accepts every finite step.

    Returns:
        bool scalar; float32 [STATISTICS].
    """
    values = jnp.stack([loss, grad_norm])
    count, means, squares = statistics[0], statistics[1:UPDATES:2], statistics[2:UPDATES:2]
    # By scalars: a reduction of both at once made the TPU compiler move a seventh more through HBM in small steps.
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    may = finite & (statistics[SKIPS] < most_skips)
    if deviations is None:
        return may, statistics.at[0].add(finite)
    limits = _limits(count, means, squares, deviations, jnp.array([LEAST_OF_LOSS, 0.0]))
    counted = jnp.where(finite, jnp.minimum(values, limits), means)
    weight = jnp.maximum(1 / (count + 1), 1 / WINDOW_STEPS)  # a plain mean first
    means = means + weight * (counted - means)
    squares = squares + weight * (jnp.where(finite, counted**2, squares) - squares)
    moved = jnp.stack([means, squares], axis=1).reshape(-1)
    after = jnp.concatenate([(count + finite)[None], moved, statistics[UPDATES:]])
    return may & (loss <= limits[0]) & (grad_norm <= limits[1]), after


def judge_update(
    statistics: jax.Array, taken: jax.Array, norm: jax.Array, deviations: float | None, most_skips: int
) -> jax.Array:
    """Return the statistics after a step that was taken or skipped.

    Skips in a row are counted. An update that was made, but is not finite or a spike, counts as `most_skips` of them:
    to undo it inside the step would take a second copy of the weights.

    Args:
        statistics: that `judge_step` has returned.
        norm: of the update without the learning rate, float32 scalar.
    """
    mean, square = statistics[UPDATES], statistics[UPDATES + 1]
    good = jnp.isfinite(norm)
    if deviations is not None:
        limit = _limits(statistics[0], mean, square, deviations, 0.0)
        counts = taken & good
        weight = jnp.where(counts, jnp.maximum(1 / statistics[0], 1 / WINDOW_STEPS), 0.0)
        counted = jnp.where(counts, jnp.minimum(norm, limit), 0.0)
        good &= norm <= limit
        mean, square = mean + weight * (counted - mean), square + weight * (counted**2 - square)
    skips = jnp.where(taken, jnp.where(good, 0.0, most_skips), statistics[SKIPS] + 1)
    return jnp.concatenate([statistics[:UPDATES], jnp.stack([mean, square, skips]), statistics[ROLLBACKS:]])


def was_taken(statistics: np.ndarray, step: int) -> bool:
    """Return whether the step was taken, and neither skipped nor followed by a rollback."""
    return bool(statistics[SKIPS] == 0 and statistics[LAST_ROLLBACK] < step)


def _limits(
    count: jax.Array, means: jax.Array, squares: jax.Array, deviations: float, least: jax.Array | float
) -> jax.Array:
    """Return the values above which the next ones are spikes."""
    spread = jnp.sqrt(jnp.maximum(squares - means**2, 0.0))
    spread = jnp.maximum(spread, LEAST_OF_MEAN * jnp.abs(means))
    return jnp.where(count >= WINDOW_STEPS, means + deviations * jnp.maximum(spread, least), jnp.inf)
