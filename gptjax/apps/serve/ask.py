"""What a request asks for: its JSON fields, checked, as prompts of ids and settings."""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gptjax.apps.serve.errors import ApiError
from gptjax.apps.serve.fields import Fields, checked_text, shown
from gptjax.decoding.grammars import ANY_OBJECT
from gptjax.decoding.prompts import N_ALTERNATIVES
from gptjax.generate import LanguageModel
from gptjax.sampling import Sampling
from gptjax.tokenizers import ChatTemplate

MAX_TEXTS = 128  # of one request: prompts times best_of
MAX_STOPS, MAX_STOP_CHARACTERS = 16, 256
MAX_COMPLETION_LOGPROBS = 5
MAX_INSPECTED_TOKENS = 256  # of the text whose attention and logit lens are shown: T^2 weights, T words of each layer
DEFAULT_COMPLETION_TOKENS = 16
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}


@dataclass(frozen=True)
class Ask:
    """A request for text.

    Attributes:
        prompts: ids of each prompt.
        texts: their texts, which `echo` repeats.
        n: how many answers to return for each prompt, of `best_of` that are drawn.
        max_tokens: of an answer; 0 draws none.
        seed: of the draws; answer j of prompt i draws by row i * best_of + j of `row_keys(seed)`.
        logprobs: how many likeliest tokens to report beside each; None for no probabilities.
        echo: whether the answer begins with its prompt.
        schema: JSON schema that the answer matches; None for free text.
    """

    prompts: list[list[int]]
    texts: list[str]
    n: int
    best_of: int
    max_tokens: int
    sampling: Sampling
    seed: int
    stops: list[str]
    stream: bool
    include_usage: bool
    logprobs: int | None
    echo: bool = False
    schema: dict[str, Any] | None = None


class Asking:
    """Reads requests for a model.

    Args:
        lm: the model.
        context: the most tokens of prompt and answer.
        template: lays out conversations; None where the model has none.
    """

    def __init__(self, lm: LanguageModel, context: int, template: ChatTemplate | None):
        self._lm, self._context, self._template = lm, context, template

    @property
    def chats(self) -> bool:
        """Whether the model has a chat template."""
        return self._template is not None

    def completion(self, values: dict[str, Any]) -> Ask:
        """Return what /v1/completions is asked for."""
        fields = Fields(values)
        fields.any("model")  # by which the server chose this one
        prompts, texts = self._prompts(fields.any("prompt"))
        echo = fields.flag("echo")
        logprobs = fields.integer("logprobs", None, 0, MAX_COMPLETION_LOGPROBS)
        room = self._room(prompts, "prompt")
        limit = fields.integer("max_tokens", min(DEFAULT_COMPLETION_TOKENS, room), 0, 10**9)
        n = fields.integer("n", 1, 1, 10**9)
        best_of = fields.integer("best_of", n, 1, 10**9)
        if best_of < n:
            raise ApiError(400, f"best_of {best_of} is below n {n}; make it at least n", "best_of")
        return self._finish(
            fields, prompts, texts, n=n, best_of=best_of, limit=limit, room=room, logprobs=logprobs, echo=echo
        )

    def chat(self, values: dict[str, Any]) -> Ask:
        """Return what /v1/chat/completions is asked for."""
        fields = Fields(values)
        fields.any("model")  # by which the server chose this one
        text = self.conversation(fields.any("messages"))
        ids = self._lm.tokenizer.encode(text).tolist()
        room = self._room([ids], "messages")
        limit = fields.integer("max_completion_tokens", fields.integer("max_tokens", room, 1, 10**9), 1, 10**9)
        n = fields.integer("n", 1, 1, 10**9)
        alternatives = fields.integer("top_logprobs", 0, 0, N_ALTERNATIVES)
        wanted = fields.flag("logprobs")
        if alternatives and not wanted:
            raise ApiError(400, "top_logprobs needs logprobs: true", "top_logprobs")
        logprobs = alternatives if wanted else None
        return self._finish(fields, [ids], [text], n=n, best_of=n, limit=limit, room=room, logprobs=logprobs)

    def embedding(self, values: dict[str, Any]) -> tuple[list[list[int]], bool]:
        """Return the prompts of /v1/embeddings, and whether the answer is in base64."""
        fields = Fields(values)
        fields.any("model")  # by which the server chose this one
        prompts, _ = self._prompts(fields.any("input"), "input")
        self._room(prompts, "input", least=0)
        form = fields.text("encoding_format", "float")
        if form not in ("float", "base64"):
            raise ApiError(400, f"encoding_format {shown(form)} must be float or base64", "encoding_format")
        if fields.any("dimensions") not in (None, self._lm.config.d_model):
            raise ApiError(400, f"dimensions must be {self._lm.config.d_model}, or left out", "dimensions")
        fields.finish()
        return prompts, form == "base64"

    def tokens(self, values: dict[str, Any]) -> list[int]:
        """Return the ids of a text or a conversation (/tokenize)."""
        fields = Fields(values)
        fields.any("model")  # by which the server chose this one
        ids = self._text_or_messages(fields)
        fields.finish()
        return ids

    def inspection(self, values: dict[str, Any]) -> tuple[list[int], int, int]:
        """Return the ids of a text or a conversation, a layer and a head, both from 0 (/inspect)."""
        fields, cfg = Fields(values), self._lm.config
        fields.any("model")  # by which the server chose this one
        ids = self._text_or_messages(fields)
        layer = fields.integer("layer", cfg.n_layers - 1, 0, cfg.n_layers - 1)
        head = fields.integer("head", 0, 0, cfg.n_heads - 1)
        fields.finish()
        most = min(self._context, MAX_INSPECTED_TOKENS)
        if len(ids) > most:
            raise ApiError(
                400, f"the text has {len(ids)} tokens, and at most {most} are looked at; shorten it", "prompt"
            )
        return ids, layer, head

    def _text_or_messages(self, fields: Fields) -> list[int]:
        text, messages = fields.text("prompt"), fields.any("messages")
        if (text is None) == (messages is None):
            raise ApiError(400, "give either prompt or messages", "prompt")
        if text is None:
            return self._lm.tokenizer.encode(self.conversation(messages)).tolist()
        return self._lm.tokenizer.encode_prompt(text).tolist()

    def conversation(self, messages: Any) -> str:
        """Return a conversation as the text that the model continues."""
        if self._template is None:
            raise ApiError(400, "this model has no chat template; use /v1/completions", "messages")
        if not isinstance(messages, list) or not messages:
            raise ApiError(400, "messages must be a list of at least one message", "messages")
        return self._template.render([_message(message, i) for i, message in enumerate(messages)])

    def _prompts(self, given: Any, name: str = "prompt") -> tuple[list[list[int]], list[str]]:
        """Return the ids and texts of a prompt: a text, ids, or a list of either."""
        if given is None and name == "input":
            raise ApiError(400, "input is missing", "input")
        several = [""] if given is None else [given] if isinstance(given, str) else given
        if isinstance(several, list) and several and all(type(x) is int for x in several):
            several = [several]
        if not isinstance(several, list) or not 0 < len(several) <= MAX_TEXTS:
            rule = f"must be a string, a list of ids, or a list of 1 to {MAX_TEXTS} of these"
            raise ApiError(400, f"{name} {shown(given)} {rule}", name)
        prompts, texts = [], []
        for one in several:
            if isinstance(one, str):
                prompts.append(self._lm.prompt_ids(checked_text(one, name)))
                texts.append(one)
            else:
                prompts.append(self._checked_ids(one, name))
                texts.append(self._lm.tokenizer.decode(one))
        return prompts, texts

    def _checked_ids(self, ids: Any, name: str) -> list[int]:
        V = self._lm.config.vocab_size
        if not isinstance(ids, list) or not ids or any(type(id) is not int or not 0 <= id < V for id in ids):
            raise ApiError(400, f"{name} {shown(ids)} must be a text or a list of ids in [0, {V})", name)
        return ids

    def _room(self, prompts: Sequence[Sequence[int]], name: str, least: int = 1) -> int:
        """Return how many tokens fit after the longest prompt."""
        longest = max(map(len, prompts))
        if longest + least > self._context:
            said = f"{name} has {longest} tokens, and this server's limit for prompt and answer is {self._context}"
            raise ApiError(400, f"{said}; shorten it", name, "context_length_exceeded")
        return self._context - longest

    def _finish(
        self,
        fields: Fields,
        prompts: list[list[int]],
        texts: list[str],
        *,
        n: int,
        best_of: int,
        limit: int,
        room: int,
        logprobs: int | None,
        echo: bool = False,
    ) -> Ask:
        """Read the fields that both kinds of requests have."""
        if limit > room:
            said = f"max_tokens {limit} and a prompt of {self._context - room} tokens exceed this server's limit"
            raise ApiError(
                400, f"{said} of {self._context}; lower max_tokens", "max_tokens", "context_length_exceeded"
            )
        if len(prompts) * best_of > MAX_TEXTS:
            said = f"{len(prompts)} prompts with {best_of} answers each are over this server's limit of {MAX_TEXTS}"
            raise ApiError(400, f"{said}; ask for fewer", "n")
        temperature = fields.number("temperature", 1.0, 0, 100)
        top_p = fields.number("top_p", 1.0, 0, 1)
        top_k = fields.integer("top_k", None, 1, 10**9)
        min_p = fields.number("min_p", None, 0, 1)
        # top_p 0 keeps the likeliest token, which is what temperature 0 draws.
        sampling = Sampling(temperature if top_p > 0 else 0.0, top_k, top_p if top_p > 0 else None, min_p)
        stream = fields.flag("stream")
        if stream and best_of > n:
            raise ApiError(400, "best_of cannot be streamed, since the best is known at the end", "best_of")
        seed = fields.integer("seed", None, -(2**63), 2**63 - 1)
        ask = Ask(
            prompts,
            texts,
            n,
            best_of,
            limit,
            sampling,
            secrets.randbits(32) if seed is None else seed % 2**32,
            fields.texts("stop", MAX_STOPS, MAX_STOP_CHARACTERS),
            stream,
            stream and _includes_usage(fields.any("stream_options")),
            logprobs,
            echo,
            _schema(fields.any("response_format")),
        )
        fields.any("stream_options")
        fields.finish()
        return ask


def _message(message: Any, number: int) -> dict[str, str]:
    """Return one message of a conversation with its content as text."""
    where = f"messages[{number}]"
    if not isinstance(message, dict):
        raise ApiError(400, f"{where} {shown(message)} must be an object with role and content", "messages")
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or role not in ROLES:
        raise ApiError(400, f"{where}.role {shown(role)} must be one of {', '.join(ROLES)}", "messages")
    if message.get("tool_calls") or message.get("function_call"):
        raise ApiError(400, f"{where} calls tools, which this server does not support", "messages")
    if isinstance(content, list):
        parts = [
            part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in content
        ]
        if not all(isinstance(part, str) for part in parts):
            raise ApiError(400, f"{where}.content holds a part that is no text; send text alone", "messages")
        content = "".join(part for part in parts if part is not None)
    if not isinstance(content, str):
        raise ApiError(400, f"{where}.content {shown(content)} must be a string", "messages")
    return {"role": ROLES[role], "content": checked_text(content, "messages")}


def _includes_usage(options: Any) -> bool:
    if options is None:
        return False
    if not isinstance(options, dict) or not isinstance(options.get("include_usage", False), bool):
        raise ApiError(400, "stream_options must be an object with include_usage true or false", "stream_options")
    return options.get("include_usage", False)


def _schema(given: Any) -> dict[str, Any] | None:
    """Return the JSON schema of a response_format; None for free text."""
    kind = given.get("type") if isinstance(given, dict) else None
    if given is None or kind == "text":
        return None
    if kind == "json_object":
        return ANY_OBJECT
    described = given.get("json_schema") if kind == "json_schema" else None
    schema = described.get("schema") if isinstance(described, dict) else None
    if not isinstance(schema, dict):
        rule = "must have the type text, json_object, or json_schema with json_schema.schema"
        raise ApiError(400, f"response_format {shown(given)} {rule}", "response_format")
    return schema
