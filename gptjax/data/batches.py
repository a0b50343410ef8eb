"""Turn corpora into batches, by Grain. A batch is a function of (seed, step) alone, so a run can resume at any step
and on any number of hosts and workers; which rows a host reads is decided last.

An example is a dictionary of one row: tokens and targets [T] int32, weights [T] float32 (0 where nothing is to be
learnt), and of packed documents also positions and segments [T] int32.
"""

from collections.abc import Iterator, Sequence
from typing import Protocol

import grain
import numpy as np
from absl import flags

from gptjax.config import DataConfig
from gptjax.data.corpus import Corpus
from gptjax.data.mixture import Assignment
from gptjax.data.shards import Split
from gptjax.data.source import Half
from gptjax.errors import MachineError, UserError

ENDLESS_STEPS = 2**48  # a length that Grain can slice and no run reaches

Example = dict[str, np.ndarray]


class Examples(Protocol):
    """One half of a corpus, cut to the model's context."""

    def __len__(self) -> int: ...

    def example(self, index: int, epoch: int) -> Example: ...


class Windows:
    """Adjacent windows of T + 1 tokens of the concatenated documents, cut without regard to documents.

    Args:
        tokens: a sequence of ids that can be sliced.
        moving_seed: seed of the offset at which the windows of each epoch start, so that the cuts between them move;
            None: all epochs start at the first token.

    Raises:
        UserError: fewer tokens than one window.
    """

    def __init__(self, tokens: np.ndarray, context_length: int, what: str, moving_seed: int | None = None):
        T = self.context_length = context_length
        if len(tokens) < T + 1:
            raise UserError(
                f"the corpus has {len(tokens)} {what} tokens, fewer than one window of {T + 1}; give more text, a "
                f"shorter context{', or a larger val_frac' if what == 'validation' else ''}"
            )
        self.tokens, self.seed = tokens, moving_seed
        self.count = (len(tokens) - 1) // T
        if moving_seed is not None:
            self.count = max(1, (len(tokens) - T) // T)  # room to move
        self.slack = len(tokens) - 1 - self.count * T

    def __len__(self) -> int:
        return self.count

    def example(self, index: int, epoch: int) -> Example:
        T, offset = self.context_length, 0
        if self.seed is not None:
            offset = int(np.random.default_rng([self.seed, epoch]).integers(0, min(T, self.slack + 1)))
        start = index * T + offset
        window = self.tokens[start : start + T + 1].astype(np.int32)
        return {"tokens": window[:-1], "targets": window[1:], "weights": np.ones(T, np.float32)}


class PackedRows:
    """Rows of whole documents, as `gptjax data prepare --pack_length` packs them.

    Positions restart at each document, segments number the documents from 0, and attention stays inside a segment.
    The unused rest of a row has weight 0 and the last segment, its own.

    Raises:
        UserError: the rows have another length than the context.
    """

    def __init__(self, split: Split, context_length: int, packed_length: int):
        if packed_length != context_length:
            raise UserError(
                f"{split.paths[0]} is packed into rows of {packed_length}, not model.context_length "
                f"{context_length}; prepare it again with --pack_length {context_length}"
            )
        self.split, self.context_length = split, context_length

    def __len__(self) -> int:
        return self.split.rows

    def example(self, index: int, epoch: int) -> Example:
        ids, lengths = self.split.row(index)
        return packed_example(ids, lengths, self.context_length)


def packed_example(ids: np.ndarray, lengths: np.ndarray, context_length: int) -> Example:
    """Return documents as one row. The last token of each document is only a target."""
    ends = np.cumsum(lengths)
    used = len(ids) - len(lengths)
    predicts = np.ones(len(ids), bool)
    predicts[ends - 1] = False
    is_target = np.ones(len(ids), bool)
    is_target[ends - lengths] = False
    spare = context_length - used
    positions = [np.arange(length - 1, dtype=np.int32) for length in lengths]
    segments = np.repeat(np.arange(len(lengths) + 1, dtype=np.int32), [*(lengths - 1), spare])
    return {
        "tokens": np.pad(ids[predicts].astype(np.int32), (0, spare)),
        "targets": np.pad(ids[is_target].astype(np.int32), (0, spare)),
        "weights": (np.arange(context_length) < used).astype(np.float32),
        "positions": np.concatenate([*positions, np.arange(spare, dtype=np.int32)]),
        "segments": segments,
    }


class Endless:
    """Examples without end: example n is a function of (seed, n). Each epoch visits all of them, in an order of its
    own; those of one group, such as a pair, stay side by side.
    """

    def __init__(self, examples: Examples, seed: int):
        self.examples, self.group_rows = examples, group_rows(examples)
        groups = len(examples) // self.group_rows
        self.order = grain.MapDataset.range(groups).shuffle(seed=seed % 2**32).repeat()

    def __getitem__(self, n: int) -> Example:
        group, row = divmod(n, self.group_rows)
        return self.examples.example(int(self.order[group]) * self.group_rows + row, n // len(self.examples))


def group_rows(examples: Examples) -> int:
    """Return how many examples, one after the other, belong together: 2 for pairs, else 1."""
    return getattr(examples, "group_rows", 1)


class Mixed:
    """Examples of several sources: example n is a function of (seed, n)."""

    def __init__(self, sources: list[Endless], assignment: Assignment):
        self.sources, self.assignment = sources, assignment

    def __getitem__(self, n: int) -> Example:
        size = self.sources[0].group_rows
        group, row = divmod(n, size)
        source, index = self.assignment[group]
        return self.sources[source][index * size + row]


def training_examples(
    corpus: Corpus, cfg: DataConfig, context_length: int, batch_sequences: int, seed: int
) -> Endless | Mixed:
    """Return the endless training examples of a run; raise UserError for a source that is too short or packed
    differently.
    """
    endless = []
    for number, source in enumerate(corpus.sources):
        source_seed = seed if number == 0 else int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
        examples = examples_of(source.train, context_length, "training", source.pack_length, source_seed)
        endless.append(Endless(examples, source_seed))
    if not cfg.mixture:
        return endless[0]
    return Mixed(endless, Assignment(cfg.mixture_schedule, batch_sequences // endless[0].group_rows, seed))


def examples_of(
    half: Half, context_length: int, what: str, pack_length: int | None = None, moving_seed: int | None = None
) -> Examples:
    """Return the examples of one half of a source: its own, packed rows, or windows.

    Args:
        what: "training" or "validation", for messages.
        moving_seed: as in `Windows`.

    Raises:
        UserError: it is too short, or packed differently.
    """
    if isinstance(half, Split):
        return PackedRows(half, context_length, pack_length or 0)
    if hasattr(half, "examples"):
        return half.examples(context_length)
    return Windows(half, context_length, what, moving_seed)


def as_batch(examples: list[Example]) -> dict[str, np.ndarray]:
    """Return rows stacked into arrays [B, T]."""
    return {key: np.stack([example[key] for example in examples]) for key in examples[0]}


class Batches:
    """The training batches of one host.

    Args:
        examples: endless.
        batch_sequences: rows of the global batch: step s has the examples s B ... (s + 1) B - 1.
        rows: indices in the global batch of the rows that this host reads, in the order of its batch.
    """

    def __init__(self, examples: Endless | Mixed, batch_sequences: int, rows: Sequence[int] | np.ndarray):
        self.examples, self.batch_sequences, self.rows = examples, batch_sequences, [int(row) for row in rows]

    def __len__(self) -> int:
        return ENDLESS_STEPS

    def __getitem__(self, step: int) -> dict[str, np.ndarray]:
        """Return this host's rows of the batch of a step."""
        first = step * self.batch_sequences
        return as_batch([self.examples[first + row] for row in self.rows])

    def iterate(self, start_step: int, prefetch: int, workers: int = 0) -> "grain.DatasetIterator | WatchedWorkers":
        """Return an iterator over the batches from a step on; the caller closes it.

        Args:
            prefetch: number of batches prepared ahead.
            workers: processes that prepare them, each for its own steps; 0 for one thread.
        """
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=prefetch)
        batches = grain.MapDataset.source(self)[start_step:].to_iter_dataset(options)
        if workers:
            if not flags.FLAGS.is_parsed():
                # Grain passes its own flags to the processes, and absl requires parsed flags.
                flags.FLAGS.mark_as_parsed()
            per_worker = -(-prefetch // workers)  # rounded up
            processes = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=per_worker)
            batches = batches.mp_prefetch(processes)
            return WatchedWorkers(iter(batches))
        return iter(batches)


class WatchedWorkers:
    """An iterator over the batches of worker processes that says in its own words when one of them is gone.

    Raises:
        MachineError: a worker ended, as where the system kills it for lack of memory.
    """

    def __init__(self, batches: grain.DatasetIterator):
        self._batches = batches

    def __iter__(self) -> "WatchedWorkers":
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        try:
            return next(self._batches)
        except RuntimeError as error:
            if "Worker process was terminated" not in str(error):
                raise
            code = str(error).partition("exit code ")[2].split(".")[0]
            raise MachineError(
                f"a process that loads data ended (exit code {code or 'unknown'}, which is -9 where memory ran out); "
                "run the same command again to resume, with fewer data.workers or data.prefetch_batches if it recurs"
            ) from error

    def close(self) -> None:
        """End the workers."""
        self._batches.close()


def validation_batches(
    half: Half,
    context_length: int,
    batch_sequences: int,
    limit: int | None,
    rows: Sequence[int] | np.ndarray,
    pack_length: int | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """Yield adjacent windows from the start of the validation tokens, or packed rows; the same at every evaluation.

    Args:
        batch_sequences: rows of a global batch; the last one is padded with rows of weight 0.
        limit: number of windows, evenly spread; None for all.
        rows: indices in a global batch of the rows that this host reads, in the order of its batch.

    Raises:
        UserError: fewer tokens than one window.
    """
    examples = examples_of(half, context_length, "validation", pack_length)
    size = group_rows(examples)
    count, limit = len(examples) // size, None if limit is None else max(1, limit // size)
    groups = np.arange(count) if limit is None or limit >= count else np.linspace(0, count - 1, limit).astype(int)
    chosen = (groups[:, None] * size + np.arange(size)).ravel()

    def generate() -> Iterator[dict[str, np.ndarray]]:
        for first in range(0, len(chosen), batch_sequences):
            indices = [min(first + int(row), len(chosen) - 1) for row in rows]
            batch = as_batch([examples.example(int(chosen[i]), 0) for i in indices])
            batch["weights"] *= np.array([first + row < len(chosen) for row in rows], np.float32)[:, None]
            yield batch

    return generate()
