"""The tasks of `gptjax eval`: each reads items, answers those that have no answer yet, and returns its figures."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from gptjax.apps.evaluate import items, metrics
from gptjax.apps.evaluate.generation import ROWS, answer_prompts
from gptjax.apps.evaluate.items import Answers
from gptjax.apps.evaluate.metrics import Figure
from gptjax.decoding.beam import BeamSearch
from gptjax.decoding.scoring import Scorer, encode_pair, first_id, rolling_windows
from gptjax.errors import UserError
from gptjax.generate import LanguageModel
from gptjax.tokenizers import known_tag

Figures = dict[str, Figure]


def with_bar(answers: Iterable[Any], total: int) -> Iterable[Any]:
    """Show progress on a terminal."""
    return tqdm(answers, "evaluate", total, disable=None, leave=False)


def choose(lm: LanguageModel, path: str, answers: Answers, abstain_below: float) -> Figures:
    """Choose among given answers by log-likelihood, raw and divided by the length in characters.

    Figures: `accuracy`, `accuracy_norm`; `calibration_error` of the probabilities that raw scores give the choices;
    with `abstain_below`, `answered` and `accuracy_answered` where the best choice is at least that probable.
    """
    questions = items.read_items(path, {"question": str, "choices": list, "answer": int})
    for number, item in enumerate(questions, 1):
        if not 0 <= item["answer"] < len(item["choices"]):
            raise UserError(
                f"--data {path!r}, item {number}: answer {item['answer']} is not the number of one of its "
                f"{len(item['choices'])} choices; count them from 0"
            )
    missing = answers.missing(len(questions))
    pairs, owners = [], []
    for number in missing:
        for choice in questions[number]["choices"]:
            pairs.append(encode_pair(lm.tokenizer, questions[number]["question"], f" {choice}"))
            owners.append(number)
    scores: dict[int, dict[int, float]] = {number: {} for number in missing}
    first = {number: owners.index(number) for number in missing}
    for place, score in with_bar(Scorer(lm).score(pairs), len(pairs)):
        number = owners[place]
        scores[number][place - first[number]] = float(score.logprobs.sum())
        if len(scores[number]) == len(questions[number]["choices"]):
            answers.add(number, _chosen(questions[number], [scores[number][i] for i in sorted(scores[number])]))
    rows = list(answers.in_order())
    right = [row["right"] for row in rows]
    confidence = [row["confidence"] for row in rows]
    figures = {"accuracy": metrics.mean(right), "accuracy_norm": metrics.mean([row["right_norm"] for row in rows])}
    return figures | _calibration(confidence, right, abstain_below)


def _chosen(item: dict[str, Any], logprobs: list[float]) -> dict[str, Any]:
    raw = np.array(logprobs)
    by_length = raw / np.array([max(1, len(choice)) for choice in item["choices"]])
    share = np.exp(raw - raw.max())
    return {
        "chosen": int(raw.argmax()),
        "right": float(raw.argmax() == item["answer"]),
        "right_norm": float(by_length.argmax() == item["answer"]),
        "confidence": float(share.max() / share.sum()),
        "logprobs": logprobs,
    }


def _calibration(confidence: Sequence[float], right: Sequence[float], abstain_below: float) -> Figures:
    figures = {"calibration_error": Figure(metrics.calibration_error(confidence, right), None)}
    if abstain_below > 0:
        kept = [r for c, r in zip(confidence, right, strict=True) if c >= abstain_below]
        figures["answered"] = metrics.mean([float(c >= abstain_below) for c in confidence])
        figures["accuracy_answered"] = metrics.mean(kept) if kept else Figure(math.nan, None)
    return figures


def answer(
    lm: LanguageModel, path: str, answers: Answers, abstain_below: float, stop: list[str], max_new_tokens: int
) -> Figures:
    """Answer prompts greedily, and compare with references by SQuAD's exact match and F1.

    Figures: `exact_match`, `f1`; `calibration_error` of the tokens' mean probability against exact matches; with
    `abstain_below`, `answered` and `accuracy_answered`.
    """
    questions = items.read_items(path, {"prompt": str, "answers": list})
    missing = answers.missing(len(questions))
    prompts = [_prompt(lm, questions[number]["prompt"], max_new_tokens) for number in missing]
    for place, found in with_bar(answer_prompts(lm, prompts, max_new_tokens, stop), len(prompts)):
        references = list(map(str, questions[missing[place]]["answers"]))
        scores = {
            "exact_match": metrics.exact_match(found.text, references),
            "f1": metrics.f1(found.text, references),
        }
        answers.add(missing[place], {"text": found.text, "confidence": found.confidence, **scores})
    rows = list(answers.in_order())
    figures = {name: metrics.mean([row[name] for row in rows]) for name in ("exact_match", "f1")}
    confidence = [row["confidence"] for row in rows]
    return figures | _calibration(confidence, [row["exact_match"] for row in rows], abstain_below)


def _prompt(lm: LanguageModel, text: str, max_new_tokens: int) -> list[int]:
    ids = lm.tokenizer.encode_prompt(text).tolist() or [first_id(lm.tokenizer)]
    if len(ids) + max_new_tokens > lm.config.context_length:
        raise UserError(
            f"the prompt {text[:60]!r} has {len(ids)} tokens, which with {max_new_tokens} new ones exceed the "
            f"model's context of {lm.config.context_length}; shorten it, or lower --max_new_tokens"
        )
    return ids


def translate(
    lm: LanguageModel,
    path: str,
    answers: Answers,
    format: Callable[[str], str],
    tokenize: str,
    max_new_tokens: int,
    beams: int | None,
    length_penalty: float,
) -> Figures:
    """Translate the first column of a TSV file, and compare with the second by chrF and BLEU (sacrebleu).

    Args:
        format: source -> prompt.
        beams: of a beam search; None for greedy translation.
    """
    pairs = items.read_pairs(path)
    missing = answers.missing(len(pairs))
    prompts = [_prompt(lm, format(pairs[number][0]), max_new_tokens) for number in missing]
    if beams is None:
        texts = ((place, found.text) for place, found in answer_prompts(lm, prompts, max_new_tokens, ["\n"]))
    else:
        texts = _by_beams(BeamSearch(lm, beams, length_penalty), prompts, max_new_tokens)
    for place, text in with_bar(texts, len(prompts)):
        answers.add(missing[place], {"source": pairs[missing[place]][0], "text": text.strip()})
    found = [row["text"] for row in answers.in_order()]
    return metrics.translation_figures(found, [target for _, target in pairs], tokenize)


def _by_beams(search: BeamSearch, prompts: list[list[int]], max_new_tokens: int) -> Iterator[tuple[int, str]]:
    """Yield each prompt's number and its best text up to a line break, longest prompts first."""
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    for start in range(0, len(order), ROWS):
        numbers = order[start : start + ROWS]
        found = search.complete_ids([prompts[i] for i in numbers], max_new_tokens)
        for number, beams in zip(numbers, found, strict=True):
            yield number, beams[0].completion.text.partition("\n")[0]


def genre(lm: LanguageModel, path: str, answers: Answers) -> Figures:
    """Score texts in windows of the context length after each of the model's tags.

    Figures: `accuracy`, the share of windows whose own tag gives the lowest loss, of all and of each genre; and
    `loss_per_token` after the own tag and after another, on average.

    Raises:
        UserError: a genre that the model has no tag for.
    """
    texts = items.read_items(path, {"genre": str, "text": str})
    windows = [(item["genre"], window) for item in texts for window in _whole_windows(lm, item["text"])]
    own = {item["genre"]: known_tag(lm.tokenizer, item["genre"]) for item in texts}
    tags = {tag: lm.tokenizer.tag_id(tag) for tag in lm.tokenizer.tags}
    missing = answers.missing(len(windows))
    requests = [([id], windows[number][1]) for number in missing for id in tags.values()]
    losses = np.zeros((len(missing), len(tags)))
    for place, score in with_bar(Scorer(lm).score(requests), len(requests)):
        losses[divmod(place, len(tags))] = -score.logprobs.mean()
    for number, row in zip(missing, losses, strict=True):
        answers.add(number, {"genre": windows[number][0], "losses": dict(zip(tags, row.tolist(), strict=True))})
    rows = list(answers.in_order())
    right = [float(min(row["losses"], key=row["losses"].get) == row["genre"]) for row in rows]
    figures = {"accuracy": metrics.mean(right)}
    for name in own:
        figures[f"accuracy of {name}"] = metrics.mean(
            [r for r, row in zip(right, rows, strict=True) if row["genre"] == name]
        )
    figures["loss_per_token"] = metrics.mean([row["losses"][row["genre"]] for row in rows])
    others = [loss for row in rows for tag, loss in row["losses"].items() if tag != row["genre"]]
    return figures | {"loss_per_token after another tag": metrics.mean(others)}


def _whole_windows(lm: LanguageModel, text: str) -> list[list[int]]:
    """Return a text's ids in windows of the context length, without the rest; raise UserError where there is none."""
    ids, width = lm.tokenizer.encode_batch([text])[0].tolist(), lm.config.context_length
    windows = [ids[start : start + width] for start in range(0, len(ids) - width + 1, width)]
    if not windows:
        raise UserError(f"a text of {len(ids)} tokens is shorter than the model's context of {width}; give more")
    return windows


def bits_per_byte(lm: LanguageModel, path: str, answers: Answers) -> Figures:
    """Score a text in windows of the context length, each token once: bits per byte of UTF-8, and loss per token."""
    text = items.read_text(path)
    ids = lm.tokenizer.encode_batch([text])[0].tolist()
    windows = rolling_windows(ids, first_id(lm.tokenizer), lm.config.context_length)
    missing = answers.missing(len(windows))
    scores = Scorer(lm).score([windows[number] for number in missing])
    for place, score in with_bar(scores, len(missing)):
        nats = -float(score.logprobs.sum(dtype=np.float64))
        answers.add(missing[place], {"nats": nats, "tokens": len(score.logprobs)})
    nats, tokens = (np.array([row[name] for row in answers.in_order()]) for name in ("nats", "tokens"))
    loss = float(nats.sum() / tokens.sum())
    n, spread = len(nats), np.square(nats - loss * tokens).sum()
    # Of a ratio of sums (Cochran 1977, section 6.4): windows are the sample.
    stderr = math.sqrt(n / (n - 1) * spread) / float(tokens.sum()) if n > 1 else None
    per_byte = float(tokens.sum()) / len(text.encode()) / math.log(2)
    bits = Figure(loss * per_byte, None if stderr is None else stderr * per_byte)
    return {"bits_per_byte": bits, "loss_per_token": Figure(loss, stderr)}
