"""The verbs of `gptjax scaling` that make runs; those that read them are in `gptjax/laws/commands.py`."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gptjax.process import prepare_process


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


VERBS: dict[str, Callable[..., None]] = {"plan": plan, "run": run, "status": status, "collect": collect}
