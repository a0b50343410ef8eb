"""The config sections of objectives that compare with another model: `dpo` and `distill`."""

from dataclasses import dataclass, field

from gptjax.checks import check, check_positive
from gptjax.config.resume import FREE


@dataclass(frozen=True)
class DpoConfig:
    """Direct preference optimization (Rafailov et al. 2023, arXiv 2305.18290), for train.objective dpo.

    Args:
        beta: how strongly the model is held to the reference, the model of init_from; lower it to let it move
            further.
        label_smoothing: share of the pairs that are taken to be labelled the wrong way round.
        normalise_length: divide each answer's log-probability by its number of tokens, so that a long answer does not
            weigh more than a short one.
    """

    beta: float = 0.1
    label_smoothing: float = 0.0
    normalise_length: bool = False

    def __post_init__(self):
        check_positive("dpo", self, "beta")
        check(0 <= self.label_smoothing < 0.5, "dpo.label_smoothing", self.label_smoothing, "must lie in [0, 0.5)")


@dataclass(frozen=True)
class DistillConfig:
    """Distillation (Hinton et al. 2015, arXiv 1503.02531), for train.objective distill.

    Args:
        teacher: the model to learn from: the directory of a run, a Hugging Face directory or id, or a .gguf file,
            with the tokenizer of this run. Its weights are held beside the model's, and do not change.
        temperature: divides the logits of both models; raise it to learn more from what the teacher finds unlikely.
        weight: of the divergence from the teacher in the objective; the cross-entropy of the data has the rest,
            1 - weight.
    """

    teacher: str | None = field(default=None, metadata=FREE)
    temperature: float = 1.0
    weight: float = 0.5

    def __post_init__(self):
        check_positive("distill", self, "temperature")
        check(0 < self.weight <= 1, "distill.weight", self.weight, "must lie in (0, 1]")
