"""Chat templates: a conversation laid out as the text that a model was trained on.

A template is a Jinja program of the model's author, and a model may come from anywhere: it runs in Jinja's immutable
sandbox, where it can read what it is given and nothing else.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from gptjax.errors import UserError
from gptjax.tokenizers.auto import options_of, token_text
from gptjax.tokenizers.plain import Tokenizer

Message = Mapping[str, Any]  # role and content, and whatever else the template reads
NAMED_TOKENS = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
LONGEST_REASON = 200  # characters of what a template says is wrong


class ChatTemplate:
    """A model's template, ready to render.

    Args:
        text: the Jinja program.
        tokens: the texts of special tokens by the names that templates use, such as `eos_token`.

    Raises:
        UserError: jinja2 is missing, or the template is not one.
    """

    def __init__(self, text: str, tokens: Mapping[str, str] | None = None):
        self._tokens = dict(tokens or {})
        try:
            import jinja2
        except ImportError:
            raise UserError("a chat template needs jinja2: pip install jinja2") from None
        try:
            self._template = _environment().from_string(text)
        except (jinja2.TemplateError, RecursionError) as error:
            raise UserError(f"the model's chat template is damaged: {_reason(error)}") from None

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """Return a conversation as text, as `apply_chat_template` of transformers does.

        Args:
            add_generation_prompt: whether the text ends where the assistant's next answer begins.

        Raises:
            UserError: the template refuses these messages, or it tries to leave the sandbox.
        """
        values = {"messages": [dict(message) for message in messages], "add_generation_prompt": add_generation_prompt}
        try:
            return self._template.render(**self._tokens, **values)
        except Exception as error:  # a template can raise whatever its expressions do
            raise UserError(f"the model's chat template refuses this conversation: {_reason(error)}") from None


def chat_template(tokenizer: Tokenizer) -> ChatTemplate:
    """Return the chat template of a tokenizer.

    Raises:
        UserError: it has none, or a damaged one.
    """
    if tokenizer.chat_template is None:
        raise UserError(
            "this model has no chat template; use one that was tuned on conversations, or plain completion"
        )
    facts = options_of(getattr(tokenizer, "files", {}))
    named = {f"{name}_token": token_text(facts.get(f"{name}_token")) for name in NAMED_TOKENS}
    return ChatTemplate(tokenizer.chat_template, {name: text for name, text in named.items() if text is not None})


def _environment() -> Any:
    """Return the environment in which transformers renders templates, with the same functions and filters."""
    from jinja2.ext import Extension, LoopControlExtension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks what the assistant says; here it renders what it holds."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser):
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, LoopControlExtension]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **how: Any) -> str:
    """Return JSON without the HTML escapes of Jinja's own filter."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **how)


def _refuse(message: str) -> None:
    import jinja2

    raise jinja2.TemplateError(message)


def _reason(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:LONGEST_REASON]
