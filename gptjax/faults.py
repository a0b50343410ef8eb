"""How a run ends early: a signal stops all processes after one step; a stuck or bereaved one leaves its stacks."""

import faulthandler
import os
import signal
import time
import traceback

import jax
from jax.experimental import multihost_utils

from gptjax.errors import UserError

START_FACTOR = 6  # the first step has so many times as long as the others: it compiles


class StopSignal:
    """While entered, SIGINT and SIGTERM only ask the loop to stop after the step; a second one ends the process.

    Several processes stop after the same step, whichever was told: JAX's preemption service takes SIGTERM, and has
    them agree on a step that none has begun, without a collective in every step.
    """

    def __init__(self):
        self.requested, self.several = False, jax.process_count() > 1

    def __enter__(self) -> "StopSignal":
        numbers = (signal.SIGINT,) if self.several else (signal.SIGINT, signal.SIGTERM)
        self.previous = {s: signal.signal(s, self._note) for s in numbers}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def after(self, step: int) -> bool:
        """Whether to stop after this step; every process asks once a step."""
        return multihost_utils.reached_preemption_sync_point(step) if self.several else self.requested

    def _note(self, number, frame) -> None:
        self.requested = True
        signal.signal(number, self.previous[number])
        if self.several:
            signal.raise_signal(signal.SIGTERM)


class Watchdog:
    """While entered, a process that gets nowhere ends, with every thread's stack on stderr: where no step has ended
    for `timeout_s` (None: for ever), and, of several processes, at any error but the user's, since an orderly exit
    waits for the others. The timer is faulthandler's, which Python's lock cannot stop; it runs from the first
    `start_phase` on, since nobody knows how long a corpus takes to tokenize."""

    def __init__(self, timeout_s: int | None):
        self.timeout_s, self.set_at = timeout_s, time.monotonic()

    def __enter__(self) -> "Watchdog":
        return self

    def start_phase(self) -> None:
        """Begin to wait anew, START_FACTOR times as long: what follows restores, compiles or draws."""
        if self.timeout_s is not None:
            faulthandler.dump_traceback_later(START_FACTOR * self.timeout_s, exit=True)

    def step_done(self) -> None:
        """Begin to wait anew, at most once a second."""
        if self.timeout_s is not None and time.monotonic() > self.set_at + 1:
            self.set_at = time.monotonic()
            faulthandler.dump_traceback_later(self.timeout_s, exit=True)

    def __exit__(self, kind, error, trace) -> None:
        faulthandler.cancel_dump_traceback_later()
        if error is not None and not isinstance(error, UserError) and jax.process_count() > 1:
            traceback.print_exception(error)
            faulthandler.dump_traceback()
            os._exit(1)
