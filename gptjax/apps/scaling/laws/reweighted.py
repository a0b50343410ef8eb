"""Many fits of one law at once, to the same rows with other weights: what bootstraps and rows left out need."""

import numpy as np

from gptjax.apps.scaling.laws.parametric import DELTA, HuberObjective, Law, as_law, fit_law, huber

MOST_STEPS = 60  # fits take 5 to 20; one that takes more is fitted alone
DECREMENT = 1e-11  # a fit ends where a step would lower its objective by less than this share


def fit_reweighted(
    law: Law, params: np.ndarray, tokens: np.ndarray, loss: np.ndarray, weights: np.ndarray, delta: float = DELTA
) -> list[Law]:
    """Return the law fitted to the rows with each weighting, from the law of all rows.

    Newton's method on all fits at once, damped as Levenberg's. A fit that does not end is fitted by `fit_law`.

    Args:
        law: of the same rows with equal weights.
        params, tokens, loss: [n] each, positive.
        weights: [k, n], none negative.

    Raises:
        UserError: as `fit_law`.
    """
    objective = HuberObjective(params, tokens, loss, delta)
    start = [[*np.log([law.E, law.A, law.B]), law.alpha, law.beta]]
    thetas = np.repeat(objective.centered(start), len(weights), axis=0)
    going, damping = np.arange(len(weights)), np.full(len(weights), 1e-3)
    ended = np.zeros(len(weights), bool)
    terms = _terms(objective, thetas)
    values = _values(objective, terms[0], weights)
    for _ in range(MOST_STEPS):
        gradient, hessian, bound = _derivatives(objective, *terms, weights[going])
        scale = np.einsum("rii->ri", bound)[:, :, None] * np.eye(5)
        steps = np.linalg.solve(hessian + damping[going, None, None] * scale + 1e-12 * np.eye(5), gradient[..., None])
        tried = thetas[going] - np.clip(steps[..., 0], -0.5, 0.5)
        tried_terms = _terms(objective, tried)
        now = _values(objective, tried_terms[0], weights[going])
        better = now < values[going]
        fall = np.einsum("ri,ri->r", gradient, _solve(bound, gradient)) / 2
        ended[going] = fall <= DECREMENT * values[going] + len(loss) * 1e-24
        thetas[going[better]], values[going[better]] = tried[better], now[better]
        damping[going] = np.clip(np.where(better, damping[going] / 5, damping[going] * 5), 1e-9, 1e9)
        left = ~ended[going]
        terms = tuple(
            np.where(_as_shape(better, new), new, old)[left] for new, old in zip(tried_terms, terms, strict=True)
        )
        going = going[left]
        if not len(going):
            break
    return [
        as_law(HuberObjective(params, tokens, loss, delta, weight), theta)
        if end
        else fit_law(params, tokens, loss, delta, weight, start)
        for end, theta, weight in zip(ended, thetas, weights, strict=True)
    ]


def _terms(objective: HuberObjective, thetas: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the residuals of log loss [k, n], and each term's share of the loss [k, 3, n]."""
    exponents = np.stack([np.zeros(len(thetas)), thetas[:, 3], thetas[:, 4]], axis=1)
    log_terms = thetas[:, :3, None] + exponents[:, :, None] * objective.design
    top = log_terms.max(axis=1)
    shares = np.exp(log_terms - top[:, None])
    total = shares.sum(axis=1)
    return top + np.log(total) - objective.target, shares / total[:, None]


def _as_shape(of_fits: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Return an array [k] with as many axes as values [k, ...]."""
    return of_fits.reshape(-1, *(1,) * (values.ndim - 1))


def _values(objective: HuberObjective, residual: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the objective of each fit [k]."""
    return np.sum(weights * huber(residual, objective.delta), axis=1)


def _derivatives(
    objective: HuberObjective, residual: np.ndarray, shares: np.ndarray, weights: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return each fit's gradient [k, 5], its Hessian [k, 5, 5], and the curvature of `newton_decrement` [k, 5, 5].

    A residual is the log of a sum of exponentials u_i with du_i = slopes_i dtheta, so that its Hessian is
    sum_i share_i slopes_i slopes_i' - jacobian jacobian'.
    """
    delta, rows = objective.delta, residual.shape[1]
    slopes = np.zeros((3, 5, rows))
    slopes[[0, 1, 2], [0, 1, 2]] = 1.0
    slopes[[1, 2], [3, 4]] = objective.design[1:]
    products = np.einsum("ain,ajn->anij", slopes, slopes).reshape(3 * rows, 25)
    jacobian = np.concatenate([shares, shares[:, 1:] * objective.design[1:]], axis=1)
    pull = weights * np.clip(residual, -delta, delta)
    size = np.abs(residual)
    inner = weights * (size <= delta) - pull
    bent = ((pull[:, None] * shares).reshape(len(shares), -1) @ products).reshape(-1, 5, 5)
    hessian = (jacobian * inner[:, None]) @ jacobian.swapaxes(1, 2) + bent
    steepness = weights * np.minimum(1.0, delta / np.maximum(size, 1e-300))
    bound = (jacobian * steepness[:, None]) @ jacobian.swapaxes(1, 2)
    return np.einsum("kn,kin->ki", pull, jacobian), hessian, bound


def _solve(matrices: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    """Return the solutions [k, 5] of symmetric systems, without the directions that have no curvature."""
    return np.einsum("kij,kj->ki", np.linalg.pinv(matrices, rcond=1e-13, hermitian=True), vectors)
