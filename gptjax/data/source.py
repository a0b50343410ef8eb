"""One source of a run's data, as token ids."""

from dataclasses import dataclass
from typing import Any

from gptjax.data.shards import Split, Tokens
from gptjax.tokenizers import Tokenizer

Half = Tokens | Split | Any


@dataclass(frozen=True)
class Source:
    """One source as token ids.

    Attributes:
        name: its name in the metrics of a mixture.
        train, val: concatenated ids, read from disk where needed; a Split where documents are packed into rows; or
            any object with `examples(context_length)`, the rows to train on (batches.py), and the number of tokens as
            its length.
        val_predictions: number of validation tokens that are targets.
        val_bytes: length of the validation text in UTF-8, for bits per byte.
        tokenizer: the tokenizer that made the ids.
        fingerprint: hash of the documents and the tokenizer, independent of their path.
        older_fingerprint: the hash that earlier versions wrote into checkpoints for the same tokens; None: the same.
        notes: lines for the user about what is left out, and about what the names of files decided.
        pack_length: positions of a packed row; None where documents are not packed.
    """

    name: str
    train: Half
    val: Half
    val_predictions: int
    val_bytes: int
    tokenizer: Tokenizer
    fingerprint: str
    pack_length: int | None = None
    older_fingerprint: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def train_tokens(self) -> int:
        """Return the number of training tokens."""
        return len(self.train.tokens if isinstance(self.train, Split) else self.train)

    def all_notes(self) -> list[str]:
        """Return `notes`, and what its halves found out since, such as conversations that were cut."""
        return [*self.notes, *(note for half in (self.train, self.val) for note in getattr(half, "notes", ()))]
