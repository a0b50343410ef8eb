"""What a family of Hugging Face's models is: a table that maps the names of its config.json and tensors to ours.

And Llama's, of which the others are changes. The families are in `families.py` and `expert_families.py`.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple


class Tensor(NamedTuple):
    """The tensor, or part of one, that holds a weight.

    Attributes:
        name: the tensor's name, with `{}` for the layer, and a second one for the expert.
        dims: the tensor's dimensions, in order, each a product of axes (docs/design.md's letters): `HK,D`. E is the
            number of experts, of a tensor that holds all of them; P counts equal parts that are fused into one
            tensor, Q the heads of queries, keys and values that are, N is the width of a norm or bias.
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
        period: their keys for the length of that pattern, of which the last layer is global.
        written: their keys that an export writes because the class's value is that of one published model.
        ropes: the rope types that its class takes; None: all that are known.
        theta: the base of the rotary wavelengths where there is no key.
        scaling: the rope scaling where there is none, in their terms; None: no scaling.
        local_theta: the base of the layers with a window, whose wavelengths are not scaled; None: as all.
        local_theta_key: their key for it beside `rope_theta`; None: it is in `rope_parameters` alone.
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
    period: tuple[str, ...] = ()
    written: tuple[tuple[str, Any], ...] = ()
    ropes: tuple[str, ...] | None = None
    theta: float = 10000.0
    scaling: Mapping[str, Any] | None = None
    local_theta: float | None = None
    local_theta_key: str | None = None
    fused: tuple[tuple[str, tuple[str, ...]], ...] = ()


# The names of one function in `transformers` (activations.py).
TANH_GELUS = ("gelu_new", "gelu_pytorch_tanh", "gelu_python_tanh", "gelu_fast", "gelu_accurate")
SILUS = ("silu", "swish")
LLAMA = Family(
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
UNBIASED = tuple(key for key in LLAMA.keys if key[0] != "bias")
WITHOUT_WIDTH = tuple(key for key in UNBIASED if key[0] != "mlp.width")  # of experts, which have widths of their own
ANY_HEADS = {field: value for field, value in LLAMA.form.items() if field != "d_model"}


def with_defaults(keys: Iterable[tuple[str, str, Any]], **defaults: Any) -> tuple[tuple[str, str, Any], ...]:
    """Return `Family.keys` with other values, by their key, of a config.json without the key."""
    return tuple((ours, theirs, defaults.get(theirs, default)) for ours, theirs, default in keys)


def with_norms(tensors: dict[str, Tensor], names: dict[str, str]) -> dict[str, Tensor]:
    """Return Llama's tensors with other norms of a block: our names -> theirs."""
    others = {
        path: tensor
        for path, tensor in tensors.items()
        if path.split(".")[1:2] not in (["attention_norm"], ["mlp_norm"])
    }
    norms = {
        f"blocks.{ours}.scale": Tensor(f"model.layers.{{}}.{theirs}.weight", "N") for ours, theirs in names.items()
    }
    return {**others, **norms}


# Norms of queries and keys over all heads together.
NORMS_OVER_HEADS = {
    "blocks.attention.query_norm.scale": Tensor("model.layers.{}.self_attn.q_norm.weight", "HK"),
    "blocks.attention.key_norm.scale": Tensor("model.layers.{}.self_attn.k_norm.weight", "GK"),
}
