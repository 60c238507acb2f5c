"""Parts: immutable Parquet files of result rows, each written whole and known by its sha256."""

from collections.abc import Iterator
from hashlib import sha256
from io import BytesIO
from typing import TypeAlias
from uuid import uuid4

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
from pyarrow.fs import LocalFileSystem

from storage.errors import CorruptStoreError
from storage.files import Files
from storage.log import Part
from storage.schema import RESULT_SCHEMA

GROUP_ROWS = 20_000


def write_part(files: Files, rows: pa.Table) -> Part:
    """Write rows as a durable part that no log entry names yet."""
    rows = rows.sort_by("row_id")
    buffer = BytesIO()
    pq.write_table(rows, buffer, compression="zstd", row_group_size=GROUP_ROWS)
    content, row_ids = buffer.getvalue(), rows.column("row_id")
    first, last = row_ids[0].as_py(), row_ids[-1].as_py()
    part = Part(
        name=f"part-{first:010d}-{uuid4().hex}.parquet",
        rows=rows.num_rows,
        errors=rows.column("status").to_pylist().count("error"),
        first_row_id=first,
        last_row_id=last,
        bytes=len(content),
        sha256=sha256(content).hexdigest(),
    )
    files.write(f"data/{part.name}", content)
    return part


def read_part(files: Files, part: Part) -> pa.Table:
    """A part's rows; CorruptStoreError if it is not what was written, byte for byte."""
    return pq.read_table(BytesIO(check_part(files, part)), schema=RESULT_SCHEMA)


def check_part(files: Files, part: Part) -> bytes:
    """A part's bytes, if they are those that the log names and their footer agrees with it."""
    place = f"{files.shown}/data/{part.name}"
    try:
        content = files.read(f"data/{part.name}")
    except FileNotFoundError as error:
        raise CorruptStoreError(f"{place} is missing") from error
    if sha256(content).hexdigest() != part.sha256:
        raise CorruptStoreError(f"{place} is torn or changed: its sha256 is not the log's")
    try:
        rows = pq.read_metadata(BytesIO(content)).num_rows
    except (pa.ArrowException, OSError) as error:
        raise CorruptStoreError(f"{place} has no readable Parquet footer: {error}") from error
    if rows != part.rows:
        raise CorruptStoreError(f"{place} has {rows} rows, the log says {part.rows}")
    return content


def remove_part(files: Files, name: str) -> None:
    """Delete a part that no log entry keeps alive and no reader needs."""
    files.remove(f"data/{name}")


class FetchedTable:
    """Parquet files of a remote store as one table; each is fetched whole when a scan comes to it.

    A dataset would read them through a filesystem written in Python, and that deadlocks: DuckDB
    starts a scan under the interpreter's lock, and Arrow's thread needs the lock to open a file.
    """

    def __init__(self, files: Files, names: list[str], schema: pa.Schema) -> None:
        self._files = files
        self._names = names
        self._schema = schema

    def __arrow_c_schema__(self) -> object:
        return self._schema.__arrow_c_schema__()

    def __arrow_c_stream__(self, requested_schema: object = None) -> object:
        reader = pa.RecordBatchReader.from_batches(self._schema, self._batches())
        return reader.__arrow_c_stream__(requested_schema)

    def _batches(self) -> Iterator[pa.RecordBatch]:
        for name in self._names:
            with pq.ParquetFile(pa.BufferReader(self._files.read(name))) as parquet:
                for batch in parquet.iter_batches(GROUP_ROWS, columns=self._schema.names):
                    yield pa.record_batch(batch.columns, schema=self._schema)


ScannedTable: TypeAlias = ds.Dataset | FetchedTable
"""What DuckDB scans; nothing is opened before a query comes to it."""


def table_of(files: Files, names: list[str], schema: pa.Schema) -> ScannedTable:
    """The named Parquet files as one table."""
    if files.root is None:
        return FetchedTable(files, names, schema)
    filesystem, parquet = LocalFileSystem(), ds.ParquetFileFormat()
    paths = [str(files.root / name) for name in names]
    fragments = [parquet.make_fragment(path, filesystem) for path in paths]
    return ds.FileSystemDataset(fragments, schema, parquet, filesystem)
