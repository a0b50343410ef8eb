"""Train as train.py does, and kill this process in a phase: GPTJAX_KILL=PHASE:N:SECONDS sends SIGKILL so many seconds
after the N-th time that PHASE (a name of gptjax.goodput.NAMES) begins. A phase that ends earlier changes nothing.
"""

import os
import signal
import sys
import threading
import time

from gptjax import goodput
from gptjax.cli import train


def kill_soon(after_s: float) -> None:
    time.sleep(after_s)
    os.kill(os.getpid(), signal.SIGKILL)


def arrange(phase: str, number: int, after_s: float) -> None:
    """Start the timer when the phase begins for the `number`-th time."""
    begun, change = [], goodput.Clock._change

    def watched(clock: goodput.Clock, alter) -> None:
        before = clock.names[-1]
        change(clock, alter)
        if clock.names[-1] == phase and before != phase:
            begun.append(phase)
            if len(begun) == number:
                threading.Thread(target=kill_soon, args=(after_s,), daemon=True).start()

    if phase == "start":
        threading.Thread(target=kill_soon, args=(after_s,), daemon=True).start()
    goodput.Clock._change = watched


if __name__ == "__main__":
    if wish := os.environ.get("GPTJAX_KILL"):
        name, count, seconds = wish.split(":")
        arrange(name, int(count), float(seconds))
    sys.exit(train(sys.argv[1:]))
