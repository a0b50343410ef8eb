"""Hugging Face's model families: one table each, which maps the names of its config.json and tensors to ours.

To add one: a `Family`, and a line in `FAMILIES`.

Sources: the configuration_*.py and modeling_*.py of `transformers` for the same `model_type`.
"""

import json
from collections.abc import Iterable
from typing import Any, NamedTuple

from gptjax.config import ModelConfig, override, plain_values
from gptjax.errors import UserError


class Tensor(NamedTuple):
    """The tensor, or part of one, that holds a weight.

    Attributes:
        name: the tensor's name, with `{}` for the layer, and a second one for the expert.
        dims: the tensor's dimensions, in order, each a product of axes (docs/design.md's letters): `HK,D`. E is the
            number of experts, P counts the parts that are fused into one tensor, N is the width of a norm or bias.
        part: index of the fused part.
    """

    name: str
    dims: str
    part: int | None = None


class Family(NamedTuple):
    """A family of models.

    Attributes:
        title: its name in messages.
        architecture: the class in `transformers`.
        keys: (our field, their key, the value of a config.json without the key).
        form: fields of ours, or properties of a model's form (`_facts`), that all its models share.
        demands: their keys, with the values under which the model is the one that we run. The first is exported.
        aliases: other names of their keys, which override them (`attribute_map` of their config class).
        window: their key for a sliding window (4096 without the key), and the key that turns it on; None: the family
            has no window.
        prefix: of the tensors' names, which a file of the bare model lacks.
        tensors: by our weight's path.
        ignored: endings of tensors that hold no weights.
        biases: their keys that turn some of the biases on -> the prefix of these weights' paths. Where only some
            are on, the others are read as zeros.
        preset: a preset of ours that the family can express.
        unread: their keys that matter in training alone.
    """

    title: str
    architecture: str
    keys: tuple[tuple[str, str, Any], ...]
    form: dict[str, Any]
    demands: dict[str, tuple[Any, ...]]
    window: tuple[str, str | None] | None
    prefix: str
    tensors: dict[str, Tensor]
    ignored: tuple[str, ...]
    preset: str
    aliases: dict[str, str]
    biases: dict[str, str]
    unread: tuple[str, ...] = ()


# The names of one function in `transformers` (activations.py).
TANH_GELUS = ("gelu_new", "gelu_pytorch_tanh", "gelu_python_tanh", "gelu_fast", "gelu_accurate")
SILUS = ("silu", "swish")
IN_NO_FAMILY = {"logit_softcap": None, "conv_width": None}  # values of features that no family has

_GPT2 = Family(
    title="GPT-2",
    architecture="GPT2LMHeadModel",
    keys=(
        ("n_layers", "n_layer", 12),
        ("d_model", "n_embd", 768),
        ("n_heads", "n_head", 12),
        ("mlp.width", "n_inner", None),
        ("context_length", "n_positions", 1024),
        ("vocab_size", "vocab_size", 50257),
        ("norm.eps", "layer_norm_epsilon", 1e-5),
        ("tie_embeddings", "tie_word_embeddings", True),
    ),
    form={
        "positions.kind": "learned",
        "norm.kind": "layernorm",
        "mlp.kind": "gelu",
        "bias": True,
        "attention.qkv_bias": True,
        "attention.qk_norm": False,
        "n_kv_heads": "n_heads",
        "head_dim": "d_model / n_heads",
    },
    demands={
        "activation_function": TANH_GELUS,
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
    },
    window=None,
    prefix="transformer.",
    tensors={
        "embed": Tensor("transformer.wte.weight", "V,D"),
        "positions": Tensor("transformer.wpe.weight", "T,D"),
        "blocks.attention_norm.scale": Tensor("transformer.h.{}.ln_1.weight", "N"),
        "blocks.attention_norm.bias": Tensor("transformer.h.{}.ln_1.bias", "N"),
        "blocks.attention.query": Tensor("transformer.h.{}.attn.c_attn.weight", "D,PHK", 0),
        "blocks.attention.key": Tensor("transformer.h.{}.attn.c_attn.weight", "D,PGK", 1),
        "blocks.attention.value": Tensor("transformer.h.{}.attn.c_attn.weight", "D,PGK", 2),
        "blocks.attention.query_bias": Tensor("transformer.h.{}.attn.c_attn.bias", "PHK", 0),
        "blocks.attention.key_bias": Tensor("transformer.h.{}.attn.c_attn.bias", "PGK", 1),
        "blocks.attention.value_bias": Tensor("transformer.h.{}.attn.c_attn.bias", "PGK", 2),
        "blocks.attention.out": Tensor("transformer.h.{}.attn.c_proj.weight", "HK,D"),
        "blocks.attention.out_bias": Tensor("transformer.h.{}.attn.c_proj.bias", "N"),
        "blocks.mlp_norm.scale": Tensor("transformer.h.{}.ln_2.weight", "N"),
        "blocks.mlp_norm.bias": Tensor("transformer.h.{}.ln_2.bias", "N"),
        "blocks.mlp.up": Tensor("transformer.h.{}.mlp.c_fc.weight", "D,F"),
        "blocks.mlp.up_bias": Tensor("transformer.h.{}.mlp.c_fc.bias", "F"),
        "blocks.mlp.down": Tensor("transformer.h.{}.mlp.c_proj.weight", "F,D"),
        "blocks.mlp.down_bias": Tensor("transformer.h.{}.mlp.c_proj.bias", "N"),
        "final_norm.scale": Tensor("transformer.ln_f.weight", "N"),
        "final_norm.bias": Tensor("transformer.ln_f.bias", "N"),
        "head": Tensor("lm_head.weight", "V,D"),
    },
    ignored=(".attn.bias", ".attn.masked_bias"),  # the causal mask, in files of 2019
    preset="gpt2",
    aliases={
        "hidden_size": "n_embd",
        "max_position_embeddings": "n_positions",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
    },
    biases={},
)

_LLAMA = Family(
    title="Llama",
    architecture="LlamaForCausalLM",
    keys=(
        ("n_layers", "num_hidden_layers", 32),
        ("d_model", "hidden_size", 4096),
        ("n_heads", "num_attention_heads", 32),
        ("n_kv_heads", "num_key_value_heads", None),
        ("head_dim", "head_dim", None),
        ("mlp.width", "intermediate_size", 11008),
        ("context_length", "max_position_embeddings", 2048),
        ("vocab_size", "vocab_size", 32000),
        ("norm.eps", "rms_norm_eps", 1e-6),
        ("tie_embeddings", "tie_word_embeddings", False),
        ("bias", "attention_bias", False),
        ("bias", "mlp_bias", False),
    ),
    form={
        "positions.kind": "rope",
        "norm.kind": "rmsnorm",
        "mlp.kind": "swiglu",
        "attention.qk_norm": False,
        "attention.qkv_bias": "bias",
        "d_model": "a multiple of n_heads",
    },
    demands={"hidden_act": SILUS},
    window=None,
    prefix="model.",
    tensors={
        "embed": Tensor("model.embed_tokens.weight", "V,D"),
        "blocks.attention_norm.scale": Tensor("model.layers.{}.input_layernorm.weight", "N"),
        "blocks.attention.query": Tensor("model.layers.{}.self_attn.q_proj.weight", "HK,D"),
        "blocks.attention.key": Tensor("model.layers.{}.self_attn.k_proj.weight", "GK,D"),
        "blocks.attention.value": Tensor("model.layers.{}.self_attn.v_proj.weight", "GK,D"),
        "blocks.attention.out": Tensor("model.layers.{}.self_attn.o_proj.weight", "D,HK"),
        "blocks.attention.query_bias": Tensor("model.layers.{}.self_attn.q_proj.bias", "HK"),
        "blocks.attention.key_bias": Tensor("model.layers.{}.self_attn.k_proj.bias", "GK"),
        "blocks.attention.value_bias": Tensor("model.layers.{}.self_attn.v_proj.bias", "GK"),
        "blocks.attention.out_bias": Tensor("model.layers.{}.self_attn.o_proj.bias", "N"),
        "blocks.attention.query_norm.scale": Tensor("model.layers.{}.self_attn.q_norm.weight", "N"),
        "blocks.attention.key_norm.scale": Tensor("model.layers.{}.self_attn.k_norm.weight", "N"),
        "blocks.mlp_norm.scale": Tensor("model.layers.{}.post_attention_layernorm.weight", "N"),
        "blocks.mlp.gate": Tensor("model.layers.{}.mlp.gate_proj.weight", "F,D"),
        "blocks.mlp.up": Tensor("model.layers.{}.mlp.up_proj.weight", "F,D"),
        "blocks.mlp.down": Tensor("model.layers.{}.mlp.down_proj.weight", "D,F"),
        "blocks.mlp.gate_bias": Tensor("model.layers.{}.mlp.gate_proj.bias", "F"),
        "blocks.mlp.up_bias": Tensor("model.layers.{}.mlp.up_proj.bias", "F"),
        "blocks.mlp.down_bias": Tensor("model.layers.{}.mlp.down_proj.bias", "N"),
        "final_norm.scale": Tensor("model.norm.weight", "N"),
        "head": Tensor("lm_head.weight", "V,D"),
    },
    ignored=(".rotary_emb.inv_freq",),
    preset="smollm2-135m",
    aliases={},
    biases={"attention_bias": "blocks.attention.", "mlp_bias": "blocks.mlp."},
)
# The others are Llama's form with a change or two, so their tensors have Llama's names.
_UNBIASED = tuple(key for key in _LLAMA.keys if key[0] != "bias")
_ANY_HEADS = {field: value for field, value in _LLAMA.form.items() if field != "d_model"}


def _with_defaults(keys: Iterable[tuple[str, str, Any]], **defaults: Any) -> tuple[tuple[str, str, Any], ...]:
    return tuple((ours, theirs, defaults.get(theirs, default)) for ours, theirs, default in keys)


_ROUTERS = ("router_aux_loss_coef", "router_jitter_noise", "output_router_logits")
_EXPERTS = {
    **_ANY_HEADS,
    "bias": False,
    "mlp.kind": "moe",
    "mlp.moe.activation": "swiglu",
    "mlp.moe.scores": "softmax",
    "mlp.moe.scale": 1.0,
    "mlp.moe.shared_experts": 0,
    "mlp.moe.first_dense_layers": 0,
}


def _expert_tensors(router: str, gate: str, up: str, down: str) -> dict[str, Tensor]:
    """Return Llama's tensors with experts in place of the MLP, given the names below `model.layers.{}.`."""
    others = {path: tensor for path, tensor in _LLAMA.tensors.items() if not path.startswith("blocks.mlp.")}
    return {
        **others,
        "blocks.mlp.router": Tensor(f"model.layers.{{}}.{router}.weight", "E,D"),
        "blocks.mlp.gate": Tensor(f"model.layers.{{}}.{gate}.weight", "F,D"),
        "blocks.mlp.up": Tensor(f"model.layers.{{}}.{up}.weight", "F,D"),
        "blocks.mlp.down": Tensor(f"model.layers.{{}}.{down}.weight", "D,F"),
    }


# By the `model_type` of a config.json. An export takes the first that has the model's form.
FAMILIES: dict[str, Family] = {
    "gpt2": _GPT2,
    "llama": _LLAMA,
    "arcee": _LLAMA._replace(
        title="Arcee",
        architecture="ArceeForCausalLM",
        keys=_with_defaults(
            _LLAMA.keys,
            hidden_size=2560,
            intermediate_size=18432,
            rms_norm_eps=1e-5,
            max_position_embeddings=4096,
        ),
        form={**_LLAMA.form, "mlp.kind": "relu2"},
        demands={"hidden_act": ("relu2",)},
    ),
    "mistral": _LLAMA._replace(
        title="Mistral",
        biases={},
        architecture="MistralForCausalLM",
        keys=_with_defaults(
            _UNBIASED, num_key_value_heads=8, intermediate_size=14336, max_position_embeddings=131072
        ),
        form={**_ANY_HEADS, "bias": False},
        window=("sliding_window", None),
    ),
    "qwen2": _LLAMA._replace(
        title="Qwen2",
        biases={},
        architecture="Qwen2ForCausalLM",
        keys=_with_defaults(
            _UNBIASED,
            num_key_value_heads=32,
            intermediate_size=22016,
            max_position_embeddings=32768,
            vocab_size=151936,
        ),
        form={**_ANY_HEADS, "bias": False, "attention.qkv_bias": True},
        window=("sliding_window", "use_sliding_window"),
    ),
    "qwen3": _LLAMA._replace(
        title="Qwen3",
        biases={},
        architecture="Qwen3ForCausalLM",
        keys=_with_defaults(
            _UNBIASED,
            num_key_value_heads=32,
            intermediate_size=22016,
            max_position_embeddings=32768,
            vocab_size=151936,
            head_dim=128,
        ),
        form={**_ANY_HEADS, "bias": False, "attention.qk_norm": True},
        demands={"hidden_act": SILUS, "attention_bias": (False,)},
        window=("sliding_window", "use_sliding_window"),
    ),
    "mixtral": _LLAMA._replace(
        title="Mixtral",
        biases={},
        architecture="MixtralForCausalLM",
        keys=(
            *_with_defaults(
                [key for key in _UNBIASED if key[0] != "mlp.width"],
                num_key_value_heads=8,
                max_position_embeddings=131072,
                rms_norm_eps=1e-5,
            ),
            ("mlp.moe.width", "intermediate_size", 14336),
            ("mlp.moe.experts", "num_local_experts", 8),
            ("mlp.moe.top_k", "num_experts_per_tok", 2),
        ),
        form={**_EXPERTS, "mlp.moe.normalize": True},
        window=("sliding_window", None),
        tensors=_expert_tensors(
            "block_sparse_moe.gate",
            "block_sparse_moe.experts.{}.w1",
            "block_sparse_moe.experts.{}.w3",
            "block_sparse_moe.experts.{}.w2",
        ),
        aliases={"num_experts": "num_local_experts"},
        unread=_ROUTERS,
    ),
    "qwen3_moe": _LLAMA._replace(
        title="Qwen3-MoE",
        biases={},
        architecture="Qwen3MoeForCausalLM",
        keys=(
            *_with_defaults(
                _UNBIASED,
                hidden_size=2048,
                num_hidden_layers=24,
                num_key_value_heads=4,
                intermediate_size=6144,
                max_position_embeddings=32768,
                vocab_size=151936,
            ),
            ("mlp.moe.width", "moe_intermediate_size", 768),
            ("mlp.moe.experts", "num_experts", 128),
            ("mlp.moe.top_k", "num_experts_per_tok", 8),
            ("mlp.moe.normalize", "norm_topk_prob", False),
        ),
        form={**_EXPERTS, "attention.qk_norm": True},
        demands={
            "hidden_act": SILUS,
            "attention_bias": (False,),
            "decoder_sparse_step": (1,),
            "mlp_only_layers": ([], None),
        },
        window=("sliding_window", "use_sliding_window"),
        tensors=_expert_tensors(
            "mlp.gate", "mlp.experts.{}.gate_proj", "mlp.experts.{}.up_proj", "mlp.experts.{}.down_proj"
        ),
        aliases={"num_local_experts": "num_experts"},
        unread=_ROUTERS,
    ),
}

# Their `rope_type`, with our names of its values and theirs.
ROPE_TYPES: dict[str, dict[str, str]] = {
    "default": {},
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
        "original_context": "original_max_position_embeddings",
    },
}


def _facts(cfg: ModelConfig) -> dict[str, Any]:
    """Return a model's form, in the terms of `Family.form`."""
    even_heads = cfg.d_head * cfg.n_heads == cfg.d_model
    qkv_bias = cfg.bias if cfg.attention.qkv_bias is None else cfg.attention.qkv_bias
    return {
        **plain_values(cfg),
        "attention.qkv_bias": "bias" if qkv_bias == cfg.bias else qkv_bias,
        "n_kv_heads": "n_heads" if cfg.kv_heads == cfg.n_heads else cfg.kv_heads,
        "head_dim": "d_model / n_heads" if even_heads else cfg.d_head,
        "d_model": "a multiple of n_heads" if cfg.d_model % cfg.n_heads == 0 else cfg.d_model,
    }


def _obstacles(family: Family, cfg: ModelConfig) -> dict[str, str]:
    """Return the fields in which a model differs from a family's form, each with both values for the user."""
    facts, form = _facts(cfg), {**family.form, **IN_NO_FAMILY}
    if facts["attention.qkv_bias"] == "bias" and family.form["attention.qkv_bias"] != "bias":
        facts["attention.qkv_bias"] = cfg.bias
    # A tensor that the family has and the model lacks is exported as what changes nothing: zeros.
    spare = {"bias", "attention.qkv_bias"} if family.form.get("bias") is True else set()
    return {
        field: f"model.{field} {_in_yaml(facts[field])} where {family.title} has {_in_yaml(wanted)}"
        for field, wanted in form.items()
        if facts[field] != wanted and not (field in spare and not facts[field])
    }


def _in_yaml(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def family_for(cfg: ModelConfig, origin: str | None = None) -> str:
    """Return the `model_type` under which a model can be exported; `origin`, where it came from, if that still fits.

    Raises:
        UserError: no family has this form; the message names the fields that differ from the nearest family.
    """
    kinds = [origin, *FAMILIES] if origin in FAMILIES else list(FAMILIES)
    obstacles = {kind: _obstacles(FAMILIES[kind], cfg) for kind in kinds}
    best = min(kinds, key=lambda kind: len(obstacles[kind]))
    if obstacles[best]:
        raise UserError(
            f"no Hugging Face family has this model's form; differing: {', '.join(obstacles[best].values())} "
            f"(model.preset {FAMILIES[best].preset} can be exported)"
        )
    return best


def exported_form(cfg: ModelConfig, kind: str) -> ModelConfig:
    """Return the same model with every tensor of the family: norms with weights, and biases where the family has
    them.
    """
    form = FAMILIES[kind].form
    biases = {"bias": True, "attention.qkv_bias": None} if form.get("bias") is True else {}
    return override(cfg, {"norm.weights": True, **biases})


def export_config(cfg: ModelConfig, kind: str, dtype: str) -> dict[str, Any]:
    """Return the config.json of a model; `transformers` 4 and 5 read it to the same model."""
    family = FAMILIES[kind]
    resolved = {"n_kv_heads": cfg.kv_heads, "head_dim": cfg.d_head, "mlp.width": cfg.mlp_width}
    resolved["mlp.moe.width"] = cfg.expert_width
    ours_values = plain_values(cfg) | resolved
    values = {theirs: ours_values[ours] for ours, theirs, _ in family.keys}
    values |= {key: allowed[0] for key, allowed in family.demands.items()}
    if cfg.positions.kind == "rope":
        scaling = cfg.positions.scaling
        values["rope_theta"] = cfg.positions.theta
        values["rope_scaling"] = scaling and {
            "rope_type": scaling.kind,
            **{theirs: getattr(scaling, ours) for ours, theirs in ROPE_TYPES[scaling.kind].items()},
        }
    if family.window is not None:
        values[family.window[0]] = None
    return {"architectures": [family.architecture], "model_type": kind, **values, "torch_dtype": dtype}
