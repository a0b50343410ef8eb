"""Writing a file so that it is either absent, old or whole."""

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
