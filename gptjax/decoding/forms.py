"""Texts in a form that a user asks for: up to a stop string, of so many lines, or as a regular expression says.

texts = FormDecoder(lm, Form(regex=r"[0-9]{4}")).complete(["Born on "], 20, Sampling(0.8))
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from gptjax.decoding.answers import AnswerText
from gptjax.decoding.grammars import Grammars, TokenGrammar
from gptjax.errors import UserError
from gptjax.generate import CHUNK_OF_TEXT, Completion, LanguageModel
from gptjax.sampling import Sampling


class Form(NamedTuple):
    """What a continuation looks like.

    Attributes:
        stop: ends the text and is no part of it; None for none.
        max_lines: the text has at most so many lines; None for any number.
        regex: the whole text matches this regular expression (Rust's syntax); None for any text.
    """

    stop: str | None = None
    max_lines: int | None = None
    regex: str | None = None

    def check(self) -> "Form":
        """Return the form; raises UserError for values out of range."""
        if self.stop == "":
            raise UserError("the stop string is empty; give at least one character")
        if self.max_lines is not None and self.max_lines < 1:
            raise UserError(f"max_lines {self.max_lines} must be at least 1")
        return self


class FormDecoder:
    """Generates texts of one form.

    Args:
        lm: the model.
        form: of every text.

    Attributes:
        incomplete: how many texts ended before they matched the regular expression.

    Raises:
        UserError: values out of range, no regular expression, or its library is missing.
    """

    def __init__(self, lm: LanguageModel, form: Form):
        self._lm, self._form, self.incomplete = lm, form.check(), 0
        self._grammar = None
        if form.regex is not None:
            self._grammar = Grammars(lm.tokenizer, lm.config.vocab_size).regex(form.regex)

    def complete(
        self, prompts: Sequence[str], max_new_tokens: int, sampling: Sampling, seed: int = 0
    ) -> list[Completion]:
        """Return one continuation for each prompt. Row i draws by (seed, i), as in `LanguageModel.complete`."""
        grammars = [None if self._grammar is None else self._grammar.copy() for _ in prompts]
        texts = [_Text(self._lm, p, self._form, g) for p, g in zip(prompts, grammars, strict=True)]
        chunk = CHUNK_OF_TEXT if self._grammar is None else 1
        for _ in self._lm.stream(prompts, max_new_tokens, sampling, seed, chunk, _Texts(texts)):
            pass
        self.incomplete = sum(text.grammar is not None and not text.over for text in texts)
        return [text.completion() for text in texts]


class _Text:
    """One text as its tokens arrive."""

    def __init__(self, lm: LanguageModel, prompt: str, form: Form, grammar: TokenGrammar | None):
        self._prompt, self._ends, self.grammar = prompt, lm.tokenizer.eos_ids, grammar
        stops = [] if form.stop is None else [form.stop]
        self._answer = AnswerText(lm.tokenizer, lm.prompt_ids(prompt), stops, form.max_lines)
        self._ids: list[int] = []
        self._logprobs: list[float] = []
        self._parts: list[str] = []
        self.over = False

    def take(self, token: int, logprob: float) -> None:
        """Take the next token, and find out whether the text is complete."""
        if token in self._ends:
            self.over = True
            return
        self._parts.append(self._answer.add(token))
        self.over = self._answer.stopped
        if not self.over:
            self._ids.append(token)
            self._logprobs.append(logprob)
            self.over = self.grammar is not None and self.grammar.accept(token)

    def completion(self) -> Completion:
        return Completion(self._prompt, self._ids, "".join(self._parts) + self._answer.finish(), self._logprobs)


class _Texts:
    """The texts of a batch, as `LanguageModel.stream` asks for them."""

    def __init__(self, texts: Sequence[_Text]):
        self._texts = texts

    def allowed(self) -> np.ndarray | None:
        """Return which ids each text may draw next, [B, vocab_size] bool; None without a grammar."""
        masks = [None if text.over or text.grammar is None else text.grammar.allowed() for text in self._texts]
        known = next((mask for mask in masks if mask is not None), None)
        if known is None:
            return None
        return np.stack([np.ones_like(known) if mask is None else mask for mask in masks])

    def take(self, tokens: np.ndarray, logprobs: np.ndarray) -> list[int]:
        """Hand each text its tokens; return the rows whose text they complete."""
        going = [row for row, text in enumerate(self._texts) if not text.over]
        for row in going:
            for token, value in zip(tokens[row].tolist(), logprobs[row].tolist(), strict=True):
                if not self._texts[row].over:
                    self._texts[row].take(token, value)
        return [row for row in going if self._texts[row].over]
