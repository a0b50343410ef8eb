"""Byte-level BPE (Radford et al. 2019, section 2.2) by the library `tokenizers`."""

from collections.abc import Mapping, Sequence
from typing import Any

import tokenizers
from tokenizers import Regex, pre_tokenizers
from tokenizers.models import BPE

from gptjax.errors import UserError

GPT2_SPLIT = pre_tokenizers.ByteLevel(add_prefix_space=False)
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_PATTERN = LLAMA3_PATTERN.replace("{1,3}", "")


def cut_by_pattern(pattern: str, add_prefix_space: bool = False) -> list[Any]:
    """Return pre-tokenizers that cut a text into words by a regular expression, and write them as bytes."""
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space, use_regex=False)
    return [pre_tokenizers.Split(Regex(pattern), "isolated"), as_bytes]


def bpe_model(vocab: Mapping[str, int], merges: Sequence[tuple[str, ...]], **options: Any) -> BPE:
    """Return a BPE; `options` are the library's. Raises UserError for merges that do not fit the vocabulary."""
    try:
        return BPE(dict(vocab), list(merges), **options)
    except Exception as error:  # the library raises Exception itself
        raise UserError(f"these merges do not fit this vocabulary: {error}") from None


def read_merges(text: str) -> list[tuple[str, ...]]:
    """Return the pairs of a merges.txt, the first to be merged first."""
    lines = (line.removesuffix("\r") for line in text.split("\n"))
    return [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]


def byte_level_bpe(
    vocab: Mapping[str, int],
    merges: Sequence[str],
    split: Sequence[Any],
    special: Sequence[str],
) -> str:
    """Return the tokenizer.json of a byte-level BPE.

    Args:
        vocab: id by token, bytes written as GPT-2's printable characters.
        merges: "left right", the first to be merged first.
        split: pre-tokenizers of the library `tokenizers`, which cut a text into words.
        special: tokens of the vocabulary that are no text; those which it lacks are left out.

    Raises:
        UserError: merges of tokens that the vocabulary lacks.
    """
    made = tokenizers.Tokenizer(bpe_model(vocab, read_merges("\n".join(merges))))
    made.pre_tokenizer = pre_tokenizers.Sequence(list(split))
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens([token for token in special if token in vocab])
    return made.to_str()


def printable_bytes() -> list[str]:
    """Return the character that GPT-2's byte-level vocabulary writes for each byte (Radford et al., encoder.py)."""
    kept = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    moved = [byte for byte in range(256) if byte not in kept]
    return [chr(byte) if byte in kept else chr(256 + moved.index(byte)) for byte in range(256)]
