"""Tokenizers of Hugging Face models, run by the library `tokenizers`."""

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from gptjax.errors import UserError
from gptjax.tokenizers.bpe import GPT2_SPLIT, byte_level_bpe
from gptjax.tokenizers.openai import TiktokenTokenizer, by_tiktoken


class HuggingFaceTokenizer:
    """A tokenizer as Hugging Face models carry it, run by the library `tokenizers`.

    Args:
        files: text by name: `tokenizer.json`, and any other of FILES. They are kept as they are, so that they
            leave by `to_dict` as they came.
        ends: ids that end a generated text, as the model's own files name them (`model_ends`).

    Attributes:
        eos_token: the text of `eos_id`.
        bos_id: the token that begins a text, where the files name one.
        chat_template: Jinja text that lays out a conversation; None without one.

    Raises:
        UserError: `tokenizer.json` is not one.
    """

    kind = "hf"
    FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
    # Where no file says which token ends a document: GPT-2's name for it, Llama's, Llama 3's.
    USUAL_EOS = ("<|endoftext|>", "</s>", "<|end_of_text|>")

    def __init__(self, files: Mapping[str, str], ends: Sequence[int] = ()):
        self.files = dict(files)
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(files["tokenizer.json"])
        except Exception as error:  # the library raises Exception itself
            raise UserError(f"tokenizer.json is not a tokenizer of Hugging Face: {error}") from None
        self._tokenizer.no_truncation()  # both may have been left on by whoever saved the file
        self._tokenizer.no_padding()
        self._documents = tokenizers.Tokenizer.from_str(self._tokenizer.to_str())
        self._documents.encode_special_tokens = True
        ids = self._tokenizer.get_vocab(with_added_tokens=True)
        added = self._tokenizer.get_added_tokens_decoder()
        self.special_tokens = {token.content: id for id, token in added.items() if token.special}
        self.vocab_size = 1 + max(ids.values(), default=-1)
        facts = {**_json_object(files, "special_tokens_map.json"), **_json_object(files, "tokenizer_config.json")}
        given = _token_text(facts.get("eos_token"))
        named = self.USUAL_EOS if given is None else (given,)
        self.eos_token = next((token for token in named if token in ids), None)
        self.eos_id = ids.get(self.eos_token)
        self.eos_ids = tuple(dict.fromkeys([*([] if self.eos_id is None else [self.eos_id]), *ends]))
        self.bos_id = ids.get(_token_text(facts.get("bos_token")))
        template = files.get("chat_template.jinja", facts.get("chat_template"))
        if isinstance(template, list):  # several, by name
            template = next((t["template"] for t in template if t.get("name") == "default"), None)
        self.chat_template: str | None = template

    def encode(self, text: str) -> np.ndarray:
        return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, np.int32)

    @cached_property
    def _faster(self) -> "TiktokenTokenizer | None":
        return by_tiktoken(self._documents)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        if self._faster is not None:
            return self._faster.encode_batch(texts)
        found = self._documents.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, np.int32) for encoding in found]

    def encode_prompt(self, text: str) -> np.ndarray:
        return np.array(self._tokenizer.encode(text).ids, np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        return self._tokenizer.decode([int(i) for i in ids])

    def to_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, "files": self.files, "eos_ids": list(self.eos_ids)}


def read_huggingface_tokenizer(path: str | Path) -> HuggingFaceTokenizer:
    """The tokenizer of a Hugging Face directory, or a tokenizer.json with what lies beside it.

    A directory of GPT-2's first form (vocab.json and merges.txt alone) is taken too.

    Raises:
        UserError: no tokenizer is there, or its files are damaged.
    """
    path = Path(path)
    main, folder = (path / "tokenizer.json", path) if path.is_dir() else (path, path.parent)
    try:
        beside = [folder / name for name in HuggingFaceTokenizer.FILES[1:]]
        files = {file.name: file.read_text(encoding="utf-8") for file in beside if file.exists()}
        if main.exists():
            files["tokenizer.json"] = main.read_text(encoding="utf-8")
        elif (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
            merges = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
            pairs = [line for line in merges if line and not line.startswith("#version")]
            vocab = _json_object({"vocab.json": (folder / "vocab.json").read_text(encoding="utf-8")}, "vocab.json")
            files["tokenizer.json"] = byte_level_bpe(vocab, pairs, [GPT2_SPLIT], ["<|endoftext|>"])
        else:
            raise UserError(f"{str(path)!r} holds no tokenizer.json{_SENTENCEPIECE_HINT[_has_sentencepiece(folder)]}")
        return HuggingFaceTokenizer(files, model_ends(folder))
    except OSError as error:
        raise UserError(f"cannot read the tokenizer {str(path)!r}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"the tokenizer {str(path)!r} is not UTF-8; copy it anew") from None


_SENTENCEPIECE_HINT = {
    True: ", only tokenizer.model; in Python: AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR) writes one",
    False: "; give a Hugging Face directory or a tokenizer.json",
}


def model_ends(folder: Path) -> list[int]:
    """Return the ids that end a text by a model's generation_config.json or, where that names none, its config.json.

    This is transformers' rule. Many a config.json holds a default that the model does not mean, and so comes second.

    Raises:
        UserError: one of these files is not a JSON object.
    """
    for name in ("generation_config.json", "config.json"):
        if not (folder / name).exists():
            continue
        config = _json_object({name: (folder / name).read_text(encoding="utf-8")}, name)
        for values in (config, config.get("text_config")):
            ends = values.get("eos_token_id") if isinstance(values, dict) else None
            ends = ends if isinstance(ends, list) else [ends]
            if found := list(dict.fromkeys(id for id in ends if type(id) is int and id >= 0)):
                return found
    return []


def _has_sentencepiece(folder: Path) -> bool:
    return (folder / "tokenizer.model").exists()


def _token_text(token: str | dict[str, Any] | None) -> str | None:
    """A special token is written as its text, or as an object with its `content`."""
    return token.get("content") if isinstance(token, dict) else token


def _json_object(files: Mapping[str, str], name: str) -> dict[str, Any]:
    try:
        values = json.loads(files.get(name, "{}"))
    except json.JSONDecodeError as error:
        raise UserError(f"{name} is not JSON: {error.msg} at line {error.lineno}") from None
    if not isinstance(values, dict):
        raise UserError(f"{name} must hold a JSON object")
    return values
