"""Conversations to fine-tune on (`data.kind: sft`): laid out once, cached on disk, packed into rows."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from gptjax.config import DataConfig
from gptjax.data.arrays import ArrayFolder, cached_arrays
from gptjax.data.filearray import FileArray
from gptjax.data.formats import SourceFile
from gptjax.data.layout import Laid, lay_out, messages_of
from gptjax.data.packing import best_fit
from gptjax.data.reading import readable
from gptjax.data.rows import rows_of
from gptjax.data.source import Source
from gptjax.data.sources import list_files
from gptjax.errors import UserError
from gptjax.shell.paths import user_path
from gptjax.tokenizers import (
    CharTokenizer,
    ChatTemplate,
    Tokenizer,
    chat_template,
    make_tokenizer,
    tokenizer_from_dict,
    with_chat_template,
)
from gptjax.tokenizers.chat import chatml

LAYOUT_FORMAT = 1  # increase it when the same sources give other tokens
# (template, tokenizer, row of a file, its place) -> the conversations that the row holds.
LayOutRow = Callable[[ChatTemplate, Tokenizer, Mapping[str, Any], str], list[Laid]]
DATE = "2024-07-26"  # that templates write into a training text: the one that Llama 3.1's uses without a clock


def load_conversations(cfg: DataConfig, path: str, name: str) -> Source:
    """Return a source of conversations.

    Args:
        path: as data.path: JSON lines with `messages` or `prompt` and `response`; a table with `source` and `target`.
        name: of the source, in the metrics of a mixture.

    Raises:
        UserError: files that cannot be read, rows that are no conversation, a template that refuses one, fewer than
            two conversations.
    """
    files, notes = list_files(path)
    tokenizer = conversation_tokenizer(cfg, files)
    key = fingerprint(["sft", cfg.val_frac, tokenizer.to_dict()], files)
    folder = cached_arrays(cfg.cache_dir, key, lambda: lay_out_files(cfg, path, files, tokenizer, _lay_out_row))
    meta = folder.meta
    if meta["straddling"]:
        notes.append(
            f"{path}: {meta['straddling']:,} conversations have a token that begins before a turn of the assistant "
            "or ends after it; it is learnt"
        )
    halves = [Conversations(folder, half, cfg.train_on, cfg.pack, name) for half in ("train", "val")]
    counts = (meta["val_learnt"], meta["val_bytes"])
    found = tokenizer_from_dict(meta["tokenizer"])
    return Source(name, *halves, *counts, found, key, notes=tuple(notes))


def conversation_tokenizer(cfg: DataConfig, files: list[SourceFile]) -> Tokenizer:
    """Return the tokenizer that a config names, with the chat template that lays out its conversations.

    Raises:
        UserError: none is named, or the template cannot be read.
    """
    if cfg.tokenizer is None:
        raise UserError(
            f"data.kind {cfg.kind} needs the tokenizer of the model that is tuned; set data.tokenizer to its folder"
        )
    given = None if cfg.chat_template is None else read_template(cfg.chat_template)
    if cfg.tokenizer == "char":  # whose alphabet comes from the text
        nothing = CharTokenizer("")
        layout = ChatTemplate(given or chatml(nothing), date=DATE)
        rows = (row for file in files for row in rows_of(file))
        texts = (layout.render(messages_of(row, where), False) for where, row in rows)
        return with_chat_template(make_tokenizer("char", texts), given or chatml(nothing))
    tokenizer = make_tokenizer(cfg.tokenizer, [])
    template = given or tokenizer.chat_template or chatml(tokenizer)
    return tokenizer if template == tokenizer.chat_template else with_chat_template(tokenizer, template)


def read_template(path: str) -> str:
    """Return the text of a template's file; raise UserError where it cannot be read."""
    try:
        return Path(user_path(path)).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot read data.chat_template {path!r}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"data.chat_template {path!r} is not UTF-8 text") from None


def fingerprint(options: Sequence[Any], files: list[SourceFile]) -> str:
    """Return the hash of all that decides the tokens: options, and the files' formats and bytes."""
    digest = hashlib.sha256(json.dumps([LAYOUT_FORMAT, DATE, *options]).encode())
    for file in files:
        digest.update(f"{file.format} {file.split}\0".encode())
        with readable(file.path), epath.Path(file.path).open("rb") as stream:
            for data in iter(partial(stream.read, 2**20), b""):
                digest.update(data)
    return digest.hexdigest()[:20]


def is_for_validation(number: int, split: str | None, divided: bool, val_frac: float) -> bool:
    """Return whether a row is held out: by its file's name where names decide, else evenly spread."""
    if divided:
        return split == "val"
    return int((number + 1) * val_frac) > int(number * val_frac)


def rows_with_halves(files: list[SourceFile], val_frac: float) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield each row as "train" or "val", its place, and its values."""
    divided = any(file.split == "val" for file in files)
    rows = ((file, row) for file in files for row in rows_of(file))
    for number, (file, (where, values)) in enumerate(rows):
        held_out = is_for_validation(number, file.split, divided, val_frac)
        yield "val" if held_out else "train", where, values


def lay_out_files(
    cfg: DataConfig, path: str, files: list[SourceFile], tokenizer: Tokenizer, lay_out_row: LayOutRow
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Return the arrays of both halves of a source, and the plain values beside them."""
    template = chat_template(tokenizer, DATE)
    rows: dict[str, list[list[Laid]]] = {"train": [], "val": []}
    for half, where, values in rows_with_halves(files, cfg.val_frac):
        rows[half].append(lay_out_row(template, tokenizer, values, where))
    check_halves(rows, path)
    halves = {half: [laid for row in laid_rows for laid in row] for half, laid_rows in rows.items()}
    arrays = {f"{half}-{name}": a for half, laid in halves.items() for name, a in as_arrays(laid, tokenizer).items()}
    everything = [laid for half in halves.values() for laid in half]
    meta = {
        "tokenizer": with_turn_end(tokenizer, everything).to_dict(),
        "straddling": sum(laid.straddles for laid in everything),
        "val_learnt": int(sum(laid.learnt.sum() for laid in halves["val"])),
        "val_bytes": sum(len(tokenizer.decode(laid.ids[laid.learnt].tolist()).encode()) for laid in halves["val"]),
    }
    return arrays, meta


def _lay_out_row(template: ChatTemplate, tokenizer: Tokenizer, row: Mapping[str, Any], where: str) -> list[Laid]:
    return [lay_out(template, tokenizer, messages_of(row, where), where)]


def check_halves(halves: dict[str, list[Any]], path: str) -> None:
    """Raise UserError where nothing is left to train on, or nothing to validate with."""
    count = sum(map(len, halves.values()))
    for half, rows in halves.items():
        if not rows:
            what = "to train on" if half == "train" else "for validation (data.val_frac)"
            raise UserError(f"data.path {path!r} has too few rows, {count}, to leave any {what}; give more")


def with_turn_end(tokenizer: Tokenizer, laid: list[Laid]) -> Tokenizer:
    """Return the tokenizer with the token that ends the assistant's turns among those that end a generated text."""
    last = {int(one.ids[one.turns[-1] - 1]) for one in laid}
    end = last.pop() if len(last) == 1 else None
    if end is None or end in tokenizer.eos_ids or end not in tokenizer.special_tokens.values():
        return tokenizer
    return with_chat_template(tokenizer, tokenizer.chat_template, end)


def as_arrays(laid: list[Laid], tokenizer: Tokenizer) -> dict[str, np.ndarray]:
    """Return conversations as flat arrays: ids and which are learnt; where each ends, and where its turns end."""
    dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
    return {
        "ids": np.concatenate([one.ids for one in laid]).astype(dtype),
        "learnt": np.concatenate([one.learnt for one in laid]),
        "ends": np.cumsum([len(one.ids) for one in laid], dtype=np.int64),
        "turns": np.concatenate([one.turns for one in laid]),
        "turn_ends": np.cumsum([len(one.turns) for one in laid], dtype=np.int64),
    }


class Conversations:
    """One half of a source's conversations.

    Args:
        folder: that holds the arrays.
        half: train or val.
        train_on: responses or all, as data.train_on.
        pack: whether several share a row.
        name: of the source, for notes.

    Attributes:
        notes: lines about conversations that are longer than the context, once `examples` has seen them.
        unit: what its notes call them.
    """

    unit = "conversations"

    def __init__(self, folder: ArrayFolder, half: str, train_on: str, pack: bool, name: str):
        self.folder, self.half, self.name = folder, half, name
        self.learns_all, self.pack = train_on == "all", pack
        self.notes: list[str] = []

    def __len__(self) -> int:
        return len(self.array("ids"))

    def array(self, name: str) -> FileArray:
        """Return one of the arrays of `as_arrays`."""
        return self.folder[f"{self.half}-{name}"]

    def conversation(self, number: int, length: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Return ids, int32 [n], and which are learnt, bool [n], of one conversation or of its first tokens."""
        ends = self.array("ends")
        start = 0 if number == 0 else int(ends[number - 1])
        stop = int(ends[number]) if length is None else start + length
        ids = self.array("ids")[start:stop].astype(np.int32)
        learnt = np.ones(len(ids), bool) if self.learns_all else self.array("learnt")[start:stop]
        return ids, learnt

    def fitting_length(self, number: int, context_length: int) -> int:
        """Return how many tokens of a conversation fit: all, those of its first whole turns, or 0."""
        ends, turn_ends = self.array("ends"), self.array("turn_ends")
        length = int(ends[number]) - (int(ends[number - 1]) if number else 0)
        if length - 1 <= context_length:
            return length
        turns = self.array("turns")[(int(turn_ends[number - 1]) if number else 0) : int(turn_ends[number])]
        return max((int(turn) for turn in turns if turn - 1 <= context_length), default=0)

    def examples(self, context_length: int) -> "ConversationRows":
        """Return the conversations as rows.

        Raises:
            UserError: none fits the context.
        """
        count = len(self.array("ends"))
        lengths = [self.fitting_length(number, context_length) for number in range(count)]
        kept = [number for number in range(count) if lengths[number] > 1]
        whole = np.diff(self.array("ends")[:], prepend=0)
        cut = sum(lengths[number] < whole[number] for number in kept)
        beyond = f"are longer than model.context_length {context_length}"
        if not kept:
            raise UserError(f"{self.name}: all {count} {self.unit} {beyond}; raise it")
        self.notes = [
            f"{self.name}, {self.half}: {n:,} of {count:,} {self.unit} {beyond} and are {what}"
            for n, what in ((cut, "cut after a whole turn"), (count - len(kept), "left out"))
            if n
        ]
        sizes = [lengths[number] - 1 for number in kept]
        bins = best_fit(sizes, context_length) if self.pack else [[i] for i in range(len(kept))]
        rows = [[(kept[i], lengths[kept[i]]) for i in row] for row in bins]
        return ConversationRows(self, rows, context_length)


class ConversationRows:
    """Rows of conversations: positions restart at each, and attention stays inside its own.

    Args:
        rows: of each row, its conversations as (number, tokens taken).
    """

    def __init__(self, conversations: Conversations, rows: list[list[tuple[int, int]]], context_length: int):
        self.conversations, self.rows, self.context_length = conversations, rows, context_length

    def __len__(self) -> int:
        return len(self.rows)

    def example(self, index: int, epoch: int) -> dict[str, np.ndarray]:
        """Return a row: tokens, targets, positions, segments [T] int32 and weights [T] float32."""
        parts = [self.conversations.conversation(number, length) for number, length in self.rows[index]]
        return conversation_row(parts, self.context_length)


def conversation_row(parts: Sequence[tuple[np.ndarray, np.ndarray]], context_length: int) -> dict[str, np.ndarray]:
    """Return conversations as one row. The unused rest has weight 0 and a segment of its own.

    Args:
        parts: ids and which of them are learnt, of each conversation.
    """
    lengths = [len(ids) - 1 for ids, _ in parts]
    spare = context_length - sum(lengths)
    none = np.zeros(spare, np.int32)
    return {
        "tokens": np.concatenate([*(ids[:-1] for ids, _ in parts), none]),
        "targets": np.concatenate([*(ids[1:] for ids, _ in parts), none]),
        "weights": np.concatenate([*(learnt[1:] for _, learnt in parts), none]).astype(np.float32),
        "positions": np.concatenate([np.arange(n, dtype=np.int32) for n in (*lengths, spare)]),
        "segments": np.repeat(np.arange(len(parts) + 1, dtype=np.int32), [*lengths, spare]),
    }
