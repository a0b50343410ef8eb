"""Token arrays to batches (Grain). A batch is a function of (seed, step) alone, so a run can go on from any step
and on any number of hosts; which rows a host reads is decided last."""

from collections.abc import Iterator
from functools import lru_cache

import grain
import numpy as np

from gptjax.errors import UserError

FOREVER = 2**48  # steps; a length that Grain can slice and no run reaches


def window_examples(tokens: np.ndarray, context_length: int, seed: int) -> grain.MapDataset:
    """Windows of `context_length` + 1 tokens, without end; example n is a function of (seed, n).

    An epoch visits every window once, in an order of its own; the windows of an epoch lie side by side, and
    start at an offset of its own, so that no cut between windows stays where it is.

    Raises:
        UserError: fewer tokens than one window.
    """
    T = context_length
    if len(tokens) < T + 1:
        raise UserError(
            f"the corpus has {len(tokens)} training tokens, fewer than one window of {T + 1};"
            " give more text or a shorter context"
        )
    count = max(1, (len(tokens) - T) // T)
    slack = len(tokens) - 1 - count * T

    @lru_cache(maxsize=4)
    def offset(epoch: int) -> int:
        return int(np.random.default_rng([seed, epoch]).integers(0, min(T, slack + 1)))

    def cut(n: int, window: int) -> np.ndarray:
        start = int(window) * T + offset(n // count)
        return tokens[start : start + T + 1]

    return grain.MapDataset.range(count).shuffle(seed=seed % 2**32).repeat().map_with_index(cut)


def as_batch(windows: np.ndarray) -> dict[str, np.ndarray]:
    """[B, T + 1] windows -> tokens and targets [B, T] int32, weights [B, T] float32."""
    windows = windows.astype(np.int32)
    return {
        "tokens": windows[:, :-1],
        "targets": windows[:, 1:],
        "weights": np.ones(windows[:, 1:].shape, np.float32),
    }


class Batches:
    """The training batches of one host.

    Args:
        examples: a dataset without end.
        batch_sequences: rows of the global batch: step s has the examples s B ... (s + 1) B - 1.
        rows: those of them that this host reads.
    """

    def __init__(self, examples: grain.MapDataset, batch_sequences: int, rows: range):
        self.examples, self.batch_sequences, self.rows = examples, batch_sequences, rows

    def __len__(self) -> int:
        return FOREVER

    def __getitem__(self, step: int) -> dict[str, np.ndarray]:
        """This host's rows of the batch of a step."""
        first = step * self.batch_sequences
        return as_batch(np.stack([self.examples[first + row] for row in self.rows]))

    def iterate(self, start_step: int, prefetch: int) -> Iterator[dict[str, np.ndarray]]:
        """The batches from a step on, made ready by a thread."""
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=prefetch)
        return iter(grain.MapDataset.source(self)[start_step:].to_iter_dataset(options))


def validation_batches(
    tokens: np.ndarray, context_length: int, batch_sequences: int, limit: int | None, rows: range
) -> Iterator[dict[str, np.ndarray]]:
    """Windows side by side from the start of the validation tokens, the same at every evaluation.

    Args:
        batch_sequences: rows of a global batch; the last one is filled up with rows of weight 0.
        limit: how many windows, evenly spread; None for all.
        rows: those of a global batch that this host reads.

    Raises:
        UserError: fewer tokens than one window.
    """
    T = context_length
    count = (len(tokens) - 1) // T
    if count < 1:
        raise UserError(
            f"the corpus has {len(tokens)} validation tokens, fewer than one window of {T + 1}; raise data.val_frac, "
            "give more text or a shorter context"
        )
    chosen = np.arange(count) if limit is None or limit >= count else np.linspace(0, count - 1, limit).astype(int)

    def generate() -> Iterator[dict[str, np.ndarray]]:
        for first in range(0, len(chosen), batch_sequences):
            indices = [min(first + row, len(chosen) - 1) for row in rows]
            batch = as_batch(np.stack([tokens[chosen[i] * T : chosen[i] * T + T + 1] for i in indices]))
            batch["weights"] *= np.array([first + row < len(chosen) for row in rows], np.float32)[:, None]
            yield batch

    return generate()
