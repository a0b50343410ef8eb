"""Write a study as a page: the finding, what not to conclude, figures beside their tables."""

from pathlib import Path
from typing import Any

import numpy as np

from gptjax.apps.scaling.laws import uncertainty
from gptjax.apps.scaling.laws.isoflop import find_floors, frontier
from gptjax.apps.scaling.laws.parametric import VANISHED
from gptjax.apps.scaling.laws.table import read_rows
from gptjax.apps.scaling.predict import fit
from gptjax.apps.scaling.predict.forecast import FARTHEST, Fitted
from gptjax.apps.scaling.predict.plots import exponent_finding, floors_finding, forecast_finding, study_figures
from gptjax.pages.page import Cell, Checklist, Facts, Paragraph, Picture, Section, Table, amount, number, render
from gptjax.shell import display
from gptjax.shell.paths import shell

ABOUT = {
    "compute": "Loss against training compute of every run, with the law's frontier.",
    "isoflop": "Loss against size at each budget.",
    "residuals": "Residual of each run's loss about the law.",
    "rates": "Loss against the peak learning rate.",
    "batch": "Tokens to one loss against the batch.",
    "forecasts": "Forecasts with their intervals, and the losses reached.",
}
SHOWN = {  # columns of the table of runs, with their headings
    "id": "run",
    "params": "parameters",
    "tokens": "tokens",
    "flops": "FLOPs",
    "loss": "loss",
    "status": "status",
    "peak_lr": "peak lr",
    "batch_sequences": "batch",
    "seed": "seed",
    "epochs": "epochs",
    "wall_s": "time",
}


def study_page(
    study: str, path: Path, fitted: Fitted, diagnosis: dict[str, Any], checks: list[str], scores: list[dict[str, Any]]
) -> str:
    """Return the page of a study.

    Args:
        path: its table.
        diagnosis: of `doctor.diagnose`.
        checks: the names of all checks.
        scores: of `forecast.audit`; empty without forecasts.
    """
    figures = study_figures(fitted, path, scores)

    def shown(name: str) -> list[Any]:
        return [Picture(figures[name], ABOUT[name])] if name in figures else []

    sections = [
        Section("", [Paragraph(finding(fitted, scores), lead=True), *shown("isoflop")]),
        Section("What not to conclude", [Paragraph(text) for text in cautions(fitted, path, diagnosis)]),
        Section("The law", [_law_table(fitted), *shown("compute"), *shown("residuals")]),
        Section("Each budget's best size", [_floors_table(fitted)]),
        Section("Forecasts", [*shown("forecasts"), _forecast_table(scores)] if scores else []),
        Section("Learning rate and batch", [*shown("rates"), *shown("batch")]),
        Section("Checks", [Checklist(check_items(diagnosis, checks))]),
        Section("How far the result depends on choices", _sensitivity(path)),
        Section("The runs", [_runs_table(path)]),
        Section("Methods and provenance", _methods(study, path, fitted)),
    ]
    title = f"Scaling study {Path(study).resolve().name}"
    return render(
        title, [section for section in sections if section.blocks], shell("gptjax", "scaling", "report", study)
    )


def finding(fitted: Fitted, scores: list[dict[str, Any]]) -> str:
    """Say in one paragraph what was found, with intervals."""
    table, law = fitted.table, fitted.law
    spread = uncertainty.law_intervals(fitted.laws)
    ends = [display.count(float(edge(table.params)), 2) for edge in (np.min, np.max)]
    budgets = [display.power(float(edge(table.flops)), 2) for edge in (np.min, np.max)]
    text = f"{exponent_finding(fitted)}, over {display.plural(len(table), 'run')} of {ends[0]} to {ends[1]} "
    text += f"parameters and {budgets[0]} to {budgets[1]} FLOPs. "
    text += f"{floors_finding(fitted)}The law L = E + A/N^α + B/D^β has "
    text += f"α {_with(law.alpha, spread['alpha'])}, β {_with(law.beta, spread['beta'])} and "
    text += f"E {_with(law.E, spread['E'])} nats per token; runs scatter by {100 * fitted.noise:.2f} % about it."
    return f"{text} {forecast_finding(scores)}." if scores else text


def _with(value: float, interval: tuple[float, float]) -> str:
    return f"{value:.3f} ({interval[0]:.3f} to {interval[1]:.3f})"


def cautions(fitted: Fitted, path: Path, diagnosis: dict[str, Any]) -> list[str]:
    """Say what the study does not show."""
    table, law = fitted.table, fitted.law
    decades = float(np.ptp(np.log10(table.flops)))
    largest = display.power(float(table.flops.max()), 2)
    beyond = display.power(FARTHEST * float(table.flops.max()), 2)
    warnings = [
        f"The budgets span {decades:.2f} decades. Beyond {FARTHEST} times the largest of them, {largest} FLOPs "
        f"(that is, beyond {beyond}), the law is a guess."
    ]
    low, high = uncertainty.law_intervals(fitted.laws)["E"]
    if not law.converged or low < VANISHED * table.loss.min() or (high - low) > 0.2 * max(law.E, 1e-9):
        warnings.append(
            f"The irreducible loss E is poorly determined ({low:.2f} to {high:.2f}): do not read it as the entropy "
            "of the text."
        )
    rows = read_rows(path)
    if len({row.get("seed") for row in rows}) < 2:
        warnings.append("Every run has the same seed: the scatter about the law is the only estimate of the noise.")
    if len({row.get("peak_lr") for row in rows}) < 2:
        warnings.append(
            "One learning rate served every size; an optimum that moves with the size would bend these curves."
        )
    warnings.append("The exponents hold only for this data, tokenizer, recipe and way of counting N.")
    if diagnosis["findings"]:
        warnings.append(
            f"{display.plural(len(diagnosis['findings']), 'finding')} of the checks below weigh against the law."
        )
    return warnings


def check_items(diagnosis: dict[str, Any], names: list[str]) -> list[tuple[bool, str, str, str]]:
    """Return the doctor's checks with what was found and what to do; those with findings come first."""
    items = []
    for entry in diagnosis["findings"]:
        found, _, remedy = entry["finding"].rpartition(": ")
        items.append((False, entry["check"], found or remedy, remedy if found else ""))
    return items + [(True, name, "nothing found", "") for name in names if name in diagnosis["passed"]]


def _law_table(fitted: Fitted) -> Table:
    names = {"E": "E (nats per token)", "A": "A", "B": "B", "alpha": "α", "beta": "β", "exponent": "a of N* ~ C^a"}
    spread = uncertainty.law_intervals(fitted.laws)
    rows = [
        [Cell(label), number(float(getattr(fitted.law, name))), *(number(edge) for edge in spread[name])]
        for name, label in names.items()
    ]
    return Table("L = E + A/N^α + B/D^β", ["", "value", "95 % from", "to"], rows)


def _floors_table(fitted: Fitted) -> Table | Paragraph:
    floors = find_floors(fitted.table)
    if all("too few" in floor.refused for floor in floors):
        return Paragraph("The runs do not share budgets: there are no valleys, and the frontier is the law's.")
    rows = []
    for floor in floors:
        found = (amount(floor.params), amount(floor.tokens), number(floor.loss, 4))
        least = [Cell(display.MISSING)] * 3 if floor.refused else found
        rows.append([Cell(display.power(floor.flops, 2), floor.flops), *least, Cell(floor.refused)])
    header = ["FLOPs", "parameters", "tokens", "loss (nats/token)", "refused"]
    if not any(floor.refused for floor in floors):
        header, rows = header[:-1], [row[:-1] for row in rows]
    return Table("Size of least loss at each budget", header, rows)


def _forecast_table(scores: list[dict[str, Any]]) -> Table:
    rows = []
    for score in scores:
        low, high = score["interval"]
        done = score["status"] == "done"
        order = ("before" if score["before_the_run"] else "AFTER") if done else display.MISSING
        inside = ("inside" if score["held"] else "OUTSIDE") if done else score["status"]
        error = Cell(f"{100 * score['error']:+.2f} %", score["error"]) if done else Cell(display.MISSING)
        came = number(score.get("loss"), 5)
        forecast = number(score["forecast"], 5)
        rows.append(
            [Cell(score["rung"]), forecast, number(low, 5), number(high, 5), came, error, Cell(inside), Cell(order)]
        )
    header = ["run", "forecast", "95 % from", "to", "came", "off by", "interval", "written"]
    return Table("Forecasts of the loss (nats per token), and what came", header, rows)


def _sensitivity(path: Path) -> list[Any]:
    values, _ = fit.describe_sensitivity(path)
    one_out = values.pop("one row left out", None)
    names = ("exponent", "alpha", "beta", "E", "loss")
    rows = [[Cell(found["choice"]), *(number(float(found[key])) for key in names)] for found in values.values()]
    header = ["choice", "a", "α", "β", "E", "forecast"]
    about = "The fit repeated with other choices; forecast: the loss at ten times the largest budget"
    blocks: list[Any] = [Table(about, header, rows)]
    if one_out:
        low, high = one_out["exponent"]
        blocks.append(Paragraph(f"With any one run left out, a lies between {low:.3f} and {high:.3f}."))
    return blocks


def _runs_table(path: Path) -> Table:
    rows = [*read_rows(path), *read_rows(path, held_out=True)]
    names = [name for name in SHOWN if any(row.get(name) for row in rows)]
    extra = ["held out"] if any(row.get("held_out") in ("1", "true") for row in rows) else []
    shown = []
    for row in rows:
        held = [Cell("yes" if row.get("held_out") in ("1", "true") else "")] if extra else []
        shown.append([_cell(name, row.get(name) or "") for name in names] + held)
    caption = f"All runs ({path.name} has every column in full); loss in nats per token, batch in sequences"
    return Table(caption, [*(SHOWN[name] for name in names), *extra], shown)


def _cell(name: str, text: str) -> Cell:
    try:
        value = float(text)
    except ValueError:
        return Cell(text)
    if name in ("id", "seed"):
        return Cell(text)
    if name == "flops":
        return Cell(display.power(value, 3), text)
    if name == "wall_s":
        return Cell(display.duration(value), text)
    whole = name in ("params", "tokens", "batch_sequences")
    return Cell(display.count(value) if whole else display.significant(value), text)


def _methods(study: str, path: Path, fitted: Fitted) -> list[Any]:
    rows = read_rows(path)
    prints = sorted({row["fingerprint"] for row in rows if row.get("fingerprint")})
    method = (
        "The law is fitted by the sum of Huber terms (δ 1e-3) of log loss from many starts (Hoffmann et al. 2022; "
        f"Besiroglu et al. 2024). Intervals are the middle 95 % of {len(fitted.laws)} fits with random weights on "
        "the runs (Bayesian bootstrap). The best size of a budget is the least value of the Akima interpolant of the "
        "loss over log N (Porian et al. 2024); a budget whose best size is at the edge of the grid is refused."
    )
    found = frontier(find_floors(fitted.table))
    facts = [
        ("study", str(study)),
        ("table", str(path)),
        ("runs in the fit", f"{len(fitted.table):,}"),
        ("data fingerprint", ", ".join(prints) or display.MISSING),
        ("exponent by the law", f"{fitted.law.exponent:.4f}"),
        ("exponent by the floors", display.MISSING if found is None else f"{found[0].exponent:.4f}"),
        ("objective", f"{fitted.law.objective:.6g}"),
        ("converged", "yes" if fitted.law.converged else "no"),
    ]
    return [Paragraph(method), Facts(facts)]
