"""The optimizer, its schedule, and the loop."""

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

    total_steps: int = field(default=1000, metadata=FREE)
    batch_sequences: int = 8
    microbatches: int = 1
    loss_chunks: int = 1
    z_loss: float = 0.0
    log_interval_steps: int = field(default=10, metadata=FREE)
    eval_interval_steps: int = field(default=250, metadata=FREE)
    eval_sequences: int | None = field(default=None, metadata=FREE)

    def __post_init__(self):
        check_at_least(1, "train", self, "total_steps", "batch_sequences", "microbatches", "loss_chunks")
        check_at_least(1, "train", self, "log_interval_steps", "eval_interval_steps", "eval_sequences")
        check_at_least(0, "train", self, "z_loss")
        rest = self.batch_sequences % self.microbatches
        wanted = f"does not divide train.batch_sequences {self.batch_sequences}"
        check(rest == 0, "train.microbatches", self.microbatches, wanted)
