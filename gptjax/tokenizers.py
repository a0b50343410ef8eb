"""Text to token ids and back. A tokenizer is also plain data (`to_dict`), which travels inside checkpoints.

To add one: a class with these members, and a line in `KINDS`.
"""

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import numpy as np

from gptjax.errors import UserError, nearest


class Tokenizer(Protocol):
    """What the rest of the project asks of a tokenizer.

    Attributes:
        kind: its name in `KINDS`.
        vocab_size: ids lie in [0, vocab_size).
        eos_id: the id that ends a document; None where the tokenizer has none.
    """

    kind: str
    vocab_size: int
    eos_id: int | None

    def encode(self, text: str) -> np.ndarray:
        """Ids, int32 [n]. Raises UserError for text that has no ids."""

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode`, text by text."""

    def decode(self, ids: Iterable[int]) -> str:
        """The text of these ids; bytes that are no UTF-8 (a cut character) become U+FFFD."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, with `kind`, from which `tokenizer_from_dict` makes an equal tokenizer."""


class ByteTokenizer:
    """UTF-8 bytes as ids 0-255, and 256 to end a document."""

    kind = "byte"
    vocab_size = 257
    eos_id = 256

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")

    def to_dict(self) -> dict[str, Any]:
        return {"kind": self.kind}


class CharTokenizer:
    """One id for each character of an alphabet, in the order of their code points."""

    kind = "char"
    eos_id = None

    def __init__(self, alphabet: str):
        self.alphabet = "".join(sorted(set(alphabet)))
        self.vocab_size = len(self.alphabet)
        codes = np.array([ord(c) for c in self.alphabet], np.int64)
        self._id_of_code = np.full(int(codes.max(initial=0)) + 1, -1, np.int32)
        self._id_of_code[codes] = np.arange(len(codes))

    def encode(self, text: str) -> np.ndarray:
        codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
        known = codes < len(self._id_of_code)
        ids = np.where(known, self._id_of_code[np.where(known, codes, 0)], -1)
        if (ids < 0).any():
            unknown = sorted({chr(c) for c in codes[ids < 0]})
            raise UserError(
                f"the character tokenizer has never seen {' '.join(map(repr, unknown[:10]))}; "
                f"it knows {self.vocab_size} characters: {self.alphabet!r}"
            )
        return ids.astype(np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        return "".join(self.alphabet[i] for i in ids)

    def to_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, "alphabet": self.alphabet}


KINDS = {
    "byte": lambda spec: ByteTokenizer(),
    "char": lambda spec: CharTokenizer(spec["alphabet"]),
}


def tokenizer_from_dict(spec: dict[str, Any]) -> Tokenizer:
    """The tokenizer that `to_dict` described."""
    return KINDS[spec["kind"]](spec)


def make_tokenizer(name: str, texts: Iterable[str]) -> Tokenizer:
    """The tokenizer that a config names; `texts` is the corpus, from which `char` takes its alphabet.

    Raises:
        UserError: a name that is not known.
    """
    if name == "char":
        alphabet: set[str] = set()
        for text in texts:
            alphabet |= set(text)
        return CharTokenizer("".join(alphabet))
    if name == "byte":
        return ByteTokenizer()
    raise UserError(f"data.tokenizer {name!r} is not known{nearest(name, KINDS)} (there are: {', '.join(KINDS)})")
