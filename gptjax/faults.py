"""End a run early: a signal stops all processes after the same step; the watchdog ends a process that hangs, or that
has lost another, and prints its stacks.
"""

import faulthandler
import os
import signal
import time
import traceback

import jax
from jax.experimental import multihost_utils

from gptjax.errors import UserError

START_FACTOR = 6  # times the limit of a step, for the first one, which compiles


class StopSignal:
    """While active, SIGINT and SIGTERM request a stop after the current step; a second signal ends the process.

    Several processes stop after the same step, whichever received the signal: JAX's preemption service handles
    SIGTERM, and the processes agree on a step that none has begun, without a collective in every step.
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
        """Return whether to stop after this step; every process calls it once a step."""
        return multihost_utils.reached_preemption_sync_point(step) if self.several else self.requested

    def _note(self, number, frame) -> None:
        self.requested = True
        signal.signal(number, self.previous[number])
        if self.several:
            signal.raise_signal(signal.SIGTERM)


class Watchdog:
    """While active, a process that makes no progress ends with every thread's stack on stderr.

    That is: no step has ended for `timeout_s` (None: no limit). With several processes it also ends at any error but
    a UserError, since an orderly exit would wait for the others. The timer is faulthandler's, which runs even while
    Python's lock is held. It starts at the first `start_phase`: the time to tokenize a corpus has no bound.
    """

    def __init__(self, timeout_s: int | None):
        self.timeout_s, self.set_at = timeout_s, time.monotonic()

    def __enter__(self) -> "Watchdog":
        return self

    def start_phase(self) -> None:
        """Restart the timer with START_FACTOR times the limit: what follows restores, compiles or samples."""
        if self.timeout_s is not None:
            faulthandler.dump_traceback_later(START_FACTOR * self.timeout_s, exit=True)

    def step_done(self) -> None:
        """Restart the timer, at most once a second."""
        if self.timeout_s is not None and time.monotonic() > self.set_at + 1:
            self.set_at = time.monotonic()
            faulthandler.dump_traceback_later(self.timeout_s, exit=True)

    def __exit__(self, kind, error, trace) -> None:
        faulthandler.cancel_dump_traceback_later()
        if error is not None and not isinstance(error, UserError) and jax.process_count() > 1:
            traceback.print_exception(error)
            faulthandler.dump_traceback()
            os._exit(1)
