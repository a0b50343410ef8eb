"""A run's directory: whose it is, what is in it, and how the run ended."""

import json
from pathlib import Path
from typing import Any

from etils import epath

from gptjax.checkpoint import Checkpoints, read_newest
from gptjax.config import Config
from gptjax.configfile import config_from_dict, config_to_yaml, differing_keys, read_yaml
from gptjax.data.reading import readable
from gptjax.environment import describe_environment
from gptjax.errors import UserError
from gptjax.files import size_of, write_atomically
from gptjax.hosts import is_writer, together


def check_workdir(cfg: Config) -> None:
    """Raise UserError where the run's directory belongs to a run of another config. Nothing is written."""
    workdir = epath.Path(cfg.workdir)
    with readable(cfg.workdir):
        workdir.exists()  # a bucket may be out of reach
    checkpoints = Checkpoints(cfg.workdir)
    saved = read_newest(checkpoints, checkpoints.meta, ("meta",))
    checkpoints.close()
    metrics, path = workdir / "metrics.jsonl", workdir / "config.yaml"
    if saved is not None:
        earlier = config_from_dict(saved[1]["config"])
    elif path.exists() and metrics.exists() and size_of(metrics):
        try:
            earlier = config_from_dict(read_yaml(path))
        except UserError as error:
            raise UserError(f"{path}: {error}; give another --workdir") from None
    else:
        return
    if keys := differing_keys(earlier, cfg, hashed=saved is not None):
        listed = ", ".join("{} ({} there, {} here)".format(key, *map(json.dumps, both)) for key, both in keys.items())
        hint = ", or --data.change_mixture true" if "data.mixture" in keys else ""
        raise UserError(f"{workdir} holds a run of another config: {listed}; give another --workdir{hint}")


def open_workdir(cfg: Config) -> Checkpoints:
    """The run's directory, made or found again; its checkpoints. Raises UserError where it cannot be written."""
    together(lambda: write_description(cfg))
    return Checkpoints(cfg.workdir, cfg.checkpoint)


def write_description(cfg: Config) -> None:
    """Make the run's directory, and write its config.yaml and env.json, once for all processes."""
    workdir = epath.Path(cfg.workdir)
    try:
        (workdir / "checkpoints").mkdir(parents=True, exist_ok=True)
        if is_writer():
            write_atomically(workdir / "config.yaml", config_to_yaml(cfg))
            write_atomically(workdir / "env.json", json.dumps(describe_environment(), indent=1))
    except OSError as error:
        raise UserError(f"cannot write to workdir {workdir}: {error.strerror or error}; give another") from None


def write_outcome(workdir: str, status: str, step: int, reason: str = "") -> None:
    """Write outcome.json, which tells other programs how the run ended last.

    Args:
        status: "done", "stopped" (by a signal; resumable) or "diverged".
        step: steps taken.
        reason: one line, for a person.
    """
    if is_writer():
        outcome = {"status": status, "step": step, "reason": reason}
        write_atomically(epath.Path(workdir) / "outcome.json", json.dumps(outcome) + "\n")


def read_outcome(workdir: str | Path) -> dict[str, Any]:
    """Return what `write_outcome` wrote; status "unfinished" where a run has not ended by itself."""
    path = epath.Path(workdir) / "outcome.json"
    if not path.exists():
        return {"status": "unfinished", "step": 0, "reason": ""}
    return json.loads(path.read_text())
