"""Identify models that cannot be run here: by their config.json, by their tensors, by the files of their folder. Each
message ends with the remedy.

Source: `transformers` 5.24: the classes of models/auto, utils/quantization_config.py and quantizers/.
"""

import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

# Kind of model, the config keys whose presence identifies it, and a pattern of its families' names.
KINDS: tuple[tuple[str, tuple[str, ...], str], ...] = (
    (
        "a mixture of experts",
        ("num_experts", "num_local_experts", "n_routed_experts", "moe_intermediate_size", "num_experts_per_tok"),
        r"moe|mixtral|dbrx|gpt_oss|deepseek_v[234]|grok|jamba|llama4|arctic|dots1|minimax|qwen3_next|switch_transf",
    ),
    (
        "a multimodal model",
        ("vision_config", "audio_config", "image_token_id", "audio_token_id"),
        r"_vl|vl_|vlm|vision|llava|clip|paligemma|idefics|mllama|pixtral|mistral3|gemma3$|gemma3n|audio|omni|whisper"
        r"|wav2vec|blip|fuyu|florence|internvl|got_ocr|voxtral|csm",
    ),
    ("a state-space or recurrent model", ("ssm_cfg", "state_size", "mamba_d_state"), r"mamba|rwkv|recurrent|zamba"),
    (
        "an encoder-decoder",
        ("decoder_layers", "num_decoder_layers"),
        r"^m?t5|^umt5|longt5|bart|pegasus|marian|m2m|^led$|prophetnet|blenderbot|nllb",
    ),
    (
        "an encoder, which predicts no next token",
        (),
        r"bert|electra|^mpnet|^xlm|nomic|funnel|canine|^esm|longformer|big_bird$|fnet|luke|ernie$|eurobert",
    ),
)
LANGUAGE_HEADS = r"(ForCausalLM|LMHeadModel|DoubleHeadsModel|Model)$"

# `quant_method` -> how `transformers` dequantizes the model; it cannot dequantize the other methods.
_FROM = "in Python: AutoModelForCausalLM.from_pretrained(DIR{}){}.save_pretrained(NEW_DIR)"
DEQUANTIZE = {
    "bitsandbytes": _FROM.format("", ".dequantize()"),
    "fp8": _FROM.format(", quantization_config=FineGrainedFP8Config(dequantize=True)", ""),
    "mxfp4": _FROM.format(", quantization_config=Mxfp4Config(dequantize=True)", ""),
    "compressed-tensors": _FROM.format(", quantization_config=CompressedTensorsConfig(run_compressed=False)", ""),
}
# Patterns of tensor names that identify a quantization, with its `quant_method`.
QUANTIZED_NAMES = (
    (r"\.qzeros$|\.g_idx$|\.qweight$", "gptq or awq"),
    (r"\.(absmax|quant_map|nested_absmax|nested_quant_map|SCB)$|\.quant_state\.bitsandbytes", "bitsandbytes"),
    (r"_blocks$", "mxfp4"),
    (r"\.weight_scale_inv$|\.activation_scale$", "fp8"),
    (r"\.weight_packed$|\.weight_scale$|\.input_scale$|\.weight_zero_point$", "compressed-tensors"),
    (r"\.codebooks$|\.codes$", "aqlm"),
)
# Patterns of tensor names that identify a model, what it is, and the remedy.
FOREIGN_NAMES = (
    (
        r"experts\.|block_sparse_moe|shared_expert",
        "of a mixture of experts",
        "use a Mixtral, a Qwen3-MoE, an OLMoE, a gpt-oss or a dense model",
    ),
    (
        r"vision_tower|vision_model|visual\.|multi_modal_projector|audio_tower",
        "of a multimodal model",
        "save only its language model",
    ),
    (
        r"\.lora_[AB]\.|\.base_layer\.|lora_embedding",
        "of a LoRA adapter",
        "merge it, in Python: PeftModel.from_pretrained(MODEL, ADAPTER).merge_and_unload().save_pretrained(NEW_DIR)",
    ),
    (
        r"(^|\.)(score|classifier|qa_outputs)\.(weight|bias)$",
        "the head of a classifier",
        "give the language model, or in Python: AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW_DIR)",
    ),
)


READ = (".json", ".safetensors", ".jinja", "merges.txt")  # endings of the files that are read


def unknown_family(config: Mapping[str, Any], known: Mapping[str, tuple[str, str]]) -> str:
    """Return a message about a config.json whose `model_type` is unknown.

    Args:
        known: (title, architecture), by model_type.
    """
    kind = config.get("model_type")
    families = "known: " + ", ".join(f"{key} ({title})" for key, (title, _) in known.items())
    classes = config.get("architectures")
    architecture = classes[0] if isinstance(classes, list) and classes and isinstance(classes[0], str) else None
    of_class = next((key for key, (_, name) in known.items() if name == architecture), None)
    if of_class is not None:
        return (
            f"config.json: model_type {kind!r} is not known, but {architecture} is that of {of_class!r}; {families}"
        )
    if not isinstance(kind, str):
        return f"config.json: model_type {kind!r} is not the name of a family; set it to the model's own, {families}"
    what = _what(kind, config)
    if what is not None:
        inner = config.get("text_config")
        text = inner.get("model_type") if isinstance(inner, Mapping) else None
        way = f"its language model, a {text!r}, can be run when it is saved separately; " if text in known else ""
        return f"config.json: model_type {kind!r} is {what}, which cannot be run here; {way}{families}"
    # Many families differ by one letter (ministral, gptj), so only another spelling of a known one is suggested.
    guess = next((f"; did you mean {key!r}?" for key in known if key == re.sub("[^a-z0-9]", "", kind.lower())), "")
    return f"config.json: model_type {kind!r} is not known{guess}; {families}"


def _what(kind: str, config: Mapping[str, Any]) -> str | None:
    for what, keys, _ in KINDS:
        if found := [key for key in keys if config.get(key)]:
            return f"{what} ({found[0]})"
    if config.get("is_encoder_decoder"):
        return "an encoder-decoder"
    return kind_of(kind)


def kind_of(family: str) -> str | None:
    """Return the kind of a family of models by its name; None where the name is unknown."""
    return next((what for what, _, names in KINDS if re.search(names, family)), None)


def another_head(config: Mapping[str, Any]) -> str | None:
    """Return a message for a class without a head for the next token; None for a language model."""
    classes = config.get("architectures")
    name = classes[0] if isinstance(classes, list) and classes else None
    if not isinstance(name, str) or re.search(LANGUAGE_HEADS, name):
        return None
    return f"config.json: its class {name} is no language model; give one whose architectures is ...ForCausalLM"


def quantization(config: Mapping[str, Any], tensors: Iterable[str], dtypes: Iterable[str]) -> str | None:
    """Return a message about a model's quantization, by its config.json or by its tensors; None without one.

    Args:
        dtypes: those of the tensors that hold no plain floats.
    """
    found = [method for pattern, method in QUANTIZED_NAMES if any(re.search(pattern, name) for name in tensors)]
    stated = quantized_by(config)
    if stated is None:
        if not found:
            return None
        method, where = found[0], "by its tensors' names"
    else:
        method, where = stated, "quantization_config in config.json"
    strange = sorted({dtype for dtype in dtypes if dtype not in ("BOOL", "I64")})
    if stated and not found and not strange:
        return (
            f"config.json has a quantization_config ({method}), but its tensors are plain floats; remove that key if "
            "the weights are not quantized"
        )
    stored = f", stored as {', '.join(strange)}" if strange else ""
    instead = f"or {DEQUANTIZE[method]}" if method in DEQUANTIZE else "or a GGUF file of it"
    return (
        f"the model is quantized by {method} ({where}{stored}), which cannot be run here; give the model that it was "
        f"made from, {instead}"
    )


def quantized_by(config: Mapping[str, Any]) -> str | None:
    """Return the method by which a config.json says that its model is quantized; None where it does not."""
    stated = config.get("quantization_config") or config.get("compression_config")
    if not stated:
        return None
    if not isinstance(stated, Mapping):
        return repr(stated)
    if "quant_method" in stated:
        return str(stated["quant_method"]).removeprefix("QuantizationMethod.").lower()
    if stated.get("load_in_8bit") or stated.get("load_in_4bit"):
        return "bitsandbytes"
    return "a method without a name"


def foreign_tensors(extra: Iterable[str]) -> str | None:
    """Return a message about tensors that no model of the family has; None where they identify nothing."""
    extra = list(extra)
    for pattern, what, way in FOREIGN_NAMES:
        if name := next((name for name in extra if re.search(pattern, name)), None):
            return f"the model has an unexpected tensor {name}: {what}, which cannot be run here; {way}"
    return None


def wrapping(found: Iterable[str], wanted: Iterable[str]) -> str | None:
    """Return the prefix of a wrapped model's tensor names, such as torch.compile's `_orig_mod.`; None without."""
    found, last = list(found), max(wanted, key=len)
    prefix = next((name.removesuffix(last) for name in found if name != last and name.endswith(last)), None)
    return prefix or None


def broken_links(folder: Path) -> str | None:
    """Return a message about links to files that are not there, among the files that are read; None without."""
    names = sorted(name for name in os.listdir(folder) if name.endswith(READ) and not name.startswith("consolidated"))
    broken = [name for name in names if not (folder / name).exists()]
    if not broken:
        return None
    return (
        f"{str(folder / broken[0])!r} is a link to {os.readlink(folder / broken[0])!r}, which is not there; copy the "
        "folder with the files that its links name: cp -rL"
    )


def no_weights(folder: Path) -> str:
    """Return a message about a folder that has a config.json and no model.safetensors."""
    if (folder / "adapter_config.json").exists():
        return adapter(folder)
    if others := _names(folder, "*.safetensors"):
        first = others[0]
        if any(re.search(r"-\d+-of-\d+\.safetensors$", name) for name in others):
            return f"{str(folder)!r} holds {first} and no model.safetensors.index.json; copy the index, too"
        return (
            f"{str(folder)!r} holds {first}, but no model.safetensors, the only name that is read; rename it, or "
            f'set "transformers_weights": "{first}" in its config.json'
        )
    if pickles := _names(folder, "*.bin", "*.pt", "*.pth", "*.ckpt"):
        return (
            f"{str(folder / pickles[0])!r} is a pickle, which can run any program when it is loaded; get the "
            "model's safetensors, or in Python: AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW_DIR)"
        )
    if files := _names(folder, "*.gguf"):
        return f"{str(folder)!r} holds no model.safetensors; give the GGUF file itself: {str(folder / files[0])!r}"
    for pattern, what in {"*.h5": "TensorFlow", "*.msgpack": "Flax", "*.onnx": "ONNX"}.items():
        if files := _names(folder, pattern):
            return f"{str(folder / files[0])!r} holds weights for {what}; get the model's safetensors"
    return f"{str(folder)!r} holds no model.safetensors; copy the whole model"


def no_model(folder: Path) -> str | None:
    """Return a message about a folder without a model, by its files; None where they identify nothing."""
    here = repr(str(folder))
    if (folder / "adapter_config.json").exists():
        return adapter(folder)
    if (folder / "params.json").exists():
        return f"{here} holds a model in its maker's own format (params.json); give the Hugging Face directory of it"
    if (folder / "model_index.json").exists():
        return f"{here} holds a pipeline of diffusers (model_index.json), which is no language model"
    if files := _names(folder, "*.gguf"):
        return f"{here} is a folder of GGUF files; give one of them: {str(folder / files[0])!r}"
    if _names(folder, "*.safetensors"):
        return f"{here} holds weights, but no config.json; copy the whole model"
    return None


def model_inside(folder: Path) -> Path | None:
    """Return the folder within a folder that holds a model: a snapshot of the hub's cache, or the last checkpoint."""
    inside = sorted(folder.glob("snapshots/*/config.json")) or sorted(folder.glob("*/config.json"), key=_last_number)
    return inside[-1].parent if inside else None


def adapter(folder: Path) -> str:
    """Return a message that a folder is an adapter of PEFT, and of which model."""
    try:
        base = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        base = "MODEL"
    return (
        f"{str(folder)!r} is an adapter (PEFT) of {base!r}, no whole model; make a run of the two: gptjax convert "
        f"from-hf {folder} --out RUN"
    )


def _names(folder: Path, *patterns: str) -> list[str]:
    return sorted(file.name for pattern in patterns for file in folder.glob(pattern))


def _last_number(path: Path) -> tuple[int, str]:
    """Return a sort key that orders checkpoint-900 before checkpoint-1000."""
    numbers = re.findall(r"\d+", path.parent.name)
    return (int(numbers[-1]) if numbers else -1, path.parent.name)
