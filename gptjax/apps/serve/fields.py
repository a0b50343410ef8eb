"""The fields of a request's JSON object, each with its type and range."""

import json
import math
from typing import Any, NoReturn

from gptjax.apps.serve.errors import ApiError
from gptjax.errors import nearest
from gptjax.shell.paths import is_text

SHOWN = 60  # characters of a wrong value that an error repeats
# Fields of OpenAI's API that change nothing here, and those that are taken only with values that ask for nothing.
WITHOUT_EFFECT = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key")
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": (),
    "verbosity": (),
    "web_search_options": (),
}


def parse_object(body: bytes) -> dict[str, Any]:
    """Return the JSON object of a body; raises ApiError where it is none."""
    try:
        values = json.loads(body.decode("utf-8"), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise ApiError(400, f"the body is not UTF-8: byte {error.start} is {body[error.start]:#04x}") from None
    except RecursionError:
        raise ApiError(400, "the body is nested too deeply") from None
    except ValueError as error:
        raise ApiError(400, f"the body is not JSON: {str(error)[:200]}") from None
    if not isinstance(values, dict):
        raise ApiError(400, f"the body is a JSON {type(values).__name__}; send an object")
    return values


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


class Fields:
    """Reads the fields of a request; `null` counts as absent. Every reader raises ApiError for a wrong value."""

    def __init__(self, values: dict[str, Any]):
        self._values = {name: value for name, value in values.items() if value is not None}
        self._known: set[str] = set()

    def any(self, name: str) -> Any:
        """Return a field of any type; None where it is absent."""
        self._known.add(name)
        return self._values.get(name)

    def text(self, name: str, default: str | None = None) -> str | None:
        """Return a text that has a UTF-8 form."""
        value = self.any(name)
        if value is None:
            return default
        if not isinstance(value, str):
            self._refuse(name, value, "must be a string")
        return checked_text(value, name)

    def flag(self, name: str) -> bool:
        """Return a boolean, False where it is absent."""
        value = self.any(name)
        if not isinstance(value, bool | None):
            self._refuse(name, value, "must be true or false")
        return bool(value)

    def integer(self, name: str, default: Any, low: int, high: int) -> Any:
        """Return an integer in [low, high]."""
        value = self.any(name)
        if value is None:
            return default
        if type(value) is not int or not low <= value <= high:
            self._refuse(name, value, f"must be an integer in [{low}, {high}]")
        return value

    def number(self, name: str, default: Any, low: float, high: float) -> Any:
        """Return a finite number in [low, high]."""
        value = self.any(name)
        if value is None:
            return default
        if type(value) not in (int, float) or not math.isfinite(value) or not low <= value <= high:
            self._refuse(name, value, f"must be a number in [{low:g}, {high:g}]")
        return float(value)

    def texts(self, name: str, most: int, longest: int) -> list[str]:
        """Return a list of non-empty texts, which may be given as a single one."""
        value = self.any(name)
        several = [] if value is None else [value] if isinstance(value, str) else value
        if not isinstance(several, list) or len(several) > most:
            self._refuse(name, value, f"must be a string or a list of at most {most}")
        for text in several:
            if not isinstance(text, str) or not 0 < len(text) <= longest:
                self._refuse(name, text, f"must hold strings of 1 to {longest} characters")
        return [checked_text(text, name) for text in several]

    def finish(self) -> None:
        """Refuse fields that nobody read, other than those that ask for nothing."""
        for name, value in self._values.items():
            if name in self._known or name in WITHOUT_EFFECT:
                continue
            if name not in NEUTRAL:
                known = [*self._known, *NEUTRAL, *WITHOUT_EFFECT]
                raise ApiError(400, f"unknown field {shown(name)}{nearest(name, known)}", shown(name))
            if value not in NEUTRAL[name] or isinstance(value, bool) != (name == "parallel_tool_calls"):
                raise ApiError(400, f"{name} is not supported by this server; leave it out", name)

    def _refuse(self, name: str, value: Any, rule: str) -> NoReturn:
        raise ApiError(400, f"{name} {shown(value)} {rule}", name)


def checked_text(text: str, name: str) -> str:
    """Return a text; raises ApiError where it has no UTF-8 form."""
    if not is_text(text):
        raise ApiError(400, f"{name} holds half a surrogate pair; send Unicode text", name)
    return text


def shown(value: Any) -> str:
    """Return a value as an error repeats it: in ASCII, and short."""
    text = json.dumps(value) if not isinstance(value, float) else repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
