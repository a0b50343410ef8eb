"""Manage a run's directory: check that it belongs to the config, describe the run, record how it ended."""

import json
import os
import socket
import time
from pathlib import Path
from typing import Any

from etils import epath

from gptjax.checkpoint import Checkpoints, read_newest_meta
from gptjax.config import Config
from gptjax.configfile import config_from_dict, config_to_yaml, differing_keys, read_yaml
from gptjax.data.reading import readable
from gptjax.errors import UserError
from gptjax.hosts import is_writer, together
from gptjax.lifecycle.goodput import FILE
from gptjax.shell.environment import describe_environment
from gptjax.shell.files import size_of, write_atomically


def check_workdir(cfg: Config) -> None:
    """Raise UserError if the directory holds a run of another config. Write nothing."""
    workdir = epath.Path(cfg.workdir)
    with readable(cfg.workdir):
        workdir.exists()  # a bucket may be out of reach
    saved = read_newest_meta(cfg.workdir)
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


class RunLock:
    """While active, and once acquired, no other run can use a directory. A run that is killed holds nothing.

    The writer's process locks a file there by `flock`, which Linux also passes on to servers of NFS. Where a file
    system has no locks, as in a bucket, nothing is locked.
    """

    NAME = "lock"
    WAIT_S = 20.0  # for a run that is just ending

    def __init__(self, workdir: str):
        self.path, self.stream, self.created = Path(workdir) / self.NAME, None, False
        self.possible = "://" not in workdir

    def acquire(self) -> None:
        """Lock the directory, and create it; every process calls it.

        Raises:
            UserError: another run uses the directory, or it cannot be written.
        """
        together(self._acquire)

    def _acquire(self) -> None:
        if not (self.possible and is_writer() and self.stream is None):
            return
        try:
            import fcntl

            self.created = not self.path.parent.exists()
            self.path.parent.mkdir(parents=True, exist_ok=True)
            stream = self.path.open("a+")
        except ImportError:  # not on Unix
            return
        except OSError as error:
            raise UserError(f"cannot write to workdir {self.path.parent}: {error.strerror}; give another") from None
        deadline = time.monotonic() + self.WAIT_S
        while True:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    stream.seek(0)
                    owner = stream.read().strip() or "unknown"
                    stream.close()
                    raise UserError(
                        f"{self.path.parent} is in use by another run ({owner}); wait until it ends, or give another "
                        "--workdir"
                    ) from None
                time.sleep(0.2)
            except OSError:  # no locks here
                break
        stream.truncate(0)
        stream.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        stream.flush()
        self.stream = stream

    def __enter__(self) -> "RunLock":
        return self

    def __exit__(self, *_) -> None:
        if self.stream is not None:
            if self.created and set(os.listdir(self.path.parent)) <= {self.NAME, FILE}:  # refused at once
                for name in (self.NAME, FILE):
                    (self.path.parent / name).unlink(missing_ok=True)
                self.path.parent.rmdir()
            self.stream.close()
            self.stream = None


def open_workdir(cfg: Config) -> Checkpoints:
    """Create or open the run's directory and return its checkpoints; raise UserError if it cannot be written."""
    together(lambda: write_description(cfg))
    return Checkpoints(cfg.workdir, cfg.checkpoint)


def write_description(cfg: Config) -> None:
    """Create the run's directory and write its config.yaml and env.json; one process does so for all."""
    workdir = epath.Path(cfg.workdir)
    try:
        (workdir / "checkpoints").mkdir(parents=True, exist_ok=True)
        if is_writer():
            write_atomically(workdir / "config.yaml", config_to_yaml(cfg))
            write_atomically(workdir / "env.json", json.dumps(describe_environment(), indent=1))
    except OSError as error:
        raise UserError(f"cannot write to workdir {workdir}: {error.strerror or error}; give another") from None


def write_outcome(workdir: str, status: str, step: int, reason: str = "") -> None:
    """Write outcome.json, which tells other programs how the run last ended.

    Args:
        status: "done", "stopped" (by a signal; resumable) or "diverged".
        step: number of steps taken.
        reason: an explanation in one line.
    """
    if is_writer():
        outcome = {"status": status, "step": step, "reason": reason}
        write_atomically(epath.Path(workdir) / "outcome.json", json.dumps(outcome) + "\n")


def read_outcome(workdir: str | Path) -> dict[str, Any]:
    """Return what `write_outcome` wrote; status "unfinished" if the run is in progress or was killed."""
    path = epath.Path(workdir) / "outcome.json"
    if not path.exists():
        return {"status": "unfinished", "step": 0, "reason": ""}
    return json.loads(path.read_text())
