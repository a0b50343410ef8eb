"""Recognise a file's format by its first bytes and its name; and which names in a folder are no documents, or name a
split.
"""

import json
import re
import zlib
from pathlib import PurePath
from typing import NamedTuple

from etils import epath

from gptjax.data.decompression import DECOMPRESSORS, decompressed
from gptjax.errors import UserError
from gptjax.shell.paths import LFS_POINTER, LFS_REMEDY

HEAD_BYTES = 2**12  # read to recognise a file


class SourceFile(NamedTuple):
    """A file of a source.

    Attributes:
        path: path or address.
        format: `text`, `play`, or a key of SUFFIXES' values, with `.gz` or `.zst` after it for a compressed file.
        split: `train` or `val`, where the folder's names divide it; None elsewhere.
    """

    path: str
    format: str
    split: str | None = None


SUFFIXES = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",  # C4's files are called .json.gz and hold a document a line
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
COMPRESSIONS = {b"\x1f\x8b": "gz", b"\x28\xb5\x2f\xfd": "zst"}
# First bytes of files that cannot be read -> what they are, and the remedy.
REFUSED = {
    b"BZh": "is compressed by bzip2: bunzip2 it, or compress it by gzip or zstd instead",
    b"\xfd7zXZ\0": "is compressed by xz: unxz it, or compress it by gzip or zstd instead",
    b"\x5d\0\0": "is compressed by lzma: unlzma it, or compress it by gzip or zstd instead",
    b"\x04\x22\x4d\x18": "is compressed by lz4: unlz4 it, or compress it by gzip or zstd instead",
    b"\x1f\x9d": "is compressed by compress: uncompress it, or compress it by gzip or zstd instead",
    b"PK\x03\x04": "is a zip archive: unzip it into a folder, and give that",
    b"PK\x05\x06": "is an empty zip archive; give the files themselves",
    b"7z\xbc\xaf\x27\x1c": "is a 7z archive: unpack it into a folder, and give that",
    b"Rar!": "is a rar archive: unpack it into a folder, and give that",
    b"%PDF": "is a PDF document: extract its text, for instance by pdftotext",
    b"SQLite format 3\0": "is an SQLite database: write its table as JSON lines, and give that",
    b"\xff\xfe": "is UTF-16: iconv -f UTF-16 -t UTF-8 converts it",
    b"\xfe\xff": "is UTF-16: iconv -f UTF-16 -t UTF-8 converts it",
    LFS_POINTER: LFS_REMEDY,
}
BINARY = {b"PAR1": "parquet", b"ARROW1\0\0": "arrow", b"\xff\xff\xff\xff": "arrow"}


def recognise(path: str) -> str:
    """Return a file's format, from its first bytes, and from its name where these are text.

    Raises:
        UserError: an archive, an unsupported compression, or another file without text.
    """
    with epath.Path(path).open("rb") as stream:
        head = stream.read(HEAD_BYTES)
        packed = next((name for magic, name in COMPRESSIONS.items() if head.startswith(magic)), None)
        if packed is not None:
            stream.seek(0)
            try:
                chunks = decompressed(iter(lambda: stream.read(HEAD_BYTES), b""), DECOMPRESSORS[packed])
                head = next((data for data in chunks if data), b"")
            except zlib.error as error:
                raise UserError(f"cannot read {path}: {error}") from None
    for magic, instead in REFUSED.items():
        if head.startswith(magic):
            raise UserError(f"{path} {'contains a file that ' if packed else ''}{instead}")
    if head[257:262] == b"ustar":
        raise UserError(f"{path} is a tar archive: unpack it into a folder by tar -xf, and give that")
    kind = next((kind for magic, kind in BINARY.items() if head.startswith(magic)), None)
    if kind is not None and packed is not None:
        raise UserError(f"{path} is a compressed {kind.capitalize()} file, which cannot be read: decompress it")
    kind = kind or _kind_of_text(path, head, packed)
    return kind + (f".{packed}" if packed else "")


def _kind_of_text(path: str, head: bytes, packed: str | None) -> str:
    name = PurePath(path).name.lower()
    stem = name.removesuffix(".gz").removesuffix(".zst")
    kind = SUFFIXES.get(PurePath(stem).suffix, "text")
    if kind in ("parquet", "arrow"):
        if head:
            raise UserError(
                f"{path} has the name of a {kind.capitalize()} file, but not its content; download it again"
            )
        return kind
    if b"\0" in head:
        raise UserError(f"{path} contains NUL bytes, so it is not text; remove it from the folder, or convert it")
    if kind == "jsonl" and head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"[" and not _is_line_of_json(head):
        return "json"
    return kind


def _is_line_of_json(head: bytes) -> bool:
    """Return whether the first line is a JSON value, with another line after it."""
    line, end, rest = head.removeprefix(b"\xef\xbb\xbf").lstrip().partition(b"\n")
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return bool(end) and bool(rest.strip())


# ---------------------------------------------------------------------------------------------------------------
# Folders

# Files that `datasets`, Hugging Face's hub, Spark and fsspec write beside the rows, and desktops, editors and Python
# beside any files.
BESIDE = re.compile(
    r"\..*|__MACOSX|__pycache__|(eh)?thumbs\.db|desktop\.ini|_(SUCCESS|metadata|common_metadata|temporary|delta_log|(committed|started)_.*)|dataset_infos?\.json|dataset_dict\.json|state\.json|.*\.(lock|crc|md5|sha256)|(MD5|SHA256)SUMS",
    re.IGNORECASE,
)
# In the source folder itself; in a folder below it, such a file may be a document.
ABOUT = re.compile(r"(README|LICEN[CS]E|COPYING|NOTICE|CITATION|CHANGELOG)([.-].*)?", re.IGNORECASE)

# The words by which the library `datasets` finds splits in names.
SPLITS = {
    "train": ("train", "training"),
    "val": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_WORDS = "|".join(word for words in SPLITS.values() for word in words)
_SPLIT = re.compile(rf"(?:^|(?<=[-._ 0-9]))({_WORDS})(?=[-._ 0-9]|$)")


def is_beside(name: str, top: bool) -> bool:
    """Return whether a file in a folder is not one of its documents.

    Args:
        top: whether the folder is the source itself.
    """
    return bool(BESIDE.fullmatch(name)) or (top and bool(ABOUT.fullmatch(name)))


def split_of(path: str) -> str | None:
    """Return the split, a key of SPLITS, that a path inside a folder names; the last part decides first."""
    for part in reversed(PurePath(path.lower()).parts):
        found = _SPLIT.search(part)
        if found:
            return next(split for split, words in SPLITS.items() if found.group(1) in words)
    return None


def divide(files: list[SourceFile], folder: str) -> tuple[list[SourceFile], list[str]]:
    """Set the split of files where their names divide the folder: some are for training, and some are not.

    Returns:
        the files of training and validation; and notes about it for the user.
    """
    splits = [split_of(file.path.removeprefix(folder)) for file in files]
    counts = {split: splits.count(split) for split in SPLITS}
    if not counts["train"] or not counts["val"] + counts["test"]:
        return files, []
    kept = [file for file, split in zip(files, splits, strict=True) if split != "test"]
    if counts["val"]:
        names = ["val" if split == "val" else "train" for split in splits if split != "test"]
        kept = [file._replace(split=name) for file, name in zip(kept, names, strict=True)]
    how = f"{counts['val']} files for validation by name" if counts["val"] else "a share of them is for validation"
    omitted = f"; {counts['test']} for testing are left out" if counts["test"] else ""
    return kept, [f"{folder.rstrip('/')}: {len(kept) - counts['val']} files for training, {how}{omitted}"]
