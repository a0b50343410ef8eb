"""The verbs of `gptjax scaling`. Each reads a study's directory or a table, computes, and prints or writes."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

# Before numpy is loaded: fits work on tables of a few hundred rows, for which BLAS threads only wait for each other.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from gptjax.errors import UserError
from gptjax.process import prepare_process
from gptjax.scaling.coordinates import coord_check


def _say(said: tuple[dict[str, Any], list[str]], as_json: bool) -> None:
    values, lines = said
    print(json.dumps(values, allow_nan=False) if as_json else "\n".join(lines))


def _load(directory: str) -> tuple[Any, list[Any]]:
    """The study of a directory, and its rungs."""
    prepare_process()
    from gptjax.scaling.ladder import make_rungs
    from gptjax.scaling.study import load_study

    study = load_study(directory)
    return study, make_rungs(study)


def plan(study: str, json: bool = False) -> None:
    """Show a study's rungs, what they cost, and what is wrong with them; run nothing.

    Args:
        study: the study's directory.
        json: print one JSON object.
    """
    read, rungs = _load(study)
    from gptjax.scaling.ladder import describe_plan

    _say(describe_plan(read, rungs), json)


def run(study: str) -> None:
    """Carry out the rungs that have no result yet, the longest last; a killed study goes on.

    Args:
        study: the study's directory.
    """
    _, rungs = _load(study)
    from gptjax.scaling.runner import collect, run_rungs

    if any(Path(study, "rungs").glob("*/result.json")):
        collect(study, rungs)  # so that a study changed under its results is refused before hours are spent
    code = run_rungs(study, rungs)
    if code:
        raise SystemExit(code)
    collect(study, rungs)
    print(f"gptjax scaling fit --study {study}    fits the law")


def status(study: str, json: bool = False) -> None:
    """Show how far each rung is.

    Args:
        study: the study's directory.
        json: print one JSON object.
    """
    _, rungs = _load(study)
    from gptjax.scaling.runner import state_of

    states = {rung.id: state_of(study, rung) for rung in rungs}
    finished = [rung.flops for rung in rungs if states[rung.id] in ("done", "diverged")]
    share = sum(finished) / sum(rung.flops for rung in rungs)
    lines = [f"{rung.id}  {rung.name:28}{states[rung.id]}" for rung in rungs]
    _say(({"rungs": states, "flops_share": share}, [*lines, f"{share:.1%} of the study's FLOPs are spent"]), json)


def collect(study: str) -> None:
    """Check the finished rungs and write them to the study's table.csv.

    Args:
        study: the study's directory.
    """
    _, rungs = _load(study)
    from gptjax.scaling.runner import collect

    results = collect(study, rungs)
    diverged = sum(result["status"] == "diverged" for result in results)
    print(f"{len(results)} finished rungs, {diverged} of them diverged, in {Path(study, 'table.csv')}")


def fit(
    study: str | None = None,
    table: str | None = None,
    law: Literal["chinchilla", "overtraining"] = "chinchilla",
    params: str = "params",
    loss: str = "loss",
    delta: float = 1e-3,
    resamples: int = 400,
    json: bool = False,
) -> None:
    """Fit a law of the loss to a study's finished runs, or to a table.

    Args:
        study: the study's directory, after `collect`.
        table: a CSV file instead, with columns params, tokens, loss and perhaps flops (else 6 N D).
        law: L = E + A/N^alpha + B/D^beta, or Gadre's law for models trained far beyond their optimum.
        params: the column that counts weights.
        loss: the column of the loss.
        delta: where the Huber loss on log loss turns straight.
        resamples: of the bootstrap that gives the intervals.
        json: print one JSON object.
    """
    from gptjax.scaling.fit import describe_fit, describe_overtraining
    from gptjax.scaling.table import read_table

    rows = read_table(_source(study, table), params, loss)
    said = describe_overtraining(rows) if law == "overtraining" else describe_fit(rows, delta, resamples)
    _say(said, json)


def _source(study: str | None, table: str | None) -> Path:
    """The table that a verb is to read; raises UserError for none, for two, or where a result is missing in it."""
    if (study is None) == (table is None):
        raise UserError("say what to fit: --study DIR, or --table F.csv with columns params, tokens, loss")
    if table is not None:
        return Path(table)
    path = Path(study, "table.csv")
    newest = max((p.stat().st_mtime for p in Path(study, "rungs").glob("*/result.json")), default=None)
    if newest is None:
        raise UserError(f"{study} has no finished rung yet; gptjax scaling run {study}")
    if not path.exists() or path.stat().st_mtime < newest:
        raise UserError(f"{path} lacks the newest results; gptjax scaling collect {study}")
    return path


VERBS: dict[str, Callable[..., None]] = {"plan": plan, "run": run, "status": status, "collect": collect, "fit": fit}
VERBS |= {"coord-check": coord_check}
