"""Vocabularies in GGUF files, the same on every machine, and llama.cpp's own ids for them.

`python tests/gguf_vocabularies.py` writes the digests of llama.cpp's ids into gguf_ids.json. It needs the package
xllamacpp==2026.10.11549, whose library exports llama.cpp's functions.
"""

import ctypes
import hashlib
import importlib.util
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizer_texts import NAMES, ODD, SCRIPTS, texts

from gptjax.tokenizers import printable_bytes

DIGESTS = Path(__file__).parent / "gguf_ids.json"
SAMPLES = [text for text in texts(300) if "\0" not in text]  # llama.cpp's strings end there
SPECIAL = [*NAMES, "[INST]", "<|fim_prefix|>", "<|fim_pad|>"]
# token_type: text that is never cut, unknown, no text.
TYPES = [2 if name == "<unk>" else 4 if name in ("<|user|>", "<|extra|>", "[INST]") else 3 for name in SPECIAL]


def _words() -> Iterator[str]:
    for text in [*SCRIPTS, *ODD] * 2:
        for word in text.split(" "):
            yield from (word, " " + word)
    yield from ("  ", "   ", "    ", "\n\n", "\t\t", "12", "123", "1234", " th", "the", " the", "aaaa", "----")


def byte_level() -> tuple[list[str], list[str]]:
    """Tokens and merges: every beginning of every word is a token."""
    letters = printable_bytes()
    tokens, merges = dict.fromkeys(sorted(letters)), {}
    for word in _words():
        written = "".join(letters[byte] for byte in word.encode())
        for end in range(2, min(len(written), 12) + 1):
            tokens[written[:end]] = None
            merges[f"{written[: end - 1]} {written[end - 1]}"] = None
    return [*tokens, "Ġlord", *SPECIAL], list(merges)  # no merge makes the last word


def sentencepiece() -> tuple[list[str], list[int], list[float]]:
    """Tokens, types and scores of SentencePiece's kind."""
    pieces: dict[str, None] = {}
    for word in _words():
        written = word.replace(" ", "▁")
        pieces |= dict.fromkeys(written[:end] for end in range(1, min(len(written), 10) + 1))
    pieces |= dict.fromkeys(character for piece in list(pieces) for character in piece)  # as SentencePiece keeps them
    special = [name for name in SPECIAL if name not in ("<unk>", "<s>", "</s>") and not name.startswith("<0x")]
    tokens = [*("<unk>", "<s>", "</s>"), *(f"<0x{byte:02X}>" for byte in range(256))]
    types = [2, 3, 3] + [6] * 256
    normal = [piece for piece in pieces if piece not in special and "\0" not in piece]
    types += [1] * len(normal) + [TYPES[SPECIAL.index(name)] for name in special]
    scores = [0.0] * len(tokens) + [-float(rank) for rank in range(len(normal))] + [0.0] * len(special)
    return [*tokens, *normal, *special], types, scores


def write(path: Path, model: str, tokens: list[str], types: list[int], **fields: Any) -> None:
    """Write a GGUF file of a Llama without tensors."""
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(8)
    writer.add_tokenizer_model(model)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    lists = {"pre": writer.add_tokenizer_pre, "merges": writer.add_token_merges, "scores": writer.add_token_scores}
    lists["name"] = writer.add_name
    for name, value in fields.items():
        if name in lists:
            lists[name](value)
        elif isinstance(value, bool):
            writer.add_bool(f"tokenizer.ggml.{name}", value)
        else:
            writer.add_uint32(f"tokenizer.ggml.{name}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def vocabularies(cuts: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Names, and the arguments of `write`."""
    tokens, merges = byte_level()
    types = [1] * (len(tokens) - len(SPECIAL)) + TYPES
    ids = {"bos_token_id": tokens.index("<|begin|>"), "eos_token_id": tokens.index("</s>")}
    held = {"model": "gpt2", "tokens": tokens, "types": types, "merges": merges, **ids}
    for name in cuts:
        yield name, {**held, "pre": name}
    yield "no-pre", held
    yield "llama-bpe-no-bos", {**held, "pre": "llama-bpe", "add_bos_token": False}
    yield "gpt-2-ends", {**held, "pre": "gpt-2", "add_bos_token": True, "add_eos_token": True}
    yield "qwen2-eot", {**held, "pre": "qwen2", "eot_token_id": 5, "eom_token_id": 6}
    tokens, types, scores = sentencepiece()
    held = {"model": "llama", "tokens": tokens, "types": types, "scores": scores}
    yield "spm", held
    yield "spm-named", {**held, "bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0}
    yield "spm-no-prefix", {**held, "add_space_prefix": False}
    yield "spm-ends", {**held, "add_bos_token": False, "add_eos_token": True}
    yield "spm-bad-id", {**held, "eos_token_id": len(tokens) + 7}


def digest(ids: list[int]) -> str:
    return hashlib.sha256(json.dumps(ids).encode()).hexdigest()[:8]


class LlamaCpp:
    """A vocabulary in llama.cpp itself, through the library of the package xllamacpp (of the version above)."""

    def __init__(self, path: Path):
        folder = Path(importlib.util.find_spec("xllamacpp").origin).parent
        self._library = library = ctypes.CDLL(str(next(folder.glob("xllamacpp*.so"))))

        class Params(ctypes.Structure):  # larger than llama_model_params, which goes by value
            _fields_ = (("bytes", ctypes.c_ubyte * 256),)

        log = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
        self._quiet = log(lambda *_: None)
        library.llama_log_set.argtypes = [log, ctypes.c_void_p]
        library.llama_log_set(self._quiet, None)
        library.llama_model_default_params.restype = Params
        library.llama_model_load_from_file.argtypes = [ctypes.c_char_p, Params]
        for name in ("llama_model_load_from_file", "llama_model_get_vocab"):
            getattr(library, name).restype = ctypes.c_void_p
        library.llama_model_get_vocab.argtypes = library.llama_vocab_n_tokens.argtypes = [ctypes.c_void_p]
        ids = ctypes.POINTER(ctypes.c_int32)
        library.llama_tokenize.argtypes = [
            *(ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int32, ids, ctypes.c_int32, ctypes.c_bool, ctypes.c_bool)
        ]
        library.llama_vocab_is_eog.argtypes = [ctypes.c_void_p, ctypes.c_int32]
        library.llama_vocab_is_eog.restype = ctypes.c_bool
        params = library.llama_model_default_params()
        params.bytes[72] = 1  # vocab_only
        model = library.llama_model_load_from_file(str(path).encode(), params)
        assert model, f"llama.cpp cannot load {path}"
        self._vocab = library.llama_model_get_vocab(model)

    def ids(self, text: str, prompt: bool) -> list[int]:
        """Ids of a prompt, with the tokens around it, or of a document."""
        data = text.encode()
        room = 2 * len(data) + 16
        out = (ctypes.c_int32 * room)()
        count = self._library.llama_tokenize(self._vocab, data, len(data), out, room, prompt, prompt)
        return list(out[:count])

    def ends(self) -> set[int]:
        count = self._library.llama_vocab_n_tokens(self._vocab)
        return {id for id in range(count) if self._library.llama_vocab_is_eog(self._vocab, id)}


def main() -> None:
    from gptjax.convert.gguf_vocabulary import CUTS

    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, values in vocabularies(list(CUTS)):
            write(Path(folder, name), **values)
            reference = LlamaCpp(Path(folder, name))
            prompts = [reference.ids(text, prompt=True) for text in SAMPLES]
            documents = [reference.ids(text, prompt=False) for text in SAMPLES]
            found[name] = {
                "prompts": digest(prompts),
                "documents": digest(documents),
                "ends": sorted(reference.ends()),
            }
    DIGESTS.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
