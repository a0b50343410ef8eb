"""Byte-level BPE (Radford et al. 2019, section 2.2) as a tokenizer.json."""

from collections.abc import Mapping, Sequence
from typing import Any

import tokenizers

from gptjax.errors import UserError

GPT2_SPLIT = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)


def byte_level_bpe(
    vocab: Mapping[str, int],
    merges: Sequence[str],
    split: Sequence[Any],
    special: Sequence[str],
    whole: Sequence[str] = (),
    first: str | None = None,
) -> str:
    """The tokenizer.json of a byte-level BPE (Radford et al. 2019, section 2.2).

    Args:
        vocab: id by token, bytes written as GPT-2's printable characters.
        merges: "left right", the first to be merged first.
        split: pre-tokenizers of the library `tokenizers`, which cut a text into words.
        special: tokens of the vocabulary that are no text; those which it lacks are left out.
        whole: tokens of the vocabulary that are text and never cut.
        first: the special token that goes before a prompt; None for none.

    Raises:
        UserError: merges of tokens that the vocabulary lacks.
    """
    try:
        pairs = [(left, right) for left, _, right in (line.partition(" ") for line in merges)]
        made = tokenizers.Tokenizer(tokenizers.models.BPE(dict(vocab), pairs))
    except Exception as error:  # the library raises Exception itself
        raise UserError(f"these merges do not fit this vocabulary: {error}") from None
    made.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(list(split))
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens([token for token in special if token in vocab])
    made.add_tokens([tokenizers.AddedToken(token, normalized=False) for token in whole])
    if first is not None:
        made.post_processor = tokenizers.processors.TemplateProcessing(
            single=f"{first}:0 $A:0", special_tokens=[(first, vocab[first])]
        )
    return made.to_str()


def printable_bytes() -> list[str]:
    """The character that GPT-2's byte-level vocabulary writes for each byte (Radford et al., encoder.py)."""
    kept = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    moved = [byte for byte in range(256) if byte not in kept]
    return [chr(byte) if byte in kept else chr(256 + moved.index(byte)) for byte in range(256)]
