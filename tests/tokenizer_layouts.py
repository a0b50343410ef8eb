"""Folders with a tokenizer in the ways in which models carry one."""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers

CLASSES = (
    *(None, "PreTrainedTokenizerFast", "TokenizersBackend", "GPT2Tokenizer", "GPT2TokenizerFast", "Qwen2Tokenizer"),
    *("LlamaTokenizer", "LlamaTokenizerFast", "GPTNeoXTokenizerFast", "GemmaTokenizer", "InternLM2Tokenizer"),
)
MODELS = ("gpt2", "llama", "mistral", "qwen2", "qwen3", "gpt_neox", "gemma", "phi3", "olmo2")
_NEW = {"content": "<|new|>", "lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
_EXTRA = {**_NEW, "content": "<|extra|>", "lstrip": True, "rstrip": True, "special": False, "normalized": True}
# What a tokenizer_config.json says, and files beside it; N is the size of the vocabulary.
CONFIGS: dict[str, dict] = {
    "plain": {},
    "named": {"eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>", "pad_token": None},
    "objects": {"eos_token": {**_NEW, "__type": "AddedToken"}, "bos_token": {**_EXTRA, "__type": "AddedToken"}},
    "decoder": {"added_tokens_decoder": {"N": {**_NEW, "special": True}}, "eos_token": "<|new|>"},
    "decoder-flags": {"added_tokens_decoder": {"N": _EXTRA, "N1": {**_NEW, "single_word": True, "special": False}}},
    "decoder-of-old": {"added_tokens_decoder": {"0": {**_EXTRA, "content": "<|endoftext|>", "special": True}}},
    "decoder-and-files": {
        "added_tokens_decoder": {"N": {**_NEW, "special": True}},
        "files": {"added_tokens.json": {"<|user|>": "N"}, "special_tokens_map.json": {"eos_token": "<|user|>"}},
    },
    "added": {"files": {"added_tokens.json": {"<|user|>": "N", "<|extra|>": "N1"}}},
    "added-special": {"eos_token": "<|user|>", "files": {"added_tokens.json": {"<|user|>": "N", "<|extra|>": "N1"}}},
    "map": {"eos_token": "</s>", "files": {"special_tokens_map.json": {"eos_token": "<|user|>", "pad_token": _NEW}}},
    "map-extra": {"files": {"special_tokens_map.json": {"additional_special_tokens": ["<|user|>", "<|extra|>"]}}},
    "extra": {"additional_special_tokens": ["<|im_start|>", "<|im_end|>"], "model_max_length": 5},
    "extra-v5": {"extra_special_tokens": ["<|im_start|>"], "additional_special_tokens": ["<|im_end|>"]},
    "roles": {"extra_special_tokens": {"image_token": "<|user|>"}, "audio_token": "<|extra|>"},
    "bos": {"add_bos_token": True, "bos_token": "<s>"},
    "both-ends": {"add_bos_token": True, "add_eos_token": True, "bos_token": "<s>", "eos_token": "</s>"},
    "unnamed-bos": {"add_bos_token": True, "bos_token": None},
    "prefix": {"add_prefix_space": True},
    "no-prefix": {"add_prefix_space": False, "legacy": True},
    "legacy": {"legacy": True},
    "clean": {"clean_up_tokenization_spaces": True},
    "split": {"split_special_tokens": True},
    "null": {"eos_token": None, "unk_token": None, "bos_token": None},
}


class Layout(NamedTuple):
    """One way to carry a tokenizer: which one, as which files, of which class, in a model of which type."""

    base: str
    files: str
    tokenizer_class: str | None
    model: str
    config: str


def layouts() -> Iterator[Layout]:
    """All of them."""
    bases = [(base, "json") for base in BASES] + [("byte-level", "vocabulary"), ("byte-level", "both")]
    for (base, files), kind, model, config in itertools.product(bases, CLASSES, MODELS, CONFIGS):
        yield Layout(base, files, kind, model, config)


def write_layout(layout: Layout, spec: dict, folder: Path) -> None:
    """Write the files of a layout; `spec` is its tokenizer.json."""
    folder.mkdir()
    config = json.loads(json.dumps(CONFIGS[layout.config]))
    size = 1 + max([token["id"] for token in spec["added_tokens"]] + _ids(spec["model"]["vocab"]))
    named = {"N": size, "N1": size + 1}
    beside = config.pop("files", {})
    if "added_tokens_decoder" in config:
        decoder = config["added_tokens_decoder"].items()
        config["added_tokens_decoder"] = {str(named.get(id, id)): token for id, token in decoder}
    if "added_tokens.json" in beside:
        beside["added_tokens.json"] = {token: named[id] for token, id in beside["added_tokens.json"].items()}
    if layout.tokenizer_class is not None:
        config["tokenizer_class"] = layout.tokenizer_class
    if config:
        beside["tokenizer_config.json"] = config
    beside["config.json"] = {"model_type": layout.model}
    if layout.files != "json":
        beside["vocab.json"] = spec["model"]["vocab"]
        merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in spec["model"]["merges"]]
        (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    if layout.files != "vocabulary":
        beside["tokenizer.json"] = spec
    for name, values in beside.items():
        (folder / name).write_text(json.dumps(values))


def _ids(vocab: dict | list) -> list[int]:
    return list(vocab.values()) if isinstance(vocab, dict) else [len(vocab) - 1]


SPECIAL = ["<|endoftext|>", "<s>", "</s>", "<unk>", "<pad>"]


def _trained(made: tokenizers.Tokenizer, trainer, file: Path) -> tokenizers.Tokenizer:
    made.train([str(file)], trainer)
    return made


def byte_level(file: Path) -> tokenizers.Tokenizer:
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.post_processor = processors.ByteLevel(trim_offsets=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, show_progress=False, special_tokens=SPECIAL, initial_alphabet=alphabet
    )
    return _trained(made, trainer, file)


def byte_fallback(file: Path) -> tokenizers.Tokenizer:
    """As Llama 2's: SentencePiece's marks for spaces, bytes for what the vocabulary lacks."""
    made = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    strip = [decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), *strip])
    tokens = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=600, show_progress=False, special_tokens=tokens)
    _trained(made, trainer, file)
    spec = json.loads(made.to_str())  # the bytes are pieces of the vocabulary, and no special tokens
    spec["added_tokens"] = [token for token in spec["added_tokens"] if not token["content"].startswith("<0x")]
    made = tokenizers.Tokenizer.from_str(json.dumps(spec))
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", made.token_to_id("<s>"))]
    )
    return made


def unigram(file: Path) -> tokenizers.Tokenizer:
    """As T5's."""
    made = tokenizers.Tokenizer(models.Unigram())
    made.normalizer = normalizers.NFKC()
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=300, show_progress=False, special_tokens=SPECIAL, unk_token="<unk>")
    return _trained(made, trainer, file)


def word_pieces(file: Path) -> tokenizers.Tokenizer:
    """As BERT's."""
    made = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece(cleanup=False)
    tokens = ["[UNK]", "[CLS]", "[SEP]", *SPECIAL]
    trainer = trainers.WordPieceTrainer(vocab_size=300, show_progress=False, special_tokens=tokens)
    _trained(made, trainer, file)
    made.add_tokens([AddedToken("<|user|>", single_word=True, lstrip=True)])
    return made


def padded_pattern(file: Path) -> tokenizers.Tokenizer:
    """As Llama 3's, with padding and truncation left on, and tokens outside the vocabulary."""
    from gptjax.tokenizers.bpe import LLAMA3_PATTERN, cut_by_pattern

    made = tokenizers.Tokenizer(models.BPE(ignore_merges=True))
    made.pre_tokenizer = pre_tokenizers.Sequence(cut_by_pattern(LLAMA3_PATTERN))
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    _trained(made, trainers.BpeTrainer(vocab_size=450, show_progress=False, initial_alphabet=alphabet), file)
    made.add_special_tokens(["<|begin|>", "<|eot_id|>", *SPECIAL])
    first = [("<|begin|>", made.token_to_id("<|begin|>"))]
    made.post_processor = processors.TemplateProcessing(single="<|begin|> $A", special_tokens=first)
    made.enable_padding(pad_id=0, pad_token="<pad>", length=9)
    made.enable_truncation(4)
    return made


BASES = {
    "byte-level": byte_level,
    "byte-fallback": byte_fallback,
    "unigram": unigram,
    "word-pieces": word_pieces,
    "padded-pattern": padded_pattern,
}
