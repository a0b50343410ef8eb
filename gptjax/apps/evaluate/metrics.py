"""Scores of single items, their mean with its standard error, and calibration."""

import math
import re
import string
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from gptjax.errors import UserError

BINS = 10  # of confidence, for the calibration error
RESAMPLES = 1000  # for standard errors of scores that are no mean over items


class Figure(NamedTuple):
    """A score with its standard error (None where it has none)."""

    value: float
    stderr: float | None


def mean(values: Sequence[float]) -> Figure:
    """Return the mean of items' scores and its standard error, s / sqrt(n) with the sample's s."""
    x = np.asarray(values, float)
    return Figure(float(x.mean()), float(x.std(ddof=1) / math.sqrt(len(x))) if len(x) > 1 else None)


def normalise(text: str) -> str:
    """Return an answer as SQuAD compares it: lower case, without punctuation, articles and extra spaces.

    Source: the evaluation script of Rajpurkar et al. 2016 (arXiv 1606.05250).
    """
    kept = "".join(c for c in text.lower() if c not in set(string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", kept).split())


def exact_match(answer: str, references: Sequence[str]) -> float:
    """Return 1 where the answer equals one of the references after `normalise`, else 0."""
    return float(any(normalise(answer) == normalise(reference) for reference in references))


def f1(answer: str, references: Sequence[str]) -> float:
    """Return the best F1 of the answer's words against a reference's (Rajpurkar et al. 2016, section 6.1)."""
    return max(_f1(normalise(answer).split(), normalise(reference).split()) for reference in references)


def _f1(words: list[str], reference: list[str]) -> float:
    if not words or not reference:
        return float(words == reference)
    common = sum((Counter(words) & Counter(reference)).values())
    return 2 * common / (len(words) + len(reference))


def calibration_error(confidence: Sequence[float], right: Sequence[float]) -> float:
    """Return the expected calibration error: the mean gap of confidence and accuracy over BINS equal bins.

    Source: Guo et al. 2017 (arXiv 1706.04599), equation 3; each bin is weighted by its items.
    """
    c, r = np.asarray(confidence, float), np.asarray(right, float)
    bins = np.minimum((c * BINS).astype(int), BINS - 1)
    gaps = [abs(c[bins == b].mean() - r[bins == b].mean()) * (bins == b).mean() for b in np.unique(bins)]
    return float(sum(gaps))


def translation_figures(found: Sequence[str], references: Sequence[str], tokenize: str) -> dict[str, Figure]:
    """Return chrF and BLEU by sacrebleu, with bootstrapped standard errors.

    Args:
        tokenize: sacrebleu's tokenizer for BLEU, such as 13a or zh.

    Raises:
        UserError: sacrebleu is missing, or does not know the tokenizer.
    """
    try:
        from sacrebleu.metrics import BLEU, CHRF
    except ImportError:
        raise UserError("chrF and BLEU need sacrebleu: pip install 'gptjax[eval]'") from None
    if tokenize not in BLEU.TOKENIZERS:
        raise UserError(f"sacrebleu has no tokenizer {tokenize!r}; it has {', '.join(sorted(BLEU.TOKENIZERS))}")
    figures = {}
    for name, metric in (("chrf", CHRF()), ("bleu", BLEU(tokenize=tokenize))):
        score: Any = metric.corpus_score(list(found), [list(references)], n_bootstrap=RESAMPLES)
        half_width = getattr(score, "_ci", None)  # of the 95 % interval
        stderr = None if half_width is None or half_width < 0 else float(half_width) / 1.96
        figures[name] = Figure(float(score.score), stderr)
    return figures
