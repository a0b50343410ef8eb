"""What happens around the steps of a run, each as a small object: the trainer's loop calls them in order.

A new hook is a subclass of `Hook`, given to `gptjax.trainer.train(cfg, hooks=[...])`. Hooks of one list share the
`values` of a step: `Measure` and `Evaluate` add to them, `Write` sends them out, `Save` looks at the validation loss.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import jax

from gptjax.lifecycle.faults import Watchdog
from gptjax.lifecycle.goodput import Attempt, Clock, share_of_steps
from gptjax.lifecycle.report import Report
from gptjax.spikes import was_taken
from gptjax.step import TrainState


@dataclass
class StepEnd:
    """What hooks see after a step.

    Attributes:
        step: number of the step, from 1; 0 before the first step of a new run.
        last: whether the loop ends here, at `total_steps`, by a signal or by a hook.
        complete: whether `total_steps` is reached.
        state: after the step. The next step consumes it: copy what must outlive this call.
        batch: that the step was taken on, global arrays.
        metrics: of the step, scalars on the device; reading one waits for the step.
        values: what the hooks before this one have found, by name as in metrics.jsonl.
    """

    step: int
    last: bool
    complete: bool
    state: TrainState
    batch: dict[str, jax.Array] = field(default_factory=dict)
    metrics: dict[str, jax.Array] = field(default_factory=dict)
    values: dict[str, float] = field(default_factory=dict)


class Hook:
    """Does nothing; a subclass overrides what it needs."""

    def before_step(self, step: int) -> None:
        """Called before each step with its number."""

    def after_step(self, end: StepEnd) -> None:
        """Called after each step, and once with step 0 where a run begins."""

    def ends_run(self, step: int) -> str | None:
        """Return why the run shall end after a step that is not its last, None otherwise; called before the hooks.

        All processes must return the same.
        """

    def close(self) -> None:
        """Called once when the loop has ended without an error."""


class Profile(Hook):
    """Write a profiler trace of some steps; after a resume, of those that are left.

    Args:
        steps: of which the trace is taken; empty for none.
        folder: that it is written to.
    """

    def __init__(self, steps: range, folder: str):
        self.steps, self.folder, self.running = steps, folder, False

    def before_step(self, step: int) -> None:
        if not self.running and step in self.steps:
            jax.profiler.start_trace(self.folder)
            self.running = True

    def after_step(self, end: StepEnd) -> None:
        if self.running and (end.last or end.step + 1 not in self.steps):
            jax.block_until_ready(end.state)
            self.close()

    def close(self) -> None:
        if self.running:
            jax.profiler.stop_trace()
            self.running = False


class Measure(Hook):
    """Add a step's metrics and the speed since the last measurement, every `interval` steps and at the end."""

    def __init__(self, interval: int, clock: Clock, tokens_per_step: int, mfu_per_token_rate: float | None):
        self.interval, self.clock, self.tokens_per_step = interval, clock, tokens_per_step
        self.mfu_per_token_rate = mfu_per_token_rate
        self.pending: list[dict[str, jax.Array]] = []
        self.measured_at_s = clock.step_seconds()

    def after_step(self, end: StepEnd) -> None:
        if not end.metrics:
            return
        self.pending.append(end.metrics)
        if not (end.last or end.step % self.interval == 0):
            return
        end.values |= {name: float(value) for name, value in end.metrics.items()}
        end.values["skipped"] = float(sum(bool(metrics["skipped"]) for metrics in jax.device_get(self.pending)))
        now_s = self.clock.step_seconds()
        end.values["step_time_s"] = (now_s - self.measured_at_s) / len(self.pending)
        end.values["tokens_per_s"] = self.tokens_per_step / end.values["step_time_s"]
        if self.mfu_per_token_rate is not None:
            end.values["mfu"] = end.values["tokens_per_s"] * self.mfu_per_token_rate
        self.measured_at_s, self.pending = now_s, []


class Verify(Hook):
    """Compare the devices every `interval` steps, before anything is saved.

    Args:
        verify: (state, batch) -> nothing; raises where devices differ (`verification.make_verify`).
    """

    def __init__(self, interval: int, clock: Clock, verify: Callable[[TrainState, dict[str, jax.Array]], None]):
        self.interval, self.clock, self.verify = interval, clock, verify

    def after_step(self, end: StepEnd) -> None:
        if end.step and end.step % self.interval == 0:
            jax.block_until_ready(end.state)
            with self.clock.spend_on("verify"):
                self.verify(end.state, end.batch)


class Evaluate(Hook):
    """Add the validation metrics, at step 0, every `interval` steps and at the end of the run."""

    def __init__(self, interval: int, clock: Clock, evaluate: Callable[[TrainState], dict[str, float]]):
        self.interval, self.clock, self.evaluate = interval, clock, evaluate

    def after_step(self, end: StepEnd) -> None:
        if end.complete or end.step % self.interval == 0:
            jax.block_until_ready(end.state)  # the steps still under way are no part of the evaluation
            with self.clock.spend_on("evaluate"):
                end.values |= self.evaluate(end.state)


class Sample(Hook):
    """Keep a sample in samples.jsonl after every evaluation but the last, whose sample is the concluding one.

    Args:
        sample: state -> the text.
    """

    def __init__(self, interval: int, clock: Clock, sample: Callable[[TrainState], str], report: Report):
        self.interval, self.clock, self.sample, self.report = interval, clock, sample, report

    def after_step(self, end: StepEnd) -> None:
        if not end.complete and end.step % self.interval == 0:
            jax.block_until_ready(end.state)
            with self.clock.spend_on("sample"):
                text = self.sample(end.state)
                self.report.keep_sample(end.step, text)


class Account(Hook):
    """Note the steps that an attempt takes, and add the goodput of all attempts at every evaluation and at the end.

    The last row has the seconds by name, too.
    """

    def __init__(self, interval: int, attempt: Attempt):
        self.interval, self.attempt = interval, attempt

    def after_step(self, end: StepEnd) -> None:
        self.attempt.row["step"] = end.step
        if end.last or (end.step and end.step % self.interval == 0):
            totals = self.attempt.totals()
            end.values["goodput"] = share_of_steps(totals)
            if end.last:
                end.values |= {f"seconds/{name}": seconds for name, seconds in totals.items()}


class Write(Hook):
    """Send a step's values to metrics.jsonl, the trackers and the screen."""

    def __init__(self, report: Report):
        self.report = report

    def after_step(self, end: StepEnd) -> None:
        if end.values:
            self.report.write(end.step, end.values)

    def close(self) -> None:
        self.report.close()


class Save(Hook):
    """Begin a checkpoint every `interval` steps and at the end; while steps are skipped, wait for the next good one.

    What a run in trouble holds never replaces the checkpoint that it may have to return to.

    Args:
        save: (state, validation loss or None) -> nothing; the state may be consumed when it returns.
    """

    def __init__(self, interval: int, clock: Clock, save: Callable[[TrainState, float | None], None]):
        self.interval, self.clock, self.save, self.due = interval, clock, save, False

    def after_step(self, end: StepEnd) -> None:
        self.due |= end.step > 0 and (end.last or end.step % self.interval == 0)
        if self.due and (end.complete or was_taken(jax.device_get(end.state.statistics), end.step)):
            self.due = False
            jax.block_until_ready(end.state)
            with self.clock.spend_on("save"):
                self.save(end.state, end.values.get("val/loss"))


class Watch(Hook):
    """Tell the watchdog that a step has ended."""

    def __init__(self, watchdog: Watchdog):
        self.watchdog = watchdog

    def after_step(self, end: StepEnd) -> None:
        if end.step == 0:
            self.watchdog.start_phase()  # the first step compiles
        else:
            self.watchdog.step_done()
