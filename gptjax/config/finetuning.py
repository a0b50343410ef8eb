"""The config sections of objectives that compare with another model: `dpo` and `distill`."""

from dataclasses import dataclass

from gptjax.checks import check, check_positive


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
