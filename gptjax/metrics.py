"""Write and read a run's metrics: metrics.jsonl, optional trackers, other records by step, and loss.png."""

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
from gptjax.shell.files import write_atomically


def read_metrics(workdir: str | Path) -> list[dict[str, Any]]:
    """Return the rows of a run's metrics.jsonl, without a last line that a crash has truncated.

    Raises:
        UserError: any other line is damaged.
    """
    path = epath.Path(workdir) / "metrics.jsonl"
    lines = path.read_bytes().splitlines()
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line.decode())
            row["step"] + 0  # a number
            rows.append(row)
        except (ValueError, KeyError, TypeError, RecursionError):
            if number < len(lines):
                raise UserError(f"{path}, line {number} is damaged; mend or remove that line") from None
    return rows


class Tracker(Protocol):
    """A destination of metrics."""

    def write(self, step: int, values: dict[str, float]) -> None: ...

    def close(self) -> None: ...


class JsonLines:
    """metrics.jsonl, one object per line. Opening it removes the rows after the restored step (0: all rows)."""

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
    """metrics.jsonl in a bucket, which cannot append: a thread rewrites the whole file repeatedly."""

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
    """TensorBoard event files in the run's directory, under `tensorboard`."""

    def __init__(self, workdir: str, step: int):
        try:
            from tensorboardX import SummaryWriter
        except ImportError:
            raise UserError("log.trackers tensorboard needs: pip install 'gptjax[tensorboard]'") from None
        # Readers drop values from this step on; the values of the restored step itself are kept.
        purged = step + 1 if step else 0
        where = os.path.join(workdir, "tensorboard")
        # The suffix gives a resume within the same second its own file, which is read after the previous one.
        self.writer = SummaryWriter(where, purge_step=purged, filename_suffix=f".after-{step:012}")

    def write(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class WandB:
    """A run at Weights & Biases, which a resume continues.

    The run's id is random and stored in the run's directory: names of directories are not unique, also between people
    who share a project, and may contain characters that an id may not.
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
        """Return the id of a run that resumes after `step`; a run from the start gets a new id."""
        path, name = epath.Path(workdir) / cls.ID_FILE, Path(workdir).name
        if step and path.exists():
            return path.read_text().strip()
        earlier = (
            step > 0 and "://" not in workdir and any(Path(workdir, "wandb").glob(f"*run-*-{glob.escape(name)}"))
        )
        found = name if earlier else uuid.uuid4().hex[:16]  # earlier: the run began when the name was the id
        write_atomically(path, found + "\n")
        return found

    def write(self, step: int, values: dict[str, float]) -> None:
        self.run.log(values, step=step)

    def close(self) -> None:
        self.run.finish()


def make_trackers(
    names: Sequence[str], workdir: str, step: int, project: str, config: dict[str, Any]
) -> list[Tracker]:
    """Return metrics.jsonl and the trackers that the config names, set to resume after `step`."""
    makers = {
        "tensorboard": lambda: TensorBoard(workdir, step),
        "wandb": lambda: WandB(workdir, step, project, config),
    }
    others = [makers[name]() for name in names]  # first: one may not be installed, and JsonLines truncates its file
    return [(BucketLines if "://" in workdir else JsonLines)(workdir, step), *others]


def read_records(path: str | Path | epath.Path) -> list[dict[str, Any]]:
    """Return the objects of a file of JSON lines, such as samples.jsonl, without damaged lines."""
    path, rows = epath.Path(path), []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        with suppress(ValueError):
            row = json.loads(line)
            if isinstance(row, dict):
                rows.append(row)
    return rows


def append_record(path: str | Path | epath.Path, row: dict[str, Any], kept_until_step: int | None = None) -> None:
    """Append an object to a file of JSON lines, after removing the rows of steps past `kept_until_step`."""
    rows = read_records(path)
    if kept_until_step is not None:
        rows = [earlier for earlier in rows if earlier.get("step", 0) <= kept_until_step]
    write_atomically(path, "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in [*rows, row]))


def plot_loss(workdir: str) -> None:
    """Draw loss.png from metrics.jsonl and events.jsonl; do nothing without matplotlib or without rows."""
    try:
        from gptjax.figures.runs import draw_loss
        from gptjax.figures.style import to_bytes
    except (ImportError, OSError):  # OSError: matplotlib finds no folder for its cache
        return
    rows, folder = read_metrics(workdir), epath.Path(workdir)
    if rows:
        sheet = draw_loss(rows, folder.name, read_records(folder / "events.jsonl"))
        write_atomically(folder / "loss.png", to_bytes(sheet))
