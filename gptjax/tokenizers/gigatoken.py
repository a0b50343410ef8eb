"""Encode documents by the library `gigatoken`, tens of times as fast as tiktoken, with tiktoken's ids.

The two libraries know different versions of Unicode. A text with a character that they may class differently is left
to tiktoken.
"""

import base64
import importlib.util
import tempfile
import unicodedata
from collections.abc import Iterable, Sequence
from functools import cache
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import numpy as np

# gigatoken's name of a way to cut a text into words, by the regular expression with which tiktoken publishes it.
SCHEMES = {
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s": "gpt2",
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|"
    r"\s+(?!\S)|\s": "cl100k",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+": "o200k",
}
SMALL_CHARS = 2**16  # fewer are encoded faster by tiktoken than gigatoken is loaded
# gigatoken remembers every word, in about 100 bytes: random words of this size take 0.7 GB. It then starts again.
REMEMBERED_CHARS = 2**26
CODE_POINTS = 0x110000
FIRST_UNUSED_PLANE = 0x40000  # from here on there are tags and private characters alone, which stay with tiktoken


class GigatokenEncoder:
    """Encodes documents by gigatoken.

    Args:
        encoding: the `tiktoken.Encoding` whose ids it returns.
        pattern: its regular expression, a key of SCHEMES.
        ranks: its id by the bytes of a token.

    Raises:
        RuntimeError, ValueError: gigatoken refuses the vocabulary.
    """

    def __init__(self, encoding: Any, pattern: str, ranks: dict[bytes, int]):
        self._encoding, self._pattern, self._ranks = encoding, pattern, ranks
        self._backend, self._remembered = load_ranks(ranks, SCHEMES[pattern]), 0
        ids = np.array(sorted(ranks.values()), np.int32)
        self._ids = None if np.array_equal(ids, np.arange(len(ids))) else ids  # by gigatoken's id, which has no gaps
        self._doubtful: np.ndarray | None = None

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the ids of each text, int32; those of one batch are parts of one buffer."""
        doubted = self._doubted(texts)
        found = iter(self._encode([text for text, doubt in zip(texts, doubted, strict=True) if not doubt]))
        return [
            np.array(self._encoding.encode_ordinary(text), np.int32) if doubt else next(found)
            for text, doubt in zip(texts, doubted, strict=True)
        ]

    def _encode(self, texts: list[str]) -> list[np.ndarray]:
        if not texts:
            return []
        if self._remembered > REMEMBERED_CHARS:
            self._backend, self._remembered = load_ranks(self._ranks, SCHEMES[self._pattern]), 0
        self._remembered += sum(map(len, texts))
        ids, offsets = encode_flat(self._backend, texts)
        ids = ids if self._ids is None else self._ids[ids]
        return [ids[begin:end] for begin, end in pairwise(offsets.tolist())]

    def _doubted(self, texts: Sequence[str]) -> list[bool]:
        """Return for each text whether it has a character that the two libraries may class differently."""
        if all(map(str.isascii, texts)):
            return [False] * len(texts)
        if self._doubtful is None:
            self._doubtful = doubtful_characters(self._pattern)
        if not self._has_doubtful("".join(text for text in texts if not text.isascii())):
            return [False] * len(texts)
        return [not text.isascii() and self._has_doubtful(text) for text in texts]

    def _has_doubtful(self, text: str) -> bool:
        assert self._doubtful is not None
        codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")
        return bool(self._doubtful[codes].any())


def make_gigatoken_encoder(encoding: Any, pattern: str, ranks: dict[bytes, int]) -> GigatokenEncoder | None:
    """Return an encoder with the ids of a `tiktoken.Encoding`; None where gigatoken is absent or cannot be one."""
    if pattern not in SCHEMES or importlib.util.find_spec("gigatoken") is None:
        return None
    try:
        return GigatokenEncoder(encoding, pattern, ranks)
    except (ImportError, ValueError, RuntimeError):  # a package that it needs is absent, or it refuses the vocabulary
        return None


def load_ranks(ranks: dict[bytes, int], scheme: str) -> Any:
    """Return gigatoken's tokenizer of a vocabulary, whose ids are the places of the tokens by rank.

    Names of special tokens are text in it.
    """
    import gigatoken

    tokens = enumerate(sorted(ranks, key=ranks.__getitem__))

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "ranks.tiktoken")
        path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % place for place, token in tokens))
        return gigatoken.Tokenizer.from_tiktoken(path, pretokenizer=scheme, special_tokens={})


def encode_flat(tokenizer: Any, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return the ids of all texts, int32 [n]; and where each text's begin and end, int64 [texts + 1]."""
    found = tokenizer.encode_batch(texts).layout
    return found.content.data.view(np.int32), found.offsets.data


@cache
def doubtful_characters(pattern: str) -> np.ndarray:
    """Return for each code point whether tiktoken and gigatoken may cut a text differently at it, bool [CODE_POINTS].

    These are characters that are unknown to this Python's version of Unicode, and so may be new in either library;
    halves of characters; and runs of characters of one category whose first is cut differently.
    """
    import tiktoken

    doubtful = np.arange(CODE_POINTS) >= FIRST_UNUSED_PLANE
    runs: list[tuple[int, int]] = []
    end = 0
    for category, codes in groupby(map(unicodedata.category, map(chr, range(FIRST_UNUSED_PLANE)))):
        begin, end = end, end + sum(1 for _ in codes)
        if category in ("Cn", "Cs"):
            doubtful[begin:end] = True
        elif end > 128:
            runs.append((begin, end))
    contexts = ("a%s", "A%s", "1%s", "!%s", "'%s", " %s", "%sa")
    texts = [context % chr(begin) for begin, _ in runs for context in contexts]
    # A vocabulary in which every cut shows: neighbours are one token unless a word ends between them.
    marks = b"aA1!' "
    pairs = [bytes(pair) for mark in marks for byte in range(256) for pair in ((mark, byte), (byte, mark))]
    ranks = {token: rank for rank, token in enumerate(dict.fromkeys([*(bytes([b]) for b in range(256)), *pairs]))}
    theirs = tiktoken.Encoding("cuts", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    expected = map(theirs.encode_ordinary, texts)  # its batches spend more on threads
    differs = different(expected, *encode_flat(load_ranks(ranks, SCHEMES[pattern]), texts))
    for (begin, end), some in zip(runs, np.reshape(differs, (len(runs), -1)), strict=True):
        doubtful[begin:end] |= some.any()
    return doubtful


def different(expected: Iterable[Sequence[int]], ids: np.ndarray, offsets: np.ndarray) -> list[bool]:
    """Return for each text whether its ids, in the form of `encode_flat`, are not the expected ones."""
    spans = pairwise(offsets.tolist())
    return [list(one) != ids[begin:end].tolist() for one, (begin, end) in zip(expected, spans, strict=True)]
