"""The verbs of `gptjax scaling`. Each reads a study's directory or a table, computes, and prints or writes."""

import json
import os
from collections.abc import Callable
from typing import Any, Literal

# Before numpy is loaded: fits work on tables of a few hundred rows, for which BLAS threads only wait for each other.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from gptjax.errors import UserError


def _say(said: tuple[dict[str, Any], list[str]], as_json: bool) -> None:
    values, lines = said
    print(json.dumps(values, allow_nan=False) if as_json else "\n".join(lines))


def fit(
    table: str | None = None,
    law: Literal["chinchilla", "overtraining"] = "chinchilla",
    params: str = "params",
    loss: str = "loss",
    delta: float = 1e-3,
    resamples: int = 400,
    sensitivity: bool = False,
    json: bool = False,
) -> None:
    """Fit a law of the loss to a table of finished runs.

    Args:
        table: a CSV file with columns params, tokens, loss and perhaps flops (else 6 N D).
        law: L = E + A/N^alpha + B/D^beta, or Gadre's law for models trained far beyond their optimum.
        params: the column that counts weights.
        loss: the column of the loss.
        delta: where the Huber loss on log loss turns straight.
        resamples: of the bootstrap that gives the intervals.
        sensitivity: also show the law under other choices.
        json: print one JSON object.
    """
    from gptjax.scaling.fit import describe_fit, describe_overtraining
    from gptjax.scaling.table import read_table

    if table is None:
        raise UserError("say what to fit: --table F.csv with columns params, tokens, loss")
    rows = read_table(table, params, loss)
    said = describe_overtraining(rows) if law == "overtraining" else describe_fit(rows, delta, resamples, sensitivity)
    _say(said, json)


VERBS: dict[str, Callable[..., None]] = {"fit": fit}
