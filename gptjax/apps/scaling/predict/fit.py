"""`gptjax scaling fit` of a table: the law, its intervals, each budget's floor, and the frontier."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from gptjax.apps.scaling.laws import uncertainty
from gptjax.apps.scaling.laws.isoflop import METHODS, find_floors, frontier
from gptjax.apps.scaling.laws.parametric import DELTA, Law, PowerLaw, fit_law, fit_overtraining
from gptjax.apps.scaling.laws.reweighted import fit_reweighted
from gptjax.apps.scaling.laws.table import Table, numbers, read_rows, read_table
from gptjax.apps.scaling.laws.tuning import fit_batch, fit_rate, fit_repetition, fit_scales, rate_valleys
from gptjax.errors import UserError
from gptjax.shell.display import MISSING, count, indent, power, significant
from gptjax.shell.display import table as table_lines

LEFT_OUT = 40  # number of rows to omit one at a time; more would take minutes
Findings = tuple[dict[str, Any], list[str]]  # values for a program, and lines for a reader


def describe_fit(table: Table, delta: float = DELTA, resamples: int = 400) -> Findings:
    """Fit the parametric law and, where budgets repeat, the frontier; return both with intervals.

    Raises:
        UserError: rows that cannot determine the law.
    """
    refuse_unstraddled(table)
    law = fit_law(table.params, table.tokens, table.loss, delta)
    intervals = uncertainty.law_intervals(uncertainty.resampled_laws(law, table, resamples, delta))
    std = uncertainty.noise(law, table)
    values: dict[str, Any] = {**asdict(law), "exponent": law.exponent, "rows": len(table), "noise": std}
    values["intervals"] = intervals
    lines = [f"L = E + A/N^alpha + B/D^beta on {len(table)} rows (interval: middle 95 % of {resamples} bootstraps)"]
    cells = [[name, *(significant(v, 4) for v in (getattr(law, name), *ends))] for name, ends in intervals.items()]
    lines += indent(table_lines(cells, ("", "value", "from", "to")))
    lines += [f"  objective {significant(law.objective)}, noise {100 * std:.2f} % of the loss"]
    if not law.converged:
        lines.append(
            f"  NOT CONVERGED: it would still fall by {law.newton_decrement:.1g}, or these rows do not determine E"
        )
    budget = 10 * float(table.flops.max())
    ratio = float(np.median(table.flops / table.params / table.tokens))
    params, tokens = map(float, law.optimum(budget, ratio))
    values["optimum"] = {"flops": budget, "params": params, "tokens": tokens, "loss": law.loss(params, tokens)}
    lines.append(f"  at {power(budget)} FLOPs the law's optimum is {count(params)} params, {count(tokens)} tokens")
    values["frontier"], frontier_lines = _describe_frontier(table, std)
    lines += frontier_lines
    return values, lines


def refuse_unstraddled(table: Table) -> None:
    """Raise UserError for an isoFLOP table of which no budget has its best model inside the grid."""
    tried = [floor.refused for floor in find_floors(table) if "too few" not in floor.refused]
    if tried and all(tried):
        raise UserError(f"no budget straddles its optimum: {'; '.join(tried)}")


def _describe_frontier(table: Table, std: float) -> tuple[dict[str, Any], list[str]]:
    values: dict[str, Any] = {}
    lines: list[str] = []
    for method in METHODS:
        floors = find_floors(table, method)
        if all("too few" in floor.refused for floor in floors):
            return {}, []  # not an isoFLOP table
        lines.append(f"floor of each budget by {method}")
        plain = [asdict(f) if not f.refused else {"flops": f.flops, "refused": f.refused} for f in floors]
        values[method] = {"floors": plain}
        good = [f for f in floors if not f.refused]
        cells = [[power(f.flops), count(f.params), count(f.tokens), f"{f.loss:.4f}"] for f in good]
        lines += indent(table_lines(cells, ("FLOPs", "params", "tokens", "loss"), ())) if good else []
        lines += [f"  refused: {f.refused}" for f in floors if f.refused]
        exponents = frontier(floors)
        if exponents is None:
            lines.append("  fewer than two floors are valid: no frontier")
            continue
        spread = uncertainty.frontier_intervals(table, method, std)
        for number, (name, line) in enumerate(zip(("params", "tokens"), exponents, strict=True)):
            known = {"exponent": line.exponent, "factor": line.factor}
            values[method][name] = known | ({"interval": spread[number]} if spread else {})
            text = f"   {spread[number][0]:.4f} to {spread[number][1]:.4f}" if spread else "   interval unresolved"
            lines.append(f"  optimal {name} ~ C^{line.exponent:.4f}{text}")
    return values, lines


def describe_overtraining(table: Table) -> Findings:
    """Fit Gadre's over-training law, and return it with intervals.

    Raises:
        UserError: rows that cannot determine the law.
    """
    inputs = 6 * table.params * table.tokens, table.tokens / table.params
    law = fit_overtraining(*inputs, table.loss)
    std = uncertainty.deviation(np.log(table.loss / law.loss(*inputs)), free=4)
    spread = uncertainty.disturbed_intervals(lambda loss: asdict(fit_overtraining(*inputs, loss)), table.loss, std)
    lines = [f"L = E + (a M^eta + b M^-eta) C^-eta on {len(table)} rows, with M = tokens / params"]
    lines += [f"  {name:4}{value:.5g}{_to(spread.get(name))}" for name, value in asdict(law).items()]
    return {**asdict(law), "intervals": spread}, lines


def _to(spread: uncertainty.Interval | None) -> str:
    return f"   {spread[0]:.4g} to {spread[1]:.4g}" if spread else "   interval unresolved"


def describe_sensitivity(path: Path, loss: str = "loss") -> Findings:
    """Fit the law with choices changed that should not matter: delta, rows, budgets, the count of N.

    Raises:
        UserError: as `read_table` and `fit_law`.
    """
    table = read_table(path, "params", loss)
    law = fit_law(table.params, table.tokens, table.loss)
    budget, budgets = 10 * float(table.flops.max()), table.budgets()
    start = [[*np.log([law.E, law.A, law.B]), law.alpha, law.beta]]
    changed: dict[str, tuple[Table, float]] = {"as it is": (table, DELTA)}
    changed |= {f"delta {delta:g}": (table, delta) for delta in (1e-4, 1e-2)}
    worst = np.argsort(table.loss)
    for k, name in ((1, "highest loss"), (3, "three highest losses")):
        changed[f"without the {name}"] = table.take(np.sort(worst[:-k])), DELTA
    shown = {f"without {c:.3g} FLOPs": f"without {power(c)} FLOPs" for c in np.unique(budgets)}
    changed |= {name: (table.take(budgets != c), DELTA) for name, c in zip(shown, np.unique(budgets), strict=True)}
    names = [name for name in read_rows(path)[0] if name.startswith("params_")]
    changed |= {f"N is {name}": (read_table(path, name, loss), DELTA) for name in names}
    values: dict[str, Any] = {}
    cells: list[list[str]] = []
    for name, (rows, delta) in changed.items():
        starts = None if name.startswith("N is") or name == "as it is" else start
        try:
            fit = (
                law
                if rows is table and delta == DELTA
                else fit_law(rows.params, rows.tokens, rows.loss, delta, starts=starts)
            )
        except UserError as reason:
            cells.append([shown.get(name, name), *[MISSING] * 5, str(reason)])
            continue
        values[name] = {
            "choice": shown.get(name, name),
            "exponent": fit.exponent,
            "alpha": fit.alpha,
            "beta": fit.beta,
            "E": fit.E,
        }
        values[name]["loss"] = _best_loss(fit, rows, budget)
        v = values[name]
        fitted = [f"{v[key]:.3f}" for key in ("exponent", "alpha", "beta")]
        cells.append([shown.get(name, name), *fitted, f"{v['E']:.4f}", f"{v['loss']:.4f}"])
    away = np.abs(np.log(table.loss / law.loss(table.params, table.tokens)))
    farthest = np.argsort(-away)[:LEFT_OUT]
    without = np.ones((len(farthest), len(table)))
    without[np.arange(len(farthest)), farthest] = 0
    one_out = [fit.exponent for fit in fit_reweighted(law, table.params, table.tokens, table.loss, without)]
    values["one row left out"] = {"exponent": [min(one_out), max(one_out)]}
    which = "any one row" if len(table) <= LEFT_OUT else f"any of the {LEFT_OUT} rows farthest from the law"
    lines = table_lines(cells, ("", "a", "alpha", "beta", "E", f"loss at {power(budget, 2)}", ""), (0, -1))
    lines.append(f"{which} left out: a from {min(one_out):.3f} to {max(one_out):.3f}")
    return values, lines


def _best_loss(law: Law, table: Table, flops: float) -> float:
    """Return the law's least loss at a budget."""
    ratio = float(np.median(table.flops / table.params / table.tokens))
    return float(law.loss(*law.optimum(flops, ratio)))


def describe_repetition(path: Path, params: str = "params", loss: str = "loss") -> Findings:
    """Fit the law of repeated data to a table with the column epochs, and return it; raise UserError as the fit."""
    rows = _done(path)
    if not rows or "epochs" not in rows[0]:
        raise UserError(f"table {str(path)!r} has no column 'epochs'; the cost of repeating needs it")
    N, D, L, epochs = (numbers(rows, name, path) for name in (params, "tokens", loss, "epochs"))
    law, unique = fit_repetition(N, D, L, epochs), D / np.maximum(1, epochs)
    std = uncertainty.deviation(np.log(L / law.loss(N, D, unique)), free=7)

    def scales(disturbed: np.ndarray) -> dict[str, float]:
        again = fit_scales(law.law, N, D, disturbed, unique)
        return {"R_D": again.R_D, "R_N": again.R_N}

    spread = uncertainty.disturbed_intervals(scales, L, std, resamples=100)
    values = {**asdict(law.law), "R_D": law.R_D, "R_N": law.R_N, "intervals": spread}
    lines = ["repeating data, the law of one epoch held fixed (Muennighoff et al.: 15.4 and 5.3)"]
    lines += [f"  {name}* {value:.4g}{_to(spread.get(name))}" for name, value in (("R_D", law.R_D), ("R_N", law.R_N))]
    return values, lines


def describe_batch(path: Path, target: float | None = None) -> Findings:
    """Fit the critical batch of each shape to a table with batch_tokens; raise UserError as the fit."""
    rows, values, lines = _done(path), {}, []
    if not rows or "batch_tokens" not in rows[0]:
        raise UserError(f"table {str(path)!r} has no column 'batch_tokens'; the critical batch needs it")
    params, batch, tokens, loss = (numbers(rows, name, path) for name in ("params", "batch_tokens", "tokens", "loss"))
    for N in np.unique(params):
        at = params == N
        law = fit_batch(batch[at], tokens[at], loss[at], target)
        values[f"{N:.4g}"] = asdict(law)
        low, high = law.critical_interval
        lines.append(f"{count(N)} params to a loss of {law.target:.4f}: at least {count(law.least_tokens)} tokens, ")
        lines[-1] += f"critical batch {law.critical:,.0f} tokens a step ({low:,.0f} to {high:,.0f})"
    return values, lines


def describe_rates(path: Path) -> Findings:
    """Return each valley of the loss over the learning rate, its sensitivity, and how the best rate moves with the
    budget.

    Raises:
        UserError: no shape and budget of the table has two rates.
    """
    valleys = valleys_of_rate(read_rows(path))
    if not valleys:
        raise UserError(f"{path} has no shape and budget with two learning rates; give sweeps.peak_lr")
    law = fit_rate(valleys)
    values: dict[str, Any] = {"law": None if law is None else asdict(law), "valleys": []}
    lines = []
    for v in valleys:
        best = None if v.refused else v.best
        values["valleys"].append({"params": v.params, "flops": v.flops, "best": best, "sensitivity": v.sensitivity})
        text = f"refused: {v.refused}" if v.refused else f"best rate {significant(v.best)}"
        lines.append(f"{count(v.params)} params, {power(v.flops)} FLOPs: {text}; sensitivity {v.sensitivity:.4f}")
    lines.append("no law of the rate" if law is None else f"best rate ~ C^{law.exponent:.3f}")
    return values, lines


def rate_law(rows: list[dict[str, str]]) -> PowerLaw | None:
    """Return the best learning rate over FLOPs; None where the rows do not determine it."""
    return fit_rate(valleys_of_rate(rows)) if rows and "peak_lr" in rows[0] else None


def rate_interval(rows: list[dict[str, str]], flops: float, std: float) -> uncertainty.Interval | None:
    """Return the interval of the best rate at a budget under noise `std` of the log loss; None where it is
    undetermined.
    """
    *swept, loss = _rate_columns(rows)

    def best(disturbed: np.ndarray) -> dict[str, float]:
        law = fit_rate(list(rate_valleys(*swept, disturbed)))
        if law is None:
            raise UserError("no law of the rate")
        return {"rate": float(law(flops))}

    return uncertainty.disturbed_intervals(best, loss, std).get("rate")


def valleys_of_rate(rows: list[dict[str, str]]) -> list[Any]:
    """Return the valley of each shape and budget with several rates."""
    return list(rate_valleys(*_rate_columns(rows)))


def _rate_columns(rows: list[dict[str, str]]) -> list[np.ndarray]:
    capped = [  # a diverged run counts with its first loss
        {**row, "loss": row["first_loss"]} if row.get("status") == "diverged" else row
        for row in rows
        if row.get("status") != "diverged" or row.get("first_loss")
    ]
    return [numbers(capped, name) for name in ("params", "budget_flops", "peak_lr", "loss")]


def _done(path: Path) -> list[dict[str, str]]:
    return [row for row in read_rows(path) if row.get("status", "done") == "done"]
