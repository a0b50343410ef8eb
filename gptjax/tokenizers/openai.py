"""Byte-level BPE as OpenAI publishes it, run by the library `tiktoken`, or `gigatoken` for many documents."""

import base64
import hashlib
import importlib.util
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from gptjax.errors import UserError
from gptjax.tokenizers.bpe import printable_bytes
from gptjax.tokenizers.gigatoken import SMALL_CHARS, GigatokenEncoder, make_gigatoken_encoder
from gptjax.tokenizers.plain import certain_length, template_of


class TiktokenTokenizer:
    """A byte-level BPE as OpenAI publishes them, run by the library `tiktoken`.

    Names of special tokens are text in a document, since a web page that quotes <|endoftext|> does not end there,
    and tokens in a prompt.

    Args:
        name: of the encoding.
        pattern: regular expression that cuts a text into words.
        ranks: id by the bytes of a token; lower ones are merged first, and none is missing.
        special_tokens: ids by name.
    """

    kind = "tiktoken"
    chat_template: str | None = None

    def __init__(self, name: str, pattern: str, ranks: dict[bytes, int], special_tokens: dict[str, int]):
        self.special_tokens, self._spec = dict(special_tokens), (name, pattern, ranks)
        facts = {"mergeable_ranks": ranks, "special_tokens": self.special_tokens}
        self._encoding = _import_tiktoken().Encoding(name, pat_str=pattern, **facts)
        self.vocab_size = self._encoding.n_vocab
        self.eos_id = special_tokens.get("<|endoftext|>")
        self.eos_ids = () if self.eos_id is None else (self.eos_id,)

    def encode(self, text: str) -> np.ndarray:
        return np.array(self._encoding.encode_ordinary(text), np.int32)

    @cached_property
    def _faster(self) -> GigatokenEncoder | None:
        _, pattern, ranks = self._spec
        return make_gigatoken_encoder(self._encoding, pattern, ranks)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        if sum(map(len, texts)) >= SMALL_CHARS and self._faster is not None:
            return self._faster.encode_batch(texts)
        return [np.array(ids, np.int32) for ids in self.encode_by_tiktoken(texts)]

    def encode_by_tiktoken(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of documents by tiktoken, one thread for each core."""
        return self._encoding.encode_ordinary_batch(list(texts), num_threads=os.cpu_count() or 1)

    def encode_prompt(self, text: str) -> np.ndarray:
        return np.array(self._encoding.encode(text, allowed_special="all"), np.int32)

    def encode_places(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        ids = self.encode_prompt(text)
        # A token's first byte decides where it begins, and its last byte where it ends.
        ends = np.cumsum([len(self._encoding.decode_single_token_bytes(id)) for id in ids.tolist()], dtype=np.int64)
        begins = np.concatenate([[0], ends[:-1]]) if len(ends) else ends
        character = np.repeat(np.arange(len(text)), [len(c.encode()) for c in text])
        return ids, np.stack([character[begins], character[ends - 1] + 1], axis=1)

    def decode(self, ids: Iterable[int]) -> str:
        # Some vocabularies have ids that name nothing, and a young model draws them.
        return self._encoding.decode([i for i in ids if i < len(self._spec[2])])

    certain_length = staticmethod(certain_length)

    def spelling(self, id: int) -> bytes | None:
        """Return a token's bytes; None for an id that names nothing."""
        return self._encoding.decode_single_token_bytes(id) if id < len(self._spec[2]) else None

    def to_dict(self) -> dict[str, Any]:
        name, pattern, _ = self._spec
        parts = {"name": name, "pattern": pattern, "special_tokens": self.special_tokens, "ranks": self._tokens}
        return {"kind": self.kind, **parts, **template_of(self)}

    @cached_property
    def _tokens(self) -> str:
        ranks = self._spec[2]
        return " ".join(base64.b64encode(token).decode() for token in sorted(ranks, key=ranks.__getitem__))

    @classmethod
    def from_dict(cls, spec: dict[str, Any]) -> "TiktokenTokenizer":
        ranks = {base64.b64decode(token): rank for rank, token in enumerate(spec["ranks"].split())}
        return cls(spec["name"], spec["pattern"], ranks, spec["special_tokens"])


# tiktoken's name of an encoding, and the published files it is made of. tiktoken knows their SHA-256.
_OPENAI = "https://openaipublic.blob.core.windows.net/"
TIKTOKEN_FILES = {
    "gpt2": ("gpt2", [f"{_OPENAI}gpt-2/encodings/main/{name}" for name in ("encoder.json", "vocab.bpe")]),
    "cl100k": ("cl100k_base", [f"{_OPENAI}encodings/cl100k_base.tiktoken"]),
    "o200k": ("o200k_base", [f"{_OPENAI}encodings/o200k_base.tiktoken"]),
}


def published_tokenizer(name: str) -> TiktokenTokenizer:
    """Return one of TIKTOKEN_FILES, from the folder that TIKTOKEN_CACHE_DIR names or from the network.

    The folder holds the files under their own names, or as tiktoken itself keeps them.

    Raises:
        UserError: the files are missing and cannot be downloaded, or are not the published ones.
    """
    _import_tiktoken()
    from tiktoken_ext import openai_public

    encoding, urls = TIKTOKEN_FILES[name]
    files = " and ".join(url.rpartition("/")[2] for url in urls)
    try:
        with _under_tiktokens_names(urls):
            made = openai_public.ENCODING_CONSTRUCTORS[encoding]()
    except Exception as error:  # an error of the network or a proxy, or a file that is not the published one
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:120]
        raise UserError(
            f"the tokenizer {name} needs {files}, which cannot be downloaded ({reason}); "
            f"without a network put {' and '.join(urls)} into a folder and set TIKTOKEN_CACHE_DIR to it"
        ) from None
    return TiktokenTokenizer(encoding, made["pat_str"], made["mergeable_ranks"], made["special_tokens"])


@contextmanager
def _under_tiktokens_names(urls: Sequence[str]) -> Iterator[None]:
    """Show tiktoken the files of TIKTOKEN_CACHE_DIR under the names that it expects: the SHA-1 of their addresses. It
    removes files that it finds damaged, so it is given links.
    """
    folder = os.environ.get("TIKTOKEN_CACHE_DIR")
    if not folder or not all(Path(folder, url.rpartition("/")[2]).exists() for url in urls):
        yield
        return
    with tempfile.TemporaryDirectory() as shown:
        for url in urls:
            link = Path(shown, hashlib.sha1(url.encode(), usedforsecurity=False).hexdigest())
            link.symlink_to(Path(folder, url.rpartition("/")[2]).resolve())
        os.environ["TIKTOKEN_CACHE_DIR"] = shown
        try:
            yield
        finally:
            os.environ["TIKTOKEN_CACHE_DIR"] = folder


def _import_tiktoken() -> Any:
    try:
        import tiktoken
    except ImportError:
        raise UserError("this tokenizer needs the package tiktoken: pip install 'gptjax[data]'") from None
    return tiktoken


def by_tiktoken(documents: tokenizers.Tokenizer) -> TiktokenTokenizer | None:
    """Return an encoder that gives the same ids by tiktoken, several times as fast, for a byte-level BPE cut as
    GPT-2's; else None.

    tiktoken merges any neighbours whose bytes are a token. Those are the merges that a BPE lists, in its order, where
    ids rise with the merges and each token's text, left to the merges, becomes that token.
    """
    if importlib.util.find_spec("tiktoken") is None:
        return None
    spec = json.loads(documents.to_str())
    model, cut = spec["model"], spec["pre_tokenizer"] or {}
    cut = cut["pretokenizers"][0] if len(cut.get("pretokenizers", ())) == 1 else cut
    special = {token["content"] for token in spec["added_tokens"] if token["special"]}
    options = [value for key, value in model.items() if key not in ("type", "vocab", "merges", "fuse_unk")]
    if (
        model["type"] != "BPE"
        or any(options)
        or spec["normalizer"] is not None
        or (cut.get("type"), cut.get("add_prefix_space"), cut.get("use_regex")) != ("ByteLevel", False, True)
        or len(special) < len(spec["added_tokens"])
    ):
        return None
    byte_of = {letter: byte for byte, letter in enumerate(printable_bytes())}
    vocab = {text: id for text, id in model["vocab"].items() if text not in special}
    made = [model["vocab"][left + right] for left, right in model["merges"]]
    if set("".join(vocab)) != byte_of.keys() or not byte_of.keys() <= vocab.keys() or made != sorted(made):
        return None
    if any(len(documents.model.tokenize(text)) != 1 for text in vocab):
        return None
    from tiktoken_ext.openai_public import r50k_pat_str

    ranks = {bytes(byte_of[letter] for letter in text): id for text, id in vocab.items()}
    return TiktokenTokenizer("bpe", r50k_pat_str, ranks, special_tokens={})
