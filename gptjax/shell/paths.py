"""Paths as users give them, and the files and folders that a command is asked to write."""

import os
import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

from gptjax.errors import UserError

BUCKETS = ("gs://", "s3://")
HUB = re.compile(r"(?:hf://|https?://(?:www\.)?(?:huggingface\.co|hf\.co)/)(datasets/)?(\w[\w.-]*(?:/\w[\w.-]*)?).*")
# What a clone of a repository holds in place of a large file.
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
LFS_REMEDY = "is a pointer of Git LFS in place of the file; fetch the file: git lfs pull"


def refuse_lfs_pointer(path: Path, head: bytes) -> None:
    """Raise UserError where a file, given its first bytes, is a pointer of Git LFS."""
    if head.startswith(LFS_POINTER):
        raise UserError(f"{path} {LFS_REMEDY}")


# The type of a command's parameter that names a path; `cli.py` passes its values through `user_path`.
UserPath = Annotated[str, "path"]


def user_path(path: str | os.PathLike[str]) -> str:
    """Return a path as the operating system, or the bucket's library, takes it.

    `~` and `~name` become a home directory; any other relative path stays relative to the current directory, and has
    `./` before it where it begins with a dash. A name that is no path, such as `gpt2`, is returned as it is.

    Raises:
        UserError: no path at all, a name that is not UTF-8, or an address that is not of BUCKETS.
    """
    try:
        text = os.fspath(path)
    except TypeError:
        raise UserError(f"{path!r} is not a path; give a str or a pathlib.Path") from None
    if not isinstance(text, str) or "\0" in text or not is_text(text):
        raise UserError(f"the path {text!r} is not UTF-8 text; rename the file or folder")
    text = re.sub(r"^(gs|s3):/(?!/)", r"\1://", text)  # pathlib makes one slash of two
    if found := HUB.fullmatch(text):
        is_dataset, name = found.groups()
        instead = f"download it (hf download {name} --repo-type dataset --local-dir DIR), and give DIR"
        raise UserError(
            f"{text!r} is an address of the Hugging Face hub; {instead if is_dataset else f'give the id, {name!r}'}"
        )
    if "://" in text and not text.startswith(BUCKETS):
        raise UserError(f"{text!r} is not an address of {', '.join(BUCKETS)}; fetch it to a file first")
    text = os.path.expanduser(text)
    return f"./{text}" if text.startswith("-") else text  # which commands would take for an option


def is_text(text: str) -> bool:
    """Return whether a string has a UTF-8 form, which bytes that the system could not decode lack."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def shell(*words: Any) -> str:
    """Return words as a command line that a POSIX shell splits into the same words."""
    return shlex.join(map(str, words))


def local_path(path: str | os.PathLike[str], option: str = "--out") -> Path:
    """Return a path of this machine; raise UserError for one in a bucket.

    Args:
        option: where the user named the path, for the message.
    """
    text = user_path(path)
    if "://" in text:
        raise UserError(f"{option} {text} is in a bucket; give a path of this machine")
    return Path(text)


@contextmanager
def writing(path: str | os.PathLike[str], option: str = "--out") -> Iterator[Path]:
    """Give the local path to write to, in a folder that exists; turn what the system says of it into a UserError.

    Args:
        option: where the user named the path, for the message.
    """
    target = local_path(path, option)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield target
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"cannot write {option} {str(target)!r}: {reason}; give another {option}") from None
