"""GGUF files of the Llama family (llama.cpp's format), through the package `gguf`. They are shown as the Hugging Face
model that they were made from: its config.json, its tensors, its tokenizer.

Source: github.com/ggml-org/llama.cpp, docs of the format and convert_hf_to_gguf.py (`LlamaModel`).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gptjax.config import RopeScaling
from gptjax.convert.gguf_vocabulary import gguf_tokenizer
from gptjax.errors import UserError
from gptjax.nn.layers import rotary_angles
from gptjax.tokenizers import Tokenizer

# Our config.json's key, by GGUF's (after `llama.`).
KEYS = {
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "context_length": "max_position_embeddings",
    "rope.freq_base": "rope_theta",
}
TENSORS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "model.layers.{}.input_layernorm",
    "attn_q": "model.layers.{}.self_attn.q_proj",
    "attn_k": "model.layers.{}.self_attn.k_proj",
    "attn_v": "model.layers.{}.self_attn.v_proj",
    "attn_output": "model.layers.{}.self_attn.o_proj",
    "ffn_norm": "model.layers.{}.post_attention_layernorm",
    "ffn_gate": "model.layers.{}.mlp.gate_proj",
    "ffn_up": "model.layers.{}.mlp.up_proj",
    "ffn_down": "model.layers.{}.mlp.down_proj",
}
ROPE_FACTORS = "rope_freqs.weight"


class GGUFTensors:
    """The tensors of a GGUF file under Hugging Face's names, dequantized one at a time.

    Attributes:
        shapes: by name.
    """

    def __init__(self, path: Path, reader: Any, config: Mapping[str, Any]):
        self._path, self._config = path, config
        self._tensors = {_huggingface_name(path, t.name): t for t in reader.tensors if t.name != ROPE_FACTORS}
        self.shapes = {name: tuple(int(n) for n in reversed(t.shape)) for name, t in self._tensors.items()}

    def read(self, name: str) -> np.ndarray:
        """Float32 values, in the shape that Hugging Face's models have."""
        from gguf import dequantize

        tensor = self._tensors[name]
        try:
            values = dequantize(tensor.data, tensor.tensor_type).reshape(self.shapes[name])
        except NotImplementedError:
            raise UserError(
                f"{str(self._path)!r}: {tensor.name} is {tensor.tensor_type.name}, which cannot be read; get the "
                "file in F32, F16, BF16, Q8_0, Q4_0 or Q4_1"
            ) from None
        heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(name.split(".")[-2])
        return values if heads is None else _unpermute(values, self._config[heads])


def _unpermute(rows: np.ndarray, n_heads: int) -> np.ndarray:
    """Rows as Hugging Face has them, a head's first halves of the rotary pairs before its second halves.

    llama.cpp turns neighbours, so its converter interleaves the halves: [H, 2, K/2] became [H, K/2, 2].
    """
    pairs = rows.reshape(n_heads, rows.shape[0] // n_heads // 2, 2, -1)
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def _huggingface_name(path: Path, name: str) -> str:
    parts = name.split(".")
    layer = parts[1] if parts[0] == "blk" else ""
    stem, kind = parts[-2] if len(parts) > 1 else name, parts[-1]
    if stem not in TENSORS or kind != "weight":
        raise UserError(f"{str(path)!r} has a tensor {name!r}, which no Llama that can be run here has")
    return f"{TENSORS[stem].format(layer)}.{kind}"


def read_gguf(path: Path) -> tuple[dict[str, Any], GGUFTensors, Tokenizer]:
    """The values of a config.json, the tensors under its family's names, and the tokenizer.

    Raises:
        UserError: the package is missing, the file is damaged, or holds what cannot be run here.
    """
    try:
        from gguf import GGUFReader
    except ImportError:
        raise UserError(f"to read {str(path)!r}: pip install 'gptjax[hf]' (it needs the package gguf)") from None
    try:
        reader = GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
    except Exception as error:  # the reader raises what numpy does where a file ends early
        raise UserError(f"{str(path)!r} is cut short or no GGUF file ({error}); copy it anew") from None
    if (kind := fields.get("general.architecture")) != "llama":
        raise UserError(f"{str(path)!r}: architecture {kind!r} is not known; known: llama")
    config: dict[str, Any] = {"model_type": "llama"}
    for theirs, ours in KEYS.items():
        if f"llama.{theirs}" in fields:
            value = fields[f"llama.{theirs}"]
            # A float32 of the file, by the shortest decimal that means it: 1e-05, not 9.999999747378752e-06.
            config[ours] = float(str(np.float32(value))) if isinstance(value, float) else value
    scaling = fields.get("llama.rope.scaling.type", "none")
    if scaling != "none":
        config["rope_scaling"] = {"rope_type": scaling, "factor": fields.get("llama.rope.scaling.factor", 1.0)}
    factors = next((t.data for t in reader.tensors if t.name == ROPE_FACTORS), None)
    if factors is not None:
        config["rope_scaling"] = _rope_scaling(path, config, fields, factors)
    tensors = GGUFTensors(path, reader, config)
    config["vocab_size"] = tensors.shapes.get("model.embed_tokens.weight", (0,))[0]
    config["tie_word_embeddings"] = "lm_head.weight" not in tensors.shapes
    config.setdefault("num_key_value_heads", config.get("num_attention_heads"))
    return config, tensors, gguf_tokenizer(path, fields)


def _rope_scaling(path: Path, config: Mapping[str, Any], fields: Mapping[str, Any], factors: np.ndarray) -> dict:
    """Llama 3.1's scaling, of which a GGUF file keeps the divisor of every frequency. Its three other numbers are the
    same in all that Meta has published; raises UserError where the divisors do not follow from them."""
    scaling = {"rope_type": "llama3", "factor": float(factors.max()), "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling["original_max_position_embeddings"] = 8192
    width = fields.get("llama.rope.dimension_count", 2 * len(factors))
    stretched, plain = (
        np.arctan2(sin, cos).ravel()
        for cos, sin in (
            rotary_angles(np.ones((1, 1), np.int32), width, config["rope_theta"], form)
            for form in (RopeScaling("llama3", scaling["factor"]), None)
        )
    )
    if len(factors) != len(plain) or not np.allclose(plain / stretched, factors, rtol=1e-3):
        raise UserError(f"{str(path)!r}: its {ROPE_FACTORS} is not Llama 3.1's scaling, and cannot be run here")
    return scaling
