"""Write a run's model as a GGUF file, which llama.cpp runs: weights, tokenizer and chat template.

Source: github.com/ggml-org/llama.cpp, convert_hf_to_gguf.py (`LlamaModel`, `Qwen2Model`, `GPT2Model`), through the
names of tensors that the package `gguf` has.
"""

import json
import os
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import tokenizers
from tokenizers import Regex, pre_tokenizers

from gptjax.config import ModelConfig
from gptjax.convert.export import tokenizer_files
from gptjax.convert.families import FAMILIES
from gptjax.convert.forms import exported_form, family_for
from gptjax.convert.gguf import ARCHITECTURES, ROPE_FACTORS
from gptjax.convert.gguf_vocabulary import CONTROL, CUTS, NO_MERGE, USER_DEFINED
from gptjax.convert.models import on_first_device, open_model
from gptjax.convert.weights import Layout, without_multipliers, write_value
from gptjax.errors import UserError
from gptjax.nn.rotary import rotary_angles
from gptjax.shell.paths import writing
from gptjax.tokenizers import Tokenizer

WRITTEN = ("llama", "qwen2", "qwen3", "gpt2")  # families that are also architectures of llama.cpp
NORMAL, UNUSED = 1, 5  # of `tokenizer.ggml.token_type`, beside those that are read
Q8_BLOCK = 32  # values of a row that share a scale
# A text that the rules of CUTS cut differently: cases, contractions, digits, spaces, line ends, marks, scripts.
PROBE = (
    "Hello world's I'LL we've it'S  3 spaces   and\ttabs\n\n new\r\nlines 1 12 123 1234567 3.14 foo_bar camelCase "
    "HTTPServer don't!!! ...\n\n?? $x^2|y <=> a~b `c` ünïcödé 日本語テキスト 中文，文本。 русский текст हिन्दी "
    "\U0001f469\u200d\U0001f467 e\u0301 end\n/path\n \n  x"
)


def export_gguf(run: str, out: str, type: Literal["f16", "q8_0"] = "f16") -> None:
    """Write a model as one GGUF file. Vectors stay float32; rows that no block of 32 divides stay float16 in q8_0.

    Raises:
        UserError: as `open_model`; llama.cpp has no such model or tokenizer; the file cannot be written.
    """
    try:
        import gguf
    except ImportError:
        raise UserError("writing a GGUF file needs: pip install 'gptjax[hf]' (the package gguf)") from None
    model = open_model(run)
    kind = family_for(model.config, model.meta.get("origin", {}).get("model_type"))
    if kind not in WRITTEN:
        raise UserError(f"{run!r} is a {FAMILIES[kind].title}; a GGUF file can be written of {', '.join(WRITTEN)}")
    scaling = model.config.positions.scaling
    if any(model.config.local_layers) or (scaling is not None and scaling.kind in ("yarn", "longrope")):
        what = "a sliding window" if any(model.config.local_layers) else f"rope scaling {scaling.kind}"
        raise UserError(f"{run!r} has {what}, which no GGUF file can be written with here; export it by to-hf")
    vocabulary = _vocabulary(model.tokenizer, model.config.vocab_size)
    layout = Layout(FAMILIES[kind], exported_form(model.config, kind))
    params = without_multipliers(model.config, model.read(on_first_device(model.config)))
    with writing(out) as path:
        partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
        try:
            writer = gguf.GGUFWriter(partial, kind)
            _add_config(writer, model.config, kind)
            writer.add_file_type({"f16": gguf.LlamaFileType.MOSTLY_F16, "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0}[type])
            writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
            _add_vocabulary(writer, vocabulary, model.tokenizer)
            names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, kind.upper()), model.config.n_layers)
            for name in layout.tensors:
                value = _arranged(write_value(layout, params, name), name, kind, model.config)
                _add_tensor(writer, names.get_name(name, try_suffixes=(".weight", ".bias")), value, type)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)


def _add_config(writer: Any, cfg: ModelConfig, kind: str) -> None:
    """Add what llama.cpp has to know of the model besides its tensors."""
    from gguf import RopeScalingType

    writer.add_block_count(cfg.n_layers)
    writer.add_context_length(cfg.context_length)
    writer.add_embedding_length(cfg.d_model)
    writer.add_feed_forward_length(cfg.mlp_width)
    writer.add_head_count(cfg.n_heads)
    writer.add_vocab_size(cfg.vocab_size)
    if kind == "gpt2":
        writer.add_layer_norm_eps(cfg.norm.eps)
        return
    writer.add_head_count_kv(cfg.kv_heads)
    writer.add_layer_norm_rms_eps(cfg.norm.eps)
    for add in (writer.add_key_length, writer.add_value_length, writer.add_rope_dimension_count):
        add(cfg.d_head)
    writer.add_rope_freq_base(cfg.positions.theta)
    scaling = cfg.positions.scaling
    if scaling is not None and scaling.kind == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(scaling.factor)
    elif scaling is not None:  # llama3: the divisor of every frequency
        one = np.ones((1, 1), np.int32)
        stretched, plain = (
            np.arctan2(sin, cos).ravel()
            for cos, sin in (rotary_angles(one, cfg.d_head, cfg.positions.theta, form) for form in (scaling, None))
        )
        writer.add_tensor(ROPE_FACTORS, (plain / stretched).astype(np.float32))


def _arranged(value: np.ndarray, name: str, kind: str, cfg: ModelConfig) -> np.ndarray:
    """Return a tensor of Hugging Face's as llama.cpp multiplies it."""
    parts = name.split(".")
    if kind == "gpt2" and parts[-1] == "weight" and parts[-2] in ("c_attn", "c_proj", "c_fc"):
        return value.T  # its matrices are written as [in, out]
    heads = {"q_proj": cfg.n_heads, "k_proj": cfg.kv_heads}.get(parts[-2])
    if heads is None or not ARCHITECTURES.get(kind, False):
        return value
    halves = value.reshape(heads, 2, value.shape[0] // heads // 2, -1)  # rotary pairs become neighbours
    return halves.swapaxes(1, 2).reshape(value.shape)


def _add_tensor(writer: Any, name: str, value: np.ndarray, type: str) -> None:
    from gguf import GGMLQuantizationType, quants

    if value.ndim == 1 or name.startswith("position_embd"):
        writer.add_tensor(name, np.ascontiguousarray(value, np.float32))
    elif type == "q8_0" and value.shape[-1] % Q8_BLOCK == 0:
        packed = quants.quantize(np.ascontiguousarray(value, np.float32), GGMLQuantizationType.Q8_0)
        writer.add_tensor(name, packed, raw_dtype=GGMLQuantizationType.Q8_0)
    else:
        writer.add_tensor(name, np.ascontiguousarray(value, np.float16))


def _vocabulary(tokenizer: Tokenizer, size: int) -> dict[str, Any]:
    """Return tokens and types by id, merges, and the name of the rules that cut text; empty without a tokenizer.

    Raises:
        UserError: llama.cpp has no tokenizer of this kind.
    """
    files = tokenizer_files(tokenizer)
    if not files:
        return {}
    made = json.loads(files["tokenizer.json"])
    model = made["model"]
    if model.get("type", "BPE") != "BPE" or "ByteLevel" not in json.dumps(made.get("decoder")):
        raise UserError(
            f"llama.cpp has no tokenizer of this kind ({tokenizer.kind}); only a byte-level BPE can be written: "
            "data.tokenizer byte, gpt2, or one that `gptjax data train-tokenizer` has learned"
        )
    tokens, types = [f"[PAD{id}]" for id in range(size)], [UNUSED] * size
    for token, id in model["vocab"].items():
        tokens[id], types[id] = token, NORMAL
    for added in made.get("added_tokens", ()):
        tokens[added["id"]], types[added["id"]] = added["content"], CONTROL if added["special"] else USER_DEFINED
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model.get("merges", ())]
    return {"tokens": tokens, "types": types, "merges": merges, "pre": _cut_of(files["tokenizer.json"])}


def _cut_of(text: str) -> str:
    """Return llama.cpp's name of the rules by which a tokenizer cuts text, found by what they make of PROBE."""
    given = tokenizers.Tokenizer.from_str(text)
    model = json.loads(text)["model"]
    if not model.get("merges"):
        return "gpt-2"  # without merges every byte is a token, however the text is cut
    wanted = [word for word, _ in given.pre_tokenizer.pre_tokenize_str(PROBE)]
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    for name, cut in CUTS.items():
        splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in cut.patterns]
        words = pre_tokenizers.Sequence([*splits, as_bytes]).pre_tokenize_str(PROBE)
        if cut.ignore_merges == bool(model.get("ignore_merges")) and [word for word, _ in words] == wanted:
            return name
    raise UserError(
        "llama.cpp has no rules that cut text as this tokenizer does, so a GGUF file would have other ids"
    )


def _add_vocabulary(writer: Any, vocabulary: Mapping[str, Any], tokenizer: Tokenizer) -> None:
    """Add the tokenizer, its special tokens and its chat template."""
    if not vocabulary:
        writer.add_tokenizer_model("no_vocab")
        return
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(vocabulary["pre"])
    writer.add_token_list(vocabulary["tokens"])
    writer.add_token_types(vocabulary["types"])
    writer.add_token_merges(vocabulary["merges"] or [NO_MERGE])
    first, alone = tokenizer.encode_prompt("a").tolist(), tokenizer.encode("a").tolist()
    begins = len(first) > len(alone) and first[-len(alone) :] == alone
    writer.add_add_bos_token(begins)
    bos = first[0] if begins else getattr(tokenizer, "bos_id", None)
    if bos is not None:
        writer.add_bos_token_id(bos)
    for add, id in zip((writer.add_eos_token_id, writer.add_eot_token_id), tokenizer.eos_ids, strict=False):
        add(id)
    if tokenizer.chat_template is not None:
        writer.add_chat_template(tokenizer.chat_template)
