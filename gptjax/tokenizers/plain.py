"""The interface of a tokenizer, and the tokenizers that need no library: bytes, characters, none."""

import re
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Protocol

import numpy as np

from gptjax.errors import UserError


class Tokenizer(Protocol):
    """The interface of a tokenizer.

    Attributes:
        kind: its name in `KINDS`.
        vocab_size: ids lie in [0, vocab_size).
        eos_id: the id that ends a document; None where the tokenizer has none.
        eos_ids: the ids that end a generated text; `eos_id`, where there is one, comes first.
        special_tokens: name -> id of the tokens that are not text.
        chat_template: Jinja template of a conversation; None without one.
    """

    kind: str
    vocab_size: int
    eos_id: int | None
    eos_ids: tuple[int, ...]
    special_tokens: dict[str, int]
    chat_template: str | None

    def encode(self, text: str) -> np.ndarray:
        """Return the ids, int32 [n]; raise UserError for text that has no ids."""

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the ids of documents to train on: names of special tokens in them are text, and end nothing."""

    def encode_prompt(self, text: str) -> np.ndarray:
        """Return the ids of a prompt, with the special tokens that the model expects around it (often one before)."""

    def encode_places(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Return the ids of a text in which names of special tokens count as such, and where each id stands.

        Returns:
            int32 [n]; and [n, 2], the first character of each and the one after its last. Ids that are parts of one
            character all have its place.
        """

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of these ids; bytes that are no UTF-8 (a cut character) become U+FFFD, special tokens are
        omitted.
        """

    def certain_length(self, text: str) -> int:
        """Return how many characters of a decoded text no further id can change; the others may be parts of a
        character.
        """

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values, with `kind`, from which `tokenizer_from_dict` makes an equal tokenizer."""


def certain_length(text: str) -> int:
    """Return how many characters of a text decoded from bytes are certain.

    Bytes that are no whole character yet are decoded to one U+FFFD, which may still become another character.
    """
    return len(text) - text.endswith("\ufffd")


def template_of(tokenizer: Tokenizer) -> dict[str, str]:
    """Return the part of `to_dict` that holds a chat template; nothing without one."""
    return {} if tokenizer.chat_template is None else {"chat_template": tokenizer.chat_template}


def _places(lengths: Sequence[int], counts: Sequence[int]) -> np.ndarray:
    """Return the places [n, 2] of the ids of units of text: the characters of each unit, and how many ids it has."""
    ends = np.cumsum(lengths, dtype=np.int64)
    return np.repeat(np.stack([ends - np.array(lengths, np.int64), ends], axis=1), counts, axis=0)


class ByteTokenizer:
    """UTF-8 bytes as ids 0-255, and 256 to end a document."""

    kind = "byte"
    vocab_size = 257
    eos_id = 256
    eos_ids = (256,)
    chat_template: str | None = None
    special_tokens: ClassVar[dict[str, int]] = {"<|endoftext|>": 256}

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [self.encode(text) for text in texts]

    def encode_prompt(self, text: str) -> np.ndarray:
        first, *rest = (self.encode(part) for part in text.split("<|endoftext|>"))
        return np.concatenate([first, *(part for after in rest for part in ([np.int32(256)], after))], dtype=np.int32)

    def encode_places(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        pieces = re.split("(<[|]endoftext[|]>)", text)
        units = [unit for number, piece in enumerate(pieces) for unit in ([piece] if number % 2 else piece)]
        counts = [1 if unit in self.special_tokens else len(unit.encode()) for unit in units]
        return self.encode_prompt(text), _places([len(unit) for unit in units], counts)

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")

    certain_length = staticmethod(certain_length)

    def to_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, **template_of(self)}


class CharTokenizer:
    """One id for each character of an alphabet, in the order of their code points."""

    kind = "char"
    eos_id = None
    eos_ids = ()
    chat_template: str | None = None

    def __init__(self, alphabet: str):
        self.special_tokens: dict[str, int] = {}
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
                f"the character tokenizer has no id for {' '.join(map(repr, unknown[:10]))}; "
                f"it knows {self.vocab_size} characters: {self.alphabet!r}"
            )
        return ids.astype(np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [self.encode(text) for text in texts]

    def encode_prompt(self, text: str) -> np.ndarray:
        return self.encode(text)

    def encode_places(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        return self.encode(text), _places([1] * len(text), [1] * len(text))

    def decode(self, ids: Iterable[int]) -> str:
        # A model's vocabulary may be padded, and an untrained model samples ids beyond the alphabet.
        return "".join(self.alphabet[i] for i in ids if i < self.vocab_size)

    certain_length = staticmethod(certain_length)

    def to_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, "alphabet": self.alphabet, **template_of(self)}


class NoTokenizer:
    """Stands in for a missing tokenizer: the model's weights can be used, but no text."""

    kind = "none"
    vocab_size = 0
    eos_id = None
    eos_ids = ()
    chat_template = None
    special_tokens: ClassVar[dict[str, int]] = {}

    def encode(self, text: str) -> np.ndarray:
        raise UserError("this model has no tokenizer; put its tokenizer.json beside its weights")

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [self.encode(text) for text in texts]

    encode_prompt = encode_places = encode

    def decode(self, ids: Iterable[int]) -> str:
        return str(self.encode(""))

    certain_length = staticmethod(certain_length)

    def to_dict(self) -> dict[str, Any]:
        return {"kind": self.kind}
