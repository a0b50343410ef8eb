"""IsoFLOP valleys of the loss: where each budget's loss is least, and how that minimum moves with the budget."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from scipy.interpolate import Akima1DInterpolator

from gptjax.apps.scaling.laws.parametric import PowerLaw, fit_power_law
from gptjax.apps.scaling.laws.table import Table
from gptjax.shell.display import power, significant

METHODS = ("akima", "parabola")
FINE = 4001  # points at which a curve between three sizes is compared


class NoMinimum(Exception):
    """Raised with the reason why there is no trustworthy minimum."""


@dataclass(frozen=True)
class Floor:
    """The model size of least loss at a budget.

    Attributes:
        params, tokens, loss: N*, D* and the curve's least loss; nan where refused.
        refused: why there is no trustworthy minimum; empty where there is.
    """

    flops: float
    params: float
    tokens: float
    loss: float
    refused: str = ""


def valleys(table: Table) -> Iterator[tuple[float, Table]]:
    """Yield each budget with its rows by rising params; of rows of one size (seeds, rates) only the best."""
    budgets = table.budgets()
    for budget in np.unique(budgets):
        rows = table.take(budgets == budget)
        rows = rows.take(np.lexsort((rows.loss, rows.params)))
        yield float(budget), rows.take(np.unique(rows.params, return_index=True)[1])


def find_minimum(
    values: np.ndarray, losses: np.ndarray, method: str = "akima", neighbours: int | None = None, what: str = "model"
) -> tuple[float, float]:
    """Return where the loss over log value is least, and the loss there.

    Args:
        values: [n], rising: sizes, rates or batches.
        method: `akima`, the least value of the Akima interpolant (Porian et al. 2024, arXiv 2406.19146, section 2);
            `parabola`, the vertex of a parabola (Hoffmann et al. 2022, approach 2), which is biased where alpha
            and beta differ.
        neighbours: how many points on each side of the lowest the parabola uses; None: all.
        what: the values, for the messages.

    Raises:
        NoMinimum: too few values, the best at an edge, or a parabola without a minimum among them.
    """
    x, y = np.log(values), losses
    if len(x) < 4:
        raise NoMinimum(f"{len(x)} {what}s are too few for a minimum; train 4 or more")
    low = int(y.argmin())
    if low in (0, len(x) - 1):
        side, remedy = ("smallest", "smaller") if low == 0 else ("largest", "larger")
        raise NoMinimum(
            f"the {side} {what}, {significant(values[low])}, is the best: nothing straddles it; add {remedy}"
        )
    if method == "akima":
        curve = Akima1DInterpolator(x, y)
        fine = np.linspace(x[low - 1], x[low + 1], FINE)
        at = fine[curve(fine).argmin()]
        return float(np.exp(at)), float(curve(at))
    near = slice(0, None) if neighbours is None else slice(max(0, low - neighbours), low + neighbours + 1)
    parabola = np.polynomial.Polynomial.fit(x[near], y[near], 2, domain=[0, 1], window=[0, 1])
    _, slope, bend = parabola.coef
    if bend <= 0:
        raise NoMinimum("the parabola is concave: it has no minimum; add sizes or seeds")
    at = -slope / bend / 2
    if not x[0] < at < x[-1]:
        raise NoMinimum(f"the parabola's vertex, {np.exp(at):.3g}, is outside the {what}s trained; add some there")
    return float(np.exp(at)), float(parabola(at))


def find_floor(budget: float, rows: Table, method: str = "akima", neighbours: int | None = None) -> Floor:
    """Return the minimum of a valley, by `find_minimum` of the loss over log N; `rows` are one budget's, by rising
    params.
    """
    try:
        params, height = find_minimum(rows.params, rows.loss, method, neighbours)
    except NoMinimum as reason:
        return Floor(budget, np.nan, np.nan, np.nan, f"{power(budget)} FLOPs: {reason}")
    ratio = np.median(rows.flops / rows.params / rows.tokens)
    return Floor(budget, params, budget / ratio / params, height)


def find_floors(table: Table, method: str = "akima", neighbours: int | None = None) -> list[Floor]:
    """Return the floor of every budget, refused ones included."""
    return [find_floor(budget, rows, method, neighbours) for budget, rows in valleys(table)]


def disturbed_floors(table: Table, losses: np.ndarray, method: str = "akima") -> list[list[Floor]]:
    """Return `find_floors` of a table with each of other losses [k, n], without the reasons of refusals.

    The curves of one budget through all k losses are one call of the library: a study's intervals need thousands.
    """
    found: list[list[Floor]] = [[] for _ in losses]
    budgets = table.budgets()
    for budget in np.unique(budgets):
        rows = np.flatnonzero(budgets == budget)
        sizes, which = np.unique(table.params[rows], return_inverse=True)
        least = np.full((len(losses), len(sizes)), np.inf)
        np.minimum.at(least, (slice(None), which), losses[:, rows])
        ratio = np.median(table.flops[rows] / table.params[rows] / table.tokens[rows])
        for floors, (params, height) in zip(found, _minima(sizes, least, method), strict=True):
            refused = "no minimum" if np.isnan(params) else ""
            floors.append(Floor(float(budget), params, budget / ratio / params, height, refused))
    return found


def _minima(values: np.ndarray, losses: np.ndarray, method: str) -> np.ndarray:
    """Return `find_minimum` of each row of losses [k, n] as [k, 2]; nan where there is none."""
    x, found = np.log(values), np.full((len(losses), 2), np.nan)
    if len(x) < 4:
        return found
    lowest = losses.argmin(axis=1)
    if method == "parabola":
        inside = np.flatnonzero((lowest > 0) & (lowest < len(x) - 1))
        level, slope, bend = np.polynomial.polynomial.polyfit(x, losses[inside].T, 2)
        with np.errstate(divide="ignore", invalid="ignore"):
            at = -slope / bend / 2
            good = (bend > 0) & (x[0] < at) & (at < x[-1])
            found[inside[good]] = np.stack([np.exp(at), level + slope * at / 2], axis=1)[good]
        return found
    for low in range(1, len(x) - 1):
        at_low = np.flatnonzero(lowest == low)
        if len(at_low):
            fine = np.linspace(x[low - 1], x[low + 1], FINE)
            curves = Akima1DInterpolator(x, losses[at_low], axis=1)(fine)
            best = curves.argmin(axis=1)
            found[at_low] = np.stack([np.exp(fine[best]), curves[np.arange(len(best)), best]], axis=1)
    return found


def frontier(floors: list[Floor]) -> tuple[PowerLaw, PowerLaw] | None:
    """Return N*(C) and D*(C) over the floors that are not refused; None with fewer than two."""
    good = [floor for floor in floors if not floor.refused]
    if len(good) < 2:
        return None
    flops, params, tokens = np.array([(f.flops, f.params, f.tokens) for f in good]).T
    return fit_power_law(flops, params), fit_power_law(flops, tokens)
