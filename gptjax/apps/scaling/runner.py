"""Run a study's rungs, each in a process of its own, and collect their results."""

import contextlib
import csv
import fcntl
import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from gptjax.apps.scaling.ladder import Rung, trunk_of
from gptjax.apps.scaling.laws.table import read_json
from gptjax.configfile import config_to_yaml
from gptjax.errors import STOPPED, USER_ERROR, UserError
from gptjax.lifecycle.rundir import read_outcome
from gptjax.metrics import read_metrics
from gptjax.shell.files import write_atomically


def rung_dir(study_dir: str | Path, rung_id: str) -> Path:
    """Return a rung's directory, which is also its run's."""
    return Path(study_dir, "rungs", rung_id)


def read_result(study_dir: str | Path, rung_id: str) -> dict[str, Any] | None:
    """Return a finished rung's result.json; None where it is not finished."""
    path = rung_dir(study_dir, rung_id) / "result.json"
    return read_json(path) if path.exists() else None


def missing_forecasts(study_dir: str | Path, rungs: list[Rung]) -> list[Rung]:
    """Return the held-out rungs that have neither a result nor a forecast yet."""
    held = [rung for rung in rungs if rung.held_out and read_result(study_dir, rung.id) is None]
    return [rung for rung in held if not Path(study_dir, "forecasts", f"{rung.id}.json").exists()]


def run_rungs(study_dir: str | Path, rungs: list[Rung], trunks: list[Rung] | None = None) -> int:
    """Run every rung that has no result yet; one that was killed resumes from its last checkpoint.

    Args:
        trunks: rungs from which others may branch: a rung starts where its trunk began to cool down, if that
            checkpoint exists. None: every rung starts at step 0.

    Returns:
        exit code: 0 all have results; 75 a signal came and the current rung is saved; 1 a rung failed, or another
        process runs it.
    """
    left_over = 0
    for number, rung in enumerate(rungs, 1):
        directory = rung_dir(study_dir, rung.id)
        directory.mkdir(parents=True, exist_ok=True)
        with (directory / "lock").open("w") as lock:
            if not _take(lock):
                print(f"[{number}/{len(rungs)}] {rung.id}: another process is running it", flush=True)
                left_over += 1
                continue
            if read_result(study_dir, rung.id) is not None:
                continue
            if trunks and (trunk := trunk_of(rung, trunks)):
                begin_at(trunk.cooldown_step, rung_dir(study_dir, trunk.id), directory)
            began_at = _first_begun(directory)
            began = time.perf_counter()
            code, stopped = _train(rung, directory, lock)
            if code == STOPPED or (stopped and code < 0):
                print(f"stopped in rung {rung.id}; all is saved, and the same command resumes it")
                return STOPPED
            result = _result(rung, directory, code, time.perf_counter() - began, began_at)
            if result is None:
                print(f"[{number}/{len(rungs)}] {rung.id} failed ({code}): {_last_line(directory)}", flush=True)
                left_over += 1
                continue
            write_atomically(directory / "result.json", json.dumps(result, indent=1))
            outcome = result["reason"] or f"loss {result['loss']:.4f}"
            print(f"[{number}/{len(rungs)}] {rung.id} {rung.name}: {outcome}, {result['wall_s']:.0f} s", flush=True)
    return 1 if left_over else 0


def begin_at(step: int, trunk: Path, directory: Path) -> None:
    """Copy the trunk's checkpoint of a step, and its metrics up to there, into a run that has not begun.

    The schedule wsd is flat until the cooldown and a batch depends only on the step, so the run's result is bitwise
    identical to that of a run from step 0. Where the trunk has no such checkpoint, the run starts at step 0.
    """
    source, target = trunk / "checkpoints" / str(step), directory / "checkpoints" / str(step)
    if (directory / "checkpoints").exists() or not source.exists():
        return
    temporary = directory / "checkpoints.new"
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(source, temporary / str(step))
    rows = [row for row in read_metrics(trunk) if row["step"] <= step]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    os.replace(temporary, target.parent)


def now() -> str:
    """Return the time for results and forecasts: ISO 8601, UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _first_begun(directory: Path) -> str:
    """Return when a rung first began, however often it was resumed: a forecast must come before it."""
    path = directory / "began_at"
    if not path.exists():
        write_atomically(path, now())
    return path.read_text()


def _take(lock: IO[str]) -> bool:
    """Return whether this process now holds the lock. The training process inherits it, so it lasts while either
    lives.
    """
    with contextlib.suppress(BlockingIOError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False


def _train(rung: Rung, directory: Path, lock: IO[str]) -> tuple[int, bool]:
    """Return the exit code of the rung's training, and whether a signal came meanwhile, which is passed on to it."""
    write_atomically(directory / "rung.yaml", config_to_yaml(replace(rung.config, workdir=str(directory))))
    command = [sys.executable, "-m", "gptjax", "train", str(directory / "rung.yaml")]
    stopped = []
    with (directory / "log.txt").open("a") as log:
        child = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, pass_fds=[lock.fileno()], start_new_session=True
        )

        def forward(number: int, frame: Any) -> None:
            stopped.append(number)
            child.send_signal(number)

        before = [(number, signal.signal(number, forward)) for number in (signal.SIGINT, signal.SIGTERM)]
        code = child.wait()
        for number, handler in before:
            signal.signal(number, handler)
    return code, bool(stopped)


def _result(rung: Rung, directory: Path, code: int, wall_s: float, began_at: str) -> dict[str, Any] | None:
    """Return the values of result.json; None where the training process failed for a reason other than its loss.

    A run has diverged if it gave up after its first evaluation (so its outcome.json says), skipped most steps, or did
    not lower the loss.
    """
    rows = read_metrics(directory) if (directory / "metrics.jsonl").exists() else []
    losses = [row["val/loss"] for row in rows if "val/loss" in row]
    ended = read_outcome(directory)
    gave_up = code == USER_ERROR and ended["status"] == "diverged"
    if not losses or not (code == 0 or gave_up):
        return None
    reason, steps = "", rung.config.train.total_steps
    skipped = int(sum(row.get("skipped", 0) for row in rows))
    if gave_up:
        reason = f"diverged: {ended['reason']}"
    elif skipped > steps / 2:
        reason = f"diverged: {skipped} of {steps} steps had no finite gradient"
    elif not losses[-1] < losses[0]:  # also where it is nan
        reason = f"diverged: validation loss {losses[-1]:.4g} is not below the first, {losses[0]:.4g}"
    model, train, optim = rung.config.model, rung.config.train, rung.config.optim
    outcome = {"status": "diverged" if reason else "done", "reason": reason, "loss": None if reason else losses[-1]}
    outcome["first_loss"] = losses[0]
    sizes = {"params": rung.params["matmul"], "tokens": rung.tokens, "flops": rung.flops}
    sizes |= {f"params_{name}": count for name, count in rung.params.items()}
    sizes |= {f"flops_6nd_{name}": 6 * count * rung.tokens for name, count in rung.params.items()}
    asked = {"budget_flops": rung.budget_flops, "held_out": int(rung.held_out), "epochs": rung.epochs}
    shape = {"n_layers": model.n_layers, "d_model": model.d_model, "n_heads": model.n_heads}
    how = {"steps": train.total_steps, "batch_sequences": train.batch_sequences, "seed": rung.config.seed}
    how |= {"batch_tokens": train.batch_sequences * model.context_length, "decay_frac": optim.decay_frac}
    how |= {"peak_lr": optim.peak_lr, "warmup_steps": optim.warmup_steps}
    made = {"fingerprint": rung.fingerprint, "wall_s": wall_s, "began_at": began_at}
    return {"id": rung.id, **outcome, **sizes, **asked, **shape, **how, **made}


def _last_line(directory: Path) -> str:
    return ["it printed nothing", *(directory / "log.txt").read_text(errors="replace").strip().splitlines()][-1]


def state_of(study_dir: str | Path, rung: Rung) -> str:
    """Return the state of a rung: done, diverged, `step S of T` (begun), or waiting."""
    result = read_result(study_dir, rung.id)
    if result is not None:
        return result["status"]
    path = rung_dir(study_dir, rung.id)
    rows = read_metrics(path) if (path / "metrics.jsonl").exists() else []
    return f"step {rows[-1]['step']} of {rung.config.train.total_steps}" if rows else "waiting"


def collect(study_dir: str | Path, rungs: list[Rung]) -> list[dict[str, Any]]:
    """Return every finished rung's result, diverged ones included, checked and written to table.csv.

    Raises:
        UserError: a result of a rung that the study no longer has, of other data, copied, or without a finite loss.
    """
    known = {rung.id: rung for rung in rungs}
    results = []
    for path in sorted(Path(study_dir, "rungs").glob("*/result.json")):
        result = read_json(path)
        if result["id"] != path.parent.name:
            raise UserError(f"{path.parent} is a copy of rung {result['id']}: the same run twice; remove it")
        results.append(result)
    if not results:
        raise UserError(f"{study_dir} has no finished rung yet; gptjax scaling run {study_dir}")
    prints = sorted({result["fingerprint"] for result in results})
    if len(prints) > 1:
        raise UserError(f"rungs were trained on different data, {' and '.join(prints)}; fit each in its own study")
    for result in results:
        if result["id"] not in known:
            raise UserError(
                f"study.yaml, its base config or the data changed under finished rung {result['id']} "
                f"({result['n_layers']}x{result['d_model']}); change it back, or remove rungs/{result['id']}"
            )
        if result["status"] == "done" and not math.isfinite(result["loss"]):
            raise UserError(f"rung {result['id']} has loss {result['loss']}; remove its result.json and run it again")
        rung = known[result["id"]]  # the id says what was trained; the present study says what the run is used for
        result |= {"held_out": int(rung.held_out), "budget_flops": rung.budget_flops}
    results.sort(key=lambda result: (result["flops"], result["id"]))
    text = io.StringIO()
    columns = list(dict.fromkeys(name for result in results for name in result))  # older results may have fewer
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(results)
    write_atomically(Path(study_dir, "table.csv"), text.getvalue())
    return results
