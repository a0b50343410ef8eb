"""A study's figures, each titled with what it shows."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from gptjax.apps.scaling.laws import uncertainty
from gptjax.apps.scaling.laws.isoflop import find_floors, frontier, valleys
from gptjax.apps.scaling.laws.table import Table, read_rows
from gptjax.apps.scaling.laws.tuning import fit_batch, fit_rate, tokens_to_target
from gptjax.apps.scaling.predict.fit import valleys_of_rate
from gptjax.apps.scaling.predict.forecast import Fitted
from gptjax.errors import UserError
from gptjax.figures import scaling as figures
from gptjax.figures.style import Look, Sheet, to_bytes
from gptjax.shell import display
from gptjax.shell.paths import writing

Draw = Callable[[Look], Sheet]


def study_figures(fitted: Fitted, path: Path, scores: list[dict[str, Any]]) -> dict[str, Draw]:
    """Return every figure for which a table has the runs, by name.

    Args:
        scores: of the study's forecasts, as `forecast.audit` gives them.
    """
    made: dict[str, Draw] = {"compute": _compute(fitted, path, scores), "residuals": _residuals(fitted)}
    if any("too few" not in floor.refused for floor in find_floors(fitted.table)):
        made["isoflop"] = _valleys(fitted)
    made |= sweep_figures(path)
    if scores:
        made["forecasts"] = _forecasts(scores, path)
    return made


def sweep_figures(path: Path) -> dict[str, Draw]:
    """Return the figures of what a table has swept, which need no law of the loss: learning rate and batch."""
    found = {"rates": _rates(path), "batch": _batch(path)}
    return {name: draw for name, draw in found.items() if draw is not None}


def write_figures(figures_by_name: dict[str, Draw], folder: Path, kind: str) -> list[Path]:
    """Write each figure as FOLDER/NAME.png or .svg."""
    made = []
    for name, draw in figures_by_name.items():
        with writing(folder / f"{name}.{kind}", "the pictures to") as target:
            target.write_bytes(to_bytes(draw(Look()), kind))
        made.append(folder / f"{name}.{kind}")
    return made


def exponent_finding(fitted: Fitted) -> str:
    """Say how the best size grows with compute, by the law."""
    low, high = uncertainty.law_intervals(fitted.laws)["exponent"]
    return f"N* grows as C^{fitted.law.exponent:.2f} (95 %: {low:.2f} to {high:.2f})"


def floors_finding(fitted: Fitted) -> str:
    """Say how the best size grows with compute by the floors of the valleys; empty where fewer than two stand."""
    found = frontier(find_floors(fitted.table))
    if found is None:
        return ""
    spread = uncertainty.frontier_intervals(fitted.table, "akima", fitted.noise)
    known = f"{spread[0][0]:.2f} to {spread[0][1]:.2f}" if spread else "its interval is unresolved"
    return f"By the lowest points of the isoFLOP curves it grows as C^{found[0].exponent:.2f} ({known}). "


def forecast_finding(scores: list[dict[str, Any]]) -> str:
    """Say how the forecasts of finished runs came out."""
    done = [score for score in scores if score["status"] == "done"]
    if not done:
        return f"{display.plural(len(scores), 'forecast')}, none of whose runs is finished"
    inside = sum(bool(score["held"]) for score in done)
    worst = max(abs(score["error"]) for score in done)
    text = f"{inside} of {len(done)} runs came inside their intervals"
    return f"{text}; the forecasts were off by at most {100 * worst:.2f} %"


def _runs(table: Table, by_budget: bool = False) -> figures.Runs:
    return figures.Runs(table.params, table.budgets() if by_budget else table.flops, table.loss)


def _held_rows(path: Path) -> list[dict[str, str]]:
    return [row for row in read_rows(path, held_out=True) if row.get("status") == "done"]


def _compute(fitted: Fitted, path: Path, scores: list[dict[str, Any]]) -> Draw:
    held, table = _held_rows(path), fitted.table
    columns = [np.array([float(row[name]) for row in held]) for name in ("params", "flops", "loss")]
    farthest = max([float(table.flops.max()), *columns[1]])
    x = np.geomspace(table.flops.min() / 1.5, 1.5 * farthest, 60)
    each = np.array([law.loss(*law.optimum(x, fitted.per_param_token)) for law in fitted.laws])
    low, high = np.quantile(each, [0.025, 0.975], axis=0)
    band = figures.Band(x, fitted.law.loss(*fitted.law.optimum(x, fitted.per_param_token)), low, high)
    where = {row["id"]: float(row["flops"]) for row in held if "id" in row}
    known = [(where[s["rung"]], s["forecast"], *s["interval"]) for s in scores if s["rung"] in where]
    forecasts = figures.Band(*np.array(known, float).reshape(-1, 4).T) if known else None
    ends = float(band.y[0]), float(band.y[-1])
    decades = np.log10(x[-1] / x[0])
    finding = f"The law's least loss falls from {ends[0]:.2f} to {ends[1]:.2f} over {decades:.1f} decades of compute"
    finding = forecast_finding(scores) if known else finding
    return lambda look: figures.draw_compute(
        _runs(table), band, figures.Runs(*columns), forecasts, finding, look=look
    )


def _valleys(fitted: Fitted) -> Draw:
    drawn = []
    for (budget, rows), floor in zip(valleys(fitted.table), find_floors(fitted.table), strict=True):
        fine = np.geomspace(rows.params.min(), rows.params.max(), 100)
        tokens = np.exp(np.interp(np.log(fine), np.log(rows.params), np.log(rows.tokens)))
        least = None if floor.refused else (floor.params, floor.loss)
        drawn.append(figures.Valley(budget, rows.params, rows.loss, least, (fine, fitted.law.loss(fine, tokens))))
    finding = exponent_finding(fitted)
    return lambda look: figures.draw_valleys(drawn, finding, look=look)


def _residuals(fitted: Fitted) -> Draw:
    table = fitted.table
    predicted = fitted.law.loss(table.params, table.tokens)
    return lambda look: figures.draw_residuals(_runs(table, by_budget=True), predicted, fitted.noise, look=look)


def _rates(path: Path) -> Draw | None:
    rows = read_rows(path)
    if len({row.get("peak_lr") for row in rows}) < 2:
        return None
    found = valleys_of_rate(rows)
    sweeps = [
        figures.Sweep(
            f"{display.count(v.params)} parameters, {display.power(v.flops, 2)} FLOPs", v.rates, v.losses, v.best
        )
        for v in found
    ]
    law = fit_rate(found)
    finding = (
        "The rows determine no law of the learning rate"
        if law is None
        else f"The best rate goes as C^{law.exponent:.2f}"
    )
    return partial(_draw_sweeps, {"": sweeps}, finding)


def _draw_sweeps(panels: dict[str, list[figures.Sweep]], finding: str, look: Look) -> Sheet:
    return figures.draw_sweeps(panels, finding, look=look)


def _batch(path: Path) -> Draw | None:
    """Return the figure of the critical batch of the table's largest shape; None where nothing was swept."""
    rows = [row for row in read_rows(path) if row.get("status", "done") == "done"]
    if len({row.get("batch_tokens") for row in rows}) < 3:
        return None
    names = ("params", "batch_tokens", "tokens", "loss")
    params, batch, tokens, loss = np.array([[float(row[name]) for name in names] for row in rows]).T
    at = params == params.max()
    try:
        law = fit_batch(batch[at], tokens[at], loss[at])
    except UserError:
        return None
    _, sizes, needed = tokens_to_target(batch[at], tokens[at], loss[at])
    x = np.geomspace(sizes.min() / 1.3, sizes.max() * 1.3, 60)
    band = figures.Band(x, law.tokens(x), law.tokens(x), law.tokens(x))
    low, high = law.critical_interval
    finding = f"The critical batch is {law.critical:,.0f} tokens a step (95 %: {low:,.0f} to {high:,.0f}) "
    finding += f"at a loss of {law.target:.3f}"
    return lambda look: figures.draw_batch(sizes, needed, band, law.critical, finding, look=look)


def _forecasts(scores: list[dict[str, Any]], path: Path) -> Draw:
    rows = {row.get("id"): row for row in read_rows(path, held_out=True)}
    drawn = []
    for score in scores:
        row = rows.get(score["rung"], {})
        name = (
            f"{display.power(float(row['flops']), 2)} FLOPs, {display.count(float(row['params']))}"
            if row
            else score["rung"]
        )
        drawn.append(figures.Forecast(name, score["forecast"], *score["interval"], score.get("loss")))
    finding = forecast_finding(scores)
    return lambda look: figures.draw_forecasts(drawn, finding, look=look)
