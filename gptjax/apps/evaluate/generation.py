"""Greedy continuations of many prompts, each cut at its first stop text."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from gptjax.engine import CHUNK, Request, power_of_two
from gptjax.errors import UserError
from gptjax.generate import LanguageModel, row_keys
from gptjax.sampling import Sampling
from gptjax.tokenizers import text_after

ROWS = 16  # prompts of a batch


class Answer(NamedTuple):
    """A continuation.

    Attributes:
        text: up to its stop text, its end token, or the most tokens allowed.
        tokens: the ids drawn, without end tokens.
        confidence: geometric mean of its tokens' probabilities, in [0, 1].
    """

    text: str
    tokens: list[int]
    confidence: float


def answer_prompts(
    lm: LanguageModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    stops: Sequence[str] = (),
    sampling: Sampling | None = None,
    seed: int = 0,
) -> Iterator[tuple[int, Answer]]:
    """Continue prompts of ids in batches of similar length; yield each one's number and answer, longest first.

    A prompt that leaves no room for `max_new_tokens` in the context loses its first tokens.

    Args:
        stops: texts before which an answer ends.
        sampling: how tokens are drawn; None takes the likeliest.

    Raises:
        UserError: more new tokens than the context has room for beside one token of a prompt.
    """
    room = lm.config.context_length - max_new_tokens
    if max_new_tokens < 1 or room < 1:
        raise UserError(
            f"{max_new_tokens} new tokens must be at least 1 and fewer than the model's context of "
            f"{lm.config.context_length}"
        )
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    keys = row_keys(seed, len(prompts))
    for start in range(0, len(order), ROWS):
        numbers = order[start : start + ROWS]
        requests = [Request(sampling or Sampling(0), keys[i], max_new_tokens) for i in numbers]
        batch = [list(prompts[i])[-room:] for i in numbers]
        yield from zip(numbers, _answer_batch(lm, batch, requests, stops), strict=True)


def _answer_batch(lm: LanguageModel, prompts, requests: list[Request], stops: Sequence[str]) -> list[Answer]:
    longest, most = max(map(len, prompts)), requests[0].max_new_tokens
    engine, count = lm.engine, len(prompts)
    slots = min(power_of_two(longest + most), lm.config.context_length)
    state = engine.init_state(ROWS, slots)
    state = engine.insert(state, engine.prefill(prompts), list(range(count)), requests)
    drawn: list[list[int]] = [[] for _ in prompts]
    logprobs: list[list[float]] = [[] for _ in prompts]
    running = set(range(count))
    answers = [Answer("", [], 0.0)] * count
    for done in range(0, most, CHUNK):
        state, tokens, chunk_logprobs = engine.step(state, min(CHUNK, most - done))
        for row in sorted(running):
            new = tokens[row][tokens[row] >= 0].tolist()
            drawn[row] += new
            logprobs[row] += chunk_logprobs[row][: len(new)].tolist()
            ended = len(new) < tokens.shape[1] or (new and new[-1] in lm.tokenizer.eos_ids)
            answers[row], stopped = _cut(lm, prompts[row], drawn[row], logprobs[row], stops)
            if ended or stopped:
                running.discard(row)
                state = engine.release(state, row)
        if not running:
            break
    return answers


def _cut(lm: LanguageModel, prompt, ids: list[int], logprobs: list[float], stops) -> tuple[Answer, bool]:
    """Return the answer that these ids give, and whether a stop text ended it."""
    kept = [id for id in ids if id not in lm.tokenizer.eos_ids]
    text = text_after(lm.tokenizer, prompt, kept)
    ends = [place for stop in stops if stop and (place := text.find(stop)) >= 0]
    confidence = float(np.exp(np.mean(logprobs))) if logprobs else 0.0
    return Answer(text[: min(ends)] if ends else text, kept, confidence), bool(ends)
