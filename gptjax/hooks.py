"""What happens around the steps of a run, each as a small object: the trainer's loop calls them in order.

A new hook is a subclass of `Hook`, given to `gptjax.trainer.train(cfg, hooks=[...])`. Hooks of one list share the
`values` of a step: `Measure` and `Evaluate` add to them, `Write` sends them out, `Save` looks at the validation loss.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter

import jax

from gptjax.errors import Diverged
from gptjax.faults import Watchdog
from gptjax.report import Report
from gptjax.rundir import write_outcome
from gptjax.step import TrainState

PATIENCE_STEPS = 10  # so many steps in a row without a finite gradient end a run


class Clock:
    """Seconds of a run by what they were spent on. What nothing else claims is spent on steps.

    Attributes:
        seconds: by name, such as "evaluate".
    """

    def __init__(self):
        self.began_at = perf_counter()
        self.seconds: dict[str, float] = {}

    @contextmanager
    def spend_on(self, name: str) -> Iterator[None]:
        """Count the seconds of a `with` block under a name."""
        began = perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + perf_counter() - began

    def step_seconds(self) -> float:
        """Return the seconds since the beginning that no name has claimed."""
        return perf_counter() - self.began_at - sum(self.seconds.values())


@dataclass
class StepEnd:
    """What hooks see after a step.

    Attributes:
        step: number of the step, from 1; 0 before the first step of a new run.
        last: whether the loop ends here, at `total_steps` or by a signal.
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
    """Add a step's metrics and the speed since the last measurement, every `interval` steps and at the end.

    Raises:
        Diverged: PATIENCE_STEPS steps in a row had no finite gradient, or all the last ones of a shorter run.
    """

    def __init__(
        self, interval: int, clock: Clock, tokens_per_step: int, mfu_per_token_rate: float | None, workdir: str
    ):
        self.interval, self.clock, self.tokens_per_step = interval, clock, tokens_per_step
        self.mfu_per_token_rate, self.workdir = mfu_per_token_rate, workdir
        self.pending: list[dict[str, jax.Array]] = []
        self.measured_at_s = clock.step_seconds()
        self.skipped_in_a_row, self.steps_seen = 0, 0

    def after_step(self, end: StepEnd) -> None:
        if not end.metrics:
            return
        self.pending.append(end.metrics)
        if not (end.last or end.step % self.interval == 0):
            return
        end.values |= {name: float(value) for name, value in end.metrics.items()}
        skipped = [bool(metrics["skipped"]) for metrics in jax.device_get(self.pending)]
        end.values["skipped"] = float(sum(skipped))
        now_s = self.clock.step_seconds()
        end.values["step_time_s"] = (now_s - self.measured_at_s) / len(self.pending)
        end.values["tokens_per_s"] = self.tokens_per_step / end.values["step_time_s"]
        if self.mfu_per_token_rate is not None:
            end.values["mfu"] = end.values["tokens_per_s"] * self.mfu_per_token_rate
        self.measured_at_s, self.pending = now_s, []
        self._check_divergence(end, skipped)

    def _check_divergence(self, end: StepEnd, skipped: list[bool]) -> None:
        for offset, was_skipped in enumerate(skipped, end.step - len(skipped) + 1):
            self.steps_seen += 1
            self.skipped_in_a_row = self.skipped_in_a_row + 1 if was_skipped else 0
            ended_so = end.complete and offset == end.step and self.skipped_in_a_row == self.steps_seen
            if self.skipped_in_a_row >= PATIENCE_STEPS or ended_so:
                error = Diverged(offset - self.skipped_in_a_row + 1, offset)
                write_outcome(self.workdir, "diverged", offset, str(error))
                raise error


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
    """Begin a checkpoint every `interval` steps and at the end.

    Args:
        save: (state, validation loss or None) -> nothing; the state may be consumed when it returns.
    """

    def __init__(self, interval: int, clock: Clock, save: Callable[[TrainState, float | None], None]):
        self.interval, self.clock, self.save = interval, clock, save

    def after_step(self, end: StepEnd) -> None:
        if end.step and (end.last or end.step % self.interval == 0):
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
