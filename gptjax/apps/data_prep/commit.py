"""Turn tokenized units into shards: duplicates are found in bounded memory, and documents are copied in order."""

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from gptjax.data.packing import pack

SHARD_TOKENS = 2**28  # a shard is closed at this size
CHUNK_TOKENS = 2**22  # copied at a time
POOL_TOKENS = 2**25  # packed together
BUCKET_DOCUMENTS = 2**21  # whose hashes are sorted at a time

# Facts recorded of each document when its unit is tokenized: 128 bits of its text's BLAKE2b, lengths, and its split.
DOCUMENT = np.dtype([("hash", "<u8", 2), ("tokens", "<i8"), ("text_bytes", "<i8"), ("validation", "?")])


class UnitFiles:
    """The files of a tokenized unit: ids, one DOCUMENT for each document, and a marker, written last."""

    def __init__(self, work: Path, number: int):
        self.tokens, self.documents, self.marker = (
            work / f"unit-{number:07d}.{kind}" for kind in ("tokens", "documents", "json")
        )

    def whole(self) -> bool:
        """Return whether the unit is finished."""
        return self.marker.exists()

    def facts(self) -> Iterator[np.ndarray]:
        """Yield the documents' facts, some thousands at a time."""
        with self.documents.open("rb") as stream:
            while len(some := np.fromfile(stream, DOCUMENT, count=2**16)):
                yield some

    @staticmethod
    def dtype(vocab_size: int) -> np.dtype:
        """Return the dtype of token ids on disk."""
        return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")

    @contextmanager
    def writing(self, vocab_size: int) -> Iterator[Callable[[np.ndarray, np.ndarray], None]]:
        """Yield a function that appends documents: their ids, and their facts. The files are renamed into place on
        success.
        """
        temporary = [path.with_name(f"{path.name}.{os.getpid()}") for path in (self.tokens, self.documents)]
        try:
            with temporary[0].open("wb") as tokens, temporary[1].open("wb") as documents:

                def write(ids: np.ndarray, facts: np.ndarray) -> None:
                    assert not len(ids) or 0 <= ids.min() <= ids.max() < vocab_size
                    tokens.write(ids.astype(self.dtype(vocab_size)).data)
                    documents.write(facts.tobytes())

                yield write
            for path, final in zip(temporary, (self.tokens, self.documents), strict=True):
                os.replace(path, final)
        finally:
            for path in temporary:
                path.unlink(missing_ok=True)


def find_duplicates(work: Path, units: Sequence[UnitFiles], counts: Sequence[int]) -> tuple[np.ndarray, int]:
    """Mark every document whose text occurred earlier.

    Hashes are distributed over files by value: equal ones share a file, and each file is sorted separately. Memory is
    bounded by BUCKET_DOCUMENTS (up to 256 times as many documents), and the marks are a memory-mapped file.

    Args:
        counts: number of documents of each unit.

    Returns:
        one bool for each document, in order; and how many are marked.
    """
    total = sum(counts)
    if not total:
        return np.zeros(0, bool), 0
    buckets = min(256, -(-total // BUCKET_DOCUMENTS))
    record = np.dtype([("hash", "<u8", 2), ("place", "<i8")])
    paths = [work / f"hashes-{bucket:03d}" for bucket in range(buckets)]
    streams = [path.open("wb") for path in paths]
    place = 0
    for facts in chain.from_iterable(unit.facts() for unit in units):
        hashes = np.zeros(len(facts), record)
        hashes["hash"], hashes["place"] = facts["hash"], np.arange(place, place + len(facts))
        place += len(facts)
        bucket = hashes["hash"][:, 1] % np.uint64(buckets)
        for number, stream in enumerate(streams):
            stream.write(hashes[bucket == number].tobytes())
    for stream in streams:
        stream.close()

    marks = np.memmap(work / "duplicates", dtype=bool, mode="w+", shape=(total,))
    duplicates = 0
    for path in paths:
        found = np.fromfile(path, record)
        order = np.lexsort((found["place"], found["hash"][:, 1], found["hash"][:, 0]))
        found = found[order]
        again = np.zeros(len(found), bool)
        again[1:] = (found["hash"][1:] == found["hash"][:-1]).all(axis=1)
        marks[found["place"][again]] = True
        duplicates += int(again.sum())
        path.unlink()
    return marks, duplicates


def write_shards(
    folder: Path,
    split: str,
    units: Sequence[UnitFiles],
    dropped: np.ndarray,
    vocab_size: int,
    pack_length: int | None,
) -> dict[str, Any]:
    """Write the documents of a split as shards, over those of an earlier attempt.

    Returns:
        the manifest's entry: counts, and each shard's files with size and SHA-256.
    """
    totals = {"documents": 0, "text_bytes": 0}

    def kept() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        place = 0
        for unit in units:
            offset = 0
            for facts in unit.facts():
                keep = ~dropped[place : place + len(facts)] & (facts["validation"] == (split == "val"))
                totals["documents"] += int(keep.sum())
                totals["text_bytes"] += int(facts["text_bytes"][keep].sum())
                yield from _chunks(unit, offset, facts["tokens"], keep, UnitFiles.dtype(vocab_size))
                place, offset = place + len(facts), offset + int(facts["tokens"].sum())

    shards: list[dict[str, Any]] = []
    used = 0
    if pack_length is None:
        parts = ((tokens, lengths, None) for tokens, lengths in kept())
    else:
        parts = pack(kept(), pack_length, POOL_TOKENS)
    writer: Shard | None = None
    for tokens, lengths, rows in parts:
        if writer is None:
            writer = Shard(folder, f"{split}-{len(shards):05d}", packed=rows is not None)
        writer.append(tokens, lengths, rows)
        used += int((lengths - 1).sum())
        if writer.tokens >= SHARD_TOKENS:
            shards.append(writer.close())
            writer = None
    if writer is not None:
        shards.append(writer.close())
    rows_total = sum(shard["rows"] for shard in shards)
    facts = {**totals, "tokens": sum(shard["tokens"] for shard in shards), "rows": rows_total}
    if pack_length is not None:
        facts["used_frac"] = used / max(1, rows_total * pack_length)
    return {**facts, "shards": shards}


def _chunks(
    unit: UnitFiles, offset: int, lengths: np.ndarray, keep: np.ndarray, dtype: np.dtype
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the tokens of the kept documents, about CHUNK_TOKENS at a time, and each document's number of tokens.

    Args:
        offset: position of the first of these documents in the unit's tokens.
    """
    ends = np.cumsum(lengths)
    if not keep.any() or not ends[-1]:
        return
    tokens = np.memmap(unit.tokens, dtype=dtype, mode="r", offset=offset * dtype.itemsize, shape=(int(ends[-1]),))
    cuts = np.unique([0, *np.searchsorted(ends, np.arange(CHUNK_TOKENS, ends[-1], CHUNK_TOKENS)), len(lengths)])
    for first, last in pairwise(cuts.tolist()):
        if (chosen := keep[first:last]).any():
            part = tokens[int(ends[first] - lengths[first]) : int(ends[last - 1])]
            yield part[np.repeat(chosen, lengths[first:last])], lengths[first:last][chosen]


class Shard:
    """The files of a shard during writing; they are renamed into place when they are complete and on disk."""

    def __init__(self, folder: Path, name: str, packed: bool):
        self.folder, self.name = folder, name
        self.tokens = self.documents = self.rows = 0
        kinds = ("tokens", "documents", "rows") if packed else ("tokens", "documents")
        self.streams: dict[str, BinaryIO] = {
            kind: Path(f"{self._path(kind)}.new").open("wb")  # noqa: SIM115
            for kind in kinds
        }
        self.digests = {kind: hashlib.sha256() for kind in kinds}

    def _path(self, kind: str) -> str:
        return str(self.folder / f"{self.name}.{kind}")

    def append(self, tokens: np.ndarray, lengths: np.ndarray, rows: np.ndarray | None) -> None:
        """Append documents: ids, lengths in tokens, and for packed ones the number of documents in each row."""
        self._write("tokens", tokens)
        self._write("documents", self.tokens + np.cumsum(lengths, dtype="<i8"))
        if rows is not None:
            self._write("rows", self.documents + np.cumsum(rows, dtype="<i8"))
            self.rows += len(rows)
        self.tokens += len(tokens)
        self.documents += len(lengths)

    def _write(self, kind: str, values: np.ndarray) -> None:
        data = values.tobytes()
        self.streams[kind].write(data)
        self.digests[kind].update(data)

    def close(self) -> dict[str, Any]:
        """Rename the files into place, and return the manifest's entry."""
        files = {}
        for kind, stream in self.streams.items():
            stream.flush()
            os.fsync(stream.fileno())
            files[kind] = {"bytes": stream.tell(), "sha256": self.digests[kind].hexdigest()}
            stream.close()
            os.replace(self._path(kind) + ".new", self._path(kind))
        counts = {"tokens": self.tokens, "documents": self.documents, "rows": self.rows}
        return {"name": self.name, **counts, "files": files}
