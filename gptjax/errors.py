"""What the user did wrong, said in one line."""

import difflib
import signal
import sys
from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any

DIVERGED = "no gradient was finite"  # how the message of a training that gives up begins


class UserError(Exception):
    """The user's input is at fault. The message names the value and the remedy; the exit code is 2."""


def report_user_errors(main: Callable[..., Any]) -> Callable[..., Any]:
    """Turn a `UserError` that leaves a command's main function into one line on stderr and exit code 2."""

    @wraps(main)
    def wrapper(*args, **kwargs):
        try:
            return main(*args, **kwargs)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(2) from None
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            raise SystemExit(128 + signal.SIGINT) from None

    return wrapper


def nearest(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the known word that is most alike, or an empty string."""
    matches = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {matches[0]!r}?" if matches else ""
