"""The words of a command line: options with their values, and what stands alone."""

import os
import sys
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from gptjax.errors import UserError, nearest
from gptjax.paths import is_text, shell

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
