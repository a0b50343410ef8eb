"""Turn documents into token ids, many at a time."""

from collections.abc import Iterable, Iterator
from itertools import chain
from typing import NamedTuple

import numpy as np

from gptjax.data.reading import Document
from gptjax.tokenizers import Tokenizer

BATCH_CHARS = 2**20  # of documents that are encoded together


class Encoded(NamedTuple):
    """Documents and their ids.

    Attributes:
        texts: of the documents that have one.
        ids: of all of them, with the end of each whole document, int32 [n].
        lengths: how many of the ids belong to each document, int64 [len(texts)].
        empty: number of documents without text.
    """

    texts: list[str]
    ids: np.ndarray
    lengths: np.ndarray
    empty: int


def encode_documents(documents: Iterable[Document], tokenizer: Tokenizer, end: np.ndarray) -> Iterator[Encoded]:
    """Yield documents with their ids, about BATCH_CHARS characters at a time.

    Args:
        end: the ids that follow a whole document, int32; empty where none do.
    """
    for batch in _batches(documents):
        kept = [document for document in batch if document.text]
        texts = [document.text for document in kept]
        found = tokenizer.encode_batch(texts)
        lengths = np.fromiter(map(len, found), np.int64, len(found))
        if len(end):
            tails = [end if document.whole else end[:0] for document in kept]
            lengths += np.fromiter(map(len, tails), np.int64, len(tails))
            found = list(chain.from_iterable(zip(found, tails, strict=True)))
        ids = np.concatenate([np.zeros(0, np.int32), *found], dtype=np.int32)
        yield Encoded(texts, ids, lengths, len(batch) - len(kept))


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    chars = 0
    for document in documents:
        batch.append(document)
        chars += len(document.text)
        if chars >= BATCH_CHARS:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch
