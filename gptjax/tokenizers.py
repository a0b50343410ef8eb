"""Text to token ids and back. A tokenizer is also plain data (`to_dict`), which travels inside checkpoints.

To add one: a class with these members, and a line in `KINDS`.
"""

import base64
import hashlib
import importlib.util
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import tokenizers

from gptjax.errors import UserError, nearest


class Tokenizer(Protocol):
    """What the rest of the project asks of a tokenizer.

    Attributes:
        kind: its name in `KINDS`.
        vocab_size: ids lie in [0, vocab_size).
        eos_id: the id that ends a document; None where the tokenizer has none.
        special_tokens: ids by name of the tokens that are no text.
    """

    kind: str
    vocab_size: int
    eos_id: int | None
    special_tokens: dict[str, int]

    def encode(self, text: str) -> np.ndarray:
        """Ids, int32 [n]. Raises UserError for text that has no ids."""

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of documents to learn from: names of special tokens in them are text, and end nothing."""

    def encode_prompt(self, text: str) -> np.ndarray:
        """`encode`, with the special tokens that the model expects around a text (often one before it)."""

    def decode(self, ids: Iterable[int]) -> str:
        """The text of these ids; bytes that are no UTF-8 (a cut character) become U+FFFD, special tokens nothing."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, with `kind`, from which `tokenizer_from_dict` makes an equal tokenizer."""


class ByteTokenizer:
    """UTF-8 bytes as ids 0-255, and 256 to end a document."""

    kind = "byte"
    vocab_size = 257
    eos_id = 256
    special_tokens: ClassVar[dict[str, int]] = {"<|endoftext|>": 256}

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [self.encode(text) for text in texts]

    def encode_prompt(self, text: str) -> np.ndarray:
        return self.encode(text)

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")

    def to_dict(self) -> dict[str, Any]:
        return {"kind": self.kind}


class CharTokenizer:
    """One id for each character of an alphabet, in the order of their code points."""

    kind = "char"
    eos_id = None

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
                f"the character tokenizer has never seen {' '.join(map(repr, unknown[:10]))}; "
                f"it knows {self.vocab_size} characters: {self.alphabet!r}"
            )
        return ids.astype(np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [self.encode(text) for text in texts]

    def encode_prompt(self, text: str) -> np.ndarray:
        return self.encode(text)

    def decode(self, ids: Iterable[int]) -> str:
        return "".join(self.alphabet[i] for i in ids)

    def to_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, "alphabet": self.alphabet}


class HuggingFaceTokenizer:
    """A tokenizer as Hugging Face models carry it, run by the library `tokenizers`.

    Args:
        files: text by name: `tokenizer.json`, and any other of FILES. They are kept as they are, so that they
            leave by `to_dict` as they came.

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

    def __init__(self, files: Mapping[str, str]):
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
        self.bos_id = ids.get(_token_text(facts.get("bos_token")))
        template = files.get("chat_template.jinja", facts.get("chat_template"))
        if isinstance(template, list):  # several, by name
            template = next((t["template"] for t in template if t.get("name") == "default"), None)
        self.chat_template: str | None = template

    def encode(self, text: str) -> np.ndarray:
        return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, np.int32)

    @cached_property
    def _faster(self) -> "TiktokenTokenizer | None":
        return _by_tiktoken(self._documents)

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
        return {"kind": self.kind, "files": self.files}


class NoTokenizer:
    """The place of a tokenizer that did not come with its model: the weights can be used, text cannot."""

    kind = "none"
    vocab_size = 0
    eos_id = None
    special_tokens: ClassVar[dict[str, int]] = {}

    def encode(self, text: str) -> np.ndarray:
        raise UserError("this model came without a tokenizer; put its tokenizer.json beside its weights")

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [self.encode(text) for text in texts]

    encode_prompt = encode

    def decode(self, ids: Iterable[int]) -> str:
        return str(self.encode(""))

    def to_dict(self) -> dict[str, Any]:
        return {"kind": self.kind}


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
        return HuggingFaceTokenizer(files)
    except OSError as error:
        raise UserError(f"cannot read the tokenizer {str(path)!r}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"the tokenizer {str(path)!r} is not UTF-8; copy it anew") from None


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


GPT2_SPLIT = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
_SENTENCEPIECE_HINT = {
    True: ", only tokenizer.model; in Python: AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR) writes one",
    False: "; give a Hugging Face directory or a tokenizer.json",
}


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


class TiktokenTokenizer:
    """A byte-level BPE as OpenAI publishes them, run by the library `tiktoken`.

    Names of special tokens in a text are text: a web page that quotes <|endoftext|> does not end there.

    Args:
        name: of the encoding.
        pattern: regular expression that cuts a text into words.
        ranks: id by the bytes of a token; lower ones are merged first, and none is missing.
        special_tokens: ids by name.
    """

    kind = "tiktoken"

    def __init__(self, name: str, pattern: str, ranks: dict[bytes, int], special_tokens: dict[str, int]):
        self.special_tokens, self._spec = dict(special_tokens), (name, pattern, ranks)
        facts = {"mergeable_ranks": ranks, "special_tokens": self.special_tokens}
        self._encoding = _import_tiktoken().Encoding(name, pat_str=pattern, **facts)
        self.vocab_size = self._encoding.n_vocab
        self.eos_id = special_tokens.get("<|endoftext|>")

    def encode(self, text: str) -> np.ndarray:
        return np.array(self._encoding.encode_ordinary(text), np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.array(ids, np.int32) for ids in self._encoding.encode_ordinary_batch(list(texts))]

    def encode_prompt(self, text: str) -> np.ndarray:
        return self.encode(text)

    def decode(self, ids: Iterable[int]) -> str:
        # Some vocabularies have ids that name nothing, and a young model draws them.
        return self._encoding.decode([i for i in ids if i < len(self._spec[2])])

    def to_dict(self) -> dict[str, Any]:
        name, pattern, ranks = self._spec
        tokens = " ".join(base64.b64encode(token).decode() for token in sorted(ranks, key=ranks.__getitem__))
        parts = {"name": name, "pattern": pattern, "special_tokens": self.special_tokens, "ranks": tokens}
        return {"kind": self.kind, **parts}

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
    """One of TIKTOKEN_FILES: from the folder that the environment's TIKTOKEN_CACHE_DIR names, or from the network.

    The folder holds the files under their own names, or as tiktoken itself keeps them.

    Raises:
        UserError: the files are not there and cannot be had, or are not the published ones.
    """
    _import_tiktoken()
    from tiktoken_ext import openai_public

    encoding, urls = TIKTOKEN_FILES[name]
    files = " and ".join(url.rpartition("/")[2] for url in urls)
    try:
        with _under_tiktokens_names(urls):
            made = openai_public.ENCODING_CONSTRUCTORS[encoding]()
    except Exception as error:  # of the network, of its proxies, or a file that is not the published one
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:120]
        raise UserError(
            f"the tokenizer {name} needs {files}, and they cannot be had ({reason}); "
            f"without a network put {' and '.join(urls)} into a folder and set TIKTOKEN_CACHE_DIR to it"
        ) from None
    return TiktokenTokenizer(encoding, made["pat_str"], made["mergeable_ranks"], made["special_tokens"])


@contextmanager
def _under_tiktokens_names(urls: Sequence[str]) -> Iterator[None]:
    """Where TIKTOKEN_CACHE_DIR holds files under their own names, show them to tiktoken as it expects them: under
    the SHA-1 of their addresses. It removes what it finds damaged, so it is shown links."""
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


def printable_bytes() -> list[str]:
    """The character that GPT-2's byte-level vocabulary writes for each byte (Radford et al., encoder.py)."""
    kept = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    moved = [byte for byte in range(256) if byte not in kept]
    return [chr(byte) if byte in kept else chr(256 + moved.index(byte)) for byte in range(256)]


def _by_tiktoken(documents: tokenizers.Tokenizer) -> TiktokenTokenizer | None:
    """The same ids by tiktoken, several times as fast, of a byte-level BPE cut as GPT-2's; else None.

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


KINDS = {
    "byte": lambda spec: ByteTokenizer(),
    "char": lambda spec: CharTokenizer(spec["alphabet"]),
    "hf": lambda spec: HuggingFaceTokenizer(spec["files"]),
    "none": lambda spec: NoTokenizer(),
    "tiktoken": TiktokenTokenizer.from_dict,
}


def tokenizer_from_dict(spec: dict[str, Any]) -> Tokenizer:
    """The tokenizer that `to_dict` described."""
    return KINDS[spec["kind"]](spec)


def same_ids(a: Tokenizer, b: Tokenizer) -> bool:
    """Whether every id stands for the same text in two tokenizers, whichever library runs them."""
    if NoTokenizer.kind in (a.kind, b.kind):
        return a.kind == b.kind
    return a.vocab_size == b.vocab_size and all(a.decode([i]) == b.decode([i]) for i in range(a.vocab_size))


def make_tokenizer(name: str, texts: Iterable[str]) -> Tokenizer:
    """The tokenizer that a config names; `texts` is the corpus, from which `char` takes its alphabet.

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
    path = Path(name).expanduser()
    if path.exists():
        return read_huggingface_tokenizer(path)
    known = ("byte", "char", *TIKTOKEN_FILES)
    raise UserError(
        f"data.tokenizer {name!r} is not known{nearest(name, known)}; give {', '.join(known)}, or the path of a "
        "tokenizer.json or of a Hugging Face directory"
    )
