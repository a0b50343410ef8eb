"""Inject faults into training and print a table: python -m tests.faults

Each trial is a run of its own of a tiny model on the CPU, in processes of its own; it is resumed after the fault, and
its metrics.jsonl and final weights are compared bitwise with those of a run that nothing interrupts.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from gptjax.shell import display

from .disks import files_of_checkpoint
from .injections import FAULTS
from .trials import Ground, Wrong


@dataclass
class Row:
    """Of one kind of fault: how often it was injected, hit, and was survived; the most steps taken again."""

    injected: int = 0
    hit: int = 0
    survived: int = 0
    taken_again: int = 0

    def texts(self) -> tuple[str, ...]:
        return tuple(map(str, (self.injected, self.hit, self.survived, self.taken_again)))


HEADER = ("injected", "ended or damaged the run", "survived, bitwise equal", "most steps taken again")


def main() -> int:
    """Return the exit code: 1 where a run has not survived."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--hours", type=float, default=0.0, help="repeat all faults until so much time has passed")
    parser.add_argument("--only", nargs="+", choices=FAULTS, default=list(FAULTS), help="inject only these")
    parser.add_argument("--trials", type=int, help="of each fault, in place of the usual number")
    parser.add_argument("--seed", type=int, default=0)
    wish = parser.parse_args()
    ends_at = time.monotonic() + 3600 * wish.hours
    folder = Path(tempfile.mkdtemp(prefix="gptjax-faults-"))
    rows: dict[str, Row] = {}
    problems: list[str] = []
    try:
        ground = Ground(folder, wish.seed)
        while True:
            for name in wish.only:
                inject(ground, name, wish.trials, rows, problems)
            if time.monotonic() > ends_at:
                break
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    together = Row(*(sum(getattr(row, name) for row in rows.values()) for name in ("injected", "hit", "survived")))
    together.taken_again = max(row.taken_again for row in rows.values())
    lines = [(name, *row.texts()) for name, row in [*rows.items(), ("together", together)]]
    print("\n".join(display.table(lines, ("fault", *HEADER))))
    print("\n".join(problems))
    return 1 if problems else 0


def inject(ground: Ground, name: str, trials: int | None, rows: dict[str, Row], problems: list[str]) -> None:
    """Inject a fault so often, and note what came of it."""
    fault = FAULTS[name]
    trials = trials or fault.trials or len(files_of_checkpoint(ground.whole().training.workdir))
    for number in range(trials):
        ground.notes, ground.taken_again, survived = [], 0, True
        try:
            fault.inject(ground, number)
        except (Wrong, subprocess.TimeoutExpired) as problem:
            survived = False
            problems.append(f"{name} (trial {number}): {problem}")
        for row_name, hit in ground.notes or [(name, False)]:
            row = rows.setdefault(row_name, Row())
            row.injected, row.hit, row.survived = row.injected + 1, row.hit + hit, row.survived + survived
            row.taken_again = max(row.taken_again, ground.taken_again)
        ground.clear()
        print(
            f"{name} {number + 1}/{trials}: {'survived' if survived else problems[-1]}", file=sys.stderr, flush=True
        )


if __name__ == "__main__":
    sys.exit(main())
