"""The families of mixtures of experts, by `model_type`.

Sources: as `families.py`.
"""

from gptjax.convert.family import (
    ANY_HEADS,
    LLAMA,
    NORMS_OVER_HEADS,
    SILUS,
    UNBIASED,
    WITHOUT_WIDTH,
    Family,
    Tensor,
    with_defaults,
)

_ROUTERS = ("router_aux_loss_coef", "router_jitter_noise", "output_router_logits")
_EXPERTS = {
    **ANY_HEADS,
    "bias": False,
    "mlp.kind": "moe",
    "mlp.moe.activation": "swiglu",
    "mlp.moe.router_bias": False,
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
    others = {path: tensor for path, tensor in LLAMA.tensors.items() if not path.startswith("blocks.mlp.")}
    return {
        **others,
        "blocks.mlp.router": Tensor(f"model.layers.{{}}.{router}.weight", "E,D"),
        "blocks.mlp.gate": Tensor(f"model.layers.{{}}.{gate}.weight", "F,D"),
        "blocks.mlp.up": Tensor(f"model.layers.{{}}.{up}.weight", "F,D"),
        "blocks.mlp.down": Tensor(f"model.layers.{{}}.{down}.weight", "D,F"),
    }


_BY_NAME = _expert_tensors(
    "mlp.gate", "mlp.experts.{}.gate_proj", "mlp.experts.{}.up_proj", "mlp.experts.{}.down_proj"
)

_GPT_OSS = "model.layers.{}.mlp."
# The gate's columns are the even ones of a tensor for both.
_GPT_OSS_TENSORS = {
    **_BY_NAME,
    "blocks.attention.sinks": Tensor("model.layers.{}.self_attn.sinks", "H"),
    "blocks.mlp.router": Tensor(_GPT_OSS + "router.weight", "E,D"),
    "blocks.mlp.router_bias": Tensor(_GPT_OSS + "router.bias", "E"),
    "blocks.mlp.gate": Tensor(_GPT_OSS + "experts.gate_up_proj", "E,D,FP", 0),
    "blocks.mlp.up": Tensor(_GPT_OSS + "experts.gate_up_proj", "E,D,FP", 1),
    "blocks.mlp.down": Tensor(_GPT_OSS + "experts.down_proj", "E,F,D"),
    "blocks.mlp.gate_bias": Tensor(_GPT_OSS + "experts.gate_up_proj_bias", "E,FP", 0),
    "blocks.mlp.up_bias": Tensor(_GPT_OSS + "experts.gate_up_proj_bias", "E,FP", 1),
    "blocks.mlp.down_bias": Tensor(_GPT_OSS + "experts.down_proj_bias", "E,N"),
}

EXPERT_FAMILIES: dict[str, Family] = {
    "mixtral": LLAMA._replace(
        title="Mixtral",
        biases={},
        architecture="MixtralForCausalLM",
        keys=(
            *with_defaults(
                WITHOUT_WIDTH,
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
    "qwen3_moe": LLAMA._replace(
        title="Qwen3-MoE",
        biases={},
        architecture="Qwen3MoeForCausalLM",
        keys=(
            *with_defaults(
                UNBIASED,
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
        tensors=_BY_NAME,
        aliases={"num_local_experts": "num_experts"},
        unread=_ROUTERS,
        fused=_FUSED_EXPERTS,
    ),
    "olmoe": LLAMA._replace(
        title="OLMoE",
        biases={},
        architecture="OlmoeForCausalLM",
        keys=(
            *with_defaults(
                WITHOUT_WIDTH,
                hidden_size=2048,
                num_hidden_layers=16,
                num_attention_heads=16,
                max_position_embeddings=4096,
                rms_norm_eps=1e-5,
                vocab_size=50304,
            ),
            ("mlp.moe.width", "intermediate_size", 2048),
            ("mlp.moe.experts", "num_experts", 64),
            ("mlp.moe.top_k", "num_experts_per_tok", 8),
            ("mlp.moe.normalize", "norm_topk_prob", False),
        ),
        form={
            **_EXPERTS,
            "head_dim": "d_model / n_heads",
            "attention.qk_norm": True,
            "attention.qk_norm_over": "heads",
        },
        demands={"hidden_act": SILUS, "attention_bias": (False,), "clip_qkv": (None,)},
        tensors={**_BY_NAME, **NORMS_OVER_HEADS},
        aliases={"num_local_experts": "num_experts"},
        unread=_ROUTERS,
        fused=_FUSED_EXPERTS,
    ),
    "gpt_oss": LLAMA._replace(
        title="gpt-oss",
        biases={},
        architecture="GptOssForCausalLM",
        keys=(
            *with_defaults(
                WITHOUT_WIDTH,
                num_hidden_layers=36,
                hidden_size=2880,
                num_attention_heads=64,
                num_key_value_heads=8,
                head_dim=64,
                max_position_embeddings=131072,
                rms_norm_eps=1e-5,
                vocab_size=201088,
            ),
            ("mlp.moe.width", "intermediate_size", 2880),
            ("mlp.moe.experts", "num_local_experts", 128),
            ("mlp.moe.top_k", "num_experts_per_tok", 4),
        ),
        form={
            **_EXPERTS,
            "bias": True,
            "attention.sinks": True,
            "mlp.moe.activation": "clamped_swiglu",
            "mlp.moe.router_bias": True,
            "mlp.moe.normalize": True,  # the same as a softmax over those that were chosen
        },
        demands={"attention_bias": (True,), "swiglu_alpha": (1.702,), "swiglu_limit": (7.0,)},
        window=("sliding_window", None, 128),
        layers=("local", "global"),
        tensors=_GPT_OSS_TENSORS,
        aliases={"num_experts": "num_local_experts"},
        unread=(*_ROUTERS, "hidden_act", "initial_context_length", "experts_per_token"),
        theta=150000.0,
        scaling={
            "rope_type": "yarn",
            "factor": 32.0,
            "original_max_position_embeddings": 4096,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
        },
    ),
}
