"""The environment in which a chat template runs: Jinja's immutable sandbox, with the functions that transformers
gives to templates, and with bounds.

Jinja's sandbox keeps a template from Python's attributes and from changing what it is given. It does not keep it from
running for hours or from filling the memory: here each rendering has a budget of steps and of characters.

Source: transformers 5.24, utils/chat_template_utils.py (`_cached_compile_jinja_template`).
"""

import json
import re
from collections.abc import Iterable, Iterator
from datetime import datetime
from typing import Any, ClassVar

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, LoopControlExtension
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
from jinja2.visitor import NodeTransformer

STEPS = 2**20  # iterations and calls of one rendering
CHARACTERS = 2**24  # of its text, and of each text that it makes on the way
WIDTH = 1000  # characters to which a template may pad or indent
# Filters that pad, repeat, format or reach for attributes; no published chat template is known to use them.
REMOVED_FILTERS = ("attr", "batch", "center", "filesizeformat", "format", "pprint", "random", "slice", "urlize")
REMOVED_FILTERS += ("wordwrap", "xmlattr")
_WIDE = re.compile(rf"\d{{{len(str(WIDTH))},}}|\*")  # a width in a format, of WIDTH's digits or more


class _Counted(NodeTransformer):
    """Wraps what every loop goes through, and every concatenation, in the environment's counting filters."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        self.generic_visit(node)
        node.iter = nodes.Filter(node.iter, "_counted", [], [], None, None, lineno=node.lineno)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Filter:
        self.generic_visit(node)
        return nodes.Filter(
            nodes.List(node.nodes, lineno=node.lineno), "_joined", [], [], None, None, lineno=node.lineno
        )


class Environment(ImmutableSandboxedEnvironment):
    """The sandbox; `start_counting` before each rendering gives it its budget."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def start_counting(self) -> None:
        """Give the next rendering its budget."""
        self.steps_left, self.characters_left = STEPS, CHARACTERS

    def step(self) -> None:
        """Count an iteration or a call; raises SecurityError where none is left."""
        self.steps_left -= 1
        if self.steps_left < 0:
            raise SecurityError(f"it takes more than {STEPS:,} steps")

    def counted(self, values: Iterable[Any]) -> Iterator[Any]:
        """Yield the values of a loop, each one a step."""
        for value in values:
            self.step()
            yield value

    def joined(self, values: list[Any]) -> str:
        """Return the texts of the operator `~`, joined."""
        texts = [str(value) for value in values]
        check_length(sum(map(len, texts)))
        return "".join(texts)

    def count_output(self, value: Any) -> Any:
        """Return a value that is written, counted by its characters."""
        self.characters_left -= len(value) if isinstance(value, str) else 0
        check_length(CHARACTERS - self.characters_left)
        return value

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        return _Counted().visit(super()._parse(source, name, filename))

    def unsafe_undefined(self, obj: Any, attribute: str) -> Any:
        """Raise at once: Jinja's own value for a forbidden attribute renders as an empty text."""
        raise SecurityError(f"it reaches for the attribute {attribute!r} of a {type(obj).__name__}")

    def call(self, context: Any, obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Call what the template calls, unless it is forbidden or would make too long a text."""
        self.step()
        if isinstance(owner := getattr(obj, "__self__", None), str):
            check_text_method(owner, obj.__name__, args)
        result = super().call(context, obj, *args, **kwargs)
        if isinstance(result, str | list | tuple):
            check_length(len(result))
        return result

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Compute a product, power, sum or remainder, unless it would be too large."""
        sized = [value for value in (left, right) if isinstance(value, str | list | tuple)]
        if operator == "+" and sized:
            check_length(sum(map(len, sized)))
        elif operator == "*" and sized:
            check_length(len(sized[0]) * max(0, int(right if sized[0] is left else left)))
        elif operator == "%" and isinstance(left, str) and _WIDE.search(left):
            raise SecurityError("it formats to a width")
        elif operator in ("*", "**") and not sized and max(abs(left), abs(right)) > 2**32:
            raise SecurityError("it multiplies large numbers")
        elif operator == "**" and abs(right) > 64:
            raise SecurityError("it raises to a large power")
        return super().call_binop(context, operator, left, right)


def check_length(length: int) -> None:
    """Raise SecurityError where a text or list is longer than CHARACTERS."""
    if length > CHARACTERS:
        raise SecurityError(f"it makes more than {CHARACTERS:,} characters")


def check_text_method(text: str, method: str, args: tuple[Any, ...]) -> None:
    """Raise SecurityError where a method of a text would make too long a text."""
    if any(isinstance(arg, int) and arg > WIDTH for arg in args) and method in (
        *("center", "ljust", "rjust", "zfill", "expandtabs"),
    ):
        raise SecurityError(f"it pads to more than {WIDTH:,} characters")
    if method in ("format", "format_map") and _WIDE.search(text):
        raise SecurityError("it formats to a width")
    if method == "replace" and len(args) > 1 and all(isinstance(arg, str) for arg in args[:2]):
        check_length(len(text) + text.count(args[0]) * len(args[1]))
    if method == "join" and args and isinstance(args[0], list | tuple):
        check_length(sum(len(str(part)) + len(text) for part in args[0]))


def make_environment(begin: str, end: str, date: str | None = None) -> Environment:
    """Return the environment for one template.

    Args:
        begin, end: written around what stands in `{% generation %} ... {% endgeneration %}`.
        date: what `strftime_now` shows, as `%Y-%m-%d`; None for today.
    """

    class Generation(Extension):
        """Marks what the assistant says."""

        tags: ClassVar[set[str]] = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            marks = [nodes.Output([nodes.TemplateData(mark)]).set_lineno(line) for mark in (begin, end)]
            return [marks[0], nodes.Scope(body).set_lineno(line), marks[1]]

    made = Environment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, LoopControlExtension])
    made.start_counting()
    made.finalize = made.count_output
    join, replace, indent = (made.filters[name] for name in ("join", "replace", "indent"))
    for name in REMOVED_FILTERS:
        del made.filters[name]

    @jinja2.pass_eval_context
    def bounded_join(context, value, d="", attribute=None):
        parts = list(value)
        check_length(sum(len(str(part)) + len(d) for part in parts))
        return join(context, parts, d, attribute)

    @jinja2.pass_eval_context
    def bounded_replace(context, s, old, new, count=None):
        check_text_method(str(s), "replace", (str(old), str(new)))
        return replace(context, s, old, new, count)

    def bounded_indent(s, width=4, first=False, blank=False):
        check_text_method("", "ljust", (width if isinstance(width, int) else len(width),))
        return indent(s, width, first, blank)

    made.filters |= {"join": bounded_join, "replace": bounded_replace, "indent": bounded_indent}
    made.filters |= {"tojson": _to_json, "_counted": made.counted, "_joined": made.joined}
    made.globals["raise_exception"] = _refuse
    made.globals["strftime_now"] = lambda form: _now(date).strftime(form)
    return made


def _now(date: str | None) -> datetime:
    return datetime.now() if date is None else datetime.strptime(date, "%Y-%m-%d")


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **how: Any) -> str:
    """Return JSON without the HTML escapes of Jinja's own filter."""
    check_text_method("", "ljust", (indent,))
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **how)


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)
