"""The config sections `optim` and `train`: optimizer, learning-rate schedule, batch and loop."""

from dataclasses import dataclass, field
from typing import Literal

from gptjax.checks import check, check_at_least, check_positive, is_pattern
from gptjax.config.resume import FREE


@dataclass(frozen=True)
class OptimConfig:
    """Optimizer and learning-rate schedule.

    Args:
        name: adamw for all weights, or muon for the blocks' matrices with adamw for the rest; docs/extending.md adds
            others.
        peak_lr: highest learning rate, reached after the warm-up; with muon, that of the matrices.
        lr_scales: factors on peak_lr by regular expression of a weight's path, such as {embed: 0.2}; the first that
            matches applies.
        schedule: learning rate after the warm-up: cosine or linear decay over the whole run; wsd (constant, then a
            linear decay over decay_frac of the steps), which lets a run be extended before the decay; or constant.
        freeze: roles whose weights are not trained (`parametrization.ROLES`: matrix, embed, head, position, norm,
            bias, conv, router, balance); they have neither gradients nor moments.
        warmup_steps: steps over which the learning rate rises linearly from 0 to peak_lr.
        decay_frac: with wsd, the fraction of the steps, at the end, over which the learning rate decays.
        final_lr_frac: learning rate at the end, as a fraction of peak_lr.
        b1: decay rate of Adam's first moment.
        b2: decay rate of Adam's second moment; lower it for short runs or large batches.
        eps: value added to Adam's denominator.
        momentum: Nesterov momentum of Muon.
        moments_dtype: data type of the stored moments; bfloat16 halves their memory.
        weight_decay: decoupled weight decay, times the learning rate, of the matrices; norms, biases and position
            embeddings do not decay.
        clip_norm: largest global norm of the gradient, above which it is scaled down; null means no clipping.
        ema_decay: decay rate of an exponential moving average of the weights, which is evaluated and sampled in their
            place; null means none.
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
    """Batch, length of the run, and how often it logs and evaluates.

    Args:
        objective: what is minimised: next_token is the cross-entropy of every token, sft that of the tokens that
            data.kind sft marks, dpo prefers one answer to another (data.kind preferences), distill learns the
            distribution of another model (distill.teacher); docs/extending.md adds others.
        aux_weights: factors by which other terms of the objective are added to it, by name, such as the auxiliary
            losses of the model's blocks; a term without a factor is reported only.
        total_steps: optimizer steps of the whole run; raise it and resume to train longer.
        batch_sequences: sequences in a step, over all devices and microbatches.
        microbatches: number of microbatches whose gradients a step accumulates; raise it if activations do not fit in
            memory.
        loss_chunks: number of chunks of positions in which the loss is computed, so that memory holds the logits of
            one chunk; null means as few as take 256 MiB of a device.
        z_loss: weight of the squared log of the softmax's denominator; a value such as 1e-4 keeps logits from
            drifting in long bfloat16 runs.
        spike_deviations: a step is skipped if its loss or gradient norm lies more than so many standard deviations
            above the mean of the last 100 steps (a deviation counts as at least 0.3 of the mean); null skips only
            steps that are not finite. Raise it if good steps are skipped.
        rollback_skips: steps skipped in a row after which the run returns to the weights of its last checkpoint and
            continues with the data that follow; no checkpoint is written while steps are skipped. The run checks
            this every so many steps.
        max_rollbacks: rollbacks, each within 100 steps of the one before, after which the run gives up.
        log_interval_steps: steps between lines of metrics.jsonl.
        eval_interval_steps: steps between evaluations on the validation data.
        eval_sequences: validation sequences of an evaluation, evenly spaced; null means all of them. Lower it if
            evaluation takes too long.
    """

    objective: str = "next_token"
    aux_weights: dict[str, float] = field(default_factory=dict)
    total_steps: int = field(default=1000, metadata=FREE)
    batch_sequences: int = 8
    microbatches: int = 1
    loss_chunks: int | None = field(default=None, metadata=FREE)
    z_loss: float = 0.0
    spike_deviations: float | None = field(default=10.0, metadata=FREE)
    rollback_skips: int = field(default=10, metadata=FREE)
    max_rollbacks: int = field(default=3, metadata=FREE)
    log_interval_steps: int = field(default=10, metadata=FREE)
    eval_interval_steps: int = field(default=250, metadata=FREE)
    eval_sequences: int | None = field(default=None, metadata=FREE)

    def __post_init__(self):
        check_at_least(1, "train", self, "total_steps", "batch_sequences", "microbatches", "loss_chunks")
        check_at_least(1, "train", self, "log_interval_steps", "eval_interval_steps", "eval_sequences")
        check_at_least(1, "train", self, "rollback_skips")
        check_at_least(0, "train", self, "z_loss", "max_rollbacks")
        check_positive("train", self, "spike_deviations")
        rest = self.batch_sequences % self.microbatches
        wanted = f"does not divide train.batch_sequences {self.batch_sequences}"
        check(rest == 0, "train.microbatches", self.microbatches, wanted)
