"""Make a tokenizer from the files in a folder, by the rules of `transformers` 5.24 (AutoTokenizer).

A tokenizer.json alone does not decide the ids. A class that the files name (or that belongs to the `model_type`) may
rebuild everything but the vocabulary and the merges, and further tokens stand in tokenizer_config.json,
special_tokens_map.json and added_tokens.json.

Sources: transformers, models/auto/tokenization_auto.py, tokenization_utils_base.py (`_from_pretrained`),
tokenization_utils_tokenizers.py (`TokenizersBackend`), and the tokenization_*.py of each class.
"""

import json
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import tokenizers
from tokenizers import AddedToken, decoders, normalizers, pre_tokenizers

from gptjax.errors import UserError
from gptjax.tokenizers.bpe import QWEN2_PATTERN, bpe_model, cut_by_pattern, read_merges

# The files of a tokenizer, and the model's config.json, which can name its class.
FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "chat_template.jinja", "config.json"),
)
BACKEND = "TokenizersBackend"  # the class that uses a tokenizer.json unchanged
# The class of a `model_type` whose files name none; a type that is not here has BACKEND.
CLASS_OF_MODEL = {
    **dict.fromkeys(
        ("gpt2", "gpt_neo", "gptj", "phi", "opt", "codegen", "dbrx", "jais2", "starcoder2", "emu3"), "GPT2Tokenizer"
    ),
    **dict.fromkeys(("qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "qwen3_next"), "Qwen2Tokenizer"),
    **dict.fromkeys(("gpt_neox", "mamba", "mamba2", "mpt", "olmo", "olmoe", "rwkv", "xlstm"), "GPTNeoXTokenizer"),
    **dict.fromkeys(("gemma", "gemma2", "gemma3", "gemma3_text", "recurrent_gemma"), "GemmaTokenizer"),
    **dict.fromkeys(
        ("mistral", "mistral3", "ministral", "mixtral", "olmo2", "olmo3", "stablelm", "granite"), BACKEND
    ),
    **dict.fromkeys(("phi3", "phimoe", "nemotron", "internlm2", "modernbert-decoder", "gpt_bigcode"), BACKEND),
    **dict.fromkeys(("glm", "glm4", "flex_olmo", "granitemoe", "granitemoehybrid", "persimmon", "jamba"), BACKEND),
}
# Types whose class is taken even where the files name another, because published files name a wrong one.
DECLARED_WRONGLY = {"phi3", "phimoe", "nemotron", "internlm2", "modernbert-decoder", "jamba", "qwen2"}
# Classes of transformers with rules of their own that are not followed here.
OTHER_CLASSES = re.compile(
    r"(Albert|Bart|Barthez|Bartpho|BertGeneration|BertJapanese|Bert|Bertweet|BigBird|BioGpt|BlenderbotSmall|"
    r"Blenderbot|ByT5|CLIP|CTRL|Camembert|Canine|Clvp|CodeGen|CodeLlama|Cohere|CpmAnt|Cpm|DPRQuestionEncoder|"
    r"DebertaV2|Deberta|DistilBert|Electra|Esm|FNet|FSMT|Flaubert|Funnel|GPTNeoXJapanese|GPTSw3|Herbert|LED|"
    r"LayoutLMv2|LayoutLMv3|LayoutXLM|Luke|Lxmert|M2M100|MBart50|MBart|MLuke|MPNet|Marian|MarkupLM|Mgpstr|"
    r"MobileBert|Mvp|MyT5|Nllb|Nougat|OpenAIGPT|PLBart|Parakeet|Pegasus|Perceiver|Phobert|ProphetNet|Qwen3_5|"
    r"Reformer|RemBert|RoCBert|RoFormer|Roberta|SeamlessM4T|Siglip2|Siglip|Speech2Text|SpeechT5|Splinter|T5|"
    r"Tapas|Udop|Vits|Wav2Vec2CTC|Whisper|XGLM|XLMRoberta|XLM|XLNet)Tokenizer"
)
# The named special tokens, in the order in which those that the vocabulary lacks are given ids.
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_END = "<|endoftext|>"
DEFAULT_TOKENS: dict[str, dict[str, str | None]] = {
    "GPT2Tokenizer": {"unk_token": _END, "bos_token": _END, "eos_token": _END},
    "Qwen2Tokenizer": {"unk_token": _END, "eos_token": _END, "pad_token": _END},
    "GPTNeoXTokenizer": {"unk_token": _END, "bos_token": _END, "eos_token": _END, "pad_token": "<|padding|>"},
    "LlamaTokenizer": {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"},
    "GemmaTokenizer": {
        "unk_token": "<unk>",
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
        "mask_token": "<mask>",
    },
}


class Facts(NamedTuple):
    """The content of the files besides the vocabulary.

    Attributes:
        options: of tokenizer_config.json, with special_tokens_map.json where that counts.
        named: special tokens by their role, `eos_token` and so on, and those of a model's own roles.
        extra: further special tokens.
        added: tokens by id, from `added_tokens_decoder`, added_tokens.json and tokenizer.json.
    """

    options: dict[str, Any]
    named: dict[str, AddedToken]
    extra: list[AddedToken]
    added: dict[int, AddedToken]


def json_object(files: Mapping[str, str], name: str) -> dict[str, Any]:
    """Return the JSON object of a file, empty where there is no such file; raise UserError for anything else."""
    try:
        values = json.loads(files.get(name, "{}"))
    except json.JSONDecodeError as error:
        raise UserError(f"{name} is not JSON: {error.msg} at line {error.lineno}") from None
    if not isinstance(values, dict):
        raise UserError(f"{name} must hold a JSON object")
    return values


def token_text(token: Any) -> str | None:
    """Return the text of a special token, which is written as its text or as an object with its `content`."""
    return token.get("content") if isinstance(token, dict) else token


def options_of(files: Mapping[str, str]) -> dict[str, Any]:
    """Return tokenizer_config.json, and over it special_tokens_map.json where there is no `added_tokens_decoder`."""
    options = json_object(files, "tokenizer_config.json")
    if "added_tokens_decoder" in options:
        return options
    return {**options, **json_object(files, "special_tokens_map.json")}


def tokenizer_class(files: Mapping[str, str]) -> str:
    """Return the name of the class whose rules AutoTokenizer follows.

    Raises:
        UserError: it is one whose rules are not known here.
    """
    config = json_object(files, "config.json")
    kind = config.get("model_type")
    declared = json_object(files, "tokenizer_config.json").get("tokenizer_class") or config.get("tokenizer_class")
    registered = CLASS_OF_MODEL.get(str(kind))
    if declared is None:
        return registered or BACKEND
    found = str(declared).removesuffix("Fast")
    byte_level = '"ByteLevel"' in files.get("tokenizer.json", "")
    if found == "LlamaTokenizer" and byte_level and kind not in DECLARED_WRONGLY:
        return BACKEND  # Llama 3's files name Llama 2's class
    if registered is not None and registered != found:
        found = registered if registered == BACKEND or kind in DECLARED_WRONGLY else found
    if OTHER_CLASSES.fullmatch(found):
        raise UserError(
            f"tokenizer_config.json names the class {declared!r}, whose rules are not known here; if tokenizer.json "
            "contains them all, give only that file in a folder"
        )
    return found if found in DEFAULT_TOKENS else BACKEND


def read_facts(files: Mapping[str, str], defaults: Mapping[str, str | None]) -> Facts:
    """Return the files' content besides the vocabulary; `defaults` are the class's own special tokens.

    Raises:
        UserError: a file is damaged.
    """
    options = options_of(files)
    added: dict[int, AddedToken] = {}
    roles = {**defaults, **{key: value for key, value in options.items() if key.endswith("_token")}}
    extra = _extra_tokens(files, options)
    if isinstance(extra, dict):  # a model's own roles
        roles, extra = {**roles, **extra}, []
    special = {token_text(token) for token in [*roles.values(), *extra] if isinstance(token, str | dict)}
    if "added_tokens_decoder" in options:
        for id, token in options["added_tokens_decoder"].items():
            added[int(id)] = _added_token(token)
    else:
        for text, id in json_object(files, "added_tokens.json").items():
            added[id] = AddedToken(text, normalized=text not in special, special=text in special)
        for token in json_object(files, "tokenizer.json").get("added_tokens", []):
            added[token["id"]] = _added_token(token)
    from_map = set() if "added_tokens_decoder" in options else json_object(files, "special_tokens_map.json").keys()
    known = {token.content: token for token in added.values()}
    named = {
        role: known.get(token_text(token)) or _added_token(token, special=role in from_map)
        for role, token in sorted(roles.items(), key=_order)
        if isinstance(token, str | dict)
    }
    return Facts(options, named, [_added_token(token) for token in extra], added)


def _order(role: tuple[str, Any]) -> int:
    return NAMED.index(role[0]) if role[0] in NAMED else len(NAMED)


def _extra_tokens(files: Mapping[str, str], options: Mapping[str, Any]) -> Any:
    """Return special tokens without a role, from a list or an object by role; tokenizer_config.json's precede the
    map's.
    """
    config = json_object(files, "tokenizer_config.json")
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    if "added_tokens_decoder" in config or isinstance(extra, dict):
        return extra
    mapped = options.get("extra_special_tokens") or []
    if isinstance(mapped, dict):
        return mapped
    return [*extra, *(token for token in mapped if token not in extra)] or options.get(
        "additional_special_tokens", []
    )


def _added_token(token: str | dict[str, Any], special: bool = False) -> AddedToken:
    if isinstance(token, str):
        return AddedToken(token, special=True)
    flags = {key: value for key, value in token.items() if key not in ("id", "__type")}
    return AddedToken(**flags | ({"special": True} if special else {}))


def make_backend(files: Mapping[str, str]) -> tuple[tokenizers.Tokenizer, Facts]:
    """Return the tokenizer that AutoTokenizer makes of these files, without truncation and padding.

    Raises:
        UserError: files are missing or damaged, or their class is not known here.
    """
    whole = from_json(files["tokenizer.json"]) if "tokenizer.json" in files else None
    name = tokenizer_class(files)
    facts = read_facts(files, DEFAULT_TOKENS.get(name, {}))
    if name == BACKEND and whole is None:
        name = _class_of_vocabulary(files)
        facts = read_facts(files, DEFAULT_TOKENS[name])
    made = whole if name == BACKEND else _rebuilt(name, files, facts)
    if whole is not None and whole.post_processor is not None:
        made.post_processor = whole.post_processor
    _add_tokens(made, facts)
    if name == "Qwen2Tokenizer":
        made.add_tokens([AddedToken(token.content, special=True) for token in [*facts.named.values(), *facts.extra]])
    # A tokenizer.json has its own post-processor, but GPT-NeoX's class ignores it.
    ends = facts.options if whole is None else {}
    if name == "GPTNeoXTokenizer" or made.post_processor is None or {"add_bos_token", "add_eos_token"} & ends.keys():
        _surround(made, facts, bool(ends.get("add_bos_token")), bool(ends.get("add_eos_token")))
    return made, facts


def from_json(text: str) -> tokenizers.Tokenizer:
    """Return the tokenizer of a tokenizer.json; without truncation and padding, which may be saved in it.

    Raises:
        UserError: it is not one.
    """
    try:
        made = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises Exception itself
        raise UserError(f"tokenizer.json is not a tokenizer of Hugging Face: {str(error)[:300]}") from None
    made.no_truncation()
    made.no_padding()
    return made


def _class_of_vocabulary(files: Mapping[str, str]) -> str:
    """Return the class for vocab.json and merges.txt without a tokenizer.json: GPT-2's, where the files name none."""
    config = json_object(files, "config.json")
    declared = json_object(files, "tokenizer_config.json").get("tokenizer_class") or config.get("tokenizer_class")
    if declared is None and config.get("model_type") is None:
        return "GPT2Tokenizer"
    raise UserError(
        f"vocab.json and merges.txt do not say how {declared or config['model_type']!r} cuts a text into words; in "
        "Python, AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR) writes the tokenizer.json that is missing"
    )


def _rebuilt(name: str, files: Mapping[str, str], facts: Facts) -> tokenizers.Tokenizer:
    """Return the tokenizer of a class that takes only vocabulary and merges from the files."""
    if "tokenizer.json" in files:
        model = json_object(files, "tokenizer.json").get("model", {})
        vocab, pairs = model.get("vocab"), model.get("merges")
        if not isinstance(vocab, dict) or pairs is None:
            raise UserError(f"tokenizer.json holds a {model.get('type')} model, and the class {name} needs a BPE")
        merges = [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in pairs]
    elif name in ("LlamaTokenizer", "GemmaTokenizer"):
        raise UserError(f"the class {name} needs a tokenizer.json, which is not among the files")
    else:
        vocab, merges = json_object(files, "vocab.json"), read_merges(files["merges.txt"])
    return _BUILD[name](vocab, merges, facts)


def _gpt2(vocab: dict[str, int], merges: list[tuple[str, str]], facts: Facts) -> tokenizers.Tokenizer:
    made = tokenizers.Tokenizer(bpe_model(vocab, merges))
    prefix = bool(facts.options.get("add_prefix_space"))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    made.decoder = decoders.ByteLevel()
    return made


def _gpt_neox(vocab: dict[str, int], merges: list[tuple[str, str]], facts: Facts) -> tokenizers.Tokenizer:
    made = _gpt2(vocab, merges, facts)
    made.normalizer = normalizers.NFC()
    return made


def _qwen2(vocab: dict[str, int], merges: list[tuple[str, str]], facts: Facts) -> tokenizers.Tokenizer:
    made = tokenizers.Tokenizer(bpe_model(vocab, merges))
    made.normalizer = normalizers.NFC()
    prefix = bool(facts.options.get("add_prefix_space"))
    made.pre_tokenizer = pre_tokenizers.Sequence(cut_by_pattern(QWEN2_PATTERN, prefix))
    made.decoder = decoders.ByteLevel()
    return made


def _llama(vocab: dict[str, int], merges: list[tuple[str, str]], facts: Facts) -> tokenizers.Tokenizer:
    made = tokenizers.Tokenizer(bpe_model(vocab, merges, fuse_unk=True, byte_fallback=True))
    given = facts.options.get("add_prefix_space")
    prefix = given if given is not None else True
    scheme = "never" if not prefix else "always" if facts.options.get("legacy") else "first"
    made.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme, split=False)
    strip = [decoders.Strip(content=" ", left=1)] if prefix else []
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    return made


def _gemma(vocab: dict[str, int], merges: list[tuple[str, str]], facts: Facts) -> tokenizers.Tokenizer:
    named = facts.named.get("unk_token")
    unknown = "None" if named is None else named.content  # as transformers writes it: then unknown text has no ids
    made = tokenizers.Tokenizer(bpe_model(vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    made.normalizer = normalizers.Replace(" ", "▁")
    made.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return made


_BUILD = {
    "GPT2Tokenizer": _gpt2,
    "GPTNeoXTokenizer": _gpt_neox,
    "Qwen2Tokenizer": _qwen2,
    "LlamaTokenizer": _llama,
    "GemmaTokenizer": _gemma,
}


def _add_tokens(made: tokenizers.Tokenizer, facts: Facts) -> None:
    """Add the tokens that the files list, the named ones, then the extra ones; a token with a role is special."""
    wanted = [token for _, token in sorted(facts.added.items())]
    known = {token.content for token in [*made.get_added_tokens_decoder().values(), *wanted]}
    roles = {token.content for token in facts.named.values()}
    for token in [*facts.named.values(), *facts.extra]:
        if token.content not in known:
            wanted.append(token)
            known.add(token.content)
    for token in wanted:
        token.special = token.special or token.content in roles
    if wanted:
        made.add_tokens(wanted)


def _surround(made: tokenizers.Tokenizer, facts: Facts, before: bool, after: bool) -> None:
    """Put the begin and end tokens around a text, where they are requested and named."""
    first = facts.named.get("bos_token") if before else None
    last = facts.named.get("eos_token") if after else None
    parts = [f"{first.content}:0"] if first else []
    parts += ["$A:0", *([f"{last.content}:0"] if last else [])]
    special = {token.content: made.token_to_id(token.content) for token in (first, last) if token}
    made.post_processor = tokenizers.processors.TemplateProcessing(single=parts, special_tokens=list(special.items()))


def settle(files: Mapping[str, str]) -> dict[str, str]:
    """Return files that hold the whole tokenizer in tokenizer.json and name no class that rebuilds it.

    Files that already do are returned unchanged, except the model's config.json, which is dropped.

    Raises:
        UserError: as `make_backend`.
    """
    made, facts = make_backend(files)
    kept = {name: files[name] for name in files if name not in ("config.json", "vocab.json", "merges.txt")}
    if "tokenizer.json" in files and _form(made) == _form(from_json(files["tokenizer.json"])):
        return kept
    applied = ("add_bos_token", "add_eos_token", "add_prefix_space", "legacy", "added_tokens_decoder")
    options = {key: value for key, value in facts.options.items() if key not in applied}
    options |= {"tokenizer_class": "PreTrainedTokenizerFast"}
    options |= {role: token.content for role, token in facts.named.items()}
    kept["tokenizer.json"] = made.to_str()
    kept["tokenizer_config.json"] = json.dumps(options, indent=2, ensure_ascii=False) + "\n"
    return {name: text for name, text in kept.items() if name not in ("special_tokens_map.json", "added_tokens.json")}


def files_beside(files: Mapping[str, str], model_type: str) -> tuple[dict[str, str], bool]:
    """Return files from which AutoTokenizer makes a tokenizer.json's ids beside a model of this type, and whether so.

    For some types it rebuilds every tokenizer by the rules of its own class, and no file prevents that.
    """
    options = {**json_object(files, "tokenizer_config.json"), "tokenizer_class": "PreTrainedTokenizerFast"}
    plain = {**files, "tokenizer_config.json": json.dumps(options, indent=2, ensure_ascii=False) + "\n"}
    for several in (dict(files), plain):
        try:
            if settle({**several, "config.json": json.dumps({"model_type": model_type})}) == several:
                return several, True
        except UserError:  # the class does not support this tokenizer
            continue
    return plain, False


def _form(made: tokenizers.Tokenizer) -> Any:
    """Return a tokenizer's JSON for comparison, in which an empty text means none and offsets are omitted."""
    return _without_offsets(json.loads(made.to_str()))


def _without_offsets(value: Any) -> Any:
    if isinstance(value, dict):
        large = ("vocab", "merges")
        items = {key: item for key, item in value.items() if key != "trim_offsets"}
        return {key: item if key in large else _without_offsets(item) for key, item in items.items()}
    if isinstance(value, list):
        return [_without_offsets(item) for item in value]
    return None if value == "" else value
