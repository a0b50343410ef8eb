"""Conversations as token ids: which text a chat template makes of the messages, and which of its tokens are learnt.

What the assistant says is learnt, with the token that ends its turn. Where a template marks it by
`{% generation %}`, the marks decide. Elsewhere a turn is what the template adds after the text that asks for it
(`add_generation_prompt`), up to its last token that is no white space. Ids are those of the whole text, and a token
is learnt where it has a character of such a span.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from gptjax.errors import UserError, nearest
from gptjax.tokenizers import ChatTemplate, Tokenizer

ROLES = ("system", "user", "assistant", "tool")
# The names under which a row holds a conversation of two turns.
PAIRS = (("prompt", "response"), ("prompt", "completion"), ("source", "target"))


class Laid(NamedTuple):
    """A conversation as token ids.

    Attributes:
        ids: int32 [n].
        learnt: bool [n]: whether a token is the assistant's.
        turns: int64 [k]: how many tokens there are up to the end of each assistant's turn.
        straddles: whether a token stands across the boundary of a turn.
    """

    ids: np.ndarray
    learnt: np.ndarray
    turns: np.ndarray
    straddles: bool


def messages_of(row: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    """Return the messages of a row: its `messages`, or those of a prompt and its response.

    Args:
        where: the row's place, for messages.

    Raises:
        UserError: none of the known fields, an unknown role, a message without text, or nothing that the assistant
            says.
    """
    if "messages" in row:
        return check_messages(row["messages"], where)
    for prompt, response in PAIRS:
        if prompt in row and response in row:
            return check_messages(
                [*as_messages(row[prompt], "user"), *as_messages(row[response], "assistant")], where
            )
    known = ", ".join(f"{prompt} and {response}" for prompt, response in PAIRS)
    raise UserError(f"{where} has the fields {', '.join(map(repr, row)) or 'none'}; needed are messages, or {known}")


def as_messages(value: Any, role: str) -> list[Any]:
    """Return a text as one message of a role, and messages as they are."""
    return value if isinstance(value, list) else [{"role": role, "content": value}]


def check_messages(messages: Any, where: str) -> list[dict[str, Any]]:
    """Return the messages of one conversation; raise UserError as `messages_of`."""
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{where} has no messages; write a list of objects with role and content")
    found = []
    for message in messages:
        if not isinstance(message, dict) or "role" not in message:
            raise UserError(f"{where} has a message without a role: {message!r}"[:300])
        role = message["role"]
        if role not in ROLES:
            raise UserError(
                f"{where} has the role {role!r}, not one of {', '.join(ROLES)}{nearest(str(role), ROLES)}"
            )
        content, calls = message.get("content"), message.get("tool_calls")
        if not isinstance(content, str) and not calls:
            raise UserError(f"{where} has a message of role {role} whose content is no text: {content!r}"[:300])
        if role == "assistant" and not (content or "").strip() and not calls:
            raise UserError(f"{where} has a response without tokens; write one, or remove the conversation")
        found.append({**message, "content": content})
    if all(message["role"] != "assistant" for message in found):
        raise UserError(f"{where} has no message of role assistant, so there is nothing to learn")
    return found


def lay_out(template: ChatTemplate, tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], where: str) -> Laid:
    """Return a conversation as token ids.

    Raises:
        UserError: the template refuses the conversation, or does not show where the assistant's turns are.
    """
    try:
        text, spans = template.render_marked(messages)
        spans = spans if template.marks else turn_spans(template, tokenizer, messages, text)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    ids, places = tokenizer.encode_places(text)
    learnt, turns, straddles = np.zeros(len(ids), bool), [], False
    for start, end in spans:
        inside = np.flatnonzero((places[:, 0] < end) & (places[:, 1] > start))
        if len(inside):
            learnt[inside] = True
            turns.append(int(inside[-1]) + 1)
            straddles |= bool(places[inside[0], 0] < start or places[inside[-1], 1] > end)
    if not turns:
        raise UserError(
            f"{where}: the chat template writes nothing of what the assistant says; give data.chat_template another"
        )
    return Laid(ids, learnt, np.array(turns, np.int64), straddles)


def turn_spans(
    template: ChatTemplate, tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], text: str
) -> list[tuple[int, int]]:
    """Return the spans of the assistant's turns in a text, of a template that marks none.

    Raises:
        UserError: the text before a turn, alone, is not the beginning of the whole text.
    """
    spans: list[tuple[int, int]] = []
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = template.render(messages[:number]) if number else ""
        if not text.startswith(before):
            raise UserError(
                f"the chat template writes what comes before message {number + 1} differently when that is there; "
                "give data.chat_template a template that marks the assistant's text by {% generation %}"
            )
        start = max(len(before), spans[-1][1] if spans else 0)
        spans.append((start, _turn_end(template, tokenizer, messages[: number + 1], text, start)))
    return spans


def _turn_end(
    template: ChatTemplate, tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], text: str, start: int
) -> int:
    """Return where the last turn of these messages ends in the whole text, without the white space after its end."""
    through = template.render(messages, add_generation_prompt=False)
    names = tuple(tokenizer.special_tokens)
    if text.startswith(through):
        trimmed = through.rstrip()
        return max(start, len(trimmed) if trimmed.endswith(names) else len(through))
    # The template writes a turn differently where others follow: it ends with the next token that ends a turn.
    last = next((name for name in names if through.rstrip().endswith(name)), None)
    place = -1 if last is None else text.find(last, start)
    if place < 0:
        raise UserError(
            f"the chat template does not show where message {len(messages)} ends; give data.chat_template a template "
            "that marks the assistant's text by {% generation %}"
        )
    return place + len(last)
