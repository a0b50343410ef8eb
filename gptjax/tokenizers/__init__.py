"""Convert text to token ids and back. A tokenizer is also plain data (`to_dict`), which checkpoints contain.

To add one: a class with the members of `Tokenizer`, and a line in `KINDS`.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from gptjax.errors import UserError, nearest
from gptjax.shell.paths import user_path
from gptjax.tokenizers.bpe import GPT2_SPLIT, bpe_model, byte_level_bpe, printable_bytes
from gptjax.tokenizers.chat import ChatTemplate, chat_template
from gptjax.tokenizers.decoding import TextDecoder, text_after
from gptjax.tokenizers.huggingface import HuggingFaceTokenizer, read_huggingface_tokenizer
from gptjax.tokenizers.marked import MarkedTokenizer, PictureFormat, known_tag, marked_from_dict
from gptjax.tokenizers.openai import TIKTOKEN_FILES, TiktokenTokenizer, published_tokenizer
from gptjax.tokenizers.plain import ByteTokenizer, CharTokenizer, NoTokenizer, Tokenizer

__all__ = [
    "GPT2_SPLIT",
    "KINDS",
    "TIKTOKEN_FILES",
    "ByteTokenizer",
    "CharTokenizer",
    "ChatTemplate",
    "HuggingFaceTokenizer",
    "MarkedTokenizer",
    "NoTokenizer",
    "PictureFormat",
    "TextDecoder",
    "TiktokenTokenizer",
    "Tokenizer",
    "bpe_model",
    "byte_level_bpe",
    "chat_template",
    "known_tag",
    "make_tokenizer",
    "printable_bytes",
    "published_tokenizer",
    "read_huggingface_tokenizer",
    "same_ids",
    "spelling",
    "text_after",
    "tokenizer_from_dict",
    "with_chat_template",
]

KINDS = {
    "byte": lambda spec: ByteTokenizer(),
    "char": lambda spec: CharTokenizer(spec["alphabet"]),
    "hf": lambda spec: HuggingFaceTokenizer(spec["files"], spec.get("eos_ids", ())),
    "marked": lambda spec: marked_from_dict(tokenizer_from_dict(spec["text"]), spec),
    "none": lambda spec: NoTokenizer(),
    "tiktoken": TiktokenTokenizer.from_dict,
}


def tokenizer_from_dict(spec: dict[str, Any]) -> Tokenizer:
    """Return the tokenizer that `to_dict` described."""
    tokenizer = KINDS[spec["kind"]](spec)
    if "chat_template" in spec:
        tokenizer.chat_template = spec["chat_template"]
    return tokenizer


def with_chat_template(tokenizer: Tokenizer, template: str, end: int | None = None) -> Tokenizer:
    """Return a tokenizer that also carries a chat template, in its files and in `to_dict`.

    Args:
        end: the id that ends a turn, at which sampling then stops; None adds none.
    """
    spec = tokenizer.to_dict()
    if isinstance(tokenizer, HuggingFaceTokenizer):
        spec["files"] = {**spec["files"], "chat_template.jinja": template}
        if end is not None and end not in spec["eos_ids"]:
            spec["eos_ids"] = [*spec["eos_ids"], end]
    else:
        spec["chat_template"] = template
    return tokenizer_from_dict(spec)


def same_ids(a: Tokenizer, b: Tokenizer) -> bool:
    """Return whether every id stands for the same text in two tokenizers, whichever library runs them.

    Ids that their text does not identify, such as parts of characters and special tokens, are compared by their bytes
    or names.
    """
    if NoTokenizer.kind in (a.kind, b.kind):
        return a.kind == b.kind
    if a.vocab_size != b.vocab_size:
        return False
    names = [{id: name for name, id in tokenizer.special_tokens.items()} for tokenizer in (a, b)]
    for id in range(a.vocab_size):
        text = a.decode([id])
        if text != b.decode([id]):
            return False
        if text and "\ufffd" not in text:
            continue
        if names[0].get(id) != names[1].get(id) or (id not in names[0] and spelling(a, id) != spelling(b, id)):
            return False
    return True


def spelling(tokenizer: Tokenizer, id: int) -> bytes | None:
    """Return the bytes of a token; None for an unused id, and for a special token that has no text."""
    if isinstance(tokenizer, MarkedTokenizer):
        return spelling(tokenizer.text, id) if id < tokenizer.text.vocab_size else None
    if isinstance(tokenizer, ByteTokenizer):
        return bytes([id]) if id < 256 else None
    if isinstance(tokenizer, CharTokenizer):
        return tokenizer.alphabet[id].encode() if id < tokenizer.vocab_size else None
    return None if isinstance(tokenizer, NoTokenizer) else tokenizer.spelling(id)


def make_tokenizer(name: str, texts: Iterable[str]) -> Tokenizer:
    """Return the tokenizer that a config names; `texts` is the corpus, from which `char` takes its alphabet.

    Raises:
        UserError: a name that is neither known nor the path of a tokenizer.
    """
    if name == "char":
        alphabet: set[str] = set()
        for text in texts:
            alphabet |= set(text)
        return CharTokenizer("".join(alphabet))
    if name == "byte":
        return ByteTokenizer()
    if name in TIKTOKEN_FILES:
        return published_tokenizer(name)
    path = Path(user_path(name))
    if path.exists():
        return read_huggingface_tokenizer(path)
    known = ("byte", "char", *TIKTOKEN_FILES)
    raise UserError(
        f"data.tokenizer {name!r} is not known{nearest(name, known)}; give {', '.join(known)}, or the path of a "
        "tokenizer.json or of a Hugging Face directory"
    )
