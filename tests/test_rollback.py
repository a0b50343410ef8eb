"""What a run does when its steps are skipped repeatedly: back to the last good checkpoint, and past the data."""

import json
from collections.abc import Callable
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GPT2_LIKE, TINY_RUN, make_config
from faults.training import hash_of_weights

from gptjax import trainer
from gptjax.configfile import load_config
from gptjax.errors import Diverged
from gptjax.hooks import Hook, StepEnd
from gptjax.lifecycle.rollback import Rollback
from gptjax.metrics import read_metrics, read_records
from gptjax.spikes import SKIPS, STATISTICS, UPDATES, WINDOW_STEPS, first_statistics, judge_step, judge_update

TIMES = ("step_time_s", "tokens_per_s", "goodput")


@pytest.fixture
def train(corpus_file, token_cache, tmp_path, monkeypatch) -> Callable:
    """Return a function that trains in a directory, with the weights of the loss changed in some batches."""

    def run(name: str, bad: dict[int, float], *more: str, hooks: tuple[Hook, ...] = ()):
        step_number = [0]

        class Count(Hook):
            def before_step(self, step: int) -> None:
                step_number[0] = step

        def disturbed(*args):
            batch = global_batch(*args)
            factor = bad.get(step_number[0])
            return batch if factor is None else batch | {"weights": batch["weights"] * jnp.float32(factor)}

        monkeypatch.setattr(trainer, "global_batch", disturbed)
        data = [f"--data.path={corpus_file}", f"--data.cache_dir={token_cache}", f"--workdir={tmp_path / name}"]
        few = ["--train.total_steps=40", "--train.rollback_skips=4", "--mesh.data=8", "--train.log_interval_steps=3"]
        assert trainer.train(load_config([*TINY_RUN, *data, *few, *more]), [Count(), *hooks]) == 0
        rows = [
            {key: v for key, v in row.items() if key not in TIMES and not key.startswith("seconds/")}
            for row in read_metrics(tmp_path / name)
        ]
        return rows, hash_of_weights(tmp_path / name, 40), tmp_path / name

    global_batch = trainer.global_batch
    return run


class Killed(Exception):
    """Stands for a process that is killed."""


class Kill(Hook):
    def __init__(self, step: int):
        self.step = step

    def after_step(self, end: StepEnd) -> None:
        if end.step == self.step:
            raise Killed


@pytest.mark.whole
def test_bad_batches_in_a_row_are_passed_and_a_resume_decides_the_same(train):
    bad = dict.fromkeys(range(17, 26), np.nan)  # nine steps, four skips roll back
    rows, weights, workdir = train("whole", bad)
    rollbacks = [(row["step"], row["rolled_back_to"]) for row in rows if "rolled_back_to" in row]
    assert rollbacks == [(20, 15), (24, 15)]
    events = [row for row in read_records(workdir / "events.jsonl") if row["event"] == "rollback"]
    assert [(event["step"], event["to_step"]) for event in events] == [(20, 15), (24, 15)]
    assert [row["step"] for row in rows] == sorted({row["step"] for row in rows})
    assert np.isfinite(rows[-1]["train/loss"])
    assert rows[-1]["train/loss"] < rows[1]["train/loss"]
    with pytest.raises(Killed):
        train("killed", bad, hooks=(Kill(23),))
    again, weights_then, folder = train("killed", bad)
    assert again == rows
    assert weights_then == weights
    assert [event["step"] for event in read_records(folder / "events.jsonl") if event["event"] == "rollback"] == [
        20,
        24,
    ]


@pytest.mark.whole
def test_single_bad_batches_are_skipped_and_no_checkpoint_is_written_meanwhile(train, monkeypatch):
    saved, save = [], trainer.save
    monkeypatch.setattr(trainer, "save", lambda *args: saved.append(int(args[4].step)) or save(*args))
    bad = dict.fromkeys((12, 19, 20, 21), np.nan)
    rows, _, _ = train("waiting", bad, "--train.eval_interval_steps=50")
    assert saved == [5, 10, 15, 22, 25, 30, 35, 40]
    assert sum(row.get("skipped", 0) for row in rows) == 4
    assert not any("rolled_back_to" in row for row in rows)


@pytest.mark.whole
def test_a_run_that_does_not_recover_gives_up_and_keeps_its_checkpoint(train, tmp_path):
    with pytest.raises(
        Diverged, match=r"gave up after step 32: .*, and 2 rollbacks did not help; lower optim.peak_lr"
    ):
        train("lost", dict.fromkeys(range(21, 41), np.nan), "--train.max_rollbacks=2")
    folder = tmp_path / "lost"
    assert json.loads((folder / "outcome.json").read_text())["status"] == "diverged"
    assert [step for step in range(41) if (folder / "checkpoints" / str(step)).exists()][-1] == 20


def test_a_short_run_without_any_good_step_is_no_success(tmp_path):
    t = SimpleNamespace(cfg=make_config(GPT2_LIKE, workdir=str(tmp_path)))
    statistics = np.zeros(STATISTICS, np.float32)
    statistics[SKIPS] = 3
    with pytest.raises(Diverged, match="gave up after step 13"):
        Rollback(t, None, None, None, start=10).after(13, True, SimpleNamespace(statistics=statistics))
    state = SimpleNamespace(statistics=statistics)
    assert Rollback(t, None, None, None, start=9).after(13, True, state) == (state, {})  # its first step was taken


def test_an_update_that_spikes_stops_all_steps_until_a_rollback():
    statistics = first_statistics()
    for _ in range(WINDOW_STEPS + 5):
        good, statistics = judge_step(statistics, jnp.float32(3), jnp.float32(1), 10.0, 4)
        statistics = judge_update(statistics, good, jnp.float32(2), 10.0, 4)
    assert statistics[UPDATES] == pytest.approx(2)
    for norm in (np.nan, np.inf, 20.0):
        after = judge_update(statistics, jnp.bool_(True), jnp.float32(norm), 10.0, 4)
        assert after[SKIPS] == 4
        assert np.isfinite(after).all()
        assert not judge_step(after, jnp.float32(3), jnp.float32(1), 10.0, 4)[0]
    calm = judge_update(statistics, jnp.bool_(True), jnp.float32(5), 10.0, 4)
    assert calm[SKIPS] == 0
    assert judge_update(statistics, jnp.bool_(False), jnp.float32(0), 10.0, 4)[SKIPS] == 1
    assert judge_update(first_statistics(), jnp.bool_(True), jnp.float32(np.nan), None, 4)[SKIPS] == 4
