"""On what a run has spent its time, over attempts that were killed."""

import json
import random
import signal
import time

import pytest
from conftest import run_script
from faults.training import Training

from gptjax.lifecycle import goodput
from gptjax.lifecycle.goodput import (
    BETWEEN,
    LOST,
    STEPS,
    Clock,
    read_goodput,
    share_of_steps,
    table_of,
    total_seconds,
)


def test_every_second_counts_under_one_name(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(goodput, "perf_counter", lambda: now[0])
    clock = Clock(age_s=2.0)
    now[0] += 1
    clock.turn_to(STEPS)
    with clock.spend_on("evaluate"):
        now[0] += 10
        with clock.spend_on("compile"):
            now[0] += 100
        now[0] += 1000
    now[0] += 10000
    assert clock.read() == {"start": 3, STEPS: 10000, "evaluate": 1010, "compile": 100}
    assert clock.step_seconds() == 10000


def attempt(began: float, from_step: int | None, step: int, steps_s: float, **more) -> dict:
    seconds = {"start": 1.0, STEPS: steps_s} | more.pop("seconds", {})
    return {"began": began, "from_step": from_step, "step": step, "rolled_back_steps": 0, "seconds": seconds, **more}


def test_steps_that_were_taken_again_are_lost():
    attempts = [
        attempt(0, 0, 20, 20.0),  # steps 11 to 20 were taken again
        attempt(30, None, 0, 0.0),  # killed before it resumed
        attempt(40, 10, 14, 4.0),  # all four were lost
        attempt(50, 10, 30, 20.0, rolled_back_steps=5),
    ]
    totals = total_seconds(attempts)
    assert totals[LOST] == pytest.approx(10 + 4 + 5)
    assert totals[STEPS] == pytest.approx(10 + 15)
    assert totals[BETWEEN] == pytest.approx(9 + 9 + 5)
    assert sum(totals.values()) == pytest.approx(50 + 21)  # from the first beginning to the last end
    assert share_of_steps(totals) == pytest.approx(25 / 48)
    assert table_of(totals, 4)[0] == "goodput 52.1% of 48 s in 4 attempts"


def test_a_damaged_record_is_no_error(tmp_path):
    good = attempt(0, 0, 20, 20.0)
    lines = ["{", "[]", '{"began": 1}', json.dumps(good | {"seconds": {"steps": "x"}}), json.dumps(good)]
    (tmp_path / goodput.FILE).write_text("\n".join(lines))
    assert read_goodput(str(tmp_path))[1] == 1


def check_sum(training: Training, expected_s: float, tolerance: float) -> None:
    """Compare the table of a run with the time for which its processes ran."""
    totals, attempts = read_goodput(str(training.workdir))
    running_s = sum(totals.values()) - totals[BETWEEN]
    assert attempts == training.starts
    assert running_s == pytest.approx(expected_s, rel=tolerance)
    assert totals[STEPS] > 0


@pytest.mark.whole
def test_the_table_of_a_killed_run_adds_up(corpus_file, token_cache, tmp_path):
    training = Training(tmp_path / "run", corpus_file, token_cache, "--train.total_steps=14")
    recorded_s = 0.0  # from each beginning to the last record: the interpreter's own end is in no record
    for kill, code in ((["steps", 18, 0], -9), (["", 1, 0], 0)):
        began = time.time()
        assert training.run(fault={"kill": kill})[0] == code
        recorded_s += (training.workdir / goodput.FILE).stat().st_mtime - began
    check_sum(training, recorded_s, 0.1)
    last = json.loads((training.workdir / "metrics.jsonl").read_text().splitlines()[-1])
    assert 0 < last["goodput"] < 1
    assert last["seconds/restore"] > 0
    shown = run_script("-m", "gptjax", "inspect", training.workdir, "--goodput")
    assert shown.stdout.startswith("goodput ") and "in 2 attempts" in shown.stdout


@pytest.mark.slow
def test_the_table_of_a_run_killed_ten_times_adds_up(corpus_file, token_cache, tmp_path):
    random.seed(0)
    training = Training(tmp_path / "run", corpus_file, token_cache, "--train.total_steps=100000")
    for _ in range(10):
        began = time.monotonic()
        process = training.start()
        while not (training.workdir / goodput.FILE).exists() or len(attempts_of(training)) < training.starts:
            time.sleep(0.05)
        time.sleep(random.uniform(3, 15))
        process.kill()
        process.communicate()
        training.running_s += time.monotonic() - began
    began, process = time.monotonic(), training.start()
    time.sleep(15)
    process.send_signal(signal.SIGTERM)
    process.communicate()
    training.running_s += time.monotonic() - began
    assert process.returncode == 75
    check_sum(training, training.running_s, 0.02)
    assert read_goodput(str(training.workdir))[0][LOST] > 0


def attempts_of(training: Training) -> list[dict]:
    return goodput.read_attempts(training.workdir / goodput.FILE)
