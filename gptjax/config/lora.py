"""The config section `lora`: low-rank adapters on a frozen model."""

from dataclasses import dataclass
from typing import Literal

from gptjax.checks import check, check_at_least, check_positive, is_pattern


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters (LoRA): the model of init_from stays as it is, and only small matrices beside it are trained.

    Args:
        rank: rank of each adapter; 0 means no adapters: all weights are trained.
        alpha: an adapter's output is multiplied by alpha / rank; raise it for a larger effect at the same rank.
        targets: weights that get an adapter: a role (matrix: every matrix of the blocks), or a regular expression of
            a weight's path, such as attention/(query|value).
        base_dtype: how the frozen matrices are held: float32, bfloat16, or int8 (with one scale for each output
            channel), which takes a quarter of the memory.
    """

    rank: int = 0
    alpha: float = 16.0
    targets: tuple[str, ...] = ("matrix",)
    base_dtype: Literal["float32", "bfloat16", "int8"] = "float32"

    @property
    def scale(self) -> float:
        """Return the factor on an adapter's output, alpha / rank."""
        return self.alpha / self.rank

    def __post_init__(self):
        check_at_least(0, "lora", self, "rank")
        check_positive("lora", self, "alpha")
        check(len(self.targets) > 0, "lora.targets", list(self.targets), "must name a role or a pattern of paths")
        for target in self.targets:
            check(is_pattern(target), "lora.targets", repr(target), "is neither a role nor a regular expression")
