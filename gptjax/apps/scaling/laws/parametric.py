"""Laws of the loss, and how they are fitted: Chinchilla's parametric form, power laws, and over-training.

N counts weights, D training tokens, C floating-point operations of training; losses are nats per token.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.optimize import curve_fit, minimize, nnls

from gptjax.errors import UserError

DELTA = 1e-3  # of the Huber loss on log loss (Hoffmann et al. 2022, arXiv 2203.15556, section 3.3)
TOLERANCES = {"ftol": 1e-15, "gtol": 1e-11, "maxiter": 10_000, "maxfun": 50_000, "maxcor": 30}
EXPONENTS = (0.1, 0.25, 0.4, 0.6, 0.9, 1.5)  # where fits of alpha and of beta start

# From an optimum the objective falls by no more than this share of itself along a Newton step. Fits of 240 noisy rows
# end below 1e-15; on the mean of the Huber terms, scipy's own tolerances end them at 4e-5 and more.
CONVERGED = 1e-7
VANISHED = 1e-4  # an E below this share of the least loss is none: the rows do not determine it
KEPT_STARTS = 12  # of the grid of exponents, those whose objective is lowest


@dataclass(frozen=True)
class Law:
    """L(N, D) = E + A / N^alpha + B / D^beta (Hoffmann et al. 2022, equation 2).

    Attributes:
        objective: sum of the Huber terms on log loss over the rows fitted.
        converged: whether the fit ended in an optimum with positive exponents and an E that has not vanished.
        newton_decrement: by what share of itself the objective would still fall along a Newton step.
    """

    E: float
    A: float
    B: float
    alpha: float
    beta: float
    objective: float = 0.0
    converged: bool = True
    newton_decrement: float = 0.0

    def loss(self, params: np.ndarray | float, tokens: np.ndarray | float) -> np.ndarray | float:
        """Predicted loss of a model of `params` weights after `tokens` tokens."""
        return self.E + self.A / params**self.alpha + self.B / tokens**self.beta

    @property
    def exponent(self) -> float:
        """a of N* ~ C^a: beta / (alpha + beta); D* goes with 1 - a."""
        return self.beta / (self.alpha + self.beta)

    def optimum(self, flops: np.ndarray | float, per_param_token: float = 6.0) -> tuple[np.ndarray, np.ndarray]:
        """(N*, D*) of least loss where C = per_param_token N D (Hoffmann et al. 2022, equation 4)."""
        product = np.asarray(flops) / per_param_token
        ratio = (self.alpha * self.A / (self.beta * self.B)) ** (1 / (self.alpha + self.beta))
        best = ratio * product**self.exponent
        return best, product / best


def fit_law(
    params: np.ndarray,
    tokens: np.ndarray,
    loss: np.ndarray,
    delta: float = DELTA,
    weights: np.ndarray | None = None,
    starts: np.ndarray | None = None,
    tolerances: dict[str, float] = TOLERANCES,
    reduce: Callable[[np.ndarray], float] = np.sum,
) -> Law:
    """Fit the parametric law by the Huber loss of log residuals (Hoffmann et al. 2022, appendix D.3).

    The terms are summed: their mean is so small that default tolerances end the search at once, which is what went
    wrong in the original (Besiroglu et al. 2024, arXiv 2404.10102, section 3).

    Args:
        params, tokens, loss: [n] each, all positive.
        delta: where the Huber loss turns from square to straight.
        weights: [n], how much each row counts; None: one.
        starts: [k, 5] of (log E, log A, log B, alpha, beta) to start from; None: the best of a grid of exponents,
            each with the E, A, B that suit them.
        tolerances: options of scipy's L-BFGS-B.
        reduce: np.sum; np.mean exists to show that the check of convergence sees that mistake.

    Raises:
        UserError: fewer than six rows, or sizes or tokens that do not differ.
    """
    x, y, target = (np.log(np.asarray(v, dtype=np.float64)) for v in (params, tokens, loss))
    if len(x) < 6:
        raise UserError(f"{len(x)} rows are too few for a law of five parameters; give 6 or more")
    for name, values in (("params", x), ("tokens", y)):
        if np.ptp(values) < 0.1:
            raise UserError(f"{name} hardly differs between the rows; its exponent needs a range of sizes")
    weights = np.ones_like(x) if weights is None else weights
    middle = np.array([0.0, x.mean(), y.mean()])  # fitted about the middle, where the terms are of like size
    design = np.stack([np.zeros_like(x), -(x - middle[1]), -(y - middle[2])])
    share = reduce(np.ones_like(x)) / len(x)

    def terms(theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Residuals of log loss [n], and their Jacobian [n, 5], by log-sum-exp."""
        exponents = np.array([0.0, theta[3], theta[4]])
        parts = theta[:3, None] + exponents[:, None] * design
        top = parts.max(axis=0)
        shares = np.exp(parts - top)
        total = shares.sum(axis=0)
        shares /= total
        jacobian = np.concatenate([shares, (shares * design)[1:]]).T
        return top + np.log(total) - target, jacobian

    def objective(theta: np.ndarray) -> tuple[float, np.ndarray]:
        residual, jacobian = terms(theta)
        pull = share * weights * np.clip(residual, -delta, delta)
        return float(reduce(weights * _huber(residual, delta))), np.einsum("n,nk->k", pull, jacobian)

    if starts is None:
        grid = [_best_factors(a, b, design, target) for a, b in itertools.product(EXPONENTS, repeat=2)]
        starts = sorted(grid, key=lambda theta: objective(theta)[0])[:KEPT_STARTS]
    else:
        starts = np.array(starts, dtype=np.float64)
        starts[:, 1] -= starts[:, 3] * middle[1]
        starts[:, 2] -= starts[:, 4] * middle[2]
    ends = [minimize(objective, start, jac=True, method="L-BFGS-B", options=tolerances) for start in starts]
    best = min(ends, key=lambda end: end.fun)
    decrement = _newton_decrement(*terms(best.x), weights, delta)
    theta, alpha, beta = best.x, *best.x[3:]
    factors = np.exp(theta[:3] + np.array([0.0, alpha, beta]) * middle)
    total = best.fun / share
    inside = min(alpha, beta) > 0 and np.all(np.isfinite(factors)) and factors[0] > VANISHED * np.min(loss)
    good = bool(decrement < CONVERGED and inside)
    return Law(*map(float, factors), float(alpha), float(beta), total, good, float(decrement))


def _best_factors(alpha: float, beta: float, design: np.ndarray, target: np.ndarray) -> np.ndarray:
    """(log E, log A, log B, alpha, beta) with the non-negative E, A, B of least squared relative error."""
    columns = np.exp(np.array([0.0, alpha, beta])[:, None] * design - target).T
    factors, _ = nnls(columns, np.ones(len(target)))
    return np.array([*np.log(np.maximum(factors, 1e-3)), alpha, beta])


def _huber(residual: np.ndarray, delta: float) -> np.ndarray:
    size = np.abs(residual)
    return np.where(size <= delta, size**2 / 2, delta * (size - delta / 2))


def _newton_decrement(residual: np.ndarray, jacobian: np.ndarray, weights: np.ndarray, delta: float) -> float:
    """How far the summed objective would fall along a Gauss-Newton step, as a share of itself.

    The curvature of a term beyond delta is that of its quadratic upper bound, delta / |r|.
    """
    gradient = (weights * np.clip(residual, -delta, delta)) @ jacobian
    curvature = (jacobian.T * weights * np.minimum(1.0, delta / np.maximum(np.abs(residual), 1e-300))) @ jacobian
    step = np.linalg.lstsq(curvature, gradient, rcond=1e-13)[0]
    floor = len(residual) * 1e-12 * delta  # of a perfect fit, where any share of nothing is large
    return float(gradient @ step / 2 / ((weights * _huber(residual, delta)).sum() + floor))


@dataclass(frozen=True)
class PowerLaw:
    """y = factor * x^exponent."""

    factor: float
    exponent: float

    def __call__(self, x: np.ndarray | float) -> np.ndarray | float:
        """The power law's value at x."""
        return self.factor * np.asarray(x) ** self.exponent


def fit_power_law(x: np.ndarray, y: np.ndarray, log_std: np.ndarray | None = None) -> PowerLaw:
    """Fit y = factor x^exponent; weights are 1 / log_std^2 (Porian et al. 2024, arXiv 2406.19146, section 2).

    Args:
        x, y: [n], positive.
        log_std: [n], standard deviation of log y; None: all alike.

    Raises:
        UserError: fewer than two different x.
    """
    if len(np.unique(x)) < 2:
        raise UserError("a power law needs two or more different budgets; add budgets to the study")
    weights = None if log_std is None else 1 / np.asarray(log_std)  # numpy squares them
    slope, level = np.polyfit(np.log(x), np.log(y), 1, w=weights)
    return PowerLaw(float(np.exp(level)), float(slope))


@dataclass(frozen=True)
class OvertrainingLaw:
    """L = E + (a M^eta + b M^-eta) C^-eta with M = D / N (Gadre et al. 2024, arXiv 2403.08540, equation 4)."""

    E: float
    a: float
    b: float
    eta: float

    def loss(self, flops: np.ndarray | float, ratio: np.ndarray | float) -> np.ndarray | float:
        """Predicted loss at C FLOPs and M tokens a weight."""
        return self.E + (self.a * ratio**self.eta + self.b * ratio**-self.eta) * flops**-self.eta


def fit_overtraining(flops: np.ndarray, ratio: np.ndarray, loss: np.ndarray) -> OvertrainingLaw:
    """Fit the over-training law to [n] runs by least squares of the loss, as Gadre et al. (appendix) do.

    Raises:
        UserError: fewer than four rows, one ratio only, or no fit.
    """
    if len(loss) < 4 or len(np.unique(np.round(np.log(ratio), 2))) < 2:
        raise UserError("the over-training law needs four or more rows with two or more different tokens / params")

    def law(inputs: np.ndarray, E: float, a: float, b: float, eta: float) -> np.ndarray:
        return OvertrainingLaw(E, a, b, eta).loss(*inputs)

    start = (0.6 * np.min(loss), 100.0, 100.0, 0.15)
    try:
        found, _ = curve_fit(law, np.stack([flops, ratio]), loss, p0=start, maxfev=100_000)
    except RuntimeError:
        raise UserError("the over-training law does not converge on these rows; check them for outliers") from None
    return OvertrainingLaw(*map(float, found))
