"""Check a table for the known ways in which scaling studies go wrong."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from gptjax.apps.scaling.laws import uncertainty
from gptjax.apps.scaling.laws.isoflop import find_floors, frontier, valleys
from gptjax.apps.scaling.laws.parametric import Law, fit_law
from gptjax.apps.scaling.laws.table import Table, numbers, read_rows, read_table
from gptjax.apps.scaling.predict.fit import Findings
from gptjax.shell.display import plural, power

LONG_WARMUP = 0.1  # share of a run's steps (Porian et al. 2024, arXiv 2406.19146, section 3.2)
MANY_EPOCHS = 4  # beyond which repeated tokens are worth clearly less (Muennighoff et al. 2023, arXiv 2305.16264)
FLIP = 0.05  # a difference of exponents that moves N* by a quarter over a hundredfold budget
SHALLOW = 3  # times the noise; the floor of a shallower valley is undetermined
BIAS = 0.02  # share of N* by which a parabola may err without noise


def diagnose(path: Path) -> Findings:
    """Return every reason to distrust the law of a table, each with its figure and its remedy.

    Raises:
        UserError: a table that no law can be fitted to at all.
    """
    rows, table = read_rows(path), read_table(path)
    law = fit_law(table.params, table.tokens, table.loss)
    std = uncertainty.noise(law, table)
    found = [
        {"check": name, "finding": finding}
        for name, check in CHECKS.items()
        for finding in check(path, rows, table, law, std)
    ]
    lines = [f"{entry['check']}: {entry['finding']}" for entry in found]
    passed = [name for name in CHECKS if name not in {entry["check"] for entry in found}]
    lines.append(f"nothing found by: {', '.join(passed) or 'no check'}")
    return {"findings": found, "passed": passed}, lines


Check = Callable[[Path, list[dict[str, str]], Table, Law, float], Iterator[str]]


def convergence(path: Path, rows: list[dict[str, str]], table: Table, law: Law, std: float) -> Iterator[str]:
    """Check whether the rows determine the law."""
    if not law.converged:
        yield "the fit did not converge, or E has vanished: add larger budgets or drop outliers"
    if np.ptp(np.log10(table.flops)) < 1:
        yield f"budgets span {np.ptp(np.log10(table.flops)):.2f} decades of FLOPs: exponents need one or more"


def convention(path: Path, rows: list[dict[str, str]], table: Table, law: Law, std: float) -> Iterator[str]:
    """Check whether the way of counting N decides the exponent (Porian et al. 2024; Pearce & Song 2024)."""
    found = {}
    for name in (name for name in rows[0] if name.startswith("params_")):
        other = read_table(path, name)
        lines = frontier(find_floors(other))
        found[name] = lines[0].exponent if lines else fit_law(other.params, other.tokens, other.loss).exponent
    if found and max(found.values()) - min(found.values()) > FLIP:
        each = ", ".join(f"{value:.3f} by {name}" for name, value in found.items())
        sides = " on both sides of 1/2" if min(found.values()) < 0.5 < max(found.values()) else ""
        yield f"N* ~ C^a has a = {each}{sides}: say which is meant, or train larger models"


def warmup(path: Path, rows: list[dict[str, str]], table: Table, law: Law, std: float) -> Iterator[str]:
    """Check for short runs that warm up for much of their length."""
    if "warmup_steps" in rows[0] and "steps" in rows[0]:
        shares = np.array([float(row["warmup_steps"]) / float(row["steps"]) for row in rows])
        if (shares > LONG_WARMUP).any():
            yield (
                f"{plural((shares > LONG_WARMUP).sum(), 'run')} of {len(rows):,} warm up for up to "
                f"{100 * shares.max():.0f} % of the steps, which "
                "makes large models of small budgets look worse: set warmup_frac"
            )


def repetition(path: Path, rows: list[dict[str, str]], table: Table, law: Law, std: float) -> Iterator[str]:
    """Check for runs that read their data many times."""
    if "epochs" in rows[0]:
        epochs = numbers(rows, "epochs", path)
        if (epochs > MANY_EPOCHS).any():
            yield (
                f"{plural((epochs > MANY_EPOCHS).sum(), 'run')} of {len(rows):,} took more than {MANY_EPOCHS} "
                f"epochs, up to {epochs.max():.1f}: bring more data"
            )


def edges(path: Path, rows: list[dict[str, str]], table: Table, law: Law, std: float) -> Iterator[str]:
    """Check for budgets whose best model is at the edge of the grid, or that have no minimum."""
    for floor in find_floors(table):
        if floor.refused and "too few" not in floor.refused:
            yield floor.refused


def depth(path: Path, rows: list[dict[str, str]], table: Table, law: Law, std: float) -> Iterator[str]:
    """Check for valleys that are no deeper than the noise."""
    for budget, valley in valleys(table):
        rise = min(valley.loss[0], valley.loss[-1]) / valley.loss.min() - 1
        if len(valley) >= 4 and 0 < rise < SHALLOW * std:
            yield (
                f"{power(budget)} FLOPs: the valley is {100 * rise:.2f} % deep and the noise {100 * std:.2f} %: "
                "widen the grid, or add seeds"
            )


def parabola(path: Path, rows: list[dict[str, str]], table: Table, law: Law, std: float) -> Iterator[str]:
    """Check how far parabolas on this grid miss the fitted law's own optimum, without any noise."""
    exact = Table(table.params, table.tokens, law.loss(table.params, table.tokens), table.flops)
    for floor in find_floors(exact, "parabola"):
        if floor.refused:
            continue
        ratio = floor.flops / floor.params / floor.tokens
        bias = floor.params / float(law.optimum(floor.flops, ratio)[0]) - 1
        if abs(bias) > BIAS:
            yield (
                f"{power(floor.flops)} FLOPs: a parabola errs by {100 * bias:+.1f} % in N* even without noise "
                f"(alpha {law.alpha:.2f}, beta {law.beta:.2f}): trust Akima, or narrow the grid"
            )


def divergence(path: Path, rows: list[dict[str, str]], table: Table, law: Law, std: float) -> Iterator[str]:
    """Check for runs that are missing from the fit because they diverged."""
    lost = sum(row.get("status") == "diverged" for row in rows)
    if lost:
        yield f"{lost:,} of {plural(len(rows), 'run')} diverged, and the fit leaves them out: lower their peak_lr"


CHECKS: dict[str, Check] = {
    "convergence": convergence,
    "count of N": convention,
    "warm-up": warmup,
    "epochs": repetition,
    "edge of the grid": edges,
    "depth against noise": depth,
    "bias of the parabola": parabola,
    "divergence": divergence,
}
