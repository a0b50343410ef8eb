"""The verbs of `gptjax scaling` that read a study's table: each fits, and prints or writes what follows."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

# Before numpy is loaded: fits work on tables of a few hundred rows, for which BLAS threads only wait for each other.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from gptjax.errors import UserError


def _say(said: tuple[dict[str, Any], list[str]], as_json: bool) -> None:
    values, lines = said
    print(json.dumps(values, allow_nan=False) if as_json else "\n".join(lines))


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
    from gptjax.predict.fit import describe_fit, describe_overtraining
    from gptjax.laws.table import read_table

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


VERBS: dict[str, Callable[..., None]] = {"fit": fit}
