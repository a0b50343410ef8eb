"""The verbs of `gptjax scaling` that read a study's table: each fits, and prints or writes the result."""

import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

# Before numpy is imported: on tables of a few hundred rows, BLAS threads only wait for each other.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from gptjax.errors import UserError
from gptjax.shell.display import count, power
from gptjax.shell.paths import UserPath, shell, writing


def _print_result(result: tuple[dict[str, Any], list[str]], as_json: bool) -> None:
    values, lines = result
    print(json.dumps(_plain(values), allow_nan=False) if as_json else "\n".join(lines))


def _plain(values: Any) -> Any:
    """Return the values with None for numbers that are not finite, which JSON cannot express."""
    if isinstance(values, dict):
        return {name: _plain(value) for name, value in values.items()}
    if isinstance(values, list | tuple):
        return [_plain(value) for value in values]
    return None if isinstance(values, float) and not math.isfinite(values) else values


def fit(
    study: UserPath | None = None,
    table: UserPath | None = None,
    law: Literal["chinchilla", "overtraining", "repetition", "batch", "rate"] = "chinchilla",
    params: str = "params",
    loss: str = "loss",
    delta: float = 1e-3,
    resamples: int = 400,
    target: float | None = None,
    sensitivity: bool = False,
    json: bool = False,
) -> None:
    """Fit a law of the loss to a study's finished runs, or to a table.

    Args:
        study: the study's directory, after `collect`.
        table: a CSV file instead, with columns params, tokens, loss and perhaps flops (else 6 N D).
        law: L = E + A/N^alpha + B/D^beta; Gadre's law for models trained far beyond their optimum; Muennighoff's of
            repeated data (column epochs); the critical batch (batch_tokens); or the best learning rate (peak_lr).
        params: the column that counts weights.
        loss: the column of the loss.
        delta: where the Huber loss on log loss turns straight.
        resamples: of the bootstrap that gives the intervals.
        target: with batch, the loss to reach; without it the lowest that every batch reaches.
        sensitivity: fit again with other deltas, counts of N, and rows or budgets left out.
        json: print one JSON object.
    """
    from gptjax.apps.scaling.laws.table import read_table
    from gptjax.apps.scaling.predict import fit

    if resamples < 2 or delta <= 0:
        raise UserError(f"resamples {resamples} must be at least 2, and delta {delta:g} positive")
    if (sensitivity and law != "chinchilla") or (target is not None and law != "batch"):
        raise UserError("--sensitivity is of the law chinchilla and --target of batch; give that --law, or drop it")
    path = _source(study, table)
    laws: dict[str, Callable[[], Any]] = {
        "chinchilla": lambda: fit.describe_fit(read_table(path, params, loss), delta, resamples),
        "overtraining": lambda: fit.describe_overtraining(read_table(path, params, loss)),
        "repetition": lambda: fit.describe_repetition(path, params, loss),
        "batch": lambda: fit.describe_batch(path, target),
        "rate": lambda: fit.describe_rates(path),
    }
    _print_result(fit.describe_sensitivity(path, loss) if sensitivity else laws[law](), json)


def recommend(
    study: UserPath,
    flops: float | None = None,
    usd: float | None = None,
    hours: float | None = None,
    out: UserPath | None = None,
    force: bool = False,
    json: bool = False,
) -> None:
    """Print the best model for a budget, with intervals, and write a config that trains it.

    Args:
        study: the study's directory, after `collect`.
        flops: the budget in FLOPs.
        usd: the budget in USD, by study.yaml's usd_per_hour and flops_per_s.
        hours: the budget in hours, by study.yaml's flops_per_s.
        out: the config file to write.
        force: also beyond 30 times the largest fitted budget.
        json: print one JSON object.
    """
    _prepare()
    from gptjax.apps.scaling.predict import forecast

    fitted = forecast.fit_table(_source(study, None))
    budget = forecast.budget_flops(study, flops, usd, hours)
    fitted.refuse_far(budget, force)
    (values, lines), config = forecast.recommend(study, fitted, budget)
    if out is not None:
        with writing(out) as path:
            path.write_text(config)
        lines.append(f"{shell('gptjax', 'train', out)}    trains it")
    _print_result((values, lines), json)


def forecast(study: UserPath, force: bool = False, json: bool = False) -> None:
    """Write the law's prediction for every held-out rung, before it runs.

    Args:
        study: the study's directory, after `collect`.
        force: also beyond 30 times the largest fitted budget.
        json: print one JSON object.
    """
    _prepare()
    from gptjax.apps.scaling.predict import forecast

    path = _source(study, None)
    made = forecast.write_forecasts(study, forecast.fit_table(path), path, force)
    lines = []
    for one in made:
        low, high = one["interval"]
        lines.append(f"{one['rung']}: {count(one['params'])} params, {count(one['tokens'])} tokens, ")
        lines[-1] += f"{power(one['flops'])} FLOPs"
        lines.append(f"  loss {one['loss']:.4f} ({low:.4f} to {high:.4f}), made at {one['made_at']}")
        lines.append(f"  sha256 {one['sha256']}; commit {study}/forecasts/{one['rung']}.json before the run")
    _print_result(({"forecasts": made}, lines), json)


def audit(study: UserPath, json: bool = False) -> None:
    """Score every forecast of a study against the run that followed, and write audit.json.

    Args:
        study: the study's directory, after `collect`.
        json: print one JSON object.
    """
    from gptjax.apps.scaling.predict import forecast

    scores, lines = forecast.audit(study, _source(study, None))
    Path(study, "audit.json").write_text(_dumps(scores))
    _print_result(({"audit": scores}, lines), json)


def doctor(study: UserPath, json: bool = False) -> None:
    """Print the reasons not to trust a study's law.

    Args:
        study: the study's directory, after `collect`.
        json: print one JSON object.
    """
    from gptjax.apps.scaling.predict.doctor import diagnose

    _print_result(diagnose(_source(study, None)), json)


def compare(a: UserPath, b: UserPath, flops: float | None = None, resamples: int = 400, json: bool = False) -> None:
    """Print how much less compute recipe B needs than recipe A, or how many more FLOPs would decide it.

    Args:
        a: the directory of a study.
        b: the directory of a study of the same data with another recipe.
        flops: the budget of A at which to compare; without it, the largest that both have.
        resamples: of the bootstrap that gives the interval.
        json: print one JSON object.
    """
    _prepare()
    from gptjax.apps.scaling.laws.table import read_rows
    from gptjax.apps.scaling.predict.compare import compare, refuse_other_data
    from gptjax.apps.scaling.predict.forecast import fit_table

    paths = [_source(a, None), _source(b, None)]
    refuse_other_data(*(read_rows(path) for path in paths))
    one, other = (fit_table(path, resamples=resamples, seed=seed) for seed, path in enumerate(paths))
    _print_result(compare(one, other, flops or min(float(f.table.flops.max()) for f in (one, other))), json)


def plot(study: UserPath, format: Literal["png", "svg"] = "png") -> None:
    """Draw a study: loss against compute, valleys, residuals, and learning rates where they were swept.

    Args:
        study: the study's directory, after `collect`.
        format: of the pictures, which go to its folder plots.
    """
    path = _source(study, None)
    plots, scores = _plots(), _scores(study, path)
    from gptjax.apps.scaling.predict.forecast import fit_table

    figures = plots.sweep_figures(path)
    try:
        figures = plots.study_figures(fit_table(path), path, scores)
    except UserError as reason:
        if not figures:
            raise
        print(f"note: the figures of the law are left out: {reason}", file=sys.stderr)
    for made in plots.write_figures(figures, Path(study, "plots"), format):
        print(made)


def report(study: UserPath) -> None:
    """Write report.html: what a study found, with intervals, figures, tables, checks and methods.

    Args:
        study: the study's directory, after `collect`.
    """
    _plots()
    from gptjax.apps.scaling.predict.doctor import CHECKS, diagnose
    from gptjax.apps.scaling.predict.forecast import fit_table
    from gptjax.apps.scaling.predict.report import study_page
    from gptjax.pages.page import write_page

    path, made = _source(study, None), Path(study, "report.html")
    page = study_page(study, path, fit_table(path), diagnose(path)[0], list(CHECKS), _scores(study, path))
    write_page(made, page)
    print(made)


def _plots() -> Any:
    try:
        import jinja2  # noqa: F401

        from gptjax.apps.scaling.predict import plots
    except ImportError:
        raise UserError("figures and pages need: pip install 'gptjax[scaling]'") from None
    return plots


def _scores(study: str, path: Path) -> list[dict[str, Any]]:
    """Return the scores of a study's forecasts; none where it has no forecast."""
    from gptjax.apps.scaling.predict import forecast

    return forecast.audit(study, path)[0] if list(Path(study, "forecasts").glob("*.json")) else []


def _prepare() -> None:
    """Prepare the process before JAX is imported, which counts a shape's weights."""
    from gptjax.process import prepare_process

    prepare_process()


def _dumps(values: Any) -> str:
    return json.dumps(values, indent=1) + "\n"


def _source(study: str | None, table: str | None) -> Path:
    """Return the table that a verb reads; raise UserError for none, for two, or where the table lacks a result."""
    if (study is None) == (table is None):
        raise UserError("give what to fit: --study DIR, or --table F.csv with columns params, tokens, loss")
    if table is not None:
        return Path(table)
    path = Path(study, "table.csv")
    newest = max((p.stat().st_mtime for p in Path(study, "rungs").glob("*/result.json")), default=None)
    if newest is None and not path.exists():  # a study may be shared as only its table
        raise UserError(f"{study} has no finished rung yet; gptjax scaling run {study}")
    if not path.exists() or path.stat().st_mtime < (newest or 0):
        raise UserError(f"{path} lacks the newest results; gptjax scaling collect {study}")
    _refuse_other_study(study, path)
    return path


def _refuse_other_study(study: UserPath, path: Path) -> None:
    """Raise UserError where the table has runs that the study, as last planned, does not."""
    from gptjax.apps.scaling.laws.table import read_json, read_rows

    plan = Path(study, "plan.json")
    if plan.exists():
        known = {row["id"] for row in read_json(plan)}
        rows = [row for held_out in (False, True) for row in read_rows(path, held_out)]
        others = [row["id"] for row in rows if row.get("id", "") not in known]
        if others:
            raise UserError(
                f"{path} has rung {others[0]} and {plan} does not: study.yaml, its base config or the data changed; "
                "change it back, or fit the table by --table"
            )


VERBS: dict[str, Callable[..., None]] = {
    "fit": fit,
    "plot": plot,
    "recommend": recommend,
    "forecast": forecast,
    "audit": audit,
    "doctor": doctor,
    "compare": compare,
    "report": report,
}
