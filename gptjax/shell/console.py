"""What every command does alike: where its output goes, and what it says of an error."""

import contextlib
import errno
import os
import re
import signal
import sys
import tempfile
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any, TextIO

from gptjax.errors import USER_ERROR, MachineError, UserError

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
FULL_TEXTS = ("No space left on device", "Disk quota exceeded", "File too large")  # as libraries in C++ say it
STORAGE_PACKAGES = ("gcsfs", "s3fs", "aiohttp", "botocore", "google")
LONGEST_LINE = 2000  # characters of a message
LONGEST_REASON = 300  # characters of an error's message that are printed
FRAMES = 6  # of an error's trace that are printed


class Output:
    """A standard stream whose reader may leave.

    Characters that its encoding lacks are replaced. When nobody reads any more, the command ends with exit code 0;
    when the disk that it is written to is full, with 2.

    Attributes:
        optional: whether the command continues without the stream instead.
    """

    def __init__(self, stream: TextIO, optional: bool = False):
        self._stream, self.optional = stream, optional
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write text, as a file does."""
        return self._attempt(self._stream.write, text) or 0

    def flush(self) -> None:
        """Flush, as a file does."""
        self._attempt(self._stream.flush)

    def _attempt(self, call: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return call(*arguments)
        except OSError as error:
            self._discard()
            if self.optional:
                return None
            if isinstance(error, BrokenPipeError):
                raise SystemExit(0) from None
            print(f"error: cannot write to standard output: {error.strerror}; give it another place", file=sys.stderr)
            raise SystemExit(2) from None

    def _discard(self) -> None:
        """Send what is still to come, and what the stream has buffered, nowhere."""
        with contextlib.suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)


@contextlib.contextmanager
def guarded_output() -> Iterator[None]:
    """Replace the standard streams by an `Output` each while a command runs; a closed one is discarded."""
    if isinstance(sys.stdout, Output):  # of the command that called this one
        yield
        return
    before, hooks = (sys.stdout, sys.stderr), (threading.excepthook, sys.unraisablehook)
    threading.excepthook, sys.unraisablehook = _note_failure_of_thread, _note_failure_of_callback
    with open(os.devnull, "w") as nowhere:
        sys.stdout, sys.stderr = Output(before[0] or nowhere), Output(before[1] or nowhere, optional=True)
        try:
            yield
        finally:
            try:
                sys.stdout.flush()
                sys.stderr.flush()
            finally:
                (sys.stdout, sys.stderr), threading.excepthook = before, hooks[0]
                if sys.unraisablehook is _note_failure_of_callback:
                    sys.unraisablehook = hooks[1]


def _note_failure_of_thread(failed: threading.ExceptHookArgs) -> None:
    """Say in one line what ended a thread; where that matters, it is also raised to whoever waits for the thread."""
    reason = one_line(str(causes(failed.exc_value)[-1]) if failed.exc_value else "", LONGEST_REASON)
    print(f"note: a thread ended by {failed.exc_type.__name__}: {reason}", file=sys.stderr)


def _note_failure_of_callback(failed: "sys.UnraisableHookArgs") -> None:
    """Say in one line what failed in a library's callback or in a destructor, where nobody can catch it.

    Nothing is said of an event loop that is closed: when a save fails, TensorStore reports the arrays that it was
    still writing to the loop of that save, which has ended with the first error.
    """
    if str(failed.exc_value) != "Event loop is closed":
        reason = one_line(str(failed.exc_value or ""), LONGEST_REASON)
        print(f"note: a callback failed ({failed.exc_type.__name__}: {reason})", file=sys.stderr)


def continue_without_output() -> None:
    """Let the command at hand run to its end although nobody may read what it prints."""
    if isinstance(sys.stdout, Output):
        sys.stdout.optional = True


def writes_unicode() -> bool:
    """Return whether standard output can print every character."""
    return (getattr(sys.stdout, "encoding", None) or "utf-8").lower().replace("-", "").startswith("utf")


def _check_current_folder() -> None:
    """Raise UserError where the folder that relative paths start from was removed."""
    try:
        os.getcwd()
    except FileNotFoundError:
        raise UserError("the current folder is not there any more; change to one that is: cd") from None


def report_user_errors(main: Callable[..., Any]) -> Callable[..., Any]:
    """Turn what leaves a command's main function into a few lines on stderr and an exit code.

    A `UserError`, or a disk that is full or read-only, gives one line and 2; any other exception its cause, where
    it was raised and where the whole trace lies, and 1.
    """

    @wraps(main)
    def wrapper(*args, **kwargs):
        with guarded_output():
            try:
                _check_current_folder()
                return main(*args, **kwargs)
            except UserError as error:
                print(f"error: {one_line(str(error))}", file=sys.stderr)
                raise SystemExit(USER_ERROR) from None
            except KeyboardInterrupt:
                print("interrupted", file=sys.stderr)
                sys.stdout.flush()
                sys.stderr.flush()
                # Not by an exception: what an interrupted compilation leaves behind crashes when it is destroyed.
                os._exit(128 + signal.SIGINT)
            except Exception as error:
                code, text = describe_failure(error)
                print(text, file=sys.stderr)
                sys.excepthook = sys.unraisablehook = lambda *_: None  # what else fails only follows from it
                warnings.simplefilter("ignore")  # of writes that a failed save has left unfinished, say
                raise SystemExit(code) from None

    return wrapper


def one_line(text: str, longest: int = LONGEST_LINE) -> str:
    """Return text in one line, cut in its middle where it is longer than `longest` characters."""
    line = " ".join(part.strip() for part in text.splitlines() if part.strip())
    return line if len(line) <= longest else f"{line[: longest // 2]} ... {line[-longest // 2 :]}"


def describe_failure(error: BaseException) -> tuple[int, str]:
    """Return the exit code and the few lines that say what an exception means to the user."""
    if isinstance(error, MachineError):
        return 1, f"error: {error}"
    for one in causes(error, contexts=True):
        reason = getattr(one, "strerror", None) or one_line(str(one), LONGEST_REASON)
        where = getattr(one, "filename", None)
        full = next((text for text in FULL_TEXTS if text in str(one)), None)
        if full or (isinstance(one, OSError) and one.errno in DISK_FULL):
            at = f"to {where}" if where else "a file"
            return 2, f"error: cannot write {at}: {full or reason}; make room and run the same command again"
        if isinstance(one, OSError) and where is not None:
            return 2, f"error: cannot use {where}: {reason}; mend that, or give another path"
    if of_storage := next((one for one in causes(error) if is_of_storage(one)), None):
        reason = one_line(str(of_storage), LONGEST_REASON) or type(of_storage).__name__
        return 1, f"error: the storage refused a request: {reason}; run the same command again to resume"
    if refusal := _platform_refused(error):
        return USER_ERROR, refusal
    first = causes(error)[-1]
    where = _write_trace(error)
    frames = traceback.extract_tb(first.__traceback__)[-FRAMES:]
    lines = [f"  {frame.filename}:{frame.lineno} in {frame.name}" for frame in frames]
    said = one_line(str(first), LONGEST_REASON)
    head = f"error: {type(first).__name__}{': ' if said else ''}{said}"
    return 1, "\n".join([head, *lines, f"this is a fault of gptjax or of this machine; the whole trace: {where}"])


def _platform_refused(error: BaseException) -> str | None:
    """Return a message where JAX cannot start the platform that JAX_PLATFORMS names; else None.

    Whatever uses a device first raises RuntimeError then, or an AssertionError without a word. JAX is asked
    after such an error only, since starting a platform takes it away from other processes.
    """
    names, jax = os.environ.get("JAX_PLATFORMS", ""), sys.modules.get("jax")
    if names in ("", "cpu") or jax is None or not isinstance(causes(error)[-1], AssertionError | RuntimeError):
        return None
    try:
        jax.devices()
    except Exception as refusal:
        reason = one_line(str(refusal), LONGEST_REASON) or "it has no such plugin, or the machine no such device"
        return (
            f"error: JAX cannot use the platform that the environment names, JAX_PLATFORMS={names} ({reason}); unset "
            "it, set it to cpu, or pip install 'gptjax[cuda]' or 'gptjax[tpu]' for an accelerator"
        )
    return None


def is_of_storage(error: BaseException | None) -> bool:
    """Return whether a bucket's library raised an error, after the retries that it makes itself."""
    package = type(error).__module__.partition(".")[0]
    refused = re.search(r"\b(UNAVAILABLE|RESOURCE_EXHAUSTED|DEADLINE_EXCEEDED):.*\bHTTP\b", str(error))
    return package in STORAGE_PACKAGES or refused is not None


def causes(error: BaseException, contexts: bool = False) -> list[BaseException]:
    """Return an exception, what it was raised from, and what that was raised from, to the first cause.

    Args:
        contexts: whether what was being handled when an exception was raised counts as its cause, too.
    """
    chain: list[BaseException] = []
    following: BaseException | None = error
    while following is not None and following not in chain:
        chain.append(following)
        inside = following.exceptions[0] if isinstance(following, BaseExceptionGroup) else None
        following = inside or following.__cause__ or (following.__context__ if contexts else None)
    return chain


def _write_trace(error: BaseException) -> str:
    """Write an exception's whole trace to a temporary file and return its path."""
    try:
        number, path = tempfile.mkstemp(prefix="gptjax-", suffix=".log")
        with open(number, "w", encoding="utf-8", errors="replace") as file:
            file.writelines(traceback.format_exception(error))
        return path
    except OSError as failed:
        return f"not kept ({failed.strerror})"
