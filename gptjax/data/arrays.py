"""Arrays that are made once and cached on disk: one file for each, and plain values beside them."""

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from gptjax.data.filearray import FileArray
from gptjax.errors import UserError
from gptjax.shell.paths import user_path

META = "meta.json"  # written last


class ArrayFolder:
    """Arrays [n] by name.

    Attributes:
        meta: plain values.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.meta: dict[str, Any] = json.loads((folder / META).read_text())
        self._arrays: dict[str, FileArray] = {}

    def __getitem__(self, name: str) -> FileArray:
        if name not in self._arrays:
            self._arrays[name] = FileArray.of_npy(self.folder / f"{name}.npy")
        return self._arrays[name]


def cached_arrays(
    cache_dir: str, key: str, make: Callable[[], tuple[dict[str, np.ndarray], dict[str, Any]]]
) -> ArrayFolder:
    """Return the arrays under a key, made and written where they are not there or not whole.

    Args:
        make: the arrays by name, and plain values.

    Raises:
        UserError: the folder cannot be written.
    """
    folder = Path(user_path(cache_dir)) / key
    if not _is_whole(folder):
        arrays, meta = make()
        _write(folder, arrays, meta)
    return ArrayFolder(folder)


def _is_whole(folder: Path) -> bool:
    try:
        sizes = json.loads((folder / META).read_text())["bytes"]
        return all((folder / f"{name}.npy").stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError):
        return False


def _write(folder: Path, arrays: dict[str, np.ndarray], meta: dict[str, Any]) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as work:
            for name, array in arrays.items():
                np.save(Path(work, f"{name}.npy"), array)
            sizes = {name: Path(work, f"{name}.npy").stat().st_size for name in arrays}
            Path(work, META).write_text(json.dumps({**meta, "bytes": sizes}))
            # Replace each file atomically: it may be damaged, or of a faster process that is reading it.
            for name in (*(f"{name}.npy" for name in arrays), META):
                os.replace(Path(work, name), folder / name)
    except OSError as error:
        raise UserError(
            f"cannot write the cache {folder}: {error.strerror}; set data.cache_dir to a writable folder"
        ) from None
