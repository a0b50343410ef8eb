"""Laws of other choices than the size: repeated data, batch size, and learning rate."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from scipy.optimize import curve_fit, least_squares

from gptjax.apps.scaling.laws.isoflop import NoMinimum, find_minimum
from gptjax.apps.scaling.laws.parametric import Law, PowerLaw, fit_law, fit_power_law
from gptjax.errors import UserError


@dataclass(frozen=True)
class RepetitionLaw:
    """Chinchilla's law on effective weights and tokens (Muennighoff et al. 2023, arXiv 2305.16264, equations 5 to 7).

    Attributes:
        law: the law of runs without repetition.
        R_D, R_N: repetitions of the tokens, or excess of weights, that give 1 - 1/e of the greatest possible gain.
    """

    law: Law
    R_D: float
    R_N: float

    def loss(self, params: np.ndarray, tokens: np.ndarray, unique: np.ndarray) -> np.ndarray:
        """Return the predicted loss of models of `params` weights after `tokens` tokens, of which `unique` differ."""
        law = self.law
        enough = (law.alpha * law.A / (law.beta * law.B) * unique**law.beta) ** (1 / law.alpha)
        used = np.minimum(params, enough)
        return law.loss(_effective(params, used, self.R_N), _effective(tokens, unique, self.R_D))


def _effective(amount: np.ndarray, unique: np.ndarray, scale: float) -> np.ndarray:
    return unique * (1 + scale * -np.expm1(-(amount / unique - 1) / scale))


def fit_repetition(params: np.ndarray, tokens: np.ndarray, loss: np.ndarray, epochs: np.ndarray) -> RepetitionLaw:
    """Fit the law of the runs of one epoch, then the two scales of repetition to all runs.

    Raises:
        UserError: fewer than six runs within an epoch, or fewer than three beyond one.
    """
    once = epochs <= 1
    unique = tokens / np.maximum(1, epochs)
    if once.sum() < 6 or (~once).sum() < 3:
        raise UserError(
            f"{once.sum()} rows within an epoch and {(~once).sum()} beyond do not determine the cost of repeating; "
            "give 6 and 3 or more"
        )
    return fit_scales(fit_law(params[once], tokens[once], loss[once]), params, tokens, loss, unique)


def fit_scales(
    law: Law, params: np.ndarray, tokens: np.ndarray, loss: np.ndarray, unique: np.ndarray
) -> RepetitionLaw:
    """Fit only the two scales of repetition, to [n] runs of which `unique` tokens differ."""

    def residuals(log_scales: np.ndarray) -> np.ndarray:
        return np.log(RepetitionLaw(law, *np.exp(log_scales)).loss(params, tokens, unique) / loss)

    ends = [
        least_squares(residuals, np.log([d, n]), bounds=(-5, 10), x_scale=1.0, ftol=1e-14, xtol=1e-14, gtol=1e-14)
        for d in (2, 15, 60)
        for n in (2, 15)
    ]
    return RepetitionLaw(law, *map(float, np.exp(min(ends, key=lambda end: end.cost).x)))


@dataclass(frozen=True)
class BatchLaw:
    """Tokens to a loss = least_tokens (1 + B / critical) (McCandlish et al. 2018, arXiv 1812.06162, equation 2.7).

    Attributes:
        target: the loss.
        least_tokens: the tokens that the smallest batches need, in the limit.
        critical: tokens a step, where both the tokens and the steps are twice their minimum.
        critical_interval: 95 %, from the scatter about the law.
    """

    target: float
    least_tokens: float
    critical: float
    critical_interval: tuple[float, float]

    def tokens(self, batch: np.ndarray) -> np.ndarray:
        """Return the tokens needed at a batch of this many tokens a step."""
        return self.least_tokens * (1 + batch / self.critical)


def tokens_to_target(
    batch: np.ndarray, tokens: np.ndarray, loss: np.ndarray, target: float | None = None
) -> tuple[float, np.ndarray, np.ndarray]:
    """Return (target, batches, tokens at which each reaches it); the default target is the lowest loss that all
    reach.

    Between runs of different length log tokens is interpolated in log loss; runs of one length at several rates count
    by their best. A batch without runs on both sides of the target is left out.
    """
    curves = {}  # batch size -> lengths in tokens, and the least loss up to each
    for size in np.unique(batch):
        lengths = np.unique(tokens[batch == size])
        best = np.array([loss[(batch == size) & (tokens == length)].min() for length in lengths])
        curves[size] = lengths, np.minimum.accumulate(best)
    if target is None:
        target = max(best[-1] for _, best in curves.values())
    sizes = []
    needed = []
    for size, (lengths, best) in curves.items():
        if len(lengths) > 1 and best[-1] <= target <= best[0]:
            sizes.append(size)
            needed.append(np.exp(np.interp(-np.log(target), -np.log(best), np.log(lengths))))
    return float(target), np.array(sizes), np.array(needed)


def fit_batch(batch: np.ndarray, tokens: np.ndarray, loss: np.ndarray, target: float | None = None) -> BatchLaw:
    """Fit the critical batch to [n] runs of one shape: several batches (tokens a step), each at several lengths.

    Raises:
        UserError: fewer than three batches reach the target between two of their lengths.
    """
    target, sizes, needed = tokens_to_target(batch, tokens, loss, target)
    if len(sizes) < 3:
        raise UserError(
            f"{len(sizes)} batch sizes reach a loss of {target:.4g} between two of their lengths; give 3 or more "
            "(sweeps.batch_sequences with several budgets.tokens), or another --target"
        )

    def law(size: np.ndarray, log_least: float, log_critical: float) -> np.ndarray:
        return log_least + np.log1p(size / np.exp(log_critical))

    start = (np.log(needed.min()), np.log(np.median(sizes)))
    found, covariance = curve_fit(law, sizes, np.log(needed), p0=start, maxfev=100_000)
    spread = 1.96 * np.sqrt(covariance[1, 1])
    low, high = np.exp(np.clip(found[1] + np.array([-spread, spread]), -50, 50))
    return BatchLaw(target, float(np.exp(found[0])), float(np.exp(found[1])), (float(low), float(high)))


@dataclass(frozen=True)
class RateValley:
    """The rates of one shape and budget.

    Attributes:
        rates, losses: by rising rate, the best of each; a diverged run has its first loss.
        best: the rate of least loss; nan where refused.
        sensitivity: mean excess over the least loss, evenly over the log of the rates tried, a loss counting at most
            as the first one (Wortsman et al. 2023, arXiv 2309.14322, section 2.2).
        refused: why there is no minimum.
    """

    params: float
    flops: float
    rates: np.ndarray
    losses: np.ndarray
    best: float
    sensitivity: float
    refused: str = ""


def rate_valleys(params: np.ndarray, flops: np.ndarray, rates: np.ndarray, loss: np.ndarray) -> Iterator[RateValley]:
    """Yield the valley of each shape and budget that has several rates."""
    for N, C in sorted(set(zip(params, flops, strict=True))):
        rows = (params == N) & (flops == C)
        tried = np.unique(rates[rows])
        if len(tried) < 2:
            continue
        losses = np.array([loss[rows & (rates == rate)].min() for rate in tried])
        excess = losses - losses.min()
        sensitivity = float(np.trapezoid(excess, np.log(tried)) / np.ptp(np.log(tried)))
        try:
            best, refused = find_minimum(tried, losses, "parabola", 1, "rate")[0], ""
        except NoMinimum as reason:
            best, refused = np.nan, str(reason)
        yield RateValley(N, C, tried, losses, best, sensitivity, refused)


def fit_rate(valleys: list[RateValley]) -> PowerLaw | None:
    """Return the best rate over FLOPs, from the valleys that have a minimum; None with fewer than two budgets."""
    good = [valley for valley in valleys if not valley.refused]
    if len({valley.flops for valley in good}) < 2:
        return None
    return fit_power_law(np.array([v.flops for v in good]), np.array([v.best for v in good]))
