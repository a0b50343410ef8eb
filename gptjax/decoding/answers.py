"""The text of an answer as its tokens arrive, up to a stop string or the last of its lines."""

from collections.abc import Sequence

from gptjax.tokenizers import TextDecoder, Tokenizer


class AnswerText:
    """Decodes an answer. Text that may be the beginning of a stop string is held back.

    Args:
        tokenizer: of the model.
        before: the ids of the prompt.
        stops: texts that end the answer and are no part of it.
        max_lines: the answer ends before so many line ends; None for no limit.

    Attributes:
        stopped: whether the answer has ended, at a stop string or at its last line.
    """

    def __init__(
        self, tokenizer: Tokenizer, before: Sequence[int], stops: Sequence[str] = (), max_lines: int | None = None
    ):
        self._decoder, self._stops, self._lines_left = TextDecoder(tokenizer, before), tuple(stops), max_lines
        self._held, self.stopped = "", False

    def add(self, token: int) -> str:
        """Return the text that a further token makes certain."""
        return self._release(self._decoder.add([token]))

    def finish(self) -> str:
        """Return what is held back, after the last token."""
        if self.stopped:
            return ""
        return self._release(self._decoder.finish()) + self._held * (not self.stopped)

    def _release(self, new: str) -> str:
        text, self._held = self._held + new, ""
        found = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if self._lines_left is not None:
            ends = [place for place, character in enumerate(text) if character == "\n"]
            found += ends[self._lines_left - 1 :][:1]
        if found:
            self.stopped = True
            return text[: min(found)]
        longest = max(map(len, self._stops), default=1) - 1
        for n in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-n:]) for stop in self._stops):
                self._held = text[-n:]
                break
        certain = text[: len(text) - len(self._held)]
        if self._lines_left is not None:
            self._lines_left -= certain.count("\n")
        return certain
