"""The text of an answer as its tokens arrive, up to the first of its stop strings."""

from collections.abc import Sequence

from gptjax.tokenizers import TextDecoder, Tokenizer


class AnswerText:
    """Decodes an answer. Text that may be the beginning of a stop string is held back.

    Args:
        tokenizer: of the model.
        before: the ids of the prompt.
        stops: texts that end the answer and are no part of it.

    Attributes:
        stopped: whether a stop string was found.
    """

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int], stops: Sequence[str] = ()):
        self._decoder, self._stops = TextDecoder(tokenizer, before), tuple(stops)
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
        if found := [place for stop in self._stops if (place := text.find(stop)) >= 0]:
            self.stopped = True
            return text[: min(found)]
        longest = max(map(len, self._stops), default=1) - 1
        for n in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-n:]) for stop in self._stops):
                self._held = text[-n:]
                return text[:-n]
        return text
