"""Checkpoints (Orbax, asynchronous). Three items each: `params`; `rest`, what only training needs; `meta`, plain
values (config, tokenizer, losses), so that one path is enough to sample from."""

import logging
import os
import sys
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint.checkpoint_managers import preservation_policy

from gptjax.config import CheckpointConfig
from gptjax.errors import UserError

logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax reports every phase of a save


class Checkpoints:
    """The checkpoints of a run.

    Args:
        workdir: the run's directory; they lie in its subfolder `checkpoints`.
        cfg: which are kept; None to read only.
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
            # Compressing spares a float32 weight a twelfth of its bytes, takes half of the time that a save takes,
            # and holds what it has compressed in memory: nearly a second copy of the model.
            registry.add(name, ocp.args.PyTreeSave, ocp.PyTreeCheckpointHandler(use_compression=False))
            registry.add(name, ocp.args.StandardRestore, ocp.StandardCheckpointHandler())
        json_handler = ocp.JsonCheckpointHandler()
        for args in (ocp.args.JsonSave, ocp.args.JsonRestore):
            registry.add("meta", args, json_handler)
        self.manager = ocp.CheckpointManager(self.folder, options=options, handler_registry=registry)

    def steps(self) -> list[int]:
        """Steps that have a finished checkpoint, the newest first."""
        return sorted(self.manager.all_steps(), reverse=True)

    def save(self, step: int, params: Any, rest: Any, meta: dict[str, Any], val_loss: float | None) -> None:
        """Begin to write; the arrays may be given away as soon as this returns. An imported model has no `rest`."""
        items = {"params": ocp.args.PyTreeSave(params), "meta": ocp.args.JsonSave(meta)}
        if rest is not None:
            items["rest"] = ocp.args.PyTreeSave(rest)
        begun = self.manager.save(
            step,
            args=ocp.args.Composite(**items),
            metrics=None if val_loss is None else {"val/loss": val_loss},
        )
        assert begun, f"Orbax did not save step {step}; it has {self.steps()}"

    def set_aside_after(self, step: int) -> None:
        """Move newer checkpoints, which could not be read, out of the way of those that will take their numbers."""
        newer = [s for s in self.steps() if s > step]
        if jax.process_index() == 0:
            for damaged in newer:
                kept = self.folder.parent / f"damaged-{damaged}"
                kept.rmtree(missing_ok=True)
                (self.folder / str(damaged)).rename(kept)
        if newer and jax.process_count() > 1:
            multihost_utils.sync_global_devices("damaged checkpoints are set aside")

    def meta(self, step: int) -> dict[str, Any]:
        """The plain values of a checkpoint."""
        return self.manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]

    def restore_params(self, step: int, abstract: Any) -> Any:
        """The weights, onto the shardings of `abstract` (a tree of ShapeDtypeStructs)."""
        return self._restore(step, params=abstract)["params"]

    def restore(self, step: int, params: Any, rest: Any) -> tuple[Any, Any]:
        """Weights and rest, onto the shardings of these abstract trees, whatever mesh wrote them."""
        found = self._restore(step, params=params, rest=rest)
        return found["params"], found["rest"]

    def _restore(self, step: int, **abstract: Any) -> Any:
        items = {name: ocp.args.StandardRestore(tree) for name, tree in abstract.items()}
        found = self.manager.restore(step, args=ocp.args.Composite(**items))
        for name, tree in abstract.items():  # never trust a layout that was not asked for
            for want, got in zip(jax.tree.leaves(tree), jax.tree.leaves(found[name]), strict=True):
                assert got.shape == want.shape and got.sharding == want.sharding, (name, want, got)
        return found

    def close(self) -> None:
        """Wait for what is being written, then let go."""
        self.manager.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind, error, trace) -> None:
        """Finish the save in flight, whichever way a run ends; but wait for no process that may be lost."""
        if error is None or isinstance(error, UserError) or jax.process_count() == 1:
            self.close()


def newest_readable(checkpoints: Checkpoints, read: Any) -> tuple[int, Any] | None:
    """The newest step for which `read(step)` succeeds, with what it gave; None where there is no checkpoint.

    A damaged checkpoint is passed over with a warning. Raises UserError where all are damaged.
    """
    steps = checkpoints.steps()
    for step in steps:
        try:
            return step, read(step)
        except UserError:
            raise
        except Exception as error:  # Orbax and TensorStore raise many kinds for damaged files
            reason = " ".join(str(error).split())[:200]
            print(
                f"warning: checkpoint {step} in {checkpoints.folder} cannot be read ({reason}); trying an older one",
                file=sys.stderr,
            )
    if steps:
        raise UserError(f"no checkpoint in {checkpoints.folder} can be read; delete the folder to start again")
    return None
