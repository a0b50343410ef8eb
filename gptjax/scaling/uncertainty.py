"""How far a fit may be off: bootstrap intervals, and what a fit does when its choices change."""

from collections.abc import Iterator

import numpy as np

from gptjax.errors import UserError
from gptjax.scaling.isoflop import find_floors, frontier
from gptjax.scaling.laws import DELTA, Law, fit_law, refit_many
from gptjax.scaling.table import Table

LEVEL = 0.95
RESAMPLES = 400

Interval = tuple[float, float]


def resampled_laws(law: Law, table: Table, resamples: int = RESAMPLES, seed: int = 0) -> list[Law]:
    """The law fitted again to randomly reweighted rows: the Bayesian bootstrap (Rubin 1981, Annals of Statistics 9).

    Its smooth weights leave no budget without rows, as drawing whole rows does in studies of a few dozen runs.
    """
    weights = np.random.default_rng(seed).exponential(size=(resamples, len(table)))
    return [Law(*map(float, row)) for row in refit_many(law, table.params, table.tokens, table.loss, weights)]


def interval(values: list[float] | np.ndarray) -> Interval:
    """The middle LEVEL of the values."""
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def law_intervals(laws: list[Law]) -> dict[str, Interval]:
    """An interval for each parameter, and for the exponent of N*(C)."""
    names = ("E", "A", "B", "alpha", "beta", "exponent")
    return {name: interval([getattr(law, name) for law in laws]) for name in names}


def noise(law: Law, table: Table) -> float:
    """Standard deviation of log loss about the law, from the median deviation so that outliers do not set it."""
    residual = np.log(table.loss / law.loss(table.params, table.tokens))
    return float(1.4826 * np.median(np.abs(residual)) * np.sqrt(len(table) / max(1, len(table) - 5)))


def frontier_intervals(table: Table, method: str, std: float, resamples: int = 200, seed: int = 0) -> list[Interval]:
    """Intervals of the exponents of N*(C) and D*(C) when each loss is off by `std` of its logarithm.

    Returns:
        two intervals; none where fewer than nine in ten disturbed tables have a frontier.
    """
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(resamples):
        disturbed = table.loss * np.exp(std * rng.normal(size=len(table)))
        lines = frontier(find_floors(Table(table.params, table.tokens, disturbed, table.flops), method))
        found += [] if lines is None else [[line.exponent for line in lines]]
    return [interval(column) for column in np.array(found).T] if len(found) >= 0.9 * resamples else []


def sensitivity(law: Law, table: Table) -> Iterator[tuple[str, Law]]:
    """Name a changed choice, and give the law under it: other deltas, worst rows dropped, a budget left out."""
    start = np.array([[*np.log([law.E, law.A, law.B]), law.alpha, law.beta]])

    def again(rows: Table, delta: float = DELTA) -> Law:
        return fit_law(rows.params, rows.tokens, rows.loss, delta, starts=start)

    for delta in (DELTA / 10, DELTA * 10, 0.1):
        yield f"delta {delta:g}", again(table, delta)
    off = np.abs(np.log(table.loss / law.loss(table.params, table.tokens)))
    budgets = table.budgets()
    smaller = [
        ("the worst row dropped", np.argsort(off)[:-1]),
        ("the highest loss dropped", np.argsort(table.loss)[:-1]),
    ]
    if len(np.unique(budgets)) > 2:
        smaller += [(f"without {budget:.3g} FLOPs", budgets != budget) for budget in np.unique(budgets)]
    for name, rows in smaller:
        try:
            yield name, again(table.take(rows))
        except UserError:
            continue  # too few rows are left, or all of one size
