"""What every injection of a fault shares: runs to inject it into, runs without it, and what is noted of them."""

import random
import shutil
import time
from pathlib import Path
from typing import Any

from gptjax.lifecycle.goodput import FILE, read_attempts

from .training import Training

WORDS = ("the", "king", "and", "queen", "of", "night", "do", "speak", "in", "thee", "my", "lord", "what", "love")
TOTAL_STEPS = 60  # with a checkpoint every 5
SAVE_INTERVAL_STEPS = 5


class Wrong(Exception):
    """A run did not survive, or ended with other numbers."""


class Whole:
    """A run that nothing interrupts.

    Attributes:
        wanted: what it has left (`Training.outcome`).
        seconds: how long it took.
    """

    def __init__(self, training: Training):
        self.training = training
        code, errors = training.run()
        if code != 0:
            raise Wrong(f"the run that nothing interrupts ended with {code}: {errors.strip()[-300:]}")
        self.wanted, self.seconds = training.outcome(), training.running_s


class Ground:
    """Where faults are injected: a folder with a corpus, a token cache, and runs.

    Attributes:
        chance: decides all that is random.
        notes: of the current trial: for each fault that was injected its row in the table, and whether it hit.
        taken_again: of the current trial: the most steps that an attempt has taken again.
    """

    def __init__(self, folder: Path, seed: int = 0):
        self.folder, self.chance, self.number = folder, random.Random(seed), 0
        self.corpus, self.cache = folder / "corpus.txt", folder / "cache"
        words = random.Random(0)
        self.corpus.write_text("\n".join(" ".join(words.choices(WORDS, k=6)) for _ in range(1200)))
        self.wholes: dict[str, Whole] = {}
        self.notes: list[tuple[str, bool]] = []
        self.taken_again = 0

    def new(self, *more: str, cache: Path | None = None, **options: Any) -> Training:
        """Return a run that has not begun."""
        self.number += 1
        folder = self.folder / f"run-{self.number}"
        more = (f"--train.total_steps={TOTAL_STEPS}", *more)
        return Training(folder, self.corpus, cache or self.cache, *more, **options)

    def whole(self, *more: str, **options: Any) -> Whole:
        """Return the run with these arguments that nothing interrupts; it is made once."""
        key = repr((more, sorted(options.items())))
        if key not in self.wholes:
            self.wholes[key] = Whole(self.new(*more, **options))
        return self.wholes[key]

    def run(self, training: Training, *more: str, **options: Any) -> tuple[int, str]:
        """Run an attempt to its end, as `Training.run`, and note the steps that it takes again."""
        before = training.last_step()
        code, errors = training.run(*more, **options)
        self.note_resume(training, before)
        return code, errors

    def note_resume(self, training: Training, before: int) -> None:
        """Note how many steps the last attempt has taken again, where `before` is the last step before it."""
        attempts = read_attempts(training.workdir / FILE)
        if attempts and attempts[-1]["from_step"] is not None:
            self.taken_again = max(self.taken_again, before - attempts[-1]["from_step"])

    def finish(self, training: Training, wanted: tuple) -> None:
        """Run to the end and compare; raises Wrong."""
        code, errors = self.run(training)
        if code != 0:
            raise Wrong(f"the resume ended with {code}: {errors.strip()[-300:]}")
        if (found := training.outcome()) != wanted:
            raise Wrong(f"other numbers than without the fault: {difference(found, wanted)}")

    def clear(self) -> None:
        """Remove the runs of the last trial, but not those that nothing interrupts."""
        kept = {whole.training.workdir.name for whole in self.wholes.values()}
        for path in self.folder.glob("run-*"):
            if path.name not in kept and not path.is_symlink() and path.is_dir():
                shutil.rmtree(path, ignore_errors=True)


def difference(found: tuple, wanted: tuple) -> str:
    """Return where two outcomes differ first."""
    if len(found[0]) != len(wanted[0]):
        return f"{len(found[0])} rows and not {len(wanted[0])}"
    for mine, other in zip(found[0], wanted[0], strict=True):
        if mine != other:
            return f"{mine} and not {other}"
    return f"weights {found[1]} and not {wanted[1]}"


def timed_out(began: float, limit_s: float, what: str) -> None:
    """Raise Wrong where more than so many seconds have passed since a moment."""
    took_s = time.monotonic() - began
    if took_s > limit_s:
        raise Wrong(f"{what} took {took_s:.0f} s")
