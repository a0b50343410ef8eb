"""Tokenizers of Hugging Face models, run by the library `tokenizers`."""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers.models import BPE

from gptjax.errors import UserError
from gptjax.shell.paths import refuse_lfs_pointer
from gptjax.tokenizers.auto import FILES, from_json, json_object, options_of, settle, token_text
from gptjax.tokenizers.bpe import printable_bytes
from gptjax.tokenizers.openai import TiktokenTokenizer, by_tiktoken
from gptjax.tokenizers.plain import certain_length

BYTE_OF = {character: byte for byte, character in enumerate(printable_bytes())}


class HuggingFaceTokenizer:
    """A tokenizer of a Hugging Face model, run by the library `tokenizers`.

    Args:
        files: text by name: `tokenizer.json`, and any other of FILES. `to_dict` returns them unchanged.
        ends: ids that end a generated text, as the model's own files name them (`model_ends`).

    Attributes:
        eos_token: the text of `eos_id`.
        bos_id: the token that begins a text, where the files name one.
        chat_template: Jinja text that lays out a conversation; None without one.

    Raises:
        UserError: `tokenizer.json` is not one.
    """

    kind = "hf"
    # Names of the token that ends a document, where no file says which: GPT-2's, Llama's, Llama 3's.
    USUAL_EOS = ("<|endoftext|>", "</s>", "<|end_of_text|>")

    def __init__(self, files: Mapping[str, str], ends: Sequence[int] = ()):
        self.files = dict(files)
        self._tokenizer = from_json(files["tokenizer.json"])
        self._documents = tokenizers.Tokenizer.from_str(self._tokenizer.to_str())
        self._documents.encode_special_tokens = True
        ids = self._tokenizer.get_vocab(with_added_tokens=True)
        added = self._tokenizer.get_added_tokens_decoder()
        self.special_tokens = {token.content: id for id, token in added.items() if token.special}
        self.vocab_size = 1 + max(ids.values(), default=-1)
        facts = options_of(files)
        self._tokenizer.encode_special_tokens = bool(facts.get("split_special_tokens"))
        # transformers cleans up nothing that a BPE decodes, whatever the files say.
        model = self._tokenizer.model
        self._cleans_up = bool(facts.get("clean_up_tokenization_spaces")) and not isinstance(model, BPE)
        self._bytes = "ByteFallback" in str(self._tokenizer.decoder)
        given = token_text(facts.get("eos_token"))
        named = self.USUAL_EOS if given is None else (given,)
        self.eos_token = next((token for token in named if token in ids), None)
        self.eos_id = ids.get(self.eos_token)
        also = ids.get(token_text(json_object(files, "special_tokens_map.json").get("eos_token")))
        self.eos_ids = tuple(dict.fromkeys(id for id in (self.eos_id, *ends, also) if id is not None))
        self.bos_id = ids.get(token_text(facts.get("bos_token")))
        template = files.get("chat_template.jinja", facts.get("chat_template"))
        if isinstance(template, list):  # several, by name
            template = next((t["template"] for t in template if t.get("name") == "default"), None)
        self.chat_template: str | None = template

    def encode(self, text: str) -> np.ndarray:
        return self._ids(text, add_special_tokens=False)

    def _ids(self, text: str, add_special_tokens: bool) -> np.ndarray:
        try:
            return np.array(self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids, np.int32)
        except Exception as error:  # the library raises Exception itself
            raise _without_ids([text], error) from None

    @cached_property
    def _faster(self) -> "TiktokenTokenizer | None":
        return by_tiktoken(self._documents)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        if self._faster is not None:
            return self._faster.encode_batch(texts)
        try:
            found = self._documents.encode_batch_fast(list(texts), add_special_tokens=False)
        except Exception as error:  # the library raises Exception itself
            raise _without_ids(texts, error) from None
        return [np.array(encoding.ids, np.int32) for encoding in found]

    def encode_prompt(self, text: str) -> np.ndarray:
        return self._ids(text, add_special_tokens=True)

    def encode_places(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        try:
            found = self._tokenizer.encode(text, add_special_tokens=False)
        except Exception as error:  # the library raises Exception itself
            raise _without_ids([text], error) from None
        return np.array(found.ids, np.int32), np.array(found.offsets, np.int64).reshape(-1, 2)

    def decode(self, ids: Iterable[int]) -> str:
        text = self._decode_with_bytes(ids) if self._bytes else self._tokenizer.decode([int(i) for i in ids])
        return _without_loose_spaces(text) if self._cleans_up else text

    def _decode_with_bytes(self, ids: Iterable[int]) -> str:
        """Return `decode` where some tokens are single bytes: the library drops a whole run of them for one wrong
        byte.
        """
        # By text, as the library does: a normalized special token has another text, and is shown.
        tokens = [self._tokenizer.id_to_token(int(i)) for i in ids]
        shown = [token for token in tokens if token and token not in self.special_tokens]
        whole: list[str] = []
        for is_bytes, run in groupby(shown, key=lambda token: bool(_BYTE_TOKEN.fullmatch(token))):
            several = list(run)
            whole += _whole_characters(several) if is_bytes else several
        return self._tokenizer.decoder.decode(whole)

    def certain_length(self, text: str) -> int:
        if self._cleans_up:  # a space, and the text after it, may still be joined to the word before
            return max(0, text.rfind(" "))
        return certain_length(text)

    def spelling(self, id: int) -> bytes | None:
        """Return a token's bytes; of a vocabulary that does not write them as GPT-2's does, its name in UTF-8."""
        token = self._tokenizer.id_to_token(id)
        if token is None or any(c not in BYTE_OF for c in token):
            return None if token is None else token.encode()
        return bytes(BYTE_OF[c] for c in token)

    def to_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, "files": self.files, "eos_ids": list(self.eos_ids)}


_BYTE_TOKEN = re.compile("<0x[0-9A-Fa-f]{2}>")


def _whole_characters(tokens: list[str]) -> list[str]:
    """Return tokens of single bytes as text, with one U+FFFD in place of bytes that make no character."""
    data = bytes(int(token[3:5], 16) for token in tokens)
    found: list[str] = []
    start = 0
    while start < len(data):
        try:
            data[start:].decode("utf-8")
            return found + tokens[start:]
        except UnicodeDecodeError as damage:
            found += [*tokens[start : start + damage.start], "\ufffd"]
            start += damage.end
    return found


def _without_ids(texts: Sequence[str], error: Exception) -> UserError:
    """Return the error for characters that the vocabulary lacks, where it has no unknown token."""
    start = "".join(texts)[:40]
    return UserError(f"this tokenizer has no ids for a text that begins {start!r} ({error}); use another tokenizer")


def _without_loose_spaces(text: str) -> str:
    """Apply `clean_up_tokenization` of transformers, which undoes how WordPiece spaces English."""
    for mark in (" .", " ?", " !", " ,"):
        text = text.replace(mark, mark[1:])
    text = text.replace(" ' ", "'")
    for ending in (" n't", " 'm", " 's", " 've", " 're"):
        text = text.replace(ending, ending[1:])
    return text


def read_huggingface_tokenizer(path: str | Path) -> HuggingFaceTokenizer:
    """Return the tokenizer of a Hugging Face directory, or of a tokenizer.json and the files beside it.

    Its ids are those of `AutoTokenizer`. vocab.json and merges.txt alone are GPT-2's.

    Raises:
        UserError: there is no tokenizer, its files are damaged, or their rules are unknown here.
    """
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    try:
        files = {name: (folder / name).read_text(encoding="utf-8") for name in FILES if (folder / name).exists()}
        if path != folder:
            files["tokenizer.json"] = path.read_text(encoding="utf-8")
        elif "tokenizer.json" not in files and not {"vocab.json", "merges.txt"} <= files.keys():
            raise UserError(f"{str(path)!r} holds no tokenizer.json{_instead(folder)}")
        for name, text in files.items():
            refuse_lfs_pointer(folder / name, text[:80].encode())
        return HuggingFaceTokenizer(settle(files), model_ends(folder))
    except OSError as error:
        raise UserError(f"cannot read the tokenizer {str(path)!r}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"the tokenizer {str(path)!r} is not UTF-8; copy it again") from None


# Tokenizers in the formats of SentencePiece, tiktoken, Mistral and BERT.
OTHER_FILES = re.compile(r".*\.(model|spm|tiktoken)(\.v\d+)?|tekken.*\.json|vocab\.txt")


def _instead(folder: Path) -> str:
    for name in sorted(os.listdir(folder)) if folder.is_dir() else ():
        if OTHER_FILES.fullmatch(name):
            return f", only {name}; in Python: AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR) writes one"
    for name, other in (("vocab.json", "merges.txt"), ("merges.txt", "vocab.json")):
        if (folder / name).exists():
            return f", and {name} without {other}; copy {other} or tokenizer.json beside it"
    return "; give a Hugging Face directory or a tokenizer.json"


def model_ends(folder: Path) -> list[int]:
    """Return the ids that end a text by a model's generation_config.json or, where that names none, its config.json.

    This is transformers' rule. Many a config.json holds a default that the model does not mean, and so comes second.

    Raises:
        UserError: one of these files is not a JSON object.
    """
    for name in ("generation_config.json", "config.json"):
        if not (folder / name).exists():
            continue
        config = json_object({name: (folder / name).read_text(encoding="utf-8")}, name)
        for values in (config, config.get("text_config")):
            ends = values.get("eos_token_id") if isinstance(values, dict) else None
            ends = ends if isinstance(ends, list) else [ends]
            if found := list(dict.fromkeys(id for id in ends if type(id) is int and id >= 0)):
                return found
    return []
