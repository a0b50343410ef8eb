"""Arrays in files, of which parts are read where they are needed.

Not by a memory map: of a file that has become shorter, it ends the process by SIGBUS, without a word.
"""

import functools
import io
import os
from pathlib import Path

import numpy as np

from gptjax.errors import UserError

MOST_OPEN = 128  # files at a time


class FileArray:
    """The array [n] of a file; a process that receives a copy of this object opens the file again.

    Args:
        offset_bytes: where the array begins.
        length: number of elements; None: as many as the file has now.
    """

    def __init__(self, path: str | Path, dtype: np.dtype | str, offset_bytes: int = 0, length: int | None = None):
        self.path, self.dtype, self.offset_bytes = str(path), np.dtype(dtype), offset_bytes
        if length is None:
            length = (os.stat(self.path).st_size - offset_bytes) // self.dtype.itemsize
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, part: slice | int) -> np.ndarray | np.generic:
        """Return the elements of a slice without a step, or one element.

        Raises:
            UserError: the file has become shorter.
            OSError: it cannot be read; names the file.
        """
        if not isinstance(part, slice):
            at = range(self.length)[part]
            return self[at : at + 1][0]
        start, stop, step = part.indices(self.length)
        assert step == 1, part
        found = np.empty(max(0, stop - start), self.dtype)
        missing, at = memoryview(found.view(np.uint8)), self.offset_bytes + start * self.dtype.itemsize
        stream = _opened(self)
        while missing:
            try:
                count = os.preadv(stream.fileno(), [missing], at)
            except OSError as error:
                raise OSError(error.errno, error.strerror, self.path) from None
            if count == 0:
                raise UserError(
                    f"{self.path} has become shorter since it was opened: it ends before byte {at:,}; copy it again, "
                    "or prepare the data again, and run the same command to resume"
                )
            missing, at = missing[count:], at + count
        return found

    @classmethod
    def of_npy(cls, path: Path) -> "FileArray":
        """Return the array [n] of a .npy file."""
        with path.open("rb") as stream:
            np.lib.format.read_magic(stream)
            (length,), _, dtype = np.lib.format.read_array_header_1_0(stream)
            return cls(path, dtype, stream.tell(), length)


@functools.lru_cache(maxsize=MOST_OPEN)
def _opened(array: FileArray) -> io.FileIO:
    return open(array.path, "rb", buffering=0)
