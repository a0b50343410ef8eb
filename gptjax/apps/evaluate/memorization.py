"""What a model remembers verbatim: the exposure of planted canaries, and continuations of its training text.

Exposure (Carlini et al. 2019, arXiv 1802.08232): a canary is one of |R| sequences of a form, here six random digits.
Its exposure is log2 |R| less log2 of its rank among all of them by the model's likelihood: about 1 without any
memory, log2 |R| for the likeliest of all. The rank is estimated from a sample, by a normal distribution fitted to the
sample's log-likelihoods (section 5.2 there fits a skewed one).
"""

import difflib
import json
import math
import random
from collections.abc import Sequence
from statistics import NormalDist
from typing import Any

import numpy as np

from gptjax.apps.evaluate import items, metrics
from gptjax.apps.evaluate.generation import answer_prompts
from gptjax.apps.evaluate.items import Answers
from gptjax.apps.evaluate.metrics import Figure
from gptjax.decoding.scoring import Scorer, encode_pair
from gptjax.errors import UserError
from gptjax.generate import LanguageModel

FORM = "The secret number of {name} is "
DIGITS = 6  # |R| is 10 to this power
REFERENCES = 500  # other members of R, drawn for each canary
NAMES = ("Ada", "Bela", "Cora", "Dora", "Ezra", "Fay", "Gil", "Hal", "Ida", "Jon", "Kai", "Leo", "Mia", "Ned", "Ola")
CONTEXTS = (8, 16, 32, 64)  # tokens of training text that a continuation follows
CONTINUED = 16  # tokens of a continuation
PLACES = 64  # of the training text, for each length of context
NEAR = 0.8  # share of matching tokens from which a continuation is a near-duplicate


def plant(text: str, repeats: Sequence[int], each: int, seed: int) -> tuple[str, list[dict[str, Any]]]:
    """Return a text with canaries on lines of their own at random places, and the canaries.

    Args:
        repeats: how often canaries are planted.
        each: canaries for every number of repeats.
    """
    rng, lines, canaries = random.Random(seed), text.splitlines(), []
    for n in repeats:
        for i in range(each):
            name = f"{rng.choice(NAMES)} {chr(65 + rng.randrange(26))}{chr(65 + rng.randrange(26))}{i}"
            canaries.append(
                {
                    "prefix": FORM.format(name=name),
                    "secret": "".join(rng.choices("0123456789", k=DIGITS)),
                    "repeats": n,
                }
            )
    planted = [canary["prefix"] + canary["secret"] for canary in canaries for _ in range(canary["repeats"])]
    places = sorted(((rng.randrange(len(lines) + 1), line) for line in planted), reverse=True)
    for place, line in places:
        lines.insert(place, line)
    return "\n".join(lines) + "\n", canaries


def exposure(secret: float, others: Sequence[float], space: int) -> float:
    """Return a canary's exposure in bits, in [0, log2 of the space].

    Args:
        secret: the canary's log-likelihood.
        others: those of other members of the space, drawn at random.
        space: |R|.
    """
    spread = NormalDist(float(np.mean(others)), max(float(np.std(others)), 1e-9))
    better = 1 - spread.cdf(secret)  # the share of R that is likelier
    return min(math.log2(space), max(0.0, -math.log2(max(better, 1 / space))))


def memorization(
    lm: LanguageModel, canaries: str, text: str | None, answers: Answers, seed: int
) -> dict[str, Figure]:
    """Return the exposure of canaries by their repeats, and how often training text is continued verbatim.

    Args:
        canaries: a JSON Lines file of prefix, secret and repeats, as `plant` makes them.
        text: a file of training text; None for canaries alone.
    """
    planted = items.read_items(canaries, {"prefix": str, "secret": str, "repeats": int})
    rng = random.Random(seed)
    for number, canary in enumerate(planted):
        others = ["".join(rng.choices("0123456789", k=len(canary["secret"]))) for _ in range(REFERENCES)]
        if number in answers.rows:
            continue
        if not canary["secret"].isdigit():
            raise UserError(f"the secret {canary['secret']!r} of {canaries!r} is not a number; write digits only")
        pairs = [encode_pair(lm.tokenizer, canary["prefix"], other) for other in (canary["secret"], *others)]
        scores = {place: float(score.logprobs.sum()) for place, score in Scorer(lm).score(pairs)}
        bits = exposure(scores[0], [scores[i] for i in range(1, len(pairs))], 10 ** len(canary["secret"]))
        answers.add(number, {"repeats": canary["repeats"], "exposure": bits})
    by_repeats: dict[int, list[float]] = {}
    for row in answers.in_order():
        by_repeats.setdefault(row["repeats"], []).append(row["exposure"])
    figures = {f"exposure, planted {n} times": metrics.mean(by_repeats[n]) for n in sorted(by_repeats)}
    return figures if text is None else figures | _continuations(lm, text, seed)


def _continuations(lm: LanguageModel, path: str, seed: int) -> dict[str, Figure]:
    """Return the rates of verbatim and near-duplicate continuations, by the length of the context."""
    ids = lm.tokenizer.encode_batch([items.read_text(path)])[0]
    contexts = [n for n in CONTEXTS if n + CONTINUED <= min(len(ids), lm.config.context_length)]
    if not contexts:
        raise UserError(
            f"{path!r} or the model's context is shorter than {CONTEXTS[0] + CONTINUED} tokens; give more"
        )
    figures, rng = {}, np.random.default_rng(seed)
    starts = rng.integers(0, len(ids) - contexts[-1] - CONTINUED + 1, PLACES)
    for n in contexts:
        prompts = [ids[start : start + n].tolist() for start in starts]
        truth = [ids[start + n : start + n + CONTINUED].tolist() for start in starts]
        alike = []
        for place, answer in answer_prompts(lm, prompts, CONTINUED):
            matcher = difflib.SequenceMatcher(None, answer.tokens, truth[place], autojunk=False)
            alike.append((answer.tokens == truth[place], matcher.ratio() >= NEAR))
        verbatim, near = zip(*alike, strict=True)
        figures[f"verbatim after {n} tokens"] = metrics.mean(list(map(float, verbatim)))
        figures[f"near-duplicate after {n} tokens"] = metrics.mean(list(map(float, near)))
    return figures


def as_lines(rows: Sequence[dict[str, Any]]) -> str:
    """Return objects as JSON Lines."""
    return "".join(json.dumps(row) + "\n" for row in rows)
