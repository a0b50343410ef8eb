"""Figures of plans: a chip's memory, the roofline, the mesh on its topology, and the search's candidates."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, PathPatch, Rectangle
from matplotlib.path import Path

from gptjax.figures.style import ORDERED_COLOURS, Sheet, axis, figure_kind, limits
from gptjax.shell import display

GIB = 2**30
MOST_LABELLED = 64  # chips whose rows are written on them


@dataclass(frozen=True)
class Chip:
    """A chip as `draw_mesh` places it.

    Attributes:
        x, y: its place on the page, in chips.
        host: the machine that it is in.
        rows: which part of the batch it reads.
        weights: which part of the weights it holds.
    """

    x: int
    y: int
    host: int
    rows: int
    weights: int


@dataclass(frozen=True)
class Candidate:
    """A layout that the search tried: its name, a chip's memory, seconds a step, and whether it is the best."""

    name: str
    memory_bytes: float
    step_s: float
    best: bool = False


@figure_kind(1.35, 1.35)
def draw_memory(sheet: Sheet, parts: Mapping[str, float], capacity_bytes: float, finding: str) -> None:
    """Draw a chip's memory as one bar, a segment for each part, with the chip's capacity marked."""
    axes = sheet.figure.subplots()
    sheet.title(finding)
    left, shown = 0.0, [(name, value) for name, value in parts.items() if np.isfinite(value) and value > 0]
    for i, (name, value) in enumerate(sorted(shown, key=lambda part: -part[1])):
        colour = sheet.colour(i)
        hatch = None if i < len(sheet.theme.series) else "///"
        style = {"facecolor": colour, "hatch": hatch, "edgecolor": sheet.theme.paper, "lw": 0.8}
        axes.barh([0], [value], left=[left], height=0.7, **style)
        sheet.name(f"{display.shorten(name, 20)}  {display.size(value)}", Patch(**style))
        left += value
    colour = sheet.theme.good if left <= capacity_bytes else sheet.theme.bad
    mark = axes.axvline(capacity_bytes, color=colour, lw=2.2)
    sheet.name(f"the chip has  {display.size(capacity_bytes)}", mark)
    axis(axes, "x", "memory of a chip", kind="bytes")
    axes.set_xlim(0, 1.06 * max(left, capacity_bytes, 1.0))
    axes.set(ylim=(-0.5, 0.5), yticks=[])
    axes.grid(axis="y", visible=False)


@figure_kind(3.2, 2.8)
def draw_roofline(
    sheet: Sheet,
    flops: float,
    peak_flops_per_s: float,
    traffic: Mapping[str, tuple[float, float]],
    expected_flops_per_s: float,
    finding: str,
) -> None:
    """Draw the roofline (Williams et al. 2009) of each resource, with the step on it.

    Args:
        flops: of a step, one chip.
        peak_flops_per_s: of the chip.
        traffic: (bytes of a step, bytes/s) by resource: hbm, ici, dcn.
        expected_flops_per_s: what published runs suggest.
        finding: the title.
    """
    axes = sheet.figure.subplots()
    sheet.title(finding, "what a chip can reach, by its FLOPs for each byte that a resource moves")
    names = {"hbm": "memory (HBM)", "ici": "links (ICI)", "dcn": "network (DCN)"}
    used = {name: pair for name, pair in traffic.items() if min(pair) > 0 and np.isfinite(pair).all()}
    places = [flops / n_bytes for n_bytes, _ in used.values()]
    ridges = [peak_flops_per_s / rate for _, rate in used.values()]
    if not used or not np.isfinite(flops) or flops <= 0:
        sheet.say(axes, "no resource but compute is used")
        return
    low, high = min([*places, *ridges]) / 4, max([*places, *ridges]) * 8
    heights = [expected_flops_per_s]
    for i, (name, (n_bytes, rate)) in enumerate(used.items()):
        x = np.geomspace(low, high, 200)
        axes.plot(x, np.minimum(peak_flops_per_s, rate * x), color=sheet.colour(i), lw=1.6)
        place = flops / n_bytes
        reached = min(peak_flops_per_s, rate * place)
        heights.append(reached)
        [mark] = axes.plot([place], [reached], "o", ms=9, color=sheet.colour(i), mec=sheet.theme.paper, zorder=4)
        sheet.name(f"{names.get(name, name)}: {display.count(place)} FLOPs/byte", mark)
        sheet.hover(axes, names.get(name, name), [place], [reached], sheet.colour(i))
    line = axes.axhline(expected_flops_per_s, color=sheet.theme.muted, ls="--", lw=1.3)
    sheet.name(f"expected: {display.power(expected_flops_per_s, 2)} FLOP/s", line)
    sheet.name(f"peak: {display.power(peak_flops_per_s, 2)} FLOP/s", Line2D([], [], color=sheet.theme.ink, lw=1))
    axes.axhline(peak_flops_per_s, color=sheet.theme.ink, lw=0.8, zorder=1)
    axis(axes, "x", "intensity (FLOPs/byte)", True, "count")
    axis(axes, "y", "rate of a chip (FLOP/s)", True, "power")
    axes.set_xlim(low, high)
    limits(axes, "y", np.array([min(heights) / 3, peak_flops_per_s * 1.6]), True, 0.0)


@figure_kind(0.4, 0.4)
def draw_mesh(sheet: Sheet, chips: Sequence[Chip], finding: str, drawn: str) -> None:
    """Draw every chip in its place, coloured by the rows of the batch that it reads; hosts are outlined.

    Args:
        chips: in any order.
        finding, drawn: title and the line under it.
    """
    wide = max((chip.x for chip in chips), default=0) + 1
    high = max((chip.y for chip in chips), default=0) + 1
    room = sheet.look.width_in - 0.4
    cell = min(room / wide, 0.5 if not sheet.look.narrow else 0.4)
    sheet.figure.set_figheight(sheet.figure.get_figheight() + cell * high)
    axes = sheet.figure.subplots()
    sheet.title(finding, drawn)
    groups = max((chip.rows for chip in chips), default=0) + 1
    squares: dict[int, list[tuple[float, float]]] = {}
    for chip in chips:
        place = round(chip.rows * (ORDERED_COLOURS - 1) / max(1, groups - 1))
        squares.setdefault(place, []).append((chip.x, chip.y))
    for place, corners in squares.items():
        paths = [Path.unit_rectangle().transformed(_square(x, y, 0.08)) for x, y in corners]
        colour = sheet.ordered(place)
        axes.add_patch(PathPatch(Path.make_compound_path(*paths), color=colour, alpha=0.35, lw=0))
    hosts: dict[int, list[Chip]] = {}
    for chip in chips:
        hosts.setdefault(chip.host, []).append(chip)
    for members in hosts.values():
        x, y = min(chip.x for chip in members), min(chip.y for chip in members)
        across, down = max(chip.x for chip in members) - x + 1, max(chip.y for chip in members) - y + 1
        outline = Rectangle((x + 0.02, y + 0.02), across - 0.04, down - 0.04, fill=False, ec=sheet.theme.ink, lw=0.8)
        axes.add_patch(outline)
    if len(chips) <= MOST_LABELLED and cell > 0.24:
        for chip in chips:
            text = f"{chip.rows}·{chip.weights}"
            axes.text(chip.x + 0.5, chip.y + 0.5, text, ha="center", va="center", fontsize=6.5 if cell < 0.4 else 8)
    axes.set(xlim=(0, wide), ylim=(high, 0), aspect="equal", xticks=[], yticks=[])
    axes.axis("off")


def _square(x: float, y: float, gap: float):
    from matplotlib.transforms import Affine2D

    return Affine2D().scale(1 - 2 * gap).translate(x + gap, y + gap)


@figure_kind(3.2, 2.8)
def draw_candidates(sheet: Sheet, candidates: Sequence[Candidate], capacity_bytes: float, finding: str) -> None:
    """Draw the layouts that a search tried: a chip's memory against the expected time of a step."""
    axes = sheet.figure.subplots()
    sheet.title(finding, "each mark a mesh with its remat and microbatches")
    good = [c for c in candidates if np.isfinite([c.memory_bytes, c.step_s]).all() and c.step_s > 0]
    if not good:
        sheet.say(axes, "no layout fits")
        return
    memory, times = np.array([c.memory_bytes for c in good]), np.array([c.step_s for c in good])
    marks = axes.scatter(memory, times, s=16, color=sheet.colour(0), alpha=0.6, lw=0)
    sheet.name(display.plural(len(good), "layout"), marks)
    for c in (c for c in good if c.best):
        ring = axes.scatter([c.memory_bytes], [c.step_s], s=130, facecolors="none", edgecolors=sheet.colour(1), lw=2)
        sheet.name(display.shorten(f"best: {c.name}", 44), ring)
        sheet.hover(axes, c.name, [c.memory_bytes], [c.step_s], sheet.colour(1))
    line = axes.axvline(capacity_bytes, color=sheet.theme.bad, lw=1.4, ls="--")
    sheet.name(f"the chip has {display.size(capacity_bytes)}", line)
    axis(axes, "x", "memory of a chip", kind="bytes")
    axis(axes, "y", "expected time of a step", True, "seconds")
    limits(axes, "x", np.append(memory, capacity_bytes), margin=0.06)
    limits(axes, "y", times, True, 0.08)
