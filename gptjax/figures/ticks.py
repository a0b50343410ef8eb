"""Ticks that fit: the densest set of round values whose labels leave room between one another."""

import itertools
import math
from collections.abc import Iterator

import numpy as np
from matplotlib.ticker import Formatter, Locator

from gptjax.shell import display

LABEL_POINTS = 9.5  # as gptjax.mplstyle has it
EM = 0.64  # width of a digit of DejaVu Sans, in font sizes
GAP = 1.1  # between labels, in font sizes
LINEAR_COUNTS = (7, 6, 5, 4, 3, 2)
STEPS = (1, 2, 2.5, 5, 10)


class FittingTicks(Locator):
    """Choose ticks by the axis' length, so that no two labels touch.

    Args:
        kind: how they are written (`labels`).
        log: of a logarithmic axis.
    """

    def __init__(self, kind: str, log: bool):
        self.kind, self.log = kind, log
        self.formatter = FittingLabels(kind)

    def __call__(self) -> np.ndarray:
        """Return the ticks of the axis' present range and length."""
        return self.tick_values(*self.axis.get_view_interval())

    def tick_values(self, vmin: float, vmax: float) -> np.ndarray:
        """Return the ticks of a range."""
        low, high = min(vmin, vmax), max(vmin, vmax)
        chosen = np.array([])
        for values in self.candidates(low, high):
            inside = values[(values >= low * (1 - 1e-9) if self.log else values >= low - 1e-9 * (high - low))]
            inside = inside[(inside <= high * (1 + 1e-9) if self.log else inside <= high + 1e-9 * (high - low))]
            if not len(inside):
                continue
            chosen = inside
            if self.fits(inside, low, high):
                return inside
        return chosen[:1]

    def candidates(self, low: float, high: float) -> Iterator[np.ndarray]:
        """Yield sets of ticks, dense ones first."""
        if self.log:
            times = time_candidates() if self.kind == "seconds" and high > max(60, 8 * low) else iter(())
            return itertools.chain(times, log_candidates(low, high))
        units = {"seconds": (86400, 3600, 60), "bytes": (2**40, 2**30, 2**20, 2**10)}.get(self.kind, ())
        unit = next((u for u in units if high - low > 3 * u), 1)
        found = (unit * values for values in linear_candidates(low / unit, high / unit, self.kind == "whole"))
        return itertools.chain(found, [np.array([float(math.ceil(low))])] if self.kind == "whole" else [])

    def fits(self, values: np.ndarray, low: float, high: float) -> bool:
        """Return whether the labels of the ticks leave gaps between one another."""
        axis = self.axis
        box = axis.axes.bbox
        horizontal = axis.axis_name == "x"
        length = (box.width if horizontal else box.height) * 72 / axis.get_figure(root=True).dpi
        size = LABEL_POINTS
        texts = labels(values, self.kind)
        widths = np.array([EM * size * display.width(text) if horizontal else 0.9 * size for text in texts])
        if self.log:
            places = np.log(values / low) / math.log(high / low) * length
        else:
            places = (values - low) / (high - low) * length
        gaps = np.diff(places) - (widths[1:] + widths[:-1]) / 2
        return bool((gaps >= GAP * size * (1 if horizontal else 0.6)).all()) and len(set(texts)) == len(texts)


class FittingLabels(Formatter):
    """Write an axis' ticks, all of them in one manner."""

    def __init__(self, kind: str):
        self.kind = kind

    def format_ticks(self, values: list[float]) -> list[str]:
        """Return the labels of all ticks."""
        return labels(np.asarray(values, float), self.kind)

    def __call__(self, value: float, position: int | None = None) -> str:
        """Return the label of one value."""
        return labels(np.array([value]), self.kind)[0]


def log_candidates(low: float, high: float) -> Iterator[np.ndarray]:
    """Yield sets of round values, dense ones first: 1-2-5, 1-3, decades, every second decade, and so on.

    A range of less than a decade begins with the values that a linear axis would have.
    """
    bottom, top = math.floor(math.log10(low)), math.ceil(math.log10(high))
    decades = 10.0 ** np.arange(bottom, top + 1)
    if high / low < 8:
        yield from linear_candidates(low, high)
    for steps in ((1, 2, 5), (1, 3)):
        yield np.array([step * decade for decade in decades for step in steps])
    for every in range(1, max(2, top - bottom + 1)):
        yield 10.0 ** np.arange(bottom - bottom % every, top + 1, every)
    yield np.array([step * decade for decade in decades for step in (1, 2, 5)])


def time_candidates() -> Iterator[np.ndarray]:
    """Yield sets of round times in seconds, dense ones first."""
    times = np.array([*10.0 ** np.arange(-6, 2), 60, 600, 3600, 36_000, 86_400, 864_000, 8_640_000])
    for every in (1, 2, 4):
        yield times[times.tolist().index(60) % every :: every]


def linear_candidates(low: float, high: float, whole: bool = False) -> Iterator[np.ndarray]:
    """Yield evenly spaced round values, dense ones first; `whole` ones only, of what is counted."""
    for number in LINEAR_COUNTS:
        rough = (high - low) / number
        decade = 10.0 ** math.floor(math.log10(rough))
        step = next(step * decade for step in STEPS if step * decade >= rough * (1 - 1e-9))
        if whole and step != round(step):
            continue
        first = math.ceil(low / step - 1e-9)
        yield step * np.arange(first, math.floor(high / step + 1e-9) + 1)


def labels(values: np.ndarray, kind: str) -> list[str]:
    """Return the texts of ticks, with as many digits as tell them apart.

    Args:
        kind: count, whole, power, plain, percent, seconds or bytes.
    """
    if not len(values):
        return []
    top = np.abs(values).max()
    least = 1e-4 if top < 1e-4 else 1e-7  # below, a power of ten: all of an axis' ticks or none
    write = {
        "count": display.count,
        "whole": lambda value, digits: display.count(value, digits) if top >= 1e5 else f"{value:,.10g}",
        "power": display.power,
        "plain": lambda value, digits: _plain(value, digits, least),
        "percent": lambda value, digits: f"{_plain(100 * value, digits)} %",
        "seconds": lambda value, digits: display.duration(value),
        "bytes": lambda value, digits: display.size(value),
    }[kind]
    texts: list[str] = []
    for digits in range(1, 9):
        texts = [write(0.0 if abs(value) < 1e-12 * top else float(value), digits) for value in values]
        exact = kind in ("seconds", "bytes") or digits >= _digits(values)
        if exact and len(set(texts)) == len(texts):
            break
    return _aligned(texts) if kind == "plain" else texts


def _aligned(texts: list[str]) -> list[str]:
    """Return plain numbers with the same number of decimals."""
    if any("×" in text or (text.startswith("10") and not text[2:].isascii()) for text in texts):
        return texts
    decimals = max(len(text.partition(".")[2]) for text in texts)
    return [
        f"{text}{'' if '.' in text or not decimals else '.'}{'0' * (decimals - len(text.partition('.')[2]))}"
        for text in texts
    ]


def _digits(values: np.ndarray) -> int:
    """Return how many significant digits write every value to a thousandth of their spacing."""
    spread = np.ptp(values) / max(1, len(values) - 1) or abs(values[0]) or 1.0
    for digits in range(1, 8):
        if all(abs(float(f"{value:.{digits - 1}e}") - value) <= 1e-3 * spread for value in values):
            return digits
    return 8


def _plain(value: float, digits: int, least: float = 1e-4) -> str:
    """Return a number without trailing zeros: 0.25, 1,000; a power of ten where it is large or below `least`."""
    if value == 0:
        return "0"
    if not least <= abs(value) < 1e6:
        return display.power(value, digits)
    small = abs(value) < 1e-4
    text = (
        f"{value:.{digits - 1 - math.floor(math.log10(abs(value)))}f}"
        if small
        else display.significant(value, digits)
    )
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return text.replace("-", "−")
