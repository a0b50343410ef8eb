"""Figures of runs: the loss, any other metric, and several runs side by side."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from gptjax.figures.series import column, smooth, thin, top_of_range
from gptjax.figures.style import MOST_COLOURS, Sheet, axis, figure_kind, limits
from gptjax.shell import display

Rows = Sequence[Mapping[str, Any]]  # of metrics.jsonl


@dataclass(frozen=True)
class Metric:
    """How a metric is drawn.

    Attributes:
        key: in metrics.jsonl.
        label: its name with the unit.
        kind: how its ticks are written.
        noisy: smoothed, and summed up by its median; else by its last value.
        falls: from far above in the first steps, which are left out as those of the loss.
    """

    key: str
    label: str
    kind: str = "plain"
    log: bool = False
    noisy: bool = False
    falls: bool = False


METRICS = (
    Metric("val/bpb", "validation bits per byte", falls=True),
    Metric("lr", "learning rate"),
    Metric("grad_norm", "gradient norm", log=True, noisy=True),
    Metric("tokens_per_s", "throughput (tokens/s)", "count", noisy=True),
    Metric("mfu", "MFU (% of the peak)", "percent", noisy=True),
    Metric("goodput", "goodput (% of the time)", "percent"),
)
EVENTS = {"resume": (":", "muted"), "rollback": ("--", "bad")}


@figure_kind(4.0, 3.4)
def draw_loss(sheet: Sheet, rows: Rows, name: str, events: Rows = ()) -> None:
    """Draw a run's loss over steps and tokens, with its learning rate below.

    Args:
        rows: of metrics.jsonl.
        name: of the run.
        events: of events.jsonl: objects with `step` and `event` (resume, rollback).
    """
    lr_x, lr_y = column(rows, "lr")
    panels = (2, 1) if np.isfinite(lr_y).any() else (1, 1)
    axes = sheet.figure.subplots(*panels, sharex=True, squeeze=False, height_ratios=(5, 1)[: panels[0]]).ravel()
    loss, lowest = axes[0], axes[-1]
    train_x, train_y = column(rows, "train/loss")
    val_x, val_y = column(rows, "val/loss")
    smoothed = smooth(train_y)
    top = top_of_range([(train_x, smoothed), (val_x, val_y)])
    if top is None:
        top = top_of_range([(train_x, smoothed), (val_x, val_y)], share=0.0)
    if top is None:
        sheet.say(loss, "no finite loss is logged")
        sheet.title(display.shorten(name, 60))
        for panel in axes[1:]:
            panel.set_visible(False)
        return
    blue, orange = sheet.colour(0), sheet.colour(1)
    if len(train_x) > 1 and smoothed is not train_y:
        [raw] = loss.plot(*thin(train_x, train_y), color=blue, alpha=0.3, lw=0.8)
        sheet.name("training, as logged", raw)
    if len(train_x):
        marker = "o" if len(train_x) == 1 else ""
        [line] = loss.plot(*thin(train_x, smoothed), color=blue, marker=marker)
        sheet.name("training, smoothed" if smoothed is not train_y else "training", line)
        sheet.hover(loss, "training", train_x, train_y, blue)
    finding = _draw_validation(sheet, loss, val_x, val_y, orange) or f"training loss {_last(smoothed):.4f}"
    shown = _set_range(loss, np.concatenate([train_y, val_y]), top)
    highest = float(np.nanmax(np.concatenate([train_y, val_y])))
    _mark_events(sheet, loss, rows, events)
    axis(loss, "y", "loss (nats per token)", kind="plain")
    axis(lowest, "x", "step", kind="whole")
    steps = np.concatenate([train_x, val_x])
    limits(lowest, "x", np.append(steps, 0), margin=0.02)
    tokens = _tokens_per_step(rows)
    _add_tokens(loss, tokens)
    for rate in axes[1:]:
        axis(rate, "y", "lr", kind="plain")
        limits(rate, "y", np.append(lr_y, 0.0), margin=0.12)
        rate.plot(*thin(lr_x, lr_y), color=sheet.theme.muted, lw=1.2, marker="o" if len(lr_x) == 1 else "")
        sheet.hover(rate, "learning rate", lr_x, lr_y, sheet.theme.muted)
    clipped = f"; the first steps, from {highest:.2f}, lie above" if highest > shown else ""
    steps_said = display.plural(int(steps.max()), "step")
    steps_said += f", {display.count(tokens * steps.max())} tokens" if np.isfinite(tokens) else ""
    sheet.title(f"{display.shorten(name, 60)}: {finding}", f"{steps_said}{clipped}")


def _draw_validation(sheet: Sheet, axes: Axes, x: np.ndarray, y: np.ndarray, colour: str) -> str:
    """Draw the validation loss with its best value marked; return the finding, empty without a finite value."""
    if not np.isfinite(y).any():
        return ""
    many = len(x) > 60
    [line] = axes.plot(*thin(x, y), color=colour, marker="" if many else "o", ms=3.5, zorder=4)
    best = int(np.nanargmin(y))
    ring = axes.scatter([x[best]], [y[best]], s=85, facecolors="none", edgecolors=colour, linewidths=1.6, zorder=5)
    sheet.name("validation", line)
    sheet.name(f"best {y[best]:.4f} at step {int(x[best]):,}", ring)
    sheet.hover(axes, "validation", x, y, colour)
    return f"validation loss {_last(y):.4f} nats per token"


def _last(values: np.ndarray) -> float:
    filled = values[np.isfinite(values)]
    return float(filled[-1]) if len(filled) else float("nan")


def _set_range(axes: Axes, values: np.ndarray, top: float) -> float:
    """Set the range of the loss from its least value up to `top`; return the highest value that is shown."""
    limits(axes, "y", np.append(values[np.isfinite(values) & (values <= top)], top), margin=0.06)
    return axes.get_ylim()[1]


def _mark_events(sheet: Sheet, axes: Axes, rows: Rows, events: Rows) -> None:
    """Mark resumes, rollbacks and skipped steps."""
    for event in events:
        if event.get("event") in EVENTS and display.finite(event.get("step")):
            style, colour = EVENTS[event["event"]]
            line = axes.axvline(event["step"], ls=style, lw=1.2, color=getattr(sheet.theme, colour), zorder=1)
            sheet.name(event["event"], line)
    steps, skipped = column(rows, "skipped")
    steps, skipped = steps[skipped > 0], skipped[skipped > 0]
    if len(steps):
        total, height = skipped.sum(), np.full(len(steps), 0.05)
        marks = axes.scatter(
            steps, height, marker="x", s=22, color=sheet.theme.bad, transform=axes.get_xaxis_transform(), zorder=5
        )
        sheet.name(f"{display.plural(int(total), 'skipped step')}", marks)


def _tokens_per_step(rows: Rows) -> float:
    """Return the tokens of a step, from the last row that has both; NaN where none has."""
    for row in reversed(rows):
        if display.finite(row.get("tokens")) and row.get("step"):
            return row["tokens"] / row["step"]
    return float("nan")


def _add_tokens(axes: Axes, tokens: float) -> None:
    """Put the tokens on a second axis, on top, for so many tokens a step."""
    if not np.isfinite(tokens) or tokens <= 0:
        return
    top = axes.twiny()
    top.grid(False)
    top.spines["top"].set_visible(True)
    low, high = axes.get_xlim()
    top.set_xlim(low * tokens, high * tokens)
    axis(top, "x", "tokens", kind="count")


@figure_kind(2.3, 2.0)
def draw_metric(sheet: Sheet, rows: Rows, metric: Metric) -> None:
    """Draw one metric of a run over its steps."""
    axes = sheet.figure.subplots()
    x, y = column(rows, metric.key)
    if metric.log:
        y = np.where(y > 0, y, np.nan)
    filled = np.isfinite(y)
    sheet.title(metric.label)
    if not filled.any():
        sheet.say(axes, "no finite value is logged")
        return
    said = f"median {_write(np.median(y[filled]), metric.kind)}" if metric.noisy else _write(_last(y), metric.kind)
    title = f"{display.shorten(metric.label, 60)}: {said}{'' if metric.noisy else ' at the end'}"
    colour = sheet.colour(2)
    smoothed = smooth(y) if metric.noisy else y
    if smoothed is not y:
        axes.plot(*thin(x, y), color=colour, alpha=0.3, lw=0.8)
    axes.plot(*thin(x, smoothed), color=colour, marker="o" if len(x) < 40 else "", ms=3.5)
    top = top_of_range([(x, y)]) if metric.falls else None
    above = top is not None and y[filled].max() > top
    sheet.title(title, f"the first steps, from {_write(y[filled].max(), metric.kind)}, lie above" if above else "")
    if above:
        limits(axes, "y", y[y <= top], margin=0.08)
    else:
        low, high = np.quantile(y[filled], [0.0, 1.0 if metric.log or not metric.noisy else 0.999])
        limits(axes, "y", np.append([low, high], [] if metric.log else 0.0), log=metric.log)
    limits(axes, "x", np.append(x, 0.0), margin=0.02)
    axis(axes, "x", "step", kind="whole")
    label = display.shorten(metric.label.partition(" (")[0], 24)
    axis(axes, "y", "" if sheet.look.narrow else label, metric.log, metric.kind)
    sheet.hover(axes, metric.label, x, y, colour)


def _write(value: float, kind: str) -> str:
    if kind == "percent":
        return f"{100 * value:.1f} %" if np.isfinite(value) else display.MISSING
    return display.count(value) if kind == "count" else display.significant(value)


@dataclass(frozen=True)
class Curve:
    """A run as `draw_compare` takes it: its name, and its losses over each of AGAINST that is known; all [n]."""

    name: str
    loss: np.ndarray
    against: Mapping[str, np.ndarray] = field(default_factory=dict)


FAR_APART = 30  # times as long as the shortest run: the axis is then logarithmic
AGAINST = {
    "steps": ("steps", "whole", False),
    "tokens": ("tokens", "count", False),
    "flops": ("training compute (FLOPs)", "power", True),
    "seconds": ("training time", "seconds", False),
}


@figure_kind(5.8, 9.6)
def draw_compare(sheet: Sheet, curves: Sequence[Curve], what: str = "validation loss") -> None:
    """Draw the losses of several runs over steps, tokens, FLOPs and time; the best have colours, the others are grey.

    Args:
        what: the loss that is drawn.
    """
    panels = sheet.figure.subplots(4, 1) if sheet.look.narrow else sheet.figure.subplots(2, 2, sharey=True).ravel()
    finals = [_last(curve.loss) for curve in curves]
    order = np.argsort([value if np.isfinite(value) else np.inf for value in finals], kind="stable")
    coloured = {int(i): sheet.colour(rank) for rank, i in enumerate(order[:MOST_COLOURS])}
    top = max((top_of_range([(np.arange(len(c.loss)), c.loss)]) or -np.inf for c in curves), default=-np.inf)
    for panel, (key, (label, kind, log)) in zip(panels, AGAINST.items(), strict=True):
        known = [curve.against[key] for curve in curves if key in curve.against]
        left = sheet.look.narrow or key in ("steps", "flops")
        axis(panel, "y", "loss (nats per token)" if left else "", kind="plain")
        axis(panel, "x", label, log, kind)
        if not known or not np.isfinite(top):
            sheet.say(panel, f"not recorded: {label}")
            continue
        x_all = np.concatenate(known)
        if not log and _far_apart(known):
            log = True
            axis(panel, "x", label, log, kind)
        limits(panel, "x", x_all if log else np.append(x_all, 0.0), log, 0.03)
        for i in reversed(order):
            _draw_curve(sheet, panel, curves[i], key, coloured.get(int(i)), log)
    if np.isfinite(top):
        filled = np.concatenate([curve.loss[np.isfinite(curve.loss)] for curve in curves])
        for panel in panels:
            limits(panel, "y", np.append(filled[filled <= top], top), margin=0.06)
    for rank, i in enumerate(order[:MOST_COLOURS]):
        handle = Line2D([], [], color=sheet.colour(rank))
        sheet.key[f"{display.shorten(curves[i].name, 22)}  {_last(curves[i].loss):.4f}"] = handle
    if len(curves) > MOST_COLOURS:
        others = Line2D([], [], color=sheet.theme.muted, alpha=0.6)
        sheet.name(display.plural(len(curves) - MOST_COLOURS, "other run"), others)
    sheet.title(_compare_finding(curves, order, finals, what), f"{what}; the first steps lie above")


def _far_apart(known: Sequence[np.ndarray]) -> bool:
    """Return whether the shortest of several runs would be a bar at the left edge of a linear axis."""
    ends = [float(np.nanmax(x)) for x in known if (x > 0).any()]
    return len(ends) > 1 and max(ends) > FAR_APART * min(ends)


def _draw_curve(sheet: Sheet, panel: Axes, curve: Curve, key: str, colour: str | None, log: bool) -> None:
    """Draw one run's loss on one panel."""
    if key not in curve.against:
        return
    x = curve.against[key]
    x = np.where(x > 0, x, np.nan) if log else x
    one = np.isfinite(curve.loss).sum() < 2
    style = {"color": colour or sheet.theme.muted, "lw": 1.7 if colour else 0.8, "alpha": 1.0 if colour else 0.5}
    panel.plot(*thin(x, curve.loss, 400), marker="o" if one else "", zorder=3 if colour else 2, **style)
    if colour:
        sheet.hover(panel, curve.name, x, curve.loss, colour)


def _compare_finding(curves: Sequence[Curve], order: np.ndarray, finals: list[float], what: str) -> str:
    best = order[0] if len(order) else None
    if best is None or not np.isfinite(finals[best]):
        return f"{display.plural(len(curves), 'run')}, none with a finite {what}"
    said = f"{display.shorten(curves[best].name, 40)} has the lowest {what}, {finals[best]:.4f}"
    second = finals[order[1]] if len(order) > 1 else float("nan")
    return f"{said}; the next reaches {second:.4f}" if np.isfinite(second) else said
