"""Documents of texts and pictures in one vocabulary (`data.kind: interleaved`).

A document is a row of a file, `{"parts": [{"text": "three"}, {"picture": [[0, 5, ...], ...]}]}`, with parts in any
order. A picture becomes a mark, a token for each pixel's level, row by row, and a closing mark. The text's end token
ends the document. Codes of a learned codec, of images or of sound, come in the same way: a grid of whole numbers.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from gptjax.config import DataConfig
from gptjax.data.arrays import cached_arrays
from gptjax.data.conversations import Conversations, as_arrays, check_halves, fingerprint, rows_with_halves
from gptjax.data.formats import SourceFile
from gptjax.data.layout import Laid
from gptjax.data.source import Source
from gptjax.data.sources import list_files
from gptjax.errors import UserError
from gptjax.tokenizers import MarkedTokenizer, PictureFormat, make_tokenizer


def load_interleaved(cfg: DataConfig, path: str, name: str) -> Source:
    """Return a source of documents with pictures.

    Args:
        path: as data.path: rows with `parts`, in JSON lines or an array, Parquet or Arrow.
        name: of the source, in the metrics of a mixture.

    Raises:
        UserError: files that cannot be read, rows that are no such document, a picture of another form than
            data.picture, fewer than two documents.
    """
    files, notes = list_files(path)
    tokenizer = picture_tokenizer(cfg)
    key = fingerprint(["interleaved", cfg.val_frac, cfg.train_on, tokenizer.to_dict()], files)
    folder = cached_arrays(cfg.cache_dir, key, lambda: _lay_out_files(cfg, path, files, tokenizer))
    halves = [Documents(folder, half, cfg.train_on, cfg.pack, name) for half in ("train", "val")]
    counts = (folder.meta["val_learnt"], folder.meta["val_bytes"])
    return Source(name, *halves, *counts, tokenizer, key, notes=tuple(notes))


class Documents(Conversations):
    """One half of a source's documents."""

    unit = "documents"


def picture_tokenizer(cfg: DataConfig) -> MarkedTokenizer:
    """Return the vocabulary of texts and pictures.

    Raises:
        UserError: no form of pictures is given, or no token of the text's tokenizer ends a document.
    """
    if cfg.picture is None:
        raise UserError(
            "data.kind interleaved needs the form of its pictures; set data.picture.{height,width,levels}"
        )
    text = make_tokenizer(cfg.tokenizer or "byte", [])
    if text.eos_id is None:
        raise UserError(
            f"data.tokenizer {cfg.tokenizer} has no token that ends a document, which data.kind interleaved needs; "
            "give byte, or a BPE"
        )
    return MarkedTokenizer(text, picture=PictureFormat(cfg.picture.height, cfg.picture.width, cfg.picture.levels))


def _lay_out_files(
    cfg: DataConfig, path: str, files: list[SourceFile], tokenizer: MarkedTokenizer
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    halves: dict[str, list[Laid]] = {"train": [], "val": []}
    for half, where, values in rows_with_halves(files, cfg.val_frac):
        halves[half].append(lay_out_document(tokenizer, values, where))
    check_halves(halves, path)
    arrays = {f"{half}-{name}": a for half, laid in halves.items() for name, a in as_arrays(laid, tokenizer).items()}
    learnt = [one.ids[1:] if cfg.train_on == "all" else one.ids[one.learnt] for one in halves["val"]]
    meta = {"val_learnt": sum(map(len, learnt)), "val_bytes": sum(_size_bytes(tokenizer, ids) for ids in learnt)}
    return arrays, meta


def _size_bytes(tokenizer: MarkedTokenizer, ids: np.ndarray) -> int:
    """Return how large ids are as UTF-8 and as pixels of log2(levels) bits."""
    pixels = int((ids >= tokenizer.vocab_size - tokenizer.picture.levels).sum())
    return len(tokenizer.decode(ids.tolist()).encode()) + math.ceil(pixels * math.log2(tokenizer.picture.levels) / 8)


def lay_out_document(tokenizer: MarkedTokenizer, row: Mapping[str, Any], where: str) -> Laid:
    """Return a document as ids, of which the last part is what is learnt with data.train_on responses.

    Args:
        where: the row's place, for messages.

    Raises:
        UserError: no parts, a part that is neither a text nor a picture, or a picture of another form.
    """
    parts = row.get("parts")
    if not isinstance(parts, list) or not parts:
        raise UserError(f'{where} has no parts; write {{"parts": [{{"text": "..."}}, {{"picture": [[...], ...]}}]}}')
    ids = [_part_ids(tokenizer, part, f"{where}, part {number}") for number, part in enumerate(parts, 1)]
    ids[-1] = np.append(ids[-1], np.int32(tokenizer.eos_id))
    total, last = sum(map(len, ids)), len(ids[-1])
    return Laid(np.concatenate(ids), np.arange(total) >= total - last, np.array([total]), False)


def _part_ids(tokenizer: MarkedTokenizer, part: Any, where: str) -> np.ndarray:
    if isinstance(part, dict) and isinstance(part.get("text"), str):
        return tokenizer.encode(part["text"])
    if not isinstance(part, dict) or "picture" not in part:
        raise UserError(f"{where} is neither a text nor a picture: {str(part)[:60]}")
    return tokenizer.picture_ids(checked_picture(part["picture"], tokenizer.picture, where))


def checked_picture(levels: Any, form: PictureFormat, where: str) -> np.ndarray:
    """Return a picture as whole numbers [height, width]; raise UserError for another form."""
    try:
        found = np.array(levels)
    except ValueError:  # rows of different lengths
        found = np.zeros(0)
    if found.shape != (form.height, form.width) or found.dtype.kind not in "iu":
        size = " x ".join(map(str, found.shape)) or "no size"
        raise UserError(
            f"{where} has a picture of {size} and type {found.dtype}; needed are {form.height} x {form.width} whole "
            "numbers"
        )
    outside = found[(found < 0) | (found >= form.levels)]
    if outside.size:
        raise UserError(f"{where} has a pixel of level {outside[0]}; levels lie in [0, {form.levels})")
    return found
