"""Laws of the loss and their fits: Chinchilla's parametric form, power laws, and over-training.

N counts weights, D training tokens, C floating-point operations of training; losses are nats per token.
"""

import itertools
from dataclasses import dataclass

import numpy as np
from scipy.optimize import curve_fit, minimize, nnls

from gptjax.errors import UserError

DELTA = 1e-3  # of the Huber loss on log loss (Hoffmann et al. 2022, arXiv 2203.15556, section 3.3)
TOLERANCES = {"ftol": 1e-15, "gtol": 1e-11, "maxiter": 10_000, "maxfun": 50_000, "maxcor": 30}
EXPONENTS = (0.1, 0.25, 0.4, 0.6, 0.9, 1.5)  # starting values of alpha and of beta

# At an optimum, a Newton step lowers the objective by at most this share of itself. Fits of 240 noisy rows end below
# 1e-15; on the mean of the Huber terms, scipy's default tolerances end them at 4e-5 and more.
CONVERGED = 1e-7
VANISHED = 1e-4  # an E below this share of the least loss counts as 0: the rows do not determine it
KEPT_STARTS = 12  # starts of lowest objective, out of the grid of exponents


@dataclass(frozen=True)
class Law:
    """L(N, D) = E + A / N^alpha + B / D^beta (Hoffmann et al. 2022, equation 2).

    Attributes:
        objective: sum of the Huber terms on log loss over the rows fitted.
        converged: whether the fit ended in an optimum with positive exponents and an E that has not vanished.
        newton_decrement: share by which a Newton step would still lower the objective.
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
        """Return the predicted loss of a model of `params` weights after `tokens` tokens."""
        return self.E + self.A / params**self.alpha + self.B / tokens**self.beta

    @property
    def exponent(self) -> float:
        """Return a of N* ~ C^a: beta / (alpha + beta). D* ~ C^(1 - a)."""
        return self.beta / (self.alpha + self.beta)

    def optimum(self, flops: np.ndarray | float, per_param_token: float = 6.0) -> tuple[np.ndarray, np.ndarray]:
        """Return (N*, D*) of least loss where C = per_param_token N D (Hoffmann et al. 2022, equation 4)."""
        product = np.asarray(flops) / per_param_token
        ratio = (self.alpha * self.A / (self.beta * self.B)) ** (1 / (self.alpha + self.beta))
        best = ratio * product**self.exponent
        return best, product / best


class HuberObjective:
    """The objective of `fit_law`: the sum of the Huber terms of the log-loss residuals, and its derivatives.

    Its variable is theta = (log E, log A', log B', alpha, beta), where A' and B' are the values of the two terms at
    the mean log N and the mean log D of the rows: there the terms are of similar size, which L-BFGS-B needs.

    Args:
        params, tokens, loss: [n] each, all positive.
        delta: where the Huber loss turns from quadratic to linear.
        weights: [n], the weight of each row; None weighs all rows equally.

    Raises:
        UserError: fewer than six rows, or sizes or tokens that do not differ.
    """

    def __init__(
        self,
        params: np.ndarray,
        tokens: np.ndarray,
        loss: np.ndarray,
        delta: float = DELTA,
        weights: np.ndarray | None = None,
    ):
        log_params, log_tokens, self.target = (
            np.log(np.asarray(v, dtype=np.float64)) for v in (params, tokens, loss)
        )
        if len(log_params) < 6:
            raise UserError(f"{len(log_params)} rows are too few for a law of five parameters; give 6 or more")
        for name, values in (("params", log_params), ("tokens", log_tokens)):
            if np.ptp(values) < 0.1:
                raise UserError(f"{name} hardly differs between the rows; its exponent needs a range of sizes")
        self.delta = delta
        self.weights = np.ones_like(log_params) if weights is None else weights
        self.center = np.array([0.0, log_params.mean(), log_tokens.mean()])
        offsets = (log_params - self.center[1], log_tokens - self.center[2])
        self.design = np.stack([np.zeros_like(log_params), -offsets[0], -offsets[1]])

    def __call__(self, theta: np.ndarray) -> tuple[float, np.ndarray]:
        """Return the objective and its gradient [5].

        The terms are summed: their mean is so small that default tolerances end the search at once, which is what
        went wrong in the original (Besiroglu et al. 2024, arXiv 2404.10102, section 3).
        """
        residual, jacobian = self.residuals(theta)
        pull = self.weights * np.clip(residual, -self.delta, self.delta)
        return float(np.sum(self.weights * huber(residual, self.delta))), np.einsum("n,nk->k", pull, jacobian)

    def residuals(self, theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the residuals of log loss [n] and their Jacobian [n, 5], computed by log-sum-exp."""
        exponents = np.array([0.0, theta[3], theta[4]])
        log_terms = theta[:3, None] + exponents[:, None] * self.design
        top = log_terms.max(axis=0)
        shares = np.exp(log_terms - top)
        total = shares.sum(axis=0)
        shares /= total
        jacobian = np.concatenate([shares, (shares * self.design)[1:]]).T
        return top + np.log(total) - self.target, jacobian

    def newton_decrement(self, theta: np.ndarray) -> float:
        """Return how far the objective would fall along a Gauss-Newton step, as a share of itself.

        The curvature of a term beyond delta is that of its quadratic upper bound, delta / |r|.
        """
        residual, jacobian = self.residuals(theta)
        delta = self.delta
        gradient = (self.weights * np.clip(residual, -delta, delta)) @ jacobian
        steepness = np.minimum(1.0, delta / np.maximum(np.abs(residual), 1e-300))
        curvature = (jacobian.T * self.weights * steepness) @ jacobian
        step = np.linalg.lstsq(curvature, gradient, rcond=1e-13)[0]
        floor = len(residual) * 1e-12 * delta  # a perfect fit has an objective of 0, of which every share is large
        return float(gradient @ step / 2 / ((self.weights * huber(residual, delta)).sum() + floor))

    def best_starts(self) -> list[np.ndarray]:
        """Return the KEPT_STARTS lowest points of a grid of exponents, each with its least-squares E, A' and B'."""
        grid = [self._best_factors(alpha, beta) for alpha, beta in itertools.product(EXPONENTS, repeat=2)]
        return sorted(grid, key=lambda theta: self(theta)[0])[:KEPT_STARTS]

    def _best_factors(self, alpha: float, beta: float) -> np.ndarray:
        """Return theta with the non-negative E, A' and B' of least squared relative error."""
        columns = np.exp(np.array([0.0, alpha, beta])[:, None] * self.design - self.target).T
        factors, _ = nnls(columns, np.ones(len(self.target)))
        return np.array([*np.log(np.maximum(factors, 1e-3)), alpha, beta])

    def centered(self, starts: np.ndarray | list[list[float]]) -> np.ndarray:
        """Return thetas [k, 5] for rows of (log E, log A, log B, alpha, beta)."""
        thetas = np.array(starts, dtype=np.float64)
        thetas[:, 1] -= thetas[:, 3] * self.center[1]
        thetas[:, 2] -= thetas[:, 4] * self.center[2]
        return thetas

    def factors(self, theta: np.ndarray) -> np.ndarray:
        """Return (E, A, B) of a theta."""
        return np.exp(theta[:3] + np.array([0.0, theta[3], theta[4]]) * self.center)


def fit_law(
    params: np.ndarray,
    tokens: np.ndarray,
    loss: np.ndarray,
    delta: float = DELTA,
    weights: np.ndarray | None = None,
    starts: np.ndarray | list[list[float]] | None = None,
) -> Law:
    """Fit the parametric law by the Huber loss of log residuals (Hoffmann et al. 2022, appendix D.3).

    Args:
        params, tokens, loss, delta, weights: as for `HuberObjective`.
        starts: [k, 5] of (log E, log A, log B, alpha, beta) to start from; None: the best of a grid of exponents,
            each with its least-squares E, A and B.

    Raises:
        UserError: fewer than six rows, or sizes or tokens that do not differ.
    """
    objective = HuberObjective(params, tokens, loss, delta, weights)
    thetas = objective.best_starts() if starts is None else objective.centered(starts)
    ends = [minimize(objective, theta, jac=True, method="L-BFGS-B", options=TOLERANCES) for theta in thetas]
    best = min(ends, key=lambda end: end.fun)
    return as_law(objective, best.x)


def as_law(objective: HuberObjective, theta: np.ndarray) -> Law:
    """Return the law of a theta at which a search of `objective` ended."""
    decrement = objective.newton_decrement(theta)
    E, A, B = objective.factors(theta)
    alpha, beta = theta[3:]
    least = np.exp(objective.target.min())
    has_law = min(alpha, beta) > 0 and np.all(np.isfinite((E, A, B))) and least * VANISHED < E
    return Law(
        E=float(E),
        A=float(A),
        B=float(B),
        alpha=float(alpha),
        beta=float(beta),
        objective=float(objective(theta)[0]),
        converged=bool(decrement < CONVERGED and has_law),
        newton_decrement=decrement,
    )


def huber(residual: np.ndarray, delta: float) -> np.ndarray:
    """Return the Huber loss of each residual: quadratic up to delta, linear beyond."""
    size = np.abs(residual)
    return np.where(size <= delta, size**2 / 2, delta * (size - delta / 2))


@dataclass(frozen=True)
class PowerLaw:
    """y = factor * x^exponent."""

    factor: float
    exponent: float

    def __call__(self, x: np.ndarray | float) -> np.ndarray | float:
        """Return the power law's value at x."""
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
        """Return the predicted loss at C FLOPs and M tokens a weight."""
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
