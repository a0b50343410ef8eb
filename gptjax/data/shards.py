"""The files that `gptjax data prepare` writes and a run reads: token ids without separators.

A prepared folder has `manifest.json`, written last; `tokenizer.spec.json`, which is the tokenizer as plain data; and
for each shard of a split three files of little-endian integers without header:

    train-00000.tokens      ids, uint16 or uint32
    train-00000.documents   where each document ends, in tokens, int64
    train-00000.rows        only in packed data: where each row ends, in documents, int64
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from gptjax.data.filearray import FileArray
from gptjax.errors import UserError
from gptjax.shell.paths import user_path
from gptjax.tokenizers import Tokenizer, tokenizer_from_dict

MANIFEST_FORMAT = 1  # increase it when older data would be read wrongly
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.spec.json"
WORK = "work"  # subfolder during preparation: the plan, and the results of the units of work
CHECKED_BYTES = 2**30  # data of at most this size is hashed before use; of larger data only sizes are compared


class Tokens:
    """Token ids of several files, as one sequence.

    Args:
        files: pairs of a path and its number of tokens.
        vocab_size: ids are checked to lie below it when they are read.
    """

    def __init__(self, files: list[tuple[str, int]], dtype: str, vocab_size: int):
        self.files, self.dtype, self.vocab_size = files, np.dtype(dtype), vocab_size
        self.ends = np.cumsum([count for _, count in files], dtype=np.int64)
        stored = self.dtype.newbyteorder("<")
        self.parts = [FileArray(path, stored, length=count) for path, count in files]

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def __getitem__(self, part: slice) -> np.ndarray:
        """Return the ids of a slice, [n]; raise UserError where one is beyond the vocabulary."""
        start, stop, _ = part.indices(len(self))
        pieces = []
        at = start
        while at < stop:
            number = int(np.searchsorted(self.ends, at, side="right"))
            first = int(self.ends[number]) - self.files[number][1]
            piece = self.parts[number][at - first : stop - first]
            if piece.max() >= self.vocab_size:
                raise UserError(
                    f"{self.files[number][0]} has id {piece.max()} between tokens {at - first} and "
                    f"{at - first + len(piece)}, beyond the vocabulary of {self.vocab_size}; prepare the data again"
                )
            pieces.append(piece)
            at += len(piece)
        return pieces[0] if len(pieces) == 1 else np.concatenate([np.zeros(0, self.dtype), *pieces])


class Split:
    """The training or the validation half of a prepared folder.

    Attributes:
        tokens: all its ids, documents concatenated.
        documents, rows: their number; rows is 0 where the data is not packed.
        text_bytes: length of its documents in UTF-8.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any], name: str):
        facts = manifest["splits"][name]
        self.shards = facts["shards"]
        self.paths = [str(folder / shard["name"]) for shard in self.shards]
        files = [(f"{path}.tokens", shard["tokens"]) for path, shard in zip(self.paths, self.shards, strict=True)]
        self.tokens = Tokens(files, manifest["dtype"], manifest["tokenizer"]["vocab_size"])
        self.documents, self.rows = facts["documents"], facts["rows"]
        self.text_bytes = facts["text_bytes"]
        self._row_ends = np.cumsum([shard["rows"] for shard in self.shards], dtype=np.int64)
        self._ends: dict[str, FileArray] = {}

    def row(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the ids of a packed row, and the number of ids of each of its documents."""
        number = int(np.searchsorted(self._row_ends, index, side="right"))
        local = index - int(self._row_ends[number]) + self.shards[number]["rows"]
        documents = self.document_ends(number)
        first, last = _between(self._ends_of(number, "rows"), local)
        ends = documents[first:last]
        begin = 0 if first == 0 else int(documents[first - 1])
        base = int(self.tokens.ends[number]) - self.shards[number]["tokens"]
        return self.tokens[base + begin : base + int(ends[-1])], np.diff(ends, prepend=begin)

    def document_ends(self, number: int) -> FileArray:
        """Return where the documents of a shard end, in tokens of that shard."""
        return self._ends_of(number, "documents")

    def _ends_of(self, number: int, kind: str) -> FileArray:
        path = f"{self.paths[number]}.{kind}"
        if path not in self._ends:
            self._ends[path] = FileArray(path, "<i8")
        return self._ends[path]


def _between(ends: FileArray, index: int) -> tuple[int, int]:
    return (0 if index == 0 else int(ends[index - 1])), int(ends[index])


def is_prepared(path: str | Path) -> bool:
    """Return whether a path is a folder that `gptjax data prepare` finished; raise UserError if unfinished."""
    folder = Path(user_path(path))
    if (folder / MANIFEST).is_file():
        return True
    if (folder / WORK / "plan.json").exists():
        raise UserError(f"{folder} is not completely prepared; run the same gptjax data prepare again")
    return False


def load_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of a prepared folder; raise UserError where it is damaged or of another version."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        found = manifest["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / MANIFEST} is damaged ({error}); prepare the data again") from None
    if found != MANIFEST_FORMAT:
        raise UserError(
            f"{folder} has format {found} and this version reads {MANIFEST_FORMAT}; prepare the data again"
        )
    return manifest


def load_tokenizer(folder: Path, manifest: dict[str, Any]) -> Tokenizer:
    """Return the tokenizer of a prepared folder; raise UserError where it is not the one that the manifest names."""
    path = folder / TOKENIZER
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; prepare the data again") from None
    if hashlib.sha256(data).hexdigest() != manifest["tokenizer"]["sha256"]:
        raise UserError(f"{path} is not the tokenizer that made these shards; prepare the data again")
    return tokenizer_from_dict(json.loads(data))


def check_files(folder: Path, manifest: dict[str, Any], hashes: bool | None = None) -> None:
    """Compare every shard with the manifest.

    Args:
        hashes: whether to compare checksums, not only sizes; None compares those of up to CHECKED_BYTES in total.

    Raises:
        UserError: a file that is missing, or of another length or content.
    """
    files = [
        (folder / f"{shard['name']}.{kind}", facts)
        for split in manifest["splits"].values()
        for shard in split["shards"]
        for kind, facts in shard["files"].items()
    ]
    remedy = "copy it again, or prepare the data again"
    for path, facts in files:
        try:
            found = os.stat(path).st_size
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}; {remedy}") from None
        if found != facts["bytes"]:
            raise UserError(f"{path} has {found:,} bytes, not {facts['bytes']:,}; {remedy}")
    if hashes is None:
        hashes = sum(facts["bytes"] for _, facts in files) <= CHECKED_BYTES
    if not hashes:
        return
    for path, facts in files:
        with path.open("rb") as stream:
            if hashlib.file_digest(stream, "sha256").hexdigest() != facts["sha256"]:
                raise UserError(f"{path} has changed since it was written: its checksum differs; {remedy}")
