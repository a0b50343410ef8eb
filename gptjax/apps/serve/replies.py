"""The JSON of answers, in OpenAI's layout."""

import re
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from gptjax.apps.serve.ask import Ask
from gptjax.apps.serve.scheduler import Event, Job
from gptjax.decoding.prompts import Scores
from gptjax.tokenizers import Tokenizer, spelling

LEAST_LOGPROB = -9999.0  # what OpenAI reports for a probability of zero, since JSON has no infinity


class Spellings:
    """What the ids of a tokenizer stand for, one at a time."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._byte_level = "ByteLevel" in getattr(tokenizer, "files", {}).get("tokenizer.json", "ByteLevel")

    def bytes(self, id: int) -> bytes:
        """Return a token's bytes; empty for an id that the tokenizer lacks."""
        found = spelling(self._tokenizer, id) or b""
        if self._byte_level:
            return found
        byte = re.fullmatch(rb"<0x([0-9A-F]{2})>", found)
        return bytes([int(byte[1], 16)]) if byte else found.replace("▁".encode(), b" ")

    def text(self, id: int) -> str:
        """Return a token as text; of bytes that are no whole characters, their names."""
        try:
            return self.bytes(id).decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in self.bytes(id))


@dataclass
class Answer:
    """One answer so far.

    Attributes:
        events: one for each token that belongs to the text.
        text: of the answer.
        finish: why it ended.
        drawn: how many tokens were drawn, those that ended it included.
    """

    job: Job
    events: list[Event] = field(default_factory=list)
    text: str = ""
    finish: str | None = None

    def add(self, event: Event) -> None:
        """Add what happened."""
        self.text += event.text
        self.finish = event.finish or self.finish
        if event.token is not None:
            self.events.append(event)

    @property
    def mean_logprob(self) -> float:
        """The mean log-probability of its tokens, by which `best_of` chooses."""
        return sum(e.logprob for e in self.events) / max(1, len(self.events))


class Replies:
    """Writes the answers to one request.

    Args:
        chat: whether in the layout of /v1/chat/completions.
        model: its name.
        ask: the request.
    """

    def __init__(self, chat: bool, model: str, ask: Ask, spellings: Spellings):
        self._chat, self._ask, self._spellings = chat, ask, spellings
        self._head = {
            "id": ("chatcmpl-" if chat else "cmpl-") + uuid.uuid4().hex,
            "object": "chat.completion" if chat else "text_completion",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": None,
        }

    def whole(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """Return the response to a request that is not streamed: the n best answers of each prompt."""
        ask, chosen = self._ask, []
        for start in range(0, len(answers), ask.best_of):
            several = list(answers[start : start + ask.best_of])
            if ask.best_of > ask.n:
                several.sort(key=lambda answer: -answer.mean_logprob)
            chosen += several[: ask.n]
        choices = [self._choice(number, answer) for number, answer in enumerate(chosen)]
        return {**self._head, "choices": choices, "usage": self._usage(answers)}

    def first(self, number: int, answer: Answer) -> list[dict[str, Any]]:
        """Return the chunks that come before an answer's first token."""
        if self._chat:
            return [self._chunk(number, {"delta": {"role": "assistant", "content": ""}, "logprobs": None})]
        if not self._ask.echo:
            return []
        return [self._chunk(number, {"text": self._echoed(answer), "logprobs": self._logprobs(answer, [], 0)})]

    def next(self, number: int, answer: Answer, event: Event) -> list[dict[str, Any]]:
        """Return the chunks of an event of an answer that holds it already."""
        events = [] if event.token is None else [event]
        offset = len(answer.text) - len(event.text)
        logprobs = self._logprobs(answer, events, offset, with_prompt=False) if events else None
        chunks = []
        if self._chat:
            if event.text or events:
                chunks.append(self._chunk(number, {"delta": {"content": event.text}, "logprobs": logprobs}))
            if event.finish:
                chunks.append(self._chunk(number, {"delta": {}, "logprobs": None}, event.finish))
        elif event.text or events or event.finish:
            chunks.append(self._chunk(number, {"text": event.text, "logprobs": logprobs}, event.finish))
        return chunks

    def last(self, answers: Sequence[Answer]) -> list[dict[str, Any]]:
        """Return the chunk with the usage, where it is asked for."""
        if not self._ask.include_usage:
            return []
        return [{**self._stream_head, "choices": [], "usage": self._usage(answers)}]

    @property
    def _stream_head(self) -> dict[str, Any]:
        return {**self._head, "object": "chat.completion.chunk"} if self._chat else self._head

    def _chunk(self, number: int, values: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
        return {**self._stream_head, "choices": [{"index": number, **values, "finish_reason": finish}]}

    def _choice(self, number: int, answer: Answer) -> dict[str, Any]:
        logprobs = self._logprobs(answer, answer.events, 0)
        end = {"logprobs": logprobs, "finish_reason": answer.finish}
        if self._chat:
            return {"index": number, "message": {"role": "assistant", "content": answer.text, "refusal": None}, **end}
        return {"index": number, "text": self._echoed(answer) * self._ask.echo + answer.text, **end}

    def _echoed(self, answer: Answer) -> str:
        return next(
            text for ids, text in zip(self._ask.prompts, self._ask.texts, strict=True) if ids is answer.job.ids
        )

    def _usage(self, answers: Sequence[Answer]) -> dict[str, Any]:
        read = sum(map(len, self._ask.prompts))
        reused = sum(a.job.reading.reused for a in answers[:: self._ask.best_of] if a.job.reading is not None)
        drawn = sum(answer.job.drawn for answer in answers)
        details = {"cached_tokens": reused}
        return {
            "prompt_tokens": read,
            "completion_tokens": drawn,
            "total_tokens": read + drawn,
            "prompt_tokens_details": details,
        }

    def _logprobs(self, answer: Answer, events: Sequence[Event], offset: int, with_prompt: bool = True) -> Any:
        """Return the probabilities of an answer's tokens, and before them those of an echoed prompt."""
        k = self._ask.logprobs
        if k is None:
            return None
        if self._chat:
            return {"content": [self._chat_logprob(event, k) for event in events], "refusal": None}
        tokens, values, tops = [], [], []
        if self._ask.echo and with_prompt:
            assert answer.job.reading is not None
            tokens, values, tops = self._prompt_logprobs(answer.job.ids, answer.job.reading.scores, k)
        for event in events:
            tokens.append(self._spellings.text(event.token))
            values.append(max(event.logprob, LEAST_LOGPROB))
            tops.append(self._top(event.token, event.logprob, event.alternatives, k))
        offsets, at = [], offset
        for token in tokens:
            offsets.append(at)
            at += len(token)
        return {
            "tokens": tokens,
            "token_logprobs": values,
            "top_logprobs": tops if k else None,
            "text_offset": offsets,
        }

    def _prompt_logprobs(self, ids: Sequence[int], scores: Scores, k: int) -> tuple[list, list, list]:
        tokens = [self._spellings.text(id) for id in ids]
        tops = [
            self._top(id, value, (alternatives, values), k)
            for id, value, alternatives, values in zip(
                ids[1:], scores.logprobs, scores.ids, scores.values, strict=True
            )
        ]
        return tokens, [None, *scores.logprobs], [None, *tops]

    def _top(self, token: int | None, logprob: float, alternatives: Any, k: int) -> dict[str, float]:
        """Return the k likeliest tokens by their text, and the token itself."""
        found = {}
        if alternatives is not None:
            for id, value in zip(alternatives[0][:k].tolist(), alternatives[1][:k].tolist(), strict=True):
                found.setdefault(self._spellings.text(id), max(value, LEAST_LOGPROB))
        if token is not None:
            found.setdefault(self._spellings.text(token), max(logprob, LEAST_LOGPROB))
        return found

    def _chat_logprob(self, event: Event, k: int) -> dict[str, Any]:
        assert event.token is not None and event.alternatives is not None
        ids, values = (x[:k].tolist() for x in event.alternatives)
        tops = [self._one(id, value) for id, value in zip(ids, values, strict=True)]
        return {**self._one(event.token, event.logprob), "top_logprobs": tops}

    def _one(self, id: int, logprob: float) -> dict[str, Any]:
        text, data = self._spellings.text(id), self._spellings.bytes(id)
        return {"token": text, "logprob": max(logprob, LEAST_LOGPROB), "bytes": list(data)}
