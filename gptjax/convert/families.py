"""Hugging Face's model families: one table each, which maps the names of its config.json and tensors to ours.

To add one: a `Family`, and a line in `FAMILIES`.

Sources: the configuration_*.py and modeling_*.py of `transformers` for the same `model_type`.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple


class Tensor(NamedTuple):
    """The tensor, or part of one, that holds a weight.

    Attributes:
        name: the tensor's name, with `{}` for the layer, and a second one for the expert.
        dims: the tensor's dimensions, in order, each a product of axes (docs/design.md's letters): `HK,D`. E is the
            number of experts, P counts equal parts that are fused into one tensor, Q the heads of queries, keys and
            values that are, N is the width of a norm or bias.
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
        window: their key for a sliding window, the key that turns it on, and the value of a config.json without the
            first; None: the family has no window.
        layers: which layers have the window where the config.json does not say, as `attention.pattern`; (): those
            from `max_window_layers` on; None: all, and it cannot say otherwise.
        written: their keys that an export writes because the class's value is that of one published model.
        ropes: the rope types that its class takes; None: all that are known.
        theta: the base of the rotary wavelengths where there is no key.
        local_theta: that of the layers with a window, where the family has another; None: as all.
        prefix: of the tensors' names, which a file of the bare model lacks.
        tensors: by our weight's path.
        ignored: endings of tensors that hold no weights.
        biases: their keys that turn some of the biases on -> the prefix of these weights' paths. Where only some
            are on, the others are read as zeros.
        preset: a preset of ours that the family can express.
        unread: their keys that matter in training alone.
        fused: tensors that hold those of several weights one after another, as the class has them in memory: the
            weights' paths by name, with `{}` for the layer. Experts follow each other.
    """

    title: str
    architecture: str
    keys: tuple[tuple[str, str, Any], ...]
    form: dict[str, Any]
    demands: dict[str, tuple[Any, ...]]
    window: tuple[str, str | None, int | None] | None
    prefix: str
    tensors: dict[str, Tensor]
    ignored: tuple[str, ...]
    preset: str
    aliases: dict[str, str]
    biases: dict[str, str]
    unread: tuple[str, ...] = ()
    layers: tuple[str, ...] | None = None
    written: tuple[tuple[str, Any], ...] = ()
    ropes: tuple[str, ...] | None = None
    theta: float = 10000.0
    local_theta: float | None = None
    fused: tuple[tuple[str, tuple[str, ...]], ...] = ()


# The names of one function in `transformers` (activations.py).
TANH_GELUS = ("gelu_new", "gelu_pytorch_tanh", "gelu_python_tanh", "gelu_fast", "gelu_accurate")
SILUS = ("silu", "swish")
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


# As transformers 5 holds experts: what its state_dict has, and so a file that save_pretrained has not written.
_FUSED_EXPERTS = (
    ("model.layers.{}.mlp.experts.gate_up_proj", ("blocks.mlp.gate", "blocks.mlp.up")),
    ("model.layers.{}.mlp.experts.down_proj", ("blocks.mlp.down",)),
)


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
        window=("sliding_window", None, 4096),
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
        window=("sliding_window", "use_sliding_window", 4096),
        layers=(),
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
        window=("sliding_window", "use_sliding_window", 4096),
        layers=(),
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
        window=("sliding_window", None, None),
        tensors=_expert_tensors(
            "block_sparse_moe.gate",
            "block_sparse_moe.experts.{}.w1",
            "block_sparse_moe.experts.{}.w3",
            "block_sparse_moe.experts.{}.w2",
        ),
        aliases={"num_experts": "num_local_experts"},
        unread=_ROUTERS,
        theta=1000000.0,
        fused=(*_FUSED_EXPERTS, ("model.layers.{}.mlp.gate.weight", ("blocks.mlp.router",))),
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
        window=("sliding_window", "use_sliding_window", 4096),
        tensors=_expert_tensors(
            "mlp.gate", "mlp.experts.{}.gate_proj", "mlp.experts.{}.up_proj", "mlp.experts.{}.down_proj"
        ),
        aliases={"num_local_experts": "num_experts"},
        unread=_ROUTERS,
        fused=_FUSED_EXPERTS,
    ),
}

_GEMMA2_NAMES = {
    "attention_norm": "input_layernorm",
    "attention_post_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_post_norm": "post_feedforward_layernorm",
}


def _with_norms(tensors: dict[str, Tensor], names: dict[str, str]) -> dict[str, Tensor]:
    """Return Llama's tensors with these norms of a block in place of its own."""
    others = {
        path: tensor
        for path, tensor in tensors.items()
        if path.split(".")[1:2] not in (["attention_norm"], ["mlp_norm"])
    }
    norms = {
        f"blocks.{ours}.scale": Tensor(f"model.layers.{{}}.{theirs}.weight", "N") for ours, theirs in names.items()
    }
    return {**others, **norms}


_GEMMA2 = _LLAMA._replace(
    title="Gemma 2",
    architecture="Gemma2ForCausalLM",
    biases={},
    keys=(
        *_with_defaults(
            _UNBIASED,
            hidden_size=2304,
            intermediate_size=9216,
            num_hidden_layers=26,
            num_attention_heads=8,
            num_key_value_heads=4,
            head_dim=256,
            max_position_embeddings=8192,
            vocab_size=256000,
            tie_word_embeddings=True,
        ),
        ("attention.scale_width", "query_pre_attn_scalar", 256),
        ("attention.softcap", "attn_logit_softcapping", 50.0),
        ("logit_softcap", "final_logit_softcapping", 30.0),
    ),
    form={
        **_ANY_HEADS,
        "bias": False,
        "mlp.kind": "geglu",
        "norm.place": "both",
        "norm.from_one": True,
        "embed_multiplier": "the root of d_model",
    },
    demands={
        "hidden_activation": (*TANH_GELUS[1:], TANH_GELUS[0]),
        "attention_bias": (False,),
        "use_bidirectional_attention": (False, None),
    },
    window=("sliding_window", None, 4096),
    layers=("local", "global"),
    tensors=_with_norms(_LLAMA.tensors, _GEMMA2_NAMES),
    unread=("hidden_act", "cache_implementation"),
)
_PHI3_TENSORS = {
    **{path: t for path, t in _LLAMA.tensors.items() if not path.startswith(("blocks.attention.", "blocks.mlp."))},
    "blocks.attention.query": Tensor("model.layers.{}.self_attn.qkv_proj.weight", "QK,D", 0),
    "blocks.attention.key": Tensor("model.layers.{}.self_attn.qkv_proj.weight", "QK,D", 1),
    "blocks.attention.value": Tensor("model.layers.{}.self_attn.qkv_proj.weight", "QK,D", 2),
    "blocks.attention.out": _LLAMA.tensors["blocks.attention.out"],
    "blocks.mlp.gate": Tensor("model.layers.{}.mlp.gate_up_proj.weight", "PF,D", 0),
    "blocks.mlp.up": Tensor("model.layers.{}.mlp.gate_up_proj.weight", "PF,D", 1),
    "blocks.mlp.down": _LLAMA.tensors["blocks.mlp.down"],
}

FAMILIES |= {
    "gemma2": _GEMMA2,
    "gemma3_text": _GEMMA2._replace(
        title="Gemma 3",
        architecture="Gemma3ForCausalLM",
        keys=_with_defaults(
            [key for key in _GEMMA2.keys if key[0] != "attention.softcap"],
            max_position_embeddings=131072,
            vocab_size=262208,
            final_logit_softcapping=None,
        ),
        form={**_GEMMA2.form, "attention.qk_norm": True},
        layers=("local",) * 5 + ("global",),
        unread=(*_GEMMA2.unread, "attn_logit_softcapping"),  # its class has the key and does not compute it
        theta=1000000.0,
        local_theta=10000.0,
    ),
    "phi3": _LLAMA._replace(
        title="Phi-3",
        architecture="Phi3ForCausalLM",
        biases={},
        keys=(
            *_with_defaults(
                _UNBIASED,
                hidden_size=3072,
                intermediate_size=8192,
                max_position_embeddings=4096,
                rms_norm_eps=1e-5,
                vocab_size=32064,
            ),
            ("positions.rotated_frac", "partial_rotary_factor", 1.0),
        ),
        form={**_LLAMA.form, "bias": False},
        window=("sliding_window", None, None),
        tensors=_PHI3_TENSORS,
        written=(("pad_token_id", None),),
        ropes=("default", "longrope"),
    ),
    "olmo2": _LLAMA._replace(
        title="OLMo 2",
        architecture="Olmo2ForCausalLM",
        biases={},
        keys=_with_defaults(_UNBIASED, rms_norm_eps=1e-5, vocab_size=50304),
        form={
            **_LLAMA.form,
            "bias": False,
            "norm.place": "post",
            "attention.qk_norm": True,
            "attention.qk_norm_over": "heads",
        },
        demands={"hidden_act": SILUS, "attention_bias": (False,), "clip_qkv": (None,)},
        tensors={
            **_with_norms(
                _LLAMA.tensors,
                {"attention_post_norm": "post_attention_layernorm", "mlp_post_norm": "post_feedforward_layernorm"},
            ),
            "blocks.attention.query_norm.scale": Tensor("model.layers.{}.self_attn.q_norm.weight", "HK"),
            "blocks.attention.key_norm.scale": Tensor("model.layers.{}.self_attn.k_norm.weight", "GK"),
        },
    ),
}
