"""Pages made of blocks: paragraphs, facts, tables, figures, commands, checklists and samples; all text is escaped."""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2

from gptjax.errors import UserError
from gptjax.figures.series import thin
from gptjax.figures.style import DARK, LIGHT, NARROW_IN, Hover, Look, Sheet, Theme, to_inline
from gptjax.shell import display
from gptjax.shell.files import write_atomically

HERE = Path(__file__).parent
HOVER_POINTS = 300  # of a series, under the pointer


@dataclass(frozen=True)
class Paragraph:
    """Text; `lead` sets it larger, at the head of a page."""

    text: str
    lead: bool = False
    kind: str = "paragraph"


@dataclass(frozen=True)
class Facts:
    """Pairs of a name and a value."""

    pairs: Sequence[tuple[str, str]]
    large: bool = False
    kind: str = "facts"


@dataclass(frozen=True)
class Cell:
    """A cell of a table: what it shows, and the full value, shown under the pointer and sorted by."""

    text: str
    value: float | str | None = None

    @property
    def full(self) -> str:
        """Return the full value as text, empty where the cell shows it."""
        return "" if self.value is None or str(self.value) == self.text else str(self.value)


@dataclass(frozen=True)
class Table:
    """A table whose columns sort by a click; rows of Cells or texts."""

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[Cell | str]]
    kind: str = "table"

    def cells(self) -> list[list[Cell]]:
        """Return the rows with every text as a Cell."""
        return [[cell if isinstance(cell, Cell) else Cell(str(cell)) for cell in row] for row in self.rows]

    def words(self) -> list[bool]:
        """Return for each column whether it has words only, which are aligned to the left."""
        rows, columns = self.cells(), range(len(self.header))
        texts = [[row[i].text for row in rows if i < len(row)] for i in columns]
        return [i == 0 or not any(re.match(r"[−+-]?[\d∞]", text) for text in texts[i]) for i in columns]


@dataclass(frozen=True)
class Picture:
    """A figure, drawn anew for a wide and a narrow page.

    Attributes:
        draw: look -> the figure.
        about: what it shows, in a sentence, for those who cannot see it.
    """

    draw: Callable[[Look], Sheet]
    about: str
    kind: str = "picture"


@dataclass(frozen=True)
class Commands:
    """Commands with what each does."""

    pairs: Sequence[tuple[str, str]]
    kind: str = "commands"


@dataclass(frozen=True)
class Checklist:
    """Checks: (passed, its name, what was found, what to do)."""

    items: Sequence[tuple[bool, str, str, str]]
    kind: str = "checklist"


@dataclass(frozen=True)
class Text:
    """A text as it stands, line breaks kept, with a heading: a sample, a file."""

    heading: str
    text: str
    kind: str = "text"


@dataclass(frozen=True)
class Section:
    """A heading with its blocks."""

    heading: str
    blocks: Sequence[Any] = field(default_factory=tuple)

    @property
    def anchor(self) -> str:
        """Return the heading as the name that a link points to."""
        return re.sub(r"[^a-z0-9]+", "-", self.heading.lower()).strip("-")


def number(value: Any, digits: int = 3) -> Cell:
    """Return a number as a cell with three significant digits; the full one is shown under the pointer."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return Cell(display.MISSING if value is None else str(value))
    if isinstance(value, int) and abs(value) < 10**6:
        return Cell(f"{value:,}", value)
    return Cell(display.significant(float(value), digits), value)


def amount(value: float | None) -> Cell:
    """Return a count as a cell: 1.23 M."""
    return Cell(display.MISSING) if value is None else Cell(display.count(value), value)


def render(title: str, sections: Sequence[Section], made_by: str) -> str:
    """Return the page.

    Args:
        title: its heading; untrusted, like every text of the sections.
        made_by: the command that makes it again.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    pictures: list[Picture] = [b for s in sections for b in s.blocks if isinstance(b, Picture)]
    drawn = {picture: _drawn(picture, f"f{i}") for i, picture in enumerate(pictures)}
    return environment.get_template("page.html.j2").render(
        title=title,
        sections=sections,
        made_by=made_by,
        pictures=drawn,
        light=LIGHT.names(),
        dark=DARK.names(),
        css=(HERE / "page.css").read_text(),
        script=(HERE / "page.js").read_text(),
    )


def write_page(path: str | Path, page: str) -> None:
    """Write a page to a file; raises UserError where that is not possible."""
    try:
        write_atomically(path, page)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; give another file") from None


def _drawn(picture: Picture, prefix: str) -> dict[str, Any]:
    """Return a picture's two drawings as <svg> elements, and the data that the pointer shows."""
    wide, narrow = picture.draw(Look()), picture.draw(Look(width_in=NARROW_IN))
    series = [_series(hover, wide.theme) for hover in wide.hovers]
    boxes = [[_box(hover, sheet) for hover in sheet.hovers] for sheet in (wide, narrow)]
    data = {"series": series, "wide": boxes[0], "narrow": boxes[1]}
    return {
        "wide": to_inline(wide, f"{prefix}w"),
        "narrow": to_inline(narrow, f"{prefix}n"),
        "data": json.dumps(data, separators=(",", ":")) if series else "",
        "about": picture.about,
    }


def _series(hover: Hover, theme: Theme) -> dict[str, Any]:
    """Return a series as plain values, thinned with its extremes kept; NaN is null."""
    x, y = thin(hover.x, hover.y, HOVER_POINTS)
    names = {colour: name for name, colour in theme.names().items()}
    rounded = [[float(f"{v:.6g}") if display.finite(float(v)) else None for v in values] for values in (x, y)]
    return {"name": hover.name, "x": rounded[0], "y": rounded[1], "colour": names.get(hover.colour, "ink")}


def _box(hover: Hover, sheet: Sheet) -> dict[str, Any]:
    """Return where a series' axes lie in the figure, in shares of its width and height from the top left."""
    box, axes = hover.axes.get_position(), hover.axes
    return {
        "left": round(box.x0, 5),
        "right": round(box.x1, 5),
        "top": round(1 - box.y1, 5),
        "bottom": round(1 - box.y0, 5),
        "x": [float(v) for v in axes.get_xlim()],
        "y": [float(v) for v in axes.get_ylim()],
        "log": [axes.get_xscale() == "log", axes.get_yscale() == "log"],
    }
