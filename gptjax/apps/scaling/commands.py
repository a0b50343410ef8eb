"""The verbs of `gptjax scaling` that make runs; `predict/commands.py` has the verbs that read them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from gptjax.apps.scaling.coordinates import coord_check
from gptjax.apps.scaling.laws.table import read_json
from gptjax.errors import UserError, nearest
from gptjax.process import prepare_process
from gptjax.shell.display import power, table
from gptjax.shell.paths import UserPath, shell


def _print_result(result: tuple[dict[str, Any], list[str]], as_json: bool) -> None:
    values, lines = result
    print(json.dumps(values, allow_nan=False) if as_json else "\n".join(lines))


def _write(path: Path, values: Any) -> None:
    path.write_text(json.dumps(values, indent=1) + "\n")


def _load(directory: str) -> tuple[Any, list[Any]]:
    """Return the study of a directory, and its rungs."""
    prepare_process()
    from gptjax.apps.scaling.ladder import make_rungs
    from gptjax.apps.scaling.study import load_study

    study = load_study(directory)
    return study, make_rungs(study)


def plan(study: UserPath, probe: bool = False, json: bool = False) -> None:
    """Show a study's rungs, their cost, and what is wrong with them; train nothing.

    Args:
        study: the study's directory.
        probe: measure five steps of every shape to predict the hours; probe.json keeps the times for later plans.
        json: print one JSON object.
    """
    read, rungs = _load(study)
    from gptjax.apps.scaling.ladder import describe_plan, key_of

    path = Path(study, "probe.json")
    if probe:
        from gptjax.apps.scaling.probe import seconds_per_step

        _write(path, seconds_per_step(rungs))
    seconds = read_json(path) if path.exists() else None
    if seconds is not None and not {key_of(rung.config) for rung in rungs} <= set(seconds):
        seconds = None  # of an earlier ladder
    _write_plan(study, rungs)
    _print_result(describe_plan(read, rungs, seconds), json)


def _write_plan(study: UserPath, rungs: list[Any]) -> None:
    """Write plan.json, from which the verbs that fit read which rungs are held out."""
    from gptjax.apps.scaling.ladder import plan_rows

    _write(Path(study, "plan.json"), plan_rows(rungs))


def run(
    study: UserPath, rung: str | None = None, emit: Literal["slurm", "gke"] | None = None, no_forecast: bool = False
) -> None:
    """Run the rungs that have no result yet, the longest last; the same command resumes a killed study.

    Args:
        study: the study's directory.
        rung: the id of one rung, to run only that one.
        emit: print a Slurm job array, or a Kubernetes Job of GKE, with a task for each rung without a result; run
            nothing.
        no_forecast: run held-out rungs that have no forecast.
    """
    read, rungs = _load(study)
    from gptjax.apps.scaling.emit import EMITTERS
    from gptjax.apps.scaling.runner import collect, missing_forecasts, read_result, run_rungs

    if any(Path(study, "rungs").glob("*/result.json")):
        collect(study, rungs)  # raises early if the study changed since its results were computed
    _write_plan(study, rungs)
    wanted = [r for r in rungs if rung in (None, r.id)]
    if not wanted:
        raise UserError(f"the study has no rung {rung!r}{nearest(str(rung), [r.id for r in rungs])}; plan lists them")
    unforecast = [] if no_forecast else missing_forecasts(study, wanted)
    wanted = [r for r in wanted if r not in unforecast]
    if emit and read.branches:
        raise UserError(
            "branches must wait for their trunks, and the tasks of a batch system do not; set branches: false"
        )
    if emit:
        ids = [r.id for r in wanted if read_result(study, r.id) is None]
        if not ids:
            raise UserError(f"every rung of {study} that may run has its result: nothing to emit")
        print(EMITTERS[emit](study, ids), end="")
        return
    if rung and unforecast:
        raise UserError(f"rung {rung} is held out: gptjax scaling forecast {study} first, or --no_forecast")
    code = run_rungs(study, wanted, rungs if read.branches else None)
    if any(Path(study, "rungs").glob("*/result.json")):
        collect(study, rungs)  # also for an unfinished study
    if code:
        raise SystemExit(code)
    for r in unforecast:
        command = shell("gptjax", "scaling", "forecast", study)
        print(f"held out until it is forecast: {r.id} {r.name}; {command}, then run again")
    print(f"{shell('gptjax', 'scaling', 'fit', '--study', study)}    fits the law")


def status(study: UserPath, json: bool = False) -> None:
    """Show the progress of each rung.

    Args:
        study: the study's directory.
        json: print one JSON object.
    """
    _, rungs = _load(study)
    from gptjax.apps.scaling.runner import state_of

    states = {rung.id: state_of(study, rung) for rung in rungs}
    finished = [rung.flops for rung in rungs if states[rung.id] in ("done", "diverged")]
    share = sum(finished) / sum(rung.flops for rung in rungs)
    rows = [[rung.id, rung.name, power(rung.flops, 2), states[rung.id]] for rung in rungs]
    lines = table(rows, ["rung", "name", "FLOPs", "state"], left=(0, 1, -1))
    others = {path.parent.name for path in Path(study, "rungs").glob("*/result.json")} - set(states)
    lines += [f"{other}  finished, but no longer a rung of this study" for other in sorted(others)]
    _print_result(
        ({"rungs": states, "flops_share": share}, [*lines, f"{share:.1%} of the study's FLOPs are spent"]), json
    )


def collect(study: UserPath) -> None:
    """Check the finished rungs and write them to the study's table.csv.

    Args:
        study: the study's directory.
    """
    _, rungs = _load(study)
    from gptjax.apps.scaling.runner import collect

    results = collect(study, rungs)
    _write_plan(study, rungs)
    diverged = sum(result["status"] == "diverged" for result in results)
    print(f"{len(results)} finished rungs, {diverged} of them diverged, in {Path(study, 'table.csv')}")


VERBS: dict[str, Callable[..., None]] = {
    "plan": plan,
    "run": run,
    "status": status,
    "collect": collect,
    "coord-check": coord_check,
}
