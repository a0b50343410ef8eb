"""Chat templates: a conversation laid out as the text that a model was trained on.

A template is a Jinja program of the model's author, and a model may come from anywhere: it runs in the sandbox of
sandbox.py, where it can read what it is given and nothing else, and is stopped where it does too much.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from gptjax.errors import UserError
from gptjax.tokenizers.auto import options_of, token_text
from gptjax.tokenizers.plain import Tokenizer

Message = Mapping[str, Any]  # role and content, and whatever else the template reads
NAMED_TOKENS = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
LONGEST_REASON = 200  # characters of what a template says is wrong
# Noncharacters, which no text contains: they enclose what a template marks as the assistant's.
BEGIN, END = "\ufdd0", "\ufdd1"


class Rendered(NamedTuple):
    """A conversation as text.

    Attributes:
        text: as transformers renders it.
        spans: [start, end) in characters of what the template marks by `{% generation %}`, in order.
    """

    text: str
    spans: list[tuple[int, int]]


class ChatTemplate:
    """A model's template, ready to render.

    Args:
        text: the Jinja program.
        tokens: the texts of special tokens by the names that templates use, such as `eos_token`.
        date: what the template's clock shows, as `%Y-%m-%d`; None for today. Texts to train on must not change
            from one day to the next.

    Raises:
        UserError: jinja2 is missing, or the template is not one.
    """

    def __init__(self, text: str, tokens: Mapping[str, str] | None = None, date: str | None = None):
        self._tokens = dict(tokens or {})
        try:
            import jinja2

            from gptjax.tokenizers.sandbox import make_environment
        except ImportError:
            raise UserError("a chat template needs jinja2: pip install jinja2") from None
        self._environment = make_environment(BEGIN, END, date)
        self.marks = bool(re.search(r"\{%-?\s*generation\b", text))
        try:
            self._template = self._environment.from_string(text)
        except (jinja2.TemplateError, RecursionError) as error:
            raise UserError(f"the model's chat template is damaged: {_reason(error)}") from None

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """Return a conversation as text, as `apply_chat_template` of transformers does.

        Args:
            add_generation_prompt: whether the text ends where the assistant's next answer begins.

        Raises:
            UserError: the template refuses these messages, or it tries to leave the sandbox.
        """
        return self.render_marked(messages, add_generation_prompt).text

    def render_marked(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> Rendered:
        """Return a conversation as text, with what the template marks as the assistant's.

        Raises:
            UserError: as `render`; a message with one of the characters that mark.
        """
        if any(mark in str(message) for message in messages for mark in (BEGIN, END)):
            raise UserError(f"a message contains {BEGIN!a} or {END!a}, which is no character of a text; remove it")
        values = {"messages": [dict(message) for message in messages], "add_generation_prompt": add_generation_prompt}
        try:
            self._environment.start_counting()
            text = self._template.render(tools=None, documents=None, **self._tokens, **values)
        except Exception as error:  # a template can raise whatever its expressions do
            raise UserError(f"the model's chat template refuses this conversation: {_reason(error)}") from None
        return _without_marks(text)


def _without_marks(text: str) -> Rendered:
    """Return a text without its marks, and where they stood; an inner pair belongs to the outer one."""
    pieces, spans, length, depth, start = [], [], 0, 0, 0
    for piece in re.split(f"([{BEGIN}{END}])", text):
        if piece == BEGIN:
            depth += 1
            start = length if depth == 1 else start
        elif piece == END:
            depth -= 1
            if depth == 0:
                spans.append((start, length))
        else:
            pieces.append(piece)
            length += len(piece)
    return Rendered("".join(pieces), spans)


def chat_template(tokenizer: Tokenizer, date: str | None = None) -> ChatTemplate:
    """Return the chat template of a tokenizer.

    Args:
        date: as in `ChatTemplate`.

    Raises:
        UserError: it has none, or a damaged one.
    """
    if tokenizer.chat_template is None:
        raise UserError(
            "this model has no chat template; use one that was tuned on conversations, or plain completion"
        )
    facts = options_of(getattr(tokenizer, "files", {}))
    named = {f"{name}_token": token_text(facts.get(f"{name}_token")) for name in NAMED_TOKENS}
    tokens = {name: text for name, text in named.items() if text is not None}
    ends = [name for name, id in tokenizer.special_tokens.items() if id == tokenizer.eos_id]
    tokens = {**({"eos_token": ends[0]} if ends else {}), **tokens}
    return ChatTemplate(tokenizer.chat_template, tokens, date)


def chatml(tokenizer: Tokenizer) -> str:
    """Return the ChatML template for a tokenizer: a turn ends with <|im_end|>, or with the token that ends a text.

    A vocabulary without <|im_end|> would write it as several tokens, and sampling would not stop after them.
    """
    end, ends = "<|im_end|>", {id: name for name, id in tokenizer.special_tokens.items()}
    if end not in tokenizer.special_tokens and tokenizer.eos_id in ends:
        end = ends[tokenizer.eos_id]
    turn = "{{ message['content'] + " + json.dumps(end) + " }}"
    return (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
        "{% if message['role'] == 'assistant' %}{% generation %}" + turn + "{% endgeneration %}"
        "{% else %}" + turn + "{% endif %}{{ '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )


def _reason(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:LONGEST_REASON]
