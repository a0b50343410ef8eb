"""Format numbers, names and tables for people: on a terminal, on the ticks of a figure, in a page."""

import math
import os
import sys
import unicodedata
from collections.abc import Sequence
from typing import Any, TextIO

SCALES = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))
BYTES = ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
COLOURS = {"bold": "1", "dim": "2", "red": "31", "green": "32", "yellow": "33", "cyan": "36"}
MISSING = "–"


def significant(value: float, digits: int = 3) -> str:
    """Return a number with so many significant digits, without an exponent from 1e-4 to 1e6: 0.0123, 1.50, 24,300."""
    if not math.isfinite(value):
        return MISSING if math.isnan(value) else ("∞" if value > 0 else "−∞")
    if value == 0:
        return "0"
    exponent = math.floor(math.log10(abs(float(f"{value:.{digits - 1}e}"))))
    if not -5 < exponent < 6:
        return power(value, digits)
    return f"{round(value, digits - 1 - exponent):,.{max(0, digits - 1 - exponent)}f}"


def power(value: float, digits: int = 3) -> str:
    """Return a number as a multiple of a power of ten: 3×10¹¹, 10⁻³."""
    if value == 0 or not math.isfinite(value):
        return significant(value)
    mantissa, _, exponent = f"{value:.{digits - 1}e}".partition("e")
    if "." in mantissa:
        mantissa = mantissa.rstrip("0").rstrip(".")
    ten = "10" + str(int(exponent)).translate(SUPERSCRIPTS)
    return ten if mantissa == "1" else f"{mantissa}×{ten}"


def count(value: float, digits: int = 3) -> str:
    """Return a count with a unit that suits: 768, 12.5 k, 1.2 M, 3.4 B, 15 T; beyond, a power of ten."""
    if not math.isfinite(value):
        return significant(value)
    if abs(value) >= 1e16:
        return power(value, digits)
    rounded = float(f"{value:.{digits - 1}e}")
    for scale, unit in SCALES:
        if abs(rounded) >= scale:
            return f"{_plain(value / scale, digits)} {unit}"
    return _plain(value, digits)


def _plain(value: float, digits: int) -> str:
    """Return a number of up to so many significant digits, without trailing zeros after the point."""
    whole = significant(value, digits)
    return whole.rstrip("0").rstrip(".") if "." in whole else whole


def size(n_bytes: float) -> str:
    """Return a number of bytes with a unit that suits: 787 MiB, 1.46 GiB."""
    for scale, unit in BYTES:
        if abs(n_bytes) >= scale:
            return f"{_plain(n_bytes / scale, 3)} {unit}"
    return f"{n_bytes:,.0f} B"


def duration(seconds: float) -> str:
    """Return a time in at most two units: 240 ms, 12.3 s, 4 min 10 s, 2 h 10 min, 3 d 4 h."""
    if not math.isfinite(seconds):
        return MISSING
    if seconds < 1:
        return f"{_plain(1000 * seconds, 3)} ms" if seconds else "0 s"
    if seconds < 60:
        return f"{_plain(seconds, 3)} s"
    for large, small, names in ((86400, 3600, "d h"), (3600, 60, "h min"), (60, 1, "min s")):
        rounded = round(seconds / small) * small
        if rounded >= large:
            whole, rest = divmod(rounded, large)
            parts = zip((whole, rest // small), names.split(), strict=True)
            return " ".join(f"{int(n):,} {name}" for n, name in parts if n)
    raise AssertionError(seconds)


def plural(n: int, noun: str) -> str:
    """Return a count with its noun: 1 run, 1,200 runs."""
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def width(text: str) -> int:
    """Return how many columns of a terminal a text takes: two for a Chinese character, none for a combining mark."""
    return sum(
        0 if unicodedata.combining(char) else 2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text
    )


def one_line(text: str) -> str:
    """Return a text without line breaks or other control characters, which a name from a file may contain."""
    return "".join(char if char.isprintable() else " " for char in text)


def shorten(text: str, columns: int) -> str:
    """Return a name in at most so many columns: what does not fit is cut out of its middle, marked by an ellipsis."""
    text = one_line(text)
    if width(text) <= columns:
        return text
    head, tail = "", ""
    for front, back in zip(text, reversed(text), strict=True):
        if width(head + front + tail) >= columns:
            break
        head += front
        if width(head + back + tail) >= columns:
            break
        tail = back + tail
    return f"{head}…{tail}"


def table(
    rows: Sequence[Sequence[str]], header: Sequence[str] | None = None, left: Sequence[int] = (0,)
) -> list[str]:
    """Return the lines of a table whose columns are aligned: those of `left` to the left, the others to the right.

    Args:
        rows: the cells as text, without control characters; a shorter row ends early.
        header: a name for each column.
        left: the numbers of the columns of words; a negative one counts from the last column.
    """
    everything = [list(map(one_line, row)) for row in ([header] if header else []) + list(rows)]
    columns = max(map(len, everything), default=0)
    of_words = {number % columns for number in left} if columns else set()
    widths = [max((width(row[i]) for row in everything if i < len(row)), default=0) for i in range(columns)]

    def line(row: list[str]) -> str:
        cells = []
        for i, (cell, wide) in enumerate(zip(row, widths, strict=False)):
            gap = " " * (wide - width(cell))
            cells.append(cell + gap if i in of_words else gap + cell)
        return "  ".join(cells).rstrip()

    return [line(row) for row in everything]


def indent(lines: Sequence[str]) -> list[str]:
    """Return lines set in by two columns, as those of a table under its heading."""
    return [f"  {line}" for line in lines]


def colours_allowed(stream: TextIO | None = None) -> bool:
    """Return whether a stream (standard output) is a terminal that takes colours; NO_COLOR (no-color.org) forbids."""
    stream = sys.stdout if stream is None else stream
    return not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb" and stream.isatty()


def paint(text: str, colour: str, stream: TextIO | None = None) -> str:
    """Return a text in a colour of COLOURS where the stream takes colours, elsewhere as it is."""
    return f"\x1b[{COLOURS[colour]}m{text}\x1b[0m" if colours_allowed(stream) else text


def finite(value: Any) -> bool:
    """Return whether a value is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
