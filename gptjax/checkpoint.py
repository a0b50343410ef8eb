"""Checkpoints (Orbax, asynchronous). Three items each: `params`; `rest`, which only training needs; `meta`, plain
values (config, tokenizer, losses), so that one path is enough to sample from.
"""

import copy
import json
import logging
import os
import re
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp
import tensorstore
from etils import epath
from orbax.checkpoint.checkpoint_managers import preservation_policy

from gptjax.checksums import WHOLE, damage_of, files_under, read_checksums, write_checksums
from gptjax.config import CheckpointConfig
from gptjax.errors import UserError
from gptjax.hosts import exchange, from_writer, is_writer

# Orbax logs every phase of a save, and the traceback of each error that it also raises; asyncio logs the errors of
# other arrays' writes after the first one has been raised.
for _name in ("absl", "asyncio"):
    logging.getLogger(_name).setLevel(logging.CRITICAL)
# Orbax calls this four times a save, only to log the bytes written. TensorStore 0.1.86 never frees the lists that it
# returns: 60 KiB a save.
tensorstore.experimental_collect_matching_metrics = lambda *_, **__: []


def _remember(to_json: Callable[..., Any], most: int = 16) -> Callable[..., Any]:
    """Return the method KvStore.Spec.to_json that remembers what it has returned for the last few specs."""
    found: dict[str, Any] = {}
    lock = threading.Lock()

    def remembered(spec: Any, *args: Any, **kwargs: Any) -> Any:
        key = repr((spec, args, kwargs))
        with lock:
            if key not in found:
                if len(found) >= most:
                    found.pop(next(iter(found)))
                found[key] = to_json(spec, *args, **kwargs)
            return copy.deepcopy(found[key])

    return remembered


# Orbax calls this for each array of a save, with the same few folders. What it returns is never freed either: 0.3 KiB
# a call.
tensorstore.KvStore.Spec.to_json = _remember(tensorstore.KvStore.Spec.to_json)

ITEMS = ("params", "rest", "meta", "metrics")
REQUIRED = ("params", "meta")  # an imported model has no `rest`, a save without an evaluation no `metrics`
JSON_FILES = {"meta": "metadata", "metrics": "metrics"}
Result = TypeVar("Result")


class Damaged(Exception):
    """What was read from a checkpoint is not what was written, whatever its files' checksums say."""


class PartWritten:
    """The last future that Orbax waits for in a process: it writes the checksums of the arrays that the process has
    written.
    """

    def __init__(self, folder: epath.Path):
        self.folder, self.process = folder, jax.process_index()

    def result(self, timeout: float | None = None) -> None:
        """Write the checksums, into the folder that Orbax then renames."""
        own = self.folder / f"ocdbt.process_{self.process}"
        if own.exists():
            files = [f"{own.name}/{name}" for name in files_under(own)]
            write_checksums(self.folder, files, f"checksums.process_{self.process}.json")

    def cancel(self) -> None:
        """Do nothing: nothing has started."""


class CheckedArrays(ocp.PyTreeCheckpointHandler):
    """Orbax's handler of arrays, with checksums: each process hashes what it wrote, the first process the rest."""

    async def async_save(self, directory: epath.Path, *args: Any, **kwargs: Any) -> list[Any]:
        """Start to write, and return the futures to wait for."""
        futures = await super().async_save(directory, *args, **kwargs)
        return [*(futures or []), PartWritten(directory)]

    def finalize(self, directory: epath.Path) -> None:
        """Merge what the processes wrote, and write its checksums. One process calls it, after all have written."""
        super().finalize(directory)
        write_checksums(directory, [name for name in files_under(directory) if not name.startswith("ocdbt.process_")])


class CheckedJson(ocp.JsonCheckpointHandler):
    """Orbax's handler of plain values, with checksums."""

    def finalize(self, directory: epath.Path) -> None:
        """Write the checksums of the files."""
        super().finalize(directory)
        write_checksums(directory, list(files_under(directory)))


class Checkpoints:
    """The checkpoints of a run.

    Args:
        workdir: the run's directory; the checkpoints are in its subfolder `checkpoints`.
        cfg: which checkpoints are kept; None to only read.
    """

    def __init__(self, workdir: str, cfg: CheckpointConfig | None = None):
        self.folder = epath.Path(os.path.abspath(workdir) if "://" not in workdir else workdir) / "checkpoints"
        options = ocp.CheckpointManagerOptions(read_only=True)
        if cfg is not None:
            policies: list[Any] = [preservation_policy.LatestN(cfg.keep_last)]
            if cfg.keep_best:
                lowest = preservation_policy.BestN(
                    get_metric_fn=lambda metrics: -metrics["val/loss"], n=1, keep_checkpoints_without_metrics=False
                )
                policies.append(lowest)
            options = ocp.CheckpointManagerOptions(
                preservation_policy=preservation_policy.AnyPreservationPolicy(policies),
                enable_async_checkpointing=True,
            )
        registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
        for name in ("params", "rest"):
            # Compression saves a twelfth of the bytes of a float32 weight, but takes half of the time of a save and
            # keeps the compressed bytes in memory: nearly a second copy of the model.
            registry.add(name, ocp.args.PyTreeSave, CheckedArrays(use_compression=False))
            registry.add(name, ocp.args.StandardRestore, ocp.StandardCheckpointHandler())
        for name, file in (("meta", None), ("metrics", "metrics")):
            handler = CheckedJson(file)
            for args in (ocp.args.JsonSave, ocp.args.JsonRestore):
                registry.add(name, args, handler)
        self.refused: dict[int, str] = {}  # step -> why reading it failed
        self.checked: dict[tuple[int, str], str | None] = {}  # step, item -> damage
        self.manager = ocp.CheckpointManager(self.folder, options=options, handler_registry=registry)

    def steps(self) -> list[int]:
        """Return the steps that have a finished checkpoint, the newest first."""
        return sorted(self.manager.all_steps(), reverse=True)

    def save(self, step: int, params: Any, rest: Any, meta: dict[str, Any], val_loss: float | None) -> None:
        """Start to write a checkpoint; the caller may donate the arrays once this returns. An imported model has no
        `rest`.
        """
        items = {"params": ocp.args.PyTreeSave(params), "meta": ocp.args.JsonSave(meta)}
        if rest is not None:
            items["rest"] = ocp.args.PyTreeSave(rest)
        is_saving = self.manager.save(
            step,
            args=ocp.args.Composite(**items),
            metrics=None if val_loss is None else {"val/loss": val_loss},
        )
        assert is_saving, f"Orbax did not save step {step}; it has {self.steps()}"

    def damage(self, step: int, items: Sequence[str] = ITEMS, part: int = 0, parts: int = 1) -> str | None:
        """Return what is wrong with a checkpoint's files; None where nothing is.

        Checkpoints of older versions have no checksums; only their JSON is checked.

        Args:
            part, parts: check only every `parts`-th file of each item, starting at number `part`.
        """
        if step in self.refused:
            return self.refused[step]
        for item in items:
            if (step, item) not in self.checked:
                self.checked[step, item] = self._damage_of_item(step, item, part, parts)
            if self.checked[step, item] is not None:
                return self.checked[step, item]
        return None

    def _damage_of_item(self, step: int, item: str, part: int, parts: int) -> str | None:
        folder = self.folder / str(step) / item
        if not folder.exists():
            return f"{item} is missing" if item in REQUIRED else None
        try:
            wanted = read_checksums(folder)
            if wanted is None and item in JSON_FILES:
                json.loads((folder / JSON_FILES[item]).read_bytes())
        except (ValueError, FileNotFoundError) as error:
            return f"{item}: {error}"
        for file in sorted(wanted or {})[part::parts]:
            if damage := damage_of(folder, file, wanted[file]):
                return f"{item}/{damage}"
        return None

    def has_checksums(self, step: int, items: Sequence[str] = ITEMS) -> bool:
        """Return whether the items of a checkpoint were written with checksums."""
        folders = [self.folder / str(step) / item for item in items]
        return all((folder / WHOLE).exists() for folder in folders if folder.exists())

    def set_aside_after(self, step: int) -> None:
        """Rename newer checkpoints, which are damaged, so that new ones can take their numbers.

        An older one is renamed too where its metrics are damaged, by which Orbax ranks it. Every process calls it.
        """
        if is_writer():
            for other in self.steps():
                if other > step or self.damage(other, ("metrics",)):
                    kept = self.folder.parent / f"damaged-{other}"
                    kept.rmtree(missing_ok=True)
                    (self.folder / str(other)).rename(kept)
        exchange(None)

    def meta(self, step: int) -> dict[str, Any]:
        """Return the plain values of a checkpoint."""
        return self.manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]

    def restore_params(self, step: int, abstract: Any) -> Any:
        """Return the weights, on the shardings of `abstract` (a tree of ShapeDtypeStructs)."""
        return self._restore(step, params=abstract)["params"]

    def restore(self, step: int, params: Any, rest: Any) -> tuple[Any, Any]:
        """Return weights and rest, on the shardings of these abstract trees, whatever mesh wrote them."""
        found = self._restore(step, params=params, rest=rest)
        return found["params"], found["rest"]

    def _restore(self, step: int, **abstract: Any) -> Any:
        items = {name: ocp.args.StandardRestore(tree) for name, tree in abstract.items()}
        found = self.manager.restore(step, args=ocp.args.Composite(**items))
        for name, tree in abstract.items():  # Orbax may return another layout than the requested one
            for wanted, restored in zip(jax.tree.leaves(tree), jax.tree.leaves(found[name]), strict=True):
                assert restored.shape == wanted.shape, (name, wanted, restored)
                assert restored.sharding == wanted.sharding, (name, wanted, restored)
        return found

    def wait(self) -> None:
        """Wait for pending writes."""
        self.manager.wait_until_finished()

    def reload(self) -> None:
        """Look at the disk again, where other objects may have set checkpoints aside."""
        self.manager.reload()

    def close(self) -> None:
        """Wait for pending writes, then close."""
        self.manager.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind, error, trace) -> None:
        """Finish the pending save, however the run ends, but do not wait for a process that may be lost."""
        if error is None or isinstance(error, UserError) or jax.process_count() == 1:
            self.close()


def newest_sound(checkpoints: Checkpoints, items: Sequence[str] = ITEMS) -> int | None:
    """Return the newest step whose files are undamaged, the same on every process; None where nothing is saved.

    Every process calls it, and checks its share of the files. Nothing is moved or changed.

    Args:
        items: the items that will be read; the others are not checked.

    Raises:
        UserError: all checkpoints are damaged.
    """
    steps = json.loads(from_writer(lambda: json.dumps(checkpoints.steps())))
    for step in steps:
        damages = exchange(checkpoints.damage(step, items, jax.process_index(), jax.process_count()))
        if not damages:
            return step
        _warn(checkpoints, step, damages[min(damages)])
    if steps:
        raise UserError(f"all checkpoints in {checkpoints.folder} are damaged; delete the folder to start again")
    return None


def read_newest(
    checkpoints: Checkpoints, read: Callable[[int], Result], items: Sequence[str] = ITEMS
) -> tuple[int, Result] | None:
    """Return the newest undamaged step and `read(step)`; None where nothing is saved. Every process calls it.

    Errors of `read` are raised: lack of memory or a failing network prove no damage. For a checkpoint without
    checksums, which older versions wrote, some errors do prove damage; then the previous checkpoint is read.

    Raises:
        UserError: all checkpoints are damaged.
    """
    while (step := newest_sound(checkpoints, items)) is not None:
        result, damage = None, None
        try:
            result = read(step)
        except Exception as error:
            proven = isinstance(error, Damaged) or (
                not checkpoints.has_checksums(step, items) and proves_damage(error)
            )
            if not proven:
                raise
            damage = " ".join(str(error).split())[:200]
        damages = exchange(damage)
        if not damages:
            return step, result  # type: ignore[return-value]
        checkpoints.refused[step] = damages[min(damages)]
    return None


def read_newest_meta(workdir: str) -> tuple[int, dict[str, Any]] | None:
    """Return the step of a run's newest undamaged checkpoint, and its plain values; None where nothing is saved."""
    checkpoints = Checkpoints(workdir)
    saved = read_newest(checkpoints, checkpoints.meta, ("meta",))
    checkpoints.close()
    return saved


def proves_damage(error: BaseException | None) -> bool:
    """Return whether an error, or its cause, can only come from a file that is missing, truncated or changed."""
    while error is not None and not isinstance(error, UserError):
        of_tensorstore = re.search(r"\b(DATA_LOSS|OUT_OF_RANGE|NOT_FOUND):", str(error))
        if of_tensorstore or isinstance(error, FileNotFoundError | json.JSONDecodeError | UnicodeDecodeError):
            return True
        error = error.__cause__ or error.__context__
    return False


def _warn(checkpoints: Checkpoints, step: int, damage: str) -> None:
    if is_writer():
        print(
            f"warning: checkpoint {step} in {checkpoints.folder} is damaged ({damage}); trying an older one",
            file=sys.stderr,
        )
