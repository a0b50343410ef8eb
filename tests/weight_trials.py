"""Random models in every way that `transformers` saves them, loaded here: equal logits, or a refusal by name.

`python tests/weight_trials.py [TRIALS [FAMILY …]]` prints, for every family or those that are named, how many were
tried, equal and refused, and why; a trial's only seed is its number. tests/test_convert_trials.py asserts the same of
a few, and of all with `-m slow`.
"""

import collections
import contextlib
import io
import json
import re
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import safetensors.torch
import torch
import transformers

import gptjax
from gptjax.errors import UserError

VOCAB = 61
IDS = np.random.default_rng(0).integers(0, VOCAB, (2, 12))
TOLERANCE = 1e-4
EXPERT_FAMILIES = ("mixtral", "qwen3_moe", "olmoe", "gpt_oss")
# A family's place is part of its trials' seeds: new ones go to the end.
FAMILIES = ("gpt2", "llama", "mistral", "qwen2", "qwen3", "arcee", "gemma2", "gemma3_text", "phi3", "olmo2")
FAMILIES += ("mixtral", "qwen3_moe", "olmoe", "olmo3", "gpt_oss")
ALIASES = {"n_embd": "hidden_size", "n_head": "num_attention_heads", "n_positions": "max_position_embeddings"}
LONG_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8, "truncate": False}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
TWO_ROPES = ("gemma3_text", "olmo3")
# Keys that may be null, by what their classes take in this version.
NULLS = {family: ["num_key_value_heads", "head_dim", "sliding_window"] for family in ("llama", "arcee")}
NULLS |= {"gpt2": ["n_inner"], "mistral": ["head_dim", "sliding_window"]}
NULLS |= {family: ["num_key_value_heads", "sliding_window"] for family in ("qwen2", "qwen3", "phi3")}
NULLS |= {family: ["final_logit_softcapping"] for family in ("gemma2", "gemma3_text")}
NULLS |= {family: ["num_key_value_heads"] for family in ("olmo2", "olmo3", "olmoe")}
NULLS |= {"gpt_oss": ["rope_scaling", "layer_types"]}
NULLS |= {"mixtral": ["head_dim", "sliding_window"]}
NULLS |= {"qwen3_moe": ["sliding_window", "mlp_only_layers"]}
LOST = r"1\.mlp(?!.*down)|1\.block_sparse_moe(?!.*w2)"  # tensors of layer 1 that an incomplete file lacks
# Keys that no class reads, and keys that other families compute with.
UNKNOWN = {"my_note": "a", "n_ctx": 64, "unsloth_version": "1", "logit_scale": 1.0, "use_mrope": False}
UNKNOWN |= {
    "final_logit_softcapping": None,
    "rope_interleaved": False,
    "is_llama_config": True,
    "embedding_multiplier": 2.0,
}


class Outcome(NamedTuple):
    """What a trial came to.

    Attributes:
        kind: equal, refused, both refused (transformers loads no such model either), or different.
        reason: the key, tensor or file that the refusal names; of `different`, by how much.
    """

    kind: str
    reason: str


def random_config(family: str, random: np.random.Generator) -> dict[str, Any]:
    """Return the keys of a small model."""
    heads, groups, width = [(2, 1, 8), (4, 2, 8), (4, 4, 4), (2, 2, 16)][random.integers(4)]
    layers, mlp = int(random.integers(1, 4)), int(random.choice([24, 48]))
    tied = bool(random.random() < 0.5)
    if family == "gpt2":
        names = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu_accurate", "gelu_python_tanh", "gelu", "relu")
        return {
            "vocab_size": VOCAB,
            "n_embd": heads * width,
            "n_layer": layers,
            "n_head": heads,
            "n_positions": 32,
            "n_inner": [None, mlp][random.integers(2)],
            "activation_function": str(random.choice(names, p=[0.5, 0.2, 0.06, 0.06, 0.06, 0.06, 0.06])),
            "layer_norm_epsilon": float(random.choice([1e-5, 1e-6, 1e-12])),
            "scale_attn_weights": bool(random.random() < 0.95),
            "scale_attn_by_inverse_layer_idx": bool(random.random() < 0.05),
            "reorder_and_upcast_attn": bool(random.random() < 0.2),
            "tie_word_embeddings": tied,
        }
    config = {
        "vocab_size": VOCAB,
        "hidden_size": heads * width,
        "num_hidden_layers": layers,
        "intermediate_size": mlp,
        "num_attention_heads": heads,
        "num_key_value_heads": [groups, groups, None][random.integers(3)],
        "head_dim": int(random.choice([width, 12])),
        "max_position_embeddings": 32,
        "rms_norm_eps": float(random.choice([1e-5, 1e-6])),
        "hidden_act": "relu2"
        if family == "arcee"
        else str(random.choice(["silu", "swish", "gelu"], p=[0.8, 0.15, 0.05])),
        "tie_word_embeddings": tied,
        "rope_parameters": random_rope(random),
    }
    if family in TWO_ROPES:
        local = {"rope_type": "default", "rope_theta": 1000.0}
        config["rope_parameters"] = {"full_attention": config["rope_parameters"], "sliding_attention": local}
    if family in ("llama", "arcee"):
        config |= {key: bool(random.random() < 0.4) for key in ("attention_bias", "mlp_bias")}
    if family in ("qwen3", "qwen3_moe", "olmoe"):
        config["attention_bias"] = bool(random.random() < 0.1)
    if family in ("mistral", "mixtral"):
        config["sliding_window"] = [None, 4096, 16, 6][random.integers(4)]
    if family.startswith("qwen"):
        config |= {
            "use_sliding_window": bool(random.random() < 0.4),
            "sliding_window": int(random.choice([4096, 16, 6])),
        }
        config["max_window_layers"] = int(random.integers(0, 4))
    change_to_family(family, config, random)
    return config


def change_to_family(family: str, config: dict[str, Any], random: np.random.Generator) -> None:
    """Give a config of Llama's form the keys that only its family has."""
    if family.startswith("gemma"):
        change_to_gemma(config, random)
    if family == "olmo3":
        config.pop("head_dim")  # its class computes it
        change_windows(config, random)
    if family == "phi3":
        change_to_phi3(config, random)
    if family in EXPERT_FAMILIES:
        change_to_experts(family, config, random)


def change_to_gemma(config: dict[str, Any], random: np.random.Generator) -> None:
    """Give a config the keys that only Gemma 2 and 3 have."""
    kinds = ("gelu_pytorch_tanh", "gelu_new", "gelu")
    config["hidden_activation"] = str(random.choice(kinds, p=[0.8, 0.15, 0.05]))
    config |= {
        "num_key_value_heads": config["num_key_value_heads"] or config["num_attention_heads"],
        "query_pre_attn_scalar": int(random.choice([16, 24])),
        "attn_logit_softcapping": [None, 2.0][random.integers(2)],
        "final_logit_softcapping": [None, 1.0][random.integers(2)],
        "use_bidirectional_attention": bool(random.random() < 0.05),
    }
    change_windows(config, random)


def change_windows(config: dict[str, Any], random: np.random.Generator) -> None:
    """Give a config a window, and perhaps the layers that have it."""
    config["sliding_window"] = int(random.choice([4096, 6, 3]))
    if random.random() < 0.5:
        kinds = ("sliding_attention", "full_attention")
        config["layer_types"] = [str(random.choice(kinds)) for _ in range(config["num_hidden_layers"])]


def change_to_phi3(config: dict[str, Any], random: np.random.Generator) -> None:
    """Give a config the keys that only Phi-3 has; its texts are longer than the original context."""
    config.pop("head_dim")
    share = float(random.choice([1.0, 0.5]))
    pairs = int(config["hidden_size"] // config["num_attention_heads"] * share) // 2
    factors = {name: [float(f) for f in 1 + random.random(pairs)] for name in ("short_factor", "long_factor")}
    scaled = {"rope_type": "longrope", **factors} if random.random() < 0.7 else {"rope_type": "default"}
    config["rope_parameters"] = {"rope_theta": 10000.0, "partial_rotary_factor": share, **scaled}
    config |= {"original_max_position_embeddings": 8, "sliding_window": [None, 6, 4096][random.integers(3)]}
    config |= {"pad_token_id": None}


def change_to_experts(family: str, config: dict[str, Any], random: np.random.Generator) -> None:
    """Give a config the keys that only mixtures of experts have."""
    experts = int(random.integers(1, 6))
    config |= {
        "num_key_value_heads": config["num_key_value_heads"] or config["num_attention_heads"],
        "num_experts_per_tok": int(random.integers(1, experts + 1)),
        "num_local_experts" if family in ("mixtral", "gpt_oss") else "num_experts": experts,
        "output_router_logits": bool(random.random() < 0.2),
        "router_aux_loss_coef": 0.02,
    }
    if family == "mixtral":
        config["router_jitter_noise"] = float(random.choice([0.0, 0.1]))
        return
    if family == "gpt_oss":
        config["swiglu_limit"] = float(random.choice([7.0, 5.0], p=[0.9, 0.1]))
        config["attention_bias"] = bool(random.random() < 0.9)
        change_windows(config, random)
        if random.random() < 0.4:
            config["rope_parameters"] = {**LONG_YARN, "rope_theta": 150000.0}
        return
    config["norm_topk_prob"] = bool(random.random() < 0.6)
    if family == "olmoe":
        config.pop("head_dim")  # its class computes it
        config["clip_qkv"] = 8.0 if random.random() < 0.1 else None
        return
    config |= {
        "moe_intermediate_size": int(random.choice([16, 24])),
        "decoder_sparse_step": int(random.choice([1, 2], p=[0.9, 0.1])),
        "mlp_only_layers": [0] if random.random() < 0.1 else [],
    }


def random_rope(random: np.random.Generator) -> dict[str, Any]:
    """Return `rope_parameters`, as transformers 5 saves them."""
    theta = float(random.choice([100.0, 10000.0, 500000.0]))
    kinds: list[dict[str, Any]] = [
        {"rope_type": "default"},
        {"rope_type": "linear", "factor": 4.0},
        {**LLAMA3, "original_max_position_embeddings": 8},
        LLAMA3,
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8},
        {"rope_type": "dynamic", "factor": 4.0},
    ]
    return {"rope_theta": theta, **kinds[random.choice(6, p=[0.5, 0.15, 0.15, 0.1, 0.05, 0.05])]}


def save(family: str, config: dict[str, Any], random: np.random.Generator, folder: Path) -> None:
    """Write a model of random weights, in one of the ways that files are found in the world."""
    torch.manual_seed(int(random.integers(1 << 30)))
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(family, **config))
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    dtype = [torch.float32, torch.float32, torch.bfloat16, torch.float16][random.integers(4)]
    model = model.to(dtype)
    way = random.choice(["plain", "shards", "save_model", "bare", "base", "both", "stale", "named", "pickle", "cut"])
    if way == "base":
        model = model.base_model
    model.save_pretrained(folder, max_shard_size="10KB" if way == "shards" else "5GB")
    weights = folder / "model.safetensors"
    if way == "save_model":
        safetensors.torch.save_model(model, str(weights))
    if way == "pickle":
        weights.unlink()
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
    if way == "stale":
        index = {"metadata": {}, "weight_map": {"a": "model-00001-of-00002.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    if way == "bare":
        change_tensors(weights, lambda tensors: {strip(name): value for name, value in tensors.items()})
    if way == "both":  # a head of its own, whatever config.json says
        head = 0.1 * torch.randn(VOCAB, model.get_output_embeddings().weight.shape[1], dtype=dtype)
        change_tensors(weights, lambda tensors: {**tensors, "lm_head.weight": head})
    if way == "cut":  # a layer fewer or more than config.json says, or one tensor lost
        change_tensors(weights, lambda tensors: {k: v for k, v in tensors.items() if not re.search(LOST, k)})
    if way == "named":
        weights.rename(folder / "weights.safetensors")
        safetensors.torch.save_file({"other": torch.zeros(2)}, weights)
    rewrite_config(family, folder / "config.json", way, random)


def strip(name: str) -> str:
    """Return a tensor's name without the prefix of the base model."""
    return re.sub(r"^(model|transformer)\.", "", name)


def change_tensors(file: Path, change) -> None:
    """Let `change` make other tensors of a file's."""
    tensors = change(safetensors.torch.load_file(file))
    safetensors.torch.save_file({k: v.clone() for k, v in tensors.items()}, file, metadata={"format": "pt"})


def rewrite_config(family: str, file: Path, way: str, random: np.random.Generator) -> None:
    """Write the keys as other versions and other people do."""
    values = json.loads(file.read_text())
    if way == "named":
        values["transformers_weights"] = "weights.safetensors"
    if family in TWO_ROPES:
        rewrite_two_ropes(values, random)
    elif "rope_parameters" in values and random.random() < 0.4:  # as transformers 4
        rope = values.pop("rope_parameters")
        values["rope_theta"] = rope.pop("rope_theta")
        values["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    elif "rope_parameters" in values and random.random() < 0.1:
        values["rope_scaling"] = {"type": "linear", "factor": 2.0}
    if family == "gpt2" and random.random() < 0.3:
        values |= {alias: values.pop(name) for name, alias in ALIASES.items()}
    if random.random() < 0.3:
        for key in ("initializer_range", "use_cache", "dtype", "num_key_value_heads", "head_dim", "layer_types"):
            if random.random() < 0.3:
                values.pop(key, None)
    if random.random() < 0.1:
        values[str(random.choice(NULLS[family]))] = None
    for key, value in UNKNOWN.items():
        if random.random() < 0.06:
            values[key] = value
    if random.random() < 0.03:
        values["is_causal"] = False
    if random.random() < 0.1:
        values["tie_word_embeddings"] = not values.get("tie_word_embeddings", True)
    scaled = re.search(r'"(dynamic|yarn|llama3)"', json.dumps(values))
    if family == "mixtral" and values.get("head_dim") is None and scaled:
        values["head_dim"] = values["hidden_size"] // values["num_attention_heads"]  # without, its class fails
    file.write_text(json.dumps(values))


def rewrite_two_ropes(values: dict[str, Any], random: np.random.Generator) -> None:
    """Write the rotary positions of layers with a window and without as transformers 4."""
    if random.random() < 0.4:
        rope = values.pop("rope_parameters")
        values["rope_theta"] = rope["full_attention"].pop("rope_theta")
        if values["model_type"] == "gemma3_text":
            values["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        values["rope_scaling"] = None if rope["full_attention"]["rope_type"] == "default" else rope["full_attention"]


def theirs(folder: Path) -> np.ndarray | None:
    """Return the logits of transformers; None where it runs no such model, or one with random weights."""
    try:
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True
        )
        with torch.no_grad():
            logits = model(torch.from_numpy(IDS)).logits.numpy()
    except Exception:  # whatever transformers raises for a config or file that it does not take
        return None
    return None if info["missing_keys"] or info["mismatched_keys"] else logits


def compare(path: Path, expected: np.ndarray | None) -> Outcome:
    """Load a model here and compare its logits."""
    notes = io.StringIO()
    try:
        with contextlib.redirect_stderr(notes), jax.disable_jit():
            ours = np.asarray(gptjax.load(str(path)).logits(IDS))
    except UserError as error:
        message = str(error)
        assert len(message.splitlines()) == 1, message
        return Outcome("both refused" if expected is None else "refused", reason(path, message))
    if expected is None:
        return Outcome("different", "loaded here, and not by transformers")
    difference = np.abs(ours - expected).max()
    return (
        Outcome("equal", "")
        if difference < TOLERANCE
        else Outcome("different", f"{difference:.2g} {notes.getvalue()}")
    )


def reason(path: Path, message: str) -> str:
    """Return what a refusal names, without the values of the trial."""
    text = message.replace(repr(str(path)), "").replace(str(path), "DIR").removeprefix(": ")
    text = re.sub(r"\.\d+\.", ".N.", re.sub(r"\([\d, ]+\)", "(..)", text))
    return " ".join(text.split(";")[0].split()[:9])


def trial(family: str, number: int) -> Outcome:
    """Save a model of a family, and load it."""
    random = np.random.default_rng([FAMILIES.index(family), number])
    with tempfile.TemporaryDirectory() as folder:
        while True:
            try:
                save(family, random_config(family, random), random, Path(folder))
                break
            except Exception:  # the library has many errors for what it does not make
                continue  # not a model that transformers makes
        return compare(Path(folder), theirs(Path(folder)))


def table(outcomes: dict[str, list[Outcome]]) -> str:
    """Return counts by family, and the reasons of refusals, most common first."""
    kinds = ("equal", "refused", "both refused", "different")
    lines = [f"{'family':12} {'tried':>6} " + " ".join(f"{kind:>12}" for kind in kinds)]
    for family, found in outcomes.items():
        counts = collections.Counter(outcome.kind for outcome in found)
        lines.append(f"{family:12} {len(found):6} " + " ".join(f"{counts[kind]:12}" for kind in kinds))
    for kind in kinds[1:]:
        reasons = collections.Counter(o.reason for found in outcomes.values() for o in found if o.kind == kind)
        lines += [f"{kind}: {count:5}  {text}" for text, count in reasons.most_common()]
    return "\n".join(lines)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    trials = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    found = {family: [trial(family, i) for i in range(trials)] for family in sys.argv[2:] or FAMILIES}
    print(table(found))
    sys.exit(any(outcome.kind == "different" for outcomes in found.values() for outcome in outcomes))
