"""Files on disks and in buckets: sizes, times, and writing one so that it is either absent, old or whole."""

import os
from pathlib import Path

from etils import epath


def write_atomically(path: str | Path | epath.Path, data: str | bytes) -> None:
    """Replace a file's content at once, also across a power cut.

    In a bucket, where nothing can be renamed, every write already replaces the whole object.
    """
    target, content = epath.Path(path), data.encode() if isinstance(data, str) else data
    if "://" in str(path):
        target.write_bytes(content)
        return
    temporary = Path(f"{target}.{os.getpid()}.new")
    try:
        with temporary.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def size_of(path: str | Path | epath.Path) -> int:
    """Return a file's length in bytes; raises OSError where it cannot be read."""
    # epath's own `stat` of a file on a disk fails where its owner has no name, as in containers.
    return epath.Path(path).stat().length if "://" in str(path) else os.stat(path).st_size


def changed_at(path: str | Path | epath.Path) -> int:
    """Return when a file was changed last, in whole seconds since 1970; raises OSError where it cannot be read."""
    return int(epath.Path(path).stat().mtime if "://" in str(path) else os.stat(path).st_mtime)
