"""Pack documents into rows of a fixed length, so that few positions stay empty and few documents are cut."""

from collections.abc import Iterator, Sequence

import numpy as np


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Return a best-fit decreasing bin packing (Ding et al. 2024, arXiv 2404.10830, section 3).

    Each item, the longest first, goes where it leaves the least room; a new bin is opened only where none has room.

    Args:
        lengths: of the items, each in [1, capacity].

    Returns:
        for every bin the indices of its items.
    """
    bins: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    rooms = 0  # bit r: a bin has room r. The lowest bit from an item's length on is the best fit.
    for item in np.argsort(-np.asarray(lengths), kind="stable").tolist():
        length = int(lengths[item])
        fits = rooms >> length
        if fits:
            room = length + (fits & -fits).bit_length() - 1
            chosen = with_room[room].pop()
            if not with_room[room]:
                rooms ^= 1 << room
        else:
            room, chosen = capacity, len(bins)
            bins.append([])
        bins[chosen].append(item)
        if left := room - length:
            with_room[left].append(chosen)
            rooms |= 1 << left
    return bins


def pack(
    documents: Iterator[tuple[np.ndarray, np.ndarray]], capacity: int, pool_tokens: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yield rows of documents; a document of n tokens takes n - 1 positions, since its last token is only a target.

    A document that is longer than a row is cut, each part beginning with the token that the one before ended with,
    so that every token but the first is predicted once. Documents of a single token are left out.

    Args:
        documents: token ids, side by side, and the number of tokens of each document.
        capacity: positions of a row.
        pool_tokens: how many tokens are packed together.

    Yields:
        token ids in the rows' order, lengths of the parts in tokens, and how many parts each row has.
    """
    parts: list[np.ndarray] = []
    pooled = 0
    for tokens, lengths in documents:
        start = 0
        for length in lengths.tolist():
            document = tokens[start : start + length]
            start += length
            cuts = range(0, length - 1, capacity)
            parts += [document[cut : cut + capacity + 1] for cut in cuts]
            pooled += length + len(cuts)
        if pooled >= pool_tokens:
            yield _packed(parts, capacity)
            parts, pooled = [], 0
    if parts:
        yield _packed(parts, capacity)


def _packed(parts: list[np.ndarray], capacity: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rows = best_fit([len(part) - 1 for part in parts], capacity)
    order = [part for row in rows for part in row]
    lengths = np.array([len(parts[part]) for part in order], np.int64)
    return np.concatenate([parts[part] for part in order]), lengths, np.array([len(row) for row in rows], np.int64)
