"""Inject faults into training for so many hours and print a table: python -m tests.faults --hours 2

Each trial is a run of its own of a tiny model on the CPU, in processes of its own; it is resumed after the fault, and
its metrics.jsonl and final weights are compared bitwise with those of a run without faults.
"""

import argparse
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

from gptjax import display

from .injections import INJECTIONS, TOTAL_STEPS, Trial, Wrong, can_mount, fill_disk
from .training import Training

WORDS = ("the", "king", "and", "queen", "of", "night", "do", "speak", "in", "thee", "my", "lord", "what", "love")


def main() -> int:
    """Return the exit code: 1 where a run has not survived."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults")
    parser.add_argument("--hours", type=float, default=2.0)
    parser.add_argument("--seed", type=int, default=0)
    wish = parser.parse_args()
    ends_at, chance = time.monotonic() + 3600 * wish.hours, random.Random(wish.seed)
    folder = Path(tempfile.mkdtemp(prefix="gptjax-faults-"))
    try:
        counts, problems = inject(folder, ends_at, chance)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    rows = [(name, *map(str, numbers)) for name, numbers in counts.items()]
    rows.append(("together", *(str(sum(numbers)) for numbers in zip(*counts.values(), strict=True))))
    print("\n".join(display.table(rows, ("fault", "trials", "ended or damaged the run", "survived, bitwise equal"))))
    print("\n".join(problems))
    return 1 if problems else 0


def inject(folder: Path, ends_at: float, chance: random.Random) -> tuple[dict[str, list[int]], list[str]]:
    """Return for each fault the numbers of trials, of those that hit, and of those survived; and the problems."""
    corpus = folder / "corpus.txt"
    corpus.write_text("\n".join(" ".join(chance.choices(WORDS, k=6)) for _ in range(1200)))
    more = (f"--train.total_steps={TOTAL_STEPS}",)
    whole = Training(folder / "whole", corpus, folder / "cache", *more)
    code, errors = whole.run()
    if code != 0:
        sys.exit(f"the run without faults ended with {code}: {errors}")
    wanted, whole_s = whole.outcome(), whole.running_s
    faults = {name: fault for name, fault in INJECTIONS.items() if fault is not fill_disk or can_mount()}
    counts, problems, number = {name: [0, 0, 0] for name in faults}, [], 0
    while time.monotonic() < ends_at:
        name, fault = list(faults.items())[number % len(faults)]
        number += 1
        training = Training(folder / f"run-{number}", corpus, folder / "cache", *more)
        counts[name][0] += 1
        try:
            counts[name][1] += fault(Trial(training, whole.workdir, wanted, whole_s, chance))
            counts[name][2] += 1
        except Wrong as problem:
            problems.append(f"{name} (trial {number}): {problem}")
        print(f"{number} trials, {len(problems)} problems, last: {name}", file=sys.stderr, flush=True)
        shutil.rmtree(training.workdir, ignore_errors=True)
    return counts, problems


if __name__ == "__main__":
    sys.exit(main())
