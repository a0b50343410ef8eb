"""Return a run to its last good checkpoint where steps are skipped repeatedly, and give up where that does not help.

A rollback restores weights, moments and statistics. The step number continues, and with it the batches and the
learning rate: the run passes the data that caused the trouble, ends after as many steps as planned, and writes each
step once. No checkpoint is written while steps are skipped (`hooks.Save`): a resume starts before them and takes the
same decisions again.
"""

from datetime import UTC, datetime

import jax
import numpy as np
from etils import epath

from gptjax.checkpoint import Checkpoints
from gptjax.data.corpus import Corpus
from gptjax.errors import Diverged
from gptjax.hosts import is_writer
from gptjax.lifecycle.faults import note_progress
from gptjax.lifecycle.goodput import Attempt, spend_on
from gptjax.lifecycle.report import attempt as attempt_call
from gptjax.lifecycle.rundir import write_outcome
from gptjax.lifecycle.start import begin_or_resume
from gptjax.metrics import append_record, read_records
from gptjax.spikes import LAST_ROLLBACK, ROLLBACKS, SKIPS, WINDOW_STEPS
from gptjax.step import Trainable, TrainState


class Rollback:
    """Decides every `train.rollback_skips` steps, a number that no logging changes, whether a run rolls back.

    Args:
        checkpoints: of the run.
        attempt: to which the steps that are given up are reported.
        start: the step from which this process takes steps.
    """

    def __init__(self, t: Trainable, corpus: Corpus, checkpoints: Checkpoints, attempt: Attempt, start: int):
        self.t, self.corpus, self.checkpoints, self.attempt, self.start = t, corpus, checkpoints, attempt, start

    def after(self, step: int, complete: bool, state: TrainState) -> tuple[TrainState, dict[str, float]]:
        """Return the state to resume from after a step, and what metrics.jsonl says of it; every process calls it.

        Raises:
            Diverged: so many rollbacks have not helped, the run ends after one that has not, or it has taken no step.
        """
        train = self.t.cfg.train
        if not (complete or step % train.rollback_skips == 0):
            return state, {}
        statistics = np.array(jax.device_get(state.statistics))
        skips = int(statistics[SKIPS])
        none_taken = complete and skips >= step - self.start
        earlier = int(statistics[ROLLBACKS]) if step - skips - statistics[LAST_ROLLBACK] < WINDOW_STEPS else 0
        ends_so = complete and skips > 0 and earlier > 0
        if skips < train.rollback_skips and not (none_taken or ends_so):
            return state, {}
        if none_taken or ends_so or earlier >= train.max_rollbacks:
            error = Diverged(step, earlier)
            write_outcome(self.t.cfg.workdir, "diverged", step, str(error))
            raise error
        with spend_on("restore"):
            return self._roll_back(step, skips, earlier + 1, state)

    def _roll_back(
        self, step: int, skips: int, rollbacks: int, state: TrainState
    ) -> tuple[TrainState, dict[str, float]]:
        note_progress()
        jax.tree.map(lambda x: x.delete(), state)  # there may be no room for two states
        self.checkpoints.wait()
        restored, _ = begin_or_resume(self.t, self.corpus)
        self.checkpoints.reload()
        from_step = int(restored.step)
        statistics = np.array(jax.device_get(restored.statistics))
        statistics[[SKIPS, ROLLBACKS, LAST_ROLLBACK]] = 0, rollbacks, step
        self.attempt.row["rolled_back_steps"] += max(0, step - skips - from_step)
        if is_writer():
            attempt_call("writing events.jsonl", lambda: self._note(step, from_step))
        shardings = self.t.state.step.sharding, self.t.state.statistics.sharding
        placed = jax.device_put((np.int32(step), statistics), shardings)
        return restored._replace(step=placed[0], statistics=placed[1]), {"rolled_back_to": float(from_step)}

    def _note(self, step: int, from_step: int) -> None:
        path = epath.Path(self.t.cfg.workdir) / "events.jsonl"
        event = {"step": step, "event": "rollback", "to_step": from_step}
        if not any(event.items() <= row.items() for row in read_records(path)):  # a resume repeats it
            append_record(path, event | {"time": datetime.now(UTC).isoformat(timespec="seconds")})
