"""What `gptjax scaling fit` says of a table: the law, its intervals, each budget's floor, and the frontier."""

from dataclasses import asdict
from typing import Any

import numpy as np

from gptjax.laws.isoflop import METHODS, find_floors, frontier
from gptjax.laws.parametric import DELTA, fit_law, fit_overtraining
from gptjax.laws.table import Table
from gptjax.laws import uncertainty

Said = tuple[dict[str, Any], list[str]]  # for a program, and for a reader


def describe_fit(table: Table, delta: float = DELTA, resamples: int = 400) -> Said:
    """Fit the parametric law and, where budgets repeat, the frontier; say both with intervals.

    Raises:
        UserError: rows that cannot determine the law.
    """
    law = fit_law(table.params, table.tokens, table.loss, delta)
    intervals = uncertainty.law_intervals(uncertainty.resampled_laws(law, table, resamples, delta))
    std = uncertainty.noise(law, table)
    values: dict[str, Any] = {**asdict(law), "exponent": law.exponent, "rows": len(table), "noise": std}
    values["intervals"] = intervals
    lines = [f"L = E + A/N^alpha + B/D^beta on {len(table)} rows (interval: middle 95 % of {resamples} bootstraps)"]
    for name, (low, high) in intervals.items():
        lines.append(f"  {name:9}{getattr(law, name):12.5g}   {low:.5g} to {high:.5g}")
    lines += [f"  objective {law.objective:.6g}, noise {100 * std:.2f} % of the loss"]
    if not law.converged:
        lines.append(
            f"  NOT CONVERGED: it would still fall by {law.newton_decrement:.1g}, or these rows do not determine E"
        )
    budget = 10 * float(table.flops.max())
    ratio = float(np.median(table.flops / table.params / table.tokens))
    params, tokens = map(float, law.optimum(budget, ratio))
    values["optimum"] = {"flops": budget, "params": params, "tokens": tokens, "loss": law.loss(params, tokens)}
    lines.append(f"  at {budget:.3g} FLOPs the law's optimum is {params:.4g} params, {tokens:.4g} tokens")
    values["frontier"], said = _describe_frontier(table, std)
    lines += said
    return values, lines


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
        for f in floors:
            found = f"{f.flops:.3g} FLOPs: {f.params:.4g} params, {f.tokens:.4g} tokens, loss {f.loss:.4f}"
            lines.append(f"  refused: {f.refused}" if f.refused else f"  {found}")
        exponents = frontier(floors)
        if exponents is None:
            lines.append("  fewer than two floors stand: no frontier")
            continue
        spread = uncertainty.frontier_intervals(table, method, std)
        for number, (name, line) in enumerate(zip(("params", "tokens"), exponents, strict=True)):
            known = {"exponent": line.exponent, "factor": line.factor}
            values[method][name] = known | ({"interval": spread[number]} if spread else {})
            said = f"   {spread[number][0]:.4f} to {spread[number][1]:.4f}" if spread else "   interval unresolved"
            lines.append(f"  optimal {name} ~ C^{line.exponent:.4f}{said}")
    return values, lines


def describe_overtraining(table: Table) -> Said:
    """Fit Gadre's over-training law, and say it.

    Raises:
        UserError: rows that cannot determine the law.
    """
    law = fit_overtraining(6 * table.params * table.tokens, table.tokens / table.params, table.loss)
    return asdict(law), [
        f"L = E + (a M^eta + b M^-eta) C^-eta on {len(table)} rows, with M = tokens / params",
        *(f"  {name:4}{value:.5g}" for name, value in asdict(law).items()),
    ]
