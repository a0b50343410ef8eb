"""What a run reads: prepared folders, or texts that are tokenized at the start and cached on disk under a
fingerprint.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from gptjax.config import DataConfig
from gptjax.data.conversations import load_conversations
from gptjax.data.encoding import encode_documents
from gptjax.data.formats import SourceFile
from gptjax.data.interleaved import load_interleaved
from gptjax.data.preferences import load_preferences
from gptjax.data.reading import Document, Reading, documents, readable
from gptjax.data.shards import Split, Tokens, check_files, is_prepared, load_manifest, load_tokenizer
from gptjax.data.source import Source
from gptjax.data.sources import list_files, pieces_of
from gptjax.data.tagged import with_tag
from gptjax.errors import UserError, choose
from gptjax.lifecycle.faults import note_progress
from gptjax.shell.paths import user_path
from gptjax.tokenizers import Tokenizer, make_tokenizer, tokenizer_from_dict

CACHE_FORMAT = 3  # increase it when the same sources give other tokens
DOCUMENT_END = "\n"  # after a document where the tokenizer has no token for that


@dataclass(frozen=True)
class Corpus:
    """The sources of a run: one, or those of a mixture.

    Attributes:
        shares: weight of each source's loss in val/loss: the mixture's first weights, also after they changed, so
            that the metric stays comparable.
    """

    sources: tuple[Source, ...]
    shares: tuple[float, ...]

    @property
    def tokenizer(self) -> Tokenizer:
        """Return the tokenizer, which is the same for all sources."""
        return self.sources[0].tokenizer

    @property
    def fingerprint(self) -> str:
        """Return the hash of all sources' documents and of the tokenizer."""
        return _joined([source.fingerprint for source in self.sources])

    @property
    def older_fingerprint(self) -> str:
        """Return the hash that versions before CACHE_FORMAT 3 had; that of today where they read something else."""
        return _joined([source.older_fingerprint or source.fingerprint for source in self.sources])

    def first(self, count: int | None) -> "Corpus":
        """Return the corpus of the first so many sources; of all if None."""
        return Corpus(self.sources[:count], self.shares[:count])

    def is_that_of(self, fingerprint: str) -> bool:
        """Return whether a checkpoint with this fingerprint was trained on the same tokens."""
        return fingerprint in (self.fingerprint, self.older_fingerprint)

    @property
    def notes(self) -> list[str]:
        """Return the notes of all sources, for the user."""
        return [note for source in self.sources for note in source.all_notes()]

    @property
    def train_tokens(self) -> int:
        """Return the number of training tokens of all sources."""
        return sum(source.train_tokens for source in self.sources)

    def validation_metrics(self, means: list[dict[str, float]], bits_per_byte: bool) -> dict[str, float]:
        """Return val/NAME of each term, sources weighted by their shares; of several sources also val/loss/SOURCE.

        Args:
            means: of each source, its terms by name; "loss" is one of them.
            bits_per_byte: whether to add val/bpb: "loss" is then in nats a token.
        """
        parts = list(zip(self.shares, means, strict=True))
        metrics = {f"val/{name}": sum(share * of[name] for share, of in parts) for name in means[0]}
        if bits_per_byte:
            bits = [s.val_predictions / s.val_bytes / np.log(2) for s in self.sources]
            metrics["val/bpb"] = sum(share * of["loss"] * b for (share, of), b in zip(parts, bits, strict=True))
        if len(self.sources) > 1:
            metrics |= {f"val/loss/{s.name}": of["loss"] for s, of in zip(self.sources, means, strict=True)}
        return {name: float(value) for name, value in metrics.items()}


def _joined(fingerprints: list[str]) -> str:
    if len(fingerprints) == 1:
        return fingerprints[0]
    return hashlib.sha256(" ".join(fingerprints).encode()).hexdigest()[:20]


def load_corpus(cfg: DataConfig) -> Corpus:
    """Return the corpus that a config names.

    Raises:
        UserError: sources that are missing, empty, damaged or not UTF-8, different tokenizers, or a cache that
            cannot be written.
    """
    load_source = choose(KINDS, cfg.kind, "data.kind")
    if not cfg.mixture:
        return Corpus((load_source(cfg, cfg.path, "data"),), (1.0,))
    sources = tuple(load_source(cfg, part.path, part.label) for part in cfg.mixture)
    for source in sources[1:]:
        if source.tokenizer.to_dict() != sources[0].tokenizer.to_dict():
            raise UserError(
                f"data.mixture: {source.name} and {sources[0].name} have different tokenizers; prepare both with one"
            )
        if source.pack_length != sources[0].pack_length:
            raise UserError(
                f"data.mixture: {source.name} and {sources[0].name} are packed differently; prepare both with the "
                "same --pack_length"
            )
    weights = cfg.mixture_schedule[0][1]
    return Corpus(sources, tuple(weight / sum(weights) for weight in weights))


def load_text(cfg: DataConfig, path: str, name: str) -> Source:
    """Return a source of running text: a prepared folder, or files that are tokenized now.

    Args:
        path: as data.path.
        name: of the source, in the metrics of a mixture.

    Raises:
        UserError: as `load_corpus`.
    """
    if "://" not in path and is_prepared(path):
        return _prepared_source(cfg, Path(user_path(path)), name)
    return _tokenized_source(cfg, path, name)


def load_tagged(cfg: DataConfig, path: str, name: str) -> Source:
    """Return a source of running text after a tag, its name; raise UserError as `load_text` and `with_tag`."""
    return with_tag(cfg, path, name, load_text(cfg, path, name))


# data.kind -> (config, path, name) -> a source.
KINDS: dict[str, Callable[[DataConfig, str, str], Source]] = {
    "text": load_text,
    "sft": load_conversations,
    "preferences": load_preferences,
    "interleaved": load_interleaved,
    "tagged": load_tagged,
}


def _prepared_source(cfg: DataConfig, folder: Path, name: str) -> Source:
    manifest = load_manifest(folder)
    check_files(folder, manifest)
    tokenizer = load_tokenizer(folder, manifest)
    made_with = manifest["tokenizer"]["name"]
    if cfg.tokenizer not in (None, made_with):
        wanted = make_tokenizer(cfg.tokenizer, []) if Path(user_path(cfg.tokenizer)).exists() else None
        if wanted is None or wanted.to_dict() != tokenizer.to_dict():
            raise UserError(
                f"data.tokenizer {cfg.tokenizer} is not what {folder} was prepared with: {made_with}; remove the "
                "key, or prepare the data again"
            )
    packed = manifest["options"]["pack_length"]
    train, val = (Split(folder, manifest, half) for half in ("train", "val"))
    return Source(
        name,
        train if packed else train.tokens,
        val if packed else val.tokens,
        len(val.tokens) - (sum(shard["documents"] for shard in val.shards) if packed else 0),
        val.text_bytes,
        tokenizer,
        manifest["fingerprint"],
        packed,
    )


def _tokenized_source(cfg: DataConfig, path: str, name: str) -> Source:
    files, notes = list_files(path)
    named = cfg.tokenizer or "char"
    tokenizer = None if named == "char" else make_tokenizer(named, [])  # char: its alphabet comes from the text
    spec = named if tokenizer is None else tokenizer.to_dict()
    fingerprint, older = _fingerprints(cfg, path, files, spec)
    if separates(tokenizer, files):
        older = fingerprint  # earlier versions had no separator, so no checkpoint of theirs has these tokens
    folder = Path(user_path(cfg.cache_dir)) / fingerprint
    if not _is_whole(folder):
        end = [DOCUMENT_END] if separates(tokenizer, files) else []
        tokenizer = tokenizer or make_tokenizer(named, chain((text for text, _ in _texts(cfg, files)), end))
        _tokenize(cfg, path, files, folder, tokenizer)
    meta = json.loads((folder / "meta.json").read_text())
    tokenizer = tokenizer or tokenizer_from_dict(meta["tokenizer"])
    halves = []
    for half in ("train", "val"):
        count = meta[f"{half}_tokens"]
        files_of_half = [(str(folder / f"{half}.bin"), count)] if count else []
        halves.append(Tokens(files_of_half, meta["dtype"], tokenizer.vocab_size))
    if meta["empty"]:
        notes.append(f"{path}: {meta['empty']:,} documents without text are left out")
    counts = (len(halves[1]), meta["val_bytes"])
    return Source(name, *halves, *counts, tokenizer, fingerprint, older_fingerprint=older, notes=tuple(notes))


def separates(tokenizer: Tokenizer | None, files: list[SourceFile], separator: str | None = None) -> bool:
    """Return whether DOCUMENT_END follows each document: there are several, and no token ends a document.

    Args:
        tokenizer: None for the characters of the corpus.
        separator: as in `Reading`.
    """
    several = len(files) > 1 or any(not file.format.startswith("text") for file in files) or separator is not None
    plays = all(file.format == "play" for file in files)  # whose reader appends an end
    return (tokenizer is None or tokenizer.eos_id is None) and several and not plays


def _fingerprints(
    cfg: DataConfig, path: str, files: list[SourceFile], tokenizer: str | dict[str, Any]
) -> tuple[str, str]:
    """Return the hash of everything that decides the tokens, and the hash that versions before CACHE_FORMAT 3
    computed.

    The older hash includes the files' names. It equals the first hash where those versions read the files
    differently.
    """
    options = [tokenizer, cfg.text_field, cfg.val_frac]
    digest = hashlib.sha256(json.dumps([CACHE_FORMAT, *options]).encode())
    older = hashlib.sha256(json.dumps([2, path == "shakespeare", *options]).encode())
    same = True
    for file in files:
        digest.update(f"{file.format} {file.split}\0".encode())
        with readable(file.path), epath.Path(file.path).open("rb") as stream:
            older.update(f"{epath.Path(file.path).name}\0".encode())
            for data in iter(partial(stream.read, 2**20), b""):
                note_progress()
                same &= file.split is None and not data.startswith(b"\xef\xbb\xbf")
                digest.update(data)
                older.update(data)
    found = digest.hexdigest()[:20]
    return found, older.hexdigest()[:20] if same else found


def _texts(cfg: DataConfig, files: list[SourceFile]) -> Iterator[Document]:
    """Yield each text of the files."""
    how = Reading(cfg.text_field)
    for piece in pieces_of([files], how, val_frac=0):
        for document in documents(piece, how):
            note_progress()
            yield document


def _is_whole(folder: Path) -> bool:
    try:
        meta = json.loads((folder / "meta.json").read_text())
        found = [(folder / f"{half}.bin").stat().st_size for half in ("train", "val")]
        return found == meta["bytes"]
    except (OSError, ValueError, KeyError):
        return False


def _tokenize(cfg: DataConfig, path: str, files: list[SourceFile], folder: Path, tokenizer: Tokenizer) -> None:
    end = np.zeros(0, np.int32)
    if tokenizer.eos_id is not None:
        end = np.array([tokenizer.eos_id], np.int32)
    elif separates(tokenizer, files):
        end = tokenizer.encode(DOCUMENT_END)
    empty = 0
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)

    def ids_of(some: list[SourceFile]) -> np.ndarray:
        nonlocal empty
        parts: list[np.ndarray] = []
        for encoded in encode_documents(_texts(cfg, some), tokenizer, end):
            empty += encoded.empty
            parts.append(encoded.ids.astype(dtype))
        if not any(map(len, parts)):
            raise UserError(f"data.path {path!r} is empty: there is no text in it")
        return np.concatenate(parts)

    if any(file.split == "val" for file in files):
        halves = [ids_of([file for file in files if file.split == half]) for half in ("train", "val")]
    else:
        tokens = ids_of(files)
        halves = np.split(tokens, [int(len(tokens) * (1 - cfg.val_frac))])
    meta: dict[str, Any] = {
        "bytes": [half.nbytes for half in halves],
        "dtype": halves[0].dtype.name,
        "empty": empty,
        "train_tokens": len(halves[0]),
        "val_tokens": len(halves[1]),
        "val_bytes": len(tokenizer.decode(halves[1].tolist()).encode("utf-8")),
        "tokenizer": tokenizer.to_dict(),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as work:
            for name, half in zip(("train", "val"), halves, strict=True):
                half.tofile(os.path.join(work, f"{name}.bin"))
            Path(work, "meta.json").write_text(json.dumps(meta))
            # Replace each file atomically: it may be damaged, or of a faster process that is reading it.
            for name in ("train.bin", "val.bin", "meta.json"):
                os.replace(os.path.join(work, name), folder / name)
    except OSError as error:
        raise UserError(
            f"cannot write the token cache {folder}: {error.strerror}; set data.cache_dir to a writable folder"
        ) from None
