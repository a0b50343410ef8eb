"""The transformer's knobs."""

from dataclasses import dataclass, field
from typing import Literal

from gptjax.checks import check, check_at_least, check_positive, divisors
from gptjax.config.resume import FREE


@dataclass(frozen=True)
class RopeScaling:
    """How rotary wavelengths are stretched for contexts beyond the one trained on.

    Args:
        kind: llama3 stretches only the long wavelengths (Llama 3.1); linear stretches all, and needs only `factor`.
        factor: by how much they are stretched.
        low_freq_factor: wavelengths longer than original_context / low_freq_factor are stretched in full.
        high_freq_factor: wavelengths shorter than original_context / high_freq_factor stay as they are.
        original_context: the context length of the pre-training, in tokens.
    """

    kind: Literal["llama3", "linear"] = "llama3"
    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192


@dataclass(frozen=True)
class PositionsConfig:
    """How the model knows a token's position.

    Args:
        kind: learned position embeddings, or rotary ones inside attention (rope).
        theta: base of the rotary wavelengths.
        scaling: how rotary wavelengths are stretched for long contexts; null means they are not.
    """

    kind: Literal["learned", "rope"] = "learned"
    theta: float = 10000.0
    scaling: RopeScaling | None = None


@dataclass(frozen=True)
class NormConfig:
    """Normalisation of the residual stream.

    Args:
        kind: LayerNorm or RMSNorm.
        weights: whether norms have a learned scale (and, with model.bias, a learned shift).
        eps: added to the variance.
    """

    kind: Literal["layernorm", "rmsnorm"] = "layernorm"
    weights: bool = True
    eps: float = 1e-5


@dataclass(frozen=True)
class AttentionConfig:
    """What attention computes. How it is computed is run.attention's to say.

    Args:
        qk_norm: RMSNorm over each head's queries and keys.
        qkv_bias: biases in the query, key and value projections alone; null means as model.bias.
    """

    qk_norm: bool = False
    qkv_bias: bool | None = None


@dataclass(frozen=True)
class MlpConfig:
    """The MLP of a block.

    Args:
        kind: gelu is GPT-2's tanh form; swiglu has a third matrix; relu2 is the square of ReLU.
        width: of the hidden layer (F); null means 4 * model.d_model.
    """

    kind: Literal["gelu", "swiglu", "relu2"] = "gelu"
    width: int | None = None


@dataclass(frozen=True)
class ParametrizationConfig:
    """Whether initial values and learning rates follow the model's size (see gptjax/parametrization.py).

    Args:
        kind: standard (they do not), mup (they follow the width) or completep (width and depth).
        base_width: the d_model that the hyperparameters were tuned for; heads and MLP should grow in proportion.
        base_layers: the n_layers that they were tuned for, for completep.
        base_head_dim: the head_dim that they were tuned for; null means that only the number of heads grows.
    """

    kind: Literal["standard", "mup", "completep"] = "standard"
    base_width: int | None = None
    base_layers: int | None = None
    base_head_dim: int | None = None


@dataclass(frozen=True)
class ModelConfig:
    """The transformer. The defaults are GPT-2's smallest model.

    Args:
        preset: start from a published model (see gptjax/presets.py); other keys override its values.
        n_layers: number of blocks (L).
        d_model: width of the residual stream (D).
        n_heads: query heads (H).
        n_kv_heads: key/value heads (G), a divisor of n_heads; null means n_heads (no grouping).
        head_dim: width of a head (K); null means d_model / n_heads.
        context_length: longest sequence that the model is trained on, in tokens.
        vocab_size: number of token ids; null means the tokenizer's.
        vocab_multiple: the embedding's rows are padded up to a multiple of this, for sharding and for speed.
        conv_width: tokens under a causal convolution before attention and before the MLP; null means none.
        bias: biases in linear layers and in LayerNorm.
        tie_embeddings: whether the output head is the transposed token embedding.
        logit_softcap: cap c of the logits, c * tanh(logits / c); null means none.
        init: gpt2 is normal(0.02) with residual projections divided by sqrt(2 L); zero starts residual
            projections and an untied head at zero, other matrices at 1 / sqrt(fan_in).
        dropout: probability at the embedding and at each residual branch.
        dtype: of the matmuls. Weights, norms, softmax and loss are float32 always.
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
        check_positive("model", self, "logit_softcap")
        check_positive("model.positions", self.positions, "theta")
        check_positive("model.norm", self.norm, "eps")
        check(0 <= self.dropout < 1, "model.dropout", self.dropout, "must lie in [0, 1)")
        self._check_heads()
        self._check_parametrization()

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
        odd = "is odd: rotary positions turn pairs, so make it even"
        check(self.positions.kind == "learned" or self.d_head % 2 == 0, "model.head_dim", self.d_head, odd)

    def _check_parametrization(self) -> None:
        chosen = self.parametrization
        check_at_least(1, "model.parametrization", chosen, "base_width", "base_layers", "base_head_dim")
        needed = {"standard": (), "mup": ("base_width",), "completep": ("base_width", "base_layers")}
        for name in needed[chosen.kind]:
            missing = f"needs model.parametrization.{name}, the size at which the hyperparameters were tuned"
            check(getattr(chosen, name) is not None, "model.parametrization.kind", chosen.kind, missing)

    @property
    def kv_heads(self) -> int:
        """Key/value heads (G)."""
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads

    @property
    def d_head(self) -> int:
        """Width of a head (K)."""
        return self.d_model // self.n_heads if self.head_dim is None else self.head_dim

    @property
    def mlp_width(self) -> int:
        """Width of the MLP (F)."""
        return 4 * self.d_model if self.mlp.width is None else self.mlp.width

    @property
    def padded_vocab(self) -> int:
        """Rows of the embedding (V): `vocab_size` rounded up to a multiple of `vocab_multiple`."""
        assert self.vocab_size is not None, "fill in the tokenizer's vocabulary first"
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple
