"""The config section `model`: the architecture of the transformer."""

from dataclasses import dataclass, field, replace
from typing import Literal

from gptjax.checks import check, check_at_least, check_positive, divisors
from gptjax.config.resume import FREE


@dataclass(frozen=True)
class RopeScaling:
    """Scaling of the rotary wavelengths, for contexts longer than the model was pre-trained on.

    Args:
        kind: llama3 scales only the long wavelengths (Llama 3.1); linear scales all of them, and reads only `factor`;
            yarn scales long ones, keeps short ones and blends between them; longrope has a factor for each.
        factor: factor by which wavelengths are scaled; with longrope only attention_factor depends on it.
        low_freq_factor: wavelengths longer than original_context / low_freq_factor are scaled by the whole factor.
        high_freq_factor: wavelengths shorter than original_context / high_freq_factor are not scaled.
        original_context: the context length of the pre-training, in tokens.
        beta_fast: with yarn, wavelengths that turn more often than this in the original context are kept.
        beta_slow: with yarn, wavelengths that turn less often than this are scaled by the whole factor.
        truncate: with yarn, whether the two bounds are rounded to whole pairs of a head's dimensions.
        attention_factor: factor on the rotated queries and keys; null means what yarn and longrope make of factor.
        short_factors: with longrope, the factor of each wavelength where model.context_length is at most
            original_context.
        long_factors: the same where it is more.
    """

    kind: Literal["llama3", "linear", "yarn", "longrope"] = "llama3"
    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float | None = None
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()


@dataclass(frozen=True)
class PositionsConfig:
    """Encoding of positions.

    Args:
        kind: learned adds a trained embedding of the position (GPT-2); rope rotates queries and keys (Llama).
        theta: base of the rotary wavelengths; raise it for long contexts, lower it for windows of a few hundred
            tokens.
        scaling: scaling of the rotary wavelengths for contexts longer than the pre-training's; null means none.
        rotated_frac: share of a head's dimensions that are rotated, the first ones.
        local_theta: theta of the layers with a window, whose wavelengths are then not scaled (Gemma 3); null means
            that all layers rotate alike.
    """

    kind: Literal["learned", "rope"] = "learned"
    theta: float = 10000.0
    scaling: RopeScaling | None = None
    rotated_frac: float = 1.0
    local_theta: float | None = None


@dataclass(frozen=True)
class NormConfig:
    """Normalisation of the residual stream.

    Args:
        kind: layernorm (GPT-2) or rmsnorm (Llama).
        place: pre normalises what attention and the MLP read; post what they add to the residual stream (OLMo 2);
            both does both (Gemma).
        from_one: whether a scale is stored as its difference from 1 (Gemma).
        weights: whether each norm has a learned scale (and, in LayerNorm with model.bias, a learned shift).
        eps: value added to the variance before the square root.
    """

    kind: Literal["layernorm", "rmsnorm"] = "layernorm"
    place: Literal["pre", "post", "both"] = "pre"
    from_one: bool = False
    weights: bool = True
    eps: float = 1e-5


@dataclass(frozen=True)
class AttentionConfig:
    """Options of attention. The kernel that computes it is run.attention.

    Args:
        window: number of positions, its own included, that a query of a local layer attends to; null means all.
        pattern: which layers have the window, local, and which attend to all positions, global; it repeats over the
            layers, such as [local, global] (Gemma 2).
        softcap: cap c of the scores, c * tanh(scores / c); null means none.
        scale_width: scores are divided by the root of this; null means the head's width.
        sinks: whether each head has a learned logit in the softmax's denominator, to which attention that no position
            deserves can go (gpt-oss).
        qk_norm: apply RMSNorm to each head's queries and keys, which permits higher learning rates.
        qk_norm_over: whether that norm is over each head alone, or over all heads together (OLMo 2).
        qkv_bias: whether the query, key and value projections have biases; null means as model.bias. Qwen2 has these
            biases and no others.
    """

    window: int | None = None
    pattern: tuple[Literal["local", "global"], ...] = ("local",)
    softcap: float | None = None
    scale_width: float | None = None
    sinks: bool = False
    qk_norm: bool = False
    qk_norm_over: Literal["head", "heads"] = "head"
    qkv_bias: bool | None = None

    def __post_init__(self):
        check_at_least(1, "model.attention", self, "window")
        check_positive("model.attention", self, "softcap", "scale_width")
        check(len(self.pattern) > 0, "model.attention.pattern", "[]", "must name local or global; make it [local]")


@dataclass(frozen=True)
class MoeConfig:
    """The experts of `model.mlp.kind: moe`. No token is dropped, whatever the load of an expert.

    A loss that balances the load is added by `train.aux_weights: {load_balance: 0.01}`, and one that keeps the
    router's logits small by `{router_z: 0.001}`; both are reported either way.

    Args:
        experts: number of experts (E) in a layer.
        top_k: number of experts that a token is sent to.
        width: width of an expert's hidden layer; null means as model.mlp.width.
        activation: of the experts, the shared ones and the dense layers, as model.mlp.kind.
        shared_experts: number of further experts that every token is sent to, computed as one MLP.
        first_dense_layers: number of layers, the first ones, with an MLP of model.mlp.width in place of experts.
        router_bias: whether the router's logits have a learned bias (gpt-oss).
        scores: how the router's logits become scores: softmax over the experts, or sigmoid of each.
        normalize: whether a token's chosen scores are divided by their sum.
        scale: factor on the chosen scores.
        balance_rate: how far, at the peak of the learning rate, a step moves the bias by which an overloaded expert
            is chosen less often, which balances the load without a loss; null means no biases. 1e-3 is usual.
    """

    experts: int = 8
    top_k: int = 2
    width: int | None = None
    activation: Literal["gelu", "swiglu", "geglu", "clamped_swiglu", "relu2"] = "swiglu"
    shared_experts: int = 0
    first_dense_layers: int = 0
    router_bias: bool = False
    scores: Literal["softmax", "sigmoid"] = "softmax"
    normalize: bool = True
    scale: float = 1.0
    balance_rate: float | None = None

    def __post_init__(self):
        check_at_least(1, "model.mlp.moe", self, "experts", "top_k", "width")
        check_at_least(0, "model.mlp.moe", self, "shared_experts", "first_dense_layers")
        check_positive("model.mlp.moe", self, "scale", "balance_rate")
        more = f"is more than model.mlp.moe.experts {self.experts}; make it at most that"
        check(self.top_k <= self.experts, "model.mlp.moe.top_k", self.top_k, more)


@dataclass(frozen=True)
class MlpConfig:
    """The MLP of a block.

    Args:
        kind: gelu (GPT-2, the tanh approximation); with a third matrix swiglu (Llama), geglu (Gemma) or
            clamped_swiglu (gpt-oss); relu2 (ReLU squared); or moe, a mixture of experts, each an MLP, of which a
            token passes a few.
        width: width of the hidden layer (F); null means 4 * model.d_model. With a third matrix, two thirds of that
            gives as many parameters.
        moe: the experts; read where kind is moe.
    """

    kind: Literal["gelu", "swiglu", "geglu", "clamped_swiglu", "relu2", "moe"] = "gelu"
    width: int | None = None
    moe: MoeConfig = field(default_factory=MoeConfig)


@dataclass(frozen=True)
class ParametrizationConfig:
    """Scaling of initial values and learning rates with the model's size (see docs/parametrization.md).

    Args:
        kind: standard does not scale; mup scales with the width; completep with width and depth. Choose one of the
            latter to reuse the hyperparameters of a small model in a large one.
        base_width: the d_model at which the hyperparameters were tuned; required by mup and completep. Scale heads
            and MLP in proportion.
        base_layers: the n_layers at which they were tuned; required by completep.
        base_head_dim: the head_dim at which they were tuned; null means that it does not change with the size.
    """

    kind: Literal["standard", "mup", "completep"] = "standard"
    base_width: int | None = None
    base_layers: int | None = None
    base_head_dim: int | None = None


@dataclass(frozen=True)
class ModelConfig:
    """The transformer. The defaults are GPT-2's smallest model.

    Args:
        preset: name of a published architecture (gptjax/presets.py:PRESETS), such as gpt2 or llama-3.2-1b; other keys
            override its values.
        n_layers: number of blocks (L).
        d_model: width of the residual stream (D).
        n_heads: query heads (H).
        n_kv_heads: key/value heads (G), a divisor of n_heads; null means n_heads. Fewer make the cache of generation
            smaller (grouped-query attention).
        head_dim: width of a head (K); null means d_model / n_heads.
        context_length: length of the training sequences, in tokens; generation beyond it uses a sliding window.
        vocab_size: number of token ids; null means the tokenizer's.
        vocab_multiple: the embedding's rows are padded to a multiple of this; mesh.tensor must divide the result.
        conv_width: width, in tokens, of a causal convolution before attention and before the MLP; null means none. It
            helps small models on few tokens (docs/recipe.md).
        bias: whether linear layers and LayerNorm have biases.
        tie_embeddings: whether the output head shares the weights of the token embedding.
        embed_multiplier: factor on the tokens' vectors, such as the root of d_model (Gemma).
        logit_softcap: cap c of the logits, c * tanh(logits / c); null means none.
        init: gpt2 draws from normal(0.02) and divides residual projections by sqrt(2 L); zero starts residual
            projections and an untied head at zero, and draws other matrices with deviation 1 / sqrt(fan_in).
        dropout: dropout probability at the embedding and at each residual branch; raise it where the same text is
            read many times.
        dtype: data type of the matmuls; bfloat16 is faster on GPUs and TPUs. Weights, norms, softmax and loss are
            always float32.
    """

    preset: str | None = field(default=None, metadata=FREE)
    n_layers: int = 12
    d_model: int = 768
    n_heads: int = 12
    n_kv_heads: int | None = None
    head_dim: int | None = None
    context_length: int = 1024
    vocab_size: int | None = None
    vocab_multiple: int = 128
    conv_width: int | None = None
    bias: bool = True
    tie_embeddings: bool = True
    embed_multiplier: float = 1.0
    logit_softcap: float | None = None
    init: Literal["gpt2", "zero"] = "gpt2"
    dropout: float = 0.0
    dtype: Literal["float32", "bfloat16"] = "float32"
    positions: PositionsConfig = field(default_factory=PositionsConfig)
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    mlp: MlpConfig = field(default_factory=MlpConfig)
    norm: NormConfig = field(default_factory=NormConfig)
    parametrization: ParametrizationConfig = field(default_factory=ParametrizationConfig)

    def __post_init__(self):
        check_at_least(1, "model", self, "n_layers", "d_model", "n_heads", "n_kv_heads", "head_dim")
        check_at_least(1, "model", self, "conv_width", "context_length", "vocab_multiple", "vocab_size")
        check_at_least(1, "model.mlp", self.mlp, "width")
        check_positive("model", self, "logit_softcap", "embed_multiplier")
        check_positive("model.positions", self.positions, "theta", "local_theta")
        check_positive("model.norm", self.norm, "eps")
        check(0 <= self.dropout < 1, "model.dropout", self.dropout, "must lie in [0, 1)")
        self._check_heads()
        self._check_parametrization()
        if self.mlp.kind == "moe":
            dense, fewer = self.mlp.moe.first_dense_layers, f"must be less than model.n_layers {self.n_layers}"
            check(dense < self.n_layers, "model.mlp.moe.first_dense_layers", dense, f"{fewer}; lower it")

    def _check_heads(self) -> None:
        check(
            self.head_dim is not None or self.d_model % self.n_heads == 0,
            "model.n_heads",
            self.n_heads,
            f"does not divide model.d_model {self.d_model}; choose one of {divisors(self.d_model)} "
            "or set model.head_dim",
        )
        check(
            self.kv_heads >= 1 and self.n_heads % self.kv_heads == 0,
            "model.n_kv_heads",
            self.n_kv_heads,
            f"does not divide model.n_heads {self.n_heads}; choose one of {divisors(self.n_heads)}",
        )
        rope, share = self.positions, self.positions.rotated_frac
        learned = rope.kind == "learned"
        odd = "is odd: rotary positions turn pairs, so make it even"
        check(learned or self.d_head % 2 == 0, "model.head_dim", self.d_head, odd)
        check(0 < share <= 1, "model.positions.rotated_frac", share, "must lie in (0, 1]")
        pairs = self.rotated_width // 2
        wanted = f"does not rotate pairs of model.head_dim {self.d_head}; make its product with that an even number"
        check(learned or self.rotated_width == 2 * pairs > 0, "model.positions.rotated_frac", share, wanted)
        if rope.scaling is not None:
            factors = ("factor", "low_freq_factor", "high_freq_factor", "original_context", "beta_fast", "beta_slow")
            check_positive("model.positions.scaling", rope.scaling, *factors)
        if not learned and rope.scaling is not None and rope.scaling.kind == "longrope":
            for name in ("short_factors", "long_factors"):
                given, rule = len(getattr(rope.scaling, name)), f"factors must be {pairs}, one for each pair"
                check(given == pairs, f"model.positions.scaling.{name}", given, rule)

    def _check_parametrization(self) -> None:
        chosen = self.parametrization
        check_at_least(1, "model.parametrization", chosen, "base_width", "base_layers", "base_head_dim")
        needed = {"standard": (), "mup": ("base_width",), "completep": ("base_width", "base_layers")}
        for name in needed[chosen.kind]:
            missing = f"needs model.parametrization.{name}, the size at which the hyperparameters were tuned"
            check(getattr(chosen, name) is not None, "model.parametrization.kind", chosen.kind, missing)

    @property
    def kv_heads(self) -> int:
        """Return the number of key/value heads (G)."""
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads

    @property
    def d_head(self) -> int:
        """Return the width of a head (K)."""
        return self.d_model // self.n_heads if self.head_dim is None else self.head_dim

    @property
    def rotated_width(self) -> int:
        """Return how many of a head's dimensions are rotated."""
        return int(self.d_head * self.positions.rotated_frac)

    @property
    def local_layers(self) -> tuple[bool, ...]:
        """Return of each layer whether it has the window of `attention.window`; without one, none has."""
        pattern, window = self.attention.pattern, self.attention.window
        return tuple(window is not None and pattern[i % len(pattern)] == "local" for i in range(self.n_layers))

    @property
    def attended_positions(self) -> int:
        """Return over how many positions attention reaches, summed over the layers: the context, or the window."""
        T, window = self.context_length, self.attention.window
        return sum(min(T, window) if local else T for local in self.local_layers)

    @property
    def mlp_width(self) -> int:
        """Return the width of the MLP (F)."""
        return 4 * self.d_model if self.mlp.width is None else self.mlp.width

    @property
    def expert_width(self) -> int:
        """Return the width of an expert (F)."""
        return self.mlp_width if self.mlp.moe.width is None else self.mlp.moe.width

    @property
    def n_dense_layers(self) -> int:
        """Return the number of layers, the first ones, without experts in a model that has experts."""
        return self.mlp.moe.first_dense_layers if self.mlp.kind == "moe" else 0

    def with_dense_mlp(self, width: int) -> "ModelConfig":
        """Return the config with one MLP of this width in place of experts."""
        return replace(self, mlp=MlpConfig(self.mlp.moe.activation, width))

    @property
    def padded_vocab(self) -> int:
        """Rows of the embedding (V): `vocab_size` rounded up to a multiple of `vocab_multiple`."""
        assert self.vocab_size is not None, "fill in the tokenizer's vocabulary first"
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple
