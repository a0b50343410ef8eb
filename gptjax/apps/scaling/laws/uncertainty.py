"""Bootstrap intervals of a fit's parameters and of the frontier."""

import contextlib
from collections.abc import Callable

import numpy as np

from gptjax.apps.scaling.laws.isoflop import disturbed_floors, frontier
from gptjax.apps.scaling.laws.parametric import DELTA, Law
from gptjax.apps.scaling.laws.reweighted import fit_reweighted
from gptjax.apps.scaling.laws.table import Table
from gptjax.errors import UserError

LEVEL = 0.95
Interval = tuple[float, float]


def resampled_laws(law: Law, table: Table, resamples: int, delta: float = DELTA, seed: int = 0) -> list[Law]:
    """Return the law fitted to randomly reweighted rows: the Bayesian bootstrap (Rubin 1981, Annals of Statistics 9).

    Its smooth weights leave no budget without rows, as drawing whole rows does in studies of a few dozen runs.
    """
    weights = np.random.default_rng(seed).exponential(size=(resamples, len(table)))
    return fit_reweighted(law, table.params, table.tokens, table.loss, weights, delta)


def interval(values: list[float] | np.ndarray) -> Interval:
    """Return the central interval that contains the share LEVEL of the values."""
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def law_intervals(laws: list[Law]) -> dict[str, Interval]:
    """Return an interval for each parameter, and for the exponent of N*(C)."""
    names = ("E", "A", "B", "alpha", "beta", "exponent")
    return {name: interval([getattr(law, name) for law in laws]) for name in names}


def noise(law: Law, table: Table) -> float:
    """Return the standard deviation of log loss about the law."""
    return deviation(np.log(table.loss / law.loss(table.params, table.tokens)), free=5)


def deviation(residual: np.ndarray, free: int) -> float:
    """Return the standard deviation about a law of `free` parameters, from the median, robust to outliers."""
    return float(1.4826 * np.median(np.abs(residual)) * np.sqrt(len(residual) / max(1, len(residual) - free)))


def disturbed_intervals(
    fit: Callable[[np.ndarray], dict[str, float]], loss: np.ndarray, std: float, resamples: int = 200, seed: int = 0
) -> dict[str, Interval]:
    """Return an interval of each value of `fit` when each log loss is disturbed with standard deviation `std`.

    Returns:
        none where `fit` refuses (UserError) more than one in ten of the disturbed losses.
    """
    rng = np.random.default_rng(seed)
    found: list[dict[str, float]] = []
    for _ in range(resamples):
        with contextlib.suppress(UserError):
            found.append(fit(loss * np.exp(std * rng.normal(size=len(loss)))))
    enough = len(found) >= 0.9 * resamples
    return {name: interval([values[name] for values in found]) for name in found[0]} if enough else {}


def frontier_intervals(table: Table, method: str, std: float, resamples: int = 200, seed: int = 0) -> list[Interval]:
    """Return intervals of the exponents of N*(C) and D*(C) when each log loss is disturbed with deviation `std`.

    Returns:
        two intervals; none where fewer than nine in ten disturbed tables have a frontier.
    """

    rng = np.random.default_rng(seed)
    losses = table.loss * np.exp(std * rng.normal(size=(resamples, len(table))))
    lines = [found for floors in disturbed_floors(table, losses, method) if (found := frontier(floors))]
    if len(lines) < 0.9 * resamples:
        return []
    return [interval([found[which].exponent for found in lines]) for which in (0, 1)]
