"""Recognise steps that must not be taken: a loss or a gradient that is not finite, or far above its recent mean."""

import jax
import jax.numpy as jnp

WINDOW_STEPS = 100  # over which means and deviations are taken; before so many steps nothing is a spike
# A deviation counts at least as so much: of the mean; and of the loss, in its own unit.
LEAST_OF_MEAN = 0.3
LEAST_OF_LOSS = 0.05
STATISTICS = 5  # of one state: steps counted; running means of the loss, its square, the gradient's norm, its square


def first_statistics() -> jax.Array:
    """Return the statistics before the first step, float32 [STATISTICS]."""
    return jnp.zeros(STATISTICS, jnp.float32)


def judge_step(
    statistics: jax.Array, loss: jax.Array, grad_norm: jax.Array, deviations: float | None
) -> tuple[jax.Array, jax.Array]:
    """Return whether to take a step, and the statistics after it.

    A step is not taken where its loss or its gradient's norm is not finite, or lies more than `deviations` standard
    deviations above the running mean (weights 1 - 1 / WINDOW_STEPS). A spike counts in the statistics as if it lay
    just at the limit, so that a level that stays is soon accepted.

    Args:
        statistics: float32 [STATISTICS].
        loss, grad_norm: of the step, float32 scalars.
        deviations: None accepts every finite step.

    Returns:
        bool scalar; float32 [STATISTICS].
    """
    values = jnp.stack([loss, grad_norm])
    count, means, squares = statistics[0], statistics[1::2], statistics[2::2]
    # By scalars: a reduction of both at once made the TPU compiler move a seventh more through HBM in small steps.
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    if deviations is None:
        return finite, statistics
    spread = jnp.sqrt(jnp.maximum(squares - means**2, 0.0))
    spread = jnp.maximum(spread, LEAST_OF_MEAN * jnp.abs(means))
    limits = means + deviations * jnp.maximum(spread, jnp.array([LEAST_OF_LOSS, 0.0]))
    limits = jnp.where(count >= WINDOW_STEPS, limits, jnp.inf)
    counted = jnp.where(finite, jnp.minimum(values, limits), means)
    weight = jnp.maximum(1 / (count + 1), 1 / WINDOW_STEPS)  # a plain mean first
    means = means + weight * (counted - means)
    squares = squares + weight * (jnp.where(finite, counted**2, squares) - squares)
    after = jnp.concatenate([(count + finite)[None], jnp.stack([means, squares], axis=1).reshape(-1)])
    return finite & (loss <= limits[0]) & (grad_norm <= limits[1]), after
