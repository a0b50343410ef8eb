"""Train on folders of prepared data that appear during a run.

At each evaluation the run looks for new folders. Where it finds some, it saves, ends, and resumes with a mixture in
which they have their share from that step on. That mixture is in every checkpoint, so that a batch remains a function
of (seed, step), whenever the folders came.
"""

import dataclasses
import json
import os
import sys
from collections.abc import Sequence

from gptjax.checkpoint import read_newest_meta
from gptjax.config import Config, MixtureSource
from gptjax.configfile import config_from_dict
from gptjax.data.shards import is_prepared
from gptjax.errors import STOPPED, UserError
from gptjax.hooks import Hook
from gptjax.hosts import from_writer, is_writer
from gptjax.trainer import train


def train_and_follow(cfg: Config, hooks: Sequence[Hook] = ()) -> int:
    """Train on the folders in `cfg.follow`, those that appear meanwhile too; as `trainer.train`.

    Raises:
        UserError: as `trainer.train`; no folder is there yet, or one that was trained on is gone.
    """
    while True:
        step, earlier = saved_sources(cfg)
        sources = with_arrivals(earlier, list_prepared(cfg.follow), step, cfg)
        if is_writer() and earlier and len(sources) > len(earlier):
            names = ", ".join(source.label for source in sources[len(earlier) :])
            print(f"new data from step {step} on: {names}", file=sys.stderr)
        look = Look(cfg.follow, [source.label for source in sources], cfg.train.eval_interval_steps)
        data = dataclasses.replace(cfg.data, mixture=sources)
        code = train(dataclasses.replace(cfg, data=data), [*hooks, look])
        if code != STOPPED or not look.found:
            return code


class Look(Hook):
    """End the run at an evaluation where a folder appeared that it does not know.

    Args:
        known: names of the folders that it trains on.
    """

    def __init__(self, folder: str, known: Sequence[str], interval: int):
        self.folder, self.known, self.interval, self.found = folder, known, interval, False

    def ends_run(self, step: int) -> str | None:
        if step % self.interval:
            return None
        new = [name for name in list_prepared(self.folder) if name not in self.known]
        self.found = bool(new)
        return f"training continues with the new {', '.join(new)}" if new else None


def list_prepared(folder: str) -> list[str]:
    """Return the names of the finished folders of prepared data in a folder, sorted, as the writer's process sees it.

    An unfinished one is not among them: its manifest comes last. Every process calls this.
    """

    def names() -> str:
        try:
            return json.dumps(sorted(entry.name for entry in os.scandir(folder) if _is_finished(entry.path)))
        except OSError:  # not there yet, or a network's file system that does not answer for a moment
            return "[]"

    return json.loads(from_writer(names))


def _is_finished(path: str) -> bool:
    try:
        return is_prepared(path)
    except UserError:
        return False


def saved_sources(cfg: Config) -> tuple[int, tuple[MixtureSource, ...]]:
    """Return the step of the run's newest checkpoint, 0 without one, and the sources that it was trained on."""
    saved = read_newest_meta(cfg.workdir)
    return (0, ()) if saved is None else (saved[0], config_from_dict(saved[1]["config"]).data.mixture)


def with_arrivals(
    earlier: Sequence[MixtureSource], names: Sequence[str], step: int, cfg: Config
) -> tuple[MixtureSource, ...]:
    """Return the sources of a mixture with those that are new, which have their share from a step on.

    The new ones have 1 - data.replay of the examples in equal parts, the earlier ones data.replay. Of a run that
    begins, all have equal parts.

    Args:
        earlier: what the run has been trained on, with their weights so far.
        names: of the folders in `cfg.follow`.

    Raises:
        UserError: there is no folder, one of the earlier ones is gone, or the config has a mixture of its own.
    """
    folder, labels = cfg.follow, [source.label for source in earlier]
    own = [source.label for source in cfg.data.mixture if source.label not in names]
    if gone := [label for label in labels if label not in names]:
        raise UserError(f"{folder} lacks {', '.join(gone)}, on which the run was trained; put it back")
    if own:
        raise UserError(f"follow {folder} and data.mixture ({', '.join(own)}) exclude each other; leave one out")
    if not names:
        raise UserError(
            f"follow {folder} holds no folder of prepared data yet; write one: gptjax data prepare TEXT --out "
            f"{os.path.join(folder, '0001')}"
        )
    paths = {name: os.path.join(folder, name) for name in names}
    if not earlier:
        return tuple(MixtureSource(path, 1.0) for path in paths.values())
    known = [dataclasses.replace(source, path=paths[source.label]) for source in earlier]
    new = [path for name, path in paths.items() if name not in labels]
    if not new:
        return tuple(known)
    older, newer = cfg.data.replay / len(known), (1 - cfg.data.replay) / len(new)
    known = [dataclasses.replace(source, weight_from={**source.weight_from, step: older}) for source in known]
    return (*known, *(MixtureSource(path, 0.0, {step: newer}) for path in new))
