"""Metrics of a run: metrics.jsonl, trackers behind extras, other records by step, and the picture of the loss."""

import glob
import json
import os
import uuid
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from etils import epath

from gptjax.errors import UserError
from gptjax.files import write_atomically


def read_metrics(workdir: str | Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl; a last line cut short by a crash is left out.

    Raises:
        UserError: another line is damaged.
    """
    path = epath.Path(workdir) / "metrics.jsonl"
    lines = path.read_bytes().splitlines()
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            row["step"] + 0  # a number
            rows.append(row)
        except (ValueError, KeyError, TypeError, RecursionError):
            if number < len(lines):
                raise UserError(f"{path}, line {number} is damaged; mend or remove that line") from None
    return rows


class Tracker(Protocol):
    """A place that metrics go to."""

    def write(self, step: int, values: dict[str, float]) -> None: ...

    def close(self) -> None: ...


class JsonLines:
    """metrics.jsonl, one object a line. Opened again, it is cut back to the restored step (0: to nothing)."""

    def __init__(self, workdir: str, step: int):
        self.path = epath.Path(workdir) / "metrics.jsonl"
        kept = [row for row in read_metrics(workdir) if row["step"] <= step] if step and self.path.exists() else []
        self.text = "".join(json.dumps(row) + "\n" for row in kept)
        write_atomically(self.path, self.text)

    def write(self, step: int, values: dict[str, float]) -> None:
        with self.path.open("a") as stream:
            stream.write(json.dumps({"step": step, **values}) + "\n")

    def close(self) -> None: ...


class BucketLines(JsonLines):
    """The same in a bucket, where nothing can be appended to: a thread writes the whole file anew, over and over."""

    def __init__(self, workdir: str, step: int):
        super().__init__(workdir, step)
        self.thread = ThreadPoolExecutor(1)
        self.writing: Future[int] = self.thread.submit(len, "")

    def write(self, step: int, values: dict[str, float]) -> None:
        self.text += json.dumps({"step": step, **values}) + "\n"
        if self.writing.done():
            self.writing.result()  # raises what went wrong
            self.writing = self.thread.submit(self.path.write_text, self.text)

    def close(self) -> None:
        self.thread.shutdown()
        self.path.write_text(self.text)


class TensorBoard:
    """Event files in the run's folder `tensorboard`."""

    def __init__(self, workdir: str, step: int):
        try:
            from tensorboardX import SummaryWriter
        except ImportError:
            raise UserError("log.trackers tensorboard needs: pip install 'gptjax[tensorboard]'") from None
        # A reader drops what came at this step or later; the values of the restored step itself stay.
        purged = step + 1 if step else 0
        where = os.path.join(workdir, "tensorboard")
        # A resume within the same second opens a file of its own, which is read after the one before.
        self.writer = SummaryWriter(where, purge_step=purged, filename_suffix=f".after-{step:012}")

    def write(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class WandB:
    """A run at Weights & Biases; the same run again after a resume.

    The run's id is drawn at random and kept in the run's directory: names of directories repeat, also between people
    who share a project, and may hold characters that no id may.
    """

    ID_FILE = "wandb_id.txt"

    def __init__(self, workdir: str, step: int, project: str, config: dict[str, Any]):
        try:
            import wandb
        except ImportError:
            raise UserError("log.trackers wandb needs: pip install 'gptjax[wandb]'") from None
        folder = None if "://" in workdir else workdir
        name = Path(workdir).name
        self.run = wandb.init(
            project=project, name=name, id=self.run_id(workdir, step), resume="allow", dir=folder, config=config
        )

    @classmethod
    def run_id(cls, workdir: str, step: int) -> str:
        """Return the id of a run that resumes after `step`; one that begins anew gets a new id."""
        path, name = epath.Path(workdir) / cls.ID_FILE, Path(workdir).name
        if step and path.exists():
            return path.read_text().strip()
        earlier = (
            step > 0 and "://" not in workdir and any(Path(workdir, "wandb").glob(f"*run-*-{glob.escape(name)}"))
        )
        found = name if earlier else uuid.uuid4().hex[:16]  # earlier: begun when the name was the id
        write_atomically(path, found + "\n")
        return found

    def write(self, step: int, values: dict[str, float]) -> None:
        self.run.log(values, step=step)

    def close(self) -> None:
        self.run.finish()


def make_trackers(
    names: Sequence[str], workdir: str, step: int, project: str, config: dict[str, Any]
) -> list[Tracker]:
    """metrics.jsonl and the trackers that the config names, to go on after `step`."""
    makers = {
        "tensorboard": lambda: TensorBoard(workdir, step),
        "wandb": lambda: WandB(workdir, step, project, config),
    }
    others = [makers[name]() for name in names]  # first, since one may not be installed, and JsonLines cuts its file
    return [(BucketLines if "://" in workdir else JsonLines)(workdir, step), *others]


def read_records(path: str | Path | epath.Path) -> list[dict[str, Any]]:
    """Return the objects of a file of JSON lines, such as samples.jsonl; what is not whole is left out."""
    path, rows = epath.Path(path), []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        with suppress(ValueError):
            row = json.loads(line)
            if isinstance(row, dict):
                rows.append(row)
    return rows


def append_record(path: str | Path | epath.Path, row: dict[str, Any], kept_until_step: int | None = None) -> None:
    """Add an object to a file of JSON lines; rows of later steps, which a resume has discarded, are removed."""
    rows = read_records(path)
    if kept_until_step is not None:
        rows = [earlier for earlier in rows if earlier.get("step", 0) <= kept_until_step]
    write_atomically(path, "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in [*rows, row]))


def plot_loss(workdir: str) -> None:
    """Draw loss.png from metrics.jsonl and events.jsonl; nothing without matplotlib or without a row."""
    try:
        from gptjax.figures.runs import draw_loss
        from gptjax.figures.style import to_bytes
    except (ImportError, OSError):  # OSError: matplotlib finds no folder for its cache
        return
    rows, folder = read_metrics(workdir), epath.Path(workdir)
    if rows:
        sheet = draw_loss(rows, folder.name, read_records(folder / "events.jsonl"))
        write_atomically(folder / "loss.png", to_bytes(sheet))
