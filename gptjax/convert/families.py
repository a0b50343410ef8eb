"""The families of Hugging Face's models, by `model_type`; those with experts are in `expert_families.py`.

To add one: a `Family`, and a line in `FAMILIES`.

Sources: the configuration_*.py and modeling_*.py of `transformers` for the same `model_type`.
"""

from gptjax.convert.expert_families import EXPERT_FAMILIES
from gptjax.convert.family import (
    ANY_HEADS,
    LLAMA,
    NORMS_OVER_HEADS,
    SILUS,
    TANH_GELUS,
    UNBIASED,
    Family,
    Tensor,
    with_defaults,
    with_norms,
)

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

_GEMMA2_NAMES = {
    "attention_norm": "input_layernorm",
    "attention_post_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_post_norm": "post_feedforward_layernorm",
}


_GEMMA2 = LLAMA._replace(
    title="Gemma 2",
    architecture="Gemma2ForCausalLM",
    biases={},
    keys=(
        *with_defaults(
            UNBIASED,
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
        **ANY_HEADS,
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
    tensors=with_norms(LLAMA.tensors, _GEMMA2_NAMES),
    unread=("hidden_act", "cache_implementation"),
)
_PHI3_TENSORS = {
    **{path: t for path, t in LLAMA.tensors.items() if not path.startswith(("blocks.attention.", "blocks.mlp."))},
    "blocks.attention.query": Tensor("model.layers.{}.self_attn.qkv_proj.weight", "QK,D", 0),
    "blocks.attention.key": Tensor("model.layers.{}.self_attn.qkv_proj.weight", "QK,D", 1),
    "blocks.attention.value": Tensor("model.layers.{}.self_attn.qkv_proj.weight", "QK,D", 2),
    "blocks.attention.out": LLAMA.tensors["blocks.attention.out"],
    "blocks.mlp.gate": Tensor("model.layers.{}.mlp.gate_up_proj.weight", "PF,D", 0),
    "blocks.mlp.up": Tensor("model.layers.{}.mlp.gate_up_proj.weight", "PF,D", 1),
    "blocks.mlp.down": LLAMA.tensors["blocks.mlp.down"],
}

_OLMO2 = LLAMA._replace(
    title="OLMo 2",
    architecture="Olmo2ForCausalLM",
    biases={},
    keys=with_defaults(UNBIASED, rms_norm_eps=1e-5, vocab_size=50304),
    form={
        **LLAMA.form,
        "bias": False,
        "norm.place": "post",
        "attention.qk_norm": True,
        "attention.qk_norm_over": "heads",
    },
    demands={"hidden_act": SILUS, "attention_bias": (False,), "clip_qkv": (None,)},
    tensors={
        **with_norms(
            LLAMA.tensors,
            {"attention_post_norm": "post_attention_layernorm", "mlp_post_norm": "post_feedforward_layernorm"},
        ),
        **NORMS_OVER_HEADS,
    },
)

_QWEN2 = LLAMA._replace(
    title="Qwen2",
    biases={},
    architecture="Qwen2ForCausalLM",
    keys=with_defaults(
        UNBIASED,
        num_key_value_heads=32,
        intermediate_size=22016,
        max_position_embeddings=32768,
        vocab_size=151936,
    ),
    form={**ANY_HEADS, "bias": False, "attention.qkv_bias": True},
    window=("sliding_window", "use_sliding_window", 4096),
    layers=(),
)

# By the `model_type` of a config.json. An export takes the first that has the model's form.
FAMILIES: dict[str, Family] = {
    "gpt2": _GPT2,
    "llama": LLAMA,
    "arcee": LLAMA._replace(
        title="Arcee",
        architecture="ArceeForCausalLM",
        keys=with_defaults(
            LLAMA.keys,
            hidden_size=2560,
            intermediate_size=18432,
            rms_norm_eps=1e-5,
            max_position_embeddings=4096,
        ),
        form={**LLAMA.form, "mlp.kind": "relu2"},
        demands={"hidden_act": ("relu2",)},
    ),
    "mistral": LLAMA._replace(
        title="Mistral",
        biases={},
        architecture="MistralForCausalLM",
        keys=with_defaults(UNBIASED, num_key_value_heads=8, intermediate_size=14336, max_position_embeddings=131072),
        form={**ANY_HEADS, "bias": False},
        window=("sliding_window", None, 4096),
    ),
    "qwen2": _QWEN2,
    "qwen3": _QWEN2._replace(
        title="Qwen3",
        architecture="Qwen3ForCausalLM",
        keys=with_defaults(_QWEN2.keys, head_dim=128),
        form={**ANY_HEADS, "bias": False, "attention.qk_norm": True},
        demands={"hidden_act": SILUS, "attention_bias": (False,)},
    ),
    "gemma2": _GEMMA2,
    "gemma3_text": _GEMMA2._replace(
        title="Gemma 3",
        architecture="Gemma3ForCausalLM",
        keys=with_defaults(
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
        local_theta_key="rope_local_base_freq",
        period=("sliding_window_pattern", "_sliding_window_pattern"),
    ),
    "phi3": LLAMA._replace(
        title="Phi-3",
        architecture="Phi3ForCausalLM",
        biases={},
        keys=(
            *with_defaults(
                UNBIASED,
                hidden_size=3072,
                intermediate_size=8192,
                max_position_embeddings=4096,
                rms_norm_eps=1e-5,
                vocab_size=32064,
            ),
            ("positions.rotated_frac", "partial_rotary_factor", 1.0),
        ),
        form={**LLAMA.form, "bias": False},
        window=("sliding_window", None, None),
        tensors=_PHI3_TENSORS,
        written=(("pad_token_id", None),),
        ropes=("default", "longrope"),
    ),
    "olmo2": _OLMO2,
    "olmo3": _OLMO2._replace(
        title="OLMo 3",
        architecture="Olmo3ForCausalLM",
        demands={"hidden_act": SILUS, "attention_bias": (False,)},
        window=("sliding_window", None, 4096),
        layers=("local",) * 3 + ("global",),
        theta=500000.0,
        local_theta=500000.0,
    ),
    **EXPERT_FAMILIES,
}
