"""Read runs, of this trainer or as other trainers' CSV files, for a report."""

import csv
import json
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from gptjax.configfile import config_from_dict, config_to_yaml, read_yaml
from gptjax.errors import UserError
from gptjax.figures.series import Logged, column
from gptjax.metrics import read_metrics, read_records
from gptjax.shell import display

# Column names of other trainers' CSV files, by our key; the first that a file has is used.
COLUMNS = {
    "step": ("step", "_step", "global_step", "iteration", "iter", "trainer/global_step"),
    "tokens": ("tokens", "consumed_tokens", "train/tokens", "tokens_seen"),
    "val/loss": ("val/loss", "val_loss", "eval_loss", "eval/loss", "validation_loss", "valid_loss"),
    "train/loss": ("train/loss", "train_loss", "loss"),
    "seconds": ("seconds", "wall_time", "elapsed", "time_s", "_runtime"),
    "flops": ("flops", "total_flos", "train/flops"),
}
# Keys that do not belong to the recipe of a run: two runs that differ in them only are the same experiment.
NOT_IN_RECIPE = (
    "seed",
    "workdir",
    "run.",
    "log.",
    "checkpoint.",
    "distributed.",
    "data.cache_dir",
    "profile",
)


@dataclass(frozen=True)
class Run:
    """The records of a run.

    Attributes:
        path: its directory, or its CSV file.
        rows: the rows of metrics.jsonl, sorted by step.
        config: every value by `section.key`; empty for a CSV file.
        meta: metadata of the newest checkpoint: tokenizer and fingerprint of the corpus.
    """

    path: Path
    rows: Logged
    config: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Return the directory's or the file's name."""
        return self.path.resolve().stem if self.path.is_file() else self.path.resolve().name

    def last(self, key: str) -> float | None:
        """Return a metric's last finite value; None if there is none."""
        return next((row[key] for row in reversed(self.rows) if display.finite(row.get(key))), None)

    def best(self, key: str) -> tuple[float, int] | None:
        """Return a metric's lowest value and its step; None if there is none."""
        steps, values = column(self.rows, key)
        if not np.isfinite(values).any():
            return None
        at = int(np.nanargmin(values))
        return float(values[at]), int(steps[at])

    def seconds(self) -> np.ndarray:
        """Return the seconds of training up to each row, [n], without evaluations and saves; NaN if unknown."""
        every = np.array([row["step"] for row in self.rows], float)
        steps, times = column(self.rows, "seconds")
        if not np.isfinite(times).any():
            steps, each = column(self.rows, "step_time_s")  # the mean since the row before that has one
            steps, each = steps[np.isfinite(each)], each[np.isfinite(each)]
            times = np.cumsum(np.diff(steps, prepend=0.0) * each)
            steps, times = np.append(0.0, steps), np.append(0.0 if len(times) else math.nan, times)
        known = np.isfinite(times)
        return np.interp(every, steps[known], times[known]) if known.any() else np.full(len(every), math.nan)


def read_run(path: str | Path) -> Run:
    """Read a run's directory.

    Raises:
        UserError: there is no metrics.jsonl, or it cannot be read.
    """
    folder = Path(path)
    if not (folder / "metrics.jsonl").is_file():
        raise UserError(f"{folder} holds no metrics.jsonl; give the directory of a run")
    return Run(
        folder,
        Logged(sorted(read_metrics(folder), key=lambda row: row["step"])),
        _config(folder),
        _json(folder / "env.json"),
        [row for row in read_records(folder / "samples.jsonl") if isinstance(row.get("text"), str)],
        read_records(folder / "events.jsonl"),
        _meta(folder),
    )


def read_csv(path: str | Path) -> Run:
    """Read another trainer's CSV file, with a step and a loss in columns of any of the names in COLUMNS.

    Raises:
        UserError: the file cannot be read, or lacks a column of steps or of a loss.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as stream:
            lines = list(csv.DictReader(stream))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
    names = list(lines[0]) if lines else []
    found = {key: next((name for name in known if name in names), None) for key, known in COLUMNS.items()}
    if found["step"] is None or (found["val/loss"] is None and found["train/loss"] is None):
        wanted = "step and val_loss (or train_loss)"
        raise UserError(f"{path} has columns {', '.join(map(str, names[:8])) or 'none'}; name two of them {wanted}")
    rows = []
    for line in lines:
        values = {key: _float(line[name]) for key, name in found.items() if name is not None}
        if values["step"] is not None:
            rows.append({key: value for key, value in values.items() if value is not None})
    return Run(Path(path), Logged(sorted(rows, key=lambda row: row["step"])))


def find_runs(paths: list[str]) -> list[Run]:
    """Read every run that the paths name: runs, CSV files, and folders of runs.

    Raises:
        UserError: a path contains no run.
    """
    found: list[Run] = []
    for path in map(Path, paths):
        if path.suffix.lower() == ".csv":
            found.append(read_csv(path))
        elif (path / "metrics.jsonl").is_file():
            found.append(read_run(path))
        else:
            found += _runs_inside(path)
    return found


def _runs_inside(path: Path) -> list[Run]:
    """Return the runs of a folder and of its folders; note CSV files that hold no run, such as a study's table."""
    runs = [read_run(file.parent) for depth in ("*", "*/*") for file in path.glob(f"{depth}/metrics.jsonl")]
    for file in [*path.glob("*.csv"), *path.glob("*/*.csv")]:
        try:
            runs.append(read_csv(file))
        except UserError as reason:
            print(f"note: {reason}; left out", file=sys.stderr)
    if not runs:
        raise UserError(f"{path} is neither a run, a folder of runs nor a .csv file; give one of these")
    return sorted(runs, key=lambda run: run.path)


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested values by `section.key`."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def defaults() -> dict[str, Any]:
    """Return every default by `section.key`."""
    return flatten(yaml.safe_load(config_to_yaml(config_from_dict({}))))


def recipe(run: Run) -> dict[str, Any]:
    """Return the values that make two runs the same experiment: all but the seed and where it ran."""
    return {key: value for key, value in run.config.items() if not key.startswith(NOT_IN_RECIPE)}


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.yaml"
    if not path.is_file():
        return flatten(_meta(folder).get("config", {}))
    values = read_yaml(path)
    try:
        return flatten(yaml.safe_load(config_to_yaml(config_from_dict(values))))
    except UserError:  # written by another version of this package: shown unchanged
        return flatten(values)


def _meta(folder: Path) -> dict[str, Any]:
    steps = [
        p for p in (folder / "checkpoints").glob("*") if p.name.isdecimal() and (p / "meta" / "metadata").is_file()
    ]
    return _json(max(steps, key=lambda p: int(p.name)) / "meta" / "metadata") if steps else {}


def _json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def _float(text: str | None) -> float | None:
    try:
        return float(text or "")
    except ValueError:
        return None
