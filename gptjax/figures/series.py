"""Series of a run's metrics: columns, smoothing, and thinning that keeps the extremes."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

POINTS = 1200  # of a line; more than a figure has pixels


class Logged(list[Mapping[str, Any]]):
    """Rows of metrics.jsonl that do not change: each column is read once, for every figure of a page."""

    def __init__(self, rows: Iterable[Mapping[str, Any]] = ()):
        super().__init__(rows)
        self.columns: dict[tuple[str, str], tuple[np.ndarray, np.ndarray]] = {}


def column(rows: Sequence[Mapping[str, Any]], name: str, over: str = "step") -> tuple[np.ndarray, np.ndarray]:
    """Return the rows' values of a metric, and of what it is drawn over; both [n], rows without either left out.

    A value that is not finite stays as NaN, so that a line breaks there.
    """
    if not isinstance(rows, Logged):
        return _read_column(rows, name, over)
    if (name, over) not in rows.columns:
        rows.columns[name, over] = _read_column(rows, name, over)
    return rows.columns[name, over]


def _read_column(rows: Sequence[Mapping[str, Any]], name: str, over: str) -> tuple[np.ndarray, np.ndarray]:
    pairs = [(row[over], row[name]) for row in rows if name in row and over in row]
    try:
        x, y = np.array(pairs, float).reshape(-1, 2).T
    except (TypeError, ValueError):  # something that is no number
        pairs = [pair for pair in pairs if all(map(_number, pair))]
        x, y = np.array(pairs, float).reshape(-1, 2).T
    x, y = x[np.isfinite(x)], y[np.isfinite(x)]
    return x, np.where(np.isfinite(y), y, np.nan)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def thin(x: np.ndarray, y: np.ndarray, points: int = POINTS) -> tuple[np.ndarray, np.ndarray]:
    """Return at most so many points of a line, among them each stretch's lowest and highest, and both ends."""
    if len(x) <= points:
        return x, y
    kept = [np.array([0, len(x) - 1])]
    edges = np.linspace(0, len(x), max(1, (points - 2) // 2) + 1).astype(int)
    filled = np.isfinite(y)
    lows, highs = np.where(filled, y, np.inf), np.where(filled, y, -np.inf)
    for begin, end in itertools.pairwise(edges):
        kept.append(begin + np.array([lows[begin:end].argmin(), highs[begin:end].argmax()]))
    index = np.unique(np.concatenate(kept))
    return x[index], y[index]


def smooth(y: np.ndarray, share: float = 0.05) -> np.ndarray:
    """Return the mean over a window of so large a share of the line about each point, NaN left out."""
    half = int(len(y) * share / 2)
    if half < 1:
        return y
    filled = np.isfinite(y)
    sums = np.concatenate([[0.0], np.cumsum(np.where(filled, y, 0.0))])
    counts = np.concatenate([[0], np.cumsum(filled)])
    places = np.arange(len(y))
    reach = np.minimum(half, places)  # narrower at the beginning, where losses fall steeply
    first, last = places - reach, np.minimum(places + reach + 1, len(y))
    number = counts[last] - counts[first]
    return np.where(number > 0, (sums[last] - sums[first]) / np.maximum(number, 1), np.nan)


def top_of_range(lines: Sequence[tuple[np.ndarray, np.ndarray]], share: float = 0.08) -> float | None:
    """Return the highest value after the first share of the steps; None where nothing is finite then.

    The fall of the first steps, from the logarithm of the vocabulary, would otherwise take most of a figure. Where it
    takes less than half, return the highest of all values.
    """
    last = max((x[-1] for x, _ in lines if len(x)), default=0.0)
    late = [y[(x >= share * last) & np.isfinite(y)] for x, y in lines]
    values = np.concatenate([[], *late])
    if not len(values):
        return None
    top, highest = float(values.max()), max(float(np.nanmax(y)) for _, y in lines if np.isfinite(y).any())
    return highest if highest - top < top - float(values.min()) else top
