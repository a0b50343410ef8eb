"""Random models as GGUF files, written with the package `gguf` as llama.cpp's converter does, loaded here.

`python tests/gguf_trials.py [TRIALS [ARCHITECTURE …]]` prints the table of weight_trials.py for every architecture.
"""

import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers
from weight_trials import FAMILIES, IDS, Outcome, compare, random_config, table

ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "arcee": gguf.MODEL_ARCH.ARCEE,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
}
# Keys after the architecture's name, each with values of which some change what is computed.
CHANGES: tuple[tuple[str, list[Any]], ...] = (
    ("rope.dimension_count", [6]),
    ("attention.value_length", [6]),
    ("expert_count", [0, 4]),
    ("attention.causal", [True, False]),
    ("logit_scale", [1.0, 2.0]),
    ("attention.scale", [0.5]),
    ("rope.scaling.attn_factor", [1.0, 0.5]),
    ("final_logit_softcapping", [30.0]),
    ("my_key", [1]),
)
CHANGING = {"attention.scale", "final_logit_softcapping", "rope.dimension_count", "attention.value_length"}


def permuted(rows: np.ndarray, heads: int) -> np.ndarray:
    """Return rows as convert_hf_to_gguf.py orders a Llama's queries and keys."""
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(rows.shape)


def add_keys(writer: gguf.GGUFWriter, arch: str, config: Any, random: np.random.Generator) -> bool:
    """Write the keys of a model; return whether one of them makes it another than the config's."""
    rope = config.rope_parameters
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    if config.num_key_value_heads != config.num_attention_heads or random.random() < 0.5:
        writer.add_head_count_kv(config.num_key_value_heads)
    width = config.head_dim
    if width != config.hidden_size // config.num_attention_heads or random.random() < 0.5:
        writer.add_key_length(width)
        writer.add_value_length(width)
    if rope["rope_theta"] != 10000.0 or random.random() < 0.5:
        writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_context_length(config.max_position_embeddings)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if rope["rope_type"] == "linear":
        name = ["rope.scaling.factor", "rope.scale_linear"][random.integers(2)]
        if name == "rope.scaling.factor" and random.random() < 0.5:
            writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_float32(f"{arch}.{name}", rope["factor"])
    elif random.random() < 0.3:
        writer.add_rope_scaling_type(gguf.RopeScalingType.NONE)
        writer.add_rope_scaling_factor(8.0)
    changed = False
    for name, values in CHANGES:
        if random.random() < 0.04:
            value = values[random.integers(len(values))]
            adds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}
            adds[type(value)](f"{arch}.{name}", value)
            changed |= name in CHANGING or (name != "my_key" and value != values[0])
    return changed


def write(arch: str, random: np.random.Generator, folder: Path) -> tuple[Path, np.ndarray | None]:
    """Write a model, and return the file to give and the logits of its weights; None where none can be said."""
    while True:
        values = random_config(arch, random) | {"sliding_window": None, "use_sliding_window": False}
        values["hidden_act"] = "relu2" if arch == "arcee" else "silu"
        try:
            config = transformers.AutoConfig.for_model(arch, **values)
            if config.rope_parameters["rope_type"] not in ("default", "linear"):
                continue
            torch.manual_seed(int(random.integers(1 << 30)))
            model = transformers.AutoModelForCausalLM.from_config(config)
            break
        except Exception:  # the library has many errors for what it does not make
            continue
    if not hasattr(config, "head_dim"):
        config.head_dim = config.hidden_size // config.num_attention_heads
    split = bool(random.random() < 0.2)
    path = folder / "model.gguf"
    writer = gguf.GGUFWriter(path, arch, split_max_tensors=6 if split else 0)
    changed = add_keys(writer, arch, config, random)
    names = gguf.get_tensor_name_map(ARCHITECTURES[arch], config.num_hidden_layers)
    quantized = gguf.GGMLQuantizationType[str(random.choice(["F32", "F16", "BF16", "Q8_0", "Q4_0"]))]
    tied = config.tie_word_embeddings
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.add_(0.1 * torch.randn_like(weight))
            heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
            count = heads.get(name.split(".")[-2]) if arch in ("llama", "arcee") else None
            stored = weight.numpy() if count is None else permuted(weight.numpy(), count)
            fits = weight.ndim == 2 and weight.shape[1] % gguf.GGML_QUANT_SIZES[quantized][0] == 0
            kind = quantized if fits else gguf.GGMLQuantizationType.F32
            packed = gguf.quantize(np.ascontiguousarray(stored), kind)
            kept = gguf.dequantize(packed, kind)
            back = kept if count is None else unpermuted(kept, count)
            weight.copy_(torch.from_numpy(np.array(back)))
            writer.add_tensor(names.get_name(name, (".weight", ".bias")), packed, raw_dtype=kind)
        head = model.lm_head.weight
        if tied and random.random() < 0.2:  # a head of its own after all
            head = 0.1 * torch.randn_like(head)
            writer.add_tensor("output.weight", head.numpy())
            model.lm_head.weight = torch.nn.Parameter(head)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    files = sorted(folder.glob("*.gguf"))
    if len(files) > 1 and random.random() < 0.3:
        files[-1].unlink()
        changed = True
    with torch.no_grad():
        expected = model(torch.from_numpy(IDS)).logits.numpy()
    return files[0], None if changed else expected


def unpermuted(rows: np.ndarray, heads: int) -> np.ndarray:
    """Return rows in the order that `permuted` has changed."""
    return rows.reshape(heads, rows.shape[0] // heads // 2, 2, -1).swapaxes(1, 2).reshape(rows.shape)


def trial(arch: str, number: int) -> Outcome:
    """Write a model of an architecture, and load it."""
    random = np.random.default_rng([100 + FAMILIES.index(arch), number])
    with tempfile.TemporaryDirectory() as folder:
        return compare(*write(arch, random, Path(folder)))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    trials = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    found = {arch: [trial(arch, number) for number in range(trials)] for arch in sys.argv[2:] or ARCHITECTURES}
    print(table(found))
    sys.exit(any(outcome.kind == "different" for outcomes in found.values() for outcome in outcomes))
