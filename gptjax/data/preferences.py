"""Pairs of answers of which one is preferred (`data.kind: preferences`): two rows each, the chosen one first."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from gptjax.config import DataConfig
from gptjax.data.arrays import ArrayFolder, cached_arrays
from gptjax.data.conversations import (
    Conversations,
    conversation_row,
    conversation_tokenizer,
    fingerprint,
    lay_out_files,
)
from gptjax.data.layout import Laid, as_messages, check_messages, lay_out
from gptjax.data.source import Source
from gptjax.data.sources import list_files
from gptjax.errors import UserError
from gptjax.tokenizers import ChatTemplate, Tokenizer, tokenizer_from_dict

SIDES = ("chosen", "rejected")


def load_preferences(cfg: DataConfig, path: str, name: str) -> Source:
    """Return a source of pairs: rows with `prompt`, `chosen` and `rejected`, each a text or messages.

    Args:
        path: as data.path.
        name: of the source, in the metrics of a mixture.

    Raises:
        UserError: files that cannot be read, rows that hold no pair, two equal sides, fewer than two pairs.
    """
    files, notes = list_files(path)
    tokenizer = conversation_tokenizer(cfg, files)
    key = fingerprint(["preferences", cfg.val_frac, tokenizer.to_dict()], files)
    folder = cached_arrays(cfg.cache_dir, key, lambda: lay_out_files(cfg, path, files, tokenizer, lay_out_pair))
    halves = [Preferences(folder, half, name) for half in ("train", "val")]
    found = tokenizer_from_dict(folder.meta["tokenizer"])
    counts = (folder.meta["val_learnt"], folder.meta["val_bytes"])
    return Source(name, *halves, *counts, found, key, notes=tuple(notes))


def pair_of(row: Mapping[str, Any], where: str) -> tuple[list[list[dict[str, Any]]], int]:
    """Return the messages of the chosen and of the rejected conversation, and how many of them are the prompt's.

    Raises:
        UserError: a field is missing, or a side is no conversation.
    """
    missing = [field for field in ("prompt", *SIDES) if field not in row]
    if missing:
        raise UserError(
            f"{where} has the fields {', '.join(map(repr, row)) or 'none'}; {' and '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} missing"
        )
    prompt = as_messages(row["prompt"], "user")
    sides = [[*prompt, *as_messages(row[side], "assistant")] for side in SIDES]
    return [check_messages(messages, where) for messages in sides], len(prompt)


def lay_out_pair(template: ChatTemplate, tokenizer: Tokenizer, row: Mapping[str, Any], where: str) -> list[Laid]:
    """Return the two conversations of a row as token ids; only what follows the prompt is learnt.

    Raises:
        UserError: as `pair_of`; the sides are equal.
    """
    sides, n_prompt = pair_of(row, where)
    said = sum(message["role"] == "assistant" for message in sides[0][:n_prompt])
    laid = []
    for messages in sides:
        one = lay_out(template, tokenizer, messages, where)
        if len(one.turns) <= said:
            raise UserError(f"{where} has a side without a response; write one, or remove the pair")
        after = np.arange(len(one.ids)) >= (one.turns[said - 1] if said else 0)
        laid.append(one._replace(learnt=one.learnt & after, turns=one.turns[said:]))
    if np.array_equal(laid[0].ids, laid[1].ids):
        raise UserError(f"{where} has equal sides, chosen and rejected; remove the pair")
    return laid


class Preferences(Conversations):
    """One half of a source's pairs.

    Attributes:
        group_rows: rows of a pair.
        reference: of each row of `examples`, the log-probability of what is learnt under the reference model,
            float32; None until it is known (lifecycle/reference.py).
    """

    group_rows = len(SIDES)

    def __init__(self, folder: ArrayFolder, half: str, name: str):
        super().__init__(folder, half, "responses", False, name)
        self.reference: np.ndarray | None = None

    def examples(self, context_length: int) -> "PreferenceRows":
        """Return the pairs as rows.

        Raises:
            UserError: none fits the context.
        """
        lengths = np.diff(self.array("ends")[:], prepend=0).reshape(-1, self.group_rows)
        kept = np.flatnonzero((lengths - 1 <= context_length).all(axis=1))
        beyond = f"have a side longer than model.context_length {context_length}"
        if not len(kept):
            raise UserError(f"{self.name}: all {len(lengths)} pairs {beyond}; raise it")
        left_out = len(lengths) - len(kept)
        self.notes = [f"{self.name}, {self.half}: {left_out:,} of {len(lengths):,} pairs {beyond} and are left out"]
        self.notes = self.notes if left_out else []
        return PreferenceRows(self, kept, context_length)


class PreferenceRows:
    """Rows of pairs: row 2 i is the chosen side of pair i, and row 2 i + 1 the rejected one.

    Args:
        kept: numbers of the pairs.
    """

    def __init__(self, pairs: Preferences, kept: np.ndarray, context_length: int):
        self.pairs, self.kept, self.context_length = pairs, kept, context_length
        self.group_rows = pairs.group_rows

    def __len__(self) -> int:
        return len(self.kept) * self.group_rows

    def example(self, index: int, epoch: int) -> dict[str, np.ndarray]:
        """Return a row as `conversation_row`, with `reference` [T] once it is known: a sum in its first place."""
        pair, side = divmod(index, self.group_rows)
        row = conversation_row(
            [self.pairs.conversation(int(self.kept[pair]) * self.group_rows + side)], self.context_length
        )
        if self.pairs.reference is not None:
            row["reference"] = np.zeros(self.context_length, np.float32)
            row["reference"][0] = self.pairs.reference[index]
        return row
