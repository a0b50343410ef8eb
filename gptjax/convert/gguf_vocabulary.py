"""The tokenizer in a GGUF file's metadata, with the ids of llama.cpp.

Source: github.com/ggml-org/llama.cpp, src/llama-vocab.cpp, compared in tests/test_gguf_vocabulary.py.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
from tokenizers import AddedToken, Regex, decoders, normalizers, pre_tokenizers, processors

from gptjax.errors import UserError
from gptjax.tokenizers import HuggingFaceTokenizer, NoTokenizer, Tokenizer, bpe_model

UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4  # of `tokenizer.ggml.token_type`
NO_MERGE = "<none> <none>"  # stands in a file of a vocabulary without merges, since llama.cpp demands one
_CONTRACTIONS = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_BLOOM = r" ?[^(\s|.,!?…。，、।۔،)]+"


def _modern(digits: str) -> str:
    return _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|" + digits + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|" + _SPACES


def _cased(digits: str, ending: str) -> str:
    """Return the pattern of words cut where lower case turns to upper case, as GPT-4o's and Mistral's Tekken do."""
    letters, upper, lower = r"[^\r\n\p{L}\p{N}]?", r"((?=[\p{L}])([^a-z]))", r"((?=[\p{L}])([^A-Z]))"
    words = f"{letters}{upper}*{lower}+{ending}|{letters}{upper}+{lower}*{ending}"
    return f"{words}|{digits}" + r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|" + _SPACES


class Cut(NamedTuple):
    """How a text is cut into words before the merges.

    Attributes:
        patterns: regular expressions, each applied to what the one before has left.
        ignore_merges: whether a word that is a token is taken whole, whatever the merges make of it.
        add_bos: whether the begin token goes before a prompt where the file does not say.
    """

    patterns: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False


# By `tokenizer.ggml.pre`.
CUTS: dict[str, Cut] = {
    "default": Cut((r"[\p{P}\$\+<=>\^~\|]+", _WORDS, r"\p{N}+", "[0-9][0-9][0-9]")),
    **dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "exaone4", "gigachat"), Cut((_WORDS,))),
    **dict.fromkeys(
        ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"), Cut((r"\p{N}", _WORDS))
    ),
    **dict.fromkeys(
        ("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"),
        Cut((_modern(r"\p{N}{1,3}"),), ignore_merges=True, add_bos=True),
    ),
    **dict.fromkeys(("dbrx", "smaug-bpe", "chatglm-bpe"), Cut((_modern(r"\p{N}{1,3}"),))),
    "glm4": Cut((_modern(r"\p{N}{1,3}"),), ignore_merges=True),
    **dict.fromkeys(("qwen2", "stablelm2", "deepseek-r1-qwen", "megrez", "hunyuan"), Cut((_modern(r"\p{N}"),))),
    "falcon": Cut((r"[\p{P}\$\+<=>\^~\|`]+", _WORDS, "[0-9][0-9][0-9]")),
    "tekken": Cut((_cased(r"\p{N}", ""),), ignore_merges=True, add_bos=True),
    **dict.fromkeys(("gpt-4o", "llama4", "kanana2"), Cut((_cased(r"\p{N}{1,3}", f"{_CONTRACTIONS}?"),))),
    **dict.fromkeys(("bloom", "poro-chat", "gpt3-finnish"), Cut((_BLOOM,))),
    "viking": Cut((_BLOOM, r"\p{N}")),
    "seed-coder": Cut((_CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}\r\n]+|" + _SPACES,)),
}
# Tokens that end a text whatever the file says, and those that only are no text.
ENDS = {
    *("<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>"),
    *("<|endoftext|>", "<|eom_id|>", "<EOT>", "_<EOT>", "<|end_of_text|>", "<end_of_utterance>", "</s>", "<eos>"),
    *("<｜end▁of▁sentence｜>", "[EOS]", "<turn|>", "[EOT]", "[e~[", "<|tool_response>"),
    *("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>"),
    *("<reponame>", "<|file_sep|>"),
}
CONTROLS = {
    *("<|fim_prefix|>", "<fim-prefix>", "<fim_prefix>", "<｜fim▁begin｜>", "<PRE>", "▁<PRE>"),
    *("<|fim_suffix|>", "<fim-suffix>", "<fim_suffix>", "<｜fim▁hole｜>", "<SUF>", "▁<SUF>"),
    *("<|fim_middle|>", "<fim-middle>", "<fim_middle>", "<｜fim▁end｜>", "<MID>", "▁<MID>"),
}
# Harmony's messages end with <|end|>, and only its turns with these.
HARMONY = ({"<|return|>", "<|call|>"}, {"<|calls|>", "<|flush|>"})


class Vocabulary(NamedTuple):
    """What the metadata say.

    Attributes:
        tokens: by id.
        types: of the tokens, by id; those that are no text by their name are CONTROL.
        named: id by role, `bos`, `eos`, `unknown` and so on.
        fields: the metadata, without `tokenizer.ggml.` before their names.
    """

    tokens: list[str]
    types: list[int]
    named: dict[str, int]
    fields: dict[str, Any]


def gguf_tokenizer(path: Path, metadata: Mapping[str, Any]) -> Tokenizer:
    """Return the tokenizer that a GGUF file's metadata describe; one that raises when used where they describe none.

    Raises:
        UserError: a kind that is not known here, or metadata that do not fit together.
    """
    before = "tokenizer.ggml."
    fields = {name.removeprefix(before): value for name, value in metadata.items() if name.startswith(before)}
    fields["name"] = str(metadata.get("general.name", ""))
    kind = fields.get("model")
    if kind in (None, "none", "no_vocab"):
        return NoTokenizer()
    if kind not in _MAKE:
        raise UserError(
            f"{str(path)!r}: its tokenizer is of the kind {kind!r}, and known here are {', '.join(_MAKE)}; give the "
            "Hugging Face directory"
        )
    try:
        made, vocabulary = _MAKE[kind](fields)
    except UserError as error:
        raise UserError(f"{str(path)!r}: {error}") from None
    facts = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    roles = (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
    named = vocabulary.named
    facts |= {f"{ours}_token": vocabulary.tokens[named[theirs]] for ours, theirs in roles if theirs in named}
    if "tokenizer.chat_template" in metadata:
        facts["chat_template"] = metadata["tokenizer.chat_template"]
    files = {
        "tokenizer.json": made.to_str(),
        "tokenizer_config.json": json.dumps(facts, indent=2, ensure_ascii=False),
    }
    return HuggingFaceTokenizer(files, end_ids(vocabulary))


def _read(fields: dict[str, Any], usual: Mapping[str, int]) -> Vocabulary:
    """Return the vocabulary of a file's metadata; `usual` gives the ids of roles that the file does not name."""
    tokens = fields.get("tokens")
    if tokens is None:
        raise UserError("its metadata lack tokenizer.ggml.tokens; convert the model again")
    types = list(fields.get("token_type") or [1] * len(tokens))
    types += [1] * (len(tokens) - len(types))
    types = [CONTROL if token in ENDS | CONTROLS else type for token, type in zip(tokens, types, strict=False)]
    roles = ("bos", "eos", "eot", "eom", "unknown", "padding", "fim_pad", "fim_rep", "fim_sep")
    given = {role: fields.get(f"{role}_token_id") for role in roles}
    named = {
        role: id if id is not None and id < len(tokens) else usual.get(role, len(tokens))
        for role, id in given.items()
    }
    return Vocabulary(tokens, types, {role: id for role, id in named.items() if id < len(tokens)}, fields)


def end_ids(vocabulary: Vocabulary) -> list[int]:
    """Return the ids that end a text for llama.cpp: those that the file names, and those of well-known names."""
    present = ENDS.intersection(vocabulary.tokens)
    harmony = "<|end|>" in present and any(names <= present for names in HARMONY)
    by_name = [id for id, token in enumerate(vocabulary.tokens) if token in present]
    by_role = [id for role, id in vocabulary.named.items() if role not in ("bos", "unknown", "padding")]
    found = list(dict.fromkeys([*by_role, *by_name]))
    return [id for id in found if not (harmony and vocabulary.tokens[id] == "<|end|>")]


def _byte_level(fields: dict[str, Any]) -> tuple[tokenizers.Tokenizer, Vocabulary]:
    """Return a byte-level BPE, as GPT-2 has."""
    vocabulary, name = _read(fields, {}), fields.get("pre", "default")
    if name not in CUTS:
        raise UserError(
            f"its tokenizer cuts text as {name!r}, and known here are {', '.join(CUTS)}; give the Hugging Face "
            "directory"
        )
    if "merges" not in fields:
        raise UserError("its metadata lack tokenizer.ggml.merges; convert the model again")
    cut = CUTS[name]
    # A token may hold a space of its own, as the first character.
    ends = [(merge, merge.index(" ", 1)) for merge in fields["merges"] if " " in merge[1:] and merge != NO_MERGE]
    merges = [(merge[:end], merge[end + 1 :]) for merge, end in ends]
    vocab = {token: id for id, token in enumerate(vocabulary.tokens)}
    made = tokenizers.Tokenizer(bpe_model(vocab, merges, ignore_merges=cut.ignore_merges))
    if cut.patterns == (_WORDS,):
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # the same, and faster
    else:
        splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in cut.patterns]
        as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        made.pre_tokenizer = pre_tokenizers.Sequence([*splits, as_bytes])
    made.decoder = decoders.ByteLevel()
    _add_special(made, vocabulary)
    _surround(made, vocabulary, cut.add_bos)
    return made, vocabulary


def _sentencepiece(fields: dict[str, Any]) -> tuple[tokenizers.Tokenizer, Vocabulary]:
    """Return a SentencePiece BPE, as Llama 2 has: pairs are merged in the order of their scores.

    The characters of every token are tokens, too: SentencePiece trains no other vocabulary.
    """
    vocabulary = _read(fields, {"bos": 1, "eos": 2, "unknown": 0})
    vocab = {token: id for id, token in enumerate(vocabulary.tokens)}
    scores = fields.get("scores") or [0.0] * len(vocab)
    merges = _pairs(vocab, scores)
    unknown = vocabulary.tokens[vocabulary.named["unknown"]] if "unknown" in vocabulary.named else None
    made = tokenizers.Tokenizer(bpe_model(vocab, merges, unk_token=unknown, byte_fallback=True))
    prefix = bool(fields.get("add_space_prefix", True))
    marks = [normalizers.Prepend("▁")] if prefix else []
    made.normalizer = normalizers.Sequence([*marks, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    _add_special(made, vocabulary)
    _surround(made, vocabulary, usual_bos=True)
    return made, vocabulary


def _pairs(vocab: Mapping[str, int], scores: Sequence[float]) -> list[tuple[str, str]]:
    """Return all pairs of tokens that make a token, by falling score of the token that they make."""
    found = [
        (-scores[id], id, cut, token)
        for token, id in vocab.items()
        for cut in range(1, len(token))
        if token[:cut] in vocab and token[cut:] in vocab
    ]
    return [(token[:cut], token[cut:]) for _, _, cut, token in sorted(found)]


def _add_special(made: tokenizers.Tokenizer, vocabulary: Vocabulary) -> None:
    """Add the tokens that are no text, and the texts that are never cut, also inside documents."""
    kinds = {CONTROL: True, UNKNOWN: True, USER_DEFINED: False}
    pairs = [(token, type) for token, type in zip(vocabulary.tokens, vocabulary.types, strict=True) if type in kinds]
    # llama.cpp knows Phi-3 by its name: most of its special tokens take the white space behind them.
    phi3 = any(name in vocabulary.fields["name"].lower() for name in ("phi-3", "phi3"))
    kept = ("<unk>", "<s>", "<|endoftext|>")
    made.add_tokens(
        [
            AddedToken(token, special=kinds[type], normalized=False, rstrip=phi3 and token not in kept)
            for token, type in pairs
            if token
        ]
    )


def _surround(made: tokenizers.Tokenizer, vocabulary: Vocabulary, usual_bos: bool) -> None:
    """Add the begin and end tokens around a prompt, where the file or its kind requires them."""
    fields, named, tokens = vocabulary.fields, vocabulary.named, vocabulary.tokens
    first = [tokens[named["bos"]]] if fields.get("add_bos_token", usual_bos) and "bos" in named else []
    last = [tokens[named["eos"]]] if fields.get("add_eos_token", False) and "eos" in named else []
    if first or last:
        parts = [*(f"{token}:0" for token in first), "$A:0", *(f"{token}:0" for token in last)]
        special = [(token, made.token_to_id(token)) for token in {*first, *last}]
        made.post_processor = processors.TemplateProcessing(single=parts, special_tokens=special)


_MAKE = {"gpt2": _byte_level, "llama": _sentencepiece}
