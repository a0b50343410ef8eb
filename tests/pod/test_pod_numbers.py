"""Two processes with bad batches, a kill and a flipped bit: they take the same decisions, and name the device.

`pytest -m slow -n 0 tests/pod/test_pod_numbers.py`
"""

import signal

import pytest
from faults.training import Training

from gptjax.lifecycle.goodput import STEPS, read_goodput

MORE = ("--train.total_steps=40", "--train.rollback_skips=4", "--run.verify_interval_steps=4", "--mesh.cpu_devices=2")
BAD = {"disturb": ["nan batch", 17, 25]}  # nine steps, of which four roll back


@pytest.mark.slow
def test_two_processes_roll_back_and_resume_alike_while_devices_are_compared(corpus_file, token_cache, tmp_path):
    whole, killed = (
        Training(tmp_path / name, corpus_file, token_cache, *MORE, hosts=2, fault=BAD) for name in ("whole", "killed")
    )
    assert whole.run()[0] == 0, whole.errors_of(0)
    wanted = whole.outcome()
    rollbacks = [(row["step"], row["rolled_back_to"]) for row in wanted[0] if "rolled_back_to" in row]
    assert rollbacks == [(20, 15), (24, 15)]
    assert killed.run(fault={"kill": ["steps", 33, 0]})[0] == -signal.SIGKILL
    assert 15 < killed.last_step() < 40
    assert killed.run()[0] == 0, killed.errors_of(0)
    assert killed.outcome() == wanted
    totals, attempts = read_goodput(str(killed.workdir))
    assert attempts == 2
    assert min(totals[name] for name in (STEPS, "verify", "restore", "compile", "save")) > 0


@pytest.mark.slow
def test_a_bit_that_flips_in_one_process_ends_both_and_names_the_device(corpus_file, token_cache, tmp_path):
    run = Training(tmp_path / "run", corpus_file, token_cache, *MORE, hosts=2, fault={"flip": 7})
    assert run.run()[0] == 1
    for host in (0, 1):
        named = run.errors_of(host).partition("silent corruption: ")[2].partition(" of the replicas of ")[0]
        assert named and "," not in named, run.errors_of(host)
    assert run.last_step() == 7  # step 8 was compared, and neither written nor saved
    assert sorted(path.name for path in (run.workdir / "checkpoints").iterdir()) == ["5"]
