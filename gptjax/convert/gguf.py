"""GGUF files of Llama's form (llama.cpp's format), through the package `gguf`. They are shown as the Hugging Face
model that they were made from: its config.json, its tensors, its tokenizer.

Source: github.com/ggml-org/llama.cpp, docs of the format, convert_hf_to_gguf.py (`LlamaModel`) and, for what a key
means and what holds without it, src/llama-model.cpp.
"""

import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gptjax.config import RopeScaling
from gptjax.convert.foreign import kind_of
from gptjax.convert.gguf_vocabulary import gguf_tokenizer
from gptjax.errors import UserError
from gptjax.nn.rotary import rotary_angles
from gptjax.shell.paths import LFS_POINTER, refuse_lfs_pointer
from gptjax.tokenizers import Tokenizer

# Our config.json's key, by GGUF's (after `llama.`); those without a default are in every file.
KEYS = {
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "context_length": "max_position_embeddings",
}
OPTIONAL_KEYS = {
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "rope.freq_base": "rope_theta",
}
# The values under which other keys change nothing.
NEUTRAL_VALUES: dict[str, tuple[Any, ...]] = {
    "expert_count": (0,),
    "attention.causal": (True,),
    "attention.scale": (0,),
    "attention.clamp_kqv": (0,),
    "attention.max_alibi_bias": (0,),
    "attention.temperature_length": (0,),
    "attn_logit_softcapping": (0,),
    "final_logit_softcapping": (0,),
    "logit_scale": (0, 1),
    "residual_scale": (0, 1),
    "embedding_scale": (0, 1),
    "use_parallel_residual": (False,),
    "pooling_type": (0,),
    "rope.scaling.attn_factor": (1,),
}
READ_HERE = {"attention.value_length", "attention.sliding_window", "rope.dimension_count", "rope.scale_linear"}
READ_HERE |= {"rope.scaling.type", "rope.scaling.factor"}
IRRELEVANT = {"vocab_size", "tensor_data_layout", "expert_used_count", "rope.scaling.finetuned"}
IRRELEVANT |= {"rope.scaling.original_context_length"}
# The architectures, each a `model_type`; and whether their rotary pairs are neighbours (see `_unpermute`).
ARCHITECTURES = {"llama": True, "arcee": True, "qwen2": False, "qwen3": False}
TENSORS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "model.layers.{}.input_layernorm",
    "attn_q": "model.layers.{}.self_attn.q_proj",
    "attn_k": "model.layers.{}.self_attn.k_proj",
    "attn_v": "model.layers.{}.self_attn.v_proj",
    "attn_output": "model.layers.{}.self_attn.o_proj",
    "attn_q_norm": "model.layers.{}.self_attn.q_norm",
    "attn_k_norm": "model.layers.{}.self_attn.k_norm",
    "ffn_norm": "model.layers.{}.post_attention_layernorm",
    "ffn_gate": "model.layers.{}.mlp.gate_proj",
    "ffn_up": "model.layers.{}.mlp.up_proj",
    "ffn_down": "model.layers.{}.mlp.down_proj",
}
ROPE_FACTORS = "rope_freqs.weight"


class GGUFTensors:
    """The tensors of a GGUF model under Hugging Face's names, dequantized one at a time.

    Args:
        tensors: those of all its files.
        config: the values of its config.json.

    Attributes:
        shapes: by name.
        unreadable: the types, by name, of tensors that the package `gguf` cannot turn into floats.
    """

    def __init__(self, tensors: list[Any], config: Mapping[str, Any]):
        self._config = config
        self._tensors = {_huggingface_name(t.name): t for t in tensors if t.name != ROPE_FACTORS}
        kinds = {t.tensor_type: t for t in tensors}
        strange = {kind.name for kind, tensor in kinds.items() if not _is_readable(tensor)}
        self.shapes = {name: tuple(int(n) for n in reversed(t.shape)) for name, t in self._tensors.items()}
        types = {name: t.tensor_type.name for name, t in self._tensors.items()}
        self.unreadable = {name: kind for name, kind in types.items() if kind in strange}

    def rename(self, names: Mapping[str, str]) -> None:
        """Rename tensors: a mapping from their present names to the new ones."""
        for field in ("_tensors", "shapes", "unreadable"):
            setattr(self, field, {names.get(name, name): value for name, value in getattr(self, field).items()})

    def read(self, name: str) -> np.ndarray:
        """Return float32 values, in the shape that Hugging Face's models have."""
        from gguf import dequantize

        tensor = self._tensors[name]
        values = dequantize(tensor.data, tensor.tensor_type).reshape(self.shapes[name])
        heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(name.split(".")[-2])
        if heads is None or not ARCHITECTURES[self._config["model_type"]]:
            return values
        return _unpermute(values, self._config[heads])


def _is_readable(tensor: Any) -> bool:
    from gguf import dequantize

    try:
        dequantize(tensor.data[:1], tensor.tensor_type)
    except NotImplementedError:
        return False
    return True


def _unpermute(rows: np.ndarray, n_heads: int) -> np.ndarray:
    """Return rows in Hugging Face's order: a head's first halves of the rotary pairs before its second halves.

    llama.cpp turns neighbours, so its converter interleaves the halves: [H, 2, K/2] became [H, K/2, 2].
    """
    pairs = rows.reshape(n_heads, rows.shape[0] // n_heads // 2, 2, -1)
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def _huggingface_name(name: str) -> str:
    parts = name.split(".")
    layer = parts[1] if parts[0] == "blk" else ""
    stem, kind = parts[-2] if len(parts) > 1 else name, parts[-1]
    if stem not in TENSORS or kind not in ("weight", "bias"):
        experts = ": of a mixture of experts" if "_exp" in name or "gate_inp" in name else ""
        raise UserError(f"it has a tensor {name!r}, which no model that can be run here has{experts}")
    return f"{TENSORS[stem].format(layer)}.{kind}"


def read_gguf(path: Path) -> tuple[dict[str, Any], GGUFTensors, Tokenizer]:
    """Return the values of a config.json, the tensors under its family's names, and the tokenizer.

    Of a model that is split into several files, the first one is given, and the others lie beside it.

    Raises:
        UserError: the package is missing, a file is damaged or missing, or holds what cannot be run here.
    """
    reader = _reader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    try:
        tensors = [tensor for part in _parts(path, reader, fields) for tensor in part.tensors]
        config = _config(fields, tensors)
        found = GGUFTensors(tensors, config)
    except UserError as error:
        raise UserError(f"{str(path)!r}: {error}") from None
    config["vocab_size"] = found.shapes.get("model.embed_tokens.weight", (0,))[0]
    config["tie_word_embeddings"] = "lm_head.weight" not in found.shapes
    if config["model_type"] in ("llama", "arcee"):
        config["attention_bias"] = any(name.endswith("_proj.bias") and "attn" in name for name in found.shapes)
        config["mlp_bias"] = any(name.endswith("_proj.bias") and "mlp" in name for name in found.shapes)
    return config, found, gguf_tokenizer(path, fields)


def _reader(path: Path) -> Any:
    with path.open("rb") as stream:
        refuse_lfs_pointer(path, stream.read(len(LFS_POINTER)))
    try:
        from gguf import GGUFReader
    except ImportError:
        raise UserError(f"to read {str(path)!r}: pip install 'gptjax[hf]' (it needs the package gguf)") from None
    try:
        return GGUFReader(path)
    except Exception as error:  # the reader raises what numpy does where a file ends early
        raise UserError(f"{str(path)!r} is truncated or not a GGUF file ({error}); copy it again") from None


def _parts(path: Path, reader: Any, fields: Mapping[str, Any]) -> list[Any]:
    """Return the readers of all files of a model, of which the first is given (llama.cpp, `gguf-split`)."""
    count, number = int(fields.get("split.count", 0)), int(fields.get("split.no", 0))
    if count <= 1:
        return [reader]
    ending = re.search(r"-\d{5}-of-\d{5}\.gguf$", path.name)
    part = f"it is part {number + 1} of {count} of a split model"
    if ending is None:
        raise UserError(f"{part}; name the parts ...-00001-of-{count:05d}.gguf and so on, and give the first")
    names = [f"{path.name[: ending.start()]}-{i:05d}-of-{count:05d}.gguf" for i in range(1, count + 1)]
    if number != 0:
        raise UserError(f"{part}; give the first, {names[0]}, with the others beside it")
    if missing := [name for name in names[1:] if not (path.parent / name).exists()]:
        raise UserError(
            f"{part}, and {', '.join(missing[:3])} {'is' if len(missing) == 1 else 'are'} not beside it; copy all "
            "parts into one folder"
        )
    return [reader, *(_reader(path.parent / name) for name in names[1:])]


def _config(fields: Mapping[str, Any], tensors: list[Any]) -> dict[str, Any]:
    """Return the values of a config.json; every key of the architecture is used, neutral or refused."""
    kind, role = fields.get("general.architecture"), fields.get("general.type", "model")
    if role != "model":
        raise UserError(f"it is a GGUF file of the type {role!r}, not a whole model; give the model's own file")
    if kind not in ARCHITECTURES:
        what = kind_of(str(kind))
        raise UserError(
            f"architecture {kind!r} is not known{f': {what}' if what else ''}; known: {', '.join(ARCHITECTURES)}"
        )
    given = {name.removeprefix(f"{kind}."): v for name, v in fields.items() if name.startswith(f"{kind}.")}
    for key, allowed in NEUTRAL_VALUES.items():
        if given.get(key, allowed[0]) not in allowed:
            what = " (a mixture of experts)" if key == "expert_count" else ""
            raise UserError(f"{kind}.{key} {given[key]!r}{what} cannot be run here, only {allowed[0]!r}")
    if missing := [key for key in KEYS if key not in given]:
        raise UserError(f"it lacks {kind}.{missing[0]}; convert the model again")
    used = {*KEYS, *OPTIONAL_KEYS, *NEUTRAL_VALUES, *READ_HERE, *IRRELEVANT}
    if unknown := sorted(given.keys() - used):
        print(f"note: {', '.join(unknown[:5])}: unknown keys of {kind}; ignored", file=sys.stderr)
    config = {"model_type": kind}
    config |= {ours: _value(given[key]) for key, ours in {**KEYS, **OPTIONAL_KEYS}.items() if key in given}
    for key, ours in {**KEYS, **OPTIONAL_KEYS}.items():
        if isinstance(config.get(ours), list):
            raise UserError(f"{kind}.{key} {config[ours]} differs by layer, which cannot be run here")
    config.setdefault("num_key_value_heads", config["num_attention_heads"])
    config.setdefault("head_dim", None)
    width = _head_width(config)
    for key in ("attention.value_length", "rope.dimension_count"):
        if given.get(key, width) != width:
            raise UserError(f"{kind}.{key} {given[key]} cannot be run here, only {width}, the width of a head")
    if window := given.get("attention.sliding_window"):
        config["max_position_embeddings"] = min(config["max_position_embeddings"], window)
    config["rope_scaling"] = _rope_scaling(config, given, tensors)
    return config


def _head_width(config: Mapping[str, Any]) -> int:
    return config["head_dim"] or config["hidden_size"] // config["num_attention_heads"]


def _value(value: Any) -> Any:
    """Return a value of the file: of one per layer the one that all share, of a float32 the shortest decimal that
    means it (1e-05, not 9.999999747378752e-06)."""
    if isinstance(value, list) and len(set(value)) == 1:
        value = value[0]
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _rope_scaling(config: Mapping[str, Any], given: Mapping[str, Any], tensors: list[Any]) -> dict | None:
    factor = given.get("rope.scaling.factor", given.get("rope.scale_linear", 0.0))
    kind = given.get("rope.scaling.type", "linear")
    factors = next((tensor.data for tensor in tensors if tensor.name == ROPE_FACTORS), None)
    if kind == "none" or (kind == "linear" and factor in (0, 1)):
        return None if factors is None else _llama3_scaling(config, factors)
    if factors is not None:
        raise UserError(f"it has {ROPE_FACTORS} and the rope scaling {kind!r}; only one of them can be run here")
    if kind != "linear":
        raise UserError(f"rope_type {kind!r} cannot be run here from a GGUF file; give the Hugging Face directory")
    return {"rope_type": kind, "factor": _value(factor)}


def _llama3_scaling(config: Mapping[str, Any], factors: np.ndarray) -> dict:
    """Return Llama 3.1's scaling, of which a GGUF file keeps the divisor of every frequency. Its three other numbers
    are the same in all that Meta has published; raises UserError where the divisors do not follow from them."""
    scaling = {"rope_type": "llama3", "factor": float(factors.max()), "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling["original_max_position_embeddings"] = 8192
    stretched, plain = (
        np.arctan2(sin, cos).ravel()
        for cos, sin in (
            rotary_angles(np.ones((1, 1), np.int32), _head_width(config), config.get("rope_theta", 10000.0), form)
            for form in (RopeScaling("llama3", scaling["factor"]), None)
        )
    )
    if len(factors) != len(plain) or not np.allclose(plain / stretched, factors, rtol=1e-3):
        raise UserError(f"its {ROPE_FACTORS} is not Llama 3.1's scaling, and cannot be run here")
    return scaling
