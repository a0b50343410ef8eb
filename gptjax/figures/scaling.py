"""Figures of scaling studies: compute, valleys, residuals, learning rates, batches, widths, forecasts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from gptjax.figures.style import ORDERED_COLOURS, Sheet, axis, figure_kind, limits
from gptjax.shell import display

LOSS = "loss (nats per token)"
COMPUTE = "training compute (FLOPs)"
MOST_KEYS = 9  # entries of a legend that lists budgets or sizes


@dataclass(frozen=True)
class Runs:
    """Finished runs; all [n].

    Attributes:
        params, flops, loss: size, training compute, final loss.
        names: of the runs, for the pointer.
    """

    params: np.ndarray
    flops: np.ndarray
    loss: np.ndarray


@dataclass(frozen=True)
class Band:
    """A line with its 95 % interval over x; all [n]."""

    x: np.ndarray
    y: np.ndarray
    low: np.ndarray
    high: np.ndarray


@dataclass(frozen=True)
class Valley:
    """The runs of one budget, by rising size.

    Attributes:
        flops: the budget.
        params, losses: [n].
        floor: (size, loss) of the least loss; None where the runs have none that can be trusted.
        curve: (sizes, losses) of the law; None without one.
    """

    flops: float
    params: np.ndarray
    losses: np.ndarray
    floor: tuple[float, float] | None = None
    curve: tuple[np.ndarray, np.ndarray] | None = None


@dataclass(frozen=True)
class Sweep:
    """A loss over something that was swept, both [n]; `best` is where it is least, if known."""

    name: str
    values: np.ndarray
    losses: np.ndarray
    best: float | None = None


@dataclass(frozen=True)
class Forecast:
    """A forecast of one run: its label, the loss with its interval, and what came (None: not yet)."""

    name: str
    loss: float
    low: float
    high: float
    came: float | None = None


def classes(values: np.ndarray) -> tuple[np.ndarray, list[tuple[float, int]]]:
    """Return the colour of each positive value, [n] places on the ordered scale, and the legend's (value, place)s."""
    known = np.unique(values)
    if len(known) <= MOST_KEYS:
        places = np.rint(np.linspace(0, ORDERED_COLOURS - 1, len(known)) if len(known) > 1 else [0]).astype(int)
        return places[np.searchsorted(known, values)], list(zip(known.tolist(), places.tolist(), strict=True))
    low, high = np.log(known[0]), np.log(known[-1])
    places = np.rint((np.log(values) - low) / (high - low) * (ORDERED_COLOURS - 1)).astype(int)
    shown = range(0, ORDERED_COLOURS, 2)
    ends = np.exp(np.linspace(low, high, ORDERED_COLOURS))
    return places, [(float(ends[i]), i) for i in shown]


def _good(*columns: np.ndarray) -> np.ndarray:
    return np.all([np.isfinite(column) & (np.asarray(column) > 0) for column in columns], axis=0)


@figure_kind(3.4, 2.9)
def draw_compute(
    sheet: Sheet, runs: Runs, frontier: Band | None, held: Runs, forecasts: Band | None, finding: str
) -> None:
    """Draw every run's loss over its compute, with the law's frontier and the runs that no fit has seen.

    Args:
        frontier: the law's least loss at each budget.
        held: the runs that were held out.
        forecasts: what was forecast of held-out runs, at their compute, with intervals.
        finding: the title.
    """
    axes = sheet.figure.subplots()
    sheet.title(finding, "each mark a run, coloured by its size")
    good, apart = _good(runs.params, runs.flops, runs.loss), _good(held.flops, held.loss)
    if not good.any():
        sheet.say(axes, "no finished run")
        return
    N, C, L = runs.params[good], runs.flops[good], runs.loss[good]
    if frontier is not None:
        axes.fill_between(frontier.x, frontier.low, frontier.high, color=sheet.colour(0), alpha=0.18, lw=0)
        [line] = axes.plot(frontier.x, frontier.y, color=sheet.colour(0), lw=1.4)
        sheet.name("the law's least loss, with 95 % interval", (Patch(color=sheet.colour(0), alpha=0.18, lw=0), line))
    places, key = classes(N)
    for value, place in key:
        colour = sheet.ordered(place)
        sheet.name(f"{display.count(value)} parameters", Line2D([], [], marker="o", ls="", ms=5, color=colour))
    axes.scatter(C, L, s=20, color=[sheet.ordered(place) for place in places], zorder=3)
    order = np.argsort(C, kind="stable")
    sheet.hover(axes, "run", C[order], L[order], sheet.theme.ink)
    bad, ink = sheet.theme.bad, sheet.theme.ink
    if forecasts is not None and len(forecasts.x):
        reach = [forecasts.y - forecasts.low, forecasts.high - forecasts.y]
        bars = axes.errorbar(forecasts.x, forecasts.y, reach, fmt="_", color=ink, capsize=4, ms=9, zorder=4)
        sheet.name("forecast, with 95 % interval", bars)
    if apart.any():
        stars = axes.scatter(held.flops[apart], held.loss[apart], marker="*", s=120, color=bad, zorder=5)
        sheet.name("held out of the fit", stars)
        sheet.hover(axes, "held out", held.flops[apart], held.loss[apart], bad)
    axis(axes, "x", COMPUTE, True, "power")
    axis(axes, "y", LOSS, True, "plain")
    limits(axes, "x", np.concatenate([C, held.flops[apart]]), True, 0.06)
    around = [L, held.loss[apart]] + ([forecasts.low, forecasts.high] if forecasts is not None else [])
    limits(axes, "y", np.concatenate(around), True, 0.06)


@figure_kind(3.4, 2.9)
def draw_valleys(sheet: Sheet, valleys: Sequence[Valley], finding: str) -> None:
    """Draw each budget's losses over the size, the law's curve through them, and the floor where there is one."""
    axes = sheet.figure.subplots()
    sheet.title(finding, "a curve for each budget: runs, the law, and the size of least loss")
    shown = [valley for valley in valleys if _good(valley.params, valley.losses).any()]
    if not shown:
        sheet.say(axes, "no budget with a finished run")
        return
    _, key = classes(np.array([valley.flops for valley in shown]))
    places, _ = classes(np.array([valley.flops for valley in shown]))
    for valley, place in zip(shown, places, strict=True):
        colour = sheet.ordered(int(place))
        good = _good(valley.params, valley.losses)
        axes.plot(valley.params[good], valley.losses[good], "o", color=colour, zorder=3)
        sheet.hover(axes, f"{display.power(valley.flops, 2)} FLOPs", valley.params[good], valley.losses[good], colour)
        if valley.curve is not None:
            axes.plot(*valley.curve, color=colour, lw=1.2)
        if valley.floor is not None:
            axes.plot(*valley.floor, "v", ms=9, mfc="none", mew=1.6, color=colour, zorder=4)
    for value, place in key:
        sheet.name(f"{display.power(value, 2)} FLOPs", Line2D([], [], color=sheet.ordered(place), marker="o", lw=1.2))
    if any(valley.floor is not None for valley in shown):
        sheet.name(
            "size of least loss", Line2D([], [], ls="", marker="v", ms=9, mfc="none", mew=1.6, color=sheet.theme.ink)
        )
    axis(axes, "x", "size (parameters)", True, "count")
    axis(axes, "y", LOSS, True, "plain")
    limits(axes, "x", np.concatenate([valley.params for valley in shown]), True, 0.06)
    limits(axes, "y", np.concatenate([valley.losses for valley in shown]), True, 0.08)


@figure_kind(3.0, 2.6)
def draw_residuals(sheet: Sheet, runs: Runs, predicted: np.ndarray, noise: float) -> None:
    """Draw what the law leaves of each run's loss, over the size.

    Args:
        predicted: [n], the law's loss.
        noise: standard deviation of log loss about the law.
    """
    axes = sheet.figure.subplots()
    sheet.title(
        f"Runs scatter by {100 * noise:.2f} % of the loss about the law",
        "loss over the law's; shaded: two deviations",
    )
    good = _good(runs.params, runs.loss, runs.flops, predicted)
    if not good.any():
        sheet.say(axes, "no finished run")
        return
    left = 100 * np.log(runs.loss[good] / predicted[good])
    places, key = classes(runs.flops[good])
    axes.axhspan(-200 * noise, 200 * noise, color=sheet.theme.muted, alpha=0.12, lw=0)
    axes.axhline(0, color=sheet.theme.muted, lw=1)
    axes.scatter(runs.params[good], left, s=20, color=[sheet.ordered(place) for place in places], zorder=3)
    for value, place in key:
        colour = sheet.ordered(place)
        sheet.name(f"{display.power(value, 2)} FLOPs", Line2D([], [], marker="o", ls="", color=colour))
    order = np.argsort(runs.params[good], kind="stable")
    sheet.hover(axes, "over the law, %", runs.params[good][order], left[order], sheet.theme.ink)
    axis(axes, "x", "size (parameters)", True, "count")
    axis(axes, "y", "loss over the law's (%)", kind="plain")
    limits(axes, "x", runs.params[good], True, 0.06)
    limits(axes, "y", np.append(left, [-200 * noise, 200 * noise]), margin=0.08)


@figure_kind(3.2, 5.2)
def draw_sweeps(
    sheet: Sheet,
    panels: Mapping[str, Sequence[Sweep]],
    finding: str,
    x: str = "peak learning rate",
    kind: str = "power",
) -> None:
    """Draw the loss over what was swept, a curve for each shape and budget, a panel for each recipe.

    Args:
        panels: the curves by the recipe's name.
        finding: the title.
        x: what was swept, with its unit.
        kind: how its ticks are written.
    """
    number = max(1, len(panels))
    rows, columns = (number, 1) if sheet.look.narrow else (1, number)
    grid = sheet.figure.subplots(rows, columns, squeeze=False, sharey=True).ravel()
    sheet.title(finding, "each curve one model and budget; ring: its best")
    names = list(dict.fromkeys(sweep.name for sweeps in panels.values() for sweep in sweeps))
    everything = [sweep for sweeps in panels.values() for sweep in sweeps]
    losses = np.concatenate([[], *(sweep.losses for sweep in everything)])
    for (title, sweeps), axes in zip(panels.items(), grid, strict=False):
        if number > 1:
            axes.set_title(display.shorten(title, 34), fontsize=9.5, loc="left", color=sheet.theme.ink)
        axis(axes, "x", x, True, kind)
        axis(axes, "y", LOSS if axes is grid[0] or sheet.look.narrow else "", kind="plain")
        _draw_sweeps(sheet, axes, sweeps, names)
    if not len(losses[np.isfinite(losses)]):
        for axes in grid:
            sheet.say(axes, "no finite loss")
        return
    finite = losses[np.isfinite(losses)]
    for axes in grid:
        limits(axes, "y", finite[finite <= np.quantile(finite, 0.98) + 1e-12], margin=0.08)
        limits(axes, "x", np.concatenate([sweep.values for sweep in everything]), True, 0.06)


def _draw_sweeps(sheet: Sheet, axes: Axes, sweeps: Sequence[Sweep], names: list[str]) -> None:
    """Draw one panel's curves; their colours are those of their names' order."""
    for sweep in sweeps:
        at = names.index(sweep.name)
        colour = sheet.ordered(round(at * (ORDERED_COLOURS - 1) / max(1, len(names) - 1)))
        good = np.isfinite(sweep.losses)
        axes.plot(sweep.values[good], sweep.losses[good], "o-", ms=4, lw=1.4, color=colour)
        sheet.hover(axes, sweep.name, sweep.values, sweep.losses, colour)
        if len(names) <= MOST_KEYS or at % -(-len(names) // MOST_KEYS) == 0:
            sheet.name(sweep.name, Line2D([], [], color=colour, marker="o", ms=4))
        if sweep.best is not None and np.isfinite(sweep.best) and good.any():
            height = np.interp(np.log(sweep.best), np.log(sweep.values[good]), sweep.losses[good])
            axes.plot([sweep.best], [height], "o", ms=10, mfc="none", mew=1.6, color=colour, zorder=4)


@figure_kind(3.0, 2.6)
def draw_batch(
    sheet: Sheet, batches: np.ndarray, tokens: np.ndarray, law: Band | None, critical: float, finding: str
) -> None:
    """Draw the tokens that each batch needs to one loss, and the law with its critical batch.

    Args:
        batches, tokens: [n], tokens a step, and tokens to the loss.
        law: the law over batches.
        critical: the critical batch, in tokens a step.
    """
    axes = sheet.figure.subplots()
    sheet.title(finding, "tokens to reach one loss; at the critical batch, twice the least")
    good = _good(batches, tokens)
    if not good.any():
        sheet.say(axes, "no batch reaches the loss")
        return
    axes.plot(batches[good], tokens[good], "o", color=sheet.colour(0), zorder=3)
    sheet.name("runs", Line2D([], [], ls="", marker="o", color=sheet.colour(0)))
    sheet.hover(axes, "tokens", batches[good], tokens[good], sheet.colour(0))
    if law is not None:
        [line] = axes.plot(law.x, law.y, color=sheet.colour(0), lw=1.4)
        sheet.name("least tokens × (1 + batch / critical)", line)
    if np.isfinite(critical) and critical > 0:
        mark = axes.axvline(critical, color=sheet.colour(1), ls="--", lw=1.3)
        sheet.name(f"critical batch, {display.count(critical)} tokens a step", mark)
    axis(axes, "x", "batch (tokens a step)", True, "count")
    axis(axes, "y", "tokens to the loss", True, "count")
    limits(axes, "x", np.append(batches[good], critical), True, 0.06)
    limits(axes, "y", tokens[good], True, 0.1)


@figure_kind(3.2, 2.8)
def draw_coordinates(
    sheet: Sheet,
    widths: Sequence[float],
    layers: Mapping[str, Sequence[float]],
    slopes: Mapping[str, float],
    finding: str,
) -> None:
    """Draw how much a few steps change the activations, over the width: the coordinate check.

    Args:
        layers: root mean square of the change at each width, by kind of layer.
        slopes: of the logarithms, by kind of layer.
    """
    axes = sheet.figure.subplots()
    sheet.title(finding, "change of the activations over a few steps; flat lines are wanted")
    x, shown = np.asarray(widths, float), []
    for i, (name, values) in enumerate(layers.items()):
        y = np.asarray(values, float)
        good = _good(x, y)
        if good.any():
            shown.append(y[good])
            [line] = axes.plot(x[good], y[good], "o-", ms=4, color=sheet.colour(i))
            sheet.name(f"{display.shorten(name, 24)}, slope {slopes.get(name, float('nan')):+.2f}", line)
            sheet.hover(axes, name, x[good], y[good], sheet.colour(i))
    if not shown:
        sheet.say(axes, "no finite change")
        return
    axis(axes, "x", "width (d_model)", True, "whole")
    axis(axes, "y", "root mean square of the change", True, "plain")
    limits(axes, "x", x, True, 0.06)
    limits(axes, "y", np.concatenate(shown), True, 0.08)


@figure_kind(0.9, 1.0)
def draw_forecasts(sheet: Sheet, forecasts: Sequence[Forecast], finding: str) -> None:
    """Draw each forecast with its interval, and what came, a row each."""
    good = [f for f in forecasts if np.isfinite([f.loss, f.low, f.high]).all()]
    sheet.figure.set_figheight(sheet.figure.get_figheight() + 0.32 * max(1, len(good)))
    axes = sheet.figure.subplots()
    sheet.title(finding, "forecasts written before their runs, with 95 % intervals")
    if not good:
        sheet.say(axes, "no forecast")
        return
    rows, ink = np.arange(len(good))[::-1], sheet.theme.ink
    losses = np.array([f.loss for f in good])
    reach = [losses - [f.low for f in good], [f.high for f in good] - losses]
    bars = axes.errorbar(losses, rows, xerr=reach, fmt="|", color=sheet.colour(0), capsize=5, ms=11, lw=1.8)
    sheet.name("forecast, with 95 % interval", bars)
    came = [(f.came, row) for f, row in zip(good, rows, strict=True) if f.came is not None and np.isfinite(f.came)]
    if came:
        stars = axes.scatter(*zip(*came, strict=True), marker="*", s=110, color=sheet.theme.bad, zorder=4)
        sheet.name("what came", stars)
    axis(axes, "x", LOSS, kind="plain")
    limits(axes, "x", np.array([v for f in good for v in (f.low, f.high, f.came) if v is not None]), margin=0.08)
    axes.set_ylim(-0.6, len(good) - 0.4)
    axes.set_yticks(rows, [display.shorten(f.name, 21 if sheet.look.narrow else 36) for f in good], color=ink)
    axes.grid(axis="y", visible=False)
