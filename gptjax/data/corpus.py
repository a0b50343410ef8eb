"""What a run reads: prepared folders, or texts that are tokenized now and kept on disk under a fingerprint."""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from gptjax.config import DataConfig
from gptjax.data.formats import SourceFile
from gptjax.data.reading import Reading, documents, readable
from gptjax.data.shards import Split, Tokens, check_files, is_prepared, load_manifest, load_tokenizer
from gptjax.data.sources import list_files, pieces_of
from gptjax.errors import UserError
from gptjax.paths import user_path
from gptjax.tokenizers import Tokenizer, make_tokenizer, tokenizer_from_dict

FORMAT = 3  # of the cache; raise it when the same sources come to give other tokens
DOCUMENT_END = "\n"  # after a document where the tokenizer has no token for that
TEXTS_AT_ONCE = 64  # which a tokenizer spreads over the cores


@dataclass(frozen=True)
class Source:
    """One source as token ids.

    Attributes:
        name: in the metrics of a mixture.
        train, val: ids side by side, mapped from disk; a Split where documents are packed into rows.
        val_predictions: how many validation tokens are predicted.
        val_bytes: length of the validation text in UTF-8, for bits per byte.
        tokenizer: what made the ids.
        fingerprint: hash of the documents and the tokenizer, wherever they lie.
        older_fingerprint: what earlier versions wrote into checkpoints for the same tokens; None: the same.
        notes: lines for the user on what is left out, and on what names of files decided.
        pack_length: positions of a packed row; None where documents are not packed.
    """

    name: str
    train: Tokens | Split
    val: Tokens | Split
    val_predictions: int
    val_bytes: int
    tokenizer: Tokenizer
    fingerprint: str
    pack_length: int | None = None
    older_fingerprint: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def train_tokens(self) -> int:
        """Number of training tokens."""
        return len(self.train.tokens if isinstance(self.train, Split) else self.train)


@dataclass(frozen=True)
class Corpus:
    """The sources of a run: one, or those of a mixture.

    Attributes:
        shares: weight of each source's validation loss in the whole; they are the mixture's first weights, also after
            those have changed, so that the figure keeps its meaning.
    """

    sources: tuple[Source, ...]
    shares: tuple[float, ...]

    @property
    def tokenizer(self) -> Tokenizer:
        """What made the ids, the same for all sources."""
        return self.sources[0].tokenizer

    @property
    def fingerprint(self) -> str:
        """Hash of all sources' documents, and of the tokenizer."""
        return _joined([source.fingerprint for source in self.sources])

    def is_that_of(self, fingerprint: str) -> bool:
        """Return whether a checkpoint with this fingerprint was trained on the same tokens."""
        older = _joined([source.older_fingerprint or source.fingerprint for source in self.sources])
        return fingerprint in (self.fingerprint, older)

    @property
    def notes(self) -> list[str]:
        """Lines for the user on all sources."""
        return [note for source in self.sources for note in source.notes]

    @property
    def train_tokens(self) -> int:
        """Number of training tokens of all sources."""
        return sum(source.train_tokens for source in self.sources)

    def validation_metrics(self, losses: list[float]) -> dict[str, float]:
        """val/loss and val/bpb from the loss of each source in nats a token; of several also val/loss/NAME."""
        bits = [s.val_predictions / s.val_bytes / np.log(2) for s in self.sources]
        metrics = {
            "val/loss": sum(share * loss for share, loss in zip(self.shares, losses, strict=True)),
            "val/bpb": sum(share * loss * b for share, loss, b in zip(self.shares, losses, bits, strict=True)),
        }
        if len(self.sources) > 1:
            metrics |= {f"val/loss/{s.name}": loss for s, loss in zip(self.sources, losses, strict=True)}
        return {name: float(value) for name, value in metrics.items()}


def _joined(fingerprints: list[str]) -> str:
    if len(fingerprints) == 1:
        return fingerprints[0]
    return hashlib.sha256(" ".join(fingerprints).encode()).hexdigest()[:20]


def load_corpus(cfg: DataConfig) -> Corpus:
    """The corpus that a config names.

    Raises:
        UserError: sources that are missing, empty, damaged or not UTF-8, tokenizers at odds, or a cache that
            cannot be written.
    """
    if not cfg.mixture:
        return Corpus((_load_source(cfg, cfg.path, "data"),), (1.0,))
    sources = tuple(_load_source(cfg, part.path, part.label) for part in cfg.mixture)
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


def _load_source(cfg: DataConfig, path: str, name: str) -> Source:
    if "://" not in path and is_prepared(path):
        return _prepared(cfg, Path(user_path(path)), name)
    return _tokenized(cfg, path, name)


def _prepared(cfg: DataConfig, folder: Path, name: str) -> Source:
    manifest = load_manifest(folder)
    check_files(folder, manifest)
    tokenizer = load_tokenizer(folder, manifest)
    made_with = manifest["tokenizer"]["name"]
    if cfg.tokenizer not in (None, made_with):
        wanted = make_tokenizer(cfg.tokenizer, []) if Path(user_path(cfg.tokenizer)).exists() else None
        if wanted is None or wanted.to_dict() != tokenizer.to_dict():
            raise UserError(
                f"data.tokenizer {cfg.tokenizer} is not what {folder} was prepared with: {made_with}; leave it out, "
                "or prepare the data anew"
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


def _tokenized(cfg: DataConfig, path: str, name: str) -> Source:
    files, notes = list_files(path)
    named = cfg.tokenizer or "char"
    tokenizer = None if named == "char" else make_tokenizer(named, [])  # char: whatever the text contains
    spec = named if tokenizer is None else tokenizer.to_dict()
    fingerprint, older = _fingerprints(cfg, path, files, spec)
    if separates(tokenizer, files):
        older = fingerprint  # which knew no separator
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
    """Return whether DOCUMENT_END stands after each document: where there are several, and no token ends one.

    Args:
        tokenizer: None for the characters of the corpus.
        separator: as in `Reading`.
    """
    several = len(files) > 1 or any(not file.format.startswith("text") for file in files) or separator is not None
    plays = all(file.format == "play" for file in files)  # which bring their own
    return (tokenizer is None or tokenizer.eos_id is None) and several and not plays


def _fingerprints(
    cfg: DataConfig, path: str, files: list[SourceFile], tokenizer: str | dict[str, Any]
) -> tuple[str, str]:
    """Return the hash of everything that decides the tokens; and the one that versions before FORMAT 3 computed.

    Theirs has the files' names in it; it is the first again where they read the same files otherwise.
    """
    options = [tokenizer, cfg.text_field, cfg.val_frac]
    digest = hashlib.sha256(json.dumps([FORMAT, *options]).encode())
    older = hashlib.sha256(json.dumps([2, path == "shakespeare", *options]).encode())
    same = True
    for file in files:
        digest.update(f"{file.format} {file.split}\0".encode())
        with readable(file.path), epath.Path(file.path).open("rb") as stream:
            older.update(f"{epath.Path(file.path).name}\0".encode())
            for data in iter(partial(stream.read, 2**20), b""):
                same &= file.split is None and not data.startswith(b"\xef\xbb\xbf")
                digest.update(data)
                older.update(data)
    found = digest.hexdigest()[:20]
    return found, older.hexdigest()[:20] if same else found


def _texts(cfg: DataConfig, files: list[SourceFile]) -> Iterator[tuple[str, bool]]:
    """Texts, and whether a document ends with each."""
    how = Reading(cfg.text_field)
    for piece in pieces_of([files], how, val_frac=0):
        yield from documents(piece, how)


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
        end = np.array([tokenizer.eos_id])
    elif separates(tokenizer, files):
        end = tokenizer.encode(DOCUMENT_END)
    empty = 0

    def ids_of(some: list[SourceFile]) -> np.ndarray:
        nonlocal empty
        pieces: list[np.ndarray] = []
        texts = _texts(cfg, some)
        for several in iter(lambda: list(islice(texts, TEXTS_AT_ONCE)), []):
            kept = [(text, whole) for text, whole in several if text]
            empty += len(several) - len(kept)
            for ids, (_, whole) in zip(tokenizer.encode_batch([text for text, _ in kept]), kept, strict=True):
                pieces += [ids, *([end] if whole else [])]
        if not pieces:
            raise UserError(f"data.path {path!r} is empty: there is no text in it")
        return np.concatenate(pieces).astype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)

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
            # Each at once, over a damaged one or over the same file of a process that was first and may be reading.
            for name in ("train.bin", "val.bin", "meta.json"):
                os.replace(os.path.join(work, name), folder / name)
    except OSError as error:
        raise UserError(
            f"cannot write the token cache {folder}: {error.strerror}; set data.cache_dir to a folder of yours"
        ) from None
