"""The index: one line for every prompt row, written once per version of the input.

Its name is the hash of its content, so equal inputs have one index, wherever and in whatever
format they lie. It is built in a scratch folder and reaches the store only when the whole input
is valid.
"""

import hashlib
import heapq
from array import array
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice, takewhile
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import xxhash

from storage.errors import InputError
from storage.files import shown
from storage.formats import read_rows
from storage.prompts import PromptRow, PromptSource
from storage.schema import INDEX_SCHEMA
from storage.scratch import Scratch

GROUP_ROWS = 65_536
SAMPLED_ROWS = 256

Keys = npt.NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class BuiltIndex:
    """A finished index in a scratch folder, ready for a store."""

    path: Path
    sha: str
    rows: int
    source: PromptSource
    sample: tuple[PromptRow, ...]
    """Some rows from all over the input, the same ones every time: to learn their lengths from."""


@contextmanager
def built_index(source: PromptSource) -> Iterator[BuiltIndex]:
    """Validate the whole input and index it; the index lives as long as the context.

    Raises InputError at the first fault; nothing is left behind then. Memory: 8 bytes a row, beside
    one batch and the sample.
    """
    with Scratch("index") as folder:
        path = folder / "rows.parquet"
        sample = _Sample()
        keys, named = _write_rows(sample.passing(read_rows(source)), path)
        repeated = _repeated(keys)
        if not named:
            path = _with_content_ids(path, repeated)
        elif len(repeated):
            _refuse_duplicates(source, path, repeated)
        sha = content_sha(index_batches(path))
        yield BuiltIndex(path, sha, len(keys), source, sample.rows)


def index_batches(file: Path | pa.NativeFile, rows: int = GROUP_ROWS) -> Iterator[pa.RecordBatch]:
    """An index file as record batches of so many rows."""
    with pq.ParquetFile(file) as parquet:
        yield from parquet.iter_batches(rows)


def content_sha(batches: Iterable[pa.RecordBatch]) -> str:
    """sha256 over (custom_id, input_hash) of all rows in order, whatever the batches."""
    digest = hashlib.sha256(b"wagonway index 1\0")
    for batch in batches:
        ids, hashes = batch.column("custom_id"), batch.column("input_hash")
        lines = pc.binary_join_element_wise(ids, hashes, "", "\0")
        digest.update("".join(lines.to_pylist()).encode())
    return digest.hexdigest()


class _Sample:
    """The rows whose positions have the smallest hashes: every row is as likely as any other."""

    def __init__(self) -> None:
        self._kept: list[tuple[int, int, PromptRow]] = []

    def passing(self, rows: Iterable[PromptRow]) -> Iterator[PromptRow]:
        """The same rows, looked at."""
        for row in rows:
            # Negative, for a heap gives its smallest first; here the largest hash must go.
            key = -xxhash.xxh3_64_intdigest(row.row_id.to_bytes(8, "big"))
            if len(self._kept) < SAMPLED_ROWS:
                heapq.heappush(self._kept, (key, row.row_id, row))
            elif key > self._kept[0][0]:
                heapq.heapreplace(self._kept, (key, row.row_id, row))
            yield row

    @property
    def rows(self) -> tuple[PromptRow, ...]:
        return tuple(row for _, _, row in self._kept)


def _write_rows(rows: Iterable[PromptRow], path: Path) -> tuple[Keys, bool]:
    """Write every row; return 64 bits of what makes each id, and whether the input names ids."""
    keys, named = array("Q"), True
    columns: list[list[object]] = [[] for _ in INDEX_SCHEMA]
    with pq.ParquetWriter(path, INDEX_SCHEMA, compression="zstd") as writer:
        for row in rows:
            named = bool(row.custom_id)
            keys.append(_key(row.custom_id or row.input_hash))
            fields = (row.row_id, row.custom_id, row.input_hash, row.prefix_hash, row.length)
            for column, value in zip(columns, fields, strict=True):
                column.append(value)
            if len(columns[0]) == GROUP_ROWS:
                _flush(writer, columns)
        _flush(writer, columns)
    return (np.frombuffer(keys, np.uint64) if keys else np.zeros(0, np.uint64)), named


def _flush(writer: pq.ParquetWriter, columns: list[list[object]]) -> None:
    arrays = [
        pa.array(values, kind.type) for values, kind in zip(columns, INDEX_SCHEMA, strict=True)
    ]
    writer.write_batch(pa.record_batch(arrays, schema=INDEX_SCHEMA))
    for column in columns:
        column.clear()


def _key(value: str) -> int:
    return xxhash.xxh3_64_intdigest(value.encode())


def _repeated(keys: Keys) -> Keys:
    """The keys that occur more than once, sorted."""
    ordered = np.sort(keys)
    return np.unique(ordered[1:][ordered[1:] == ordered[:-1]])


def _members(values: list[str], repeated: Keys) -> Iterator[tuple[int, int]]:
    """(offset, position in `repeated`) of every value whose key is a repeated one."""
    keys = np.fromiter(map(_key, values), np.uint64, len(values))
    offsets = np.flatnonzero(np.isin(keys, repeated))
    positions = np.searchsorted(repeated, keys[offsets])
    return zip(offsets.tolist(), positions.tolist(), strict=True)


def _with_content_ids(path: Path, repeated: Keys) -> Path:
    """The same index with ids of the form <input_hash>-<occurrence, from 0>."""
    target = path.with_name("named.parquet")
    seen = np.zeros(len(repeated), np.int64)
    with pq.ParquetWriter(target, INDEX_SCHEMA, compression="zstd") as writer:
        for batch in index_batches(path):
            hashes: list[str] = batch.column("input_hash").to_pylist()
            ids = [f"{input_hash}-0" for input_hash in hashes]
            for offset, position in _members(hashes, repeated):
                ids[offset] = f"{hashes[offset]}-{seen[position]}"
                seen[position] += 1
            writer.write_batch(batch.set_column(1, INDEX_SCHEMA.field("custom_id"), pa.array(ids)))
    return target


def _refuse_duplicates(source: PromptSource, path: Path, repeated: Keys) -> None:
    """Raise InputError at the first id that is there twice; equal keys alone are no proof."""
    first_rows: dict[str, int] = {}
    for batch in index_batches(path):
        ids: list[str] = batch.column("custom_id").to_pylist()
        rows = batch.column("row_id")
        for offset, _ in _members(ids, repeated):
            row, custom_id = rows[offset].as_py(), ids[offset]
            first = first_rows.setdefault(custom_id, row)
            if first != row:
                lines = _lines_of(source, {first, row})
                also = f"row {first}" + (f", line {lines[first]}," if first in lines else "")
                raise InputError(
                    shown(source.uri),
                    f"the id {custom_id!r} is there twice; {also} has it too",
                    row=row,
                    line=lines.get(row),
                    column=source.id_column or "custom_id",
                )


def _lines_of(source: PromptSource, rows: set[int]) -> dict[int, int]:
    """The lines of those rows, which the index does not keep; none for a file without lines."""
    up_to = takewhile(lambda row: row.line is not None, islice(read_rows(source), max(rows) + 1))
    return {row.row_id: row.line for row in up_to if row.row_id in rows and row.line}
