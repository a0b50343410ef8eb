"""Tables of finished runs, to which every law is fitted."""

import csv
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gptjax.errors import UserError, nearest

SAME_BUDGET = 1.1  # budgets within this factor of each other are one: steps are whole numbers


@dataclass(frozen=True)
class Table:
    """Finished runs, one a row.

    Attributes:
        params, tokens, loss: [n], positive and finite.
        flops: [n], of training.
    """

    params: np.ndarray
    tokens: np.ndarray
    loss: np.ndarray
    flops: np.ndarray

    def __len__(self) -> int:
        return len(self.loss)

    def take(self, rows: np.ndarray) -> "Table":
        """Return the rows that a mask or an index array selects."""
        return Table(self.params[rows], self.tokens[rows], self.loss[rows], self.flops[rows])

    def budgets(self) -> np.ndarray:
        """Return [n], for each row the geometric mean of the FLOPs of all rows with about the same FLOPs."""
        order = np.argsort(self.flops, kind="stable")
        log = np.log(self.flops[order])
        group = np.concatenate([[0], np.cumsum(np.diff(log) > np.log(SAME_BUDGET))])
        means = np.bincount(group, weights=log) / np.bincount(group)
        budgets = np.empty(len(self))
        budgets[order] = np.exp(means[group])
        return budgets


def read_json(path: str | Path) -> Any:
    """Return the values of a study's JSON file; raise UserError where it cannot be read, or was cut short."""
    try:
        return json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}; remove it and run the command that writes it again") from None


def read_rows(path: str | Path, held_out: bool = False) -> list[dict[str, str]]:
    """Return the rows of a CSV file unchanged, diverged ones too: those not held out, or only those held out.

    Raises:
        UserError: no such file, or not a CSV file.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as stream:
            rows = list(csv.DictReader(stream))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"cannot read table {str(path)!r}: {getattr(error, 'strerror', None) or error}") from None
    return [row for row in rows if ((row.get("held_out") or "0").lower() in ("1", "true")) == held_out]


def read_table(path: str | Path, params: str = "params", loss: str = "loss") -> Table:
    """Return the table of a CSV file with columns params, tokens, loss, and flops (without it, 6 N D).

    Of a study's table.csv, held-out and diverged rows are omitted: no fit reads them. Where rates or batches were
    swept, each shape and budget counts by the setting that did best, with all of its seeds.

    Args:
        params: the column of N, for a table that counts weights in several ways.
        loss: the column of the loss.

    Raises:
        UserError: no such file or column, a value that is not a positive number, the same run twice, or runs on
            different data.
    """
    rows = best_tuned([row for row in read_rows(path) if row.get("status", "done") == "done"], loss)
    if not rows:
        raise UserError(f"table {str(path)!r} has no rows to fit; it needs columns params, tokens, loss")
    names = [name for name in rows[0] if name is not None]
    for name in (params, "tokens", loss):
        if name not in names:
            raise UserError(f"table {str(path)!r} has no column {name!r}{nearest(name, names)}")
    N, D, L = (numbers(rows, name, path) for name in (params, "tokens", loss))
    flops = numbers(rows, "flops", path) if "flops" in names else 6 * N * D
    prints = sorted({row["fingerprint"] for row in rows}) if "fingerprint" in names else []
    if len(prints) > 1:
        raise UserError(f"table {str(path)!r} mixes data {' and '.join(prints)}; fit each in a table of its own")
    seeds = [row.get("seed", "") for row in rows]
    runs = [row["id"] for row in rows] if "id" in names else zip(N, D, L, seeds, strict=True)
    seen: dict[Any, int] = {}
    for number, key in enumerate(runs, 1):
        if seen.setdefault(key, number) != number:
            raise UserError(f"table {str(path)!r}: rows {seen[key]} and {number} are the same run; remove one")
    return Table(N, D, L, flops)


def best_tuned(rows: list[dict[str, str]], loss: str) -> list[dict[str, str]]:
    """Return a study's rows at the learning rate and batch of least mean loss over the seeds, for each shape and
    budget.
    """
    if not rows or not {"budget_flops", "peak_lr", "batch_sequences", loss} <= set(rows[0]):
        return rows
    losses: dict[tuple[str, ...], dict[tuple[str, ...], list[float]]] = {}
    for row, value in zip(rows, numbers(rows, loss), strict=True):
        point, setting = _point(row)
        losses.setdefault(point, {}).setdefault(setting, []).append(float(value))
    best = {}
    for point, by_setting in losses.items():
        means = {setting: float(np.mean(values)) for setting, values in by_setting.items()}
        best[point] = min(means, key=means.__getitem__)
    return [row for row in rows if best[_point(row)[0]] == _point(row)[1]]


def _point(row: dict[str, str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return a row's (shape, budget), and its (learning rate, batch)."""
    return (row["params"], row["budget_flops"]), (row["peak_lr"], row["batch_sequences"])


def numbers(rows: list[dict[str, str]], name: str, path: str | Path = "table.csv") -> np.ndarray:
    """Return a column of positive numbers; raise UserError for any other value."""
    values = []
    if rows and name not in rows[0]:
        raise UserError(f"table {str(path)!r} has no column {name!r}{nearest(name, [n for n in rows[0] if n])}")
    for number, row in enumerate(rows, 1):
        try:
            values.append(float(row[name]))
        except (TypeError, ValueError):
            values.append(np.nan)
        if not 0 < values[-1] < np.inf:
            raise UserError(
                f"table {str(path)!r}, row {number}: {name} {row[name]!r} is not a positive number; drop it"
            )
    return np.array(values)
