"""The words of a command line: options with their values, and what stands alone."""

import os
import re
import sys
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from gptjax.errors import UserError, nearest
from gptjax.shell.paths import is_text, shell

HELP = ("-h", "--help")


class CommandLine(NamedTuple):
    """A command line that was split.

    Attributes:
        options: name without dashes and value, in order. A flag's value is `true` or `false`.
        positionals: the words that belong to no option.
    """

    options: list[tuple[str, str]]
    positionals: list[str]

    @property
    def words(self) -> list[str]:
        """The same for argparse, which then takes no value for an option."""
        alone = ["--", *self.positionals] if self.positionals else []
        return [f"--{name}={value}" for name, value in self.options] + alone


def split_words(args: Sequence[str], options: Mapping[str, bool], program: str) -> CommandLine | None:
    """Split a command line whose options may stand anywhere, as `--name VALUE` or `--name=VALUE`.

    A value may begin with dashes unless it is itself an option, and is then given as `--name=VALUE`. After `--`
    every word stands alone. A flag may stand without a value.

    Args:
        options: the names of all options, each with whether it is a flag.

    Returns:
        None where help is asked for.

    Raises:
        UserError: an unknown option, an option without its value, or a word that is not UTF-8.
    """
    found = CommandLine([], [])
    rest = [_as_text(word) for word in args]
    while rest:
        word = rest.pop(0)
        name, equals, value = word.removeprefix("--").partition("=")
        if word == "--":
            found.positionals.extend(rest)
            break
        if word in HELP:
            return None
        if not word.startswith("-") or word == "-":
            found.positionals.append(word)
        elif not word.startswith("--") or name not in options:
            _refuse_unknown(word, options, program)
        elif equals:
            found.options.append((name, value))
        elif options[name]:
            given = rest[:1] in (["true"], ["false"])
            found.options.append((name, rest.pop(0) if given else "true"))
        else:
            found.options.append((name, _value_of(word, rest, options)))
    return found


def _value_of(option: str, rest: list[str], options: Mapping[str, bool]) -> str:
    if not rest:
        raise UserError(f"{option} needs a value; give {option} VALUE")
    if rest[0] in HELP or (rest[0].startswith("--") and rest[0][2:].partition("=")[0] in options):
        joined = shell(f"{option}={rest[0]}")
        raise UserError(f"{option} needs a value; if {rest[0]} is meant to be it, write {joined}")
    return rest.pop(0)


def _refuse_unknown(word: str, options: Mapping[str, bool], program: str) -> None:
    option = word.partition("=")[0]
    known = [*HELP, *(f"--{name}" for name in options)]
    instead = f"{program} --help lists them; a word that begins with a dash and is no option goes after --"
    raise UserError(f"unknown option {option}{nearest(option, known)}; {instead}")


def _as_text(word: str) -> str:
    """Return a word of the command line as text; raise UserError where its bytes are not UTF-8."""
    if is_text(word):
        return word
    try:
        return os.fsencode(word).decode()  # what a locale that is not UTF-8 kept of a word that is
    except UnicodeError:
        raise UserError(f"the argument {word!r} is not UTF-8; type it in UTF-8, or read it from a file") from None


def read_standard_input() -> str:
    """Return all of standard input, which is UTF-8 whatever the locale says.

    Raises:
        UserError: it is closed, or not UTF-8.
    """
    if sys.stdin is None:
        raise UserError("standard input is closed; give the text itself instead of -")
    stream = getattr(sys.stdin, "buffer", None)
    if stream is None:  # of an embedding program, which gives text
        return sys.stdin.read()
    data = stream.read()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"standard input is not UTF-8: byte {data[error.start]:#04x} at offset {error.start}; convert it by iconv"
        ) from None


def mesh_axes(mesh: str | None) -> dict[str, int] | None:
    """Return the axes and sizes that --mesh names, such as fsdp=4,tensor=2; None where it is not given."""
    if mesh is None:
        return None
    pairs = [part.partition("=") for part in mesh.split(",")]
    if not all(name and size.lstrip("-").isdecimal() for name, _, size in pairs):
        raise UserError(f"--mesh {mesh!r} is not a list of axes and sizes; write it as fsdp=4,tensor=2")
    return {name.strip(): int(size) for name, _, size in pairs}


# What a value must be, by the name of its type in a message of jsonargparse.
_RULES = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "a text, in quotes if YAML takes it for something else",
    "tuple": "a list",
    "list": "a list",
    "NoneType": "null",
}


def wrong_value(error: Exception) -> str:
    """Return a message of jsonargparse about a value of another type in plain words, any other in one line."""
    text = " ".join(str(error).split())
    keys = re.findall(r'Parser key "([^"]+)": ', text)
    told = text.rpartition(f'Parser key "{keys[-1]}": ')[2] if keys else ""
    value = re.search(r"(?:Got|Given) value: (.*?)(?: - Expected .*)?$", told)
    kinds = re.findall(r"Expected an? (?:<class '([\w.]+)'>|typing\.Literal\[(.*?)\])", told)
    rules = [f"one of {words.replace(chr(39), '')}" if words else _RULES.get(kind) for kind, words in kinds]
    outer, inner = (keys[0], keys[-1]) if keys else ("", "")
    key = inner if inner.startswith(outer) else f"{outer}.{inner}"
    if unknown := re.search(r"Option '([^']+)' is not accepted$", told):
        return f"unknown key {key}.{unknown[1]}"
    if section := re.fullmatch(r'Unable to load config "(.*)"', told):
        return f"{key} {section[1]} must be a section of `key: value` lines"
    if value is None or not rules or None in rules:
        return text
    return f"{key} {value[1]} must be {' or '.join(dict.fromkeys(rules))}"
