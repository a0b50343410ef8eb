"""Bad numbers: batches or gradients that are not finite, and spikes. They are part of the run; what interrupts it is
a kill, after which it must take the same decisions again.
"""

import signal
from collections.abc import Callable

from .trials import Ground, Wrong

FIRST = 131  # more than spikes.WINDOW_STEPS
STEPS = 190
MORE = (f"--train.total_steps={STEPS}", "--train.rollback_skips=10")


def disturb_batches(how: str, count: int) -> Callable[[Ground, int], None]:
    """Return an injection that disturbs so many steps in a row, and kills the run soon after."""
    last = FIRST + count - 1
    fault = {"disturb": [how, FIRST, last]}

    def inject(ground: Ground, _: int) -> None:
        whole, calm = ground.whole(*MORE, fault=fault), ground.whole(*MORE)
        check(whole.wanted[0], calm.wanted[0], count)
        training = ground.new(*MORE, fault=fault)
        kill = ["steps", FIRST + ground.chance.randint(-3, count + 8), ground.chance.uniform(0, 0.02)]
        code, errors = ground.run(training, fault={"kill": kill})
        row = f"{count} batches in a row: {how}" if count > 1 else how
        ground.notes.append((row, code != 0))
        if code not in (0, -signal.SIGKILL):
            raise Wrong(f"{row}: ended with {code}: {errors.strip()[-300:]}")
        ground.finish(training, whole.wanted)

    return inject


def check(rows: list[dict], calm: list[dict], count: int) -> None:
    """Raise Wrong unless the disturbed steps were skipped or passed, and the loss is as without them."""
    skipped = sum(row.get("skipped", 0) for row in rows)
    back = [row["step"] for row in rows if "rolled_back_to" in row]
    if skipped != count or len(back) != count // 10:
        raise Wrong(f"{skipped:.0f} steps were skipped and not {count}; rollbacks: {back}")
    found, wanted = rows[-1]["val/loss"], calm[-1]["val/loss"]
    if not abs(found / wanted - 1) < 0.05:
        raise Wrong(f"val/loss {found:.4f} and not {wanted:.4f}")
