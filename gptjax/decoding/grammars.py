"""Grammars as masks of tokens: which ids may follow, so that a text matches a JSON schema or a regular expression.

llguidance does the work; it is imported where a grammar is asked for (extra `serve`).
"""

import json
from typing import Any

import numpy as np

from gptjax.errors import UserError
from gptjax.tokenizers import HuggingFaceTokenizer, Tokenizer, spelling

LONGEST_SCHEMA = 2**16  # characters of JSON
ANY_OBJECT = {"type": "object"}


class TokenGrammar:
    """One text's way through a grammar."""

    def __init__(self, matcher: Any, vocab_size: int):
        self._matcher, self._V = matcher, vocab_size

    def copy(self) -> "TokenGrammar":
        """Return the same state of the same grammar, for another text."""
        return TokenGrammar(self._matcher.deep_copy(), self._V)

    def allowed(self) -> np.ndarray:
        """Return which ids may come next, [vocab_size] bool."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        mask = np.zeros(self._V, bool)
        found = np.unpackbits(bits, bitorder="little")[: self._V].astype(bool)
        mask[: len(found)] = found
        return mask

    def accept(self, token: int) -> bool:
        """Take the token that was drawn; return whether nothing may follow it."""
        return not self._matcher.consume_token(token) or self._matcher.is_stopped()


class Grammars:
    """Makes grammars for a tokenizer.

    Args:
        tokenizer: of the model.
        vocab_size: of the model; masks have so many ids.

    Raises:
        UserError: llguidance is missing.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int):
        try:
            import llguidance
        except ImportError:
            raise UserError("grammars need: pip install 'gptjax[serve]'") from None
        self._library, self._V = llguidance, vocab_size
        # Without an end token, one beyond the vocabulary stands for the end; no model draws it.
        self._ends = list(tokenizer.eos_ids) or [vocab_size]
        size = max(vocab_size, *(end + 1 for end in self._ends))
        if isinstance(tokenizer, HuggingFaceTokenizer):
            self._tokens = llguidance.LLTokenizer(
                tokenizer.files["tokenizer.json"], n_vocab=size, eos_token=self._ends
            )
        else:
            wrapped = llguidance.TokenizerWrapper(_Spelled(tokenizer, size, self._ends[0]))
            self._tokens = llguidance.LLTokenizer(wrapped, eos_token=self._ends)

    def json_schema(self, schema: dict[str, Any]) -> TokenGrammar:
        """Return the grammar of JSON texts, without spaces between their parts, that match a schema.

        Raises:
            UserError: no schema, or one that is too large or has what the library lacks.
        """
        text = json.dumps(schema)
        if len(text) > LONGEST_SCHEMA:
            raise UserError(f"the JSON schema has {len(text)} characters; the limit is {LONGEST_SCHEMA}")
        compact = {"whitespace_flexible": False}
        try:
            grammar = self._library.LLMatcher.grammar_from_json_schema(text, overrides=compact)
        except ValueError as error:
            raise UserError(f"the JSON schema is not one: {_short(error)}") from None
        return self._start(grammar, "JSON schema")

    def regex(self, pattern: str) -> TokenGrammar:
        """Return the grammar of texts that match a regular expression (Rust's syntax) as a whole.

        Raises:
            UserError: no regular expression, or one that is too large.
        """
        return self._start(self._library.LLMatcher.grammar_from_regex(pattern), "regular expression")

    def _start(self, grammar: str, kind: str) -> TokenGrammar:
        matcher = self._library.LLMatcher(self._tokens, grammar, log_level=0)
        if not matcher.is_error():
            matcher.compute_bitmask()  # which finds what the construction does not
        if matcher.is_error():
            raise UserError(f"the {kind} cannot be used: {_short(matcher.get_error())}")
        return TokenGrammar(matcher, self._V)


class _Spelled:
    """A tokenizer as llguidance takes one that it does not know."""

    def __init__(self, tokenizer: Tokenizer, size: int, end: int):
        self.eos_token_id, self.bos_token_id = end, None
        self.tokens = [spelling(tokenizer, id) or b"" for id in range(size)]
        self.special_token_ids = sorted({end, *(id for id in tokenizer.special_tokens.values() if id < size)})
        for id in self.special_token_ids:
            self.tokens[id] = b"<special>"
        self._tokenizer = tokenizer

    def __call__(self, text: str) -> list[int]:
        return self._tokenizer.encode(text).tolist()


def _short(reason: Any) -> str:
    return " ".join(str(reason).split())[:200]
