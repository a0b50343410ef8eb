"""Checksums of a folder's files, kept in files beside them: how damage on a disk is proven.

TensorStore checks the nodes of a checkpoint's tree, and neither arrays nor JSON files. A file's length and CRC-32
find every flipped bit, every run of up to 32 damaged bits, and all but one in four thousand million others.
"""

import json
import zlib
from collections.abc import Iterable, Iterator

from etils import epath

from gptjax.shell.files import size_of

NAME = "checksums"  # how the names of the files that hold them begin
WHOLE = f"{NAME}.json"  # the one that is written last, and covers the others
READ_BYTES = 2**24


def files_under(folder: epath.Path, prefix: str = "") -> Iterator[str]:
    """Yield the names of all files in a folder and its subfolders, relative to it."""
    for path in sorted(folder.iterdir(), key=lambda path: path.name):
        if path.is_dir():
            yield from files_under(path, f"{prefix}{path.name}/")
        else:
            yield prefix + path.name


def checksum(path: epath.Path) -> list[int]:
    """Return a file's length in bytes and its CRC-32."""
    length, crc = 0, 0
    with path.open("rb") as stream:
        while data := stream.read(READ_BYTES):
            length, crc = length + len(data), zlib.crc32(data, crc)
    return [length, crc]


def write_checksums(folder: epath.Path, files: Iterable[str], name: str = WHOLE) -> None:
    """Write the checksums of files in a folder to a file there, whose name begins with NAME."""
    (folder / name).write_text(json.dumps({file: checksum(folder / file) for file in files}))


def read_checksums(folder: epath.Path) -> dict[str, list[int]] | None:
    """Return length and CRC-32 of each file that a folder should hold; None where no checksums were written.

    Raises:
        ValueError: the checksums themselves are damaged.
    """
    if not (folder / WHOLE).exists():
        return None
    found = _parsed(folder, WHOLE)
    for name in [file for file in found if file.startswith(NAME)]:
        if damage_of(folder, name, found[name]) is not None:
            raise ValueError(f"{name} is damaged")
        found |= _parsed(folder, name)
    return found


def _parsed(folder: epath.Path, name: str) -> dict[str, list[int]]:
    found = json.loads((folder / name).read_bytes())
    if not isinstance(found, dict) or not all(isinstance(value, list) for value in found.values()):
        raise ValueError(f"{name} is damaged")
    return found


def damage_of(folder: epath.Path, file: str, wanted: list[int]) -> str | None:
    """Return what is wrong with a file, in a few words; None where it is as it was written."""
    path = folder / file
    if not path.exists():
        return f"{file} is missing"
    if size_of(path) != wanted[0]:
        return f"{file} has {size_of(path):,} bytes and not {wanted[0]:,}"
    return None if checksum(path) == wanted else f"{file} does not match its checksum"
