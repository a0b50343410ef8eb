"""Read the rows of files of records, such as conversations: JSON lines, a JSON array, CSV, TSV, Parquet and Arrow."""

import csv
import json
from collections.abc import Callable, Iterator
from typing import Any

from etils import epath

from gptjax.data.formats import SourceFile
from gptjax.data.reading import LONGEST_BYTES, Piece, import_pyarrow, lines, readable, records
from gptjax.errors import UserError
from gptjax.shell.files import size_of

Row = tuple[str, dict[str, Any]]  # where it stands, for messages; and its values by name


def rows_of(file: SourceFile) -> Iterator[Row]:
    """Yield the rows of a file.

    Raises:
        UserError: a file or a row that cannot be read, or a file without rows, such as plain text.
    """
    kind = file.format.partition(".")[0]
    if kind not in READERS:
        raise UserError(f"{file.path} is plain text; give rows as .jsonl, .json, .tsv, .csv, .parquet or .arrow")
    with readable(file.path):
        size = size_of(file.path)
        yield from READERS[kind](Piece(0, file.path, file.format, 0, size, size))


def _json_lines(piece: Piece) -> Iterator[Row]:
    for number, (_, record) in enumerate(records(piece, b"\n"), 1):
        if record.strip():
            where = f"{piece.file}, line {number}"
            yield where, _object(where, _parsed(where, record))


def _json_array(piece: Piece) -> Iterator[Row]:
    values = _parsed(piece.file, b"\n".join(record for _, record in records(piece, b"\n")))
    for number, value in enumerate(values if isinstance(values, list) else [values], 1):
        where = f"{piece.file}, row {number}"
        yield where, _object(where, value)


def _parsed(where: str, data: bytes) -> Any:
    try:
        value = json.loads(data.decode("utf-8-sig"))
        json.dumps(value, ensure_ascii=False).encode()  # JSON can escape half a character, which raises here
        return value
    except json.JSONDecodeError as error:
        raise UserError(f"{where} is not JSON: {error.msg} at column {error.colno}") from None
    except UnicodeError as error:
        raise UserError(f"{where} is not UTF-8: {error.reason}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} cannot be read: {' '.join(str(error).split())[:80]}") from None


def _object(where: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{where} is no JSON object, but {json.dumps(value)[:40]}; write one object a row")
    return value


def _table(piece: Piece) -> Iterator[Row]:
    """Read a table with a line of column names, separated by commas, or by tabs in a .tsv file."""
    delimiter = "\t" if piece.format.startswith("tsv") else ","
    csv.field_size_limit(LONGEST_BYTES)
    reader = csv.reader(lines(piece), delimiter=delimiter, strict=True)
    try:
        names = next(reader, [])
        for row in reader:
            where = f"{piece.file}, line {reader.line_num}"
            if row and len(row) != len(names):
                raise UserError(f"{where} has {len(row)} columns, and the first line {len(names)}")
            if row:
                yield where, dict(zip(names, row, strict=True))
    except csv.Error as error:
        raise UserError(f"{piece.file}, line {reader.line_num} is not a row of a table: {error}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{piece.file} is not UTF-8: {error.reason} near line {reader.line_num + 1}") from None


def _columns(piece: Piece) -> Iterator[Row]:
    with epath.Path(piece.file).open("rb") as stream:
        if piece.format == "parquet":
            batches = import_pyarrow("parquet").ParquetFile(stream).iter_batches(512, use_threads=False)
        else:
            ipc = import_pyarrow("ipc")
            is_file = stream.read(6) == b"ARROW1"  # the file format, with an index at its end
            stream.seek(0)
            file = ipc.open_file(stream) if is_file else ipc.open_stream(stream)
            batches = (file.get_batch(i) for i in range(file.num_record_batches)) if is_file else file
        number = 0
        for batch in batches:
            for value in batch.to_pylist():
                number += 1
                yield f"{piece.file}, row {number}", value


READERS: dict[str, Callable[[Piece], Iterator[Row]]] = {
    "jsonl": _json_lines,
    "json": _json_array,
    "csv": _table,
    "tsv": _table,
    "parquet": _columns,
    "arrow": _columns,
}
