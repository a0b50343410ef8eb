"""The watchdog of a process: what it ends, what it leaves, and how much it prints."""

import threading

import pytest
from conftest import run_script

from gptjax.lifecycle.faults import describe_threads

SCRIPT = """
import ctypes, threading, time
from gptjax.lifecycle import faults
faults.START_FACTOR, faults.BACKSTOP_S = 2, 1

def wait_in_vain():
    time.sleep(60)

def hold_the_lock_of_python():
    ctypes.PyDLL(None).sleep(60)

with faults.Watchdog(1) as watchdog:
    {body}
print("done")
"""


def run(body: str):
    return run_script("-c", SCRIPT.format(body=body), timeout=50)


def test_a_process_that_is_stuck_ends_and_names_the_place():
    done = run("watchdog.start_phase(); wait_in_vain()")
    assert done.returncode == 1
    assert done.stderr.startswith("error: no progress for 2 s (distributed.stall_timeout_s 1")
    assert "in wait_in_vain\n" in done.stderr


def test_a_process_is_ended_even_while_no_thread_of_python_runs():
    done = run("watchdog.step_done(); hold_the_lock_of_python()")
    assert done.returncode == 1
    assert "in hold_the_lock_of_python\n" in done.stderr


@pytest.mark.whole
def test_progress_and_waiting_for_another_process_are_not_stuck():
    done = run(
        "faults.START_FACTOR = 3; watchdog.start_phase()\n"
        "    for _ in range(9): time.sleep(0.5); faults.note_progress()\n"
        "    watchdog.pause(); time.sleep(4)"
    )
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr


STUCK_START = """
import sys, time
from gptjax import cli, trainer
from gptjax.lifecycle import faults

def read_a_dead_disk(*_):
    time.sleep(100)

faults.START_FACTOR, trainer.load_corpus = 2, read_a_dead_disk
sys.exit(cli.train(sys.argv[2:]))
"""


@pytest.mark.whole
def test_a_run_is_watched_while_it_reads_its_corpus(tiny_run, tmp_path):
    arguments = [*tiny_run, f"--workdir={tmp_path / 'run'}", "--distributed.stall_timeout_s=1"]
    done = run_script("-c", STUCK_START, *arguments, timeout=60)
    assert done.returncode == 1
    assert "in read_a_dead_disk\n" in done.stderr


@pytest.mark.parametrize("different", [False, True])
def test_what_is_printed_of_many_threads_is_bounded(different):
    stop = threading.Event()

    def wait(depth: int) -> None:
        wait(depth - 1) if depth else stop.wait()

    depths = range(100) if different else [200] * 100
    threads = [threading.Thread(target=wait, args=(depth,), daemon=True) for depth in depths]
    for thread in threads:
        thread.start()
    said = describe_threads()
    stop.set()
    assert len(said.splitlines()) <= 120
    assert said.startswith("MainThread:\n") and "in test_what_is_printed_of_many_threads_is_bounded\n" in said
    assert " threads, such as Thread-" in said
