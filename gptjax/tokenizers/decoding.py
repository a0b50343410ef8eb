"""Text of ids that come one after another."""

from collections.abc import Iterable

from gptjax.tokenizers.plain import Tokenizer


class TextDecoder:
    """Turn ids that follow others into text as they come, so that all pieces together are the text at once.

    A character whose bytes are not all there is kept back, and so is what later ids may still change. Only the ids
    since the last whole character and those of one piece before them are decoded anew: some tokenizers drop the
    space before the first word that they decode, and the piece before keeps that word from being first.

    Args:
        tokenizer: whose `decode` gives the text.
        before: ids that the new ones follow, whose text is not given again.
    """

    def __init__(self, tokenizer: Tokenizer, before: Iterable[int] = ()):
        self._tokenizer = tokenizer
        self._context, self._pending = list(before), []
        self._given = tokenizer.decode(self._context)  # of the text of context and pending

    def add(self, ids: Iterable[int]) -> str:
        """Return the text that further ids make certain; empty while they make none."""
        self._pending += ids
        text = self._tokenizer.decode(self._context + self._pending)
        certain = text[: self._tokenizer.certain_length(text)]
        if len(certain) <= len(self._given) or not certain.startswith(self._given):
            return ""
        new = certain[len(self._given) :]
        if certain == text:
            self._context, self._pending = self._pending, []
            self._given = self._tokenizer.decode(self._context)
        else:
            self._given = certain
        return new

    def finish(self) -> str:
        """Return what was kept back, after the last id."""
        text = self._tokenizer.decode(self._context + self._pending)
        pairs = zip(text, self._given, strict=False)
        differing = next((place for place, (now, then) in enumerate(pairs) if now != then), len(self._given))
        return text[differing:]


def text_after(tokenizer: Tokenizer, before: Iterable[int], ids: Iterable[int]) -> str:
    """Return the text of ids that follow others, decoded where they stand."""
    decoder = TextDecoder(tokenizer, before)
    return decoder.add(ids) + decoder.finish()
