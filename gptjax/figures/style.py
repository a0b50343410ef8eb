"""The one style of every figure: themes, sizes, axes with clean ticks, titles and legends that fit."""

import functools
import io
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.style
import numpy as np
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from gptjax.figures.ticks import FittingTicks
from gptjax.shell import display

STYLE = Path(__file__).with_name("gptjax.mplstyle")
# The first is matplotlib's own; the others have the scripts that it lacks, where one of them is installed.
FONTS = (
    "DejaVu Sans",
    "Noto Sans CJK SC",
    "Noto Sans CJK JP",
    "WenQuanYi Micro Hei",
    "PingFang SC",
    "Microsoft YaHei",
)
WIDE_IN, NARROW_IN = 7.2, 3.5
MOST_COLOURS, ORDERED_COLOURS = 7, 9
WIDE_LABEL, NARROW_LABEL = 44, 34  # characters of a legend's longest label
EDGE_IN = 0.09  # between text and the edge of the figure
TITLE_POINTS, TEXT_POINTS, LINE = 11.5, 9.5, 1.42


@dataclass(frozen=True)
class Theme:
    """Colours of a figure. The series' colours are told apart by colour-blind readers (Okabe & Ito 2008).

    Attributes:
        paper, ink, muted, grid: background, text, secondary text and marks, grid lines.
        series: of the data, MOST_COLOURS of them.
        ordered: from low to high values, ORDERED_COLOURS of them.
        good, bad: of what fits, and of what does not.
    """

    name: str
    paper: str
    ink: str
    muted: str
    grid: str
    series: tuple[str, ...]
    ordered: tuple[str, ...]
    good: str
    bad: str

    def names(self) -> dict[str, str]:
        """Return each colour under the name that it has as a CSS variable."""
        plain = {name: getattr(self, name) for name in ("paper", "ink", "muted", "grid", "good", "bad")}
        plain |= {f"series-{i}": colour for i, colour in enumerate(self.series)}
        return plain | {f"ordered-{i}": colour for i, colour in enumerate(self.ordered)}


def _ordered(low: float, high: float) -> tuple[str, ...]:
    """Return colours of viridis from one share of it to another."""
    return tuple(to_hex(colour) for colour in mpl.colormaps["viridis"](np.linspace(low, high, ORDERED_COLOURS)))


LIGHT = Theme(
    name="light",
    paper="#ffffff",
    ink="#1b1f24",
    muted="#59636e",
    grid="#e3e6ea",
    series=("#0072b2", "#c44e00", "#00795a", "#a6508a", "#946300", "#3a3fa0", "#2b8cbe"),
    ordered=_ordered(0.74, 0.0),
    good="#1a7f4b",
    bad="#b3261e",
)
DARK = Theme(
    name="dark",
    paper="#14171c",
    ink="#e8eaed",
    muted="#a3adb8",
    grid="#2c323a",
    series=("#56b4e9", "#ff9c42", "#2fcf9f", "#e69ac8", "#f0d24a", "#a8adff", "#9adcf7"),
    ordered=_ordered(0.35, 1.0),
    good="#4fd18b",
    bad="#ff8f85",
)
THEMES = {theme.name: theme for theme in (LIGHT, DARK)}


@dataclass(frozen=True)
class Look:
    """How a figure is drawn: its theme, and its width in inches (WIDE_IN for a page, NARROW_IN for a phone)."""

    theme: Theme = LIGHT
    width_in: float = WIDE_IN

    @property
    def narrow(self) -> bool:
        """Return whether the figure is one for a phone."""
        return self.width_in < 5


@dataclass
class Hover:
    """A series whose values a page shows under the pointer: its axes, name, and points."""

    axes: Axes
    name: str
    x: np.ndarray
    y: np.ndarray
    colour: str


@dataclass
class Sheet:
    """A figure being drawn, with what its page needs besides.

    Attributes:
        hovers: the series that show their values.
        key: the legend's handles by label, in order; each mark is named once.
        finding, drawn: the title, and the line under it.
    """

    figure: Figure
    look: Look
    hovers: list[Hover] = field(default_factory=list)
    key: dict[str, Any] = field(default_factory=dict)
    finding: str = ""
    drawn: str = ""

    @property
    def theme(self) -> Theme:
        """Return the figure's colours."""
        return self.look.theme

    def colour(self, i: int) -> str:
        """Return the colour of the i-th series."""
        return self.theme.series[i % MOST_COLOURS]

    def ordered(self, place: int) -> str:
        """Return a colour of the ordered scale, 0 for the lowest values."""
        return self.theme.ordered[place]

    def name(self, label: str, handle: Any) -> None:
        """Put a mark into the legend, unless its label is there."""
        self.key.setdefault(label, handle)

    def hover(self, axes: Axes, name: str, x: Sequence[float], y: Sequence[float], colour: str) -> None:
        """Have a page show a series' values under the pointer."""
        self.hovers.append(Hover(axes, name, np.asarray(x, float), np.asarray(y, float), colour))

    def title(self, finding: str, drawn: str = "") -> None:
        """Say the finding as the figure's title, and under it, smaller, what is drawn."""
        self.finding, self.drawn = finding, drawn

    def say(self, axes: Axes, text: str) -> None:
        """Say in the middle of empty axes why they are empty."""
        axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=self.theme.muted)
        axes.set(xticks=[], yticks=[])


def wrap(text: str, room_points: float, size_points: float, bold: bool = False) -> str:
    """Return a text broken into lines that fit a room: after spaces, and anywhere in what is longer than a line."""
    columns = max(12, int(room_points / (size_points * (0.66 if bold else 0.58))))
    lines, line = [], ""
    for word in display.one_line(text).split(" "):
        joined = f"{line} {word}" if line else word
        if display.width(joined) <= columns:
            line = joined
            continue
        lines += [line] if line else []
        line = word
        while display.width(line) > columns:
            end = next(i for i in range(len(line), 0, -1) if display.width(line[:i]) <= columns)
            lines.append(line[:end])
            line = line[end:]
    return "\n".join([*lines, line])


def settings(theme: Theme) -> dict[str, Any]:
    """Return the theme as matplotlib's settings, with the fonts that are installed."""
    installed = {entry.name for entry in font_manager.fontManager.ttflist}
    return {
        "font.family": [name for name in FONTS if name in installed],
        "figure.facecolor": theme.paper,
        "savefig.facecolor": theme.paper,
        "axes.facecolor": theme.paper,
        "axes.edgecolor": theme.muted,
        "axes.labelcolor": theme.ink,
        "text.color": theme.ink,
        "xtick.color": theme.muted,
        "ytick.color": theme.muted,
        "xtick.labelcolor": theme.ink,
        "ytick.labelcolor": theme.ink,
        "grid.color": theme.grid,
        "axes.prop_cycle": mpl.cycler(color=theme.series),
    }


def figure_kind(height_in: float, narrow_in: float | None = None) -> Callable[..., Callable[..., Sheet]]:
    """Make a function that draws on a Sheet a figure of this height: `draw(..., look=Look()) -> Sheet`.

    Args:
        height_in: of the axes of a wide figure, with their labels, in inches.
        narrow_in: of a narrow one; else 0.72 of it. Title and legend come on top.
    """

    def decorate(draw: Callable[..., None]) -> Callable[..., Sheet]:
        @functools.wraps(draw)
        def drawn(*args: Any, look: Look = Look(), **options: Any) -> Sheet:
            with mpl.rc_context(), warnings.catch_warnings():
                matplotlib.style.use(STYLE)
                mpl.rcParams.update(settings(look.theme))
                height = (narrow_in or 0.72 * height_in) if look.narrow else height_in
                sheet = Sheet(Figure(figsize=(look.width_in, height), layout="constrained"), look)
                draw(sheet, *args, **options)
                settle(sheet)
            return sheet

        return drawn

    return decorate


def settle(sheet: Sheet) -> None:
    """Set title and legend above and below the axes, make the figure higher by as much, and fix the layout."""
    figure, theme = sheet.figure, sheet.theme
    room = 72 * (sheet.look.width_in - 2 * EDGE_IN)
    title = wrap(sheet.finding, room, TITLE_POINTS, bold=True)
    drawn = wrap(sheet.drawn, room, TEXT_POINTS)
    title_in = (title.count("\n") + 1) * LINE * TITLE_POINTS / 72
    drawn_in = (drawn.count("\n") + 1) * LINE * TEXT_POINTS / 72 + 0.03 if sheet.drawn else 0.0
    most = NARROW_LABEL if sheet.look.narrow else WIDE_LABEL
    labels = [display.shorten(label, most) for label in sheet.key]
    longest = max(map(display.width, labels), default=1)
    columns = max(1, min(int(room // (0.57 * TEXT_POINTS * longest + 34)), len(labels)))
    legend_in = -(-len(labels) // columns) * 1.52 * TEXT_POINTS / 72 + 0.1 if labels else 0.0

    height = figure.get_figheight() + EDGE_IN + title_in + drawn_in + legend_in
    figure.set_figheight(height)
    x, top = EDGE_IN / sheet.look.width_in, 1 - EDGE_IN / height
    figure.text(x, top, title, ha="left", va="top", size=TITLE_POINTS, weight="bold", linespacing=LINE - 0.15)
    if sheet.drawn:
        at = top - title_in / height
        figure.text(x, at, drawn, ha="left", va="top", size=TEXT_POINTS, color=theme.muted, linespacing=LINE - 0.15)
    if labels:
        place = {"loc": "lower left", "bbox_to_anchor": (0.0, 0.0), "borderaxespad": 0.3, "ncols": columns}
        figure.legend(list(sheet.key.values()), labels, labelcolor=theme.ink, **place)
    used = (EDGE_IN + title_in + drawn_in + 0.02) / height
    figure.set_layout_engine("constrained", rect=(0, legend_in / height, 1, 1 - legend_in / height - used))
    figure.align_ylabels()
    with quiet():
        for _ in range(2):  # the first gives the ticks their room
            figure.get_layout_engine().execute(figure)
    figure.set_layout_engine("none")


class quiet(warnings.catch_warnings):
    """Silence matplotlib about characters that no installed font has; they are drawn as boxes."""

    def __enter__(self) -> None:
        super().__enter__()
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")


def axis(axes: Axes, which: str, label: str, log: bool = False, kind: str = "count") -> None:
    """Give an axis its label with a unit, its scale, and ticks that fit its length.

    Args:
        which: x or y.
        kind: how ticks are written: count (1.2 M), whole (1,250), power (3×10¹¹), plain (0.25), percent, seconds or
            bytes.
    """
    one = axes.xaxis if which == "x" else axes.yaxis
    if log:
        getattr(axes, f"set_{which}scale")("log")
    ticks = FittingTicks(kind, log)
    one.set_major_locator(ticks)
    one.set_major_formatter(ticks.formatter)
    one.set_minor_locator(mpl.ticker.NullLocator())
    one.set_label_text(label)


def limits(axes: Axes, which: str, values: np.ndarray, log: bool = False, margin: float = 0.05) -> None:
    """Set an axis' range to the finite values, widened where they are all one; 0 to 1 where there are none."""
    values = np.asarray(values, float)
    values = values[np.isfinite(values) & ((values > 0) | (not log))]
    if not len(values):
        low, high = (1.0, 10.0) if log else (0.0, 1.0)
    else:
        low, high = float(values.min()), float(values.max())
    if log:
        apart = max(np.log10(high / low) * margin, 0.0 if high > low * 1.05 else 0.2)
        low, high = low / 10**apart, high * 10**apart
    else:
        apart = (high - low) * margin if high - low > 1e-9 * max(abs(high), 1e-9) else max(abs(high) * 0.1, 0.5)
        low, high = (low - apart, high + apart) if low or high else (-margin, 1.0 + margin)
    getattr(axes, f"set_{which}lim")(low, high)


def to_bytes(sheet: Sheet, kind: str = "png") -> bytes:
    """Return a figure as a PNG or SVG file; the same figure gives the same bytes."""
    stream = io.BytesIO()
    metadata = {"Software": None} if kind == "png" else {"Date": None, "Creator": None}
    options = {"svg.fonttype": "none", "svg.hashsalt": "gptjax", "savefig.facecolor": sheet.theme.paper}
    with mpl.rc_context(options), quiet():
        if kind == "svg":  # savefig draws twice: first without an output, for layouts that are not settled
            FigureCanvasSVG(sheet.figure).print_svg(stream, metadata=metadata)
        else:
            sheet.figure.savefig(stream, format=kind, dpi="figure", metadata=metadata)
    return stream.getvalue()


def to_inline(sheet: Sheet, prefix: str) -> str:
    """Return a figure as an <svg> element of a page: its colours are CSS variables, its ids begin with a prefix."""
    text = to_bytes(sheet, "svg").decode()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r"\n\s*", "\n", re.sub(r"<!--.*?-->", "", text, flags=re.S))
    text = re.sub(r'\bid="', f'id="{prefix}-', text)
    text = text.replace("url(#", f"url(#{prefix}-").replace('href="#', f'href="#{prefix}-')
    for name, colour in sheet.theme.names().items():
        text = text.replace(colour, f"var(--{name})")
    return re.sub(
        r'<svg[^>]*?viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" aria-hidden="true">', text, count=1, flags=re.S
    )
