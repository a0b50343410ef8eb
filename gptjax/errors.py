"""Errors of the user's input, each one line, and the exit codes of every command."""

import difflib
from collections.abc import Iterable, Mapping
from typing import TypeVar

T = TypeVar("T")

DONE = 0
USER_ERROR = 2  # the input is at fault; one line on stderr says what to change
DOES_NOT_FIT = 3  # `gptjax plan`: the run does not fit the chips
STOPPED = 75  # a signal ended the run with everything saved; run again to resume (EX_TEMPFAIL of sysexits.h)


class UserError(Exception):
    """The user's input is at fault. The message names the value, the rule and the remedy; the exit code is 2."""


class Diverged(UserError):
    """A run gave up: it skipped its last steps, and rolling back did not help."""

    def __init__(self, step: int, rollbacks: int):
        self.step, self.rollbacks = step, rollbacks
        tried = f", and {rollbacks} rollbacks did not help" if rollbacks else ""
        super().__init__(
            f"the run gave up after step {step}: loss, gradient or update were not finite or spiked, step after step"
            f"{tried}; lower optim.peak_lr in another --workdir"
        )


class MachineError(Exception):
    """The machine failed under a run. The message is one line that says how to resume; the exit code is 1."""


class CorruptDevice(MachineError):
    """Devices have computed or stored wrong values without reporting an error."""

    def __init__(self, devices: Iterable[object], what: str):
        self.devices = list(devices)
        names = ", ".join(map(str, self.devices))
        super().__init__(
            f"silent corruption: {names} {what}; take them out of service, delete the checkpoints of the last "
            "run.verify_interval_steps steps, and run again to resume"
        )


def nearest(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the known word that is most alike, or an empty string."""
    matches = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {matches[0]!r}?" if matches else ""


def choose(table: Mapping[str, T], name: str, key: str) -> T:
    """Return the entry of a table that the config key `key` names.

    Raises:
        UserError: it has no such entry; the message names the nearest.
    """
    if name not in table:
        raise UserError(f"{key} {name!r} is not one of {', '.join(table)}{nearest(name, table)}")
    return table[name]
