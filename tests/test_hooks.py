"""What happens around the steps: speed and evaluation, at every interval."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import run_script

from gptjax import hooks
from gptjax.hooks import Evaluate, Measure, Profile, StepEnd
from gptjax.lifecycle import goodput
from gptjax.lifecycle.goodput import STEPS, Clock

STEP_S = 0.01


class FakeTime:
    """A clock that tests turn by hand."""

    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def fake_time(monkeypatch) -> FakeTime:
    clock = FakeTime()
    monkeypatch.setattr(goodput, "perf_counter", clock)
    return clock


def take_steps(called, total: int, fake_time: FakeTime, skipped=lambda step: False, start: int = 0) -> list[StepEnd]:
    """Call hooks as the trainer does, each step STEP_S long."""
    ends = []
    for step in range(start + 1, total + 1):
        fake_time.now += STEP_S
        metrics = {"train/loss": np.float32(3.0), "skipped": np.float32(skipped(step))}
        end = StepEnd(step, step == total, step == total, SimpleNamespace(step=step), {}, metrics)
        for hook in called:
            hook.after_step(end)
        ends.append(end)
    return ends


@pytest.mark.parametrize(("log", "evaluate"), [(10, 25), (1, 1), (7, 3), (25, 10), (10, 10), (1000, 4)])
def test_step_time_leaves_evaluations_out_at_every_interval(fake_time, log, evaluate):
    """It was 5.1 ms for steps of 10.2 with 10 and 25: the evaluation reset the clock under measured steps."""

    def slow_evaluation(state) -> dict[str, float]:
        fake_time.now += 5.0
        return {"val/loss": 1.0}

    clock = Clock()
    clock.turn_to(STEPS)
    called = [Measure(log, clock, 100, 1e-3), Evaluate(evaluate, clock, slow_evaluation)]
    measured = [end.values for end in take_steps(called, 100, fake_time) if "step_time_s" in end.values]
    assert len(measured) == len({*range(log, 101, log), 100})
    for values in measured:
        assert values["step_time_s"] == pytest.approx(STEP_S)
        assert values["tokens_per_s"] == pytest.approx(100 / STEP_S)
        assert values["mfu"] == pytest.approx(values["tokens_per_s"] * 1e-3)
    assert clock.step_seconds() == pytest.approx(100 * STEP_S)


@pytest.mark.parametrize("log", [1, 10])
def test_skipped_steps_are_counted_at_every_interval(fake_time, log):
    clock = Clock()
    clock.turn_to(STEPS)
    ends = take_steps([Measure(log, clock, 100, None)], 40, fake_time, lambda step: step % 10 != 0)
    assert sum(end.values.get("skipped", 0) for end in ends) == 36


@pytest.fixture
def traces(monkeypatch) -> list[str]:
    calls: list[str] = []
    monkeypatch.setattr(hooks.jax.profiler, "start_trace", lambda folder: calls.append("start"))
    monkeypatch.setattr(hooks.jax.profiler, "stop_trace", lambda: calls.append("stop"))
    return calls


def profile(steps: range, start: int, stop: int, traces: list[str]) -> None:
    """Steps start + 1 to stop of a run, with a profile of `steps`; the last call ends the run."""
    hook = Profile(steps, "unused")
    for step in range(start + 1, stop + 1):
        hook.before_step(step)
        traces.append(str(step))
        hook.after_step(StepEnd(step, step == stop, step == stop, SimpleNamespace()))
    hook.close()


def test_a_profile_covers_its_steps(traces):
    profile(range(3, 5), 0, 6, traces)
    assert traces == ["1", "2", "start", "3", "4", "stop", "5", "6"]


def test_a_resume_inside_the_profiled_steps_profiles_what_is_left(traces):
    """It ended every resume with an error: the trace was to stop that nothing had started."""
    profile(range(3, 8), 0, 4, traces)
    profile(range(3, 8), 4, 8, traces)
    assert traces == ["1", "2", "start", "3", "4", "stop", "start", "5", "6", "7", "stop", "8"]
    profile(range(3, 8), 8, 9, rest := [])
    assert rest == ["9"]


@pytest.mark.whole
@pytest.mark.parametrize("interval", [1, 3])
def test_a_run_that_diverges_ends_with_2_and_says_so(tiny_run, tmp_path, interval):
    workdir = tmp_path / "run"
    args = (f"--train.log_interval_steps={interval}", "--optim.peak_lr=1e38", "--optim.clip_norm=null")
    result = run_script(*tiny_run, f"--workdir={workdir}", *args)
    assert result.returncode == 2, result.stdout
    assert "loss, gradient or update were not finite or spiked" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert json.loads((workdir / "outcome.json").read_text())["status"] == "diverged"
    assert not list((workdir / "checkpoints").glob("*tmp*"))  # the save in flight was finished


@pytest.mark.whole
def test_a_hook_of_ones_own_sees_every_step(corpus_file, token_cache, tmp_path):
    from conftest import TINY_RUN

    from gptjax.configfile import load_config
    from gptjax.trainer import train

    class Losses(hooks.Hook):
        def __init__(self):
            self.seen: list[tuple[int, float]] = []
            self.closed = False

        def after_step(self, end: StepEnd) -> None:
            if end.metrics:
                self.seen.append((end.step, float(end.metrics["train/loss"])))

        def close(self) -> None:
            self.closed = True

    data = [f"--data.path={corpus_file}", f"--data.cache_dir={token_cache}", f"--workdir={tmp_path / 'run'}"]
    mesh = ["--mesh.data=8"]  # the test process has eight devices
    losses = Losses()
    assert train(load_config([*TINY_RUN, *data, *mesh, "--train.total_steps=4"]), [losses]) == 0
    assert [step for step, _ in losses.seen] == [1, 2, 3, 4]
    assert losses.closed
    assert losses.seen[-1][1] < losses.seen[0][1]
