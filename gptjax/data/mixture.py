"""Which source the n-th example of a mixture comes from, in a closed form: no history is replayed to find it."""

from collections.abc import Sequence
from itertools import accumulate

import numpy as np

RANGE = 2**32
# The odd number nearest to RANGE times the golden ratio's fraction: multiples of it fill RANGE more evenly than those
# of any other number (Knuth, The Art of Computer Programming 3, section 6.4, theorem S), so that any run of examples
# has close to its share of each source.
STRIDE = 2654435769


class Assignment:
    """`assignment[n]` is the source of example n, and how many examples of that source came before.

    Example n has the place (STRIDE n + phase) mod RANGE; each source owns an interval of them, as long as
    its weight.

    Args:
        schedule: pairs of a step and the weights from it on, one for each source; the first step is 0. Weights are
            divided by their sum.
        batch_sequences: examples a step.
    """

    def __init__(self, schedule: Sequence[tuple[int, Sequence[float]]], batch_sequences: int, seed: int):
        self.phase = int(np.random.SeedSequence([seed, 2]).generate_state(1)[0])
        self.starts = [step * batch_sequences for step, _ in schedule]
        self.bounds = []
        for _, weights in schedule:
            shares = accumulate(weights)
            self.bounds.append([0, *(round(RANGE * share / sum(weights)) for share in shares)])
        # For each period: how many places below each bound came before it, and how many examples of each source.
        self.passed = [
            [self._below(bound, start) for bound in bounds]
            for bounds, start in zip(self.bounds, self.starts, strict=True)
        ]
        sources = range(len(self.bounds[0]) - 1)
        self.before = [[0 for _ in sources]]
        for period, end in enumerate(self.starts[1:]):
            self.before.append([self._count(period, source, end) for source in sources])

    def __getitem__(self, n: int) -> tuple[int, int]:
        period = int(np.searchsorted(self.starts, n, side="right")) - 1
        place = (STRIDE * n + self.phase) % RANGE
        source = int(np.searchsorted(self.bounds[period], place, side="right")) - 1
        return source, self._count(period, source, n)

    def _count(self, period: int, source: int, n: int) -> int:
        """Return how many of the examples before n are of a source, for an n in or right after a period."""
        low, high = (self._below(self.bounds[period][i], n) - self.passed[period][i] for i in (source, source + 1))
        return self.before[period][source] + high - low

    def _below(self, bound: int, n: int) -> int:
        """Return how many of the examples before n have a place below a bound."""
        return n + floor_sum(n, RANGE, STRIDE, self.phase) - floor_sum(n, RANGE, STRIDE, self.phase - bound + RANGE)


def floor_sum(n: int, m: int, a: int, b: int) -> int:
    """Return the sum of floor((a i + b) / m) over i = 0 ... n - 1, for a, b >= 0, in O(log m) steps.

    Graham, Knuth, Patashnik, Concrete Mathematics, section 3.5: what reaches m is taken out of a and b, and then the
    points under the line are counted along the other axis.
    """
    total = 0
    while n > 0:
        total += n * (n - 1) // 2 * (a // m) + n * (b // m)
        a, b = a % m, b % m
        top = a * n + b
        if top < m:
            break
        n, b, m, a = top // m, top % m, a, m
    return total
