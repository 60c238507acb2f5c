"""Opens a prompt file, finds its format, streams its rows; Parquet is read here, by the batch."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.core import url_to_fs

from storage.errors import InputError
from storage.files import shown
from storage.lines import BOM, csv_rows, jsonl_rows
from storage.prompts import PromptRow, PromptSource, RawRow, RowReader

PARQUET_MAGIC = b"PAR1"
ENCRYPTED_MAGIC = b"PARE"
BATCH_BYTES = 16 * 2**20  # of decoded Parquet, so that long prompts make short batches
BATCH_ROWS = 8192
READ_BYTES = 2**20

SUFFIXES = {
    ".parquet": "parquet",
    ".pq": "parquet",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
}


def read_rows(source: PromptSource) -> Iterator[PromptRow]:
    """All rows in order, validated; ids are empty where the source names no id column.

    Raises InputError at the first fault. Memory stays at about one batch, whatever the file's size.
    """
    with _opened(source) as file:
        kind = _format(source, file)
        if kind == "parquet":
            yield from map(RowReader.of(source).row, _parquet_rows(source, file))
        elif kind == "csv":
            yield from map(RowReader.of(source).row, csv_rows(source, file))
        else:
            yield from jsonl_rows(source, file)


def readable(source: PromptSource) -> bool:
    """Whether the file is still there."""
    try:
        filesystem, path = url_to_fs(source.uri)
        return bool(filesystem.isfile(path))
    except (OSError, ValueError, ImportError):
        return False


@contextmanager
def _opened(source: PromptSource) -> Iterator[BinaryIO]:
    """The file, open; whatever the filesystem says against it becomes an InputError."""
    try:
        filesystem, path = url_to_fs(source.uri)
        file = filesystem.open(path, "rb")
    except FileNotFoundError as error:
        raise source.fault("there is no such file") from error
    except IsADirectoryError as error:
        raise source.fault("is a folder; name one file") from error
    except (OSError, ValueError, ImportError) as error:
        raise source.fault(f"cannot be opened: {error}") from error
    with file:
        try:
            yield file
        except OSError as error:  # pa.ArrowException apart, which readers place themselves
            raise source.fault(f"cannot be read: {error}") from error


def _format(source: PromptSource, file: BinaryIO) -> str:
    """parquet, csv or jsonl: by the name's ending, or else by the first bytes."""
    start = file.read(len(PARQUET_MAGIC))
    file.seek(0)
    named = next((kind for end, kind in SUFFIXES.items() if source.uri.lower().endswith(end)), None)
    if start == ENCRYPTED_MAGIC:
        raise source.fault("is encrypted Parquet; write it without encryption")
    if start == PARQUET_MAGIC:
        if named not in (None, "parquet"):
            raise source.fault(f"is a Parquet file under a name that says {named}; rename it")
        return "parquet"
    if named == "parquet":
        empty = "is empty (0 bytes)" if not start else f"starts with {start!r}"
        raise source.fault(f"is no Parquet file: it {empty}")
    if named:
        return named
    if start.removeprefix(BOM).lstrip()[:1] == b"{":
        return "jsonl"
    raise source.fault(f"has an unknown format; name it with one of {', '.join(SUFFIXES)}")


def _parquet_rows(source: PromptSource, file: BinaryIO) -> Iterator[RawRow]:
    try:
        # A buffer makes the reader stream a column's pages; otherwise it loads the whole column.
        parquet = pq.ParquetFile(file, buffer_size=READ_BYTES)
    except (pa.ArrowException, OSError) as error:
        raise source.fault(f"is no readable Parquet file, perhaps torn: {error}") from error
    source.require_columns(parquet.schema_arrow.names)
    row = 0
    try:
        for group in range(parquet.num_row_groups):
            rows = _batch_rows(parquet.metadata.row_group(group))
            for batch in parquet.iter_batches(rows, [group], sorted(set(source.columns))):
                yield from _batch(source, batch, row)
                row += batch.num_rows
    except (pa.ArrowException, OSError) as error:
        fault = f"its Parquet pages cannot be read at or after this row: {error}"
        raise InputError(shown(source.uri), fault, row=row) from error


def _batch_rows(group: pq.RowGroupMetaData) -> int:
    """Rows a batch, so that it holds about BATCH_BYTES."""
    row_bytes = max(1, int(group.total_byte_size) // max(1, int(group.num_rows)))
    return max(1, min(BATCH_ROWS, BATCH_BYTES // row_bytes))


def _batch(source: PromptSource, batch: pa.RecordBatch, first_row: int) -> Iterator[RawRow]:
    rows = range(first_row, first_row + batch.num_rows)
    values = {name: _values(source, batch, name, first_row) for name in set(source.columns)}
    ids = values[source.id_column] if source.id_column else [None] * len(rows)
    chat = source.messages_column is not None
    overrides = [(name, values[column]) for name, column in source.sampling_columns.items()]
    contents = values[source.content_column]
    for offset, (row, custom_id, content) in enumerate(zip(rows, ids, contents, strict=True)):
        sampling = {name: given[offset] for name, given in overrides}
        yield RawRow(row, None, custom_id, chat, content, sampling)


def _values(source: PromptSource, batch: pa.RecordBatch, name: str, first_row: int) -> list[object]:
    """A column as Python values; InputError at the row whose bytes are not UTF-8."""
    column = batch.column(name)
    try:
        values: list[object] = column.to_pylist()
        return values
    except UnicodeDecodeError:
        for offset in range(len(column)):
            try:
                column[offset].as_py()
            except UnicodeDecodeError as error:
                fault = f"is not UTF-8 at byte {error.start}"
                raise InputError(
                    shown(source.uri), fault, row=first_row + offset, column=name
                ) from error
        raise


# Lines
