"""Decode ids that arrive one after another."""

from collections.abc import Iterable

from gptjax.tokenizers.plain import Tokenizer


class TextDecoder:
    """Decodes ids as they arrive, so that all pieces together equal the text decoded at once.

    Incomplete characters, and text that later ids may still change, are held back. Only the ids since the last whole
    character, and those of the previous piece, are decoded again: some tokenizers drop the space before the first
    word that they decode, and the previous piece prevents that.

    Args:
        tokenizer: whose `decode` gives the text.
        before: preceding ids, whose text is not returned.
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
        """Return the text that was held back, after the last id."""
        text = self._tokenizer.decode(self._context + self._pending)
        pairs = zip(text, self._given, strict=False)
        differing = next((place for place, (now, then) in enumerate(pairs) if now != then), len(self._given))
        return text[differing:]


def text_after(tokenizer: Tokenizer, before: Iterable[int], ids: Iterable[int]) -> str:
    """Return the text of ids, decoded in the context of the ids before them."""
    decoder = TextDecoder(tokenizer, before)
    return decoder.add(ids) + decoder.finish()
